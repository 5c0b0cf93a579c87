"""The networks, written with stock Keras layers. One is added here, as one
entry of `NETWORKS`.

A network is a function from a batch of images to logits, which are float32
whatever the dtype policy is. The kernels are he_normal, but for recurrent ones;
the layers have explicit names, which appear in the alignment curves.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import keras
from keras import KerasTensor
from keras.layers import BatchNormalization
from keras.layers import Conv2D
from keras.layers import Dense
from keras.layers import ReLU

from experiment.errors import UserError
from experiment.networks import chains
from experiment.networks import residual
from experiment.networks.layers import normalization as normalization_of


class Network(NamedTuple):
    """A network, the images it is made for, and the part of them it sees.

    Where `input_shape` is smaller than `image_shape` it sees random crops in
    training and the centre in evaluation. `drops` says whether `logits` takes
    a dropout rate for the inputs of the readout, `normalizes` whether it has
    BatchNormalization of its own; a network that has none is a chain of
    layers. `least_size` is the side of the smallest images that `resized`
    takes; None: a network of one size. `pad` is how many black pixels there are
    around an image in training, out of which it sees a window.
    """

    logits: Callable[..., KerasTensor]
    image_shape: tuple[int, int, int]
    input_shape: tuple[int, int, int]
    drops: bool = True
    normalizes: bool = False
    least_size: int | None = None
    pad: int = 0

    @property
    def windowed(self) -> bool:
        """Whether it sees random windows of images in training."""
        return bool(self.pad) or self.input_shape != self.image_shape

    @property
    def resizable(self) -> bool:
        """Whether it takes images of another size than its own."""
        return self.least_size is not None

    def resized(self, image_size: int) -> "Network":
        """The network for square images of another size.

        Raises:
            UserError: If they are too small.
            ValueError: If it is not `resizable`.
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
    "digits": Network(chains.digits, (8, 8, 1), (8, 8, 1)),
    "digits_lstm": Network(chains.digits_lstm, (8, 8, 1), (8, 8, 1)),
    "mnist": Network(chains.mnist, (28, 28, 1), (28, 28, 1)),
    "cifar10_1": Network(chains.cifar10_1, _CIFAR, (24, 24, 3)),
    "cifar10_2": Network(chains.cifar10_2, _CIFAR, _CIFAR, drops=False),
    "resnet20": Network(
        residual.resnet20, _CIFAR, _CIFAR, normalizes=True, pad=4
    ),
    "resnet56": Network(
        residual.resnet56, _CIFAR, _CIFAR, normalizes=True, pad=4
    ),
    # The maps shrink 32 times; what they shrink to must be a place at least.
    "imagenet_1": Network(
        chains.imagenet_1, _IMAGENET, _IMAGENET, least_size=32
    ),
    "imagenet_2": Network(
        chains.imagenet_2, _IMAGENET, _IMAGENET, drops=False, least_size=63
    ),
    "resnet18": Network(
        residual.resnet18, _IMAGENET, _IMAGENET, normalizes=True, least_size=32
    ),
    "resnet50": Network(
        residual.resnet50, _IMAGENET, _IMAGENET, normalizes=True, least_size=32
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
        preprocessing: Layers that turn uint8 images of the network's
            `image_shape` into the `input_shape` that it sees. Default `()`:
            the model takes the latter, in float32.
        image_size: Side of the images in pixels, for a network that is
            `resizable`. Default `None`: the network's own.
        kernel_scale, dropout, normalization: As main.py's flags.
        synchronized: Whether BatchNormalization takes its statistics over
            the whole batch that a `tf.distribute` strategy shares out.

    Raises:
        UserError: If the images are too small for the network, or it has no
            ReLU for `normalization`.
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
        logits = _with_batch_normalization(name, plain, x)
    else:
        logits = network.logits(x, classes, **options)
    model = keras.Model(inputs, logits, name=name)
    for layer in model.layers:
        for weight in layer.weights if kernel_scale != 1 else ():
            if weight.name.endswith("kernel"):
                weight.assign(kernel_scale * weight)
        if isinstance(layer, BatchNormalization):
            layer.synchronized = synchronized
    return model


def _with_batch_normalization(
    name: str, plain: keras.Model, x: KerasTensor
) -> KerasTensor:
    """The chain of a model's layers, with BatchNormalization in it."""
    _, *layers = plain.layers
    *hidden, _ = [one for one in layers if isinstance(one, Conv2D | Dense)]
    if not hidden:
        raise UserError(
            f"--normalization=batch: {name} has no hidden ReLU to put "
            "BatchNormalization in front of. Leave it out, or choose another "
            "--model."
        )
    for layer in layers:
        config = layer.get_config()
        if layer not in hidden:
            x = type(layer).from_config(config)(x)
            continue
        config |= {"activation": None, "use_bias": False}
        x = type(layer).from_config(config)(x)
        x = normalization_of(layer.name)(x)
        x = ReLU(name=f"{layer.name}_relu")(x)
    return x
