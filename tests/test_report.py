"""The report, of run folders with known numbers."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import pytest
import report

from experiment import startup
from experiment.table import cells
from experiment.table import published
from experiment.table import report as making
from keras_fa.methods import METHODS

CIFAR10 = {"dataset": "cifar10", "model": "cifar10_1"}
LAYERS = ("conv1", "conv2", "readout")
RECIPE = {"optimizer": "adam", "learning_rate": 0.001}


def write_run(folder: Path, alignment: bool = False, **result) -> Path:
    """A run folder as train/main.py leaves it, but for what is given."""
    result = {
        "dataset": "digits",
        "model": "digits",
        "method": "bp",
        "seed": 0,
        "epochs": 3,
        **RECIPE,
        "test_error": 2.0,
        "seconds": 1.0,
        **result,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    columns = ["epoch", "val_accuracy"]
    columns += [
        f"alignment/{measure}/{layer}"
        for layer in LAYERS
        for measure in ("angle", "gradient_angle")
        if alignment
    ]
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for epoch in range(1, result["epochs"] + 1):
            angles = [90 / epoch if epoch != 2 else ""] * (len(columns) - 2)
            writer.writerow([epoch, 1 - 0.5 / epoch, *angles])
    return folder


def write_cell(runs_dir: Path, errors: list[float], **result) -> list[Path]:
    return [
        write_run(
            runs_dir / f"{'-'.join(map(str, result.values()))}-s{seed}",
            seed=seed,
            test_error=error,
            **result,
        )
        for seed, error in enumerate(errors)
    ]


@pytest.fixture
def made(tmp_path, capsys):
    """Runs the program; returns its status, output and errors."""

    def run(runs_dir=tmp_path):
        status = report.run(["report.py", str(runs_dir)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def _without_figures(monkeypatch):
    monkeypatch.setattr(making, "draw", lambda found, folder: [])


def rows(output: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if line.startswith("|")
    ]


def test_table(tmp_path, made):
    write_cell(tmp_path, [18.0], **CIFAR10, method="bp")
    write_cell(tmp_path, [20.0, 21.0, 22.0], **CIFAR10, method="fa_usf_sn")
    write_cell(
        tmp_path / "below", [40.0, 50.0], **CIFAR10, method="fa", epochs=4
    )
    status, output, errors = made()
    assert (status, errors) == (0, "")
    assert "## CIFAR-10 1: cifar10_1 on cifar10\n" in output
    head, _, *table = rows(output)
    assert head == [
        "method",
        "ours",
        "epochs",
        "paper",
        "reproduction",
        "ours - BP",
        "paper - BP",
        "reproduction - BP",
    ]
    assert table == [
        ["BP", "18.00 (n=1)", "3", "17.2", "24.2", "-", "-", "-"],
        ["BP + Noise", "open", "", "17.4", "-", "-", "+0.2", "-"],
        ["BP + Alignment", "open", "", "17.4", "-", "-", "+0.2", "-"],
        [
            "FA",
            "45.00 ± 7.07 (n=2)",
            "4",
            "26.6",
            "59.9",
            "+27.00",
            "+9.4",
            "+35.7",
        ],
        ["FA-uSF Init. E/I", "open", "", "18.9", "-", "-", "+1.7", "-"],
        ["FA-uSF Init.", "open", "", "17.6", "25.7", "-", "+0.4", "+1.5"],
        [
            "FA-uSF SN",
            "21.00 ± 1.00 (n=3)",
            "3",
            "17.7",
            "24.3",
            "+3.00",
            "+0.5",
            "+0.1",
        ],
        ["DFA", "open", "", "28.6", "-", "-", "+11.4", "-"],
        ["DenseFA", "open", "", "16.9", "-", "-", "-0.3", "-"],
    ]
    written = (tmp_path / "report" / "table.md").read_text("utf-8")
    assert output.startswith(written)


@pytest.mark.usefixtures("_without_figures")
def test_beyond_the_paper(tmp_path, made):
    """A second table, with the largest angle that carries an error on."""
    write_cell(tmp_path, [18.0], **CIFAR10, method="bp")
    write_cell(tmp_path, [17.5], **CIFAR10, method="frozen")
    folder = tmp_path / "kp"
    write_run(folder, True, **CIFAR10, method="kolen_pollack", test_error=19.0)
    lines = (folder / "history.csv").read_text().splitlines()
    values = lines[-1].split(",")
    assert lines[0].split(",")[2] == "alignment/angle/conv1"
    lines[-1] = ",".join([*values[:2], "89.0", *values[3:6], "31.6", values[7]])
    (folder / "history.csv").write_text("\n".join([*lines, ""]))
    _, output, errors = made()
    assert errors == ""
    first, second = output.split("\n\nBeyond the paper:\n\n")
    assert [row[0] for row in rows(first)[2:]][-1] == "DenseFA"
    assert rows(second)[0] == [
        "method",
        "ours",
        "epochs",
        "ours - BP",
        "angle, °",
    ]
    assert rows(second)[2:] == [
        ["Frozen", "17.50 (n=1)", "3", "-0.50", "-"],
        ["Kolen-Pollack", "19.00 (n=1) †", "3", "+1.00", "32"],
    ]
    assert "- angle: between B and W" in second


@pytest.mark.usefixtures("_without_figures")
def test_a_sample_of_imagenet_is_not_imagenet(tmp_path, made):
    cell = {"dataset": "imagenet2012", "model": "imagenet_1"}
    write_cell(tmp_path, [80.0], **cell, training_images=1_281_167)
    write_cell(tmp_path, [2.0], **cell, training_images=250)
    status, output, errors = made()
    assert (status, errors) == (0, "")
    whole, sample = output.split("\n## ")[1:]
    assert whole.startswith("ImageNet 1: imagenet_1 on imagenet2012\n")
    assert rows(whole)[2] == ["BP", "80.00 (n=1)", "3", "79.5", "-", "-"]
    assert sample.startswith("imagenet_1 on imagenet2012_250_images\n")
    assert rows(sample)[0] == ["method", "ours", "epochs", "ours - BP"]
    assert rows(sample)[2:] == [["BP", "2.00 (n=1)", "3", "-"]]


def test_columns(tmp_path, made):
    """A table for each, the paper's first; without BP there is no gap."""
    write_cell(tmp_path, [3.0, 4.0], dataset="digits", method="fa_usf_sn")
    write_cell(
        tmp_path, [1.0], dataset="mnist", model="mnist", method="bp_noise"
    )
    write_cell(
        tmp_path, [9.0], dataset="cifar10", model="resnet20", method="bp"
    )
    _, output, _ = made()
    heads = [line for line in output.splitlines() if line.startswith("#")]
    assert heads == [
        "## MNIST: mnist on mnist",
        "## resnet20 on cifar10",
        "## digits on digits",
    ]
    table = rows(output)
    assert ["BP + Noise", "1.00 (n=1)", "3", "0.8", "-", "+0.0"] in table
    assert ["DFA", "open", "", "45.94", "-", "+37.31"] in table
    assert ["FA-uSF SN", "3.50 ± 0.71 (n=2)", "3", "-"] in table


def test_recipes(tmp_path, made):
    write_cell(tmp_path, [3.001], method="bp")
    write_cell(tmp_path, [3.0], method="fa_usf_sn")
    write_cell(tmp_path, [3.0], method="fa", learning_rate=0.1)
    _, output, _ = made()
    assert [line for line in output.splitlines() if line.startswith("- ")] == [
        "- all of ours: batch_size 32, optimizer adam, warmup_epochs 0.0, "
        "weight_decay 0.0",
        "- BP, FA-uSF SN: learning_rate 0.001",
        "- FA: learning_rate 0.1",
    ]
    assert [row[-1] for row in rows(output)[2:]] == ["-", "+0.00", "+0.00"]


def test_published():
    """The paper's table, a digit of it in each row and column."""
    paper = {c: source.errors for c, source in published.PAPER.items()}
    assert paper["mnist", "mnist"]["fa"] == 1.1
    assert paper["cifar10", "cifar10_1"]["dense_fa"] == 16.9
    assert paper["cifar10", "cifar10_2"]["fa_usf_init_ei"] == 17.8
    assert paper["imagenet2012", "imagenet_1"]["fa_usf_sn"] == 78.9
    assert paper["imagenet2012", "imagenet_2"]["fa_usf_const"] == 51.2
    assert [len(errors) for errors in paper.values()] == [9, 9, 7, 7, 10]
    for source in (*published.PAPER.values(), *published.OTHERS.values()):
        assert source.errors.keys() <= METHODS.keys()


def replace_in(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def set_in_result(name, value):
    def damage(folder):
        result = json.loads((folder / "result.json").read_text())
        result[name] = value
        (folder / "result.json").write_text(json.dumps(result))

    return damage


def cut(name, characters):
    def damage(folder):
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(text[:-characters])

    return damage


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "result.json").unlink(), "not finished"),
        (set_in_result("test_error", None), "a search"),
        (set_in_result("test_error", float("nan")), "test_error is nan"),
        (set_in_result("test_error", 100.1), "test_error is 100.1"),
        (set_in_result("test_error", -0.1), "test_error is -0.1"),
        (set_in_result("test_error", "2"), "test_error is '2'"),
        (set_in_result("test_error", True), "test_error is True"),
        (set_in_result("method", "fb"), "no method 'fb'"),
        (set_in_result("dataset", 7), "dataset is 7"),
        (set_in_result("seed", "0"), "seed is '0'"),
        (set_in_result("epochs", 0), "epochs is 0"),
        (set_in_result("epochs", 4), "3 rows of a run of 4 epochs"),
        (lambda f: (f / "result.json").write_text("[]"), "not an object"),
        (lambda f: (f / "result.json").write_text("{}"), "no 'dataset'"),
        (cut("result.json", 9), "result.json is damaged"),
        (lambda f: (f / "history.csv").unlink(), "not there"),
        (lambda f: (f / "history.csv").write_text(""), "torn"),
        (lambda f: (f / "history.csv").write_bytes(b"\xff\n"), "utf-8"),
        (cut("history.csv", 4), "torn"),
        (
            lambda f: replace_in(f / "history.csv", "2,0.75", "2"),
            "row 2 has 1 of 2 columns",
        ),
        (
            lambda f: replace_in(f / "history.csv", "2,0.75", "3,0.75"),
            "epochs are not 1 to 3",
        ),
        (
            lambda f: replace_in(f / "history.csv", "2,0.75", "2,nan"),
            "val_accuracy is not 0 to 1",
        ),
        (
            lambda f: replace_in(f / "history.csv", "0.75", "0.7x"),
            "0.7x",
        ),
        (
            lambda f: replace_in(f / "history.csv", "val_acc", "acc"),
            "no 'val_accuracy'",
        ),
    ],
)
def test_skipped(damage, says, tmp_path, made):
    folders = write_cell(tmp_path, [1.0, 2.0, 6.0], method="bp")
    damage(folders[2])
    status, output, errors = made()
    assert status == 0
    assert rows(output)[2][1] == "1.50 ± 0.71 (n=2)"
    assert len(errors.splitlines()) == 1
    assert f"{folders[2]}: " in errors
    assert says in errors


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 4}, "differ in epochs (3 and 4)"),
        ({"dropout": 0.5}, "differ in dropout (0.0 and 0.5)"),
        ({"normalization": "batch"}, "normalization (none and batch)"),
        ({"lengths": [1, 3]}, "differ in lengths (none and [1, 3])"),
        ({"seed": 0}, "are both of seed 0"),
    ],
)
def test_what_is_not_comparable_is_not_averaged(changes, says, tmp_path, made):
    a = write_cell(tmp_path, [1.0, 2.0], method="fa")[0]
    c = write_run(tmp_path / "other", **{"method": "fa", "seed": 2, **changes})
    write_cell(tmp_path, [3.0], method="bp")
    status, output, errors = made()
    assert status == 0
    assert [row[0] for row in rows(output)[2:]] == ["BP"]
    assert len(errors.splitlines()) == 1
    assert says in errors
    assert str(a) in errors
    assert str(c) in errors
    assert "all 3 runs" in errors


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 9.0},
        {"versions": {"keras": "4"}},
        {"alignment_every": 1},
        {"train_error": 3.0, "validation_error": 4.0},
        {"examples_per_second": 5.0},
    ],
)
def test_what_is_measured_is_no_recipe(changes, tmp_path, made):
    write_run(tmp_path / "a", test_error=1.0)
    write_run(tmp_path / "b", seed=1, test_error=2.0, **changes)
    _, output, errors = made()
    assert errors == ""
    assert rows(output)[2][1] == "1.50 ± 0.71 (n=2)"
    assert not set(changes) & set(output.split())


# What main.py writes today and did not when the first results were made.
YOUNGER = {
    "tpu": None,
    "label_smoothing": 0.0,
    "image_size": None,
    "crop_area": None,
    "normalization": "none",
    "replicas": 1,
    "workers": 1,
    "training_images": 1257,
}


@pytest.mark.usefixtures("_without_figures")
def test_an_old_run_and_a_new_one_of_its_recipe_are_a_cell(tmp_path, made):
    write_run(tmp_path / "old", test_error=1.0)
    write_run(tmp_path / "new", seed=1, test_error=2.0, **YOUNGER)
    _, output, errors = made()
    assert errors == ""
    assert rows(output)[2][1] == "1.50 ± 0.71 (n=2)"
    assert "label_smoothing" not in output


@pytest.mark.usefixtures("_without_figures")
def test_runs_of_unlike_data_are_no_cell(tmp_path, made):
    """Though the first of them does not say how many images it had."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, **YOUNGER)
    write_run(tmp_path / "c", seed=2, **{**YOUNGER, "training_images": 100})
    write_cell(tmp_path, [3.0], method="fa")
    _, output, errors = made()
    assert [row[0] for row in rows(output)[2:]] == ["FA"]
    assert "differ in training_images (1257 and 100)" in errors


def words_of(svg: Path) -> list[str]:
    texts = ElementTree.parse(svg).getroot().itertext()
    return [text.strip() for text in texts]


def text_of(svg: Path) -> str:
    return " ".join(words_of(svg))


def test_figures(tmp_path, made):
    for method in ("bp", "fa", "fa_usf_init", "dfa"):
        write_cell(
            tmp_path, [20.0, 30.0], **CIFAR10, method=method, alignment=True
        )
    write_cell(tmp_path, [20.0], **CIFAR10, method="fa_usf_sn")
    status, output, errors = made()
    assert (status, errors) == (0, "")
    folder = tmp_path / "report"
    names = ("errors", "learning_curves", "angles")
    files = [
        folder / f"cifar10-cifar10_1-{name}.{suffix}"
        for name in names
        for suffix in ("png", "svg")
    ]
    assert {*folder.iterdir()} == {*files, folder / "table.md"}
    assert all(f"Figure: {file}\n" in output for file in files)
    for file in files[::2]:
        image = matplotlib.image.imread(file)
        assert image.shape[1] == 1200
        assert image.std() > 0.05
    errors, curves, angles = map(text_of, files[1::2])
    for method in published.PAPER["cifar10", "cifar10_1"].errors:
        assert METHODS[method].title in errors
    assert errors.count("open") == 4
    assert "25.00" in errors
    assert "paper" in errors
    for title in ("BP", "FA", "FA-uSF Init.", "FA-uSF SN", "DFA"):
        assert f"{title}: 16.7" in curves  # 50 % / 3 epochs
    for word in (*LAYERS, "FA-uSF Init.", "90"):
        assert word in angles
    # A panel's title, and not the start of another's.
    assert "FA" in words_of(files[5])
    assert angles.index("conv1") < angles.index("readout")
    assert "SN" not in angles
    assert "DFA" not in angles

    before = [file.read_bytes() for file in files]
    made()
    assert [file.read_bytes() for file in files] == before


def test_seeds_without_alignment_leave_gaps_alone(tmp_path, made):
    """Angles are of the seeds that measured them, where all of these did."""
    for seed in range(2):
        write_run(
            tmp_path / str(seed), seed=seed, method="fa", alignment=seed == 0
        )
    found, _ = cells.collect(tmp_path)
    cell = found["digits", "digits"]["fa"]
    assert cell.layers("gradient_angle") == list(LAYERS)
    assert cell.curves("alignment/angle/conv1") == {1: [90.0], 3: [30.0]}
    assert cell.curves("val_accuracy")[2] == [0.75, 0.75]


def test_figures_of_perfect_runs(tmp_path, made):
    """Nothing but zeros, of one epoch."""
    folder = write_run(tmp_path / "a", epochs=1, test_error=0)
    replace_in(folder / "history.csv", "1,0.5", "1,1.0")
    status, _, errors = made()
    assert (status, errors) == (0, "")
    assert "BP: 0.0" in text_of(
        tmp_path / "report" / "digits-digits-learning_curves.svg"
    )


def test_no_alignment(tmp_path, made):
    write_cell(tmp_path, [20.0], method="fa")
    _, output, _ = made()
    assert "No angles of digits digits" in output
    assert "--alignment_every" in output
    assert not list((tmp_path / "report").glob("*angles*"))


def test_without_matplotlib(tmp_path, made, monkeypatch):
    write_cell(tmp_path, [20.0], method="fa")
    installed = startup.installed
    monkeypatch.setattr(
        startup,
        "installed",
        lambda *names: "matplotlib" not in names and installed(*names),
    )
    status, output, errors = made()
    assert (status, errors) == (0, "")
    assert "20.00 (n=1)" in output
    assert output.count("pip install matplotlib") == 1
    assert [f.name for f in (tmp_path / "report").iterdir()] == ["table.md"]


def test_folder_that_cannot_be_written(tmp_path, made):
    write_cell(tmp_path, [20.0], method="fa")
    (tmp_path / "report").write_text("")
    status, output, errors = made()
    assert status == 1
    assert "20.00 (n=1)" in output
    assert len(errors.splitlines()) == 1
    assert f"{tmp_path / 'report'}: cannot be written" in errors


def test_nothing_to_report(tmp_path, capsys):
    assert report.run(["report.py", str(tmp_path / "none")]) == 1
    assert report.run(["report.py"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert report.run(["report.py", "--help"]) == 0
    assert report.__doc__ in capsys.readouterr().out


@pytest.mark.usefixtures("_without_figures")
def test_what_is_no_better_than_frozen_is_marked(tmp_path, made):
    """By less than 2 points of what the table shows."""
    cells_of = {"bp": 10.0, "frozen": 20.1, "fa": 18.1, "brsf": 18.106}
    for method, error in cells_of.items():
        write_cell(tmp_path, [error], **CIFAR10, method=method)
    _, output, errors = made()
    assert errors == ""
    shown = {row[0]: row[1] for row in rows(output)}
    assert shown["BP"] == "10.00 (n=1)"
    assert shown["FA"] == "18.10 (n=1)"
    assert shown["brSF"] == "18.11 (n=1) †"
    assert shown["Frozen"] == "20.10 (n=1)"
    assert "- † not 2 points below Frozen, whose hidden kernels" in output


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize("other", ["bp", "frozen"])
def test_without_frozen_or_within_its_margin_nothing_is_marked(
    other, tmp_path, made
):
    write_cell(tmp_path, [9.0], **CIFAR10, method=other)
    write_cell(tmp_path, [7.0], **CIFAR10, method="fa")
    write_cell(tmp_path, [80.0], dataset="digits", method="dfa")
    assert "†" not in made()[1]
