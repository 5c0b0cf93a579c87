"""The folder of a run: what is in it, how it is continued.

    model.keras     the model as it was last saved; also the checkpoint: besides
                    Keras's own members the archive holds `run.json` with the
                    settings, the rows of the history, how far the epoch under
                    way is, and the state of the random generators, which Keras
                    does not save
    model.1.keras   the one before; there may be more
    history.csv     one row an epoch
    result.json     written when the run is finished

All of them are written aside and then renamed, so a file is the old or the
new one, never half of it. One file holds all that a run is continued from, so
the parts of a checkpoint cannot belong to different steps; `history.csv` is
written anew from it. Where the newest checkpoint is damaged all the same, the
run goes on from the one before, and learns what it has learned before.

TensorBoard's events are written as they come: where a run was killed and goes
on, those behind its checkpoint are there twice, with equal values.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import Self

import files
import keras
import numpy as np
from errors import Busy
from errors import Diverged
from errors import Stopped
from errors import UserError

# A run's folder is named after these, and may have been renamed.
NAMING_SETTINGS = ("dataset", "model", "method", "seed")

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
    "normalization",
    "label_smoothing",
    "image_size",
    "crop_area",
)

# What a run that does not say was made with: settings have been added since
# the first runs. They are the defaults of main.py's flags.
DEFAULTS = {
    "kernel_scale": 1.0,
    "feedback_scale": 1.0,
    "feedback_maps": "dense",
    "dropout": 0.0,
    "normalization": "none",
    "label_smoothing": 0.0,
    "image_size": None,
    "crop_area": None,
    "strategy": "none",
    "tpu": None,
    "virtual_devices": 0,
    "dtype_policy": "float32",
    "steps_per_execution": 1,
}

# What to do about a divergence: where the first one applies, it says best.
REMEDIES: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda run: run["dtype_policy"] == "mixed_float16",
        "--dtype_policy=mixed_bfloat16 or float32, whose range is larger",
    ),
    (
        lambda run: run["kernel_scale"] > 1,
        "less than --kernel_scale={kernel_scale}",
    ),
    (
        lambda run: run["feedback_scale"] > 1,
        "less than --feedback_scale={feedback_scale}",
    ),
    (
        lambda run: run["method"] in ("fa", "fa_usf_init", "fa_usf_init_ei"),
        "less than --learning_rate={learning_rate}, a smaller "
        "--feedback_scale, or --method=fa_usf_sn, whose feedback has the norm "
        "of the weights",
    ),
    (
        lambda run: True,
        "less than --learning_rate={learning_rate} or a longer warm-up than "
        "--warmup_epochs={warmup_epochs}",
    ),
)

# What reading a damaged archive raises.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)

# Tries to lock a folder: another process may only have looked who is at it.
PATIENCE = 5


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
        skipped: The names of the images that could not be read.
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
    skipped: list[str] = dataclasses.field(default_factory=list)
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
        return cls(**{**told, "partial": partial})

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
    result = folder / "result.json"
    if not files.kept(folder / "model.keras"):
        if result.exists():
            raise UserError(
                f"{folder}: there is a result.json but no model.keras to go "
                "on from. Delete the folder to start again."
            )
        return Progress()
    progress, begun = _newest(folder)
    for name in (*NAMING_SETTINGS, *FIXED_SETTINGS):
        if begun.get(name) != settings[name]:
            flag = "KERAS_BACKEND" if name == "backend" else f"--{name}"
            raise UserError(
                f"{folder}: this run was started with "
                f"{flag}={begun.get(name)}, not {settings[name]}. "
                "Resume it as it was started, or choose another --runs_dir."
            )
    if result.exists():
        try:
            progress.result = json.loads(result.read_text("utf-8"))
            progress.result["test_error"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            progress.result = None
            _say(f"{result}: {_damage(error)}; it is made anew.")
    begun_epochs = progress.epoch + (progress.partial.step > 0)
    if progress.result is None and begun_epochs > settings["epochs"]:
        raise UserError(
            f"{folder}: {begun_epochs} epochs are trained or begun already, "
            f"more than --epochs={settings['epochs']}. Ask for at least as "
            "many."
        )
    return progress


def _newest(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The newest checkpoint that is whole, and the settings in it."""
    newest = folder / "model.keras"
    wrong = [] if newest.exists() else ["missing"]
    for checkpoint in files.kept(newest):
        try:
            progress, settings = _read(checkpoint)
        except DAMAGE as error:
            wrong.append(_damage(error))
            continue
        if wrong:
            _say(
                f"{newest}: {wrong[0]}; going on from {checkpoint.name}, "
                f"{progress.place}."
            )
        return progress, settings
    raise UserError(
        f"{folder}: model.keras is {wrong[0]}, and no checkpoint before it is "
        "whole. Delete the folder to start again."
    )


def _read(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    with zipfile.ZipFile(checkpoint) as archive:
        torn = archive.testzip()
        if torn is not None:
            raise ValueError(f"bad checksum of {torn}")
        saved = json.loads(archive.read("run.json"))
    settings = completed(saved["settings"])
    progress = Progress(
        saved["rows"],
        Partial(**saved["partial"]),
        saved["random_state"],
        lengths=settings.get("lengths", [settings["epochs"]]),
        skipped=saved.get("skipped", []),
        training_images=settings.get("training_images"),
        workers=settings.get("workers"),
        checkpoint=checkpoint,
    )
    progress.saved = progress.place
    return progress, settings


def _damage(error: Exception) -> str:
    return f"damaged ({type(error).__name__}: {error})"


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)


def check_data(
    folder: Path, progress: Progress, settings: dict[str, Any]
) -> None:
    """Refuses to go on with other data than a run was started with.

    Raises:
        UserError: If it is other data.
    """
    images, workers = settings["training_images"], settings["workers"]
    if progress.training_images not in (None, images):
        raise UserError(
            f"{folder}: this run was started on {progress.training_images} "
            f"training images, and now there are {images}. Resume it with the "
            "--data_dir, and the --test or --notest, that it was started with, "
            "or choose another --runs_dir."
        )
    # Each worker reads a part of the photos of its own, in its own order.
    if progress.partial.step and progress.workers not in (None, workers):
        raise UserError(
            f"{folder}: this run was left inside an epoch by "
            f"{progress.workers} worker(s), and now there are {workers}. "
            f"Resume it with {progress.workers}."
        )


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as it was saved, and those younger than it is."""
    return DEFAULTS | settings


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, finished or not; `None` if none.

    Of a finished run, all of `result.json`.
    """
    try:
        return completed(
            json.loads((folder / "result.json").read_text("utf-8"))
        )
    except (OSError, ValueError, TypeError):
        pass
    for checkpoint in files.kept(folder / "model.keras"):
        with contextlib.suppress(*DAMAGE):
            return _read(checkpoint)[1]
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


def restore(progress: Progress, model: keras.Model) -> None:
    """Puts a compiled model back to where its checkpoint was."""
    try:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping variable loading")
            model.load_weights(progress.checkpoint)
        _assign(_random_state(model), progress.random_state)
    except (OSError, UserWarning, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{progress.checkpoint}: does not fit this run's model "
            f"({str(error).splitlines()[0]}). Delete the folder to start again."
        ) from error


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, which says that the run is finished."""
    text = json.dumps(result, indent=2) + "\n"
    files.replace(folder / "result.json", lambda aside: aside.write_text(text))


class Termination:
    """Hears SIGTERM while it is entered, and notes it.

    In a thread other than the main one, where Python hears no signals, it
    hears nothing.

    Attributes:
        asked: Whether the program was asked to end.
    """

    asked = False

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    def _hear(self, *signal: object) -> None:
        self.asked = True


@contextlib.contextmanager
def written_to(folder: Path, progress: Progress) -> Iterator[None]:
    """Turns the errors of a full or failing disk into one line.

    Args:
        folder: The run's.
        progress: What is saved of it, which changes meanwhile.

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


class RunWriter(keras.callbacks.Callback):
    """Writes a row of `history.csv` after each epoch, and the checkpoints.

    There is a checkpoint after each epoch, in between whenever some time has
    passed since the last, and when the program is asked to end. Saving changes
    nothing of what is learned. It comes last among the callbacks.

    An epoch that was left is gone on with: `fit` is given the steps that are
    left of it, the metrics go on from where they were, so that the row is that
    of an epoch in one piece, and `fit` ends after it.

    Args:
        folder: the run's.
        settings: the run's, kept in the checkpoint.
        progress: what was done before; this one adds to it.
        examples_per_epoch: number of images an epoch trains on.
        metrics: names of the model's metrics.
        monitor: the `AlignmentMonitor` whose values become columns, or None.
        minutes: between two checkpoints inside an epoch; 0: there are none.
        keep: number of checkpoints that are kept, at least 1.
        skipped: names of the images that could not be read so far.
        terminated: whether the program was asked to end.
        agree: what several workers make of a question that each answers for
            itself; all of them ask at the same steps.
        writes: whether this is the worker that writes.

    Raises:
        Stopped: At the end of the step under way, when the program was asked
            to end and what is done is saved.
        Diverged: After an epoch, or instead of saving, if a weight, the loss
            or another metric is not a finite number.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        progress: Progress,
        examples_per_epoch: int,
        metrics: Sequence[str] = ("accuracy",),
        monitor: Any = None,
        minutes: float = 0.0,
        keep: int = 1,
        skipped: Collection[str] = (),
        terminated: Callable[[], bool] = lambda: False,
        agree: Callable[[bool], bool] = bool,
        writes: bool = True,
    ):
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.progress = progress
        self.examples_per_epoch = examples_per_epoch
        self.metrics = metrics
        self.monitor = monitor
        self.minutes = minutes
        self.keep = keep
        self.skipped = skipped
        self.terminated = terminated
        self.agree = agree
        self.writes = writes
        self._saved_at = time.monotonic()
        if writes and progress.checkpoint is not None:
            # What is newer is damaged, and must not take a whole one's place.
            newest = folder / "model.keras"
            os.replace(progress.checkpoint, newest)
            progress.checkpoint = newest
        self._begin_history()  # there may be nothing left to train

    def on_train_begin(self, logs=None):
        self._begin_history()

    def _begin_history(self) -> None:
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
        self.columns = list(columns)

        def write(aside: Path) -> None:
            with aside.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
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
            _assign(self.model.metrics_variables, self.begun.metrics)

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
        if self.writes:
            with (self.folder / "history.csv").open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        self._save()
        if self.begun.step:
            self.model.stop_training = True

    def _note(self) -> None:
        """Notes how far the epoch under way is."""
        elapsed = time.perf_counter() - self.began
        self.progress.partial = Partial(
            self.step,
            [array.tolist() for array in _values(self.model.metrics_variables)],
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
        self.model.save(aside)
        run = {
            "settings": self.settings,
            "rows": self.progress.rows,
            "partial": dataclasses.asdict(self.progress.partial),
            "skipped": sorted(self.skipped),
            "random_state": [
                array.tolist() for array in _values(_random_state(self.model))
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
        """Refuses to go on, or to save, what is not a number any more."""
        layers = [
            layer.name
            for layer in self.model.layers
            if not all(np.isfinite(a).all() for a in _values(layer.weights))
        ]
        lost = [
            name for name, value in logs.items() if not math.isfinite(value)
        ]
        if not layers and not lost:
            return
        holds = (
            f"weights of {', '.join(layers)}"
            if layers
            else (f"{', '.join(lost)}, though all weights still are")
        )
        remedy = next(
            text for applies, text in REMEDIES if applies(self.settings)
        )
        raise Diverged(
            f"{self.folder}: {Diverged.SIGN} in epoch "
            f"{self.progress.epoch + 1} of {self.settings['epochs']}: no "
            f"finite numbers any more are {holds}. What was saved before is "
            "kept. Try again in another --runs_dir, or delete the folder, with "
            f"{remedy.format(**self.settings)}."
        )


def finish_epoch(
    model: keras.Model,
    progress: Progress,
    callbacks: list[keras.callbacks.Callback],
    evaluate: Callable[[keras.callbacks.CallbackList], dict[str, float]],
) -> None:
    """The end of an epoch that was left when all of its steps were done.

    Args:
        model: The model, as it was left.
        progress: How far it is.
        callbacks: As `fit` would be given them.
        evaluate: Evaluates the model on the validation images, with callbacks.
    """
    events = keras.callbacks.CallbackList(callbacks, model=model)
    events.on_train_begin()
    events.on_epoch_begin(progress.epoch)
    logs = dict(progress.partial.logs)
    logs |= {f"val_{name}": v for name, v in evaluate(events).items()}
    events.on_epoch_end(progress.epoch, logs)
    events.on_train_end(logs)


def _random_state(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators, which `.keras` files leave out."""
    known = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in known]


def _values(variables: list[keras.Variable]) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def _assign(variables: list[keras.Variable], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
