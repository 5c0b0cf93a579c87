"""`model.export`: what is served computes what the model does."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import references
from backends import ON_TORCH
from backends import array
from keras import layers
from test_composite import Subclassed as TextClassifier

import keras_fa
from keras_fa import convert
from keras_fa.layers import __all__ as names
from keras_fa.layers.feedback import FeedbackArguments
from keras_fa.layers.feedback import all_layers

if ON_TORCH:
    pytest.skip("Keras exports no SavedModel of it", allow_module_level=True)
# Keras on JAX makes one by TensorFlow.
tf = pytest.importorskip("tensorflow")


def of_all_kinds() -> keras.Model:
    """A chain of every layer that has an FA counterpart, in small."""
    chain = [
        layers.Conv3D(2, 2, padding="same"),
        layers.Conv3DTranspose(2, 2, padding="same"),
        layers.Reshape((4, 4, 4)),
        layers.Conv2D(2, 2, padding="same", activation="relu"),
        layers.Conv2DTranspose(2, 2, padding="same"),
        layers.DepthwiseConv2D(2, padding="same"),
        layers.SeparableConv2D(2, 2, padding="same"),
        layers.Reshape((8, 4)),
        layers.Conv1D(4, 2, padding="causal"),
        layers.Conv1DTranspose(4, 2, padding="same"),
        layers.DepthwiseConv1D(2, padding="same"),
        layers.SeparableConv1D(4, 2, padding="same"),
        layers.EinsumDense("abc,cd->abd", output_shape=(None, 4)),
        layers.TimeDistributed(layers.Dense(4)),
    ]
    start = x = keras.Input((4, 4, 2, 2))
    for layer in chain:
        x = layer(x)
    x = layers.MultiHeadAttention(2, 2)(x, x)
    x = layers.GroupQueryAttention(2, 2, 1)(x, x)
    x = layers.RNN(
        [layers.SimpleRNNCell(2), layers.LSTMCell(2), layers.GRUCell(3)],
        return_sequences=True,
    )(x)
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.GRU(2, return_sequences=True)(x)
    return keras.Model(start, layers.SimpleRNN(3)(x))


def served(model: keras.Model, folder: Path, x: np.ndarray) -> Any:
    model.export(folder, verbose=False)
    loaded = tf.saved_model.load(str(folder))
    return array(loaded.serve(x))


@pytest.mark.slow  # some of the kinds are exported in test_conversion
@pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W only where")
def test_all_kinds(tmp_path: Path) -> None:
    model = convert(of_all_kinds(), "kolen_pollack")
    kinds = {
        type(layer)
        for layer in all_layers(model)
        if isinstance(layer, FeedbackArguments)
    }
    assert kinds == {getattr(keras_fa.layers, name) for name in names}
    x = references.normal((2, *model.input_shape[1:]), 1)
    y = array(model(x))
    assert np.std(y) > 1e-5  # such a chain leaves little
    np.testing.assert_allclose(served(model, tmp_path, x), y, 1e-3, 1e-7)


def test_a_subclassed_model_that_was_converted_in_place(tmp_path: Path) -> None:
    model = TextClassifier()
    x = np.random.default_rng(0).integers(1, 9, (4, 5))
    model(x)
    convert(model, "fa_usf_sn")
    y = array(model(x))
    np.testing.assert_allclose(served(model, tmp_path, x), y, 1e-5, 1e-6)
