"""Fixed signs and norms with an optimizer that averages: refused."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_fa import FADense
from keras_fa import convert
from keras_fa import to_backprop
from keras_fa.callbacks import RefuseAverages
from keras_fa.constraints import ConstantNorm
from keras_fa.methods import METHODS

FIXED = [m.name for m in METHODS.values() if m.kernel_constraint is not None]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = RNG.normal(size=(16, 3)).astype("float32")
REFUSAL = r"^SGD\(use_ema=True\) .* of layer 'fc' .* Use use_ema=False"


def stock() -> keras.Model:
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(3, name="fc")], name="stock"
    )


def averaging() -> keras.Optimizer:
    return keras.optimizers.SGD(0.1, use_ema=True)


def test_there_is_something_to_refuse() -> None:
    """As it would be: the norm is lost at the end of `fit`."""
    model = keras.Sequential(
        [keras.Input((6,)), FADense(3, kernel_constraint="constant_norm")]
    )
    model.compile(averaging(), "mse")
    before = np.linalg.norm(model.layers[0].kernel)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)
    after = np.linalg.norm(model.layers[0].kernel)
    assert abs(after / before - 1) > 1e-3


@pytest.mark.parametrize("method", FIXED)
def test_in_fit(method: str) -> None:
    model = convert(stock(), method)
    model.compile(averaging(), "mse")
    kernel = np.array(model.layers[0].kernel)
    with pytest.raises(ValueError, match=REFUSAL):
        model.fit(X, Y, verbose=0, callbacks=METHODS[method].callbacks())
    assert np.array_equal(model.layers[0].kernel, kernel)


@pytest.mark.parametrize("method", FIXED)
def test_in_conversion(method: str) -> None:
    model = stock()
    model.compile(averaging(), "mse")
    with pytest.raises(ValueError, match=REFUSAL):
        convert(model, method)
    with pytest.raises(ValueError, match=REFUSAL):
        convert(model, "fa", layers={"fc": method})


def test_what_is_fine() -> None:
    model = stock()
    model.compile(averaging(), "mse")
    assert convert(model, "fa_usf_sn").optimizer.use_ema
    model.fit(X, Y, verbose=0, callbacks=[RefuseAverages()])
    model = convert(stock(), "fa_usf_const_ei")
    callbacks = METHODS["fa_usf_const_ei"].callbacks()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=callbacks)
    plain = to_backprop(model)
    plain.compile(averaging(), "mse")
    plain.fit(X, Y, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dense(3, kernel_constraint=ConstantNorm(), name="fc"),
        FADense(3, kernel_constraint=["non_neg", "fixed_sign"], name="fc"),
    ],
)
def test_models_written_by_hand(layer: layers.Layer) -> None:
    """Built or not, stock layers too, under loss scaling too."""

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = keras.Sequential([layer])

        def call(self, inputs: object) -> object:
            return self.inner(inputs)

    model = Model()
    model.compile(
        keras.optimizers.LossScaleOptimizer(averaging()),
        "mse",
        run_eagerly=True,
    )
    with pytest.raises(ValueError, match=REFUSAL):
        model.fit(X, Y, verbose=0, callbacks=[RefuseAverages()])
