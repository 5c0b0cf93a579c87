"""A search: each method at each point of a grid, and what is best."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from experiment import markdown
from experiment import settings
from experiment.errors import UserError
from experiment.run import error
from experiment.table import columns
from experiment.table import sweep

# All runs are equally long.
RECIPE = tuple(name for name in settings.RECIPE if name != "epochs")


@dataclasses.dataclass
class Grid:
    """The points at which each method of a column is tried.

    Args:
        column: Of the table.
        methods: Its rows.
        points: Flags of main.py, separated by spaces.
        runs_dir: Folder for the runs.
        rest: Flags of main.py that all runs are given.
        halving: Whether the worse half of a method's points is given up after
            1, 2, 4, ... epochs.

    Attributes:
        results: `result.json` of each method and point; `None` where a run
            diverged or was given up, or where another process is at it.
        given_up: The validation error in percent, and the epoch it is of, of
            each method and point that was given up.

    Raises:
        UserError: If a flag is not where it belongs.
    """

    column: str
    methods: list[str]
    points: list[str]
    runs_dir: Path
    rest: list[str] = dataclasses.field(default_factory=list)
    halving: bool = False
    results: dict[tuple[str, str], dict[str, Any] | None] = dataclasses.field(
        default_factory=dict
    )
    given_up: dict[tuple[str, str], tuple[float, int]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        settled = (*columns.SETTLED, "test", "notest", "seed", *RECIPE)
        columns.refuse(self.rest, settled, "A --point is where a recipe is.")
        for point in self.points:
            names = [columns.name(flag) for flag in point.split()]
            columns.refuse(
                point.split(),
                [name for name in names if name not in RECIPE],
                f"A --point holds flags of {', '.join(RECIPE)}.",
            )

    def search(self) -> list[str]:
        """Does all runs; returns the names of those that are missing.

        Raises:
            UserError: If a run failed, but for one that diverged.
        """
        jobs = {
            (method, point): self._job(method, point)
            for method in self.methods
            for point in self.points
        }
        epochs = min(job.epochs for job in jobs.values())
        stages = [2**n for n in range(epochs.bit_length()) if 2**n < epochs]
        left, diverged = dict(jobs), set()
        for stage in (*(stages if self.halving else ()), None):
            if stage is not None and len(left) == len({m for m, _ in left}):
                continue  # there is nothing to compare
            todo = {c: job._replace(until=stage) for c, job in left.items()}
            failed = sweep.run(list(todo.values()))
            columns.fail({n: f for n, f in failed.items() if not f.diverged})
            diverged.update(c for c, j in todo.items() if j.name in failed)
            missing = [
                job.name
                for cell, job in todo.items()
                if cell not in diverged and not sweep.is_done(job)
            ]
            if missing:
                break
            if stage is not None:
                left = self._halved(todo, diverged, stage)
        self.results = dict.fromkeys(jobs)
        self.results |= {cell: sweep.result(job) for cell, job in left.items()}
        return missing

    def _halved(
        self,
        jobs: dict[tuple[str, str], sweep.Job],
        diverged: set[tuple[str, str]],
        epoch: int,
    ) -> dict[tuple[str, str], sweep.Job]:
        """The better half of each method's jobs after so many epochs."""
        kept = {}
        for method in self.methods:
            errors = {
                cell: error(
                    sweep.rows_of(job.folder)[epoch - 1]["val_accuracy"]
                )
                for cell, job in jobs.items()
                if cell[0] == method and cell not in diverged
            }
            ranked = sorted(errors, key=errors.get)
            half = math.ceil(len(ranked) / 2)
            kept |= {cell: jobs[cell] for cell in ranked[:half]}
            self.given_up |= {c: (errors[c], epoch) for c in ranked[half:]}
        return kept

    def _job(self, method: str, point: str) -> sweep.Job:
        folder = point.replace("--", "").replace(" ", ",")
        return sweep.job(
            f"{self.column} {method} {point}",
            [
                *columns.unsearched(self.column, method),
                *point.split(),
                "--notest",
                "--alignment_every=0",
                f"--runs_dir={self.runs_dir / self.column / folder}",
                *self.rest,
            ],
        )

    def table(self) -> str:
        """The validation errors in percent, the least of each method marked.

        A point that was given up has that of its last epoch, which is named; a
        point without a result has none.
        """
        rows = []
        for method in self.methods:
            best = self.choose(method)
            rows.append([method])
            for point in self.points:
                found = self.results[method, point]
                text = f"{found['validation_error']:.2f}" if found else "-"
                if (method, point) in self.given_up:
                    then, epoch = self.given_up[method, point]
                    text = f"{then:.2f} after {epoch}"
                rows[-1].append(f"**{text}**" if point == best else text)
        points = (f"`{point}`" for point in self.points)
        return markdown.table(["validation error, %", *points], rows)

    def choose(self, method: str) -> str | None:
        """The point of least validation error, the first one of equals."""
        errors = {
            point: self.results[method, point]["validation_error"]
            for point in self.points
            if self.results[method, point] is not None
        }
        return min(errors, key=errors.get) if errors else None

    def write(self, method: str) -> None:
        """Writes the flag file of a cell.

        Raises:
            UserError: If there is no result to go by.
        """
        best = self.choose(method)
        if best is None:
            raise UserError(
                f"{self.column} {method}: every --point diverged, so no flag "
                "file is written. Give other points."
            )
        found = self.results[method, best]
        fixed = columns.unsearched(self.column, method)
        searched = {columns.name(flag) for flag in best.split()}
        columns.write(
            self.column,
            method,
            [
                f"Searched: {best}, of least validation error "
                f"({found['validation_error']:.2f} %,",
                f"{found['epochs']} epoch(s), seed {found['seed']}) among "
                f"{' | '.join(self.points)}.",
                *(
                    f"{self._end(method, point)}: {point}"
                    for point in self.points
                    if self.results[method, point] is None
                ),
            ],
            [
                *(flag for flag in fixed if columns.name(flag) not in searched),
                *best.split(),
            ],
        )

    def _end(self, method: str, point: str) -> str:
        if (method, point) not in self.given_up:
            return "Diverged"
        then, epoch = self.given_up[method, point]
        return f"Given up after {epoch} epoch(s) ({then:.2f} %)"
