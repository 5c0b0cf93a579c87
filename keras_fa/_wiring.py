"""Where the errors of DFA and DenseFA leave and where they arrive.

A *node* is one call of one operation: a shared layer has several. A *hidden*
kernel node is one from which another kernel node can be reached. Its error
arrives at its *tap*: follow its output through normalization, activation and
dropout layers with one input and one consumer, and stop before pooling, a
merge, a branch or the next kernel layer.

DFA sends the error of one node, the *source*, to taps, and no error passes a
tap from above. `taps` and `error_from` of `convert` name other taps and another
source; what lies between two taps is then a *block*, in which errors are exact:

```
x -> a -> b -> TAP STOP -> c -> d -> TAP STOP -> readout -> SOURCE SEND -> ...
     <- exact -  |         <- exact -  |         <---- exact ----    |
                 +----- e B_1 ---------+---------- e B_2 ------------+
```

How a model gets there: names are looked up in the model as it is given
(`named`); nested models are taken apart (`_cloning.flatten`), since the layer
that sends an error needs the tensors that receive it, whatever model they are
made in; `Graph` records the nodes of what is left; `direct` and `dense` say who
sends to whom; and `conversion` calls the layers anew, with SEND behind sources
and STOP behind taps.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import keras

from keras_fa import _cloning

# What a tap moves through, besides the operations of activation functions.
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
# What may stand between the logits and the output.
TO_PROBABILITIES = ("softmax", "log_softmax", "sigmoid", "linear")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of one operation.

    Attributes:
        operation: A layer, or what a `keras.ops` function is recorded as;
            `None` for an input of the model.
        label: The operation's name, with a number from its second call on;
            that of no other node.
        parents: The nodes that its tensors come from, one for each tensor.
        shape: That of its output; `None` if there are several.
    """

    operation: keras.Operation | None = None
    label: str = ""
    parents: tuple["Node", ...] = ()
    shape: tuple[int | None, ...] | None = None


# The receivers of each source, and where what each receives arrives.
Sends = dict[Node, dict[Node, Node]]


class Graph:
    """The nodes of a Functional model.

    Args:
        model: A Functional model with one output, without nested models.
            Nothing is added to it.
        is_kernel: Tells which operations are kernel layers.

    Attributes:
        nodes: All but inputs, in the order in which `clone_model` calls them:
            node i is the i-th call of a clone's `call_function`.
        consumers: By node, those that take its output.
        output: The node of the model's output.

    Raises:
        ValueError: If the model has several outputs.
    """

    def __init__(
        self,
        model: keras.Model,
        is_kernel: Callable[[keras.Operation], bool],
    ) -> None:
        if len(model.outputs) != 1:
            raise ValueError(
                "DFA and DenseFA need a model with one output, whose error "
                f"they send. Received: model '{model.name}' with "
                f"{len(model.outputs)} outputs."
            )
        self.nodes, self.output = _record(model)
        self.consumers = collections.defaultdict(list)
        for node in self.nodes:
            for parent in node.parents:
                self.consumers[parent].append(node)
        # No direct error arrives at a layer with several outputs.
        self._kernels = [
            n
            for n in self.nodes
            if n.shape is not None and is_kernel(n.operation)
        ]
        kernels = set(self._kernels)
        # The kernel nodes above each node, and the first on each way up.
        self._above, self._next = {}, {}
        for node in reversed(self.nodes):
            above, first = set(), set()
            for consumer in self.consumers[node]:
                above |= self._above[consumer]
                if consumer in kernels:
                    first.add(consumer)
                else:
                    first |= self._next[consumer]
            self._above[node], self._next[node] = above | first, first

    def hidden(self, source: Node | None = None) -> list[Node]:
        """The hidden kernel nodes of what ends at a node; default: all."""
        end = source or self.output
        ending = {end, *self.below(end)}
        return [
            node
            for node in self._kernels
            if not ending.isdisjoint(self._above[node])
        ]

    def below(self, node: Node) -> set[Node]:
        """The nodes from which a node can be reached."""
        found, left = set(), list(node.parents)
        while left:
            parent = left.pop()
            if parent not in found:
                found.add(parent)
                left += parent.parents
        return found

    def tap(self, node: Node) -> Node:
        """The node at whose output the error of a kernel node arrives."""
        while len(self.consumers[node]) == 1 and node is not self.output:
            (consumer,) = self.consumers[node]
            if len(consumer.parents) != 1 or not _passes(consumer.operation):
                break
            node = consumer
        return node

    def logits(self) -> Node:
        """The output's node, or the one below a trailing softmax or sigmoid."""
        return self._trailing()[-1]

    def probabilities(self) -> list[str]:
        """The activations between the logits and the output, by name."""
        return [activation_of(node.operation) for node in self._trailing()]

    def _trailing(self) -> list[Node]:
        """The output's node, and those below it down to the logits'."""
        nodes = [self.output]
        while nodes[-1] not in self._kernels and _makes_probabilities(
            nodes[-1].operation
        ):
            nodes += nodes[-1].parents
        return nodes

    def direct(
        self, source: Node | None = None, taps: list[Node] | None = None
    ) -> Sends:
        """DFA's sends.

        Args:
            source: Whose error is sent. Default: that of the logits.
            taps: What receives it, right at its output. Default: every hidden
                kernel node below the source, at its tap.
        """
        source = source or self.logits()
        if taps is None:
            receivers = {n: self.tap(n) for n in self.hidden(source)}
        else:
            receivers = {tap: tap for tap in taps}
        return {source: receivers} if receivers else {}

    def dense(self) -> Sends:
        """DenseFA's: from each kernel node to all beyond those just below."""
        sends = collections.defaultdict(dict)
        for node in self.hidden():
            for source in self._above[node] - self._next[node]:
                sends[source][node] = self.tap(node)
        return {node: sends[node] for node in self._kernels if node in sends}


class _Recorded(keras.Operation):
    """Stands for an operation in a recording: it only tells its output."""

    def __init__(self, operation: keras.Operation) -> None:
        super().__init__()
        self.operation = operation

    def call(self, *args: object, **kwargs: object) -> object:
        return self.operation(*args, **kwargs)

    def compute_output_spec(self, *args: object, **kwargs: object) -> object:
        try:
            return self.operation.compute_output_spec(*args, **kwargs)
        except Exception:
            # Told by a trace of `call`, in which the layer casts its inputs.
            return super().compute_output_spec(*args, **kwargs)


def _record(model: keras.Model) -> tuple[list[Node], Node]:
    """The nodes of a model, inputs left out, and the node of its output."""
    # A view is not compiled and has no constructor of a user's.
    view = _cloning.functional(model)
    nodes, calls = [], collections.Counter()
    labels = {operation.name for operation in view.operations}
    produced = collections.defaultdict(Node)  # what nothing produced is input

    def record(
        operation: keras.Operation, *args: object, **kwargs: object
    ) -> object:
        outputs = _Recorded(operation)(*args, **kwargs)
        tensors = keras.tree.flatten(outputs)
        label = operation.name
        if calls[operation]:
            label += f"_{calls[operation]}"
            while label in labels:
                label += "_"
        calls[operation] += 1
        labels.add(label)
        node = Node(
            operation,
            label,
            tuple(
                produced[value]
                for value in keras.tree.flatten((args, kwargs))
                if isinstance(value, keras.KerasTensor)
            ),
            tensors[0].shape if len(tensors) == 1 else None,
        )
        nodes.append(node)
        produced.update(dict.fromkeys(tensors, node))
        return outputs

    recording = keras.models.clone_model(
        view,
        clone_function=lambda operation: operation,
        call_function=record,
    )
    return nodes, produced[recording.outputs[0]]


def named(
    model: keras.Model, graph: Graph, clones: _cloning.Clones
) -> dict[str, list[Node]]:
    """The calls of each layer, operation and nested model, by its path.

    Args:
        model: A Functional or Sequential model.
        graph: That of the model without nested models.
        clones: The layers of that one by those of the model.

    Returns:
        By path (`name`, or `model/name` in a nested model) the nodes; those of
        a nested model are the calls of the layer that its output comes from,
        and none if it has several outputs.
    """
    calls = collections.defaultdict(list)
    for node in graph.nodes:
        calls[node.operation].append(node)

    def last(operation: keras.Operation | None) -> keras.Operation | None:
        if not _cloning.is_graph(operation):
            return clones.get(operation, operation)
        if len(operation.outputs) != 1:
            return None
        return last(_record(operation)[1].operation)

    return {
        "/".join(path): calls[last(operation)]
        for path, operation in _cloning.walk(model)
    }


def hidden_layers(
    model: keras.Model, is_kernel: Callable[[keras.Operation], bool]
) -> set[keras.Operation]:
    """The kernel layers from whose output another kernel layer is reached.

    In models nested in each other, with several outputs, and with shared
    layers: one that is hidden in one of its calls is hidden.

    Args:
        model: A built Functional or Sequential model.
        is_kernel: Tells which operations are kernel layers.
    """
    reached, *_ = _reached(model, is_kernel)
    return {each for each in reached if not isinstance(each, keras.KerasTensor)}


def _reached(
    model: keras.Model, is_kernel: Callable[[keras.Operation], bool]
) -> tuple[set, list, list[set]]:
    """What a model's kernel layers are reached from.

    Returns:
        The kernel layers and inputs below any kernel layer; the inputs; and,
        for each output, the kernel layers and inputs below it.
    """
    below, reached = {}, set()

    def of(tensors: object) -> list[set]:
        flat = keras.tree.flatten(tensors)
        found = [t for t in flat if isinstance(t, keras.KerasTensor)]
        return [below.get(tensor, {tensor}) for tensor in found]

    def call(
        operation: keras.Operation, *args: object, **kwargs: object
    ) -> object:
        outputs = _Recorded(operation)(*args, **kwargs)
        given = of((args, kwargs))
        under = set().union(*given)
        made = [under] * len(keras.tree.flatten(outputs))
        if hasattr(operation, "operations"):  # a nested model
            inner, inputs, ends = _reached(operation, is_kernel)
            outer = dict(zip(inputs, given))

            def seen(found: set) -> set:
                return set().union(*(outer.get(one, {one}) for one in found))

            reached.update(seen(inner))
            made = list(map(seen, ends))
        elif is_kernel(operation):
            reached.update(under)
            made = [under | {operation}] * len(made)
        below.update(zip(keras.tree.flatten(outputs), made))
        return outputs

    recording = keras.models.clone_model(
        keras.Model(model.inputs, model.outputs),
        clone_function=lambda operation: operation,
        call_function=call,
    )
    return reached, recording.inputs, of(recording.outputs)


@functools.cache
def _operations() -> dict[type, str]:
    """The operations that activation functions are recorded as, by class.

    Public functions tell it: those of `keras.activations` and those of the
    same names in `keras.ops`. A function of several operations has no class.
    """
    names = {keras.layers.Softmax: "softmax"}
    for name in dir(keras.activations):
        for module in (keras.activations, keras.ops):
            x = keras.KerasTensor((None, 4))
            try:
                operations = keras.Function(x, getattr(module, name)(x))
            except (AttributeError, TypeError, ValueError):
                continue  # not there, or no function of one symbolic tensor
            if len(operations.operations) == 1:
                names[type(operations.operations[0])] = name
    return names


def activation_of(operation: keras.Operation) -> str:
    """The name of the activation that an operation is, or a layer ends in."""
    if type(operation) in _operations():
        return _operations()[type(operation)]
    function = getattr(operation, "activation", None)
    return getattr(function, "__name__", "linear" if function is None else "")


def _passes(operation: keras.Operation) -> bool:
    """Whether a tap moves through an operation with one input."""
    return type(operation) in _PASSED or type(operation) in _operations()


def _makes_probabilities(operation: keras.Operation | None) -> bool:
    """Whether it is a softmax or the like and nothing else."""
    kind = type(operation)
    alone = kind is keras.layers.Activation or kind in _operations()
    return alone and activation_of(operation) in TO_PROBABILITIES
