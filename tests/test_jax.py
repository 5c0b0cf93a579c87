"""What is JAX's own: staging, state that `fit` holds, donated memory."""

from typing import Any

import backends
import forks
import keras
import numpy as np
import pytest
import references
from keras import layers

from keras_fa import FADense
from keras_fa import convert
from keras_fa.alignment import alignment
from keras_fa.callbacks import StrictNormalization

if not backends.ON_JAX:
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


def test_sparse_inputs() -> None:
    """As the dense ones; there is nothing below to send an error to."""
    layer = FADense(3)
    layer.build(X.shape)
    inputs = sparse.BCOO.fromdense(X)
    np.testing.assert_allclose(layer(inputs), layer(X), rtol=1e-5)

    def output(kernel: jax.Array, values: jax.Array) -> jax.Array:
        x = sparse.BCOO((values, inputs.indices), shape=X.shape)
        weights = [kernel, layer.bias.value], [layer.feedback_kernel.value]
        return layer.stateless_call(*weights, x)[0].sum()

    of_kernel, below = jax.grad(output, (0, 1))(layer.kernel.value, inputs.data)
    references.assert_close(
        references.array(of_kernel), X.T @ np.ones((8, 3), "f")
    )
    assert not np.any(below)


_SHARDED = """
import keras
import numpy as np
from keras import distribution
from keras_fa import convert

pattern, method = {!r}, {!r}
mesh = distribution.DeviceMesh(
    (1, 2), ["batch", "model"], devices=distribution.list_devices()
)
layouts = distribution.LayoutMap(mesh)
layouts[pattern] = (None, "model")
distribution.set_distribution(
    distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
)
stock = keras.Sequential(
    [keras.Input((8,)), keras.layers.Dense(4, name="dense")]
)
model = convert(stock, method)
model.compile("sgd", "mse")
model.fit(np.ones((4, 8)), np.ones((4, 4)), verbose=0)
layer = model.layers[-1]
for kernel in (layer.kernel, layer.feedback_kernel):
    print(kernel is not None and tuple(kernel.value.sharding.spec))
"""


@pytest.mark.parametrize("method", ["fa", "fa_usf_sn", "fa_usf_init_ei"])
@pytest.mark.parametrize("pattern", [".*dense.*kernel", ".*dense/kernel"])
def test_feedback_kernels_are_sharded_as_kernels(
    pattern: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", flags)
    done = forks.run("-c", _SHARDED.format(pattern, method))
    assert done.returncode == 0, done.stderr
    kernel, feedback = done.stdout.splitlines()
    assert kernel == "(None, 'model')"
    assert feedback == ("False" if method == "fa_usf_sn" else kernel)
