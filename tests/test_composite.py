"""Layers that hold layers, subclassed models, and models as Keras has them."""

import collections
import logging
import pickle
from typing import Any
from typing import NamedTuple

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
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import feedback_layers

TOKENS = np.random.default_rng(0).integers(1, 9, (4, 5))
IMAGES = references.normal((2, 8, 8, 3), 1)
TARGETS = references.normal((4, 2), 4)


@keras.saving.register_keras_serializable(package="tests")
class TransformerBlock(layers.Layer):
    """As in Keras's guide to text classification."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.attention = layers.MultiHeadAttention(2, dim, name="attention")
        self.feed_forward = keras.Sequential(
            [
                layers.Dense(8, activation="relu", name="wide"),
                layers.Dense(dim, name="narrow"),
            ]
        )
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.dropout = layers.Dropout(0.1)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.attention(inputs, inputs)
        x = self.norms[0](inputs + self.dropout(x, training=training))
        return self.norms[1](x + self.feed_forward(x))

    def get_config(self) -> dict:
        return {**super().get_config(), "dim": self.dim}


@keras.saving.register_keras_serializable(package="tests")
class PatchEncoder(layers.Layer):
    """As in Keras's example of a Vision Transformer."""

    def __init__(self, patches: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patches, self.dim = patches, dim
        self.projection = layers.Dense(dim, name="projection")
        self.position = layers.Embedding(patches, dim)

    def call(self, patch: Any) -> Any:
        positions = ops.expand_dims(ops.arange(self.patches), axis=0)
        return self.projection(patch) + self.position(positions)

    def get_config(self) -> dict:
        config = {"patches": self.patches, "dim": self.dim}
        return {**super().get_config(), **config}


def text_classifier() -> keras.Model:
    start = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4)(start)
    x = TransformerBlock(4, name="block")(x)
    x = layers.Bidirectional(
        layers.LSTM(3, return_sequences=True, name="inner"), name="both"
    )(x)
    x = layers.RNN(
        layers.StackedRNNCells([layers.GRUCell(3), layers.LSTMCell(2)]),
        name="stacked",
    )(x)
    return keras.Model(start, layers.Dense(2, name="readout")(x))


def vision_transformer() -> keras.Model:
    start = keras.Input((8, 8, 3))
    patches = ops.image.extract_patches(start, 4)
    x = PatchEncoder(4, 6, name="encoder")(ops.reshape(patches, (-1, 4, 48)))
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.MultiHeadAttention(2, 3, dropout=0.1, name="attention")(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.Dense(8, activation=keras.activations.gelu, name="mlp")(y)
    x = layers.Add()([x, layers.Dense(6, name="back")(y)])
    x = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(start, layers.Dense(2, name="readout")(x))


def autoencoder() -> keras.Model:
    """Two outputs: the image and a class."""
    start = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="encode")(start)
    code = layers.LeakyReLU()(x)
    x = layers.Conv2DTranspose(
        3, 3, strides=2, padding="same", activation="sigmoid", name="decode"
    )(code)
    label = layers.Dense(2, name="label")(layers.Flatten()(code))
    return keras.Model(start, [x, label])


WANTED = {
    "block/attention/query",
    "block/wide",
    "block/narrow",
    "both/forward_inner/lstm_cell/recurrent_kernel",
    "both/backward_inner/lstm_cell/kernel",
    "stacked/stacked_rnn_cells/gru_cell/kernel",
    "readout",
}


def test_held_layers_are_converted(tmp_path: Any) -> None:
    stock = text_classifier()
    for i, variable in enumerate(stock.weights):
        variable.assign(variable + 0.01 * i)
    y = array(stock(TOKENS))
    model = convert(stock, "fa", layers={"wide": "fa_usf_sn"})
    assert not feedback_layers(stock)  # which is left as it is
    np.testing.assert_array_equal(array(model(TOKENS)), y)
    paths = named_paths(model)
    assert paths.keys() >= WANTED
    assert paths["block/wide"].rule.sign_concordant
    assert len(model.weights) == len(stock.weights) + len(paths) - 1
    before = {
        name: array(p.feedback_kernel)
        for name, p in paths.items()
        if p.feedback_kernel is not None
    }
    model.compile("sgd", "mse")
    model.fit(TOKENS, TARGETS, verbose=0)
    after = convert(model, "fa")  # stored kernels go on with their values
    for name, path in named_paths(after).items():
        if name in before:
            np.testing.assert_array_equal(
                array(path.feedback_kernel), before[name]
            )
    plain = to_backprop(model)
    assert not feedback_layers(plain)
    for a, b in zip(plain.weights, stock.weights):
        assert a.shape == b.shape
    np.testing.assert_array_equal(array(plain(TOKENS)), array(model(TOKENS)))
    model.save_weights(tmp_path / "w.weights.h5")
    twin = convert(stock, "fa", layers={"wide": "fa_usf_sn"})
    twin.load_weights(tmp_path / "w.weights.h5")
    for a, b in zip(model.weights, twin.weights):
        np.testing.assert_array_equal(array(a), array(b))


def test_stock_wrappers_keep_what_they_hold_in_a_file(tmp_path: Any) -> None:
    start = keras.Input((5, 4))
    x = layers.Bidirectional(layers.SimpleRNN(3), name="both")(start)
    model = convert(keras.Model(start, x), "fa")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert named_paths(loaded).keys() == named_paths(model).keys()
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b))


@pytest.mark.parametrize("method", ["fa_usf_sn", "dfa"])
def test_a_vision_transformer(method: str) -> None:
    stock = vision_transformer()
    model = convert(stock, method)
    np.testing.assert_array_equal(array(model(IMAGES)), array(stock(IMAGES)))
    assert named_paths(model).keys() >= {
        "encoder/projection",
        "attention/query",
        "mlp",
    }
    if method == "dfa":  # a block that is not one kernel layer receives, too
        assert "encoder_stop_error" in [layer.name for layer in model.layers]
    model.compile("sgd", "mse")
    before = [array(w) for w in model.trainable_weights]
    model.fit(IMAGES, TARGETS[:2], verbose=0)
    moved = [
        w.path
        for w, old in zip(model.trainable_weights, before)
        if not np.array_equal(array(w), old)
    ]
    assert any("projection" in path for path in moved)
    plain = to_backprop(model)
    assert not feedback_layers(plain)
    np.testing.assert_array_equal(array(plain(IMAGES)), array(model(IMAGES)))


def test_an_autoencoder_with_two_outputs() -> None:
    stock = autoencoder()
    model = convert(stock, "fa_usf_sn")
    for a, b in zip(model(IMAGES), stock(IMAGES)):
        np.testing.assert_array_equal(array(a), array(b))
    assert sorted(named_paths(model)) == ["decode", "encode", "label"]
    model.compile("sgd", ["mse", "mse"])
    before = array(model.get_layer("encode").kernel)
    model.fit(IMAGES, [IMAGES, TARGETS[:2]], verbose=0)
    assert np.abs(array(model.get_layer("encode").kernel) - before).max() > 0
    with pytest.raises(ValueError, match="one output"):
        convert(stock, "dfa")


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A model whose `call` is a program."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = TransformerBlock(4, name="block")
        self.embedding = layers.Embedding(9, 4)
        self.pool = layers.GlobalAveragePooling1D()
        self.readout = layers.Dense(2, name="readout")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.block(self.embedding(inputs), training=training)
        return self.readout(self.pool(x))


def test_a_subclassed_model_is_converted_in_place(caplog: Any) -> None:
    model = Subclassed()
    with pytest.raises(ValueError, match="not built"):
        convert(model, "fa")
    model.compile("sgd", "mse")
    y = array(model(TOKENS))
    shapes = [w.shape for w in model.weights]
    with caplog.at_level(logging.INFO, "keras_fa"):
        assert convert(model, "fa") is model
    assert "converted in place" in caplog.text
    np.testing.assert_array_equal(array(model(TOKENS)), y)
    assert type(model.readout) is keras_fa.FADense
    paths = named_paths(model)
    assert paths.keys() >= {"block/attention/query", "block/wide", "readout"}
    stored = {name: array(p.feedback_kernel) for name, p in paths.items()}
    model.fit(TOKENS, TARGETS, verbose=0)
    assert not np.array_equal(array(model(TOKENS)), y)
    convert(model, "fa_usf_init")
    for name, path in named_paths(model).items():
        np.testing.assert_array_equal(array(path.feedback_kernel), stored[name])
    y = array(model(TOKENS))
    assert to_backprop(model) is model
    assert not feedback_layers(model)
    assert [w.shape for w in model.weights] == shapes
    np.testing.assert_array_equal(array(model(TOKENS)), y)
    for method in ("dfa", "frozen"):
        with pytest.raises(ValueError, match="as a Functional model"):
            convert(model, method)


@keras.saving.register_keras_serializable(package="tests")
class Task(keras.Model):
    """A Functional model that its constructor makes, as KerasHub's are."""

    def __init__(self, backbone: keras.Model, units: int, **kwargs: Any):
        features = backbone(backbone.input)
        head = layers.Dense(units, name="readout")
        super().__init__(
            inputs=backbone.input, outputs=head(features), **kwargs
        )
        self.backbone, self.head, self.units = backbone, [head], units
        self.features, self.calls = {"last": features}, []
        self.seen = keras.metrics.Mean(name="seen")
        self.all_seen = [self.seen]
        self.trained = {head}
        self.state = (keras.optimizers.SGD(), np.zeros(2))

    def preprocess(self, x: Any) -> Any:
        return x % 9

    def train_step(self, *args: Any) -> Any:
        self.calls.append("train_step")
        return super().train_step(*args)

    def get_config(self) -> dict:
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {"backbone": backbone, "units": self.units, "name": self.name}

    @classmethod
    def from_config(cls, config: dict) -> keras.Model:
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


def task() -> keras.Model:
    start = keras.Input((5,), dtype="int32")
    x = TransformerBlock(4, name="block")(layers.Embedding(9, 4)(start))
    x = layers.Dense(3, activation="relu", name="hidden")(layers.Flatten()(x))
    return Task(keras.Model(start, x, name="backbone"), 2, name="task")


def subclassed() -> keras.Model:
    model = Subclassed()
    model(TOKENS)
    return model


@pytest.mark.filterwarnings("ignore:.*does not have a `build")
@pytest.mark.parametrize(
    ("make", "method", "by"),
    [
        (lambda: task().backbone, "fa", "file"),
        (lambda: task().backbone, "dfa", "file"),
        (subclassed, "fa_usf_const_ei", "file"),
        (task, "fa_usf_sn", "file"),
        (task, "fa_usf_const_ei", "pickle"),
    ],
)
def test_what_constructors_make_is_saved_as_it_is(
    make: Any, method: str, by: str, tmp_path: Any
) -> None:
    model = convert(make(), method)
    y = 0 * array(model(TOKENS))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(TOKENS, y, verbose=0)
    if by == "file":
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
    else:
        again = pickle.loads(pickle.dumps(model))
    assert named_paths(again).keys() == named_paths(model).keys()
    for ours, theirs in zip(feedback_layers(again), feedback_layers(model)):
        assert type(ours) is type(theirs)
        assert ours.get_config() == theirs.get_config()
    for ours, theirs in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))
    np.testing.assert_array_equal(array(again(TOKENS)), array(model(TOKENS)))
    for each in (again, model):
        for layer in all_layers(each):
            if isinstance(layer, layers.Dropout):
                layer.rate = 0  # which they would draw each for itself
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.fit(TOKENS, y, shuffle=False, verbose=0)
    for ours, theirs in zip(again.weights, model.weights, strict=True):
        references.assert_close(array(ours), array(theirs), 1e-4)
    plain = to_backprop(again)
    assert not feedback_layers(plain)
    stock = make()
    assert type(plain) is type(stock)
    config = keras.saving.serialize_keras_object(plain)
    assert "keras_fa" not in str(config)


@keras.saving.register_keras_serializable(package="tests")
class Residual(layers.Layer):
    """A block that says what its output is, as wrappers want it."""

    def __init__(self, build: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner, self.builds = layers.Dense(4, name="inner"), build

    def build(self, shape: tuple) -> None:
        if self.builds:
            self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return x + self.inner(x)

    def compute_output_shape(self, shape: tuple) -> tuple:
        return shape

    def get_config(self) -> dict:
        return {**super().get_config(), "build": self.builds}


def wrapped(block: layers.Layer) -> keras.Model:
    start = keras.Input((3, 4))
    model = keras.Model(
        start, layers.TimeDistributed(block, name="each")(start)
    )
    model(np.ones((1, 3, 4)))
    return model


def test_parts_of_a_model_tell_what_they_hold() -> None:
    """A block in one of Keras's wrappers, and one that is used by itself."""
    model = convert(wrapped(Residual()), "fa")
    block = model.get_layer("each").layer
    alone = keras.Sequential([keras.Input((4,)), block])
    for each in (model, alone):
        again = keras.models.clone_model(each)
        assert len(feedback_layers(again)) == len(feedback_layers(each)) == 1
    for part in (to_backprop(model).get_layer("each").layer, block):
        told = "keras_fa" in str(keras.saving.serialize_keras_object(part))
        assert told is (part is block)


@keras.saving.register_keras_serializable(package="tests")
class Calling(Residual):
    """A block that calls its layer by a function of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        inner = self.inner
        self.function = lambda x: inner(x)


def test_a_block_that_would_go_on_with_its_stock_layer() -> None:
    with pytest.raises(ValueError, match=r"replaced, or its weight, in 'func"):
        convert(wrapped(Calling()), "fa")


@keras.saving.register_keras_serializable(package="tests")
class OwnActivation(Residual):
    """A block with an activation that no file brings back."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner.activation = lambda x: x * x


@pytest.mark.filterwarnings("ignore:.*includes a `lambda`")
def test_functions_that_a_constructor_gives(tmp_path: Any) -> None:
    model, x = convert(wrapped(OwnActivation()), "fa"), np.ones((1, 3, 4))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(again(x)), array(model(x)))
    assert np.abs(array(model(x)) - x).max() > 0


def test_a_block_of_a_config_is_as_a_new_one() -> None:
    """What its FA layers remember is of the weights that they have."""
    model = convert(wrapped(Residual()), "fa_usf_const_ei")
    again = keras.models.clone_model(model)
    before = array(again.get_layer("each").layer.inner.kernel)
    again.compile(keras.optimizers.SGD(1e-6), "mse")
    again.fit(np.ones((4, 3, 4)), np.zeros((4, 3, 4)), verbose=0)
    np.testing.assert_allclose(
        array(again.get_layer("each").layer.inner.kernel), before, atol=1e-4
    )


def test_a_block_of_a_config_is_as_frozen() -> None:
    start = keras.Input((4,))
    x = layers.Dense(2, name="readout")(Residual(name="block")(start))
    model = convert(keras.Model(start, x), "frozen")
    again = keras.models.clone_model(model)
    names = [w.path for w in model.trainable_weights]
    assert [w.path for w in again.trainable_weights] == names
    assert "block/inner/kernel" not in names


def test_a_block_that_nobody_builds() -> None:
    with pytest.raises(ValueError, match=r"'inner' .* is built by nothing"):
        convert(wrapped(Residual(build=False)), "fa")


def test_a_functional_model_of_an_own_class_stays_one() -> None:
    stock = task()
    stock.compile("sgd", "mse")
    model = convert(stock, "fa")
    assert isinstance(model, Task)
    assert model.units == 2
    assert model.seen is model.all_seen[0] is not stock.seen
    for ours, theirs in zip(model.state, stock.state, strict=True):
        assert type(ours) is type(theirs)
        assert ours is not theirs
    np.testing.assert_array_equal(model.preprocess(TOKENS), TOKENS % 9)
    model.fit(TOKENS, TARGETS, verbose=0)
    assert model.calls
    assert not stock.calls
    # What it keeps are the new layers and tensors, and the old one's its own.
    assert model.head[0] is model.get_layer("readout")
    assert model.trained == {model.head[0]}
    assert model.backbone is model.get_layer("backbone")
    last = keras.Model(model.inputs, model.features["last"])
    assert "hidden" in named_paths(last)
    assert not feedback_layers(stock)
    assert stock.head[0] is stock.get_layer("readout")
    # DFA takes its backbone apart.
    with pytest.warns(UserWarning, match="loses its train_step"):
        assert not isinstance(convert(stock, "dfa"), Task)


def with_layer(stock: keras.Model) -> None:
    stock.other = layers.Dense(2)
    stock.other.build((None, 3))


def with_closure(stock: keras.Model) -> None:
    readout = stock.get_layer("readout")
    stock.other = lambda x: readout(x)


def with_queue(stock: keras.Model) -> None:
    stock.other = collections.deque([stock.get_layer("readout")])


@pytest.mark.parametrize("add", [with_layer, with_closure, with_queue])
def test_a_class_that_cannot_be_kept_is_told(add: Any) -> None:
    stock = task()
    add(stock)
    with pytest.warns(UserWarning, match="'other' cannot be copied"):
        model = convert(stock, "fa")
    assert not isinstance(model, Task)
    np.testing.assert_array_equal(array(model(TOKENS)), array(stock(TOKENS)))


def test_a_class_that_has_changed_since_it_was_saved() -> None:
    model = convert(subclassed(), "fa")
    config = model.get_config()
    config["keras_fa_layers"]["held"][0]["place"] = [1]
    with pytest.raises(ValueError, match="version of the class"):
        type(model).from_config(config)


class Partly(Subclassed):
    """A model with a layer that its `call` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = layers.Dense(2, name="unused")


def test_nothing_is_converted_where_one_layer_cannot_be() -> None:
    model = Partly()
    model(TOKENS)
    with pytest.raises(ValueError, match=r"'unused' .* is not built"):
        convert(model, "fa")
    assert not feedback_layers(model)


class OwnKernel(layers.Layer):
    """A kernel of its own beside a layer that it holds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, name="inner")

    def build(self, shape: tuple) -> None:
        self.kernel = self.add_weight(shape=(4, 4), name="kernel")
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x @ self.kernel)


class NoConfig(layers.Layer):
    """A layer that its config does not make again."""

    def __init__(self, inner: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x: Any) -> Any:
        return self.inner(x)


class Derived(layers.Layer):
    """A layer whose config tells more than its constructor takes."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.inner = layers.Dense(units, name="inner")

    def call(self, x: Any) -> Any:
        return self.inner(x)

    def get_config(self) -> dict:
        config = {"units": self.units, "twice": 2 * self.units}
        return {**super().get_config(), **config}


def test_a_config_that_tells_more_than_the_constructor_takes() -> None:
    start = keras.Input((4,))
    stock = keras.Model(start, Derived(3, name="block")(start))
    model = convert(stock, "fa")
    assert named_paths(model).keys() == {"block/inner"}
    x = references.normal((2, 4), 1)
    np.testing.assert_array_equal(array(model(x)), array(stock(x)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OwnKernel(name="odd"), r"'odd' \(OwnKernel\) has a kernel"),
        (
            lambda: NoConfig(layers.Dense(4), name="odd"),
            r"'odd' \(NoConfig\) cannot be made again",
        ),
        (
            lambda: NoConfig(OwnKernel(name="deep"), name="odd"),
            r"'deep' \(OwnKernel\) in 'odd' \(NoConfig\).*skip=\['odd'\]",
        ),
    ],
    ids=["own_kernel", "no_config", "deep"],
)
def test_refused(make: Any, said: str) -> None:
    start = keras.Input((4,))
    stock = keras.Model(start, layers.Dense(2)(make()(start)))
    with pytest.raises(ValueError, match=said):
        convert(stock, "fa")


# In place ---------------------------------------------------------------------


class Pair(NamedTuple):
    """What holds layers and is a tuple."""

    first: Any
    second: Any


class Held(keras.Model):
    """Holds layers in whatever `container` makes of two."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.both = container(layers.Dense(8), layers.Dense(4))
        self.readout = layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        first, second = (
            self.both.values() if isinstance(self.both, dict) else self.both
        )
        return self.readout(second(first(inputs)))


@pytest.mark.parametrize(
    "container",
    [
        lambda *both: both,
        Pair,
        lambda *both: list(both),
        lambda *both: dict(zip("ab", both)),
    ],
    ids=["tuple", "named tuple", "list", "dict"],
)
def test_what_is_used_is_what_is_converted(container: Any) -> None:
    model, x = Held(container), references.normal((8, 6), 1)
    before = array(model(x))
    convert(model, "fa")
    assert len(feedback_layers(model)) == 3
    np.testing.assert_array_equal(array(model(x)), before)
    kernels = [array(path.kernel) for path in named_paths(model).values()]
    model.compile("sgd", "mse")
    model.fit(x, references.normal((8, 2), 2), verbose=0)
    for path, old in zip(named_paths(model).values(), kernels):
        assert not np.array_equal(array(path.kernel), old)


def test_what_was_compiled_is_not_used_after_conversion() -> None:
    model, x = Held(Pair), references.normal((8, 6), 1)
    model.predict(x, verbose=0)
    for change in (lambda m: convert(m, "fa"), to_backprop):
        change(model)
        kernel = model.both.first.kernel
        kernel.assign(2 * array(kernel) + 1)
        np.testing.assert_allclose(
            model.predict(x, verbose=0), array(model(x)), rtol=1e-5
        )


class Trunk(keras.Model):
    """Two models that share their first layer."""

    def __init__(self) -> None:
        super().__init__()
        trunk = layers.Dense(5)
        self.one, self.two = (
            keras.Sequential([keras.Input((6,)), trunk, layers.Dense(units)])
            for units in (2, 3)
        )

    def call(self, inputs: Any) -> Any:
        return ops.concatenate([self.one(inputs), self.two(inputs)], -1)


def test_layers_that_held_models_share_stay_shared() -> None:
    model, x = Trunk(), references.normal((8, 6), 1)
    before = array(model(x))
    for change in (lambda m: convert(m, "fa"), to_backprop):
        change(model)
        assert model.one.layers[0] is model.two.layers[0]
        assert len(model.trainable_weights) == 6
        np.testing.assert_array_equal(array(model(x)), before)
