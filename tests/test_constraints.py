"""Rules for feedback, fixed signs and constant norms."""

import warnings
from collections.abc import Callable
from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from backends import vjp
from references import BASE_KINDS
from references import KINDS

import keras_fa
from keras_fa import FADense
from keras_fa import constraints
from keras_fa.callbacks import StrictNormalization
from keras_fa.constraints import Chain
from keras_fa.constraints import ConstantNorm
from keras_fa.constraints import FeedbackConstraint
from keras_fa.constraints import FixedSign
from keras_fa.constraints import NoisyKernel
from keras_fa.constraints import SignConcordance
from keras_fa.constraints import Stored

CROSSING_RATE = 20.0  # throws many weights across zero in a step


def dense(units: int = 3, inputs: int = 5, **arguments: Any) -> FADense:
    """A built FADense."""
    layer = FADense(units, **arguments)
    layer.build((None, inputs))
    return layer


def net(layer: Any, shape: tuple[int, ...], optimizer: Any) -> keras.Model:
    """A compiled model of one layer."""
    model = keras.Sequential([keras.Input(shape), layer])
    model.compile(optimizer, "mse")
    return model


def train(model: keras.Model, steps: int = 5) -> None:
    """Some updates of a model on noise."""
    x = references.normal((4 * steps, *model.input_shape[1:]), 1)
    shape = model(x[:1]).shape[1:]
    y = references.normal((4 * steps, *shape), 2)
    model.fit(x, y, batch_size=4, verbose=0)


def signs(kernel: Any) -> np.ndarray:
    """The signs of a kernel; a zero is excitatory."""
    return np.where(references.array(kernel) >= 0, 1, -1)


def stored_signs(kernel: Any) -> np.ndarray:
    """The fixed signs that a kernel's constraint remembers."""
    excitatory = references.array(kernel.constraint.state["excitatory"])
    return np.where(excitatory, 1, -1)


# SignConcordance.


def test_sign_concordance_follows_every_sign() -> None:
    b = np.array([[-2.0, 3.0, -4.0]], "float32")
    w = np.array([[5.0, -6.0, 0.0]], "float32")
    np.testing.assert_array_equal(SignConcordance()(b, w), [[2.0, -3.0, 0.0]])
    np.testing.assert_array_equal(
        SignConcordance()(np.float32(-0.5), w), [[0.5, -0.5, 0.0]]
    )


@pytest.mark.parametrize(
    ("law", "uniform_magnitudes", "random_magnitudes"),
    [
        ("gaussian", 37.07, 50.5),
        ("uniform", 30.0, 41.4),
        ("he_normal", 34.7, 47.5),
    ],
)
def test_known_angles(
    law: str, uniform_magnitudes: float, random_magnitudes: float
) -> None:
    keras_law = {
        "gaussian": keras.initializers.RandomNormal(),
        "uniform": keras.initializers.RandomUniform(-1, 1),
        "he_normal": "he_normal",
    }[law]
    layer = dense(
        500,
        500,
        kernel_initializer=keras_law,
        feedback_constraint="sign_concordance",
    )
    w = references.array(layer.kernel)
    (b,) = references.effective_of(layer)
    assert abs(references.angle(np.sign(w), w) - uniform_magnitudes) < 0.15
    assert abs(references.angle(b, w) - random_magnitudes) < 0.15


# NoisyKernel.


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("angle", [None, 0.0, 1.0, 30.0, 60.0, 89.0])
def test_noisy_kernel_has_exactly_its_angle(
    angle: float | None, law: str
) -> None:
    layer = dense(40, 50, feedback_constraint=NoisyKernel(angle))
    rng = np.random.default_rng(1)
    draw = rng.normal if law == "gaussian" else rng.uniform
    w = draw(size=(50, 40)).astype("float32")
    layer.kernel.assign(w)
    wanted = angle
    if angle is None:
        norm = np.linalg.norm(w.astype("float64"))
        cosine = np.abs(w.astype("float64")).sum() / (np.sqrt(2000) * norm)
        wanted = np.degrees(np.arccos(cosine))
    (b,) = references.effective_of(layer)
    assert abs(references.angle(b, w) - wanted) < 1e-3


def test_noisy_kernel_of_one_law_is_the_angle_of_strict_normalization() -> None:
    layer = dense(100, 100, feedback_constraint="noisy_kernel")
    w = references.array(layer.kernel)
    (b,) = references.effective_of(layer)
    gap = references.angle(b, w) - references.angle(np.sign(w), w)
    assert abs(gap) < 1e-3


def test_noise_is_fresh_at_every_step_and_reading_draws_none() -> None:
    layer = dense(feedback_constraint=NoisyKernel(45.0))
    x, dy = KINDS["dense"].inputs(), references.normal((4, 3), 5)
    seen = []
    for _ in range(3):
        (first,), (second,) = (references.effective_of(layer) for _ in "ab")
        np.testing.assert_array_equal(first, second)
        got = references.computed(layer, x, dy, compiled=False)
        references.assert_close(got.dx, dy @ first.T)
        seen.append(first)
    assert references.angle(seen[0], seen[1]) > 10
    assert references.angle(seen[1], seen[2]) > 10


def test_layers_with_one_noise_instance_draw_their_own() -> None:
    rule = NoisyKernel(45.0)
    a, b = (dense(feedback_constraint=rule) for _ in range(2))
    b.kernel.assign(a.kernel)
    before = references.effective_of(b)[0]
    assert references.angle(references.effective_of(a)[0], before) > 10
    a(KINDS["dense"].inputs())
    np.testing.assert_array_equal(references.effective_of(b)[0], before)


def test_noise_of_one_seed_is_reproducible() -> None:
    first, second = (
        dense(feedback_constraint=NoisyKernel(45.0, seed=1)) for _ in range(2)
    )
    second.kernel.assign(first.kernel)
    np.testing.assert_array_equal(
        *(references.effective_of(layer)[0] for layer in (first, second))
    )


@pytest.mark.parametrize("angle", [None, 45.0])
@pytest.mark.parametrize(
    ("units", "inputs", "value"),
    [(3, 5, 0.0), (1, 1, 0.5), (1, 1, 0.0), (3, 5, 1.0), (2, 1, -1.0)],
)
def test_degenerate_kernels_give_finite_noise(
    units: int, inputs: int, value: float, angle: float | None
) -> None:
    layer = dense(units, inputs, feedback_constraint=NoisyKernel(angle))
    layer.kernel.assign(np.full((inputs, units), value))
    (b,) = references.effective_of(layer)
    assert np.isfinite(b).all()
    if value == 0:
        np.testing.assert_array_equal(b, np.zeros_like(b))


@pytest.mark.parametrize("angle", [-1.0, 90.0, 120.0])
def test_noise_angle_is_checked(angle: float) -> None:
    with pytest.raises(ValueError, match=f"Received: angle={angle}"):
        NoisyKernel(angle)


# FixedSign, per synapse.


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_signs_never_change(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.fa(
        **kind.arguments,
        **kind.constrained("fixed_sign"),
        feedback_constraint="sign_concordance",
    )
    model = net(layer, kind.shape, keras.optimizers.SGD(CROSSING_RATE))
    kernels = references.kernels_of(layer)
    initial = [signs(kernel) for kernel in kernels]
    magnitudes = [np.abs(b) for b in references.stored_of(layer)]
    train(model)
    stopped = 0
    for kernel, sign, magnitude, b in zip(
        kernels, initial, magnitudes, references.effective_of(layer)
    ):
        w = references.array(kernel)
        assert (w * sign >= 0).all()
        np.testing.assert_array_equal(np.signbit(w), sign < 0)
        stopped += (w == 0).sum()
        np.testing.assert_array_equal(stored_signs(kernel), sign)
        # A weight at zero keeps its sign and its feedback's magnitude.
        np.testing.assert_array_equal(b, magnitude * sign)
    assert stopped > 0


def test_update_stops_at_zero_and_leaves_the_rest() -> None:
    layer = dense(kernel_constraint="fixed_sign")
    layer.kernel.assign([[1.0, -1.0, 0.0]] * 5)
    layer.refresh()
    pushed = np.array([[-2.0, 3.0, -4.0], [2.0, -3.0, 4.0]], "float32")
    got = layer.kernel.constraint(np.concatenate([pushed, pushed, pushed[:1]]))
    np.testing.assert_array_equal(got[0], [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(got[1], [2.0, -3.0, 4.0])


def test_weights_that_are_not_numbers_stay_so() -> None:
    layer = dense(kernel_constraint="fixed_sign")
    got = layer.kernel.constraint(np.full((5, 3), np.nan, "float32"))
    assert np.isnan(references.array(got)).all()


class Either(keras.constraints.Constraint):
    """Of one's own, with an attribute that Chain has, too."""

    def __init__(self) -> None:
        self.constraints = [keras.constraints.NonNeg()]

    def __call__(self, w: Any) -> Any:
        return w


def test_a_constraint_of_ones_own_is_not_taken_to_pieces() -> None:
    given = Either()
    assert constraints.parts_of(given) == [given]


def test_weight_that_starts_at_zero_is_excitatory() -> None:
    w = np.array([[0.0, -0.0, -1.0]], "float32")
    layer = dense(
        3,
        1,
        kernel_initializer=w,
        feedback_initializer="he_normal",
        kernel_constraint="fixed_sign",
        feedback_constraint="sign_concordance",
    )
    np.testing.assert_array_equal(stored_signs(layer.kernel), [[1, 1, -1]])
    b = np.abs(references.array(layer.feedback_kernel))
    np.testing.assert_array_equal(
        references.effective_of(layer)[0], b * [[1, 1, -1]]
    )
    np.testing.assert_array_equal(layer.kernel.constraint(w - 1)[0, :2], [0, 0])


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_signs_hold_in_mixed_precision(dtype: str) -> None:
    layer = FADense(
        8,
        dtype=dtype,
        kernel_constraint="fixed_sign",
        feedback_constraint="sign_concordance",
    )
    optimizer = keras.optimizers.SGD(1.0, momentum=0.9)
    if dtype == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = net(layer, (10,), optimizer)
    initial = signs(layer.kernel)
    train(model, 10)
    w = references.array(layer.kernel)
    assert (w * initial >= 0).all()
    assert (w == 0).any()
    np.testing.assert_array_equal(
        np.sign(references.effective_of(layer)[0]), initial
    )


# FixedSign, per unit (Dale's law).


def unit_signs(w: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The sign of each unit; fails if a unit's weights disagree."""
    units = np.broadcast_to(units, w.shape)
    found = [np.unique(np.sign(w[units == u])) for u in range(units.max() + 1)]
    found = [f[f != 0] for f in found]
    assert all(len(f) == 1 for f in found)
    return np.array([f[0] for f in found])


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [(kind, 0.3) for kind in KINDS]
    + [
        (kind, fraction)
        for kind in ("dense", "conv2d_groups", "separable1d")
        for fraction in (0.0, 0.5, 0.8, 1.0)
    ],
)
def test_units_have_one_sign(kind: str, fraction: float) -> None:
    kind = KINDS[kind]
    constraint = FixedSign("unit", fraction, seed=1)
    keras.utils.set_random_seed(1)
    layer = kind.make(kind.fa, **kind.constrained(constraint))
    keras.utils.set_random_seed(1)
    drawn = kind.make(kind.fa)
    for kernel, units, w_0 in zip(
        references.kernels_of(layer), kind.unit, references.kernels_of(drawn)
    ):
        w, w_0 = references.array(kernel), references.array(w_0)
        each = unit_signs(w, units)
        assert (each > 0).sum() == round(fraction * len(each))
        assert np.broadcast_to(units, w.shape).shape == w.shape
        broadcast = np.broadcast_to(stored_signs(kernel), w.shape)
        np.testing.assert_array_equal(broadcast, np.sign(w))
        norm = np.linalg.norm(w_0)
        np.testing.assert_allclose(np.linalg.norm(w), norm, rtol=1e-6)
        # The magnitudes are those of the draw, up to a scale for each sign.
        for sign in (-1, 1):
            ratio = (np.abs(w) / np.abs(w_0))[np.sign(w) == sign]
            if ratio.size:
                np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.9])
def test_excitation_balances_inhibition(fraction: float) -> None:
    layer = dense(
        400, 200, kernel_constraint=FixedSign("unit", fraction, seed=1)
    )
    w = references.array(layer.kernel)
    excess = abs(w.sum()) / np.abs(w).sum()
    ratio = fraction / (1 - fraction)
    unbalanced = abs(ratio - 1) / (ratio + 1)
    assert excess < 0.02
    assert fraction == 0.5 or excess < unbalanced / 10
    means = [np.abs(w[w * s > 0]).mean() for s in (-1, 1)]
    np.testing.assert_allclose(means[0] / means[1], ratio, rtol=0.05)


def test_excitatory_units_are_a_random_choice() -> None:
    choices = []
    for seed in (1, 1, 2):
        layer = dense(
            4, 20, kernel_constraint=FixedSign("unit", 0.5, seed=seed)
        )
        choices.append(signs(layer.kernel)[:, 0])
    np.testing.assert_array_equal(choices[0], choices[1])
    assert not np.array_equal(choices[0], choices[2])
    a, b = (
        signs(dense(4, 20, kernel_constraint=FixedSign("unit", 0.5)).kernel)
        for _ in range(2)
    )
    assert not np.array_equal(a[:, 0], b[:, 0])


@pytest.mark.parametrize("kind", ["dense", "conv2d_groups", "separable1d"])
def test_units_keep_their_signs_in_training(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.fa(
        **kind.arguments,
        **kind.constrained(["constant_norm", FixedSign("unit", 0.5)]),
        feedback_constraint="sign_concordance",
    )
    model = net(layer, kind.shape, keras.optimizers.SGD(5.0))
    before = [
        unit_signs(references.array(kernel), units)
        for kernel, units in zip(references.kernels_of(layer), kind.unit)
    ]
    train(model)
    stopped = 0
    for kernel, units, each in zip(
        references.kernels_of(layer), kind.unit, before
    ):
        w = references.array(kernel)
        expected = np.broadcast_to(each[units], w.shape)
        assert (w * expected >= 0).all()
        stopped += (w == 0).sum()
        np.testing.assert_array_equal(
            np.broadcast_to(stored_signs(kernel), w.shape), expected
        )
    assert stopped > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "neuron"}, "per='neuron'"),
        ({"excitatory_fraction": 1.1}, "excitatory_fraction=1.1"),
        ({"excitatory_fraction": -0.1}, "excitatory_fraction=-0.1"),
    ],
)
def test_fixed_sign_arguments_are_checked(
    arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FixedSign(**arguments)


# What constraints remember.


STATEFUL = {
    "synapse": lambda: ["fixed_sign", "constant_norm"],
    "unit": lambda: [FixedSign("unit", 0.5), ConstantNorm()],
}


def stateful_model(per: str) -> keras.Model:
    """A model whose kernels' constraints remember something."""
    arguments = {
        "kernel_constraint": STATEFUL[per](),
        "feedback_constraint": "sign_concordance",
    }
    model = keras.Sequential(
        [
            keras.Input((6, 2)),
            keras_fa.FAConv1D(4, 2, name="conv", **arguments),
            keras.layers.Flatten(),
            FADense(3, name="fc", **arguments),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    return model


def remembered(model: keras.Model) -> dict[str, np.ndarray]:
    """The signs and norms of all layers."""
    return {
        f"{name}/{state}": references.array(value)
        for name in ("conv", "fc")
        for state, value in model.get_layer(
            name
        ).kernel.constraint.state.items()
    }


@pytest.mark.parametrize("per", STATEFUL)
@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_state_survives_saving_after_training(
    form: str, per: str, tmp_path: Any
) -> None:
    model = stateful_model(per)
    train(model)
    state = remembered(model)
    for name in ("conv", "fc"):
        assert (references.array(model.get_layer(name).kernel) == 0).any()
    path = str(tmp_path / f"model.{form}")
    if form == "keras":
        model.save(path)
        loaded = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        loaded = stateful_model(per)
        loaded.load_weights(path)
    for name, value in remembered(loaded).items():
        np.testing.assert_array_equal(value, state[name])
    for name in ("conv", "fc"):
        ours, theirs = model.get_layer(name), loaded.get_layer(name)
        np.testing.assert_array_equal(
            *(references.effective_of(layer)[0] for layer in (ours, theirs))
        )
    # They go on in step.
    for each in (model, loaded):
        sgd = keras.optimizers.SGD(1.0)
        each.compile(sgd, "mse", run_eagerly=backends.ON_TENSORFLOW)
        keras.utils.set_random_seed(4)
        train(each)
    for ours, theirs in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(
            references.array(ours), references.array(theirs)
        )


def stock_model() -> keras.Model:
    """The stock twin of `stateful_model`."""
    return keras.Sequential(
        [
            keras.Input((6, 2)),
            keras.layers.Conv1D(4, 2, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="fc"),
        ]
    )


def assert_remembers(layer: Any, per: str) -> None:
    """Asserts that signs and norm are those of the kernel as it is."""
    w = references.array(layer.kernel)
    state = layer.kernel.constraint.state
    expected = signs(w)
    if per == "unit":
        rows = np.moveaxis(w, -2, 0).reshape(w.shape[-2], -1).sum(axis=1)
        expected = signs(rows).reshape((1,) * (w.ndim - 2) + (-1, 1))
    np.testing.assert_array_equal(stored_signs(layer.kernel), expected)
    np.testing.assert_allclose(
        references.array(state["norm"]), np.linalg.norm(w), rtol=1e-6
    )


@pytest.mark.parametrize("per", STATEFUL)
def test_stock_weights_file_sets_the_state_anew(
    per: str, tmp_path: Any
) -> None:
    stock = stock_model()
    path = str(tmp_path / "stock.weights.h5")
    stock.save_weights(path)
    model = stateful_model(per)
    feedback = references.array(model.get_layer("fc").feedback_kernel)
    model.load_weights(path)
    for name in ("conv", "fc"):
        np.testing.assert_array_equal(
            references.array(model.get_layer(name).kernel),
            references.array(stock.get_layer(name).kernel),
        )
        assert_remembers(model.get_layer(name), per)
    np.testing.assert_array_equal(
        model.get_layer("fc").feedback_kernel, feedback
    )


@pytest.mark.parametrize("per", STATEFUL)
def test_refresh_after_set_weights(per: str) -> None:
    model = stateful_model(per)
    before = remembered(model)
    for name in ("conv", "fc"):
        kernel = model.get_layer(name).kernel
        kernel.assign(-2 * kernel)
    for name, value in remembered(model).items():
        np.testing.assert_array_equal(value, before[name])
    keras_fa.refresh(model)
    for name in ("conv", "fc"):
        assert_remembers(model.get_layer(name), per)


def test_file_of_another_method_is_refused(tmp_path: Any) -> None:
    path = str(tmp_path / "fa.weights.h5")
    net(FADense(3, name="fc"), (5,), "sgd").save_weights(path)
    model = net(
        FADense(3, name="fc", kernel_constraint="fixed_sign"), (5,), "sgd"
    )
    with pytest.raises(ValueError, match="written under another method"):
        model.load_weights(path)


def test_one_instance_in_two_layers_has_two_states() -> None:
    constraint = Chain([FixedSign(), ConstantNorm()])
    a, b = (dense(kernel_constraint=constraint) for _ in range(2))
    for layer in (a, b):
        assert_remembers(layer, "synapse")
    assert not np.array_equal(stored_signs(a.kernel), stored_signs(b.kernel))
    b_signs = stored_signs(b.kernel)
    a.kernel.assign(-a.kernel)
    a.refresh()
    np.testing.assert_array_equal(stored_signs(b.kernel), b_signs)


# ConstantNorm.


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_norm_is_kept_for_every_kind(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.fa(**kind.arguments, **kind.constrained("constant_norm"))
    model = net(layer, kind.shape, keras.optimizers.SGD(0.5))
    before = [references.array(k) for k in references.kernels_of(layer)]
    train(model, 2)
    for kernel, w_0 in zip(references.kernels_of(layer), before):
        w = references.array(kernel)
        assert references.angle(w, w_0) > 0.1
        np.testing.assert_allclose(
            np.linalg.norm(w), np.linalg.norm(w_0), rtol=1e-6
        )


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_norm_is_kept_over_many_steps(dtype: str) -> None:
    layer = FADense(8, kernel_constraint="constant_norm", dtype=dtype)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    if dtype == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0**8)
    model = net(layer, (10,), optimizer)
    w_0 = references.array(layer.kernel)
    train(model, 50)
    w = references.array(layer.kernel)
    assert references.angle(w, w_0) > 5
    np.testing.assert_allclose(
        np.linalg.norm(w), np.linalg.norm(w_0), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norm_does_not_overflow_in_half_precision(dtype: str) -> None:
    layer = dense(
        20,
        20,
        kernel_initializer=keras.initializers.RandomNormal(stddev=100.0),
        kernel_constraint="constant_norm",
        feedback_initializer="constant",
        feedback_constraint="sign_concordance",
        dtype=dtype,
    )
    w = references.floats(layer.kernel)
    norm = references.floats(layer.kernel.constraint.norm)
    np.testing.assert_allclose(norm, np.linalg.norm(w), rtol=1e-2)
    b = references.floats(layer.effective_feedback_kernel())
    np.testing.assert_allclose(np.linalg.norm(b), np.linalg.norm(w), rtol=1e-2)


def test_zero_kernel_stays_zero() -> None:
    layer = FADense(
        3,
        kernel_initializer="zeros",
        kernel_constraint="constant_norm",
        feedback_initializer="he_normal",
    )
    train(net(layer, (5,), "sgd"))
    np.testing.assert_array_equal(layer.kernel, np.zeros((5, 3)))


# Chain.


class Halve(keras.constraints.Constraint):
    """A user's constraint that breaks both signs and norm."""

    def __call__(self, w: Any) -> Any:
        return 0.5 * w


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_chain_runs_in_its_own_order(order: tuple[int, ...]) -> None:
    parts = [FixedSign(), Halve(), ConstantNorm()]
    layer = dense(kernel_constraint=[parts[i] for i in order])
    chain = layer.kernel.constraint
    assert [type(c) for c in chain.constraints] == [
        FixedSign,
        Halve,
        ConstantNorm,
    ]
    w_0 = references.array(layer.kernel)
    pushed = w_0 - 0.3
    kept = np.where(pushed * signs(w_0) > 0, pushed, 0.0)
    wanted = kept * np.linalg.norm(w_0) / np.linalg.norm(kept)
    references.assert_close(references.array(chain(pushed)), wanted)


def test_chains_in_a_chain_are_one() -> None:
    inner = Chain([ConstantNorm(), FixedSign("unit", 0.5)])
    layer = dense(4, 10, kernel_constraint=[Halve(), inner])
    kinds = [type(c) for c in layer.kernel.constraint.constraints]
    assert kinds == [FixedSign, Halve, ConstantNorm]
    assert set(layer.kernel.constraint.state) == {"excitatory", "norm"}
    unit_signs(references.array(layer.kernel), np.arange(10)[:, None])


def test_two_of_a_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="FixedSign, FixedSign"):
        Chain([FixedSign("unit"), FixedSign()])


# Names, configs, stock layers.


@pytest.mark.parametrize(
    "constraint",
    [
        SignConcordance(strict=True),
        constraints.TiedKernel(),
        NoisyKernel(33.0, seed=4),
        Stored("non_neg"),
        FixedSign("unit", 0.25, seed=3, silent_zeros=True),
        ConstantNorm(),
        Chain(["constant_norm", "fixed_sign", keras.constraints.MaxNorm(3)]),
    ],
    ids=lambda constraint: type(constraint).__name__,
)
def test_config_round_trip(constraint: Any) -> None:
    config = keras.saving.serialize_keras_object(constraint)
    name = type(constraint).__name__
    assert config["registered_name"] == f"keras_fa>{name}"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(constraint)
    assert again.get_config() == constraint.get_config()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sign_concordance", SignConcordance),
        ("SignConcordance", SignConcordance),
        ("tied_kernel", constraints.TiedKernel),
        ("noisy_kernel", NoisyKernel),
        ("non_neg", Stored),
    ],
)
def test_feedback_names(name: str, kind: type) -> None:
    assert type(constraints.get(name)) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fixed_sign", FixedSign),
        ("FixedSign", FixedSign),
        ("constant_norm", ConstantNorm),
        ("unit_norm", keras.constraints.UnitNorm),
        (["fixed_sign", "max_norm"], Chain),
    ],
)
def test_kernel_names(name: Any, kind: type) -> None:
    assert type(constraints.get_kernel_constraint(name)) is kind


def test_rule_without_call_says_so() -> None:
    class Empty(FeedbackConstraint):
        pass

    with pytest.raises(NotImplementedError, match="Empty must implement"):
        Empty()(None, None)


@pytest.mark.parametrize(
    "make",
    [FixedSign, ConstantNorm, lambda: Chain([FixedSign(), ConstantNorm()])],
    ids=["fixed_sign", "constant_norm", "chain"],
)
def test_stock_layers_take_built_constraints(make: Callable) -> None:
    layer = keras.layers.Dense(8, kernel_constraint=make())
    model = net(layer, (10,), keras.optimizers.SGD(1.0))
    with pytest.raises(ValueError, match=r"build\(layer.kernel\)"):
        train(model)
    layer = keras.layers.Dense(8, kernel_constraint=make())
    model = net(layer, (10,), keras.optimizers.SGD(1.0))
    layer.kernel_constraint.build(layer.kernel)
    w_0 = references.array(layer.kernel)
    train(model)
    w = references.array(layer.kernel)
    state = layer.kernel_constraint.state
    assert not np.array_equal(w, w_0)
    if "excitatory" in state:
        assert (w * signs(w_0) >= 0).all()
        assert (w == 0).any()
    if "norm" in state:
        np.testing.assert_allclose(
            np.linalg.norm(w), np.linalg.norm(w_0), rtol=1e-6
        )


def test_built_stock_layer_per_unit() -> None:
    layer = keras.layers.Dense(
        8, kernel_constraint=FixedSign("unit"), kernel_initializer="ones"
    )
    layer.build((None, 3))
    layer.kernel.assign(layer.kernel * np.array([[1], [-1], [1]], "float32"))
    layer.kernel_constraint.build(layer.kernel)
    got = layer.kernel_constraint(np.ones((3, 8), "float32"))
    np.testing.assert_array_equal(got[:, 0], [1.0, 0.0, 1.0])


# Careless use.


def test_names_with_the_package() -> None:
    layer = dense(
        feedback_constraint="keras_fa>SignConcordance",
        kernel_constraint="keras_fa>FixedSign",
    )
    assert isinstance(layer.feedback_constraint, SignConcordance)
    assert isinstance(layer.kernel_constraint, FixedSign)


def test_a_rule_of_two_arguments_is_a_class() -> None:
    with pytest.raises(ValueError, match=r"subclass of .*FeedbackConstraint"):
        FADense(3, feedback_constraint=lambda feedback, kernel: feedback)
    layer = dense(feedback_constraint=lambda feedback: 2 * feedback)
    np.testing.assert_array_equal(
        references.array(layer.effective_feedback_kernel()),
        2 * references.array(layer.feedback_kernel),
    )


class Flat(FeedbackConstraint):
    """A rule that returns another shape."""

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        return keras.ops.reshape(feedback_kernel, (-1,))


def test_a_rule_keeps_the_shape() -> None:
    with pytest.raises(ValueError, match=r"Flat must return .*\(5, 3\)"):
        dense(feedback_constraint=Flat()).effective_feedback_kernel()


def test_signs_at_zero_in_float16() -> None:
    layer = dense(
        dtype="float16",
        kernel_constraint="fixed_sign",
        feedback_constraint="sign_concordance",
    )
    fixed = stored_signs(layer.kernel)
    layer.kernel.assign(np.zeros((5, 3)))
    feedback = references.array(layer.effective_feedback_kernel())
    np.testing.assert_array_equal(np.sign(feedback), fixed)


@pytest.mark.filterwarnings("ignore:.*feedback of one magnitude")
@pytest.mark.parametrize("per", ["synapse", "unit"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_silent_zeros_send_no_error(dtype: str, strict: bool, per: str) -> None:
    layer = dense(
        dtype=dtype,
        kernel_constraint=FixedSign(per, silent_zeros=True),
        feedback_constraint=SignConcordance(strict),
    )
    fixed = stored_signs(layer.kernel) * np.ones((5, 3))
    magnitudes = 1.0 if strict else np.abs(references.stored_of(layer)[0])
    w = references.array(layer.kernel)
    w[::2] *= 0
    layer.kernel.assign(w)
    kept = np.sign(w)
    assert not kept[::2].any()
    np.testing.assert_array_equal(kept[1::2], fixed[1::2])
    if strict:
        magnitudes = np.linalg.norm(w) / np.sqrt(np.count_nonzero(w))
    (b,) = references.effective_of(layer)
    np.testing.assert_allclose(b, magnitudes * kept, rtol=1e-6)
    # And their sign is kept all the same.
    moved = references.array(layer.kernel.constraint(w + 1e-3 * fixed))
    np.testing.assert_array_equal(np.sign(moved), fixed)
    np.testing.assert_array_equal(
        references.array(layer.kernel.constraint(w - 1e-3 * fixed))[::2], 0
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"feedback_initializer": "he_normal"},
        {"feedback_constraint": constraints.RandomMagnitude(3)},
        {"feedback_constraint": NoisyKernel(60.0, seed=3)},
    ],
)
def test_kernels_of_one_layer_draw_their_own(arguments: dict) -> None:
    kind = KINDS["separable2d"]
    layer = kind.fa(64, 3, depth_multiplier=4, **arguments)
    layer.build((None, 8, 8, 16))
    first, second = (
        (b - w).ravel() if "feedback_constraint" in arguments else b.ravel()
        for b, w in zip(
            references.effective_of(layer),
            map(references.array, references.kernels_of(layer)),
        )
    )
    size = min(first.size, second.size)
    pair = np.abs([first[:size], second[:size]])
    assert abs(np.corrcoef(pair)[0, 1]) < 0.2


def test_weights_against_the_sign_of_their_unit_are_said() -> None:
    layer = dense(kernel_constraint=FixedSign(per="unit"))
    layer.kernel.assign([[1.0, 1.0, -0.5]] * 5)
    with pytest.warns(UserWarning, match=r"33 % of the weights"):
        layer.refresh()


def test_what_is_remembered_may_change_after_training() -> None:
    """A step that was compiled with other signs and norms is not used."""
    layer = FADense(4, kernel_constraint=["fixed_sign", "constant_norm"])
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x, y = references.normal((8, 6), 1), references.normal((8, 4), 2)
    model.fit(x, y, verbose=0)
    other = 3 * references.normal((6, 4), 3)
    layer.kernel.assign(other)
    layer.refresh()
    model.fit(x, y, epochs=2, verbose=0)
    kernel = references.array(layer.kernel)
    assert np.all(kernel * other >= 0)
    assert np.mean(kernel != 0) > 0.5
    np.testing.assert_allclose(
        np.linalg.norm(kernel), np.linalg.norm(other), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_units_at_zero_keep_their_sign_in_half_precision(dtype: str) -> None:
    layer = FADense(
        3, dtype=dtype, kernel_constraint=FixedSign(per="unit", seed=1)
    )
    layer.build((None, 12))
    before = references.array(layer.kernel.constraint.state["excitatory"])
    assert 0 < before.mean() < 1
    kernel = references.array(keras.ops.cast(layer.kernel, "float32"))
    layer.kernel.assign(np.where(np.signbit(kernel), -0.0, 0.0))
    layer.refresh()
    after = references.array(layer.kernel.constraint.state["excitatory"])
    np.testing.assert_array_equal(after, before)


def test_units_of_one_sign_and_feedback_of_one_magnitude_are_told() -> None:
    """Below a softmax such a layer sends no error at all."""
    strict = SignConcordance(strict=True)
    loose = SignConcordance()
    unit, synapse = FixedSign(per="unit", seed=1), FixedSign()
    with pytest.warns(UserWarning, match="keep the readout free"):
        readout = dense(kernel_constraint=unit, feedback_constraint=strict)
    e = references.normal((4, 3), 2)
    e -= e.mean(-1, keepdims=True)  # as softmax's errors
    _, (dx,), _ = vjp(readout, readout, [references.normal((4, 5), 1)], e)
    np.testing.assert_allclose(references.array(dx), 0, atol=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense(kernel_constraint=synapse, feedback_constraint=strict)
        layer = dense(kernel_constraint=unit, feedback_constraint=loose)
        # Here each input has an error of its own.
        keras_fa.FADepthwiseConv2D(
            1, depthwise_constraint=unit, feedback_constraint=strict
        ).build((None, 4, 4, 3))
    with pytest.warns(UserWarning, match="keep the readout free"):
        StrictNormalization().apply(layer)
