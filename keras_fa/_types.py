"""What the signatures of this package speak of, whatever the backend."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import TypeAlias

import keras

# A tensor of the backend, an array, or a Keras variable read as one. Backends
# share no class for it.
Tensor: TypeAlias = Any

# What Keras resolves: a name, a config, an instance, a function.
Identifier: TypeAlias = str | Mapping | Callable | None

# Draws the first value of a weight: (shape, dtype) -> tensor.
Draw: TypeAlias = Callable[..., Tensor]

# A linear operation: (x, kernels, biases) -> y.
LinearOp: TypeAlias = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]

# A rule: the kernels W of an operation -> the kernels B that carry its error.
Feedback: TypeAlias = Callable[[list[Tensor]], list[Tensor]]

# What B learns from: the gradients of kernels W -> those of kernels B, if any.
Learn: TypeAlias = Callable[[list[Tensor]], list[Tensor] | None]


class Learned(NamedTuple):
    """Kernels B that are made of weights that the same step trains.

    Attributes:
        used: What carries the error.
        receiving: The same, what the gradient of B arrives at.
    """

    used: list[Tensor]
    receiving: list[Tensor]


# Of x if it is wanted, of kernels, of biases, and of the kernels B where these
# learn.
Gradients: TypeAlias = tuple[
    Tensor | None, list[Tensor], list[Tensor], list[Tensor] | None
]

# Layer.add_weight, or what stands for it.
AddWeight: TypeAlias = Callable[..., keras.Variable]

# Where Keras keeps what a layer saves: a mapping of names to arrays.
Store: TypeAlias = Any
