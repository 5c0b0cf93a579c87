"""Prints the test errors of many runs as a table.

    python train/report.py runs

A row is a method, a column a data set and network; a cell is the mean of the
test error in percent over the seeds, its standard deviation, and their number.
"""

import startup  # noqa: F401 - before anything imports Keras

# isort: split
import json
import statistics
import sys
from pathlib import Path

from keras_fa.methods import METHODS

Cells = dict[tuple[str, str], list[float]]


def read(runs_dir: Path) -> tuple[Cells, list[str]]:
    """Collects the finished runs below a folder.

    Returns:
        The test errors by method and column, and a line on each run that is
        left out.
    """
    cells: Cells = {}
    skipped = []
    for folder in sorted(p.parent for p in runs_dir.rglob("history.csv")):
        file = folder / "result.json"
        try:
            result = json.loads(file.read_text("utf-8"))
            column = f"{result['dataset']} {result['model']}"
            test_error = float(result["test_error"])
            cells.setdefault((result["method"], column), []).append(test_error)
        except FileNotFoundError:
            skipped.append(f"{folder}: not finished, left out")
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(
                f"{file}: damaged, left out ({type(error).__name__}: {error})"
            )
    return cells, skipped


def table(cells: Cells) -> str:
    """Lays the cells out as a Markdown table."""
    columns = sorted({column for _, column in cells})
    others = sorted({method for method, _ in cells} - set(METHODS))
    lines = [["test error, %", *columns], ["---"] * (1 + len(columns))]
    lines += [
        [
            method,
            *(_cell(cells.get((method, column), [])) for column in columns),
        ]
        for method in [*METHODS, *others]
        if any((method, column) in cells for column in columns)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width, "-" if cell == "---" else " ")
            for cell, width in zip(line, widths, strict=True)
        )
        + " |"
        for line in lines
    )


def _cell(errors: list[float]) -> str:
    if not errors:
        return "-"
    mean = f"{statistics.mean(errors):.2f}"
    if len(errors) == 1:
        return f"{mean} (n=1)"
    return f"{mean} ± {statistics.stdev(errors):.2f} (n={len(errors)})"


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    if len(argv) != 2:
        print("usage: python train/report.py <runs_dir>", file=sys.stderr)
        return 2
    cells, skipped = read(Path(argv[1]))
    for line in skipped:
        print(f"report.py: {line}", file=sys.stderr)
    if not cells:
        print(
            f"report.py: {argv[1]}: no finished run below it. Give the "
            "--runs_dir of train/main.py.",
            file=sys.stderr,
        )
        return 1
    print(table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv))
