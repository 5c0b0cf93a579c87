"""Runs what is missing of a column of the paper's table.

From the root of the project:

    python train/reproduce.py --column=mnist --data_dir=FOLDER
    python train/reproduce.py --column=cifar10_1 --methods=bp,fa --seeds=1
    python train/reproduce.py --column=mnist --data_dir=FOLDER --hours=2 \\
        --finished=train/results/mnist

Each cell is one flag file, train/flags/<column>_<method>.flags, with seeds 0,
1, ... The first seed of all cells comes first, and of one seed the run that is
done soonest, as far as the times are known. The program can be stopped and
started again, and several of them can work on one column at once. Other flags
of main.py may be added, and win over the recipes; a changed recipe needs a
--runs_dir of its own. At the end: python train/report.py <runs_dir>.
"""

import math
import sys
import time
from pathlib import Path

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from absl import flags

from experiment import commandline
from experiment.errors import UserError
from experiment.table import columns
from experiment.table import sweep

FLAGS = flags.FlagValues()
columns.define_flags(FLAGS)
define = commandline.definers(FLAGS)
define.integer("seeds", 3, "Runs of a cell.", lower_bound=1)
define.float(
    "hours",
    None,
    "Time to work, above 0. No run is begun that would not be finished by "
    "then, as long as the epochs of its kind have taken; what is left is named "
    "at the end. By default until all is done.",
)
flags.register_validator(
    "hours",
    lambda value: value is None or 0 < value < math.inf,
    "it must be a finite number above 0",
    flag_values=FLAGS,
)
define.string(
    "finished",
    None,
    "Folder of runs, such as train/results/mnist. What is finished there is "
    "not run again, while this program works in --runs_dir.",
)


def jobs(rest: list[str]) -> list[sweep.Job]:
    """The runs of the column, the first seed of all methods first."""
    columns.refuse(
        rest,
        (*columns.SETTLED, "seed"),
        "The column says what is run; --methods and --seeds choose.",
    )
    finished = None
    if FLAGS.finished is not None:
        finished = Path(FLAGS.finished).expanduser()
        if not finished.is_dir():
            raise UserError(
                f"--finished={FLAGS.finished}: no such folder. Give one with "
                "folders of runs, such as train/results/mnist, or leave it out."
            )
    methods = columns.chosen_methods(FLAGS.column, FLAGS.methods)
    return [
        sweep.job(
            f"{FLAGS.column} {method} seed {seed}",
            [*columns.cell(FLAGS.column, method), f"--seed={seed}", *rest],
            finished,
        )
        for seed in range(FLAGS.seeds)
        for method in methods
    ]


def reproduce(rest: list[str]) -> None:
    """Runs what is missing."""
    hours = math.inf if FLAGS.hours is None else FLAGS.hours
    deadline = time.monotonic() + 3600 * hours
    columns.fail(sweep.run(jobs(rest), deadline))


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
