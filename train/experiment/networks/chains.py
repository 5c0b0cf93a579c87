"""The networks that are a chain of layers."""

from keras import KerasTensor
from keras.layers import LSTM
from keras.layers import Flatten
from keras.layers import GlobalAveragePooling2D
from keras.layers import MaxPooling2D
from keras.layers import Reshape
from keras.layers import ZeroPadding2D

from experiment.networks.layers import conv
from experiment.networks.layers import dense
from experiment.networks.layers import drop
from experiment.networks.layers import logits
from experiment.networks.layers import seeded_dropout


def digits(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """A small convnet for 8x8 images."""
    x = conv("conv1", 32, 3)(x)
    x = conv("conv2", 64, 3)(x)
    x = MaxPooling2D(2, name="pool1")(x)
    x = Flatten(name="flatten")(x)
    x = dense("fc1", 128)(x)
    return logits("fc2", classes)(drop(x, dropout))


def digits_lstm(
    x: KerasTensor, classes: int, dropout: float = 0.0
) -> KerasTensor:
    """An LSTM that reads an 8x8 image row by row, from the top.

    The recurrent kernel is orthogonal, as Keras's own.
    """
    x = Reshape((8, 8), name="rows")(x)
    x = LSTM(64, kernel_initializer="he_normal", unroll=True, name="lstm")(x)
    return logits("fc", classes)(drop(x, dropout))


def mnist(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """Two convolutions and two dense layers, 3.3 million parameters."""
    x = conv("conv1", 32, 5)(x)
    x = MaxPooling2D(2, name="pool1")(x)
    x = conv("conv2", 64, 5)(x)
    x = MaxPooling2D(2, name="pool2")(x)
    x = Flatten(name="flatten")(x)
    x = dense("fc1", 1024)(x)
    return logits("fc2", classes)(drop(x, dropout))


def cifar10_1(
    x: KerasTensor, classes: int, dropout: float = 0.0
) -> KerasTensor:
    """The net of the old TensorFlow tutorial, without its normalization."""
    x = conv("conv1", 64, 5)(x)
    x = MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)
    x = conv("conv2", 64, 5)(x)
    x = MaxPooling2D(3, strides=2, padding="same", name="pool2")(x)
    x = Flatten(name="flatten")(x)
    x = dense("fc1", 384)(x)
    x = dense("fc2", 192)(x)
    return logits("fc3", classes)(drop(x, dropout))


def cifar10_2(x: KerasTensor, classes: int) -> KerasTensor:
    """All-CNN-C of Springenberg et al. (2015), 1.4 million parameters.

    Convolutions with stride 2 stand where others pool; on 32x32 images the
    mean is taken over 6x6 places. The paper leaves the initialization open.
    """
    x = seeded_dropout("dropout1", 0.2)(x)
    x = conv("conv1", 96, 3)(x)
    x = conv("conv2", 96, 3)(x)
    x = conv("conv3", 96, 3, strides=2)(x)
    x = seeded_dropout("dropout2", 0.5)(x)
    x = conv("conv4", 192, 3)(x)
    x = conv("conv5", 192, 3)(x)
    x = conv("conv6", 192, 3, strides=2)(x)
    x = seeded_dropout("dropout3", 0.5)(x)
    x = conv("conv7", 192, 3, padding="valid")(x)
    x = conv("conv8", 192, 1)(x)
    x = conv("conv9", classes, 1)(x)
    return GlobalAveragePooling2D(dtype="float32", name="mean")(x)


def imagenet_1(
    x: KerasTensor, classes: int, dropout: float = 0.0
) -> KerasTensor:
    """The small convnet of Bartunov et al. (2018) for ImageNet.

    Kernel sizes, channels and strides are those of the network that Payeur et
    al. (2021) published as code, the only listing of this stack we could
    read. They pad nothing, so that 224x224 images end in a single place; ours
    pads to "same", takes images of any size, and reads out all 7x7 places,
    with 20.2 million parameters. ReLU and he_normal are our choice too.
    """
    convolutions = [
        # filters, kernel size, strides
        (48, 9, 4),
        (48, 3, 2),
        (96, 5, 1),
        (96, 3, 2),
        (192, 3, 1),
        (192, 3, 2),
        (384, 3, 1),
    ]
    for number, (filters, size, strides) in enumerate(convolutions, 1):
        x = conv(f"conv{number}", filters, size, strides)(x)
    x = Flatten(name="flatten")(x)
    return logits("fc8", classes)(drop(x, dropout))


def imagenet_2(x: KerasTensor, classes: int) -> KerasTensor:
    """AlexNet without local response normalization, 61.1 million parameters.

    Krizhevsky's network of one tower (2014), with the channels and dropout of
    torchvision's `alexnet`. That one averages its last maps to 6x6 places,
    which is what they are on 224x224 images; ours flattens them as they are,
    so that on images of another size `fc6` has another number of inputs.
    """
    x = ZeroPadding2D(2, name="pad1")(x)
    x = conv("conv1", 64, 11, strides=4, padding="valid")(x)
    x = MaxPooling2D(3, strides=2, name="pool1")(x)
    x = conv("conv2", 192, 5)(x)
    x = MaxPooling2D(3, strides=2, name="pool2")(x)
    x = conv("conv3", 384, 3)(x)
    x = conv("conv4", 256, 3)(x)
    x = conv("conv5", 256, 3)(x)
    x = MaxPooling2D(3, strides=2, name="pool5")(x)
    x = Flatten(name="flatten")(x)
    x = seeded_dropout("dropout6", 0.5)(x)
    x = dense("fc6", 4096)(x)
    x = seeded_dropout("dropout7", 0.5)(x)
    x = dense("fc7", 4096)(x)
    return logits("fc8", classes)(x)
