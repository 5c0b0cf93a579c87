"""JAX: the error path as `jax.custom_vjp`.

Each name does what its namesake in `gradients_tensorflow` does. JAX's compiled
functions are pure: what they read of Keras's state is an argument, handed
through a `keras.StatelessScope`, or else a constant of the compiled function.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.sparse
import jax.numpy as jnp
import keras


def feedback_op(
    op: Callable[[jax.Array, list[jax.Array], list[jax.Array]], jax.Array],
    inputs: jax.Array,
    kernels: Sequence[jax.Array],
    feedback_kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array],
) -> jax.Array:
    """Computes `op(x, W)` and sends the error down through B."""
    n = len(kernels)
    # Staged while the layer's autocast scope is open: JAX may call `record`
    # after the layer has returned.
    kernels, biases = list(kernels), list(biases)
    staged, constants = jax.closure_convert(op, inputs, kernels, biases)

    @jax.custom_vjp
    def feedback(x, forward, back, bias):
        return staged(x, forward, bias, *constants)

    def record(x, forward, back, bias):
        # With the first i kernels W and the others B, the error of x (i = 0)
        # or of kernel i is right. Outputs that nobody reads are not computed
        # once this is compiled.
        _, of_inputs = jax.vjp(lambda x: staged(x, back, bias, *constants), x)
        of_kernels = []
        for i in range(1, n + 1):

            def of(kernel, bias, i=i):
                mixed = [*forward[: i - 1], kernel, *back[i:]]
                return staged(x, mixed, bias, *constants)

            y, of_kernel = jax.vjp(of, forward[i - 1], bias)
            of_kernels.append(of_kernel)
        return y, (of_inputs, of_kernels)

    def send(records, dy):
        of_inputs, of_kernels = records
        (dx,) = of_inputs(dy)
        kernel_grads, bias_grads = zip(*(vjp(dy) for vjp in of_kernels))
        return dx, list(kernel_grads), None, bias_grads[-1]

    feedback.defvjp(record, send)
    return feedback(inputs, kernels, list(feedback_kernels), biases)


def is_sparse(inputs: Any) -> bool:
    """Whether this is a sparse tensor of the backend."""
    return isinstance(inputs, jax.experimental.sparse.JAXSparse)


def send_error(
    source: jax.Array,
    receivers: Sequence[jax.Array],
    maps: Sequence[Any],
    carry: Sequence[Callable[[jax.Array, jax.Array], jax.Array]],
) -> jax.Array:
    """The identity on `source`, whose error also goes to the receivers."""
    dtypes = [receiver.dtype for receiver in receivers]

    @jax.custom_vjp
    def identity(source, receivers, maps):
        return source

    def record(source, receivers, maps):
        return source, maps

    def send(maps, e):
        errors = [
            to(e, b.astype(e.dtype)).astype(dtype)
            for to, b, dtype in zip(carry, maps, dtypes)
        ]
        return e, errors, None

    identity.defvjp(record, send)
    maps = [keras.ops.convert_to_tensor(b) for b in maps]
    return identity(source, list(receivers), maps)


def gradients_of(
    loss: Callable[[], jax.Array],
    variables: Sequence[keras.Variable],
    state: Sequence[keras.Variable],
) -> list[jax.Array]:
    """Gradients of `loss()` with respect to Keras variables."""
    state = [(variable, variable.value) for variable in state]

    def of(values):
        scope = keras.StatelessScope(
            [*state, *zip(variables, values)], initialize_variables=False
        )
        with scope:
            return loss()

    return jax.grad(of)([variable.value for variable in variables])


def sum_of_squares(tensor: jax.Array) -> jax.Array:
    """The sum of the squares of all elements, a scalar."""
    return jnp.sum(jnp.square(tensor))


def compiled(
    function: Callable,
    reads: Sequence[keras.Variable],
    assigns: Sequence[keras.Variable] = (),
) -> Callable:
    """`function`, compiled at its first call and whenever shapes change."""
    variables = [*reads, *assigns]

    @jax.jit
    def pure(values, *args):
        scope = keras.StatelessScope(
            list(zip(variables, values)), initialize_variables=False
        )
        with scope:
            outputs = function(*args)
        return outputs, [scope.get_current_value(v) for v in assigns]

    def call(*args):
        outputs, values = pure([v.value for v in variables], *args)
        for variable, value in zip(assigns, values):
            variable.assign(value)
        return outputs

    return call


def followed_by(
    model: keras.Model, function: Callable[[], None]
) -> Callable[..., Any]:
    """The model's training step with `function()` at its end."""
    if keras.config.is_nnx_enabled():
        raise RuntimeError(
            "With Keras's NNX integration a training step cannot be extended, "
            "as StrictNormalization does. Unset KERAS_NNX_ENABLED."
        )
    step = model.train_step

    def train_step(state, data):
        logs, (trainable, non_trainable, *others) = step(state, data)
        scope = keras.StatelessScope(
            [
                *zip(model.trainable_variables, trainable),
                *zip(model.non_trainable_variables, non_trainable),
            ],
            initialize_variables=False,
        )
        with scope:
            function()
        trainable, non_trainable = (
            [scope.get_current_value(variable) for variable in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
            )
        )
        return logs, (trainable, non_trainable, *others)

    return train_step


def synchronize(model: keras.layers.Layer) -> None:
    """Puts the weights of a model that `fit` is training where they belong."""
    if isinstance(model, keras.Model):
        model.jax_state_sync()


# The variables whose values are constants of compiled functions.
_constants: set[int] = set()


def recall(variable: keras.Variable, kernel: Any) -> jax.Array:
    """The value of a variable that no step is handed."""
    value = variable.value
    compiling = isinstance(kernel, jax.core.Tracer)
    if compiling and not isinstance(value, jax.core.Tracer):
        _constants.add(id(variable))
    return value


def remember(variable: keras.Variable, value: Any) -> None:
    """Assigns a variable that `recall` reads, outside a compiled step."""
    variable.assign(value)
    if id(variable) in _constants:
        # Whatever was compiled with the old value is compiled anew.
        jax.clear_caches()
        _constants.clear()


def exported(variables: Sequence[keras.Variable]) -> list:
    """Nothing: an exported graph holds their values as constants."""
    return []
