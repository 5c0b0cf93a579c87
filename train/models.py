"""The networks of the experiments, written with stock Keras layers.

Each builder returns logits in float32 whatever the dtype policy is. The
kernels are he_normal; the layers have explicit names, which appear in the
alignment curves.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
from keras.layers import Conv2D
from keras.layers import Dense
from keras.layers import Flatten
from keras.layers import MaxPooling2D


def digits(input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """A small convnet for 8x8 images."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            _conv("conv1", 32, 3),
            _conv("conv2", 64, 3),
            MaxPooling2D(2, name="pool1"),
            Flatten(name="flatten"),
            _dense("fc1", 128),
            _logits("fc2", classes),
        ],
        name="digits",
    )


def mnist(input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Two convolutions and two dense layers, 3.3 million parameters."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            _conv("conv1", 32, 5),
            MaxPooling2D(2, name="pool1"),
            _conv("conv2", 64, 5),
            MaxPooling2D(2, name="pool2"),
            Flatten(name="flatten"),
            _dense("fc1", 1024),
            _logits("fc2", classes),
        ],
        name="mnist",
    )


def cifar10_1(input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """The net of the old TensorFlow tutorial, without its normalisation."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            _conv("conv1", 64, 5),
            MaxPooling2D(3, strides=2, padding="same", name="pool1"),
            _conv("conv2", 64, 5),
            MaxPooling2D(3, strides=2, padding="same", name="pool2"),
            Flatten(name="flatten"),
            _dense("fc1", 384),
            _dense("fc2", 192),
            _logits("fc3", classes),
        ],
        name="cifar10_1",
    )


class Network(NamedTuple):
    """A network, the images it is made for, and the part of them it sees.

    Where `input_shape` is smaller than `image_shape` it sees random crops in
    training and the centre in evaluation.
    """

    build: Callable[[tuple[int, int, int], int], keras.Model]
    image_shape: tuple[int, int, int]
    input_shape: tuple[int, int, int]


NETWORKS = {
    "digits": Network(digits, (8, 8, 1), (8, 8, 1)),
    "mnist": Network(mnist, (28, 28, 1), (28, 28, 1)),
    "cifar10_1": Network(cifar10_1, (32, 32, 3), (24, 24, 3)),
}


def _conv(name: str, filters: int, size: int) -> Conv2D:
    return Conv2D(
        filters,
        size,
        padding="same",
        activation="relu",
        kernel_initializer="he_normal",
        name=name,
    )


def _dense(name: str, units: int) -> Dense:
    return Dense(
        units, activation="relu", kernel_initializer="he_normal", name=name
    )


def _logits(name: str, classes: int) -> Dense:
    return Dense(
        classes, kernel_initializer="he_normal", dtype="float32", name=name
    )
