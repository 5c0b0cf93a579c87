"""Many runs of main.py, one after the other: what is missing of them.

A sweep can be stopped at any moment and goes on where it was. Several
processes can work on one sweep: a run that another one is at is passed over.
"""

import csv
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

from experiment import commandline
from experiment import settings
from experiment.console import in_words
from experiment.errors import Busy
from experiment.errors import Diverged
from experiment.run import error
from experiment.run import run_folder
from experiment.runfolder import checkpoint
from experiment.runfolder import lock

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
POLL_SECONDS = 1.0
# How reasons begin that are no other run's: a method that does not fit the
# network or memory, and a process that was killed.
ITS_OWN = ("--method=", "--feedback_maps=", "exit status")


class Job(NamedTuple):
    """A run of main.py that is wanted.

    Attributes:
        name: What it is called on the console.
        arguments: The command line of main.py.
        folder: The run's.
        settings: What main.py makes of the arguments.
        finished: Where the run may lie finished instead; it is only read.
        until: The epoch after which it is left, and can be gone on with.
            Default `None`: the run is done to its end.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    finished: Path | None = None
    until: int | None = None

    @property
    def epochs(self) -> int:
        """Those of the whole run."""
        return self.settings["epochs"]

    @property
    def kind(self) -> tuple[str, ...]:
        """Jobs of one kind take about equally long for an epoch."""
        return tuple(self.settings[n] for n in ("dataset", "model", "method"))


class Failure(NamedTuple):
    """Why a run failed; whether its training diverged."""

    reason: str
    diverged: bool


def job(
    name: str, arguments: Sequence[str], finished: Path | None = None
) -> Job:
    """The job of a command line of main.py.

    It may be done already in --runs_dir, or in the folder `finished`.

    Raises:
        UserError: If main.py would refuse the command line.
    """
    arguments = (*arguments, "--resume")
    commandline.parse(settings.FLAGS, [PROGRAM.name, *arguments])
    config = settings.given()
    settings.check(config)
    folder = run_folder(config)
    return Job(
        name,
        arguments,
        folder,
        vars(config),
        None if finished is None else finished / folder.name,
    )


def result(job: Job) -> dict[str, Any] | None:
    """What a finished job has come to; `None` while it is not finished."""
    for folder in (job.folder, job.finished):
        found = folder and checkpoint.result_of(folder)
        if found is not None and not conflict(job, folder):
            return found
    return None


def is_done(job: Job) -> bool:
    """Whether a job has come as far as it is to."""
    if result(job) is not None:
        return True
    return (
        job.until is not None
        and len(rows_of(job.folder)) >= job.until
        and not conflict(job)
    )


def conflict(job: Job, folder: Path | None = None) -> str:
    """What tells the run in a folder from the job; nothing if it is it.

    A run of another recipe or length is no part of the sweep, and is not to be
    taken for one. The folder is the job's own by default.
    """
    folder = folder or job.folder
    found = checkpoint.settings_of(folder)
    if found is None:
        return ""
    compared = (*settings.NAMING, *settings.RECIPE)
    name = settings.difference(found, job.settings, compared)
    if name is not None:
        return (
            f"{folder} holds a run of {name}={found.get(name)}, and "
            f"{name}={job.settings[name]} is asked for."
        )
    steps = found.get("steps_per_epoch")
    if steps is not None:
        batch = found["batch_size"]
        whole = found.get("training_images", steps * batch) // batch
        wanted = whole - whole % job.settings["steps_per_execution"]
        if steps != wanted:
            return (
                f"{folder} holds a run of {steps} steps an epoch, and "
                f"{wanted} are asked for."
            )
    if "lengths" in found:
        return (
            f"{folder} holds a run whose --epochs was changed on the way: "
            f"{found['lengths']}."
        )
    if job.settings["test"] and found.get("test_error", 0) is None:
        return (
            f"{folder} holds a run of --notest, which did not look at the "
            "test images."
        )
    return ""


def run(jobs: Sequence[Job], deadline: float = math.inf) -> dict[str, Failure]:
    """Does all jobs that no other process is at or has done.

    The first seeds come first, and of one seed what is done soonest. Where a
    job diverges, or its method or folder is to blame, the others go on. Any
    other failure would be theirs, too, and ends it, and so does the same reason
    for a second time.

    No job is begun that would not be finished by the deadline, a time of
    `time.monotonic`, as long as its epochs take.

    Returns:
        The jobs that failed, by their names.
    """
    # A kill, too, is to end the run that is under way, and not orphan it.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(jobs, deadline)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(jobs: Sequence[Job], deadline: float) -> dict[str, Failure]:
    failed: dict[str, Failure] = {}

    def missing() -> list[Job]:
        left = (job for job in jobs if job.name not in failed)
        return [job for job in left if not is_done(job)]

    def free() -> list[Job]:
        return [job for job in missing() if not lock.is_held(job.folder)]

    for job in jobs:
        if job.finished and (other := conflict(job, job.finished)):
            print(f"{other} It does not count.")
    print(
        f"{len(jobs) - len(missing())} of {len(jobs)} runs are finished "
        "already.",
        flush=True,
    )
    # Again and again: other processes leave runs that they were at.
    while todo := free():
        job = _next(todo, jobs, deadline)
        if job is None:
            break
        failure = _do(job, jobs, failed)
        if failure is None:
            continue
        again = failure in failed.values()
        failed[job.name] = failure
        its_own = failure.reason.startswith((str(job.folder), *ITS_OWN))
        if again or not (failure.diverged or its_own):
            return failed
        print(f"{job.name}: failed. {failure.reason}", flush=True)
    if todo:
        times = paces(jobs)
        named = [
            f"{job.name} ({in_words(seconds_of(job, times))})" for job in todo
        ]
        print(f"Not enough time is left for {', '.join(named)}.")
    if held := [job for job in missing() if job not in todo]:
        names = ", ".join(job.name for job in held)
        print(f"Left to other processes, which are training them: {names}.")
    elif not failed and not todo:
        print(f"All {len(jobs)} runs are finished.")
    return failed


def _next(
    todo: Sequence[Job], jobs: Sequence[Job], deadline: float
) -> Job | None:
    """The job to begin; `None` if none of them can be done in time."""
    times = paces(jobs)
    left = deadline - time.monotonic()
    # As long as nothing has been measured, all of them might be.
    fitting = [
        job for job in todo if left > 0 and not seconds_of(job, times) > left
    ]

    def order(job: Job) -> tuple[int, float]:
        return job.settings["seed"], seconds_of(job, times) if times else 0.0

    return min(fitting, key=order, default=None)


def _do(
    job: Job, jobs: Sequence[Job], failed: dict[str, Failure]
) -> Failure | None:
    """Does one job; returns why it failed, if it did."""
    other = conflict(job)
    if other:
        return Failure(
            f"{other} Give another --runs_dir, or delete the folder.",
            diverged=False,
        )
    place = f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}"
    seen = len(rows_of(job.folder))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *job.arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                rows = rows_of(job.folder)
                if len(rows) > seen:
                    seen = len(rows)
                    print(
                        f"{place}: {_progress(job, jobs, failed)}", flush=True
                    )
                if job.until is not None and seen >= job.until:
                    break
        finally:
            process.terminate()
            process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if job.until is not None and is_done(job):
        return None
    if process.returncode:
        last = said[-1] if said else f"exit status {process.returncode}"
        if Busy.SIGN in last:  # another process began it just now
            return None
        return Failure(
            last.removeprefix(f"{PROGRAM.name}: "), Diverged.SIGN in last
        )
    print(f"{place}: {_summary(job)}", flush=True)
    return None


def _progress(job: Job, jobs: Sequence[Job], failed: dict[str, Failure]) -> str:
    row = rows_of(job.folder)[-1]
    left = seconds_left([job for job in jobs if job.name not in failed])
    return (
        f"epoch {int(row['epoch'])} of {job.epochs}, validation error "
        f"{error(row['val_accuracy']):.2f} %, {row['seconds']:.0f} s an "
        f"epoch; {in_words(left)} left"
    )


def _summary(job: Job) -> str:
    found = result(job)
    if found is None:  # it was told to stop, or another process changed it
        return "stopped before its end"
    if found["test_error"] is None:
        return f"validation error {found['validation_error']:.2f} %"
    return f"test error {found['test_error']:.2f} %"


def seconds_left(jobs: Sequence[Job]) -> float:
    """An estimate of the time until all jobs are finished.

    Processes share what is left.
    """
    times = paces(jobs)
    left = [job for job in jobs if not is_done(job)]
    workers = sum(lock.is_held(job.folder) for job in left)
    if not times:
        return float("nan")
    return sum(seconds_of(job, times) for job in left) / max(workers, 1)


def paces(jobs: Sequence[Job]) -> dict[tuple[str, ...], float]:
    """The seconds of an epoch by kind of job, as far as any is measured.

    What was finished elsewhere, maybe by another machine, tells of kinds that
    nothing here does.
    """
    measured: dict[tuple[str, ...], float] = {}
    for place in ("finished", "folder"):
        times: dict[tuple[str, ...], list[float]] = {}
        for job in jobs:
            folder = getattr(job, place)
            rows = rows_of(folder) if folder else []
            times.setdefault(job.kind, []).extend(r["seconds"] for r in rows)
        measured |= {k: statistics.median(t) for k, t in times.items() if t}
    return measured


def seconds_of(job: Job, times: dict[tuple[str, ...], float]) -> float:
    """An estimate of the time that is left of a job that is not finished.

    By the `paces`, of which a kind without one has the others' average; NaN
    if there are none.
    """
    if not times:
        return float("nan")
    pace = times.get(job.kind, statistics.mean(times.values()))
    epochs = job.epochs if job.until is None else job.until
    return max(epochs - len(rows_of(job.folder)), 0) * pace


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The whole rows of a history; the last one may be half-written."""
    try:
        with (folder / "history.csv").open(newline="") as file:
            return [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)
                if row["val_accuracy"] and row["examples_per_second"]
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
