"""What a training step computes: no convolution or product too many."""

import re
from collections import Counter

import keras
import numpy as np
import pytest
from backends import ON_JAX
from backends import ON_TENSORFLOW
from backends import ON_TORCH
from keras import layers

from keras_fa import convert
from keras_fa.layers.feedback import feedback_layers
from keras_fa.methods import METHODS

CONVOLUTIONS, DENSE = 2, 3
KERNELS = CONVOLUTIONS + DENSE
# What they learn from takes products of its own. XLA finds that y is there
# already; B of the lowest kernel, which carries no error, and the B that the
# gradient goes to are left out by it, too. PyTorch makes B once.
LEARNING = {
    "activation_alignment": 2 if ON_JAX else 3,
    "information_alignment": 4 if ON_JAX else 5,
    "pfa": 3 * KERNELS if ON_TENSORFLOW else 2 * KERNELS - ON_JAX,
}
CHAINED = [
    name
    for name, method in METHODS.items()
    if method.wiring == "chain" and name not in ("frozen", *LEARNING)
]


def network() -> keras.Model:
    """Two convolutions, three dense layers; sizes that XLA leaves alone."""
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu", name="conv1"),
            layers.Conv2D(16, 3, name="conv2"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.MaxPooling2D(2, name="pool"),
            layers.Flatten(name="flatten"),
            layers.Dense(32, activation="relu", name="fc1"),
            layers.Dense(16, activation="relu", name="fc2"),
            layers.Dense(10, name="fc3"),
        ]
    )


def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 12, 12, 3)).astype("float32")
    return x, random.integers(0, 10, 8)


if ON_TENSORFLOW:
    import tensorflow as tf

    def operations(model: keras.Model, train_step) -> Counter:
        """Counts what a step runs: ops that its results or effects need."""
        x, y = map(tf.constant, batch())
        model(x)  # builds the optimizer's variables outside of the graph
        model.optimizer.build(model.trainable_variables)
        step = tf.function(lambda x, y: train_step((x, y)), autograph=False)
        graph = step.get_concrete_function(x, y).graph
        front = [tensor.op for tensor in graph.outputs]
        front += graph.control_outputs
        needed = {}
        while front:
            op = front.pop()
            if op.name not in needed:
                needed[op.name] = op.type
                front += [tensor.op for tensor in op.inputs]
                front += op.control_inputs
        kinds = {
            "Conv2D": "conv",
            "Conv2DBackpropInput": "conv",
            "Conv2DBackpropFilter": "conv",
            "MatMul": "matmul",
        }
        calls = {"PartitionedCall", "StatefulPartitionedCall", "While", "If"}
        assert calls.isdisjoint(needed.values()), "ops hidden in functions"
        return Counter(kinds[t] for t in needed.values() if t in kinds)

elif ON_TORCH:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        """Counts what is computed, and not what has a shape alone."""

        def __init__(self) -> None:
            super().__init__()
            self.found = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if not any(tensor.is_meta for tensor in tensors):
                if name == "convolution":
                    self.found["conv"] += 1
                elif name == "convolution_backward":
                    self.found["conv"] += sum(args[-1][:2])
                elif name in ("mm", "addmm", "bmm", "baddbmm"):
                    self.found["matmul"] += 1
            return func(*args, **(kwargs or {}))

    def operations(model: keras.Model, train_step) -> Counter:
        """Counts what a step computes."""
        with Count() as count:
            train_step(tuple(map(keras.ops.convert_to_tensor, batch())))
        return count.found

else:
    import jax

    def operations(model: keras.Model, train_step) -> Counter:
        """Counts what a step runs, after the compiler has cleaned up."""
        x, y = batch()
        model.optimizer.build(model.trainable_variables)
        state = tuple(
            [variable.value for variable in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
        )
        compiled = jax.jit(train_step).lower(state, (x, y)).compile()
        found = re.findall(r" (convolution|dot)\(", compiled.as_text())
        names = {"convolution": "conv", "dot": "matmul"}
        return Counter(names[name] for name in found)


def counted(model: keras.Model, method: str | None = None) -> Counter:
    """The ops of the step that `fit` compiles for a method."""
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    captured = []

    class Model(type(model)):
        """Shows the step that is made into the train function."""

        def make_train_function(self, force=False):
            captured[:] = [self.train_step]
            super().make_train_function(force)

    model.__class__ = Model
    model.make_train_function()
    for callback in [] if method is None else METHODS[method].callbacks():
        callback.set_model(model)
        callback.on_train_begin()
    return operations(model, captured[0])


# Forward and dW for each kernel, dx for each but the lowest, whose input is
# the data.
BACKPROPAGATION = Counter(
    conv=2 * CONVOLUTIONS + CONVOLUTIONS - 1, matmul=3 * DENSE
)


def test_stock_model_needs_what_backpropagation_needs():
    assert counted(network()) == BACKPROPAGATION


@pytest.mark.parametrize("method", CHAINED)
def test_chained_feedback_needs_no_more_than_backpropagation(method):
    assert counted(convert(network(), method), method) == BACKPROPAGATION


@pytest.mark.parametrize("method", LEARNING)
def test_learning_adds_products_for_each_kernel(method):
    counts = counted(convert(network(), method), method)
    more = LEARNING[method]
    if method == "pfa":  # of matrices, whatever the layer
        assert counts == BACKPROPAGATION + Counter(matmul=more)
    else:
        of_kernels = Counter(conv=more * CONVOLUTIONS, matmul=more * DENSE)
        if ON_TORCH and method == "information_alignment":
            # Its transposed convolution's derivative runs as two.
            of_kernels["conv"] += CONVOLUTIONS
        assert counts == BACKPROPAGATION + of_kernels


def test_frozen_kernels_have_no_gradients():
    hidden = Counter(conv=CONVOLUTIONS, matmul=DENSE - 1)
    frozen = counted(convert(network(), "frozen"), "frozen")
    assert frozen == BACKPROPAGATION - hidden


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("dfa", "dense"),
        ("dfa", "convolutional"),
        ("drtp", "dense"),
        ("direct_kolen_pollack", "dense"),
    ],
)
def test_dfa_has_no_chained_input_gradients(method, form):
    # Each hidden layer's error is one product with e, what its map learns is
    # another one.
    products = 2 if method == "direct_kolen_pollack" else 1
    wanted = Counter(
        conv=2 * CONVOLUTIONS, matmul=2 * DENSE + products * (KERNELS - 1)
    )
    model = convert(network(), method, feedback_maps=form)
    assert counted(model, method) == wanted


@pytest.mark.parametrize("form", ["dense", "convolutional"])
def test_dense_fa_adds_a_product_for_each_pair_of_layers(form):
    # From each kernel layer to all that are further down than the next. The
    # two convolutions are neighbours: no map goes from one to the other.
    pairs = (KERNELS - 1) * (KERNELS - 2) // 2
    wanted = BACKPROPAGATION + Counter(matmul=pairs)
    model = convert(network(), "dense_fa", feedback_maps=form)
    assert counted(model, "dense_fa") == wanted


def test_dense_fa_adds_a_convolution_from_map_to_map():
    stock = keras.Sequential(
        [keras.Input((12, 12, 3))]
        + [layers.Conv2D(c, 3) for c in (8, 16, 8)]
        + [layers.Flatten(), layers.Dense(10)]
    )
    model = convert(stock, "dense_fa", feedback_maps="convolutional")
    wanted = counted(stock) + Counter(conv=1, matmul=2)
    assert counted(model, "dense_fa") == wanted


@pytest.mark.parametrize(
    "method", ["fa_usf_sn", "bp_const", "fa_usf_const", "fa_usf_const_ei"]
)
def test_sn_and_const_store_no_second_kernel(method):
    model = convert(network(), method)
    for layer in feedback_layers(model):
        assert layer.feedback_kernel is None
        state = getattr(layer.kernel.constraint, "state", {})
        for name, variable in state.items():
            if name == "excitatory":  # a byte a weight
                assert variable.dtype == "bool"
            else:
                assert variable.shape == ()
    remembered = ("kernel_excitatory", "kernel_norm")
    others = [w for w in model.weights if not w.path.endswith(remembered)]
    assert len(others) == len(network().weights)
