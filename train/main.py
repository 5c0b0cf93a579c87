"""Trains a network on a data set by one of the methods of the paper.

From the root of the project:

    python train/main.py --flagfile=digits_usf.flags
    python train/main.py --dataset=mnist --method=fa --download
    python train/main.py --helpfull

A bare flagfile name is looked up in the current folder, then in train/flags.
Flags given after a flagfile win over it. The run is written to the folder
<runs_dir>/<dataset>-<model>-<method>-s<seed>; experiment/runfolder says what is
in it.
"""

import sys

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from experiment import commandline
from experiment import settings
from experiment.run import train


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv,
        settings.FLAGS,
        lambda: train(settings.given()),
        __doc__,
        "--resume continues.",
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
