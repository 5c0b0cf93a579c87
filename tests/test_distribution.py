"""Several devices of JAX by `keras.distribution`, against one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import keras
import main
import pytest
from backends import ON_JAX
from test_strategies import COMMON
from test_strategies import WORKER
from test_strategies import assert_close
from test_strategies import ended
from test_strategies import folder_of
from test_strategies import free_ports
from test_strategies import history

from experiment import devices
from experiment.errors import UserError

pytestmark = pytest.mark.skipif(
    not ON_JAX, reason="keras.distribution is JAX's; see test_strategies.py"
)
METHODS = (
    "fa_usf_sn",
    "fa_usf_const_ei",
    "dfa",
    "kolen_pollack",
    "weight_mirror",
)

# What the programs below have in common. The network is smooth: rounding turns
# no unit on or off.
_COMMON = f"""
METHODS = {METHODS}
"""
_COMMON += """
import keras
import numpy as np
from keras import distribution
from keras import layers
from keras_fa import convert
from keras_fa import methods

rng = np.random.default_rng(0)
x = rng.normal(size=(48, 6, 6, 3)).astype("float32")
y = rng.integers(0, 5, 48)


def trained(method, spread=None):
    keras.utils.set_random_seed(0)
    distribution.set_distribution(spread)
    stock = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(8, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("tanh", name="tanh"),
            layers.Flatten(name="flatten"),
            layers.Dense(16, activation="tanh", name="hidden"),
            layers.Dense(5, name="readout"),
        ]
    )
    stock.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model = convert(stock, method)
    callbacks = methods.METHODS[method].callbacks()
    model.fit(
        x,
        y,
        batch_size=16,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    distribution.set_distribution(None)
    return model


def assert_equal(model, other):
    models = model, other
    variables, others = (m.weights + m.optimizer.variables for m in models)
    assert len(variables) == len(others)
    for variable, other in zip(variables, others):
        np.testing.assert_allclose(
            variable, other, atol=1e-5, err_msg=variable.path
        )
"""

_REPLICATED = (
    _COMMON
    + """
for method in METHODS:
    alone = trained(method)
    model = trained(method, distribution.DataParallel())
    for variable in model.weights:
        on_each = variable.value.addressable_shards
        assert len(on_each) == len(distribution.list_devices())
        for shard in on_each:
            np.testing.assert_array_equal(shard.data, on_each[0].data)
    assert_equal(model, alone)
    print(method, len(on_each))
"""
)


_SHARDED = (
    _COMMON
    + """
mesh = distribution.DeviceMesh(
    (2, 2), ["batch", "model"], distribution.list_devices()
)
layouts = distribution.LayoutMap(mesh)
layouts[".*conv/kernel"] = (None, None, None, "model")
layouts[".*hidden/kernel"] = (None, "model")
spread = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
model = trained("kolen_pollack", spread)
for name in ("conv", "hidden"):
    layer = model.get_layer(name)
    w, b = layer.kernel, layer.feedback_kernel
    moved = [v for v in model.optimizer.variables if name in v.path]
    assert len(moved) == 2 + (layer.bias is not None)
    halves = [v for v in (w, b, *moved) if v.shape == w.shape]
    assert len(halves) == 4
    half = (*w.shape[:-1], w.shape[-1] // 2)
    for variable in halves:
        value = variable.value
        assert value.sharding.spec[-1] == "model", variable.path
        assert value.addressable_shards[0].data.shape == half, variable.path
assert_equal(model, trained("kolen_pollack"))
"""
)


def virtual(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts have several CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    monkeypatch.setenv("XLA_FLAGS", flags)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_equal_one_device(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has all weights, which are equal to the bit."""
    virtual(count, monkeypatch)
    done = forks.run("-c", _REPLICATED)
    assert done.returncode == 0, done.stderr
    expected = "".join(f"{method} {count}\n" for method in METHODS)
    assert done.stdout == expected


def test_shards_of_the_feedback_are_those_of_its_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So are the momenta of both, and one device learns the same."""
    virtual(4, monkeypatch)
    done = forks.run("-c", _SHARDED)
    assert done.returncode == 0, done.stderr


# The program.


def options(runs_dir: Path, *others: str) -> str:
    """A command line of the program."""
    return " ".join([COMMON, f"--runs_dir={runs_dir}", *others])


def result_of(runs_dir: Path, method: str) -> dict:
    return json.loads((folder_of(runs_dir, method) / "result.json").read_text())


def test_program_on_four_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped inside an epoch, goes on, and equals one device."""
    monkeypatch.setenv("STOP", "4")
    four, one = tmp_path / "4", tmp_path / "1"
    spread = "--strategy=data_parallel --virtual_devices=4 --resume"
    done = forks.run(WORKER, *[options(four, spread)] * 2, options(one))
    assert done.returncode == 0, done.stderr
    assert "stopped in epoch 2, after step 4" in done.stdout
    assert "1 of 2 epochs are trained, and 4 of 10 steps" in done.stdout
    assert_close(folder_of(four, "fa_usf_sn"), folder_of(one, "fa_usf_sn"))
    result = result_of(four, "fa_usf_sn")
    assert (result["replicas"], result["workers"]) == (4, 1)


PLACE = devices.PROCESSES[2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("", "", ""), None),
        (("host0:1", "3", "2"), (2, 3, "host0:1")),
        (("a:1,b:2", "2", "0"), (0, 2, "a:1,b:2")),
    ],
)
def test_processes(values: tuple, expected: tuple | None) -> None:
    assert devices.processes(dict(zip(devices.PROCESSES, values))) == expected


@pytest.mark.parametrize(
    "values",
    [
        ("host0:1", "", "0"),
        ("", "2", "0"),
        ("host0", "2", "0"),
        ("host0:1", "two", "0"),
        ("host0:1", "2", "2"),
        ("host0:1", "2", "-1"),
        ("a:1,b:2", "3", "0"),
    ],
)
def test_wrong_processes(
    values: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(devices.PROCESSES, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="do not describe processes"):
        devices.data_parallel(0, None)


# Several processes, which is several machines as far as JAX knows.


def start_processes(
    *command_lines: str, environment: tuple[dict, dict] = ({}, {})
) -> list[subprocess.Popen]:
    """Two processes that run the same command lines, `{index}` filled in."""
    (port,) = free_ports(1)
    told = dict(zip(devices.PROCESSES, (f"127.0.0.1:{port}", "2")))
    train = str(Path(main.__file__).parent)
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                *(line.format(index=index) for line in command_lines),
            ],
            env={
                **os.environ,
                **told,
                PLACE: str(index),
                "PYTHONPATH": train,
                **environment[index],
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


SPREAD = "--strategy=data_parallel"


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One hears SIGTERM inside an epoch, and the chief refuses the last run.

    Each has a folder of its own, and only the chief's is written or read.
    """
    first, *others = (
        # Kolen-Pollack learns from weight decay.
        f"--method={method} --weight_decay=0.01"
        for method in METHODS
    )
    two, one = tmp_path / "{index}", tmp_path / "one"
    resumed = options(two, SPREAD, first, "--resume")
    said = ended(
        start_processes(
            resumed,
            resumed,
            *(options(two, SPREAD, other) for other in others),
            options(two, SPREAD, first),
            environment=({}, {"STOP": "4"}),
        )
    )
    for index, (status, output, errors) in enumerate(said):
        assert status == 1
        assert "stopped in epoch 2, after step 4" in output
        assert "1 of 2 epochs are trained, and 4 of 10 steps" in output
        assert "this run exists already. Add --resume" in errors
        assert ("Worker 0 refused" in errors) == bool(index)
    assert not (tmp_path / "1").exists()
    done = forks.run(WORKER, *(options(one, m) for m in (first, *others)))
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert_close(folder_of(tmp_path / "0", method), folder_of(one, method))
        result = result_of(tmp_path / "0", method)
        assert (result["replicas"], result["workers"]) == (2, 2)


# ImageNet.


def photos(data_dir: Path, runs_dir: Path, *others: str) -> str:
    """A command line that trains on a folder of small photos."""
    return (
        f"--dataset=imagenet2012 --model=imagenet_1 --image_size=32 --epochs=1 "
        f"--batch_size=4 --data_dir={data_dir} --runs_dir={runs_dir} "
        + " ".join(others)
    )


@pytest.mark.slow
def test_photos_are_streamed_to_all_devices(tmp_path: Path) -> None:
    """Two devices learn what one does; two processes have photos of their own.

    In each step a process makes its half of the batch, and in an evaluation
    all photos come once.
    """
    pytest.importorskip("tensorflow_datasets")
    import photo_folder

    from experiment.datasets import photos as stream

    photo_folder.write(tmp_path, 12, 5, shards=2)
    name = "imagenet2012-imagenet_1-fa_usf_sn-s0"
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    done = forks.run(
        WORKER,
        photos(tmp_path, two, SPREAD, "--virtual_devices=2"),
        photos(tmp_path, one),
    )
    assert done.returncode == 0, done.stderr
    assert_close(two / name, one / name)
    for status, _, errors in ended(
        start_processes(photos(tmp_path, both, SPREAD))
    ):
        assert status == 0, errors
    result = json.loads((both / name / "result.json").read_text())
    assert (result["replicas"], result["workers"]) == (2, 2)
    model = keras.saving.load_model(both / name / "model.keras")
    images, labels = stream.Photos(str(tmp_path), 32).probe(5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    (row,) = history(both / name)
    expected = float(loss(labels, model(images, training=False)))
    assert row["val_loss"] == pytest.approx(expected, rel=1e-4)
