"""Layers and models that are saved as what their constructor makes.

A block of one's own or a task makes its layers itself: stock ones. Where some
were replaced, its class gives way to one of the same name that tells in its
config what was, and puts that back when it is made of this config.
"""

import functools
import json
import types
import warnings
from collections.abc import Iterator

import keras

from keras_fa import _cloning
from keras_fa.layers.feedback import FeedbackArguments
from keras_fa.layers.feedback import feedback_layers

# What is added to a config.
_KEY = "keras_fa_layers"


class Holder:
    """What the class of something that holds FA layers is derived from, too."""

    def get_config(self) -> dict[str, object]:
        stock = {
            **_named(_cloning.class_of(self)),
            "build_config": self.get_build_config(),
        }
        # Not by Keras's serialize, for which what comes twice is shared.
        serialize = keras.saving.serialize_keras_object
        held = [
            {
                "place": place,
                "layer": {
                    **_named(type(layer)),
                    "config": serialize(layer.get_config()),
                },
            }
            for place, layer in _members(self)
            if _is_fa(layer)
        ]
        config = _cloning.own_config(self)
        return {**config, _KEY: {"stock": stock, "held": held}}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> keras.layers.Layer:
        config = dict(config)
        kept = config.pop(_KEY)
        stock = keras.saving.deserialize_keras_object(
            {**kept["stock"], "config": config}
        )
        new = {}
        for entry in kept["held"]:
            old = _at(stock, entry["place"])
            layer = keras.saving.deserialize_keras_object(
                _with_objects_of(old, entry["layer"])
            )
            if not isinstance(old, (type(layer), layer.stock_class)):
                raise ValueError(
                    f"'{stock.name}' ({type(stock).__name__}) was saved with "
                    f"'{layer.name}' ({type(layer).__name__}), and its class "
                    f"now has {old!r} there. Load it with the version of the "
                    "class that it was saved with, or, if layers in it are "
                    "made by `build`, give it a `build` that builds these."
                )
            new[old] = layer
        if _cloning.is_graph(stock):
            stock, _ = _cloning.rebuild_all(stock, new.get, keep=True)
        else:
            _cloning.remake_held(stock, new.get, keep=True)
        remember(stock)
        return stock

    def __reduce__(self) -> tuple:
        load, given = super().__reduce__()
        return getattr(_cloning.class_of(self), load.__name__), given

    def compile_from_config(self, config: dict[str, object]) -> None:
        _cloning.compile_again(self, config)


def remember(layer: keras.Operation) -> None:
    """Has a layer or model, and all in it, tell which FA layers it holds."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for holder in _cloning.reached(layer, _is_fa):
        if (
            not (_is_fa(holder) or isinstance(holder, Holder))
            and _cloning.makes_layers(holder)
            and feedback_layers(holder)
        ):
            _cloning.become(_holding(type(holder)), holder)


def forget(layer: keras.layers.Layer) -> None:
    """Gives a layer or model, and all in it, their own classes back."""
    for holder in _cloning.reached(layer, _is_fa):
        if isinstance(holder, Holder):
            _cloning.become(_cloning.class_of(holder), holder)


def _is_fa(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, FeedbackArguments)


@functools.cache
def _holding(cls: type) -> type:
    names = {
        # Where it is missing Keras says so, and does not take `cls` instead.
        "__module__": "keras_fa",
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "held_class": cls,
    }
    if hasattr(cls, "save_to_preset"):
        names["save_to_preset"] = _refuse_preset
    return _register(
        types.new_class(
            cls.__name__, (Holder, cls), exec_body=lambda n: n.update(names)
        )
    )


def _refuse_preset(self: keras.Model, *args: object, **kwargs: object) -> None:
    raise ValueError(
        f"A preset of '{self.name}' would hold its FA layers, which no class "
        "of KerasHub reads. Use `model.save(filepath)`, or "
        "`to_backprop(model).save_to_preset(...)`."
    )


def _register(cls: type) -> type:
    """Has `Holder.from_config` called for what is saved as this class."""
    for each in (cls, Holder):  # the last one is found by the name
        keras.saving.register_keras_serializable("keras_fa", "Holder")(each)
    return cls


_register(Holder)


def _named(cls: type) -> dict[str, str]:
    """How a serialised object names its class."""
    return {
        "module": cls.__module__,
        "class_name": cls.__name__,
        "registered_name": keras.saving.get_registered_name(cls),
    }


def _with_objects_of(old: object, saved: dict) -> dict[str, object]:
    """What was saved of a layer, with its functions as a constructor gave them.

    What equals the stock layer's is taken from that: a file brings no lambda.
    """
    if not isinstance(old, keras.layers.Layer):
        return saved
    with warnings.catch_warnings(action="ignore"):  # of lambdas that are unsafe
        told = keras.saving.serialize_keras_object(_cloning.own_config(old))
    given = _cloning.config_of(old)
    config = {
        name: given[name]
        if name in told and _as_text(told[name]) == _as_text(value)
        else value
        for name, value in saved["config"].items()
    }
    return {**saved, "config": config}


def _as_text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _inner(holder: keras.layers.Layer) -> list[keras.Operation]:
    """What a layer holds or a model calls, in the order of its making."""
    if isinstance(holder, keras.Sequential):
        return holder.layers
    graph = _cloning.is_graph(holder)
    return holder.operations if graph else _cloning.held(holder)


def _at(holder: keras.layers.Layer, place: list[int]) -> object:
    for i in place:
        inner = _inner(holder)
        holder = inner[i] if i < len(inner) else None
    return holder


def _members(
    holder: keras.layers.Layer,
) -> Iterator[tuple[list[int], keras.layers.Layer]]:
    """The layers in a layer, but for those in FA layers, and where they are."""
    seen, left = set(), [([], holder)]
    while left:
        place, outer = left.pop(0)
        for i, layer in enumerate(_inner(outer)):
            if isinstance(layer, keras.layers.Layer) and layer not in seen:
                seen.add(layer)
                yield [*place, i], layer
                if not _is_fa(layer):
                    left.append(([*place, i], layer))
