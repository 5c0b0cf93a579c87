"""What FA layers must compute, worked out without `keras_fa`.

A layer kind is written as the stock layers that make it up (`stages`, one for
each kernel). The error goes down a stage through the stock layer with its
kernel swapped for B, and B comes from a rule written in NumPy.
"""

import copy
import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import backends
import keras
import numpy as np
from backends import array
from keras import layers
from keras import ops

import keras_fa
from keras_fa import constraints
from keras_fa.methods import METHODS

SEED = 7


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer kind, or a variant of one, under test.

    Attributes:
        name: The stock layer's class name.
        arguments: What it is made with.
        shape: The shape of one example.
        unit: For each kernel the presynaptic unit of each weight, as an array
            that broadcasts to the kernel's shape; by hand.
    """

    name: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    unit: tuple[np.ndarray, ...]

    @property
    def fa(self) -> type:
        return getattr(keras_fa, f"FA{self.name}")

    @property
    def stock(self) -> type:
        return getattr(layers, self.name)

    @property
    def separable(self) -> bool:
        return self.name.startswith("Separable")

    @property
    def kernel_arguments(self) -> tuple[str, ...]:
        """The prefixes of `*_initializer`, `*_constraint`, ..."""
        if self.separable:
            return ("depthwise", "pointwise")
        return ("depthwise",) if "Depthwise" in self.name else ("kernel",)

    def constrained(self, constraint: Any) -> dict[str, Any]:
        """The arguments that put a constraint on every kernel."""
        return {
            f"{name}_constraint": constraint for name in self.kernel_arguments
        }

    def initialized(self, initializer: Any) -> dict[str, Any]:
        """The arguments that draw every kernel from an initializer."""
        return {
            f"{name}_initializer": initializer for name in self.kernel_arguments
        }

    def make(self, cls: type, **arguments: Any) -> Any:
        """A built layer with random biases."""
        layer = cls(**{**self.arguments, **arguments})
        layer.build((None, *self.shape))
        if layer.bias is not None:
            values = np.random.default_rng(1).normal(size=layer.bias.shape)
            layer.bias.assign(values)
        return layer

    def stages(self, **arguments: Any) -> list[Any]:
        """Built stock layers without activation, one for each kernel."""
        config = {**self.arguments, **arguments, "activation": None}
        if not self.separable:
            return [self.make(self.stock, **config)]
        size = self.name[-2:]
        filters = config.pop("filters")
        biased = config.pop("use_bias", True)
        depthwise = getattr(layers, f"DepthwiseConv{size}")(
            use_bias=False, **config
        )
        pointwise = getattr(layers, f"Conv{size}")(
            filters,
            1,
            use_bias=biased,
            dtype=config.get("dtype"),
        )
        depthwise.build((None, *self.shape))
        pointwise.build(depthwise.compute_output_shape((None, *self.shape)))
        return [depthwise, pointwise]

    def inputs(self, batch: int = 4) -> np.ndarray:
        """A batch of normal values."""
        return normal((batch, *self.shape), seed=2)


def axis(size: int, position: int, rank: int) -> np.ndarray:
    """Units counted along one axis of a kernel."""
    shape = [1] * rank
    shape[position] = size
    return np.arange(size).reshape(shape)


def grouped_units(rank: int) -> np.ndarray:
    """4 channels in 2 groups, 6 filters: filters 3 to 5 see channels 2, 3."""
    units = np.array([[0, 0, 0, 2, 2, 2], [1, 1, 1, 3, 3, 3]])
    return units.reshape((1,) * (rank - 2) + (2, 6))


# Methods that keep something besides kernels, of each sort one: fixed signs and
# norms; B and fixed signs; what a loss aligns with; maps; a B, an R and maps
# that learn; kernels that do not.
KEEPING = (
    "fa_usf_const_ei",
    "fa_usf_init_ei_silent",
    "bp_alignment",
    "dense_fa",
    "kolen_pollack",
    "pfa",
    "direct_kolen_pollack",
    "frozen",
)


def _kinds() -> dict[str, Kind]:
    conv = {"filters": 3, "kernel_size": 2}
    depth = {"kernel_size": 2, "depth_multiplier": 2}
    sep = {"filters": 3, "kernel_size": 2, "depth_multiplier": 2}
    kinds = {
        "dense": Kind("Dense", {"units": 3}, (5,), (axis(5, 0, 2),)),
        "dense_rank3": Kind("Dense", {"units": 3}, (4, 5), (axis(5, 0, 2),)),
        "einsum": Kind(
            "EinsumDense",
            {
                "equation": "abc,cd->abd",
                "output_shape": (None, 3),
                "bias_axes": "d",
            },
            (4, 5),
            (axis(5, 0, 2),),
        ),
        "einsum_ellipsis": Kind(
            "EinsumDense",
            {"equation": "...x,xyz->...yz", "output_shape": (3, 2)},
            (4, 5),
            (axis(5, 0, 3),),
        ),
        "einsum_attention": Kind(
            "EinsumDense",
            {
                "equation": "abcd,cde->abe",
                "output_shape": (None, 3),
                "bias_axes": "e",
            },
            (4, 2, 5),
            (np.arange(10).reshape(2, 5, 1),),
        ),
        "einsum_batched": Kind(
            "EinsumDense",
            {"equation": "abc,dcb->abd", "output_shape": (4, 3)},
            (4, 5),
            (np.arange(20).reshape(1, 5, 4),),
        ),
    }
    for n, name in enumerate(("Conv1D", "Conv2D", "Conv3D"), start=1):
        shape, rank = (5, 6, 5)[:n], n + 2
        one = (axis(2, -2, rank),)
        kinds[name.lower()] = Kind(name, conv, (*shape, 2), one)
        kinds[f"{name.lower()}_strides"] = Kind(
            name, {**conv, "strides": 2, "padding": "same"}, (*shape, 2), one
        )
        kinds[f"{name.lower()}_transpose"] = Kind(
            f"{name}Transpose", conv, (*shape, 2), (axis(2, -1, rank),)
        )
        kinds[f"{name.lower()}_transpose_strides"] = Kind(
            f"{name}Transpose",
            {**conv, "strides": 2, "padding": "same"},
            (*shape, 2),
            (axis(2, -1, rank),),
        )
    for n, size in ((1, "1D"), (2, "2D")):
        shape, rank = (5, 6)[:n], n + 2
        kinds[f"conv{size.lower()}_groups"] = Kind(
            f"Conv{size}",
            {"filters": 6, "kernel_size": 2, "groups": 2},
            (*shape, 4),
            (grouped_units(rank),),
        )
        kinds[f"conv{size.lower()}_dilation"] = Kind(
            f"Conv{size}",
            {**conv, "dilation_rate": 2},
            (*shape, 2),
            (axis(2, -2, rank),),
        )
        kinds[f"depthwise{size.lower()}"] = Kind(
            f"DepthwiseConv{size}", depth, (*shape, 2), (axis(2, -2, rank),)
        )
        kinds[f"depthwise{size.lower()}_strides"] = Kind(
            f"DepthwiseConv{size}",
            {**depth, "strides": 2, "padding": "same"},
            (*shape, 2),
            (axis(2, -2, rank),),
        )
        both = (axis(2, -2, rank), axis(4, -2, rank))
        kinds[f"separable{size.lower()}"] = Kind(
            f"SeparableConv{size}", sep, (*shape, 2), both
        )
        kinds[f"separable{size.lower()}_strides"] = Kind(
            f"SeparableConv{size}",
            {**sep, "strides": 2, "padding": "same"},
            (*shape, 2),
            both,
        )
    kinds["conv1d_causal"] = Kind(
        "Conv1D", {**conv, "padding": "causal"}, (5, 2), (axis(2, -2, 3),)
    )
    kinds["conv2d_rectangle"] = Kind(
        "Conv2D",
        {"filters": 3, "kernel_size": (3, 2), "strides": (1, 2)},
        (5, 6, 2),
        (axis(2, -2, 4),),
    )
    return kinds


KINDS = _kinds()
BASE_KINDS = (
    "dense einsum conv1d conv2d conv3d depthwise1d depthwise2d separable1d "
    "separable2d conv1d_transpose conv2d_transpose conv3d_transpose"
).split()


@keras.saving.register_keras_serializable(package="tests")
class HalfConcordant(constraints.FeedbackConstraint):
    """A user's rule: half of the error through sign(W), half through B_0."""

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        concordant = keras.ops.abs(feedback_kernel) * keras.ops.sign(kernel)
        return 0.5 * (concordant + feedback_kernel)


def noise(shape: Sequence[int], step: int = 0) -> np.ndarray:
    """What a generator seeded with `SEED` draws at a step."""
    generator = keras.random.SeedGenerator(SEED)
    for _ in range(step):
        generator.next()
    return array(keras.random.normal(shape, seed=generator))


def noisy(kernel: np.ndarray, n: np.ndarray, angle: float | None) -> np.ndarray:
    """BP + Noise, in double precision."""
    kernel, n = kernel.astype("float64"), n.astype("float64")
    norm = np.linalg.norm(kernel)
    if angle is None:
        cosine = np.abs(kernel).sum() / (np.sqrt(kernel.size) * norm)
        angle = np.degrees(np.arccos(cosine))
    n = n - kernel * (n * kernel).sum() / norm**2
    return kernel + np.tan(np.radians(angle)) * norm * n / np.linalg.norm(n)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A feedback rule under test and what it means.

    Attributes:
        arguments: The FA layer's feedback arguments.
        expected: B as a NumPy function of stored B, W, the signs of W_0 and
            the number of steps before.
        kernel_constraint: What constrains the forward kernels.
    """

    arguments: dict[str, Any]
    expected: Callable[..., np.ndarray]
    kernel_constraint: Any = None

    def made_for(self, kind: Kind) -> dict[str, Any]:
        """The arguments of an FA layer of a kind under this rule."""
        # Instances of their own: a shared one draws other noise each time.
        arguments = copy.deepcopy(self.arguments)
        if self.kernel_constraint is None:
            return arguments
        return {**arguments, **kind.constrained(self.kernel_constraint)}


RULES = {
    "fa": Rule({}, lambda b, w, s, t: b),
    "fa_constant": Rule(
        {"feedback_initializer": "constant"},
        lambda b, w, s, t: np.full_like(w, b),
    ),
    "sign_concordance": Rule(
        {"feedback_constraint": "sign_concordance"},
        lambda b, w, s, t: np.abs(b) * np.sign(w),
    ),
    "sign_concordance_constant": Rule(
        {
            "feedback_constraint": "sign_concordance",
            "feedback_initializer": "constant",
        },
        lambda b, w, s, t: b * np.sign(w),
    ),
    "fixed_sign": Rule(
        {"feedback_constraint": "sign_concordance"},
        lambda b, w, s, t: np.abs(b) * s,
        "fixed_sign",
    ),
    "tied_kernel": Rule(
        {"feedback_constraint": "tied_kernel"}, lambda b, w, s, t: w
    ),
    "noisy_kernel": Rule(
        {"feedback_constraint": constraints.NoisyKernel(seed=SEED)},
        lambda b, w, s, t: noisy(w, noise(w.shape, t), None),
    ),
    "noisy_kernel_60": Rule(
        {"feedback_constraint": constraints.NoisyKernel(60.0, seed=SEED)},
        lambda b, w, s, t: noisy(w, noise(w.shape, t), 60.0),
    ),
    "random_magnitude": Rule(
        {
            "feedback_initializer": keras.initializers.RandomNormal(stddev=0.3),
            "feedback_constraint": constraints.RandomMagnitude(seed=SEED),
        },
        lambda b, w, s, t: 0.3 * np.abs(noise(w.shape, t)) * np.sign(w),
    ),
    "kernel_sign": Rule(
        {"feedback_initializer": "kernel_sign"},
        lambda b, w, s, t: s * np.abs(b).max(),
    ),
    "non_neg": Rule(
        {"feedback_constraint": "non_neg"}, lambda b, w, s, t: np.maximum(b, 0)
    ),
    "user": Rule(
        {"feedback_constraint": HalfConcordant()},
        lambda b, w, s, t: 0.5 * (np.abs(b) * np.sign(w) + b),
    ),
}


@dataclasses.dataclass
class Gradients:
    """The output of a layer and where an error at the output goes."""

    y: np.ndarray
    dx: np.ndarray
    kernels: list[np.ndarray]
    bias: np.ndarray | None


def kernels_of(layer: Any) -> list[keras.Variable]:
    """The forward kernels of a layer, in the order in which x meets them."""
    if hasattr(layer, "pointwise_kernel"):
        return [layer.depthwise_kernel, layer.pointwise_kernel]
    return [layer.kernel]


def stored_of(layer: Any) -> list[np.ndarray | None]:
    """The stored feedback kernels of an FA layer, as arrays."""
    stored = layer.feedback_kernel
    stored = stored if isinstance(stored, tuple) else (stored,)
    return [None if b is None else array(b) for b in stored]


def effective_of(layer: Any) -> list[np.ndarray]:
    """What an FA layer says that its errors go through, as arrays."""
    effective = layer.effective_feedback_kernel()
    effective = effective if isinstance(effective, tuple) else (effective,)
    return [array(b) for b in effective]


def gradients(layer: Any, x: Any, dy: Any) -> tuple:
    """`(y, dx, [dW], [dbias])` of a layer, from the backend's autodiff."""
    kernels = kernels_of(layer)
    biases = [] if layer.bias is None else [layer.bias]
    y, (dx,), rest = backends.vjp(layer, layer, [x], dy, [*kernels, *biases])
    return y, dx, rest[: len(kernels)], rest[len(kernels) :]


def computed(
    layer: Any, x: np.ndarray, dy: np.ndarray, compiled: bool
) -> Gradients:
    """What a layer computes, eagerly or compiled."""

    def run(x, dy):
        return gradients(layer, x, dy)

    if compiled:
        run = backends.compiled(run, layer.variables)
    dtype = layer.compute_dtype
    y, dx, kernels, bias = run(
        *(ops.convert_to_tensor(z, dtype) for z in (x, dy))
    )
    return Gradients(
        floats(y),
        floats(dx),
        [floats(k) for k in kernels],
        floats(bias[0]) if bias else None,
    )


def reference(
    kind: Kind,
    layer: Any,
    feedback: Sequence[np.ndarray],
    x: np.ndarray,
    dy: np.ndarray,
    **arguments: Any,
) -> Gradients:
    """What `layer` must compute with given feedback kernels.

    Args:
        kind: The layer's kind.
        layer: Any layer of that kind; its weights and activation are read.
        feedback: B for each kernel.
        x: The inputs.
        dy: The error at the layer's output.
        **arguments: More arguments of the stock layers (`dtype`).
    """
    forward, backward = kind.stages(**arguments), kind.stages(**arguments)
    dtype = forward[0].compute_dtype
    for stage, other, kernel, b in zip(
        forward, backward, kernels_of(layer), feedback
    ):
        stage.kernel.assign(kernel)
        other.kernel.assign(b)
    if layer.bias is not None:
        forward[-1].bias.assign(layer.bias)
    hidden = [ops.convert_to_tensor(x, dtype)]
    for stage in forward:
        hidden.append(stage(hidden[-1]))
    activation = layer.activation or keras.activations.linear
    y, (error,), _ = backends.vjp(None, activation, [hidden[-1]], dy)
    kernels, bias = [], None
    for i in reversed(range(len(forward))):
        _, _, (dw,), db = gradients(forward[i], hidden[i], error)
        _, error, _, _ = gradients(backward[i], hidden[i], error)
        kernels.insert(0, floats(dw))
        if db:
            bias = floats(db[0])
    return Gradients(floats(y), floats(error), kernels, bias)


def error_for(layer: Any, x: np.ndarray) -> np.ndarray:
    """An error at the output of a layer."""
    with keras.StatelessScope(initialize_variables=False):  # noise stays
        return normal(layer(x).shape, seed=5)


def loss_of(method: str) -> Any:
    """A loss that a method takes: a name, or a cross-entropy."""
    if METHODS[method].direct_signal == "error":
        return "mse"
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def floats(tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array of single precision."""
    return array(ops.cast(tensor, "float32"))


def normal(shape: Sequence[int], seed: int) -> np.ndarray:
    """Normal values in single precision."""
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype("float32")


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """The angle between two arrays, in degrees, in double precision."""
    u, v = (np.ravel(z).astype("float64") for z in (a, b))
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    half = np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return float(np.degrees(2 * half))


def assert_close(
    got: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5
) -> None:
    """Asserts equality up to a share of the largest element."""
    assert got.shape == wanted.shape
    scale = max(np.abs(wanted).max(), 1e-30)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


def assert_gradients(
    got: Gradients, wanted: Gradients, tolerance: float = 1e-5
) -> None:
    """Asserts that all errors are those of the reference."""
    assert_close(got.dx, wanted.dx, tolerance)
    assert len(got.kernels) == len(wanted.kernels)
    for ours, theirs in zip(got.kernels, wanted.kernels):
        assert_close(ours, theirs, tolerance)
    assert (got.bias is None) == (wanted.bias is None)
    if got.bias is not None:
        assert_close(got.bias, wanted.bias, tolerance)
