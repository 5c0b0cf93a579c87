"""Attention FA layers against attention written out with two kernels."""

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
from keras_fa.alignment import named_paths
from keras_fa.layers.feedback import feedback_layers

X = references.normal((2, 3, 4), 1)
OTHER = references.normal((2, 5, 4), 2)
MASK = np.random.default_rng(3).random((2, 3, 5)) < 0.7
MASK[..., 0] = True
KINDS = {
    "MultiHeadAttention": {"num_heads": 2, "key_dim": 3},
    "GroupQueryAttention": {
        "head_dim": 3,
        "num_query_heads": 2,
        "num_key_value_heads": 1,
    },
}


def projection(x: Any, kernel: Any, bias: Any, back: np.ndarray) -> Any:
    """`x W + b` over the last axes of x, whose error goes through B."""
    equation = "btd,dhk->bthk" if len(x.shape) == 3 else "bthk,hkd->btd"
    still = ops.stop_gradient(x)
    y = ops.einsum(equation, still, kernel)
    return y + ops.einsum(equation, x - still, back) + bias


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    layer = getattr(keras_fa, f"FA{kind}")(**KINDS[kind])
    layer.build(X.shape, OTHER.shape)
    parts = {part.name: part for part in feedback_layers(layer)}
    names = ("query", "key", "value", "attention_output")
    assert set(parts) == set(names)
    variables, feedback = [], []
    for name in names:
        part = parts[name]
        part.bias.assign(references.normal(part.bias.shape, 4))
        variables += [part.kernel, part.bias]
        feedback += references.effective_of(part)
        angle = references.angle(feedback[-1], array(part.kernel))
        assert 20 < angle < 160
    error = references.normal(X.shape, 5)

    def reference(x: Any, other: Any, *weights: Any) -> Any:
        q, k, v = (
            projection(given, *weights[2 * i : 2 * i + 2], feedback[i])
            for i, given in enumerate((x, other, other))
        )
        heads = q.shape[2] // k.shape[2]
        k, v = (ops.repeat(z, heads, axis=2) for z in (k, v))
        scores = ops.einsum("bqhk,bvhk->bhqv", q, k) / np.sqrt(3.0)
        scores = ops.where(MASK[:, None], scores, -1e9)
        y = ops.einsum("bhqv,bvhk->bqhk", ops.softmax(scores), v)
        return ops.multiply(projection(y, *weights[6:], feedback[3]), error)

    def ours(x: Any, other: Any) -> Any:
        y = layer(x, other, attention_mask=ops.convert_to_tensor(MASK))
        return ops.multiply(y, error)

    given = [X, OTHER, *map(array, variables)]
    y, wanted, _ = backends.vjp(None, reference, given)

    def run(x: Any, other: Any) -> tuple:
        return backends.vjp(layer, ours, [x, other], None, variables)

    for compiled in (False, True):
        step = backends.compiled(run, layer.variables) if compiled else run
        got, errors, rest = step(X, OTHER)
        for a, b in zip([got, *errors, *rest], [y, *wanted]):
            # Of one scale: a softmax has no error for the bias of the keys.
            np.testing.assert_allclose(array(a), array(b), atol=1e-5)


def classifier() -> keras.Model:
    start = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 4)(start)
    x = keras.layers.MultiHeadAttention(2, 3, name="many")(x, x)
    x = keras.layers.GroupQueryAttention(3, 2, 1, name="few")(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(start, keras.layers.Dense(2, name="readout")(x))


TOKENS = np.random.default_rng(0).integers(0, 9, (4, 5))
TARGETS = references.normal((4, 2), 4)


def test_conversion(tmp_path: Any) -> None:
    stock = classifier()
    for layer in stock.layers:  # what each variable is, not its number, counts
        for i, variable in enumerate(layer.weights):
            variable.assign(variable + 0.01 * i)
    y = array(stock(TOKENS))
    model = convert(stock, "fa_usf_init")
    assert type(model.get_layer("many")) is keras_fa.FAMultiHeadAttention
    assert type(model.get_layer("few")) is keras_fa.FAGroupQueryAttention
    np.testing.assert_array_equal(array(model(TOKENS)), y)
    assert {n.split("/")[0] for n in named_paths(model)} == {
        "many",
        "few",
        "readout",
    }
    assert "many/query" in named_paths(model)
    model.compile("sgd", "mse")
    model.fit(TOKENS, TARGETS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b))
    for path in named_paths(loaded).values():
        assert path.rule.sign_concordant
    plain = to_backprop(loaded)
    assert type(plain.get_layer("many")) is keras.layers.MultiHeadAttention
    assert not feedback_layers(plain)
    np.testing.assert_array_equal(array(plain(TOKENS)), array(model(TOKENS)))

    stock.save_weights(tmp_path / "stock.weights.h5")
    keras_fa.load_stock_weights(model, tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(array(model(TOKENS)), y)


def test_direct_errors_arrive_at_the_outputs() -> None:
    model = convert(classifier(), "dfa")
    names = [layer.name for layer in model.layers]
    assert {"many_stop_error", "few_stop_error"} <= set(names)


def test_mixed_precision() -> None:
    layer = keras_fa.FAMultiHeadAttention(2, 3, dtype="mixed_bfloat16")
    y, (dx,), _ = backends.vjp(layer, lambda x: layer(x, x), [X])
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(dx.dtype) == "float32"
    for part in feedback_layers(layer):
        b = part.effective_feedback_kernel()
        assert keras.backend.standardize_dtype(b.dtype) == "float32"
