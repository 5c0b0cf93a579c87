"""The networks of the experiments, written with stock Keras layers.

A network is a function from a batch of images to logits, which are float32
whatever the dtype policy is. The kernels are he_normal; the layers have
explicit names, which appear in the alignment curves.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import KerasTensor
from keras.layers import Conv2D
from keras.layers import Dense
from keras.layers import Dropout
from keras.layers import Flatten
from keras.layers import GlobalAveragePooling2D
from keras.layers import MaxPooling2D


def digits(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """A small convnet for 8x8 images."""
    x = _conv("conv1", 32, 3)(x)
    x = _conv("conv2", 64, 3)(x)
    x = MaxPooling2D(2, name="pool1")(x)
    x = Flatten(name="flatten")(x)
    x = _dense("fc1", 128)(x)
    return _logits("fc2", classes)(_drop(x, dropout))


def mnist(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """Two convolutions and two dense layers, 3.3 million parameters."""
    x = _conv("conv1", 32, 5)(x)
    x = MaxPooling2D(2, name="pool1")(x)
    x = _conv("conv2", 64, 5)(x)
    x = MaxPooling2D(2, name="pool2")(x)
    x = Flatten(name="flatten")(x)
    x = _dense("fc1", 1024)(x)
    return _logits("fc2", classes)(_drop(x, dropout))


def cifar10_1(
    x: KerasTensor, classes: int, dropout: float = 0.0
) -> KerasTensor:
    """The net of the old TensorFlow tutorial, without its normalisation."""
    x = _conv("conv1", 64, 5)(x)
    x = MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)
    x = _conv("conv2", 64, 5)(x)
    x = MaxPooling2D(3, strides=2, padding="same", name="pool2")(x)
    x = Flatten(name="flatten")(x)
    x = _dense("fc1", 384)(x)
    x = _dense("fc2", 192)(x)
    return _logits("fc3", classes)(_drop(x, dropout))


def cifar10_2(x: KerasTensor, classes: int) -> KerasTensor:
    """All-CNN-C of Springenberg et al. (2015), 1.4 million parameters.

    Convolutions with stride 2 stand where others pool; on 32x32 images the
    mean is taken over 6x6 places. The paper leaves the initialisation open.
    """
    x = Dropout(0.2, name="dropout1")(x)
    x = _conv("conv1", 96, 3)(x)
    x = _conv("conv2", 96, 3)(x)
    x = _conv("conv3", 96, 3, strides=2)(x)
    x = Dropout(0.5, name="dropout2")(x)
    x = _conv("conv4", 192, 3)(x)
    x = _conv("conv5", 192, 3)(x)
    x = _conv("conv6", 192, 3, strides=2)(x)
    x = Dropout(0.5, name="dropout3")(x)
    x = _conv("conv7", 192, 3, padding="valid")(x)
    x = _conv("conv8", 192, 1)(x)
    x = _conv("conv9", classes, 1)(x)
    return GlobalAveragePooling2D(dtype="float32", name="mean")(x)


class Network(NamedTuple):
    """A network, the images it is made for, and the part of them it sees.

    Where `input_shape` is smaller than `image_shape` it sees random crops in
    training and the centre in evaluation. `drops` says whether `logits` takes
    a dropout rate for the inputs of the readout.
    """

    logits: Callable[..., KerasTensor]
    image_shape: tuple[int, int, int]
    input_shape: tuple[int, int, int]
    drops: bool = True


NETWORKS = {
    "digits": Network(digits, (8, 8, 1), (8, 8, 1)),
    "mnist": Network(mnist, (28, 28, 1), (28, 28, 1)),
    "cifar10_1": Network(cifar10_1, (32, 32, 3), (24, 24, 3)),
    "cifar10_2": Network(cifar10_2, (32, 32, 3), (32, 32, 3), drops=False),
}


def build(
    name: str,
    classes: int,
    preprocessing: Sequence[keras.layers.Layer] = (),
    *,
    kernel_scale: float = 1.0,
    dropout: float = 0.0,
) -> keras.Model:
    """Builds a network as one flat Functional model.

    Args:
        name: One of `NETWORKS`.
        classes: Number of logits.
        preprocessing: Layers that turn uint8 images into what the network
            sees. Default `()`: the model's input is that already.
        kernel_scale: The kernels are this many times he_normal. Default 1.
        dropout: Rate at which the inputs of the readout are dropped in
            training, for a network that `drops`. Default 0: no such layer.

    Returns:
        A model of float32 logits `(batch, classes)`. Its input is uint8 of
        the network's `image_shape` with preprocessing, float32 of its
        `input_shape` without.
    """
    network = NETWORKS[name]
    inputs = (
        keras.Input(network.image_shape, dtype="uint8")
        if preprocessing
        else keras.Input(network.input_shape, dtype="float32")
    )
    x = inputs
    for layer in preprocessing:
        x = layer(x)
    options = {"dropout": dropout} if dropout else {}
    logits = network.logits(x, classes, **options)
    model = keras.Model(inputs, logits, name=name)
    for layer in model.layers:
        if isinstance(layer, Conv2D | Dense):
            layer.kernel.assign(kernel_scale * layer.kernel)
    return model


def _conv(
    name: str, filters: int, size: int, strides: int = 1, padding: str = "same"
) -> Conv2D:
    return Conv2D(
        filters,
        size,
        strides=strides,
        padding=padding,
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


def _drop(x: KerasTensor, rate: float) -> KerasTensor:
    return Dropout(rate, name="dropout")(x) if rate else x
