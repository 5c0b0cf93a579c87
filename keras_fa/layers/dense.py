"""Dense FA layers."""

import keras
import numpy as np

from keras_fa.layers.feedback import FeedbackLayer


@keras.saving.register_keras_serializable(package="keras_fa")
class FADense(FeedbackLayer, keras.layers.Dense):
    """`Dense` with feedback: `y = act(x W + b)`, `dx = dy B^T`.

    `dW = x^T dy` and `db = sum(dy)` are exact. W and B: `(input_dim, units)`.
    Presynaptic units are the inputs, the rows of W.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Lillicrap et al., 2016.

    ```python
    from keras_fa import FADense

    layer = FADense(4, activation="relu")
    layer.build((None, 3))
    assert layer.feedback_kernel.shape == layer.kernel.shape == (3, 4)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAEinsumDense(FeedbackLayer, keras.layers.EinsumDense):
    """`EinsumDense` with feedback: the equation's transpose with B for W.

    `y = act(einsum(equation, x, W) + b)`. W and B have the shape that the
    equation gives W. Presynaptic units are the combinations of those indices of
    W that the input has too.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Lillicrap et al., 2016.

    ```python
    from keras_fa import FAEinsumDense

    layer = FAEinsumDense("abc,cd->abd", output_shape=(None, 4))
    layer.build((None, 5, 3))
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
