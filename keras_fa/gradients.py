"""The error path: the only place that touches a backend's autodiff.

Backpropagation sends the error `dy` that arrives at a layer down through the
transpose of the layer's own kernel, `dx = op^T(dy, W)`. Feedback alignment
sends it through another kernel, `dx = op^T(dy, B)`, and leaves the rest as it
is: the output is `op(x, W)` and the kernel's own gradient is the true local
product of `x` and `dy`.

Everything that the rest of the package needs of a backend is listed here. A
backend is one module that implements these names; `gradients_tensorflow` says
what each of them does:

- `feedback_op`: an operation that computes with W and sends errors through B;
- `is_sparse`: whether an input is of the backend's sparse kind;
- `send_error`: the identity, whose error also goes to other tensors (DFA);
- `gradients_of`: the gradients of a loss with respect to variables;
- `compiled`: a function compiled for the backend;
- `followed_by`: a training step with something done at its end;
- `synchronize`: the weights of a model that is being trained, made readable;
- `sum_of_squares`: of a kernel, the fastest way;
- `recall`, `remember`, `exported`: what is kept beside a model's own variables.
"""

import contextlib
import threading
from collections.abc import Iterable
from collections.abc import Iterator

import keras

if keras.backend.backend() == "tensorflow":
    from keras_fa.gradients_tensorflow import compiled
    from keras_fa.gradients_tensorflow import exported
    from keras_fa.gradients_tensorflow import feedback_op
    from keras_fa.gradients_tensorflow import followed_by
    from keras_fa.gradients_tensorflow import gradients_of
    from keras_fa.gradients_tensorflow import is_sparse
    from keras_fa.gradients_tensorflow import recall
    from keras_fa.gradients_tensorflow import remember
    from keras_fa.gradients_tensorflow import send_error
    from keras_fa.gradients_tensorflow import sum_of_squares
    from keras_fa.gradients_tensorflow import synchronize
elif keras.backend.backend() == "jax":
    from keras_fa.gradients_jax import compiled
    from keras_fa.gradients_jax import exported
    from keras_fa.gradients_jax import feedback_op
    from keras_fa.gradients_jax import followed_by
    from keras_fa.gradients_jax import gradients_of
    from keras_fa.gradients_jax import is_sparse
    from keras_fa.gradients_jax import recall
    from keras_fa.gradients_jax import remember
    from keras_fa.gradients_jax import send_error
    from keras_fa.gradients_jax import sum_of_squares
    from keras_fa.gradients_jax import synchronize
else:
    raise ImportError(
        "keras_fa runs on Keras's backends tensorflow and jax. Received: "
        f"KERAS_BACKEND={keras.backend.backend()}. Set KERAS_BACKEND=tensorflow"
        " or jax in the environment, or `backend` in keras.json, before keras "
        "is imported."
    )

__all__ = [
    "backpropagation",
    "compiled",
    "exported",
    "feedback_op",
    "followed_by",
    "gradients_of",
    "in_backpropagation",
    "is_sparse",
    "isolated",
    "recall",
    "remember",
    "send_error",
    "sum_of_squares",
    "synchronize",
]

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


def isolated(variables: Iterable[keras.Variable]) -> keras.StatelessScope:
    """A scope that reads variables as they are and drops what it assigns.

    Args:
        variables: All Keras variables that are read or assigned inside.
    """
    return keras.StatelessScope(
        [(variable, variable.value) for variable in variables],
        initialize_variables=False,
    )
