"""Attention FA layers.

The projections of queries, keys, values and of what attention makes of these
send errors down through feedback kernels of their own. Attention itself, which
has no weights, passes errors exactly:

```
query, key, value --W_q, W_k, W_v--> q, k, v --> attention --W_o--> output
             errors <--B_q, B_k, B_v--        <-- exact --  <--B_o--
```

A layer is the stock layer with `FAEinsumDense` for each of its projections.
"""

import keras

from keras_fa import _cloning
from keras_fa.layers.dense import FAEinsumDense
from keras_fa.layers.feedback import FeedbackArguments


class _Attention(FeedbackArguments):
    """Mixin of the attention layers."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        given, family = self._split(super().__init__, args, kwargs)
        super().__init__(*given.args, **given.kwargs)
        self._keep(family)

    def build(
        self,
        query_shape: tuple,
        value_shape: tuple,
        key_shape: tuple | None = None,
    ) -> None:
        """As the stock layer's `build`, then gives projections feedback."""
        super().build(query_shape, value_shape, key_shape)
        family = {n: getattr(self, n) for n in self.feedback_arguments()}
        new = {}
        for layer in _cloning.all_layers(self):
            if type(layer) is keras.layers.EinsumDense:
                config = _cloning.config_of(layer)
                new[layer] = FAEinsumDense(**config, **family)
                new[layer].build_from_config(layer.get_build_config())
        _cloning.replace(self, new)


@keras.saving.register_keras_serializable(package="keras_fa")
class FAMultiHeadAttention(_Attention, keras.layers.MultiHeadAttention):
    """`MultiHeadAttention` whose projections have feedback.

    `q = x W_q`, `dx = dq B_q^T`, and so for keys, values and the output (and
    the gate, with `use_gate`); the softmax and its products pass errors
    exactly. W and B: `(dim, num_heads, key_dim)`, of the output
    `(num_heads, value_dim, dim)`. Presynaptic units are the projections'
    inputs.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both.
    Source: Lillicrap et al., 2016, for the feedback; one for each projection:
    our choice.

    ```python
    import keras
    from keras_fa import FAMultiHeadAttention
    from keras_fa.layers.feedback import feedback_layers

    layer = FAMultiHeadAttention(2, 3)
    x = keras.ops.ones((2, 5, 4))
    assert layer(x, x).shape == (2, 5, 4)
    assert len(feedback_layers(layer)) == 4
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAGroupQueryAttention(_Attention, keras.layers.GroupQueryAttention):
    """`GroupQueryAttention` whose projections have feedback.

    As `FAMultiHeadAttention`, with fewer heads of keys and values than of
    queries: W_k and W_v are `(dim, num_key_value_heads, head_dim)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both.
    Source: Lillicrap et al., 2016, for the feedback; one for each projection:
    our choice.

    ```python
    import keras
    from keras_fa import FAGroupQueryAttention
    from keras_fa.layers.feedback import feedback_layers

    layer = FAGroupQueryAttention(3, 4, 2)
    x = keras.ops.ones((2, 5, 4))
    assert layer(x, x).shape == (2, 5, 4)
    assert len(feedback_layers(layer)) == 4
    ```
    """
