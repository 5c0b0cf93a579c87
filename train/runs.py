"""The folder of a run: what is in it, how it is continued.

    model.keras     the model after the last whole epoch; also the checkpoint:
                    besides Keras's own members the archive holds `run.json`
                    with the settings, the rows of the history and the state
                    of the random generators, which Keras does not save
    history.csv     one row an epoch
    result.json     written when the run is finished

All of them are written aside and then renamed, so a file is the old or the
new one, never half of it. One file holds all that a run is continued from, so
the parts of a checkpoint cannot belong to different epochs; `history.csv` is
written anew from it.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import files
import keras
from errors import Busy
from errors import UserError

# A run that goes on with another value of one of these is no run of that
# value; --epochs may grow, and the rest does not change what is learned.
FIXED_SETTINGS = (
    "backend",
    "batch_size",
    "optimizer",
    "learning_rate",
    "warmup_epochs",
    "weight_decay",
    "dtype_policy",
    "steps_per_execution",
    "kernel_scale",
    "feedback_scale",
    "feedback_maps",
    "dropout",
)


# Tries to lock a folder: another process may only have looked who is at it.
PATIENCE = 5


@dataclasses.dataclass
class Progress:
    """What a run folder says has been done.

    Attributes:
        rows: Of the history.
        random_state: Of the seed generators.
        result: What `result.json` holds, if the run is finished.
        lengths: The values of --epochs that the learning rate was scheduled
            for so far, one after the other.
    """

    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    random_state: list[list[int]] = dataclasses.field(default_factory=list)
    result: dict[str, Any] | None = None
    lengths: list[int] = dataclasses.field(default_factory=list)

    @property
    def epoch(self) -> int:
        """The number of whole epochs that have been trained."""
        return len(self.rows)

    @property
    def seconds(self) -> float:
        """The time they took, validation included."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def examples_per_second(self) -> float:
        """Of training alone; the median, for the first epoch compiles."""
        return statistics.median(
            row["examples_per_second"] for row in self.rows
        )


def look(folder: Path, settings: dict[str, Any], resume: bool) -> Progress:
    """Finds out how far the run in `folder` is.

    Raises:
        UserError: if the folder cannot be used for this run.
    """
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{folder}: {parent} is not a folder that can be written to. Give "
            "another one with --runs_dir."
        )
    if not folder.exists():
        return Progress()
    if not resume:
        raise UserError(
            f"{folder}: this run exists already. Add --resume to continue it, "
            "delete the folder, or choose another --seed or --runs_dir."
        )
    checkpoint, result = folder / "model.keras", folder / "result.json"
    if not checkpoint.exists():
        if result.exists():
            raise UserError(
                f"{folder}: there is a result.json but no model.keras to go "
                "on from. Delete the folder to start again."
            )
        return Progress()
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            torn = archive.testzip()
            if torn is not None:
                raise ValueError(f"bad checksum of {torn}")
            saved = json.loads(archive.read("run.json"))
        progress = Progress(saved["rows"], saved["random_state"])
        begun = saved["settings"]
        progress.lengths = begun.get("lengths", [begun["epochs"]])
        if result.exists():
            progress.result = json.loads(result.read_text("utf-8"))
            progress.result["test_error"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(
            f"{folder}: model.keras or result.json is damaged "
            f"({type(e).__name__}: {e}). Delete the folder to start again."
        ) from e
    for name in FIXED_SETTINGS:
        if saved["settings"].get(name) != settings[name]:
            flag = "KERAS_BACKEND" if name == "backend" else f"--{name}"
            raise UserError(
                f"{folder}: this run was started with "
                f"{flag}={saved['settings'].get(name)}, not {settings[name]}. "
                "Resume it as it was started, or choose another --runs_dir."
            )
    if progress.result is None and progress.epoch > settings["epochs"]:
        raise UserError(
            f"{folder}: {progress.epoch} epochs are trained already, more "
            f"than --epochs={settings['epochs']}. Ask for at least as many."
        )
    return progress


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, finished or not; `None` if none.

    Of a finished run, all of `result.json`.
    """
    try:
        return json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        pass
    try:
        with zipfile.ZipFile(folder / "model.keras") as archive:
            return json.loads(archive.read("run.json"))["settings"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of a run folder, however this one ends.

    Args:
        folder: The run's; it need not be there yet.

    Yields:
        A function that makes the folder where it is not there yet, and marks
        an existing one as unfinished.

    Raises:
        Busy: If another process is at it.
        UserError: If it cannot be made.
    """
    busy = Busy(
        f"{folder}: {Busy.SIGN}. Let it end, or "
        "choose another --seed or --runs_dir."
    )
    with contextlib.ExitStack() as locks:

        def lock() -> None:
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                locks.callback(os.close, descriptor)  # which unlocks it
                for _ in range(PATIENCE):
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return
                    time.sleep(0.05)
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be locked ({error.strerror}), so that "
                    "another process might train the same run. Give a folder "
                    "that can be with --runs_dir."
                ) from error
            raise busy

        def make() -> None:
            try:
                if existed:
                    (folder / "result.json").unlink(missing_ok=True)
                    return
                folder.mkdir(parents=True)
            except FileExistsError:
                raise busy from None
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be made ({error.strerror}). Give a "
                    "folder that can be written to with --runs_dir."
                ) from error
            lock()

        existed = folder.is_dir()
        if existed:
            lock()
        yield make


def is_held(folder: Path) -> bool:
    """Whether a process is at a run."""
    try:
        with held(folder):
            return False
    except Busy:
        return True


def restore(folder: Path, progress: Progress, model: keras.Model) -> None:
    """Puts a compiled model back to where its checkpoint was."""
    try:
        model.optimizer.build(model.trainable_variables)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping variable loading")
            model.load_weights(folder / "model.keras")
        for variable, value in zip(
            _random_state(model), progress.random_state, strict=True
        ):
            variable.assign(value)
    except (OSError, UserWarning, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'model.keras'}: does not fit this run's model "
            f"({str(error).splitlines()[0]}). Delete the folder to start again."
        ) from error


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, which says that the run is finished."""
    text = json.dumps(result, indent=2) + "\n"
    files.replace(folder / "result.json", lambda aside: aside.write_text(text))


class RunWriter(keras.callbacks.Callback):
    """Writes a row of `history.csv` and the checkpoint after each epoch.

    It comes last among the callbacks. Nothing is written for an epoch whose
    loss is not a number; `diverged` then holds the number of the epoch.

    Args:
        folder: the run's.
        settings: the run's, kept in the checkpoint.
        progress: the epochs before; this one adds to it.
        examples_per_epoch: number of images an epoch trains on.
        monitor: the `AlignmentMonitor` whose values become columns, or None.
    """

    COLUMNS = (
        "epoch",
        "learning_rate",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "seconds",
        "examples_per_second",
    )

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        progress: Progress,
        examples_per_epoch: int,
        monitor: Any = None,
    ):
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.progress = progress
        self.examples_per_epoch = examples_per_epoch
        self.monitor = monitor
        self.diverged: int | None = None

    def on_train_begin(self, logs=None):
        # A run that is continued may measure more or less than it did before.
        columns = dict.fromkeys(self.COLUMNS)
        columns |= dict.fromkeys(c for r in self.progress.rows for c in r)
        if self.monitor is not None:
            columns |= dict.fromkeys(self.monitor.columns)
        self.columns = list(columns)

        def write(aside: Path) -> None:
            with aside.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.progress.rows)

        files.replace(self.folder / "history.csv", write)

    def on_epoch_begin(self, epoch, logs=None):
        self.began = self.trained = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs = {name: float(value) for name, value in (logs or {}).items()}
        if not all(math.isfinite(value) for value in logs.values()):
            self.diverged = epoch + 1
            self.model.stop_training = True
            return
        row = {
            "epoch": epoch + 1,
            "learning_rate": float(self.model.optimizer.learning_rate),
            **logs,
            "seconds": time.perf_counter() - self.began,
            "examples_per_second": self.examples_per_epoch
            / (self.trained - self.began),
        }
        if self.monitor is not None:
            row |= self.monitor.history.get(epoch, {})
        self.progress.rows.append(row)
        with (self.folder / "history.csv").open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        files.replace(self.folder / "model.keras", self._write_checkpoint)

    def _write_checkpoint(self, aside: Path) -> None:
        self.model.save(aside)
        run = {
            "settings": self.settings,
            "rows": self.progress.rows,
            "random_state": [
                variable.numpy().tolist()
                for variable in _random_state(self.model)
            ],
        }
        with zipfile.ZipFile(aside, "a") as archive:
            archive.writestr("run.json", json.dumps(run))


def _random_state(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators, which `.keras` files leave out."""
    weights = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in weights]
