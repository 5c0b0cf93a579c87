"""Errors that leave the chain: what DFA and DenseFA insert into a model."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fa import gradients
from keras_fa import initializers


@keras.saving.register_keras_serializable(package="keras_fa")
class StopError(keras.layers.Layer):
    """The identity that no error passes: `y = x`, `dx = 0`.

    Input and output shape: any, the same.

    Example:

    ```python
    import numpy as np
    from keras_fa.layers.direct import StopError

    x = np.ones((2, 3), "float32")
    assert np.array_equal(StopError()(x), x)
    ```
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # whatever the dtype of what it stands behind
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        if gradients.in_backpropagation():
            return inputs
        return ops.stop_gradient(inputs)

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)


@keras.saving.register_keras_serializable(package="keras_fa")
class SendError(keras.layers.Layer):
    """The identity on a tensor whose error also goes to other tensors.

    Called as `SendError(names)([source, *receivers])`, it returns `source`.
    With e the error at its output, flattened per example, `source` receives e
    and receiver l receives `e B_l`, where B_l is a fixed random matrix of
    shape `(size of source, size of receiver)`, a non-trainable weight.

    Args:
        receivers: The names of the receivers, one for each.
        feedback_initializer: The law of each B_l, drawn independently of the
            others. Default "glorot_uniform" (our choice).

    Input shape: a list of tensors `(batch, ...)`, static but for the batch.
    Output shape: that of the first.

    Raises:
        ValueError: If the number of tensors is not that of the names, or a
            size is not known.

    Source: Nokland (2016), direct feedback alignment.

    Example:

    ```python
    import numpy as np
    from keras_fa.layers.direct import SendError

    send = SendError(["hidden"])
    logits, hidden = np.ones((2, 3), "float32"), np.ones((2, 5), "float32")
    assert np.array_equal(send([logits, hidden]), logits)
    assert send.maps[0].shape == (3, 5)
    ```
    """

    def __init__(
        self,
        receivers: Sequence[str],
        feedback_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # whatever the dtype of what it stands behind
        self.supports_masking = True
        self.receivers = list(receivers)
        self.feedback_initializer = keras.initializers.get(feedback_initializer)

    def build(self, input_shape: Any) -> None:
        source, *receivers = input_shape
        if len(receivers) != len(self.receivers):
            raise ValueError(
                f"SendError '{self.name}' has {len(self.receivers)} names of "
                f"receivers. Received: {len(receivers)} receivers."
            )
        self.maps = [
            self.add_weight(
                shape=(size_per_example(source), size_per_example(shape)),
                initializer=initializers.reseeded(
                    self.feedback_initializer, index
                ),
                trainable=False,
                name=f"feedback_{name}",
            )
            for index, (name, shape) in enumerate(
                zip(self.receivers, receivers)
            )
        ]

    def call(self, inputs: Any) -> Any:
        source, *receivers = inputs
        if gradients.in_backpropagation():
            return source
        return gradients.send_error(source, receivers, self.maps)

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs[0].shape, dtype=inputs[0].dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return None if previous_mask is None else previous_mask[0]

    def load_own_variables(self, store: Any) -> None:
        if list(store.keys()):  # a file of stock layers has no maps
            super().load_own_variables(store)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "receivers": self.receivers,
            "feedback_initializer": keras.initializers.serialize(
                self.feedback_initializer
            ),
        }


def size_per_example(shape: tuple) -> int:
    """The number of values per example of a tensor of shape `(batch, ...)`.

    Raises:
        ValueError: If a dimension after the first is not known.
    """
    if None in shape[1:]:
        raise ValueError(
            "A fixed feedback map needs static shapes. Received: a tensor of "
            f"shape {tuple(shape)}. Give the model an Input of fixed size."
        )
    return int(np.prod(shape[1:]))
