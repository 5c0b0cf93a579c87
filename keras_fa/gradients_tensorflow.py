"""TensorFlow: the error path as `tf.custom_gradient`."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


def feedback_op(
    op: Callable[[tf.Tensor, list[tf.Tensor], list[tf.Tensor]], tf.Tensor],
    inputs: tf.Tensor,
    kernels: Sequence[tf.Tensor],
    feedback_kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor],
) -> tf.Tensor:
    """Computes `op(x, W)` and sends the error down through B.

    With one kernel, `dx = op^T(dy, B)`, and `dW` and `dbias` are those of
    `op(x, W)`. With several kernels in a row (separable convolutions) each
    kernel is one such step: the error that reaches kernel i has come through
    the feedback kernels of those above it, and its own gradient is the true
    local product.

    Args:
        op: `op(x, kernels, biases)`, linear in `x` and in each kernel.
        inputs: The tensor `x`.
        kernels: Forward kernels W in the order in which `x` meets them.
        feedback_kernels: Feedback kernels B, each of its kernel's shape. They
            receive no gradient.
        biases: What else `op` reads and is trained; may be empty.

    Returns:
        The tensor `op(x, W)`.
    """
    n = len(kernels)

    # Captured, since it receives no gradient; all else is an argument.
    back = _tensors(feedback_kernels)

    @tf.custom_gradient
    def feedback(x, *tensors):
        forward, bias = list(tensors[:n]), list(tensors[n:])

        # The output waits for B, and so do the updates, which come from it.
        # TensorFlow orders a step's reads before its writes, but takes both
        # custom_gradient's and the optimizer's IdentityN for such an order and
        # prunes them later: B was at times made of the next step's kernels.
        # It is the input that waits: between a convolution and its activation
        # this would keep the two from being fused.
        with tf.control_dependencies(back):
            x = tf.identity(x)

        # With the first i kernels W and the others B, the error of x (i = 0)
        # or of kernel i is right. All are recorded now, while the layer's
        # autocast scope is open; inside a tf.function the outputs that nobody
        # reads are pruned from the graph.
        sources = [[x], *([w] for w in forward)]
        sources[n] += bias
        records = [
            _record(op, x, forward[:i] + back[i:], bias, sources[i])
            for i in range(n + 1)
        ]

        def gradient(dy):
            grads = [
                tape.gradient(y, source, dy)
                for (tape, y), source in zip(records, sources)
            ]
            kernel_grads = [grad[0] for grad in grads[1:]]
            return (*grads[0], *kernel_grads, *grads[n][1:])

        return records[n][1], gradient

    return feedback(*_tensors([inputs, *kernels, *biases]))


def is_sparse(inputs: Any) -> bool:
    """Whether this is a sparse tensor of the backend."""
    return isinstance(inputs, tf.SparseTensor)


def _record(
    op: Callable,
    x: tf.Tensor,
    kernels: list[tf.Tensor],
    biases: list[tf.Tensor],
    sources: list[tf.Tensor],
) -> tuple[tf.GradientTape, tf.Tensor]:
    with tf.GradientTape(
        persistent=True, watch_accessed_variables=False
    ) as tape:
        tape.watch(sources)
        y = op(x, kernels, biases)
    return tape, y


def send_error(
    source: tf.Tensor,
    receivers: Sequence[tf.Tensor],
    maps: Sequence[tf.Tensor],
    carry: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]],
) -> tf.Tensor:
    """The identity on `source`, whose error also goes to the receivers.

    With `e` the error that arrives at the output, `source` receives `e` and
    receiver l receives `carry_l(e, B_l)`.

    Args:
        source: A tensor of shape `(batch, ...)`.
        receivers: Tensors of shape `(batch, ...)`.
        maps: For each receiver a kernel B_l. They receive no gradient.
        carry: For each receiver a function of `e` and B_l, both of the dtype
            of `e`, that returns an error of the receiver's shape.

    Returns:
        `source`, unchanged.
    """
    n = len(receivers)

    @tf.custom_gradient
    def op(source, *tensors):
        def gradient(e):
            errors = [
                tf.cast(to(e, tf.cast(b, e.dtype)), receiver.dtype)
                for to, receiver, b in zip(carry, tensors, tensors[n:])
            ]
            return e, *errors, *[None] * n

        return tf.identity(source), gradient

    return op(*_tensors([source, *receivers, *maps]))


def _tensors(values: list) -> list[tf.Tensor]:
    """The values of what may be variables, which custom_gradient refuses."""
    return [tf.convert_to_tensor(value) for value in values]


def gradients_of(
    loss: Callable[[], tf.Tensor],
    variables: Sequence[keras.Variable],
    state: Sequence[keras.Variable],
) -> list[tf.Tensor]:
    """Gradients of `loss()` with respect to Keras variables.

    Args:
        loss: A function without arguments that computes a scalar.
        variables: Keras variables.
        state: What else `loss` reads or assigns. What it assigns is dropped.

    Returns:
        A tensor for each variable: zeros where the loss does not depend on it.
    """
    values = [tf.convert_to_tensor(variable) for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        scope = keras.StatelessScope(
            [
                *((variable, variable.value) for variable in state),
                *zip(variables, values),
            ],
            initialize_variables=False,
        )
        with scope:
            value = loss()
    return tape.gradient(
        value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )


def sum_of_squares(tensor: tf.Tensor) -> tf.Tensor:
    """The sum of the squares of all elements, a scalar, in one pass."""
    return 2 * tf.nn.l2_loss(tensor)


def compiled(
    function: Callable,
    reads: Sequence[keras.Variable],
    assigns: Sequence[keras.Variable] = (),
) -> Callable:
    """`function`, compiled at its first call and whenever shapes change.

    Args:
        function: A function of tensors.
        reads: The variables that it reads and that may change between calls.
        assigns: Those that it assigns.

    Returns:
        A function of the same tensors.
    """
    del reads, assigns  # a tf.function follows its variables by itself
    return tf.function(function, autograph=False, reduce_retracing=True)


def followed_by(
    model: keras.Model, function: Callable[[], None]
) -> Callable[..., Any]:
    """The model's training step with `function()` at its end.

    Args:
        model: A Keras model.
        function: What is done after each update, on the updated weights. It
            reads the model's variables and assigns non-trainable ones.

    Returns:
        A function of the arguments of the model's `train_step`.
    """
    step = model.train_step

    def train_step(data):
        logs = step(data)
        function()
        return logs

    return train_step


def synchronize(model: keras.layers.Layer) -> None:
    """Puts the weights of a model that `fit` is training where they belong."""


def recall(variable: keras.Variable, kernel: Any) -> Any:
    """The value of a variable that no step is handed.

    Args:
        variable: A variable that is not tracked by a layer, whose value is
            assigned by `remember` alone.
        kernel: The kernel that the value is used with: tells whether this is
            being compiled.

    Returns:
        A tensor or variable of the backend.
    """
    return variable.value


def remember(variable: keras.Variable, value: Any) -> None:
    """Assigns a variable that `recall` reads, outside a compiled step."""
    variable.assign(value)


def exported(variables: Sequence[keras.Variable]) -> list:
    """What an exported graph refers to of variables that no layer tracks."""
    return [variable.value for variable in variables]
