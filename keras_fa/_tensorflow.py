"""TensorFlow: gradients of one's own by `tf.custom_gradient`."""

import contextlib
import inspect
import weakref
from collections.abc import Callable
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_fa._types import Feedback
from keras_fa._types import Learned
from keras_fa._types import LinearOp

# An optimizer's step reads any variable, so what a kernel's constraint
# remembers is an ordinary weight of the layer.
TRACKS_CONSTRAINTS = True


def custom_gradient(
    op: LinearOp,
    feedback: Feedback,
    gradient: Callable,
    x: tf.Tensor,
    kernels: list[tf.Tensor],
    biases: list[tf.Tensor],
    learned: Learned | None,
) -> tf.Tensor:
    """`op(x, kernels, biases)` with a gradient of one's own.

    Args:
        op: What is computed.
        feedback: What the gradient is made with, as a function of `kernels`.
        gradient: `gradient(op, x, kernels, biases, feedback(kernels), dy)`
            returns the gradients of `x`, `kernels`, `biases`, and of `learned`
            if these have any.
        x: A tensor.
        kernels: Tensors or variables.
        biases: Tensors or variables.
        learned: What `feedback` would return, made of weights that are
            trained. `None`: it is made here, and has no gradient.

    Returns:
        A tensor.
    """
    n, m = len(kernels), len(kernels) + len(biases)
    used, receiving = (None, []) if learned is None else learned
    if tf.inside_function():
        # The gradient functions of graphs live as long as the process.
        op, feedback = _weakly(op), _weakly(feedback)

    @tf.custom_gradient
    def function(x, *tensors):
        kernels, biases = list(tensors[:n]), list(tensors[n:m])
        back = used
        if back is None and tf.inside_function():
            # Made here, since the gradient of a loop or a branch may read no
            # variable; what nobody takes a gradient of is pruned.
            back = feedback(kernels)

        def backward(dy):
            # B is that of the very W that the output came of: no other read of
            # W can slip behind the optimizer's write.
            made = feedback(kernels) if back is None else back
            made = [tf.stop_gradient(b) for b in made]
            dx, dkernels, dbiases, dback = gradient(
                op, x, kernels, biases, made, dy
            )
            dback = dback or [None] * len(receiving)
            return (dx, *dkernels, *dbiases, *dback)

        return op(_no_way_down(x), kernels, biases), backward

    # custom_gradient takes no variables.
    tensors = [x, *kernels, *biases, *receiving]
    return function(*map(tf.convert_to_tensor, tensors))


def read_apart(make: Callable[[], list[tf.Tensor]]) -> tuple[list, list]:
    """What `make` returns, for use and for its gradient: see `after`."""
    # A tf.Variable that is returned as it is has not been read yet.
    made = list(map(tf.convert_to_tensor, make()))
    if not tf.inside_function():
        return made, made
    return made, list(map(tf.convert_to_tensor, make()))


def after(made: list[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """`x`, which is there once `made` is.

    What is made of weights that the same step trains has to be made before
    they are written. TensorFlow's optimizer of graphs drops that order where a
    way leads from one to the other by data, and loses it altogether where it
    removes a part of that way later, such as the IdentityN around a gradient
    of one's own: now and then the step then uses the weights of the next one.
    """
    if not tf.inside_function():
        return x
    with tf.control_dependencies(made):
        # No identity, which would be removed as well.
        return tf.ensure_shape(x, x.shape)


def _no_way_down(x: tf.Tensor) -> tf.Tensor:
    """`x`, which raises where a gradient function got lost on the way."""
    if not tf.inside_function():
        return x  # nobody records what custom_gradient runs eagerly
    return tf.raw_ops.PreventGradient(
        input=x,
        message="tf.vectorized_map drops the gradient functions of feedback "
        "alignment layers: errors would go through W. Use tf.map_fn, or take "
        "the gradient inside of the mapped function. (TimeDistributed maps so "
        "where the number of time steps is unknown: give batches a static one, "
        "or call the layer without the wrapper.)",
    )


def _weakly(function: Callable) -> Callable:
    """A layer's method, held so that the layer may go."""
    if not inspect.ismethod(function):
        return function
    weak = weakref.WeakMethod(function)
    return lambda *args: weak()(*args)


def pullback(
    function: Callable[..., tf.Tensor],
    arguments: list[tf.Tensor],
    dy: tf.Tensor | None = None,
) -> list[tf.Tensor]:
    """The gradients of a function's arguments for the error at its output.

    Zeros where nothing depends on an argument. Inside a `tf.function` the
    output that nobody reads is pruned.

    Args:
        function: A function of tensors.
        arguments: Its arguments.
        dy: The error. Default: 1.
    """
    # Of this graph: the gradient of a loop has one of its own.
    arguments = [tf.identity(argument) for argument in arguments]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(arguments)
        y = function(*arguments)
    zero = tf.UnconnectedGradients.ZERO
    return tape.gradient(y, arguments, dy, unconnected_gradients=zero)


def without_error(
    inputs: tf.Tensor | tf.SparseTensor,
) -> tf.SparseTensor | None:
    """A sparse tensor that sends no error down; `None` for a dense one."""
    if isinstance(inputs, tf.SparseTensor):
        return tf.sparse.map_values(tf.stop_gradient, inputs)
    return None


# A scope whose draws leave no trace outside: all random states are variables.
own_random_state = contextlib.nullcontext


def sum_of_squares(tensor: tf.Tensor) -> tf.Tensor:
    """The sum of the squares of all elements, a scalar, in one pass."""
    return 2 * tf.nn.l2_loss(tensor)


def compiled(
    function: Callable, reads: Sequence[keras.Variable]
) -> Callable[..., object]:
    """`function`, compiled at its first call and whenever shapes change.

    Args:
        function: A function of tensors.
        reads: The variables that it reads and that may change between calls.

    Returns:
        A function of the same tensors.
    """
    del reads  # a tf.function follows its variables by itself
    return tf.function(function, autograph=False, reduce_retracing=True)


def recall(variable: keras.Variable, kernel: tf.Tensor) -> tf.Tensor:
    """The value of a variable that a constraint remembers something in.

    Args:
        variable: Assigned by `remember` alone.
        kernel: The kernel that the value is used with: tells whether this is
            being compiled.
    """
    return variable.value


def remember(variable: keras.Variable, value: tf.Tensor) -> None:
    """Assigns a variable that `recall` reads, outside a compiled step."""
    variable.assign(value)


def holds(kernel: keras.Variable, as_remembered: Callable) -> bool:
    """Whether a kernel is still what its constraint remembers of it.

    On TensorFlow it is: what constraints remember moves with the weights.

    Args:
        kernel: The kernel.
        as_remembered: Tells it of the kernel's value.
    """
    return True
