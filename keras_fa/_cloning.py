"""A copy of a model that is made of other layers.

Keras's `clone_model` makes new layers of the old ones' configs. Here they also
get what no config holds: weights, vocabularies, `trainable` flags of models,
and functions and objects that Keras cannot serialise. `rebuild` keeps nested
models as they are, `flatten` takes them apart.
"""

import collections
import contextlib
import functools
import gc
import inspect
import tempfile
import types
import warnings
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from typing import TypeVar

import keras
import numpy as np
from keras import ops

# A layer, or what a `keras.ops` function is recorded as.
Operation = TypeVar("Operation", bound=keras.Operation)
Clones = dict[keras.Operation, keras.Operation]
# Marks copies of Functional models whose class has a constructor of its own.
_OWN = "_keras_fa_own"


def is_graph(layer: object) -> bool:
    """Whether this is a model whose layers can be seen and replaced."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and isinstance(layer, keras.Function)
    )


def class_of(layer: keras.Operation) -> type:
    """The class of a layer or model, without what `_holders` adds to it."""
    return getattr(type(layer), "held_class", type(layer))


def become(cls: type, layer: keras.layers.Layer) -> None:
    """Gives a layer or model another class."""
    object.__setattr__(layer, "__class__", cls)


def own_config(layer: keras.Operation) -> dict[str, object]:
    """A layer's config, without what `_holders` adds to it."""
    cls, own = type(layer), class_of(layer)
    if cls is own:
        return layer.get_config()
    become(own, layer)  # Keras asks whether it has a `get_config` of its own
    try:
        return layer.get_config()
    finally:
        become(cls, layer)


def functional(model: keras.Model) -> keras.Model:
    """A view of a model: plain Functional, not compiled, of the same layers."""
    sequential = isinstance(model, keras.Sequential)
    return keras.Model(
        model.inputs[0] if sequential else model.input,
        model.outputs[0] if sequential else model.output,
        name=model.name,
        trainable=model.trainable,
    )


def walk(
    model: keras.Model, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], keras.Operation]]:
    """All operations of a model and of those nested in it, inputs left out.

    Yields:
        The names of the models on the way to an operation and its own, and the
        operation. What several models hold comes once for each.
    """
    for operation in functional(model).operations:
        if not isinstance(operation, keras.layers.InputLayer):
            yield (*path, operation.name), operation
            if is_graph(operation):
                yield from walk(operation, (*path, operation.name))


def leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model and of the models nested in it, each once."""
    found = {}
    for layer in model.layers:
        found.update(
            dict.fromkeys(leaves(layer) if is_graph(layer) else [layer])
        )
    return list(found)


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and all layers in it, however deep, each once."""
    # Keras's own walk, private: a public one would have to know every kind of
    # container that layers are held in.
    return list(layer._flatten_layers())


def held(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer itself holds."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def held_names(layer: keras.layers.Layer) -> dict[keras.layers.Layer, str]:
    """The names of all layers in a layer, led by those of their holders.

    Models lead no names: their layers have names of their own.
    """
    found = {layer: layer.name}

    def visit(holder: keras.layers.Layer, lead: str) -> None:
        if not isinstance(holder, keras.Model):
            lead = f"{lead}{holder.name}/"
        for inner in held(holder):
            if inner not in found:
                found[inner] = f"{lead}{inner.name}"
                visit(inner, lead)

    visit(layer, "")
    return found


def rebuild(
    model: keras.Model,
    make: Callable[[keras.Operation], keras.Operation],
    call: Callable[..., object] | None = None,
    clones: Clones | None = None,
    own: bool = True,
    keep: Collection[keras.Operation] = (),
) -> tuple[keras.Model, Clones]:
    """A copy of a model, with its state, that is made of other layers.

    Args:
        model: A Functional or Sequential model, which is left as it is.
        make: Gives the new layer for an old one, once for each.
        call: Calls the new layers, `(layer, *args, **kwargs)`, in Functional
            models. Default: just so.
        clones: New layers that there are already, by the old ones.
        own: Whether Functional models of a class with a constructor of its own
            stay such; else they become plain Functional.
        keep: The old layers whose new ones keep the state that they have.

    Raises:
        ValueError: If a model would lose a `call` of its own, or the graph
            uses a weight of its layers as such.

    Returns:
        The copy, and which of its layers and models stands for which.
    """
    clones = {} if clones is None else dict(clones)
    call = call or _just_call
    _refuse_weights_in_calls(model)

    def clone(layer: keras.Operation) -> keras.Operation:
        if layer not in clones:
            clones[layer] = copy(layer) if is_graph(layer) else make(layer)
        return clones[layer]

    def copy(graph: keras.Model) -> keras.Model:
        given = []

        def recorded(*args: object, **kwargs: object) -> object:
            given.append(call(*args, **kwargs))
            return given[-1]

        sequential = isinstance(graph, keras.Sequential)
        with _uncompiled(graph):
            new = keras.models.clone_model(
                graph,
                clone_function=clone,
                call_function=None if sequential else recorded,
            )
        if own and not sequential and type(new) is not class_of(graph):
            new = _as_own(graph, new, clones, given)
        _refuse_own_call(graph, type(new))
        return new

    clone(model)
    _copy_state({o: n for o, n in reversed(clones.items()) if o not in keep})
    return clones[model], clones


def _just_call(
    operation: keras.Operation, *args: object, **kwargs: object
) -> object:
    return operation(*args, **kwargs)


def _as_own(
    graph: keras.Model, plain: keras.Model, clones: Clones, given: list
) -> keras.Model:
    """A copy of a Functional model as one of that model's own class.

    Its constructor would make stock layers, so it is not run: the copy gets
    the attributes that it had set, with the new layers and tensors.

    Args:
        graph: The model.
        plain: Its copy as a plain Functional model.
        clones: The new layers by the old ones.
        given: What the new layers gave, in the order of their calls.

    Returns:
        The copy, or, with a warning, `plain`, where an attribute has weights
        or tensors that are not the graph's.
    """
    nodes = [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]
    tensors = dict(zip(map(id, graph.inputs), plain.inputs))
    for node, outputs in zip(nodes, given):
        new = keras.tree.flatten(outputs)
        tensors.update(zip(map(id, node.outputs), new))

    cls = class_of(graph)
    own = cls.__new__(cls)
    type(plain).__init__(own, plain.input, plain.output, name=graph.name)
    layers = {id(old): new for old, new in clones.items()}
    copies = {**tensors, **layers, id(graph): own}
    olds, news = set(copies), set(map(id, copies.values()))

    def copied(value: object) -> object:
        if id(value) not in copies:
            if isinstance(value, _STATEFUL):
                copies[id(value)] = type(value).from_config(value.get_config())
            elif isinstance(value, np.ndarray):
                copies[id(value)] = value.copy()
        return copies.get(id(value), value)

    def foreign(one: object) -> bool:
        layer = isinstance(one, keras.layers.Layer) and one.weights
        weights = layer or isinstance(one, (keras.Variable, keras.Function))
        return id(one) not in news and bool(weights or id(one) in olds)

    usual = {*_attributes(own), *_usual_attributes()}
    usual -= {
        "dtype_policy",
        "supports_jit",
        "supports_masking",
        "_auto_config",
    }
    for name, value in _attributes(graph).items():
        if name in usual:
            continue
        try:
            new = mapped(value, copied, always=True)
            lost = _leads_to(new, foreign)
        except Exception:  # what it is by its config is its class's own affair
            lost = True
        if lost:
            warnings.warn(
                f"Model '{graph.name}' ({cls.__name__}) becomes a plain "
                f"Functional one: its attribute '{name}' cannot be copied, has "
                "weights that are not part of its graph, or has the graph's "
                "layers or tensors in something other than a list, tuple, dict "
                "or set.",
                stacklevel=2,
            )
            return plain
        setattr(own, name, new)
    vars(own)[_OWN] = True
    return own


# Kept by a model beside its layers, with a state that is not another model's.
_STATEFUL = (
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
)
_NO_LAYERS = (type, types.ModuleType, str, bytes, int, float, *_STATEFUL)


def _leads_to(value: object, wanted: Callable[[object], bool]) -> bool:
    """Whether a value is, or leads to, what is wanted.

    Layers are not looked into, nor are the globals of functions.
    """
    seen, left = set(), [value]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, _NO_LAYERS):
            continue
        seen.add(id(one))
        if wanted(one):
            return True
        if isinstance(one, types.FunctionType):
            left += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        elif not isinstance(one, (keras.Operation, keras.Variable)):
            left += gc.get_referents(one)
    return False


@functools.cache
def _usual_attributes() -> set[str]:
    """What layers and models have that is no attribute of their class."""
    model = keras.Model()
    model.compile("sgd", "mse")
    return {*vars(keras.layers.Layer()), *vars(model), "history"}


def makes_layers(layer: keras.layers.Layer) -> bool:
    """Whether a layer's config tells less than the layers that it holds.

    So it is with classes that make their layers themselves. Keras's own, and
    Functional models of a class that is made of inputs and outputs, tell all.
    """
    if is_graph(layer):
        return _OWN in vars(layer)
    return type(layer).__module__.split(".")[0] != "keras"


def _attributes(layer: keras.layers.Layer) -> dict[str, object]:
    """The attributes of a layer. PyTorch keeps those that are layers apart."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def compile_again(model: keras.Model, config: dict[str, object]) -> None:
    """Compiles a model as the one whose `get_compile_config` this was.

    Keras leaves out classes with a `compile` of their own, which mostly takes
    what Keras's takes.
    """
    cls = class_of(model)
    own = cls.compile is not keras.Model.compile
    if own and cls.compile_from_config is keras.Model.compile_from_config:
        model.compile(**keras.saving.deserialize_keras_object(config))
        if model.optimizer is not None:
            model.optimizer.build(model.trainable_variables)
    else:
        cls.compile_from_config(model, config)


def reached(
    layer: keras.layers.Layer, stop: Callable[[keras.layers.Layer], bool]
) -> list[keras.layers.Layer]:
    """A layer and those that it holds, however deep, each once.

    Args:
        layer: A layer.
        stop: Tells which layers are not looked into.
    """
    found, left = [], [layer]
    while left:
        one = left.pop(0)
        if one not in found:
            found.append(one)
            left += [] if stop(one) else held(one)
    return found


def remake_held(
    holder: keras.layers.Layer,
    make: Callable[[keras.layers.Layer], keras.layers.Layer | None],
    keep: bool = False,
) -> Clones:
    """Replaces layers that a layer holds, however deep, in place.

    Args:
        holder: A layer or model.
        make: Gives the new layer for an old one; `None` to look into that,
            or itself to leave it as it is. Models that are graphs are rebuilt.
        keep: Whether what `make` gives keeps the state that it has.

    Returns:
        The new layers by the old ones; they have their state.

    Raises:
        ValueError: If something of the holder would go on with an old layer.
    """
    clones, looked_into = {}, set()

    def visit(outer: keras.layers.Layer) -> None:
        if outer in looked_into:
            return
        looked_into.add(outer)
        for layer in held(outer):
            if layer in clones:
                continue
            if is_graph(layer):
                _, inside = rebuild_all(layer, make, clones, keep)
                clones.update(inside)
                continue
            new = make(layer)
            if new is None:
                visit(layer)
                continue
            if new is layer:
                continue
            clones[layer] = new
            if layer.built:
                _build_as(layer, new)
            if not keep:
                _copy_state({layer: new})

    visit(holder)
    changed = {old: new for old, new in clones.items() if old is not new}
    for outer in looked_into:  # all or none: `make` may raise, and this
        _refuse_hidden(outer, changed)
    for outer in looked_into:
        replace(outer, changed)
    return clones


def _refuse_hidden(holder: keras.layers.Layer, changed: Clones) -> None:
    """Refuses what would go on with old layers once these are replaced."""
    if not makes_layers(holder):
        return
    olds = {id(o) for old in changed for o in (old, *old.weights)}
    for name, value in _attributes(holder).items():
        if name not in _usual_attributes() and _leads_to(
            _replaced(value, changed, True), lambda one: id(one) in olds
        ):
            raise ValueError(
                f"'{holder.name}' ({class_of(holder).__name__}) has a layer "
                f"that is to be replaced, or its weight, in '{name}', in "
                "something other than a list, tuple, dict or set. Write it so "
                "that it looks the layer up in an attribute when it is called."
            )


def rebuild_all(
    model: keras.Model,
    make: Callable[[keras.layers.Layer], keras.layers.Layer | None],
    clones: Clones | None = None,
    keep: bool = False,
) -> tuple[keras.Model, Clones]:
    """As `rebuild`, and in its layers `remake_held`."""
    made = set()

    def made_or_again(layer: keras.Operation) -> keras.Operation:
        new = make(layer)
        if new is None:
            return again(layer)
        if keep:
            made.add(layer)
        return new

    copy, clones = rebuild(model, made_or_again, clones=clones, keep=made)
    for old, layer in list(clones.items()):
        if isinstance(layer, keras.layers.Layer) and not is_graph(layer):
            olds = dict(zip(all_layers(layer), all_layers(old)))
            remake_held(
                layer, lambda new, olds=olds: make(olds.get(new, new)), keep
            )
    return copy, clones


def _build_as(layer: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Builds a layer for what another one is built for, at its place."""
    with contextlib.ExitStack() as scopes:
        for name in layer.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        new.build_from_config(layer.get_build_config())


def flatten(model: keras.Model) -> tuple[keras.Model, Clones]:
    """A Functional copy of a model, with its state, without nested models.

    Their layers stand in the graph itself, once for each, however often and by
    however many models they are called. Names that two of them had are led by
    those of the models that they were in: `inner_dense`.

    Args:
        model: A Functional or Sequential model, which is left as it is.

    Returns:
        The copy, and which of its layers stands for which; none does for a
        nested model.

    Raises:
        ValueError: If a nested model is of a class with a `call` of its own,
            or is called with a mask that its input does not carry.
    """
    clones, paths = {}, {}
    for path, operation in walk(model):
        if not is_graph(operation):
            paths.setdefault(operation, path)
    names = _unique_names(paths, [x.name for x in functional(model).inputs])

    def calls(training: bool | None) -> Callable[..., object]:
        """What calls the copies in the place of a model's operations."""

        def call(
            operation: keras.Operation, *args: object, **kwargs: object
        ) -> object:
            layer = isinstance(operation, keras.layers.Layer)
            if layer and training is not None:
                kwargs["training"] = training
            if is_graph(operation):
                return inline(operation, *args, **kwargs)
            if operation not in clones:
                config = config_of(operation)
                if "name" in config:  # else Keras finds one that is free
                    config["name"] = names[operation]
                clones[operation] = again(operation, config=config)
            return clones[operation](*args, **kwargs)

        return call

    def copy(graph: keras.Model, training: bool | None) -> keras.Model:
        if isinstance(graph, keras.Sequential):
            graph = functional(graph)
        with _uncompiled(graph):
            return keras.models.clone_model(
                graph,
                clone_function=lambda operation: operation,
                call_function=calls(training),
            )

    def inline(
        graph: keras.Model,
        inputs: object,
        training: bool | None = None,
        mask: object = None,
    ) -> object:
        """What a call of the model computes, layer by layer."""
        sequential = isinstance(graph, keras.Sequential)
        _refuse_own_call(graph, _plain(graph))
        piece = copy(graph, training)
        if isinstance(inputs, dict) and not isinstance(piece.input, dict):
            inputs = [inputs[x.name] for x in piece.inputs]
        tensors = keras.tree.flatten(inputs)
        given = any(m is not None for m in keras.tree.flatten(mask))
        if given and not any(map(_carries_mask, tensors)):
            raise ValueError(
                f"Nested model '{graph.name}' is called with a `mask`, which "
                "is lost where DFA and DenseFA take it apart. Let the mask "
                "come from a Masking or Embedding layer."
            )
        if sequential:  # it casts its inputs, a Functional one does not
            cast = graph.dtype_policy.convert_input
            tensors = [
                cast(x, graph.autocast, graph.input_dtype) for x in tensors
            ]
        tensors = [
            x if x.dtype == wanted.dtype else ops.cast(x, wanted.dtype)
            for x, wanted in zip(tensors, piece.inputs)
        ]
        # Not `piece.call`, which would copy each of them by an operation.
        return keras.Function.call(piece, tensors)

    _refuse_weights_in_calls(model)
    _refuse_own_call(model, _plain(model))
    flat = copy(model, None)
    _copy_state({model: flat, **clones})
    return flat, clones


def _plain(graph: keras.Model) -> type:
    """Keras's own class of such a model."""
    sequential = isinstance(graph, keras.Sequential)
    return keras.Sequential if sequential else type(functional(graph))


def _refuse_own_call(graph: keras.Model, new: type) -> None:
    """Refuses a model whose copy, of class `new`, computes something else."""
    if type(graph).call is not new.call:
        raise ValueError(
            f"Model '{graph.name}' ({type(graph).__name__}) has a `call` of "
            f"its own, which its copy, a {new.__name__} model, would lose. "
            "Write what it does as layers of the model, or the model as a "
            "subclass of keras.Model without inputs and outputs."
        )


def _refuse_weights_in_calls(model: keras.Model) -> None:
    """Refuses a graph in which a weight of a layer is an operation's argument.

    The copy's operation would go on with the weight of the old layer.
    """
    if not model.built:  # a Sequential model that nothing is known of yet
        return
    weights = {id(weight) for weight in model.weights}
    for path, operation in walk(model):
        for node in operation._inbound_nodes:  # Keras's own, private
            given = keras.tree.flatten(
                (node.arguments.args, node.arguments.kwargs)
            )
            used = [w for w in given if id(w) in weights]
            if used:
                raise ValueError(
                    f"'{'/'.join(path)}' is called on a weight, "
                    f"'{used[0].path}', which its copy would not share. Write "
                    "it as a layer that is given the other layer."
                )


def _carries_mask(tensor: keras.KerasTensor) -> bool:
    """Whether layers find a mask on a tensor without being given one."""
    found = []

    class Find(keras.layers.Layer):
        def call(self, inputs: object, mask: object = None) -> object:
            found.append(mask)
            return inputs

    Find()(tensor)
    return any(mask is not None for mask in found)


def _unique_names(
    paths: dict[keras.Operation, tuple[str, ...]], taken: list[str]
) -> dict[keras.Operation, str]:
    """Names for operations: their own, or their path's where two have one."""
    found = collections.Counter(
        [*taken, *(path[-1] for path in paths.values())]
    )
    names = {o: path[-1] for o, path in paths.items() if found[path[-1]] == 1}
    taken = {*taken, *names.values()}
    for operation, path in paths.items():
        if operation not in names:
            name = "_".join(path)
            while name in taken:
                name += "_"
            taken.add(name)
            names[operation] = name
    return names


def _copy_state(clones: Clones) -> None:
    """Gives new layers the state of the old ones; models come first."""
    for source, new in clones.items():
        if isinstance(source, keras.layers.Layer) and new is not source:
            if new.trainable != source.trainable:
                new.trainable = source.trainable  # and that of all in it
            copy_weights(source, new)


@contextlib.contextmanager
def _uncompiled(model: keras.Model) -> Iterator[None]:
    """Keeps `clone_model` from compiling: losses may not be serialisable."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def copy_weights(source: keras.Operation, target: keras.Operation) -> None:
    """Gives a layer the weights of another one, and whether each is trained.

    The two may be a stock layer and its FA counterpart: a layer's own weights
    come before those of its feedback paths.
    """
    layer = isinstance(source, keras.layers.Layer) and not is_graph(source)
    if not layer or not target.built:
        return
    for theirs, ours in zip(all_layers(source), all_layers(target)):
        if ours is not target and ours.trainable != theirs.trainable:
            ours.trainable = theirs.trainable
        if ours.built:
            _copy_own_weights(theirs, ours)


def _copy_own_weights(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """As `copy_weights`, without the layers that a layer holds."""
    for ours, theirs in zip(own_weights(target), own_weights(source)):
        # Copies: training on JAX gives the memory of a model's weights away.
        ours.assign(ops.copy(theirs))
        ours.trainable = theirs.trainable
    if type(source) is type(target):
        # Some layers derive more from what they load (Normalization).
        store = {}
        source.save_own_variables(store)
        if store:
            target.load_own_variables(
                {name: np.array(value) for name, value in store.items()}
            )


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """A layer's weights without those of the layers that it holds."""
    inner = {id(w) for one in held(layer) for w in one.weights}
    return [weight for weight in layer.weights if id(weight) not in inner]


def replace(holder: keras.layers.Layer, new: Clones) -> None:
    """Puts other layers in the place of those that a layer holds.

    Args:
        holder: A layer, built or not. What it holds as attributes, also in
            lists, tuples, dicts and sets, is replaced.
        new: The new layers by the old ones.
    """
    # Private, as in Keras's own `enable_lora`: a layer that is built takes no
    # new layers, and one that is overwritten stays among those of its holder.
    tracker, internal = holder._tracker, holder._layers
    for old, layer in new.items():
        if tracker.is_in_store("layers", old):
            tracker.replace_tracked_value("layers", old, layer)
    for name, value in list(vars(holder).items()):
        if value is not internal:
            changed = _replaced(value, new)
            if changed is not value:
                setattr(holder, name, changed)


def _replaced(value: object, new: Clones, always: bool = False) -> object:
    def other(item: object) -> object:
        layer = isinstance(item, keras.layers.Layer)
        return new.get(item, item) if layer else item

    return mapped(value, other, always)


def mapped(
    value: object, new: Callable[[object], object], always: bool = False
) -> object:
    """A value with `new` of all that is in its lists, tuples, dicts and sets.

    It is the value itself where `new` changes nothing, unless `always` asks for
    lists, dicts and sets of their own.
    """
    if isinstance(value, dict):
        items = {key: mapped(x, new, always) for key, x in value.items()}
        same = all(items[key] is x for key, x in value.items())
        return value if same and not always else items
    if isinstance(value, (set, frozenset)):
        items = {mapped(x, new, always) for x in value}
        if items == value and not always:
            return value
        return frozenset(items) if isinstance(value, frozenset) else items
    if not isinstance(value, (tuple, list)):
        return new(value)
    items = [mapped(x, new, always) for x in value]
    if all(x is old for x, old in zip(items, value)) and not always:
        return value
    if isinstance(value, list):
        return items
    kind = type(getattr(value, "__wrapped__", value))
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def config_of(layer: keras.Operation) -> dict[str, object]:
    """A layer's config, with the functions and objects that it was given.

    A config names them, and Keras finds no lambda, no `jax.nn.relu` and no
    unregistered class by its name, or another function of the same name.
    Initializers are made anew: one without a seed is to draw anew.

    Raises:
        ValueError: If the layer has no config; it is named.
    """
    with _naming(layer):
        config = own_config(layer)
        for name, entry in config.items():
            given = getattr(layer, name, None)
            if isinstance(given, keras.initializers.Initializer):
                config[name] = given.clone()
            elif (
                callable(given)
                and isinstance(entry, (str, dict))
                and not isinstance(given, keras.layers.Layer)
            ):
                config[name] = given
    return config


def again(
    layer: Operation,
    cls: type | None = None,
    config: dict[str, object] | None = None,
) -> Operation:
    """A new layer like another one, with its vocabulary, without its weights.

    Args:
        layer: A layer, or an operation. In one that makes the layers in it,
            these are as its constructor makes them.
        cls: Class of the new layer. Default: that of `layer`.
        config: What to make it of. Default: `config_of(layer)`.

    Raises:
        ValueError: If the config does not make a layer; it is named.
    """
    config = config_of(layer) if config is None else config
    with _naming(layer):
        try:
            new = (cls or class_of(layer)).from_config(config)
        except Exception:
            if cls is not None:
                raise
            # A from_config of its own may take nothing but configs.
            plain = own_config(layer)
            if "name" in config:
                plain["name"] = config["name"]
            new = _of_config(class_of(layer), plain)
        if hasattr(layer, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                new.load_assets(folder)
    return new


def _of_config(cls: type, config: dict[str, object]) -> keras.Operation:
    """`cls.from_config`, also of a config that tells what follows from it."""
    try:
        return cls.from_config(dict(config))
    except Exception:
        taken = {n: v for n, v in config.items() if n in arguments(cls)}
        if len(taken) < len(config):
            with contextlib.suppress(Exception):
                return cls.from_config(taken)
        raise


def arguments(cls: type) -> set[str]:
    """What the constructor of a layer or an operation takes, by name."""
    bases = [c for c in cls.__mro__ if issubclass(c, keras.Operation)]
    given = [set(inspect.signature(b.__init__).parameters) for b in bases]
    return {"name", "trainable", "dtype"}.union(*given)


@contextlib.contextmanager
def _naming(layer: keras.Operation) -> Iterator[None]:
    """Turns what goes wrong into one line that names the layer."""
    try:
        yield
    except Exception as error:
        kind = "Layer" if isinstance(layer, keras.layers.Layer) else "Operation"
        raise ValueError(
            f"{kind} '{layer.name}' ({type(layer).__name__}) cannot be made "
            f"again: {reason(error)} It has to be one that Keras can save and "
            "load: with a complete get_config(), registered classes and "
            "functions, an adapted vocabulary."
        ) from error


def reason(error: Exception) -> str:
    """The first sentence of what an exception says, in one line."""
    # Keras puts the whole config in front of what went wrong.
    text = str(error).split("Exception encountered: ")[-1]
    return " ".join(text.split()).split(". ")[0].rstrip(".") + "."
