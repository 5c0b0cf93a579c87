"""Runs what is missing of a column of the paper's table.

From the root of the project:

    python train/reproduce.py --column=mnist --data_dir=FOLDER
    python train/reproduce.py --column=cifar10_1 --methods=bp,fa --seeds=1

Each cell is one flag file, train/flags/<column>_<method>.flags, with seeds 0,
1, ... The program can be stopped and started again, and several of them can
work on one column at once. Other flags of main.py may be added, and win over
the recipes; a changed recipe needs a --runs_dir of its own. At the end:
python train/report.py <runs_dir>.
"""

import startup  # noqa: F401 - before anything imports Keras

# isort: split
import sys

import columns
import commandline
import sweep
from absl import flags

FLAGS = flags.FlagValues()
columns.define_flags(FLAGS)
flags.DEFINE_integer(
    "seeds", 3, "Runs of a cell.", lower_bound=1, flag_values=FLAGS
)


def jobs(rest: list[str]) -> list[sweep.Job]:
    """The runs of the column, the first seed of all methods first."""
    columns.refuse(
        rest,
        (*columns.SETTLED, "seed"),
        "The column says what is run; --methods and --seeds choose.",
    )
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
    columns.fail(sweep.run(jobs(rest)))


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
