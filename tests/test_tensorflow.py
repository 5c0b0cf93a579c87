"""What is TensorFlow's own: graphs, replicas, tapes, sparse tensors."""

from typing import Any

import backends
import numpy as np
import pytest
import references
from references import BASE_KINDS
from references import KINDS
from references import RULES
from test_layers import constrained_model
from test_layers import made

import keras_fa
from keras_fa import FADense

if not backends.ON_TENSORFLOW:
    pytest.skip("about TensorFlow itself", allow_module_level=True)

import tensorflow as tf

# Two replicas.


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(kind, "sign_concordance") for kind in BASE_KINDS]
    + [("dense", rule) for rule in RULES if rule != "sign_concordance"],
)
def test_two_replicas_equal_one_device(
    strategy: tf.distribute.Strategy, kind: str, rule: str
) -> None:
    kind, rule = KINDS[kind], RULES[rule]
    alone = kind.make(kind.fa, **rule.made_for(kind))
    with strategy.scope():
        layer = kind.make(kind.fa, **rule.made_for(kind))
    for ours, theirs in zip(layer.weights, alone.weights):
        ours.assign(theirs)
    keras_fa.refresh(layer)
    keras_fa.refresh(alone)
    x = kind.inputs(batch=4)
    dy = references.error_for(layer, x)
    wanted = references.computed(alone, x, dy, compiled=True)

    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tuple(
            tf.split(z, 2)[context.replica_id_in_sync_group] for z in (x, dy)
        )
    )

    @tf.function
    def run(halves: Any) -> Any:
        return strategy.run(
            lambda pair: references.gradients(layer, *pair), args=(halves,)
        )

    y, dx, kernels, bias = run(halves)
    local = strategy.experimental_local_results
    joined = references.Gradients(
        np.concatenate(local(y)),
        np.concatenate(local(dx)),
        [np.sum(local(kernel), axis=0) for kernel in kernels],
        np.sum(local(bias[0]), axis=0),
    )
    references.assert_gradients(joined, wanted)
    references.assert_close(joined.y, wanted.y)


def test_training_on_two_replicas_equals_one_device(
    strategy: tf.distribute.Strategy,
) -> None:
    alone = constrained_model()
    with strategy.scope():
        model = constrained_model()
    model.set_weights(alone.get_weights())
    keras_fa.refresh(model)
    keras_fa.refresh(alone)
    x, y = references.normal((24, 6, 6, 2), 1), references.normal((24, 3), 2)
    for each in (alone, model):
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for ours, theirs in zip(model.weights, alone.weights):
        references.assert_close(
            references.array(ours), references.array(theirs)
        )
    effective = references.effective_of(model.layers[-1])
    assert np.array_equal(
        effective[0] > 0,
        references.array(
            model.layers[-1].kernel.constraint.state["excitatory"]
        ),
    )


# Graphs.


def compiled_call(layer: Any, x: np.ndarray) -> tf.Graph:
    """The graph of a layer's call."""
    call = tf.function(lambda x: layer(x))
    return call.get_concrete_function(tf.constant(x)).graph


def before(output: tf.Tensor) -> set[str]:
    """The names of the operations that an output really waits for.

    Of an IdentityN that is the one input that belongs to the output:
    TensorFlow splits it before it runs the graph.
    """
    seen, todo = set(), [output]
    while todo:
        tensor = todo.pop()
        op = tensor.op
        if tensor.name in seen:
            continue
        seen |= {tensor.name, op.name}
        if op.type == "IdentityN":
            todo.append(op.inputs[tensor.value_index])
        else:
            todo.extend(op.inputs)
        for control in op.control_inputs:
            todo.extend(control.outputs)
    return seen


@pytest.mark.parametrize("rule", ["user", "fixed_sign"])
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_compiled_output_waits_for_the_feedback(kind: str, rule: str) -> None:
    """So that no update of the same step can come before it."""
    kind = KINDS[kind]
    layer, _ = made(kind, RULES[rule])
    graph = compiled_call(layer, kind.inputs())
    waits = before(graph.outputs[0])
    reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
    assert len(reads) > 2
    assert all(op.name in waits for op in reads)


@pytest.mark.parametrize("rule", ["user", "noisy_kernel", "fixed_sign"])
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_compiled_step_reads_each_kernel_once(kind: str, rule: str) -> None:
    """So that B is made of the very W that the output is computed with."""
    kind = KINDS[kind]
    layer, _ = made(kind, RULES[rule])
    graph = compiled_call(layer, kind.inputs())
    for kernel in references.kernels_of(layer):
        inner = next(
            inner
            for external, inner in graph.captures
            if external is kernel.value.handle
        )
        reads = [op for op in inner.consumers() if op.type == "ReadVariableOp"]
        assert len(reads) == 1


# Tapes.


@pytest.mark.parametrize("compiled", [False, True])
def test_persistent_tape_gives_the_same_twice(compiled: bool) -> None:
    layer = FADense(3)
    layer.build((None, 5))

    def run(x: tf.Tensor) -> tuple:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x)
        first, second = tape.gradient(y, x), tape.gradient(y, x)
        return first, second, tape.gradient(y, layer.kernel.value)

    x = tf.constant(KINDS["dense"].inputs())
    first, second, dw = (tf.function(run) if compiled else run)(x)
    np.testing.assert_array_equal(first, second)
    wanted = np.ones((4, 3)) @ references.array(layer.feedback_kernel).T
    references.assert_close(references.array(first), wanted.astype("float32"))
    references.assert_close(
        references.array(dw), references.array(x).T @ np.ones((4, 3), "f")
    )


# Sparse tensors.


def test_sparse_inputs_are_refused() -> None:
    layer = FADense(3)
    with pytest.raises(ValueError, match="dense inputs"):
        layer(tf.sparse.from_dense(KINDS["dense"].inputs()))
