"""DFA by blocks, and nested models under DFA and DenseFA.

The reference is NumPy by hand, or stock Keras: a loss whose gradients, with
`stop_gradient` behind the taps, are the updates of DFA.
"""

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backends
import keras
import numpy as np
import pytest
from keras import layers
from keras import ops
from test_wiring import CROSSENTROPY
from test_wiring import Arrays
from test_wiring import N
from test_wiring import X
from test_wiring import Y
from test_wiring import check
from test_wiring import deep
from test_wiring import dense_fa_by_hand
from test_wiring import gradients
from test_wiring import maps
from test_wiring import mlp_by_hand
from test_wiring import parameters
from test_wiring import received
from test_wiring import softmax

from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.conversion import load_stock_weights
from keras_fa.layers.direct import SendError
from keras_fa.layers.direct import StopError
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.methods import METHODS

RNG = np.random.default_rng(3)
SEQUENCES = RNG.normal(size=(N, 4, 6)).astype("float32")
MSE = keras.losses.MeanSquaredError()
# What goes from DFA's tests to any method with its wiring.
CHAINED = [name for name, m in METHODS.items() if m.wiring != "direct"]


@keras.saving.register_keras_serializable(package="tests")
class Attention(layers.Layer):
    """Attention of one head, with a kernel and without an FA counterpart."""

    def build(self, shape: tuple) -> None:
        size = shape[-1]
        self.kernel = self.add_weight(shape=(size, 3 * size), name="kernel")

    def call(self, inputs: Any) -> Any:
        query, key, value = ops.split(inputs @ self.kernel, 3, axis=-1)
        weights = ops.softmax(query @ ops.swapaxes(key, 1, 2))
        return weights @ value


class Stop(layers.Layer):
    """Stock Keras's way to stop an error."""

    def call(self, inputs: Any) -> Any:
        return ops.stop_gradient(inputs)


class Shift(layers.Layer):
    """Adds zeros, whose gradient is the error at the output."""

    def build(self, shape: tuple) -> None:
        self.zeros = self.add_weight(shape=(N, *shape[1:]), initializer="zeros")

    def call(self, inputs: Any) -> Any:
        return inputs + self.zeros

    def compute_output_shape(self, shape: tuple) -> tuple:
        return shape


def reference(
    stock: keras.Model,
    x: Any,
    y: np.ndarray,
    loss: Callable,
    sent: dict[str, Sequence[np.ndarray]],
    source: str,
) -> Arrays:
    """DFA's gradients of a stock model, by stock Keras.

    They are those of `loss + sum_l <h_l, e B_l>`, with e and B held constant,
    and no gradient behind h_l.

    Args:
        stock: A Functional model without nested ones.
        x: Its inputs.
        y: The targets.
        loss: A function of targets and outputs.
        sent: The maps by the layers that receive them, one for each call.
        source: The layer whose output's error is sent.
    """
    taps, shift = {name: [] for name in sent}, Shift()

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        if layer.name == source:
            outputs = shift(outputs)
        if layer.name in taps:
            taps[layer.name].append(outputs)
            return Stop()(outputs)
        return outputs

    cut = keras.models.clone_model(
        stock, clone_function=lambda layer: layer, call_function=call
    )
    ends = [tensor for found in taps.values() for tensor in found]
    cut = keras.Model(cut.inputs, [*cut.outputs, *ends])
    with keras.StatelessScope():  # no statistics move
        _, _, (e,) = backends.vjp(
            cut,
            lambda x: loss(y, cut(x, training=True)[0]),
            [x],
            variables=[shift.zeros],
        )
    e = np.array(e)
    matrices = [matrix for found in sent.values() for matrix in found]
    assert len(matrices) == len(ends)

    def total(x: Any) -> Any:
        outputs, *tensors = cut(x, training=True)
        value = loss(y, outputs)
        for tensor, matrix in zip(tensors, matrices):
            direct = received(e, matrix, tensor.shape[1:])
            direct = ops.convert_to_tensor(direct, tensor.dtype)
            value += ops.sum(tensor * direct)
        return value

    weights = stock.trainable_weights
    _, _, grads = backends.vjp(cut, total, [x], variables=weights)
    return {w.path: np.array(g) for w, g in zip(weights, grads)}


def by_receiver(model: keras.Model, source: str) -> dict[str, list]:
    """The maps out of a layer, those of one layer's calls together."""
    names = {layer.name for layer in model.layers}
    found = {}
    for label, matrix in maps(model, source).items():
        name = label if label in names else label.rpartition("_")[0]
        found.setdefault(name, []).append(matrix)
    return found


def check_all(ours: Arrays, expected: Arrays, rtol: float = 2e-4) -> None:
    """Compares the gradients of all weights."""
    assert set(ours) == set(expected)
    check(ours, expected, rtol)


def stops(model: keras.Model) -> int:
    """How many layers no error passes."""
    return sum(isinstance(layer, StopError) for layer in model.layers)


# Blocks ----------------------------------------------------------------------


def blocks() -> keras.Model:
    """Two blocks of two dense layers, and a readout."""
    start = keras.Input((4,))
    x = layers.Dense(6, activation="relu", name="h1")(start)
    x = layers.Dense(5, activation="tanh", name="h2")(x)
    x = layers.Dense(7, activation="relu", name="h3")(x)
    x = layers.Dense(6, activation="tanh", name="h4")(x)
    x = layers.Dense(3, activation="softmax", name="out")(x)
    return keras.Model(start, x)


def forward(model: keras.Model) -> tuple[list, list, list]:
    """Kernels, inputs and outputs of the layers of `blocks`."""
    kernels, inputs, outputs = [], [], []
    x = X
    for index, name in enumerate(("h1", "h2", "h3", "h4", "out")):
        kernel, bias = parameters(model, name)
        kernels.append(kernel)
        inputs.append(x)
        x = x @ kernel + bias
        x = (lambda a: np.maximum(a, 0), np.tanh)[index % 2](x)
        outputs.append(x)
    kernel, bias = parameters(model, "out")
    outputs[-1] = inputs[-1] @ kernel + bias
    return kernels, inputs, outputs


def updates(inputs: list, errors: list) -> Arrays:
    """The gradients of the layers whose pre-activations have these errors."""
    names = ("h1", "h2", "h3", "h4", "out")
    return {
        f"{name}/{kind}": value
        for name, x, d in zip(names, inputs, errors)
        for kind, value in (("kernel", x.T @ d), ("bias", d.sum(0)))
    }


def blocks_by_hand(model: keras.Model) -> Arrays:
    """The gradients of `blocks` with taps at h2 and h4, under crossentropy."""
    w, inputs, (h1, h2, h3, h4, z) = forward(model)
    b = maps(model, "out")
    assert set(b) == {"h2", "h4"}
    e = (softmax(z) - Y) / N
    d4 = (e @ b["h4"]) * (1 - h4**2)
    d3 = (d4 @ w[3].T) * (h3 > 0)
    d2 = (e @ b["h2"]) * (1 - h2**2)
    d1 = (d2 @ w[1].T) * (h1 > 0)
    return updates(inputs, [d1, d2, d3, d4, e])


def test_errors_are_exact_within_blocks() -> None:
    stock = blocks()
    model = convert(stock, "dfa", taps=["h2", "h4"])
    assert np.array_equal(model(X), stock(X))
    assert stops(model) == 2
    ours = gradients(model, X, Y, CROSSENTROPY)
    expected = blocks_by_hand(model)
    assert set(ours) == set(expected)
    check(ours, expected)
    exact = gradients(stock, X, Y, CROSSENTROPY)
    for name in ("h1", "h2", "h3", "h4"):
        path = f"{name}/kernel"
        assert not np.allclose(ours[path], exact[path], atol=1e-4)


@pytest.mark.parametrize("eager", [True, False])
def test_blocks_in_fit(eager: bool, tmp_path: Path) -> None:
    model = convert(blocks(), "dfa", taps=("h2", "h4"))
    expected = blocks_by_hand(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        before = {w.path: np.array(w) for w in each.trainable_weights}
        each.compile(keras.optimizers.SGD(0.5), CROSSENTROPY, run_eagerly=eager)
        each.fit(X, Y, batch_size=N, verbose=0)
        moved = {
            w.path: (before[w.path] - w) / 0.5 for w in each.trainable_weights
        }
        check_all(moved, expected, rtol=1e-3)


@backends.requires_tensorflow
def test_blocks_on_two_replicas(strategy: Any) -> None:
    """Each has the batch once: the update of the batch."""
    with strategy.scope():
        model = convert(blocks(), "dfa", taps=["h2", "h4"])
        model.compile(keras.optimizers.SGD(0.5), CROSSENTROPY)
    expected = blocks_by_hand(model)
    before = {w.path: np.array(w) for w in model.trainable_weights}
    x, y = np.concatenate([X, X]), np.concatenate([Y, Y])
    model.fit(x, y, batch_size=2 * N, shuffle=False, verbose=0)
    moved = {
        w.path: (before[w.path] - w) / 0.5 for w in model.trainable_weights
    }
    check_all(moved, expected, rtol=1e-3)


def test_a_block_does_not_depend_on_what_is_above() -> None:
    def linear(y: Any, z: Any) -> Any:
        # So that e is Y whatever the weights.
        return ops.sum(ops.multiply(z, Y))

    start = keras.Input((4,))
    x = start
    for name in ("h1", "h2", "h3", "h4"):
        x = layers.Dense(5, activation="tanh", name=name)(x)
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    model = convert(stock, "dfa", taps="h2")
    before = gradients(model, X, Y, linear)
    for name, path in (("h4", "h1/kernel"), ("h2", "h2/kernel")):
        kernel = model.get_layer(name).kernel
        kernel.assign(-3.0 * kernel)
        after = gradients(model, X, Y, linear)
        if name == "h4":
            assert np.array_equal(after[path], before[path])
        else:  # within the block it does
            assert not np.allclose(after[path], before[path])
    assert stops(model) == 1


def transformer() -> keras.Model:
    """Two residual blocks, whose sums are layers and operations."""
    start = keras.Input((4, 6))
    x = layers.Dense(6, name="embed")(start)
    for block in "ab":
        y = layers.LayerNormalization(name=f"{block}_norm1")(x)
        y = Attention(name=f"{block}_attention")(y)
        x = layers.Add(name=f"{block}_add1")([x, y])
        y = layers.LayerNormalization(name=f"{block}_norm2")(x)
        y = layers.Dense(8, activation="gelu", name=f"{block}_wide")(y)
        y = layers.Dense(6, name=f"{block}_narrow")(y)
        x = layers.Add(name=f"{block}_add2")([x, y])
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(start, layers.Dense(3, name="out")(x))


SKIP = ["a_attention", "b_attention"]


@pytest.mark.parametrize(
    ("taps", "form"),
    [
        (["embed", "a_add2", "b_add2"], "dense"),
        (["embed", "a_add2", "b_add2"], "convolutional"),
        (["a_add1", "a_add2", "b_add1", "b_add2"], "dense"),
        (["a_norm2", "b_attention"], "dense"),  # residuals go around them
        (["norm"], "dense"),
    ],
)
def test_blocks_of_a_transformer(taps: list[str], form: str) -> None:
    stock = transformer()
    model = convert(stock, "dfa", None, SKIP, form, taps=taps)
    assert np.array_equal(model(SEQUENCES), stock(SEQUENCES))
    sent = by_receiver(model, "out")
    assert list(sent) == taps
    ours = gradients(model, SEQUENCES, Y, MSE)
    expected = reference(stock, SEQUENCES, Y, MSE, sent, "out")
    check_all(ours, expected, 1e-3)


def test_blocks_of_a_transformer_train_and_go_back(tmp_path: Path) -> None:
    stock = transformer()
    taps = ["a_add2", "b_add2"]
    model = convert(stock, "dfa", skip=SKIP, taps=taps)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    first, *_, last = model.fit(
        SEQUENCES, Y, epochs=20, verbose=0, batch_size=N
    ).history["loss"]
    assert last < 0.7 * first
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    plain = to_backprop(loaded)
    assert not any(
        isinstance(a, StopError | SendError | FeedbackLayer)
        for a in plain.layers
    )
    names = [[a.name for a in m.layers[1:]] for m in (plain, stock)]
    assert names[0] == names[1]
    again = convert(loaded, "dfa", skip=SKIP, taps=taps)
    for each in (loaded, plain, again, convert(plain, "fa", skip=SKIP)):
        assert np.array_equal(each(SEQUENCES), model(SEQUENCES))
    # Maps of equal names and shapes go on.
    old, new = maps(model, "out"), maps(again, "out")
    assert list(new) == taps
    assert all(np.array_equal(old[name], new[name]) for name in taps)


# The source ------------------------------------------------------------------


def test_the_error_of_a_hidden_layer() -> None:
    model = convert(blocks(), "dfa", error_from="h3")
    w, inputs, (h1, h2, h3, h4, z) = forward(model)
    b = maps(model, "h3")
    assert set(b) == {"h1", "h2"}
    e = (softmax(z) - Y) / N
    d4 = (e @ w[4].T) * (1 - h4**2)
    at_h3 = d4 @ w[3].T  # at its output, behind the relu
    d3 = at_h3 * (h3 > 0)
    d2 = (at_h3 @ b["h2"]) * (1 - h2**2)
    d1 = (at_h3 @ b["h1"]) * (h1 > 0)
    expected = updates(inputs, [d1, d2, d3, d4, e])
    check_all(gradients(model, X, Y, CROSSENTROPY), expected)


def test_source_and_taps() -> None:
    model = convert(blocks(), "dfa", taps=["h2"], error_from="h4")
    w, inputs, (h1, h2, h3, h4, z) = forward(model)
    b = maps(model, "h4")
    e = (softmax(z) - Y) / N
    at_h4 = e @ w[4].T
    d4 = at_h4 * (1 - h4**2)
    d3 = (d4 @ w[3].T) * (h3 > 0)
    d2 = (at_h4 @ b["h2"]) * (1 - h2**2)
    d1 = (d2 @ w[1].T) * (h1 > 0)
    expected = updates(inputs, [d1, d2, d3, d4, e])
    check_all(gradients(model, X, Y, CROSSENTROPY), expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "tanh"])
def test_a_hidden_source_sends_the_error_of_its_output(activation: str) -> None:
    """Whatever its activation: only the logits' is split off."""
    start = keras.Input((4,))
    x = layers.Dense(6, name="a")(start)
    x = layers.Dense(5, activation, name="b")(x)
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    model = convert(stock, "dfa", error_from="b")
    ours = gradients(model, X, Y, MSE)
    sent = by_receiver(model, "b")
    check_all(ours, reference(stock, X, Y, MSE, sent, "b"))


def test_the_last_layer_stands_for_the_logits() -> None:
    model = convert(blocks(), "dfa", error_from="out")
    other = convert(model, "dfa")
    assert [a.name for a in model.layers] == [a.name for a in other.layers]
    check_all(
        gradients(model, X, Y, CROSSENTROPY),
        gradients(other, X, Y, CROSSENTROPY),
        1e-6,
    )


def test_branches_that_do_not_reach_the_source_are_backpropagated() -> None:
    start = keras.Input((4,))
    x = layers.Dense(4, activation="tanh", name="h1")(start)
    left = layers.Dense(4, activation="tanh", name="h2")(x)
    left = layers.Dense(4, activation="tanh", name="left")(left)
    right = layers.Dense(4, activation="tanh", name="right1")(x)
    right = layers.Dense(4, activation="tanh", name="right2")(right)
    x = layers.Add(name="add")([left, right])
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    model = convert(stock, "dfa", error_from="left")
    sent = by_receiver(model, "left")
    assert set(sent) == {"h1", "h2"}
    ours = gradients(model, X, Y, MSE)
    check_all(ours, reference(stock, X, Y, MSE, sent, "left"))
    exact = gradients(stock, X, Y, MSE)
    path = "right1/kernel"
    np.testing.assert_allclose(ours[path], exact[path], rtol=1e-4, atol=1e-6)


# Nested models ---------------------------------------------------------------


def put(
    nested: bool, name: str, function: Callable, x: keras.KerasTensor
) -> keras.KerasTensor:
    """What a function makes of a tensor, as a model in the model or not."""
    if not nested:
        return function(x)
    start = keras.Input(x.shape[1:])
    return keras.Model(start, function(start), name=name)(x)


def once(nested: bool) -> keras.Model:
    """A base with a normalization behind a layer, and a readout."""

    def base(x: keras.KerasTensor) -> keras.KerasTensor:
        x = layers.Dense(6, name="a")(x)
        x = layers.BatchNormalization(name="norm")(x)
        x = layers.ReLU(name="relu")(x)
        return layers.Dense(5, activation="tanh", name="b")(x)

    start = keras.Input((4,))
    x = put(nested, "base", base, start)
    return keras.Model(start, layers.Dense(3, name="out")(x))


def twice_deep(nested: bool) -> keras.Model:
    """A model in a model, with a sum across its borders."""

    def inner(x: keras.KerasTensor) -> keras.KerasTensor:
        x = layers.Dense(6, activation="tanh", name="b")(x)
        return layers.Dense(4, activation="relu", name="c")(x)

    def middle(x: keras.KerasTensor) -> keras.KerasTensor:
        x = layers.Dense(4, activation="tanh", name="a")(x)
        y = put(nested, "inner", inner, x)
        return layers.Add(name="sum")([x, y])

    start = keras.Input((4,))
    x = put(nested, "middle", middle, start)
    x = layers.Dense(4, activation="relu", name="d")(ops.tanh(x))
    return keras.Model(start, layers.Dense(3, name="out")(x))


def called_twice(nested: bool) -> keras.Model:
    """One model called twice: its layers are shared."""
    first = layers.Dense(5, activation="tanh", name="a")
    second = layers.Dense(4, activation="relu", name="b")
    start = keras.Input((4,))
    block = keras.Model(start, second(first(start)), name="block")
    start = keras.Input((4,))
    x = start
    for _ in range(2):
        x = block(x) if nested else second(first(x))
    x = layers.Add(name="sum")([x, start])
    return keras.Model(start, layers.Dense(3, name="out")(x))


def in_sequentials(nested: bool) -> keras.Model:
    """Sequential models in each other."""
    inner = [
        layers.Dense(6, activation="tanh", name="b"),
        layers.Dense(4, activation="relu", name="c"),
    ]
    outer = [layers.Dense(4, activation="tanh", name="a")]
    after = [layers.ReLU(name="relu")]
    readout = layers.Dense(3, name="out")
    if nested:
        outer.append(keras.Sequential(inner, name="inner"))
        outer = [keras.Sequential([*outer, *after], name="outer")]
    else:
        outer += inner + after
    return keras.Sequential([keras.Input((4,)), *outer, readout])


NETS = {f.__name__: f for f in (once, twice_deep, called_twice, in_sequentials)}
# Taps of each by names and paths, and by the names of the flat model.
NAMED = {
    "once": (["base/a", "base"], ["a", "b"]),
    "twice_deep": (["middle/inner/b", "inner", "sum"], ["b", "c", "sum"]),
    "called_twice": (["block"], ["b"]),
    "in_sequentials": (["outer", "a"], ["a", "relu"]),
}


def twins(name: str) -> tuple[keras.Model, keras.Model]:
    """A model with nested ones and without, of equal weights."""
    nested, flat = (NETS[name](nested) for nested in (True, False))
    if isinstance(flat, keras.Sequential):
        flat = keras.Model(flat.inputs[0], flat.outputs[0])
    theirs = {tuple(w.path.split("/")[-2:]): w for w in nested.weights}
    for weight in flat.weights:
        weight.assign(theirs[tuple(weight.path.split("/")[-2:])])
    assert np.array_equal(nested(X), flat(X))
    return nested, flat


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_nested_models_under_dfa(
    name: str, given: bool, tmp_path: Path
) -> None:
    nested, flat = twins(name)
    before = [np.array(w) for w in nested.weights]
    taps, names = NAMED[name] if given else (None, None)
    model = convert(nested, "dfa", taps=taps)
    assert np.array_equal(model(X), nested(X))
    sent = by_receiver(model, "out")
    if given:
        assert sorted(sent) == names
    else:  # at their taps
        assert {"a", "b"} <= set(sent)
        if name == "once":
            sent["relu"] = sent.pop("a")
    expected = reference(flat, X, Y, MSE, sent, "out")
    expected = {"/".join(p.split("/")[-2:]): g for p, g in expected.items()}
    if name == "once" and not given:
        # A bias below a normalization has no gradient.
        assert np.abs(expected.pop("a/bias")).max() < 1e-6
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        ours = gradients(each, X, Y, MSE)
        assert len(ours) == len(flat.trainable_weights)
        check(ours, expected)
    # Traced once, for the time that it takes.
    for eager in (True, False) if name == "called_twice" else (True,):
        loaded.set_weights(model.get_weights())
        loaded.compile(keras.optimizers.SGD(0.5), MSE, run_eagerly=eager)
        start = {w.path: np.array(w) for w in loaded.trainable_weights}
        loaded.fit(X, Y, batch_size=N, verbose=0)
        moved = {
            w.path: (start[w.path] - w) / 0.5 for w in loaded.trainable_weights
        }
        check(moved, expected, 2e-3)
    # The source has not been touched.
    assert all(map(np.array_equal, nested.weights, before))


@pytest.mark.parametrize("head", ["softmax fused", "softmax layer"])
def test_a_nested_multilayer_perceptron_by_hand(head: str) -> None:
    kind, _, place = head.partition(" ")
    start = keras.Input((4,))
    x = layers.Dense(6, activation="relu", name="h1")(start)
    base = keras.Model(start, x, name="base")
    top = [layers.Dense(5, activation="relu", name="h2")]
    if place == "fused":
        top += [layers.Dense(3, kind, name="out")]
    else:
        top += [layers.Dense(3, name="out"), layers.Activation(kind)]
    top = keras.Sequential(top, name="top")
    start = keras.Input((4,))
    stock = keras.Model(start, top(base(start)))
    model = convert(stock, "dfa")
    assert np.array_equal(model(X), stock(X))
    expected, loss = mlp_by_hand(model, head)
    check_all(gradients(model, X, Y, loss), expected)


def test_nested_models_under_dense_fa_by_hand() -> None:
    flat = deep()
    lower = keras.Model(flat.inputs[0], flat.get_layer("h2").output, name="low")
    upper = keras.Sequential(
        [layers.Activation("tanh"), layers.Dense(7, "tanh", name="h3")],
        name="up",
    )
    start = keras.Input((4,))
    x = layers.Dense(3, activation="softmax", name="out")(upper(lower(start)))
    stock = keras.Model(start, x)
    model = convert(stock, "dense_fa")
    assert np.array_equal(model(X), stock(X))
    for layer in model.layers:  # small maps would hide behind the chain
        if isinstance(layer, SendError):
            for matrix in layer.maps:
                matrix.assign(10.0 * matrix)
    check_all(gradients(model, X, Y, CROSSENTROPY), dense_fa_by_hand(model))


@pytest.mark.parametrize("name", NETS)
def test_nested_models_under_dense_fa(name: str) -> None:
    """As the flat model, which is worked by hand elsewhere."""
    nested, flat = twins(name)
    model, other = (convert(stock, "dense_fa") for stock in (nested, flat))
    theirs = {
        (layer.name, receiver): matrix
        for layer in other.layers
        if isinstance(layer, SendError)
        for receiver, matrix in zip(layer.receivers, layer.maps)
    }
    sends = [a for a in model.layers if isinstance(a, SendError)]
    assert sum(len(send.maps) for send in sends) == len(theirs) > 0
    for send in sends:
        for receiver, matrix in zip(send.receivers, send.maps):
            matrix.assign(10.0 * theirs[send.name, receiver])
            theirs[send.name, receiver].assign(matrix)
    expected = gradients(other, X, Y, MSE)
    expected = {"/".join(p.split("/")[-2:]): g for p, g in expected.items()}
    if name == "once":
        del expected["a/bias"]
    check(gradients(model, X, Y, MSE), expected, 1e-5)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(X, Y, verbose=0)


def test_a_model_that_holds_a_layer_of_another() -> None:
    """One layer in two nested models, and called by the outer one, too."""
    shared = layers.Dense(4, activation="tanh", name="shared")
    pieces = []
    for name in ("one", "two"):
        start = keras.Input((4,))
        x = layers.Dense(4, activation="relu", name=f"in_{name}")(start)
        pieces.append(keras.Model(start, shared(x), name=name))
    start = keras.Input((4,))
    x = shared(pieces[1](pieces[0](start)))
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    model = convert(stock, "dfa", taps=["shared"])
    assert np.array_equal(model(X), stock(X))
    assert list(maps(model, "out")) == ["shared", "shared_1", "shared_2"]
    assert len(model.trainable_weights) == len(stock.trainable_weights)


def test_calls_have_labels_that_no_layer_has() -> None:
    """Else one of two maps of one name would be lost in a conversion."""
    shared = layers.Dense(4, activation="tanh", name="dense")
    start = keras.Input((4,))
    x = layers.Dense(4, name="dense_1")(shared(shared(start)))
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    model = convert(stock, "dfa")
    again = convert(model, "dfa")
    old, new = maps(model, "out"), maps(again, "out")
    assert list(old) == list(new) == ["dense", "dense_1_", "dense_1"]
    assert all(np.array_equal(old[name], new[name]) for name in old)


# What a flat model keeps -----------------------------------------------------


def alike() -> keras.Model:
    """Layers of one name in different models."""
    pieces = []
    for name in ("one", "two"):
        start = keras.Input((4,), name="x")
        x = layers.Dense(4, activation="tanh", name="dense")(start)
        x = layers.Dropout(0.0, name=f"only_{name}")(x)
        pieces.append(keras.Model(start, x, name=name))
    start = keras.Input((4,), name="x")
    x = layers.Dense(4, activation="relu", name="dense")(start)
    x = layers.Dense(4, activation="relu", name="one_dense")(x)
    x = pieces[1](pieces[0](x))
    return keras.Model(start, layers.Dense(3, name="out")(x))


def test_names_that_two_layers_have() -> None:
    stock = alike()
    model = convert(stock, "dfa")
    fa = [a.name for a in model.layers if isinstance(a, FeedbackLayer)]
    assert fa == ["dense", "one_dense", "one_dense_", "two_dense", "out"]
    assert np.array_equal(model(X), stock(X))
    names = [a.name for a in model.layers]
    assert {"only_one", "only_two"} <= set(names)
    # The flat model is stock without nested models, then.
    plain = to_backprop(model)
    again = convert(plain, "dfa", taps=["one_dense_"])
    assert list(maps(again, "out")) == ["one_dense_"]
    for name, wanted in (
        ("one/dense", ["one_dense_"]),
        ("dense", ["dense"]),
        ("one_dense", ["one_dense"]),
        ("only_two", ["only_two"]),
    ):
        assert list(maps(convert(stock, "dfa", taps=name), "out")) == wanted


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_a_frozen_base_stays_frozen(method: str, tmp_path: Path) -> None:
    for path, trained in (
        (["base"], {"out"}),
        (["base", "a"], {"norm", "b", "out"}),
        (["out"], {"a", "norm", "b"}),
        ([], set()),
    ):
        frozen = stock = once(nested=True)
        base = stock.get_layer("base")
        for name in path:
            frozen = frozen.get_layer(name)
        frozen.trainable = False
        model = convert(stock, method)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for each in (model, loaded, to_backprop(model), convert(model, "fa")):
            found = {w.path.split("/")[-2] for w in each.trainable_weights}
            assert found == trained
            number = len(stock.trainable_weights)
            assert len(each.trainable_weights) == number
        # With its statistics.
        np.testing.assert_allclose(
            model(X, training=True), stock(X, training=True), rtol=1e-6
        )
        statistics = "moving_mean", "moving_variance"
        for name in statistics:
            ours = getattr(model.get_layer("norm"), name)
            assert np.array_equal(ours, getattr(base.get_layer("norm"), name))


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_layers_of_a_frozen_base_are_set_free(
    method: str, tmp_path: Path
) -> None:
    """One of them in the stock model, which Keras trains, the rest later."""
    stock = once(nested=True)
    base = stock.get_layer("base")
    base.trainable = False
    base.get_layer("b").trainable = True
    model = convert(stock, method)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        names = [w.path.split("/")[-2] for w in each.trainable_weights]
        assert names == ["b", "b", "out", "out"]
        assert len(stock.trainable_weights) == 4
        each.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        each.fit(X, Y, verbose=0)
        for name, moves in (("a", False), ("b", True)):
            ours, theirs = (m.get_layer(name).kernel for m in (each, base))
            assert np.array_equal(ours, theirs) != moves
        for layer in each.layers:
            layer.trainable = True
        assert len(each.trainable_weights) == 8
        each.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        each.fit(X, Y, verbose=0)
        ours, theirs = (m.get_layer("a").kernel for m in (each, base))
        assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("pinned", [None, False, True])
@pytest.mark.parametrize("training", [None, False, True])
def test_training_of_a_nested_call(
    pinned: bool | None, training: bool | None
) -> None:
    start = keras.Input((4,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(4)(start))
    inner = keras.Sequential([layers.Dropout(0.5, seed=1, name="drop")])
    base = keras.Model(start, inner(x), name="base")
    start = keras.Input((4,))
    x = base(start, training=pinned)
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    x = RNG.normal(2.0, 3.0, (16, 4)).astype("float32")
    model = convert(stock, "dfa")
    ours, theirs = (m(x, training=training) for m in (model, stock))
    assert np.array_equal(ours, theirs)
    assert np.array_equal(
        model.get_layer("norm").moving_mean, base.get_layer("norm").moving_mean
    )


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_masks_reach_into_nested_models(method: str) -> None:
    inner = keras.Sequential(
        [
            layers.Dense(6, activation="tanh", name="a"),
            layers.GlobalAveragePooling1D(name="pool"),
        ]
    )
    start = keras.Input((5,))
    x = layers.Embedding(10, 4, mask_zero=True, name="embed")(start)
    stock = keras.Model(start, layers.Dense(3, name="out")(inner(x)))
    x = RNG.integers(1, 9, (N, 5))
    x[:, 3:] = 0  # masked: the mean is of the rest
    model = convert(stock, method)
    assert np.array_equal(model(x), stock(x))
    table = model.get_layer("embed").embeddings
    before = np.array(model(x))
    table.assign(np.array(table) + np.eye(10, 1) * 5.0)
    assert np.array_equal(model(x), before)


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_nested_models_in_low_precision(method: str, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Rescaling(1 / 3, dtype="float32"),
            layers.Dense(5, activation="tanh", name="b"),
        ],
        name="inner",
    )
    start = keras.Input((6,))
    base = keras.Model(start, ops.tanh(start) / 3.0, name="base")
    start = keras.Input((4,))
    x = base(layers.Dense(6, name="a")(start))
    stock = keras.Model(start, layers.Dense(3, name="out")(inner(x)))
    keras.config.set_dtype_policy("float32")
    model = convert(stock, method)
    assert np.array_equal(model(X), stock(X))
    assert np.array_equal(model(X, training=True), stock(X, training=True))
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(X, Y, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def structured() -> keras.Model:
    """Nested models with several inputs and outputs, by place and by name."""
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="b")
    x = layers.Dense(5, activation="tanh", name="a")(left)
    y = layers.Dense(5, activation="tanh", name="c")(right)
    two = keras.Model([left, right], [layers.Add()([x, y]), y], name="two")
    left, right = keras.Input((5,), name="z"), keras.Input((5,), name="y")
    x = layers.Subtract()([left, layers.Dense(5, name="d")(right)])
    named = keras.Model({"z": left, "y": right}, {"sum": x}, name="named")
    first, second = keras.Input((4,)), keras.Input((3,))
    x, y = two({"b": second, "left": first})
    x = named({"y": x, "z": y})["sum"]
    x = two([layers.Dense(4, name="e")(x), second])[0]
    return keras.Model([first, second], layers.Dense(3, name="out")(x))


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_several_inputs_and_outputs_of_nested_models(method: str) -> None:
    stock = structured()
    x = [X, X[:, :3]]
    model = convert(stock, method)
    assert np.array_equal(model(x), stock(x))
    assert len(model.trainable_weights) == len(stock.trainable_weights)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(x, Y, verbose=0)
    with pytest.raises(ValueError, match=r"'two', which is not one of them"):
        convert(stock, "dfa", taps="two")  # it has two outputs
    assert np.array_equal(convert(stock, "dfa", taps="named")(x), stock(x))


def test_vocabularies_and_state_of_nested_models() -> None:
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(X)
    base = keras.Sequential(
        [keras.Input((4,)), normalization, layers.Dense(5, name="a")]
    )
    stock = keras.Sequential(
        [keras.Input((4,)), base, layers.Dense(3, name="out")]
    )
    model = convert(stock, "dfa")
    assert np.array_equal(model(X), stock(X))
    ours = model.get_layer("normalization")
    assert ours is not normalization
    assert np.array_equal(ours.mean, normalization.mean)


def test_feedback_of_a_nested_model_goes_on() -> None:
    """From a nested model to a flat one, and from one flat one to another."""
    method = "fa_usf_init"
    once_fa = convert(once(nested=True), method)
    stored = once_fa.get_layer("base").get_layer("b").feedback_kernel
    flat = convert(to_backprop(convert(once_fa, "dfa")), method)
    assert flat.get_layer("b").feedback_kernel.shape == stored.shape
    model = convert(once_fa, "dfa")
    again = convert(model, "dfa")
    old, new = maps(model, "out"), maps(again, "out")
    assert list(old) == ["a", "b"]
    assert all(np.array_equal(old[name], new[name]) for name in old)
    drawn = maps(convert(to_backprop(model), "dfa"), "out")
    assert not any(np.array_equal(old[name], drawn[name]) for name in old)


def test_weights_files_of_nested_models(tmp_path: Path) -> None:
    stock, other = once(nested=True), once(nested=True)
    model = convert(other, "dfa")
    stock.save_weights(tmp_path / "nested.weights.h5")
    before = [np.array(w) for w in model.weights]
    with pytest.raises(ValueError, match="could not be loaded"):
        load_stock_weights(model, tmp_path / "nested.weights.h5")
    assert all(map(np.array_equal, model.weights, before))
    other.load_weights(tmp_path / "nested.weights.h5")
    assert np.array_equal(convert(other, "dfa")(X), stock(X))
    # A file of the flat model is one of a stock model like any other.
    flat = to_backprop(convert(stock, "dfa"))
    flat.save_weights(tmp_path / "flat.weights.h5")
    for load in (load_stock_weights, keras.Model.load_weights):
        model = convert(once(nested=True), "dfa")
        load(model, tmp_path / "flat.weights.h5")
        assert np.array_equal(model(X), stock(X))


def test_a_compiled_nested_model_stays_compiled() -> None:
    stock = once(nested=True)
    stock.compile(keras.optimizers.SGD(0.25), "mse")
    stock.get_layer("base").compile("sgd", lambda y, z: 0.0)  # its own affair
    model = convert(stock, "dfa")
    assert model.compiled
    assert float(model.optimizer.learning_rate) == 0.25


# Refusals --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments"),
    [(method, {"taps": ["h1"]}) for method in CHAINED]
    + [("fa", {"taps": []}), ("dense_fa", {"error_from": "h2"})],
)
def test_other_methods_take_no_taps(method: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=rf"those of DFA.*'{method}'") as one:
        convert(blocks(), method, **arguments)
    assert "\n" not in str(one.value)


BELOW = "h1, h2, h3, h4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": ["h5"]}, rf"'h5', a name that no layer has.*: {BELOW}$"),
        ({"taps": [None]}, rf"None, a name that no layer has.*: {BELOW}$"),
        ({"taps": ["out"]}, rf"'out', which is not one.*: {BELOW}$"),
        ({"taps": ["h2", "h2"]}, "once.*'h2'"),
        ({"taps": []}, "at least one layer"),
        (
            {"taps": ["h4"], "error_from": "h3"},
            "layers below the source.*'h4', which is not one.*: h1, h2$",
        ),
        ({"taps": ["h3"], "error_from": "h3"}, "'h3', which.*: h1, h2$"),
        (
            {"error_from": "h9"},
            "a layer.*called once.*'h9', a name.*: h2, h3, h4, out$",
        ),
        ({"error_from": "h1"}, "'h1', which is not one.*: h2, h3, h4, out$"),
    ],
)
def test_wrong_taps_and_sources(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        convert(blocks(), "dfa", **arguments)
    assert "\n" not in str(refusal.value)


def test_a_tap_needs_a_static_shape() -> None:
    start = keras.Input((None, 4))
    x = layers.Dense(6, name="a")(start)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    parts = ops.split(x, 2, axis=-1)
    x = layers.Dense(5, name="c")(parts[0])
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    (split,) = (o.name for o in stock.operations if "split" in o.name)
    for name in ("a", split):  # of no fixed length, two tensors
        match = rf"static shapes.*'{name}', which is not one.*: pool, c$"
        with pytest.raises(ValueError, match=match):
            convert(stock, "dfa", taps=name)
    assert stops(convert(stock, "dfa", taps="c")) == 1


def test_names_that_may_be_two_layers() -> None:
    stock = alike()
    start = keras.Input((4,))
    x = layers.Dense(3, name="last")(stock.layers[3](stock.layers[4](start)))
    match = r"'dense', which may be \w+/dense or \w+/dense\. Allowed: "
    with pytest.raises(ValueError, match=match):
        convert(keras.Model(start, x), "dfa", taps="dense")


def test_a_source_that_is_called_twice() -> None:
    stock = called_twice(nested=True)
    for name in ("b", "block", "block/b"):
        with pytest.raises(ValueError, match=f"called once.*'{name}', which"):
            convert(stock, "dfa", error_from=name, taps="a")


def test_a_mask_of_a_nested_models_own_is_refused() -> None:
    inner = keras.Sequential([layers.Dense(4), layers.GlobalMaxPooling1D()])
    start, mask = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    x = inner(start, mask=mask)
    stock = keras.Model([start, mask], layers.Dense(3)(x))
    match = f"'{inner.name}' is called with a `mask`.*Masking"
    with pytest.raises(ValueError, match=match):
        convert(stock, "dfa")


class Doubled(keras.Model):
    """A Functional model whose call does more."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return 2.0 * super().call(inputs, training=training)


def test_a_nested_model_with_a_call_of_its_own_is_refused() -> None:
    start = keras.Input((4,))
    inner = Doubled(start, layers.Dense(4)(start), name="inner")
    start = keras.Input((4,))
    stock = keras.Model(start, layers.Dense(3)(inner(start)))
    match = r"'inner' \(Doubled\) has a `call` of its own"
    with pytest.raises(ValueError, match=match):
        convert(stock, "dfa")
