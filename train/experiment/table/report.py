"""The report: a table for each data set and network, and figures."""

import logging
import sys
from pathlib import Path
from typing import Any

from experiment import files
from experiment import markdown
from experiment import settings
from experiment import startup
from experiment.errors import UserError
from experiment.table import cells
from experiment.table.cells import Cell
from experiment.table.cells import Cells
from experiment.table.published import TITLES
from experiment.table.published import Task
from experiment.table.published import published
from experiment.table.published import rows_of
from keras_fa.methods import METHODS

# What a row has to have learned in its hidden kernels to be told from one that
# has learned nothing there, in percentage points.
MARGIN = 2.0
MARK = "†"
_MARKED = (
    f"{MARK} not {MARGIN:g} points below {METHODS['frozen'].title}, whose "
    "hidden kernels stay as they are drawn: what they have learned here does "
    "not show."
)

_ANGLE = (
    "angle: between B and W at the end, the largest of all layers but the "
    "lowest, whose B sends no error on."
)

LEGEND = (
    "Test error in percent after the last epoch: mean ± sample standard "
    "deviation (number of seeds). A gap is the error less that of BP in the "
    "same column; open: no run of ours to show. Settings that are not named "
    "are the defaults of train/main.py."
)


def table(column: Task, ours: dict[str, Cell]) -> str:
    """A data set and network as Markdown, of our runs by method."""
    sources = published(column)
    marked = no_better_than_frozen(ours)
    rows = rows_of(column, ours)
    beyond = [
        m for m in rows if sources and not any(m in s.errors for s in sources)
    ]
    heads = ["method", "ours", "epochs"]
    heads += [source.source for source in sources]
    heads += [f"{head} - BP" for head in ("ours", *heads[3:])]
    means = {method: cell.mean for method, cell in ours.items()}
    first = [
        [
            *_ours(method, ours, marked),
            *(_figure(s.errors.get(method), s.decimals) for s in sources),
            _gap(means, method, 2),
            *(_gap(s.errors, method, s.decimals) for s in sources),
        ]
        for method in rows
        if method not in beyond
    ]
    second = [
        [*_ours(m, ours, marked), _gap(means, m, 2), _figure(ours[m].angle, 0)]
        for m in beyond
    ]
    dataset, model = column
    title = f"{TITLES[column]}: " if column in TITLES else ""
    parts = [f"## {title}{model} on {dataset}", markdown.table(heads, first)]
    if beyond:
        parts += [
            "Beyond the paper:",
            markdown.table([*heads[:3], "ours - BP", "angle, °"], second),
        ]
    remarks = [
        *(s.about for s in sources),
        *([_ANGLE] if beyond else []),
        *([_MARKED] if marked else []),
        *recipes(ours),
    ]
    parts.append("\n".join(f"- {line}" for line in remarks))
    return "\n\n".join(parts)


def _ours(method: str, ours: dict[str, Cell], marked: list[str]) -> list[str]:
    """The first cells of a row: method, error, epochs."""
    title = METHODS[method].title
    if method not in ours:
        return [title, "open", ""]
    mark = f" {MARK}" if method in marked else ""
    return [title, _mean(ours[method]) + mark, str(ours[method].epochs)]


def no_better_than_frozen(ours: dict[str, Cell]) -> list[str]:
    """The methods whose error is not `MARGIN` below that of frozen kernels."""
    if "frozen" not in ours:
        return []
    error = ours["frozen"].mean
    return [
        method
        for method, cell in ours.items()
        if method != "frozen" and round(error - cell.mean, 2) < MARGIN
    ]


def recipes(ours: dict[str, Cell]) -> list[str]:
    """What all methods have in common, and what each has of its own."""
    all_recipes = {
        method: {
            name: value
            for name, value in cell.recipe.items()
            if name not in ("dataset", "model", "method", "epochs")
            and not settings.is_default(name, value)
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


def order(column: Task) -> tuple[int, Task]:
    """The paper's columns first, in its order."""
    known = list(TITLES)
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
    from experiment.table import figures

    lines = []
    for column, ours in found.items():
        for name in figures.FIGURES:
            written = figures.write(name, column, ours, folder)
            lines += [f"Figure: {file}" for file in written] or [
                f"No {name} of {' '.join(column)}: no run that has feedback "
                "kernels of its own has --alignment_every."
            ]
    return lines
