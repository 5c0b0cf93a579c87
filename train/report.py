"""Makes the paper's table, and figures, of many runs.

    python train/report.py <runs_dir>

It reads `result.json` and `history.csv` of every run below the folder, prints
a table for each data set and network, and writes it to <runs_dir>/report,
as table.md, with these figures, each as PNG and SVG:

    <dataset>-<model>-errors            test error of each method
    <dataset>-<model>-learning_curves   validation error over training
    <dataset>-<model>-angles            angles of each layer over training, of
                                        runs with --alignment_every

A row is a method. Ours is the mean of the test error in percent over the
seeds, their sample standard deviation, and their number; beside it stand the
figures of the paper and of others. A gap is the error less that of BP in the
same table. "open" is where others have a figure and we have no run to show. A
setting that a run does not say, for it is younger, is at its default.

Runs that are damaged, unfinished or of a search without a test error are named
and skipped. A method whose runs differ in more than the seed, or that has two
of one seed, is named and left out.
"""

import startup  # before anything imports Keras

# isort: split
import logging
import sys
from pathlib import Path
from typing import Any

import cells
import files
from cells import Cell
from cells import Cells
from errors import UserError
from published import COLUMNS
from published import Column
from published import published
from published import rows_of
from runs import DEFAULTS

from keras_fa.methods import METHODS

LEGEND = (
    "Test error in percent after the last epoch: mean ± sample standard "
    "deviation (number of seeds). A gap is the error less that of BP in the "
    "same column; open: no run of ours to show. Settings that are not named "
    "are the defaults of train/main.py."
)


def table(column: Column, ours: dict[str, Cell]) -> str:
    """A data set and network as Markdown.

    Args:
        column: Data set and network.
        ours: Method to our runs.
    """
    sources = published(column)
    heads = ["method", "ours", "epochs"]
    heads += [source.source for source in sources]
    heads += [f"{head} - BP" for head in ("ours", *heads[3:])]
    rows = [
        [
            METHODS[method].title,
            _mean(ours[method]) if method in ours else "open",
            str(ours[method].epochs) if method in ours else "",
            *(_figure(s.errors.get(method), s.decimals) for s in sources),
            _gap({m: cell.mean for m, cell in ours.items()}, method, 2),
            *(_gap(s.errors, method, s.decimals) for s in sources),
        ]
        for method in rows_of(column, ours)
    ]
    dataset, model = column
    title = f"{COLUMNS[column]}: " if column in COLUMNS else ""
    return "\n\n".join(
        [
            f"## {title}{model} on {dataset}",
            _markdown([heads, *rows]),
            "\n".join(
                f"- {line}"
                for line in [*(s.about for s in sources), *recipes(ours)]
            ),
        ]
    )


def recipes(ours: dict[str, Cell]) -> list[str]:
    """What all methods have in common, and what each has of its own."""
    all_recipes = {
        method: {
            name: value
            for name, value in cell.recipe.items()
            if name not in ("dataset", "model", "method", "epochs")
            and (name not in DEFAULTS or value != DEFAULTS[name])
        }
        for method, cell in ours.items()
    }
    first, *others = all_recipes.values()
    common = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }
    groups: dict[str, list[str]] = {}
    for method, recipe in all_recipes.items():
        own = {k: v for k, v in recipe.items() if k not in common}
        groups.setdefault(_settings(own), []).append(METHODS[method].title)
    groups.pop("", None)
    lines = [f"all of ours: {_settings(common)}"] if common else []
    return lines + [f"{', '.join(g)}: {text}" for text, g in groups.items()]


def _settings(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.items())


def _mean(cell: Cell) -> str:
    deviation = "" if cell.deviation is None else f" ± {cell.deviation:.2f}"
    return f"{cell.mean:.2f}{deviation} (n={len(cell.runs)})"


def _figure(error: float | None, decimals: int) -> str:
    return "-" if error is None else f"{error:.{decimals}f}"


def _gap(errors: dict[str, float], method: str, decimals: int) -> str:
    if method == "bp" or not {"bp", method} <= errors.keys():
        return "-"
    gap = round(errors[method] - errors["bp"], decimals) + 0.0  # no -0.00
    return f"{gap:+.{decimals}f}"


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width, "-" if cell == "---" else " ")
            for cell, width in zip(line, widths)
        )
        + " |"
        for line in lines
    )


def order(column: Column) -> tuple[int, Column]:
    """The paper's columns first, in its order."""
    known = list(COLUMNS)
    return known.index(column) if column in known else len(known), column


def report(runs_dir: Path) -> None:
    """Prints the table of the runs below a folder, and draws the figures."""
    found, skipped = cells.collect(runs_dir)
    for line in skipped:
        print(f"report.py: {line}", file=sys.stderr)
    if not found:
        raise UserError(
            f"{runs_dir}: no finished run below it that could be shown. Give "
            "the --runs_dir of train/main.py."
        )
    found = {column: found[column] for column in sorted(found, key=order)}
    text = "\n\n".join([LEGEND, *(table(*item) for item in found.items())])
    print(text)
    folder = runs_dir / "report"
    try:
        folder.mkdir(exist_ok=True)
        files.replace(
            folder / "table.md",
            lambda aside: aside.write_text(f"{text}\n", "utf-8"),
        )
        drawn = draw(found, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}). Make "
            "it a folder that can be, or give a copy of the runs."
        ) from error
    print("\n".join(["", f"Table: {folder / 'table.md'}", *drawn]))


def draw(found: Cells, folder: Path) -> list[str]:
    """Draws the figures of all columns; says where they are, or why not."""
    if not startup.installed("matplotlib"):
        return ["No figures: they need matplotlib (pip install matplotlib)."]
    # It says when it builds its font cache, as at its first use.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import figures

    lines = []
    for column, ours in found.items():
        for name in figures.FIGURES:
            written = figures.write(name, column, ours, folder)
            lines += [f"Figure: {file}" for file in written] or [
                f"No {name} of {' '.join(column)}: no run of "
                f"{', '.join(figures.ANGLES_OF)} has --alignment_every."
            ]
    return lines


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    if argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if len(argv) != 2:
        print("usage: python train/report.py <runs_dir>", file=sys.stderr)
        return 2
    try:
        report(Path(argv[1]).expanduser())
    except UserError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
