"""Finished runs, and the cells of the table that they make.

A cell is a method on a column, which is a data set and a network. Its runs
differ in nothing but the seed, or they are not averaged.
"""

import csv
import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

from experiment import settings
from experiment.datasets import DATASETS
from experiment.table.published import Task
from keras_fa.methods import METHODS

# What decides what is learned besides the settings.
FACTS = (
    "training_images",
    "augmentation",
    "steps_per_epoch",
    "parameters",
    "lengths",
)
# What the first runs do not say.
UNSAID = ("training_images", "augmentation")

Curve = dict[int, list[float]]  # epoch, from 1, to a value for each seed


class Skipped(Exception):
    """A folder that is left out, and why."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it is.
        result: What is in `result.json`.
        history: `history.csv`: column to a value for each epoch, NaN where
            none was measured.
    """

    folder: Path
    result: dict[str, Any]
    history: dict[str, list[float]]

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides what is learned, but the seed."""
        completed = settings.completed(self.result)
        names = (*settings.NAMING, *settings.RECIPE, *FACTS)
        return {
            name: completed[name]
            for name in names
            if name in completed and name != "seed"
        }


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of a method on a column: one for each seed, of one recipe."""

    runs: list[Run]

    @property
    def errors(self) -> list[float]:
        """Test errors in percent, one a seed."""
        return [run.result["test_error"] for run in self.runs]

    @property
    def mean(self) -> float:
        """Of the test errors."""
        return statistics.mean(self.errors)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the test errors; None of one."""
        return statistics.stdev(self.errors) if len(self.runs) > 1 else None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that all of the runs share."""
        return self.runs[0].recipe

    @property
    def epochs(self) -> int:
        """How long each of the runs trained."""
        return self.recipe["epochs"]

    @property
    def angle(self) -> float | None:
        """Between B and W where it was measured last, in degrees.

        The largest of all layers but the lowest, mean over the seeds; `None`
        where no angle was measured.
        """
        curves = [
            self.curves(f"alignment/angle/{layer}")
            for layer in self.layers("angle")[1:]
        ]
        last = [statistics.mean(curve[max(curve)]) for curve in curves]
        return max(last, default=None)

    def curves(self, column: str) -> Curve:
        """A column of the histories of all runs in which it was measured.

        Epochs at which one of these runs has no value are left out.
        """
        measured = [
            run.history[column]
            for run in self.runs
            if not all(map(math.isnan, run.history.get(column, [])))
        ]
        return {
            epoch: list(values)
            for epoch, values in enumerate(zip(*measured), 1)
            if not any(map(math.isnan, values))
        }

    def layers(self, measure: str) -> list[str]:
        """The layers with a curve of `alignment/<measure>`, lowest first."""
        start = f"alignment/{measure}/"
        columns = dict.fromkeys(c for run in self.runs for c in run.history)
        return [
            column.removeprefix(start)
            for column in columns
            if column.startswith(start) and self.curves(column)
        ]


Cells = dict[Task, dict[str, Cell]]


def collect(runs_dir: Path) -> tuple[Cells, list[str]]:
    """Reads the runs below a folder.

    Returns:
        The cells by column and method, methods in the order of `METHODS`, and
        a line on each run or cell that is left out.
    """
    groups: dict[tuple[Task, str], list[Run]] = {}
    skipped = []
    folders = {
        file.parent
        for name in ("history.csv", "result.json")
        for file in runs_dir.rglob(name)
    }
    for folder in sorted(folders):
        try:
            run = read(folder)
        except Skipped as reason:
            skipped.append(f"{folder}: {reason}")
            continue
        column, method = column_of(run), run.result["method"]
        groups.setdefault((column, method), []).append(run)
    cells: Cells = {}
    for (column, method), runs in sorted(
        groups.items(),
        key=lambda group: (group[0][0], list(METHODS).index(group[0][1])),
    ):
        reason = not_comparable(runs)
        if reason:
            skipped.append(f"{method} on {' '.join(column)}: {reason}")
        else:
            runs.sort(key=lambda run: run.result["seed"])
            cells.setdefault(column, {})[method] = Cell(runs)
    return cells, skipped


def column_of(run: Run) -> Task:
    """Where a run belongs. A sample of a data set is one of its own.

    What others have published is of the whole one.
    """
    dataset, images = run.result["dataset"], run.result.get("training_images")
    whole = DATASETS[dataset].images if dataset in DATASETS else 0
    if isinstance(images, int) and images < whole:
        dataset = f"{dataset}_{images}_images"
    return dataset, run.result["model"]


def read(folder: Path) -> Run:
    """Reads a run.

    Raises:
        Skipped: If it is not finished, did not look at the test images, or
            its files are not what a finished run writes.
    """
    if not (folder / "result.json").exists():
        raise Skipped("not finished, left out")
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
        if not isinstance(result, dict):
            raise ValueError("not an object")
        if "test_error" in result and result["test_error"] is None:
            raise Skipped("a search, which has no test error, left out")
        for name in ("dataset", "model", "method"):
            if not isinstance(result[name], str):
                raise ValueError(f"{name} is {result[name]!r}, not a name")
        if result["method"] not in METHODS:
            raise ValueError(f"there is no method {result['method']!r}")
        for name, least in (("seed", 0), ("epochs", 1)):
            if type(result[name]) is not int or result[name] < least:
                raise ValueError(f"{name} is {result[name]!r}")
        error = result["test_error"]
        if type(error) not in (int, float) or not 0 <= error <= 100:
            raise ValueError(f"test_error is {error!r}, not 0 to 100 percent")
    except (OSError, ValueError, KeyError) as wrong:
        raise _damaged("result.json", wrong) from wrong
    try:
        history = _read_history(folder / "history.csv", result["epochs"])
    except (OSError, ValueError, KeyError, csv.Error) as wrong:
        raise _damaged("history.csv", wrong) from wrong
    return Run(folder, result, history)


def _damaged(name: str, wrong: Exception) -> Skipped:
    match wrong:
        case KeyError():
            wrong = f"it has no {wrong}"
        case FileNotFoundError():
            wrong = "it is not there"
    return Skipped(f"{name} is damaged, left out ({wrong})")


def _read_history(file: Path, epochs: int) -> dict[str, list[float]]:
    text = file.read_bytes().decode("utf-8")
    if not text.endswith("\n"):
        raise ValueError("its last row is torn")
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise ValueError(
                f"row {number} has {len(row)} of {len(head)} columns"
            )
    if len(rows) != epochs:
        raise ValueError(f"{len(rows)} rows of a run of {epochs} epochs")
    history = {
        name: [float(value or "nan") for value in column]
        for name, *column in zip(head, *rows)
    }
    if history["epoch"] != list(range(1, epochs + 1)):
        raise ValueError(f"its epochs are not 1 to {epochs}")
    if not all(0 <= value <= 1 for value in history["val_accuracy"]):
        raise ValueError("val_accuracy is not 0 to 1")
    return history


def not_comparable(runs: list[Run]) -> str:
    """Why runs of one cell may not be averaged, or an empty string.

    Nobody but the user knows which of two recipes, or of two runs of a seed,
    is meant.
    """
    missing = object()
    for name in dict.fromkeys(name for run in runs for name in run.recipe):
        values = [(run, run.recipe.get(name, missing)) for run in runs]
        if name in UNSAID:
            values = [pair for pair in values if pair[1] is not missing]
        first, value = values[0]
        for run, other in values[1:]:
            if other != value:
                a, b = ("none" if v is missing else v for v in (value, other))
                return (
                    f"{first.folder} and {run.folder} differ in {name} ({a} "
                    f"and {b}); all {len(runs)} runs left out. Report on a "
                    "folder with one recipe for each method."
                )
    seeds: dict[int, Run] = {}
    for run in runs:
        other = seeds.setdefault(run.result["seed"], run)
        if other is not run:
            return (
                f"{other.folder} and {run.folder} are both of seed "
                f"{run.result['seed']}; all {len(runs)} runs left out. Delete "
                "one of them."
            )
    return ""
