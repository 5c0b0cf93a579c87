"""How far a run is."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any
from typing import Self


@dataclasses.dataclass
class Partial:
    """How far an epoch is that is under way.

    Attributes:
        step: The number of its steps that are done.
        metrics: The values of the metrics' variables after them.
        logs: The metrics themselves, means over these steps.
        seconds: The time it has taken.
        training_seconds: The same, without validation.
    """

    step: int = 0
    metrics: list[Any] = dataclasses.field(default_factory=list)
    logs: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    training_seconds: float = 0.0


@dataclasses.dataclass
class Progress:
    """What a run folder says has been done.

    Attributes:
        rows: Of the history.
        partial: The epoch under way.
        random_state: Of the seed generators.
        result: What `result.json` holds, if the run is finished.
        lengths: The values of --epochs that the learning rate was scheduled
            for so far, one after the other.
        training_images: How many there were, if there is a checkpoint.
        workers: How many processes trained, if there is one.
        checkpoint: The newest whole one, if there is one.
        saved: How far that one is, in words.
    """

    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    partial: Partial = dataclasses.field(default_factory=Partial)
    random_state: list[list[int]] = dataclasses.field(default_factory=list)
    result: dict[str, Any] | None = None
    lengths: list[int] = dataclasses.field(default_factory=list)
    training_images: int | None = None
    workers: int | None = None
    checkpoint: Path | None = None
    saved: str = ""

    def told(self) -> dict[str, Any]:
        """It as JSON, for workers that do not use the folder."""
        told = dataclasses.asdict(self)
        return told | {"checkpoint": self.checkpoint and str(self.checkpoint)}

    @classmethod
    def of(cls, told: dict[str, Any]) -> Self:
        """It, as it was told."""
        partial = Partial(**told["partial"])
        checkpoint = told["checkpoint"] and Path(told["checkpoint"])
        return cls(**{**told, "partial": partial, "checkpoint": checkpoint})

    @property
    def epoch(self) -> int:
        """The number of whole epochs that have been trained."""
        return len(self.rows)

    @property
    def place(self) -> str:
        """How far it is, in words."""
        if self.partial.step:
            return f"in epoch {self.epoch + 1}, after step {self.partial.step}"
        return f"after epoch {self.epoch}"

    @property
    def seconds(self) -> float:
        """The time the whole epochs took, validation included."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def examples_per_second(self) -> float:
        """Of training alone; the median, for the first epoch compiles."""
        return statistics.median(
            row["examples_per_second"] for row in self.rows
        )
