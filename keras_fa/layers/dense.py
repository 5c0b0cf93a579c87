"""Dense FA layers."""

import keras
import numpy as np

from keras_fa.layers.feedback import FeedbackLayer


@keras.saving.register_keras_serializable(package="keras_fa")
class FADense(FeedbackLayer, keras.layers.Dense):
    """`keras.layers.Dense` with a feedback kernel.

    `y = activation(x W + b)`; the error `dy` at the pre-activation goes down
    as `dx = dy B^T`; `dW = x^T dy` and `db = sum(dy)` are exact.

    Args:
        units: Positive integer, as for `Dense`, and all of its arguments
            except `lora_rank` and `quantization_config`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Dense`. Kernel and feedback kernel have
    the shape `(input_dim, units)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Dense` does.

    Source: Lillicrap et al. (2016); Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FADense

    layer = FADense(4, activation="relu")
    y = layer(np.ones((2, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape == (3, 4)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAEinsumDense(FeedbackLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a feedback kernel.

    `y = activation(einsum(equation, x, W) + b)`; the error goes down through
    the same contraction with B in the place of W.

    Args:
        equation: String, as for `EinsumDense`, and all of its arguments except
            `lora_rank` and `quantization_config`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `EinsumDense`. Kernel and feedback kernel
    have the shape that the equation gives the kernel.

    Raises:
        ValueError: For LoRA and quantization, and as `EinsumDense` does.

    Source: Lillicrap et al. (2016), for a general linear layer.

    Example:

    ```python
    import numpy as np
    from keras_fa import FAEinsumDense

    layer = FAEinsumDense("abc,cd->abd", output_shape=(None, 4))
    y = layer(np.ones((2, 5, 3), "float32"))
    assert layer.feedback_kernel.shape == (3, 4)
    ```
    """

    def presynaptic_units(self, name: str, shape: tuple) -> np.ndarray:
        """Weights that share their input indices share the unit."""
        inputs, rest = self.equation.split(",")
        labels = rest.split("->")[0].strip()
        of_input = [label in inputs for label in labels]
        sizes = [n if own else 1 for n, own in zip(shape, of_input)]
        return np.arange(np.prod(sizes)).reshape(sizes)
