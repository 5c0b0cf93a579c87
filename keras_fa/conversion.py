"""From a stock Keras model to one of the paper's methods, and back.

`convert` clones a Functional or Sequential model with each layer that has a
kernel replaced by its FA counterpart, also in layers that hold layers, copies
the weights, and, for DFA and DenseFA, rewires the error:

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

import copy
import dataclasses
import logging
import math
import os
import types
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_fa import _cloning
from keras_fa import _holders
from keras_fa import _wiring
from keras_fa import callbacks
from keras_fa import constraints
from keras_fa import initializers
from keras_fa import layers as fa_layers
from keras_fa import methods
from keras_fa.layers import direct
from keras_fa.layers.feedback import FeedbackArguments
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import feedback_layers

_COUNTERPART = {
    cls.stock_class: cls for cls in map(vars(fa_layers).get, fa_layers.__all__)
}
# What names a kind of layers, by the stock class that it stands for.
_CLASSES = {
    key: stock
    for stock, cls in _COUNTERPART.items()
    for key in (cls, stock, cls.__name__, stock.__name__)
}
_OURS = (FeedbackArguments, direct.SendError, direct.StopError)
_MAP_LAW = "glorot_uniform"
# What two arguments of `convert` name.
_ENDS = {
    "taps": "layers below the source whose outputs have static shapes",
    "error_from": "a layer that is called once, with an output of static "
    "shape, above what receives its error",
}

Layers = Mapping[str | type, str | methods.Method] | None


def convert(
    model: keras.Model,
    method: str | methods.Method,
    layers: Layers = None,
    skip: Iterable[str] = (),
    feedback_maps: str = "dense",
    taps: Iterable[str] | None = None,
    error_from: str | None = None,
) -> keras.Model:
    """The same model under another way to train it.

    Every layer with a kernel becomes its FA counterpart, with the same name,
    the same forward weights, vocabulary and `trainable` flag and a feedback
    path as the method says; nested models, shared layers and the layers that
    another layer holds (a block, `Bidirectional`, `RNN`, `TimeDistributed`)
    too. Outputs are
    equal to the last bit, and weight files of the stock model load. Functions
    and objects that a layer was given, such as a lambda as its activation, are
    carried over as they are.

    Only a method with `FixedSign(per="unit")` (Dale's law) changes weights: a
    kernel in which units have weights of both signs becomes |W| times a sign
    that is drawn for each unit, as `FixedSign` says, with a warning.

    Args:
        model: A built Functional or Sequential model: stock, or converted
            before (it is taken back to stock first). It is left as it is. A
            subclassed model that is built is converted in place and returned;
            a line of the logger `keras_fa` says so.
        method: A name in `keras_fa.methods.METHODS`, or a `Method`.
        layers: Other methods for some layers: a dict of layer name or class
            (`keras.layers.Dense`, or "Dense" where no layer is called that)
            to method. Names win over classes. Default
            `None`. Not with DFA and DenseFA, which wire the whole model.
        skip: Names of layers to leave as they are: layers with a kernel of
            their own that have no FA counterpart (ConvLSTM2D, of one's own).
            Errors pass through them exactly. Default: none.
        feedback_maps: What carries the direct errors of DFA and DenseFA, as
            `keras_fa.layers.direct.SendError` says in full. "dense" (default):
            a matrix `(size of source, size of receiver)` for each pair.
            "convolutional" (our choice of a form that fits): 3x3 convolutions
            from feature map to feature map and, from a vector, a matrix for
            each place of a 4x4 grid, resized to the receiver. The law is the
            method's `map_initializer`.
        taps: For DFA, the layers at whose outputs direct error arrives, by
            name: any layer, operation or nested model below the source, with
            or without a kernel, whose output has a static shape. At a tap the
            error is `B_l e` and no error from above is added to it; between
            two taps, in a block, errors are exact (backpropagation), and so
            are they above the last tap and along a branch that goes around a
            tap. A name is that of a layer or, in a nested model, its path:
            `"block"`, `"block/dense"`, or `"dense"` alone where no other
            layer has it. A nested model stands for the layer that its output
            comes from. Every call of a layer that is called several times is
            a tap. Default `None`: every hidden kernel layer, behind the
            normalization, activation and dropout layers that follow it.
        error_from: For DFA, the layer whose output's error is e, by name as
            in `taps`. What is above it is backpropagated. Default `None`:
            the logits, which the name of a last layer with a softmax or
            sigmoid stands for, too.

    DFA and DenseFA take nested models apart: the new model has their layers
    and no `get_layer("backbone")`, and so has what `to_backprop` makes of it.
    A layer keeps its name unless another one has it, too; then it is
    `backbone_dense`, after the models that it was in. Layers that were frozen
    with their model are frozen, and set free one by one. Weight files of a
    stock model with nested models load into that one, which is then converted.

    A model with FA layers, converted or written by hand, is taken back to
    stock first: the feedback arguments and the constraints of this package
    that its FA layers had give way to those of the method. Feedback kernels
    that both store in one shape, and maps of equal names and shapes, go on
    with their values, unless the method draws them by another law than they
    had been drawn by. To draw them anew, convert `to_backprop(model)`.

    Returns:
        A new model (a subclassed one: the same), of the class of `model`
        (plain Functional under DFA and DenseFA), compiled if `model` is. In a
        Functional model of a class of its own (a task of KerasHub) attributes
        that are layers or tensors of the graph are those of the new one; a
        layer without weights outside of the graph (a preprocessor) is the
        same object. Such a class becomes plain Functional, with a warning,
        where an attribute has weights that are not the graph's, or leads to
        its layers by a closure or an object. If what it was compiled with
        cannot be copied (a loss or metric that is a function of one's own), it
        is left uncompiled, with a warning.

    Blocks, tasks and subclassed models, whose constructors make their layers,
    are saved with what was made of these: a file of the new model loads as it
    is, where one of `model` loads. So do pickles and copies by Keras's
    `from_config`. Their class is then one of the same name, derived from it.

    Raises:
        ValueError: If the model is not built, or subclassed and the method
            DFA, DenseFA or Frozen, has a layer with a kernel but without a
            counterpart that `skip` does not name, or one that Keras cannot
            make again, or one that is part of two others (two
            `TimeDistributed` of one layer), or if the graph uses a layer's
            weight by itself, or its class has a `call` of its own that the
            copy would lose, or a layer that holds others would go on with
            the stock ones (by a closure), or if a name is unknown, if no
            kernel would learn (under "frozen", where all are hidden), or if a
            method without direct errors is given
            `feedback_maps`, or one other than DFA `taps` or `error_from`; if
            these name no layer that there is, one twice, or one that is not
            below the source or has no static shape, or if the model is
            compiled with `use_ema=True` and a method fixes signs or norms;
            under DFA and DenseFA also for several outputs, `layers`, nested
            models that have a `call` of their own or are called with a mask,
            maps that the machine's memory cannot hold (before they are made),
            and convolutional maps for kernel layers that are channels_first.

    Source: Moskovitz et al. (2018) for the methods; Launay, Poli, Boniface &
    Krzakala (2020) for DFA by blocks.

    Example:

    ```python
    import keras
    from keras_fa import convert
    from keras_fa.methods import METHODS

    stock = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(10, name="readout"),
        ]
    )
    model = convert(stock, "fa_usf_sn", layers={"readout": "bp"})
    model.compile("adam", "mse")
    callbacks = METHODS["fa_usf_sn"].callbacks()

    # Logs "DFA: 1 fixed random convolutional maps for model 'sequential'
    # need 5,120 bytes (0.0 MiB).", where dense ones need 216,320.
    direct = convert(stock, "dfa", feedback_maps="convolutional")

    # Direct error at the output of `flatten` alone.
    blocks = convert(stock, "dfa", taps=["flatten"])
    ```
    """
    method = _own(methods.get(method))
    direct.check_feedback_maps(feedback_maps)
    if method.wiring == "chain" and feedback_maps != "dense":
        raise ValueError(
            "`feedback_maps` are those of DFA and DenseFA. Received: "
            f"feedback_maps={feedback_maps!r} with '{method.name}', whose "
            "errors go from layer to layer. Leave `feedback_maps` out."
        )
    if method.wiring != "direct" and not (taps is None and error_from is None):
        raise ValueError(
            "`taps` and `error_from` are those of DFA. Received: "
            f"taps={taps!r}, error_from={error_from!r} with '{method.name}'. "
            "Leave them out."
        )
    if method.direct_signal == "target" and error_from is not None:
        raise ValueError(
            f"'{method.name}' sends the target of the logits. Received: "
            f"error_from={error_from!r}. Leave it out."
        )
    skip = {skip} if isinstance(skip, str) else set(skip)
    _check_model(model)
    if not _cloning.is_graph(model):
        return _convert_in_place(model, method, layers, skip)
    stock, stocks = model, {}
    if any(isinstance(layer, _OURS) for layer in _reached(model)):
        stock, stocks = _to_stock(model)
    others = _other_methods(stock, layers, method)
    _check_layers(stock, skip)
    hidden = set()
    if any(m.hidden_kernel_constraint for m in (method, *others.values())):
        found = _wiring.hidden_layers(
            stock, lambda layer: _kernel_of(layer) is not None
        )
        hidden = set(filter(_learns, found))
    if method.wiring == "chain":

        def make(layer: keras.Operation) -> keras.Operation:
            own = _method_of(layer, method, others)
            return _counterpart(layer, own, layer in hidden)

        converted, clones = _cloning.rebuild(stock, make)
    else:
        loss = model.loss if model.compiled else None
        converted, clones = _wire(
            stock, method, feedback_maps, taps, error_from, loss, hidden, skip
        )
    _tell_lost_steps(model, converted)
    left = {new for layer, new in clones.items() if layer.name in skip}
    for layer, new in clones.items():
        if type(layer) not in _COUNTERPART and new not in left:
            _convert_held(new, method, others, skip, layer in hidden)
    _holders.remember(converted)
    _name_peers(clones)
    _settle(converted, stocks, clones)
    if _learns(stock) and not _learns(converted):
        kernels = ", ".join(layer.name for layer in feedback_layers(converted))
        raise ValueError(
            f"No kernel of model '{model.name}' would learn under "
            f"'{method.name}', which freezes hidden ones: from each of its "
            f"kernel layers, {kernels}, another one or itself can be reached. "
            "End the model in a trainable kernel layer that is called once."
        )
    _compile_as(model, converted)
    return converted


def _tell_lost_steps(model: keras.Model, new: keras.Model) -> None:
    """Warns of steps of a class of its own that the new model does not have."""
    names = "train_step", "test_step", "predict_step", "compute_loss"
    lost = [
        n for n in names if getattr(type(model), n) != getattr(type(new), n)
    ]
    if lost:
        warnings.warn(
            f"Model '{model.name}' ({type(model).__name__}) becomes "
            f"{type(new).__name__} and loses its {', '.join(lost)}. "
            "Make a model of your class of the new one's inputs and outputs, "
            "or write it as a subclass of keras.Model that holds its layers.",
            stacklevel=3,
        )


def _settle(
    model: keras.Model, stocks: _cloning.Clones, clones: _cloning.Clones
) -> None:
    """Brings what FA layers keep in line with the weights that they got."""
    for layer in feedback_layers(model):
        if not layer.built:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) is built by "
                "nothing but a call on data. Give the class that holds it a "
                "`build` that builds it."
            )
        layer.restart()  # of the weights that were copied
    _carry_feedback(stocks, clones, model)
    _give_units_signs(model)
    refresh(model)


def _method_of(
    layer: keras.Operation,
    method: methods.Method,
    others: dict[str | type, methods.Method],
) -> methods.Method:
    return others.get(layer.name, others.get(type(layer), method))


def _convert_held(
    holder: keras.Operation,
    method: methods.Method,
    others: dict[str | type, methods.Method],
    skip: set[str],
    hidden: bool = False,
) -> _cloning.Clones:
    """Converts what a layer holds, in place."""
    if not isinstance(holder, keras.layers.Layer) or _cloning.is_graph(holder):
        return {}

    def make(layer: keras.Operation) -> keras.Operation | None:
        if layer.name in skip:
            return layer
        if type(layer) not in _COUNTERPART:
            return None
        return _counterpart(layer, _method_of(layer, method, others), hidden)

    return _cloning.remake_held(holder, make)


def _convert_in_place(
    model: keras.Model,
    method: methods.Method,
    layers: Layers,
    skip: set[str],
) -> keras.Model:
    """`convert` for a model whose `call` is a program of its own."""
    unseen = method.wiring != "chain" or method.hidden_kernel_constraint
    if unseen:
        raise ValueError(
            f"'{method.name}' needs to know which layer comes before which, "
            "and a subclassed model's `call` does not say it. Received: "
            f"'{model.name}' ({type(model).__name__}). Write it as a "
            "Functional model, or use a method whose errors go from layer to "
            "layer."
        )
    stocks = _to_stock_in_place(model)
    others = _other_methods(model, layers, method)
    _check_layers(model, skip)
    clones = _convert_held(model, method, others, skip)
    _holders.remember(model)
    _settle(model, stocks, clones)
    _compile_as(model, model)
    logging.getLogger("keras_fa").info(
        "Model '%s' (%s) is subclassed: it was converted in place.",
        model.name,
        type(model).__name__,
    )
    return model


def to_backprop(model: keras.Model) -> keras.Model:
    """The way back: a plain Keras model with the trained weights.

    Every FA layer becomes its stock counterpart, and what this package added
    to the model (its constraints, its regularizers, the wiring of DFA and
    DenseFA) is gone. Where DFA and DenseFA split a layer's activation off, it
    stays a layer of its own.

    Args:
        model: A built Functional or Sequential model. It is left as it is. A
            subclassed one goes back in place.

    Returns:
        A new model (a subclassed one: the same), with outputs equal to the
        last bit.

    Raises:
        ValueError: If the model is not built, or has a layer that Keras cannot
            make again, is part of two others, or whose weight the graph uses
            by itself, or a `call` of its own that the copy would lose.

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
    if not _cloning.is_graph(model):
        _to_stock_in_place(model)
        _compile_as(model, model)
        return model
    plain, _ = _to_stock(model)
    _compile_as(model, plain)
    return plain


def refresh(model: keras.Model) -> None:
    """Takes what FA layers remember of their kernels anew from these.

    The fixed signs of E/I and the norms of Const. Call it after a bare
    `set_weights` or `assign` with weights from elsewhere; loading a stock
    weights file does it by itself, and a file of an FA model brings what it
    remembers.

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


def load_stock_weights(model: keras.Model, filepath: str | os.PathLike) -> None:
    """Loads a file of the stock model's weights into a model with FA layers.

    The model may be converted or written by hand. The file is loaded into its
    stock twin, `to_backprop(model)`, so that whatever Keras can load can be
    loaded here, and the weights are copied from there; then `refresh(model)`.
    Where DFA or DenseFA took nested models apart, so does that twin, and a
    file of the nested model is refused: load it there, and convert that.
    Stored feedback kernels and maps stay as they are, but for those that follow
    from W_0 ("constant", "kernel_sign"). For a layer of a class derived from an
    FA class, the file holds the stock layer of the latter.

    Args:
        model: A built Functional or Sequential model.
        filepath: A `.weights.h5` or `.keras` file, or an `.h5` file of the old
            layout, as `keras.applications` ships them.

    Raises:
        ValueError: As `to_backprop`, and as Keras's `load_weights` where the
            file is that of another model.

    Example:

    ```python
    import keras
    from keras_fa import convert, load_stock_weights

    stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    stock.save_weights("stock.weights.h5")
    model = convert(stock, "fa_usf_const_ei")
    load_stock_weights(model, "stock.weights.h5")
    ```
    """
    if not _cloning.is_graph(model):
        raise ValueError(
            "Only Functional and Sequential models take a stock model's file. "
            "Load it into the stock model, and convert that. Received: "
            f"{model!r} of type {type(model).__name__}"
        )
    _check_model(model)
    twin, stocks = _to_stock(model, subclasses=True)
    twin.load_weights(filepath)
    for layer, stock in stocks.items():
        _cloning.copy_weights(stock, layer)
    for layer in feedback_layers(model):
        layer.restart()
    refresh(model)


def _to_stock(
    model: keras.Model, subclasses: bool = False
) -> tuple[keras.Model, _cloning.Clones]:
    """The plain model, not compiled, and its layers by the given ones.

    Args:
        model: The model.
        subclasses: Whether the stock layer of a subclass of an FA class is to
            be that of the FA class; else such a layer is refused.
    """

    def make(layer: keras.Operation) -> keras.Operation:
        if isinstance(layer, (direct.StopError, direct.SendError)):
            return layer  # which is not called
        stock = _stock_of(layer, subclasses)
        return stock or _cloning.again(layer, None, _plain_config(layer))

    def call(layer: keras.Operation, *args: object, **kwargs: object) -> object:
        if isinstance(layer, direct.StopError):
            return args[0]
        if isinstance(layer, direct.SendError):
            return args[0][0]
        return layer(*args, **kwargs)

    _reached(model)  # or refused
    plain, stocks = _cloning.rebuild(model, make, call)
    for new in set(stocks.values()):
        _to_stock_in_place(new, subclasses)
    for layer, stock in stocks.items():
        for ours, theirs in _held_pairs(layer, stock):
            for name, path in zip(ours.kernel_names, ours.feedback_paths):
                parts = path.fixed.constraints
                if any(isinstance(part, constraints.Frozen) for part in parts):
                    getattr(theirs, name).trainable = True  # as it was before
    if left := feedback_layers(plain):
        raise ValueError(
            f"FA layer '{left[0].name}' ({type(left[0]).__name__}) is inside a "
            "layer that is no Functional or Sequential model. Replace it by "
            "hand."
        )
    return plain, stocks


def _stock_of(
    layer: keras.Operation, subclasses: bool = False
) -> keras.Operation | None:
    """The stock layer of an FA layer; `None` for others."""
    if not isinstance(layer, FeedbackArguments):
        return None
    stock = layer.stock_class
    if not subclasses and type(layer) not in _COUNTERPART.values():
        raise ValueError(
            f"Layer '{layer.name}' is of the class {type(layer).__name__}, "
            "which is not one of keras_fa's own: its stock counterpart is "
            "not known. Replace it by hand."
        )
    config = _plain_config(layer)
    for name in config.keys() - _cloning.arguments(stock):
        del config[name]
    return _cloning.again(layer, stock, config)


def _plain_config(layer: keras.Operation) -> dict[str, object]:
    """A layer's config without the constraints of this package."""
    return {
        name: _without_ours(value) if _is_ours(value) else value
        for name, value in _cloning.config_of(layer).items()
    }


def _to_stock_in_place(
    holder: keras.Operation, subclasses: bool = False
) -> _cloning.Clones:
    """Makes the FA layers that a layer or model holds stock ones."""
    layer = isinstance(holder, keras.layers.Layer)
    if not layer or _cloning.is_graph(holder) or not feedback_layers(holder):
        return {}
    _holders.forget(holder)
    return _cloning.remake_held(holder, lambda x: _stock_of(x, subclasses))


def _held_pairs(
    layer: keras.Operation, stock: keras.Operation
) -> list[tuple[FeedbackLayer, keras.layers.Layer]]:
    """The FA layers in a layer, itself among them, and their stock twins."""
    if _cloning.is_graph(layer) or not isinstance(layer, keras.layers.Layer):
        return []
    return [
        (ours, theirs)
        for ours, theirs in zip(all_layers(layer), all_layers(stock))
        if isinstance(ours, FeedbackLayer)
    ]


def _counterpart(
    layer: keras.Operation, method: methods.Method, hidden: bool = False
) -> keras.Operation:
    """The FA layer that a stock layer becomes; others as they are."""
    cls = _COUNTERPART.get(type(layer))
    if cls is None:
        return _cloning.again(layer)
    config = _cloning.config_of(layer)
    added = [method.kernel_constraint]
    if hidden and method.hidden_kernel_constraint is not None:
        added.append(method.hidden_kernel_constraint)
    for name in cls.kernel_constraint_arguments:
        constraint = constraints.get_kernel_constraint(config[name])
        for second in added:
            constraint = _composed(constraint, second)
        config[name] = constraint
    for name in cls.feedback_arguments():  # of each kernel the method's
        config[name] = getattr(method, f"feedback_{name.split('_')[-1]}")
    return cls(**config)


def _composed(first: Callable | None, second: Callable | None) -> object:
    """Both constraints; what the first one has already is not added again."""
    parts = constraints.parts_of(first)
    kinds = {type(part): part for part in parts if _is_ours(part)}
    for part in constraints.parts_of(second):
        own = kinds.get(type(part))
        if own is None:
            parts.append(part)
        elif getattr(part, "silent_zeros", False):
            config = own.get_config() | {"silent_zeros": True}
            parts[parts.index(own)] = type(own).from_config(config)
    if len(parts) > 1:
        return constraints.Chain(parts)
    return parts[0] if parts else None


def _without_ours(constraint: Callable) -> Callable | None:
    """What is left of a kernel constraint without those of this package."""
    left = [p for p in constraints.parts_of(constraint) if not _is_ours(p)]
    if len(left) > 1:
        raise ValueError(
            "A stock layer takes one kernel constraint. Received: "
            f"{', '.join(type(part).__name__ for part in left)}. Write one "
            "constraint that does the work of them all."
        )
    return left[0] if left else None


def _is_ours(constraint: object) -> bool:
    return isinstance(constraint, constraints.KernelConstraint)


def _wire(
    model: keras.Model,
    method: methods.Method,
    feedback_maps: str,
    taps: Iterable[str] | None,
    error_from: str | None,
    loss: object,
    hidden: set[keras.Operation],
    skip: set[str],
) -> tuple[keras.Model, _cloning.Clones]:
    """The model under DFA or DenseFA."""
    _check_wirable(model, feedback_maps)
    flat, flats = model, {}
    if any(map(_cloning.is_graph, model.layers)):
        flat, flats = _cloning.flatten(model)
    elif isinstance(model, keras.Sequential):
        flat = _cloning.functional(model)
    hidden = {flats.get(layer, layer) for layer in hidden}
    dfa = method.wiring == "direct"

    left = [layer for layer in _cloning.leaves(model) if layer.name in skip]
    left = {flats.get(layer, layer) for layer in left}

    def is_kernel(operation: keras.Operation) -> bool:
        """Whether it sends or receives direct errors.

        In DFA a layer that holds kernel layers receives them at its output.
        What DenseFA sends are the errors at pre-activations, of which such a
        layer has several.
        """
        ours = _COUNTERPART.get(type(operation), object)
        if not dfa or issubclass(ours, FeedbackLayer):
            return issubclass(ours, FeedbackLayer)
        return _kernel_of(operation) is not None and operation not in left

    graph = _wiring.Graph(flat, is_kernel)
    if dfa:
        named = _wiring.named(model, graph, flats)
        sends = graph.direct(*_named_ends(graph, named, taps, error_from))
    else:
        sends = graph.dense()
    ways = [(a, tap) for a in sends for tap in sends[a].values()]
    stops = {tap for _, tap in ways} if dfa else set()
    pairs = [(source.shape, tap.shape) for source, tap in ways]
    signal = _signal(graph, method, loss)
    kind = "fixed random" if method.map_learning is None else "learned"
    what = f"{kind} {feedback_maps} maps for model '{model.name}'"
    _say_bytes(f"{method.title}: {len(pairs)} {what}", pairs, feedback_maps)
    # DFA's e is that of the logits or of a named layer's output, DenseFA's
    # that of the pre-activations.
    fused = {
        source.operation: _wiring.activation_of(source.operation)
        for source in sends
        if issubclass(
            _COUNTERPART.get(type(source.operation), object), FeedbackLayer
        )
    }
    split = [
        layer
        for layer, name in fused.items()
        if name != "linear"
        and not (dfa and name not in _wiring.TO_PROBABILITIES)
        and not (dfa and graph.logits() not in sends)
    ]
    taken = {operation.name for operation in flat.operations}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    activations, order = {}, {node: i for i, node in enumerate(sends)}

    def make(layer: keras.Operation) -> keras.Operation:
        clone = _counterpart(layer, method, layer in hidden)
        if layer in split:
            activations[clone] = keras.layers.Activation(
                clone.activation,
                activity_regularizer=clone.activity_regularizer,
                dtype=layer.dtype_policy,
                name=free(f"{layer.name}_activation"),
            )
            clone.activation = keras.activations.linear
            clone.activity_regularizer = None
        return clone

    nodes, ends = iter(graph.nodes), {}

    def call(layer: keras.Operation, *args: object, **kwargs: object) -> object:
        node = next(nodes)
        outputs = layer(*args, **kwargs)
        if node in sends:
            send = direct.SendError(
                [receiver.label for receiver in sends[node]],
                initializers.reseeded(method.map_initializer, order[node]),
                feedback_maps,
                feedback_learning=method.map_learning,
                signal=signal,
                name=free(f"{node.label}_send_error"),
            )
            arriving = [ends[tap] for tap in sends[node].values()]
            outputs = send([outputs, *arriving])
        if layer in activations:
            outputs = activations[layer](outputs)
        ends[node] = outputs
        if node in stops:
            outputs = direct.StopError(name=free(f"{node.label}_stop_error"))(
                outputs
            )
        return outputs

    converted, clones = _cloning.rebuild(flat, make, call, own=False)
    for source, new in flats.items():
        if new in clones:  # and not left out, as what made a mask may be
            clones[source] = clones[new]
    return converted, clones


def _named_ends(
    graph: _wiring.Graph,
    named: dict[str, list[_wiring.Node]],
    taps: Iterable[str] | None,
    error_from: str | None,
) -> tuple[_wiring.Node, list[_wiring.Node] | None]:
    """The source and the taps that the arguments of `convert` name."""

    def found(name: str, argument: str, allowed: list[str]) -> str:
        """The path of what a name stands for."""
        given = str(name)
        paths = [given] if given in named else []
        if not paths:
            paths = [path for path in named if path.endswith(f"/{given}")]
        why = "which is not one of them"
        if not paths:
            why = "a name that no layer has"
        elif len({id(named[path]) for path in paths}) > 1:  # of several layers
            why = f"which may be {' or '.join(paths)}"
        elif paths[0] in allowed:
            return paths[0]
        raise ValueError(
            f"`{argument}` names {_ENDS[argument]}. Received: {name!r}, {why}. "
            f"Allowed: {', '.join(allowed)}"
        )

    def fixed(nodes: list[_wiring.Node]) -> bool:
        shapes = [node.shape for node in nodes]
        return bool(shapes) and not any(
            s is None or None in s[1:] for s in shapes
        )

    source = graph.logits()
    if error_from is not None:
        allowed = [
            path
            for path, nodes in named.items()
            if len(nodes) == 1
            and fixed(nodes)
            and (taps is not None or graph.hidden(nodes[0]))
        ]
        (source,) = named[found(error_from, "error_from", allowed)]
    if taps is None:
        return source, None
    below = graph.below(source)
    allowed = [
        path
        for path, nodes in named.items()
        if below.issuperset(nodes) and fixed(nodes)
    ]
    ends = []
    for name in [taps] if isinstance(taps, str) else taps:
        nodes = named[found(name, "taps", allowed)]
        if not set(nodes).isdisjoint(ends):
            raise ValueError(
                "`taps` names each layer once. Received: one for the second "
                f"time, {name!r}"
            )
        ends += nodes
    if not ends:
        raise ValueError(
            "`taps` names at least one layer. Received: none. Leave `taps` out "
            "to send error to every hidden kernel layer."
        )
    return source, ends


def _signal(graph: _wiring.Graph, method: methods.Method, loss: object) -> str:
    """What the logits' node sends: the argument `signal` of `SendError`."""
    if method.direct_signal == "error":
        return "error"
    if loss is not None:
        return direct.target_signal(loss)
    # Told by what makes probabilities of the logits, or else by their number.
    names = graph.probabilities()
    alone = graph.logits().shape[-1] == 1 and "softmax" not in names
    return "sigmoid_target" if alone or "sigmoid" in names else "softmax_target"


def _say_bytes(
    what: str, pairs: list[tuple[tuple, tuple]], feedback_maps: str
) -> None:
    """Logs the size of the maps that are about to be made.

    Args:
        what: The maps, in words.
        pairs: The shapes of source and receiver of each map.
        feedback_maps: As the argument of `SendError`.

    Raises:
        ValueError: If the machine's main memory cannot hold them while they
            are drawn.
    """
    weight = np.dtype(keras.config.dtype_policy().variable_dtype).itemsize

    def sizes(kind: str) -> list[int]:
        return [
            weight * math.prod(direct.map_between(*pair, kind).kernel_shape)
            for pair in pairs
        ]

    needed = sizes(feedback_maps)
    words = f"{what} need {_in_words(sum(needed))}"
    memory = _machine_memory()
    # While the largest is drawn, it is there twice.
    if memory is not None and sum(needed) + max(needed, default=0) > memory:
        fitting = ""
        if feedback_maps == "dense":
            fitting = (
                "feedback_maps='convolutional', which needs "
                f"{_in_words(sum(sizes('convolutional')))}, "
            )
        raise ValueError(
            f"{words}, and this machine has {memory / 2**20:,.0f} MiB. Use "
            f"{fitting}a smaller model, or a method without such maps, for "
            "example 'fa_usf_sn'."
        )
    logging.getLogger("keras_fa").info("%s.", words)


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


def _name_peers(clones: _cloning.Clones) -> None:
    """Tells FA layers what a weights file of the stock model looks like."""
    models = {layer for layer in clones if _cloning.is_graph(layer)}
    for model in models:
        for layer in model.layers:
            new = clones.get(layer)
            if isinstance(new, FeedbackLayer):
                new.stock_peers = tuple(
                    other.name
                    for other in model.layers
                    if type(other) is type(layer)
                )


def _carry_feedback(
    stocks: _cloning.Clones, clones: _cloning.Clones, converted: keras.Model
) -> None:
    """Feedback kernels and maps of a model go on in the one made of it.

    Args:
        stocks: The stock layers by the layers of the given model.
        clones: The new layers by these stock layers.
        converted: The new model, in which maps go by the names of layers.
    """
    sends = {
        layer.name: layer
        for layer in converted.layers
        if isinstance(layer, direct.SendError)
    }
    for old, stock in stocks.items():
        new = clones.get(stock, sends.get(old.name))
        for source, target in zip(_storing(old), _storing(new)):
            given = source.stored_feedback()
            for name, variable in target.stored_feedback().items():
                if (
                    name in given
                    and given[name].shape == variable.shape
                    and _same_law(source.law_of(name), target.law_of(name))
                ):
                    variable.assign(ops.copy(given[name]))


def _storing(layer: keras.Operation | None) -> list:
    """What stores feedback in a layer: the layer, or those that it holds."""
    if isinstance(layer, direct.SendError):
        return [layer]
    held = isinstance(layer, keras.layers.Layer) and not _cloning.is_graph(
        layer
    )
    return feedback_layers(layer) if held else []


def _give_units_signs(model: keras.Model) -> None:
    """Gives kernels of stock weights signs by unit, where they are fixed so."""
    changed = []
    for layer in feedback_layers(model):
        for name, path in zip(layer.kernel_names, layer.feedback_paths):
            kernel = ops.convert_to_tensor(path.kernel)
            for part in path.fixed.constraints:
                if isinstance(part, constraints.FixedSign) and part.lost(
                    kernel
                ):
                    units = layer.presynaptic_units(name, kernel.shape)
                    path.kernel.assign(part.initial_kernel(kernel, units))
                    changed.append(path.kernel.path)
    if changed:
        warnings.warn(
            f"FixedSign(per='unit'): {', '.join(changed)} became |W| times the "
            "sign that was drawn for each presynaptic unit, balanced, with the "
            "norm of W. The outputs are not those of the given model.",
            stacklevel=3,
        )


def _same_law(old: object, new: object) -> bool:
    """Whether two initializers differ in nothing but the seed.

    A feedback kernel drawn by no initializer in particular goes on, too, but
    for one that is not independent of the kernel.
    """

    def law(initializer: object) -> object:
        if isinstance(initializer, keras.initializers.Initializer):
            return {**initializer.get_config(), "seed": None}
        return initializer

    if new is None:
        return not isinstance(old, initializers.KernelSign)
    return type(old) is type(new) and law(old) == law(new)


def _own(method: methods.Method) -> methods.Method:
    """A method with objects of its own: what has no seed draws anew.

    Keras gives an initializer without a seed one of its own, which it would
    keep from one conversion to the next.
    """

    def own(law: object) -> object:
        drawn = isinstance(getattr(law, "seed", None), int)
        return law.clone() if drawn else law

    maps = keras.initializers.get(method.map_initializer or _MAP_LAW)
    return dataclasses.replace(
        method,
        feedback_initializer=own(method.feedback_initializer),
        feedback_constraint=copy.copy(method.feedback_constraint),
        map_initializer=own(maps),
    )


def _compile_as(model: keras.Model, other: keras.Model) -> None:
    if model is other:  # its compiled functions are of other layers
        model.train_function = None
        model.test_function = None
        model.predict_function = None
    if not model.compiled:
        return
    optimizer = getattr(model, "optimizer", None)
    try:
        config = model.get_compile_config()
        _check_functions(model, config)
        _cloning.compile_again(other, config)
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"What model '{model.name}' was compiled with could not be copied "
            f"({_cloning.reason(error)}) Compile the new model.",
            stacklevel=3,
        )
    # Private, and in no config of Keras's.
    excluded = (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    )
    if any(getattr(optimizer, name, None) for name in excluded):
        warnings.warn(
            f"What the optimizer of model '{model.name}' excludes from weight "
            "decay is not copied. Compile the new model with an optimizer that "
            "excludes it.",
            stacklevel=3,
        )
    callbacks.refuse_averages(other)


def _check_functions(model: keras.Model, config: dict | None) -> None:
    """Refuses losses and metrics that Keras would take for its own."""

    def walk(given: object, again: object) -> None:
        if isinstance(given, types.FunctionType) and again is not given:
            raise ValueError(
                f"{given.__name__} is a function of your own, and Keras finds "
                "another one by its name."
            )
        if isinstance(given, dict) and isinstance(again, dict):
            for key in given.keys() & again.keys():
                walk(given[key], again[key])
        elif isinstance(given, (list, tuple)):
            for one, other in zip(given, again):
                walk(one, other)

    given = getattr(getattr(model, "_compile_config", None), "config", {})
    if config and any(map(given.get, ("loss", "metrics", "weighted_metrics"))):
        again = keras.saving.deserialize_keras_object(config)
        for name in ("loss", "metrics", "weighted_metrics"):
            walk(given.get(name), again.get(name))


def _check_model(model: keras.Model) -> None:
    """Refuses what is no built model."""
    graph = _cloning.is_graph(model)
    if not graph and not isinstance(model, keras.Model):
        raise ValueError(
            "Only Functional and Sequential models can be converted, and "
            f"subclassed ones in place. Received: {model!r} of type "
            f"{type(model).__name__}"
        )
    if not model.built or (graph and not getattr(model, "inputs", None)):
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights yet. "
            "Begin it with a keras.Input, or call it on data first."
        )


def _reached(model: keras.Model) -> dict[keras.Operation, keras.Operation]:
    """The layers that `convert` sees: those of a model, and what they hold.

    Returns:
        By the layer, that layer of the model itself which it is part of.

    Raises:
        ValueError: If a layer is part of two of them.
    """
    graph = _cloning.is_graph(model)
    found = {}
    for top in _cloning.leaves(model) if graph else _cloning.held(model):
        for layer in _cloning.reached(top, _is_known):
            other = found.setdefault(layer, top)
            # What a layer holds is copied with it, as by Keras's clone_model.
            if graph and other is not top and layer.weights:
                raise ValueError(
                    f"Layer '{layer.name}' ({type(layer).__name__}) is part of "
                    f"'{other.name}' ({type(other).__name__}) and of "
                    f"'{top.name}' ({type(top).__name__}), whose copies would "
                    "each have one of their own. Call one of the two in both "
                    "places, or write the model as a subclass."
                )
    return found


def _is_known(layer: keras.Operation) -> bool:
    return type(layer) in _COUNTERPART or isinstance(layer, FeedbackArguments)


def _check_layers(model: keras.Model, skip: set[str]) -> None:
    """Refuses kernels that no FA layer stands for, and wrong names."""
    reached = _reached(model)
    names = [layer.name for layer in reached]
    for name in skip.difference(names):
        raise ValueError(
            f"No layer is named {name!r}. Received it in `skip`. The model's "
            f"layers: {', '.join(dict.fromkeys(names))}"
        )
    for layer, top in reached.items():
        name = layer.name
        converted = type(layer) in _COUNTERPART
        if converted and name in skip:
            raise ValueError(
                f"Layer '{name}' ({type(layer).__name__}) has an FA "
                "counterpart. To leave backpropagation in it, give "
                f"layers={{{name!r}: 'bp'}} and not skip."
            )
        if converted and not layer.built:
            raise ValueError(
                f"Layer '{name}' ({type(layer).__name__}) in '{top.name}' "
                f"({type(top).__name__}) is not built. Call the model on data "
                "that reaches it first."
            )
        kernel = None if converted else _kept_kernel(layer)
        if kernel is not None and skip.isdisjoint({name, top.name}):
            within = "" if top is layer else f" in '{top.name}'"
            within += "" if top is layer else f" ({type(top).__name__})"
            raise ValueError(
                f"Layer '{name}' ({type(layer).__name__}){within} has a "
                f"kernel, '{kernel.path}', and no FA counterpart. Give "
                f"skip=[{top.name!r}] to leave it as it is: errors pass "
                "through it exactly."
            )


def _kept_kernel(layer: keras.layers.Layer) -> keras.Variable | None:
    """A kernel that converting what a layer holds would not reach.

    It is the layer's own, or one of a held layer that it reads by itself.
    """
    if not isinstance(layer, keras.layers.Layer):
        return None
    own = [w for w in _cloning.own_weights(layer) if w.name.endswith("kernel")]
    read = (
        value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable)
        and (name.endswith("kernel") or value.name.endswith("kernel"))
    )
    return next(iter([*own, *read]), None)


def _kernel_of(layer: keras.Operation) -> keras.Variable | None:
    """A kernel of a layer; `None` if it has none."""
    weights = getattr(layer, "weights", ())
    return next((w for w in weights if w.name.endswith("kernel")), None)


def _learns(layer: keras.layers.Layer) -> bool:
    """Whether any kernel of a layer or model is trained."""
    return any(w.name.endswith("kernel") for w in layer.trainable_weights)


def _check_wirable(model: keras.Model, feedback_maps: str) -> None:
    """Refuses models that DFA and DenseFA have no wiring for."""
    first = [
        layer.name
        for layer in _cloning.leaves(model)
        if type(layer) in _COUNTERPART
        and getattr(layer, "data_format", None) == "channels_first"
    ]
    if first and feedback_maps == "convolutional":
        raise ValueError(
            "Convolutional feedback maps need layers that are channels_last. "
            f"Received: channels_first layers {', '.join(first)} in "
            f"'{model.name}'. Build it with data_format='channels_last', or "
            "use feedback_maps='dense'."
        )


def _other_methods(
    model: keras.Model, layers: Layers, method: methods.Method
) -> dict[str | type, methods.Method]:
    """The argument `layers` with stock classes and methods resolved."""
    if not isinstance(layers, Mapping | None):
        raise ValueError(
            "`layers` is a dict of layer name or class to method. Received: "
            f"layers={layers}"
        )
    if layers and method.wiring != "chain":
        raise ValueError(
            f"'{method.name}' wires the errors of the whole model. Received: "
            f"layers={layers}. Leave `layers` out."
        )
    kinds = {}
    for layer in _reached(model):
        kinds.setdefault(layer.name, set()).add(type(layer))
    others = {}
    for key, value in (layers or {}).items():
        other = _own(methods.get(value))
        if other.wiring != "chain":
            raise ValueError(
                f"'{other.name}' wires the errors of a whole model and cannot "
                f"be the method of one layer. Received: layers[{key!r}]="
                f"'{other.name}'. Use convert(model, '{other.name}')."
            )
        named = kinds.get(key, {_CLASSES.get(key)})
        if named.isdisjoint(_COUNTERPART):
            found = ", ".join(kind.__name__ for kind in kinds.get(key, ()))
            raise ValueError(
                "`layers` takes names and classes of layers with an FA "
                f"counterpart. Received: {key!r} ({found or 'unknown'}). The "
                f"model's layers: {', '.join(kinds)}. Allowed classes: "
                f"{', '.join(kind.__name__ for kind in _COUNTERPART)}"
            )
        others[key if key in kinds else _CLASSES[key]] = other
    return others
