"""Makes the paper's table, and figures, of many runs.

    python train/report.py <runs_dir>

It reads `result.json` and `history.csv` of every run below the folder, prints
a table for each data set and network, and writes it to <runs_dir>/report,
as table.md, with these figures, each as PNG and SVG:

    <dataset>-<model>-errors            test error of each method
    <dataset>-<model>-learning_curves   validation error over training
    <dataset>-<model>-angles            angles of each layer over training, of
                                        runs with --alignment_every

A row is a method. Ours is the mean of the test error in percent over the
seeds, their sample standard deviation, and their number; beside it stand the
figures of the paper and of others. A gap is the error less that of BP in the
same table. A dagger marks what is not 2 points better than Frozen in the same
table, whose hidden kernels do not learn. "open" is where others have a figure
and we have no run to show. A setting that a run does not say, for it is
younger, is at its default.

Runs that are damaged, unfinished or of a search without a test error are named
and skipped. A method whose runs differ in what is learned and not in the seed
alone, or that has two of one seed, is named and left out.
"""

import sys
from pathlib import Path

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from experiment.commandline import HELP
from experiment.errors import UserError
from experiment.table.report import report


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    if HELP.intersection(argv) or "-h" in argv:
        print(__doc__)
        return 0
    if len(argv) != 2:
        print("usage: python train/report.py <runs_dir>", file=sys.stderr)
        return 2
    try:
        report(Path(argv[1]).expanduser())
    except UserError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
