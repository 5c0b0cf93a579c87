"""What is read from a run folder: its settings, and where to go on."""

import contextlib
import json
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np

from experiment import files
from experiment import settings
from experiment.errors import UserError
from experiment.errors import reason
from experiment.runfolder.progress import Partial
from experiment.runfolder.progress import Progress

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


def look(folder: Path, asked: dict[str, Any], resume: bool) -> Progress:
    """Finds out how far the run in `folder` is.

    Raises:
        UserError: if the folder cannot be used for this run.
    """
    files.check_writable(folder, folder, "Give another one with --runs_dir.")
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
    other = settings.difference(begun, asked, settings.FIXED)
    if other is not None:
        raise UserError(
            f"{folder}: this run was started with {settings.flag(other)}="
            f"{begun.get(other)}, not {asked[other]}. Resume it as it was "
            "started, or choose another --runs_dir."
        )
    if result.exists():
        try:
            progress.result = json.loads(result.read_text("utf-8"))
            progress.result["test_error"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            progress.result = None
            print(
                f"{result}: damaged ({reason(error)}); it is written again.",
                file=sys.stderr,
            )
    begun_epochs = progress.epoch + (progress.partial.step > 0)
    if progress.result is None and begun_epochs > asked["epochs"]:
        raise UserError(
            f"{folder}: {begun_epochs} epochs are trained or begun already, "
            f"more than --epochs={asked['epochs']}. Ask for at least as "
            "many."
        )
    return progress


def _newest(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The newest checkpoint that is whole, and the settings in it."""
    newest = folder / "model.keras"
    wrong = [] if newest.exists() else ["missing"]
    for checkpoint in files.kept(newest):
        try:
            progress, begun = _read(checkpoint)
        except DAMAGE as error:
            wrong.append(f"damaged ({reason(error)})")
            continue
        if wrong:
            print(
                f"{newest}: {wrong[0]}; going on from {checkpoint.name}, "
                f"{progress.place}.",
                file=sys.stderr,
            )
        return progress, begun
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
    begun = settings.completed(saved["settings"])
    progress = Progress(
        saved["rows"],
        Partial(**saved["partial"]),
        saved["random_state"],
        lengths=begun.get("lengths", [begun["epochs"]]),
        training_images=begun.get("training_images"),
        workers=begun.get("workers"),
        checkpoint=checkpoint,
    )
    progress.saved = progress.place
    return progress, begun


def check_data(
    folder: Path, progress: Progress, recorded: dict[str, Any]
) -> None:
    """Refuses to go on with other data than a run was started with.

    Raises:
        UserError: If it is other data.
    """
    images, workers = recorded["training_images"], recorded["workers"]
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


def result_of(folder: Path) -> dict[str, Any] | None:
    """What `result.json` holds; `None` if there is none, or it is damaged."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, finished or not; `None` if none.

    Of a finished run, all of `result.json`.
    """
    result = result_of(folder)
    if result is not None:
        return settings.completed(result)
    for checkpoint in files.kept(folder / "model.keras"):
        with contextlib.suppress(*DAMAGE):
            return _read(checkpoint)[1]
    return None


def restore(progress: Progress, model: keras.Model, file: Path) -> None:
    """Puts a compiled model back to where its checkpoint was.

    The file is the checkpoint, or a copy of it.
    """
    try:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping variable loading")
            model.load_weights(file)
        assign(random_state(model), progress.random_state)
    except (OSError, UserWarning, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{progress.checkpoint}: does not fit this run's model "
            f"({reason(error)}). Delete the folder to start again."
        ) from error


def random_state(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators, which `.keras` files leave out."""
    known = {id(variable) for variable in model.weights}
    return [v for v in model.variables if id(v) not in known]


def values(variables: list[keras.Variable]) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assign(variables: list[keras.Variable], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
