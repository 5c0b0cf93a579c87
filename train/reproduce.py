"""Runs what is missing of a column of the paper's table.

From the root of the project:

    python train/reproduce.py --column=mnist --data_dir=FOLDER
    python train/reproduce.py --column=cifar10_1 --methods=bp,fa --seeds=1

Each cell is one flag file, train/flags/<column>_<method>.flags, with seeds 0,
1, ... The program can be stopped and started again, and several of them can
work on one column at once. All flags of main.py may be added, and win over the
recipes; a change of a recipe needs a --runs_dir of its own. At the end:
python train/report.py <runs_dir>.
"""

import startup  # noqa: F401 - before anything imports Keras

# isort: split
import sys

import columns
import commandline
import sweep
from absl import flags
from errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_enum(
    "column",
    None,
    list(columns.COLUMNS),
    "Column of the table.",
    required=True,
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "methods",
    None,
    "Rows of the table, separated by commas. By default all of the column's.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "seeds", 3, "Runs of a cell.", lower_bound=1, flag_values=FLAGS
)


def jobs(rest: list[str]) -> list[sweep.Job]:
    """The runs of the column, the first seed of all methods first."""
    columns.refuse(rest, (*columns.SETTLED, "seed"))
    methods = columns.chosen_methods(FLAGS.column, FLAGS.methods)
    return [
        sweep.job(
            f"{FLAGS.column} {method} seed {seed}",
            [*columns.cell(FLAGS.column, method), f"--seed={seed}", *rest],
        )
        for seed in range(FLAGS.seeds)
        for method in methods
    ]


def reproduce(rest: list[str]) -> None:
    """Runs what is missing."""
    failed = sweep.run(jobs(rest))
    if failed:
        raise UserError(
            f"{len(failed)} runs failed: "
            + "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        )


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv,
        FLAGS,
        reproduce,
        __doc__,
        "The same command goes on from here.",
        others=True,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
