"""Many runs of main.py, one after the other: what is missing of them.

A sweep can be stopped at any moment and goes on where it was. Several
processes can work on one sweep: a run that another one is at is passed over.
"""

import csv
import json
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

import commandline
import main
import runs
from errors import Busy
from errors import Diverged

PROGRAM = Path(main.__file__)
POLL_SECONDS = 1.0


class Job(NamedTuple):
    """A run of main.py that is wanted.

    Attributes:
        name: What it is called on the console.
        arguments: The command line of main.py.
        folder: The run's.
        settings: What main.py makes of the arguments.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]

    @property
    def epochs(self) -> int:
        """Its length."""
        return self.settings["epochs"]

    @property
    def kind(self) -> tuple[str, ...]:
        """Jobs of one kind take about equally long for an epoch."""
        return tuple(self.settings[n] for n in ("dataset", "model", "method"))


class Failure(NamedTuple):
    """Why a run failed; whether its training diverged."""

    reason: str
    diverged: bool


def job(name: str, arguments: Sequence[str]) -> Job:
    """The job of a command line of main.py.

    Args:
        name: What it is called on the console.
        arguments: Of main.py.

    Raises:
        UserError: If main.py would refuse the command line.
    """
    arguments = (*arguments, "--resume")
    commandline.parse(main.FLAGS, [PROGRAM.name, *arguments])
    config = main.settings()
    main.check(config)
    return Job(name, arguments, main.run_folder(config), vars(config))


def result(job: Job) -> dict[str, Any] | None:
    """What a finished job has come to; `None` while it is not finished."""
    try:
        found = json.loads((job.folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return None if conflict(job) else found


def conflict(job: Job) -> str:
    """What tells the run in a job's folder from the job; nothing if it is it.

    A run of another recipe or length is no part of the sweep, and is not to be
    taken for one.
    """
    found = runs.settings_of(job.folder)
    if found is None:
        return ""
    for name in (*runs.NAMING_SETTINGS, *runs.FIXED_SETTINGS, "epochs"):
        if found.get(name) != job.settings[name]:
            return (
                f"{job.folder} holds a run of {name}={found.get(name)}, and "
                f"{name}={job.settings[name]} is asked for. Give another "
                "--runs_dir, or delete the folder."
            )
    if "lengths" in found:
        return (
            f"{job.folder} holds a run whose --epochs was changed on the way: "
            f"{found['lengths']}. Give another --runs_dir, or delete the "
            "folder."
        )
    if job.settings["test"] and found.get("test_error", 0) is None:
        return (
            f"{job.folder} holds a run of --notest, which did not look at the "
            "test images. Give another --runs_dir, or delete the folder."
        )
    return ""


def run(jobs: Sequence[Job]) -> dict[str, Failure]:
    """Does all jobs that no other process is at or has done.

    It ends early where a second job fails for the very reason of a first one:
    the others would, too.

    Returns:
        The jobs that failed, by their names.
    """
    # A kill, too, is to end the run that is under way, and not orphan it.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(jobs)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(jobs: Sequence[Job]) -> dict[str, Failure]:
    failed: dict[str, Failure] = {}

    def missing() -> list[Job]:
        left = (job for job in jobs if job.name not in failed)
        return [job for job in left if result(job) is None]

    def free() -> list[Job]:
        return [job for job in missing() if not runs.is_held(job.folder)]

    print(
        f"{len(jobs) - len(missing())} of {len(jobs)} runs are finished "
        "already.",
        flush=True,
    )
    # Again where another process has left a run that it was at.
    while turn := free():
        for job in turn:
            if result(job) is not None or runs.is_held(job.folder):
                continue
            failure = _do(job, jobs, failed)
            if failure is None:
                continue
            again = failure in failed.values()
            failed[job.name] = failure
            print(f"{job.name}: failed. {failure.reason}", flush=True)
            if again:
                return failed
    if held := missing():
        print(f"Other processes are at {', '.join(job.name for job in held)}.")
    elif not failed:
        print(f"All {len(jobs)} runs are finished.")
    return failed


def _do(
    job: Job, jobs: Sequence[Job], failed: dict[str, Failure]
) -> Failure | None:
    """Does one job; returns why it failed, if it did."""
    other = conflict(job)
    if other:
        return Failure(other, diverged=False)
    place = f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}"
    seen = len(_rows(job))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *job.arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                rows = _rows(job)
                if len(rows) > seen:
                    seen = len(rows)
                    print(
                        f"{place}: {_progress(job, jobs, failed)}", flush=True
                    )
        finally:
            process.terminate()
            process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
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
    row = _rows(job)[-1]
    left = seconds_left([job for job in jobs if job.name not in failed])
    return (
        f"epoch {int(row['epoch'])} of {job.epochs}, validation error "
        f"{main.error(row['val_accuracy']):.2f} %, {row['seconds']:.0f} s an "
        f"epoch; {_duration(left)} left"
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

    An epoch takes as long as those of its kind have taken (where there is
    none yet: as all have on average); processes share what is left.
    """
    times: dict[tuple[str, ...], list[float]] = {}
    left: dict[tuple[str, ...], int] = {}
    workers = 0
    for job in jobs:
        rows = _rows(job)
        times.setdefault(job.kind, []).extend(row["seconds"] for row in rows)
        if result(job) is None:
            epochs = max(job.epochs - len(rows), 0)
            left[job.kind] = left.get(job.kind, 0) + epochs
            workers += runs.is_held(job.folder)
    medians = {kind: statistics.median(t) for kind, t in times.items() if t}
    if not medians:
        return float("nan")
    typical = statistics.mean(medians.values())
    total = sum(n * medians.get(kind, typical) for kind, n in left.items())
    return total / max(workers, 1)


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "an unknown time"
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


def _rows(job: Job) -> list[dict[str, float]]:
    """The whole rows of a history; the last one may be half-written."""
    try:
        with (job.folder / "history.csv").open(newline="") as file:
            return [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)
                if row["val_accuracy"] and row["examples_per_second"]
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
