"""Runs that are stopped, killed or damaged, and what becomes of them."""

import csv
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import forks
import keras
import main
import numpy as np
import pytest
import small
from backends import long_on_jax
from backends import requires_tensorflow
from filelock import FileLock

from experiment import commandline
from experiment import files
from experiment import model as models
from experiment import networks
from experiment import settings
from experiment.errors import Diverged
from experiment.errors import Stopped
from experiment.errors import UserError
from experiment.runfolder import checkpoint
from experiment.runfolder import lock
from experiment.runfolder import writer
from experiment.runfolder.progress import Partial
from experiment.runfolder.progress import Progress
from experiment.runfolder.termination import Termination

pytestmark = pytest.mark.usefixtures("optimized_graphs")

NAME = "digits-digits-fa_usf_sn-s0"
# Ten steps an epoch, with random state.
COMMON = ("--epochs=3", "--batch_size=128", "--dropout=0.3")
EVERY_STEP = "--checkpoint_minutes=1e-9"


def begin(runs_dir, *arguments):
    """Runs the program in this process; returns its exit status."""
    return main.run(["main.py", f"--runs_dir={runs_dir}", *COMMON, *arguments])


def history(folder):
    """The rows without what a clock measured."""
    with (folder / "history.csv").open(newline="") as file:
        return [
            {n: v for n, v in row.items() if "second" not in n}
            for row in csv.DictReader(file)
        ]


def assert_same(folder, other):
    """All that is learned, to the bit: weights, optimizer, random state."""
    assert history(folder) == history(other)
    assert len(history(folder)) > 0
    models, states = [], []
    for path in (folder / "model.keras", other / "model.keras"):
        with zipfile.ZipFile(path) as archive:
            states.append(json.loads(archive.read("run.json"))["random_state"])
        model = keras.saving.load_model(path)
        models.append(model.weights + model.optimizer.variables)
    assert states[0] == states[1]
    assert states[0]
    assert len(models[0]) == len(models[1])
    for variable, other_variable in zip(*models):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable),
            keras.ops.convert_to_numpy(other_variable),
            err_msg=variable.path,
        )


def config_of(*arguments):
    commandline.parse(settings.FLAGS, ["main.py", *COMMON, *arguments])
    return vars(settings.given())


def terminate_at(monkeypatch, event, epoch, index=None, by=signal.SIGTERM):
    """Sends this process a signal at an event of the training."""
    unpatched = getattr(writer.RunWriter, event)

    def terminated(self, *arguments, **logs):
        if self.progress.epoch + 1 == epoch and index in (None, *arguments):
            os.kill(os.getpid(), by)
        unpatched(self, *arguments, **logs)

    monkeypatch.setattr(writer.RunWriter, event, terminated)


@pytest.fixture(scope="module", autouse=True)
def network():
    """A network of two layers in place of digits' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "digits", small.NETWORKS["digits"])
        yield


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C's signal is not ignored, as it is in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    runs_dir = tmp_path_factory.mktemp("whole")
    assert begin(runs_dir) == 0
    return runs_dir / NAME


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run that was left in epoch 2, after step 4; before, after epoch 1."""
    runs_dir = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        terminate_at(patch, "on_train_batch_end", 2, 3)
        assert begin(runs_dir) == 0
    return runs_dir / NAME


@pytest.fixture
def copy(left, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(left, tmp_path / "runs" / NAME))


# Stopped.


def test_saving_changes_nothing(whole, tmp_path, monkeypatch):
    saved = []
    replace = files.replace

    def counted(path, *arguments):
        saved.append(path.name)
        replace(path, *arguments)

    monkeypatch.setattr(files, "replace", counted)
    assert begin(tmp_path, EVERY_STEP, "--keep_checkpoints=3") == 0
    assert saved.count("model.keras") == 3 * (10 + 1)
    assert_same(tmp_path / NAME, whole)
    newest = tmp_path / NAME / "model.keras"
    assert len(files.kept(newest)) == 3
    assert (
        begin(tmp_path, "--epochs=4", "--resume", "--keep_checkpoints=1") == 0
    )
    assert files.kept(newest) == [newest]


MOMENTS = [
    ("on_train_batch_end", 1, 2, "in epoch 1, after step 3"),
    ("on_train_batch_end", 1, 4, "in epoch 1, after step 8"),
    ("on_test_batch_end", 1, 0, "in epoch 1, after step 10"),
]
OTHER_MOMENTS = [
    ("on_test_begin", 1, None, "in epoch 1, after step 10"),
    ("on_train_batch_end", 2, 9, "in epoch 2, after step 10"),
    ("on_epoch_end", 3, 2, "stopped; go on"),
]


@pytest.mark.parametrize(
    "moments",
    [MOMENTS, pytest.param(OTHER_MOMENTS, marks=pytest.mark.slow)],
    ids=["inside", "between"],
)
def test_terminated_run_goes_on(moments, whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / NAME
    before = signal.getsignal(signal.SIGTERM)
    # By a batch system and by Ctrl-C.
    by = itertools.cycle([signal.SIGTERM, signal.SIGINT])
    for event, epoch, index, place in moments:
        number = next(by)
        with monkeypatch.context() as patch:
            terminate_at(patch, event, epoch, index, number)
            status = 130 if number == signal.SIGINT else 0
            assert begin(tmp_path, "--resume") == status
        output, errors = capfd.readouterr()
        said = f"{folder}: stopped"
        if number == signal.SIGINT:
            stopping, last = errors.splitlines()
            assert stopping.startswith("Stopping after this step")
            assert last.startswith(f"main.py: {said}")
            assert said not in output
        else:
            assert errors == ""
            last = output.strip().splitlines()[-1]
            assert last.startswith(said)
        assert place in last
        assert "--resume" in last
        assert not (folder / "result.json").exists()
        assert signal.getsignal(signal.SIGTERM) is before
    assert begin(tmp_path, "--resume") == 0
    assert_same(folder, whole)
    results = [
        json.loads((path / "result.json").read_text())
        for path in (folder, whole)
    ]
    for name in ("test_error", "train_error", "validation_error", "epochs"):
        assert results[0][name] == results[1][name]
    assert "lengths" not in results[0]


@pytest.mark.slow  # test_train compares such a run, which is not stopped
def test_steps_of_one_execution_are_one(tmp_path, monkeypatch, capfd):
    five = ("--steps_per_execution=5", "--epochs=2")
    assert begin(tmp_path / "a", *five) == 0
    with monkeypatch.context() as patch:
        terminate_at(patch, "on_train_batch_end", 2, 4)
        assert begin(tmp_path / "b", *five) == 0
    assert "in epoch 2, after step 5;" in capfd.readouterr().out
    assert begin(tmp_path / "b", *five, "--resume") == 0
    assert_same(tmp_path / "a" / NAME, tmp_path / "b" / NAME)


def test_terminated_before_training(tmp_path, monkeypatch, capfd):
    build = models.build

    def terminated(config):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(config)

    monkeypatch.setattr(models, "build", terminated)
    assert begin(tmp_path) == 0
    output, errors = capfd.readouterr()
    assert output == f"{tmp_path / NAME}: stopped; go on with --resume.\n"
    assert errors == ""
    assert not (tmp_path / NAME).exists()


def test_interrupted(monkeypatch, capfd):
    """At once where there is nothing to save, and by the second Ctrl-C."""

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with Termination() as termination:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        assert not termination.asked
        termination.saves = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked
        assert not termination.interrupted
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        interrupt()
        assert termination.interrupted
        said = capfd.readouterr().err
        assert said.startswith("\nStopping after this step")  # of its own
        assert "again interrupts at once" in said
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in background
    try:
        with Termination() as termination:
            interrupt()
        assert not termination.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_look_at_a_lock_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    assert not lock.is_held(folder)
    folder.mkdir()
    assert not lock.is_held(folder)
    assert not list(folder.iterdir())
    with lock.held(folder):
        assert lock.is_held(folder)
    assert not lock.is_held(folder)
    shutil.rmtree(folder)
    assert not lock.is_held(folder)
    assert not folder.exists()


def test_a_look_at_a_lock_waits_for_another_look(tmp_path, monkeypatch):
    """Which keeps it for a moment."""
    monkeypatch.setattr(lock, "PATIENCE", 60)
    (tmp_path / lock.LOCK).touch()
    looking, looked = threading.Event(), []

    def look():
        with FileLock(tmp_path / lock.LOCK):
            looking.set()
            time.sleep(0.2)
            looked.append(True)

    other = threading.Thread(target=look)
    other.start()
    looking.wait()
    assert not lock.is_held(tmp_path)
    assert looked
    other.join()


# Killed.


@pytest.fixture
def launch(tmp_path):
    """Starts the program in a process of its own, which may be killed."""
    with (tmp_path / "log").open("a") as log:
        yield lambda *arguments: forks.Fork(
            [sys.executable, small.__file__, *COMMON, *arguments],
            stdout=log,
            stderr=log,
        )


def checkpoint_of(folder):
    """Tells one checkpoint from the next."""
    path = folder / "model.keras"
    try:
        return path.stat().st_ino
    except FileNotFoundError:  # also while it makes room for the next one
        return None


def wait_for(happens, pause, seconds=600):
    """However slow the machine is; a program that hangs is ended."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(pause)


def wait_for_a_checkpoint(folder):
    last = checkpoint_of(folder)
    wait_for(lambda: checkpoint_of(folder) not in (None, last), 0.01)


@pytest.mark.slow
@requires_tensorflow
def test_killed_at_20_moments(launch, tmp_path):
    """In training or at a checkpoint, in validation or while starting."""
    moments = random.Random(0)
    run = ["--epochs=4", "--batch_size=64", EVERY_STEP]
    whole, killed = tmp_path / "whole" / NAME, tmp_path / "killed" / NAME
    aside = killed / "aside.model.keras"
    assert launch(*run, f"--runs_dir={whole.parent}").wait() == 0
    writing = 0
    for i in range(20):
        process = launch(*run, f"--runs_dir={killed.parent}", "--resume")
        if i % 4:
            wait_for_a_checkpoint(killed)
            if i % 4 == 1:
                wait_for(aside.exists, 0.001)  # it is there for a moment
            else:
                time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, 2))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        writing += aside.exists()
    assert not (killed / "result.json").exists()
    assert writing >= 3

    process = launch(*run, f"--runs_dir={killed.parent}", "--resume")
    wait_for_a_checkpoint(killed)
    time.sleep(moments.uniform(0, 0.5))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 0
    assert not (killed / "result.json").exists()

    process = launch(*run, f"--runs_dir={killed.parent}", "--resume")
    assert process.wait() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert_same(whole, killed)
    assert {path.name for path in killed.iterdir() if path.is_file()} - {
        path.name for path in killed.glob("events*")
    } == {
        ".lock", "history.csv", "model.keras", "model.1.keras", "result.json"
    }  # fmt: skip


# Damaged.


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "foreign":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("else", "of another program")
    else:
        path.unlink()


@pytest.mark.parametrize(
    "how", ["cut", "flipped", "emptied", "foreign", "missing"]
)
def test_checkpoint_before_a_damaged_one(how, copy, capfd):
    newest = copy / "model.keras"
    damage(newest, how)
    progress = checkpoint.look(copy, config_of(), resume=True)
    assert (progress.epoch, progress.partial.step) == (1, 0)
    assert progress.checkpoint == copy / "model.1.keras"
    said = capfd.readouterr().err
    reason = "missing" if how == "missing" else "damaged ("
    assert said.startswith(f"{newest}: {reason}")
    assert said.endswith("; going on from model.1.keras, after epoch 1.\n")
    assert said.count("\n") == 1

    damage(copy / "model.1.keras", "cut")
    with pytest.raises(UserError, match=f"{reason.split()[0]}.* Delete the"):
        checkpoint.look(copy, config_of(), resume=True)
    assert len(list(copy.glob("*.keras"))) == 2 - (how == "missing")


@long_on_jax
def test_run_with_a_damaged_checkpoint_loses_nothing(copy, whole):
    damage(copy / "model.keras", "cut")
    assert begin(copy.parent, "--resume", "--keep_checkpoints=9") == 0
    assert_same(copy, whole)
    # The damaged one did not take the place of a whole one.
    assert len(files.kept(copy / "model.keras")) == 3
    for path in files.kept(copy / "model.keras"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


@long_on_jax
def test_damaged_result(whole, tmp_path, capfd):
    folder = Path(shutil.copytree(whole, tmp_path / NAME))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text('{"test_err')
    assert begin(tmp_path, "--resume") == 0
    output, errors = capfd.readouterr()
    assert errors.startswith(f"{folder / 'result.json'}: damaged (")
    assert errors.count("\n") == 1
    assert json.loads((folder / "result.json").read_text()) == result
    assert "Epoch" not in output
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("argument", "was"),
    [
        ("--method=fa", "--method=fa_usf_sn, not fa"),
        ("--seed=1", "--seed=0, not 1"),
        ("--dataset=mnist", "--dataset=digits, not mnist"),
        ("--model=mnist", "--model=digits, not mnist"),
        ("--dropout=0.2", "--dropout=0.3, not 0.2"),
        ("--epochs=1", "2 epochs are trained or begun already"),
    ],
)
def test_checkpoint_of_another_run(argument, was, left):
    before = (left / "model.keras").read_bytes()
    with pytest.raises(UserError, match=was):
        checkpoint.look(left, config_of(argument), resume=True)
    assert (left / "model.keras").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        (
            "training_images",
            99,
            "on 1293 training images, and now there are 99",
        ),
        ("workers", 2, "inside an epoch by 1 worker.s., and now there are 2"),
    ],
)
def test_other_data_than_before(setting, value, says, left):
    progress = checkpoint.look(left, config_of(), resume=True)
    now = {"training_images": 1293, "workers": 1}
    checkpoint.check_data(left, progress, now)
    with pytest.raises(UserError, match=says):
        checkpoint.check_data(left, progress, {**now, setting: value})


def test_checkpoint_that_is_older_than_a_setting(left, monkeypatch):
    """It was trained as if the flag had been at its default."""
    read = json.loads

    def old(text):
        saved = read(text)
        for name in ("normalization", "label_smoothing", "workers"):
            del saved["settings"][name]
        return saved

    monkeypatch.setattr(checkpoint.json, "loads", old)
    progress = checkpoint.look(left, config_of(), resume=True)
    assert progress.epoch == 1
    with pytest.raises(UserError, match="--normalization=none, not batch"):
        checkpoint.look(left, config_of("--normalization=batch"), resume=True)


@pytest.mark.parametrize("error", [EOFError, NotImplementedError, zlib.error])
def test_whatever_a_damaged_archive_raises(error, copy, monkeypatch, capfd):
    unpatched = zipfile.ZipFile.testzip

    def damaged(self):
        if Path(self.filename).name == "model.keras":
            raise error("what zipfile says")
        return unpatched(self)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", damaged)
    progress = checkpoint.look(copy, config_of(), resume=True)
    assert progress.checkpoint.name == "model.1.keras"
    assert "what zipfile says" in capfd.readouterr().err


def test_versions_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    write = [
        lambda aside, text=str(i): aside.write_text(text) for i in range(9)
    ]
    for i in range(5):
        files.replace(path, write[i], 3)
        texts = [p.read_text() for p in files.kept(path)]
        assert texts == [str(j) for j in range(i, max(i - 3, -1), -1)]
    assert [p.name for p in files.kept(path)] == [
        "model.keras", "model.1.keras", "model.2.keras"
    ]  # fmt: skip

    # Killed at each of the renames: the last whole one comes first.
    rename = os.replace
    for i, allowed in enumerate((0, 1, 2)):
        calls = []

        def killed(*places, calls=calls, allowed=allowed):
            calls.append(places)
            if len(calls) > allowed:
                raise SystemExit
            rename(*places)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(SystemExit):
                files.replace(path, write[5], 3)
        assert files.kept(path)[0].read_text() == str(4 + i)
        files.replace(path, write[5 + i], 3)
        assert files.kept(path)[0].read_text() == str(5 + i)
        assert not list(tmp_path.glob("aside*"))


# Full disks.


@pytest.fixture
def small_files():
    """Makes larger files fail, as a full disk does, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(soft)


def assert_full(folder, errors, place):
    assert errors.startswith(f"main.py: {folder}: cannot be written to (")
    assert f"the checkpoint {place} is whole" in errors
    assert "--resume" in errors
    assert errors.count("\n") == 1
    assert not list(folder.glob("aside*"))
    assert not (folder / "result.json").exists()
    progress = checkpoint.look(folder, config_of(), resume=True)
    assert progress.place == place


@long_on_jax
def test_file_that_is_too_large(copy, whole, small_files, capfd):
    small_files(200_000)  # the checkpoint's, not the history's
    status = begin(copy.parent, "--resume")
    small_files(resource.RLIM_INFINITY)
    assert status == 1
    assert_full(copy, capfd.readouterr().err, "in epoch 2, after step 4")
    assert begin(copy.parent, "--resume") == 0
    assert_same(copy, whole)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 12 MB, which goes when this process ends.

    It keeps its path: a lock is taken on the resolved one, and that of a
    detached disk lies in the root folder, the same for all processes.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a disk takes root")
    at_end = ["sh", "-c", 'read line; exec umount --lazy "$0"', str(folder)]
    with subprocess.Popen(
        at_end, stdin=subprocess.PIPE, start_new_session=True
    ):
        yield folder
    assert not folder.is_mount()


@long_on_jax
@pytest.mark.slow
def test_full_disk(disk, left, whole, monkeypatch, capfd):
    """At the start, and at the next checkpoint after that."""
    folder = Path(shutil.copytree(left, disk / NAME))
    for event in ("on_train_begin", "on_epoch_end"):
        unpatched = getattr(writer.RunWriter, event)

        def filled(self, *arguments, unpatched=unpatched):
            with (disk / "other").open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
            unpatched(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(writer.RunWriter, event, filled)
            assert begin(disk, "--resume", "--alignment_every=1") == 1
        (disk / "other").unlink()
        errors = capfd.readouterr().err
        assert_full(folder, errors, "in epoch 2, after step 4")
    assert begin(disk, "--resume") == 0
    assert_same(folder, whole)


def test_words_of_a_full_disk():
    """Of libraries that keep no error number."""
    inner = RuntimeError(
        "Unable to write (errno = 28, No space left on device)"
    )
    outer = ValueError("could not save")
    outer.__cause__ = inner
    assert files.disk_error(outer) == "No space left"
    assert files.disk_error(OSError(122, "")) == "Disk quota exceeded"
    assert files.disk_error(ValueError("no number")) is None
    assert files.disk_error(PermissionError(13, "denied")) is None


# Divergence.


@pytest.fixture
def run_writer(tmp_path):
    """That of a small model, after a first epoch."""
    model = keras.Sequential(
        [keras.Input((2,))]
        + [keras.layers.Dense(2, name=name) for name in ("low", "mid", "high")]
    )
    model.compile("sgd", "mse")
    run_writer = writer.RunWriter(
        tmp_path, config_of(), Progress(), examples_per_epoch=1
    )
    run_writer.set_model(model)
    run_writer.on_train_begin()
    end_epoch(run_writer, 0, loss=1.0)
    return run_writer


def end_epoch(run_writer, epoch, **logs):
    run_writer.on_epoch_begin(epoch)
    run_writer.progress.partial = Partial(training_seconds=1.0)
    run_writer.on_epoch_end(epoch, logs)


def test_divergence_names_its_layers(run_writer, tmp_path):
    before = (tmp_path / "model.keras").read_bytes()
    layers = run_writer.model.layers
    layers[2].bias.assign([1.0, np.nan])
    layers[0].kernel.assign([[1.0, 0.0], [np.inf, 0.0]])
    with pytest.raises(
        Diverged, match=r"epoch 2 of 3: .* weights of low, high"
    ):
        end_epoch(run_writer, 1, loss=1.0)
    # Nor are they saved inside an epoch.
    run_writer.on_epoch_begin(1)
    run_writer.terminated = lambda: True
    with pytest.raises(Diverged):
        run_writer.on_train_batch_end(0)
    assert (tmp_path / "model.keras").read_bytes() == before
    assert not (tmp_path / "model.1.keras").exists()
    layers[2].bias.assign([0.0, 0.0])
    layers[0].kernel.assign(np.eye(2))
    with pytest.raises(Diverged, match="Inf in val_loss, though not in the"):
        end_epoch(run_writer, 1, loss=1.0, val_loss=np.inf)
    with pytest.raises(Stopped):
        run_writer.on_train_batch_end(0)


def test_time_of_the_parts_of_an_epoch(run_writer, monkeypatch):
    clock = iter([3.0, 10.0])
    monkeypatch.setattr(writer.time, "perf_counter", lambda: next(clock))
    run_writer.progress.partial = Partial(3, [], {}, 100.0, 50.0)
    run_writer.on_epoch_begin(1)
    run_writer.on_epoch_end(1, {"loss": 1.0})
    row = run_writer.progress.rows[-1]
    assert row["seconds"] == 100 + 7
    assert row["examples_per_second"] == 1 / 50
    assert run_writer.model.stop_training  # the next fit has other steps


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("--dtype_policy=mixed_float16 --method=fa", "=mixed_bfloat16 or"),
        ("--kernel_scale=3 --method=fa", "lower --kernel_scale (now 3)"),
        ("--feedback_scale=2 --method=fa", "lower --feedback_scale (now 2)"),
        ("--method=fa", "fa_usf_sn"),
        ("--learning_rate=7", "lower --learning_rate (now 7) or raise"),
    ],
)
def test_advice_on_divergence(arguments, advice, run_writer):
    run_writer.settings = config_of(*arguments.split())
    with pytest.raises(Diverged) as raised:
        end_epoch(run_writer, 1, loss=np.nan)
    message = str(raised.value)
    assert Diverged.SIGN in message
    assert advice in message.partition("after deleting the folder, ")[2]
