"""Rules for feedback kernels and constraints of forward kernels.

A *feedback constraint* says what carries the error down. It is called inside
the compiled step with the stored feedback kernel and the forward kernel of
that moment, and returns the kernel B of `dx = op^T(dy, B)`. So B is never
older than W.

A *kernel constraint* is Keras's own: the optimizer calls it with the forward
kernel after every update. `FixedSign` and `ConstantNorm` remember something of
the kernel they were built for (its signs, its norm). An FA layer makes a copy
of its own, builds it, and saves what it remembers with the weights.

A rule of one's own is a class:

```python
import keras
from keras import ops
from keras_fa import FADense
from keras_fa.constraints import FeedbackConstraint


@keras.saving.register_keras_serializable(package="my_rules")
class HalfConcordant(FeedbackConstraint):
    "Half of the error through sign(W), half through fixed random weights."

    def __call__(self, feedback_kernel, kernel):
        concordant = ops.abs(feedback_kernel) * ops.sign(kernel)
        return 0.5 * (concordant + feedback_kernel)


layer = FADense(10, feedback_constraint=HalfConcordant())
```
"""

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fa import gradients


class FeedbackConstraint(keras.constraints.Constraint):
    """Base class of feedback rules: `B_t = rule(stored B, W_t)`.

    Subclasses implement `__call__(feedback_kernel, kernel)`, both tensors of
    the kernel's shape in the kernel's variable dtype (a constant feedback
    kernel comes as a scalar), and return a tensor of that shape. Under
    `FixedSign` the kernel that a rule sees has its fixed sign where its weight
    is exactly zero, so that `sign(kernel)` is never 0.

    Attributes:
        stores_feedback_kernel: Whether the layer keeps a feedback kernel for
            this rule. If `False`, the rule is called with `None` for it.
        fixed_magnitude: Whether `StrictNormalization` leaves the stored
            feedback kernel as it is.
    """

    stores_feedback_kernel = True
    fixed_magnitude = False

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} must implement "
            "__call__(feedback_kernel, kernel)."
        )

    def build(self) -> None:
        """Makes what this rule needs for one kernel. Optional."""


@keras.saving.register_keras_serializable(package="keras_fa")
class SignConcordance(FeedbackConstraint):
    """Uniform sign-concordant feedback: `B_t = |B_0| * sign(W_t)`.

    The signs follow the forward kernel, the magnitudes are the stored ones.
    With `feedback_initializer="constant"` and the callback
    `StrictNormalization` it is uSF SN, `B_t = ||W_t|| sign(W_t) /
    ||sign(W_t)||`. A weight that is exactly zero carries no error, except
    under `FixedSign`, whose sign it then takes.

    Args:
        fixed_magnitude: Boolean, default `False`. Whether
            `StrictNormalization` leaves the stored magnitudes as they are
            (uSF Init.).

    Source: Moskovitz et al. (2018); Liao, Leibo & Poggio (2016).

    Example:

    ```python
    from keras_fa import FAConv2D
    from keras_fa.constraints import SignConcordance

    layer = FAConv2D(64, 3, feedback_constraint=SignConcordance())
    ```
    """

    def __init__(self, fixed_magnitude: bool = False) -> None:
        self.fixed_magnitude = fixed_magnitude

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        return ops.abs(feedback_kernel) * ops.sign(kernel)

    def get_config(self) -> dict:
        return {"fixed_magnitude": self.fixed_magnitude}


@keras.saving.register_keras_serializable(package="keras_fa")
class TiedKernel(FeedbackConstraint):
    """Backpropagation: `B_t = W_t`. Nothing is stored.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_constraint="tied_kernel")
    ```
    """

    stores_feedback_kernel = False

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        return kernel


@keras.saving.register_keras_serializable(package="keras_fa")
class NoisyKernel(FeedbackConstraint):
    """The forward kernel plus noise: `B_t = W_t + tan(a) ||W_t|| n / ||n||`.

    `n` is Gaussian noise, fresh at every step and made orthogonal to W_t, so
    that the angle between B_t and W_t is exactly `a`. Nothing is stored but
    the state of the random generator, which every forward pass moves on. This
    is BP + Noise; its definition is our reading of the paper's name for it.

    Args:
        angle: Float in [0, 90), degrees, or `None` (default): the angle that
            strictly normalized sign-concordant feedback would have at this
            step, `cos a = ||W||_1 / (sqrt(size) ||W||)`.
        seed: Integer or `None`, the seed of the noise.

    Raises:
        ValueError: If `angle` is out of range.

    Example:

    ```python
    from keras_fa import FADense
    from keras_fa.constraints import NoisyKernel

    layer = FADense(10, feedback_constraint=NoisyKernel(angle=45.0))
    ```
    """

    stores_feedback_kernel = False

    def __init__(
        self, angle: float | None = None, seed: int | None = None
    ) -> None:
        if angle is not None and not 0 <= angle < 90:
            raise ValueError(
                "`angle` must be None or at least 0 and less than 90 degrees. "
                f"Received: angle={angle}"
            )
        self.angle = angle
        self.seed = seed

    def build(self) -> None:
        self.seed_generator = keras.random.SeedGenerator(self.seed)

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        noise = keras.random.normal(
            kernel.shape, dtype=kernel.dtype, seed=self.seed_generator
        )
        squared_norm = ops.sum(ops.square(kernel))
        noise = noise - kernel * _divide(ops.sum(noise * kernel), squared_norm)
        return kernel + kernel_norm(kernel) * self._tangent(kernel) * _divide(
            noise, kernel_norm(noise)
        )

    def _tangent(self, kernel: Any) -> Any:
        if self.angle is not None:
            return math.tan(math.radians(self.angle))
        # tan a = sqrt(1 / cos^2 a - 1)
        cosine = _divide(
            ops.sum(ops.abs(kernel)),
            math.sqrt(math.prod(kernel.shape)) * kernel_norm(kernel),
        )
        return ops.sqrt(
            ops.maximum(_divide(1.0, ops.square(cosine)) - 1.0, 0.0)
        )

    def get_config(self) -> dict:
        return {"angle": self.angle, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_fa")
class Stored(FeedbackConstraint):
    """A stock constraint on the stored feedback kernel: `B_t = c(B_0)`.

    FA layers wrap a one-argument Keras constraint in this by themselves.

    Args:
        constraint: A `keras.constraints.Constraint`, its name, or any callable
            of one tensor.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_constraint="non_neg")
    ```
    """

    def __init__(self, constraint: Any) -> None:
        self.constraint = keras.constraints.get(constraint)

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        return self.constraint(feedback_kernel)

    def get_config(self) -> dict:
        return {"constraint": keras.constraints.serialize(self.constraint)}


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
    """

    def build(self, kernel: Any, units: np.ndarray | None = None) -> None:
        """Remembers what this constraint keeps of a kernel.

        Args:
            kernel: The forward kernel, a Keras variable.
            units: Integer array that broadcasts to the kernel's shape: the
                index of the presynaptic unit of each weight. By default the
                last axis but one counts the units, as in Dense and
                convolution kernels.
        """
        raise NotImplementedError

    def refresh(self, kernel: Any) -> None:
        """Remembers a kernel anew, after other weights were loaded."""
        raise NotImplementedError

    @property
    def state(self) -> dict[str, keras.Variable]:
        """What this constraint remembers, by name.

        To be read. It changes by `refresh` and by loading alone: on JAX a
        compiled step holds these values as constants.
        """
        raise NotImplementedError

    def _not_built(self) -> ValueError:
        name = type(self).__name__
        return ValueError(
            f"{name} does not know its kernel yet. Give it to an FA layer, "
            f"which builds it, or call `{name}.build(layer.kernel)` once a "
            "stock layer is built."
        )


@keras.saving.register_keras_serializable(package="keras_fa")
class FixedSign(KernelConstraint):
    """E/I: each forward weight keeps the sign it had when this was built.

    After an update `W <- s * max(s * W, 0)`, with s the fixed signs, +1
    (excitatory) or -1 (inhibitory). A weight that would cross zero stops at
    zero and keeps its sign: feedback rules see that sign and not sign(0). A
    weight that starts at zero is excitatory.

    With `per="unit"` all weights out of one presynaptic unit have one sign
    (Dale's law). The layer then draws W_0 as ever and gives a random
    `round(excitatory_fraction * units)` of the units the sign +1 and the rest
    -1. The inhibitory weights are scaled by the ratio of excitatory to
    inhibitory units, so that the two balance for equal inputs, and all weights
    together so that the norm is that of the draw. Balancing and scaling are
    our choice. When other weights are loaded, a unit's sign becomes that of
    the sum of its weights, with a warning if some of these have the other
    sign: the next update sets them to zero.

    Args:
        per: `"synapse"` (default) or `"unit"`.
        excitatory_fraction: Float in [0, 1], for `per="unit"`. Default 0.8.
        seed: Integer or `None`, for `per="unit"`: which units are excitatory.

    Raises:
        ValueError: If an argument is out of range.

    Source: Moskovitz et al. (2018), fixed excitatory/inhibitory connectivity.

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

    def __init__(
        self,
        per: str = "synapse",
        excitatory_fraction: float = 0.8,
        seed: int | None = None,
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
        self.excitatory = None

    def initial_kernel(self, kernel: Any, units: np.ndarray) -> Any:
        """W_0 under this constraint, made of the values that were drawn."""
        if self.per == "synapse":
            return kernel
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
        return signed * _divide(kernel_norm(kernel), kernel_norm(signed))

    def build(self, kernel: Any, units: np.ndarray | None = None) -> None:
        if units is None:
            units = units_along(kernel.shape, -2)
        self._units = units
        shape = kernel.shape if self.per == "synapse" else units.shape
        self.excitatory = keras.Variable(
            lambda shape, dtype: self._positive(kernel),
            shape=shape,
            dtype="bool",
            trainable=False,
            name="excitatory",
        )

    def _positive(self, kernel: Any) -> Any:
        kernel = ops.convert_to_tensor(kernel)
        if self.per == "unit":
            units = np.broadcast_to(self._units, kernel.shape)
            sums = ops.segment_sum(
                ops.reshape(kernel, (-1,)),
                units.reshape(-1),
                num_segments=int(units.max()) + 1,
            )
            kernel = ops.take(sums, self._units)
        return kernel >= 0

    def refresh(self, kernel: Any) -> None:
        gradients.remember(self.excitatory, self._positive(kernel))
        kernel = ops.convert_to_tensor(kernel)
        lost = float(ops.mean(ops.cast(self(kernel) != kernel, "float32")))
        if lost:
            warnings.warn(
                f"{100 * lost:.0f} % of the weights of a kernel do not have "
                "the sign of their presynaptic unit, which is that of the "
                "unit's sum: the next update sets them to zero.",
                stacklevel=2,
            )

    @property
    def state(self) -> dict[str, keras.Variable]:
        return {"excitatory": self.excitatory}

    def __call__(self, kernel: Any) -> Any:
        if self.excitatory is None:
            raise self._not_built()
        kernel = ops.convert_to_tensor(kernel)
        excitatory = gradients.recall(self.excitatory, kernel)
        keeps_sign = ops.where(excitatory, kernel, -kernel) > 0
        return ops.where(keeps_sign, kernel, ops.zeros_like(kernel))

    def get_config(self) -> dict:
        return {
            "per": self.per,
            "excitatory_fraction": self.excitatory_fraction,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="keras_fa")
class ConstantNorm(KernelConstraint):
    """Const.: the forward kernel keeps the norm it had when this was built.

    After an update `W <- W ||W_0|| / ||W||`, with the Frobenius norm of the
    whole kernel. A kernel of zeros stays one. An optimizer's `use_ema=True`
    overwrites kernels with averages after the constraints have run and so
    breaks the norm: do not use the two together.

    Source: Moskovitz et al. (2018), constant forward norms.

    Example:

    ```python
    from keras_fa import FADense
    from keras_fa.constraints import ConstantNorm

    layer = FADense(10, kernel_constraint=ConstantNorm())
    ```
    """

    def __init__(self) -> None:
        self.norm = None

    def build(self, kernel: Any, units: np.ndarray | None = None) -> None:
        self.norm = keras.Variable(
            lambda shape, dtype: kernel_norm(ops.convert_to_tensor(kernel)),
            shape=(),
            dtype=kernel.dtype,
            trainable=False,
            name="norm",
        )

    def refresh(self, kernel: Any) -> None:
        norm = kernel_norm(ops.convert_to_tensor(kernel))
        gradients.remember(self.norm, norm)

    @property
    def state(self) -> dict[str, keras.Variable]:
        return {"norm": self.norm}

    def __call__(self, kernel: Any) -> Any:
        if self.norm is None:
            raise self._not_built()
        kernel = ops.convert_to_tensor(kernel)
        norm = gradients.recall(self.norm, kernel)
        return kernel * _divide(norm, kernel_norm(kernel))


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

    def __init__(self, constraints: Sequence[Any]) -> None:
        parts = []
        for constraint in map(get_kernel_constraint, constraints):
            inner = isinstance(constraint, Chain)
            parts += constraint.constraints if inner else [constraint]
        self.constraints = sorted(parts, key=_position)
        kinds = [type(c) for c in self._stateful()]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "A kernel takes one constraint of a kind. Received: "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )

    def __copy__(self) -> "Chain":
        return Chain([copy.copy(c) for c in self.constraints])

    def _stateful(self) -> list[KernelConstraint]:
        return [c for c in self.constraints if isinstance(c, KernelConstraint)]

    def initial_kernel(self, kernel: Any, units: np.ndarray) -> Any:
        """W_0 under these constraints, made of the values that were drawn."""
        for constraint in self.constraints:
            if isinstance(constraint, FixedSign):
                kernel = constraint.initial_kernel(kernel, units)
        return kernel

    def build(self, kernel: Any, units: np.ndarray | None = None) -> None:
        for constraint in self._stateful():
            constraint.build(kernel, units)

    def refresh(self, kernel: Any) -> None:
        for constraint in self._stateful():
            constraint.refresh(kernel)

    @property
    def state(self) -> dict[str, keras.Variable]:
        return {
            name: variable
            for constraint in self._stateful()
            for name, variable in constraint.state.items()
        }

    def __call__(self, kernel: Any) -> Any:
        for constraint in self.constraints:
            kernel = constraint(kernel)
        return kernel

    def get_config(self) -> dict:
        return {
            "constraints": [
                keras.constraints.serialize(c) for c in self.constraints
            ]
        }


def get(identifier: Any) -> FeedbackConstraint | None:
    """Resolves a `feedback_constraint`.

    Args:
        identifier: `None` (B is the stored kernel: FA), a feedback constraint,
            its name (`"sign_concordance"`), its config, or a stock Keras
            constraint, which is applied to the stored kernel.

    Returns:
        A `FeedbackConstraint`, or `None`.

    Raises:
        ValueError: If the name is unknown, or names a forward-kernel
            constraint.
    """
    constraint = _resolve(identifier, _FEEDBACK_CONSTRAINTS)
    if isinstance(constraint, KernelConstraint):
        raise ValueError(
            f"{type(constraint).__name__} constrains forward kernels: give it "
            "as `kernel_constraint`. Received: "
            f"feedback_constraint={identifier}"
        )
    if constraint is None or isinstance(constraint, FeedbackConstraint):
        return constraint
    if inspect.isfunction(constraint) and _arguments(constraint) != 1:
        raise ValueError(
            "A function is applied to the stored feedback kernel alone and "
            "takes one argument. A rule of (feedback_kernel, kernel) is a "
            "subclass of keras_fa.constraints.FeedbackConstraint. Received: "
            f"feedback_constraint={identifier}"
        )
    return Stored(constraint)


def _arguments(function: Any) -> int:
    """How many arguments a function needs."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is inspect.Parameter.empty for p in parameters)


def get_kernel_constraint(identifier: Any) -> Any:
    """Resolves a forward kernel's constraint.

    Args:
        identifier: What `keras.constraints.get` takes, one of this module's
            names (`"fixed_sign"`, `"constant_norm"`), or a list of these,
            which makes a `Chain`.

    Returns:
        A constraint, or `None`.

    Raises:
        ValueError: If the name is unknown, or names a feedback rule.
    """
    if isinstance(identifier, (list, tuple)):
        return Chain(identifier)
    constraint = _resolve(identifier, _KERNEL_CONSTRAINTS)
    if isinstance(constraint, FeedbackConstraint):
        raise ValueError(
            f"{type(constraint).__name__} is a rule for feedback: give it as "
            f"`feedback_constraint`. Received: kernel_constraint={identifier}"
        )
    return constraint


def compose(first: Any, second: Any) -> Any:
    """The constraint that applies both; either may be `None`.

    A constraint of a kind that is there already is not added again.
    """
    parts = []
    for constraint in (first, second):
        inner = (
            constraint.constraints
            if isinstance(constraint, Chain)
            else [constraint]
        )
        for part in inner:
            again = isinstance(part, KernelConstraint) and any(
                type(part) is type(p) for p in parts
            )
            if part is not None and not again:
                parts.append(part)
    if len(parts) > 1:
        return Chain(parts)
    return parts[0] if parts else None


def without_ours(constraint: Any) -> Any:
    """What is left of a kernel constraint without those of this module."""
    if isinstance(constraint, Chain):
        left = [
            part
            for part in constraint.constraints
            if not isinstance(part, KernelConstraint)
        ]
        if len(left) > 1:
            raise ValueError(
                "A stock layer takes one kernel constraint. Received: "
                f"{', '.join(type(part).__name__ for part in left)}. Write one "
                "constraint that does the work of them all."
            )
        return left[0] if left else None
    return None if isinstance(constraint, KernelConstraint) else constraint


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


def kernel_norm(kernel: Any) -> Any:
    """The Frobenius norm of a whole kernel, a scalar of its dtype."""
    kernel = ops.convert_to_tensor(kernel)
    # In half precision the sum of squares would overflow.
    full = ops.cast(kernel, keras.backend.result_type(kernel.dtype, "float32"))
    return ops.cast(ops.sqrt(gradients.sum_of_squares(full)), kernel.dtype)


def _divide(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    return ops.divide_no_nan(a, b)


def _position(constraint: Any) -> int:
    if isinstance(constraint, FixedSign):
        return 0
    return 2 if isinstance(constraint, ConstantNorm) else 1


def _resolve(identifier: Any, ours: dict[str, type]) -> Any:
    if isinstance(identifier, str):
        name = identifier.removeprefix("keras_fa>").lower().replace("_", "")
        for known, cls in {
            **_FEEDBACK_CONSTRAINTS,
            **_KERNEL_CONSTRAINTS,
        }.items():
            if name == known.replace("_", ""):
                return cls()
        try:
            return keras.constraints.get(identifier)
        except ValueError:
            raise ValueError(
                f"Unknown constraint {identifier!r}. Allowed here: "
                f"{', '.join(ours)}, the names of keras.constraints, or an "
                "instance."
            ) from None
    return keras.constraints.get(identifier)


_FEEDBACK_CONSTRAINTS = {
    "sign_concordance": SignConcordance,
    "tied_kernel": TiedKernel,
    "noisy_kernel": NoisyKernel,
}
_KERNEL_CONSTRAINTS = {
    "fixed_sign": FixedSign,
    "constant_norm": ConstantNorm,
}
