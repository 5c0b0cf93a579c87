"""Several devices of JAX by `keras.distribution`, against one of them."""

import forks
import pytest
from backends import ON_TENSORFLOW

pytestmark = pytest.mark.skipif(
    ON_TENSORFLOW, reason="tf.distribute is tested in test_strategies.py"
)
DEVICES = 4

# What the programs below have in common. The network is smooth: rounding turns
# no unit on or off.
_COMMON = """
import keras
import numpy as np
from keras import distribution
from keras import layers
from keras_fa import convert

rng = np.random.default_rng(0)
x = rng.normal(size=(48, 6, 6, 3)).astype("float32")
y = rng.integers(0, 5, 48)


def trained(method, spread=None):
    keras.utils.set_random_seed(0)
    distribution.set_distribution(spread)
    stock = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(8, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("tanh", name="tanh"),
            layers.Flatten(name="flatten"),
            layers.Dense(16, activation="tanh", name="hidden"),
            layers.Dense(5, name="readout"),
        ]
    )
    stock.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model = convert(stock, method)
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    distribution.set_distribution(None)
    return model


def assert_equal(model, other):
    variables, others = (m.weights + m.optimizer.variables for m in (model, other))
    assert len(variables) == len(others)
    for variable, other in zip(variables, others):
        np.testing.assert_allclose(
            variable, other, atol=1e-5, err_msg=variable.path
        )
"""

_REPLICATED = (
    _COMMON
    + """
for method in ("fa_usf_sn", "fa_usf_const_ei", "dfa", "kolen_pollack"):
    alone = trained(method)
    for count in (2, 4):
        devices = distribution.list_devices()[:count]
        model = trained(method, distribution.DataParallel(devices=devices))
        for variable in model.weights:
            on_each = variable.value.addressable_shards
            assert len(on_each) == count, variable.path
            for shard in on_each:
                np.testing.assert_array_equal(shard.data, on_each[0].data)
        assert_equal(model, alone)
        print(method, count)
"""
)


@pytest.fixture(autouse=True)
def virtual_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that tests start have several CPU devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    monkeypatch.setenv("XLA_FLAGS", flags)


def test_replicas_equal_one_device() -> None:
    """Each of them has all weights, which are equal to the bit."""
    done = forks.run("-c", _REPLICATED)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * 2
