"""What is JAX's own: staging, state that `fit` holds, donated memory."""

from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from keras import layers

from keras_fa import FADense
from keras_fa import convert
from keras_fa.alignment import alignment
from keras_fa.callbacks import StrictNormalization

if backends.ON_TENSORFLOW:
    pytest.skip("about JAX itself", allow_module_level=True)

import jax
from jax.experimental import sparse

X = references.normal((8, 6), seed=1)
Y = references.normal((8, 3), seed=2)


def network(policy: str = "float32") -> keras.Model:
    """A converted perceptron with a dense and a separable layer."""
    return convert(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, activation="relu", dtype=policy),
                layers.Reshape((4, 2), dtype=policy),
                layers.SeparableConv1D(4, 2, dtype=policy),
                layers.Flatten(dtype=policy),
                layers.Dense(3, dtype=policy),
            ]
        ),
        "fa_usf_sn",
    )


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("staged", [jax.jit, jax.checkpoint])
def test_staged_calls_send_the_same_errors(staged: Any, policy: str) -> None:
    """JAX differentiates these long after the layers have returned."""
    model = network(policy)
    trainable = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    def loss(trainable: list) -> Any:
        outputs, _ = model.stateless_call(trainable, others, X)
        return (outputs.astype("float32") ** 2).sum()

    wanted = jax.grad(loss)(trainable)
    got = jax.grad(staged(loss))(trainable)
    tolerance = 1e-5 if policy == "float32" else 0.02
    for ours, theirs in zip(got, wanted):
        assert np.any(theirs)
        references.assert_close(np.asarray(ours), np.asarray(theirs), tolerance)


def test_trains_under_rematerialization() -> None:
    with keras.RematScope("full"):
        model = network("mixed_bfloat16")
    plain = network("mixed_bfloat16")
    plain.set_weights(model.get_weights())
    for each in (model, plain):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.fit(X, Y, verbose=0, callbacks=[StrictNormalization()])
    for ours, theirs in zip(model.weights, plain.weights):
        references.assert_close(
            references.array(ours), references.array(theirs), 0.02
        )


def test_measures_within_an_epoch() -> None:
    """Where `fit` holds the weights, and a model shows none."""
    model, seen = network(), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(
            self, batch: int, logs: dict | None = None
        ) -> None:
            angles = alignment(model, X, Y, "mse")
            StrictNormalization().apply(model)
            seen.append(angles["dense_0"]["norm_ratio"])

    model.layers[0].name = "dense_0"
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[Look()])
    assert len(set(seen)) == len(seen) == 2
    ratio = alignment(model, X, Y, "mse")["dense_0"]["norm_ratio"]
    assert ratio == pytest.approx(1, abs=1e-5)


def test_sparse_inputs_are_refused() -> None:
    layer = FADense(3)
    with pytest.raises(ValueError, match="dense inputs"):
        layer(sparse.BCOO.fromdense(X))
