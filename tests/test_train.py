"""The program in train/, run as a user runs it."""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import export
import forks
import keras
import main
import numpy as np
import pytest
from backends import ON_TENSORFLOW
from backends import ON_TORCH
from backends import array
from backends import requires_tensorflow

import keras_fa
from experiment import commandline
from experiment import datasets
from experiment import model as models
from experiment import networks
from experiment import run as experiment_run
from experiment import settings
from experiment import startup
from experiment.datasets import arrays
from experiment.errors import UserError
from experiment.networks.layers import seeded_dropout
from experiment.runfolder import writer

pytestmark = pytest.mark.usefixtures("optimized_graphs")

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"seconds", "examples_per_second"}
BACKEND = keras.backend.backend()
PLAIN = ("--method=bp", "--epochs=1", "--batch_size=128")

requires_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None
    or importlib.util.find_spec("tensorflow_datasets") is None,
    reason="TensorFlow Datasets is not installed",
)


@pytest.fixture
def train(tmp_path, capfd):
    """Runs the program in this process; returns status, output, errors."""

    def run(*arguments, runs_dir=tmp_path / "runs"):
        status = main.run(["main.py", f"--runs_dir={runs_dir}", *arguments])
        output, errors = capfd.readouterr()
        return status, output, errors

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, to be read."""
    runs_dir = tmp_path_factory.mktemp("finished")
    assert main.run(["main.py", f"--runs_dir={runs_dir}", *PLAIN]) == 0
    return runs_dir / "digits-digits-bp-s0"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, where `train` goes on with it."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def in_new_process(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def config_of(*arguments):
    commandline.parse(settings.FLAGS, ["main.py", *arguments])
    return settings.given()


def without(monkeypatch, *missing):
    """Makes packages seem not to be installed."""
    installed = startup.installed
    monkeypatch.setattr(
        startup,
        "installed",
        lambda *names: not set(names) & set(missing) and installed(*names),
    )


def splits_of(name, data_dir):
    """The parts of a data set that fits into memory."""
    config = SimpleNamespace(
        data_dir=data_dir, download=False, label_smoothing=0.0
    )
    return datasets.DATASETS[name].open(config)._splits


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def learned(folder):
    """The history without what a clock measured, and all weights."""
    rows = [
        {k: v for k, v in row.items() if k not in MEASURED}
        for row in history(folder)
    ]
    model = keras.saving.load_model(folder / "model.keras")
    return rows, [variable.numpy() for variable in model.weights]


def assert_same(folder, other):
    rows, weights = learned(folder)
    other_rows, other_weights = learned(other)
    assert rows == other_rows
    assert len(weights) == len(other_weights)
    for weight, other_weight in zip(weights, other_weights):
        np.testing.assert_array_equal(weight, other_weight)


def interrupt_after(epoch, monkeypatch):
    """Makes training stop as by Ctrl-C once an epoch is on the disk."""
    on_epoch_end = writer.RunWriter.on_epoch_end

    def interrupted(self, index, logs=None):
        on_epoch_end(self, index, logs)
        if index + 1 == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer.RunWriter, "on_epoch_end", interrupted)


# The runs.


def test_main_job(tmp_path):
    """What the README starts with, from the project's root."""
    done = in_new_process(
        "train/main.py",
        "--flagfile=digits_usf.flags",
        "--epochs=5",  # a sixth of its length
        f"--runs_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "digits-digits-fa_usf_sn-s0"
    result = json.loads((folder / "result.json").read_text())
    assert result["test_error"] < 5
    assert f"Test error {result['test_error']:.2f} %" in done.stdout
    assert str(folder) in done.stdout

    # What it leaves behind loads with the package alone.
    loaded = forks.run(
        "-c",
        "import sys, keras, keras_fa\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "print(type(model).__name__, model.name, 'main' in sys.modules)",
        folder / "model.keras",
        cwd=tmp_path,
    )
    expected = ["Functional", "digits", "False"]
    assert loaded.stdout.split() == expected, loaded.stderr


def test_run_folder(train, tmp_path):
    status, _, errors = train(
        "--epochs=3", "--seed=4", "--alignment_every=2", "--optimizer=sgd"
    )
    assert (status, errors) == (0, "")
    folder = tmp_path / "runs" / "digits-digits-fa_usf_sn-s4"

    result = json.loads((folder / "result.json").read_text())
    expected = {
        "dataset": "digits",
        "model": "digits",
        "method": "fa_usf_sn",
        "seed": 4,
        "epochs": 3,
        "batch_size": 32,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "alignment_every": 2,
        "dtype_policy": "float32",
        "parameters": 151306,
    }
    assert {name: result[name] for name in expected} == expected
    assert result["backend"] == BACKEND
    assert result["versions"].keys() == {
        "python", "keras_fa", "keras", BACKEND
    }  # fmt: skip
    assert result["versions"]["keras"] == keras.__version__
    assert result["examples_per_second"] > 0

    rows = history(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = rows[-1]
    assert result["train_error"] == experiment_run.error(
        float(last["accuracy"])
    )
    assert result["validation_error"] == experiment_run.error(
        float(last["val_accuracy"])
    )
    seconds = sum(float(row["seconds"]) for row in rows)
    assert result["seconds"] == pytest.approx(seconds, abs=0.01)
    assert float(last["learning_rate"]) == pytest.approx(0, abs=1e-9)
    for row in rows:
        measured = row["epoch"] == "2"
        for layer in ("conv1", "conv2", "fc1"):
            assert bool(row[f"alignment/angle/{layer}"]) == measured

    # The test error is that of the saved model on the raw test images.
    splits = splits_of("digits", None)
    model = keras.saving.load_model(folder / "model.keras")
    assert type(model).__name__ == "Functional"
    answers = model.predict(splits.test.images, verbose=0).argmax(-1)
    wrong = answers != splits.test.labels
    assert result["test_error"] == pytest.approx(100 * wrong.mean(), abs=1e-3)


def test_tensorboard(train, tmp_path):
    tf = pytest.importorskip("tensorflow")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    assert train("--epochs=2", "--alignment_every=1")[0] == 0
    folder = tmp_path / "runs" / "digits-digits-fa_usf_sn-s0"
    rows = history(folder)

    # One run in the list, whose epochs are counted as in the history.
    assert {f.parent for f in folder.rglob("*tfevents*")} == {folder}
    curves = events.EventAccumulator(str(folder)).Reload()
    for tag, column in [
        ("Loss/train", "loss"),
        ("Loss/validation", "val_loss"),
        ("Error/validation", "val_accuracy"),
        ("Learning_rate", "learning_rate"),
        ("alignment/angle/conv1", "alignment/angle/conv1"),
    ]:
        points = sorted(curves.Tensors(tag), key=lambda event: event.step)
        assert [event.step for event in points] == [1, 2]
        wanted = [float(row[column]) for row in rows]
        if tag.startswith("Error"):
            wanted = [100 * (1 - accuracy) for accuracy in wanted]
        values = [float(tf.make_ndarray(e.tensor_proto)) for e in points]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-12)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    tags = curves.Tags()["tensors"]
    assert not [tag for tag in tags if "norm_ratio" in tag]  # 1 under SN
    # As TensorBoard sorts them: learning curves first.
    scalars = [t for t in tags if t.split("/")[0] in ("Error", "alignment")]
    assert sorted(scalars)[0].startswith("Error/")


def test_without_tensorboard(train, tmp_path, monkeypatch):
    without(monkeypatch, "tensorboard")
    status, output, errors = train("--epochs=1", "--alignment_every=1")
    assert (status, errors) == (0, "")
    assert output.count("TensorBoard") == 1
    assert "Curves" not in output
    folder = tmp_path / "runs" / "digits-digits-fa_usf_sn-s0"
    assert {file.name for file in folder.iterdir()} == {
        ".lock", "history.csv", "model.keras", "result.json"
    }  # fmt: skip
    assert 0 < float(history(folder)[0]["alignment/angle/conv1"]) < 90


def test_same_seed_same_result_in_another_process(train, tmp_path):
    arguments = ["--epochs=1", "--method=fa_usf_sn", "--batch_size=128"]
    name = "digits-digits-fa_usf_sn-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0
    done = forks.run(
        "train/main.py", *arguments, f"--runs_dir={tmp_path / 'b'}"
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "a" / name, tmp_path / "b" / name)

    train(*arguments, "--seed=1", runs_dir=tmp_path / "a")
    with pytest.raises(AssertionError):
        assert_same(
            tmp_path / "a" / name,
            tmp_path / "a" / "digits-digits-fa_usf_sn-s1",
        )


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (
            "bp_noise",
            ["--optimizer=sgd", "--warmup_epochs=1.5", "--alignment_every=1"],
        ),
        (
            "fa_usf_const_ei",
            ["--optimizer=muon", "--dtype_policy=mixed_float16"],
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_one(
    method, arguments, train, tmp_path, monkeypatch
):
    # All layers that draw random numbers: windows, mirroring and dropout. A
    # small network, since half precision is slow on a CPU.
    def with_dropout(x, classes):
        x = seeded_dropout("dropout", 0.3)(x)
        x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(x)
        x = keras.layers.Flatten(name="flatten")(x)
        return keras.layers.Dense(classes, dtype="float32", name="fc")(x)

    monkeypatch.setitem(
        networks.NETWORKS,
        "digits",
        networks.Network(with_dropout, (8, 8, 1), (6, 6, 1)),
    )
    dataset = datasets.DATASETS["digits"]._replace(mirror=True)
    monkeypatch.setitem(datasets.DATASETS, "digits", dataset)
    arguments = [
        f"--method={method}",
        "--epochs=2",
        "--batch_size=128",
        *arguments,
    ]
    name = f"digits-digits-{method}-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0

    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        status, _, errors = train(*arguments, runs_dir=tmp_path / "b")
    assert status == 130
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "b" / name / "result.json").exists()
    status, output, _ = train(*arguments, "--resume", runs_dir=tmp_path / "b")
    assert status == 0
    assert "1 of 2 epochs are trained" in output

    assert_same(tmp_path / "a" / name, tmp_path / "b" / name)
    results = [
        json.loads((tmp_path / x / name / "result.json").read_text())
        for x in ("a", "b")
    ]
    assert results[0]["test_error"] == results[1]["test_error"]


def test_resume(train, tmp_path):
    folder = tmp_path / "runs" / "digits-digits-bp-s0"
    bp = ["--method=bp", "--optimizer=sgd"]
    assert train(*bp, "--epochs=1", "--resume")[0] == 0
    before = (folder / "result.json").stat().st_mtime_ns

    status, _, errors = train(*bp, "--epochs=1")
    assert status == 1
    assert "--resume" in errors

    status, output, _ = train(*bp, "--epochs=1", "--resume")
    assert status == 0
    assert "finished already, after epoch 1." in output
    assert (folder / "result.json").stat().st_mtime_ns == before

    status, _, errors = train(*bp, "--epochs=2", "--resume", "--batch_size=9")
    assert status == 1
    assert "--batch_size=32" in errors
    assert "9" in errors

    assert train(*bp, "--epochs=3", "--resume", "--alignment_every=1")[0] == 0
    rows = history(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["alignment/angle/conv1"] == ""
    assert float(rows[2]["alignment/angle/conv1"]) == pytest.approx(0, abs=0.1)
    # The cosine reaches 0 at the end of the new length, for the second time.
    assert float(rows[0]["learning_rate"]) == pytest.approx(0, abs=1e-9)
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.0125, rel=1e-3)
    assert json.loads((folder / "result.json").read_text())["epochs"] == 3


@pytest.mark.parametrize(
    ("dataset", "images", "of_a_sample"),
    [
        ("imagenet2012", 250, True),
        ("imagenet2012", 1_281_167, False),
        ("imagenet2012", None, False),  # of an old run
        ("digits", 1293, False),
    ],
)
def test_last_words_on_a_sample(dataset, images, of_a_sample, capsys):
    result = {"dataset": dataset, "training_images": images, "epochs": 1}
    result |= {"test_error": 4.0, "test_top5_error": 2.0, "seconds": 1.0}
    result |= {"train_error": 5.0, "validation_error": 4.0}
    experiment_run.report(Path("run"), result)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Test error 4.00 %, top-5 2.00 %")
    assert ("on a sample, which says nothing" in first) == of_a_sample


def test_resume_of_a_folder_without_a_checkpoint_starts(train, tmp_path):
    folder = tmp_path / "runs" / "digits-digits-bp-s0"
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("epoch\n1\n")
    assert train("--method=bp", "--epochs=1", "--resume")[0] == 0
    assert [row["epoch"] for row in history(folder)] == ["1"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_damaged_checkpoint(damage, train, copy):
    checkpoint = copy / "model.keras"
    content = bytearray(checkpoint.read_bytes())
    if damage == "cut":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
    elif damage == "emptied":
        checkpoint.write_bytes(b"")
    else:
        networks.build("digits", 10).save(checkpoint)
    status, _, errors = train(*PLAIN, "--epochs=2", "--resume")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "damaged" in errors
    assert "Delete the folder" in errors


def test_checkpoint_of_another_network(train, copy):
    with zipfile.ZipFile(copy / "model.keras") as archive:
        run = archive.read("run.json")
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    other.save(copy / "model.keras")
    with zipfile.ZipFile(copy / "model.keras", "a") as archive:
        archive.writestr("run.json", run)
    status, _, errors = train(*PLAIN, "--epochs=2", "--resume")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "does not fit" in errors


def test_divergence(train, tmp_path):
    status, _, errors = train(
        "--method=bp", "--epochs=2", "--optimizer=sgd", "--learning_rate=3e38"
    )
    assert status == 1
    assert "epoch 1 of 2" in errors
    assert "lower --learning_rate (now 3e+38)" in errors
    assert len(errors.splitlines()) == 1
    folder = tmp_path / "runs" / "digits-digits-bp-s0"
    assert not (folder / "model.keras").exists()
    assert not (folder / "result.json").exists()


def test_flags_after_a_flagfile_win(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits_usf.flags").write_text("--method=bp\n--seed=5\n--epochs=9\n")
    Path("own.flags").write_text("# comment\n--flagfile=digits_usf.flags\n")
    for flagfile in (
        ["--flagfile=digits_usf.flags"],  # here before train/flags
        ["--flagfile", "own.flags"],
        [f"-flagfile={tmp_path / 'own.flags'}"],
    ):
        config = config_of(*flagfile, "--epochs=2")
        assert (config.method, config.seed, config.epochs) == ("bp", 5, 2)


@pytest.mark.parametrize(
    "flagfile", sorted(f.name for f in commandline.FLAGFILES.glob("*.flags"))
)
def test_flagfiles(flagfile):
    config = config_of(f"--flagfile={flagfile}")
    settings.check(config)
    if flagfile in ("imagenet_usf.flags", "imagenet_sample.flags"):
        assert (config.dataset, config.method) == ("imagenet2012", "fa_usf_sn")
        return
    method = "usf" if flagfile == "digits_usf.flags" else config.method
    assert flagfile == f"{config.model}_{method}.flags"
    assert config.alignment_every == 1


@pytest.mark.parametrize(
    "argument",
    [
        "--dtype_policy=mixed_bfloat16",
        pytest.param(
            "--jit_compile", marks=[requires_tensorflow, pytest.mark.slow]
        ),
    ],
)
def test_ways_to_compute(argument, train, finished, tmp_path):
    assert train(*PLAIN, argument)[0] == 0
    (rows, weights), (other_rows, others) = (
        learned(folder)
        for folder in (finished, tmp_path / "runs" / finished.name)
    )
    assert float(rows[0]["loss"]) == pytest.approx(
        float(other_rows[0]["loss"]), rel=0.02
    )
    assert any((a != b).any() for a, b in zip(weights, others))


def test_steps_per_execution_change_nothing(train, tmp_path):
    """Strict normalization included, which is part of every step."""
    common = ["--epochs=1", "--batch_size=128", "--optimizer=sgd"]
    name = "digits-digits-fa_usf_sn-s0"
    assert train(*common, runs_dir=tmp_path / "a")[0] == 0
    five = "--steps_per_execution=5"
    assert train(*common, five, runs_dir=tmp_path / "b")[0] == 0
    _, weights = learned(tmp_path / "a" / name)
    _, others = learned(tmp_path / "b" / name)
    for weight, other in zip(weights, others):
        np.testing.assert_allclose(weight, other, atol=1e-5)


@requires_tensorflow
@pytest.mark.slow
def test_mirrored_replicas_equal_one_device(train, tmp_path):
    arguments = ["--epochs=2", "--batch_size=128", "--alignment_every=1"]
    name = "digits-digits-fa_usf_sn-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0
    done = forks.run(
        "train/main.py",
        *arguments,
        "--strategy=mirrored",
        "--virtual_devices=2",
        f"--runs_dir={tmp_path / 'b'}",
    )
    assert done.returncode == 0, done.stderr
    for row, other in zip(
        history(tmp_path / "a" / name), history(tmp_path / "b" / name)
    ):
        assert row.keys() == other.keys()
        for column in row.keys() - MEASURED:
            assert float(row[column]) == pytest.approx(
                float(other[column]), rel=1e-3, abs=1e-3
            )


# Bad input.


BAD_INPUT = [
    ("--dataset=cifar", "did you mean cifar10?"),
    ("--model=vgg", "cifar10_1"),
    ("--method=usf", "fa_usf_sn"),
    ("--method=FA", "did you mean fa?"),
    ("--lr=0.1", "did you mean learning_rate?"),
    ("--optimizer=lion", "adamw"),
    ("--strategy=tpus", "did you mean tpu?"),
    ("--dtype_policy=float16", "mixed_float16"),
    ("--epochs=0", "1 to 100000"),
    ("--epochs=-3", "1 to 100000"),
    ("--epochs=1e9", "1 to 100000"),
    ("--epochs=1000000000", "1 to 100000"),
    ("--epochs=2.5", "1 to 100000"),
    ("--epochs", "--epochs"),
    ("--batch_size=0", "at least 1"),
    ("--batch_size=many", "at least 1"),
    ("--batch_size=1294", "1293"),
    ("--batch_size=600 --steps_per_execution=3 --method=bp", "1293"),
    ("--learning_rate=0", "above 0"),
    ("--learning_rate=-0.1", "above 0"),
    ("--learning_rate=nan", "above 0"),
    ("--learning_rate=inf", "above 0"),
    ("--learning_rate=1e-3x", "above 0"),
    ("--warmup_epochs=-1", "at least 0"),
    ("--weight_decay=-1e-4", "at least 0"),
    ("--weight_decay=nan", "at least 0"),
    ("--seed=-1", "0 to 2147483647"),
    ("--seed=4294967296", "0 to 2147483647"),
    ("--alignment_every=-1", "at least 0"),
    ("--steps_per_execution=0", "at least 1"),
    ("--label_smoothing=1", "below 1"),
    ("--image_size=32", "size of their own"),
    ("--image_size=0", "2048"),
    ("--crop_area=0", "above 0"),
    ("--crop_area=0.5", "size of their own"),
    ("--dataset=imagenet2012 --model=mnist", "resnet18"),
    ("--tpu=local", "--strategy=tpu"),
    ("--virtual_devices=2", "--strategy=mirrored"),
    ("--virtual_devices=-1 --strategy=mirrored", "0 to 64"),
    ("--resume=perhaps", "resume"),
    ("--epoch=3", "epochs"),
    ("--fast", "--helpfull"),
    ("digits", "--name=value"),
    ("--seed=1 extra --seed=2", "extra"),
    ("--model=mnist", "--model=digits"),
    ("--dataset=mnist --model=cifar10_1", "--model=mnist"),
    ("--dataset=mnist --data_dir={missing}", "train/export.py"),
    ("--dataset=mnist --data_dir={here}", "train/export.py"),
    ("--dataset=cifar10 --data_dir={file}", "train/export.py"),
    ("--flagfile=missing.flags", "<column>_<method>.flags"),
    ("--flagfile={missing}/a.flags", "<column>_<method>.flags"),
    ("--flagfile=digits_usf", "did you mean digits_usf.flags"),
    ("--flagfile={here}", "<column>_<method>.flags"),
    ("--flagfile=", "<column>_<method>.flags"),
    ("--flagfile", "<column>_<method>.flags"),
    ("--flagfile={unknown}", "--depth: no such flag"),
    ("--flagfile={nested}", "nowhere.flags"),
    ("--flagfile={binary}", "binary"),
    ("--runs_dir={file}", "--runs_dir"),
    ("--runs_dir={file}/below", "--runs_dir"),
    ("--runs_dir=/proc/none", "--runs_dir"),
]
if ON_TENSORFLOW:
    BAD_INPUT += [
        ("--jit_compile --strategy=mirrored", "mirrored"),
        ("--strategy=tpu --dataset=cifar10 --model=cifar10_1", "windows"),
        ("--strategy=tpu --tpu=node-1", "--tpu=local"),
        ("--dataset=imagenet2012 --data_dir={missing}", "tfds build"),
        ("--dataset=imagenet2012 --data_dir={here}", "tfds build"),
        ("--dataset=imagenet2012 --download", "--data_dir"),
        ("--jit_compile --dataset=cifar10", "KERAS_BACKEND=jax"),
        ("--strategy=data_parallel", "KERAS_BACKEND=jax"),
    ]
else:
    BAD_INPUT += [
        ("--strategy=mirrored", "KERAS_BACKEND=tensorflow"),
        ("--steps_per_execution=2", "KERAS_BACKEND=tensorflow or jax")
        if ON_TORCH
        else ("--nojit_compile", "KERAS_BACKEND=tensorflow"),
    ]


@pytest.mark.parametrize(("arguments", "says"), BAD_INPUT)
def test_bad_input(arguments, says, train, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "unknown").write_text("--depth=3\n")
    (tmp_path / "nested").write_text("--flagfile=nowhere.flags\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe--epochs=3\n")
    places = {
        name: tmp_path / name
        for name in ("file", "missing", "unknown", "nested", "binary")
    }
    arguments = arguments.format(here=tmp_path, **places).split()
    before = sorted(tmp_path.iterdir())
    status, output, errors = train(*arguments)
    assert status in (1, 2)
    assert re.fullmatch(r"main\.py: .+\n", errors), errors
    assert says in errors
    assert output == ""
    assert sorted(tmp_path.iterdir()) == before


@requires_tensorflow
def test_batch_that_replicas_cannot_share(tmp_path):
    done = forks.run(
        "train/main.py",
        "--strategy=mirrored",
        "--virtual_devices=3",
        "--batch_size=32",
        f"--runs_dir={tmp_path / 'runs'}",
    )
    assert done.returncode == 1
    assert re.fullmatch(r"main\.py: .*32.* 3 replicas.*\n", done.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("backend", "program"),
    [
        pytest.param("numpy", "main.py", marks=pytest.mark.slow),
        ("nonsense", "report.py"),
    ],
)
def test_other_backends(backend, program, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    done = in_new_process(f"train/{program}")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"{re.escape(program)}: .*{backend}.* tensorflow, jax, torch.*\n",
        done.stderr,
    )


def test_run_of_another_backend(copy):
    resumed = config_of(*PLAIN, "--epochs=2", "--resume")
    resumed.backend = "other"
    resumed.runs_dir = copy.parent
    with pytest.raises(UserError, match=f"KERAS_BACKEND={BACKEND}, not"):
        experiment_run.train(resumed)


def test_help(train):
    status, output, errors = train("--helpfull")
    assert (status, errors) == (0, "")
    assert main.__doc__ in output
    assert "--alignment_every" in output


def test_every_flag_is_explained():
    explained = settings.FLAGS.get_help()
    for name in vars(settings.given()).keys() - {"backend"}:
        assert len(settings.FLAGS[name].help) > 20, name
        assert f"--{name}" in explained or f"--[no]{name}" in explained
    assert "--normalization=batch" in settings.FLAGS["fixed_signs"].help


# Data.


def test_digits_split_is_fixed_and_stratified():
    splits = splits_of("digits", None)
    keras.utils.set_random_seed(3)
    again = splits_of("digits", None)
    for split, other in zip(splits, again):
        np.testing.assert_array_equal(split.images, other.images)
    assert [len(split.labels) for split in splits] == [1293, 144, 360]
    for split in splits:
        assert split.images.dtype == np.uint8
        shares = np.bincount(split.labels) / len(split.labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.01)
    images = [{image.tobytes() for image in split.images} for split in splits]
    assert not images[0] & images[2]
    assert not images[1] & images[2]
    assert not images[0] & images[1]


def numbered(n=20, shape=(32, 32, 3)):
    """Images of which no two windows are alike."""
    images = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    return arrays.Split(images, np.arange(n))


def batches(split, seed=0, first_epoch=0, epochs=3):
    training = arrays.TrainingBatches(
        split,
        batch_size=6,
        steps_per_epoch=3,
        seed=seed,
        first_step=3 * first_epoch,
        epochs=epochs,
    )
    return [training[i] for i in range(len(training))]


def test_order_depends_on_seed_and_epoch_alone():
    split = numbered()
    whole = batches(split)
    assert len(whole) == 9
    for images, labels in whole:
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, split.images[labels])
    epochs = [
        np.concatenate([labels for _, labels in whole[i : i + 3]])
        for i in (0, 3, 6)
    ]
    for labels in epochs:
        assert len(set(labels)) == 18
    assert not np.array_equal(epochs[0], epochs[1])

    late = batches(split, first_epoch=2)
    assert len(late) == 3
    for (_, labels), (_, other_labels) in zip(whole[6:], late):
        np.testing.assert_array_equal(labels, other_labels)

    other_seed = np.concatenate([y for _, y in batches(split, seed=1)[:3]])
    assert not np.array_equal(other_seed, epochs[0])


def test_fit_sees_each_batch_once_in_order():
    """Whatever Keras fetches ahead, and with several steps an execution."""

    class Seen(keras.layers.Layer):
        """Adds up 0.5^t x over the steps t."""

        def build(self, shape):
            self.total = self.add_weight(trainable=False, initializer="zeros")
            self.scale = self.add_weight(trainable=False, initializer="ones")

        def call(self, x, training=False):
            if training:
                first = keras.ops.cast(x[0, 0], "float32")
                self.total.assign_add(self.scale * first)
                self.scale.assign(0.5 * self.scale)
            return keras.ops.cast(x, "float32")

    split = arrays.Split(np.arange(20, dtype=np.uint8)[:, None], np.zeros(20))
    inputs = keras.Input((1,), dtype="uint8")
    seen = Seen()
    model = keras.Model(inputs, keras.layers.Dense(1)(seen(inputs)))
    steps = 1 if ON_TORCH else 3  # as Keras's there, and eagerly
    model.compile(
        "sgd", "mse", steps_per_execution=steps, jit_compile=not ON_TORCH
    )
    training = arrays.TrainingBatches(
        split,
        batch_size=6,
        steps_per_epoch=3,
        seed=5,
        first_step=3,
        epochs=4,
    )
    model.fit(
        arrays.feed(training),
        initial_epoch=1,
        epochs=4,
        steps_per_epoch=3,
        shuffle=False,
        verbose=0,
    )
    firsts = [x[0, 0] for x, _ in batches(split, 5, first_epoch=1, epochs=4)]
    expected = sum(float(x) * 0.5**t for t, x in enumerate(firsts))
    assert float(array(seen.total)) == pytest.approx(expected, rel=1e-6)


def seen(layers, images, training):
    x = keras.ops.convert_to_tensor(images)
    for layer in layers:
        x = layer(x, training=training)
    return array(x)


def test_augmentation_is_a_window_perhaps_mirrored():
    *layers, standardize = datasets.DATASETS["cifar10"].preprocessing(
        (24, 24, 3)
    )
    split = numbered(200)
    # The pixels at which the windows may begin tell where they do.
    corners = split.images[:, :9, :9]
    mirrored_corners = split.images[:, :9, 23:32]
    found = {}
    for _ in range(5):
        crops = seen(layers, split.images, training=True)
        assert crops.shape == (200, 24, 24, 3)
        for i, crop in enumerate(crops):
            windows = [
                (top, left, mirrored)
                for mirrored, (places, window) in enumerate(
                    [(corners, crop), (mirrored_corners, crop[:, ::-1])]
                )
                for top, left in np.argwhere(
                    (split.images[i, :9, :9] == window[0, 0]).all(-1)
                )
                if np.array_equal(
                    split.images[i, top : top + 24, left : left + 24], window
                )
            ]
            assert len(windows) == 1
            found[windows[0]] = found.get(windows[0], 0) + 1
    # 1000 draws from 9 x 9 places and 2 sides.
    places = {}
    for (top, left, _), count in found.items():
        places[top, left] = places.get((top, left), 0) + count
    assert len(places) == 81
    for axis in (0, 1):
        for i in range(9):
            count = sum(n for place, n in places.items() if place[axis] == i)
            assert 70 < count < 155  # 111 expected, 10 the standard deviation
    mirrored = sum(n for window, n in found.items() if window[2])
    assert 430 < mirrored < 570

    values = seen([standardize], crops, training=True)
    np.testing.assert_allclose(values.mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(values.std((1, 2, 3)), 1, atol=1e-4)


def test_windows_of_padded_images():
    """As residual networks see CIFAR-10: 9 x 9 places, black beyond."""
    network = networks.NETWORKS["resnet20"]
    *layers, _ = datasets.DATASETS["cifar10"].preprocessing(
        network.input_shape, network.pad
    )
    images = numbered(200).images
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
    places = set()
    for image, window in zip(padded, seen(layers, images, training=True)):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            for side in (window, window[:, ::-1])
            if np.array_equal(image[top : top + 32, left : left + 32], side)
        ]
        assert found
        places.update(found)
    assert len(places) > 60  # 74 expected
    np.testing.assert_array_equal(seen(layers, images, training=False), images)


def test_evaluation_sees_the_centre():
    layers = datasets.DATASETS["cifar10"].preprocessing((24, 24, 3))
    split = numbered()
    centres = split.images[:, 4:28, 4:28].astype(float)
    means = centres.mean((1, 2, 3), keepdims=True)
    deviations = centres.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        seen(layers, split.images, training=False),
        (centres - means) / deviations,
        atol=1e-4,
    )


def test_whole_images_are_only_scaled():
    layers = datasets.DATASETS["mnist"].preprocessing((28, 28, 1))
    split = numbered(shape=(28, 28, 1))
    for training in (False, True):
        np.testing.assert_allclose(
            seen(layers, split.images, training), split.images / 255, rtol=1e-6
        )


def mnist_file(folder, **changes):
    """A small data set as train/export.py writes it."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (200, 28, 28, 1), np.uint8),
        "train_labels": np.arange(200) % 10,
        "test_images": rng.integers(0, 256, (40, 28, 28, 1), np.uint8),
        "test_labels": np.arange(40) % 10,
    } | changes
    np.savez_compressed(
        folder / "mnist.npz",
        **{name: a for name, a in arrays.items() if a is not None},
    )
    return arrays


@pytest.mark.usefixtures("small_mnist")
def test_file_of_arrays(train, tmp_path, monkeypatch):
    arrays = mnist_file(tmp_path)
    without(monkeypatch, "tensorflow_datasets")
    splits = splits_of("mnist", str(tmp_path))
    np.testing.assert_array_equal(
        np.concatenate([splits.train.images, splits.validation.images]),
        arrays["train_images"],
    )
    assert len(splits.validation.labels) == 20
    np.testing.assert_array_equal(splits.test.labels, arrays["test_labels"])

    for epochs in (1, 2):
        status, _, errors = train(
            "--dataset=mnist",
            f"--epochs={epochs}",
            "--batch_size=90",
            f"--data_dir={tmp_path}",
            "--resume",
        )
        assert (status, errors) == (0, "")
    folder = tmp_path / "runs" / "mnist-mnist-fa_usf_sn-s0"
    assert len(history(folder)) == 2
    assert json.loads((folder / "result.json").read_text())["test_error"] > 50


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_labels": None}, "test_labels"),
        ({"train_images": np.zeros((200, 28, 28), np.uint8)}, "(28, 28, 1)"),
        ({"train_images": np.zeros((200, 28, 28, 1))}, "float64"),
        ({"train_labels": np.arange(200)}, "0 to 9"),
        ({"train_labels": np.zeros(199, int)}, "199"),
        ({"train_labels": np.zeros(200)}, "0 to 9"),
        ({"test_labels": np.array([None] * 40)}, "damaged"),
        ("cut", "damaged"),
        ("emptied", "damaged"),
        ("flipped", "damaged"),
    ],
)
def test_damaged_file_of_arrays(changes, says, train, tmp_path):
    mnist_file(tmp_path, **changes if isinstance(changes, dict) else {})
    file = tmp_path / "mnist.npz"
    content = bytearray(file.read_bytes())
    if changes == "cut":
        content = content[: len(content) // 2]
    elif changes == "emptied":
        content = b""
    elif changes == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, _, errors = train("--dataset=mnist", f"--data_dir={tmp_path}")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert str(file) in errors
    assert says in errors
    assert "export" in errors
    assert not (tmp_path / "runs").exists()


def test_without_tensorflow_datasets(train, tmp_path, monkeypatch):
    without(monkeypatch, "tensorflow_datasets")
    status, _, errors = train("--dataset=cifar10", f"--data_dir={tmp_path}")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "cifar10.npz" in errors
    assert "train/export.py --dataset=cifar10" in errors


@pytest.fixture
def small_mnist(monkeypatch):
    """A network of a few weights in the place of MNIST's millions."""

    def network(x, classes):
        x = keras.layers.Conv2D(2, 5, 3, activation="relu", name="conv")(x)
        x = keras.layers.Flatten(name="flatten")(x)
        return keras.layers.Dense(classes, dtype="float32", name="fc")(x)

    small = networks.NETWORKS["mnist"]._replace(logits=network)
    monkeypatch.setitem(networks.NETWORKS, "mnist", small)


@pytest.fixture
def tfds_folder(tmp_path, capfd):
    """MNIST in the format that TFDS downloads to, but small."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Mnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(28, 28, 1)),
                            "label": tfds.features.ClassLabel(num_classes=10),
                        }
                    ),
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._examples(200),
                    "test": self._examples(40),
                }

            def _generate_examples(self):
                raise NotImplementedError

            def _examples(self, n):
                rng = np.random.default_rng(n)
                for i in range(n):
                    image = rng.integers(0, 256, (28, 28, 1), np.uint8)
                    yield i, {"image": image, "label": i % 10}

    Mnist(data_dir=tmp_path / "tfds").download_and_prepare()
    capfd.readouterr()  # its progress bars
    return tmp_path / "tfds"


@requires_tfds
@pytest.mark.usefixtures("small_mnist")
def test_tensorflow_datasets(train, tmp_path, tfds_folder):
    splits = splits_of("mnist", str(tfds_folder))
    assert [len(split.labels) for split in splits] == [180, 20, 40]
    assert splits.train.images.dtype == np.uint8

    arguments = ["--dataset=mnist", "--epochs=1", "--batch_size=60"]
    status, _, errors = train(*arguments, f"--data_dir={tfds_folder}")
    assert (status, errors) == (0, "")
    folder = tmp_path / "runs" / "mnist-mnist-fa_usf_sn-s0"
    assert json.loads((folder / "result.json").read_text())["test_error"] > 50

    records = next(tfds_folder.rglob("*-train.tfrecord*"))
    records.write_bytes(records.read_bytes()[:-1000])
    status, _, errors = train(
        *arguments, "--seed=1", f"--data_dir={tfds_folder}"
    )
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "could not be read" in errors


# The export.


@requires_tfds
def test_export(tmp_path, tfds_folder, capfd):
    arguments = ["export.py", "--dataset=mnist", f"--data_dir={tfds_folder}"]
    folder = tmp_path / "new" / "arrays"
    assert export.run([*arguments, f"--to={folder}"]) == 0
    output, errors = capfd.readouterr()
    file = folder / "mnist.npz"
    megabytes = file.stat().st_size / 1e6
    assert output == (
        f"{file}: 200 training and 40 test images, {megabytes:.1f} MB\n"
    )
    assert errors == ""
    assert list(folder.iterdir()) == [file]

    for split, other in zip(
        splits_of("mnist", str(folder)), splits_of("mnist", str(tfds_folder))
    ):
        np.testing.assert_array_equal(split.images, other.images)
        np.testing.assert_array_equal(split.labels, other.labels)

    before = file.read_bytes()
    assert export.run([*arguments, f"--to={folder}"]) == 1
    assert re.fullmatch(
        r"export\.py: .*exists already.*\n", capfd.readouterr().err
    )
    assert file.read_bytes() == before


@requires_tfds
def test_export_that_fails_leaves_nothing(
    tmp_path, tfds_folder, capfd, monkeypatch
):
    def full(file, **arrays):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    folder = tmp_path / "arrays"
    status = export.run(
        ["export.py", "--dataset=mnist", f"--data_dir={tfds_folder}",
         f"--to={folder}"]
    )  # fmt: skip
    assert status == 1
    assert "No space left" in capfd.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--to={here}", "--dataset=cifar10"),
        ("--dataset=mnist", "--to"),
        ("--dataset=digits --to={here}", "mnist, fashion_mnist, cifar10"),
        ("--dataset=mnist --to={here} --data_dir={here}/none", "mnist"),
        ("--dataset=mnist --to={here} --form=npz", "--helpfull"),
    ],
)
def test_bad_input_of_the_export(arguments, says, tmp_path, capfd):
    argv = ["export.py", *arguments.format(here=tmp_path).split()]
    assert export.run(argv) in (1, 2)
    output, errors = capfd.readouterr()
    assert re.fullmatch(r"export\.py: .+\n", errors), errors
    assert says in errors
    assert output == ""
    assert list(tmp_path.iterdir()) == []


# Models and schedule.


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("digits", ["conv1", "conv2", "fc1", "fc2"], 151_306),
        ("mnist", ["conv1", "conv2", "fc1", "fc2"], 3_274_634),
        ("cifar10_1", ["conv1", "conv2", "fc1", "fc2", "fc3"], 1_068_298),
        ("cifar10_2", [f"conv{i}" for i in range(1, 10)], 1_369_738),
    ],
)
def test_networks(name, layers, parameters):
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = networks.NETWORKS[name]
    model = networks.build(name, 10)
    with_kernel = [layer for layer in model.layers if hasattr(layer, "kernel")]
    assert [layer.name for layer in with_kernel] == layers
    assert model.count_params() == parameters
    assert model.compute_dtype == "bfloat16"
    assert with_kernel[0].compute_dtype == "bfloat16"
    logits = model(np.zeros((2, *network.input_shape), "float32"))
    assert logits.shape == (2, 10)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"


@pytest.mark.parametrize("method", ["fa_usf_sn", "dfa", "dense_fa"])
def test_networks_of_raw_images(method):
    """The layers in front change nothing of what the network does."""
    config = config_of("--dataset=cifar10", f"--method={method}")
    model = models.build(config)
    assert model.input_shape == (None, 32, 32, 3)
    assert model.inputs[0].dtype == "uint8"
    bare = keras_fa.to_backprop(model)
    assert [layer.name for layer in bare.layers if layer.weights] == [
        "conv1", "conv2", "fc1", "fc2", "fc3"
    ]  # fmt: skip
    network = networks.build("cifar10_1", 10)
    network.set_weights(bare.get_weights())
    images = numbered(4).images
    centres = images[:, 4:28, 4:28].astype("float32")
    centres -= centres.mean((1, 2, 3), keepdims=True)
    centres /= centres.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        array(model(images, training=False)),
        array(network(centres)),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 2, 99])
def test_learning_rate(warmup_epochs):
    config = config_of(
        "--epochs=4", "--learning_rate=0.1", f"--warmup_epochs={warmup_epochs}"
    )
    schedule = models.learning_rate(config, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in range(41)]
    top = min(int(warmup_epochs * 10), 39)
    assert rates[top] == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[40] == pytest.approx(0, abs=1e-8)
    if top:
        assert rates[0] == 0
    middle = (top + 40) // 2
    expected = 0.05 * (1 + math.cos(math.pi * (middle - top) / (40 - top)))
    assert rates[middle] == pytest.approx(expected, rel=1e-5)
