"""Recurrent FA layers.

The error of a step goes to the input through the feedback of the kernel W, and
back in time, to the state of the step before, through the feedback of the
recurrent kernel U:

```
x_t --W--+                       dx_t    = dz_t B_W^T
         +--> z_t --> gates      dh_{t-1} = dz_t B_U^T + (what gates pass on)
h ---U---+                       dW = sum_t x_t^T dz_t, dU = sum_t h^T dz_t
```

with dz_t the error at the pre-activations; activations and gates pass errors
exactly. A layer is the stock layer with a cell of these: whatever Keras does
with a sequence (masks, dropout, states, directions) is its own. B is made once
for a sequence, before the loop over time, and not at each step: a rule that
draws noise draws one B.

The computation is that of the stock cell, operation by operation. cuDNN, which
computes errors by itself and so through W, is not used.
"""

import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import MutableMapping
from collections.abc import Sequence
from typing import ClassVar

import keras
from keras import ops

from keras_fa import _cloning
from keras_fa import _gradients
from keras_fa import learning
from keras_fa._types import Tensor
from keras_fa.layers.feedback import FeedbackArguments
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import FeedbackPath

_PREFIXES = {"recurrent_kernel": "recurrent_"}
_CONSTRAINTS = ("kernel_constraint", "recurrent_constraint")
_EVERY = slice(None)


class _Product:
    """`x K` of one kernel K, whose error goes down through its B.

    K is read and B made when this is: once for all steps of a sequence.
    """

    def __init__(self, path: FeedbackPath, dtype: str) -> None:
        kernel = ops.cast(ops.convert_to_tensor(path.kernel), dtype)
        fixed = ops.stop_gradient(kernel)
        self.learn = None
        if path.learns:
            made = _gradients.learning_weights(lambda: [path.effective(fixed)])
            (used,), (self.receiving,) = made.used, made.receiving
            kernel = _gradients.backend.after(made.used, kernel)
            self.learn = path.learning.of_kernels
        else:
            used = ops.stop_gradient(path.effective(fixed))
        self.kernel, self.used = kernel, used

    def __call__(self, x: Tensor, columns: slice = _EVERY) -> Tensor:
        """`x K`, or the product with some columns of K."""

        def of(kernel: Tensor) -> Tensor:
            return kernel if columns == _EVERY else kernel[:, columns]

        used, learned = of(self.used), None
        if self.learn is not None:
            learned = _gradients.Learned([used], [of(self.receiving)])
        return _gradients.feedback_op(
            _matmul,
            lambda _: [used],
            x,
            [of(self.kernel)],
            [],
            self.learn,
            learned,
        )


def _matmul(x: Tensor, kernels: list[Tensor], biases: list[Tensor]) -> Tensor:
    return ops.matmul(x, kernels[0])


_thread = threading.local()


def _in_loop() -> MutableMapping["_Cell", tuple[_Product, ...]]:
    """The products of each cell whose loop over time this thread is in."""
    if not hasattr(_thread, "products"):
        _thread.products = weakref.WeakKeyDictionary()
    return _thread.products


class _Cell(FeedbackLayer):
    """Mixin of the recurrent cells."""

    in_loop = True
    kernel_names = ("kernel", "recurrent_kernel")
    kernel_constraint_arguments = _CONSTRAINTS
    prefixes = _PREFIXES

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for name in self.kernel_names:
            rule = self.given(name, "learning")
            if rule is not None and rule.in_step and rule.loss is not None:
                raise ValueError(
                    f"{type(rule).__name__} learns of x and y in each training "
                    "step, and a recurrent layer has those of every time step. "
                    "Use 'kolen_pollack' or 'weight_mirror' for it. Received: "
                    f"{type(self).__name__} '{self.name}', with that for its "
                    f"{name}. In `convert`, give it a method by `layers`."
                )

    @property
    def _exact(self) -> bool:
        return _gradients.in_backpropagation() or all(
            path.tied for path in self.feedback_paths
        )

    def get_dropout_mask(self, step_input: Tensor) -> Tensor | list | None:
        """As the stock cell's, which RNN layers call before their loop."""
        if not self._exact:
            _in_loop()[self] = self._make_products()
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self) -> None:
        """As the stock cell's, which RNN layers call after their loop."""
        _in_loop().pop(self, None)
        super().reset_dropout_mask()

    def _make_products(self) -> tuple[_Product, ...]:
        return tuple(
            _Product(path, self.compute_dtype) for path in self.feedback_paths
        )

    def call(
        self, inputs: Tensor, states: object, training: bool = False
    ) -> tuple[Tensor, object]:
        """As the stock cell's `call`; errors go through the feedback."""
        if self._exact:
            stock = super(FeedbackLayer, self)
            return stock.call(inputs, states, training=training)
        products = _in_loop().get(self) or self._make_products()
        nested = isinstance(states, (list, tuple))
        listed = list(states) if nested else [states]
        masks = [None, None]
        if training and 0.0 < self.dropout < 1.0:
            masks[0] = super().get_dropout_mask(inputs)
        if training and 0.0 < self.recurrent_dropout < 1.0:
            masks[1] = self.get_recurrent_dropout_mask(listed[0])
        listed = self.step(inputs, listed, products, masks)
        return listed[0], listed if nested else listed[0]

    def step(
        self,
        x: Tensor,
        states: list[Tensor],
        products: tuple[_Product, _Product],
        masks: list[Tensor | list | None],
    ) -> list[Tensor]:
        """One step in time: the new states, of which the first is the output.

        Args:
            x: The inputs of the step.
            states: Of the step before.
            products: `x W` and `h U`.
            masks: What drops out of x, and of h; `None` for nothing.
        """
        raise NotImplementedError

    def _gates(
        self,
        x: Tensor,
        product: _Product,
        mask: Tensor | list | None,
        gates: Sequence[int],
    ) -> Tensor:
        """`x K` of some gates, side by side.

        With `implementation=1` each gate is a product of its own, of an x with
        a dropout mask of its own.
        """
        n = self.units
        if self.implementation != 1:
            x = x if mask is None else x * mask
            whole = n * len(gates) == product.kernel.shape[1]
            columns = slice(gates[0] * n, (gates[-1] + 1) * n)
            return product(x, _EVERY if whole else columns)
        parts = [
            product(
                x if mask is None else x * mask[gate],
                slice(gate * n, (gate + 1) * n),
            )
            for gate in gates
        ]
        return ops.concatenate(parts, axis=-1)

    def locals(
        self, x: Tensor, kernels: list[Tensor], feedback: list[Tensor]
    ) -> Iterator[learning.Local]:
        """What the feedback of each kernel may learn from, at rest.

        The state is 0: noise takes its place, as that of x.
        """
        state = ops.zeros((x.shape[0], self.units), x.dtype)
        for arriving, path, w, b in zip(
            (x, state), self.feedback_paths, kernels, feedback
        ):
            w = ops.cast(ops.stop_gradient(w), path.full_dtype)
            b = ops.cast(b, path.full_dtype)
            yield learning.Local(ops.matmul, arriving, w, b)


@keras.saving.register_keras_serializable(package="keras_fa")
class FASimpleRNNCell(_Cell, keras.layers.SimpleRNNCell):
    """`SimpleRNNCell` with feedback: `h' = act(x W + h U + b)`.

    `dx = dz B_W^T` and `dh = dz B_U^T`, with dz the error at the
    pre-activation. W and B_W: `(input_dim, units)`, U and B_U:
    `(units, units)`. Presynaptic units are the rows.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`.
    Input and output: as there. Raises: as both, and a `ValueError` for a
    `feedback_learning` with a loss of each step.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    import keras
    from keras_fa import FASimpleRNNCell

    layer = keras.layers.RNN(FASimpleRNNCell(4))
    assert layer(keras.ops.ones((2, 5, 3))).shape == (2, 4)
    ```
    """

    def step(
        self,
        x: Tensor,
        states: list[Tensor],
        products: tuple[_Product, _Product],
        masks: list[Tensor | list | None],
    ) -> list[Tensor]:
        """`h' = act(x W + b + h U)`."""
        of_x, of_h = products
        (h,) = states
        x, h = (
            value if mask is None else value * mask
            for value, mask in zip((x, h), masks)
        )
        z = of_x(x)
        if self.bias is not None:
            z = ops.add(z, self.bias)
        z = z + of_h(h)
        return [z if self.activation is None else self.activation(z)]


@keras.saving.register_keras_serializable(package="keras_fa")
class FALSTMCell(_Cell, keras.layers.LSTMCell):
    """`LSTMCell` with feedback: `z = x W + h U + b`, in four gates.

    `dx = dz B_W^T` and `dh = dz B_U^T`, with dz the error at the
    pre-activations of the gates i, f, c, o; the carry passes errors exactly. W
    and B_W: `(input_dim, 4 * units)`, U and B_U: `(units, 4 * units)`.
    Presynaptic units are the rows.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`.
    Input and output: as there. Raises: as `FASimpleRNNCell`.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    import keras
    from keras_fa import FALSTMCell

    layer = keras.layers.RNN(FALSTMCell(4))
    assert layer(keras.ops.ones((2, 5, 3))).shape == (2, 4)
    ```
    """

    def step(
        self,
        x: Tensor,
        states: list[Tensor],
        products: tuple[_Product, _Product],
        masks: list[Tensor | list | None],
    ) -> list[Tensor]:
        """`c' = f c + i act(z_c)`, `h' = o act(c')`."""
        h, c = states
        x, h = (
            self._gates(value, product, mask, range(4))
            for value, product, mask in zip((x, h), products, masks)
        )
        if not self.use_bias:
            z = x + h
        elif self.implementation == 1:
            z = (x + self.bias) + h  # in the stock cell's order, to the bit
        else:
            z = (x + h) + self.bias
        z_i, z_f, z_c, z_o = ops.split(z, 4, axis=-1)
        i = self.recurrent_activation(z_i)
        f = self.recurrent_activation(z_f)
        c = f * c + i * self.activation(z_c)
        o = self.recurrent_activation(z_o)
        return [o * self.activation(c), c]


@keras.saving.register_keras_serializable(package="keras_fa")
class FAGRUCell(_Cell, keras.layers.GRUCell):
    """`GRUCell` with feedback: `h' = z h + (1 - z) act(...)`, in three gates.

    The error at the pre-activations of the gates z, r and of the candidate
    goes to x through B_W and to h through B_U; what the gates pass on is
    exact. With `reset_after=False` the candidate's part of B_U carries the
    error to `r h`. W and B_W: `(input_dim, 3 * units)`, U and B_U:
    `(units, 3 * units)`. Presynaptic units are the rows.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`.
    Input and output: as there. Raises: as `FASimpleRNNCell`.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    import keras
    from keras_fa import FAGRUCell

    layer = keras.layers.RNN(FAGRUCell(4))
    assert layer(keras.ops.ones((2, 5, 3))).shape == (2, 4)
    ```
    """

    def step(
        self,
        x: Tensor,
        states: list[Tensor],
        products: tuple[_Product, _Product],
        masks: list[Tensor | list | None],
    ) -> list[Tensor]:
        """`h' = z h + (1 - z) act(x_h + r (h U_h))`, or `(r h) U_h`."""
        (h,), (of_x, of_h) = states, products
        x = self._gates(x, of_x, masks[0], range(3))
        gates = range(3 if self.reset_after else 2)
        inner = self._gates(h, of_h, masks[1], gates)
        if self.use_bias and self.reset_after:
            of_input, of_state = self.bias[0], self.bias[1]
            x, inner = x + of_input, inner + of_state
        elif self.use_bias:
            x = x + self.bias
        x_z, x_r, x_h = ops.split(x, 3, axis=-1)
        inner_z, inner_r, *inner_h = ops.split(inner, len(gates), axis=-1)
        z = self.recurrent_activation(x_z + inner_z)
        r = self.recurrent_activation(x_r + inner_r)
        if self.reset_after:
            candidate = r * inner_h[0]
        elif self.implementation == 1 and masks[1] is not None:
            candidate = of_h(r * (h * masks[1][2]), slice(2 * self.units, None))
        else:
            candidate = of_h(r * h, slice(2 * self.units, None))
        return [z * h + (1 - z) * self.activation(x_h + candidate)]


class _Recurrent(FeedbackArguments):
    """Mixin of the recurrent layers: the stock one, with an FA cell."""

    kernel_constraint_arguments = _CONSTRAINTS
    prefixes = _PREFIXES
    cell_class: ClassVar[Callable] = _Cell

    def __init__(self, *args: object, **kwargs: object) -> None:
        given, family = self._split(super().__init__, args, kwargs)
        if "use_cudnn" in given.signature.parameters:
            if given.arguments.get("use_cudnn") is True:
                raise ValueError(
                    "cuDNN computes errors by itself, through W. Leave "
                    "`use_cudnn` out. Received, for "
                    f"{type(self).__name__}: use_cudnn=True"
                )
            given.arguments["use_cudnn"] = False
        super().__init__(*given.args, **given.kwargs)
        stock = self.cell
        config = _cloning.config_of(stock)
        if hasattr(stock, "implementation"):  # which is not in its config
            config["implementation"] = stock.implementation
        cell = self.cell_class(**config, **family)
        _cloning.replace(self, {stock: cell})
        for name in family:
            setattr(self, name, getattr(cell, name))


@keras.saving.register_keras_serializable(package="keras_fa")
class FASimpleRNN(_Recurrent, keras.layers.SimpleRNN):
    """`SimpleRNN` with feedback: an RNN layer of a `FASimpleRNNCell`.

    `h_t = act(x_t W + h_{t-1} U + b)`; `dx_t = dz_t B_W^T`, and `dz_t B_U^T`
    goes back in time. B is made once for each call.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`.
    Input and output: as there. Raises: as `FASimpleRNNCell`.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    from keras_fa import FASimpleRNN

    layer = FASimpleRNN(4)
    layer.build((None, 5, 3))
    assert [b.shape for b in layer.cell.feedback_kernel] == [(3, 4), (4, 4)]
    ```
    """

    cell_class = FASimpleRNNCell


@keras.saving.register_keras_serializable(package="keras_fa")
class FALSTM(_Recurrent, keras.layers.LSTM):
    """`LSTM` with feedback: an RNN layer of a `FALSTMCell`.

    `dx_t = dz_t B_W^T`, and `dz_t B_U^T` goes back in time, with dz_t the
    error at the gates' pre-activations. B is made once for each call.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`. cuDNN is not used.
    Input and output: as there. Raises: as `FASimpleRNNCell`, and a
    `ValueError` for `use_cudnn=True`.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    from keras_fa import FALSTM

    layer = FALSTM(4, recurrent_feedback_constraint="sign_concordance")
    layer.build((None, 5, 3))
    assert [b.shape for b in layer.cell.feedback_kernel] == [(3, 16), (4, 16)]
    ```
    """

    cell_class = FALSTMCell


@keras.saving.register_keras_serializable(package="keras_fa")
class FAGRU(_Recurrent, keras.layers.GRU):
    """`GRU` with feedback: an RNN layer of a `FAGRUCell`.

    `dx_t = dz_t B_W^T`, and `dz_t B_U^T` goes back in time, with dz_t the
    error at the gates' pre-activations. B is made once for each call.

    Args: those of Keras's and, for W, of
    `keras_fa.layers.feedback.FeedbackLayer`; for U the same with
    `recurrent_feedback_` in the place of `feedback_`. cuDNN is not used.
    Input and output: as there. Raises: as `FALSTM`.
    Source: Lillicrap et al., 2016, for the feedback; both kernels: our choice.

    ```python
    from keras_fa import FAGRU

    layer = FAGRU(4)
    layer.build((None, 5, 3))
    assert [b.shape for b in layer.cell.feedback_kernel] == [(3, 12), (4, 12)]
    ```
    """

    cell_class = FAGRUCell
