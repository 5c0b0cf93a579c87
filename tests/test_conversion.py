"""`convert` and `to_backprop`: the same model under another method."""

import copy
import dataclasses
import functools
import json
import pickle
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import keras
import numpy as np
import pytest
import references
from backends import array
from backends import requires_tensorflow
from keras import layers
from keras import ops

import keras_fa
from keras_fa import constraints
from keras_fa import convert
from keras_fa import refresh
from keras_fa import to_backprop
from keras_fa.conversion import load_stock_weights
from keras_fa.initializers import KernelMagnitude
from keras_fa.layers.direct import SendError
from keras_fa.layers.feedback import feedback_layers
from keras_fa.methods import METHODS

CHAINED = [name for name, m in METHODS.items() if m.wiring == "chain"]
WIRED = [name for name in METHODS if name not in CHAINED]
# One of each sort: random state, a penalty, a callback, memory, other wirings.
SORTS = "bp_noise bp_alignment fa_usf_sn fa_usf_const_ei dfa dense_fa".split()
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
VECTORS = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
class Bilinear(layers.Layer):
    """A layer of a user's own, with a kernel."""

    def build(self, shape: tuple) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


@keras.saving.register_keras_serializable(package="tests")
class OwnDense(layers.Dense):
    """A subclass of a layer that has a counterpart."""


@keras.saving.register_keras_serializable(package="tests")
class Halves(keras.constraints.Constraint):
    """Moves a kernel towards 1: shows where in a chain it ran."""

    def __call__(self, kernel: Any) -> Any:
        return 0.5 * kernel + 0.5


def sequential() -> keras.Sequential:
    """A small convnet."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv1"),
            layers.BatchNormalization(name="norm"),
            layers.MaxPooling2D(name="pool"),
            layers.Conv2D(4, 2, name="conv2"),
            layers.ReLU(name="relu"),
            layers.Flatten(name="flatten"),
            layers.Dropout(0.2, seed=3, name="dropout"),
            layers.Dense(5, activation="tanh", name="hidden"),
            layers.Dense(3, activation="softmax", name="readout"),
        ],
        name="small",
    )
    return _trained_looking(model)


def functional() -> keras.Model:
    """Two inputs, shared layers, a residual, operations, Normalization."""
    image = keras.Input((8, 8, 3), name="image")
    vector = keras.Input((6,), name="vector")
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(IMAGES)
    first = layers.Conv2D(4, 3, padding="same", name="first")(
        normalization(image)
    )
    first = ops.relu(layers.BatchNormalization(name="bn")(first))
    residual = layers.SeparableConv2D(4, 3, padding="same", name="separable")
    merged = layers.Add(name="add")([first, residual(first)])
    depthwise = layers.DepthwiseConv2D(3, name="depthwise")(merged)
    pooled = layers.GlobalAveragePooling2D(name="pool")(depthwise)
    shared = layers.Dense(4, activation="relu", name="shared")
    joined = layers.Concatenate(name="join")(
        [shared(shared(pooled)) * 2.0 - 0.1, ops.tanh(vector)]
    )
    joined = layers.Dropout(0.1, name="dropout")(joined)
    outputs = layers.Dense(3, name="readout")(joined)
    model = keras.Model([image, vector], outputs, name="several")
    return _trained_looking(model)


def dictionary() -> keras.Model:
    """Inputs by name."""
    image = keras.Input((8, 8, 3), name="image")
    vector = keras.Input((6,), name="vector")
    x = layers.Flatten(name="flatten")(image)
    x = layers.Dense(5, activation="relu", name="left")(x)
    y = layers.Dense(5, activation="relu", name="right")(vector)
    outputs = layers.Dense(3, name="readout")(layers.Add(name="add")([x, y]))
    return keras.Model({"vector": vector, "image": image}, outputs)


def nested() -> keras.Model:
    """Sequential and Functional models in each other, one called twice."""
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(6, activation="relu", name="a"),
            layers.BatchNormalization(name="inner_norm"),
            layers.Dense(6, name="b"),
        ],
        name="inner",
    )
    start = keras.Input((6,))
    block = layers.Dense(6, activation="tanh", name="c")(start)
    block = layers.Add(name="skip")([start, block])
    block = keras.Model(start, block, name="block")
    outer = keras.Sequential(
        [keras.Input((6,)), block, layers.ReLU(name="relu")], name="outer"
    )
    vector = keras.Input((6,), name="vector")
    outputs = layers.Dense(3, name="readout")(outer(inner(inner(vector))))
    return _trained_looking(keras.Model(vector, outputs, name="nest"))


MODELS = {
    "sequential": (sequential, IMAGES),
    "functional": (functional, [IMAGES, VECTORS]),
    "dictionary": (dictionary, {"vector": VECTORS, "image": IMAGES}),
    "nested": (nested, VECTORS),
}
# Each model with each sort of method, and each method with one model: what a
# method makes of a layer does not depend on where the layer is.
CASES = [(kind, method) for kind in MODELS for method in SORTS] + [
    (list(MODELS)[number % len(MODELS)], method)
    for number, method in enumerate(METHODS)
    if method not in SORTS
]
# Where a model is trained and saved: each sort of method and each model. All
# methods are in `test_controls`.
FEW = [
    ("dictionary", "bp_alignment"),
    ("dictionary", "fa_usf_init_ei"),
    ("dictionary", "fa_usf_const_ei"),
    ("dictionary", "dfa"),
    ("functional", "bp_noise"),
    ("functional", "fa_usf_const_ei"),
    ("functional", "dense_fa"),
    ("functional", "dfa"),
    ("nested", "fa_usf_sn"),
    ("nested", "fa_usf_const_ei"),
    ("nested", "dfa"),
    ("nested", "dense_fa"),
]
# Files of models that DFA and DenseFA take apart are refused (test_blocks).
WITH_FILES = [
    *(case for case in FEW if case[0] == "nested" and case[1] in CHAINED),
    *(case for case in FEW if case[0] == "functional"),
    ("dictionary", "bp_alignment"),
    ("dictionary", "fa_usf_init_ei"),
]


def _trained_looking(model: keras.Model) -> keras.Model:
    """Statistics and biases that are not what a fresh model has."""
    generator = np.random.default_rng(5)
    for weight in model.weights:
        if weight.name in ("gamma", "beta", "bias", "moving_variance"):
            value = generator.uniform(0.5, 1.5, weight.shape)
            weight.assign(value.astype("float32"))
    return model


def leaves(model: keras.Model) -> list[layers.Layer]:
    """All layers but inputs, those of nested models in their place."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += leaves(layer)
        elif not isinstance(layer, layers.InputLayer):
            found.append(layer)
    return list(dict.fromkeys(found))  # a nested model may be there twice


def by_name(model: keras.Model) -> dict[str, layers.Layer]:
    """The leaves of a model by name."""
    return {layer.name: layer for layer in leaves(model)}


def values(model: keras.Model) -> list[np.ndarray]:
    """Copies of all weights."""
    return [np.array(weight) for weight in model.weights]


def remembered(model: keras.Model) -> list[np.ndarray]:
    """The fixed signs and norms of a model."""
    return [
        np.array(value)
        for layer in leaves(model)
        if isinstance(layer, keras_fa.layers.FADense | keras_fa.FAConv2D)
        and hasattr(layer.kernel.constraint, "state")
        for value in layer.kernel.constraint.state.values()
    ]


@functools.cache
def shared(kind: str) -> keras.Model:
    """A stock model that no test changes."""
    keras.utils.set_random_seed(1)  # tests begin with 0
    return MODELS[kind][0]()


@functools.cache
def start(kind: str) -> list[np.ndarray]:
    """Its weights before any of it was trained."""
    return values(shared(kind))


@functools.cache
def converted(kind: str, method: str) -> keras.Model:
    """The same, converted, that no test changes."""
    start(kind)
    keras.utils.set_random_seed(2)
    return convert(shared(kind), method)


@functools.cache
def trained(kind: str, method: str) -> keras.Model:
    """The same, trained, that no test changes."""
    start(kind)
    keras.utils.set_random_seed(3)
    model = convert(shared(kind), method)
    train(model, MODELS[kind][1], method)
    return model


@pytest.fixture(scope="module", autouse=True)
def _shared_models() -> Iterator[None]:
    """Frees them."""
    yield
    for made in (shared, start, converted, trained):
        made.cache_clear()


def train(model: keras.Model, x: object, method: str, steps: int = 2) -> None:
    """A few eager steps of Adam with the method's callbacks."""
    loss = references.loss_of(method)
    model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
    callbacks = keras.callbacks.CallbackList(
        METHODS[method].callbacks(), model=model
    )
    callbacks.on_train_begin()
    for step in range(steps):
        model.train_on_batch(x, np.ones((4, 3), "float32"))
        callbacks.on_train_batch_end(step)


def all_equal(ours: list, theirs: list) -> bool:
    """Whether two lists of arrays are equal to the last bit."""
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) for a, b in zip(ours, theirs)
    )


# The same model ------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_same_outputs_names_and_weights(kind: str, method: str) -> None:
    stock, x = shared(kind), MODELS[kind][1]
    config, before = json.dumps(stock.get_config()), values(stock)
    model = convert(stock, method)

    assert np.array_equal(model(x), stock(x))
    ours = by_name(model)
    assert set(ours) >= set(by_name(stock))
    if method in CHAINED:
        assert [a.name for a in leaves(model)] == list(by_name(stock))
        assert type(model) is type(stock)
    for name, layer in by_name(stock).items():
        theirs = layer.weights
        assert all_equal(ours[name].weights[: len(theirs)], theirs)
        if any(w.name.endswith("kernel") for w in theirs):
            assert type(ours[name]).__name__ == f"FA{type(layer).__name__}"
    assert json.dumps(stock.get_config()) == config
    assert all_equal(values(stock), before)


@pytest.mark.parametrize(("kind", "method"), FEW)
def test_training_leaves_the_source_alone(kind: str, method: str) -> None:
    stock, x = shared(kind), MODELS[kind][1]
    model = trained(kind, method)
    assert all(np.isfinite(value).all() for value in values(model))
    assert not np.array_equal(model(x), stock(x))
    assert all_equal(values(stock), start(kind))


@pytest.mark.parametrize("method", SORTS)
def test_same_training_mode_outputs(method: str) -> None:
    stock = sequential()
    model = convert(stock, method)
    assert np.array_equal(
        model(IMAGES, training=True), stock(IMAGES, training=True)
    )
    statistics = "moving_mean", "moving_variance"
    for name in statistics:
        ours, theirs = (
            getattr(m.get_layer("norm"), name) for m in (model, stock)
        )
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("method", "scope"),
    [(name, "layers") for name in dict.fromkeys([*SORTS, *references.KEEPING])]
    + [("fa_usf_sn", "global"), ("dfa", "global")],
)
def test_mixed_precision(method: str, scope: str) -> None:
    before = keras.config.dtype_policy()
    try:
        if scope == "global":
            keras.config.set_dtype_policy("mixed_bfloat16")
        policy = "mixed_bfloat16"
        stock = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(5, activation="relu", name="a", dtype=policy),
                layers.Dense(5, name="b", dtype=policy),
                layers.Dense(3, name="readout", dtype=policy),
            ]
        )
    finally:
        # Converted under another policy than it was built under.
        keras.config.set_dtype_policy(before)
    model = convert(stock, method)
    outputs = model(VECTORS)
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    assert dtype == model.outputs[0].dtype == "bfloat16"
    assert np.array_equal(outputs, stock(VECTORS))
    train(model, VECTORS, method)
    assert all(np.isfinite(value).all() for value in values(model))
    assert model.get_layer("a").dtype_policy.name == policy
    assert model.get_layer("a").kernel.dtype == "float32"


def test_dtype_policies_per_layer_stay() -> None:
    stock = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, dtype="mixed_bfloat16", name="low"),
            layers.Dense(3, dtype="float32", name="full"),
        ]
    )
    model = convert(stock, "fa_usf_sn")
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert policies == ["mixed_bfloat16", "float32"]
    assert np.array_equal(model(VECTORS), stock(VECTORS))


@pytest.mark.parametrize("method", SORTS)
def test_frozen_layers_stay_frozen(method: str) -> None:
    stock = sequential()
    stock.get_layer("conv1").trainable = False
    stock.get_layer("norm").trainable = False
    model = convert(stock, method)
    frozen = [model.get_layer(name) for name in ("conv1", "norm")]
    assert not any(layer.trainable for layer in frozen)
    before = [np.array(w) for w in frozen[0].weights[:2]]
    hidden = np.array(model.get_layer("hidden").kernel)
    train(model, IMAGES, method)
    assert all_equal([np.array(w) for w in frozen[0].weights[:2]], before)
    assert not np.array_equal(model.get_layer("hidden").kernel, hidden)
    assert not to_backprop(model).get_layer("conv1").trainable


def test_frozen_nested_model_stays_frozen() -> None:
    stock = nested()
    stock.get_layer("inner").trainable = False
    model = convert(stock, "fa_usf_sn")
    frozen = model.get_layer("inner").layers
    assert not any(
        weight.trainable for inner in frozen for weight in inner.weights
    )
    assert len(model.trainable_weights) == len(stock.trainable_weights)


def with_base() -> keras.Model:
    """A Functional model in a Functional model."""
    start = keras.Input((6,))
    x = layers.Dense(5, activation="tanh", name="low")(start)
    x = layers.BatchNormalization(name="base_norm")(x)
    x = layers.Dense(4, activation="tanh", name="high")(x)
    base = keras.Model(start, x, name="base")
    vector = keras.Input((6,))
    outputs = layers.Dense(3, name="readout")(base(vector))
    return keras.Model(vector, outputs, name="whole")


def flags(model: keras.Model) -> dict[str, bool]:
    """The `trainable` flag of a model and of all in it but inputs."""
    found = {model.name: model.trainable}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found.update(flags(layer))
        elif not isinstance(layer, layers.InputLayer):
            found[layer.name] = layer.trainable
    return found


FROZEN: dict[str, Callable[[keras.Model], None]] = {
    "nothing": lambda model: None,
    "layer": lambda model: _freeze(model.get_layer("readout")),
    "base": lambda model: _freeze(model.get_layer("base")),
    "base but for a layer": lambda model: (
        _freeze(model.get_layer("base")),
        _freeze(model.get_layer("base").get_layer("high"), False),
    ),
    "layer in a base": lambda model: _freeze(
        model.get_layer("base").get_layer("low")
    ),
    "all": lambda model: _freeze(model),
    "weight": lambda model: _freeze(model.get_layer("readout").bias),
}


def _freeze(owner: object, frozen: bool = True) -> None:
    owner.trainable = not frozen


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, "fa") for kind in FROZEN]
    + [("base but for a layer", "fa_usf_const_ei")],
)
def test_every_flag_is_kept_and_unfreezing_trains(
    kind: str, method: str
) -> None:
    stock = with_base()
    FROZEN[kind](stock)
    model = convert(stock, method)
    for each in (model, to_backprop(model), convert(model, "fa_usf_sn")):
        assert flags(each) == flags(stock)
        ours, theirs = (
            [w.path.split("/")[-2:] for w in m.trainable_weights]
            for m in (each, stock)
        )
        assert ours == theirs
        for layer in (each, each.get_layer("base"), *leaves(each)):
            layer.trainable = True
        each.get_layer("readout").bias.trainable = True
        before = values(each)
        # Traced once, for the time that it takes.
        traced = kind == "all" and each is model
        each.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=not traced)
        each.train_on_batch(VECTORS, np.ones((4, 3)))
        for weight, value in zip(each.weights, before):
            if weight.trainable:
                moved = not np.array_equal(array(weight), value)
                # A bias below a normalization has no gradient but rounding.
                assert moved or weight.path.endswith("low/bias"), weight.path
        assert len(each.trainable_weights) == 8


@pytest.mark.parametrize("method", WIRED)
def test_every_flag_is_kept_in_wired_models(method: str) -> None:
    names = None, "hidden", "norm", "readout"
    for name in names if method in SORTS else names[:2]:
        stock = sequential()
        _freeze(stock.get_layer(name) if name else stock)
        model = convert(stock, method)
        for each in (model, to_backprop(model), convert(model, method)):
            kept = flags(each)
            assert {n: kept[n] for n in flags(stock)} == flags(stock)
            trained = [
                w for w in each.trainable_weights if "send_error" not in w.path
            ]
            assert len(trained) == len(stock.trainable_weights)


def test_layers_shared_stay_shared() -> None:
    model = convert(functional(), "fa")
    assert sum(layer.name == "shared" for layer in model.layers) == 1
    inner = convert(nested(), "fa").get_layer("inner")
    assert len(inner._inbound_nodes) >= 1
    a = [
        layer for layer in leaves(convert(nested(), "fa")) if layer.name == "a"
    ]
    assert len({id(layer) for layer in a}) == 1
    shared = layers.Dense(6, name="both")
    block = keras.Sequential([keras.Input((6,)), shared], name="block")
    vector = keras.Input((6,))
    stock = keras.Model(vector, layers.Dense(3)(shared(block(vector))))
    model = convert(stock, "fa")
    (inside,) = model.get_layer("block").layers
    assert inside is model.get_layer("both")


@pytest.mark.parametrize("method", ["fa_usf_const_ei", "dfa"])
def test_compiled_models_stay_compiled(method: str) -> None:
    stock = sequential()
    assert not convert(stock, method).compiled
    stock.compile(
        keras.optimizers.SGD(0.25, momentum=0.5),
        "mse",
        metrics=["mae"],
        run_eagerly=True,
    )
    for model in (
        convert(stock, method),
        to_backprop(convert(stock, method)),
    ):
        assert model.compiled
        assert model.optimizer is not stock.optimizer
        assert float(model.optimizer.learning_rate) == 0.25
        assert model.optimizer.momentum == 0.5
        logs = model.train_on_batch(IMAGES, np.ones((4, 3)), return_dict=True)
        assert set(logs) == {"loss", "mae"}


class Counting(keras.Model):
    """A Functional model with a training step of its own."""

    steps = 0

    def train_step(self, *args: object) -> dict:
        type(self).steps += 1
        return super().train_step(*args)


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_functional_subclass_keeps_its_class(method: str) -> None:
    start = keras.Input((6,))
    x = layers.Dense(4, activation="relu")(start)
    model = convert(Counting(start, layers.Dense(3)(x)), method)
    Counting.steps = 0
    train(model, VECTORS, method, steps=1)
    assert type(model) is Counting
    assert Counting.steps > 0


class Backbone(keras.Model):
    """A Functional model with a constructor and a config of its own."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        start = keras.Input((6,), name="features")
        x = layers.Dense(width, activation="relu", name="a")(start)
        x = layers.Dense(width, activation="relu", name="b")(x)
        outputs = layers.Dense(3, activation="softmax", name="c")(x)
        super().__init__(inputs=start, outputs=outputs, **kwargs)
        self.width = width

    def get_config(self) -> dict:
        return {"width": self.width, "name": self.name}

    @classmethod
    def from_config(cls, config: dict) -> "Backbone":
        return cls(**config)


@pytest.mark.parametrize("method", ["fa_usf_sn", *references.KEEPING])
def test_functional_subclass_with_a_config_of_its_own(method: str) -> None:
    stock = Backbone(5)
    model = convert(stock, method)
    assert np.array_equal(model(VECTORS), stock(VECTORS))
    wired = METHODS[method].wiring != "chain"
    assert isinstance(model, Backbone) is not wired
    assert type(to_backprop(model)) is type(with_base() if wired else stock)
    assert np.array_equal(to_backprop(model)(VECTORS), stock(VECTORS))
    train(model, VECTORS, method)


def test_deferred_sequential_that_was_called() -> None:
    stock = keras.Sequential([layers.Dense(4), layers.Dense(3)])
    stock(VECTORS)
    for method in SORTS:
        assert np.array_equal(convert(stock, method)(VECTORS), stock(VECTORS))


class Doubling(keras.Model):
    """A Functional model with a `call` of its own."""

    def __init__(self) -> None:
        start = keras.Input((6,))
        super().__init__(start, layers.Dense(3)(start))

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        return 2 * super().call(inputs, **kwargs)


class Stepping(keras.Sequential):
    """A Sequential model with a step of its own."""

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)


def test_a_call_of_its_own_is_not_dropped() -> None:
    start = keras.Input((6,))
    outer = keras.Model(start, layers.Dense(3)(Doubling()(start)))
    for model in (Doubling(), outer):
        assert np.array_equal(convert(model, "fa")(VECTORS), model(VECTORS))
        with pytest.raises(ValueError, match=r"\(Doubling\) has a `call` of"):
            convert(model, "dfa")


def test_a_step_of_its_own_that_is_lost_is_told() -> None:
    model = Stepping([keras.Input((6,)), layers.Dense(3)])
    with pytest.warns(UserWarning, match="Sequential and loses its train_step"):
        convert(model, "fa")


@pytest.mark.parametrize("change", [lambda m: convert(m, "fa"), to_backprop])
def test_copies_do_not_come_apart(change: Callable) -> None:
    shared = layers.Dense(5, name="shared")
    steps, vector = keras.Input((3, 6)), keras.Input((6,))
    wrapped = layers.TimeDistributed(shared, name="wrapper")(steps)
    model = keras.Model([steps, vector], [wrapped, shared(vector)])
    with pytest.raises(ValueError, match=r"'shared' \(Dense\) is part of"):
        change(model)


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_a_graph_on_a_weight_is_refused(method: str) -> None:
    start, layer = keras.Input((6,)), layers.Dense(4, name="tied")
    x = ops.einsum("bh,ih->bi", layer(start), layer.kernel)
    with pytest.raises(
        ValueError, match=r"is called on a weight, 'tied/kernel"
    ):
        convert(keras.Model(start, layers.Dense(3)(x)), method)


class Unnamed(layers.Layer):
    """A kernel whose variable has no name."""

    def build(self, shape: tuple) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 4))

    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.kernel)


def test_a_kernel_without_a_name_is_found() -> None:
    stock = keras.Sequential(
        [keras.Input((6,)), Unnamed(name="own"), layers.Dense(3)]
    )
    with pytest.raises(ValueError, match=r"'own' \(Unnamed\) has a kernel"):
        convert(stock, "fa")


def test_silent_zeros_of_the_method_win() -> None:
    own = constraints.FixedSign("unit", 0.5, seed=3)
    stock = keras.Sequential(
        [keras.Input((6,)), layers.Dense(3, kernel_constraint=own)]
    )
    for method in ("fa_usf_init_ei", "fa_usf_init_ei_silent"):
        got = convert(stock, method).layers[0].kernel_constraint
        silent = method.endswith("_silent")
        assert got.get_config() == own.get_config() | {"silent_zeros": silent}


def mean_squared_error(y: Any, output: Any) -> Any:
    """Not Keras's."""
    return 100 * ops.mean(ops.square(y - output), axis=-1)


@pytest.mark.parametrize(
    "given",
    [
        {"loss": mean_squared_error},
        {"loss": "mae", "metrics": ["mae", mean_squared_error]},
        {"loss": ["mae"], "weighted_metrics": [[mean_squared_error]]},
    ],
)
def test_a_function_with_the_name_of_keras_is_not_replaced(given: dict) -> None:
    stock = sequential()
    stock.compile("sgd", **given)
    with pytest.warns(UserWarning, match="is a function of your own"):
        model = convert(stock, "fa")
    assert not model.compiled
    stock.compile("sgd", keras.losses.mean_squared_error, metrics=["mae"])
    assert convert(stock, "fa").compiled


@pytest.mark.parametrize("by", ["var_list", "var_names"])
def test_weight_decay_that_is_not_copied_is_told(by: str) -> None:
    stock = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    optimizer = keras.optimizers.AdamW(0.01)
    stock.compile(optimizer, "mse")
    convert(stock, "fa")
    excluded = {"var_list": [stock.layers[0].bias], "var_names": ["bias"]}[by]
    optimizer = keras.optimizers.AdamW(0.01)
    optimizer.exclude_from_weight_decay(**{by: excluded})
    stock.compile(optimizer, "mse")
    with pytest.warns(UserWarning, match="excludes from weight decay is not"):
        assert convert(stock, "fa").compiled


# Feedback starts independently --------------------------------------------


@pytest.mark.parametrize("seed", [None, 7])
def test_feedback_is_not_the_forward_kernel(seed: int | None) -> None:
    same = keras.initializers.HeNormal(seed=seed)
    stock = keras.Sequential(
        [keras.Input((16,))]
        + [
            layers.Dense(16, kernel_initializer=same, name=name)
            for name in "abc"
        ]
    )
    model = convert(stock, "fa")
    forward = [np.array(layer.kernel).ravel() for layer in model.layers]
    back = [np.array(layer.feedback_kernel).ravel() for layer in model.layers]
    for own in forward:
        for other in back:
            assert abs(np.corrcoef(own, other)[0, 1]) < 0.25


def test_kernel_without_randomness() -> None:
    stock = keras.Sequential(
        [keras.Input((6,)), layers.Dense(3, kernel_initializer="zeros")]
    )
    with pytest.raises(ValueError, match="B_0 would be W_0"):
        convert(stock, "fa")
    model = convert(stock, "fa_usf_sn")
    assert np.array_equal(model(VECTORS), stock(VECTORS))


# Files ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), WITH_FILES)
def test_stock_weights_file_loads(
    kind: str, method: str, tmp_path: Path
) -> None:
    build, x = MODELS[kind]
    source, model = build(), convert(build(), method)
    _move(source)
    assert not np.array_equal(model(x), source(x))
    for file in ("stock.weights.h5", "stock.keras"):
        _move(source)
        path = str(tmp_path / file)
        source.save(path) if file.endswith("keras") else source.save_weights(
            path
        )
        model.load_weights(path)
        assert np.array_equal(model(x), source(x))
        for layer in leaves(model):
            _check_memory(layer)


def by_hand() -> keras.Model:
    """FA and stock layers in turn, with another model in between."""
    inner = keras.Sequential(
        [
            keras.Input((8,)),
            layers.BatchNormalization(name="inner_norm"),
            keras_fa.FADense(8, kernel_constraint="fixed_sign", name="inner"),
        ]
    )
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="first"),
            inner,
            keras_fa.FADense(8, kernel_constraint="constant_norm", name="b"),
            layers.Dense(8, name="c"),
            keras_fa.FADense(3, name="last"),
        ]
    )


LOADED: dict[str, tuple[Callable[[], keras.Model], Any]] = {
    **{
        f"{kind} {method}": (
            lambda build=MODELS[kind][0], method=method: convert(
                build(), method
            ),
            MODELS[kind][1],
        )
        for kind, method in WITH_FILES
    },
    "sequential dfa": (lambda: convert(sequential(), "dfa"), IMAGES),
    "by hand": (by_hand, VECTORS),
}


@pytest.mark.parametrize("kind", LOADED)
def test_load_stock_weights(kind: str, tmp_path: Path) -> None:
    build, x = LOADED[kind]
    model = build()
    stored = {
        layer.name: np.array(layer.feedback_kernel)
        for layer in feedback_layers(model)
        if getattr(layer.feedback_kernel, "shape", ()) != ()
        # Which follows from the kernel.
        and not isinstance(layer.feedback_initializer, KernelMagnitude)
    }
    source = MODELS[kind.split()[0]][0]() if " hand" not in kind else None
    source = source or to_backprop(model)
    for file in ("x.weights.h5", "x.keras", "x.h5"):
        _move(source)
        path = str(tmp_path / file)
        source.save_weights(path) if "weights" in file else source.save(path)
        assert not np.array_equal(model(x), source(x))
        load_stock_weights(model, path)
        assert np.array_equal(model(x), source(x))
        for layer in leaves(model):
            _check_memory(layer)
            if layer.name in stored:
                feedback = np.array(layer.feedback_kernel)
                assert np.array_equal(feedback, stored[layer.name])


class Noted(keras_fa.FADense):
    """A subclass of an FA layer, with an argument of its own."""

    def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note

    def get_config(self) -> dict:
        return {**super().get_config(), "note": self.note}


def test_a_stock_file_loads_into_subclasses(tmp_path: Path) -> None:
    model, stock = (
        keras.Sequential(
            [keras.Input((6,)), make("a"), layers.Dense(8), make("b")]
        )
        for make in (
            lambda note: Noted(8, note=note, kernel_constraint="fixed_sign"),
            lambda _: layers.Dense(8),
        )
    )
    stock.save_weights(tmp_path / "x.weights.h5")
    load_stock_weights(model, tmp_path / "x.weights.h5")
    assert np.array_equal(model(VECTORS), stock(VECTORS))
    for layer in leaves(model):
        _check_memory(layer)


def test_a_stock_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model = convert(sequential(), "fa_usf_const_ei")
    before = values(model)
    other = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    for file in ("x.weights.h5", "x.h5"):
        path = str(tmp_path / file)
        other.save_weights(path) if "weights" in file else other.save(path)
        with pytest.raises(ValueError, match=r"[Ll]ayer"):
            load_stock_weights(model, path)
    with pytest.raises(ValueError, match="into the stock model, and convert"):
        load_stock_weights(layers.Dense(3), "x.weights.h5")
    assert all_equal(values(model), before)


def _move(model: keras.Model) -> None:
    """Other kernels, of other signs and norms."""
    generator = np.random.default_rng()
    for weight in model.trainable_weights:
        value = 0.3 * generator.normal(size=weight.shape)
        weight.assign(value.astype("float32"))


def _check_memory(layer: layers.Layer) -> None:
    """Signs and norms are those of the kernel now."""
    constraint = getattr(getattr(layer, "kernel", None), "constraint", None)
    kernel = np.array(layer.kernel) if constraint is not None else None
    state = getattr(constraint, "state", {})
    if "excitatory" in state:
        assert np.array_equal(state["excitatory"], ~np.signbit(kernel))
    if "norm" in state:
        norm = np.linalg.norm(kernel)
        np.testing.assert_allclose(state["norm"], norm, rtol=1e-6)


@pytest.mark.parametrize(("kind", "method"), FEW)
def test_own_file_brings_everything_back(
    kind: str, method: str, tmp_path: Path
) -> None:
    build, x = MODELS[kind]
    model = trained(kind, method)
    if kind == "dictionary":  # trained on, below
        model = convert(shared(kind), method)
        train(model, x, method)
    other = build()
    _move(other)
    other = convert(other, method)
    model.save_weights(tmp_path / "ours.weights.h5")
    other.load_weights(tmp_path / "ours.weights.h5")
    model.save(tmp_path / "ours.keras")
    whole = keras.models.load_model(tmp_path / "ours.keras")
    for loaded in (other, whole):
        assert np.array_equal(loaded(x), model(x))
        assert all_equal(values(loaded), values(model))
        assert all_equal(remembered(loaded), remembered(model))
    # The step that follows is the same, too.
    if method != "bp_noise" and kind == "dictionary":
        train(model, x, method, steps=1)
        train(whole, x, method, steps=1)
        assert all_equal(values(whole), values(model))


def test_remembered_signs_and_norms_are_of_the_start(tmp_path: Path) -> None:
    stock = sequential()
    model = convert(stock, "fa_usf_const_ei")
    train(model, IMAGES, "fa_usf_const_ei", steps=10)
    kernel = np.array(stock.get_layer("hidden").kernel)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        layer = each.get_layer("hidden")
        excitatory = np.array(layer.kernel.constraint.state["excitatory"])
        assert np.array_equal(excitatory, kernel > 0)
        signs = np.where(excitatory, 1, -1)
        assert (np.array(layer.kernel) * signs >= 0).all()
        np.testing.assert_allclose(
            np.linalg.norm(layer.kernel), np.linalg.norm(kernel), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("saved", "into"),
    [
        ("fa_usf_sn", "fa"),
        ("fa", "fa_usf_sn"),
        ("fa", "fa_usf_const_ei"),
        ("fa_usf_init", "fa_usf_init_ei"),
        ("bp_const", "fa_usf_sn"),
    ],
)
def test_file_of_another_method_is_refused(
    saved: str, into: str, tmp_path: Path
) -> None:
    convert(sequential(), saved).save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="written under another method"):
        convert(sequential(), into).load_weights(tmp_path / "x.weights.h5")


@pytest.mark.parametrize("direction", ["to dfa", "from dfa"])
def test_file_of_another_wiring_is_refused(
    direction: str, tmp_path: Path
) -> None:
    methods = ["fa", "dense_fa"]
    saved, into = methods if direction == "to dfa" else methods[::-1]
    convert(sequential(), saved).save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="written under another method"):
        convert(sequential(), into).load_weights(tmp_path / "x.weights.h5")


@pytest.mark.parametrize("method", SORTS)
def test_pickle_deepcopy_and_clone(method: str) -> None:
    model = trained("sequential", method)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(again(IMAGES), model(IMAGES))
        assert all_equal(values(again), values(model))
        assert all_equal(remembered(again), remembered(model))
    clone = keras.models.clone_model(model)
    assert [type(a) for a in clone.layers] == [type(a) for a in model.layers]
    clone.set_weights(model.get_weights())
    refresh(clone)
    assert np.array_equal(clone(IMAGES), model(IMAGES))


@requires_tensorflow
@pytest.mark.parametrize("method", ["bp_noise", "fa_usf_const_ei", "dfa"])
def test_export_serves_the_same(method: str, tmp_path: Path) -> None:
    import tensorflow as tf

    x, model = MODELS["dictionary"][1], converted("dictionary", method)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-6)


_LOAD = """
import sys
import numpy as np
import keras
{imports}
folder = sys.argv[1]
data = np.load(f"{{folder}}/data.npz")
for name in data.files:
    if name == "x":
        continue
    model = keras.models.load_model(f"{{folder}}/{{name}}.keras")
    outputs = keras.ops.convert_to_numpy(model(data["x"]))
    assert np.array_equal(outputs, data[name]), name
    before = [np.array(w) for w in model.trainable_weights]
    # Traced once, for the time that it takes.
    model.compile("adam", "mse", run_eagerly=name != "fa_usf_sn")
    model.train_on_batch(data["x"], np.ones((4, 3)))
    after = model.trainable_weights
    assert not any(np.array_equal(a, b) for a, b in zip(before, after)), name
    print(name)
assert ("keras_fa" in sys.modules) == {ours}
"""


@pytest.mark.parametrize("ours", [True, False])
def test_saved_models_load_in_a_fresh_process(
    ours: bool, tmp_path: Path
) -> None:
    data = {"x": IMAGES}
    for method in SORTS:
        model = trained("sequential", method)
        if not ours:
            plain = to_backprop(model)
            assert np.array_equal(plain(IMAGES), model(IMAGES))
            model = plain
        model.save(tmp_path / f"{method}.keras")
        data[method] = np.array(model(IMAGES))
    np.savez(tmp_path / "data.npz", **data)
    imports = "import keras_fa" if ours else ""
    code = _LOAD.format(imports=imports, ours=ours)
    done = forks.run("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == SORTS


# Choices per layer ---------------------------------------------------------


def rules(model: keras.Model) -> dict[str, str]:
    """The class name of each FA layer's rule, "" for FA."""
    return {
        layer.name: type(layer.feedback_constraint).__name__.replace(
            "NoneType", ""
        )
        for layer in leaves(model)
        if hasattr(layer, "feedback_constraint")
    }


def test_methods_per_layer_names_win() -> None:
    model = convert(
        sequential(),
        "fa_usf_sn",
        layers={layers.Dense: "fa", "readout": "bp"},
    )
    assert rules(model) == {
        "conv1": "SignConcordance",
        "conv2": "SignConcordance",
        "hidden": "",
        "readout": "TiedKernel",
    }
    assert np.array_equal(model(IMAGES), sequential()(IMAGES)) is False
    again = convert(model, "fa", layers={keras_fa.FAConv2D: METHODS["bp"]})
    assert rules(again)["conv1"] == "TiedKernel"
    assert rules(again)["hidden"] == ""


def test_methods_per_layer_reach_nested_models() -> None:
    model = convert(nested(), "fa", layers={"b": "bp", "c": "fa_usf_init"})
    assert rules(model) == {
        "a": "",
        "b": "TiedKernel",
        "c": "SignConcordance",
        "readout": "",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "FA"}, "Unknown method 'FA'.*fa_usf_sn"),
        ({"method": None}, "Unknown method None"),
        ({"method": ["fa"]}, "Unknown method"),
        ({"layers": {"nowhere": "bp"}}, "'nowhere'.*conv1"),
        ({"layers": {"conv1": "bq"}}, "Unknown method 'bq'"),
        ({"layers": {"conv1": None}}, "Unknown method None"),
        ({"layers": {"pool": "bp"}}, "'pool'.*MaxPooling2D"),
        ({"layers": {layers.ConvLSTM2D: "bp"}}, "ConvLSTM2D.*Conv2D"),
        ({"layers": {3: "bp"}}, "names and classes.*3"),
        ({"layers": {"conv1": "dfa"}}, "whole model.*conv1.*dfa"),
        ({"layers": {"conv1": "dense_fa"}}, "whole model.*conv1.*dense_fa"),
        ({"layers": ["conv1"]}, "dict"),
        ({"skip": ["nowhere"]}, "'nowhere'.*skip"),
        ({"skip": ["conv1"]}, "'conv1'.*FA.*bp"),
        ({"skip": "conv1"}, "'conv1'.*FA.*bp"),
        ({"method": "dfa", "layers": {"conv1": "bp"}}, "whole model"),
        ({"method": "dense_fa", "layers": {"conv1": "bp"}}, "whole model"),
    ],
)
def test_wrong_choices(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(sequential(), **{"method": "fa", **arguments})


def test_a_method_of_ones_own() -> None:
    method = keras_fa.methods.Method(
        name="mine",
        title="Mine",
        definition="B = 0.1",
        standing="ours",
        feedback_initializer=keras.initializers.Constant(0.1),
    )
    model = convert(sequential(), method)
    feedback = model.get_layer("hidden").effective_feedback_kernel()
    assert np.array_equal(feedback, np.full_like(feedback, 0.1))


def test_dense_fa_whose_chain_is_fa() -> None:
    method = dataclasses.replace(
        METHODS["dense_fa"],
        feedback_initializer=None,
        feedback_constraint=None,
        callback_classes=(),
    )
    model = convert(sequential(), method)
    assert set(rules(model).values()) == {""}
    layer = model.get_layer("hidden")
    feedback = layer.effective_feedback_kernel()
    assert np.array_equal(feedback, layer.feedback_kernel)
    assert not np.array_equal(feedback, layer.kernel)


@pytest.mark.parametrize("seed", [None, 7])
def test_an_initializer_of_a_method_draws_for_each_layer(
    seed: int | None,
) -> None:
    """No two layers of one draw are equal; with a seed two models are."""
    law = keras.initializers.HeNormal(seed=seed)
    method = dataclasses.replace(METHODS["fa"], feedback_initializer=law)
    stock = keras.Sequential(
        [keras.Input((16,))] + [layers.Dense(16, name=name) for name in "ab"]
    )
    first, second = (
        [np.array(layer.feedback_kernel) for layer in model.layers]
        for model in (convert(stock, method), convert(stock, method))
    )
    for one, other in ((first[0], first[1]), (first[0], second[1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5
    assert np.array_equal(first[0], second[0]) == (seed is not None)


# Layers without a counterpart ----------------------------------------------


def _around(layer: layers.Layer, shape: tuple = (5, 6)) -> keras.Model:
    """A model with a Dense layer on each side of another one."""
    start = keras.Input(shape)
    x = layers.Dense(6, name="below")(start)
    return keras.Model(start, layers.Dense(3, name="above")(layer(x)))


ODD: dict[str, Callable[[], layers.Layer]] = {
    "Bilinear": lambda: Bilinear(name="odd"),
    "OwnDense": lambda: OwnDense(4, name="odd"),
    "SpectralNormalization": lambda: layers.SpectralNormalization(
        layers.Dense(4), name="odd"
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_layer_without_counterpart(kind: str, method: str) -> None:
    stock = _around(ODD[kind]())
    x = np.random.normal(size=(4, 5, 6)).astype("float32")
    with pytest.raises(ValueError, match=rf"'odd' \({kind}\).*skip=\['odd'\]"):
        convert(stock, method)
    model = convert(stock, method, skip=["odd"])
    assert np.array_equal(model(x), stock(x))
    assert type(model.get_layer("odd")) is type(stock.get_layer("odd"))
    assert np.array_equal(to_backprop(model)(x), stock(x))
    with pytest.raises(ValueError, match="'odd'"):
        convert(model, "fa_usf_sn")
    again = convert(model, "fa_usf_sn", skip="odd")
    assert np.array_equal(again(x), stock(x))


def test_layer_without_counterpart_is_not_hidden_by_a_namesake() -> None:
    odd = OwnDense(3, name="x")
    first = keras.Sequential([keras.Input((4, 2)), odd, layers.Flatten()])
    second = keras.Sequential([keras.Input((12,)), layers.Dense(3, name="x")])
    start = keras.Input((4, 2))
    with pytest.raises(ValueError, match=r"'x' \(OwnDense\)"):
        convert(keras.Model(start, second(first(start))), "fa")


def test_embedding_and_other_weights_need_no_skip() -> None:
    stock = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.LayerNormalization(),
            layers.PReLU(),
            layers.Dense(3),
        ]
    )
    x = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 1, 0]])
    for method in SORTS:
        assert np.array_equal(convert(stock, method)(x), stock(x))


class Subclassed(keras.Model):
    """A model whose layers nobody can see."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)


@pytest.mark.parametrize("way", [lambda m: convert(m, "fa"), to_backprop])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: keras.Sequential([layers.Dense(3)]), "not built"),
        (lambda: keras.Sequential(), "not built"),
        (lambda: Subclassed(), "not built"),
        (lambda: layers.Dense(3), "Functional and Sequential.*Dense"),
        (lambda: None, "Functional and Sequential.*None"),
        (lambda: "model.keras", "Functional and Sequential.*str"),
    ],
)
def test_what_cannot_be_converted(
    way: Callable, model: Callable, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        way(model())


def test_subclassed_model_inside_is_named() -> None:
    start = keras.Input((6,))
    inner = Subclassed()
    inner.name = "inside"
    with pytest.raises(ValueError, match="'inside'"):
        convert(keras.Model(start, inner(start)), "fa")


# What a config does not hold -------------------------------------------------


def _looked_up(layer: layers.Layer, dtype: str) -> keras.Model:
    start = keras.Input((1,), dtype=dtype)
    x = layers.Flatten()(ops.cast(layer(start), "float32"))
    x = layers.Dense(4, activation="relu")(x)
    return keras.Model(start, layers.Dense(3)(x))


ADAPTED: dict[str, tuple[Callable[[], layers.Layer], list, list]] = {
    "words": (
        lambda: layers.TextVectorization(output_sequence_length=3),
        ["a b c", "b c d"],
        [["d b q"], ["a"]],
    ),
    "bag of words": (
        lambda: layers.TextVectorization(output_mode="multi_hot"),
        ["a b c", "b c d"],
        [["d b q"], ["a"]],
    ),
    "strings": (
        lambda: layers.StringLookup(output_mode="one_hot"),
        ["a", "b", "c"],
        [["c"], ["q"]],
    ),
    "integers": (
        lambda: layers.IntegerLookup(output_mode="one_hot"),
        [3, 5, 8],
        [[8], [1]],
    ),
    "bins": (
        lambda: layers.Discretization(num_bins=3),
        [1.0, 2.0, 5.0, 8.0],
        [[1.5], [7.0]],
    ),
}


@requires_tensorflow
@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_vocabularies_are_kept(kind: str, method: str) -> None:
    import tensorflow as tf

    make, seen, x = ADAPTED[kind]
    layer = make()
    layer.adapt(np.array(seen))
    x = tf.constant(x)
    stock = _looked_up(layer, x.dtype.name)
    model = convert(stock, method)
    assert np.array_equal(model(x), stock(x))
    assert np.array_equal(to_backprop(model)(x), stock(x))


class Shrunk(keras.initializers.Initializer):
    """A random law of a user's own, which Keras has not registered."""

    def __init__(self, scale: float, seed: int | None = None) -> None:
        self.scale = scale
        self.seed = seed or keras.random.randint((), 1, 1000)

    def __call__(self, shape: tuple, dtype: Any = None) -> Any:
        seed = int(self.seed)
        return self.scale * keras.random.normal(shape, dtype=dtype, seed=seed)

    def get_config(self) -> dict:
        return {"scale": self.scale}


class Clipped(keras.constraints.Constraint):
    """A constraint of a user's own, which does not say its argument."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, kernel: Any) -> Any:
        return ops.clip(kernel, -self.limit, self.limit)


class Cubed(keras.regularizers.Regularizer):
    """A penalty of a user's own, which Keras has not registered."""

    def __call__(self, kernel: Any) -> Any:
        return ops.sum(ops.abs(kernel) ** 3)

    def get_config(self) -> dict:
        return {}


def relu(x: Any) -> Any:
    """Not the relu that Keras finds by this name."""
    return ops.maximum(x, 0.1 * x)


def backends_relu() -> Callable:
    """The backend's own."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.nn.relu
    if keras.backend.backend() == "torch":
        import torch

        return torch.nn.functional.relu
    import tensorflow as tf

    return tf.nn.relu


GIVEN: dict[str, Callable[[], layers.Layer]] = {
    "lambda": lambda: layers.Dense(4, lambda x: 2 * ops.tanh(x)),
    "backend's": lambda: layers.Dense(4, backends_relu()),
    "namesake": lambda: layers.Dense(4, relu),
    "layer": lambda: layers.Dense(4, layers.LeakyReLU(0.3)),
    "in a layer": lambda: layers.Activation(lambda x: 2 * ops.tanh(x)),
    "namesake in a layer": lambda: layers.Activation(relu),
    "constraint": lambda: layers.Dense(
        4, kernel_constraint=Clipped(0.1), name="clipped"
    ),
    "regularizer": lambda: layers.Dense(4, kernel_regularizer=Cubed()),
    "function": lambda: layers.Dense(4, kernel_regularizer=ops.sum),
    "initializer": lambda: layers.Dense(4, kernel_initializer=Shrunk(0.5)),
    "recurrent": lambda: layers.SimpleRNN(
        4, lambda x: 2 * ops.tanh(x), name="odd"
    ),
}


@pytest.mark.filterwarnings("ignore:The object being serialized")
@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("method", ["fa_usf_const_ei", "dfa"])
def test_what_keras_cannot_serialise_is_carried_over(
    kind: str, method: str
) -> None:
    layer = GIVEN[kind]()
    shape = (5, 6) if kind == "recurrent" else (6,)
    stock = keras.Sequential([keras.Input(shape), layer, layers.Dense(3)])
    x = np.random.default_rng(3).normal(size=(4, *shape)).astype("float32")
    model = convert(stock, method)
    plain = to_backprop(model)
    losses = []
    for each in (stock, model, plain):
        assert np.array_equal(each(x), stock(x))
        losses.append(sum(map(float, each.losses)))
    assert losses[0] == losses[1] == losses[2]
    if kind == "constraint":
        for each in (model, plain):
            each.compile("sgd", "mse", run_eagerly=True)
            each.fit(x, np.ones((4, 3)), verbose=0)
        assert np.abs(array(plain.get_layer("clipped").kernel)).max() <= 0.1


def test_an_unregistered_initializer_draws_anew() -> None:
    stock = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(16, kernel_initializer=Shrunk(0.5), name="a"),
        ]
    )
    layer = convert(stock, "fa").get_layer("a")
    assert layer.kernel_initializer is not stock.layers[0].kernel_initializer
    kernels = np.array(layer.kernel), np.array(layer.feedback_kernel)
    assert abs(np.corrcoef(*map(np.ravel, kernels))[0, 1]) < 0.5


class Patches(layers.Layer):
    """A layer whose config does not say its argument."""

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def call(self, inputs: Any) -> Any:
        return ops.repeat(inputs, self.size, axis=-1)

    def get_config(self) -> dict:
        return super().get_config()


class Wrapped(Patches):
    """A layer of which Keras makes no config."""

    get_config = layers.Layer.get_config


@pytest.mark.parametrize("way", [*SORTS, "back"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patches(2, name="p"), r"'p' \(Patches\).*argument: 'size'"),
        (
            lambda: Wrapped(np.int64(2), name="p"),
            r"'p' \(Wrapped\).*get_config",
        ),
        (
            lambda: layers.Dense(
                3, functools.partial(keras.activations.elu, alpha=2), name="p"
            ),
            r"'p' \(Dense\).*[Cc]annot serialize",
        ),
    ],
)
def test_a_layer_that_cannot_be_made_again_is_named(
    way: str, make: Callable, message: str
) -> None:
    stock = keras.Sequential([keras.Input((6,)), make(), layers.Dense(3)])
    with pytest.raises(ValueError, match=message) as refusal:
        to_backprop(stock) if way == "back" else convert(stock, way)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


# Feedback goes on -----------------------------------------------------------


STORING = [
    name
    for name, method in METHODS.items()
    if method.feedback_initializer is None
    and (
        method.feedback_constraint is None
        or method.feedback_constraint.stores_feedback_kernel
        or method.feedback_regularizer is not None
    )
]


@pytest.mark.parametrize(
    ("first", "second"),
    [("fa", name) for name in STORING]
    + [("bp_alignment", "fa"), ("bp_alignment", "bp_alignment")],
)
def test_stored_feedback_kernels_go_on(first: str, second: str) -> None:
    once = converted("nested", first)
    again = convert(once, second)
    ours, theirs = (
        {layer.name: layer.feedback_kernel for layer in feedback_layers(m)}
        for m in (again, once)
    )
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value is not theirs[name]
        assert np.array_equal(value, theirs[name])
    anew = convert(to_backprop(once), second)
    for layer in feedback_layers(anew):
        assert not np.array_equal(layer.feedback_kernel, ours[layer.name])


@pytest.mark.parametrize("law", ["he_normal", keras.initializers.HeNormal(3)])
def test_feedback_of_another_law_is_drawn(law: Any) -> None:
    method = dataclasses.replace(METHODS["fa"], feedback_initializer=law)
    once = convert(sequential(), "fa")
    other = convert(once, method)
    again = convert(other, method)
    for a, b, c in zip(*map(feedback_layers, (once, other, again))):
        assert not np.array_equal(a.feedback_kernel, b.feedback_kernel)
        assert np.array_equal(b.feedback_kernel, c.feedback_kernel)


def _maps(model: keras.Model) -> dict[tuple[str, str], np.ndarray]:
    return {
        (send.name, receiver): np.array(matrix)
        for send in model.layers
        if isinstance(send, SendError)
        for receiver, matrix in zip(send.receivers, send.maps)
    }


@pytest.mark.parametrize(
    ("method", "form"),
    [(method, "dense") for method in WIRED]
    + [("dfa", "convolutional"), ("dense_fa", "convolutional")],
)
def test_maps_go_on(method: str, form: str) -> None:
    once = convert(shared("sequential"), method, feedback_maps=form)
    given = _maps(once)
    again = _maps(convert(once, method, feedback_maps=form))
    anew = _maps(convert(to_backprop(once), method, feedback_maps=form))
    assert set(given) == set(again) == set(anew)
    for name, matrix in given.items():
        assert np.array_equal(again[name], matrix)
        assert not np.array_equal(anew[name], matrix)
    # DenseFA's are drawn by another law.
    for another in WIRED if form == "dense" else ():
        laws = (METHODS[name].map_initializer for name in (method, another))
        if len(set(map(str, laws))) == 1:
            continue
        other = _maps(convert(once, another, feedback_maps=form))
        for name in set(other) & set(given):
            assert not np.array_equal(other[name], given[name])


# Kernel constraints --------------------------------------------------------


def test_constraints_compose_in_order() -> None:
    dense = layers.Dense(3, kernel_constraint=Halves(), name="fc")
    stock = keras.Sequential([keras.Input((6,)), dense])
    model = convert(stock, "fa_usf_const_ei")
    layer = model.get_layer("fc")
    names = [type(c).__name__ for c in layer.kernel.constraint.constraints]
    assert names == ["FixedSign", "Halves", "ConstantNorm"]

    start = np.array(stock.get_layer("fc").kernel)
    moved = np.random.default_rng(2).normal(size=start.shape)
    expected = np.where(moved * start > 0, moved, 0.0) * 0.5 + 0.5
    expected *= np.linalg.norm(start) / np.linalg.norm(expected)
    moved = keras.ops.convert_to_tensor(moved.astype("float32"))
    np.testing.assert_allclose(
        layer.kernel.constraint(moved), expected, rtol=1e-5
    )

    for method in METHODS:
        model = convert(model, method)
        kept = model.get_layer("fc").kernel.constraint
        parts = getattr(kept, "constraints", [kept])
        assert sum(isinstance(part, Halves) for part in parts) == 1
    plain = to_backprop(convert(stock, "fa_usf_const_ei"))
    assert type(plain.get_layer("fc").kernel_constraint) is Halves


def test_each_layer_has_its_own_constraint() -> None:
    model = convert(sequential(), "bp_const")
    norms = [np.array(norm) for norm in remembered(model)]
    assert len(norms) == 4
    assert len({float(norm) for norm in norms}) == 4


# And back ------------------------------------------------------------------


def traces(config: object) -> bool:
    """Whether a config names this package anywhere."""
    return "keras_fa" in json.dumps(config)


@pytest.mark.parametrize(("kind", "method"), FEW)
def test_to_backprop_leaves_no_trace(kind: str, method: str) -> None:
    x, model = MODELS[kind][1], trained(kind, method)
    config = json.dumps(model.get_config())
    assert traces(model.get_config())
    plain = to_backprop(model)
    assert not traces(plain.get_config())
    for layer in plain._flatten_layers():
        assert not type(layer).__module__.startswith("keras_fa")
        for held in (*vars(layer).values(), *layer.weights):
            for one in (held, *(vars(held).values() if _plain(held) else ())):
                assert not type(one).__module__.startswith("keras_fa"), one
    assert np.array_equal(plain(x), model(x))
    assert json.dumps(model.get_config()) == config
    before = np.array(plain(x))
    train(plain, x, "bp", steps=1)
    assert not np.array_equal(plain(x), before)


def _plain(held: object) -> bool:
    return isinstance(held, keras.Variable)


def test_to_backprop_of_stock_layers_with_our_constraint() -> None:
    dense = layers.Dense(
        3, kernel_constraint=keras_fa.constraints.ConstantNorm()
    )
    model = keras.Sequential([keras.Input((6,)), dense])
    dense.kernel_constraint.build(dense.kernel)
    plain = to_backprop(model)
    assert not traces(plain.get_config())
    assert np.array_equal(plain(VECTORS), model(VECTORS))


def test_to_backprop_of_a_stock_model_is_a_copy() -> None:
    stock = sequential()
    plain = to_backprop(stock)
    assert plain is not stock
    assert json.dumps(plain.get_config()) == json.dumps(stock.get_config())
    assert np.array_equal(plain(IMAGES), stock(IMAGES))


@pytest.mark.parametrize(
    ("first", "second"),
    [("fa_usf_const_ei", name) for name in ("bp", "fa_usf_init", *SORTS)]
    + [("dense_fa", "fa"), ("dense_fa", "dfa"), ("dfa", "fa_usf_sn")],
)
def test_converting_a_converted_model(first: str, second: str) -> None:
    stock, once = shared("sequential"), trained("sequential", first)
    twice = convert(once, second)
    assert np.array_equal(twice(IMAGES), once(IMAGES))
    fresh = convert(stock, second)
    assert rules(twice) == rules(fresh)
    kinds = [type(layer).__name__ for layer in twice.layers]
    for name in ("SendError", "StopError"):
        wanted = sum(type(a).__name__ == name for a in fresh.layers)
        assert kinds.count(name) == wanted
    constraints = [
        type(getattr(layer, "kernel_constraint", None))
        for layer in leaves(twice)
    ]
    for layer in leaves(fresh):
        assert type(getattr(layer, "kernel_constraint", None)) in constraints
    for layer in leaves(twice):
        _check_memory(layer)


def test_to_backprop_of_a_fa_subclass_is_refused() -> None:
    class Mine(keras_fa.FADense):
        """A subclass whose stock counterpart is not known."""

    model = keras.Sequential([keras.Input((6,)), Mine(3, name="mine")])
    with pytest.raises(ValueError, match=r"'mine'.*Mine"):
        to_backprop(model)


def test_refresh_after_a_bare_assign() -> None:
    model = convert(sequential(), "fa_usf_const_ei")
    _move(model)
    layer = model.get_layer("hidden")
    kernel = np.array(layer.kernel)
    refresh(model)
    _check_memory(layer)
    norm = np.linalg.norm(kernel)
    feedback = layer.effective_feedback_kernel()
    np.testing.assert_allclose(np.linalg.norm(feedback), norm, rtol=1e-6)


# Careless use ----------------------------------------------------------------


def test_classes_by_name() -> None:
    model = convert(sequential(), "fa", layers={"Dense": "bp"})
    dense = [x for x in model.layers if isinstance(x, keras_fa.FADense)]
    others = set(feedback_layers(model)) - set(dense)
    assert all(x.feedback_kernel is None for x in dense)
    assert all(x.feedback_kernel is not None for x in others)
    assert dense
    assert others


def my_loss(y: object, output: object) -> object:
    """A loss that Keras cannot find by its name."""
    return keras.ops.mean(keras.ops.square(y - output))


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_a_loss_of_ones_own_leaves_the_model_uncompiled(method: str) -> None:
    stock = sequential()
    stock.compile("sgd", my_loss)
    with pytest.warns(UserWarning, match="Compile the new model"):
        model = convert(stock, method)
    assert not model.compiled
    assert stock.compiled


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("dfa", "fa"),
        ("fa", "dfa"),
        ("fa", "bp"),
        ("fa_usf_const_ei", "fa_usf_const"),
        ("fa_usf_sn", "fa"),
    ],
)
def test_files_of_other_methods_are_refused(
    written: str, read: str, tmp_path: Path
) -> None:
    stock = sequential()
    file = tmp_path / "model.weights.h5"
    convert(stock, written).save_weights(file)
    with pytest.raises(ValueError, match="written under another method"):
        convert(stock, read).load_weights(file)


def test_a_kernel_that_cannot_be_drawn_again_is_named() -> None:
    stock = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_initializer="zeros", name="head"),
        ]
    )
    with pytest.raises(ValueError, match=r"'[^']*head/kernel'"):
        convert(stock, "fa")
    convert(stock, "fa", layers={"head": "fa_usf_sn"})


def test_two_constraints_of_the_users_have_no_stock_form() -> None:
    layer = keras_fa.FADense(3, kernel_constraint=["non_neg", "max_norm"])
    model = keras.Sequential([keras.Input((4,)), layer])
    with pytest.raises(ValueError, match="NonNeg, MaxNorm"):
        to_backprop(model)


@pytest.mark.parametrize("method", ["fa_usf_sn", "dfa"])
def test_training_one_model_leaves_the_other_alone(method: str) -> None:
    """No two of them hold the same memory, which JAX gives away in training."""
    stock = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )
    converted = convert(stock, method)
    back = to_backprop(converted)
    before = [array(weight) for weight in stock.weights]
    for model in (converted, back):
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.fit(VECTORS, np.ones((4, 3)), verbose=0)
    for weight, value in zip(stock.weights, before):
        np.testing.assert_array_equal(array(weight), value)
    assert not np.array_equal(array(back.weights[0]), before[0])


def test_maps_that_do_not_fit_are_refused_before_they_are_made() -> None:
    model = keras.Sequential(
        [
            keras.Input((2, 2, 1)),
            layers.Conv2D(1, 1, name="first"),
            layers.UpSampling2D(2**10),
            layers.Conv2D(1, 1, name="second"),
            layers.UpSampling2D(2),
            layers.Conv2D(1, 1, name="third"),
        ]
    )
    with pytest.raises(ValueError, match=r"need [\d,]+ bytes .* MiB\. Use"):
        convert(model, "dfa")
