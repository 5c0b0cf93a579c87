"""BP + Alignment's penalty, and stock regularizers of feedback."""

from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from references import BASE_KINDS
from references import KINDS

from keras_fa import FADense
from keras_fa import regularizers
from keras_fa.regularizers import Alignment

RATE = 0.3


def aligned(**arguments: Any) -> FADense:
    """BP + Alignment in one layer."""
    layer = FADense(
        3,
        feedback_constraint="tied_kernel",
        feedback_regularizer=Alignment(RATE),
        **arguments,
    )
    layer.build((None, 5))
    return layer


def penalty(w: np.ndarray, b: np.ndarray) -> float:
    """The definition."""
    cosine = (w * b).sum() / (np.linalg.norm(w) * np.linalg.norm(b))
    return RATE * (1 - cosine)


def penalty_gradient(w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Its derivative: B_0's direction less its part along W, over ||W||."""
    norm, unit = np.linalg.norm(w), b / np.linalg.norm(b)
    return -RATE * (unit - w * (w * unit).sum() / norm**2) / norm


def penalty_of(layer: Any) -> tuple[Any, list[Any]]:
    """The sum of a layer's losses and its gradients at the kernels."""
    kernels = references.kernels_of(layer)
    total, _, gradients = backends.vjp(
        layer, lambda: sum(layer.losses), variables=kernels
    )
    return total, gradients


def test_value_and_gradient() -> None:
    layer = aligned()
    w = references.array(layer.kernel)
    b = references.array(layer.feedback_kernel)
    value, (gradient,) = penalty_of(layer)
    np.testing.assert_allclose(value, penalty(w, b), rtol=1e-6)
    references.assert_close(references.array(gradient), penalty_gradient(w, b))


@pytest.mark.parametrize(
    ("w", "wanted"), [(1.0, 0.0), (-2.0, 2 * RATE)], ids=["along", "against"]
)
def test_extremes(w: float, wanted: float) -> None:
    layer = aligned()
    layer.kernel.assign(w * layer.feedback_kernel)
    np.testing.assert_allclose(penalty_of(layer)[0], wanted, atol=1e-6)


def test_orthogonal_kernel_costs_the_rate() -> None:
    b, w = np.zeros((2, 5, 3), "float32")
    b[0], w[1] = 1.0, 1.0
    np.testing.assert_allclose(Alignment(RATE)(b, w), RATE, rtol=1e-6)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_every_kernel_of_every_kind_counts_once(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.make(
        kind.fa,
        feedback_constraint="tied_kernel",
        feedback_regularizer=Alignment(RATE),
    )
    x = kind.inputs()
    layer(x)
    layer(x)
    pairs = list(zip(references.kernels_of(layer), references.stored_of(layer)))
    wanted = sum(penalty(references.array(w), b) for w, b in pairs)
    value, gradients = penalty_of(layer)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for gradient, (w, b) in zip(gradients, pairs):
        references.assert_close(
            references.array(gradient),
            penalty_gradient(references.array(w), b),
        )


def test_shared_layer_counts_once_in_a_model() -> None:
    layer = FADense(5, feedback_regularizer="alignment")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert len(model.losses) == 1


def test_kernel_regularizer_is_added() -> None:
    layer = aligned(kernel_regularizer=keras.regularizers.L2(0.1))
    w = references.array(layer.kernel)
    b = references.array(layer.feedback_kernel)
    wanted = penalty(w, b) + 0.1 * (w**2).sum()
    np.testing.assert_allclose(penalty_of(layer)[0], wanted, rtol=1e-6)


def test_zero_kernel_gives_a_finite_gradient() -> None:
    layer = aligned()
    layer.kernel.assign(np.zeros((5, 3)))
    value, (gradient,) = penalty_of(layer)
    np.testing.assert_allclose(value, RATE)
    np.testing.assert_array_equal(gradient, 0)


def test_error_of_the_task_stays_exact() -> None:
    layer, kind = aligned(), KINDS["dense"]
    x, dy = kind.inputs(), references.normal((4, 3), 5)
    wanted = references.reference(kind, layer, [layer.kernel], x, dy)
    got = references.computed(layer, x, dy, compiled=True)
    references.assert_gradients(got, wanted)


def test_training_turns_the_kernel_towards_feedback() -> None:
    angles = {}
    for rate in (0.0, 1.0):
        keras.utils.set_random_seed(0)
        layer = FADense(
            8,
            feedback_constraint="tied_kernel",
            feedback_regularizer=Alignment(rate),
        )
        model = keras.Sequential([keras.Input((10,)), layer, FADense(1)])
        model.compile(keras.optimizers.Adam(0.05), "mse")
        x, y = references.normal((64, 10), 1), references.normal((64, 1), 2)
        before = references.array(layer.feedback_kernel)
        model.fit(x, y, batch_size=8, epochs=15, verbose=0)
        np.testing.assert_array_equal(layer.feedback_kernel, before)
        angles[rate] = references.angle(references.array(layer.kernel), before)
    assert angles[0.0] > 70
    assert angles[1.0] < angles[0.0] - 20


def test_stock_regularizer_does_not_move_fixed_feedback() -> None:
    layer = FADense(3, feedback_regularizer="l2")
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile("sgd", "mse")
    before = references.array(layer.feedback_kernel)
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    np.testing.assert_array_equal(layer.feedback_kernel, before)


def test_names_and_configs() -> None:
    assert isinstance(regularizers.get("alignment"), Alignment)
    assert regularizers.get(None) is None
    assert isinstance(regularizers.get("l2"), keras.regularizers.L2)
    config = keras.saving.serialize_keras_object(Alignment(0.5))
    assert config["registered_name"] == "keras_fa>Alignment"
    assert keras.saving.deserialize_keras_object(config).rate == 0.5


def test_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="Received: rate=-1"):
        Alignment(-1)


def test_constant_target() -> None:
    layer = aligned(feedback_initializer="constant")
    w = references.array(layer.kernel)
    (loss,) = layer.losses
    np.testing.assert_allclose(loss, penalty(w, np.ones_like(w)), rtol=1e-5)
