"""FA layers in threads, in long sessions, in subclasses and half-built."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterator

import backends
import keras
import numpy as np
import pytest
import references
from keras import layers
from references import array

import keras_fa
from keras_fa import FAConv2D
from keras_fa import FADense
from keras_fa import convert
from keras_fa.alignment import alignment
from keras_fa.constraints import Chain
from keras_fa.constraints import FeedbackConstraint
from keras_fa.constraints import FixedSign
from keras_fa.methods import METHODS

THREADS = 4


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[], None]) -> None:
    """Does work in several threads at once; fails if one of them does."""
    failed = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", ["dense", "conv2d", "separable2d"])
def test_threads_share_a_layer(kind: str, traced: bool) -> None:
    kind = references.KINDS[kind]
    layer = kind.make(kind.fa, activation="relu")
    x = kind.inputs()
    wanted = array(layer(x))
    assert (wanted == 0).any()

    def work() -> None:
        for _ in range(3 if traced else 25):
            call = (
                backends.compiled(lambda x: layer(x), layer.variables)
                if traced
                else layer
            )
            np.testing.assert_allclose(array(call(x)), wanted, rtol=1e-5)

    in_threads(work)
    assert layer.activation is keras.activations.relu


@pytest.mark.parametrize(
    "method", ["bp_noise", "fa", "weight_mirror", "drtp", *references.KEEPING]
)
def test_what_is_no_longer_used_is_freed(method: str) -> None:
    # All kinds of kernels under one method, and two under the others.
    kinds = [layers.Conv2D(3, 2, activation="relu")]
    if method == "fa_usf_const_ei":
        kinds.insert(0, layers.SeparableConv2D(3, 3, activation="relu"))
    kinds = [keras.layers.serialize(layer) for layer in kinds]

    def use() -> list[weakref.ref]:
        stock = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                *map(keras.layers.deserialize, kinds),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
        model = convert(stock, method)
        model.compile("sgd", references.loss_of(method))
        x, y = references.normal((8, 6, 6, 2), 1), references.normal((8, 2), 2)
        model.fit(x, y, verbose=0, callbacks=METHODS[method].callbacks())
        model(x)
        return [weakref.ref(used) for used in model.layers + model.variables]

    gc.freeze()  # the collector looks at what comes now
    left = use()
    gc.collect()
    gc.collect()  # what PyTorch's graph lets go of in the first
    assert not [ref() for ref in left if ref() is not None]


def test_a_single_layer_is_freed() -> None:
    layer = FADense(8)
    layer(np.ones((2, 4), "float32"))
    ref = weakref.ref(layer)
    del layer
    gc.collect()
    assert ref() is None


def test_a_changed_attribute_has_its_effect() -> None:
    layer = FAConv2D(3, 2, padding="same")
    x = references.normal((2, 6, 6, 2), 1)
    before = array(layer(x))
    layer.dilation_rate = (2, 2)
    after = array(layer(x))
    stock = layers.Conv2D(3, 2, padding="same", dilation_rate=2)
    stock.build(x.shape)
    stock.set_weights([layer.kernel, layer.bias])
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, stock(x), rtol=1e-5)


# Subclasses and arguments ---------------------------------------------------


class Passing(FADense):
    """Hands `training` on, as it may with Dense."""

    def call(self, inputs: object, training: bool | None = None) -> object:
        return super().call(inputs, training=training)


def test_training_may_be_handed_to_call() -> None:
    x = references.normal((2, 4), 1)
    layer = Passing(3, activation="relu")
    np.testing.assert_array_equal(layer(x, training=True), layer(x))
    np.testing.assert_array_equal(
        FADense(3, kernel_initializer="ones", feedback_initializer="ones")(
            x, training=True
        ),
        layers.Dense(3, kernel_initializer="ones")(x, training=True),
    )


@pytest.mark.parametrize("rule", ["sign_concordance", "tied_kernel"])
def test_what_stock_does_not_take_is_refused(rule: str) -> None:
    x = np.ones((2, 4), "float32")
    layer = FADense(3, feedback_constraint=rule)
    layer.build((None, 4))
    for wrong in ({"trainng": True}, {"mask": None}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            layer.call(x, **wrong)
    with pytest.raises(TypeError):
        layer.call(x, None, None)


class Own(FeedbackConstraint):
    """A rule that returns W, but is not known for it."""

    stores_feedback_kernel = False

    def __call__(self, feedback_kernel: object, kernel: object) -> object:
        return kernel


def test_second_gradients_stop_at_the_feedback() -> None:
    """A penalty on the gradient of the input sends nothing to W through B."""
    layer = FADense(3, use_bias=False, feedback_constraint=Own())
    layer.build((None, 4))
    x = keras.ops.convert_to_tensor(references.normal((2, 4), 1))
    if backends.ON_TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(layer(x))
            penalty = tf.reduce_sum(tf.square(inner.gradient(y, x)))
        assert outer.gradient(penalty, layer.kernel.value) is None
        return
    if backends.ON_TORCH:  # there is one derivative, and an error for another
        import torch

        x.requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        assert not dx.requires_grad
        loss = layer(x).square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
        return
    import jax

    def output(x: object, kernel: object) -> object:
        return layer.stateless_call([kernel], [], x)[0].sum()

    def penalty(kernel: object) -> object:
        return (jax.grad(output)(x, kernel) ** 2).sum()

    kernel = layer.kernel.value
    assert float(penalty(kernel)) > 0
    assert not np.any(jax.grad(penalty)(kernel))


def test_constraints_by_position() -> None:
    arguments = [4, None, True, "he_normal", "zeros", None, None, None]
    layer = FADense(*arguments, ["constant_norm", "fixed_sign"], "non_neg")
    assert isinstance(layer.kernel_constraint, Chain)
    assert isinstance(layer.bias_constraint, keras.constraints.NonNeg)
    layer = FADense(*arguments, "fixed_sign")
    assert isinstance(layer.kernel_constraint, FixedSign)


@pytest.mark.parametrize(
    "name", ["constant", "kernel_magnitude", "KernelMagnitude"]
)
def test_names_of_initializers(name: str) -> None:
    for given in (name, f"keras_fa>{name}"):
        made = FADense(3, feedback_initializer=given).feedback_initializer
        assert isinstance(made, keras_fa.initializers.KernelMagnitude)


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("feedback_regularizer", "alignment"),
        ("feedback_regularizer", "Alignment"),
        ("feedback_regularizer", "keras_fa>Alignment"),
        ("feedback_constraint", "SignConcordance"),
        ("feedback_constraint", "keras_fa>NoisyKernel"),
        ("kernel_constraint", "FixedSign"),
        ("kernel_constraint", "keras_fa>ConstantNorm"),
    ],
)
def test_names_in_any_spelling(argument: str, name: str) -> None:
    made = getattr(FADense(3, **{argument: name}), argument)
    plain = name.removeprefix("keras_fa>").lower()
    assert type(made).__name__.lower() == plain


# Builds that fail -----------------------------------------------------------


class Holder(keras.Model):
    """A model whose layer is built at its first call."""

    def __init__(self, layer: layers.Layer) -> None:
        super().__init__()
        self.layer = layer

    def call(self, inputs: object) -> object:
        return self.layer(inputs)


def zeros() -> FADense:
    """A layer that cannot be built: B_0 would be W_0."""
    return FADense(2, kernel_initializer="zeros")


@pytest.mark.parametrize("make", [zeros, lambda: Holder(zeros())])
def test_a_build_that_fails_says_why_every_time(make: Callable) -> None:
    layer, x = make(), np.ones((2, 3), "float32")
    for _ in range(2):
        with pytest.raises(ValueError, match="B_0 would be W_0"):
            layer(x)
    assert not getattr(layer, "layer", layer).built


# Half precision -------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_gradient_angles_do_not_depend_on_the_losses_scale(
    scale: float,
) -> None:
    x, y = references.normal((64, 8), 1), references.normal((64, 4), 2)
    angles = []
    for dtype, factor in (("float32", 1.0), ("mixed_float16", scale)):
        keras.utils.set_random_seed(1)
        stock = keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(32, activation="tanh", name="a", dtype=dtype),
                layers.Dense(32, activation="tanh", name="b", dtype=dtype),
                layers.Dense(4, dtype="float32"),
            ]
        )
        model = convert(stock, "fa_usf_sn")
        loss = keras.losses.MeanSquaredError()
        measured = alignment(
            model,
            x,
            y,
            loss=lambda y, z, f=factor, loss=loss: f * loss(y, z),
        )
        angles.append([measured[n]["gradient_angle"] for n in "ab"])
    np.testing.assert_allclose(*angles, atol=1.5)
