"""How a feedback kernel starts.

An FA layer's `feedback_initializer` is any Keras initializer. Two things are
particular to feedback:

- `None` (the default) draws B_0 from the law of W_0, *independently* of it. A
  Keras initializer gives the same values at every call, so that drawing both
  from one would make `B_0 = W_0`: backpropagation, without any error showing.
- A constant is stored as what it is, one number per layer that broadcasts, and
  not as a second kernel. `"constant"` is the magnitude that gives B_0 the norm
  of W_0; `keras.initializers.Constant(0.05)` is the magnitude 0.05.
"""

from typing import Any

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="keras_fa")
class KernelMagnitude(keras.initializers.Initializer):
    """One magnitude for all of B, such that `||B_0|| = ||W_0||`.

    The stored feedback kernel is the scalar `||W_0|| / ||rule(1, W_0)||`,
    which is `||W_0|| / ||sign(W_0)||` under `SignConcordance`. Layers accept it
    as the string `"constant"`.

    Source: Moskovitz et al. (2018), strict normalization.

    Example:

    ```python
    import keras
    from keras_fa import FADense

    layer = FADense(
        8,
        feedback_initializer="constant",
        feedback_constraint="sign_concordance",
    )
    layer.build((None, 16))
    assert layer.feedback_kernel.shape == ()
    ```
    """

    def __call__(self, shape: tuple, dtype: str | None = None) -> Any:
        raise ValueError(
            "KernelMagnitude takes its value from a layer's own kernel. Give "
            "it as the `feedback_initializer` of an FA layer. Received: a call "
            f"with shape={shape}."
        )


def get(identifier: Any) -> Any:
    """Resolves a `feedback_initializer`.

    Args:
        identifier: `None` (as the kernel's), `"constant"`, or what
            `keras.initializers.get` takes.

    Returns:
        An initializer, or `None`.
    """
    if isinstance(identifier, str) and identifier == "constant":
        return KernelMagnitude()
    return keras.initializers.get(identifier)


def is_constant(initializer: Any) -> bool:
    """Whether the feedback kernel is one number (stored as a scalar)."""
    return isinstance(initializer, _CONSTANTS)


def independent(
    initializer: Any, kernel_initializer: Any, kernel_path: str
) -> Any:
    """The initializer that draws B_0 independently of W_0.

    Args:
        initializer: The layer's `feedback_initializer`, or `None` for the
            kernel's own law.
        kernel_initializer: The initializer instance that W_0 was drawn from.
        kernel_path: The kernel's path, for the message of the error.

    Returns:
        An initializer whose seed is not that of `kernel_initializer`.

    Raises:
        ValueError: If both are to be drawn from one initializer without a
            `seed`: a constant, an array, a function. B_0 could be W_0.
    """
    if initializer is None:
        initializer = kernel_initializer
    seed = getattr(initializer, "seed", None)
    if seed is None and initializer is kernel_initializer:
        raise ValueError(
            f"The feedback kernel of '{kernel_path}' is drawn as the kernel "
            "unless told otherwise, and the kernel's initializer has no seed "
            "to draw other values from: B_0 would be W_0, which is "
            "backpropagation. Give the layer a random `feedback_initializer`, "
            "for example 'he_normal'; in `convert`, give it another method by "
            "`layers`, for example 'fa_usf_sn' or 'bp'. Received: "
            f"kernel_initializer={kernel_initializer}"
        )
    kernel_seed = getattr(kernel_initializer, "seed", None)
    if isinstance(seed, keras.random.SeedGenerator) and seed is kernel_seed:
        return initializer  # it has moved on
    # Equal seeds give equal or proportional draws, whatever the two laws.
    if seed is None or _first(seed) != _first(kernel_seed):
        return initializer
    return reseeded(initializer, _FEEDBACK_STREAM)


def reseeded(initializer: Any, stream: int) -> Any:
    """The same law with another seed, a function of the old seed and `stream`.

    Args:
        initializer: A random Keras initializer.
        stream: Integer; different streams give independent draws.

    Returns:
        An initializer.
    """
    entropy = [int(_first(initializer.seed)), stream]
    words = np.random.SeedSequence(entropy).generate_state(1)
    config = {**initializer.get_config(), "seed": int(words[0] >> 1)}
    return type(initializer).from_config(config)


def _first(seed: Any) -> int | None:
    """The integer that a seed starts from: a generator's first draw has it."""
    if isinstance(seed, keras.random.SeedGenerator):
        return seed.get_config()["seed"]
    return seed


_FEEDBACK_STREAM = 0xFEEDBAC
_CONSTANTS = (
    KernelMagnitude,
    keras.initializers.Constant,
    keras.initializers.Ones,
    keras.initializers.Zeros,
)
