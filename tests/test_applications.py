"""Real architectures: keras.applications under the methods.

By the applications' own code, with fewer of their blocks.
"""

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from backends import ON_TENSORFLOW
from backends import long_on_jax
from keras import applications
from keras import layers
from keras.src.applications import densenet
from keras.src.applications import efficientnet_v2
from keras.src.applications import mobilenet_v2
from keras.src.applications import resnet

from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.conversion import load_stock_weights
from keras_fa.layers.feedback import feedback_layers
from keras_fa.methods import METHODS

SIZE = 32
X = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype("float32")
Y = np.eye(10, dtype="float32")[[3, 7]]


def residual_blocks(x: keras.KerasTensor) -> keras.KerasTensor:
    """Two stages of ResNet50, of two bottlenecks each."""
    x = resnet.stack_residual_blocks_v1(x, 32, 2, stride1=1, name="conv2")
    return resnet.stack_residual_blocks_v1(x, 64, 2, name="conv3")


def mobile_net(**options: Any) -> keras.Model:
    """The first five of the 17 blocks of MobileNetV2, two with a shortcut."""
    block = mobilenet_v2._inverted_res_block

    def first(
        x: keras.KerasTensor, *, block_id: int, **options: Any
    ) -> keras.KerasTensor:
        return block(x, block_id=block_id, **options) if block_id < 5 else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenet_v2, "_inverted_res_block", first)
        return applications.MobileNetV2(alpha=0.35, **options)


BUILDERS: dict[str, Callable] = {
    "ResNet": functools.partial(
        resnet.ResNet, residual_blocks, preact=False, use_bias=True
    ),
    "MobileNetV2": mobile_net,
    "DenseNet": functools.partial(densenet.DenseNet, [2, 2, 2, 2]),
    # Stages of one block each, and a last one of two.
    "EfficientNetV2": functools.partial(
        efficientnet_v2.EfficientNetV2,
        0.5,
        0.2,
        224,
        name="efficientnetv2-b0",
    ),
    "VGG16": applications.VGG16,
}
KINDS = (layers.Conv2D, layers.Dense, layers.DepthwiseConv2D)
CASES = [
    ("VGG16", "dfa"),
    *(
        pytest.param(name, method, marks=[long_on_jax, pytest.mark.slow])
        for name, method in (
            ("MobileNetV2", "fa_usf_const_ei"),
            ("ResNet", "fa_usf_sn"),
            ("DenseNet", "fa_usf_sn"),
            ("EfficientNetV2", "fa_usf_sn"),
        )
    ),
]


@functools.cache
def stock(name: str) -> keras.Model:
    """The application, for small images and ten classes. Do not train it."""
    return BUILDERS[name](
        weights=None,
        include_top=name != "VGG16",  # its top is 100 MB
        input_shape=(SIZE, SIZE, 3),
        **({"pooling": "avg"} if name == "VGG16" else {"classes": 10}),
    )


def model_of(name: str) -> keras.Model:
    """The application with a readout where it has none."""
    body = stock(name)
    if name != "VGG16":
        return body
    outputs = layers.Dense(10, activation="softmax", name="predictions")
    return keras.Model(body.inputs[0], outputs(body.outputs[0]))


def kinds(model: keras.Model, prefix: str = "") -> collections.Counter:
    """How many layers there are of each kind with a kernel."""
    names = [type(layer).__name__ for layer in model.layers]
    wanted = [prefix + cls.__name__ for cls in KINDS]
    return collections.Counter(name for name in names if name in wanted)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_application(name: str, method: str, tmp_path: Path) -> None:
    source = model_of(name)
    model = convert(source, method)
    assert np.array_equal(model(X), source(X))
    assert not kinds(model)
    counts = {f"FA{kind}": n for kind, n in kinds(source).items()}
    assert kinds(model, "FA") == counts
    assert len(feedback_layers(model)) == sum(counts.values()) > 13

    model.compile(
        keras.optimizers.Adam(1e-4),
        "categorical_crossentropy",
        run_eagerly=ON_TENSORFLOW,  # tracing takes longer than a step
    )
    model.fit(
        X, Y, batch_size=2, verbose=0, callbacks=METHODS[method].callbacks()
    )
    assert all(np.isfinite(weight).all() for weight in model.weights)
    before = source.trainable_weights
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(before, model.trainable_weights)
        if "kernel" in a.path
    ]
    assert all(moved)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert all(
        np.array_equal(a, b) for a, b in zip(loaded.weights, model.weights)
    )
    assert np.array_equal(loaded(X), model(X))


@pytest.mark.slow
@long_on_jax
def test_weights_in_the_layout_of_the_applications(tmp_path: Path) -> None:
    """The old `.h5` layout, in which they are to be had."""
    shipped, base = (
        BUILDERS["MobileNetV2"](
            weights=None, input_shape=(SIZE, SIZE, 3), classes=10
        )
        for _ in range(2)
    )
    shipped.save(tmp_path / "shipped.h5")
    model = convert(base, "fa_usf_const_ei")
    load_stock_weights(model, tmp_path / "shipped.h5")
    assert np.array_equal(model(X), shipped(X))
    for layer in filter(lambda layer: layer.weights, shipped.layers):
        ours = model.get_layer(layer.name).weights
        assert all(map(np.array_equal, ours, layer.weights)), layer.name


@pytest.mark.slow
@long_on_jax
def test_fine_tuning_of_a_frozen_application() -> None:
    """Its head first, then all of it, as in stock Keras."""
    base = BUILDERS["MobileNetV2"](
        weights=None, include_top=False, input_shape=(SIZE, SIZE, 3)
    )
    start = keras.Input((SIZE, SIZE, 3))
    x = layers.GlobalAveragePooling2D()(base(start, training=False))
    source = keras.Model(start, layers.Dense(10, activation="softmax")(x))
    base.trainable = False
    model = convert(source, "fa_usf_sn")
    for each in (model, to_backprop(model)):
        assert len(each.trainable_weights) == 2
        each.get_layer(base.name).trainable = True
        base.trainable = True
        assert len(each.trainable_weights) == len(source.trainable_weights)
        base.trainable = False
        before = [np.array(weight) for weight in each.trainable_weights]
        each.compile(
            "sgd", "categorical_crossentropy", run_eagerly=ON_TENSORFLOW
        )
        each.fit(X, Y, verbose=0)
        for weight, value in zip(each.trainable_weights, before):
            if "kernel" in weight.path:
                assert not np.array_equal(weight, value), weight.path
