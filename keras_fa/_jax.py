"""JAX: gradients of one's own by `jax.custom_vjp`.

Each name does what its namesake in `_tensorflow` does. JAX's compiled
functions are pure: what they read of Keras's state is an argument, handed
through a `keras.StatelessScope`, or else a constant of the compiled function.
"""

import contextlib
import weakref
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.experimental.sparse
import jax.numpy as jnp
import keras

from keras_fa._types import Feedback
from keras_fa._types import Learned
from keras_fa._types import LinearOp

# Keras hands an optimizer's compiled step the trainable variables and the
# optimizer's own, and nothing else: a constraint that read a weight of its
# layer would find none there. So what it remembers is no weight on JAX but a
# constant of the step, compiled anew when it changes.
TRACKS_CONSTRAINTS = False


def custom_gradient(
    op: LinearOp,
    feedback: Feedback,
    gradient: Callable,
    x: jax.Array,
    kernels: list[jax.Array],
    biases: list[jax.Array],
    learned: Learned | None,
) -> jax.Array:
    """`op(x, kernels, biases)` with a gradient of one's own."""

    @jax.custom_vjp
    def function(x, kernels, biases, back):
        return op(x, kernels, biases)

    def record(x, kernels, biases, back):
        return op(x, kernels, biases), (x, kernels, biases, back)

    def backward(arguments, dy):
        # None for what the rule returned, unless that learns.
        return gradient(op, *arguments, dy)

    function.defvjp(record, backward)
    x, *tensors = map(keras.ops.convert_to_tensor, [x, *kernels, *biases])
    kernels, biases = tensors[: len(kernels)], tensors[len(kernels) :]
    if learned is not None:
        return function(x, kernels, biases, learned.receiving)
    if not any(isinstance(a, jax.core.Tracer) for a in (x, *tensors)):
        return op(x, kernels, biases)  # nobody takes a gradient
    # Rules may assign variables (their random state), which has to happen
    # out here, where Keras sees it. Compiled code that takes no gradient does
    # not compute the rest.
    back = [jax.lax.stop_gradient(b) for b in feedback(kernels)]
    return function(x, kernels, biases, back)


def read_apart(make: Callable[[], list[jax.Array]]) -> tuple[list, list]:
    """What `make` returns, for use and for its gradient."""
    made = list(map(keras.ops.convert_to_tensor, make()))
    return made, made


def after(made: list[jax.Array], x: jax.Array) -> jax.Array:
    """`x`: functions are pure, and know no order."""
    return x


def pullback(
    function: Callable[..., jax.Array],
    arguments: list[jax.Array],
    dy: jax.Array | None = None,
) -> list[jax.Array]:
    """The gradients of a function's arguments for the error at its output."""
    y, pull = jax.vjp(function, *arguments)
    return list(pull(jnp.ones_like(y) if dy is None else dy))


def without_error(inputs: object) -> jax.experimental.sparse.JAXSparse | None:
    """A sparse tensor that sends no error down; `None` for a dense one."""
    if isinstance(inputs, jax.experimental.sparse.JAXSparse):
        return jax.tree.map(jax.lax.stop_gradient, inputs)
    return None


# A scope whose draws leave no trace outside: all random states are variables.
own_random_state = contextlib.nullcontext


def sum_of_squares(tensor: jax.Array) -> jax.Array:
    """The sum of the squares of all elements, a scalar."""
    return jnp.sum(jnp.square(tensor))


def compiled(
    function: Callable, reads: Sequence[keras.Variable]
) -> Callable[..., object]:
    """`function`, compiled at its first call and whenever shapes change."""

    @jax.jit
    def pure(values, *args):
        scope = keras.StatelessScope(
            list(zip(reads, values)), initialize_variables=False
        )
        with scope:
            return function(*args)

    return lambda *args: pure([variable.value for variable in reads], *args)


# The variables whose values are constants of compiled functions.
_constants: set[int] = set()


def recall(variable: keras.Variable, kernel: jax.Array) -> jax.Array:
    """The value of a variable that a constraint remembers something in."""
    value = variable.value
    compiling = isinstance(kernel, jax.core.Tracer)
    if compiling and not isinstance(value, jax.core.Tracer):
        _constants.add(id(variable))
    return value


def remember(variable: keras.Variable, value: jax.Array) -> None:
    """Assigns a variable that `recall` reads, outside a compiled step."""
    changed = not bool(jnp.array_equal(variable.value, jnp.asarray(value)))
    variable.assign(value)
    if changed:
        _looked_at.clear()
    if changed and id(variable) in _constants:
        # Whatever was compiled with the old value is compiled anew.
        jax.clear_caches()
        _constants.clear()


def holds(kernel: keras.Variable, as_remembered: Callable) -> bool:
    """Whether a kernel is still what its constraint remembers of it."""
    try:
        value = kernel.value
    except TypeError:  # `fit` holds the weights, and has been here before
        return True
    if isinstance(value, jax.core.Tracer) or value.is_deleted():
        return True
    if id(value) not in _looked_at:
        with jax.ensure_compile_time_eval():
            if not as_remembered(value):
                return False
        _looked_at[id(value)] = value
    return True


# Values that were found to hold, for as long as they are.
_looked_at: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
