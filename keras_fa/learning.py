"""What moves a stored feedback kernel: feedback that learns.

An FA layer's `feedback_learning` says what is added to its stored B in each
step, from what is local to the layer. B is then a trainable weight, which the
model's optimizer moves: it counts as a kernel for weight decay and for the
clipping of gradients. Nothing of it reaches x, W or any other weight.

A rule of one's own is a class with a method `gradient`, `loss` or both:

```python
import keras
from keras import ops
from keras_fa import FADense
from keras_fa.learning import FeedbackLearning


@keras.saving.register_keras_serializable(package="my_rules")
class Slower(FeedbackLearning):
    "Half of the gradient of W, and a pull of B towards the signs of W."

    def gradient(self, kernel_gradient):
        return 0.5 * kernel_gradient

    def loss(self, local):
        return -0.01 * ops.sum(local.feedback_kernel * ops.sign(local.kernel))


layer = FADense(10, feedback_learning=Slower())
```
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import ClassVar
from typing import TypeAlias

import keras
from keras import ops

from keras_fa import _gradients
from keras_fa._types import Identifier
from keras_fa._types import Tensor
from keras_fa.initializers import resolve

# Linear in both: (x, kernel) -> y.
Stage: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Local:
    """What a feedback kernel may learn from: one layer in one step.

    Of all of these only `feedback_kernel` passes a gradient on.

    Attributes:
        stage: `op(x, K)` of an input and a kernel, both in one dtype: what the
            layer does with this kernel, without bias. Separable layers have a
            stage for each of their two kernels.
        x: The stage's input, in the layer's compute dtype.
        kernel: W, at least in single precision.
        feedback_kernel: B, what carries the error, as `kernel`.
    """

    stage: Stage
    x: Tensor
    kernel: Tensor
    feedback_kernel: Tensor

    def op(self, kernel: Tensor) -> Tensor:
        """`op(x, K)` of a kernel K."""
        return self.stage(self.x, ops.cast(kernel, self.x.dtype))

    def transpose(self, dy: Tensor, kernel: Tensor) -> Tensor:
        """`op^T(dy, K)`, of the shape of x."""
        kernel = ops.cast(kernel, self.x.dtype)
        stage = self.stage
        return _gradients.transposed(lambda x: stage(x, kernel), self.x, dy)

    @functools.cached_property
    def y(self) -> Tensor:
        """The pre-activation `op(x, W)`, without bias."""
        return self.op(self.kernel)

    @functools.cached_property
    def image(self) -> Tensor:
        """`op(x, B)`."""
        return self.op(self.feedback_kernel)

    def decay(self) -> Tensor:
        """`|B|^2 / 2`."""
        return 0.5 * _square(self.feedback_kernel)

    def concordance(self) -> Tensor:
        """`-<W, B>`: Kunin's "self"."""
        return -_product(self.kernel, self.feedback_kernel)

    def amp(self) -> Tensor:
        """`-<y, op(x, B)>`."""
        return -_product(self.y, self.image)

    def sparse(self) -> Tensor:
        """`|op(x, B)|^2 / 2`."""
        return 0.5 * _square(self.image)

    def null(self) -> Tensor:
        """`|op^T(y, B)|^2 / 2`."""
        return 0.5 * _square(self.transpose(self.y, self.feedback_kernel))

    def power(self) -> Tensor:
        """`|x|^2`, of the whole batch; 1 where it is 0."""
        power = _square(self.x)
        return ops.where(power > 0, power, 1.0)

    def uses(self) -> Tensor:
        """How often a weight is used, on average over the kernel."""
        ones = ops.ones_like(self.x), ops.ones(self.kernel.shape, self.x.dtype)
        return _product(self.stage(*ones), 1.0) / math.prod(self.kernel.shape)


class FeedbackLearning:
    """Base class of what feedback kernels learn from.

    Subclasses define one or both of

    - `gradient(kernel_gradient)`: dW, the local product of x and dy, to the
      gradient of B, of the same shape and dtype;
    - `loss(local)`: a scalar, computed from a `Local`, whose gradient with
      respect to B is added. It is taken in training (`training=True`) as a
      loss of the layer, which a training loop of one's own has to add as it
      does with regularizers. Its value is not part of the loss that is shown.

    Where B is made of a stored kernel by a rule, or of several weights of a
    rule, the gradient of B goes on to these by the chain rule.

    Attributes:
        in_step: Whether the model's optimizer moves B in each training step.
            Else B is no trainable weight, and a `MirrorPhase` moves it.
        decays_as_kernel: Whether the kernel's regularizer is B's too where
            there is no `feedback_regularizer`.
    """

    gradient: ClassVar[Callable[..., Tensor] | None] = None
    loss: ClassVar[Callable[..., Tensor] | None] = None
    in_step: ClassVar[bool] = True
    decays_as_kernel: ClassVar[bool] = False

    def of_kernels(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """`gradient` of each kernel's dW, if there is one."""
        if self.gradient is None:
            return None
        return [self.gradient(gradient) for gradient in gradients]

    def get_config(self) -> dict:
        return {}

    @classmethod
    def from_config(cls, config: dict) -> "FeedbackLearning":
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_fa")
class KolenPollack(FeedbackLearning):
    """B receives the very gradient of W: `dB = dW`, and both decay.

    With weights that decay at the rate l, `W - B` shrinks by `1 - l` in each
    step, so that B becomes W. **Without decay `W - B` stays what it is, and
    nothing aligns**: give the optimizer a `weight_decay` (it then holds for
    all weights) or the layer a `kernel_regularizer`, which is B's too unless
    there is a `feedback_regularizer`.

    With SGD and decoupled decay (Keras's `weight_decay`) W - B shrinks by
    `1 - learning_rate * weight_decay` in each step, exactly. Under Adam, whose
    moments of W and B are equal, for they see equal gradients, likewise; with
    a regularizer in the place of decoupled decay they are not, and the
    shrinking follows W and B in part. `global_clipnorm` counts B's gradient,
    so it moves W, too.

    Source: Kolen & Pollack (1994); Akrout et al. (2019).

    Example:

    ```python
    import keras
    from keras_fa import FADense

    layer = FADense(
        10,
        feedback_learning="kolen_pollack",
        kernel_regularizer=keras.regularizers.L2(1e-3),
    )
    ```
    """

    decays_as_kernel = True

    def gradient(self, kernel_gradient: Tensor) -> Tensor:
        """`dB = dW`."""
        return kernel_gradient


@keras.saving.register_keras_serializable(package="keras_fa")
class WeightMirror(FeedbackLearning):
    """B moves along the correlation of noise and what W makes of it.

    Between the batches of training, `keras_fa.callbacks.MirrorPhase` sends
    white noise xi into each layer and moves B down the gradient of

    `-<op(xi, W), op(xi, B)> / n + decay |B|^2 / 2`

    with n the number of times that a weight was used (of a dense layer the
    examples, of a convolution examples and places). With noise of variance v
    the first term's gradient is `-v W` on average, so that B settles at
    `(v / decay) W`.

    B is no trainable weight: the optimizer leaves it alone.

    Args:
        decay: Positive float, default 1.

    Raises:
        ValueError: If `decay` is not positive.

    Source: Akrout et al. (2019). The form for convolutions, and noise that
    enters each layer by itself, without bias and activation, are our choices.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_learning="weight_mirror")
    ```
    """

    in_step = False

    def __init__(self, decay: float = 1.0) -> None:
        if decay <= 0:
            raise ValueError(
                f"`decay` must be positive. Received: decay={decay}"
            )
        self.decay = decay

    def loss(self, local: Local) -> Tensor:
        """`-<y, op(x, B)> / n + decay |B|^2 / 2`."""
        return local.amp() / local.uses() + self.decay * local.decay()

    def get_config(self) -> dict:
        return {"decay": self.decay}


class _Alignment(FeedbackLearning):
    """A weighted sum of Kunin's primitives.

    Attributes:
        coefficients: The names of the constructor's arguments.
    """

    coefficients: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **coefficients: float) -> None:
        for name in self.coefficients:
            value = coefficients[name]
            if value < 0:
                raise ValueError(
                    f"`{name}` must be at least 0. Received: {name}={value}"
                )
            setattr(self, name, value)

    def get_config(self) -> dict:
        return {name: getattr(self, name) for name in self.coefficients}


@keras.saving.register_keras_serializable(package="keras_fa")
class SymmetricAlignment(_Alignment):
    """B is drawn to W: `a |B|^2 / 2 - b <W, B>`.

    Its gradient is `a B - b W`. It transports the weights, and so is the upper
    bound of what the other rules can reach.

    Args:
        a: Float of at least 0, of the decay. Default 1.
        b: Float of at least 0, of the agreement. Default 1: B goes to W.

    Raises:
        ValueError: If a coefficient is negative.

    Source: Kunin et al. (2020), symmetric alignment: decay and self. The
    defaults are our choice.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_learning="symmetric_alignment")
    ```
    """

    coefficients = ("a", "b")

    def __init__(self, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__(a=a, b=b)

    def loss(self, local: Local) -> Tensor:
        """`a |B|^2 / 2 - b <W, B>`."""
        return self.a * local.decay() + self.b * local.concordance()


@keras.saving.register_keras_serializable(package="keras_fa")
class ActivationAlignment(_Alignment):
    """B is to make of x what W makes of it.

    `(a |op(x, B)|^2 / 2 - b <y, op(x, B)>) / |x|^2`, the sums over the batch;
    with a = b it is `|y - op(x, B)|^2 / (2 |x|^2)` but for a constant.

    Args:
        a: Float of at least 0, of the sparse term. Default 1.
        b: Float of at least 0, of the amplifying term. Default 1.

    Raises:
        ValueError: If a coefficient is negative.

    Source: Kunin et al. (2020), activation alignment: amp and sparse. Ours
    are: y is the pre-activation without bias; `|x|^2` in the denominator,
    which makes the step's size depend neither on batch, places nor the scale
    of x; and the defaults.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_learning="activation_alignment")
    ```
    """

    coefficients = ("a", "b")

    def __init__(self, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__(a=a, b=b)

    def loss(self, local: Local) -> Tensor:
        """`(a |op(x, B)|^2 / 2 - b <y, op(x, B)>) / |x|^2`."""
        terms = self.a * local.sparse() + self.b * local.amp()
        return terms / local.power()


@keras.saving.register_keras_serializable(package="keras_fa")
class InformationAlignment(_Alignment):
    """B is to make x again of y, its own op's transpose as the decoder.

    `(-a <y, op(x, B)> + b |op^T(y, B)|^2 / 2) / |x|^2 + c |B|^2 / 2`; with
    a = b the first part is `|x - op^T(y, B)|^2 / (2 |x|^2)` but for a constant.

    Args:
        a: Float of at least 0, of the amplifying term. Default 1.
        b: Float of at least 0, of the null term. Default 0.5.
        c: Float of at least 0, of the decay. Default 0.01.

    Raises:
        ValueError: If a coefficient is negative.

    Source: Kunin et al. (2020), information alignment: amp, null and decay.
    Ours are: y is the pre-activation without bias; `|x|^2` in the denominator;
    and the defaults.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_learning="information_alignment")
    ```
    """

    coefficients = ("a", "b", "c")

    def __init__(self, a: float = 1.0, b: float = 0.5, c: float = 0.01) -> None:
        super().__init__(a=a, b=b, c=c)

    def loss(self, local: Local) -> Tensor:
        """`(a amp + b null) / |x|^2 + c decay`."""
        terms = self.a * local.amp() + self.b * local.null()
        return terms / local.power() + self.c * local.decay()


_OURS = {
    "kolen_pollack": KolenPollack,
    "weight_mirror": WeightMirror,
    "symmetric_alignment": SymmetricAlignment,
    "activation_alignment": ActivationAlignment,
    "information_alignment": InformationAlignment,
}


def get(identifier: Identifier) -> FeedbackLearning | None:
    """Resolves a `feedback_learning`.

    Args:
        identifier: `None`, a name (`"kolen_pollack"`), a `FeedbackLearning`,
            its class or its config.

    Returns:
        A `FeedbackLearning`, or `None`.

    Raises:
        ValueError: If it is none of these, or defines nothing to learn from.
    """

    def stock(given: object) -> object:
        if isinstance(given, dict):
            return keras.saving.deserialize_keras_object(given)
        ours = inspect.isclass(given) and issubclass(given, FeedbackLearning)
        return given() if ours else given

    learning = resolve(identifier, _OURS, stock)
    if not isinstance(learning, FeedbackLearning | None):
        raise ValueError(
            f"Unknown feedback learning {identifier!r}. Allowed: "
            f"{', '.join(_OURS)}, or a keras_fa.learning.FeedbackLearning."
        )
    if learning is None:
        return None
    if learning.loss is None and not (learning.in_step and learning.gradient):
        raise ValueError(
            f"{type(learning).__name__} teaches nothing: it has to define "
            "`loss` or, where it is `in_step`, `gradient`. Received: neither."
        )
    return learning


def _product(one: Tensor, other: Tensor | float) -> Tensor:
    """`<one, other>`, at least in single precision."""
    dtype = keras.backend.result_type(one.dtype, "float32")
    return ops.sum(ops.cast(one, dtype) * ops.cast(other, dtype))


def _square(tensor: Tensor) -> Tensor:
    return _product(tensor, tensor)
