"""Where the errors of DFA and DenseFA leave and where they arrive.

A *node* is one call of one layer, `(layer name, index of the call)`: a shared
layer has several. A *hidden* kernel layer is one from which another kernel
layer can be reached. Its error arrives at its *tap*: follow its output through
normalization, activation and dropout layers with one input and one consumer,
and stop before pooling, a merge, a branch or the next kernel layer.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

Node = tuple[str, int]

# What a tap moves through, and what may stand between logits and the output.
_PASSED = (
    keras.layers.Activation,
    keras.layers.BatchNormalization,
    keras.layers.Dropout,
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Softmax,
    keras.layers.Identity,
    keras.layers.ActivityRegularization,
)
# The same as operations: `keras.ops.relu(x)` is a node without a layer.
_PASSED_OPERATIONS = frozenset(
    "Celu Elu Gelu HardShrink HardSigmoid HardSilu HardTanh LeakyRelu "
    "LogSigmoid LogSoftmax Relu Relu6 Selu Sigmoid Silu SoftShrink Softmax "
    "Softplus Softsign SparsePlus SparseSigmoid Sparsemax Squareplus Tanh "
    "TanhShrink Threshold".split()
)
TO_PROBABILITIES = ("softmax", "log_softmax", "sigmoid", "linear")
_TO_PROBABILITIES_OPERATIONS = ("Softmax", "LogSoftmax", "Sigmoid")


@dataclasses.dataclass(frozen=True)
class Send:
    """Errors that leave at a node: at its layer's pre-activation.

    Attributes:
        source: The node whose error is sent.
        taps: The nodes at whose outputs it arrives.
        receivers: The kernel nodes that these are the taps of.
    """

    source: Node
    taps: tuple[Node, ...]
    receivers: tuple[Node, ...]


class Graph:
    """The nodes of a Functional model, as its config tells them.

    Args:
        model: A Functional model with one output.
        kernel_layers: The names of its kernel layers.

    Attributes:
        parents: Each node's parents, in the order of its call's tensors.
        consumers: Each node's consumers.
        inputs: The input nodes.
    """

    def __init__(self, model: keras.Model, kernel_layers: set[str]) -> None:
        config = model.get_config()
        self._operations = {node.name: node for node in model.operations}
        self._kernel_layers = kernel_layers
        self.parents = {}
        for layer in config["layers"]:
            calls = layer["inbound_nodes"] or [{}]
            for index, call in enumerate(calls):
                self.parents[layer["name"], index] = list(_histories(call))
        self.consumers = {node: [] for node in self.parents}
        for node, parents in self.parents.items():
            for parent in parents:
                self.consumers[parent].append(node)
        self.inputs = list(_references(config["input_layers"]))
        outputs = list(_references(config["output_layers"]))
        if len(outputs) != 1:
            raise ValueError(
                "DFA and DenseFA need a model with one output, whose error "
                f"they send. Received: model '{model.name}' with "
                f"{len(outputs)} outputs."
            )
        self.output = outputs[0]
        self.kernels = [n for n in self.parents if n[0] in kernel_layers]
        self._above = {n: self._kernels_above(n) for n in self.kernels}

    def hidden(self) -> list[Node]:
        """The hidden kernel nodes."""
        return [node for node in self.kernels if self._above[node]]

    def tap(self, node: Node) -> Node:
        """The node at whose output the error of a kernel node arrives."""
        while len(self.consumers[node]) == 1 and node != self.output:
            (consumer,) = self.consumers[node]
            passed = self._passes(self._operations[consumer[0]])
            if not passed or len(self.parents[consumer]) != 1:
                break
            node = consumer
        return node

    def logits(self) -> Node:
        """The output's node, or the one below a trailing softmax or sigmoid."""
        node = self.output
        while node[0] not in self._kernel_layers:
            if not self._makes_probabilities(self._operations[node[0]]):
                break
            (node,) = self.parents[node]
        return node

    @staticmethod
    def _passes(operation: Any) -> bool:
        if isinstance(operation, keras.layers.Layer):
            return type(operation) in _PASSED
        return type(operation).__name__ in _PASSED_OPERATIONS

    @staticmethod
    def _makes_probabilities(operation: Any) -> bool:
        if not isinstance(operation, keras.layers.Layer):
            return type(operation).__name__ in _TO_PROBABILITIES_OPERATIONS
        if type(operation) is keras.layers.Activation:
            name = getattr(operation.activation, "__name__", None)
            return name in TO_PROBABILITIES
        return type(operation) is keras.layers.Softmax

    def direct(self) -> list[Send]:
        """DFA: one source, the logits, and every hidden kernel node."""
        return _sends([(self.logits(), self.hidden())], self)

    def dense(self) -> list[Send]:
        """DenseFA: from each kernel node to all beyond those just below."""
        hidden = self.hidden()
        further = {
            node: self._above[node] - self._next(node) for node in hidden
        }
        return _sends(
            [
                (source, [node for node in hidden if source in further[node]])
                for source in self.kernels
            ],
            self,
        )

    def _kernels_above(self, node: Node) -> set[Node]:
        return {n for n in self._reach(node, lambda n: True) if self._is(n)}

    def _next(self, node: Node) -> set[Node]:
        reached = self._reach(node, lambda n: not self._is(n))
        return {n for n in reached if self._is(n)}

    def _is(self, node: Node) -> bool:
        return node[0] in self._kernel_layers

    def _reach(self, node: Node, passes: Any) -> set[Node]:
        """What can be reached from a node, going on from where it `passes`."""
        reached, front = set(), [node]
        while front:
            for consumer in self.consumers[front.pop()]:
                if consumer not in reached:
                    reached.add(consumer)
                    if passes(consumer):
                        front.append(consumer)
        return reached


def _sends(pairs: list[tuple[Node, list[Node]]], graph: Graph) -> list[Send]:
    return [
        Send(
            source,
            tuple(graph.tap(node) for node in receivers),
            tuple(receivers),
        )
        for source, receivers in pairs
        if receivers
    ]


def _histories(value: Any) -> Iterator[Node]:
    """The nodes of all tensors in the config of a call."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            name, node, _ = value["config"]["keras_history"]
            yield name, node
            return
        value = _in_order(value)
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _histories(inner)


def _references(value: Any) -> Iterator[Node]:
    """The nodes of `[name, node, tensor]` triples, however nested."""
    if isinstance(value, dict):
        value = _in_order(value)
    if value and isinstance(value[0], str):
        yield value[0], value[1]
        return
    for inner in value:
        yield from _references(inner)


def _in_order(value: dict) -> list:
    """The values of a dict in the order in which keras.tree flattens it."""
    return [value[key] for key in sorted(value)]
