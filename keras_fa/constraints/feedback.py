"""Rules for feedback kernels: what carries the error down."""

import math
from collections.abc import Callable

import keras
from keras import ops

from keras_fa._types import AddWeight
from keras_fa._types import Tensor
from keras_fa.constraints.kernel import kernel_norm
from keras_fa.initializers import redrawn
from keras_fa.initializers import reseeded


class FeedbackConstraint(keras.constraints.Constraint):
    """Base class of feedback rules: `B_t = rule(stored B, W_t)`.

    Subclasses implement `__call__(feedback_kernel, kernel)`, both tensors of
    the kernel's shape in the kernel's variable dtype, and return a tensor of
    that shape. It is called with this step's W, inside the compiled step. A
    compiled forward pass of which no gradient is taken computes nothing of it
    but what it assigns (a random state, say). Under `FixedSign` the kernel that
    a rule sees has its fixed sign where its weight is exactly zero, so that
    `sign(kernel)` is never 0, unless that constraint has `silent_zeros`.

    Attributes:
        stores_feedback_kernel: Whether the layer keeps a feedback kernel for
            this rule. If `False`, the rule is called with `None` for it.
        sign_concordant: Whether each weight of B has the sign of W. Default
            `False`. `keras_fa.alignment.diagnose` holds a rule to it.
        initializer: What feedback kernels of the layer are drawn from, its
            `feedback_initializer` or else what the kernel was drawn from. An
            FA layer sets it before it calls `build`.
    """

    stores_feedback_kernel = True
    sign_concordant = False
    initializer: Callable | None = None

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} must implement "
            "__call__(feedback_kernel, kernel)."
        )

    def build(self, kernel: keras.Variable, add_weight: AddWeight) -> None:
        """Makes what this rule needs for one kernel. Optional.

        An FA layer calls this on the copy of the rule that is its own. What
        is assigned to the rule here - variables by `add_weight`, a
        `keras.random.SeedGenerator` - is part of the layer: saved, restored
        and handed to compiled steps with its weights.

        Args:
            kernel: The forward kernel, built.
            add_weight: As `keras.layers.Layer.add_weight`. The weights are
                not trainable unless it is told so and the layer has a
                `feedback_learning`, whose gradient of B goes on to them.
        """


@keras.saving.register_keras_serializable(package="keras_fa")
class SignConcordance(FeedbackConstraint):
    """Uniform sign-concordant feedback.

    - `strict=False`, uSF Init.: `B_t = |B_0| * sign(W_t)`. The signs follow
      the forward kernel, the magnitudes are the stored ones.
    - `strict=True`, uSF SN: `B_t = ||W_t|| * sign(W_t) / ||sign(W_t)||`. All
      magnitudes are equal, and B has the norm of W. Nothing is stored.

    A weight that is exactly zero carries no error, except under `FixedSign`,
    whose sign it then takes. The callback `StrictNormalization` makes such
    rules strict for a training.

    Args:
        strict: Boolean, default `False`.

    Source: Moskovitz et al. (2018); Liao, Leibo & Poggio (2016).

    Example:

    ```python
    from keras_fa import FAConv2D
    from keras_fa.constraints import SignConcordance

    layer = FAConv2D(64, 3, feedback_constraint=SignConcordance(strict=True))
    ```
    """

    sign_concordant = True

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    @property
    def stores_feedback_kernel(self) -> bool:
        """Whether there are magnitudes to store."""
        return not self.strict

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        sign = ops.sign(kernel)
        if self.strict:
            magnitude = ops.divide_no_nan(
                kernel_norm(kernel), kernel_norm(sign)
            )
            return magnitude * sign
        return ops.abs(feedback_kernel) * sign

    def get_config(self) -> dict:
        return {"strict": self.strict}


@keras.saving.register_keras_serializable(package="keras_fa")
class RandomMagnitude(FeedbackConstraint):
    """Sign-concordant feedback of random magnitudes: `B_t = |n_t| sign(W_t)`.

    `n_t` is drawn anew at every step from the initial distribution of the
    kernel, or from the layer's `feedback_initializer` if it has one. Nothing is
    stored but the state of the random generator. This is brSF, batchwise
    random magnitudes; with magnitudes that are drawn once it is
    `SignConcordance`, frSF. A weight that is exactly zero carries no error,
    except under `FixedSign`, whose sign it then takes.

    Args:
        seed: Integer or `None`, the seed of the magnitudes. Where one instance
            is given to several layers, each has a seed of its own made of it.

    Raises:
        ValueError: On building, if what it is to draw from has no `seed`: a
            constant, an array, a function.

    Source: Liao, Leibo & Poggio (2016).

    Example:

    ```python
    import numpy as np
    from keras_fa import FADense
    from keras_fa.constraints import RandomMagnitude

    layer = FADense(10, feedback_constraint=RandomMagnitude())
    layer.build((None, 4))
    feedback = layer.effective_feedback_kernel()  # that of the next step
    assert np.array_equal(np.sign(feedback), np.sign(layer.kernel))
    ```
    """

    stores_feedback_kernel = False
    sign_concordant = True

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def build(self, kernel: keras.Variable, add_weight: AddWeight) -> None:
        if getattr(self.initializer, "seed", None) is None:
            raise ValueError(
                f"The magnitudes of the feedback of '{kernel.path}' are drawn "
                "anew at every step, and what they are to be drawn from has no "
                "seed: it is no distribution. Give the layer a random "
                "`feedback_initializer`, for example 'he_normal'. Received: "
                f"{self.initializer}"
            )
        self._law = redrawn(self.initializer, self.seed)
        self.seed_generator = self._law.seed

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        drawn = self._law(kernel.shape, dtype=kernel.dtype)
        return ops.abs(drawn) * ops.sign(kernel)

    def get_config(self) -> dict:
        return {"seed": self.seed}


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

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        return kernel


@keras.saving.register_keras_serializable(package="keras_fa")
class NoisyKernel(FeedbackConstraint):
    """The forward kernel plus noise: `B_t = W_t + tan(a) ||W_t|| n / ||n||`.

    `n` is Gaussian noise, fresh at every step and made orthogonal to W_t, so
    that the angle between B_t and W_t is exactly `a`. Nothing is stored but
    the state of the random generator. This is BP + Noise; its definition is
    our reading of the paper's name for it.

    Args:
        angle: Float in [0, 90), degrees, or `None` (default): the angle that
            strictly normalized sign-concordant feedback would have at this
            step, `cos a = ||W||_1 / (sqrt(size) ||W||)`.
        seed: Integer or `None`, the seed of the noise. Where one instance is
            given to several layers, each has a seed of its own made of it.

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

    def build(self, kernel: keras.Variable, add_weight: AddWeight) -> None:
        self.seed_generator = keras.random.SeedGenerator(self.seed)

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        noise = keras.random.normal(
            kernel.shape, dtype=kernel.dtype, seed=self.seed_generator
        )
        along = ops.divide_no_nan(
            ops.sum(noise * kernel), ops.sum(ops.square(kernel))
        )
        noise = noise - along * kernel
        return kernel + self._tangent(kernel) * kernel_norm(
            kernel
        ) * ops.divide_no_nan(noise, kernel_norm(noise))

    def _tangent(self, kernel: Tensor) -> Tensor | float:
        if self.angle is not None:
            return math.tan(math.radians(self.angle))
        # tan a = sqrt(1 / cos^2 a - 1)
        cosine = ops.divide_no_nan(
            ops.sum(ops.abs(kernel)),
            math.sqrt(math.prod(kernel.shape)) * kernel_norm(kernel),
        )
        square = ops.divide_no_nan(1.0, ops.square(cosine)) - 1.0
        return ops.sqrt(ops.maximum(square, 0.0))

    def get_config(self) -> dict:
        return {"angle": self.angle, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_fa")
class ProductFeedback(FeedbackConstraint):
    """Product feedback: `B = R M`, M fixed and random, R learned.

    The error goes down in two steps, `dx = op^T(M dy, R)`: through M to
    `expansion` times as many units as the kernel's last axis has, and on
    through R, which has W's shape but for that axis. With
    `feedback_learning="kolen_pollack"` B receives dW, and so R, by the chain
    rule, `dW M^T`: the local product of x and `M dy`. Since `M^T M` is nearly
    the identity for a wide M, B follows W without being told of W. Without
    `feedback_learning` R stays as it was drawn. Train it by SGD: Adam moves
    each weight of R as far as one of W, and B, a sum over R, outgrows W.

    At the start the weights of M have variance `1 / width`, those of R the
    mean square of W_0's, so that `||B_0||` is about `||W_0||`.

    Args:
        expansion: Positive integer, default 10.
        seed: Integer or `None`, the seed of M and R.

    Raises:
        ValueError: If `expansion` is no positive integer.

    Source: Ji-An & Benna (2024), Deep learning without weight symmetry (arXiv
    2405.20594); R and M's laws are our choice.
    Kernels whose last axis is not their output (transposed and depthwise
    convolutions) are mixed along it all the same.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(
        10,
        feedback_constraint="product_feedback",
        feedback_learning="kolen_pollack",
    )
    ```
    """

    stores_feedback_kernel = False

    def __init__(self, expansion: int = 10, seed: int | None = None) -> None:
        if not isinstance(expansion, int) or expansion < 1:
            raise ValueError(
                "`expansion` is a positive integer. Received: "
                f"expansion={expansion!r}"
            )
        self.expansion = expansion
        self.seed = seed

    def build(self, kernel: keras.Variable, add_weight: AddWeight) -> None:
        width = self.expansion * kernel.shape[-1]
        normal = keras.initializers.RandomNormal(stddev=1.0, seed=self.seed)
        again = reseeded(normal, 1)

        def projection(shape: tuple, dtype: str | None = None) -> Tensor:
            scale = kernel_norm(kernel) / math.sqrt(math.prod(kernel.shape))
            return scale * again(shape, dtype)

        def mixing(shape: tuple, dtype: str | None = None) -> Tensor:
            return normal(shape, dtype) / math.sqrt(width)

        self.mixing = add_weight(
            shape=(width, kernel.shape[-1]),
            initializer=mixing,
            autocast=False,
            name=f"{kernel.name}_mixing",
        )
        self.projection = add_weight(
            shape=(*kernel.shape[:-1], width),
            initializer=projection,
            trainable=True,
            autocast=False,
            name=f"{kernel.name}_projection",
        )

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        return ops.tensordot(self.projection, self.mixing, axes=1)

    def get_config(self) -> dict:
        return {"expansion": self.expansion, "seed": self.seed}


@keras.saving.register_keras_serializable(package="keras_fa")
class Stored(FeedbackConstraint):
    """A stock constraint on the stored feedback kernel: `B_t = c(B_0)`.

    FA layers wrap a one-argument Keras constraint in this by themselves.

    Args:
        constraint: A `keras.constraints.Constraint`, its name, or any callable
            of one tensor. `None`: `B_t = B_0`, which is FA.

    Example:

    ```python
    from keras_fa import FADense

    layer = FADense(10, feedback_constraint="non_neg")
    ```
    """

    def __init__(self, constraint: str | dict | Callable | None) -> None:
        self.constraint = keras.constraints.get(constraint)

    def __call__(self, feedback_kernel: Tensor, kernel: Tensor) -> Tensor:
        if self.constraint is None:
            return feedback_kernel
        return self.constraint(feedback_kernel)

    def get_config(self) -> dict:
        return {"constraint": keras.constraints.serialize(self.constraint)}
