"""A copy of a model that is made of other layers.

Keras's `clone_model` makes new layers of the old ones' configs. Here they also
get what no config holds: weights, vocabularies, `trainable` flags of models,
and functions and objects that Keras cannot serialise.
"""

import contextlib
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from typing import TypeVar

import keras
import numpy as np
from keras import ops

# A layer, or what a `keras.ops` function is recorded as.
Operation = TypeVar("Operation", bound=keras.Operation)
Clones = dict[keras.Operation, keras.Operation]


def is_graph(layer: object) -> bool:
    """Whether this is a model whose layers can be seen and replaced."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and isinstance(layer, keras.Function)
    )


def leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model and of the models nested in it, each once."""
    found = {}
    for layer in model.layers:
        found.update(
            dict.fromkeys(leaves(layer) if is_graph(layer) else [layer])
        )
    return list(found)


def rebuild(
    model: keras.Model,
    make: Callable[[keras.Operation], keras.Operation],
    call: Callable[..., object] | None = None,
) -> tuple[keras.Model, Clones]:
    """A copy of a model, with its state, that is made of other layers.

    Args:
        model: A Functional or Sequential model, which is left as it is.
        make: Gives the new layer for an old one, once for each.
        call: Calls the new layers, `(layer, *args, **kwargs)`, in Functional
            models. Default: just so.

    Returns:
        The copy, and which of its layers and models stands for which.
    """
    clones = {}

    def clone(layer: keras.Operation) -> keras.Operation:
        if layer not in clones:
            clones[layer] = copy(layer) if is_graph(layer) else make(layer)
        return clones[layer]

    def copy(graph: keras.Model) -> keras.Model:
        sequential = isinstance(graph, keras.Sequential)
        with _uncompiled(graph):
            return keras.models.clone_model(
                graph,
                clone_function=clone,
                call_function=None if sequential else call,
            )

    clone(model)
    for source, new in reversed(clones.items()):  # models before their layers
        if isinstance(source, keras.layers.Layer) and new is not source:
            if new.trainable != source.trainable:
                new.trainable = source.trainable  # and that of all in it
            copy_weights(source, new)
    return clones[model], clones


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
    for ours, theirs in zip(target.weights, source.weights):
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


def config_of(layer: keras.Operation) -> dict[str, object]:
    """A layer's config, with the functions and objects that it was given.

    A config names them, and Keras finds no lambda, no `jax.nn.relu` and no
    unregistered class by its name, or another function of the same name.
    Initializers are made anew: one without a seed is to draw anew.

    Raises:
        ValueError: If the layer has no config; it is named.
    """
    with _naming(layer):
        config = layer.get_config()
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
        layer: A layer, or an operation.
        cls: Class of the new layer. Default: that of `layer`.
        config: What to make it of. Default: `config_of(layer)`.

    Raises:
        ValueError: If the config does not make a layer; it is named.
    """
    config = config_of(layer) if config is None else config
    with _naming(layer):
        try:
            new = (cls or type(layer)).from_config(config)
        except Exception:
            if cls is not None:
                raise
            # A from_config of its own may take nothing but configs.
            new = type(layer).from_config(layer.get_config())
        if hasattr(layer, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                new.load_assets(folder)
    return new


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
