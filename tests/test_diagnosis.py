"""`diagnose` on models that are made to show each finding, and none."""

import backends
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import layers

from keras_fa import FADense
from keras_fa import convert
from keras_fa.alignment import Diagnosis
from keras_fa.alignment import LayerDiagnosis
from keras_fa.alignment import alignment
from keras_fa.alignment import diagnose
from keras_fa.alignment import effective_rank
from keras_fa.alignment import gradient_angle
from keras_fa.callbacks import AlignmentMonitor
from keras_fa.callbacks import MirrorPhase
from keras_fa.constraints import FeedbackConstraint
from keras_fa.constraints import FixedSign
from keras_fa.constraints import SignConcordance
from keras_fa.layers.feedback import feedback_layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6, 6, 2)).astype("float32")
Y = RNG.integers(0, 4, 32)
LOSS = "sparse_categorical_crossentropy"
WORDS = {
    "tied": "B is W",
    "signs": "have the sign of W",
    "still": "what it was at the start",
    "hint": "a hint: B is trained",
    "explodes": "the forward pass explodes",
    "not finite": "is not finite",
    "vanishes": "its gradient vanishes",
    "no error": "no error arrives",
    "one error": "are one error",
}


def network(**readout) -> keras.Model:
    """A convnet with statistics and masks."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.SeparableConv2D(4, 2, activation="relu", name="separable"),
            layers.Dropout(0.2, name="drop"),
            layers.Flatten(name="flatten"),
            layers.Dense(8, activation="tanh", name="hidden"),
            layers.Dense(4, activation="softmax", name="readout", **readout),
        ]
    )


def small() -> keras.Model:
    """Three of its layers with kernels."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, strides=3, activation="relu", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(8, activation="tanh", name="hidden"),
            layers.Dense(4, activation="softmax", name="readout"),
        ]
    )


def found(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """What was found of each kernel, by the keys of `WORDS`."""
    return {
        name: [
            next(key for key, words in WORDS.items() if words in finding)
            for finding in findings
        ]
        for name, findings in diagnosis.findings.items()
    }


def errors_by_numpy(model: keras.Model, x, y) -> tuple[list, list]:
    """`dy` at the two layers of a small linear net under "mse", FA and BP."""
    hidden, readout = model.layers
    h = x @ array(hidden.kernel) + array(hidden.bias)
    z = h @ array(readout.kernel) + array(readout.bias)
    e = 2 * (z - y) / z.size
    kernels = array(readout.effective_feedback_kernel()), array(readout.kernel)
    return [e @ kernel.T for kernel in kernels], e


def rank(matrix: np.ndarray) -> float:
    s = np.linalg.svd(matrix.reshape(len(matrix), -1), compute_uv=False)
    return float(np.sum(s**2) ** 2 / np.sum(s**4))


# The numbers ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 3, 3, 2), (1, 4)])
def test_effective_rank_against_singular_values(shape, scale) -> None:
    errors = RNG.normal(size=shape).astype("float32") + 0.5
    got = float(effective_rank(np.float32(scale) * errors))
    assert got == pytest.approx(rank(errors.astype("float64")), rel=1e-4)


def test_effective_rank_of_known_errors() -> None:
    one = np.outer(RNG.normal(size=6), RNG.normal(size=5)).astype("float32")
    assert float(effective_rank(one)) == pytest.approx(1, abs=1e-5)
    assert float(effective_rank(np.eye(6, 3, dtype="f"))) == pytest.approx(3)
    assert np.isnan(float(effective_rank(np.zeros((3, 4), "f"))))


def test_gradients_that_vanish_have_no_angle() -> None:
    a, b = np.array([3e-8, 0.0], "f"), np.array([3e-8, 3e-8], "f")
    assert np.isnan(float(gradient_angle(a, b)))
    assert float(gradient_angle(a, 10 * b)) == pytest.approx(45, abs=1e-3)
    assert np.isnan(float(gradient_angle(1024 * a, 1024 * b, 1024.0)))


def test_numbers_against_numpy() -> None:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            FADense(7, name="hidden"),
            FADense(3, name="readout"),
        ]
    )
    x, y = references.normal((6, 5), 1), references.normal((6, 3), 2)
    rows = diagnose(model, x, y, loss="mse").layers
    (below, exact), e = errors_by_numpy(model, x, y)
    hidden, readout = rows["hidden"], rows["readout"]
    for got, wanted in (
        (hidden.error_rank, rank(below)),
        (hidden.backprop_error_rank, rank(exact)),
        (readout.error_rank, rank(e)),
        (readout.backprop_error_rank, rank(e)),
        (hidden.received_norm, np.linalg.norm(x.T @ below)),
        (hidden.gradient_norm, np.linalg.norm(x.T @ exact)),
        (hidden.gradient_angle, references.angle(x.T @ below, x.T @ exact)),
    ):
        assert got == pytest.approx(float(wanted), rel=1e-3)
    h = x @ array(model.layers[0].kernel)
    z = h @ array(model.layers[1].kernel)
    sizes = [float(np.sqrt(np.mean(a**2))) for a in (h, z)]
    assert [hidden.activity, readout.activity] == pytest.approx(sizes, rel=1e-4)
    assert readout.activity_ratio == pytest.approx(
        sizes[1] / sizes[0], rel=1e-4
    )
    assert np.isnan(hidden.activity_ratio)
    measures = alignment(model, x, y, loss="mse")
    for name, row in measures.items():
        for measure, value in row.items():
            got = getattr(rows[name], measure)
            assert got == pytest.approx(value, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    "method",
    ["bp", "fa", "fa_usf_init_ei", "brsf", "frozen", "dfa", "dense_fa"],
)
def test_nothing_is_found_and_nothing_moves(method: str) -> None:
    model = convert(network(), method)
    before = [array(variable) for variable in model.variables]
    activations = [layer.activation for layer in feedback_layers(model)]
    diagnosis = diagnose(model, X, Y, LOSS)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    after = [layer.activation for layer in feedback_layers(model)]
    assert all(a is b for a, b in zip(activations, after))
    assert found(diagnosis) == {}
    assert str(diagnosis).endswith("Nothing found.")
    names = "conv separable/depthwise_kernel separable/pointwise_kernel hidden"
    assert list(diagnosis.layers) == [*names.split(), "readout"]
    for row in diagnosis.layers.values():
        assert 1 <= row.error_rank <= 32
        assert 1 <= row.backprop_error_rank <= 32
        assert row.gradient_norm > 1e-4
        assert np.isnan(row.angle) == (method == "dfa")
    hidden = diagnosis.layers["hidden"]
    exact = method in ("bp", "frozen")
    assert (hidden.gradient_angle < 0.1) == exact
    same = hidden.error_rank == pytest.approx(hidden.backprop_error_rank)
    assert same == exact
    model.compile("sgd", LOSS, run_eagerly=True)  # and it trains on
    assert np.isfinite(model.train_on_batch(X, Y))


def test_half_precision() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = convert(network(), "fa_usf_sn")
    rows = diagnose(model, X, Y, LOSS).layers
    keras.config.set_dtype_policy("float32")
    full = convert(network(), "fa_usf_sn")
    full.set_weights(model.get_weights())
    for name, row in diagnose(full, X, Y, LOSS).layers.items():
        got = rows[name]
        if name in ("readout", "hidden"):  # above all masks
            assert got.activity == pytest.approx(row.activity, rel=0.3)
        assert got.gradient_norm == pytest.approx(row.gradient_norm, rel=0.5)


def test_shared_and_nested_layers() -> None:
    start = keras.Input((6,))
    shared = layers.Dense(6, activation="tanh", name="shared")
    part = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, "tanh", name="inner")], name="part"
    )
    x = part(shared(part(shared(start))))
    stock = keras.Model(start, layers.Dense(2, name="readout")(x))
    x, y = references.normal((16, 6), 1), references.normal((16, 2), 2)
    rows = diagnose(convert(stock, "fa"), x, y, "mse").layers
    assert set(rows) == {"shared", "inner", "readout"}
    assert all(1 <= row.error_rank <= 6.01 for row in rows.values())
    assert not np.isnan(rows["shared"].activity_ratio)  # its second call has


def test_a_model_of_ones_own() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = FADense(5, activation="relu"), FADense(2)

        def call(self, inputs):
            return self.b(self.a(inputs))

    model = Own()
    x, y = references.normal((8, 4), 1), references.normal((8, 2), 2)
    model(x)
    assert len(diagnose(model, x, y, "mse").layers) == 2


def test_what_alignment_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="has no FA layer"):
        diagnose(network(), X, Y, LOSS)
    with pytest.raises(ValueError, match="needs one loss"):
        diagnose(convert(network(), "fa"), X, Y)


# The findings -----------------------------------------------------------------


def test_b_is_w() -> None:
    model = convert(small(), "fa")
    layer = model.get_layer("hidden")
    layer.feedback_kernel.assign(layer.kernel)
    assert found(diagnose(model, X, Y, LOSS)) == {"hidden": ["tied"]}
    layer.feedback_kernel.assign(1.001 * layer.kernel)
    assert found(diagnose(model, X, Y, LOSS)) == {}


@keras.saving.register_keras_serializable(package="tests")
class Stale(FeedbackConstraint):
    """Says that it is concordant, and keeps the signs of the start."""

    sign_concordant = True

    def __call__(self, feedback_kernel, kernel):
        return feedback_kernel


def test_signs_that_do_not_follow() -> None:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            FADense(
                6,
                activation="tanh",
                name="stale",
                feedback_initializer="kernel_sign",
                feedback_constraint=Stale(),
            ),
            FADense(4, name="readout", feedback_initializer="kernel_sign"),
        ]
    )
    x, y = references.normal((16, 6), 1), references.normal((16, 4), 2)
    assert found(diagnose(model, x, y, "mse")) == {}
    for layer in model.layers:
        kernel = array(layer.kernel)
        kernel[0, 0] *= -1
        layer.kernel.assign(kernel)
    diagnosis = diagnose(model, x, y, "mse")
    assert found(diagnosis) == {"stale": ["signs"]}  # FA promises nothing
    assert "97.2 %" in diagnosis.findings["stale"][0]


def test_trained_feedback_that_has_not_moved() -> None:
    model = convert(small(), "fa")
    model.compile("adam", LOSS)
    hidden, conv = (model.get_layer(name) for name in ("hidden", "conv"))
    for layer in (hidden, conv):  # no gradient arrives there in FA
        layer.feedback_kernel.trainable = True
    monitor = AlignmentMonitor(probe=(X, Y))
    with pytest.raises(ValueError, match="Give the monitor to `fit`"):
        monitor.diagnose()
    assert found(diagnose(model, X, Y, LOSS)) == {
        "hidden": ["hint"],
        "conv": ["hint"],
    }
    for layer in (hidden, conv):
        layer.feedback_kernel.trainable = False
    before = {"hidden": array(hidden.feedback_kernel)}
    hidden.feedback_kernel.trainable = True
    assert found(diagnose(model, X, Y, LOSS, before)) == {"hidden": ["still"]}
    hidden.feedback_kernel.assign(hidden.feedback_kernel + 0.1)
    assert found(diagnose(model, X, Y, LOSS, before)) == {}


def test_the_monitor_looks_back_to_the_start() -> None:
    model = convert(small(), "fa")
    model.compile("sgd", LOSS)
    hidden = model.get_layer("hidden")
    monitor = AlignmentMonitor(probe=(X, Y))
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert found(monitor.diagnose()) == {}
    monitor._before = {"hidden": array(hidden.feedback_kernel)}
    hidden.feedback_kernel.trainable = True
    assert found(monitor.diagnose()) == {"hidden": ["still"]}


def test_activity_that_explodes() -> None:
    model = convert(network(), "bp")
    layer = model.get_layer("separable")
    layer.bias.assign(layer.bias + 1000.0)
    names = found(diagnose(model, X, Y, LOSS))
    assert set(names["separable/depthwise_kernel"]) >= {"explodes"}
    layer.bias.assign(layer.bias * 0.01)
    assert "explodes" not in str(diagnose(model, X, Y, LOSS))


def test_activity_that_is_not_finite() -> None:
    model = convert(small(), "bp")
    layer = model.get_layer("hidden")
    layer.kernel.assign(np.inf * np.ones(layer.kernel.shape))
    assert "not finite" in found(diagnose(model, X, Y, LOSS))["hidden"]


def test_gradients_that_vanish() -> None:
    """Below units that saturate."""
    model = convert(network(), "fa")
    layer = model.get_layer("hidden")
    layer.kernel.assign(1e7 * layer.kernel)
    diagnosis = diagnose(model, X, Y, LOSS)
    assert set(found(diagnosis)) == set(diagnosis.layers) - {"readout"}
    assert found(diagnosis)["conv"] == ["vanishes"]
    assert diagnosis.layers["conv"].gradient_norm == 0
    assert np.isnan(diagnosis.layers["conv"].gradient_angle)


def test_gradients_that_are_too_small_have_no_angle() -> None:
    def tiny(y, output):
        return 1e-10 * keras.losses.sparse_categorical_crossentropy(y, output)

    model = convert(small(), "fa")
    diagnosis = diagnose(model, X, Y, tiny)
    assert found(diagnosis) == {n: ["vanishes"] for n in diagnosis.layers}
    for row in diagnosis.layers.values():
        assert 0 < row.gradient_norm < 1e-7
        assert np.isnan(row.gradient_angle)
    measures = alignment(model, X, Y, tiny)["conv"]
    assert np.isnan(measures["gradient_angle"])
    assert measures["angle"] > 0
    monitor = AlignmentMonitor(probe=(X, Y), loss=tiny)
    model.compile("sgd", LOSS)
    model.fit(X, Y, verbose=0, callbacks=[monitor])
    assert np.isnan(monitor.history[0]["alignment/gradient_angle/conv"])


def test_feedback_that_carries_no_error() -> None:
    model = convert(small(), "fa")
    readout = model.get_layer("readout")
    readout.feedback_kernel.assign(0.0 * readout.feedback_kernel)
    names = found(diagnose(model, X, Y, LOSS))
    assert names["hidden"] == ["no error"]
    assert "readout" not in names


@pytest.mark.filterwarnings("ignore:.*FixedSign")
def test_dales_law_below_a_softmax_sends_no_error() -> None:
    """A multiple of the sum of the errors, which is 0 but for rounding."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            FADense(12, activation="tanh", name="hidden"),
            FADense(
                4,
                activation="softmax",
                name="readout",
                kernel_constraint=FixedSign(per="unit"),
                feedback_constraint=SignConcordance(strict=True),
            ),
        ]
    )
    x = references.normal((32, 6), 1)
    diagnosis = diagnose(model, x, Y, LOSS)
    assert found(diagnosis) == {"hidden": ["no error"]}
    assert diagnosis.layers["hidden"].received_norm > 0


def test_feedback_of_rank_one_sends_one_error() -> None:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            FADense(12, name="hidden"),
            FADense(8, name="readout"),
        ]
    )
    readout = model.get_layer("readout")
    b = np.outer(references.normal((12,), 3), references.normal((8,), 4))
    readout.feedback_kernel.assign(0.3 * b)
    x, y = references.normal((32, 6), 1), references.normal((32, 8), 2)
    diagnosis = diagnose(model, x, y, "mse")
    assert found(diagnosis) == {"hidden": ["one error"]}
    assert diagnosis.layers["hidden"].error_rank == pytest.approx(1, abs=1e-3)
    assert diagnosis.layers["hidden"].backprop_error_rank > 1.5


def test_text() -> None:
    nan = float("nan")
    rows = {
        "a": LayerDiagnosis(90, 1, 50, 1, nan, 3, 0, nan, 1, 4, ("it is so.",)),
        "b": LayerDiagnosis(0.5, 1, 50, 2, 2, 3, 0.01, 12.34, 3, 3),
    }
    text = str(Diagnosis(rows)).splitlines()
    assert text[0].split()[:3] == ["layer", "angle", "|B|/|W|"]
    assert text[1].split() == "a 90 1 50 1 - 3 0 - 1 4".split()
    assert text[2].split() == "b 0.5 1 50 2 2 3 0.01 12.3 3 3".split()
    assert text[3:] == ["", "a: it is so."]


@backends.requires_tensorflow
def test_under_two_replicas(strategy) -> None:
    with strategy.scope():
        model = convert(small(), "fa")
        model.compile("sgd", LOSS)
    monitor = AlignmentMonitor(probe=(X, Y))
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[monitor])
    assert found(monitor.diagnose()) == {}


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirror_without_its_phase(mirrored: bool) -> None:
    stock = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, "tanh"), layers.Dense(4, "softmax")]
    )
    model = convert(stock, "weight_mirror")
    model.compile("sgd", LOSS)
    x = RNG.normal(size=(32, 5)).astype("float32")
    monitor = AlignmentMonitor((x, Y))
    phases = [MirrorPhase()] if mirrored else []
    model.fit(x, Y, verbose=0, callbacks=[monitor, *phases])
    found = str(monitor.diagnose().findings)
    assert (WORDS["still"] in found) is not mirrored
