"""From a stock Keras model to one of the paper's methods, and back.

`convert` clones a Functional or Sequential model with each layer that has a
kernel replaced by its FA counterpart, copies the weights, and, for DFA and
DenseFA, rewires the error:

```
fa, uSF, ...    x -> conv1 -> conv2 -> fc               errors chain through B
dfa             x -> conv1 -> STOP -> conv2 -> STOP -> fc -> SEND -> logits
                       ^                ^                     | |
                       +----- e B_1 ----|---------------------+ |
                                        +------- e B_2 ---------+
dense_fa        as fa, with a SEND after each kernel layer, to all that are
                further down than the next
```

STOP and SEND are identities in the forward pass: outputs do not change.
"""

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_fa import constraints
from keras_fa import layers as fa_layers
from keras_fa import methods
from keras_fa.layers.direct import SendError
from keras_fa.layers.direct import StopError
from keras_fa.layers.direct import check_feedback_maps
from keras_fa.layers.direct import drawn_apart
from keras_fa.layers.direct import map_between
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import feedback_layers
from keras_fa.wiring import TO_PROBABILITIES
from keras_fa.wiring import Graph
from keras_fa.wiring import Node
from keras_fa.wiring import Send

_STOCK = {
    cls: next(
        base for base in cls.__mro__ if base.__module__.startswith("keras.")
    )
    for cls in map(vars(fa_layers).get, fa_layers.__all__)
}
_COUNTERPART = {stock: cls for cls, stock in _STOCK.items()}
_BY_NAME = {
    **{stock.__name__: stock for stock in _COUNTERPART},
    **{cls.__name__: stock for cls, stock in _STOCK.items()},
}
_MAP_LAW = "glorot_uniform"


def convert(
    model: keras.Model,
    method: str | methods.Method,
    layers: Mapping[str | type, str | methods.Method] | None = None,
    skip: Iterable[str] = (),
    feedback_maps: str = "dense",
) -> keras.Model:
    """The same model under another way to train it.

    Every layer with a kernel becomes its FA counterpart, with the same name,
    the same forward weights and a feedback path as the method says; nested
    models and shared layers too. Outputs are equal to the last bit, and weight
    files of the stock model load.

    Args:
        model: A built Functional or Sequential model: stock, or converted
            before (it is taken back to stock first). It is left as it is.
        method: A name in `keras_fa.methods.METHODS`, or a `Method`.
        layers: Other methods for some layers: a dict of layer name or class
            (`keras.layers.Dense`, or "Dense" where no layer is called that)
            to method. Names win over classes. Default
            `None`. Not with DFA and DenseFA, which wire the whole model.
        skip: Names of layers to leave as they are: layers with a kernel that
            have no FA counterpart (recurrent, attention, TimeDistributed, of
            one's own). Errors pass through them exactly. Default: none.
        feedback_maps: What carries the direct errors of DFA and DenseFA, as
            `keras_fa.layers.direct.SendError` says in full. "dense" (default):
            a matrix `(size of source, size of receiver)` for each pair.
            "convolutional" (our choice of a form that fits): 3x3 convolutions
            from feature map to feature map and, from a vector, a matrix for
            each place of a 4x4 grid, resized to the receiver. The law is the
            method's `map_initializer`.

    Train it with the callbacks of the method, `METHODS[...].callbacks()`, and
    of the methods in `layers`: without StrictNormalization uSF SN is normalized
    once, here, and never again.

    A model with FA layers, converted or written by hand, is taken back to
    stock first: the feedback arguments and the constraints of this package
    that its FA layers had give way to those of the method.

    Returns:
        A new model, Sequential if `model` is (Functional under DFA and
        DenseFA), compiled if `model` is. If what it was compiled with cannot
        be copied (a loss that is a function of one's own), it is left
        uncompiled, with a warning.

    Raises:
        ValueError: If the model is neither Functional nor Sequential, is not
            built, has a layer with a kernel but without a counterpart that
            `skip` does not name, or if a name is unknown, or if a method
            without direct errors is given `feedback_maps`; under DFA and
            DenseFA also for nested models, several outputs, `layers`, maps
            that the machine's memory cannot hold (before they are made), and
            convolutional maps for kernel layers that are channels_first.

    Source: Moskovitz et al. (2018) for the methods.

    Example:

    ```python
    import keras
    from keras_fa import convert
    from keras_fa.methods import METHODS

    stock = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="readout"),
        ]
    )
    model = convert(stock, "fa_usf_sn", layers={"readout": "bp"})
    model.compile("adam", "mse")
    callbacks = METHODS["fa_usf_sn"].callbacks()

    # Logs "DFA: 1 fixed random convolutional maps for model 'sequential'
    # need 5,120 bytes (0.0 MiB).", where dense ones need 216,320.
    direct = convert(stock, "dfa", feedback_maps="convolutional")
    ```
    """
    method = methods.get(method)
    check_feedback_maps(feedback_maps)
    if method.wiring == "chain" and feedback_maps != "dense":
        raise ValueError(
            "`feedback_maps` are those of DFA and DenseFA. Received: "
            f"feedback_maps={feedback_maps!r} with '{method.name}', whose "
            "errors go from layer to layer. Leave `feedback_maps` out."
        )
    _check_model(model)
    if any(isinstance(inner, _OURS) for inner in all_layers(model)):
        model = to_backprop(model)
    skip = {skip} if isinstance(skip, str) else set(skip)
    others = _other_methods(model, layers)
    _check_layers(model, skip)
    if method.wiring != "chain":
        return _convert_direct(model, method, others, skip, feedback_maps)
    for key, other in others.items():
        if other.wiring != "chain":
            raise ValueError(
                f"'{other.name}' wires the errors of a whole model and cannot "
                f"be the method of one layer. Received: layers[{key!r}]="
                f"'{other.name}'. Use convert(model, '{other.name}')."
            )
    clones = {}

    def make(layer):
        rule = others.get(layer.name, others.get(type(layer), method))
        return _counterpart(layer, rule, skip)

    converted = _clone(model, make, clones)
    _copy_weights(clones)
    refresh(converted)
    _compile_as(model, converted)
    return converted


def to_backprop(model: keras.Model) -> keras.Model:
    """The way back: a plain Keras model with the trained weights.

    Every FA layer becomes its stock counterpart, and what this package added
    to the model (its constraints, its regularizers, the wiring of DFA and
    DenseFA) is gone. Where DFA and DenseFA split a layer's activation off, it
    stays a layer of its own.

    Args:
        model: A built Functional or Sequential model. It is left as it is.

    Returns:
        A new model, with outputs equal to the last bit.

    Raises:
        ValueError: If the model is neither Functional nor Sequential, or is
            not built.

    Example:

    ```python
    import keras
    from keras_fa import convert, to_backprop

    stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    plain = to_backprop(convert(stock, "fa"))
    assert type(plain.layers[0]) is keras.layers.Dense
    ```
    """
    _check_model(model)
    clones = {}

    def call(layer, *args, **kwargs):
        if isinstance(layer, StopError):
            return args[0]
        if isinstance(layer, SendError):
            return args[0][0]
        return layer(*args, **kwargs)

    plain = _clone(model, _stock, clones, call)
    _copy_weights(clones)
    _compile_as(model, plain)
    return plain


def refresh(model: keras.Model) -> None:
    """Takes what FA layers remember of their kernels anew from these.

    The fixed signs of E/I, the norms of Const. and matched magnitudes. Call it
    after a bare `set_weights` or `assign` with weights from elsewhere; loading
    a stock weights file does it by itself, and a file of an FA model brings
    what it remembers.

    Args:
        model: A model or layer with FA layers.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_fa import FADense, refresh

    layer = FADense(2, kernel_constraint="constant_norm")
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.kernel.assign(np.ones((4, 2)))
    refresh(model)
    assert float(layer.kernel.constraint.norm) == np.sqrt(8.0, dtype="float32")
    ```
    """
    for layer in feedback_layers(model):
        layer.refresh()


def _convert_direct(
    model: keras.Model,
    method: methods.Method,
    others: dict,
    skip: set[str],
    feedback_maps: str,
) -> keras.Model:
    """DFA and DenseFA."""
    if others:
        raise ValueError(
            f"'{method.name}' wires the errors of the whole model. Received: "
            f"layers={others}. Leave `layers` out."
        )
    nested = [layer.name for layer in model.layers if _is_graph(layer)]
    if nested:
        raise ValueError(
            f"'{method.name}' does not support nested models yet. Received: "
            f"nested models {', '.join(nested)} in '{model.name}'. Build the "
            "model from their layers directly, or use another method."
        )
    given = model
    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    kernels = {
        layer.name for layer in model.layers if type(layer) in _COUNTERPART
    }
    if feedback_maps == "convolutional":
        _check_channels_last(model, kernels)
    graph = Graph(model, kernels)
    direct = method.wiring == "direct"
    sends = {
        send.source: send
        for send in (graph.direct() if direct else graph.dense())
    }
    stops = {graph.tap(node) for node in graph.hidden()} if direct else set()
    # DFA's e is that of the logits, DenseFA's that of the pre-activations.
    split = {
        name
        for name, _ in sends
        if name in kernels
        and not _activates(model.get_layer(name), ("linear",))
        and (not direct or _activates(model.get_layer(name), TO_PROBABILITIES))
    }
    _say_bytes(method, model, graph, sends, feedback_maps)
    law = _own(keras.initializers.get(method.map_initializer or _MAP_LAW))
    laws = {source: drawn_apart(law, i) for i, source in enumerate(sends)}
    clones, taps, activations = {}, {}, {}
    taken = {operation.name for operation in model.operations}

    def free(name):
        while name in taken:
            name += "_"
        return name

    def make(layer):
        clone = _counterpart(layer, method, skip)
        if layer.name in split:
            activations[layer.name] = keras.layers.Activation(
                clone.activation,
                activity_regularizer=clone.activity_regularizer,
                dtype=layer.dtype_policy,
                name=free(f"{layer.name}_activation"),
            )
            clone.activation = keras.activations.linear
            clone.activity_regularizer = None
        return clone

    def call(node, layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        if node in sends:
            send = sends[node]
            outputs = SendError(
                [_label(receiver) for receiver in send.receivers],
                laws[node],
                feedback_maps,
                name=free(f"{_label(node)}_send_error"),
            )([outputs, *(taps[tap] for tap in send.taps)])
        if layer.name in activations:
            outputs = activations[layer.name](outputs)
        taps[node] = outputs
        if node in stops:
            outputs = StopError(name=free(f"{_label(node)}_stop_error"))(
                outputs
            )
        return outputs

    converted = _clone(model, make, clones, _by_node(graph, call), graph)
    _copy_weights(clones)
    refresh(converted)
    _compile_as(given, converted)
    return converted


def _say_bytes(
    method: methods.Method,
    model: keras.Model,
    graph: Graph,
    sends: dict[Node, Send],
    feedback_maps: str,
) -> None:
    """Logs the size of the maps that are about to be made.

    Raises:
        ValueError: If the machine's main memory cannot hold them while they
            are drawn.
    """
    shapes = {}

    def record(node, layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        shapes[node] = getattr(outputs, "shape", None)
        return outputs

    _clone(model, _again, {}, _by_node(graph, record), graph)
    pairs = [
        (shapes[send.source], shapes[tap])
        for send in sends.values()
        for tap in send.taps
    ]
    weight = np.dtype(keras.config.dtype_policy().variable_dtype).itemsize

    def sizes(kind):
        return [
            weight * math.prod(map_between(*pair, kind).kernel_shape)
            for pair in pairs
        ]

    def size(kind):
        return sum(sizes(kind))

    needs = (
        f"{method.title}: {len(pairs)} fixed random {feedback_maps} maps for "
        f"model '{model.name}' need {_in_words(size(feedback_maps))}"
    )
    memory = _machine_memory()
    # While the largest is drawn, it is there twice.
    peak = size(feedback_maps) + max(sizes(feedback_maps), default=0)
    if memory is not None and peak > memory:
        fitting = ""
        if feedback_maps == "dense":
            fitting = (
                "feedback_maps='convolutional', which needs "
                f"{_in_words(size('convolutional'))}, "
            )
        raise ValueError(
            f"{needs}, and this machine has {memory / 2**20:,.0f} MiB. Use "
            f"{fitting}a smaller model, or a method without such maps, for "
            "example 'fa_usf_sn'."
        )
    logging.getLogger("keras_fa").warning("%s.", needs)


def _in_words(size: int) -> str:
    return f"{size:,} bytes ({size / 2**20:,.1f} MiB)"


def _machine_memory() -> int | None:
    """Main memory in bytes; `None` where the system does not tell.

    An accelerator's own is not asked for: no backend-independent way tells it.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _by_node(graph: Graph, call: Callable) -> Callable:
    """A call function for `_clone` that also gets the node it calls.

    A layer's call is told by the nodes that its tensors come from.
    """
    open_calls = copy.deepcopy(graph.parents)
    produced = {}

    def produce(node, outputs):
        for tensor in keras.tree.flatten(outputs):
            produced[id(tensor)] = (node, tensor)  # kept: ids are reused

    def call_function(layer, *args, **kwargs):
        tensors = [
            value
            for value in keras.tree.flatten((args, kwargs))
            if isinstance(value, keras.KerasTensor)
        ]
        parents = [produced[id(tensor)][0] for tensor in tensors]
        node = next(
            node
            for node, wanted in open_calls.items()
            if node[0] == layer.name and wanted == parents
        )
        del open_calls[node]
        outputs = call(node, layer, *args, **kwargs)
        produce(node, outputs)
        return outputs

    call_function.produce = produce
    return call_function


def _clone(
    model: keras.Model,
    make: Callable,
    clones: dict,
    call: Callable | None = None,
    graph: Graph | None = None,
) -> keras.Model:
    """A copy of a model made of other layers; `clones` tells which of which."""

    def clone(layer):
        new = make(layer)
        clones[layer] = new
        return new

    if isinstance(model, keras.Sequential):
        with _uncompiled(model):
            return keras.models.clone_model(
                model, clone_function=clone, recursive=True
            )
    inputs = None
    if graph is not None:
        inputs = keras.tree.map_structure(
            lambda x: keras.Input(
                batch_shape=x.shape, dtype=x.dtype, name=x.name
            ),
            model.input,
        )
        for node, tensor in zip(graph.inputs, keras.tree.flatten(inputs)):
            call.produce(node, tensor)
    with _uncompiled(model):
        return keras.models.clone_model(
            model,
            input_tensors=inputs,
            clone_function=clone,
            call_function=call,
            recursive=True,
        )


@contextlib.contextmanager
def _uncompiled(model: keras.Model) -> Iterator[None]:
    """Keeps `clone_model` from compiling: losses may not be serialisable."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def _compile_as(model: keras.Model, other: keras.Model) -> None:
    if not model.compiled:
        return
    try:
        other.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"What model '{model.name}' was compiled with could not be copied "
            f"({reason}). Compile the new model.",
            stacklevel=3,
        )


def _copy_weights(clones: dict) -> None:
    for source, clone in clones.items():
        if not isinstance(source, keras.layers.Layer) or not clone.built:
            continue
        # A layer's own weights come before those of its feedback paths. Copies:
        # training on JAX gives the memory of a model's weights away.
        for ours, theirs in zip(clone.weights, source.weights):
            ours.assign(ops.copy(theirs))
        # Some layers derive more from what they load (Normalization).
        store = {}
        source.save_own_variables(store)
        if store:
            clone.load_own_variables(
                {name: np.array(value) for name, value in store.items()}
            )


def _counterpart(
    layer: Any, method: methods.Method, skip: set[str]
) -> keras.layers.Layer:
    """The FA layer that a stock layer becomes under a method."""
    cls = _COUNTERPART.get(type(layer))
    if cls is None or layer.name in skip:
        return _again(layer)
    config = layer.get_config()
    for name in cls.kernel_constraint_arguments:
        config[name] = constraints.compose(
            constraints.get_kernel_constraint(config[name]),
            method.kernel_constraint,
        )
    return cls(
        **config,
        feedback_initializer=_own(method.feedback_initializer),
        feedback_regularizer=copy.copy(method.feedback_regularizer),
        feedback_constraint=copy.copy(method.feedback_constraint),
    )


def _own(initializer: Any) -> Any:
    """A method's initializer for one layer: without a seed it draws anew.

    Keras gives an initializer without a seed one of its own, which a copy
    would repeat; one that was given a seed is to keep it.
    """
    if isinstance(getattr(initializer, "seed", None), int):
        return initializer.clone()
    return copy.copy(initializer)


def _stock(layer: Any) -> Any:
    """The stock layer that an FA layer is made of; others as they are."""
    stock = _STOCK.get(type(layer), type(layer))
    if isinstance(layer, FeedbackLayer) and stock is type(layer):
        raise ValueError(
            f"Layer '{layer.name}' is of the class {type(layer).__name__}, "
            "which is not one of keras_fa's own: its stock counterpart is not "
            "known. Replace it by hand."
        )
    config = layer.get_config()
    for name in list(config):
        if name.startswith("feedback_") and stock is not type(layer):
            del config[name]
        elif name.endswith("_constraint") and _is_ours(layer, name):
            left = constraints.without_ours(getattr(layer, name))
            config[name] = keras.constraints.serialize(left) if left else None
    return stock.from_config(config)


def _is_ours(layer: Any, name: str) -> bool:
    """Whether a constraint of a layer is one of this package."""
    return isinstance(getattr(layer, name, None), constraints.KernelConstraint)


def _again(layer: Any) -> Any:
    return type(layer).from_config(layer.get_config())


def _leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model and of the models nested in it, each once."""
    found = []
    for layer in model.layers:
        for leaf in _leaves(layer) if _is_graph(layer) else [layer]:
            if all(leaf is not other for other in found):
                found.append(leaf)
    return found


def _is_graph(layer: Any) -> bool:
    """Whether this is a model whose layers can be seen and replaced."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and isinstance(layer, keras.Function)
    )


def _activates(layer: keras.layers.Layer, names: tuple[str, ...]) -> bool:
    """Whether a layer's own activation is one of these."""
    if layer.activation is None:
        return "linear" in names
    return getattr(layer.activation, "__name__", None) in names


def _label(node: Node) -> str:
    name, index = node
    return f"{name}_{index}" if index else name


def _check_model(model: Any) -> None:
    if not _is_graph(model):
        raise ValueError(
            "Only Functional and Sequential models can be converted. For a "
            "subclassed model, use the FA layers in it directly. Received: "
            f"{model!r} of type {type(model).__name__}"
        )
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights yet. "
            "Begin it with a keras.Input, or call it on data first."
        )


def _check_layers(model: keras.Model, skip: set[str]) -> None:
    """Refuses kernels that no FA layer stands for, and wrong names."""
    leaves = _leaves(model)
    _check_names(skip, leaves, "skip")
    for layer in leaves:
        name = layer.name
        converted = type(layer) in _COUNTERPART
        if converted and name in skip:
            raise ValueError(
                f"Layer '{name}' ({type(layer).__name__}) has an FA "
                "counterpart. To leave backpropagation in it, give "
                f"layers={{{name!r}: 'bp'}} and not skip."
            )
        kernel = next(
            (w for w in layer.weights if w.name.endswith("kernel")), None
        )
        if kernel is not None and not converted and name not in skip:
            raise ValueError(
                f"Layer '{name}' ({type(layer).__name__}) has a kernel, "
                f"'{kernel.path}', and no FA counterpart. Give "
                f"skip=[{name!r}] to leave it as it is: errors pass through "
                "it exactly."
            )


def _check_channels_last(model: keras.Model, kernels: set[str]) -> None:
    """Refuses kernel layers whose maps are `(channels, *places)`."""
    first = [
        layer.name
        for layer in model.layers
        if layer.name in kernels
        and getattr(layer, "data_format", None) == "channels_first"
    ]
    if first:
        raise ValueError(
            "Convolutional feedback maps need layers that are channels_last. "
            f"Received: channels_first layers {', '.join(first)} in "
            f"'{model.name}'. Build it with data_format='channels_last', or "
            "use feedback_maps='dense'."
        )


def _other_methods(
    model: keras.Model, layers: Mapping | None
) -> dict[str | type, methods.Method]:
    """The argument `layers` with stock classes and methods resolved."""
    leaves = _leaves(model)
    others = {}
    if not isinstance(layers, Mapping | None):
        raise ValueError(
            "`layers` is a dict of layer name or class to method. Received: "
            f"layers={layers}"
        )
    for key, value in (layers or {}).items():
        if isinstance(key, str):
            if all(leaf.name != key for leaf in leaves) and key in _BY_NAME:
                others[_BY_NAME[key]] = methods.get(value)
                continue
            _check_names([key], leaves, "layers")
            _check_counterparts(key, leaves)
        elif key not in _STOCK and key not in _COUNTERPART:
            raise ValueError(
                "`layers` takes names and classes of layers with an FA "
                f"counterpart. Received: {key!r}. Allowed classes: "
                f"{', '.join(cls.__name__ for cls in _COUNTERPART)}"
            )
        others[_STOCK.get(key, key)] = methods.get(value)
    return others


def _check_names(names: Iterable, leaves: list, argument: str) -> None:
    known = dict.fromkeys(leaf.name for leaf in leaves)
    for name in names:
        if name not in known:
            raise ValueError(
                f"No layer is named {name!r}. Received it in `{argument}`. "
                f"The model's layers: {', '.join(known)}"
            )


def _check_counterparts(name: str, leaves: list) -> None:
    kinds = {type(leaf) for leaf in leaves if leaf.name == name}
    if kinds.isdisjoint(_COUNTERPART):
        raise ValueError(
            "`layers` takes names of layers with an FA counterpart. Received: "
            f"layer {name!r} ({', '.join(kind.__name__ for kind in kinds)})"
        )


_OURS = (FeedbackLayer, SendError, StopError)
