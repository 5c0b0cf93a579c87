"""Penalties that tie a forward kernel to a feedback kernel."""

from collections.abc import Callable

import keras
from keras import ops

from keras_fa._types import Identifier
from keras_fa._types import Tensor
from keras_fa.constraints import kernel_norm
from keras_fa.initializers import resolve


class FeedbackRegularizer(keras.regularizers.Regularizer):
    """Base class of penalties on a pair of feedback and forward kernel.

    Called with (stored feedback kernel, forward kernel); returns a scalar that
    is added to the loss. Its gradient moves the forward kernel.
    """

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} must implement "
            "__call__(feedback_kernel, kernel)."
        )


@keras.saving.register_keras_serializable(package="keras_fa")
class Alignment(FeedbackRegularizer):
    """BP + Alignment: `rate * (1 - cos(W, B_0))`, a penalty on the angle.

    It pulls the forward kernel towards the direction of a fixed random one, as
    feedback alignment does, while the error takes the exact path. The form of
    the penalty and its rate are our reading of the paper's name for it.

    Args:
        rate: Float of at least 0, the penalty at 90 degrees. Default 0.1.

    Raises:
        ValueError: If `rate` is negative.

    Example:

    ```python
    from keras_fa import FADense
    from keras_fa.regularizers import Alignment

    layer = FADense(
        10,
        feedback_constraint="tied_kernel",
        feedback_regularizer=Alignment(0.5),
    )
    ```
    """

    def __init__(self, rate: float = 0.1) -> None:
        if rate < 0:
            raise ValueError(
                f"`rate` must be at least 0. Received: rate={rate}"
            )
        self.rate = rate

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        # A kernel of zeros has no direction, and no gradient of one. The floor
        # keeps that of its norm finite.
        square = ops.sum(ops.square(kernel))
        cosine = ops.divide_no_nan(
            ops.sum(feedback_kernel * kernel),
            kernel_norm(feedback_kernel) * ops.sqrt(ops.maximum(square, 1e-30)),
        )
        return self.rate * (1.0 - ops.where(square > 0, cosine, 0.0))

    def get_config(self) -> dict:
        return {"rate": self.rate}


def get(identifier: Identifier) -> Callable | None:
    """Resolves a `feedback_regularizer`.

    Args:
        identifier: `None`, `"alignment"`, a regularizer, or what
            `keras.regularizers.get` takes.

    Returns:
        A regularizer, or `None`.
    """
    return resolve(identifier, {"alignment": Alignment}, keras.regularizers.get)
