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

PROGRAM = Path(main.__file__)
POLL_SECONDS = 1.0


class Job(NamedTuple):
    """A run of main.py that is wanted.

    Attributes:
        name: What it is called on the console.
        kind: Jobs of one kind take about equally long for an epoch.
        arguments: The command line of main.py.
        folder: The run's.
        epochs: Its length.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    folder: Path
    epochs: int


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
    return Job(
        name,
        f"{config.dataset} {config.model} {config.method}",
        arguments,
        main.run_folder(config),
        config.epochs,
    )


def result(job: Job) -> dict[str, Any] | None:
    """What a finished job has come to; `None` while it is not finished."""
    try:
        found = json.loads((job.folder / "result.json").read_text("utf-8"))
        return found if found["epochs"] >= job.epochs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(jobs: Sequence[Job]) -> dict[str, str]:
    """Does all jobs that no other process is at or has done.

    Returns:
        Why jobs failed, by their names.
    """
    # A kill, too, is to end the run that is under way, and not orphan it.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(jobs)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(jobs: Sequence[Job]) -> dict[str, str]:
    failed: dict[str, str] = {}
    done = sum(result(job) is not None for job in jobs)
    print(f"{done} of {len(jobs)} runs are finished already.", flush=True)
    for job in jobs:
        # Only now: another process may have done it meanwhile.
        if result(job) is not None or runs.is_held(job.folder):
            continue
        reason = _do(job, jobs)
        if reason:
            failed[job.name] = reason
            print(f"{job.name}: failed. {reason}", flush=True)
    missing = [
        job.name
        for job in jobs
        if result(job) is None and job.name not in failed
    ]
    if missing:
        print(f"Other processes are at {', '.join(missing)}.")
    elif not failed:
        print(f"All {len(jobs)} runs are finished.")
    return failed


def _do(job: Job, jobs: Sequence[Job]) -> str:
    """Does one job; returns why it failed, or nothing."""
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
                    print(f"{place}: {_progress(job, jobs)}", flush=True)
        finally:
            process.terminate()
            process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode == Busy.status:  # another process began it just now
        return ""
    if process.returncode:
        last = said[-1] if said else f"exit status {process.returncode}"
        return last.removeprefix(f"{PROGRAM.name}: ")
    print(f"{place}: {_summary(job)}", flush=True)
    return ""


def _progress(job: Job, jobs: Sequence[Job]) -> str:
    row = _rows(job)[-1]
    left = seconds_left(jobs)
    return (
        f"epoch {int(row['epoch'])} of {job.epochs}, validation error "
        f"{main.error(row['val_accuracy']):.2f} %, {row['seconds']:.0f} s an "
        f"epoch; {_duration(left)} left"
    )


def _summary(job: Job) -> str:
    found = result(job)
    if found["test_error"] is None:
        return f"validation error {found['validation_error']:.2f} %"
    return f"test error {found['test_error']:.2f} %"


def seconds_left(jobs: Sequence[Job]) -> float:
    """An estimate of the time until all jobs are finished.

    An epoch takes as long as those of its kind have taken (where there is
    none yet: as all have on average); processes share what is left.
    """
    times: dict[str, list[float]] = {}
    left: dict[str, int] = {}
    workers = 0
    for job in jobs:
        rows = _rows(job)
        times.setdefault(job.kind, []).extend(row["seconds"] for row in rows)
        if result(job) is None:
            epochs = job.epochs - len(rows)
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
