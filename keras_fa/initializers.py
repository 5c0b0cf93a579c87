"""How a feedback kernel starts.

An FA layer's `feedback_initializer` is any Keras initializer. Particular to
feedback is that `None` (the default) draws B_0 from the law of W_0,
*independently* of it. A Keras initializer gives the same values at every call,
so that drawing both from one would make `B_0 = W_0`: backpropagation, without
any error showing. For the same reason an instance that several layers are
given is drawn apart: the first one has it as it is, each further one has
another seed, made of the instance's own.
"""

import weakref
from collections.abc import Callable
from collections.abc import Mapping
from typing import TypeVar

import keras
import numpy as np

from keras_fa._types import Identifier
from keras_fa._types import Tensor

_Seeded = TypeVar("_Seeded")


@keras.saving.register_keras_serializable(package="keras_fa")
class KernelMagnitude(keras.initializers.Initializer):
    """One magnitude for all of B, such that `||B_0|| = ||W_0||`.

    It is `||W_0|| / ||rule(1, W_0)||`, that is `||W_0|| / sqrt(size)` for FA
    and `||W_0|| / ||sign(W_0)||` under `SignConcordance`. Layers accept it as
    the string `"constant"`.

    Example:

    ```python
    import numpy as np
    from keras_fa import FADense

    layer = FADense(8, feedback_initializer="constant")
    layer.build((None, 16))
    stored = np.array(layer.feedback_kernel)
    assert np.all(stored == stored[0, 0])
    assert np.isclose(np.linalg.norm(stored), np.linalg.norm(layer.kernel))
    ```
    """

    def __call__(self, shape: tuple, dtype: str | None = None) -> Tensor:
        raise ValueError(
            f"{type(self).__name__} takes its value from a layer's own "
            "kernel. Give it as the `feedback_initializer` of an FA layer. "
            f"Received: a call with shape={shape}."
        )


@keras.saving.register_keras_serializable(package="keras_fa")
class KernelSign(KernelMagnitude):
    """The signs of W_0 and one magnitude, such that `||B_0|| = ||W_0||`.

    It is `||W_0|| sign(W_0) / ||sign(W_0)||`. Stored and never updated, as
    under FA, it is strictly normalized sign-concordant feedback whose signs do
    not follow: what concordance at the start is worth by itself. W_0 are the
    weights that the layer starts with, in `convert` those of the given model,
    and where a stock weights file is loaded those of the file.

    Example:

    ```python
    import numpy as np
    from keras_fa import FADense

    layer = FADense(8, feedback_initializer="kernel_sign")
    layer.build((None, 16))
    stored, kernel = np.array(layer.feedback_kernel), np.array(layer.kernel)
    assert np.array_equal(np.sign(stored), np.sign(kernel))
    assert np.isclose(np.linalg.norm(stored), np.linalg.norm(kernel))
    ```
    """


_OURS = {
    "constant": KernelMagnitude,
    "kernel_magnitude": KernelMagnitude,
    "kernel_sign": KernelSign,
}


def get(identifier: Identifier) -> Callable | None:
    """Resolves a `feedback_initializer`.

    Args:
        identifier: `None` (as the kernel's), `"constant"`, `"kernel_sign"`,
            or what `keras.initializers.get` takes.

    Returns:
        An initializer, or `None`.
    """
    return resolve(identifier, _OURS, keras.initializers.get)


def resolve(
    identifier: Identifier,
    ours: Mapping[str, type],
    stock: Callable[[Identifier], object],
) -> object:
    """Resolves what a user of Keras may give in an object's place.

    Args:
        identifier: A name of ours, in any spelling that Keras has for names
            ("fixed_sign", "FixedSign", "keras_fa>FixedSign"), or anything else.
        ours: Names to classes.
        stock: Keras's own function for anything else.
    """
    if isinstance(identifier, str):
        plain = identifier.removeprefix("keras_fa>").lower().replace("_", "")
        for name, cls in ours.items():
            if plain == name.replace("_", ""):
                return cls()
    return stock(identifier)


def independent(
    initializer: Callable | None,
    kernel_initializer: Callable,
    kernel_path: str,
) -> Callable:
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


_uses: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def drawn_apart(seeded: _Seeded) -> _Seeded:
    """What one more user of an instance is to draw from.

    Args:
        seeded: An initializer, a feedback rule, a kernel constraint, or
            anything that draws nothing.

    Returns:
        The instance itself for its first user, and for each further one an
        independent one with another seed.
    """
    if getattr(seeded, "seed", None) is None:
        return seeded
    uses = _uses.get(seeded, 0)
    _uses[seeded] = uses + 1
    return reseeded(seeded, uses) if uses else seeded


def reseeded(seeded: _Seeded, stream: int) -> _Seeded:
    """The same law with another seed, a function of the old seed and `stream`.

    Args:
        seeded: What has a `seed` and Keras's `get_config` and `from_config`.
            What has no seed, and so draws nothing, is returned as it is.
        stream: Integer; different streams give independent draws.
    """
    if getattr(seeded, "seed", None) is None:
        return seeded
    entropy = [int(_first(seeded.seed)), stream]
    words = np.random.SeedSequence(entropy).generate_state(1)
    config = {**seeded.get_config(), "seed": int(words[0] >> 1)}
    return type(seeded).from_config(config)


def redrawn(initializer: Callable, seed: int | None) -> Callable:
    """The same law, of which each call draws other values.

    Args:
        initializer: What has a `seed` and Keras's `get_config` and
            `from_config`.
        seed: Of the new draws, or `None` for a random one. They are others
            than the initializer's own, also where this is its seed.

    Returns:
        An initializer whose `seed` is a `keras.random.SeedGenerator`.
    """
    generator = keras.random.SeedGenerator(seed)
    law = type(initializer).from_config(
        {**initializer.get_config(), "seed": generator}
    )
    if seed is None or seed != _first(initializer.seed):
        return law
    return redrawn(law, reseeded(law, _FEEDBACK_STREAM).seed)


def _first(seed: int | keras.random.SeedGenerator | None) -> int | None:
    """The integer that a seed starts from: a generator's first draw has it."""
    if isinstance(seed, keras.random.SeedGenerator):
        return seed.get_config()["seed"]
    return seed


_FEEDBACK_STREAM = 0xFEEDBAC
