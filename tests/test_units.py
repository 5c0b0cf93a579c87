"""Dale's law in converted models: one sign for all weights of a unit."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.constraints import Chain
from keras_fa.constraints import ConstantNorm
from keras_fa.constraints import FixedSign
from keras_fa.methods import METHODS

UNIT = FixedSign(per="unit", excitatory_fraction=0.75)
DALE = dataclasses.replace(METHODS["fa_usf_init_ei"], kernel_constraint=UNIT)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 8, 8, 4)).astype("float32")
Y = RNG.integers(0, 3, 16)
KERNELS = {"conv": (2,), "depthwise": (2, 3), "readout": (0,)}
CHANGED = r"conv/kernel, \S*depthwise/kernel, \S*readout/kernel became \|W\|"


def stock() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(8, 3, activation="relu", name="conv"),
            layers.DepthwiseConv2D(
                3, depth_multiplier=2, activation="relu", name="depthwise"
            ),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="readout"),
        ]
    )


def by_unit(layer: layers.Layer) -> np.ndarray:
    """The weights of a kernel, a row for each presynaptic unit."""
    kernel = np.array(layer.kernel)
    axis = 0 if kernel.ndim == 2 else 2
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)


def check(model: keras.Model) -> None:
    for name in KERNELS:
        signs = np.signbit(by_unit(model.get_layer(name)))
        assert np.all(signs == signs[:, :1])
        assert np.mean(signs[:, 0]) == 0.25


def test_stock_weights_become_those_of_their_units() -> None:
    source = stock()
    with pytest.warns(UserWarning, match=CHANGED):
        model = convert(source, DALE)
    check(model)
    for name in KERNELS:
        given = by_unit(source.get_layer(name))
        found = by_unit(model.get_layer(name))
        factors = np.abs(found) / np.abs(given)
        excitatory = ~np.signbit(found[:, 0])
        low, high = factors[excitatory], factors[~excitatory]
        np.testing.assert_allclose(low, low[0, 0], rtol=1e-5)
        np.testing.assert_allclose(high, 3 * low[0, 0], rtol=1e-5)
        norms = np.linalg.norm(found), np.linalg.norm(given)
        np.testing.assert_allclose(*norms, rtol=1e-5)
    assert not np.allclose(model(X), source(X))


@pytest.mark.parametrize("eagerly", [True, False])
def test_signs_hold_in_training(eagerly: bool) -> None:
    with pytest.warns(UserWarning, match=CHANGED):
        model = convert(stock(), DALE)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=eagerly,
    )
    signs = [np.signbit(by_unit(model.get_layer(n))) for n in KERNELS]
    start = np.array(model.get_layer("conv").kernel)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    check(model)
    for before, name in zip(signs, KERNELS):
        after = np.signbit(by_unit(model.get_layer(name)))
        assert np.array_equal(before, after)
    assert np.mean(start != np.array(model.get_layer("conv").kernel)) > 0.5

    # What has such signs keeps its weights, in another conversion, too.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = convert(to_backprop(model), DALE)
        other = convert(model, dataclasses.replace(DALE, name="other"))
    for name in KERNELS:
        for new in (again, other):
            found = np.array(new.get_layer(name).kernel)
            assert np.array_equal(found, model.get_layer(name).kernel)
    check(again)


def test_norms_beside_signs() -> None:
    method = dataclasses.replace(
        METHODS["fa_usf_init"], kernel_constraint=Chain([UNIT, ConstantNorm()])
    )
    source = stock()
    with pytest.warns(UserWarning, match="became"):
        model = convert(source, DALE, layers={"conv": method, "readout": "fa"})
    assert np.array_equal(
        model.get_layer("readout").kernel, source.get_layer("readout").kernel
    )
    kernel = model.get_layer("conv").kernel
    np.testing.assert_allclose(
        kernel.constraint.state["norm"],
        np.linalg.norm(source.get_layer("conv").kernel),
        rtol=1e-5,
    )
    np.testing.assert_allclose(kernel.constraint(kernel), kernel, rtol=1e-5)
