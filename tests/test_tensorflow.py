"""What is TensorFlow's own: graphs, replicas, tapes, sparse tensors."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import backends
import keras
import numpy as np
import pytest
import references
from references import BASE_KINDS
from references import KINDS
from references import RULES
from test_layers import constrained_model
from test_layers import feedback
from test_layers import made

import keras_fa
from keras_fa import FADense

if not backends.ON_TENSORFLOW:
    pytest.skip("about TensorFlow itself", allow_module_level=True)

import tensorflow as tf

pytestmark = pytest.mark.usefixtures("optimized_graphs")

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


@pytest.mark.parametrize("silent_zeros", [False, True])
def test_training_on_two_replicas_equals_one_device(
    strategy: tf.distribute.Strategy, silent_zeros: bool
) -> None:
    alone = constrained_model(silent_zeros)
    with strategy.scope():
        model = constrained_model(silent_zeros)
    small = alone.layers[-1].kernel
    small.assign(0.1 * small)  # so that some stop at zero
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
    readout = model.layers[-1]
    signs = np.where(readout.kernel.constraint.state["excitatory"], 1, -1)
    stopped = references.array(readout.kernel) == 0
    assert stopped.any()
    if silent_zeros:
        signs[stopped] = 0
    (effective,) = references.effective_of(readout)
    assert np.array_equal(np.sign(effective), signs)


# Graphs.


def reads(graph: tf.Graph, variable: keras.Variable) -> list[tf.Operation]:
    """The operations that read a variable in a graph."""
    inner = [
        inner
        for external, inner in graph.captures
        if external is variable.value.handle
    ]
    return [
        op
        for tensor in inner
        for op in tensor.consumers()
        if op.type == "ReadVariableOp"
    ]


def gradient_graph(layer: Any, x: np.ndarray) -> tf.Graph:
    """The graph of a layer's call and of all gradients."""

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, *(k.value for k in layer.weights[:1])])

    return step.get_concrete_function(tf.constant(x)).graph


@pytest.mark.parametrize("rule", ["user", "noisy_kernel", "fixed_sign"])
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_compiled_step_reads_each_kernel_once(kind: str, rule: str) -> None:
    """So that B is made of the very W that the output is computed with.

    Another read could come after the optimizer's write: TensorFlow prunes what
    orders the two.
    """
    kind = KINDS[kind]
    layer, _ = made(kind, RULES[rule])
    graph = gradient_graph(layer, kind.inputs())
    for kernel in references.kernels_of(layer):
        assert len(reads(graph, kernel)) == 1


def needed(graph: tf.Graph) -> Counter:
    """The kinds of operations that an output needs."""
    seen, todo = set(), [output.op for output in graph.outputs]
    todo += graph.control_outputs
    while todo:
        op = todo.pop()
        if op not in seen:
            seen.add(op)
            todo += [tensor.op for tensor in op.inputs] + op.control_inputs
    # Without a computation; PreventGradient is the identity, too.
    free = "Identity IdentityN NoOp Placeholder PreventGradient ReadVariableOp"
    return Counter(op.type for op in seen if op.type not in free.split())


@pytest.mark.parametrize("rule", ["fa", "user", "fixed_sign"])
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_inference_needs_nothing_that_stock_does_not(
    kind: str, rule: str
) -> None:
    kind = KINDS[kind]
    layer, _ = made(kind, RULES[rule])
    ours, theirs = (
        needed(
            tf.function(lambda x, each=each: each(x))
            .get_concrete_function(tf.constant(kind.inputs()))
            .graph
        )
        for each in (layer, kind.make(kind.stock))
    )
    assert ours == theirs


# Loops and branches.


def in_a_loop(layer: Any, x: tf.Tensor) -> tf.Tensor:
    def body(i, total):
        return i + 1, total + tf.reduce_sum(layer(x) ** 2)

    return tf.while_loop(
        lambda i, total: i < 3, body, [tf.constant(0), tf.constant(0.0)]
    )[1]


def in_a_branch(layer: Any, x: tf.Tensor) -> tf.Tensor:
    return tf.cond(
        tf.reduce_sum(x) < 1e9,
        lambda: 3 * tf.reduce_sum(layer(x) ** 2),
        lambda: tf.constant(0.0),
    )


def over_examples(layer: Any, x: tf.Tensor) -> tf.Tensor:
    return 3 * tf.reduce_sum(
        tf.map_fn(lambda one: tf.reduce_sum(layer(one[None]) ** 2), x)
    )


@pytest.mark.parametrize(
    ("where", "rule"),
    [
        (where, rule)
        for where in (in_a_loop, in_a_branch, over_examples)
        for rule in RULES
        # All rules in one of them; in others one of each sort: a stored B, one
        # of stored signs, one of random state.
        if where is in_a_loop or rule in ("fa", "fixed_sign", "noisy_kernel")
    ],
)
def test_loops_and_branches(where: Callable, rule: str) -> None:
    kind = KINDS["dense"]
    layer, signs = made(kind, RULES[rule])
    b = feedback(layer, RULES[rule], signs)
    x = tf.constant(kind.inputs())

    @tf.function
    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = where(layer, x)
        return tape.gradient(y, [x, layer.kernel.value, layer.bias.value])

    error = 2 * references.array(layer(x))
    wanted = references.reference(kind, layer, b, x, 3 * error)
    got = [references.array(g) for g in step(x)]
    if not rule.startswith(("noisy", "random")):  # others each time
        references.assert_close(got[0], wanted.dx)
    references.assert_close(got[1], wanted.kernels[0])
    references.assert_close(got[2], wanted.bias)


class Cell(keras.layers.Layer):
    """A recurrent cell made of an FA layer."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.units = self.state_size = 4
        self.inner = FADense(4, activation="tanh", **arguments)

    def build(self, shape: tuple) -> None:
        self.inner.build((None, shape[-1] + 4))

    def call(self, x: tf.Tensor, states: list) -> tuple:
        y = self.inner(keras.ops.concatenate([x, states[0]], axis=-1))
        return y, [y]


@pytest.mark.parametrize("rule", ["fa", "fixed_sign", "noisy_kernel", "user"])
def test_recurrent_cells_train(rule: str) -> None:
    arguments = RULES[rule].made_for(KINDS["dense"])
    model = keras.Sequential(
        [
            keras.Input((6, 3)),
            keras.layers.RNN(Cell(**arguments)),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    kernel = model.layers[0].cell.inner.kernel
    before = references.array(kernel)
    model.fit(references.normal((8, 6, 3), 1), np.ones((8, 1)), verbose=0)
    assert (references.array(kernel) != before).mean() > 0.5


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


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_that_vectorized_map_drops_are_no_secret(
    compiled: bool,
) -> None:
    """It knows no gradient functions: errors would go through W."""
    layer = FADense(3, activation="relu")
    layer.build((None, 4))
    x = tf.constant(references.normal((6, 2, 4), 1))
    wrap = tf.function if compiled else lambda function: function

    @wrap
    def outside(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.vectorized_map(layer, x)
        return y, tape.gradient(y, x)

    with pytest.raises(Exception, match="errors would go through W"):
        outside(x)

    def inside(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, x)

    mapped = wrap(lambda x: tf.vectorized_map(inside, x))(x)
    np.testing.assert_allclose(mapped, tf.map_fn(inside, x), rtol=1e-6)
    outputs = wrap(lambda x: tf.vectorized_map(layer, x))(x)
    np.testing.assert_allclose(outputs, layer(x), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_sparse_inputs(rule: str) -> None:
    """As the dense ones; there is nothing below to send an error to."""
    layer, _ = made(KINDS["dense"], RULES[rule])
    dense = np.where(KINDS["dense"].inputs() > 0, KINDS["dense"].inputs(), 0)
    sparse = tf.sparse.from_dense(dense)
    with tf.GradientTape() as tape:
        tape.watch(sparse.values)
        y = layer(sparse)
    np.testing.assert_allclose(y, layer(dense), rtol=1e-6)
    kernel, below = tape.gradient(y, [layer.kernel.value, sparse.values])
    references.assert_close(
        references.array(kernel), dense.T @ np.ones((4, 3), "f")
    )
    assert (below is None) == (rule != "tied_kernel")
