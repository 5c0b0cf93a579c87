"""Strict normalization after every batch, and the monitor's files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from backends import requires_tensorflow
from keras import layers
from keras import ops

from keras_fa import FADense
from keras_fa import convert
from keras_fa.callbacks import AlignmentMonitor
from keras_fa.callbacks import StrictNormalization
from keras_fa.constraints import SignConcordance
from keras_fa.layers.feedback import feedback_layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = RNG.normal(size=(16, 3)).astype("float32")


def network() -> keras.Model:
    """A small multilayer perceptron."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="first"),
            layers.Dense(8, activation="relu", name="second"),
            layers.Dense(3, name="readout"),
        ]
    )


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback) -> None:
    """Two epochs of four batches, with an optimizer that moves norms.

    Eagerly they are two.
    """
    if not model.compiled:
        adam = keras.optimizers.Adam(0.05)
        model.compile(adam, "mse", run_eagerly=True)
    size = 8 if model.run_eagerly else 4
    model.fit(
        X, Y, batch_size=size, epochs=2, verbose=0, callbacks=list(callbacks)
    )


def mismatch(layer: layers.Layer) -> float:
    """How far ||B|| / ||W|| is from 1."""
    feedback = np.array(layer.effective_feedback_kernel(), "float64")
    kernel = np.array(layer.kernel, "float64")
    return abs(np.linalg.norm(feedback) / np.linalg.norm(kernel) - 1)


class Spy(keras.callbacks.Callback):
    """Looks at a model after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def _look(self) -> None:
        backends.synchronize(self.model)
        worst = max(mismatch(layer) for layer in feedback_layers(self.model))
        norm = float(np.linalg.norm(self.model.get_layer("second").kernel))
        self.seen.append((worst, norm))

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._look()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._look()


# StrictNormalization -------------------------------------------------------


def strict_after_every_batch(model: keras.Model, *callbacks: Any) -> None:
    """Fits; B had the norm of W, which moved, whenever it was looked at."""
    fit(model, *callbacks, spy := Spy())
    assert max(worst for worst, _ in spy.seen) < 1e-6
    assert len({norm for _, norm in spy.seen}) == len(spy.seen)


def compiled(model: keras.Model, steps: int = 1) -> keras.Model:
    """The model, compiled with an optimizer that moves norms."""
    model.compile(keras.optimizers.Adam(0.05), "mse", steps_per_execution=steps)
    return model


@pytest.mark.parametrize(
    ("eagerly", "callbacks"), [(False, []), (True, [StrictNormalization])]
)
def test_sn_is_strict_with_the_callback_and_without(
    eagerly: bool, callbacks: list
) -> None:
    model = convert(network(), "fa_usf_sn")
    if not eagerly:
        compiled(model)
    strict_after_every_batch(model, *(make() for make in callbacks))


def test_sn_of_one_layer_needs_nothing() -> None:
    model = compiled(convert(network(), "fa", layers={"second": "fa_usf_sn"}))
    fit(model)
    assert mismatch(model.get_layer("second")) < 1e-6
    assert model.get_layer("second").feedback_kernel is None
    assert mismatch(model.get_layer("first")) > 1e-4


def test_averages_in_the_place_of_kernels_leave_sn_strict() -> None:
    model = convert(network(), "fa_usf_sn")
    optimizer = keras.optimizers.Adam(
        0.05, use_ema=True, ema_overwrite_frequency=3
    )
    model.compile(optimizer, "mse")
    fit(model)
    assert max(mismatch(layer) for layer in feedback_layers(model)) < 1e-6


@pytest.mark.parametrize(
    ("steps", "before"), [(1, True), (2, False), (4, True)]
)
def test_the_callback_makes_a_training_of_init_one_of_sn(
    before: bool, steps: int
) -> None:
    """To the weight, also where a step of another rule was compiled before."""
    models = []
    for method, callbacks in (
        ("fa_usf_sn", []),
        ("fa_usf_init", [StrictNormalization()]),
    ):
        keras.utils.set_random_seed(1)
        model = compiled(convert(network(), method), steps)
        if before:
            start = [references.array(weight) for weight in model.weights]
            fit(model)
            model.set_weights(start)
            for variable in model.optimizer.variables[2:]:
                variable.assign(np.zeros(variable.shape))
            model.optimizer.iterations.assign(0)
        fit(model, *callbacks)
        models.append(model)
    for strict, made_strict in zip(*(m.trainable_weights for m in models)):
        references.assert_close(
            references.array(made_strict), references.array(strict)
        )


def test_after_the_fit_the_magnitudes_are_back() -> None:
    model = compiled(convert(network(), "fa_usf_init"))
    magnitudes = [np.abs(layer.feedback_kernel) for layer in model.layers]
    fit(model, StrictNormalization(), spy := Spy())
    assert max(worst for worst, _ in spy.seen) < 1e-6
    for layer, stored in zip(model.layers, magnitudes):
        np.testing.assert_array_equal(
            np.abs(layer.effective_feedback_kernel()), stored
        )
    fit(model, spy := Spy())
    assert min(worst for worst, _ in spy.seen) > 1e-4


class Remake(keras.callbacks.Callback):
    """Makes a new train function, as after unfreezing layers."""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.model.make_train_function(force=True)


@pytest.mark.parametrize("other", [StrictNormalization, Remake])
def test_beside_other_callbacks(other: type) -> None:
    model = compiled(convert(network(), "fa_usf_init"))
    strict_after_every_batch(model, StrictNormalization(), other())
    strict_after_every_batch(model, other(), StrictNormalization())


class Interrupt(keras.callbacks.Callback):
    """Ends a fit as a user at the keyboard does."""

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        raise KeyboardInterrupt


def test_after_an_interrupted_fit_the_next_one_ends_it() -> None:
    model = compiled(convert(network(), "fa_usf_init"))
    callback = StrictNormalization()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, Interrupt())
    fit(model, callback)
    fit(model, spy := Spy())
    assert min(worst for worst, _ in spy.seen) > 1e-4


def test_a_step_of_the_models_own_stays() -> None:
    model = compiled(convert(network(), "fa_usf_init"))
    calls, step = [], model.train_step

    def own(*arguments: Any) -> Any:
        calls.append(1)
        return step(*arguments)

    model.train_step = own
    strict_after_every_batch(model, StrictNormalization())
    assert calls
    assert model.train_step is own


def test_a_model_that_is_strict_is_compiled_once() -> None:
    model, functions = compiled(convert(network(), "fa_usf_sn")), []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            functions.append(self.model.train_function)

    for _ in range(2):
        fit(model, StrictNormalization(), Look())
    assert len(set(map(id, functions))) == 1


def test_leaves_other_feedback_alone() -> None:
    model = convert(network(), "fa_usf_init", layers={"first": "fa"})
    before = [np.array(layer.feedback_kernel) for layer in model.layers]
    fit(model, StrictNormalization())
    for layer, stored in zip(model.layers, before):
        assert np.array_equal(layer.feedback_kernel, stored)
    assert mismatch(model.get_layer("first")) > 1e-4


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_nothing_to_normalize(method: str) -> None:
    fit(convert(network(), method), StrictNormalization())


@pytest.mark.parametrize("compile_step", [False, True])
def test_in_a_loop_of_ones_own(compile_step: bool) -> None:
    model = convert(network(), "fa_usf_init")
    StrictNormalization().apply(model)
    optimizer = keras.optimizers.SGD(0.3)
    optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> Any:
        loss, _, gradients = backends.vjp(
            model,
            lambda x: ops.mean((model(x, training=True) - ops.array(y)) ** 2),
            [x],
        )
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    if compile_step:
        state = [*model.variables, *optimizer.variables]
        step = backends.compiled(step, state)
    norms = set()
    for _ in range(4):
        step(X, Y)
        assert all(mismatch(layer) < 1e-6 for layer in feedback_layers(model))
        norms.add(float(np.linalg.norm(model.get_layer("second").kernel)))
    assert len(norms) == 4


def test_apply_after_a_fit_holds_in_the_next() -> None:
    model = compiled(convert(network(), "fa_usf_init"))
    fit(model)
    StrictNormalization().apply(model)
    strict_after_every_batch(model)


def test_layers_in_a_nested_model() -> None:
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, name="deep")], name="inner"
    )
    stock = keras.Sequential(
        [keras.Input((6,)), inner, layers.Dense(3, name="second")]
    )
    spy = Spy()
    fit(convert(stock, "fa_usf_init"), StrictNormalization(), spy)
    assert max(worst for worst, _ in spy.seen) < 1e-6


def test_one_callback_serves_several_models() -> None:
    callback = StrictNormalization()
    for _ in range(2):
        model, spy = convert(network(), "fa_usf_init"), Spy()
        fit(model, callback, spy)
        assert max(worst for worst, _ in spy.seen) < 1e-6


def test_under_two_replicas(strategy: Any, tmp_path: Path) -> None:
    with strategy.scope():
        model = convert(network(), "fa_usf_init")
        model.compile(keras.optimizers.SGD(0.3), "mse")
    spy, monitor = Spy(), AlignmentMonitor((X, Y), tmp_path)
    fit(model, StrictNormalization(), spy, monitor)
    assert max(worst for worst, _ in spy.seen) < 1e-6
    assert len({norm for _, norm in spy.seen}) == 9
    assert set(monitor.history) == {0, 1}
    assert list(tmp_path.rglob("events*"))


# AlignmentMonitor ----------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """All that TensorBoard reads in a folder: tag to (step, value)."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    reader = event_accumulator.EventAccumulator(
        str(folder), size_guidance={"tensors": 0}
    )
    reader.Reload()
    return {
        tag: [
            (event.step, tensor_util.make_ndarray(event.tensor_proto))
            for event in reader.Tensors(tag)
        ]
        for tag in reader.Tags()["tensors"]
    }


@requires_tensorflow
def test_events(tmp_path: Path) -> None:
    model = convert(network(), "fa_usf_sn", layers={"readout": "bp"})
    monitor = AlignmentMonitor(probe=(X, Y), log_dir=tmp_path)
    fit(model, StrictNormalization(), monitor)
    found = events(tmp_path)
    names = ("first", "second", "readout")
    measures = ("angle", "norm_ratio", "sign_agreement", "gradient_angle")
    columns = [f"alignment/{m}/{n}" for n in names for m in measures]
    assert sorted(monitor.columns) == sorted(columns)
    histograms = {f"kernel/{n}" for n in names}
    histograms |= {"feedback/first", "feedback/second"}
    page = {"custom_scalars__config__"}
    shown = [column for column in columns if "norm_ratio" not in column]
    assert set(found) == {*shown, *histograms, *page}  # SN's ratio is 1
    for column in shown:
        assert [step for step, _ in found[column]] == [1, 2]
        for step, value in found[column]:
            wanted = monitor.history[step - 1][column]
            np.testing.assert_allclose(value, wanted, rtol=1e-6)
    counts = found["kernel/second"][-1][1][:, 2]
    assert counts.sum() == 64
    low, high = found["kernel/second"][-1][1][[0, -1], [0, 1]]
    kernel = np.array(model.get_layer("second").kernel)
    np.testing.assert_allclose([low, high], [kernel.min(), kernel.max()])
    final = monitor.history[1]["alignment/angle/second"]
    feedback = model.get_layer("second").effective_feedback_kernel()
    cosine = np.vdot(kernel, feedback) / np.linalg.norm(kernel) ** 2
    np.testing.assert_allclose(np.cos(np.radians(final)), cosine, rtol=1e-4)


@pytest.mark.parametrize("every", [2, 3])
def test_every(every: int) -> None:
    monitor = AlignmentMonitor((X, Y), every=every)
    model = convert(network(), "fa")
    fit(model, monitor)
    assert list(monitor.history) == list(range(every - 1, 2, every))
    assert len(monitor.columns) == 12
    for row in monitor.history.values():
        assert list(row) == monitor.columns


def test_events_need_tensorflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("keras_fa.callbacks.find_spec", lambda name: None)
    AlignmentMonitor(probe=(X, Y))
    with pytest.raises(ImportError, match=r"written by TensorFlow.*log_dir="):
        AlignmentMonitor(probe=(X, Y), log_dir=tmp_path)


@requires_tensorflow
def test_scalars_alone_without_tensorboard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "keras_fa.callbacks.find_spec",
        lambda name: None if name == "tensorboard" else find_spec(name),
    )
    fit(convert(network(), "fa"), AlignmentMonitor((X, Y), tmp_path))
    found = events(tmp_path)
    assert "alignment/angle/first" in found
    assert "custom_scalars__config__" not in found


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", None])
def test_bad_every(every: object) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        AlignmentMonitor((X, Y), every=every)


def test_no_events_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(convert(network(), "fa"), AlignmentMonitor((X, Y)))
    assert not list(tmp_path.rglob("*"))


def test_other_callbacks_see_the_measures_where_they_are_to() -> None:
    model = convert(network(), "fa")
    model.compile("sgd", "mse")
    monitor = AlignmentMonitor((X, Y), every=2, in_logs=True)
    history = model.fit(X, Y, epochs=4, verbose=0, callbacks=[monitor]).history
    for name, values in history.items():
        if name != "loss":
            first, last = (monitor.history[epoch][name] for epoch in (1, 3))
            np.testing.assert_equal(
                values, [monitor.start[name], first, first, last]
            )
    assert set(history) == {"loss", *monitor.columns}
    assert set(monitor.start) == set(monitor.columns)
    assert monitor.start != monitor.history[1]
    silent = model.fit(X, Y, verbose=0, callbacks=[AlignmentMonitor((X, Y))])
    assert set(silent.history) == {"loss"}


@requires_tensorflow
def test_two_fits_in_a_row(tmp_path: Path) -> None:
    model = convert(network(), "fa")
    monitor = AlignmentMonitor((X, Y), tmp_path)
    fit(model, monitor)
    first = dict(monitor.history[1])
    model.fit(X, Y, initial_epoch=2, epochs=4, verbose=0, callbacks=[monitor])
    assert list(monitor.history) == [0, 1, 2, 3]
    assert monitor.history[1] == first
    assert monitor.history[3] != first
    files = list(tmp_path.rglob("events*"))
    assert len(files) == 2
    steps = [step for step, _ in events(tmp_path)["alignment/angle/first"]]
    assert sorted(steps) == [1, 2, 3, 4]


def test_dfa_has_gradient_angles_only() -> None:
    monitor = AlignmentMonitor((X, Y))
    fit(convert(network(), "dfa"), monitor)
    assert monitor.columns == [
        f"alignment/gradient_angle/{n}" for n in ("first", "second", "readout")
    ]


def test_monitor_needs_a_loss() -> None:
    model = convert(network(), "fa")
    model.compile("adam", ["mse"])
    with pytest.raises(ValueError, match="one loss"):
        fit(model, AlignmentMonitor((X, Y)))
    monitor = AlignmentMonitor((X, Y), loss="mae")
    fit(model, monitor)
    assert monitor.history


@requires_tensorflow
def test_dead_layers_are_not_written(tmp_path: Path) -> None:
    model = convert(network(), "fa")
    model.get_layer("first").trainable = False
    model.get_layer("first").kernel.assign(np.zeros((6, 8)))
    monitor = AlignmentMonitor((X, Y), tmp_path)
    fit(model, monitor)
    assert np.isnan(monitor.history[0]["alignment/angle/first"])
    assert "alignment/angle/first" not in events(tmp_path)


def test_measuring_does_not_change_training() -> None:
    def trained(*callbacks: keras.callbacks.Callback) -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        stock = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, activation="relu"),
                layers.BatchNormalization(),
                layers.Dropout(0.3),
                layers.Dense(3),
            ]
        )
        model = convert(stock, "bp_noise")
        fit(model, *callbacks)
        return model.get_weights()

    for a, b in zip(trained(), trained(AlignmentMonitor((X, Y)))):
        assert np.array_equal(a, b)


# Models that Keras builds at their first batch --------------------------------


class Lazy(keras.Model):
    """A subclassed model without an input shape."""

    def __init__(self, **rule: Any) -> None:
        super().__init__()
        self.hidden = FADense(8, activation="relu", **rule)
        self.readout = FADense(3, **rule)

    def call(self, inputs: Any) -> Any:
        return self.readout(self.hidden(inputs))


def lazy_sequential(**rule: Any) -> keras.Model:
    """A Sequential model without an Input."""
    return keras.Sequential([FADense(8, **rule), FADense(3, **rule)])


@pytest.mark.parametrize(
    ("build", "initializer"), [(Lazy, None), (lazy_sequential, "constant")]
)
def test_models_that_are_not_built_yet(
    build: type, initializer: str | None
) -> None:
    rule = {
        "feedback_initializer": initializer,
        "feedback_constraint": "sign_concordance",
    }
    model, monitored, called = (build(**rule) for _ in range(3))
    worst = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(
            self, batch: int, logs: dict | None = None
        ) -> None:
            backends.synchronize(self.model)
            worst.extend(map(mismatch, feedback_layers(self.model)))

    fit(model, StrictNormalization(), Look())
    assert len(worst) == 8
    assert max(worst) < 1e-6
    monitor = AlignmentMonitor(probe=(X, Y))
    fit(monitored, StrictNormalization(), monitor)
    assert len(monitor.columns) == 8
    for measures in monitor.history.values():
        ratios = [v for k, v in measures.items() if "norm_ratio" in k]
        np.testing.assert_allclose(ratios, 1, rtol=1e-5)
    called(X)
    if initializer == "constant":
        assert max(mismatch(layer) for layer in feedback_layers(called)) < 1e-6


def test_apply_before_the_model_is_built() -> None:
    rule = {"feedback_constraint": "sign_concordance"}
    model, normalize = lazy_sequential(**rule), StrictNormalization()
    normalize.apply(model)
    model(X)
    normalize.apply(model)
    assert max(mismatch(layer) for layer in model.layers) < 1e-6


def test_a_kernel_of_zeros_sends_nothing_until_it_moves() -> None:
    layer = FADense(
        3,
        kernel_initializer="zeros",
        feedback_constraint=SignConcordance(strict=True),
    )
    layer.build((None, 6))
    assert not np.any(backends.array(layer.effective_feedback_kernel()))
    layer.kernel.assign(RNG.normal(size=(6, 3)))
    assert mismatch(layer) < 1e-6


@pytest.mark.parametrize("probe", [X, None, (X, Y, Y)])
def test_the_probe_is_a_pair(probe: object) -> None:
    with pytest.raises(ValueError, match="must be a pair"):
        AlignmentMonitor(probe=probe)
