"""The figures of the report.

Each function of `FIGURES` draws one of a data set and network, or returns None
where the runs do not hold what it shows. matplotlib is imported here alone.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import MultipleLocator

from experiment import files
from experiment.table.cells import Cell
from experiment.table.cells import Curve
from experiment.table.published import TITLES
from experiment.table.published import Task
from experiment.table.published import published
from experiment.table.published import rows_of
from keras_fa.constraints import NoisyKernel
from keras_fa.constraints import TiedKernel
from keras_fa.methods import METHODS

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "keras_fa",  # the same names in every file
    "svg.fonttype": "none",  # text that can be searched and read aloud
}
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)  # percent; logarithmic above 1


class Line(NamedTuple):
    """How a method is drawn."""

    color: Any
    dashes: str = "-"


# Backpropagation is black and its controls grey; sign concordance is blue,
# fixed random feedback orange. Told apart by the colour-blind, too (after
# Okabe and Ito). E/I is dashed.
_LINES = {
    "bp": Line("black"),
    "bp_noise": Line("0.55", ":"),
    "bp_alignment": Line("0.55", "-."),
    "bp_const": Line("0.55"),
    "bp_ei": Line("0.55", "--"),
    "fa": Line("#D55E00"),
    "dfa": Line("#E69F00"),
    "dense_fa": Line("#CC79A7"),
    "fa_usf_init": Line("#56B4E9"),
    "fa_usf_init_ei": Line("#56B4E9", "--"),
    "fa_usf_init_ei_silent": Line("#56B4E9", ":"),
    "fa_usf_sn": Line("#0072B2"),
    "fa_usf_sn_ei": Line("#0072B2", "--"),
    "fa_usf_const": Line("#003A66"),
    "fa_usf_const_ei": Line("#003A66", "--"),
}
# Of the methods that are not among them, one after the other.
_OTHERS = ("#009E73", "#8C564B", "#7F3C8D", "#A5AA99", "#E68310", "#4B4B8F")
_unknown = [method for method in METHODS if method not in _LINES]
LINES = _LINES | {
    method: Line(_OTHERS[place % len(_OTHERS)], "-." if place >= 6 else "-")
    for place, method in enumerate(_unknown)
}


def errors(column: Task, ours: dict[str, Cell]) -> Figure:
    """The test error of each method: our mean, every seed, and the paper's."""
    sources = published(column)
    methods = rows_of(column, ours)
    figure = Figure(
        figsize=(8, 1.4 + 0.34 * len(methods)), layout="constrained"
    )
    axes = figure.subplots()
    rows = {method: row for row, method in enumerate(methods)}
    for method, cell in ours.items():
        row, color = rows[method], LINES[method].color
        axes.barh(row, cell.mean, height=0.62, color=color, alpha=0.3)
        if cell.deviation is not None:
            axes.errorbar(
                cell.mean, row, xerr=cell.deviation, color=color, capsize=4
            )
        axes.plot(
            [cell.mean] * 2, [row - 0.31, row + 0.31], color=color, linewidth=2
        )
    seeds = [
        (error, rows[method])
        for method, cell in ours.items()
        for error in cell.errors
    ]
    axes.scatter(*zip(*seeds), s=14, color="0.15", zorder=3, label="a seed")
    for source, marker in zip(sources, "Ds"):
        points = [(error, rows[m]) for m, error in source.errors.items()]
        axes.scatter(
            *zip(*points),
            s=42,
            marker=marker,
            facecolors="none",
            edgecolors="#B2182B" if marker == "D" else "#1B7837",
            linewidths=1.5,
            zorder=4,
            label=source.source,
        )
    axes.text(1.02, 1.02, "ours", transform=axes.transAxes)
    for method, row in rows.items():
        axes.text(
            1.02,
            row,
            f"{ours[method].mean:.2f}" if method in ours else "open",
            transform=axes.get_yaxis_transform(),
            va="center",
        )
    axes.set_yticks(range(len(methods)), [METHODS[m].title for m in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test error, %: mean of our seeds ± standard deviation")
    axes.set_title(f"Test error by method, {_title(column)}", loc="left")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def learning_curves(column: Task, ours: dict[str, Cell]) -> Figure:
    """The validation error of each method over its training."""
    curves = {
        method: {
            epoch: [100 * (1 - value) for value in values]
            for epoch, values in cell.curves("val_accuracy").items()
        }
        for method, cell in ours.items()
    }
    last = {
        m: statistics.mean(curve[max(curve)]) for m, curve in curves.items()
    }
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    # In the order in which the curves end, so that the legend reads as labels.
    for method in sorted(curves, key=last.get, reverse=True):
        label = f"{METHODS[method].title}: {last[method]:.1f}"
        _draw(axes, curves[method], LINES[method], label)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    values = [
        v for curve in curves.values() for vs in curve.values() for v in vs
    ]
    axes.set_ylim(
        max(tick for tick in TICKS if tick <= min(values)),
        min((tick for tick in TICKS if tick > max(values)), default=100),
    )
    axes.set_ylabel("validation error, % (logarithmic above 1)")
    _count_epochs(axes)
    axes.set_title(
        f"Validation error in training, {_title(column)}: mean over the seeds, "
        "band from least to most",
        loc="left",
    )
    figure.legend(loc="outside right center", title="at the end, %")
    return figure


def angles(column: Task, ours: dict[str, Cell]) -> Figure | None:
    """The angles of each layer over training, where B is not W itself.

    Above, between the feedback and the forward kernel; below, between the
    gradient that the kernel receives and backpropagation's.
    """
    layers = {
        method: ours[method].layers("angle")
        for method in ours
        if _has_angles(method) and ours[method].layers("angle")
    }
    if not layers:
        return None
    width = max(8, 1.4 + 2.2 * len(layers))
    figure = Figure(figsize=(width, 5.6), layout="constrained")
    grid = figure.subplots(
        2, len(layers), sharex=True, sharey=True, squeeze=False
    )
    forward = list(
        dict.fromkeys(name for names in layers.values() for name in names)
    )
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(forward)))
    lines = {}
    for measure, ylabel, panels in zip(
        ("angle", "gradient_angle"),
        ("angle of B and W, °", "angle of update and BP's, °"),
        grid,
    ):
        panels[0].set_ylabel(ylabel)
        for method, axes in zip(layers, panels):
            axes.axhline(90, color="0.3", linestyle="--", linewidth=1)
            for layer, shade in zip(forward, shades):
                curve = ours[method].curves(f"alignment/{measure}/{layer}")
                if curve:
                    lines[layer] = _draw(axes, curve, Line(shade))
    for method, axes in zip(layers, grid[0]):
        axes.set_title(METHODS[method].title)
    for axes in grid[1]:
        _count_epochs(axes)
    highest = max(axes.dataLim.y1 for axes in grid.flat)
    grid[0, 0].set_ylim(-3, max(100, highest + 5))
    grid[0, 0].yaxis.set_major_locator(MultipleLocator(30))
    figure.suptitle(
        f"Angles of each layer in training, {_title(column)}. 0° is "
        "backpropagation (BP), 90° is chance (dashed).\n"
        "Above: between the feedback kernel B and the forward kernel W. Below: "
        "between the\ngradient that a kernel receives and the one that "
        "backpropagation would give it.",
        x=0.01,
        ha="left",
    )
    named = forward
    if len(forward) > 12:
        spaced = np.linspace(0, len(forward) - 1, 10).round().astype(int)
        named = [forward[index] for index in spaced]
    figure.legend(
        [lines[layer] for layer in named],
        named,
        loc="outside right center",
        title="layer, the\nlowest first",
    )
    return figure


FIGURES: dict[str, Callable[[Task, dict[str, Cell]], Figure | None]] = {
    "errors": errors,
    "learning_curves": learning_curves,
    "angles": angles,
}


def write(
    name: str, column: Task, ours: dict[str, Cell], folder: Path
) -> list[Path]:
    """Draws a figure of `FIGURES` into a folder, as PNG and SVG.

    Returns:
        The files; none where there is nothing to draw.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = FIGURES[name](column, ours)
        if figure is None:
            return []
        written = []
        for suffix, metadata in (("png", None), ("svg", {"Date": None})):
            written.append(folder / f"{'-'.join(column)}-{name}.{suffix}")
            files.replace(
                written[-1],
                lambda aside, metadata=metadata: figure.savefig(
                    aside, metadata=metadata
                ),
            )
    return written


def _draw(axes: Axes, curve: Curve, line: Line, label: str = "") -> Line2D:
    """Draws the mean over the seeds, and a band from the least to the most."""
    values = np.array(list(curve.values()))
    epochs = list(curve)
    axes.fill_between(
        epochs,
        values.min(1),
        values.max(1),
        color=line.color,
        alpha=0.12,
        linewidth=0,
    )
    (drawn,) = axes.plot(
        epochs,
        values.mean(1),
        color=line.color,
        linestyle=line.dashes,
        linewidth=1.8,
        marker="o" if len(epochs) == 1 else "",
        label=label,
    )
    return drawn


def _has_angles(method: str) -> bool:
    """Whether its layers have feedback kernels that are not W."""
    rule = METHODS[method].feedback_constraint
    return not isinstance(rule, TiedKernel | NoisyKernel)


def _count_epochs(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10], integer=True)
    )
    axes.set_xlabel("epochs")


def _title(column: Task) -> str:
    dataset, model = column
    if column in TITLES:
        return TITLES[column]
    return dataset if dataset == model else f"{model} on {dataset}"
