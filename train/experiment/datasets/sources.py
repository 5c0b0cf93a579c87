"""Where arrays come from: scikit-learn, a file, or TensorFlow Datasets."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from experiment import files
from experiment import startup
from experiment.datasets.arrays import Split
from experiment.datasets.arrays import Splits
from experiment.errors import UserError
from experiment.errors import reason


def load_digits(*of_others: object) -> Splits:
    """The 1797 handwritten digits that come with scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)

    def split(images, labels, fraction):
        a, b, a_labels, b_labels = train_test_split(
            images, labels, test_size=fraction, stratify=labels, random_state=0
        )
        return Split(a, a_labels), Split(b, b_labels)

    rest, test = split(images, labels, 0.2)
    train, validation = split(*rest, 0.1)
    return Splits(train, validation, test)


def load_folder(
    name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    data_dir: str | None,
    download: bool,
) -> Splits:
    """A data set from its file of arrays, or else from TensorFlow Datasets."""
    if data_dir is not None and array_file(name, data_dir).exists():
        file = array_file(name, data_dir)
        rest, test = read_arrays(file, image_shape, classes)
    else:
        rest, test = read_tfds(name, data_dir, download)
    cut = len(rest.labels) - len(rest.labels) // 10
    return Splits(
        Split(rest.images[:cut], rest.labels[:cut]),
        Split(rest.images[cut:], rest.labels[cut:]),
        test,
    )


def read_tfds(
    name: str, data_dir: str | None, download: bool
) -> tuple[Split, Split]:
    """The splits `train` and `test` of a data set of TensorFlow Datasets.

    Raises:
        UserError: If it is not there, or cannot be fetched or read.
    """
    if data_dir is not None:
        data_dir = str(Path(data_dir).expanduser())
    if not startup.installed("tensorflow", "tensorflow_datasets"):
        raise UserError(
            f"--data_dir={data_dir}: no {name}.npz is there, and TensorFlow "
            "Datasets is not installed. Install tensorflow and "
            "tensorflow-datasets, or make the file where they are: python "
            f"train/export.py --dataset={name} --to=FOLDER."
        )
    import tensorflow_datasets as tfds

    if data_dir is not None and not download and not Path(data_dir).is_dir():
        raise UserError(
            f"--data_dir={data_dir}: no such folder. Give the one that holds "
            f"{name}, as TensorFlow Datasets or train/export.py wrote it, or "
            "add --download to fetch it into a new one."
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if download:
            builder.download_and_prepare()
        elif not builder.is_prepared():
            raise UserError(
                f"{builder.data_dir}: no {name} is prepared there. Give the "
                "folder that holds it with --data_dir, as TensorFlow Datasets "
                "or train/export.py wrote it, or add --download to fetch it."
            )
        train, test = (
            Split(part["image"].numpy(), part["label"].numpy())
            for part in builder.as_dataset(
                split=["train", "test"], batch_size=-1
            )
        )
    except UserError:
        raise
    except Exception as error:  # network, disk, checksums, torn files, ...
        raise UserError(
            f"{name} could not be {'fetched' if download else 'read'} "
            f"({reason(error)}). Check --data_dir"
            + (" and the network." if download else ", or use --download.")
        ) from error
    return train, test


def array_file(name: str, folder: str) -> Path:
    """The file of arrays of a data set in a folder."""
    return Path(folder).expanduser() / f"{name}.npz"


def write_arrays(file: Path, train: Split, test: Split) -> None:
    """Writes the two splits of a data set as a compressed NumPy archive."""
    files.replace(
        file,
        lambda aside: np.savez_compressed(
            aside,
            train_images=train.images,
            train_labels=train.labels,
            test_images=test.images,
            test_labels=test.labels,
        ),
    )


def read_arrays(
    file: Path, image_shape: tuple[int, int, int], classes: int
) -> tuple[Split, Split]:
    """Reads what `write_arrays` has written, and checks that it fits.

    Raises:
        UserError: If it is damaged, or holds something else.
    """
    try:
        with np.load(file) as arrays:
            train, test = (
                Split(arrays[f"{part}_images"], arrays[f"{part}_labels"])
                for part in ("train", "test")
            )
        for images, labels in (train, test):
            if images.dtype != np.uint8:
                raise ValueError(f"images of {images.dtype}, not uint8")
            if images.shape[1:] != image_shape:
                raise ValueError(
                    f"images of shape {images.shape[1:]}, not {image_shape}"
                )
            if labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"{len(images)} images, {labels.shape} labels")
            if (
                not np.issubdtype(labels.dtype, np.integer)
                or labels.min() < 0
                or labels.max() >= classes
            ):
                raise ValueError(f"labels beyond 0 to {classes - 1}")
    except (
        OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise UserError(
            f"{file}: damaged, or no {file.stem} as train/export.py writes it "
            f"({reason(error)}). Delete it and export it again."
        ) from error
    return train, test
