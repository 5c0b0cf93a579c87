"""Recurrent FA layers against sequences unrolled by hand."""

import threading
from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import ops

import keras_fa
from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.alignment import diagnose
from keras_fa.alignment import named_paths
from keras_fa.constraints import NoisyKernel
from keras_fa.methods import METHODS

if backends.ON_TENSORFLOW:
    import tensorflow as tf

UNITS, STEPS, FEATURES = 4, 3, 3
X = references.normal((2, STEPS, FEATURES), 1)
MASK = np.array([[True, True, True], [True, False, True]])
KINDS = {
    "simple": ("SimpleRNN", {}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "gru_before": ("GRU", {"reset_after": False}),
}


def made(kind: str, prefix: str = "FA", **arguments: Any) -> Any:
    """A built layer, with a random bias."""
    name, own = KINDS[kind]
    owner = keras_fa if prefix else keras.layers
    layer = getattr(owner, f"{prefix}{name}")(UNITS, **own, **arguments)
    layer.build(X.shape)
    if layer.use_bias:
        bias = references.normal(layer.cell.bias.shape, 2)
        layer.cell.bias.assign(bias)
    return layer


def twins(kind: str, **arguments: Any) -> tuple[Any, Any]:
    """An FA layer in which each B is W, and its stock counterpart."""
    ours, stock = made(kind, **arguments), made(kind, "", **arguments)
    for given, taken in zip(ours.weights, stock.weights):
        taken.assign(given)
    for path in ours.cell.feedback_paths:
        path.feedback_kernel.assign(path.kernel)
    return ours, stock


def unrolled(
    kind: str, x: Any, weights: list, feedback: list[np.ndarray], mask: Any
) -> Any:
    """All outputs of a sequence, whose errors go through `feedback`."""
    w, u, b = weights

    def product(x: Any, kernel: Any, back: np.ndarray) -> Any:
        still = ops.stop_gradient(x)
        return ops.matmul(still, kernel) + ops.matmul(x - still, back)

    def step(x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        of_x = product(x, w, feedback[0])
        if kind == "gru_before":
            n = 2 * UNITS
            of_x = of_x + b
            inner = product(h, u[:, :n], feedback[1][:, :n])
            z = ops.sigmoid(of_x[:, :UNITS] + inner[:, :UNITS])
            r = ops.sigmoid(of_x[:, UNITS:n] + inner[:, UNITS:])
            inner = product(r * h, u[:, n:], feedback[1][:, n:])
            return z * h + (1 - z) * ops.tanh(of_x[:, n:] + inner), c
        of_h = product(h, u, feedback[1])
        if kind == "simple":
            return ops.tanh(of_x + of_h + b), c
        if kind == "lstm":
            i, f, g, o = ops.split(of_x + of_h + b, 4, axis=-1)
            c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
            return ops.sigmoid(o) * ops.tanh(c), c
        x_z, x_r, x_h = ops.split(of_x + b[0], 3, axis=-1)
        h_z, h_r, h_h = ops.split(of_h + b[1], 3, axis=-1)
        z, r = ops.sigmoid(x_z + h_z), ops.sigmoid(x_r + h_r)
        return z * h + (1 - z) * ops.tanh(x_h + r * h_h), c

    h = c = ops.zeros((x.shape[0], UNITS))
    outputs = []
    for t in range(x.shape[1]):
        seen = mask[:, t, None]
        states = zip(step(x[:, t], h, c), (h, c))
        h, c = (ops.where(seen, new, old) for new, old in states)
        outputs.append(h)
    return ops.stack(outputs, axis=1)


def gradients(layer: Any, inputs: Any, compiled: bool, **call: Any) -> list:
    """The output, dx, dW, dU and db of a layer for an error at its output."""
    cell = layer.cell
    variables = [cell.kernel, cell.recurrent_kernel, cell.bias]

    def run(x: Any) -> tuple:
        # An error of its own for each element.
        def weighted(x: Any) -> Any:
            y = layer(x, **call)
            return ops.multiply(y, references.normal(y.shape, 3))

        return backends.vjp(layer, weighted, [x], None, variables)

    if compiled:
        run = backends.compiled(run, layer.variables)
    y, (dx,), rest = run(ops.convert_to_tensor(inputs))
    return [array(value) for value in (y, dx, *rest)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    layer = made(kind, return_sequences=True)
    cell = layer.cell
    feedback = references.effective_of(cell)
    for b, kernel in zip(feedback, (cell.kernel, cell.recurrent_kernel)):
        assert 20 < references.angle(b, array(kernel)) < 160

    def reference(x: Any, *weights: Any) -> Any:
        y = unrolled(kind, x, weights, feedback, MASK)
        return ops.multiply(y, references.normal(y.shape, 3))

    weights = [cell.kernel, cell.recurrent_kernel, cell.bias]
    y, wanted, _ = backends.vjp(None, reference, [X, *map(array, weights)])
    for compiled in (False, True):
        got = gradients(layer, X, compiled, mask=ops.convert_to_tensor(MASK))
        for ours, theirs in zip(got, [y, *wanted]):
            references.assert_close(ours, array(theirs))


@pytest.mark.parametrize(
    "arguments",
    [
        {"return_sequences": True, "go_backwards": True, "unroll": True},
        {"dropout": 0.5},
        {"dropout": 0.4, "recurrent_dropout": 0.5},
    ],
    ids=["backwards_unrolled", "dropout", "recurrent_dropout"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_with_kernels_for_feedback_it_is_the_stock_layer(
    kind: str, arguments: dict
) -> None:
    ours, stock = twins(kind, seed=5, **arguments)
    for a, b in zip(
        gradients(ours, X, False, training=True),
        gradients(stock, X, False, training=True),
    ):
        references.assert_close(a, b)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    # "auto" adds up in another order on PyTorch, though there is no cuDNN.
    [("simple", {}), ("lstm", {"use_cudnn": False})],
    ids=["simple", "lstm"],
)
def test_states_are_the_stock_layer_s(kind: str, arguments: dict) -> None:
    ours, stock = twins(kind, stateful=True, return_state=True, **arguments)
    for _ in range(2):
        for a, b in zip(ours(X), stock(X)):
            np.testing.assert_array_equal(array(a), array(b))
    assert np.abs(array(ours.states[0])).min() > 0


def test_b_is_made_once_for_a_sequence() -> None:
    layer = keras_fa.FASimpleRNN(
        UNITS,
        feedback_constraint=NoisyKernel(seed=references.SEED),
        recurrent_feedback_constraint=NoisyKernel(seed=references.SEED + 1),
        return_sequences=True,
    )
    layer.build(X.shape)
    cell = layer.cell
    drawn = [path.rule.seed_generator.state for path in cell.feedback_paths]
    for _ in range(2):
        before = [array(state)[-1] for state in drawn]
        feedback = references.effective_of(cell)

        def reference(x: Any, *weights: Any, feedback: Any = feedback) -> Any:
            seen = np.ones_like(MASK)
            y = unrolled("simple", x, weights, feedback, seen)
            return ops.multiply(y, references.normal(y.shape, 3))

        weights = [cell.kernel, cell.recurrent_kernel, cell.bias]
        _, wanted, _ = backends.vjp(None, reference, [X, *map(array, weights)])
        _, *got = gradients(layer, X, True)
        for ours, theirs in zip(got, wanted):
            references.assert_close(ours, array(theirs))
        assert [array(s)[-1] for s in drawn] == [n + 1 for n in before]


@pytest.mark.skipif(not backends.ON_TENSORFLOW, reason="of eager tapes")
def test_threads_do_not_share_a_sequence() -> None:
    """Each has its own reads of W and B, or its tape sees no kernel."""
    layer = made("simple")
    inside = threading.Barrier(2, timeout=60)
    found = []

    class Cell(type(layer.cell)):
        def get_dropout_mask(self, step_input: Any) -> Any:
            mask = super().get_dropout_mask(step_input)
            inside.wait()  # both are in their sequences from here on
            return mask

    layer.cell.__class__ = Cell

    def run() -> None:
        with tf.GradientTape() as tape:
            y = ops.sum(layer(X))
        variables = [w.value for w in layer.trainable_weights]
        found.append(tape.gradient(y, variables))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one, other in zip(*found):
        assert one is not None
        assert other is not None
        references.assert_close(array(one), array(other))


def test_mixed_precision() -> None:
    layer = made("lstm", dtype="mixed_bfloat16")
    full = made("lstm")
    for ours, theirs in zip(layer.weights, full.weights):
        ours.assign(theirs)
    assert layer(X).dtype == backends.ops.cast(X, "bfloat16").dtype
    # float32 in what the errors go through, bfloat16 in what is computed.
    assert layer.cell.effective_feedback_kernel()[1].dtype == ops.ones(1).dtype
    _, *got = gradients(layer, X.astype("float32"), True)
    _, *wanted = gradients(full, X, True)
    for a, b in zip(got, wanted):
        references.assert_close(a.astype("float32"), b, tolerance=5e-2)


def model(**arguments: Any) -> keras.Model:
    """A classifier of token sequences."""
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(9, 6, mask_zero=True),
            keras.layers.LSTM(
                4, return_sequences=True, name="first", **arguments
            ),
            keras.layers.GRU(3, name="second", zero_output_for_mask=True),
            keras.layers.Dense(2, name="readout"),
        ]
    )


TOKENS = np.random.default_rng(0).integers(0, 9, (4, 5))
TARGETS = references.normal((4, 2), 4)


def test_conversion(tmp_path: Any) -> None:
    stock = model(dropout=0.2)
    stock.compile("sgd", "mse")
    y = array(stock(TOKENS))
    converted = convert(stock, "fa_usf_sn")
    kinds = [type(layer).__name__ for layer in converted.layers[1:]]
    assert kinds == ["FALSTM", "FAGRU", "FADense"]
    np.testing.assert_array_equal(array(converted(TOKENS)), y)
    for path in named_paths(converted).values():
        assert path.rule.strict
    assert list(named_paths(converted)) == [
        "first/lstm_cell/kernel",
        "first/lstm_cell/recurrent_kernel",
        "second/gru_cell/kernel",
        "second/gru_cell/recurrent_kernel",
        "readout",
    ]
    assert not any(diagnose(converted, TOKENS, TARGETS).findings.values())

    other = convert(converted, "fa")  # and stored kernels go on from there
    again = convert(other, "fa_usf_init_ei")
    for a, b in zip(named_paths(other).values(), named_paths(again).values()):
        np.testing.assert_array_equal(
            array(a.feedback_kernel), array(b.feedback_kernel)
        )
    again.compile("sgd", "mse")
    again.fit(TOKENS, TARGETS, verbose=0)
    again.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(again.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b))
    plain = to_backprop(loaded)
    kinds = [type(layer).__name__ for layer in plain.layers[1:]]
    assert kinds == ["LSTM", "GRU", "Dense"]
    assert plain.get_layer("second").zero_output_for_mask
    np.testing.assert_array_equal(array(plain(TOKENS)), array(again(TOKENS)))

    stock.save_weights(tmp_path / "stock.weights.h5")
    again.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(array(again(TOKENS)), y)


@pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W only where")
def test_feedback_that_learns() -> None:
    converted = convert(model(), "kolen_pollack")
    paths = named_paths(converted).values()
    apart = [array(p.kernel) - array(p.feedback_kernel) for p in paths]
    before = [array(p.feedback_kernel) for p in paths]
    converted.compile(keras.optimizers.SGD(0.5), "mse")
    converted.fit(TOKENS, TARGETS, verbose=0)
    for path, difference, old in zip(paths, apart, before):
        b = array(path.feedback_kernel)
        assert np.abs(b - old).max() > 1e-4
        np.testing.assert_allclose(
            array(path.kernel) - b, difference, atol=1e-6
        )


def test_mirrored_feedback() -> None:
    converted = convert(model(), "weight_mirror")
    paths = list(named_paths(converted).values())
    before = [
        references.angle(array(p.kernel), array(p.current())) for p in paths
    ]
    (mirror,) = METHODS["weight_mirror"].callbacks()
    mirror.rate, mirror.batches = 0.1, 40
    mirror.mirror(converted, 0)
    for path, angle in zip(paths, before):
        assert (
            references.angle(array(path.kernel), array(path.current()))
            < angle / 2
        )


def test_direct_errors_arrive_at_the_outputs() -> None:
    converted = convert(model(), "dfa")
    converted.compile("sgd", "mse")
    before = [array(w) for w in converted.get_layer("first").weights]
    converted.fit(TOKENS, TARGETS, verbose=0)
    for old, new in zip(before, converted.get_layer("first").weights):
        assert np.abs(array(new) - old).max() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: keras_fa.FALSTM(3, use_cudnn=True), "Leave `use_cudnn` out"),
        (
            lambda: convert(model(), "symmetric_alignment"),
            "Use 'kolen_pollack' or 'weight_mirror'",
        ),
    ],
    ids=["cudnn", "loss"],
)
def test_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_stock_rnn_takes_the_cells() -> None:
    layer = made("lstm")
    cell = keras_fa.FALSTMCell.from_config(layer.cell.get_config())
    plain = keras.layers.RNN(cell)
    plain.build(X.shape)
    for ours, theirs in zip(layer.weights, plain.weights):
        theirs.assign(ours)
    for a, b in zip(gradients(layer, X, True), gradients(plain, X, True)):
        np.testing.assert_array_equal(a, b)
    plain.cell.reset_dropout_mask()
    state = [ops.zeros((2, UNITS))] * 2
    once, _ = plain.cell(X[:, 0], state)  # outside of any loop
    np.testing.assert_allclose(array(once), array(layer(X[:, :1])), atol=1e-6)


def test_replicas_train_as_one_device(strategy: Any) -> None:
    def trained(scope: Any) -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        with scope:
            layer = keras_fa.FASimpleRNN(2)
            one = keras.Sequential([keras.Input(X.shape[1:]), layer])
            one.compile(keras.optimizers.SGD(0.5), "mse")
        one.fit(X, TARGETS[:2], verbose=0)
        return [array(w) for w in one.weights]

    alone = trained(keras.name_scope("alone"))
    for a, b in zip(trained(strategy.scope()), alone):
        references.assert_close(a, b)
