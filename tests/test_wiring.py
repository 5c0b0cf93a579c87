"""DFA and DenseFA: updates worked by hand, taps, maps, refusals."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backends
import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

from keras_fa import conversion
from keras_fa import convert
from keras_fa import to_backprop
from keras_fa._gradients import backpropagation
from keras_fa._wiring import Graph
from keras_fa.constraints import TiedKernel
from keras_fa.layers.direct import SendError
from keras_fa.layers.direct import StopError
from keras_fa.methods import METHODS

Arrays = dict[str, np.ndarray]
FORMS = [
    (method, form)
    for form in ("dense", "convolutional")
    for method in ("dfa", "dense_fa")
]
N = 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 4)).astype("float32")
Y = np.eye(3, dtype="float32")[RNG.integers(0, 3, N)]
IMAGES = RNG.normal(size=(N, 8, 8, 3)).astype("float32")
CROSSENTROPY = keras.losses.CategoricalCrossentropy()


def gradients(
    model: keras.Model, x: np.ndarray, y: np.ndarray, loss: Callable
) -> Arrays:
    """The gradient of every trainable weight, by its path."""
    _, _, grads = backends.vjp(
        model, lambda x: loss(y, model(x, training=True)), [x]
    )
    return {w.path: np.array(g) for w, g in zip(model.trainable_weights, grads)}


def maps(model: keras.Model, source: str) -> Arrays:
    """The fixed maps out of a layer, by the names of those who receive."""
    send = model.get_layer(f"{source}_send_error")
    return {n: np.array(b) for n, b in zip(send.receivers, send.maps)}


def check(ours: Arrays, expected: Arrays, rtol: float = 2e-4) -> None:
    """Compares the gradients of all weights that `expected` names."""
    for name, wanted in expected.items():
        scale = np.abs(wanted).max()
        assert scale > 0, name
        np.testing.assert_allclose(
            ours[name], wanted, rtol=rtol, atol=rtol * scale, err_msg=name
        )


def parameters(model: keras.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a layer."""
    layer = model.get_layer(name)
    return np.array(layer.kernel), np.array(layer.bias)


def received(e: np.ndarray, kernel: np.ndarray, shape: tuple) -> np.ndarray:
    """What a map of either form makes of an error, place by place.

    Args:
        e: The error at the source, `(batch, ...)`.
        kernel: The map's kernel.
        shape: The receiver's shape per example.
    """
    *places, _ = shape
    if kernel.ndim != len(shape) + 1:  # (n, N)
        return (e.reshape(len(e), -1) @ kernel).reshape(len(e), *shape)
    convolves = e.ndim == kernel.ndim and np.prod(e.shape[1:-1]) > 1
    *window, _, channels = kernel.shape
    old = e.shape[1:-1] if convolves else window
    result = np.zeros((len(e), *places, channels), e.dtype)
    for place in np.ndindex(*places):
        near = [math.floor(i * n / m) for i, n, m in zip(place, old, places)]
        if not convolves:
            result[:, *place] = e.reshape(len(e), -1) @ kernel[*near]
            continue
        for step in np.ndindex(*window):
            at = [i + s - k // 2 for i, s, k in zip(near, step, window)]
            if all(0 <= i < n for i, n in zip(at, old)):
                result[:, *place] += e[:, *at] @ kernel[*step]
    return result * np.sqrt(np.prod(old) / np.prod(places))


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(z - z.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-z))


# By hand -------------------------------------------------------------------


def _head(x: keras.KerasTensor, kind: str) -> keras.KerasTensor:
    """A readout with its activation at one of several places."""
    name, _, place = kind.partition(" ")
    if place == "fused":
        return layers.Dense(3, activation=name, name="out")(x)
    x = layers.Dense(3, name="out")(x)
    if place == "Softmax":
        return layers.Softmax(name="head")(x)
    if place == "layer":
        return layers.Activation(name, name="head")(x)
    if place == "operation":
        return {"softmax": ops.softmax, "sigmoid": ops.sigmoid}[name](x)
    return x


HEADS = [
    "softmax fused",
    "softmax Softmax",
    "softmax layer",
    "softmax operation",
    "sigmoid fused",
    "sigmoid layer",
    "sigmoid operation",
    "logits",
]


def mlp(head: str = "softmax fused") -> keras.Model:
    """Two hidden layers with fused relu."""
    start = keras.Input((4,))
    x = layers.Dense(6, activation="relu", name="h1")(start)
    x = layers.Dense(5, activation="relu", name="h2")(x)
    return keras.Model(start, _head(x, head))


def mlp_by_hand(model: keras.Model, head: str) -> tuple[Arrays, Callable]:
    """The DFA gradients of `mlp`, and the loss that they are of."""
    (w1, b1), (w2, b2), (w3, b3) = (
        parameters(model, name) for name in ("h1", "h2", "out")
    )
    a1 = X @ w1 + b1
    h1 = np.maximum(a1, 0)
    a2 = h1 @ w2 + b2
    h2 = np.maximum(a2, 0)
    z = h2 @ w3 + b3
    loss, e = {
        "softmax": (CROSSENTROPY, (softmax(z) - Y) / N),
        "sigmoid": (
            keras.losses.BinaryCrossentropy(),
            (sigmoid(z) - Y) / (3 * N),
        ),
        "logits": (keras.losses.MeanSquaredError(), 2 * (z - Y) / (3 * N)),
    }[head.split()[0]]
    b = maps(model, "out")
    d2 = (e @ b["h2"]) * (a2 > 0)
    d1 = (e @ b["h1"]) * (a1 > 0)
    return {
        "out/kernel": h2.T @ e,
        "out/bias": e.sum(0),
        "h2/kernel": h1.T @ d2,
        "h2/bias": d2.sum(0),
        "h1/kernel": X.T @ d1,
        "h1/bias": d1.sum(0),
    }, loss


@pytest.mark.parametrize("head", HEADS)
def test_dfa_mlp_by_hand(head: str) -> None:
    stock = mlp(head)
    model = convert(stock, "dfa")
    assert np.array_equal(model(X), stock(X))
    expected, loss = mlp_by_hand(model, head)
    ours = gradients(model, X, Y, loss)
    assert set(ours) == set(expected)
    check(ours, expected)
    hidden = gradients(to_backprop(model), X, Y, loss)["h1/kernel"]
    assert not np.allclose(hidden, ours["h1/kernel"], atol=1e-4)


@pytest.mark.parametrize("eager", [True, False])
def test_dfa_in_fit(eager: bool) -> None:
    model = convert(mlp(), "dfa")
    expected, loss = mlp_by_hand(model, "softmax")
    before = {w.path: np.array(w) for w in model.trainable_weights}
    model.compile(keras.optimizers.SGD(0.5), loss, run_eagerly=eager)
    model.fit(X, Y, batch_size=N, verbose=0)
    check(
        {w.path: (before[w.path] - w) / 0.5 for w in model.trainable_weights},
        expected,
        rtol=1e-3,
    )


def test_dfa_with_normalization_and_dropout_by_hand() -> None:
    start = keras.Input((4,))
    x = layers.Dense(6, use_bias=False, name="h1")(start)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dropout(0.4, seed=4, name="drop")(x)
    x = layers.Dense(5, activation="tanh", name="h2")(x)
    stock = keras.Model(start, layers.Dense(3, name="out")(x))
    gamma = RNG.normal(size=6).astype("float32")
    stock.get_layer("norm").gamma.assign(gamma)
    model = convert(stock, "dfa")

    # In the scope nothing moves: the same masks and statistics again.
    probe = keras.Model(
        model.inputs,
        [model.outputs[0]]
        + [model.get_layer(name).output for name in ("relu", "drop")],
    )
    with keras.StatelessScope():
        _, kept, dropped = map(np.array, probe(X, training=True))
    ours = gradients(model, X, Y, keras.losses.MeanSquaredError())
    mask = np.where(kept > 0, dropped / np.maximum(kept, 1e-9), 0.0)
    assert set(np.unique(mask.round(1).astype(str))) == {"0.0", "1.7"}

    w1 = np.array(model.get_layer("h1").kernel)
    (w2, b2), (w3, b3) = parameters(model, "h2"), parameters(model, "out")
    a = X @ w1
    deviation = np.sqrt(a.var(0) + 1e-3)
    normed = (a - a.mean(0)) / deviation
    n = gamma * normed
    d = np.maximum(n, 0) * mask
    h2 = np.tanh(d @ w2 + b2)
    e = 2 * (h2 @ w3 + b3 - Y) / (3 * N)
    b = maps(model, "out")
    e2 = (e @ b["h2"]) * (1 - h2**2)
    at_gamma = (e @ b["h1"]) * mask * (n > 0)
    below = gamma * at_gamma
    below = below - below.mean(0) - normed * (below * normed).mean(0)
    check(
        ours,
        {
            "out/kernel": h2.T @ e,
            "h2/kernel": d.T @ e2,
            "h2/bias": e2.sum(0),
            "norm/gamma": (at_gamma * normed).sum(0),
            "norm/beta": at_gamma.sum(0),
            "h1/kernel": X.T @ (below / deviation),
        },
    )


def test_dfa_shared_layer_called_twice() -> None:
    start = keras.Input((4,))
    shared = layers.Dense(4, activation="relu", name="shared")
    stock = keras.Model(
        start, layers.Dense(3, name="out")(shared(shared(start)))
    )
    model = convert(stock, "dfa")
    w, bias = parameters(model, "shared")
    w3, b3 = parameters(model, "out")
    a1 = X @ w + bias
    h1 = np.maximum(a1, 0)
    a2 = h1 @ w + bias
    h2 = np.maximum(a2, 0)
    e = 2 * (h2 @ w3 + b3 - Y) / (3 * N)
    b = maps(model, "out")
    assert list(b) == ["shared", "shared_1"]
    d1 = (e @ b["shared"]) * (a1 > 0)
    d2 = (e @ b["shared_1"]) * (a2 > 0)
    check(
        gradients(model, X, Y, keras.losses.MeanSquaredError()),
        {
            "out/kernel": h2.T @ e,
            "shared/kernel": X.T @ d1 + h1.T @ d2,
            "shared/bias": d1.sum(0) + d2.sum(0),
        },
    )


def deep(head: str = "softmax fused") -> keras.Model:
    """Three hidden layers, the second one with its activation apart."""
    start = keras.Input((4,))
    x = layers.Dense(6, activation="relu", name="h1")(start)
    x = layers.Dense(5, name="h2")(x)
    x = layers.Activation("tanh", name="act2")(x)
    x = layers.Dense(7, activation="tanh", name="h3")(x)
    return keras.Model(start, _head(x, head))


def dense_fa_by_hand(model: keras.Model) -> Arrays:
    """The DenseFA gradients of `deep` under crossentropy."""
    names = ("h1", "h2", "h3", "out")
    w, bias = zip(*(parameters(model, name) for name in names))
    b = [np.sign(k) * np.linalg.norm(k) / np.sqrt(k.size) for k in w]
    a1 = X @ w[0] + bias[0]
    h1 = np.maximum(a1, 0)
    h2 = np.tanh(h1 @ w[1] + bias[1])
    h3 = np.tanh(h2 @ w[2] + bias[2])
    d4 = (softmax(h3 @ w[3] + bias[3]) - Y) / N
    d3 = (d4 @ b[3].T) * (1 - h3**2)
    from_out, from_h3 = maps(model, "out"), maps(model, "h3")
    assert set(from_out) == {"h1", "h2"}
    assert set(from_h3) == {"h1"}
    d2 = (d3 @ b[2].T + d4 @ from_out["h2"]) * (1 - h2**2)
    d1 = d2 @ b[1].T + d3 @ from_h3["h1"] + d4 @ from_out["h1"]
    d1 = d1 * (a1 > 0)
    below = {"h1": (X, d1), "h2": (h1, d2), "h3": (h2, d3), "out": (h3, d4)}
    return {
        **{f"{name}/kernel": x.T @ d for name, (x, d) in below.items()},
        **{f"{name}/bias": d.sum(0) for name, (_, d) in below.items()},
    }


@pytest.mark.parametrize("head", [h for h in HEADS if "softmax" in h])
def test_dense_fa_by_hand(head: str) -> None:
    stock = deep(head)
    model = convert(stock, "dense_fa")
    assert np.array_equal(model(X), stock(X))
    # Small maps would hide behind the chain: make them count.
    for layer in model.layers:
        if isinstance(layer, SendError):
            for matrix in layer.maps:
                matrix.assign(10.0 * matrix)
    ours = gradients(model, X, Y, CROSSENTROPY)
    expected = dense_fa_by_hand(model)
    assert set(ours) == set(expected)
    check(ours, expected)


def test_dense_fa_over_skip_connections() -> None:
    start = keras.Input((4,))
    x = layers.Dense(4, name="stem")(start)
    y = layers.Dense(4, activation="relu", name="a")(x)
    y = layers.Dense(4, name="b")(y)
    x = layers.Add()([x, y])
    model = convert(
        keras.Model(start, layers.Dense(3, name="out")(x)), "dense_fa"
    )
    # Just above the stem: a, and out over the skip. Further: b.
    assert set(maps(model, "b")) == {"stem"}
    assert set(maps(model, "out")) == {"a"}
    assert sum(isinstance(a, SendError) for a in model.layers) == 2


# Convolutional maps ---------------------------------------------------------

# Form, source, receiver (both per example), the kernel's shape.
MAPS = [
    ("dense", (3,), (7,), (3, 7)),
    ("dense", (3,), (4, 5, 2), (3, 40)),
    ("dense", (2, 3, 4), (6, 5), (24, 30)),
    ("convolutional", (3,), (7,), (3, 7)),
    ("convolutional", (2, 3, 4), (7,), (24, 7)),
    ("convolutional", (3,), (8, 6, 5), (4, 4, 3, 5)),
    ("convolutional", (3,), (3, 9, 2), (3, 4, 3, 2)),
    ("convolutional", (3,), (6, 5), (4, 3, 5)),
    ("convolutional", (3,), (5, 2, 6, 2), (4, 2, 4, 3, 2)),
    ("convolutional", (2, 3, 4), (6, 5), (4, 24, 5)),
    ("convolutional", (1, 1, 4), (6, 5, 2), (4, 4, 4, 2)),
    ("convolutional", (2, 3, 4), (6, 7, 5), (3, 3, 4, 5)),
    ("convolutional", (4, 4, 2), (4, 4, 3), (3, 3, 2, 3)),
    ("convolutional", (7, 4), (3, 2), (3, 4, 2)),
    ("convolutional", (5, 4), (9, 2), (3, 4, 2)),
    ("convolutional", (2, 1, 3, 2), (4, 3, 6, 3), (3, 3, 3, 2, 3)),
]


@pytest.mark.parametrize(("form", "source", "receiver", "kernel"), MAPS)
def test_received_error_by_hand(
    form: str, source: tuple, receiver: tuple, kernel: tuple
) -> None:
    send = SendError(["receiver"], feedback_maps=form)
    x, h = np.ones((N, *source), "float32"), np.ones((N, *receiver), "float32")
    e = RNG.normal(size=x.shape).astype("float32")
    y, errors, _ = backends.vjp(send, lambda x, h: send([x, h]), [x, h], e)
    (matrix,) = send.maps
    assert matrix.shape == kernel
    assert np.array_equal(y, x)
    assert np.array_equal(errors[0], e)
    wanted = received(e, np.array(matrix), receiver)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(errors[1], wanted, rtol=1e-4, atol=1e-5)


def test_kernel_and_grid_of_other_sizes() -> None:
    shapes = [(N, 4, 5, 2), (N, 8, 8, 3)]
    vector = (N, 6)
    for kernel_size, grid_size, source, kernel in (
        (1, 4, shapes[0], (1, 1, 2, 3)),
        (5, 4, shapes[0], (5, 5, 2, 3)),
        (3, 1, vector, (1, 1, 6, 3)),
        (3, 9, vector, (8, 8, 6, 3)),
    ):
        send = SendError(
            ["receiver"],
            feedback_maps="convolutional",
            kernel_size=kernel_size,
            grid_size=grid_size,
        )
        inputs = [np.ones(source, "float32"), np.ones(shapes[1], "float32")]
        e = RNG.normal(size=source).astype("float32")
        _, (_, error), _ = backends.vjp(
            send, lambda *inputs, send=send: send(inputs), inputs, e
        )
        (matrix,) = send.maps
        assert matrix.shape == kernel
        wanted = received(e, np.array(matrix), shapes[1][1:])
        np.testing.assert_allclose(error, wanted, rtol=1e-4, atol=1e-5)


def test_errors_have_the_dtypes_of_what_receives_them() -> None:
    send = SendError(["a", "b"], feedback_maps="convolutional")
    inputs = [
        ops.cast(np.ones((N, 4, 4, 2)), "bfloat16"),
        ops.ones((N, 8, 8, 3)),
        ops.cast(np.ones((N, 6)), "float16"),
    ]
    _, errors, _ = backends.vjp(send, lambda *x: send(x), inputs)
    dtypes = [keras.backend.standardize_dtype(e.dtype) for e in errors]
    assert dtypes == ["bfloat16", "float32", "float16"]
    assert all(matrix.dtype == "float32" for matrix in send.maps)


@pytest.mark.parametrize(
    ("form", "source", "receiver", "wanted"),
    [
        ("dense", (8, 8, 4), (16, 16, 6), 2 * 1536 / (256 + 1536)),
        ("convolutional", (8, 8, 48), (16, 16, 96), 2 * 96 / 144 * 22**2 / 576),
        ("convolutional", (48,), (16, 16, 96), 2 * 96 / 144),
        (
            "convolutional",
            (16, 16, 96),
            (8, 8, 48),
            2 * 48 / 144 * 46**2 / 48**2,
        ),
    ],
)
def test_what_the_law_gives(
    form: str, source: tuple, receiver: tuple, wanted: float
) -> None:
    """`||M e||^2 / ||e||^2` under Glorot's law, less what borders lose."""
    send = SendError(["receiver"], feedback_maps=form)
    inputs = [np.ones((20, *shape), "float32") for shape in (source, receiver)]
    e = RNG.normal(size=inputs[0].shape)
    _, (_, error), _ = backends.vjp(send, lambda *x: send(x), inputs, e)
    ratio = np.sum(backends.array(error) ** 2) / np.sum(np.square(e))
    np.testing.assert_allclose(ratio, wanted, rtol=0.05)


def convnet() -> keras.Model:
    """Three convolutions on two resolutions."""
    start = keras.Input((8, 8, 3))
    x = _conv("conv1", activation="relu")(start)
    x = layers.Conv2D(
        5, 3, strides=2, padding="same", activation="relu", name="conv2"
    )(x)
    x = _conv("conv3", activation="relu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(start, _head(x, "softmax fused"))


# The chain as in backpropagation, so that stock ops can follow it.
DENSE_FA_ON_BP = dataclasses.replace(
    METHODS["dense_fa"],
    feedback_initializer=None,
    feedback_constraint=TiedKernel(),
    map_initializer="glorot_uniform",  # to count beside the chain
    callback_classes=(),
)


def convnet_by_hand(model: keras.Model, direct: bool) -> Arrays:
    """The gradients of `convnet` under DFA or `DENSE_FA_ON_BP`."""
    names = ("conv1", "conv2", "conv3")
    w = [np.array(model.get_layer(name).kernel) for name in names]
    w_out, b_out = parameters(model, "out")

    def convolve(x: Any, kernel: Any, strides: int) -> Any:
        return ops.conv(x, kernel, strides, "same")

    def below(index: int, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The errors of a convolution's input and kernel."""
        _, errors, _ = backends.vjp(
            None,
            lambda x, kernel: convolve(x, kernel, 1 + (index == 1)),
            [inputs[index], w[index]],
            e,
        )
        return tuple(map(np.array, errors))

    inputs = [IMAGES]
    for index, kernel in enumerate(w):
        a = np.array(convolve(inputs[-1], kernel, 1 + (index == 1)))
        inputs.append(np.maximum(a, 0))
    h1, h2, h3 = inputs[1:]
    flat = h3.reshape(N, -1)
    e = (softmax(flat @ w_out + b_out) - Y) / N
    from_out = maps(model, "out")
    if direct:
        d3, d2, d1 = (
            received(e, from_out[name], h.shape[1:]) * (h > 0)
            for name, h in zip(names[::-1], (h3, h2, h1))
        )
    else:
        assert set(from_out) == {"conv1", "conv2"}
        (from_conv3,) = maps(model, "conv3").values()
        assert from_conv3.shape == (3, 3, 4, 4)
        d3 = (e @ w_out.T).reshape(h3.shape) * (h3 > 0)
        d2 = below(2, d3)[0] + received(e, from_out["conv2"], h2.shape[1:])
        d2 *= h2 > 0
        d1 = below(1, d2)[0] + received(d3, from_conv3, h1.shape[1:])
        d1 = (d1 + received(e, from_out["conv1"], h1.shape[1:])) * (h1 > 0)
    wanted = {"out/kernel": flat.T @ e, "out/bias": e.sum(0)}
    for index, d in enumerate((d1, d2, d3)):
        wanted[f"conv{index + 1}/kernel"] = below(index, d)[1]
        wanted[f"conv{index + 1}/bias"] = d.sum((0, 1, 2))
    return wanted


@pytest.mark.parametrize("method", ["dfa", DENSE_FA_ON_BP])
def test_convnet_by_hand(method: Any, tmp_path: Path) -> None:
    stock = convnet()
    model = convert(stock, method, feedback_maps="convolutional")
    assert np.array_equal(model(IMAGES), stock(IMAGES))
    expected = convnet_by_hand(model, method == "dfa")
    ours = gradients(model, IMAGES, Y, CROSSENTROPY)
    assert set(ours) == set(expected)
    check(ours, expected)
    # And again, from a file.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    check(gradients(loaded, IMAGES, Y, CROSSENTROPY), expected)
    # Both ways back.
    exact = gradients(stock, IMAGES, Y, CROSSENTROPY)
    assert not np.allclose(ours["conv1/kernel"], exact["conv1/kernel"])
    with backpropagation():
        check(gradients(model, IMAGES, Y, CROSSENTROPY), exact)
    plain = to_backprop(loaded)
    assert not any(isinstance(a, SendError | StopError) for a in plain.layers)
    check(gradients(plain, IMAGES, Y, CROSSENTROPY), exact)


@pytest.mark.parametrize("method", ["dfa", DENSE_FA_ON_BP])
@pytest.mark.parametrize("eager", [True, False])
def test_convnet_in_fit(method: Any, eager: bool) -> None:
    model = convert(convnet(), method, feedback_maps="convolutional")
    expected = convnet_by_hand(model, method == "dfa")
    before = {w.path: np.array(w) for w in model.trainable_weights}
    model.compile(keras.optimizers.SGD(0.5), CROSSENTROPY, run_eagerly=eager)
    model.fit(IMAGES, Y, batch_size=N, verbose=0)
    check(
        {w.path: (before[w.path] - w) / 0.5 for w in model.trainable_weights},
        expected,
        rtol=1e-3,
    )


# Taps ----------------------------------------------------------------------


def _conv(name: str, **kwargs: object) -> layers.Conv2D:
    return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)


def _readout(x: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return layers.Dense(3, name="out")(x)


def _norm_relu_pool(x: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.BatchNormalization(name="norm")(_conv("conv")(x))
    x = layers.ReLU(name="relu")(x)
    return _readout(layers.MaxPooling2D(name="pool")(x))


def _fused_pool(x: keras.KerasTensor) -> keras.KerasTensor:
    x = _conv("conv", activation="relu")(x)
    return _readout(layers.AveragePooling2D(2, name="pool")(x))


def _operation(x: keras.KerasTensor) -> keras.KerasTensor:
    x = ops.relu(_conv("conv")(x))
    x = ops.tanh(_conv("second")(x))
    return _readout(layers.MaxPooling2D(name="pool")(x))


def _branch(x: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.BatchNormalization(name="norm")(_conv("conv")(x))
    left = layers.Activation("tanh", name="left")(x)
    return _readout(layers.Multiply(name="join")([left, x]))


def _merge(x: keras.KerasTensor) -> keras.KerasTensor:
    stem = _conv("stem", activation="relu")(x)
    x = layers.BatchNormalization(name="norm")(_conv("conv")(stem))
    x = layers.Add(name="add")([x, stem])
    return _readout(layers.ReLU(name="relu")(x))


def _all_convolutional(x: keras.KerasTensor) -> keras.KerasTensor:
    x = layers.ReLU(name="relu")(_conv("conv")(x))
    x = layers.Conv2D(3, 1, activation="relu", name="last")(x)
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return layers.Activation("softmax", name="probabilities")(x)


def _preactivation(x: keras.KerasTensor) -> keras.KerasTensor:
    x = _conv("stem")(x)
    for block in "ab":
        y = layers.BatchNormalization(name=f"{block}_norm1")(x)
        y = layers.ReLU(name=f"{block}_relu1")(y)
        y = _conv(f"{block}_conv1")(y)
        y = layers.BatchNormalization(name=f"{block}_norm2")(y)
        y = layers.ReLU(name=f"{block}_relu2")(y)
        y = _conv(f"{block}_conv2")(y)
        x = layers.Add(name=f"{block}_add")([x, y])
    return _readout(layers.ReLU(name="relu")(x))


# Body, where e is taken, and the tap of each hidden kernel layer.
NETS = {
    "norm, relu, pool": (_norm_relu_pool, "out", {"conv": "relu"}),
    "fused relu, pool": (_fused_pool, "out", {"conv": "conv"}),
    "operation": (_operation, "out", {"conv": "relu", "second": "tanh"}),
    "branch": (_branch, "out", {"conv": "norm"}),
    "merge": (_merge, "out", {"stem": "stem", "conv": "norm"}),
    "all convolutional": (_all_convolutional, "gap", {"conv": "relu"}),
    "preactivation": (
        _preactivation,
        "out",
        {
            "stem": "stem",
            "a_conv1": "a_relu2",
            "a_conv2": "a_conv2",
            "b_conv1": "b_relu2",
            "b_conv2": "b_conv2",
        },
    ),
}


def _operation_output(model: keras.Model, name: str) -> keras.KerasTensor:
    """The output of a layer, or of the operation of that kind."""
    for node in model.operations:
        if node.name == name or type(node).__name__.lower() == name:
            return node.output
    raise KeyError(name)


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, "dense") for kind in NETS]
    + [(kind, "convolutional") for kind in ("operation", "all convolutional")],
)
def test_dfa_taps(kind: str, form: str) -> None:
    """Every hidden layer alone, with what it receives injected at its tap.

    No error may come from anywhere else: not over skips, not from above.
    """
    body, source, taps = NETS[kind]
    keras.backend.clear_session(free_memory=False)  # names alone
    start = keras.Input((8, 8, 3))
    model = convert(keras.Model(start, body(start)), "dfa", feedback_maps=form)
    plain = to_backprop(model)
    logits = keras.Model(plain.inputs, _operation_output(plain, source))
    z = logits(IMAGES, training=True)
    softmaxed = source == "gap"
    loss = CROSSENTROPY if softmaxed else keras.losses.MeanSquaredError()
    _, (e,), _ = backends.vjp(
        None, lambda z: loss(Y, ops.softmax(z) if softmaxed else z), [z]
    )
    e = np.array(e)
    b = maps(model, source)
    assert set(b) == set(taps)

    ours = gradients(model, IMAGES, Y, loss)
    for name, tap in taps.items():
        layer = plain.get_layer(name)
        below = keras.Model(plain.inputs, layer.input)
        piece = keras.Model(layer.input, _operation_output(plain, tap))
        shape = piece.output_shape[1:]
        if form == "dense":
            assert b[name].shape == (3, np.prod(shape))
        _, _, grads = backends.vjp(
            piece,
            lambda x, piece=piece: piece(x, training=True),
            [below(IMAGES, training=True)],
            received(e, b[name], shape),
        )
        weights = piece.trainable_weights
        # A convolution's bias below a normalization has no gradient.
        normed = any("norm" in weight.path for weight in weights)
        check(
            ours,
            {
                weight.path: np.array(grad)
                for weight, grad in zip(weights, grads)
                if not (normed and weight.name == "bias")
            },
        )
    exact = gradients(plain, IMAGES, Y, loss)
    readout = "last" if softmaxed else "out"
    path = f"{readout}/kernel"
    np.testing.assert_allclose(ours[path], exact[path], rtol=1e-4, atol=1e-6)


def test_dfa_does_not_depend_on_the_weights_above() -> None:
    def linear(y: Any, z: Any) -> Any:
        return ops.sum(z * ops.array(Y))  # so that e is Y whatever the weights

    model = convert(mlp("logits"), "dfa")
    plain = to_backprop(model)
    before = gradients(model, X, Y, linear)["h1/kernel"]
    backpropagated = gradients(plain, X, Y, linear)["h1/kernel"]
    for each in (model, plain):
        for name in ("h2", "out"):
            kernel = each.get_layer(name).kernel
            kernel.assign(-3.0 * kernel)
    after = gradients(model, X, Y, linear)["h1/kernel"]
    assert np.array_equal(after, before)
    changed = gradients(plain, X, Y, linear)["h1/kernel"]
    assert not np.allclose(changed, backpropagated)


# Maps ----------------------------------------------------------------------


def _all_maps(model: keras.Model) -> list[keras.Variable]:
    return [
        matrix
        for layer in model.layers
        if isinstance(layer, SendError)
        for matrix in layer.maps
    ]


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_bytes_are_logged_before_allocation(
    method: str,
    form: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = keras.Input((8, 8, 3))
    stock = keras.Model(start, _preactivation(start))
    caplog.set_level(logging.INFO, "keras_fa")
    model = convert(stock, method, feedback_maps=form)
    (record,) = (r for r in caplog.records if r.name == "keras_fa")
    match = re.search(r"(\d+) fixed.*need ([\d,]+) bytes", record.getMessage())
    found = _all_maps(model)
    assert int(match[1]) == len(found)
    said = int(match[2].replace(",", ""))
    assert said == sum(np.array(matrix).nbytes for matrix in found) > 0

    def no_memory(*args: object) -> None:
        raise MemoryError

    caplog.clear()
    monkeypatch.setattr(SendError, "build", no_memory)
    with pytest.raises(MemoryError):
        convert(stock, method, feedback_maps=form)
    assert "bytes" in caplog.text


def _bytes_of_maps(model: keras.Model) -> int:
    return sum(np.array(matrix).nbytes for matrix in _all_maps(model))


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_maps_that_do_not_fit_name_their_bytes_and_those_of_others(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = keras.Input((8, 8, 3))
    stock = keras.Model(start, _preactivation(start))
    dense, convolutional = (
        f"{_bytes_of_maps(convert(stock, method, feedback_maps=form)):,} bytes"
        for form in ("dense", "convolutional")
    )

    def build(*args: object) -> None:
        raise AssertionError("maps are made")

    monkeypatch.setattr(SendError, "build", build)
    monkeypatch.setattr(conversion, "_machine_memory", lambda: 100)
    with pytest.raises(ValueError, match="for example 'fa_usf_sn'") as refusal:
        convert(stock, method)
    assert f"need {dense}" in str(refusal.value)
    alternative = (
        f"Use feedback_maps='convolutional', which needs {convolutional}"
    )
    assert alternative in str(refusal.value)
    with pytest.raises(ValueError, match=r"MiB\. Use a smaller") as refusal:
        convert(stock, method, feedback_maps="convolutional")
    assert f"need {convolutional}" in str(refusal.value)


def test_a_map_fits_only_if_it_fits_while_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [np.array(b).nbytes for b in _all_maps(convert(mlp(), "dfa"))]
    peak = sum(sizes) + max(sizes)
    monkeypatch.setattr(conversion, "_machine_memory", lambda: peak)
    convert(mlp(), "dfa")
    monkeypatch.setattr(conversion, "_machine_memory", lambda: peak - 1)
    with pytest.raises(ValueError, match="fixed random dense maps"):
        convert(mlp(), "dfa")


def test_what_maps_are_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "keras_fa")
    for method, kind in (
        ("dfa", "fixed random"),
        ("direct_kolen_pollack", "learned"),
    ):
        convert(mlp(), method)
        assert f" {kind} dense maps for model" in caplog.text
        caplog.clear()


def test_bytes_are_of_the_dtype_of_the_maps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    caplog.set_level(logging.INFO, "keras_fa")
    try:
        model = convert(mlp(), "dfa")
    finally:
        keras.config.set_dtype_policy(before)
    assert all(matrix.dtype == "bfloat16" for matrix in _all_maps(model))
    assert f"need {2 * 3 * (6 + 5)} bytes" in caplog.text


def _correlation(one: Any, other: Any) -> float:
    return abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1])


@pytest.mark.parametrize("form", ["dense", "convolutional"])
@pytest.mark.parametrize("seed", [None, 3])
def test_maps_of_one_law_differ(seed: int | None, form: str) -> None:
    """From one source and from several, and (with no seed) in each model."""
    method = dataclasses.replace(
        METHODS["dense_fa"],
        map_initializer=keras.initializers.GlorotUniform(seed=seed),
    )
    start = keras.Input((4, 6))
    x = start
    for name in ("h1", "h2", "h3"):
        x = layers.Conv1D(6, 3, padding="same", name=name)(x)
    x = layers.Conv1D(6, 3, padding="same", name="out")(x)
    stock = keras.Model(start, x)
    first, second = (
        [np.array(m) for m in _all_maps(convert(stock, method, None, (), form))]
        for _ in range(2)
    )
    assert len(first) == 3
    for index, one in enumerate(first):
        for other in first[:index]:
            assert _correlation(one, other) < 0.5
    for one, other in zip(first, second):
        assert np.array_equal(one, other) == (seed is not None)


def test_the_law_of_maps_is_the_methods() -> None:
    method = dataclasses.replace(METHODS["dfa"], map_initializer="ones")
    for matrix in _all_maps(convert(mlp(), method)):
        assert np.array_equal(matrix, np.ones(matrix.shape))
    for name, scale in (("dfa", 1.0), ("dense_fa", 0.01)):
        start = keras.Input((30,))
        x = layers.Dense(40, name="h1")(start)
        x = layers.Dense(50, name="h2")(x)
        stock = keras.Model(start, layers.Dense(60, name="out")(x))
        law = np.sqrt(scale * 6 / (60 + 40))
        for method in (
            METHODS[name],
            dataclasses.replace(METHODS[name], map_initializer=None),
        ):
            matrix = maps(convert(stock, method), "out")["h1"]
            wanted = law if method.map_initializer else np.sqrt(6 / 100)
            assert 0.95 * wanted < np.abs(matrix).max() <= 1.0001 * wanted


def test_a_generator_as_seed_moves_on() -> None:
    generator = keras.random.SeedGenerator(3)
    method = dataclasses.replace(
        METHODS["fa"],
        feedback_initializer=keras.initializers.HeNormal(seed=generator),
    )
    x = start = keras.Input((8,))
    for name in ("h1", "h2"):
        x = layers.Dense(8, name=name)(x)
    model = convert(keras.Model(start, x), method)
    one, other = (model.get_layer(n).feedback_kernel for n in ("h1", "h2"))
    assert _correlation(one, other) < 0.5


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_maps_differ_and_stay(method: str) -> None:
    start = keras.Input((4,))
    x = start
    for name in ("h1", "h2", "h3"):
        x = layers.Dense(4, activation="relu", name=name)(x)
    model = convert(keras.Model(start, layers.Dense(4, name="out")(x)), method)
    found = _all_maps(model)
    before = [np.array(matrix) for matrix in found]
    assert len(found) == 3
    for index, one in enumerate(before):
        assert one.shape == (4, 4)
        for other in before[:index]:
            assert _correlation(one, other) < 0.8
    assert not any(matrix.trainable for matrix in found)
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.fit(X, X, verbose=0, callbacks=METHODS[method].callbacks())
    for one, other in zip(before, found):
        assert np.array_equal(one, other)


def test_seeded_maps_differ() -> None:
    law = keras.initializers.GlorotUniform(seed=3)
    send = SendError(["a", "b"], law)
    send.build([(None, 3), (None, 5), (None, 5)])
    first, second = send.maps
    assert _correlation(first, second) < 0.8


def test_number_of_receivers_is_checked() -> None:
    with pytest.raises(ValueError, match=r"2 names.*Received: 1"):
        SendError(["a", "b"])([np.ones((2, 3)), np.ones((2, 3))])


# Elsewhere -----------------------------------------------------------------


def _of_form(form: str) -> tuple[Callable, np.ndarray]:
    return (deep, X) if form == "dense" else (convnet, IMAGES)


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_mixed_precision_gradients(method: str, form: str) -> None:
    build, x = _of_form(form)
    full = convert(build(), method, feedback_maps=form)
    expected = gradients(full, x, Y, CROSSENTROPY)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = convert(build(), method, feedback_maps=form)
    finally:
        keras.config.set_dtype_policy(before)
    model.set_weights(full.get_weights())
    ours = gradients(model, x, Y, CROSSENTROPY)
    for name, wanted in expected.items():
        norms = np.linalg.norm(wanted) * np.linalg.norm(ours[name])
        assert np.vdot(ours[name], wanted) / norms > 0.98, name
        assert ours[name].dtype == "float32"


@pytest.mark.parametrize(
    ("method", "form"), [("dfa", "convolutional"), ("dense_fa", "dense")]
)
def test_two_replicas_are_one_device(
    method: str, form: str, strategy: Any
) -> None:
    build, x = _of_form(form)
    x, y = np.concatenate([x] * 4)[:16], np.concatenate([Y] * 4)[:16]

    def fitted() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = convert(build(), method, feedback_maps=form)
        model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
        model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=METHODS[method].callbacks(),
        )
        return model

    one = fitted()
    with strategy.scope():
        two = fitted()
    for a, b in zip(one.weights, two.weights):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_no_hidden_layer_is_backpropagation(method: str) -> None:
    start = keras.Input((4,))
    stock = keras.Model(start, layers.Dense(3, name="out")(start))
    model = convert(stock, method)
    kinds = {type(layer) for layer in model.layers}
    assert not kinds & {SendError, StopError}
    mse = keras.losses.MeanSquaredError()
    check(gradients(model, X, Y, mse), gradients(stock, X, Y, mse), 1e-5)


# Refusals ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
@pytest.mark.parametrize("form", ["sparse", "Dense", None, ["dense"]])
def test_unknown_maps_are_refused(
    method: str, form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    message = f"'dense' or 'convolutional'.*{re.escape(repr(form))}"
    with pytest.raises(ValueError, match=message):
        convert(mlp(), method, feedback_maps=form)
    assert "bytes" not in caplog.text  # of maps that there are not
    with pytest.raises(ValueError, match=message):
        SendError(["a"], feedback_maps=form)


@pytest.mark.parametrize("name", ["kernel_size", "grid_size"])
@pytest.mark.parametrize("size", [0, -1, 1.5, (3, 3), None])
def test_sizes_of_kernels_are_checked(name: str, size: Any) -> None:
    message = rf"`{name}`.*positive integer.*{re.escape(repr(size))}"
    with pytest.raises(ValueError, match=message):
        SendError(["a"], **{name: size})


@pytest.mark.parametrize("method", ["bp", "fa", "fa_usf_sn"])
def test_maps_of_a_chained_method_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"DFA and DenseFA.*'{method}'"):
        convert(mlp(), method, feedback_maps="convolutional")


def test_channels_first_is_refused_by_name() -> None:
    stock = keras.Sequential(
        [
            keras.Input((3, 8, 8)),
            layers.Conv2D(4, 3, data_format="channels_first", name="c1"),
            layers.Flatten(),
            layers.Dense(3, name="out"),
        ]
    )
    with pytest.raises(ValueError, match=r"channels_last.*layers c1 .*'dense'"):
        convert(stock, "dfa", feedback_maps="convolutional")
    assert maps(convert(stock, "dfa"), "out")["c1"].shape == (3, 4 * 6 * 6)


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_unknown_size_is_refused(method: str) -> None:
    start = keras.Input((None, None, 3))
    stock = keras.Model(start, _preactivation(start))
    with pytest.raises(ValueError, match=r"static shapes.*None.*fixed size"):
        convert(stock, method)


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_several_outputs_are_refused(method: str) -> None:
    start = keras.Input((4,))
    x = layers.Dense(5)(start)
    stock = keras.Model(start, [layers.Dense(3)(x), layers.Dense(2)(x)])
    with pytest.raises(ValueError, match=r"one output.*2 outputs"):
        convert(stock, method)


def test_names_that_are_taken() -> None:
    start = keras.Input((4,))
    x = layers.Dense(5, activation="relu", name="h")(start)
    x = layers.Dense(5, name="h_stop_error")(x)
    x = layers.ReLU(name="out_activation")(x)
    x = layers.Dropout(0.0, name="out_send_error")(x)
    stock = keras.Model(
        start, layers.Dense(3, activation="softmax", name="out")(x)
    )
    model = convert(stock, "dfa")
    assert np.array_equal(model(X), stock(X))
    assert sum(isinstance(a, StopError) for a in model.layers) == 2


# What a wired model keeps of its layers --------------------------------------


def masked(activation: str) -> keras.Model:
    """A net on masked sequences whose readout has an activity penalty."""
    start = keras.Input((5,))
    x = layers.Embedding(10, 4, mask_zero=True)(start)
    x = layers.Dense(6, activation="relu", name="a")(x)
    x = layers.Dense(5, activation="relu", name="b")(x)
    penalty = keras.regularizers.L1(1.0)
    readout = layers.Dense(
        3, activation, activity_regularizer=penalty, name="c"
    )
    return keras.Model(start, readout(x))


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_masks_and_activity_penalties_stay(method: str) -> None:
    stock = masked("softmax")
    x = RNG.integers(0, 3, (N, 5))
    y = RNG.normal(size=(N, 5, 3)).astype("float32")
    losses = []
    converted = convert(stock, method)
    for model in (stock, converted, to_backprop(converted)):
        model.compile("sgd", "mse", run_eagerly=True)
        losses.append(model.evaluate(x, y, verbose=0))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_dfa_sends_the_error_of_other_outputs(activation: str) -> None:
    """Fused or not, e is that of the output where it is no probability."""
    start = keras.Input((4,))
    hidden = layers.Dense(6, name="a")(start)
    fused = keras.Model(start, layers.Dense(3, activation, name="c")(hidden))
    apart = layers.Dense(3, name="c")(hidden)
    apart = layers.Activation(activation, name="act")(apart)
    apart = keras.Model(start, apart)
    apart.set_weights(fused.get_weights())
    models = [convert(model, "dfa") for model in (fused, apart)]
    (send,) = (x for x in models[0].layers if isinstance(x, SendError))
    (other,) = (x for x in models[1].layers if isinstance(x, SendError))
    other.maps[0].assign(send.maps[0])
    mse = keras.losses.MeanSquaredError()
    ours, theirs = (gradients(model, X, Y, mse) for model in models)
    check(ours, {"a/kernel": theirs["a/kernel"]})


# The recording -------------------------------------------------------------


def _shared() -> keras.Model:
    start = keras.Input((4,))
    shared = layers.Dense(4, activation="relu", name="shared")
    x = layers.Add()([shared(start), shared(shared(start))])
    return keras.Model(start, layers.Dense(3, name="out")(ops.tanh(x)))


def _two_inputs() -> keras.Model:
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="b")
    x = layers.Dense(4, name="h")(left)
    x = layers.Multiply()([x, right, x])
    x = ops.where(x > 0, x, right)
    return keras.Model({"left": left, "b": right}, layers.Dense(3)(x))


def _keywords() -> keras.Model:
    start, other = keras.Input((5, 4)), keras.Input((5, 4))
    x = layers.Dense(4, name="h")(start)
    x = layers.MultiHeadAttention(1, 4, name="odd")(x, value=other, key=x)
    return keras.Model([start, other], layers.Dense(3)(x))


def _part_of_another() -> keras.Model:
    """Layers that other models call, too."""
    start = keras.Input((4,))
    first, second = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    keras.Model(start, second(first(start)))
    other = keras.Input((4,))
    first(second(other))
    x = second(layers.ReLU()(second(other)))
    return keras.Model(other, layers.Dense(3, name="out")(first(x)))


def _masked() -> keras.Model:
    return masked("softmax")


def _several_outputs() -> keras.Model:
    # "auto" adds up in another order than the cell on PyTorch.
    x, h, c = layers.LSTM(4, return_state=True, use_cudnn=False, name="odd")(
        start := keras.Input((5, 4))
    )
    x, h = layers.Dense(4, name="a")(x), layers.Dense(4, name="b")(h)
    return keras.Model(start, layers.Dense(3)(layers.Add()([c, x, h])))


def _transformer() -> keras.Model:
    """A Vision Transformer written with functions."""
    start = keras.Input((8, 8, 3))
    x = ops.image.extract_patches(start, 4)
    x = layers.Dense(4, name="project")(ops.reshape(x, (-1, 4, 48)))
    x = x + ops.reshape(ops.arange(16, dtype="float32"), (4, 4)) / 16
    y = layers.LayerNormalization(name="norm")(x)
    x = x + layers.MultiHeadAttention(2, 2, name="odd")(y, y)
    y = layers.Dense(8, activation="gelu", name="wide")(ops.normalize(x))
    x = x + layers.Dense(4, name="narrow")(y)
    x = keras.activations.relu(ops.mean(x, axis=1))
    return keras.Model(start, layers.Dense(3, name="out")(x))


RECORDED = [
    _shared,
    _two_inputs,
    _keywords,
    _part_of_another,
    _masked,
    _several_outputs,
    _transformer,
    lambda: mlp("softmax operation"),
]


def _examples(model: keras.Model) -> list[np.ndarray] | dict | np.ndarray:
    return keras.tree.map_structure(
        lambda x: (
            RNG.integers(0, 3, (N, *x.shape[1:]))
            if x.dtype == "int32"
            else RNG.normal(size=(N, *x.shape[1:])).astype("float32")
        ),
        model.input,
    )


def _calls_of(model: keras.Model) -> dict[str, int]:
    """How many calls each operation has recorded, of this and other models."""
    return {o.name: len(o._inbound_nodes) for o in model.operations}


@pytest.mark.parametrize("build", RECORDED)
def test_node_i_is_call_i_of_a_clone(
    build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    calls = _calls_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(layers.Layer, "add_weight", None)  # none is made
        graph = Graph(model, lambda operation: False)
    assert _calls_of(model) == calls
    originals, made, tensors = {}, [], {}

    def clone(layer: Any) -> Any:
        new = type(layer).from_config(layer.get_config())
        originals[new] = layer
        return new

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        given = [
            tensors.get(id(value))
            for value in keras.tree.flatten((args, kwargs))
            if isinstance(value, keras.KerasTensor)
        ]
        outputs = layer(*args, **kwargs)
        node = graph.nodes[len(made)]
        made.append((outputs, args, kwargs))  # so that no id is used again
        for tensor in keras.tree.flatten(outputs):
            tensors[id(tensor)] = node
        assert node.operation is originals[layer]
        assert node.shape == getattr(outputs, "shape", None)
        parents = [p if p.operation else None for p in node.parents]
        assert parents == given
        return outputs

    keras.models.clone_model(model, clone_function=clone, call_function=call)
    assert len(made) == len(graph.nodes)
    # A layer that is called again has another label.
    assert len({node.label for node in graph.nodes}) == len(graph.nodes)


@pytest.mark.parametrize("build", RECORDED)
@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_any_graph_is_wired(build: Callable, method: str) -> None:
    stock = build()
    x = _examples(stock)
    model = convert(stock, method)
    # PyTorch's stock LSTM adds up in another order than its cell.
    tolerance = 1e-6 if backends.ON_TORCH else 0.0
    for each in (model, to_backprop(model)):
        np.testing.assert_allclose(each(x), stock(x), rtol=0, atol=tolerance)
    assert _all_maps(model) or method == "dense_fa"  # two layers, no more
    eagerly = backends.ON_TENSORFLOW  # where a step takes longer to trace
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
    model.fit(x, np.ones(stock(x).shape), verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert not np.array_equal(model(x), stock(x))


@backends.requires_tensorflow
@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_layers_that_compute_in_another_precision(method: str) -> None:
    """Their output is told by a trace of the call, which casts."""
    import tensorflow as tf

    class Scaled(layers.Layer):
        def build(self, shape: tuple) -> None:
            self.scale = self.add_weight(shape=(shape[-1],))

        def call(self, inputs: Any) -> Any:
            return tf.multiply(inputs, self.scale)  # no dtypes are mixed

    policy = "mixed_bfloat16"
    start = keras.Input((4,))
    x = Scaled(dtype=policy)(layers.Dense(4, "relu", dtype=policy)(start))
    x = Scaled(dtype=policy)(layers.Dense(4, "relu", dtype=policy)(x))
    stock = keras.Model(start, layers.Dense(3, dtype=policy)(x))
    model = convert(stock, method)
    assert np.array_equal(model(X), stock(X))


# Each is one operation in a graph, of `keras.ops` or of `keras.activations`.
ACTIVATIONS = (
    "celu elu gelu hard_shrink hard_sigmoid hard_tanh leaky_relu log_sigmoid "
    "log_softmax relu relu6 selu sigmoid silu soft_shrink softmax softplus "
    "softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink"
).split()
PASSED = {
    **{f"activations.{n}": getattr(keras.activations, n) for n in ACTIVATIONS},
    **{f"ops.{n}": getattr(ops, n) for n in ACTIVATIONS},
    "ops.hard_silu": ops.hard_silu,
    "ops.sparsemax": ops.sparsemax,
    "layer": layers.Activation("mish"),
}
STOPPED = {
    "scaled": lambda x: 2 * x,
    "rolled": lambda x: ops.roll(x, 1, axis=-1),
    "product": lambda x: ops.matmul(x, np.eye(4, dtype="float32")),
    "normalized": ops.normalize,
    "square": ops.square,
    "sum": lambda x: ops.cumsum(x, axis=-1),
    "reshaped": lambda x: ops.reshape(x, (-1, 4)),
}


@pytest.mark.parametrize("name", [*PASSED, *STOPPED])
def test_taps_move_through_activations_alone(name: str) -> None:
    start = keras.Input((4,))
    dense = layers.Dense(4, name="h")
    x = {**PASSED, **STOPPED}[name](dense(start))
    model = keras.Model(start, layers.Dense(3)(x))
    graph = Graph(model, lambda o: isinstance(o, layers.Dense))
    (hidden,) = graph.hidden()
    assert hidden.operation is dense
    assert (graph.tap(hidden) is not hidden) == (name in PASSED)


@backends.requires_tensorflow
@pytest.mark.parametrize(("method", "form"), FORMS)
def test_a_checkpoint_of_tensorflow_brings_the_maps(
    method: str, form: str, tmp_path: Path
) -> None:
    import tensorflow as tf

    build, _ = _of_form(form)
    one, other = (convert(build(), method, None, (), form) for _ in range(2))
    path = tf.train.Checkpoint(one).save(str(tmp_path / "checkpoint"))
    assert not all(map(np.array_equal, _all_maps(one), _all_maps(other)))
    tf.train.Checkpoint(other).restore(path).assert_existing_objects_matched()
    assert len(_all_maps(one)) > 1
    assert all(map(np.array_equal, _all_maps(one), _all_maps(other)))
