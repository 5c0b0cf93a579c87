"""Rules for feedback kernels and constraints of forward kernels.

A *feedback constraint* says what carries the error down. It is called inside
the compiled step with the stored feedback kernel and the forward kernel of
that moment, and returns the kernel B of `dx = op^T(dy, B)`. So B is never
older than W.

A *kernel constraint* is Keras's own: the optimizer calls it with the forward
kernel after every update. `FixedSign` and `ConstantNorm` remember something of
the kernel they were built for (its signs, its norm). An FA layer makes a copy
of its own, builds it, and saves what it remembers with the weights. `Frozen`
keeps the kernel as it is.

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

import inspect
from collections.abc import Callable
from collections.abc import Sequence

import keras

from keras_fa._types import Identifier
from keras_fa.constraints.feedback import FeedbackConstraint
from keras_fa.constraints.feedback import NoisyKernel
from keras_fa.constraints.feedback import ProductFeedback
from keras_fa.constraints.feedback import RandomMagnitude
from keras_fa.constraints.feedback import SignConcordance
from keras_fa.constraints.feedback import Stored
from keras_fa.constraints.feedback import TiedKernel
from keras_fa.constraints.kernel import Chain
from keras_fa.constraints.kernel import ConstantNorm
from keras_fa.constraints.kernel import FixedSign
from keras_fa.constraints.kernel import Frozen
from keras_fa.constraints.kernel import KernelConstraint
from keras_fa.constraints.kernel import kernel_norm
from keras_fa.constraints.kernel import parts_of
from keras_fa.constraints.kernel import units_along
from keras_fa.initializers import resolve

__all__ = [
    "Chain",
    "ConstantNorm",
    "FeedbackConstraint",
    "FixedSign",
    "Frozen",
    "KernelConstraint",
    "NoisyKernel",
    "ProductFeedback",
    "RandomMagnitude",
    "SignConcordance",
    "Stored",
    "TiedKernel",
    "get",
    "get_kernel_constraint",
    "kernel_norm",
    "parts_of",
    "units_along",
]

_RULES = {
    "sign_concordance": SignConcordance,
    "tied_kernel": TiedKernel,
    "noisy_kernel": NoisyKernel,
    "product_feedback": ProductFeedback,
    "random_magnitude": RandomMagnitude,
}
_KERNEL_CONSTRAINTS = {
    "fixed_sign": FixedSign,
    "constant_norm": ConstantNorm,
    "frozen": Frozen,
}


def get(identifier: Identifier) -> FeedbackConstraint | None:
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
    rule = _resolve(identifier, _RULES)
    if isinstance(rule, KernelConstraint):
        raise ValueError(
            f"{type(rule).__name__} constrains forward kernels: give it as "
            "`kernel_constraint`. Received: "
            f"feedback_constraint={identifier}"
        )
    if rule is None or isinstance(rule, FeedbackConstraint):
        return rule
    if inspect.isfunction(rule) and _needed_arguments(rule) != 1:
        raise ValueError(
            "A function is applied to the stored feedback kernel alone and "
            "takes one argument. A rule of (feedback_kernel, kernel) is a "
            "subclass of keras_fa.constraints.FeedbackConstraint. Received: "
            f"feedback_constraint={identifier}"
        )
    return Stored(rule)


def get_kernel_constraint(
    identifier: Identifier | Sequence[Identifier],
) -> Callable | None:
    """Resolves a forward kernel's constraint.

    Args:
        identifier: What `keras.constraints.get` takes, one of this module's
            names (`"fixed_sign"`, `"constant_norm"`, `"frozen"`), or a list of
            these, which makes a `Chain`.

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


def _resolve(identifier: Identifier, allowed: dict[str, type]) -> object:
    known = {**_RULES, **_KERNEL_CONSTRAINTS}
    try:
        return resolve(identifier, known, keras.constraints.get)
    except ValueError:
        if not isinstance(identifier, str):
            raise
        raise ValueError(
            f"Unknown constraint {identifier!r}. Allowed here: "
            f"{', '.join(allowed)}, the names of keras.constraints, or an "
            "instance."
        ) from None


def _needed_arguments(function: Callable) -> int:
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is inspect.Parameter.empty for p in parameters)
