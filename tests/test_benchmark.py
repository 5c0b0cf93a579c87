"""The benchmark, on runs that are too short to tell anything about time."""

import json
import math
from pathlib import Path
from typing import Any

import benchmark
import forks
import keras
import pytest
from backends import ON_TENSORFLOW
from backends import requires_tensorflow

import keras_fa
from experiment import networks
from experiment.errors import UserError
from experiment.timing import biotorch
from experiment.timing import measure
from experiment.timing import memory
from experiment.timing import options
from experiment.timing import report as timings
from experiment.timing import trainees
from keras_fa.methods import METHODS

DIGITS = networks.build("digits", 10)
KERNELS = [layer.kernel for layer in DIGITS.layers if hasattr(layer, "kernel")]
WEIGHTS = sum(math.prod(kernel.shape) for kernel in KERNELS)
STORED = {
    "bp": 0,
    "fa": 4 * WEIGHTS,
    "fa_usf_init": 4 * WEIGHTS,
    "fa_usf_init_ei": 5 * WEIGHTS,  # a byte for each sign
    "fa_usf_sn": 0,
    "bp_const": 4 * len(KERNELS),
    "fa_usf_const": 4 * len(KERNELS),
    "fa_usf_const_ei": WEIGHTS + 4 * len(KERNELS),
    "bp_alignment": 4 * WEIGHTS,
    "bp_ei": WEIGHTS,
    "fa_usf_sn_ei": WEIGHTS,
    "fa_usf_init_ei_silent": 5 * WEIGHTS,
    "fixed_sign_feedback": 4 * WEIGHTS,
    "frozen": 0,
    "dfa": 4 * 10 * (8 * 8 * 32 + 8 * 8 * 64 + 128),
}
STORED |= dict.fromkeys(("drtp", "direct_kolen_pollack"), STORED["dfa"])
STORED |= {
    name: 4 * WEIGHTS
    for name, method in METHODS.items()
    if method.feedback_learning is not None and name != "pfa"
}
TINY = "--networks=digits --batch_size=4 --rounds=3 --steps=2".split()


def run(*arguments: str) -> int:
    return benchmark.run(["benchmark.py", *arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """What one short run of three methods leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        return short_run(tmp_path_factory)


def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("benchmark") / "below" / "digits"
    status = run(
        *TINY,
        "--methods=fa,fa_usf_sn,dfa",
        "--dtype_policies=float32,mixed_bfloat16",
        "--peak_tflops=1",
        "--nomemory",
        f"--out={out}",
    )
    assert status == 0
    assert {p.name for p in out.parent.iterdir()} == {
        "digits.json",
        "digits.md",
    }
    return (
        json.loads(out.with_suffix(".json").read_text()),
        out.with_suffix(".md").read_text(),
    )


def test_every_time_is_kept(written: tuple[dict, str]) -> None:
    results, _ = written
    assert [(r["network"], r["dtype_policy"]) for r in results["results"]] == [
        ("digits", "float32"),
        ("digits", "mixed_bfloat16"),
    ]
    for result in results["results"]:
        rows = {row["name"]: row for row in result["rows"]}
        assert list(rows) == ["stock", "fa", "fa_usf_sn", "dfa"] + [
            options.MONITOR
        ]
        for row in rows.values():
            assert len(row["seconds_per_step"]) == 3
            assert min(row["seconds_per_step"]) > 0
            assert row["ratio"]["n"] == 3
            if row["name"] != options.MONITOR:
                assert len(row["seconds_per_prediction"]) == 3
                assert min(row["seconds_per_prediction"]) > 0
        assert rows["stock"]["ratio"]["median"] == 1
        assert rows["stock"]["prediction_ratio"]["median"] == 1
        assert rows["fa_usf_sn"]["feedback_bytes"] == 0
        assert result["parameters"] == DIGITS.count_params()


def test_it_says_where_it_ran(written: tuple[dict, str]) -> None:
    results, text = written
    versions = results["versions"]
    assert versions["keras"] == keras.__version__
    assert versions["keras_fa"] == keras_fa.__version__
    assert keras.backend.backend() in versions
    assert results["settings"]["batch_size"] == 4
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["memory_bytes"] > 0
    assert f"keras {keras.__version__}" in text
    assert results["environment"]["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS=2 python train/benchmark.py" in text
    assert "SGD with momentum 0.9" in text


def test_models_take_turns(written: tuple[dict, str]) -> None:
    results, _ = written
    for result in results["results"]:
        names = sorted(row["name"] for row in result["rows"])
        orders = result["order"]
        assert [sorted(order) for order in orders] == [names] * 3
        assert len(set(map(tuple, orders))) == 3


def test_table(written: tuple[dict, str]) -> None:
    results, text = written
    for result in results["results"]:
        table = timings.table(result)
        assert table in text
        heading, _, head, rule, *rows = table.strip().splitlines()
        assert heading == f"## digits, {result['dtype_policy']}"
        assert [name.strip() for name in head.strip("|").split("|")] == [
            "method",
            "ms/step",
            "ratio (quartiles)",
            "images/s",
            "predict, ratio (quartiles)",
            "feedback bytes",
            "peak memory",
            "share of peak",
        ]
        widths = {line.count("|") for line in (head, rule, *rows)}
        assert widths == {9}
        for line, row in zip(rows, result["rows"]):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0] == row["name"]
            assert cells[1] == f"{1e3 * row['median_seconds']:.2f}"


def test_the_ratio_is_that_of_the_same_round() -> None:
    ratio = measure.spread([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert ratio == {
        "median": 3.0,
        "first_quartile": 2.5,
        "third_quartile": 3.5,
        "n": 3,
    }


@pytest.mark.parametrize("method", STORED)
def test_feedback_bytes_are_exact(method: str) -> None:
    converted = keras_fa.convert(DIGITS, method)
    extra = memory.bytes_of(converted) - memory.bytes_of(DIGITS)
    assert extra == STORED[method]


def test_operations_by_hand() -> None:
    first = 8 * 8 * (3 * 3 * 1 * 32)
    others = 8 * 8 * (3 * 3 * 32 * 64) + 4 * 4 * 64 * 128 + 128 * 10
    # Forward, kernels and inputs; no input of the first layer.
    wanted = 2 * 16 * (2 * first + 3 * others)
    assert memory.operations_of(DIGITS, 16) == wanted


def test_networks_there_are() -> None:
    assert {"digits", "cifar10_1", "cifar10_2", "resnet50"} <= set(
        trainees.NETWORKS
    )


def test_a_policy_is_set_and_taken_back() -> None:
    model = trainees.build("digits", "mixed_bfloat16")
    assert model.get_layer("conv1").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"


def test_a_block_trains_and_is_timed() -> None:
    model = trainees.build("digits", "float32")
    trainees.compile_alike(model, 2)
    batch = trainees.random_batch(model, 4)
    before = int(model.optimizer.iterations)
    trainee = trainees.Trainee(model, [], batch, steps=6)
    assert trainee.block() > 0
    assert int(model.optimizer.iterations) == before + 2 + 6


def test_form_of_the_maps() -> None:
    stock = trainees.build("digits", "float32")
    sizes = {
        maps: memory.bytes_of(trainees.converted(stock, "dense_fa", maps))
        for maps in ("dense", "convolutional")
    }
    assert 0 < sizes["convolutional"] < sizes["dense"]
    chained = trainees.converted(stock, "fa", "convolutional")
    assert memory.bytes_of(chained) > memory.bytes_of(stock)


@pytest.mark.slow
def test_peak_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # New ones, but for the imports.
    monkeypatch.setattr(
        memory.multiprocessing, "get_context", lambda kind: forks.SERVER
    )
    small, large = (
        memory.peak_in_new_process(
            "digits", "float32", "fa_usf_sn", "dense", n, 1
        )
        for n in (4, 2048)
    )
    activations = 4 * 8 * 8 * (32 + 64)  # bytes per image, the convolutions'
    assert large - small > 2000 * activations


def test_memory_on_a_system_that_does_not_tell(
    written: tuple[dict, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "accelerator", lambda: None)
    monkeypatch.setattr(memory, "STATUS", Path("nowhere"))
    peak = memory.peak_of_training("digits", "float32", None, "dense", 4, 1)
    assert peak is None
    results, text = written
    assert "not measured |" in text  # as with --nomemory
    machine = {**results["machine"], "memory_bytes": None}
    text = timings.report({**results, "machine": machine})
    assert "memory not measured, accelerator" in text


def test_a_method_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    convert = keras_fa.convert

    def convert_or_refuse(
        model: keras.Model, name: str, **options: Any
    ) -> keras.Model:
        if name == "dense_fa":
            raise ValueError("The maps need\n9 TB of memory.")
        return convert(model, name, **options)

    monkeypatch.setattr(keras_fa, "convert", convert_or_refuse)
    status = run(
        *TINY,
        "--methods=bp,dense_fa",
        "--dtype_policies=float32",
        "--nomemory",
        f"--out={tmp_path / 'b'}",
    )
    assert status == 0
    line = "- left out: dense_fa: The maps need 9 TB of memory.\n"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "b.md").read_text()
    (result,) = json.loads((tmp_path / "b.json").read_text())["results"]
    names = [row["name"] for row in result["rows"]]
    assert names == ["stock", "bp", options.MONITOR]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--networks=digits,alexnet"], "cifar10_2"),
        (["--methods=fa,usf"], "fa_usf_sn"),
        (["--methods=FA"], "--methods=FA: no such name (did you mean fa?). -"),
        (["--networks=cifar"], "no such name (did you mean cifar10_"),
        (["--methods="], "--methods= is empty. Name one"),
        (["--dtype_policies="], "--dtype_policies= is empty. Name one"),
        (["--dtype_policies=int8"], "mixed_bfloat16"),
        (["--networks="], "--input"),
        (["--steps=0"], "--steps"),
        (["--steps=3", "--steps_per_execution=2"], "multiple"),
        (["--rounds=1"], "at least 2"),
        (["--batch_size=many"], "--batch_size"),
        (["--peak_tflops=-1"], "--peak_tflops"),
        (["--peer=pytorch"], "biotorch"),
        (["--json=x"], "--helpfull"),
        (["cifar10_1"], "--helpfull"),
        (["--out=/dev/null/b"], "--out"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capfd: Any
) -> None:
    status = run(f"--out={tmp_path / 'below' / 'b'}", *arguments)
    output, errors = capfd.readouterr()
    assert status in (1, 2)
    assert output == ""
    assert errors.startswith("benchmark.py: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not list(tmp_path.iterdir())


def test_help_lists_the_flags(capsys: Any) -> None:
    assert run("--helpfull") == 0
    output = capsys.readouterr().out
    assert "--peak_tflops" in output
    assert "experiment/timing says how" in output


# BioTorch.


def test_a_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.setattr(
        biotorch.importlib.util,
        "find_spec",
        lambda name: None if name == "biotorch" else object(),
    )
    status = run("--peer=biotorch", f"--out={tmp_path / 'below' / 'b'}")
    _, errors = capfd.readouterr()
    assert status == 1
    assert errors == (
        "benchmark.py: --peer=biotorch: biotorch is not installed. Use "
        f"{biotorch.INSTALL}, or leave --peer out.\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_peer_gets_the_same_layers() -> None:
    layers = biotorch.chain(networks.build("cifar10_2", 10))
    convolutions = [layer for layer in layers if layer["kind"] == "Conv2D"]
    assert [layer["outputs"] for layer in convolutions] == [
        *[96] * 3,
        *[192] * 5,
        10,
    ]
    assert all(layer["relu"] for layer in convolutions)
    assert convolutions[2]["strides"] == (2, 2)
    json.dumps(layers)


def test_the_peer_takes_chains_only() -> None:
    x = keras.Input((4,))
    y = keras.layers.Add()([x, keras.layers.Dense(4)(x)])
    with pytest.raises(UserError, match=r"'add.*\(Add\)"):
        biotorch.chain(keras.Model(x, y))


@pytest.mark.parametrize("mode", biotorch.MODES.values())
def test_the_peer_trains(mode: str) -> None:
    pytest.importorskip("biotorch")
    with biotorch.BioTorch(DIGITS, mode, batch_size=2, steps=1) as peer:
        assert peer.block() > 0


def test_all_methods_have_known_bytes() -> None:
    # The generator's state, DenseFA's maps and PFA's R and M are others' to
    # test.
    others = {"bp_noise", "brsf", "dense_fa", "pfa"}
    assert set(METHODS) - set(STORED) == others


@pytest.mark.slow
@requires_tensorflow
def test_input_of_imagenet(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorflow_datasets")
    import photo_folder

    photo_folder.write(tmp_path / "data", training=6, validation=1)
    out = tmp_path / "input"
    arguments = ["--networks=", f"--input={tmp_path / 'data'}", f"--out={out}"]
    assert run(*TINY, *arguments) == 0
    results = json.loads(out.with_suffix(".json").read_text())
    assert results["results"] == []
    found, cores = results["input"], results["machine"]["cores"]
    assert len(found["seconds_per_step"]) == 3
    per_second = 4 / found["median_seconds"]
    assert found["images_per_second"] == per_second
    assert found["images_per_second_and_core"] == per_second / cores
    table = timings.input_table(results["input"])
    assert table in capsys.readouterr().out
    assert table in out.with_suffix(".md").read_text()
    assert "6 photos of ImageNet to 224x224" in table
    assert f"{per_second:,.0f} images/s, " in table


@pytest.mark.slow
@requires_tensorflow
def test_profile_tells_where_the_time_goes(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "digits"
    arguments = [*TINY, "--dtype_policies=float32", "--nomemory", "--profile"]
    assert run(*arguments, "--methods=fa_usf_sn,dfa", f"--out={out}") == 0
    (result,) = json.loads(out.with_suffix(".json").read_text())["results"]
    spent = {
        row["name"]: set(row.get("milliseconds_by_operation", {}))
        for row in result["rows"]
    }
    assert any("BackpropInput" in kind for kind in spent["stock"])
    assert not any("BackpropInput" in kind for kind in spent["dfa"])
    assert "Sign" in spent["fa_usf_sn"] - spent["stock"]
    assert "ms of operations a step" in capsys.readouterr().out


@pytest.mark.skipif(ON_TENSORFLOW, reason="TensorFlow has a profile")
def test_profile_is_tensorflows(tmp_path: Path, capsys: Any) -> None:
    assert run(*TINY, "--profile", f"--out={tmp_path / 'digits'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--profile" in line
    assert "jax" in line
