"""Muon's steps against NumPy's singular vectors."""

import keras
import numpy as np
import pytest
from backends import array

from keras_fa.optimizers import Muon

RATE = 0.01


def steps(optimizer, shapes, seed=0):
    """What one step takes off kernels of some shapes, and their gradients."""
    generator = np.random.default_rng(seed)
    before = [generator.normal(size=s).astype("float32") for s in shapes]
    gradients = [generator.normal(size=s).astype("float32") for s in shapes]
    variables = [keras.Variable(value) for value in before]
    optimizer.apply([*map(keras.ops.convert_to_tensor, gradients)], variables)
    return [w - array(v) for w, v in zip(before, variables)], gradients


@pytest.mark.parametrize(
    "shape", [(6, 4), (4, 6), (3, 3, 2, 5), (1, 1, 3, 8), (5, 2, 3)]
)
def test_a_step_is_orthogonal(shape):
    optimizer = Muon(RATE, weight_decay=None, rms_rate=0.2)
    (step,), (gradient,) = steps(optimizer, [shape])
    step, gradient = (x.reshape(-1, shape[-1]) for x in (step, gradient))
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    length = RATE * 0.2 * max(step.shape) ** 0.5
    in_its_frame = u.T @ step @ v.T / length
    singular = np.diag(in_its_frame)
    assert np.allclose(in_its_frame, np.diag(singular), atol=1e-3)
    # Five iterations bring them near to 1, and no nearer.
    assert singular.min() > 0.6
    assert singular.max() < 1.3


@pytest.mark.parametrize("shape", [(3,), (), (6, 1), (3, 3, 4, 1), (1, 5)])
def test_what_is_no_matrix_takes_steps_of_adam(shape):
    muon = Muon(RATE, weight_decay=None, adam_weight_decay=None)
    (step,), _ = steps(muon, [shape])
    (adam,), _ = steps(keras.optimizers.Adam(RATE), [shape])
    assert np.allclose(step, adam, rtol=1e-4)


def test_replicas_take_the_step_of_one_device(strategy):
    shapes = [(3, 3, 2, 5), (6, 4), (3,)]
    wanted, gradients = steps(Muon(RATE), shapes)
    with strategy.scope():
        optimizer = Muon(RATE)
        generator = np.random.default_rng(0)
        before = [generator.normal(size=s).astype("float32") for s in shapes]
        variables = [keras.Variable(value) for value in before]
        optimizer.build(variables)

    import tensorflow as tf

    def replica():
        # Every second entry each: a step along one part alone is another one.
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        parts = [np.arange(g.size).reshape(g.shape) % 2 for g in gradients]
        return optimizer.apply(
            [tf.where(p == number, g, 0) for p, g in zip(parts, gradients)],
            variables,
        )

    tf.function(lambda: strategy.run(replica))()
    for start, variable, change in zip(before, variables, wanted):
        assert np.allclose(start - array(variable), change, atol=1e-6)
