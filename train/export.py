"""Writes a data set of TensorFlow Datasets as one file of NumPy arrays.

    python train/export.py --dataset=cifar10 --to=arrays --download
    python train/main.py --dataset=cifar10 --data_dir=arrays

The file <to>/<dataset>.npz is all that train/main.py needs of a data set, on
any backend; TensorFlow and TensorFlow Datasets are needed only here, and once.
A file that is there already is left as it is.
"""

import sys

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from absl import flags

from experiment import commandline
from experiment.datasets import DATASETS
from experiment.datasets import sources
from experiment.errors import UserError

# Flags of its own: those of train/main.py have the same names.
FLAGS = flags.FlagValues()
define = commandline.definers(FLAGS)

define.enum(
    "dataset",
    None,
    [
        name
        for name, dataset in DATASETS.items()
        if name != "digits" and not dataset.streamed
    ],
    "Data set to export (digits needs no file, imagenet2012 is too large).",
)
define.string(
    "to", None, "Folder to write <dataset>.npz to; made where it is not there."
)
define.string(
    "data_dir",
    None,
    "Folder of TensorFlow Datasets; its own default where not given "
    "($TFDS_DATA_DIR or ~/tensorflow_datasets).",
)
define.bool(
    "download",
    False,
    "Whether to fetch a data set that --data_dir does not hold.",
)


def export() -> None:
    """Reads the data set and writes it."""
    if not FLAGS.dataset or not FLAGS.to:
        raise UserError(
            "--dataset and --to are needed: python train/export.py "
            "--dataset=cifar10 --to=FOLDER. --helpfull lists all flags."
        )
    file = sources.array_file(FLAGS.dataset, FLAGS.to)
    if file.exists():
        raise UserError(
            f"{file}: exists already. Use it, delete it, or choose another "
            "folder with --to."
        )
    splits = sources.read_tfds(FLAGS.dataset, FLAGS.data_dir, FLAGS.download)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sources.write_arrays(file, *splits)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror or error}). Give a "
            "folder that can be written to with --to."
        ) from error
    train, test = (len(split.labels) for split in splits)
    print(
        f"{file}: {train} training and {test} test images, "
        f"{file.stat().st_size / 1e6:.1f} MB"
    )


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv, FLAGS, export, __doc__, "Nothing has been written."
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
