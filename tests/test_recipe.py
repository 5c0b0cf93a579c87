"""What the recipe of a run says, and what the model then does."""

import re
import warnings

import main  # before all that imports Keras
import numpy as np
import pytest

from experiment import commandline
from experiment import model as models
from experiment import settings
from experiment.datasets import DATASETS
from experiment.networks import NETWORKS
from experiment.table import cells
from keras_fa.layers.feedback import feedback_layers


def config_of(*arguments):
    commandline.parse(settings.FLAGS, ["main.py", *arguments])
    return settings.given()


def refusal(arguments, tmp_path, capfd):
    """The one line that a command line is refused with."""
    arguments = [f"--runs_dir={tmp_path / 'runs'}", *arguments.split()]
    assert main.run(["main.py", *arguments]) == 1
    output, errors = capfd.readouterr()
    assert re.fullmatch(r"main\.py: .+\n", errors), errors
    assert (output, list(tmp_path.iterdir())) == ("", [])
    return errors


# Signs by unit.


@pytest.mark.parametrize("method", ["fa_usf_init_ei", "bp_ei"])
def test_signs_by_unit(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unit, synapse = (
            models.build(config_of(f"--method={method}", *arguments))
            for arguments in (["--fixed_signs=unit"], [])
        )
    for layer, other in zip(feedback_layers(unit), feedback_layers(synapse)):
        signs = np.signbit(np.array(layer.kernel))
        assert np.all(signs == signs[..., :1])
        units = signs.shape[-2]
        inhibitory = signs.all((*range(signs.ndim - 2), -1))
        assert inhibitory.sum() == units - round(0.8 * units)
        assert np.std(np.signbit(np.array(other.kernel))) > 0.4


@pytest.mark.parametrize("method", ["fa_usf_sn_ei", "fa_usf_const_ei", "fa"])
def test_methods_without_signs_by_unit(method, tmp_path, capfd):
    errors = refusal(f"--fixed_signs=unit --method={method}", tmp_path, capfd)
    assert "--method=fa_usf_init_ei|bp_ei" in errors


def test_feedback_that_learns_between_steps(tmp_path, capfd):
    """How many steps a call takes must not say how often it learns."""
    arguments = "--steps_per_execution=2 --method=weight_mirror"
    errors = refusal(arguments, tmp_path, capfd)
    assert "weight_mirror learns between training steps" in errors


# Augmentation.


@pytest.mark.parametrize(
    ("dataset", "network", "words"),
    [
        ("digits", "digits", "none"),
        ("cifar10", "cifar10_1", "24x24 crops, mirrored"),
        ("cifar10", "cifar10_2", "mirrored"),
        ("cifar10", "resnet20", "32x32 crops of images padded by 4, mirrored"),
        ("imagenet2012", "resnet18", "random windows, mirrored"),
    ],
)
def test_augmentation_in_words(dataset, network, words):
    """As the layers at the front of the model do it."""
    dataset, network = DATASETS[dataset], NETWORKS[network]
    assert dataset.augmentation(network.input_shape, network.pad) == words
    layers = {
        layer.name
        for layer in dataset.preprocessing(network.input_shape, network.pad)
    }
    if not dataset.streamed:
        assert ("shift" in layers) == ("crops" in words)
        assert ("flip" in layers) == ("mirrored" in words)


def test_augmentation_is_recorded(tmp_path):
    arguments = ["--method=bp", "--epochs=1", f"--runs_dir={tmp_path}"]
    assert main.run(["main.py", *arguments]) == 0
    folder = tmp_path / "digits-digits-bp-s0"
    found = cells.read(folder)
    assert (
        found.result["augmentation"] == found.recipe["augmentation"] == "none"
    )

    # Runs that differ in it are not averaged; one that does not say it is.
    def run(seed, **changes):
        result = {**found.result, "seed": seed, **changes}
        return cells.Run(folder, result, found.history)

    other = run(1, augmentation="mirrored")
    older = run(2)
    del older.result["augmentation"]
    assert "differ in augmentation" in cells.not_comparable([found, other])
    assert not cells.not_comparable([found, older])
