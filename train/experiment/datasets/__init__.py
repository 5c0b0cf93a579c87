"""The data sets. One is added here, as one entry of `DATASETS`.

All but ImageNet, which photos.py streams, fit into memory as uint8 arrays;
their test images are those of the data set's makers (digits: a fixed stratified
fifth), and the validation images are a fixed tenth of the training images.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from typing import NamedTuple

import keras

from experiment import startup
from experiment.datasets import sources
from experiment.datasets.arrays import Arrays
from experiment.datasets.arrays import Splits
from experiment.datasets.preprocessing import by_channel
from experiment.datasets.preprocessing import divided
from experiment.datasets.preprocessing import preprocessing
from experiment.datasets.preprocessing import standardized
from experiment.errors import UserError


class Dataset(NamedTuple):
    """A data set and the settings which train it well.

    Attributes:
        open: Its images for a run: settings to an `Arrays`, or to a stream
            that offers the same, such as `photos.Photos`. Raises a UserError
            if they are not there, or cannot be read.
        image_shape: Height, width and channels of its images.
        classes: How many there are.
        scaling: Makes the layer that scales pixels.
        model, epochs, batch_size, optimizer, warmup_epochs: As main.py's flags.
        mirror: Whether the model is to mirror images in training.
        streamed: Whether it does not fit into memory.
        images: Of a data set of which there are samples, all training images.
        crop_area: Of photos: the least share of one that its window has.
    """

    open: Callable[[SimpleNamespace], Any]
    image_shape: tuple[int, int, int]
    classes: int
    scaling: Callable[[], keras.layers.Layer]
    model: str
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    warmup_epochs: float = 0.0
    mirror: bool = False
    streamed: bool = False
    images: int = 0
    crop_area: float | None = None

    @property
    def image_size(self) -> int | None:
        """What photos are resized to; `None`: images have sizes of their own.

        As main.py's flag, like `crop_area`.
        """
        return self.image_shape[0] if self.streamed else None

    def preprocessing(
        self, input_shape: tuple[int, int, int], pad: int = 0
    ) -> list[keras.layers.Layer]:
        """The layers that turn its images into what a network sees.

        In training there are `pad` black pixels around an image.
        """
        return preprocessing(
            self.image_shape, input_shape, self.scaling, pad, self.mirror
        )

    def augmentation(
        self, input_shape: tuple[int, int, int], pad: int = 0
    ) -> str:
        """What is done to its images in training, in words; as above."""
        if self.streamed:
            return "random windows, mirrored"
        words = []
        if pad or input_shape != self.image_shape:
            padded = f" of images padded by {pad}" if pad else ""
            words.append("{}x{} crops".format(*input_shape) + padded)
        return ", ".join(words + ["mirrored"] * self.mirror) or "none"


def _in_memory(load: Callable[..., Splits], **about: Any) -> Dataset:
    """The entry of a data set that fits into memory.

    `load` takes `(image_shape, classes, data_dir, download)` to its parts.
    """

    def arrays(config: SimpleNamespace) -> Arrays:
        splits = load(
            about["image_shape"],
            about["classes"],
            config.data_dir,
            config.download,
        )
        return Arrays(
            splits, about["classes"] if config.label_smoothing else None
        )

    return Dataset(arrays, **about)


def _photos(config: SimpleNamespace) -> Any:
    """ImageNet, as a stream."""
    if config.download:
        raise UserError(
            f"--download: {config.dataset} cannot be fetched without an "
            "account. Leave it out, and prepare it as TensorFlow Datasets "
            "describes for --data_dir."
        )
    if not startup.installed("tensorflow", "tensorflow_datasets"):
        raise UserError(
            f"--dataset={config.dataset} is read by TensorFlow Datasets. "
            "Install tensorflow and tensorflow-datasets."
        )
    from experiment.datasets import photos

    return photos.Photos(
        config.data_dir,
        config.image_size,
        hold_out=not config.test,
        one_hot=bool(config.label_smoothing),
        crop_area=config.crop_area,
    )


DATASETS = {
    "digits": _in_memory(
        sources.load_digits,
        image_shape=(8, 8, 1),
        classes=10,
        scaling=functools.partial(divided, 16.0),
        model="digits",
        epochs=30,
        batch_size=32,
    ),
    "mnist": _in_memory(
        functools.partial(sources.load_folder, "mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        scaling=functools.partial(divided, 255.0),
        model="mnist",
        epochs=10,
        batch_size=128,
    ),
    "fashion_mnist": _in_memory(
        functools.partial(sources.load_folder, "fashion_mnist"),
        image_shape=(28, 28, 1),
        classes=10,
        scaling=functools.partial(divided, 255.0),
        model="mnist",
        epochs=20,
        batch_size=128,
    ),
    "cifar10": _in_memory(
        functools.partial(sources.load_folder, "cifar10"),
        image_shape=(32, 32, 3),
        classes=10,
        scaling=standardized,
        model="cifar10_1",
        epochs=50,
        batch_size=128,
        mirror=True,
    ),
    "imagenet2012": Dataset(
        _photos,
        image_shape=(224, 224, 3),
        classes=1000,
        scaling=by_channel,
        model="resnet18",
        epochs=90,
        batch_size=256,
        optimizer="sgd",
        warmup_epochs=5.0,
        streamed=True,
        images=1_281_167,
        crop_area=0.08,
    ),
}
