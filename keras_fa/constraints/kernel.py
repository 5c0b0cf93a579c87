"""Constraints of forward kernels that remember the kernel they were built for.

They are Keras's own kind: the optimizer calls them with the forward kernel
after every update.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa._types import AddWeight
from keras_fa._types import Identifier
from keras_fa._types import Tensor


class KernelConstraint(keras.constraints.Constraint):
    """Base class of forward-kernel constraints that remember something.

    An FA layer copies, builds and saves them. With a stock Keras layer, call
    `build` once its kernel exists:

    ```python
    import keras
    from keras_fa.constraints import ConstantNorm

    layer = keras.layers.Dense(4, kernel_constraint=ConstantNorm())
    layer.build((None, 8))
    layer.kernel_constraint.build(layer.kernel)
    ```

    What is remembered follows from the kernel itself as long as this
    constraint held (`refresh` reads it off again), so whatever way moves the
    kernel's values moves it, too. On TensorFlow and PyTorch it is a weight of
    the layer besides; why not on JAX, the module `keras_fa._jax` says.
    """

    remembers = ""

    def build(
        self,
        kernel: keras.Variable,
        units: np.ndarray | None = None,
        add_weight: AddWeight = keras.Variable,
    ) -> None:
        """Remembers what this constraint keeps of a kernel.

        Args:
            kernel: The forward kernel.
            units: Integer array that broadcasts to the kernel's shape: the
                index of the presynaptic unit of each weight. By default the
                last axis but one counts the units, as in Dense and
                convolution kernels.
            add_weight: Makes the variables. By default they belong to no
                layer.
        """
        self._units = units_along(kernel.shape, -2) if units is None else units
        shape, dtype = self._kind(kernel)
        variable = add_weight(
            shape=shape,
            initializer=lambda shape, dtype: self._of(kernel),
            dtype=dtype,
            trainable=False,
            autocast=False,
            name=f"{kernel.name}_{self.remembers}",
        )
        setattr(self, self.remembers, variable)

    def _kind(self, kernel: keras.Variable) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of what is remembered."""
        raise NotImplementedError

    def _of(self, kernel: Tensor) -> Tensor:
        """What is remembered of a kernel."""
        raise NotImplementedError

    def _recalled(self, kernel: Tensor) -> Tensor:
        """What was remembered, for the kernel of this moment."""
        variable = getattr(self, self.remembers)
        if variable is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} does not know its kernel yet. Give it to an FA layer, "
                f"which builds it, or call `{name}.build(layer.kernel)` once a "
                "stock layer is built."
            )
        return _gradients.backend.recall(variable, kernel)

    @property
    def state(self) -> dict[str, keras.Variable]:
        """What this constraint remembers, by name. To be read."""
        return {self.remembers: getattr(self, self.remembers)}

    def refresh(self, kernel: keras.Variable) -> None:
        """Remembers a kernel anew, after other weights were loaded."""
        _gradients.backend.remember(
            getattr(self, self.remembers), self._of(kernel)
        )

    def holds(self, kernel: Tensor) -> bool:
        """Whether a kernel is as it is remembered."""
        change = ops.max(ops.abs(self(kernel) - kernel))
        return bool(change <= 0.01 * ops.max(ops.abs(kernel)))

    def initial_kernel(self, kernel: Tensor, units: np.ndarray) -> Tensor:
        """W_0 under this constraint, made of the values that were drawn."""
        return kernel

    def signed(self, kernel: Tensor) -> Tensor:
        """W as feedback rules see it: under fixed signs, zeros have theirs."""
        return kernel


@keras.saving.register_keras_serializable(package="keras_fa")
class FixedSign(KernelConstraint):
    """E/I: each forward weight keeps the sign it had when this was built.

    After an update `W <- s * max(s * W, 0)`, with s the fixed signs, +1
    (excitatory) or -1 (inhibitory). A weight that would cross zero stops at
    zero and keeps its sign: an inhibitory one is -0.0, and feedback rules see
    that sign and not sign(0). With `silent_zeros` they see sign(0) = 0: where W
    is zero, sign-concordant B is, and the connection is silent both ways until
    an update moves it again. A weight that starts at zero is excitatory. An
    optimizer's `use_ema=True` averages kernels before this constraint has run:
    `keras_fa.callbacks.RefuseAverages` refuses the two together.

    With `per="unit"` all weights out of one presynaptic unit have one sign
    (Dale's law). The layer then draws W_0 as ever and gives a random
    `round(excitatory_fraction * units)` of the units the sign +1 and the rest
    -1. The inhibitory weights are scaled by the ratio of excitatory to
    inhibitory units, so that the two balance for equal inputs, and all weights
    together so that the norm is that of the draw. Balancing and scaling are
    our choice. `keras_fa.convert` does so with the weights of a stock model,
    in the place of a draw, and warns that its outputs are then others. When
    other weights are loaded, a unit's sign becomes that of the sum of its
    weights, with a warning if some of these have the other sign: the next
    update sets them to zero.

    Args:
        per: `"synapse"` (default) or `"unit"`.
        excitatory_fraction: Float in [0, 1], for `per="unit"`. Default 0.8.
        seed: Integer or `None`, for `per="unit"`: which units are excitatory.
        silent_zeros: Boolean, default `False`. Whether feedback rules see
            sign(0) where a weight is zero, and not its fixed sign.

    Raises:
        ValueError: If an argument is out of range.

    Source: Moskovitz et al. (2018), fixed excitatory/inhibitory connectivity.
    What B is where W has stopped at zero, the source does not say.

    Example:

    ```python
    from keras_fa import FADense
    from keras_fa.constraints import FixedSign

    layer = FADense(
        10,
        kernel_constraint=FixedSign(per="unit", excitatory_fraction=0.75),
        feedback_constraint="sign_concordance",
    )
    ```
    """

    remembers = "excitatory"
    excitatory = None

    def __init__(
        self,
        per: str = "synapse",
        excitatory_fraction: float = 0.8,
        seed: int | None = None,
        silent_zeros: bool = False,
    ) -> None:
        if per not in ("synapse", "unit"):
            raise ValueError(
                f"`per` must be 'synapse' or 'unit'. Received: per={per!r}"
            )
        if not 0 <= excitatory_fraction <= 1:
            raise ValueError(
                "`excitatory_fraction` must be between 0 and 1. Received: "
                f"excitatory_fraction={excitatory_fraction}"
            )
        self.per = per
        self.excitatory_fraction = excitatory_fraction
        self.seed = seed
        self.silent_zeros = silent_zeros

    def initial_kernel(self, kernel: Tensor, units: np.ndarray) -> Tensor:
        """W_0 under this constraint, made of the values that were drawn."""
        if self.per == "synapse":
            return kernel + 0.0  # -0.0 is an inhibitory weight
        count = int(units.max()) + 1
        excitatory = round(self.excitatory_fraction * count)
        draw = keras.initializers.RandomNormal(seed=self.seed)((count,))
        rank = ops.argsort(ops.argsort(draw))
        both = 0 < excitatory < count
        balance = excitatory / (count - excitatory) if both else 1.0
        factors = ops.where(rank < excitatory, 1.0, -balance)
        signed = ops.abs(kernel) * ops.cast(
            ops.take(factors, units), kernel.dtype
        )
        norms = kernel_norm(kernel), kernel_norm(signed)
        return signed * ops.divide_no_nan(*norms)

    def _kind(self, kernel: keras.Variable) -> tuple[tuple[int, ...], str]:
        per_synapse = self.per == "synapse"
        return kernel.shape if per_synapse else self._units.shape, "bool"

    def _of(self, kernel: Tensor) -> Tensor:
        kernel = ops.convert_to_tensor(kernel)
        positive = ops.logical_not(ops.signbit(kernel))
        if self.per == "synapse":
            return positive
        units = np.broadcast_to(self._units, kernel.shape)
        full = ops.cast(kernel, "float32")  # half has no number so small
        sums = ops.segment_sum(
            ops.reshape(_away_from_zero(full, positive), (-1,)),
            units.reshape(-1),
            num_segments=int(units.max()) + 1,
        )
        return ops.take(sums, self._units) >= 0

    def lost(self, kernel: Tensor) -> float:
        """The share of weights that would be zeroed if this kernel were W_0.

        Those of another sign than the sum of their presynaptic unit's.
        """
        kernel = ops.convert_to_tensor(kernel)
        wrong = ops.where(self._of(kernel), kernel, -kernel) < 0
        return float(ops.mean(ops.cast(wrong, "float32")))

    def signed(self, kernel: Tensor) -> Tensor:
        """A kernel whose zeros have their fixed sign: ±0 is ±1.2e-38."""
        if self.silent_zeros:
            return kernel
        signed = _away_from_zero(kernel, self._recalled(kernel))
        return ops.where(ops.equal(kernel, 0.0), signed, kernel)

    def refresh(self, kernel: keras.Variable) -> None:
        super().refresh(kernel)
        lost = self.lost(kernel)
        if lost:
            warnings.warn(
                f"{100 * lost:.0f} % of the weights of a kernel do not have "
                "the sign of their presynaptic unit, which is that of the "
                "unit's sum: the next update sets them to zero.",
                stacklevel=2,
            )

    def __call__(self, kernel: Tensor) -> Tensor:
        kernel = ops.convert_to_tensor(kernel)
        excitatory = self._recalled(kernel)
        stops = ops.where(excitatory, kernel, -kernel) <= 0  # not NaN
        zeros = ops.zeros_like(kernel)
        stopped = ops.where(excitatory, zeros, -zeros)
        return ops.where(stops, stopped, kernel)

    def get_config(self) -> dict:
        return {
            "per": self.per,
            "excitatory_fraction": self.excitatory_fraction,
            "seed": self.seed,
            "silent_zeros": self.silent_zeros,
        }


@keras.saving.register_keras_serializable(package="keras_fa")
class ConstantNorm(KernelConstraint):
    """Const.: the forward kernel keeps the norm it had when this was built.

    After an update `W <- W ||W_0|| / ||W||`, with the Frobenius norm of the
    whole kernel. A kernel of zeros stays one. An optimizer's `use_ema=True`
    overwrites kernels with averages after the constraints have run and so
    breaks the norm: `keras_fa.callbacks.RefuseAverages` refuses the two
    together.

    Source: Moskovitz et al. (2018), constant forward norms.

    Example:

    ```python
    from keras_fa import FADense
    from keras_fa.constraints import ConstantNorm

    layer = FADense(10, kernel_constraint=ConstantNorm())
    ```
    """

    remembers = "norm"
    norm = None

    def _kind(self, kernel: keras.Variable) -> tuple[tuple[int, ...], str]:
        return (), kernel.dtype

    def _of(self, kernel: Tensor) -> Tensor:
        return kernel_norm(kernel)

    def __call__(self, kernel: Tensor) -> Tensor:
        kernel = ops.convert_to_tensor(kernel)
        norm = ops.cast(self._recalled(kernel), kernel.dtype)
        return kernel * ops.divide_no_nan(norm, kernel_norm(kernel))


@keras.saving.register_keras_serializable(package="keras_fa")
class Frozen(KernelConstraint):
    """The forward kernel stays as it is: `W_t = W_0`, to the last bit.

    The kernel is no trainable weight, whatever its layer's `trainable` says;
    that flag stays as it is. Biases and other weights go on learning. As a
    part of the layer's config it holds for clones and saved models, too.
    Setting `trainable = True` on the layer or on a model around it sets that
    of all weights in it, as ever in Keras: `keras_fa.refresh(model)` freezes
    the kernel again.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, kernel_constraint="frozen")
    layer.build((None, 4))
    assert [w.name for w in layer.trainable_weights] == ["bias"]
    ```
    """

    state: ClassVar[dict[str, keras.Variable]] = {}

    def build(
        self,
        kernel: keras.Variable,
        units: np.ndarray | None = None,
        add_weight: AddWeight = keras.Variable,
    ) -> None:
        kernel.trainable = False

    def refresh(self, kernel: keras.Variable) -> None:
        kernel.trainable = False

    def holds(self, kernel: Tensor) -> bool:
        return True

    def __call__(self, kernel: Tensor) -> Tensor:
        return kernel


@keras.saving.register_keras_serializable(package="keras_fa")
class Chain(KernelConstraint):
    """Several kernel constraints, one after the other.

    They run in this order, whatever the order given: `FixedSign`, others,
    `ConstantNorm`. A layer's `kernel_constraint=[...]` makes one.

    Args:
        constraints: Kernel constraints: instances, names or configs.

    Raises:
        ValueError: If there are two `FixedSign` or two `ConstantNorm`.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, kernel_constraint=["constant_norm", "fixed_sign"])
    ```
    """

    def __init__(self, constraints: Sequence[Identifier]) -> None:
        from keras_fa.constraints import get_kernel_constraint

        parts = [
            part
            for constraint in constraints
            for part in parts_of(get_kernel_constraint(constraint))
        ]
        order = {FixedSign: 0, ConstantNorm: 2}
        self.constraints = sorted(parts, key=lambda c: order.get(type(c), 1))
        self._ours = [p for p in parts if isinstance(p, KernelConstraint)]
        kinds = [type(part) for part in self._ours]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "A kernel takes one constraint of a kind. Received: "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )

    def __copy__(self) -> "Chain":
        return Chain([copy.copy(c) for c in self.constraints])

    def build(
        self,
        kernel: keras.Variable,
        units: np.ndarray | None = None,
        add_weight: AddWeight = keras.Variable,
    ) -> None:
        for part in self._ours:
            part.build(kernel, units, add_weight)

    @property
    def state(self) -> dict[str, keras.Variable]:
        return {k: v for part in self._ours for k, v in part.state.items()}

    def refresh(self, kernel: keras.Variable) -> None:
        for part in self._ours:
            part.refresh(kernel)

    def holds(self, kernel: Tensor) -> bool:
        return all(part.holds(kernel) for part in self._ours)

    def initial_kernel(self, kernel: Tensor, units: np.ndarray) -> Tensor:
        for part in self._ours:
            kernel = part.initial_kernel(kernel, units)
        return kernel

    def signed(self, kernel: Tensor) -> Tensor:
        for part in self._ours:
            kernel = part.signed(kernel)
        return kernel

    def __call__(self, kernel: Tensor) -> Tensor:
        for constraint in self.constraints:
            kernel = constraint(kernel)
        return kernel

    def get_config(self) -> dict:
        return {
            "constraints": [
                keras.constraints.serialize(c) for c in self.constraints
            ]
        }


def parts_of(constraint: object) -> list:
    """A kernel's constraint as the list of what it is made of."""
    if constraint is None:
        return []
    if isinstance(constraint, Chain):
        return list(constraint.constraints)
    return [constraint]


def units_along(shape: tuple, axis: int) -> np.ndarray:
    """The index of each weight along one axis, broadcasting over the others.

    Args:
        shape: The kernel's shape.
        axis: The axis that counts presynaptic units.

    Returns:
        An integer array with `shape[axis]` along `axis` and 1 elsewhere.
    """
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    return np.arange(shape[axis]).reshape(ones)


def _away_from_zero(kernel: Tensor, positive: Tensor) -> Tensor:
    least = float(np.finfo("float32").tiny)
    size = ops.maximum(ops.abs(kernel), least)
    return ops.where(positive, size, -size)


def kernel_norm(kernel: Tensor) -> Tensor:
    """The Frobenius norm of a whole kernel, a scalar of its dtype."""
    kernel = ops.convert_to_tensor(kernel)
    # In half precision the sum of squares would overflow.
    full = ops.cast(kernel, keras.backend.result_type(kernel.dtype, "float32"))
    return ops.cast(
        ops.sqrt(_gradients.backend.sum_of_squares(full)), kernel.dtype
    )
