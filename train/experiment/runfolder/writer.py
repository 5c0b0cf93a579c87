"""What is written to a run folder while a model trains."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from experiment import files
from experiment.errors import Diverged
from experiment.errors import Stopped
from experiment.errors import UserError
from experiment.model import draws
from experiment.runfolder.checkpoint import assign
from experiment.runfolder.checkpoint import random_state
from experiment.runfolder.checkpoint import values
from experiment.runfolder.progress import Partial
from experiment.runfolder.progress import Progress
from keras_fa.methods import METHODS
from keras_fa.methods import Method


def _free_feedback(method: Method) -> bool:
    """Whether its stored feedback may outgrow the weights."""
    return method.wiring == "chain" and draws(method)


# What to do about a divergence: where the first one applies, it says best.
REMEDIES: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda run: run["dtype_policy"] == "mixed_float16",
        "use --dtype_policy=mixed_bfloat16 or float32, whose range is larger",
    ),
    (
        lambda run: run["kernel_scale"] > 1,
        "lower --kernel_scale (now {kernel_scale:g})",
    ),
    (
        lambda run: run["feedback_scale"] > 1,
        "lower --feedback_scale (now {feedback_scale:g})",
    ),
    (
        lambda run: _free_feedback(METHODS[run["method"]]),
        "lower --learning_rate (now {learning_rate:g}) or --feedback_scale, or "
        "take --method=fa_usf_sn, whose feedback has the norm of the weights",
    ),
    (
        lambda run: True,
        "lower --learning_rate (now {learning_rate:g}) or raise "
        "--warmup_epochs (now {warmup_epochs:g})",
    ),
)


@contextlib.contextmanager
def written_to(folder: Path, progress: Progress) -> Iterator[None]:
    """Turns the errors of a full or failing disk into one line.

    Raises:
        UserError: If the disk is full or fails.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        reason = files.disk_error(error)
        if reason is None:
            raise
        safe = "nothing of the run is saved yet"
        if progress.checkpoint is not None:
            safe = f"the checkpoint {progress.saved} is whole"
        raise UserError(
            f"{folder}: cannot be written to ({reason}); {safe}. Free space, "
            "and go on with --resume."
        ) from error


@contextlib.contextmanager
def _undistributed() -> Iterator[None]:
    """Variables that Keras makes for itself in saving are this process's."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


@dataclasses.dataclass(eq=False)
class RunWriter(keras.callbacks.Callback):
    """Writes a row of `history.csv` after each epoch, and the checkpoints.

    There is a checkpoint after each epoch, in between whenever so many minutes
    have passed (0: never), and when the program is asked to end. Saving changes
    nothing of what is learned. It comes last among the callbacks.

    An epoch that was left is gone on with: `fit` is given the steps that are
    left of it, the metrics go on from where they were, so that the row is that
    of an epoch in one piece, and `fit` ends after it.

    Args:
        progress: What was done before; this one adds to it.
        monitor: The `AlignmentMonitor` whose values become columns.
        keep: The number of checkpoints that are kept, at least 1.
        terminated: Whether the program was asked to end.
        agree: What several workers make of a question; all of them ask at the
            same steps.
        writes: Whether this is the worker that writes.

    Raises:
        Stopped: At the end of the step under way, when the program was asked
            to end and what is done is saved.
        Diverged: After an epoch, or instead of saving, if a weight, the loss
            or another metric is not a finite number.
    """

    folder: Path
    settings: dict[str, Any]
    progress: Progress
    examples_per_epoch: int
    metrics: Sequence[str] = ("accuracy",)
    monitor: Any = None
    minutes: float = 0.0
    keep: int = 1
    terminated: Callable[[], bool] = lambda: False
    agree: Callable[[bool], bool] = bool
    writes: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._saved_at = time.monotonic()
        if self.writes and self.progress.checkpoint is not None:
            # What is newer is damaged, and must not take a whole one's place.
            newest = self.folder / "model.keras"
            os.replace(self.progress.checkpoint, newest)
            self.progress.checkpoint = newest
        self._write_history()  # there may be nothing left to train

    def on_train_begin(self, logs=None):
        self._write_history()

    def _write_history(self) -> None:
        """Writes the rows that there are, under all columns that will be."""
        # A run that is continued may measure more or less than it did before.
        measured = ["loss", *self.metrics]
        columns = dict.fromkeys(
            [
                "epoch",
                "learning_rate",
                *measured,
                *(f"val_{name}" for name in measured),
                "seconds",
                "examples_per_second",
            ]
        )
        columns |= dict.fromkeys(c for r in self.progress.rows for c in r)
        if self.monitor is not None:
            columns |= dict.fromkeys(self.monitor.columns)

        def write(aside: Path) -> None:
            with aside.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(self.progress.rows)

        if self.writes:
            files.replace(self.folder / "history.csv", write)

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = self.progress.partial
        self.step = self.begun.step
        self.began = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0 and self.begun.step:
            assign(self.model.metrics_variables, self.begun.metrics)

    def on_train_batch_end(self, batch, logs=None):
        self.step = self.begun.step + batch + 1
        elapsed = time.monotonic() - self._saved_at
        due = self.minutes and elapsed >= 60 * self.minutes
        if self.agree(self.terminated() or bool(due)):
            self._note()
            self._save()
            self._stop_if_asked()

    def on_test_begin(self, logs=None):
        # While the metrics are those of training.
        if self.step > self.begun.step:
            self._note()
            self._check(self.progress.partial.logs)

    def on_test_batch_end(self, batch, logs=None):
        if self.agree(self.terminated()):
            self._save()
            self._stop_if_asked()

    def on_epoch_end(self, epoch, logs=None):
        logs = {name: float(value) for name, value in (logs or {}).items()}
        trained = self.progress.partial.training_seconds
        row = {
            "epoch": epoch + 1,
            "learning_rate": float(self.model.optimizer.learning_rate),
            **logs,
            "seconds": self.begun.seconds + time.perf_counter() - self.began,
            "examples_per_second": self.examples_per_epoch / trained,
        }
        if self.monitor is not None:
            row |= self.monitor.history.get(epoch, {})
        self._check(logs)
        self.progress.rows.append(row)
        self.progress.partial = Partial()
        self._write_history()
        self._save()
        if self.begun.step:
            self.model.stop_training = True

    def _note(self) -> None:
        """Notes how far the epoch under way is."""
        elapsed = time.perf_counter() - self.began
        self.progress.partial = Partial(
            self.step,
            [array.tolist() for array in values(self.model.metrics_variables)],
            {
                name: float(value)
                for name, value in self.model.get_metrics_result().items()
            },
            self.begun.seconds + elapsed,
            self.begun.training_seconds + elapsed,
        )

    def _save(self) -> None:
        self._check(self.progress.partial.logs)
        if self.writes:
            newest = self.folder / "model.keras"
            files.replace(newest, self._write_checkpoint, self.keep)
            for old in files.kept(newest)[self.keep :]:
                old.unlink()
            self.progress.checkpoint = newest
        self.progress.saved = self.progress.place
        self._saved_at = time.monotonic()

    def _write_checkpoint(self, aside: Path) -> None:
        with _undistributed():
            self.model.save(aside)
        run = {
            "settings": self.settings,
            "rows": self.progress.rows,
            "partial": dataclasses.asdict(self.progress.partial),
            "random_state": [
                array.tolist() for array in values(random_state(self.model))
            ],
        }
        with zipfile.ZipFile(aside, "a") as archive:
            archive.writestr("run.json", json.dumps(run))

    def _stop_if_asked(self) -> None:
        if self.agree(self.terminated()):
            raise Stopped(
                f"{self.folder}: stopped {self.progress.place}; go on with "
                "--resume."
            )

    def _check(self, logs: dict[str, float]) -> None:
        """Refuses to continue with, or to save, NaN and Inf."""
        layers = [
            layer.name
            for layer in self.model.layers
            if not all(np.isfinite(a).all() for a in values(layer.weights))
        ]
        lost = [
            name for name, value in logs.items() if not math.isfinite(value)
        ]
        if not layers and not lost:
            return
        where = (
            f"the weights of {', '.join(layers)}"
            if layers
            else f"{', '.join(lost)}, though not in the weights"
        )
        remedy = next(
            text for applies, text in REMEDIES if applies(self.settings)
        )
        raise Diverged(
            f"{self.folder}: {Diverged.SIGN} in epoch "
            f"{self.progress.epoch + 1} of {self.settings['epochs']}: NaN "
            f"or Inf in {where}. What was saved before is kept. In another "
            "--runs_dir, or after deleting the folder, "
            f"{remedy.format(**self.settings)}."
        )


def finish_epoch(
    model: keras.Model,
    progress: Progress,
    callbacks: list[keras.callbacks.Callback],
    evaluate: Callable[[keras.callbacks.CallbackList], dict[str, float]],
) -> None:
    """The end of an epoch that was left when all of its steps were done.

    Args as of `run.fit`, and what evaluates the model on the validation images.
    """
    events = keras.callbacks.CallbackList(callbacks, model=model)
    events.on_train_begin()
    events.on_epoch_begin(progress.epoch)
    logs = dict(progress.partial.logs)
    logs |= {f"val_{name}": v for name, v in evaluate(events).items()}
    events.on_epoch_end(progress.epoch, logs)
    events.on_train_end(logs)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, which says that the run is finished."""
    text = json.dumps(result, indent=2) + "\n"
    files.replace(folder / "result.json", lambda aside: aside.write_text(text))
