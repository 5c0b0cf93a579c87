"""Models of KerasHub, which the extra `hub` installs, without weights."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import references
from backends import array

from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.alignment import named_paths
from keras_fa.layers.feedback import feedback_layers

keras_hub = pytest.importorskip("keras_hub")
hub = keras_hub.models
pytestmark = pytest.mark.slow

WORDS = "[UNK] [CLS] [SEP] [PAD] [MASK] the quick brown fox".split()
IMAGES = references.normal((2, 8, 8, 3), 1)
TOKENS = {
    "token_ids": np.array([[1, 5, 6, 8, 2, 3]] * 2),
    "segment_ids": np.zeros((2, 6), "int32"),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 0]] * 2),
}


def resnet() -> keras.Model:
    return hub.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(8, 8, 3),
    )


def vit() -> keras.Model:
    return hub.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=4,
        mlp_dim=8,
    )


def bert() -> keras.Model:
    return hub.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=1,
        num_heads=2,
        hidden_dim=4,
        intermediate_dim=8,
        max_sequence_length=6,
        dropout=0,
    )


def preprocessor_of_images() -> Any:
    return hub.ResNetImageClassifierPreprocessor(
        keras_hub.layers.ResNetImageConverter(image_size=(8, 8), scale=1 / 255)
    )


def image_classifier(backbone: Any = None) -> keras.Model:
    return hub.ResNetImageClassifier(
        backbone or resnet(), 3, preprocessor_of_images()
    )


def text_classifier() -> keras.Model:
    tokenizer = hub.BertTokenizer(vocabulary=WORDS)
    preprocessor = hub.BertTextClassifierPreprocessor(tokenizer, 6)
    return hub.BertTextClassifier(bert(), 3, preprocessor, dropout=0)


def assert_equal(model: keras.Model, other: keras.Model, x: Any) -> None:
    """Equal outputs, to the last bit."""
    pairs = zip(*(keras.tree.flatten(one(x)) for one in (model, other)))
    for ours, theirs in pairs:
        np.testing.assert_array_equal(array(ours), array(theirs))


@pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W only where")
@pytest.mark.parametrize(
    ("make", "x", "method", "kernels"),
    [
        (resnet, IMAGES, "dfa", 3),
        (vit, IMAGES, "fa_usf_const_ei", 7),
        (bert, TOKENS, "kolen_pollack", 7),
    ],
)
def test_backbones(
    make: Callable, x: Any, method: str, kernels: int, tmp_path: Any
) -> None:
    stock = make()
    model = convert(stock, method)
    assert len(named_paths(model)) == kernels
    assert_equal(model, stock, x)
    model.save_weights(tmp_path / "w.weights.h5")
    again = convert(make(), method)
    again.load_weights(tmp_path / "w.weights.h5")
    assert_equal(again, model, x)
    plain = to_backprop(model)
    assert not feedback_layers(plain)
    assert_equal(plain, model, x)


@pytest.mark.parametrize("method", ["fa", "fa_usf_const_ei"])
@pytest.mark.parametrize(
    ("make", "raw", "block"),
    [
        (image_classifier, 255 * np.abs(IMAGES), "stack0_block0_1_conv"),
        (
            text_classifier,
            ["the quick brown fox", "the fox"],
            "transformer_layer_0/feedforward_intermediate_dense",
        ),
    ],
)
def test_tasks(
    make: Callable, raw: Any, block: str, method: str, tmp_path: Any
) -> None:
    """They stay tasks, which take raw data, and are saved as such."""
    stock = make()
    stock.compile(optimizer=keras.optimizers.SGD(0.1))
    model = convert(stock, method)
    assert isinstance(model, type(stock))
    assert isinstance(model.backbone, type(stock.backbone))
    assert model.compiled
    np.testing.assert_array_equal(
        model.predict(raw, verbose=0), stock.predict(raw, verbose=0)
    )
    path = named_paths(model)[block]
    before = array(path.kernel)
    model.fit(raw, np.array([0, 1]), verbose=0)
    assert not np.array_equal(array(path.kernel), before)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, type(stock))
    assert named_paths(again).keys() == named_paths(model).keys()
    np.testing.assert_array_equal(
        again.predict(raw, verbose=0), model.predict(raw, verbose=0)
    )
    for each in (model, again):  # with the optimizer that it was compiled with
        each.fit(raw, np.array([0, 1]), verbose=0)
    for ours, theirs in zip(again.weights, model.weights):
        references.assert_close(array(ours), array(theirs), 1e-4)
    plain = to_backprop(again)
    assert type(plain) is type(stock)
    assert not feedback_layers(plain)
    np.testing.assert_array_equal(
        plain.predict(raw, verbose=0), again.predict(raw, verbose=0)
    )


def test_presets(tmp_path: Any) -> None:
    model = convert(image_classifier(), "fa")
    with pytest.raises(ValueError, match="no class of KerasHub reads"):
        model.save_to_preset(tmp_path / "preset")
    to_backprop(model).save_to_preset(tmp_path / "preset")
    again = hub.ImageClassifier.from_preset(str(tmp_path / "preset"))
    raw = 255 * np.abs(IMAGES)
    np.testing.assert_array_equal(
        again.predict(raw, verbose=0), model.predict(raw, verbose=0)
    )


def test_feature_pyramids_are_those_of_the_new_layers() -> None:
    model = convert(resnet(), "fa")
    (level,) = model.pyramid_outputs.values()
    found = feedback_layers(keras.Model(model.inputs, level))
    assert set(found) == set(feedback_layers(model))


def test_a_task_of_a_converted_backbone(tmp_path: Any) -> None:
    """Its readout is stock."""
    model = image_classifier(convert(resnet(), "fa_usf_sn"))
    assert len(named_paths(model)) == 3
    raw = 255 * np.abs(IMAGES)
    before = array(feedback_layers(model)[-1].kernel)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.fit(raw, np.array([0, 1]), verbose=0)
    assert not np.array_equal(array(feedback_layers(model)[-1].kernel), before)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert named_paths(again).keys() == named_paths(model).keys()
    np.testing.assert_array_equal(
        again.predict(raw, verbose=0), model.predict(raw, verbose=0)
    )
