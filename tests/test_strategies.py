"""Several devices and several workers, against one device."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import keras
import main
import numpy as np
import pytest
from backends import ON_TENSORFLOW

from experiment import devices
from experiment import networks
from experiment.datasets.arrays import Arrays
from experiment.datasets.arrays import Split
from experiment.datasets.arrays import Splits
from experiment.datasets.arrays import evaluation_steps
from experiment.devices.one import Share
from experiment.errors import UserError
from experiment.runfolder import writer
from keras_fa import convert
from keras_fa.callbacks import StrictNormalization

pytestmark = [
    pytest.mark.skipif(
        not ON_TENSORFLOW, reason="tf.distribute is TensorFlow's own"
    ),
    pytest.mark.usefixtures("optimized_graphs"),
]

WORKER = Path(__file__).with_name("workers.py")
METHODS = ("fa_usf_sn", "fa_usf_const_ei", "dfa")
# Ten steps an epoch.
COMMON = (
    "--epochs=2 --batch_size=128 --optimizer=sgd --label_smoothing=0.1 "
    "--alignment_every=1"
)


def folder_of(runs_dir, method):
    return runs_dir / f"digits-digits-{method}-s0"


def begin(runs_dir, method, *arguments):
    """Runs the program in this process."""
    return main.run(
        [
            "main.py",
            *COMMON.split(),
            f"--runs_dir={runs_dir}",
            f"--method={method}",
            *arguments,
        ]
    )


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return [
            {
                name: float(value)
                for name, value in row.items()
                if "second" not in name
            }
            for row in csv.DictReader(file)
        ]


def assert_close(folder, other, tolerance=2e-5):
    """The same is learned and measured, to rounding."""
    rows, other_rows = history(folder), history(other)
    assert len(rows) == len(other_rows) > 0
    for row, other_row in zip(rows, other_rows):
        assert row == pytest.approx(other_row, rel=1e-3, abs=1e-3, nan_ok=True)
    models = [
        keras.saving.load_model(f / "model.keras") for f in (folder, other)
    ]
    variables, others = (m.weights + m.optimizer.variables for m in models)
    assert len(variables) == len(others)
    for variable, other_variable in zip(variables, others):
        np.testing.assert_allclose(
            variable, other_variable, atol=tolerance, err_msg=variable.path
        )
    results = [
        json.loads((f / "result.json").read_text()) for f in (folder, other)
    ]
    for name in ("test_error", "validation_error", "train_error"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-3)


@pytest.fixture(scope="module")
def network():
    """The network with batch normalization, in place of digits' own."""
    import workers

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "digits", workers.NETWORKS["digits"])
        yield


@pytest.fixture(scope="module")
def alone(network, tmp_path_factory):
    """The folder of a method's run on one device, which is made once."""
    runs_dir = tmp_path_factory.mktemp("alone")

    def folder(method):
        if not folder_of(runs_dir, method).exists():
            assert begin(runs_dir, method) == 0
        return folder_of(runs_dir, method)

    return folder


@pytest.fixture
def mirrored(strategy, network, monkeypatch):
    """`--strategy=mirrored` is this process's two replicas."""
    opened = devices.Strategy(lambda config: devices.Distributed(strategy))
    monkeypatch.setitem(devices.STRATEGIES, "mirrored", opened)


# Replicas in one process.


@pytest.mark.parametrize(
    "method",
    [METHODS[0], pytest.param(METHODS[2], marks=pytest.mark.slow)],
)
def test_two_replicas_equal_one_device(method, mirrored, alone, tmp_path):
    arguments = ["--strategy=mirrored", "--steps_per_execution=2"]
    assert begin(tmp_path, method, *arguments) == 0
    assert_close(folder_of(tmp_path, method), alone(method))
    saved = keras.saving.load_model(folder_of(tmp_path, method) / "model.keras")
    assert type(saved).__name__ == "Functional"


@pytest.mark.slow
def test_replicas_are_stopped_and_go_on(
    mirrored, alone, tmp_path, monkeypatch, capfd
):
    """Inside an epoch, the means of whose metrics are those of all steps."""
    import workers

    unpatched = writer.RunWriter.on_train_batch_end
    monkeypatch.setattr(writer.RunWriter, "on_train_batch_end", unpatched)
    workers.stop_at(4)
    method = METHODS[1]
    arguments = ["--strategy=mirrored", "--resume"]
    assert begin(tmp_path, method, *arguments) == 0
    assert "stopped in epoch 2, after step 4" in capfd.readouterr().out
    monkeypatch.setattr(writer.RunWriter, "on_train_batch_end", unpatched)
    assert begin(tmp_path, method, *arguments) == 0
    assert_close(folder_of(tmp_path, method), alone(method))


@pytest.mark.slow
def test_scaled_loss_is_resumed(mirrored, tmp_path):
    """The state of mixed_float16's optimizer is there once."""
    arguments = ["--strategy=mirrored", "--dtype_policy=mixed_float16"]
    arguments += ["--batch_size=600", "--alignment_every=0"]
    assert begin(tmp_path, "fa_usf_sn", *arguments, "--epochs=1") == 0
    assert begin(tmp_path, "fa_usf_sn", *arguments, "--resume") == 0
    assert len(history(folder_of(tmp_path, "fa_usf_sn"))) == 2


def test_step_is_a_graph_of_fixed_shapes_without_the_host(strategy, network):
    """What a TPU needs, by the graph of the compiled step itself."""
    placement = devices.Distributed(strategy)
    with placement.scope():
        model = convert(
            networks.build("digits", 10, synchronized=True), "fa_usf_sn"
        )
    model = placement.adopt(
        model,
        lambda model: model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
            steps_per_execution=2,
        ),
    )
    split = Split(np.zeros((32, 8, 8, 1), np.float32), np.arange(32) % 10)
    batches = placement.feed(
        lambda share: Arrays(Splits(split, split, split)).training(
            share,
            batch_size=8,
            steps_per_epoch=4,
            seed=0,
            first_step=0,
            epochs=1,
        )
    )
    images, labels = batches.element_spec
    for value in (*images._component_specs, *labels._component_specs):
        assert value.shape[0] == 4
        assert value.shape.is_fully_defined()
    traced = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            function = self.model.train_function
            traced.append(function.get_concrete_function(iter(batches)))

    model.fit(
        batches,
        steps_per_epoch=2,
        callbacks=[StrictNormalization(), Look()],
        verbose=0,
    )
    graph = traced[0].graph
    definition = graph.as_graph_def()
    operations = [node.op for node in definition.node]
    for function in definition.library.function:
        operations += [node.op for node in function.node_def]
    assert "Conv2DBackpropFilter" in "".join(operations)
    assert any("Sign" in operation for operation in operations)
    host = {"PyFunc", "EagerPyFunc", "PyFuncStateless", "PrintV2", "Print"}
    assert not host & set(operations)


# Several workers.


RESERVED = []


def free_ports(number):
    """Ports that stay this process's until it ends, so nobody else is given
    them; TensorFlow shares them under TF_GRPC_REUSE_PORT."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("", 0))
    RESERVED.extend(sockets)
    return [one.getsockname()[1] for one in sockets]


def start_workers(tmp_path, *command_lines, environment=({}, {})):
    """Two workers with a folder each; their processes."""
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        cluster = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        train = str(Path(main.__file__).parent)
        processes.append(
            forks.Fork(
                [
                    sys.executable,
                    str(WORKER),
                    *(
                        f"{COMMON} --strategy=multi_worker {line} "
                        f"--runs_dir={tmp_path / str(index)}"
                        for line in command_lines
                    ),
                ],
                env={
                    **os.environ,
                    "TF_CONFIG": json.dumps(cluster),
                    "TF_GRPC_REUSE_PORT": "1",
                    "PYTHONPATH": train,
                    **environment[index],
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def ended(processes):
    """Exit status, output and errors of each."""
    said = [process.communicate(timeout=400) for process in processes]
    return [(p.returncode, *s) for p, s in zip(processes, said)]


@pytest.mark.slow
def test_two_workers_equal_one_device(alone, tmp_path):
    """Stopped by SIGTERM to one of them, inside an epoch, and uninterrupted.

    What the chief refuses ends both.
    """
    first, *others = METHODS
    chief, other = ended(
        start_workers(
            tmp_path,
            f"--method={first} --resume",
            f"--method={first} --resume",
            *(f"--method={method}" for method in others),
            f"--method={first}",
            environment=({}, {"STOP": "4"}),
        )
    )
    for index, (status, output, errors) in enumerate((chief, other)):
        assert status == 1
        assert "stopped in epoch 2, after step 4" in output
        assert "1 of 2 epochs are trained, and 4 of 10 steps" in output
        assert len(errors.splitlines()) == 1
        assert "this run exists already. Add --resume" in errors
        assert ("Worker 0 refused" in errors) == bool(index)
    assert chief[1].count("Test error") == 3
    assert "Test error" not in other[1]
    for method in METHODS:
        assert_close(folder_of(tmp_path / "0", method), alone(method))
    assert not (tmp_path / "1").exists()  # the chief alone writes


@pytest.mark.slow
def test_lost_worker(tmp_path):
    """The other one says so, and the job goes on from its checkpoint."""
    processes = start_workers(tmp_path, "--epochs=100")
    rows = folder_of(tmp_path / "0", "fa_usf_sn") / "history.csv"
    while not rows.exists() or len(rows.read_text().splitlines()) < 2:
        assert processes[0].poll() is None
        time.sleep(0.1)
    processes[1].kill()
    status, _, errors = ended(processes)[0]
    assert status == 1
    assert "Worker 0 of 2 lost another one" in errors
    assert "--resume" in errors
    assert len(errors.splitlines()) == 1
    done = len(history(rows.parent))
    for status, output, errors in ended(
        start_workers(tmp_path, f"--epochs={done + 1} --resume")
    ):
        assert status == 0, errors
        assert f"{done} of {done + 1} epochs are trained" in output
    assert len(history(rows.parent)) == done + 1


def test_workers_with_different_flags(tmp_path, monkeypatch, capfd):
    """As a worker sees it whose chief has another learning rate."""

    class Worker(devices.OneDevice):
        chief = False

        def tell(self, find):
            told = find()
            return {
                **told,
                "settings": {**told["settings"], "optimizer": "adam"},
            }

    opened = devices.Strategy(lambda config: Worker())
    monkeypatch.setitem(devices.STRATEGIES, "none", opened)
    assert begin(tmp_path, "fa_usf_sn") == 1
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "different flags (here: --optimizer)" in errors
    assert not list(tmp_path.iterdir())


TASK = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "needs TF_CONFIG"),
        ("{'cluster': 1}", "is not JSON"),
        ("[1]", "does not describe workers"),
        (json.dumps({"cluster": {"worker": ["a:1"]}}), "does not describe"),
        (json.dumps({"cluster": {"worker": "a:1"}, "task": TASK}), "describe"),
        (
            json.dumps(
                {
                    "cluster": {"worker": ["a:1"]},
                    "task": {"type": "worker", "index": 1},
                }
            ),
            "does not describe",
        ),
        (
            json.dumps({"cluster": {"ps": ["a:1"]}, "task": TASK}),
            "does not describe",
        ),
    ],
)
def test_wrong_cluster(text, says, monkeypatch, capfd, tmp_path):
    if text is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", text)
    assert begin(tmp_path, "fa", "--strategy=multi_worker") == 1
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert says in errors
    assert '"task": {"type": "worker", "index": 0}' in errors
    assert not list(tmp_path.iterdir())


def test_cluster():
    both = {"worker": ["a:1", "b:2"]}
    task = {"type": "worker", "index": 1}
    text = json.dumps({"cluster": both, "task": task})
    assert devices.cluster(text) == (1, ["a:1", "b:2"])


# TPUs, as far as they can be had without one.


def test_tpu_is_resolved_by_its_name(strategy, monkeypatch):
    import tensorflow as tf

    calls = []

    class Resolver:
        def __init__(self, name):
            calls.append(name)

        def master(self):
            return ""

    def note(name):
        return lambda resolver: calls.append((name, type(resolver)))

    def made(resolver):
        assert isinstance(resolver, Resolver)
        return strategy

    monkeypatch.setattr(
        tf.distribute.cluster_resolver, "TPUClusterResolver", Resolver
    )
    monkeypatch.setattr(
        tf.config, "experimental_connect_to_cluster", note("connect")
    )
    monkeypatch.setattr(
        tf.tpu.experimental, "initialize_tpu_system", note("initialize")
    )
    monkeypatch.setattr(tf.distribute, "TPUStrategy", made)
    placement = devices.tpu(SimpleNamespace(tpu="node-1"))
    assert calls == ["node-1", ("connect", Resolver), ("initialize", Resolver)]
    assert (placement.replicas, placement.workers, placement.chief) == (2, 1, 1)


@pytest.mark.parametrize("name", ["local", "grpc://localhost:1"])
def test_no_tpu(name, tmp_path):
    done = forks.run(
        main.__file__,
        "--dataset=imagenet2012",
        "--strategy=tpu",
        f"--tpu={name}",
        f"--runs_dir={tmp_path / 'runs'}",
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"--tpu={name}: no TPU can be used" in done.stderr
    assert "--strategy=none|mirrored|multi_worker" in done.stderr
    assert not (tmp_path / "runs").exists()


# Shares of the data.


def numbered(n):
    """Images that tell their number, and labels that do so too."""
    return Split(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), np.arange(n))


def batches_of(source, share, first_step=0):
    dataset = source.training(
        share,
        batch_size=8,
        steps_per_epoch=5,
        seed=3,
        first_step=first_step,
        epochs=2,
    )
    return [images.numpy().ravel().tolist() for images, _ in dataset]


def test_replicas_share_the_batches_of_one():
    source = Arrays(Splits(*[numbered(43)] * 3))
    whole = batches_of(source, Share())
    assert [len(batch) for batch in whole] == [8] * 10
    two = batches_of(source, Share(2, 0, 2))
    assert [a + b for a, b in zip(two[::2], two[1::2])] == whole
    workers = [batches_of(source, Share(4, 2 * i, 2)) for i in range(2)]
    joined = [
        [*a, *b, *c, *d]
        for a, b, c, d in zip(
            workers[0][::2], workers[0][1::2], workers[1][::2], workers[1][1::2]
        )
    ]
    assert joined == whole
    assert batches_of(source, Share(2, 0, 2), first_step=7) == two[14:]


@pytest.mark.parametrize("images", [1, 16, 43])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 4])
def test_evaluation_sees_each_image_once(images, replicas, multiple):
    batch_size, steps = evaluation_steps(images, 16, replicas, multiple)
    assert batch_size % replicas == 0
    assert steps % multiple == 0
    source = Arrays(Splits(*[numbered(images)] * 3))
    seen, total = [], 0.0
    for worker in range(replicas):
        share = Share(replicas, worker, 1)
        dataset = source.validation(share, batch_size, steps)
        for x, y, w in dataset.take(steps):
            assert len(x) == batch_size // replicas
            np.testing.assert_array_equal(np.ravel(x)[w > 0], y[w > 0])
            seen += y[w > 0].numpy().tolist()
            total += float(sum(w))
    assert sorted(seen) == list(range(images))
    assert total == pytest.approx(steps * batch_size)


def test_padding_changes_no_metric():
    rng = np.random.default_rng(0)
    split = Split(
        rng.normal(size=(43, 8, 8, 1)).astype(np.float32), np.arange(43) % 10
    )
    model = networks.build("digits", 10)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    expected = model.evaluate(*split, verbose=0)
    padded = Arrays(Splits(split, split, split)).validation(Share(), 16, 4)
    measured = model.evaluate(padded, steps=4, verbose=0)
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_chief_says_what_the_others_are_told():
    assert devices.OneDevice().tell(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="no"):
        devices.OneDevice().tell(_refuse)


def _refuse():
    raise UserError("no")
