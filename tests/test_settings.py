"""The table of settings, and what follows from it."""

import json
from pathlib import Path

import main  # noqa: F401 - before all that imports Keras
import pytest

from experiment import commandline
from experiment import settings
from experiment.settings import Role
from experiment.settings import Setting
from experiment.table import cells
from experiment.table import columns
from experiment.table import sweep

RESULTS = Path(__file__).resolve().parents[1] / "train" / "results"


def mnist(**changes):
    """A committed result of MNIST, with other settings."""
    file = RESULTS / "mnist" / "mnist-mnist-fa-s0" / "result.json"
    return json.loads(file.read_text("utf-8")) | changes


def run_of(**changes):
    return cells.Run(Path("a"), mnist(**changes), {})


def test_rows_are_complete():
    assert len(settings.BY_NAME) == len(settings.TABLE)
    for setting in settings.TABLE:
        assert setting.help.endswith(".")
        assert setting.is_number == bool(setting.bounds)
        if not isinstance(setting.default, settings.Of):
            assert setting.allows(setting.default)


@pytest.mark.parametrize(
    ("bounds", "words", "within", "beyond"),
    [
        ("[1, 100]", "1 to 100", (1, 100), (0, 101)),
        ("[0, inf)", "at least 0", (0, 1e300), (-1e-9, float("inf"))),
        ("(0, inf)", "above 0", (1e-300,), (0, float("nan"))),
        ("[0, 1)", "from 0 to below 1", (0, 0.99), (1, -0.1)),
        ("(0, 1]", "above 0 and at most 1", (1, 0.01), (0, 1.01)),
    ],
)
def test_bounds(bounds, words, within, beyond):
    setting = Setting(Role.RECIPE, "rate", float, None, "", bounds)
    assert setting.limits == words
    assert all(map(setting.allows, (*within, None)))
    assert not any(map(setting.allows, beyond))


@pytest.mark.parametrize("name", settings.RECORDED)
def test_what_a_result_lacks_equals_its_default(name):
    """Of every setting, and so of the next one too."""
    result = mnist()
    result.pop(name, None)
    default = settings.BY_NAME[name].default
    if isinstance(default, settings.Of):
        default = default.value(mnist())
    assert settings.completed(result)[name] == default
    assert settings.difference(result, mnist(**{name: default}), [name]) is None
    assert settings.difference(result, mnist(**{name: -1}), [name]) == name


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [("image_size", 224, 64), ("crop_area", 0.08, 0.5)],
)
def test_default_of_photos_is_that_of_their_data_set(name, value, other):
    """Given or not, and so of a run that recorded none."""

    def config_of(*arguments):
        arguments = ["main.py", "--dataset=imagenet2012", *arguments]
        commandline.parse(settings.FLAGS, arguments)
        return vars(settings.given())

    left_out, given = config_of(), config_of(f"--{name}={value}")
    assert left_out == given
    assert given[name] == value
    older = {**given, name: None}
    assert settings.difference(older, given, [name]) is None
    assert settings.completed(older)[name] == value
    changed = config_of(f"--{name}={other}")
    assert settings.difference(older, changed, [name]) == name
    default = str(settings.BY_NAME[name].default)
    assert default == f"{value} on imagenet2012"
    assert settings.is_default(name, settings.completed(mnist())[name])


def test_committed_results_count():
    """MNIST's rows of the paper are as reproduce.py would make them."""
    for method in columns.ROWS:
        arguments = [*columns.cell("mnist", method), "--seed=0"]
        job = sweep.job(method, arguments, RESULTS / "mnist")
        assert sweep.result(job) is not None, method


def test_other_steps_are_another_recipe(tmp_path):
    """Steps of one execution round an epoch down: 421 to 400 of them."""
    arguments = [*columns.cell("mnist", "fa"), "--seed=0"]
    arguments += ["--steps_per_execution=100", f"--runs_dir={tmp_path}"]
    job = sweep.job("fa", arguments, RESULTS / "mnist")
    assert sweep.result(job) is None
    assert "400 are asked for" in sweep.conflict(job, job.finished)
    runs = [run_of(seed=0), run_of(seed=1, steps_per_epoch=400)]
    assert "differ in steps_per_epoch" in cells.not_comparable(runs)


@pytest.mark.parametrize("name", settings.names(Role.EXECUTION))
def test_execution_never_splits_a_cell(name):
    runs = [run_of(seed=0), run_of(**{"seed": 1, name: "other"})]
    assert cells.not_comparable(runs) == ""


@pytest.mark.parametrize("name", settings.RECIPE)
def test_a_recipe_does(name):
    runs = [run_of(seed=0), run_of(**{"seed": 1, name: -1})]
    assert f"differ in {name} (" in cells.not_comparable(runs)


def test_columns_of_hparams_are_settings():
    pytest.importorskip("tensorboard")
    pytest.importorskip("tensorflow")
    from experiment import board

    assert set(board.SETTINGS) == {*settings.NAMING, *settings.RECIPE}
