"""Layers that are called once for each time step, and what is left as it is."""

from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import layers
from keras import ops

import keras_fa
from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.alignment import named_paths
from keras_fa.layers.feedback import feedback_layers

KINDS = {
    "dense": (lambda: layers.Dense(4, name="inner"), (5,)),
    "conv2d": (lambda: layers.Conv2D(2, 3, name="inner"), (4, 4, 2)),
}
STEPS = 3


def model_of(layer: keras.layers.Layer, shape: tuple) -> keras.Model:
    start = keras.Input((STEPS, *shape))
    return keras.Model(start, layers.TimeDistributed(layer, name="each")(start))


def kernel_of(model: keras.Model) -> keras.Variable:
    return model.get_layer("each").layer.kernel


def gradients(model: keras.Model, x: np.ndarray, compiled: bool) -> list:
    """dx, dW and db for an error of ones of its own at each output."""
    variables = model.get_layer("each").layer.trainable_variables

    def run(x: Any) -> tuple:
        def weighted(x: Any) -> Any:
            y = model(x)
            return y * ops.convert_to_tensor(references.normal(y.shape, 3))

        return backends.vjp(model, weighted, [x], None, variables)

    if compiled:
        run = backends.compiled(run, model.variables)
    _, (dx,), rest = run(ops.convert_to_tensor(x))
    return [array(value) for value in (dx, *rest)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """dx is the stock wrapper's with B for its kernel, dW that with W."""
    make, shape = KINDS[kind]
    x = references.normal((2, STEPS, *shape), 1)
    stock = model_of(make(), shape)
    model = convert(stock, "fa")
    inner = model.get_layer("each").layer
    assert isinstance(inner, keras_fa.FADense | keras_fa.FAConv2D)
    y = array(stock(x))
    np.testing.assert_array_equal(array(model(x)), y)
    _, *wanted = gradients(stock, x, False)
    kernel_of(stock).assign(inner.feedback_kernel)
    wanted.insert(0, gradients(stock, x, False)[0])
    for compiled in (False, True):
        for ours, theirs in zip(gradients(model, x, compiled), wanted):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W only where")
@pytest.mark.parametrize("method", ["kolen_pollack", "dfa"])
def test_in_a_model(method: str, tmp_path: Any) -> None:
    """Nested wrappers, masks; a file that keeps the classes."""
    start = keras.Input((STEPS, 4, 5))
    x = layers.Masking()(layers.Reshape((STEPS, 20))(start))
    inner = keras.Sequential([layers.Dense(4, name="inner")], name="nested")
    x = layers.TimeDistributed(inner, name="each")(x)
    x = layers.GlobalAveragePooling1D()(x)
    stock = keras.Model(start, layers.Dense(2, name="readout")(x))
    x, y = references.normal((2, STEPS, 4, 5), 1), references.normal((2, 2), 2)
    x[:, 1] = 0
    model = convert(stock, method)
    np.testing.assert_array_equal(array(model(x)), array(stock(x)))
    before = array(stock.get_layer("each").layer.layers[0].kernel)
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.01), "mse")
    model.fit(x, y, verbose=0)
    path = named_paths(model)["each/inner"]
    assert not np.array_equal(array(path.kernel), before)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert named_paths(loaded).keys() == named_paths(model).keys()
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b))
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))
    plain = to_backprop(model)
    assert not feedback_layers(plain)
    np.testing.assert_array_equal(array(plain(x)), array(model(x)))


@backends.requires_tensorflow
def test_an_unknown_number_of_steps_is_refused() -> None:
    """TensorFlow vectorizes the loop, and so would lose the feedback."""
    import tensorflow as tf

    stock = keras.Sequential(
        [
            keras.Input((None, 5)),
            layers.Dense(5),
            layers.TimeDistributed(layers.Dense(4)),
            layers.GlobalAveragePooling1D(),
        ]
    )
    model = convert(stock, "fa")
    model.compile("sgd", "mse")
    x, y = np.ones((2, STEPS, 5), "float32"), np.ones((2, 4), "float32")
    model.fit(x, y, verbose=0)
    shapes = tf.TensorSpec((2, None, 5)), tf.TensorSpec((2, 4))
    data = tf.data.Dataset.from_generator(
        lambda: iter([(x, y)]), output_signature=shapes
    )
    with pytest.raises(LookupError, match="number of time steps is unknown"):
        model.fit(data, verbose=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutional_lstms_are_refused(rank: int) -> None:
    kind = getattr(layers, f"ConvLSTM{rank}D")
    start = keras.Input((STEPS, *[4] * rank, 2))
    x = layers.Flatten()(kind(2, 3, name="odd")(start))
    stock = keras.Model(start, layers.Dense(2)(x))
    with pytest.raises(
        ValueError,
        match=rf"'odd' \(ConvLSTM{rank}D\) .*no FA counterpart. "
        r"Give skip=\['odd'\]",
    ):
        convert(stock, "fa")
    if rank != 1:
        return
    model = convert(stock, "fa", skip=["odd"])
    x = references.normal((2, STEPS, *[4] * rank, 2), 1)
    np.testing.assert_array_equal(array(model(x)), array(stock(x)))
