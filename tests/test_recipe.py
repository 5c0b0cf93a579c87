"""What the recipe of a run says, and what the model then does."""

import re
import warnings

import main  # before all that imports Keras
import numpy as np
import pytest

from experiment import commandline
from experiment import model as models
from experiment import settings
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
