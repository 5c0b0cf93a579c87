"""The data sets: where they come from, how they are split and prepared.

Every data set is a table entry and fits into memory as uint8 arrays. The test
images are those of the data set's makers (digits: a fixed stratified fifth);
the validation images are a fixed tenth of the training images.

The order of the images and their augmentation depend on nothing but the seed
and the number of the epoch, so that a resumed run sees what an uninterrupted
one would have seen.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from errors import UserError


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

    load: Callable[[str | None, bool], Splits]
    image_shape: tuple[int, int, int]
    classes: int
    white: float | None  # pixels are divided by it; None: standardise images
    mirror: bool  # a mirrored image is still one of its class
    model: str
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    warmup_epochs: float = 0.0


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


def load_tfds(name: str, data_dir: str | None, download: bool) -> Splits:
    """A data set of TensorFlow Datasets with splits `train` and `test`."""
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
        if not download and not os.path.isdir(data_dir):
            raise UserError(
                f"--data_dir={data_dir}: no such folder. Give the TensorFlow "
                f"Datasets folder that holds {name}, or add --download to "
                "fetch it into a new one."
            )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if download:
            builder.download_and_prepare()
        elif not builder.is_prepared():
            raise UserError(
                f"{builder.data_dir}: no {name} is prepared there. Give the "
                "TensorFlow Datasets folder that holds it with --data_dir, or "
                "add --download to fetch it."
            )
        rest, test = (
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
    cut = len(rest.labels) - len(rest.labels) // 10
    return Splits(
        Split(rest.images[:cut], rest.labels[:cut]),
        Split(rest.images[cut:], rest.labels[cut:]),
        test,
    )


def _tfds(name: str) -> Callable[[str | None, bool], Splits]:
    return lambda data_dir, download: load_tfds(name, data_dir, download)


DATASETS = {
    "digits": Dataset(
        load_digits,
        image_shape=(8, 8, 1),
        classes=10,
        white=16.0,
        mirror=False,
        model="digits",
        epochs=30,
        batch_size=32,
    ),
    "mnist": Dataset(
        _tfds("mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        white=255.0,
        mirror=False,
        model="mnist",
        epochs=10,
        batch_size=128,
    ),
    "fashion_mnist": Dataset(
        _tfds("fashion_mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        white=255.0,
        mirror=False,
        model="mnist",
        epochs=20,
        batch_size=128,
    ),
    "cifar10": Dataset(
        _tfds("cifar10"),
        image_shape=(32, 32, 3),
        classes=10,
        white=None,
        mirror=True,
        model="cifar10_1",
        epochs=50,
        batch_size=128,
    ),
}


def prepare(
    images: tf.Tensor,
    dataset: Dataset,
    input_shape: tuple[int, int, int],
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Turns a uint8 batch into what the network sees.

    Args:
        images: the batch.
        dataset: whose images they are.
        input_shape: height, width and channels of the network's input.
        seed: the augmentation's; without one the centre is cut out and
            nothing is mirrored.
    """
    height, width, _ = input_shape
    if seed is None:
        top = (dataset.image_shape[0] - height) // 2
        left = (dataset.image_shape[1] - width) // 2
        images = images[:, top : top + height, left : left + width]
    else:
        crop_seed, mirror_seed = tf.unstack(tf.random.split(seed, 2))
        if dataset.image_shape != input_shape:
            images = _random_crop(images, height, width, crop_seed)
        if dataset.mirror:
            images = _random_mirror(images, mirror_seed)
    images = tf.cast(images, tf.float32)
    if dataset.white is None:
        return tf.image.per_image_standardization(images)
    return images / dataset.white


def _random_crop(
    images: tf.Tensor, height: int, width: int, seed: tf.Tensor
) -> tf.Tensor:
    """Cuts another window out of each image."""
    for axis, size, axis_seed in zip(
        (1, 2), (height, width), tf.unstack(tf.random.split(seed, 2)),
        strict=True,
    ):  # fmt: skip
        start = tf.random.stateless_uniform(
            [tf.shape(images)[0], 1],
            axis_seed,
            maxval=images.shape[axis] - size + 1,
            dtype=tf.int32,
        )
        images = tf.gather(
            images, start + tf.range(size), axis=axis, batch_dims=1
        )
    return images


def _random_mirror(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors every second image or so, left to right."""
    coin = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seed)
    return tf.where(coin < 0.5, images, images[:, :, ::-1])


def training_batches(
    split: Split,
    dataset: Dataset,
    input_shape: tuple[int, int, int],
    *,
    batch_size: int,
    steps_per_epoch: int,
    seed: int,
    first_epoch: int,
    epochs: int,
) -> tf.data.Dataset:
    """The batches of the epochs `first_epoch` to `epochs - 1`, one by one."""
    with tf.device("CPU:0"):
        images, labels = tf.constant(split.images), tf.constant(split.labels)

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split.labels)), seed=[seed, epoch]
        )

        def one_batch(step, rows):
            step_seed = tf.random.fold_in([seed, epoch], step)
            x = prepare(
                tf.gather(images, rows), dataset, input_shape, step_seed
            )
            return x, tf.gather(labels, rows)

        return (
            tf.data.Dataset.from_tensor_slices(order)
            .batch(batch_size, drop_remainder=True)
            .take(steps_per_epoch)
            .enumerate()
            .map(one_batch, num_parallel_calls=tf.data.AUTOTUNE)
        )

    return (
        tf.data.Dataset.range(first_epoch, epochs)
        .flat_map(one_epoch)
        .prefetch(tf.data.AUTOTUNE)
    )


def evaluation_batches(
    split: Split,
    dataset: Dataset,
    input_shape: tuple[int, int, int],
    batch_size: int,
) -> tf.data.Dataset:
    """All of a split, in its own order, as the network sees it."""

    def one_batch(images, labels):
        return prepare(images, dataset, input_shape), labels

    with tf.device("CPU:0"):
        batches = tf.data.Dataset.from_tensor_slices(tuple(split))
    return (
        batches.batch(batch_size)
        .map(one_batch, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def probe_batch(
    split: Split,
    dataset: Dataset,
    input_shape: tuple[int, int, int],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a split, as the network sees them, and labels."""
    batches = evaluation_batches(split, dataset, input_shape, size)
    images, labels = next(iter(batches))
    return images.numpy(), labels.numpy()
