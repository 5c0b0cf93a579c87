"""Searches the recipe of each cell of a column of the paper's table.

From the root of the project:

    python train/search.py --column=mnist --data_dir=FOLDER --runs_dir=FOLDER

Every method is given the same budget: one run of each --point of a grid, with
one seed and --epochs epochs. The point of least validation error is chosen; the
test images are not looked at. Prints a table of the validation errors and, with
--write, writes the flag files of the cells. Like reproduce.py, it goes on where
it was, in several processes if need be.
"""

import startup  # noqa: F401 - before anything imports Keras

# isort: split
import sys
from pathlib import Path

import columns
import commandline
import files
import runs
import sweep
from absl import flags
from errors import UserError

from keras_fa.methods import METHODS

FLAGS = flags.FlagValues()
columns.define_flags(FLAGS)
flags.DEFINE_multi_string(
    "point",
    ["--kernel_scale=1", "--kernel_scale=0.1"],
    "A point of the grid: flags of main.py, separated by spaces. May be given "
    "several times. (Steps of adam do not depend on the scale of B_0 or of "
    "DFA's maps; they do on that of DenseFA's maps.)",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "runs_dir",
    "runs/search",
    "Folder for the runs, with a folder for each point of the grid.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "write",
    False,
    "Whether to write the flag files of the cells.",
    flag_values=FLAGS,
)


def search(rest: list[str]) -> None:
    """Runs the grid for each method and says what is best."""
    recipe = [name for name in runs.FIXED_SETTINGS if name != "backend"]
    settled = (*columns.SETTLED, "test", "notest", "seed")
    columns.refuse(rest, (*settled, *recipe), "A --point is where a recipe is.")
    for point in FLAGS.point:
        others = [f for f in point.split() if columns.name(f) not in recipe]
        columns.refuse(
            others,
            tuple(map(columns.name, others)),
            f"A --point holds flags of {', '.join(recipe)}.",
        )
    methods = columns.chosen_methods(FLAGS.column, FLAGS.methods)
    jobs = {
        (method, point): sweep.job(
            f"{FLAGS.column} {method} {point}",
            [
                *columns.unsearched(FLAGS.column, method),
                *point.split(),
                "--notest",
                "--alignment_every=0",
                f"--runs_dir={_folder(point)}",
                *rest,
            ],
        )
        for method in methods
        for point in FLAGS.point
    }
    failed = sweep.run(list(jobs.values()))
    columns.fail({n: f for n, f in failed.items() if not f.diverged})
    results = {cell: sweep.result(job) for cell, job in jobs.items()}
    missing = [
        job.name
        for cell, job in jobs.items()
        if results[cell] is None and job.name not in failed
    ]
    print(table(methods, results))
    if FLAGS.write and missing:
        raise UserError(
            f"No flag file is written before the search is at its end; "
            f"{len(missing)} runs are missing: {', '.join(missing)}. Give the "
            "same command again."
        )
    if FLAGS.write:
        for method in methods:
            write(method, results)


def _folder(point: str) -> Path:
    name = point.replace("--", "").replace(" ", ",")
    return Path(FLAGS.runs_dir) / FLAGS.column / name


def table(methods: list[str], results: dict) -> str:
    """The validation errors in percent, the least of each method marked.

    A point that diverged, or that another process is at, has none.
    """
    lines = [["validation error, %", *(f"`{point}`" for point in FLAGS.point)]]
    lines.append(["---"] * len(lines[0]))
    for method in methods:
        best = choose(method, results)
        lines.append([method])
        for point in FLAGS.point:
            found = results[method, point]
            text = f"{found['validation_error']:.2f}" if found else "-"
            lines[-1].append(f"**{text}**" if point == best else text)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def choose(method: str, results: dict) -> str | None:
    """The point of least validation error, the first one of equals."""
    errors = {
        point: results[method, point]["validation_error"]
        for point in FLAGS.point
        if results[method, point] is not None
    }
    return min(errors, key=errors.get) if errors else None


def write(method: str, results: dict) -> None:
    """Writes the flag file of a cell."""
    best = choose(method, results)
    if best is None:
        raise UserError(
            f"{FLAGS.column} {method}: every --point diverged, so no flag "
            "file is written. Give other points."
        )
    found = results[method, best]
    fixed = columns.unsearched(FLAGS.column, method)
    searched = {columns.name(flag) for flag in best.split()}
    file = commandline.FLAGFILES / f"{FLAGS.column}_{method}.flags"
    lines = [
        f"# {METHODS[method].title}, column {FLAGS.column} of the paper's "
        "table.",
        f"# Searched: {best}, of least validation error "
        f"({found['validation_error']:.2f} %,",
        f"# {found['epochs']} epoch(s), seed {found['seed']}) among "
        f"{' | '.join(FLAGS.point)}.",
        *(
            f"# Diverged: {point}"
            for point in FLAGS.point
            if results[method, point] is None
        ),
        *(flag for flag in fixed if columns.name(flag) not in searched),
        *best.split(),
    ]
    text = "\n".join(lines) + "\n"
    files.replace(file, lambda aside: aside.write_text(text, "utf-8"))
    print(f"Wrote {file}.")


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv,
        FLAGS,
        search,
        __doc__,
        "The same command goes on from here.",
        others=True,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
