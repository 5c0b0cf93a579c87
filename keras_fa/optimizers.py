"""An optimizer that feedback alignment gains by."""

import math
import re

import keras
from keras import ops

from keras_fa._types import Tensor


@keras.saving.register_keras_serializable(package="keras_fa")
class Muon(keras.optimizers.Muon):
    """Keras's `Muon`, for the kernels of convolutions, too.

    With `G = U S V^T` the momentum of a kernel's gradients, a step goes along
    `U V^T`: as far in the directions in which little error arrives as in the
    others, and through random feedback error arrives in few. Keras's own takes
    such steps for dense kernels and leaves those of convolutions to AdamW;
    here they are matrices that have a column for each filter, as dense kernels
    have one for each unit. AdamW is left with biases, with what has but one
    row or column, and with `exclude_layers`, where the readout belongs.

    Args:
        learning_rate: As of `keras.optimizers.Muon`, like all arguments. A
            rate that suits Adam suits it, too.
        weight_decay: Of orthogonal steps; decoupled. Default 0.004.
        adam_weight_decay: Of AdamW's. Default 0.004.
        exclude_layers: Regular expressions, searched in the paths of
            variables (`"fc2/kernel"`).

    References:
        Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural
        networks"; the length of a step is that of Liu et al. (2025). That FA
        gains by it is what we measured; the paper does not use it.

    Example:

    ```python
    import numpy as np
    import keras
    import keras_fa

    stock = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="readout"),
        ]
    )
    model = keras_fa.convert(stock, "fa")
    model.compile(
        keras_fa.optimizers.Muon(1e-3, exclude_layers=["readout/"]), "mse"
    )
    model.fit(np.ones((32, 8, 8, 1)), np.zeros((32, 4)), verbose=0)
    ```
    """

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        *rows, columns = (1, *variable.shape)
        return min(math.prod(rows), columns) < 2 or any(
            re.search(name, variable.path) for name in self.exclude_layers
        )

    def zeropower_via_newtonschulz5(self, x: Tensor, steps: int) -> Tensor:
        """`U V^T` of a kernel's matrix, nearly, in the kernel's shape."""
        return ops.reshape(
            super().zeropower_via_newtonschulz5(_matrix(x), steps), x.shape
        )

    def lr_adjust(self, x: Tensor) -> Tensor:
        """The step times `sqrt(longer side) * rms_rate`."""
        return ops.reshape(super().lr_adjust(_matrix(x)), x.shape)


def _matrix(kernel: Tensor) -> Tensor:
    return ops.reshape(kernel, (-1, kernel.shape[-1]))
