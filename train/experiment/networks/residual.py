"""Residual networks: He et al. (2016), "Deep residual learning for image
recognition".

Strided layers pad as Keras's "same" does, at the right and bottom where PyTorch
pads on all sides.
"""

from collections.abc import Callable
from collections.abc import Sequence

from keras import KerasTensor
from keras.layers import Add
from keras.layers import AveragePooling2D
from keras.layers import MaxPooling2D
from keras.layers import ReLU
from keras.layers import ZeroPadding2D

from experiment.networks.layers import mean_logits
from experiment.networks.layers import normalized


def resnet18(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-18 of He et al. (2016), 11.7 million parameters."""
    x = _stages(_stem(x), _basic, 64, (2, 2, 2, 2), _projection)
    return mean_logits(x, classes, dropout)


def resnet50(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-50 of He et al. (2016), 25.6 million parameters.

    In version 1.5: the 3x3 convolution of a block takes the stride that the
    paper gives to the 1x1 convolution before it.
    """
    x = _stages(_stem(x), _bottleneck, 64, (3, 4, 6, 3), _projection)
    return mean_logits(x, classes, dropout)


def resnet20(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-20 of He et al. (2016) for CIFAR-10, 0.27 million parameters."""
    return _cifar_resnet(x, classes, dropout, blocks=3)


def resnet56(x: KerasTensor, classes: int, dropout: float = 0.0) -> KerasTensor:
    """ResNet-56 of He et al. (2016) for CIFAR-10, 0.85 million parameters."""
    return _cifar_resnet(x, classes, dropout, blocks=9)


Shortcut = Callable[[str, KerasTensor, int, int], KerasTensor]


Block = Callable[[str, KerasTensor, int, int, Shortcut], KerasTensor]


def _stem(x: KerasTensor) -> KerasTensor:
    x = ReLU(name="relu1")(normalized("conv1", x, 64, 7, strides=2))
    return MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)


def _cifar_resnet(
    x: KerasTensor, classes: int, dropout: float, blocks: int
) -> KerasTensor:
    x = ReLU(name="relu1")(normalized("conv1", x, 16, 3))
    x = _stages(x, _basic, 16, 3 * (blocks,), _padding)
    return mean_logits(x, classes, dropout)


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
    y = normalized(f"{name}_conv1", x, filters, 3, strides)
    y = ReLU(name=f"{name}_relu1")(y)
    y = normalized(f"{name}_conv2", y, filters, 3)
    return _merge(name, shortcut(name, x, filters, strides), y)


def _bottleneck(
    name: str, x: KerasTensor, filters: int, strides: int, shortcut: Shortcut
) -> KerasTensor:
    y = normalized(f"{name}_conv1", x, filters, 1)
    y = ReLU(name=f"{name}_relu1")(y)
    y = normalized(f"{name}_conv2", y, filters, 3, strides)
    y = ReLU(name=f"{name}_relu2")(y)
    y = normalized(f"{name}_conv3", y, 4 * filters, 1)
    return _merge(name, shortcut(name, x, 4 * filters, strides), y)


def _merge(name: str, x: KerasTensor, y: KerasTensor) -> KerasTensor:
    return ReLU(name=f"{name}_relu")(Add(name=f"{name}_add")([x, y]))


def _projection(
    name: str, x: KerasTensor, filters: int, strides: int
) -> KerasTensor:
    """Option B: a 1x1 convolution where the shape changes."""
    if x.shape[-1] == filters and strides == 1:
        return x
    return normalized(f"{name}_shortcut", x, filters, 1, strides)


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
