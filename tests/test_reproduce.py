"""A column of the table from one command, and the search of its recipes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import keras
import main
import numpy as np
import pytest
import report
import reproduce
import search
from backends import array
from backends import long_on_jax
from backends import requires_tensorflow

from experiment import commandline
from experiment import datasets
from experiment import model as models
from experiment import networks
from experiment import run as experiment_run
from experiment import settings
from experiment.datasets import arrays
from experiment.errors import Busy
from experiment.errors import UserError
from experiment.runfolder import lock
from experiment.table import columns
from experiment.table import figures
from experiment.table import sweep
from experiment.table.grid import Grid
from keras_fa.layers.direct import SendError
from keras_fa.methods import METHODS

pytestmark = pytest.mark.usefixtures("optimized_graphs")

ROOT = Path(__file__).resolve().parents[1]
HALF = "--dtype_policy=mixed_bfloat16"
BEYOND = columns.COLUMNS["mnist"].methods[len(columns.ROWS) :]


def begin(program, *arguments):
    """A program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train" / program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def config_of(*arguments):
    commandline.parse(settings.FLAGS, ["main.py", *arguments])
    return settings.given()


@pytest.fixture
def forked(monkeypatch):
    """The runs of sweeps are forks."""
    monkeypatch.setattr(sweep.subprocess, "Popen", forks.Fork)


# From end to end.


# A sweep in a process of its own; its runs are forks of it.
SWEEP = """
import os, sys
import forks, reproduce
from experiment.table import sweep
sweep.subprocess.Popen = forks.OwnFork
sys.exit(reproduce.run(["reproduce.py", *sys.argv[1:]]))
"""


@pytest.mark.slow
@long_on_jax
@pytest.mark.usefixtures("forked")
def test_reproduction(tmp_path, capfd, monkeypatch):
    """Two methods, at once and in pieces: one table."""
    column = ["--column=digits", "--methods=bp,fa_usf_sn", "--seeds=1"]
    column += ["--epochs=2", "--batch_size=128"]
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)  # an epoch is short
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    at_once = ["reproduce.py", *column, f"--runs_dir={whole}"]
    assert reproduce.run(at_once) == 0
    output, _ = capfd.readouterr()
    assert "0 of 2 runs are finished already." in output
    assert output.rstrip().endswith("All 2 runs are finished.")
    epoch = re.compile(
        r"\[1/2\] digits bp seed 0: epoch [12] of 2, validation error "
        r"\d+\.\d\d %, \d+ s an epoch; .+ left"
    )
    assert epoch.search(output), output

    # Killed with all it has started, as soon as an epoch is on the disk.
    in_pieces = [*column, f"--runs_dir={pieces}"]
    command = [sys.executable, "-c", SWEEP, *in_pieces]
    killed = forks.Fork(command, group=True)
    first = pieces / "digits-digits-bp-s0"
    while not (first / "model.keras").exists() and killed.poll() is None:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (first / "result.json").exists()
    # Continued by two processes, which do not get into each other's way.
    with (tmp_path / "log").open("w+") as log:
        other = forks.Fork(command, stdout=log, stderr=log, group=True)
        assert reproduce.run(["reproduce.py", *in_pieces]) == 0
        assert other.wait(600) == 0
    output = (tmp_path / "log").read_text() + capfd.readouterr().out
    ended = set(re.findall(r"\] (.+): test error", output))
    assert ended == {"digits bp seed 0", "digits fa_usf_sn seed 0"}

    tables = []
    for folder in (whole, pieces):
        with monkeypatch.context() as patch:
            if folder is whole:
                patch.setattr(figures, "FIGURES", {})
            assert report.run(["report.py", str(folder)]) == 0
        tables.append((folder / "report" / "table.md").read_text())
        assert tables[-1].strip() in capfd.readouterr().out
    for name in ("errors", "learning_curves", "angles"):
        for suffix in ("png", "svg"):
            figure = f"digits-digits-{name}.{suffix}"
            assert (pieces / "report" / figure).stat().st_size > 5000
    assert tables[0] == tables[1]
    assert tables[0].count("(n=1)") == 2
    assert reproduce.run(at_once) == 0
    again, _ = capfd.readouterr()
    assert "2 of 2 runs are finished already." in again
    assert "epoch" not in again


# The parts.


def test_one_process_at_a_run(tmp_path):
    folder = tmp_path / "runs" / "run"
    assert not lock.is_held(folder)
    with lock.held(folder) as make:
        assert not folder.exists()
        make()
        assert lock.is_held(folder)
        with pytest.raises(Busy, match="another process"), lock.held(folder):
            pass
    assert not lock.is_held(folder)
    # One that began where there was no folder, and comes second.
    other = tmp_path / "runs" / "other"
    with lock.held(other) as make, lock.held(other) as make_again:
        make()
        with pytest.raises(Busy, match="another process"):
            make_again()


def test_run_that_another_process_is_at(tmp_path, capfd):
    arguments = ["main.py", "--epochs=1", f"--runs_dir={tmp_path}", "--resume"]
    with lock.held(tmp_path / "digits-digits-fa_usf_sn-s0") as make:
        make()
        assert main.run(arguments) == 1
        assert "another process is training" in capfd.readouterr().err
    assert main.run(arguments) == 0


@pytest.fixture
def job(tmp_path):
    """A job of three epochs with a history, and a result if it is finished."""

    def make(method, epochs=0, seconds=10.0, finished=False):
        seed = len(list(tmp_path.iterdir()))
        job = sweep.job(
            f"{method} {seed}",
            [
                f"--method={method}",
                f"--seed={seed}",
                "--epochs=3",
                f"--runs_dir={tmp_path}",
            ],
        )
        job.folder.mkdir()
        rows = "".join(f"{i + 1},0.5,{seconds},100\n" for i in range(epochs))
        (job.folder / "history.csv").write_text(
            "epoch,val_accuracy,seconds,examples_per_second\n" + rows
        )
        if finished:
            write_result(job)
        return job

    return make


def write_result(job, **changes):
    result = {**job.settings, "test_error": 1.0, **changes}
    (job.folder / "result.json").write_text(json.dumps(result))


def test_time_left(job):
    assert np.isnan(sweep.seconds_left([job("fa")]))
    done = job("fa", 3, seconds=10, finished=True)
    assert sweep.seconds_left([done]) == 0
    begun = job("dfa", 1, seconds=20)
    assert sweep.seconds_left([done, begun, job("fa")]) == 2 * 20 + 3 * 10
    # A kind without an epoch takes the average of the kinds.
    assert sweep.seconds_left([done, begun, job("bp")]) == 2 * 20 + 3 * 15
    with lock.held(done.folder), lock.held(begun.folder):
        unlike = job("bp")
        with lock.held(unlike.folder):  # two are at unfinished runs
            jobs = [done, begun, unlike]
            assert sweep.seconds_left(jobs) == (2 * 20 + 3 * 15) / 2


def test_half_a_row_is_not_an_epoch(job):
    begun = job("fa", 2)
    with (begun.folder / "history.csv").open("a") as file:
        file.write("3,0.5,1")
    assert sweep.seconds_left([begun]) == 10


def test_job_is_finished_by_its_own_recipe_alone(job):
    finished = job("fa", 3, finished=True)
    assert sweep.result(finished)["test_error"] == 1.0
    for changes, says in (
        ({"epochs": 4}, "epochs=4, and epochs=3"),
        ({"epochs": 2}, "epochs=2, and epochs=3"),
        ({"dropout": 0.5}, "dropout=0.5, and dropout=0.0"),
        ({"optimizer": "sgd"}, "optimizer=sgd, and optimizer=adam"),
        ({"lengths": [2, 3]}, r"changed on the way: \[2, 3\]"),
        ({"test_error": None}, "--notest"),
    ):
        write_result(finished, **changes)
        assert sweep.result(finished) is None
        assert re.search(says, sweep.conflict(finished))
    (finished.folder / "result.json").write_text('{"epo')
    assert sweep.result(finished) is None
    assert not sweep.conflict(finished)


def test_job_is_finished_by_a_run_that_is_older_than_a_setting(job):
    finished = job("fa", 3, finished=True)
    file = finished.folder / "result.json"
    result = json.loads(file.read_text())
    for name in ("normalization", "label_smoothing", "image_size"):
        del result[name]
    file.write_text(json.dumps(result))
    assert sweep.result(finished) == result
    batch = {**finished.settings, "normalization": "batch"}
    other = finished._replace(settings=batch)
    assert sweep.result(other) is None
    assert "normalization=none, and normalization=batch" in sweep.conflict(
        other
    )


@requires_tensorflow  # a run of one backend is none of the other's
@pytest.mark.parametrize(
    ("folder", "column", "methods", "arguments", "least"),
    [
        ("mnist", "mnist", columns.ROWS, "", 9),
        ("mnist", "mnist", BEYOND, HALF, 8),
        ("cifar10_1", "cifar10_1", None, HALF, 12),
        (
            "cifar10_1_muon",
            "cifar10_1",
            None,
            f"{HALF} --optimizer=muon --learning_rate=0.003 --weight_decay=0.1",
            4,
        ),
        (
            "cifar10_1_15_epochs",
            "cifar10_1",
            None,
            f"{HALF} --epochs=15",
            20,
        ),
        ("digits_lstm", "digits_lstm", None, "", 19),
    ],
)
def test_committed_results_are_finished_jobs(
    folder, column, methods, arguments, least
):
    """Of seed 0; their recipes are those of the column's flag files."""
    methods = methods or columns.COLUMNS[column].methods
    chosen = f"--methods={','.join(methods)}"
    commandline.parse(
        reproduce.FLAGS,
        ["reproduce.py", f"--column={column}", "--seeds=1", chosen],
    )
    runs_dir = f"--runs_dir={ROOT / 'train/results' / folder}"
    wanted = reproduce.jobs([runs_dir, *arguments.split()])
    assert not [text for text in map(sweep.conflict, wanted) if text]
    assert sum(sweep.result(job) is not None for job in wanted) >= least


def test_another_recipe_is_not_overwritten(job, capsys, monkeypatch):
    other, wanted = job("fa", 3, finished=True), job("fa")
    write_result(other, dropout=0.5)

    class Begun(Exception):
        pass

    def popen(command, **kwargs):
        raise Begun(*command)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    with pytest.raises(Begun, match=f"--seed={wanted.settings['seed']}"):
        sweep.run([other, wanted])
    output = capsys.readouterr().out
    assert f"{other.name}: failed. " in output
    assert "dropout=0.5, and dropout=0.0" in output


@pytest.mark.slow
def test_length_that_changed_on_the_way_is_told(tmp_path, capfd):
    """Not the schedule of one piece: the report must not average it so."""
    command = ["main.py", f"--runs_dir={tmp_path}", "--method=bp", "--resume"]
    assert main.run([*command, "--epochs=1"]) == 0
    (file,) = tmp_path.rglob("result.json")
    assert "lengths" not in json.loads(file.read_text())
    assert main.run([*command, "--epochs=2"]) == 0
    assert json.loads(file.read_text())["lengths"] == [1, 2]
    assert main.run([*command, "--epochs=3"]) == 0
    assert json.loads(file.read_text())["lengths"] == [1, 2, 3]


def test_run_that_was_told_to_stop_is_not_finished(job, capsys, monkeypatch):
    """SIGTERM ends it with status 0; it is then gone on with."""
    wanted = job("fa")
    begun = []

    class Process:
        returncode = 0
        poll = terminate = wait = lambda self: 0

        def __init__(self, command, **kwargs):
            begun.append(command)
            if len(begun) == 2:
                write_result(wanted)

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    assert sweep.run([wanted]) == {}
    assert len(begun) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[1:3] == [
        f"[1/1] {wanted.name}: stopped before its end",
        f"[1/1] {wanted.name}: test error 1.00 %",
    ]


@pytest.fixture
def begun(monkeypatch):
    """The seeds of the runs that a sweep begins, which end at once."""
    seeds = []

    class Process:
        returncode = 0
        poll = terminate = wait = lambda self: 0

        def __init__(self, command, **kwargs):
            commandline.parse(settings.FLAGS, command[1:])
            config = settings.given()
            seeds.append(config.seed)
            folder = experiment_run.run_folder(config)
            folder.mkdir(exist_ok=True)
            result = {**vars(config), "test_error": 1.0}
            (folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    return seeds


def as_seed(job, seed):
    """A job whose place in the order is that of another seed."""
    return job._replace(settings={**job.settings, "seed": seed})


def test_cheapest_run_comes_first(job, begun):
    slow, fast = job("dfa", 3, 20, finished=True), job("fa", 3, 10, True)
    jobs = [
        slow,
        fast,
        job("dfa"),  # 60 seconds
        job("bp"),  # unknown: as the others on average, 45 seconds
        job("fa", 1),  # 20 seconds
        job("fa"),  # 30 seconds
        job("dfa", 2, 20),  # 20 seconds; of equals the first comes first
    ]
    assert [sweep.seconds_of(job, sweep.paces(jobs)) for job in jobs[2:]] == [
        60, 45, 20, 30, 20
    ]  # fmt: skip
    order = []
    todo = [as_seed(job, 0) for job in jobs[2:]]
    while todo:
        todo.remove(chosen := sweep._next(todo, jobs, math.inf))
        order.append([job.folder for job in jobs].index(chosen.folder))
    assert order == [4, 6, 5, 3, 2]
    # The first seed of all methods, though it takes longer.
    first, second = as_seed(jobs[2], 0), as_seed(jobs[4], 1)
    assert sweep._next([second, first], jobs, math.inf) == first
    assert sweep.run(jobs[2:]) == {}
    assert begun == [2, 3, 4, 5, 6]


def test_order_while_no_time_is_known(job, begun):
    jobs = [job("dfa"), job("bp"), job("fa")]
    assert [sweep._next(jobs[n:], jobs, math.inf) for n in range(3)] == jobs


def test_no_run_is_begun_that_cannot_be_finished(job, begun, capsys):
    slow, fast = job("dfa", 3, 3000, finished=True), job("fa", 3, 1000, True)
    jobs = [slow, fast, job("dfa"), job("fa"), job("dfa", 2, 3000)]
    assert sweep.run(jobs, time.monotonic() + 3600) == {}
    assert begun == [3, 4]
    output = capsys.readouterr().out
    left = f"Not enough time is left for {jobs[2].name} (about 2 h 30 min)."
    assert output.rstrip().endswith(left)
    assert "All" not in output
    begun.clear()
    assert sweep.run(jobs, time.monotonic() + 9100) == {}
    assert begun == [2]
    assert "All 5 runs are finished." in capsys.readouterr().out


def test_deadline_without_a_known_time(job, begun, capsys):
    """A run may be begun that might be finished, and none after the hour."""
    jobs = [job("dfa"), job("fa")]
    assert sweep.run(jobs, time.monotonic() - 1) == {}
    assert begun == []
    output = capsys.readouterr().out
    assert f"{jobs[0].name} (an unknown time), {jobs[1].name}" in output
    assert sweep.run(jobs, time.monotonic() + 3600) == {}
    assert begun == [0, 1]


def test_runs_that_are_finished_elsewhere(tmp_path, monkeypatch, begun, capsys):
    """They count, and are left as they are; another recipe does not count."""
    monkeypatch.chdir(tmp_path)
    done, work = tmp_path / "done", tmp_path / "work"
    work.mkdir()
    column = ["reproduce.py", "--column=digits", "--methods=bp", "--seeds=3"]
    here, there = [f"--runs_dir={folder}" for folder in (work, done)]

    def jobs(*arguments):
        commandline.parse(reproduce.FLAGS, [*column, *arguments[1:]])
        return reproduce.jobs([arguments[0], "--epochs=3"])

    for job, changes in zip(jobs(there), ({}, {"dropout": 0.5}, None)):
        job.folder.mkdir(parents=True)
        rows = "".join(f"{n},0.5,1000,100\n" for n in (1, 2, 3))
        (job.folder / "history.csv").write_text(
            "epoch,val_accuracy,seconds,examples_per_second\n" + rows
        )
        if changes is not None:
            write_result(job, **changes)
    files = {f: f.read_bytes() for f in done.rglob("*") if f.is_file()}
    command = [*column, here, "--epochs=3", f"--finished={done}"]
    # An epoch takes as long as it has taken there: none is begun.
    assert reproduce.run([*command, "--hours=0.5"]) == 0
    output = capsys.readouterr().out
    assert "1 of 3 runs are finished already." in output
    assert "dropout=0.5, and dropout=0.0 is asked for. It does not" in output
    assert "bp seed 1 (about 50 min), digits bp seed 2 (about" in output
    assert begun == []
    assert reproduce.run([*command, "--hours=1"]) == 0
    assert begun == [1, 2]
    assert "All 3 runs are finished." in capsys.readouterr().out
    assert files == {f: f.read_bytes() for f in done.rglob("*") if f.is_file()}
    # Where this machine has measured a kind itself, that is what counts.
    mine, *_ = jobs(here, f"--finished={done}")
    mine.folder.mkdir()
    (mine.folder / "history.csv").write_text(
        "epoch,val_accuracy,seconds,examples_per_second\n1,0.5,7,100\n"
    )
    assert sweep.paces([mine]) == {mine.kind: 7}


@pytest.mark.slow
def test_kill_ends_the_run_under_way(tmp_path):
    process = begin(
        "reproduce.py",
        "--column=digits",
        "--methods=bp",
        "--seeds=1",
        "--epochs=100000",
        f"--runs_dir={tmp_path}",
    )
    folder = tmp_path / "digits-digits-bp-s0"
    while not lock.is_held(folder) and process.poll() is None:
        time.sleep(0.1)
    assert lock.is_held(folder)
    process.terminate()
    process.communicate(timeout=600)
    assert process.returncode == 143
    assert not lock.is_held(folder)


@pytest.mark.usefixtures("forked")
def test_failed_run_is_named_and_the_others_go_on(tmp_path, capfd):
    column = ["reproduce.py", "--column=digits", "--seeds=1", "--epochs=1"]
    column += ["--methods=bp,fa", f"--runs_dir={tmp_path}"]
    broken = tmp_path / "digits-digits-bp-s0"
    broken.mkdir()
    (broken / "model.keras").write_bytes(b"torn")
    assert reproduce.run(column) == 1
    output, errors = capfd.readouterr()
    assert "digits bp seed 0: failed. " in output
    assert re.fullmatch(r"reproduce\.py: 1 run\(s\) failed: .+\n", errors)
    assert "is damaged" in errors
    assert (tmp_path / "digits-digits-fa-s0" / "result.json").exists()


@pytest.mark.parametrize(
    ("reasons", "begun"),
    [
        (["--method=bp: no such rule", "exit status -9", "{}: damaged"], 3),
        (["--data_dir=x: no such folder"], 1),
        (["exit status -9", "exit status -9"], 2),
    ],
)
def test_what_is_not_one_runs_fault_ends_all(
    reasons, begun, tmp_path, monkeypatch
):
    where = f"--runs_dir={tmp_path}"
    jobs = [
        sweep.job(name, [*columns.cell("digits", name), where])
        for name in ("bp", "fa", "dfa")
    ]
    left = iter(reasons)

    def fail(job, *_):
        return sweep.Failure(next(left).format(job.folder), diverged=False)

    monkeypatch.setattr(sweep, "_do", fail)
    assert len(sweep.run(jobs)) == begun


@pytest.mark.usefixtures("forked")
def test_without_data_one_run_says_so_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    begun = []
    monkeypatch.setattr(
        sweep.subprocess,
        "Popen",
        lambda *a, **k: begun.append(a) or forks.Fork(*a, **k),
    )
    for program in (search, reproduce):
        name = f"{program.__name__}.py"
        command = [name, "--column=mnist", "--methods=bp,fa"]
        if program is reproduce:
            assert search.run(["search.py", *command[1:], "--nosearch"]) == 0
        where = [f"--data_dir={tmp_path / 'none'}"]
        where += [f"--runs_dir={tmp_path / 'runs'}"]
        begun.clear()
        capfd.readouterr()
        assert program.run([*command, *where]) == 1
        output, errors = capfd.readouterr()
        assert len(begun) == 1
        assert re.fullmatch(rf"{name}: 1 run\(s\) failed: .+\n", errors)
        assert (output + errors).count("no such folder") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "column"),
        ("--column=svhn", "cifar10_1"),
        ("--column=digits --methods=fa,nonsense", "Allowed: bp, "),
        ("--column=digits --methods=bp,FA", "FA: no such name (did you mean"),
        ("--column=digits --seeds=0", "seeds"),
        ("--column=digits --method=fa", "cannot be given here"),
        ("--column=digits --flagfile=digits_bp.flags", "cannot be given here"),
        ("--column=digits --dataset=mnist", "cannot be given here"),
        ("--column=digits --epoch=3", "epochs"),
        ("--column=digits --epochs=none", "1 to 100000"),
        ("--column=digits extra", "extra"),
        ("--column=digits --hours=0", "above 0"),
        ("--column=digits --hours=nan", "above 0"),
        ("--column=digits --hours=soon", "hours"),
        ("--column=digits --finished=nowhere", "no such folder"),
    ],
)
def test_bad_input(arguments, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    own = ("--seeds", "--hours", "--finished")
    for program in (reproduce, search):
        if program is search and any(flag in arguments for flag in own):
            continue
        name = f"{program.__name__}.py"
        assert program.run([name, *arguments.split()]) in (1, 2)
        output, errors = capfd.readouterr()
        assert re.fullmatch(rf"{name}: .+\n", errors), errors
        assert says in errors
        assert output == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", columns.COLUMNS)
def test_every_cell_has_its_command(column):
    for method in columns.COLUMNS[column].methods:
        config = config_of(*columns.cell(column, method), "--seed=0")
        settings.check(config)
        assert (config.dataset, config.model, config.method) == (
            *columns.COLUMNS[column][:2],
            method,
        )
        assert config.alignment_every == 1
        text = columns.file_of(column, method).read_text("utf-8")
        given = [line for line in text.splitlines() if line[:2] == "--"]
        assert f"--method={method}" in given
        # A search is over what the column leaves open, and may go beyond.
        recipe = columns.unsearched(column, method)
        assert {*map(columns.name, recipe)} <= {*map(columns.name, given)}
        if column == "digits" and "# Searched" not in text:
            assert given == recipe
    with pytest.raises(UserError, match="has no recipe"):
        columns.cell(column, "nonsense")


def test_flag_files_without_a_search(tmp_path, monkeypatch, capfd):
    """Those that are missing; what is there stays as it is."""
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    own = tmp_path / "digits_fa.flags"
    own.write_text("--method=fa\n")
    arguments = ["search.py", "--column=digits", "--nosearch"]
    assert search.run(arguments) == 0
    assert len(capfd.readouterr().out.splitlines()) == len(METHODS) - 1
    assert own.read_text() == "--method=fa\n"
    written = tmp_path / "digits_dfa.flags"
    assert written.read_text().startswith(
        "# DFA, column digits.\n# Not searched"
    )
    config = config_of(f"--flagfile={written}")
    assert (config.method, config.model, config.epochs) == ("dfa", "digits", 30)
    assert search.run(arguments) == 0
    assert capfd.readouterr().out == ""


def test_first_seeds_come_first():
    commandline.parse(
        reproduce.FLAGS,
        ["reproduce.py", "--column=digits", "--methods=fa,bp", "--seeds=2"],
    )
    names = [job.folder.name for job in reproduce.jobs(["--runs_dir=x"])]
    assert names == [
        f"digits-digits-{method}-s{seed}"
        for seed in (0, 1)
        for method in ("fa", "bp")
    ]


# The search.


@pytest.mark.usefixtures("forked")
def test_search(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    arguments = ["search.py", "--column=digits", "--methods=fa", "--epochs=1"]
    arguments += [f"--runs_dir={tmp_path / 'runs'}", "--write"]
    assert search.run(arguments) == 0
    output, _ = capfd.readouterr()
    results = {}
    for file in tmp_path.rglob("result.json"):
        result = json.loads(file.read_text())
        assert result["test_error"] is None
        results[f"--kernel_scale={result['kernel_scale']:g}"] = result
    grid = ["--kernel_scale=1", "--kernel_scale=0.1"]
    assert set(results) == set(grid)
    errors = {
        point: result["validation_error"] for point, result in results.items()
    }
    best = min(grid, key=errors.get)
    assert f"**{errors[best]:.2f}**" in output
    written = tmp_path / "digits_fa.flags"
    config = config_of(f"--flagfile={written}")
    assert config.method == "fa"
    assert config.kernel_scale == results[best]["kernel_scale"]
    assert config.test
    assert f"{errors[best]:.2f} %" in written.read_text()


@pytest.mark.usefixtures("forked")
def test_a_run_that_is_left_is_gone_on_with(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)
    arguments = [*columns.unsearched("digits", "bp"), "--epochs=40", "--notest"]
    job = sweep.job("bp", [*arguments, f"--runs_dir={tmp_path}"])
    assert sweep.run([job._replace(until=2)]) == {}
    rows = sweep.rows_of(job.folder)
    assert 2 <= len(rows) < 40
    assert sweep.result(job) is None
    assert "All 1 runs are finished." in capfd.readouterr().out
    assert sweep.run([job._replace(until=2)]) == {}  # is done already
    assert sweep.rows_of(job.folder) == rows
    assert sweep.is_done(job._replace(until=2))
    assert not sweep.is_done(job)
    other = sweep.job("bp", [*job.arguments, "--dropout=0.5"])
    assert not sweep.is_done(other._replace(until=2))
    assert sweep.run([job._replace(until=len(rows) + 1)]) == {}
    assert sweep.rows_of(job.folder)[: len(rows)] == rows


def test_halving_gives_up_what_does_worst(tmp_path, monkeypatch, capfd):
    """As many runs as are left after 1, 2 and 4 of 5 epochs."""
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    # Validation accuracy by epoch; the fourth point diverges.
    accuracies = {
        "--dropout=0.1": [0.5, 0.6, 0.7, 0.8, 0.8],
        "--dropout=0.2": [0.4, 0.7, 0.7, 0.7, 0.9],
        "--dropout=0.3": [0.3, 0.9, 0.9, 0.9, 0.9],
        "--dropout=0.4": [],
        "--dropout=0.5": [0.2, 0.9, 0.9, 0.9, 0.9],
    }
    stages = []

    def run(jobs):
        stages.append((jobs[0].until, len(jobs)))
        failed = {}
        for job in jobs:
            rate = accuracies[f"--dropout={job.settings['dropout']}"]
            if not rate:
                failed[job.name] = sweep.Failure("NaN", diverged=True)
                continue
            job.folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(f"{1 - 1 / 3},{a},1\n" for a in rate[: job.until])
            (job.folder / "history.csv").write_text(
                f"loss,val_accuracy,examples_per_second\n{rows}"
            )
        return failed

    def result(job):
        rows = sweep.rows_of(job.folder)
        if len(rows) < 5:
            return None
        last = 100 * (1 - rows[-1]["val_accuracy"])
        return {"validation_error": last, "epochs": 5, "seed": 0}

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "result", result)
    arguments = ["search.py", "--column=digits", "--methods=fa", "--halving"]
    arguments += ["--epochs=5", "--write", f"--runs_dir={tmp_path / 'runs'}"]
    arguments += [f"--point={point}" for point in accuracies]
    assert search.run(arguments) == 0
    assert stages == [(1, 5), (2, 2), (None, 1)]
    output, _ = capfd.readouterr()
    line = r"fa +\| 40\.00 after 2 +\| \*\*10\.00\*\* +\| 70\.00 after 1 +\| - "
    assert re.search(line, output), output
    written = (tmp_path / "digits_fa.flags").read_text()
    assert "# Given up after 2 epoch(s) (40.00 %): --dropout=0.1" in written
    assert "# Diverged: --dropout=0.4" in written
    assert written.endswith("--dropout=0.2\n")


def test_unfinished_search_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    grid = ["--dropout=0", "--dropout=0.1", "--dropout=0.2"]
    points = [f"--point={point}" for point in grid]
    commandline.parse(
        search.FLAGS, ["search.py", "--column=digits", "--methods=fa", *points]
    )
    results = {
        ("fa", point): {"validation_error": error}
        for point, error in zip(grid, (1.5, 1.0, 1.0))
    }
    tried = Grid("digits", ["fa"], grid, tmp_path, results=results)
    assert tried.choose("fa") == grid[1]
    tried.results = dict.fromkeys(results)
    with pytest.raises(UserError, match="every --point diverged"):
        tried.write("fa")
    jobs_done = []
    monkeypatch.setattr(sweep, "run", lambda jobs: jobs_done.extend(jobs) or {})
    search.FLAGS.write = True
    with pytest.raises(UserError, match="3 runs are missing"):
        search.search(["--epochs=1", f"--runs_dir={tmp_path}"])
    assert len(jobs_done) == 3
    assert not list(tmp_path.iterdir())


def test_search_never_looks_at_the_test_images(tmp_path, monkeypatch, capfd):
    looks = ["main.py", "--epochs=1", f"--runs_dir={tmp_path}"]
    digits = datasets.DATASETS["digits"]

    def without_test(config):
        found = digits.open(config)
        found._splits = found._splits._replace(test=None)
        return found

    monkeypatch.setitem(
        datasets.DATASETS, "digits", digits._replace(open=without_test)
    )
    assert main.run([*looks, "--notest"]) == 0
    assert "were not looked at" in capfd.readouterr().out
    with pytest.raises(AttributeError):  # there are none
        main.run([*looks, "--seed=1"])


@pytest.mark.parametrize(
    "argument",
    [
        "--optimizer=sgd",
        "--dropout=0.1",
        "--notest",
        "--seed=3",
        "--point=--method=bp",
        "--point=--kernel_scale=1 --epochs=3",
    ],
)
def test_recipe_of_a_search_is_its_points(argument, tmp_path, capfd):
    arguments = ["search.py", "--column=digits", "--methods=fa", "--epochs=1"]
    arguments += [f"--runs_dir={tmp_path / 'runs'}", argument]
    assert search.run(arguments) == 1
    output, errors = capfd.readouterr()
    assert re.fullmatch(r"search\.py: .+ cannot be given here\. .+\n", errors)
    assert output == ""
    assert not list(tmp_path.iterdir())


def test_diverged_point_is_left_out_and_another_failure_is_not(
    monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    good, bad = "--kernel_scale=1", "--kernel_scale=0.1"
    arguments = ["search.py", "--column=digits", "--methods=fa", "--write"]
    arguments += [f"--point={good}", f"--point={bad}"]

    def result(job):
        wanted = job.settings["kernel_scale"] == 1
        found = {"validation_error": 3.0, "epochs": 1, "seed": 0}
        return found if wanted else None

    monkeypatch.setattr(sweep, "result", result)
    for diverged in (False, True):
        failure = sweep.Failure("it broke", diverged)
        monkeypatch.setattr(
            sweep, "run", lambda jobs, f=failure: {jobs[1].name: f}
        )
        assert search.run(arguments) == (0 if diverged else 1)
        output, errors = capfd.readouterr()
        assert ("it broke" in errors) is not diverged
        assert (tmp_path / "digits_fa.flags").exists() is diverged
    assert re.search(r"\| fa +\| \*\*3\.00\*\* +\| - +\|", output)
    written = (tmp_path / "digits_fa.flags").read_text()
    assert f"# Diverged: {bad}" in written


# The recipes' flags.


@pytest.mark.parametrize("network", ["digits", "cifar10_2", "resnet20"])
def test_kernel_scale(network):
    built = {}
    for scale in (1.0, 0.25):
        keras.utils.set_random_seed(3)
        built[scale] = networks.build(network, 10, kernel_scale=scale)
    for layer, smaller in zip(built[1.0].layers, built[0.25].layers):
        factor = 0.25 if hasattr(layer, "kernel") else 1.0
        for one, other in zip(layer.weights, smaller.weights):
            assert np.array_equal(factor * array(one), array(other))
    assert np.abs(array(built[0.25].weights[0])).max() > 0


def test_dropout():
    model = networks.build("mnist", 10, dropout=0.3)
    *_, drop, readout = model.layers
    assert isinstance(drop, keras.layers.Dropout)
    assert (drop.rate, readout.name) == (0.3, "fc2")
    assert "dropout" not in [x.name for x in networks.build("mnist", 10).layers]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_weight_decay(optimizer):
    """Decoupled from the gradients, which are zero here; of kernels alone."""
    config = config_of(
        "--weight_decay=0.5",
        "--learning_rate=0.1",
        "--normalization=batch",
        f"--optimizer={optimizer}",
        "--warmup_epochs=0",
    )
    model = models.build(config)
    models.compile_model(model, config, steps_per_epoch=5)
    weights = model.trainable_variables
    assert {v.name for v in weights} == {"kernel", "bias", "gamma", "beta"}
    for weight in weights:
        weight.assign(np.ones(weight.shape))
    zeros = [keras.ops.zeros(weight.shape) for weight in weights]
    model.optimizer.apply(zeros, weights)
    for weight in weights:
        left = 1 - 0.1 * 0.5 if weight.name == "kernel" else 1.0
        assert np.allclose(array(weight), left), weight.path


@pytest.mark.parametrize(
    ("model", "method", "wanted"),
    [
        ("digits", "kolen_pollack", {"fc2/kernel", "fc2/kernel_feedback"}),
        ("digits_lstm", "fa", {"fc/kernel"}),
    ],
)
def test_the_readout_takes_steps_of_adam(model, method, wanted):
    """Its feedback, too, where it learns: else it would not follow."""
    config = config_of(
        "--optimizer=muon", f"--model={model}", f"--method={method}"
    )
    made = models.build(config)
    models.compile_model(made, config, steps_per_epoch=5)
    matrices = {
        variable.path
        for variable in made.trainable_variables
        if not made.optimizer._should_use_adamw(variable)
    }
    kernels = {
        variable.path
        for variable in made.trainable_variables
        if len(variable.shape) > 1
    }
    assert kernels - matrices == wanted


def stored(model, name):
    return array(model.get_layer(name).feedback_kernel)


@pytest.mark.parametrize("method", ["fa", "fa_usf_init", "kolen_pollack"])
def test_feedback_scale(method):
    """B_0 is `scale` times he_normal, whatever W_0 is, each layer its own."""
    model = models.build(
        config_of(
            f"--method={method}", "--feedback_scale=3", "--kernel_scale=0.1"
        )
    )
    for name in ("conv2", "fc1"):
        w, b = array(model.get_layer(name).kernel), stored(model, name)
        he_normal = np.sqrt(2 / np.prod(w.shape[:-1]))
        assert np.std(w) == pytest.approx(0.1 * he_normal, rel=0.05)
        assert np.std(b) == pytest.approx(3 * he_normal, rel=0.05)
        assert abs(np.corrcoef(w.ravel(), b.ravel())[0, 1]) < 0.05
    conv, dense = stored(model, "conv2").ravel(), stored(model, "fc1").ravel()
    n = min(len(conv), len(dense))
    assert abs(np.corrcoef(conv[:n], dense[:n])[0, 1]) < 0.05


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_feedback_scale_of_maps(method):
    def maps(*arguments):
        keras.utils.set_random_seed(0)
        model = models.build(config_of(f"--method={method}", *arguments))
        return [
            array(b)
            for layer in model.layers
            if isinstance(layer, SendError)
            for b in layer.maps
        ]

    pairs = list(zip(maps(), maps("--feedback_scale=0.5"), strict=True))
    assert pairs
    for whole, half in pairs:
        assert np.std(half) == pytest.approx(0.5 * np.std(whole), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--kernel_scale=0", "above 0"),
        ("--kernel_scale=nan", "above 0"),
        ("--feedback_scale=-1", "above 0"),
        ("--dropout=1", "below 1"),
        ("--dropout=-0.1", "below 1"),
        ("--dropout=0.5 --dataset=cifar10 --model=cifar10_2", "of its own"),
        ("--normalization=layer", "batch"),
        (
            "--normalization=batch --dataset=cifar10 --model=resnet20",
            "of its own",
        ),
        ("--feedback_scale=2 --method=fa_usf_sn", "--method=fa|"),
        ("--feedback_scale=2 --method=bp", "dfa|dense_fa"),
        ("--feedback_maps=sparse", "convolutional"),
        ("--feedback_maps=convolutional --method=fa", "--method=dfa|dense_fa"),
    ],
)
def test_bad_recipe(arguments, says, tmp_path, capfd):
    arguments = [f"--runs_dir={tmp_path / 'runs'}", *arguments.split()]
    assert main.run(["main.py", *arguments]) in (1, 2)
    output, errors = capfd.readouterr()
    assert re.fullmatch(r"main\.py: .+\n", errors), errors
    assert says in errors
    assert output == ""
    assert not list(tmp_path.iterdir())


def test_recipe_is_kept(tmp_path, capfd):
    """A run goes on with the recipe that it began with, or not at all."""
    begun = ["main.py", "--method=dfa", "--epochs=1", f"--runs_dir={tmp_path}"]
    recipe = ["--kernel_scale=0.5", "--feedback_scale=2", "--dropout=0.1"]
    recipe += ["--normalization=batch"]
    assert main.run([*begun, *recipe]) == 0
    (result,) = tmp_path.rglob("result.json")
    found = json.loads(result.read_text())
    assert (found["kernel_scale"], found["feedback_scale"]) == (0.5, 2.0)
    assert (found["dropout"], found["feedback_maps"]) == (0.1, "dense")
    assert found["normalization"] == "batch"
    for flag in recipe:
        others = [other for other in recipe if other != flag]
        changed = [*begun, *others, "--resume", "--epochs=2"]
        assert main.run(changed) == 1
        assert flag.partition("=")[0] in capfd.readouterr().err


def test_methods_that_draw_feedback():
    drawing = {name for name, method in METHODS.items() if models.draws(method)}
    assert drawing == {
        "fa", "fa_usf_init", "fa_usf_init_ei", "fa_usf_init_ei_silent",
        "dfa", "dense_fa", "drtp",
        "kolen_pollack", "weight_mirror", "symmetric_alignment",
        "activation_alignment", "information_alignment", "direct_kolen_pollack",
    }  # fmt: skip


def test_flag_file_says_each_thing_once(tmp_path, monkeypatch):
    monkeypatch.setattr(commandline, "FLAGFILES", tmp_path)
    point = "--optimizer=sgd --dropout=0"
    found = {"validation_error": 1.0, "epochs": 1, "seed": 0}
    results = {("dfa", point): found}
    Grid("mnist", ["dfa"], [point], tmp_path, results=results).write("dfa")
    lines = (tmp_path / "mnist_dfa.flags").read_text().splitlines()
    names = [columns.name(line) for line in lines if line.startswith("--")]
    assert len(names) == len(set(names))
    config = config_of(f"--flagfile={tmp_path / 'mnist_dfa.flags'}")
    assert (config.method, config.optimizer) == ("dfa", "sgd")
    assert (config.dropout, config.model) == (0.0, "mnist")


@pytest.mark.parametrize("method", ["dfa", "dense_fa"])
def test_rows_that_the_paper_leaves_open_for_memory(method):
    """All-CNN-C takes a step, and every kernel of it moves."""
    arguments = columns.cell("cifar10_2", method)
    model = models.build(config_of(*arguments, "--feedback_maps=convolutional"))
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,  # tracing takes longer than a step
    )
    kernels = [w for w in model.trainable_weights if w.name == "kernel"]
    before = [array(kernel) for kernel in kernels]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    loss = model.train_on_batch(images, np.arange(4))
    assert np.isfinite(loss)
    assert len(kernels) == 9
    for old, kernel in zip(before, kernels):
        assert not np.array_equal(old, array(kernel)), kernel.path


def test_maps_that_do_not_fit_say_what_does(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("keras_fa.conversion._machine_memory", lambda: 2**34)
    cifar10 = datasets.DATASETS["cifar10"]._replace(open=few_images)
    monkeypatch.setitem(datasets.DATASETS, "cifar10", cifar10)
    status = main.run(
        ["main.py", "--dataset=cifar10", "--model=cifar10_2", "--epochs=1",
         "--method=dense_fa", "--batch_size=8", f"--runs_dir={tmp_path}"]
    )  # fmt: skip
    output, errors = capfd.readouterr()
    assert (status, output) == (1, "")
    assert re.fullmatch(r"main\.py: --feedback_maps=dense: .+\n", errors)
    assert re.search(r"need [\d,]{12,} bytes", errors)
    assert re.search(r"feedback_maps='convolutional', which needs", errors)
    assert not list(tmp_path.iterdir())


def few_images(config):
    images = np.zeros((8, 32, 32, 3), np.uint8)
    split = arrays.Split(images, np.zeros(8, np.int64))
    return arrays.Arrays(arrays.Splits(split, split, split))


def test_frozen_kernels_are_parameters_of_the_network():
    """Cells of one network, whatever learns in it."""
    counts = {
        method: models.parameters(models.build(config_of(f"--method={method}")))
        for method in ("bp", "fa_usf_init_ei", "frozen", "dfa")
    }
    assert set(counts.values()) == {151306}
