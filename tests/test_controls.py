"""brSF and the controls: signs of the start, frozen hidden kernels."""

from pathlib import Path
from typing import Any

import backends
import forks
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import layers
from references import KINDS

import keras_fa
from keras_fa import FADense
from keras_fa import convert
from keras_fa import load_stock_weights
from keras_fa import to_backprop
from keras_fa.constraints import RandomMagnitude
from keras_fa.constraints import SignConcordance
from keras_fa.initializers import KernelSign
from keras_fa.layers.feedback import feedback_layers

X = references.normal((16, 6, 6, 2), 1)
Y = references.normal((16, 3), 2)
METHODS = ("brsf", "fixed_sign_feedback", "frozen")
HeNormal = keras.initializers.HeNormal


def network() -> keras.Model:
    """A convnet with two hidden kernel layers and statistics."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.SeparableConv2D(4, 2, activation="tanh", name="separable"),
            layers.Flatten(name="flatten"),
            layers.Dense(3, name="readout"),
        ]
    )


def train(
    model: keras.Model, steps: int = 2, run_eagerly: bool = True
) -> keras.Model:
    adam = keras.optimizers.AdamW(0.05, weight_decay=0.1)
    model.compile(adam, "mse", run_eagerly=run_eagerly)
    model.fit(X, Y, batch_size=8, epochs=steps, shuffle=False, verbose=0)
    return model


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {name(w): array(w) for w in model.weights}


def name(weight: keras.Variable) -> str:
    """A weight's name with that of its layer."""
    return "/".join(weight.path.split("/")[-2:])


def stock_file(folder: Path) -> tuple[keras.Model, Path]:
    """A trained stock model and the file of its weights."""
    stock, path = train(network()), folder / "stock.weights.h5"
    stock.save_weights(path)
    return stock, path


# Random magnitudes -----------------------------------------------------------


@pytest.mark.parametrize("law", ["glorot_uniform", "he_normal", "orthogonal"])
@pytest.mark.parametrize("kind", ["dense", "einsum", "conv2d", "depthwise2d"])
def test_magnitudes_are_of_the_kernels_law(kind: str, law: str) -> None:
    """Those that stock Keras draws from the same state, step after step."""
    kind = KINDS[kind]
    layer = kind.make(
        kind.fa,
        **kind.initialized(law),
        feedback_constraint=RandomMagnitude(seed=3),
    )
    (kernel,) = references.kernels_of(layer)
    generator = keras.random.SeedGenerator(3)
    given = keras.initializers.get(law).get_config()
    if kind.name == "EinsumDense" and "input_axes" in given:
        given |= {"input_axes": [0], "output_axes": [1]}
    law = type(keras.initializers.get(law))(**given | {"seed": generator})
    x = kind.inputs()
    dy = references.error_for(layer, x)
    for compiled in (False, True, False):
        b = np.abs(array(law(kernel.shape))) * np.sign(array(kernel))
        references.assert_close(references.effective_of(layer)[0], b)
        got = references.computed(layer, x, dy, compiled)
        wanted = references.reference(kind, layer, [b], x, dy)
        references.assert_gradients(got, wanted)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", ["dense", "conv2d", "separable2d"])
def test_magnitudes_in_mixed_precision(kind: str, dtype: str) -> None:
    kind = KINDS[kind]
    layer = kind.make(
        kind.fa, feedback_constraint="random_magnitude", dtype=dtype
    )
    x = kind.inputs()
    dy = references.error_for(layer, x)
    b = references.effective_of(layer)
    assert all(each.dtype == "float32" for each in b)
    got = references.computed(layer, x, dy, compiled=True)
    wanted = references.reference(kind, layer, b, x, dy, dtype=dtype)
    got.bias = wanted.bias = None  # a sum in half precision, as ever
    references.assert_gradients(got, wanted, tolerance=2e-2)


def test_magnitudes_are_new_at_every_step_and_reading_draws_none() -> None:
    layer = FADense(40, feedback_constraint="random_magnitude")
    layer.build((None, 40))
    x, dy = references.normal((2, 40), 1), references.normal((2, 40), 2)
    seen = []
    for _ in range(3):
        b, again = (references.effective_of(layer)[0] for _ in "ab")
        np.testing.assert_array_equal(b, again)
        np.testing.assert_array_equal(np.sign(b), np.sign(layer.kernel))
        seen.append(np.abs(b).ravel())
        references.computed(layer, x, dy, compiled=True)
    seen.append(np.abs(array(layer.kernel)).ravel())
    correlations = np.corrcoef(seen)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / 40
    sizes = [np.sqrt(np.mean(each**2)) for each in seen]
    np.testing.assert_allclose(sizes, sizes[-1], rtol=0.06)


@pytest.mark.parametrize(
    "seed", [5, keras.random.SeedGenerator(5)], ids=["integer", "generator"]
)
def test_magnitudes_of_the_kernels_seed_are_not_its_own(seed: Any) -> None:
    layer = FADense(
        30,
        kernel_initializer=HeNormal(seed=seed),
        feedback_constraint=RandomMagnitude(seed=5),
    )
    layer.build((None, 30))
    w, (b,) = np.abs(array(layer.kernel)), references.effective_of(layer)
    assert abs(np.corrcoef(w.ravel(), np.abs(b).ravel())[0, 1]) < 4 / 30


def test_layers_with_one_rule_draw_their_own() -> None:
    rule = RandomMagnitude(seed=1)
    a, b = (FADense(9, feedback_constraint=rule) for _ in "ab")
    for layer in (a, b):
        layer.build((None, 9))
    magnitudes = [np.abs(references.effective_of(each)[0]) for each in (a, b)]
    assert not np.allclose(*magnitudes)


def test_magnitudes_keep_fixed_signs_at_zero() -> None:
    layer = FADense(
        3,
        feedback_constraint="random_magnitude",
        kernel_constraint="fixed_sign",
    )
    layer.build((None, 5))
    signs = np.sign(array(layer.kernel))
    layer.kernel.assign(0.0 * layer.kernel)
    (b,) = references.effective_of(layer)
    np.testing.assert_array_equal(np.sign(b), signs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_initializer": "zeros"},
        {"feedback_initializer": "constant"},
        {"feedback_initializer": keras.initializers.Constant(0.1)},
    ],
)
def test_what_is_no_law_gives_no_magnitudes(arguments: dict) -> None:
    layer = FADense(3, feedback_constraint="random_magnitude", **arguments)
    with pytest.raises(ValueError, match="drawn anew at every step") as error:
        layer.build((None, 5))
    assert "\n" not in str(error.value)


@backends.requires_tensorflow
@pytest.mark.parametrize("kind", ["conv2d", "separable2d"])
def test_magnitudes_of_two_replicas_are_those_of_one(
    strategy: Any, kind: str
) -> None:
    import tensorflow as tf

    kind = KINDS[kind]
    with strategy.scope():
        layer = kind.make(kind.fa, feedback_constraint=RandomMagnitude(seed=4))
    x = kind.inputs(batch=4)
    dy = references.error_for(layer, x)
    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tuple(
            tf.split(z, 2)[context.replica_id_in_sync_group] for z in (x, dy)
        )
    )

    @tf.function
    def run(halves: Any) -> Any:
        return strategy.run(
            lambda pair: references.gradients(layer, *pair)[1], args=(halves,)
        )

    for _ in range(2):
        b = references.effective_of(layer)
        wanted = references.reference(kind, layer, b, x, dy)
        local = strategy.experimental_local_results(run(halves))
        references.assert_close(np.concatenate(local), wanted.dx)


# The signs of the start ------------------------------------------------------


def assert_signs_of(kernel: Any, feedback: Any) -> None:
    """B is the kernel's signs with one magnitude, and its norm."""
    w, b = array(kernel), array(feedback)
    uniform = np.linalg.norm(w) / np.sqrt(np.count_nonzero(w))
    np.testing.assert_allclose(b, uniform * np.sign(w), rtol=1e-5)


@pytest.mark.parametrize("kind", references.BASE_KINDS)
def test_feedback_has_the_signs_of_the_start(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.make(kind.fa, feedback_initializer=KernelSign())
    for w, b in zip(references.kernels_of(layer), references.stored_of(layer)):
        assert_signs_of(w, b)


def test_signs_do_not_follow() -> None:
    model = convert(network(), "fixed_sign_feedback")
    start = {
        key: value
        for key, value in weights(model).items()
        if key.endswith("feedback")
    }
    assert len(start) == 4
    train(model)
    after = weights(model)
    for key, value in start.items():
        np.testing.assert_array_equal(after[key], value)
    w = after["readout/kernel"]
    agree = np.mean(np.sign(w) == np.sign(after["readout/kernel_feedback"]))
    assert 0.5 < agree < 1


@pytest.mark.parametrize("way", ["convert", "load_weights", "stock_weights"])
def test_signs_are_of_the_weights_that_training_starts_with(
    way: str, tmp_path: Path
) -> None:
    stock, path = stock_file(tmp_path)
    if way == "convert":
        model = convert(stock, "fixed_sign_feedback")
    else:
        model = convert(network(), "fixed_sign_feedback")
        load = (
            model.load_weights
            if way == "load_weights"
            else lambda path: load_stock_weights(model, path)
        )
        load(path)
    for layer in feedback_layers(model):
        twin = stock.get_layer(layer.name)
        for w, b in zip(
            references.kernels_of(twin), references.stored_of(layer)
        ):
            assert_signs_of(w, b)


def test_signs_of_the_start_outlive_what_comes_after(tmp_path: Path) -> None:
    model = train(convert(network(), "fixed_sign_feedback"))
    b = array(model.get_layer("readout").feedback_kernel)
    keras_fa.refresh(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    other = convert(network(), "fixed_sign_feedback")
    other.load_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = convert(model, "fixed_sign_feedback")
    for each in (model, other, loaded, again):
        np.testing.assert_array_equal(
            each.get_layer("readout").feedback_kernel, b
        )
    independent = convert(model, "fa").get_layer("readout")
    assert np.unique(np.abs(independent.feedback_kernel)).size > 3
    anew = convert(to_backprop(model), "fixed_sign_feedback")
    readout = anew.get_layer("readout")
    assert_signs_of(readout.kernel, readout.feedback_kernel)


def test_one_magnitude_is_of_the_norm_that_training_starts_with(
    tmp_path: Path,
) -> None:
    stock, _ = stock_file(tmp_path)
    readout = stock.get_layer("readout")
    readout.kernel.assign(3 * readout.kernel)
    method = keras_fa.methods.Method(
        "own", "own", "own", feedback_initializer="constant"
    )
    b = convert(stock, method).get_layer("readout").feedback_kernel
    np.testing.assert_allclose(
        np.linalg.norm(b), np.linalg.norm(readout.kernel), rtol=1e-6
    )


# Frozen ----------------------------------------------------------------------


def frozen_in(model: keras.Model) -> set[str]:
    """The FA layers whose kernels are not trained, though they could be."""
    return {
        layer.name
        for layer in feedback_layers(model)
        if not any(k.trainable for k in references.kernels_of(layer))
        and layer.trainable
    }


def assert_frozen(model: keras.Model, start: dict[str, np.ndarray]) -> None:
    """Hidden kernels are their start to the bit, the rest has moved."""
    hidden = {"conv/kernel"} | {
        f"separable/{part}_kernel" for part in ("depthwise", "pointwise")
    }
    for key, value in weights(model).items():
        moved = not np.array_equal(value, start[key])
        assert moved == (key not in hidden), key


def test_hidden_kernels_stay_and_the_rest_learns(tmp_path: Path) -> None:
    """Through a fit, a file and a fit: biases and normalization learn, too."""
    model = convert(network(), "frozen")
    assert frozen_in(model) == {"conv", "separable"}
    start = weights(model)
    assert_frozen(train(model, run_eagerly=False), start)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert frozen_in(loaded) == {"conv", "separable"}
    for key, value in weights(loaded).items():
        np.testing.assert_array_equal(value, weights(model)[key])
    loaded.fit(X, Y, batch_size=8, verbose=0)  # with the optimizer's state
    assert_frozen(loaded, start)
    clone = keras.models.clone_model(model)
    assert frozen_in(clone) == {"conv", "separable"}


def test_the_rest_learns_as_under_backpropagation() -> None:
    """The reference is stock Keras with kernels that are no weights."""
    stock = network()
    twin = convert(stock, "frozen")
    for layer in ("conv", "separable"):
        for kernel in references.kernels_of(stock.get_layer(layer)):
            kernel.trainable = False
    train(stock)
    train(twin)
    for ours, theirs in zip(twin.weights, stock.weights):
        references.assert_close(array(ours), array(theirs), 1e-4)


@pytest.mark.parametrize(
    ("way", "loaded"),
    [
        ("back", False),
        ("fa", True),
        ("frozen", False),
        ("frozen", True),
        ("fa_usf_const_ei", False),
    ],
)
def test_flags_are_back_under_another_method(
    way: str, loaded: bool, tmp_path: Path
) -> None:
    stock = network()
    stock.get_layer("separable").trainable = False
    model = convert(stock, "frozen")
    assert frozen_in(model) == {"conv"}
    if loaded:
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    other = to_backprop(model) if way == "back" else convert(model, way)
    names = list(map(name, other.trainable_weights))
    wanted = list(map(name, stock.trainable_weights))
    if way == "frozen":
        wanted.remove("conv/kernel")
    assert names == wanted
    assert not other.get_layer("separable").trainable


def branches() -> keras.Model:
    """Nested and shared layers, and two outputs, one below the other."""
    inner = keras.Input((4,))
    x = layers.Dense(4, name="inner")(inner)
    both = keras.Model(
        inner,
        [layers.Dense(4, name="up")(x), layers.Dense(2, name="aside")(x)],
        name="both",
    )
    last = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="last")], name="tail"
    )
    shared = layers.Dense(4, name="shared")
    start = keras.Input((4,))
    up, aside = both(shared(shared(start)))
    merged = layers.Add()([up, layers.Dense(4, name="skip")(start)])
    return keras.Model(start, [last(keras.ops.relu(merged)), aside])


def test_hidden_is_what_another_kernel_is_reached_from() -> None:
    model = convert(branches(), "frozen")
    assert frozen_in(model) == {"shared", "inner", "up", "skip"}
    x, y = references.normal((8, 4), 1), references.normal((8, 2), 2)
    model.compile(keras.optimizers.SGD(0.1), ["mse", "mse"])
    start = {w.path: array(w) for w in model.weights}
    model.fit(x, [x, y], verbose=0)
    still = {
        w.path.split("/")[-2]
        for w in model.weights
        if np.array_equal(array(w), start[w.path])
    }
    assert still == {"shared", "inner", "up", "skip"}


def test_a_recurrent_layer_counts() -> None:
    stock = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.Dense(3, name="below"),
            layers.LSTM(2, name="lstm"),
        ]
    )
    model = convert(stock, "frozen")
    assert frozen_in(model) == {"below"}


def test_methods_are_mixed_layer_by_layer() -> None:
    mixed = convert(network(), "fa", layers={"conv": "frozen"})
    assert frozen_in(mixed) == {"conv"}
    other = convert(network(), "frozen", layers={"conv": "fa_usf_sn"})
    assert frozen_in(other) == {"separable"}


def test_setting_trainable_thaws_and_refresh_freezes() -> None:
    model = convert(network(), "frozen")
    model.trainable = False
    model.trainable = True
    assert frozen_in(model) == set()
    keras_fa.refresh(model)
    assert frozen_in(model) == {"conv", "separable"}


def test_a_model_that_nothing_would_learn_in_is_refused() -> None:
    start = keras.Input((4,))
    shared = layers.Dense(4, name="again")
    stock = keras.Model(start, shared(shared(start)))
    with pytest.raises(ValueError, match="No kernel of model") as error:
        convert(stock, "frozen")
    assert "\n" not in str(error.value)
    assert "again" in str(error.value)
    stock.trainable = False  # then nothing learns anyway
    convert(stock, "frozen")


def test_a_single_kernel_layer_learns() -> None:
    stock = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    assert frozen_in(convert(stock, "frozen")) == set()


def test_frozen_by_hand() -> None:
    layer = FADense(3, kernel_constraint=["frozen", "non_neg"])
    layer.build((None, 5))
    assert [w.name for w in layer.trainable_weights] == ["bias"]


@backends.requires_tensorflow
@pytest.mark.parametrize("method", ["brsf", "frozen"])
def test_on_two_replicas(strategy: Any, method: str) -> None:
    with strategy.scope():
        model = convert(network(), method)
        start = weights(model)
        train(model, 1, run_eagerly=False)
    if method == "frozen":
        assert_frozen(model, start)
    after = weights(model)
    for key, value in start.items():
        if key.endswith("feedback"):
            np.testing.assert_array_equal(after[key], value)
    assert not np.array_equal(after["readout/kernel"], start["readout/kernel"])


# All of them -----------------------------------------------------------------

LOAD = """
import sys
import keras
import numpy as np
import keras_fa

for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    x = np.load("x.npy")
    np.save(path + ".npy", model.predict(x, verbose=0))
    assert model.compiled
    assert np.isfinite(model.train_on_batch(x, np.ones((len(x), 3))))
"""


def test_files_load_in_another_process(tmp_path: Path) -> None:
    models = {m: train(convert(network(), m), 1) for m in METHODS}
    np.save(tmp_path / "x.npy", X)
    for method, model in models.items():
        model.save(tmp_path / f"{method}.keras")
    files = (f"{method}.keras" for method in METHODS)
    done = forks.run("-c", LOAD, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for method, model in models.items():
        got = np.load(tmp_path / f"{method}.keras.npy")
        references.assert_close(got, model.predict(X, verbose=0), 1e-4)
        plain = to_backprop(model)
        references.assert_close(plain.predict(X, verbose=0), got, 1e-4)
        assert not feedback_layers(plain)


def test_random_magnitudes_go_on_after_loading(tmp_path: Path) -> None:
    model = train(convert(network(), "brsf"))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(loaded.weights, model.weights):
        references.assert_close(array(ours), array(theirs), 1e-5)


def test_a_rule_sees_what_feedback_is_drawn_from() -> None:
    given, kernel = HeNormal(), HeNormal()
    for law, wanted in ((given, given), (None, kernel)):
        layer = FADense(
            3,
            kernel_initializer=kernel,
            feedback_initializer=law,
            feedback_constraint=SignConcordance(),
        )
        layer.build((None, 4))
        assert layer.feedback_paths[0].rule.initializer is wanted
