"""PyTorch: gradients of one's own by `torch.autograd.Function`.

Each name does what its namesake in `_tensorflow` does, eagerly. PyTorch prunes
nothing, so what TensorFlow's graphs leave out is left out here by hand: B where
no gradient is taken, the error of a first layer, and the outputs of operations
that are run for the sake of their transpose alone (`_ForTranspose`).
"""

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from keras_fa._types import Feedback
from keras_fa._types import Learned
from keras_fa._types import LinearOp

# An optimizer's step reads any variable, so what a kernel's constraint
# remembers is an ordinary weight of the layer, in `state_dict` and moved by
# `to` as all of these.
TRACKS_CONSTRAINTS = True


def custom_gradient(
    op: LinearOp,
    feedback: Feedback,
    gradient: Callable,
    x: torch.Tensor,
    kernels: list[torch.Tensor],
    biases: list[torch.Tensor],
    learned: Learned | None,
) -> torch.Tensor:
    """`op(x, kernels, biases)` with a gradient of one's own."""
    x, *tensors = map(keras.ops.convert_to_tensor, [x, *kernels, *biases])
    kernels, biases = tensors[: len(kernels)], tensors[len(kernels) :]
    used, receiving = (None, []) if learned is None else learned
    differentiable = any(t.requires_grad for t in (x, *tensors, *receiving))
    if not (differentiable and torch.is_grad_enabled()):
        return op(x, kernels, biases)  # nobody takes a gradient
    if used is None:
        # Here and not in the backward pass, which has threads of its own on a
        # GPU: scopes of Keras's, and random states in them, are the thread's.
        with torch.no_grad():
            used = feedback([kernel.detach() for kernel in kernels])
    counts = len(kernels), len(biases), len(receiving)
    return _Function.apply(
        op, gradient, counts, used, x, *kernels, *biases, *receiving
    )


class _Function(torch.autograd.Function):
    """`op(x, kernels, biases)`, and where its error goes."""

    @staticmethod
    def forward(ctx, op, gradient, counts, back, x, *tensors):
        n, m, _ = ctx.counts = counts
        ctx.op, ctx.gradient = op, gradient
        ctx.save_for_backward(*back, x, *tensors[: n + m])
        return op(x, list(tensors[:n]), list(tensors[n : n + m]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        n, m, receiving = ctx.counts
        tensors = [tensor.detach() for tensor in ctx.saved_tensors]
        biases = [tensors.pop() for _ in range(m)][::-1]
        kernels = [tensors.pop() for _ in range(n)][::-1]
        x, back = tensors.pop(), tensors
        wanted = ctx.needs_input_grad[4]
        dx, dkernels, dbiases, dback = ctx.gradient(
            ctx.op, x, kernels, biases, back, dy, wanted
        )
        dback = dback or [None] * receiving
        return None, None, None, None, dx, *dkernels, *dbiases, *dback


def read_apart(make: Callable[[], list[torch.Tensor]]) -> tuple[list, list]:
    """What `make` returns, for use and for its gradient."""
    made = list(map(keras.ops.convert_to_tensor, make()))
    return made, made


def after(made: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`x`: what runs eagerly runs in the order in which it is written."""
    return x


def pullback(
    function: Callable[..., torch.Tensor],
    arguments: list[torch.Tensor],
    dy: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients of a function's arguments for the error at its output.

    Args:
        function: A function of tensors, linear in each of them if there is a
            `dy`: its values are then not computed.
        arguments: Its arguments.
        dy: The error. Default: 1. The result is a function of it, and of what
            else `function` reads, that can be differentiated once more.
    """
    linear = dy is not None
    again = linear and torch.is_grad_enabled()
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    with (
        torch.enable_grad(),
        _ForTranspose() if linear else contextlib.nullcontext(),
    ):
        y = function(*leaves)
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(
        y,
        leaves,
        dy if linear else torch.ones_like(y),
        create_graph=again,
        materialize_grads=True,
    )
    return list(gradients)


class _ForTranspose(TorchDispatchMode):
    """A scope for linear operations of which only the transpose is wanted.

    Inside, products and sums of what is differentiated are recorded, and not
    computed: their values are zeros that take no memory. What a product is
    differentiated with is as ever: its other factor, which does not depend on
    what is differentiated.
    """

    left_out = frozenset(
        {
            torch.ops.aten.add.Tensor,
            torch.ops.aten.addmm.default,
            torch.ops.aten.baddbmm.default,
            torch.ops.aten.bmm.default,
            torch.ops.aten.convolution.default,
            torch.ops.aten.mm.default,
        }
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.left_out or not any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return func(*args, **kwargs)
        shape, dtype = _result(func, *map(_described, args), **kwargs)
        return args[0].new_zeros((), dtype=dtype).expand(shape)


def _described(argument: object) -> object:
    """What there is to know of an argument before its values; hashable."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


@functools.lru_cache(1024)
def _result(
    func: Callable, *described: object, **kwargs: object
) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of an operation's value. PyTorch takes long to tell."""
    arguments = [
        torch.empty(one[0], dtype=one[1], device="meta")
        if isinstance(one, tuple) and one and isinstance(one[-1], torch.dtype)
        else one
        for one in described
    ]
    value = func(*arguments, **kwargs)
    return value.shape, value.dtype


def without_error(inputs: object) -> None:
    """`None`: Keras has no sparse tensors on PyTorch."""
    return


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """A scope whose draws leave no trace outside.

    Keras's layers without a seed, Dropout's for one, draw from PyTorch's own
    generator, which is in no variable.
    """
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=gpus):
        yield


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of all elements, a scalar, in one pass."""
    flat = torch.reshape(tensor, (-1,))
    return torch.dot(flat, flat)


def compiled(
    function: Callable, reads: Sequence[keras.Variable]
) -> Callable[..., object]:
    """`function` itself; its result has no gradient."""

    def run(*args):
        with torch.no_grad():
            return function(*args)

    return run


def recall(variable: keras.Variable, kernel: torch.Tensor) -> torch.Tensor:
    """The value of a variable that a constraint remembers something in."""
    return variable.value


def remember(variable: keras.Variable, value: torch.Tensor) -> None:
    """Assigns a variable that `recall` reads."""
    variable.assign(value)


def holds(kernel: keras.Variable, as_remembered: Callable) -> bool:
    """Whether a kernel is still what its constraint remembers of it.

    It is, as on TensorFlow: what constraints remember moves with the weights.
    """
    return True
