"""The measures of alignment against NumPy, and that measuring moves nothing."""

from pathlib import Path

import backends
import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_fa
from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.alignment import alignment
from keras_fa.alignment import alignment_function
from keras_fa.alignment import angle
from keras_fa.alignment import norm_ratio
from keras_fa.alignment import sign_agreement
from keras_fa.methods import METHODS

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6, 6, 2)).astype("float32")
Y = np.eye(3, dtype="float32")[RNG.integers(0, 3, 8)]
MEASURES = {"angle", "norm_ratio", "sign_agreement", "gradient_angle"}


def exact_angle(a: np.ndarray, b: np.ndarray) -> float:
    """The angle in degrees, in float64."""
    a, b = (np.asarray(v, "float64").ravel() for v in (a, b))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    half = np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    return float(np.degrees(2 * half))


def network(dropout: float = 0.3) -> keras.Model:
    """A convnet with everything that has state."""
    start = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, name="conv", activation="relu")(start)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.Dropout(dropout, name="drop1")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(6, activation="tanh", name="hidden")(x)
    x = layers.Dropout(dropout, seed=4, name="drop2")(x)
    return keras.Model(start, layers.Dense(3, name="readout")(x))


def tape_gradients(model: keras.Model) -> dict[str, np.ndarray]:
    """The gradients of the mean squared error by kernel."""
    weights = [w for w in model.trainable_weights if "kernel" in w.name]
    _, _, grads = backends.vjp(
        model,
        lambda: ops.mean((model(X, training=True) - ops.array(Y)) ** 2),
        variables=weights,
    )
    return {w.path: np.array(grad) for w, grad in zip(weights, grads)}


# The functions -------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("degrees", [0.0, 0.01, 1.0, 45.0, 90.0, 179.0, 179.99])
def test_angle(degrees: float, scale: float) -> None:
    u = RNG.normal(size=500)
    v = RNG.normal(size=500)
    v -= u * (u @ v) / (u @ u)
    radians = np.radians(degrees)
    turned = np.cos(radians) * u / np.linalg.norm(u)
    turned = turned + np.sin(radians) * v / np.linalg.norm(v)
    a, b = (scale * u).astype("float32"), (turned / scale).astype("float32")
    np.testing.assert_allclose(exact_angle(a, b), degrees, atol=1e-4)
    np.testing.assert_allclose(angle(a, b), degrees, atol=2e-4)
    np.testing.assert_allclose(angle(b, a), degrees, atol=2e-4)


def test_angle_of_opposites_and_of_zeros() -> None:
    a = RNG.normal(size=(3, 4)).astype("float32")
    np.testing.assert_allclose(angle(a, -2 * a), 180, atol=1e-3)
    np.testing.assert_allclose(angle(a, a), 0, atol=1e-3)
    zeros = np.zeros_like(a)
    for one, other in ((a, zeros), (zeros, a), (zeros, zeros)):
        assert np.isnan(angle(one, other))


def test_norm_ratio_and_sign_agreement() -> None:
    a, b = (RNG.normal(size=(5, 6)).astype("float32") for _ in "ab")
    a[0, 0] = b[0, 0] = 0.0
    a[0, 1] = 0.0
    wanted = np.linalg.norm(a.astype("float64")) / np.linalg.norm(b)
    np.testing.assert_allclose(norm_ratio(a, b), wanted, rtol=1e-6)
    agreement = 100 * np.mean(np.sign(a) == np.sign(b))
    np.testing.assert_allclose(sign_agreement(a, b), agreement, rtol=1e-6)
    assert np.isnan(norm_ratio(a, np.zeros_like(b)))
    assert norm_ratio(np.zeros_like(a), b) == 0


# Of models -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["fa", "fa_usf_sn", "dfa"])
def test_measures_against_numpy(method: str) -> None:
    model = convert(network(dropout=0.0), method)
    measured = alignment(model, X, Y, loss="mse")
    received = tape_gradients(model)
    exact = tape_gradients(to_backprop(model))
    kernels = {
        "conv": "conv/kernel",
        "separable/depthwise_kernel": "separable/depthwise_kernel",
        "separable/pointwise_kernel": "separable/pointwise_kernel",
        "hidden": "hidden/kernel",
        "readout": "readout/kernel",
    }
    assert set(measured) == set(kernels)
    for name, path in kernels.items():
        wanted = exact_angle(received[path], exact[path])
        got = measured[name]["gradient_angle"]
        np.testing.assert_allclose(got, wanted, atol=0.05, err_msg=name)
        if method == "dfa":
            assert set(measured[name]) == {"gradient_angle"}
            continue
        assert set(measured[name]) == MEASURES
        layer = model.get_layer(name.split("/")[0])
        feedback = layer.effective_feedback_kernel()
        if "/" in name:
            index = ["depthwise_kernel", "pointwise_kernel"].index(
                name.split("/")[1]
            )
            kernel = getattr(layer, name.split("/")[1])
            feedback = feedback[index]
        else:
            kernel = layer.kernel
        b, w = np.array(feedback, "float64"), np.array(kernel, "float64")
        agreement = 100 * np.mean(np.sign(b) == np.sign(w))
        ratio = np.linalg.norm(b) / np.linalg.norm(w)
        row = measured[name]
        np.testing.assert_allclose(row["angle"], exact_angle(b, w), atol=1e-3)
        np.testing.assert_allclose(row["norm_ratio"], ratio, rtol=1e-5)
        np.testing.assert_allclose(row["sign_agreement"], agreement, rtol=1e-5)
    assert measured["readout"]["gradient_angle"] < 0.1
    assert measured["conv"]["gradient_angle"] > 5


@pytest.mark.parametrize("method", ["bp", "bp_alignment"])
def test_backpropagation_has_no_angle(method: str) -> None:
    model = convert(network(), method)
    for row in alignment(model, X, Y, loss="mse").values():
        assert row["gradient_angle"] < 0.1
        assert row["angle"] < 0.1
        np.testing.assert_allclose(row["sign_agreement"], 100, rtol=1e-6)
        np.testing.assert_allclose(row["norm_ratio"], 1, rtol=1e-6)


@pytest.mark.parametrize("method", ["bp_noise", "fa_usf_sn", "dfa"])
def test_masks_are_shared_and_nothing_moves(method: str) -> None:
    model = convert(network(dropout=0.5), method)
    variables = model.variables
    names = " ".join(variable.path for variable in variables)
    assert "seed_generator" in names
    assert "moving_mean" in names
    before = [np.array(variable) for variable in variables]
    measure = alignment_function(model, "mse")
    first, second = measure(X, Y), measure(X, Y)
    for variable, value in zip(variables, before):
        assert np.array_equal(variable, value), variable.path
    assert first == second
    # The readout's own update is exact only if both passes drop the same.
    assert first["readout"]["gradient_angle"] < 0.1
    model(X, training=True)  # other masks next time
    if METHODS[method].wiring != "chain" or method.startswith("fa"):
        assert measure(X, Y) != first


@pytest.mark.parametrize("method", ["fa", "fa_usf_sn"])
def test_a_compiled_measure_follows_the_weights(method: str) -> None:
    model = convert(network(), method)
    measure = alignment_function(model, "mse")
    measure(X, Y)
    layer = model.get_layer("hidden")
    layer.kernel.assign(RNG.uniform(-2, 1, layer.kernel.shape))
    found = measure(X, Y)["hidden"]
    kernel, feedback = layer.kernel, layer.effective_feedback_kernel()
    wanted = exact_angle(np.array(feedback), np.array(kernel))
    assert found["angle"] == pytest.approx(wanted, abs=1e-3)
    ratio = np.linalg.norm(feedback) / np.linalg.norm(kernel)
    assert found["norm_ratio"] == pytest.approx(float(ratio), rel=1e-5)


def test_known_angles() -> None:
    stock = keras.Sequential(
        [keras.Input((300,))]
        + [
            layers.Dense(300, kernel_initializer="he_normal", name=name)
            for name in ("a", "b")
        ]
    )
    x = RNG.normal(size=(4, 300)).astype("float32")
    for method, known in (
        ("fa_usf_sn", 34.7),
        ("fa_usf_init", 47.5),
        ("fa", 90),
    ):
        measured = alignment(convert(stock, method), x, x, loss="mse")
        for row in measured.values():
            assert abs(row["angle"] - known) < 0.7
            agreement = 50 if method == "fa" else 100
            assert abs(row["sign_agreement"] - agreement) < 1
            assert abs(row["norm_ratio"] - 1) < 0.02


def test_dead_layers_are_nan() -> None:
    model = convert(network(), "fa_usf_sn")
    hidden, conv = (model.get_layer(name) for name in ("hidden", "conv"))
    hidden.kernel.assign(np.zeros(hidden.kernel.shape))
    conv.bias.assign(np.full(conv.bias.shape, -1e6))
    measured = alignment(model, X, Y, loss="mse")
    assert np.isnan(measured["hidden"]["angle"])
    assert np.isnan(measured["hidden"]["norm_ratio"])
    assert np.isnan(measured["conv"]["gradient_angle"])
    assert np.isfinite(measured["conv"]["angle"])
    assert np.isfinite(measured["readout"]["angle"])


def test_works_after_loading(tmp_path: Path) -> None:
    model = convert(network(), "fa")
    model.compile("adam", "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    static = {"angle", "norm_ratio", "sign_agreement"}
    ours, theirs = alignment(loaded, X, Y), alignment(model, X, Y)
    for name, row in theirs.items():
        for measure in static:
            assert ours[name][measure] == row[measure]


@pytest.mark.parametrize("names", [False, True])
def test_several_inputs(names: bool) -> None:
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    x = layers.Concatenate()([layers.Dense(4, name="left")(a), b])
    stock = keras.Model(
        {"a": a, "b": b} if names else [a, b],
        layers.Dense(2, name="readout")(layers.Dense(5, name="hidden")(x)),
    )
    inputs = {"a": np.ones((2, 3)), "b": np.ones((2, 4))}
    inputs = inputs if names else list(inputs.values())
    measured = alignment(convert(stock, "fa"), inputs, np.ones((2, 2)), "mse")
    assert set(measured) == {"left", "hidden", "readout"}
    assert (
        measured["readout"]["gradient_angle"]
        < 0.1
        < measured["left"]["gradient_angle"]
    )


@pytest.mark.parametrize(
    "loss", ["binary_crossentropy", keras.losses.BinaryCrossentropy(), "mse"]
)
def test_targets_as_fit_takes_them(loss: object) -> None:
    stock = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="relu"),
            layers.Dense(1, activation="sigmoid", name="readout"),
        ]
    )
    model = convert(stock, "fa")
    model.compile("sgd", loss)
    x, y = RNG.normal(size=(6, 3)), np.array([0, 1, 0, 1, 1, 0])
    assert alignment(model, x, y) == alignment(model, x, y[:, None])


@pytest.mark.parametrize("loss", ["sparse", "function", "instance"])
def test_losses(loss: str) -> None:
    given = {
        "sparse": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "function": lambda y, z: keras.ops.sum((z[:, 0] - y) ** 2),
        "instance": keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        ),
    }[loss]
    model = convert(network(dropout=0.0), "fa")
    measured = alignment(model, X, Y.argmax(-1).astype("float32"), given)
    assert measured["readout"]["gradient_angle"] < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_a_name_is_the_loss_that_fit_takes(masked: bool) -> None:
    """Where there is a mask it counts, as in a loss instance."""
    start = keras.Input((6,))
    x = layers.Embedding(9, 5, mask_zero=masked)(start)
    x = layers.Dense(4, activation="tanh", name="hidden")(x)
    model = convert(keras.Model(start, layers.Dense(3)(x)), "fa")
    x = np.random.default_rng(1).integers(1, 9, (16, 6))
    x[:, 2:] = 0
    y = RNG.normal(size=(16, 6, 3)).astype("float32")
    y[:, 2:] = 5
    exact = keras.losses.MeanSquaredError()
    by_name, by_class = (alignment(model, x, y, s) for s in ("mse", exact))
    assert by_name == by_class
    model.compile("sgd", "mse")
    assert alignment(model, x, y) == by_class


@pytest.mark.parametrize("compiled", [None, ["mse"], {"readout": "mse"}])
def test_without_one_loss(compiled: object) -> None:
    model = convert(network(), "fa")
    if compiled is not None:
        model.compile("adam", compiled)
    with pytest.raises(ValueError, match="needs one loss"):
        alignment(model, X, Y)


def test_mixed_precision() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = convert(network(), "fa_usf_sn")
    finally:
        keras.config.set_dtype_policy(before)
    measured = alignment(model, X, Y, loss="mse")
    assert measured["readout"]["gradient_angle"] < 1
    np.testing.assert_allclose(measured["hidden"]["norm_ratio"], 1, rtol=1e-5)


def test_layers_in_a_model_of_ones_own() -> None:
    model = keras.Sequential(
        [keras.Input((4,)), keras_fa.FADense(5), layers.Dense(3)]
    )
    measured = alignment(model, np.ones((2, 4)), np.ones((2, 3)), "mse")
    assert len(measured) == 1


# Names and refusals ----------------------------------------------------------


def test_equal_names_in_nested_models_have_a_row_each() -> None:
    def part() -> keras.Model:
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, "tanh", name="d")]
        )

    start = keras.Input((4,))
    stock = keras.Model(start, part()(part()(start)))
    model = convert(stock, "fa")
    x = RNG.normal(size=(8, 4)).astype("float32")
    measures = alignment(model, x, x, "mse")
    assert list(measures) == ["d", "d_1"]
    assert measures["d"]["angle"] != measures["d_1"]["angle"]


def test_models_without_alignment_are_refused() -> None:
    with pytest.raises(ValueError, match="has no FA layer"):
        alignment(network(), X, Y, "mse")
    lazy = keras.Sequential([keras_fa.FADense(3, name="lazy")])
    with pytest.raises(ValueError, match="'lazy' is not built"):
        alignment(lazy, X, Y, "mse")
    start = keras.Input((4,))
    hidden = layers.Dense(3)(start)
    two = keras.Model(start, [hidden, layers.Dense(2)(hidden)])
    with pytest.raises(ValueError, match="2 outputs"):
        alignment(convert(two, "fa"), X, Y, "mse")
