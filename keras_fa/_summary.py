"""What a model's feedback is made of, as a table."""

import math
from collections.abc import Callable

import keras
import numpy as np

from keras_fa import constraints
from keras_fa.layers.direct import SendError
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import all_layers
from keras_fa.learning import FeedbackLearning

_HEADS = ("layer", "class", "feedback", "stored", "bytes")


def summary(
    model: keras.layers.Layer, print_fn: Callable[[str], object] = print
) -> None:
    """Prints how errors go down through a model.

    A row is a kernel of an FA layer, with its rule, the constraints of its
    forward kernel and what its feedback learns from, or a map of DFA or
    DenseFA. `stored` are the shapes of what is kept as weights: the feedback
    kernel, what a rule has of its own, the map.

    Args:
        model: A built model or layer.
        print_fn: Function of a line. Default: `print`.

    Example:

    ```python
    import keras
    from keras_fa import convert, summary

    stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    lines = []
    summary(convert(stock, "fa_usf_init_ei"), lines.append)
    assert "SignConcordance, FixedSign" in lines[1]
    assert lines[-1] == "Feedback: 32 bytes."
    ```
    """
    rows, total = [], 0
    for layer in all_layers(model):
        for label, how, stored in _feedback_of(layer):
            size = sum(
                math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in stored
            )
            total += size
            shapes = " ".join(str(tuple(v.shape)) for v in stored) or "-"
            rows.append((label, type(layer).__name__, how, shapes, f"{size:,}"))
    widths = [max(map(len, cells)) for cells in zip(_HEADS, *rows)]
    for row in (_HEADS, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths))
        print_fn("  ".join(cells).rstrip())
    print_fn(f"Feedback: {total:,} bytes.")


def _feedback_of(
    layer: keras.layers.Layer,
) -> list[tuple[str, str, list[keras.Variable]]]:
    """Label, rule in words and stored weights of each way down of a layer."""
    if isinstance(layer, SendError) and layer.built:
        sent = "" if layer.signal == "error" else f", {layer.signal}"
        sent += _learned(layer.feedback_learning)
        return [
            (
                layer.path,
                f"{layer.feedback_maps} map to {name}{sent}",
                [stored],
            )
            for name, stored in layer.stored_feedback().items()
        ]
    if not isinstance(layer, FeedbackLayer) or not layer.built:
        return []
    several = len(layer.kernel_names) > 1
    return [
        (
            f"{layer.path}/{path.kernel.name}" if several else layer.path,
            ", ".join(
                [_in_words(path.rule), *map(_name, path.fixed.constraints)]
            )
            + _learned(path.learning),
            list(path.stored.values()),
        )
        for path in layer.feedback_paths
    ]


def _learned(rule: FeedbackLearning | None) -> str:
    return "" if rule is None else f", {_name(rule)}"


def _in_words(rule: constraints.FeedbackConstraint) -> str:
    if isinstance(rule, constraints.Stored):
        inner = rule.constraint
        return "stored" if inner is None else f"{_name(inner)}(stored)"
    given = [
        f"{name}={value}"
        for name, value in rule.get_config().items()
        if value is not None and value is not False
    ]
    return f"{_name(rule)}({', '.join(given)})" if given else _name(rule)


def _name(constraint: object) -> str:
    return getattr(constraint, "__name__", type(constraint).__name__)
