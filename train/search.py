"""Searches the recipe of each cell of a column of the paper's table.

From the root of the project:

    python train/search.py --column=mnist --data_dir=FOLDER --runs_dir=FOLDER

Every method is given the same budget: one run of each --point of a grid, with
one seed and --epochs epochs, of which --halving spares what does worst early
on. The point of least validation error is chosen; the test images are not
looked at. Prints a table of the validation errors and, with
--write, writes the flag files of the cells. Like reproduce.py, it goes on where
it was, in several processes if need be.

    python train/search.py --column=digits --nosearch

writes the flag files that a column lacks, such as those of a new method, with
the column's own recipe.
"""

import sys
from pathlib import Path

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from absl import flags

from experiment import commandline
from experiment.errors import UserError
from experiment.table import columns
from experiment.table.grid import Grid

FLAGS = flags.FlagValues()
columns.define_flags(FLAGS)
define = commandline.definers(FLAGS)
define.multi_string(
    "point",
    ["--kernel_scale=1", "--kernel_scale=0.1"],
    "A point of the grid: flags of main.py, separated by spaces. May be given "
    "several times. (Steps of adam do not depend on the scale of B_0 or of "
    "DFA's maps; they do on that of DenseFA's maps.)",
)
define.string(
    "runs_dir",
    "runs/search",
    "Folder for the runs, with a folder for each point of the grid.",
)
define.bool(
    "halving",
    False,
    "Whether the worse half of a method's points is given up after 1, 2, 4, "
    "... epochs (successive halving).",
)
define.bool("write", False, "Whether to write the flag files of the cells.")
define.bool(
    "search",
    True,
    "Whether to search. --nosearch writes the flag files that are missing, "
    "with the recipe that all cells of the column share.",
)


def search(rest: list[str]) -> None:
    """Runs the grid for each method and says what is best."""
    methods = columns.chosen_methods(FLAGS.column, FLAGS.methods)
    if not FLAGS.search:
        for method in methods:
            if not columns.file_of(FLAGS.column, method).exists():
                recipe = columns.unsearched(FLAGS.column, method)
                columns.write(FLAGS.column, method, ["Not searched."], recipe)
        return
    grid = Grid(
        FLAGS.column,
        methods,
        FLAGS.point,
        Path(FLAGS.runs_dir),
        rest,
        FLAGS.halving,
    )
    missing = grid.search()
    print(grid.table())
    if FLAGS.write and missing:
        raise UserError(
            f"No flag file is written before the search is at its end; "
            f"{len(missing)} runs are missing: {', '.join(missing)}. Give the "
            "same command again."
        )
    if FLAGS.write:
        for method in methods:
            grid.write(method)


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
