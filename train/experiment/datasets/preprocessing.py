"""The layers between raw images and a network: windows, mirroring, scaling."""

from collections.abc import Callable

import keras


def divided(white: float) -> keras.layers.Layer:
    """Pixels from 0 to 1."""
    return keras.layers.Rescaling(1 / white, dtype="float32", name="rescale")


def standardized() -> keras.layers.Layer:
    """Each image of mean 0 and variance 1."""
    return keras.layers.LayerNormalization(
        axis=[1, 2, 3],
        center=False,
        scale=False,
        dtype="float32",
        name="standardize",
    )


def by_channel() -> keras.layers.Layer:
    """ImageNet's own mean and variance of each colour."""
    return keras.layers.Normalization(
        mean=[255 * mean for mean in (0.485, 0.456, 0.406)],
        variance=[(255 * std) ** 2 for std in (0.229, 0.224, 0.225)],
        dtype="float32",
        name="standardize",
    )


def preprocessing(
    image_shape: tuple[int, int, int],
    input_shape: tuple[int, int, int],
    scaling: Callable[[], keras.layers.Layer],
    pad: int = 0,
    mirror: bool = False,
) -> list[keras.layers.Layer]:
    """The layers that turn uint8 images into what a network sees.

    In training they cut another window out of each image, padded with so many
    black pixels, and mirror every second one or so; otherwise they cut out the
    centre.
    """
    layers = []
    if pad or image_shape != input_shape:
        layers += [
            # RandomCrop would cut the same window out of a whole batch.
            keras.layers.RandomTranslation(
                *(
                    _shift(size, seen, pad)
                    for size, seen in zip(image_shape[:2], input_shape[:2])
                ),
                fill_mode="constant",
                interpolation="nearest",
                dtype="float32",
                name="shift",
            ),
            keras.layers.CenterCrop(
                *input_shape[:2], dtype="float32", name="crop"
            ),
        ]
    if mirror:
        layers.append(
            keras.layers.RandomFlip("horizontal", dtype="float32", name="flip")
        )
    layers.append(scaling())
    return layers


def _shift(size: int, seen: int, pad: int) -> float:
    """The share of an image by which the window may leave the centre.

    Shifts are rounded to pixels: all are equally likely up to the margin, and
    none is beyond it.
    """
    return ((size - seen) // 2 + pad + 0.49) / size
