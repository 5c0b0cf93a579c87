"""The table of a model's feedback."""

import math

import keras
import pytest
from keras import layers

from keras_fa import convert
from keras_fa import summary
from keras_fa.methods import METHODS


def stock() -> keras.Model:
    """A network with a layer of two kernels, and one inside of another."""
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.SeparableConv2D(4, 3, name="separable")]
    )
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            inner,
            layers.Flatten(),
            layers.Dense(5, name="hidden"),
            layers.Dense(3, name="readout"),
        ]
    )


def rows(model: keras.Model) -> tuple[list[list[str]], str]:
    """The cells of each row, and the last line."""
    lines = []
    summary(model, lines.append)
    head, *body, total = lines
    starts = [head.index(name) for name in head.split()]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])]
        for line in body
    ]
    return cells, total


@pytest.mark.parametrize(
    "method", [m for m in METHODS if METHODS[m].wiring == "chain"]
)
def test_every_kernel_has_a_row(method: str) -> None:
    model = convert(stock(), method)
    cells, total = rows(model)
    names = ["separable/depthwise_kernel", "separable/pointwise_kernel"]
    for row, name in zip(cells, [*names, "hidden", "readout"], strict=True):
        assert row[0].endswith(f"/{name}")
    plain = sum(math.prod(v.shape) for v in stock().trainable_variables)
    stored = 4 * (plain - 4 - 5 - 3)  # all but biases, of four bytes
    if method == "pfa":  # R and M, ten times as wide as the last axis
        kernels = [
            v.shape for v in stock().trainable_variables if len(v.shape) > 1
        ]
        stored = 4 * sum(10 * (math.prod(k) + k[-1] ** 2) for k in kernels)
    keeps = METHODS[method].feedback_learning is not None or method in (
        "fa",
        "fa_usf_init",
        "fa_usf_init_ei",
        "fa_usf_init_ei_silent",
        "bp_alignment",
        "fixed_sign_feedback",
    )
    assert total == f"Feedback: {keeps * stored:,} bytes."
    assert all((row[3] != "-") == keeps for row in cells)
    signs = {"FixedSign" in row[2] for row in cells}
    assert signs == {"_ei" in method}


def test_maps_have_rows() -> None:
    flat = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(5, name="hidden"),
            layers.Dense(3, name="readout"),
        ]
    )
    cells, total = rows(convert(flat, "dfa"))
    maps = [row for row in cells if row[1] == "SendError"]
    assert [row[2:] for row in maps] == [
        ["dense map to hidden", "(3, 5)", "60"]
    ]
    assert total == "Feedback: 60 bytes."


def test_other_layers_have_none() -> None:
    cells, total = rows(stock())
    assert (cells, total) == ([], "Feedback: 0 bytes.")


def test_half_precision() -> None:
    dense = layers.Dense(2, dtype="float16")
    model = keras.Sequential([keras.Input((4,)), dense])
    assert rows(convert(model, "fa"))[1] == "Feedback: 16 bytes."
