"""Models as Keras's own examples and guides write them, in small."""

from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import layers
from test_composite import text_classifier
from test_composite import vision_transformer

from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.alignment import named_paths
from keras_fa.layers.feedback import feedback_layers

TOKENS = np.random.default_rng(0).integers(1, 9, (2, 5))
IMAGES = references.normal((2, 8, 8, 3), 1)
TARGETS = references.normal((2, 2), 2)


def convolutional_text_classifier() -> keras.Model:
    """As in "Text classification from scratch"."""
    start = keras.Input((5,), dtype="int32")
    x = layers.Dropout(0.5)(layers.Embedding(9, 4)(start))
    for name in ("conv1", "conv2"):
        x = layers.Conv1D(
            4, 2, strides=2, padding="same", activation="relu", name=name
        )(x)
    x = layers.GlobalMaxPooling1D()(x)
    x = layers.Dense(4, activation="relu", name="hidden")(x)
    return keras.Model(start, layers.Dense(2, name="readout")(x))


def autoencoder() -> keras.Model:
    """As in "Convolutional autoencoder for image denoising"."""
    start = x = keras.Input((8, 8, 3))
    for name in ("down1", "down2"):
        x = layers.Conv2D(2, 3, activation="relu", padding="same", name=name)(x)
        x = layers.MaxPooling2D(2, padding="same")(x)
    for name in ("up1", "up2"):
        x = layers.Conv2DTranspose(
            2, 3, strides=2, activation="relu", padding="same", name=name
        )(x)
    x = layers.Conv2D(3, 3, padding="same", name="image")(x)
    return keras.Model(start, x)


def two_inputs_and_outputs() -> keras.Model:
    """As in the guide to the functional API."""
    title, tags = keras.Input((5,), dtype="int32"), keras.Input((2,))
    x = layers.LSTM(3, name="lstm")(layers.Embedding(9, 4)(title))
    x = layers.concatenate([x, tags])
    outputs = {
        name: layers.Dense(2, name=name)(x) for name in ("priority", "kind")
    }
    return keras.Model([title, tags], outputs)


# What makes a model, inputs and targets, and whether a file has all classes.
MODELS = {
    "vit": (vision_transformer, IMAGES, TARGETS, False),
    "transformer": (text_classifier, TOKENS, TARGETS, False),
    "text": (convolutional_text_classifier, TOKENS, TARGETS, True),
    "autoencoder": (autoencoder, IMAGES, IMAGES, True),
    "two": (
        two_inputs_and_outputs,
        [TOKENS, TARGETS],
        {"priority": TARGETS, "kind": -TARGETS},
        True,
    ),
}


def outputs_of(model: keras.Model, x: Any) -> list[np.ndarray]:
    return [array(y) for y in keras.tree.flatten(model(x))]


@pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W only where")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "fa"),
        pytest.param(
            "transformer", "fa_usf_const_ei", marks=backends.long_on_jax
        ),
        ("transformer", "dfa"),
        ("text", "kolen_pollack"),
        ("text", "dfa"),
        ("autoencoder", "fa_usf_sn"),
        ("autoencoder", "dfa"),
        ("two", "fa_usf_const_ei"),
    ],
)
def test_model(name: str, method: str, tmp_path: Any) -> None:
    make, x, y, saved = MODELS[name]
    stock = make()
    model = convert(stock, method)
    for ours, theirs in zip(outputs_of(model, x), outputs_of(stock, x)):
        np.testing.assert_array_equal(ours, theirs)
    paths = named_paths(model)
    before = {key: array(path.kernel) for key, path in paths.items()}
    # Traced in other tests of what these models consist of.
    model.compile(
        keras.optimizers.SGD(0.1, weight_decay=0.01),
        "mse",
        run_eagerly=backends.ON_TENSORFLOW,
    )
    model.fit(x, y, verbose=0)
    for key, path in paths.items():
        assert not np.array_equal(array(path.kernel), before[key]), key
    if saved:
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        again = convert(make(), method)
        again.load_weights(tmp_path / "model.weights.h5")
    assert len(named_paths(again)) == len(paths)
    plain = to_backprop(model)
    assert not feedback_layers(plain)
    for ours, *others in zip(
        *(outputs_of(one, x) for one in (model, again, plain))
    ):
        for other in others:
            np.testing.assert_array_equal(ours, other)
