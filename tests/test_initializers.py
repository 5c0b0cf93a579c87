"""B_0 is independent of W_0, whatever both are drawn from."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import references
from references import BASE_KINDS
from references import KINDS

from keras_fa import FADense
from keras_fa import FAEinsumDense
from keras_fa.initializers import KernelMagnitude

GlorotUniform = keras.initializers.GlorotUniform
HeNormal = keras.initializers.HeNormal
RandomNormal = keras.initializers.RandomNormal
SeedGenerator = keras.random.SeedGenerator


def same(initializer: Any) -> dict[str, Any]:
    """One initializer for both kernels."""
    return {
        "kernel_initializer": initializer,
        "feedback_initializer": initializer,
    }


def pair(kernel_initializer: Any, feedback_initializer: Any) -> dict[str, Any]:
    """An initializer for each kernel."""
    return {
        "kernel_initializer": kernel_initializer,
        "feedback_initializer": feedback_initializer,
    }


SOURCES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "no_kernel_initializer": lambda: pair(None, None),
    "string": lambda: {"kernel_initializer": "he_normal"},
    "orthogonal": lambda: {"kernel_initializer": "orthogonal"},
    "unseeded": lambda: {"kernel_initializer": HeNormal()},
    "seeded": lambda: {"kernel_initializer": HeNormal(seed=3)},
    "same_string": lambda: same("he_normal"),
    "same_unseeded": lambda: same(HeNormal()),
    "same_seeded": lambda: same(HeNormal(seed=3)),
    "equal_seeds": lambda: pair(HeNormal(seed=3), HeNormal(seed=3)),
    "equal_seeds_other_class": lambda: pair(
        GlorotUniform(seed=3), keras.initializers.HeUniform(seed=3)
    ),
    "equal_seeds_other_scale": lambda: pair(
        RandomNormal(stddev=1.0, seed=3), RandomNormal(stddev=0.1, seed=3)
    ),
    "generator": lambda: {
        "kernel_initializer": HeNormal(seed=SeedGenerator(3))
    },
    "same_generator": lambda: same(HeNormal(seed=SeedGenerator(3))),
    "equal_generators": lambda: pair(
        HeNormal(seed=SeedGenerator(3)), HeNormal(seed=SeedGenerator(3))
    ),
    "seed_and_equal_generator": lambda: pair(
        HeNormal(seed=3), HeNormal(seed=SeedGenerator(3))
    ),
    "generator_and_equal_seed": lambda: pair(
        HeNormal(seed=SeedGenerator(3)), HeNormal(seed=3)
    ),
}
ONE_LAW = [
    name
    for name in SOURCES
    if name not in ("equal_seeds_other_class", "equal_seeds_other_scale")
]


def built(arguments: dict[str, Any], units: int = 100) -> FADense:
    """An FADense with a square kernel."""
    layer = FADense(units, **arguments)
    layer.build((None, units))
    return layer


def kernels(layer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each forward kernel with its stored feedback kernel."""
    forward = [references.array(k) for k in references.kernels_of(layer)]
    return list(zip(forward, references.stored_of(layer)))


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """Asserts that nothing shows that one tells of the other."""
    assert a.shape == b.shape
    for f in (lambda z: z, np.abs, np.sign):
        if np.ptp(f(a)) == 0 or np.ptp(f(b)) == 0:
            continue
        correlation = np.corrcoef(f(a).ravel(), f(b).ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("source", SOURCES)
def test_feedback_is_drawn_independently(source: str) -> None:
    ((w, b),) = kernels(built(SOURCES[source]()))
    assert_independent(w, b)


@pytest.mark.parametrize("source", ONE_LAW)
def test_feedback_has_the_law_of_the_kernel(source: str) -> None:
    ((w, b),) = kernels(built(SOURCES[source]()))
    # 10,000 draws: the standard error of a ratio of two is about 1 percent.
    assert abs(np.std(b) / np.std(w) - 1) < 0.04
    assert abs(np.abs(b).max() / np.abs(w).max() - 1) < 0.5


@pytest.mark.parametrize("initializer", ["he_normal", "seeded", "generator"])
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_every_kind_draws_independently(kind: str, initializer: str) -> None:
    kind = KINDS[kind]
    sizes = {
        name: 40 if name in ("filters", "units", "depth_multiplier") else value
        for name, value in kind.arguments.items()
    }
    if "output_shape" in sizes:
        sizes["output_shape"] = (None, 200)
    law = {
        "he_normal": "he_normal",
        "seeded": HeNormal(seed=3),
        "generator": HeNormal(seed=SeedGenerator(3)),
    }[initializer]
    layer = kind.fa(**{**sizes, **kind.initialized(law)})
    layer.build((None, *kind.shape))
    for w, b in kernels(layer):
        assert_independent(w, b)
        assert abs(np.std(b) / np.std(w) - 1) < 6 / np.sqrt(w.size)


def test_einsum_feedback_has_the_fans_of_its_equation() -> None:
    """A Keras initializer would take other axes for the fans by itself."""
    layer = FAEinsumDense(
        "abc,cde->abde",
        output_shape=(None, 8, 50),
        kernel_initializer=keras.initializers.VarianceScaling(
            1.0, "fan_in", "untruncated_normal"
        ),
    )
    layer.build((None, 6, 100))
    ((w, b),) = kernels(layer)
    for kernel in (w, b):
        assert abs(np.std(kernel) - 0.1) < 0.002
    assert_independent(w, b)


def test_layers_of_one_seed_have_other_feedback_than_kernels() -> None:
    layers = [built(same(HeNormal(seed=3))) for _ in range(2)]
    (w, _), (_, b) = kernels(layers[0])[0], kernels(layers[1])[0]
    assert_independent(w, b)


def test_explicit_initializer_is_the_law() -> None:
    given = RandomNormal(mean=5.0, stddev=0.1, seed=4)
    ((w, b),) = kernels(built({"feedback_initializer": given}))
    np.testing.assert_array_equal(b, given((100, 100)))
    assert_independent(w, b)


def test_array_is_an_initializer() -> None:
    values = references.normal((100, 100), 1)
    ((_, b),) = kernels(built({"feedback_initializer": values}))
    np.testing.assert_array_equal(b, values)


def fixed_draw(shape: tuple, dtype: str | None = None) -> np.ndarray:
    """A user's initializer that draws the same at every call."""
    return references.normal(shape, 1)


class OwnInitializer(keras.initializers.Initializer):
    """A user's initializer with a seed that nobody else knows of."""

    def __call__(self, shape: tuple, dtype: str | None = None) -> np.ndarray:
        return fixed_draw(shape, dtype)


@pytest.mark.parametrize(
    "initializer",
    [
        "zeros",
        "ones",
        "identity",
        keras.initializers.Constant(0.1),
        fixed_draw,
        OwnInitializer(),
        references.normal((100, 100), 1),
    ],
    ids="zeros ones identity constant function class array".split(),
)
def test_kernels_that_are_not_random_need_a_feedback_initializer(
    initializer: Any,
) -> None:
    with pytest.raises(ValueError, match="B_0 would be W_0"):
        built({"kernel_initializer": initializer})
    layer = built(pair(initializer, "he_normal"))
    w, b = kernels(layer)[0]
    assert_independent(w, b)


@pytest.mark.parametrize("initializer", [fixed_draw, OwnInitializer()])
def test_one_instance_without_a_seed_is_refused_for_both(
    initializer: Any,
) -> None:
    with pytest.raises(ValueError, match="B_0 would be W_0"):
        built(same(initializer))


@pytest.mark.parametrize("rule", ["tied_kernel", "noisy_kernel"])
def test_kernels_that_are_not_random_serve_rules_that_store_nothing(
    rule: str,
) -> None:
    layer = built({"kernel_initializer": "ones", "feedback_constraint": rule})
    assert layer.feedback_kernel is None


def test_set_random_seed_makes_feedback_reproducible() -> None:
    draws = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        draws.append(kernels(built({}))[0])
    for first, second, other in zip(*draws):
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)


def test_seeded_initializers_make_feedback_reproducible() -> None:
    first, second = (
        kernels(built({"kernel_initializer": HeNormal(seed=3)}))[0]
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_constant_is_one_magnitude_of_the_kernels_norm(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.make(
        kind.fa,
        feedback_initializer="constant",
        feedback_constraint="sign_concordance",
    )
    for (w, b), effective in zip(
        kernels(layer), references.effective_of(layer)
    ):
        assert b.shape == w.shape
        norm = np.linalg.norm(w)
        np.testing.assert_allclose(b, norm / np.sqrt(w.size), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(effective), norm, rtol=1e-6)


def test_constant_counts_the_weights_that_carry_error() -> None:
    w = references.normal((5, 3), 1)
    w[0] = 0.0
    layer = FADense(
        3,
        kernel_initializer=w,
        feedback_initializer="constant",
        feedback_constraint="sign_concordance",
    )
    layer.build((None, 5))
    norm = np.linalg.norm(w)
    np.testing.assert_allclose(
        layer.feedback_kernel, norm / np.sqrt(12), rtol=1e-6
    )
    (b,) = references.effective_of(layer)
    np.testing.assert_allclose(np.linalg.norm(b), norm, rtol=1e-6)


def test_given_magnitude() -> None:
    layer = built({"feedback_initializer": keras.initializers.Constant(0.05)})
    np.testing.assert_allclose(
        layer.effective_feedback_kernel(), np.full((100, 100), 0.05, "f")
    )


def test_kernel_magnitude_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="feedback_initializer"):
        KernelMagnitude()((2, 3))


@pytest.mark.parametrize("source", ["default", "seeded", "same_unseeded"])
def test_feedback_survives_saving(source: str, tmp_path: Any) -> None:
    model = keras.Sequential(
        [keras.Input((6,)), FADense(4, **SOURCES[source]())]
    )
    stored = references.array(model.layers[0].feedback_kernel)
    model.save(tmp_path / "model.keras")
    keras.utils.set_random_seed(99)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.layers[0].feedback_kernel, stored)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(clone.layers[0].feedback_kernel, stored)
