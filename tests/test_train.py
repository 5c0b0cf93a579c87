"""The program in train/, run as a user runs it."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import data
import keras
import main
import models
import numpy as np
import pytest
import report
import runs
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

import keras_fa  # noqa: F401 - registers what saved models are made of

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"seconds", "examples_per_second"}


@pytest.fixture(autouse=True)
def _dtype_policy():
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def train(tmp_path, capfd):
    """Runs the program in this process; returns status, output, errors."""

    def run(*arguments, runs_dir=tmp_path / "runs"):
        status = main.run(["main.py", f"--runs_dir={runs_dir}", *arguments])
        output, errors = capfd.readouterr()
        return status, output, errors

    return run


def in_new_process(*command, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


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
    on_epoch_end = runs.RunWriter.on_epoch_end

    def interrupted(self, index, logs=None):
        on_epoch_end(self, index, logs)
        if index + 1 == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunWriter, "on_epoch_end", interrupted)


# The runs.


def test_main_job(tmp_path):
    """What the README starts with, from the project's root."""
    done = in_new_process(
        "train/main.py",
        "--flagfile=digits_usf.flags",
        "--epochs=10",  # a third of its length
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
    loaded = in_new_process(
        "-c",
        "import sys, keras, keras_fa\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "print(type(model).__name__, model.name, 'main' in sys.modules)",
        folder / "model.keras",
        cwd=tmp_path,
    )
    assert loaded.stdout.split() in (
        ["Sequential", "digits", "False"],
        ["Functional", "digits", "False"],
    ), loaded.stderr


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
    assert result["versions"]["keras"] == keras.__version__
    assert result["examples_per_second"] > 0

    rows = history(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = rows[-1]
    assert result["train_error"] == main.error(float(last["accuracy"]))
    assert result["validation_error"] == main.error(float(last["val_accuracy"]))
    seconds = sum(float(row["seconds"]) for row in rows)
    assert result["seconds"] == pytest.approx(seconds, abs=0.01)
    assert float(last["learning_rate"]) == pytest.approx(0, abs=1e-9)
    for row in rows:
        measured = row["epoch"] == "2"
        for layer in ("conv1", "conv2", "fc1"):
            assert bool(row[f"alignment/angle/{layer}"]) == measured

    # The test error is that of the saved model on the test images.
    dataset = data.DATASETS["digits"]
    splits = dataset.load(None, False)
    model = keras.saving.load_model(folder / "model.keras")
    assert type(model) in (keras.Sequential, keras.Model) or isinstance(
        model, keras.src.models.functional.Functional
    )
    wrong = (
        model.predict(splits.test.images / 16.0, verbose=0).argmax(-1)
        != splits.test.labels
    )
    assert result["test_error"] == pytest.approx(100 * wrong.mean(), abs=1e-3)


def test_tensorboard(train, tmp_path):
    assert train("--epochs=2", "--alignment_every=1")[0] == 0
    folder = tmp_path / "runs" / "digits-digits-fa_usf_sn-s0"
    rows = history(folder)

    def curve(subrun, tag):
        events = EventAccumulator(str(folder / subrun)).Reload()
        return [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]

    for subrun, tag, column in [
        ("train", "epoch_loss", "loss"),
        ("validation", "epoch_accuracy", "val_accuracy"),
        ("alignment", "alignment/angle/conv1", "alignment/angle/conv1"),
    ]:
        points = curve(subrun, tag)
        assert [step for step, _ in points] == [0, 1]
        np.testing.assert_allclose(
            [value for _, value in points],
            [float(row[column]) for row in rows],
            rtol=1e-6,
        )


def test_same_seed_same_result_in_another_process(train, tmp_path):
    arguments = ["--epochs=2", "--method=fa_usf_sn", "--batch_size=128"]
    name = "digits-digits-fa_usf_sn-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0
    done = in_new_process(
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
        ("fa_usf_sn", ["--alignment_every=1"]),
        ("bp_noise", ["--optimizer=sgd", "--warmup_epochs=1.5"]),
        ("fa_usf_const_ei", ["--optimizer=adamw"]),
        ("dfa", ["--dtype_policy=mixed_float16"]),
    ],
)
def test_resumed_run_equals_uninterrupted_one(
    method, arguments, train, tmp_path, monkeypatch
):
    def with_dropout(input_shape, classes):
        layers = models.digits(input_shape, classes).layers
        layers.insert(-1, keras.layers.Dropout(0.3, name="dropout"))
        return keras.Sequential([keras.Input(input_shape), *layers])

    network = models.NETWORKS["digits"]._replace(build=with_dropout)
    monkeypatch.setitem(models.NETWORKS, "digits", network)
    arguments = [
        f"--method={method}",
        "--epochs=3",
        "--batch_size=128",
        *arguments,
    ]
    name = f"digits-digits-{method}-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0

    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        status, _, errors = train(*arguments, runs_dir=tmp_path / "b")
    assert status == 130
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "b" / name / "result.json").exists()
    status, output, _ = train(*arguments, "--resume", runs_dir=tmp_path / "b")
    assert status == 0
    assert "2 of 3 epochs are trained" in output

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
    assert "finished already, after 1 epochs" in output
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


def test_resume_of_a_folder_without_a_checkpoint_starts(train, tmp_path):
    folder = tmp_path / "runs" / "digits-digits-bp-s0"
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("epoch\n1\n")
    assert train("--method=bp", "--epochs=1", "--resume")[0] == 0
    assert [row["epoch"] for row in history(folder)] == ["1"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_damaged_checkpoint(damage, train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        train("--method=bp", "--epochs=2")
    checkpoint = tmp_path / "runs" / "digits-digits-bp-s0" / "model.keras"
    content = bytearray(checkpoint.read_bytes())
    if damage == "cut":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
    elif damage == "emptied":
        checkpoint.write_bytes(b"")
    else:
        models.digits((8, 8, 1), 10).save(checkpoint)
    status, _, errors = train("--method=bp", "--epochs=2", "--resume")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "damaged" in errors
    assert "Delete the folder" in errors


def test_checkpoint_of_another_network(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        train("--method=bp", "--epochs=2")
    folder = tmp_path / "runs" / "digits-digits-bp-s0"
    with zipfile.ZipFile(folder / "model.keras") as archive:
        run = archive.read("run.json")
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    other.save(folder / "model.keras")
    with zipfile.ZipFile(folder / "model.keras", "a") as archive:
        archive.writestr("run.json", run)
    status, _, errors = train("--method=bp", "--epochs=2", "--resume")
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "does not fit" in errors


def test_divergence(train, tmp_path):
    status, _, errors = train(
        "--method=bp", "--epochs=2", "--optimizer=sgd", "--learning_rate=1e30"
    )
    assert status == 1
    assert "epoch 1 of 2" in errors
    assert "--learning_rate=1e+30" in errors
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
        main.parse(["main.py", *flagfile, "--epochs=2"])
        config = main.settings()
        assert (config.method, config.seed, config.epochs) == ("bp", 5, 2)


@pytest.mark.parametrize(
    "flagfile", sorted(f.name for f in main.FLAGFILES.glob("*.flags"))
)
def test_flagfiles(flagfile):
    main.parse(["main.py", f"--flagfile={flagfile}"])
    config = main.settings()
    main.check(config)
    stem = flagfile.removesuffix(".flags")
    assert f"{config.dataset}_{config.method.split('_')[-1]}".startswith(
        stem.replace("usf", "sn")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps_per_execution=4"],
        ["--dtype_policy=mixed_bfloat16"],
        ["--jit_compile"],
    ],
)
def test_ways_to_run(arguments, train, tmp_path):
    common = ["--method=bp", "--epochs=1", "--batch_size=128"]
    assert train(*common, runs_dir=tmp_path / "a")[0] == 0
    assert train(*common, *arguments, runs_dir=tmp_path / "b")[0] == 0
    row, other = (
        history(tmp_path / x / "digits-digits-bp-s0")[0] for x in ("a", "b")
    )
    # 10 steps are rounded down to 8 by --steps_per_execution=4.
    tolerance = 0.2 if arguments[0].startswith("--steps") else 0.02
    assert row["loss"] != other["loss"]
    assert float(row["loss"]) == pytest.approx(
        float(other["loss"]), rel=tolerance
    )


def test_mirrored_replicas_equal_one_device(train, tmp_path):
    arguments = ["--epochs=2", "--batch_size=128", "--alignment_every=1"]
    name = "digits-digits-fa_usf_sn-s0"
    assert train(*arguments, runs_dir=tmp_path / "a")[0] == 0
    done = in_new_process(
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
    ("--dataset=cifar", "digits|mnist"),
    ("--model=vgg", "cifar10_1"),
    ("--method=usf", "fa_usf_sn"),
    ("--optimizer=lion", "adamw"),
    ("--strategy=tpus", "mirrored"),
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
    ("--steps_per_execution=2", "fa_usf_sn"),
    ("--steps_per_execution=2 --method=bp --strategy=mirrored", "mirrored"),
    ("--jit_compile --strategy=mirrored", "mirrored"),
    ("--virtual_devices=2", "--strategy=mirrored"),
    ("--virtual_devices=-1 --strategy=mirrored", "at least 0"),
    ("--resume=perhaps", "resume"),
    ("--epoch=3", "epochs"),
    ("--fast", "--helpfull"),
    ("digits", "--name=value"),
    ("--seed=1 extra --seed=2", "extra"),
    ("--model=mnist", "--model=digits"),
    ("--dataset=mnist --model=cifar10_1", "--model=mnist"),
    ("--dataset=mnist --data_dir={missing}", "--download"),
    ("--dataset=mnist --data_dir={here}", "--download"),
    ("--dataset=cifar10 --data_dir={file}", "--download"),
    ("--flagfile=missing.flags", "digits_usf.flags"),
    ("--flagfile={missing}/a.flags", "digits_usf.flags"),
    ("--flagfile={here}", "digits_usf.flags"),
    ("--flagfile=", "digits_usf.flags"),
    ("--flagfile", "digits_usf.flags"),
    ("--flagfile={unknown}", "'depth'"),
    ("--flagfile={nested}", "nowhere.flags"),
    ("--flagfile={binary}", "binary"),
    ("--runs_dir={file}", "--runs_dir"),
    ("--runs_dir={file}/below", "--runs_dir"),
    ("--runs_dir=/proc/none", "--runs_dir"),
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


def test_batch_that_replicas_cannot_share(tmp_path):
    done = in_new_process(
        "train/main.py",
        "--strategy=mirrored",
        "--virtual_devices=3",
        "--batch_size=32",
        f"--runs_dir={tmp_path / 'runs'}",
    )
    assert done.returncode == 1
    assert re.fullmatch(r"main\.py: .*32.* 3 replicas.*\n", done.stderr)
    assert not (tmp_path / "runs").exists()


def test_every_flag_is_explained():
    explained = main.FLAGS.get_help()
    for name in vars(main.settings()):
        assert len(main.FLAGS[name].help) > 20, name
        assert f"--{name}" in explained or f"--[no]{name}" in explained


# Data.


def test_digits_split_is_fixed_and_stratified():
    splits = data.DATASETS["digits"].load(None, False)
    keras.utils.set_random_seed(3)
    again = data.DATASETS["digits"].load(None, False)
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
    return data.Split(images, np.arange(n))


def batches(split, seed=0, first_epoch=0, epochs=3):
    return [
        (images.numpy(), labels.numpy())
        for images, labels in data.training_batches(
            split,
            data.DATASETS["cifar10"],
            (24, 24, 3),
            batch_size=6,
            steps_per_epoch=3,
            seed=seed,
            first_epoch=first_epoch,
            epochs=epochs,
        )
    ]


def test_order_depends_on_seed_and_epoch_alone():
    split = numbered()
    whole = batches(split)
    assert len(whole) == 9
    epochs = [
        np.concatenate([labels for _, labels in whole[i : i + 3]])
        for i in (0, 3, 6)
    ]
    for labels in epochs:
        assert len(set(labels)) == 18
    assert not np.array_equal(epochs[0], epochs[1])

    late = batches(split, first_epoch=2)
    assert len(late) == 3
    for (images, labels), (other_images, other_labels) in zip(whole[6:], late):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)

    other_seed = np.concatenate([y for _, y in batches(split, seed=1)[:3]])
    assert not np.array_equal(other_seed, epochs[0])


def test_augmentation_is_a_window_perhaps_mirrored():
    dataset = data.DATASETS["cifar10"]._replace(white=1.0)
    split = numbered()
    seen = set()
    for step in range(3):
        crops = data.prepare(
            tf.constant(split.images),
            dataset,
            (24, 24, 3),
            tf.constant([0, step]),
        ).numpy()
        for image, crop in zip(split.images, crops):
            windows = {
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored, window in enumerate(
                    (crop, crop[:, ::-1]),
                )
                if np.array_equal(
                    image[top : top + 24, left : left + 24], window
                )
            }
            assert len(windows) == 1
            seen |= windows
    for values in zip(*seen):
        assert len(set(values)) >= 2
    assert {mirrored for _, _, mirrored in seen} == {0, 1}
    assert len(seen) > 30


def test_evaluation_sees_the_centre_once_each():
    split = numbered()
    prepared = list(
        data.evaluation_batches(
            split, data.DATASETS["cifar10"], (24, 24, 3), batch_size=8
        )
    )
    labels = np.concatenate([labels for _, labels in prepared])
    np.testing.assert_array_equal(labels, split.labels)
    image = prepared[0][0][0].numpy()
    assert image.shape == (24, 24, 3)
    centre = split.images[0, 4:28, 4:28].astype(float)
    np.testing.assert_allclose(
        image, (centre - centre.mean()) / centre.std(), atol=1e-4
    )


def test_tensorflow_datasets(train, tmp_path, capfd):
    """A run on a data set in the format that TFDS downloads to."""
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
    splits = data.DATASETS["mnist"].load(str(tmp_path / "tfds"), False)
    assert [len(split.labels) for split in splits] == [180, 20, 40]
    assert splits.train.images.dtype == np.uint8

    arguments = ["--dataset=mnist", "--epochs=1", "--batch_size=60"]
    status, _, errors = train(*arguments, f"--data_dir={tmp_path / 'tfds'}")
    assert (status, errors) == (0, "")
    folder = tmp_path / "runs" / "mnist-mnist-fa_usf_sn-s0"
    assert json.loads((folder / "result.json").read_text())["test_error"] > 50

    records = next((tmp_path / "tfds").rglob("*-train.tfrecord*"))
    records.write_bytes(records.read_bytes()[:-1000])
    status, _, errors = train(
        *arguments, "--seed=1", f"--data_dir={tmp_path / 'tfds'}"
    )
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert "could not be read" in errors


# Models and schedule.


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("digits", ["conv1", "conv2", "fc1", "fc2"], 151_306),
        ("mnist", ["conv1", "conv2", "fc1", "fc2"], 3_274_634),
        ("cifar10_1", ["conv1", "conv2", "fc1", "fc2", "fc3"], 1_068_298),
    ],
)
def test_networks(name, layers, parameters):
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = models.NETWORKS[name]
    model = network.build(network.input_shape, 10)
    with_kernel = [layer for layer in model.layers if hasattr(layer, "kernel")]
    assert [layer.name for layer in with_kernel] == layers
    assert model.count_params() == parameters
    assert model.compute_dtype == "bfloat16"
    assert with_kernel[0].compute_dtype == "bfloat16"
    logits = model(np.zeros((2, *network.input_shape), "float32"))
    assert logits.shape == (2, 10)
    assert logits.dtype == tf.float32


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 2, 99])
def test_learning_rate(warmup_epochs):
    main.parse(
        [
            "main.py",
            "--epochs=4",
            "--learning_rate=0.1",
            f"--warmup_epochs={warmup_epochs}",
        ]
    )
    schedule = main.learning_rate(main.settings(), steps_per_epoch=10)
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


# The table.


def write_run(folder, **result):
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("epoch\n")
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def test_report(tmp_path, capsys):
    for seed, error in enumerate((1.0, 2.0, 3.0)):
        write_run(
            tmp_path / f"a-s{seed}",
            method="fa_usf_sn",
            dataset="digits",
            model="digits",
            test_error=error,
        )
    write_run(
        tmp_path / "below" / "b",
        method="bp",
        dataset="cifar10",
        model="cifar10_1",
        test_error=17.25,
    )
    write_run(tmp_path / "unfinished")
    write_run(tmp_path / "incomplete", method="bp")
    write_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "result.json").write_text("{")
    assert report.run(["report.py", str(tmp_path)]) == 0
    output, errors = capsys.readouterr()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
    ]
    assert cells[0] == ["test error, %", "cifar10 cifar10_1", "digits digits"]
    assert cells[2:] == [
        ["bp", "17.25 (n=1)", "-"],
        ["fa_usf_sn", "-", "2.00 ± 1.00 (n=3)"],
    ]
    assert len(errors.splitlines()) == 3
    assert "unfinished: not finished" in errors
    assert "incomplete/result.json: damaged" in errors
    assert "damaged/result.json: damaged" in errors


def test_report_of_nothing(tmp_path, capsys):
    assert report.run(["report.py", str(tmp_path / "none")]) == 1
    assert report.run(["report.py"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
