"""The data sets: where they come from, how they are split and prepared.

Every data set is a table entry. All but ImageNet, which photos.py streams, fit
into memory as uint8 arrays; their test images are those of the data set's
makers (digits: a fixed stratified fifth), and the validation images are a fixed
tenth of the training images.

Batches are raw images. What is done to them (windows, mirroring, scaling) are
Keras layers at the front of the model, so that it happens on the model's
device, on any backend, and a saved model takes raw images.
"""

import contextlib
import functools
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from typing import NamedTuple

import files
import keras
import numpy as np
import startup
from errors import UserError
from strategies import Share


class Split(NamedTuple):
    """Images `(n, height, width, channels)` as uint8, labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: Split
    validation: Split
    test: Split


class Dataset(NamedTuple):
    """A data set and the settings which train it well."""

    load: Callable[[str | None, bool], Splits] | None  # None: it is a stream
    image_shape: tuple[int, int, int]
    classes: int
    scaling: Callable[[], keras.layers.Layer]  # of pixels
    mirror: bool  # whether the model is to mirror images in training
    model: str
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    warmup_epochs: float = 0.0


# Where the images come from.


def load_digits(data_dir: str | None, download: bool) -> Splits:
    """The 1797 handwritten digits that come with scikit-learn."""
    del data_dir, download
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


def load_folder(name: str, data_dir: str | None, download: bool) -> Splits:
    """A data set from its file of arrays, or else from TensorFlow Datasets."""
    if data_dir is not None and array_file(name, data_dir).exists():
        rest, test = read_arrays(name, array_file(name, data_dir))
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

    Args:
        name: The data set's.
        data_dir: The folder it is prepared in; `None`: TFDS's own default.
        download: Whether to fetch it where it is not there.

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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} could not be {'fetched' if download else 'read'} "
            f"({type(error).__name__}: {reason}). Check --data_dir"
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


def read_arrays(name: str, file: Path) -> tuple[Split, Split]:
    """Reads what `write_arrays` has written, and checks that it fits.

    Args:
        name: The data set's.
        file: The archive.

    Raises:
        UserError: If it is damaged, or holds something else.
    """
    dataset = DATASETS[name]
    try:
        with np.load(file) as arrays:
            train, test = (
                Split(arrays[f"{part}_images"], arrays[f"{part}_labels"])
                for part in ("train", "test")
            )
        for images, labels in (train, test):
            if images.dtype != np.uint8:
                raise ValueError(f"images of {images.dtype}, not uint8")
            if images.shape[1:] != dataset.image_shape:
                raise ValueError(
                    f"images of shape {images.shape[1:]}, not "
                    f"{dataset.image_shape}"
                )
            if labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"{len(images)} images, {labels.shape} labels")
            if (
                not np.issubdtype(labels.dtype, np.integer)
                or labels.min() < 0
                or labels.max() >= dataset.classes
            ):
                raise ValueError(f"labels beyond 0 to {dataset.classes - 1}")
    except (
        OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{file}: damaged, or no {name} as train/export.py writes it "
            f"({reason}). Delete it and export it again."
        ) from error
    return train, test


def _folder(name: str) -> Callable[[str | None, bool], Splits]:
    return functools.partial(load_folder, name)


def _divided(white: float) -> keras.layers.Layer:
    return keras.layers.Rescaling(1 / white, dtype="float32", name="rescale")


def _standardized() -> keras.layers.Layer:
    return keras.layers.LayerNormalization(
        axis=[1, 2, 3],
        center=False,
        scale=False,
        dtype="float32",
        name="standardize",
    )


def _by_channel() -> keras.layers.Layer:
    """ImageNet's own mean and variance of each colour."""
    return keras.layers.Normalization(
        mean=[255 * mean for mean in (0.485, 0.456, 0.406)],
        variance=[(255 * std) ** 2 for std in (0.229, 0.224, 0.225)],
        dtype="float32",
        name="standardize",
    )


DATASETS = {
    "digits": Dataset(
        load_digits,
        image_shape=(8, 8, 1),
        classes=10,
        scaling=functools.partial(_divided, 16.0),
        mirror=False,
        model="digits",
        epochs=30,
        batch_size=32,
    ),
    "mnist": Dataset(
        _folder("mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        scaling=functools.partial(_divided, 255.0),
        mirror=False,
        model="mnist",
        epochs=10,
        batch_size=128,
    ),
    "fashion_mnist": Dataset(
        _folder("fashion_mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        scaling=functools.partial(_divided, 255.0),
        mirror=False,
        model="mnist",
        epochs=20,
        batch_size=128,
    ),
    "cifar10": Dataset(
        _folder("cifar10"),
        image_shape=(32, 32, 3),
        classes=10,
        scaling=_standardized,
        mirror=True,
        model="cifar10_1",
        epochs=50,
        batch_size=128,
    ),
    "imagenet2012": Dataset(
        None,
        image_shape=(224, 224, 3),
        classes=1000,
        scaling=_by_channel,
        mirror=False,
        model="resnet18",
        epochs=90,
        batch_size=256,
        optimizer="sgd",
        warmup_epochs=5.0,
    ),
}


# What becomes of them.


def preprocessing(
    dataset: Dataset, input_shape: tuple[int, int, int]
) -> list[keras.layers.Layer]:
    """The layers that turn uint8 images into what a network sees.

    In training they cut another window out of each image and mirror every
    second one or so; otherwise they cut out the centre.

    Args:
        dataset: Whose images they are.
        input_shape: Height, width and channels of the network's input.
    """
    layers = []
    if dataset.image_shape != input_shape:
        layers += [
            # RandomCrop would cut the same window out of a whole batch.
            keras.layers.RandomTranslation(
                *(
                    _shift(size, seen)
                    for size, seen in zip(
                        dataset.image_shape[:2], input_shape[:2], strict=True
                    )
                ),
                interpolation="nearest",
                dtype="float32",
                name="shift",
            ),
            keras.layers.CenterCrop(
                *input_shape[:2], dtype="float32", name="crop"
            ),
        ]
    if dataset.mirror:
        layers.append(
            keras.layers.RandomFlip("horizontal", dtype="float32", name="flip")
        )
    layers.append(dataset.scaling())
    return layers


def _shift(size: int, seen: int) -> float:
    """The share of an image by which the window may leave the centre.

    Shifts are rounded to pixels: all are equally likely up to the margin, and
    none is beyond it, where the image would have to be made up.
    """
    return ((size - seen) // 2 + 0.49) / size


class TrainingBatches(keras.utils.PyDataset):
    """The raw batches of all epochs, one after the other.

    A batch depends on nothing but the seed, the number of the epoch and the
    step in it, so that a resumed run sees what an uninterrupted one would have
    seen.

    Args:
        split: The images and labels.
        batch_size: Images in a step, a multiple of the replicas.
        steps_per_epoch: Steps in an epoch, which leaves the rest out.
        seed: Of the order.
        first_step: The step to begin with, counted over all epochs.
        epochs: The epoch to end before.
        share: The replicas that get a batch each, one after the other in each
            step. Default: all images of a step are one batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
        first_step: int,
        epochs: int,
        share: Share = Share(),
    ) -> None:
        super().__init__()
        self.split = split
        self.batch_size = batch_size // share.replicas
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.first_step = first_step
        self.epochs = epochs
        self.share = share
        self._order = functools.lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        return generator.permutation(len(self.split.labels))

    def __len__(self) -> int:
        steps = self.epochs * self.steps_per_epoch - self.first_step
        return steps * self.share.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        step, replica = divmod(index, self.share.count)
        epoch, step = divmod(self.first_step + step, self.steps_per_epoch)
        place = step * self.share.replicas + self.share.first + replica
        start = place * self.batch_size
        rows = self._order(epoch)[start : start + self.batch_size]
        return self.split.images[rows], self.split.labels[rows]


class EvaluationBatches(keras.utils.PyDataset):
    """All images of a split once, in batches of one size.

    What fills the last batches are zeros of weight 0. Images weigh as much
    more than 1 as brings the sum to that of full batches, so that the mean of
    Keras's losses over the batches is the mean over the images.

    Args:
        split: The images and labels.
        batch_size: Images in a step, a multiple of the replicas.
        steps: Steps in which all images have room.
        share: As of `TrainingBatches`.
    """

    def __init__(
        self, split: Split, batch_size: int, steps: int, share: Share = Share()
    ) -> None:
        super().__init__()
        self.split = split
        self.batch_size = batch_size // share.replicas
        self.steps = steps
        self.share = share
        self.weight = steps * batch_size / len(split.labels)

    def __len__(self) -> int:
        return self.steps * self.share.count

    def __getitem__(
        self, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step, replica = divmod(index, self.share.count)
        place = step * self.share.replicas + self.share.first + replica
        start = place * self.batch_size
        images, labels = (
            _padded(part[start : start + self.batch_size], self.batch_size)
            for part in self.split
        )
        real = start + np.arange(self.batch_size) < len(self.split.labels)
        return images, labels, np.float32(self.weight) * real


def _padded(part: np.ndarray, size: int) -> np.ndarray:
    filling = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
    return np.concatenate([part, filling])


def feed(batches: keras.utils.PyDataset, again: bool = False) -> Any:
    """Batches of one size in the form that `fit` is fastest with.

    Keras tells TensorFlow nothing of the size of a PyDataset's batches, and
    the steps of a convnet on a CPU are slower then than at a fixed size.

    Args:
        batches: The batches.
        again: Whether they come again and again, where `fit` cannot know how
            many there are.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    dataset = tf.data.Dataset.from_generator(
        lambda: (batches[i] for i in range(len(batches))),
        output_signature=tuple(
            tf.TensorSpec(part.shape, part.dtype) for part in batches[0]
        ),
    )
    if again:
        dataset = dataset.repeat()
    return dataset.prefetch(tf.data.AUTOTUNE)


# What a run trains on: the same of a data set in memory and of a stream.


class Arrays:
    """A data set in memory, in batches.

    Args:
        splits: Its three parts.
        classes: Their number, for labels that are one-hot; `None` (default):
            labels are class numbers.

    Attributes:
        training_images, validation_images: How many there are.
        skipped: The names of the images that could not be read: none.
    """

    def __init__(self, splits: Splits, classes: int | None = None) -> None:
        self._splits = splits
        self._classes = classes
        self.training_images = len(splits.train.labels)
        self.validation_images = len(splits.validation.labels)
        self.skipped: set[str] = set()

    @property
    def test_images(self) -> int:
        """How many there are to test on."""
        return len(self._splits.test.labels)

    def training(self, share: Share, **options: Any) -> Any:
        """`TrainingBatches` of these options, for `fit`."""
        return feed(
            TrainingBatches(
                self._labeled(self._splits.train), share=share, **options
            )
        )

    def validation(self, share: Share, batch_size: int, steps: int) -> Any:
        """`EvaluationBatches` of the validation images, for `evaluate`."""
        split = self._labeled(self._splits.validation)
        return feed(EvaluationBatches(split, batch_size, steps, share), True)

    def test(self, share: Share, batch_size: int, steps: int) -> Any:
        """The same of the test images."""
        split = self._labeled(self._splits.test)
        return feed(EvaluationBatches(split, batch_size, steps, share), True)

    def probe(self, n: int) -> Split:
        """The first n validation images, and their labels."""
        split = self._labeled(self._splits.validation)
        return Split(*(part[:n] for part in split))

    def _labeled(self, split: Split) -> Split:
        if self._classes is None:
            return split
        labels = keras.utils.to_categorical(split.labels, self._classes)
        return Split(split.images, labels)

    def reading(self) -> AbstractContextManager:
        """A scope in which a file that cannot be read is an error of one line.

        All of this data set's are read already.
        """
        return contextlib.nullcontext()


def evaluation_steps(
    images: int, largest: int, replicas: int, multiple: int
) -> tuple[int, int]:
    """Batches for the evaluation of a number of images.

    Args:
        images: How many there are.
        largest: Images in a step at most, or one for each replica.
        replicas: A batch is a multiple of them.
        multiple: So are the steps of this.

    Returns:
        Images in a step, and steps.
    """
    each = -(-images // -(-images // largest))
    batch_size = -(-each // replicas) * replicas
    steps = -(-images // batch_size)
    return batch_size, -(-steps // multiple) * multiple
