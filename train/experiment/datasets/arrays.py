"""A data set in memory, and its batches.

Batches are raw images. What is done to them (windows, mirroring, scaling) are
Keras layers at the front of the model, so that it happens on the model's
device, on any backend, and a saved model takes raw images.
"""

import contextlib
import dataclasses
import functools
from contextlib import AbstractContextManager
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from experiment.devices.one import Share


class Split(NamedTuple):
    """Images `(n, height, width, channels)` as uint8, labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: Split
    validation: Split
    test: Split


@dataclasses.dataclass(eq=False)
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

    split: Split
    batch_size: int
    steps_per_epoch: int
    seed: int
    first_step: int
    epochs: int
    share: Share = Share()

    def __post_init__(self) -> None:
        super().__init__()
        self.batch_size //= self.share.replicas
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

    There are as many steps as have room for all images; the rest of the
    arguments as of `TrainingBatches`.
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


class Arrays:
    """A data set in memory, in batches.

    Args:
        splits: Its three parts.
        classes: Their number, for labels that are one-hot; `None` (default):
            labels are class numbers.

    Attributes:
        training_images, validation_images, test_images: How many there are.
    """

    def __init__(self, splits: Splits, classes: int | None = None) -> None:
        if classes is not None:
            splits = Splits(
                *(
                    Split(x, keras.utils.to_categorical(y, classes))
                    for x, y in splits
                )
            )
        self._splits = splits
        self.training_images, self.validation_images, self.test_images = (
            len(split.labels) for split in splits
        )

    def training(self, share: Share, **options: Any) -> Any:
        """`TrainingBatches` of these options, for `fit`."""
        return feed(TrainingBatches(self._splits.train, share=share, **options))

    def validation(self, share: Share, batch_size: int, steps: int) -> Any:
        """`EvaluationBatches` of the validation images, for `evaluate`."""
        split = self._splits.validation
        return feed(EvaluationBatches(split, batch_size, steps, share), True)

    def test(self, share: Share, batch_size: int, steps: int) -> Any:
        """The same of the test images."""
        split = self._splits.test
        return feed(EvaluationBatches(split, batch_size, steps, share), True)

    def probe(self, n: int) -> Split:
        """The first n validation images, and their labels."""
        return Split(*(part[:n] for part in self._splits.validation))

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
