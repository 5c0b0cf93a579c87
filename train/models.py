"""The networks of the experiments, written with stock Keras layers.

A network is a function from a batch of images to logits, which are float32
whatever the dtype policy is. The kernels are he_normal; the layers have
explicit names, which appear in the alignment curves.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import keras
from errors import UserError
from keras import KerasTensor
from keras.layers import Add
from keras.layers import AveragePooling2D
from keras.layers import BatchNormalization
from keras.layers import Conv2D
from keras.layers import Dense
from keras.layers import Dropout
from keras.layers import Flatten
from keras.layers import GlobalAveragePooling2D
from keras.layers import MaxPooling2D
from keras.layers import ReLU
from keras.layers import ZeroPadding2D


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
        x = _conv(f"conv{number}", filters, size, strides)(x)
    x = Flatten(name="flatten")(x)
    return _logits("fc8", classes)(_drop(x, dropout))


def imagenet_2(x: KerasTensor, classes: int) -> KerasTensor:
    """AlexNet without local response normalisation, 61.1 million parameters.

    Krizhevsky's network of one tower (2014), with the channels and dropout of
    torchvision's `alexnet`. That one averages its last maps to 6x6 places,
    which is what they are on 224x224 images; ours flattens them as they are,
    so that on images of another size `fc6` has another number of inputs.
    """
    x = ZeroPadding2D(2, name="pad1")(x)
    x = _conv("conv1", 64, 11, strides=4, padding="valid")(x)
    x = MaxPooling2D(3, strides=2, name="pool1")(x)
    x = _conv("conv2", 192, 5)(x)
    x = MaxPooling2D(3, strides=2, name="pool2")(x)
    x = _conv("conv3", 384, 3)(x)
    x = _conv("conv4", 256, 3)(x)
    x = _conv("conv5", 256, 3)(x)
    x = MaxPooling2D(3, strides=2, name="pool5")(x)
    x = Flatten(name="flatten")(x)
    x = Dropout(0.5, name="dropout6")(x)
    x = _dense("fc6", 4096)(x)
    x = Dropout(0.5, name="dropout7")(x)
    x = _dense("fc7", 4096)(x)
    return _logits("fc8", classes)(x)


def resnet18(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-18 of He et al. (2016), 11.7 million parameters."""
    x = _stages(_stem(x), _basic, 64, (2, 2, 2, 2), _projection)
    return _mean_logits(x, classes, dropout)


def resnet50(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-50 of He et al. (2016), 25.6 million parameters.

    In version 1.5: the 3x3 convolution of a block takes the stride that the
    paper gives to the 1x1 convolution before it.
    """
    x = _stages(_stem(x), _bottleneck, 64, (3, 4, 6, 3), _projection)
    return _mean_logits(x, classes, dropout)


def resnet20(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-20 of He et al. (2016) for CIFAR-10, 0.27 million parameters."""
    return _cifar_resnet(x, classes, dropout, blocks=3)


def resnet56(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-56 of He et al. (2016) for CIFAR-10, 0.85 million parameters."""
    return _cifar_resnet(x, classes, dropout, blocks=9)


class Network(NamedTuple):
    """A network, the images it is made for, and the part of them it sees.

    Where `input_shape` is smaller than `image_shape` it sees random crops in
    training and the centre in evaluation. `drops` says whether `logits` takes
    a dropout rate for the inputs of the readout, `normalizes` whether it has
    BatchNormalization of its own; a network that has none is a chain of
    layers. `least_size` is the side of the smallest images that `resized`
    takes; None: a network of one size.
    """

    logits: Callable[..., KerasTensor]
    image_shape: tuple[int, int, int]
    input_shape: tuple[int, int, int]
    drops: bool = True
    normalizes: bool = False
    least_size: int | None = None

    @property
    def resizable(self) -> bool:
        """Whether it takes images of another size than its own."""
        return self.least_size is not None

    def resized(self, image_size: int) -> "Network":
        """The network for square images of another size.

        Args:
            image_size: Side of the images in pixels.

        Raises:
            UserError: If it is `resizable`, but not down to this size.
            ValueError: If it is not `resizable`, which main.py checks.
        """
        if not self.resizable:
            raise ValueError(f"{self.logits.__name__} takes one size only.")
        if image_size < self.least_size:
            raise UserError(
                f"--image_size={image_size} is too small for "
                f"{self.logits.__name__}. Give at least {self.least_size}, or "
                "choose another --model."
            )
        shape = (image_size, image_size, self.image_shape[-1])
        return self._replace(image_shape=shape, input_shape=shape)


_CIFAR = (32, 32, 3)
_IMAGENET = (224, 224, 3)

NETWORKS = {
    "digits": Network(digits, (8, 8, 1), (8, 8, 1)),
    "mnist": Network(mnist, (28, 28, 1), (28, 28, 1)),
    "cifar10_1": Network(cifar10_1, _CIFAR, (24, 24, 3)),
    "cifar10_2": Network(cifar10_2, _CIFAR, _CIFAR, drops=False),
    "resnet20": Network(resnet20, _CIFAR, _CIFAR, normalizes=True),
    "resnet56": Network(resnet56, _CIFAR, _CIFAR, normalizes=True),
    # The maps shrink 32 times; what they shrink to must be a place at least.
    "imagenet_1": Network(imagenet_1, _IMAGENET, _IMAGENET, least_size=32),
    "imagenet_2": Network(
        imagenet_2, _IMAGENET, _IMAGENET, drops=False, least_size=63
    ),
    "resnet18": Network(
        resnet18, _IMAGENET, _IMAGENET, normalizes=True, least_size=32
    ),
    "resnet50": Network(
        resnet50, _IMAGENET, _IMAGENET, normalizes=True, least_size=32
    ),
}


def build(
    name: str,
    classes: int,
    preprocessing: Sequence[keras.layers.Layer] = (),
    *,
    image_size: int | None = None,
    kernel_scale: float = 1.0,
    dropout: float = 0.0,
    normalization: str = "none",
    synchronized: bool = False,
) -> keras.Model:
    """Builds a network as one flat Functional model.

    Args:
        name: One of `NETWORKS`.
        classes: Number of logits.
        preprocessing: Layers that turn uint8 images into what the network
            sees. Default `()`: the model's input is that already.
        image_size: Side of the images in pixels, for a network that is
            `resizable`; main.py refuses it for the others. Default `None`:
            the network's own, which is 224 for those of ImageNet.
        kernel_scale: The kernels are this many times he_normal. Default 1.
        dropout: Rate at which the inputs of the readout are dropped in
            training, for a network that `drops`. Default 0: no such layer.
        normalization: "batch" puts BatchNormalization in front of the ReLU
            of each hidden layer with a kernel, in place of its bias; main.py
            refuses it for a network that `normalizes`. Default "none".
        synchronized: Whether BatchNormalization takes its statistics over
            the whole batch where a `tf.distribute` strategy shares it out
            (TensorFlow only), as one device would. Default: it does not.

    Returns:
        A model of float32 logits `(batch, classes)`. Its input is uint8 of
        the network's `image_shape` with preprocessing, float32 of its
        `input_shape` without.

    Raises:
        UserError: If the images are too small for the network.
    """
    network = NETWORKS[name]
    if image_size is not None:
        network = network.resized(image_size)
    inputs = (
        keras.Input(network.image_shape, dtype="uint8")
        if preprocessing
        else keras.Input(network.input_shape, dtype="float32")
    )
    x = inputs
    for layer in preprocessing:
        x = layer(x)
    options = {"dropout": dropout} if dropout else {}
    if normalization == "batch":
        seen = keras.Input(network.input_shape, dtype="float32")
        plain = keras.Model(seen, network.logits(seen, classes, **options))
        logits = _with_batch_normalization(plain, x)
    else:
        logits = network.logits(x, classes, **options)
    model = keras.Model(inputs, logits, name=name)
    for layer in model.layers:
        if isinstance(layer, Conv2D | Dense) and kernel_scale != 1:
            layer.kernel.assign(kernel_scale * layer.kernel)
        if isinstance(layer, BatchNormalization):
            layer.synchronized = synchronized
    return model


def _with_batch_normalization(
    plain: keras.Model, x: KerasTensor
) -> KerasTensor:
    """The chain of a model's layers, with BatchNormalization in it."""
    _, *layers = plain.layers
    *hidden, _ = [one for one in layers if isinstance(one, Conv2D | Dense)]
    for layer in layers:
        config = layer.get_config()
        if layer not in hidden:
            x = type(layer).from_config(config)(x)
            continue
        config |= {"activation": None, "use_bias": False}
        x = type(layer).from_config(config)(x)
        x = _normalization(layer.name)(x)
        x = ReLU(name=f"{layer.name}_relu")(x)
    return x


def _normalization(name: str) -> BatchNormalization:
    return BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")


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


# Residual networks: He et al. (2016), "Deep residual learning for image
# recognition". Strided layers pad as Keras's "same" does, at the right and
# bottom where PyTorch pads on all sides.

Shortcut = Callable[[str, KerasTensor, int, int], KerasTensor]
Block = Callable[[str, KerasTensor, int, int, Shortcut], KerasTensor]


def _stem(x: KerasTensor) -> KerasTensor:
    x = ReLU(name="relu1")(_normalized("conv1", x, 64, 7, strides=2))
    return MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)


def _cifar_resnet(
    x: KerasTensor, classes: int, dropout: float, blocks: int
) -> KerasTensor:
    x = ReLU(name="relu1")(_normalized("conv1", x, 16, 3))
    x = _stages(x, _basic, 16, 3 * (blocks,), _padding)
    return _mean_logits(x, classes, dropout)


def _stages(
    x: KerasTensor,
    block: Block,
    filters: int,
    blocks: Sequence[int],
    shortcut: Shortcut,
) -> KerasTensor:
    """Each stage but the first has half the places and twice the filters."""
    for stage, count in enumerate(blocks):
        for number in range(count):
            strides = 2 if stage and not number else 1
            name = f"stage{stage + 1}_block{number + 1}"
            x = block(name, x, filters * 2**stage, strides, shortcut)
    return x


def _basic(
    name: str, x: KerasTensor, filters: int, strides: int, shortcut: Shortcut
) -> KerasTensor:
    y = _normalized(f"{name}_conv1", x, filters, 3, strides)
    y = ReLU(name=f"{name}_relu1")(y)
    y = _normalized(f"{name}_conv2", y, filters, 3)
    return _merge(name, shortcut(name, x, filters, strides), y)


def _bottleneck(
    name: str, x: KerasTensor, filters: int, strides: int, shortcut: Shortcut
) -> KerasTensor:
    y = _normalized(f"{name}_conv1", x, filters, 1)
    y = ReLU(name=f"{name}_relu1")(y)
    y = _normalized(f"{name}_conv2", y, filters, 3, strides)
    y = ReLU(name=f"{name}_relu2")(y)
    y = _normalized(f"{name}_conv3", y, 4 * filters, 1)
    return _merge(name, shortcut(name, x, 4 * filters, strides), y)


def _merge(name: str, x: KerasTensor, y: KerasTensor) -> KerasTensor:
    return ReLU(name=f"{name}_relu")(Add(name=f"{name}_add")([x, y]))


def _projection(
    name: str, x: KerasTensor, filters: int, strides: int
) -> KerasTensor:
    """Option B: a 1x1 convolution where the shape changes."""
    if x.shape[-1] == filters and strides == 1:
        return x
    return _normalized(f"{name}_shortcut", x, filters, 1, strides)


def _padding(
    name: str, x: KerasTensor, filters: int, strides: int
) -> KerasTensor:
    """Option A, without parameters: every other place, and zero channels."""
    if x.shape[-1] == filters and strides == 1:
        return x
    missing = filters - x.shape[-1]
    x = AveragePooling2D(1, strides=strides, name=f"{name}_shortcut")(x)
    # Of (width, channels), the last two axes, it pads the channels.
    return ZeroPadding2D(
        ((0, 0), (missing // 2, missing - missing // 2)),
        data_format="channels_first",
        name=f"{name}_shortcut_pad",
    )(x)


def _normalized(
    name: str, x: KerasTensor, filters: int, size: int, strides: int = 1
) -> KerasTensor:
    x = Conv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
    return _normalization(name)(x)


def _mean_logits(x: KerasTensor, classes: int, dropout: float) -> KerasTensor:
    x = GlobalAveragePooling2D(name="mean")(x)
    return _logits("fc", classes)(_drop(x, dropout))
