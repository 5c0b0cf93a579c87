"""The error path, in one place for every backend.

Backpropagation sends the error `dy` that arrives at a layer down through the
transpose of the layer's own kernel, `dx = op^T(dy, W)`. Feedback alignment
sends it through another kernel, `dx = op^T(dy, B)`, and leaves the rest as it
is: the output is `op(x, W)` and the kernel's own gradient is the true local
product of `x` and `dy`. Where B learns, it receives a gradient of its own, made
of that product, and passes it on to the weights that it is made of.

All that the package needs of a backend's automatic differentiation is what the
modules `_tensorflow`, `_jax` and `_torch` define:

- `custom_gradient`: a function with a gradient of its own;
- `read_apart`, `after`: how what learns is read, and what waits for it;
- `pullback`: the gradient of a function for the error at its output;
- `compiled`: a function compiled for the backend;
- `sum_of_squares`: of a kernel, the fastest way;
- `without_error`: a sparse input that sends no error down;
- `own_random_state`: a scope whose draws leave no trace outside;
- `TRACKS_CONSTRAINTS`, `recall`, `remember`, `holds`: how a compiled training
  step gets at what a kernel's constraint remembers.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import keras

from keras_fa._types import Feedback
from keras_fa._types import Gradients
from keras_fa._types import Learn
from keras_fa._types import Learned
from keras_fa._types import LinearOp
from keras_fa._types import Tensor

if keras.backend.backend() == "tensorflow":
    from keras_fa import _tensorflow as backend
elif keras.backend.backend() == "jax":
    from keras_fa import _jax as backend
elif keras.backend.backend() == "torch":
    from keras_fa import _torch as backend
else:
    raise ImportError(
        "keras_fa runs on Keras's backends tensorflow, jax and torch. Received:"
        f" KERAS_BACKEND={keras.backend.backend()}. Set KERAS_BACKEND="
        "tensorflow, jax or torch in the environment, or `backend` in "
        "keras.json, before keras is imported."
    )


def feedback_op(
    op: LinearOp,
    feedback: Feedback,
    x: Tensor,
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor],
    learn: Learn | None = None,
    learned: Learned | None = None,
) -> Tensor:
    """Computes `op(x, W)` and sends the error down through B.

    With one kernel, `dx = op^T(dy, B)`, and `dW` and `dbias` are those of
    `op(x, W)`. With several kernels in a row (separable convolutions) each
    kernel is one such step: the error that reaches kernel i has come through
    the feedback kernels of those above it, and its own gradient is the true
    local product.

    Args:
        op: `op(x, kernels, biases)`, linear in `x` and in each kernel, and a
            function of these tensors alone.
        feedback: The rule: a function of the kernels W that returns the
            kernels B, each of its kernel's shape.
        x: The input.
        kernels: Forward kernels W in the order in which `x` meets them.
        biases: What else `op` reads and is trained; may be empty.
        learn: A function of the gradients dW that returns those of the
            kernels B; nothing of these reaches W. Default `None`: they receive
            no gradient.
        learned: The kernels B, where they are made of weights that are
            trained, by `learning_weights`.

    Returns:
        The tensor `op(x, W)`.
    """
    return backend.custom_gradient(
        op,
        feedback,
        functools.partial(_feedback_gradient, learn),
        x,
        list(kernels),
        list(biases),
        learned,
    )


def _feedback_gradient(
    learn: Learn | None,
    op: LinearOp,
    x: Tensor,
    forward: list[Tensor],
    biases: list[Tensor],
    back: list[Tensor],
    dy: Tensor,
    wanted: bool = True,
) -> Gradients:
    """`dx = op^T(dy, B)`, and the true local products of `x` and `dy`.

    Without dx if that is not `wanted`, as on a backend that prunes nothing.
    """
    dx, of_kernels, of_biases = None, [], []
    for i, kernel in enumerate(back):
        # What x meets before this kernel is W, what it meets after it B. The
        # product does not depend on the kernel itself: with B in the place of
        # the first one, dx comes with it.
        def local(
            x: Tensor, kernel: Tensor, *biases: Tensor, i: int = i
        ) -> Tensor:
            mixed = [*forward[:i], kernel, *back[i + 1 :]]
            return op(x, mixed, list(biases))

        if wanted and i == 0:
            dx, of_kernel, *of_biases = backend.pullback(
                local, [x, kernel, *biases], dy
            )
        else:
            of_kernel, *of_biases = backend.pullback(
                functools.partial(local, x), [kernel, *biases], dy
            )
        of_kernels.append(of_kernel)
    of_feedback = None if learn is None else learn(of_kernels)
    return dx, of_kernels, of_biases, of_feedback


def learning_weights(make: Callable[[], list[Tensor]]) -> Learned:
    """What is made of weights that the same step trains.

    Args:
        make: Reads the weights and makes it. Called once or twice.
    """
    return Learned(*backend.read_apart(make))


def transposed(op: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """`op^T(dy)`, of the shape of `x`."""
    (dx,) = backend.pullback(op, [x], dy)
    return dx


def send_error(
    source: Tensor,
    receivers: Sequence[Tensor],
    maps: Sequence[Tensor],
    carry: Sequence[Callable[[Tensor, Tensor], Tensor]],
    learn: Learn | None = None,
    signal: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The identity on `source`, whose error also goes to the receivers.

    With `e` the error that arrives at the output, `source` receives `e` and
    receiver l receives `carry_l(e, M_l)`. Where maps learn, they do of the
    products of `e` and the receivers' activities r_l, the gradients of
    `<carry_l(e, M_l), r_l>` with respect to M_l.

    Args:
        source: A tensor of shape `(batch, ...)`.
        receivers: Tensors of shape `(batch, ...)`.
        maps: For each receiver a kernel M_l.
        carry: For each receiver a function of `e` and M_l, both of the
            receiver's dtype, that returns an error of the receiver's shape.
        learn: A function of these products that returns the gradients of the
            maps. Default `None`: they receive none.
        signal: A function of `e` and `source` that returns what is sent to the
            receivers in the place of `e`. Default `None`: `e`.

    Returns:
        `source`, unchanged.
    """

    # Tensors, in plain lists: variables and lists of Keras's hold layers.
    learned = None
    if learn is not None:
        learned = learning_weights(lambda: maps)
        source = backend.after(learned.used, source)
    maps, carry = list(map(keras.ops.stop_gradient, maps)), list(carry)

    def gradient(
        _: LinearOp,
        source: Tensor,
        receivers: list[Tensor],
        no_biases: list[Tensor],
        maps: list[Tensor],
        e: Tensor,
        wanted: bool = True,
    ) -> Gradients:
        sent = e if signal is None else signal(e, source)
        errors, of_maps = [], []
        for to, r, m in zip(carry, receivers, maps):
            # In the receiver's precision: logits are float32 by any policy.
            def by(m: Tensor, to: Callable = to, r: Tensor = r) -> Tensor:
                given = keras.ops.cast(sent, r.dtype)
                return to(given, keras.ops.cast(m, r.dtype))

            errors.append(by(m))
            if learn is not None:
                of_maps += backend.pullback(by, [m], r)
        return e, errors, no_biases, learn and learn(of_maps)

    return backend.custom_gradient(
        lambda source, receivers, _: source,
        lambda _: maps,
        gradient,
        source,
        list(receivers),
        [],
        learned,
    )


_scope = threading.local()


@contextlib.contextmanager
def backpropagation() -> Iterator[None]:
    """A scope in which every feedback path is the exact one, `B = W`.

    What is computed (or traced) inside is plain backpropagation through the
    same weights, dropout masks and statistics: the reference that feedback
    gradients are measured against.
    """
    outer = in_backpropagation()
    _scope.active = True
    try:
        yield
    finally:
        _scope.active = outer


def in_backpropagation() -> bool:
    """Whether the caller is inside a `backpropagation` scope."""
    return getattr(_scope, "active", False)


@contextlib.contextmanager
def isolated(
    variables: Iterable[keras.Variable],
    given: Iterable[tuple[keras.Variable, Tensor]] = (),
) -> Iterator[None]:
    """A scope that reads variables as they are and drops what it assigns.

    Args:
        variables: All Keras variables that are read or assigned inside.
        given: Other values for some of them: pairs of variable and tensor.
    """
    values = [(variable, variable.value) for variable in variables]
    scope = keras.StatelessScope([*values, *given], initialize_variables=False)
    with scope, backend.own_random_state():
        yield


def gradients_of(
    loss: Callable[[], Tensor],
    variables: Sequence[keras.Variable],
    state: Sequence[keras.Variable],
) -> list[Tensor]:
    """Gradients of `loss()` with respect to Keras variables.

    Args:
        loss: A function without arguments that computes a scalar.
        variables: Keras variables.
        state: All that `loss` reads or assigns. What it assigns is dropped.

    Returns:
        A tensor for each variable: zeros where the loss does not depend on it.
    """

    def of(*values: Tensor) -> Tensor:
        with isolated(state, zip(variables, values)):
            return loss()

    with isolated(state):  # around the gradient too, where rules draw noise
        values = [keras.ops.convert_to_tensor(v) for v in variables]
        return backend.pullback(of, values)
