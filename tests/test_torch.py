"""What is PyTorch's own: `state_dict`, `to`, and a loop of one's own."""

import io
from pathlib import Path

import backends
import keras
import numpy as np
import pytest
import references
from backends import array
from keras import layers

from experiment import networks
from experiment.timing import biotorch
from keras_fa import convert
from keras_fa.layers.feedback import all_variables

if not backends.ON_TORCH:
    pytest.skip("about PyTorch itself", allow_module_level=True)

import torch

X = references.normal((8, 6, 6, 1), seed=1)
Y = references.normal((8, 3), seed=2)
# What they keep: B; B and signs; norms and signs; maps; a B that learns.
METHODS = ("fa", "fa_usf_init_ei", "fa_usf_const_ei", "dfa", "kolen_pollack")

pytestmark = pytest.mark.filterwarnings("ignore:KolenPollack aligns B with W")


def network(method: str, seed: int) -> keras.Model:
    """A converted network with a convolution and a hidden dense layer."""
    keras.utils.set_random_seed(seed)
    model = convert(
        keras.Sequential(
            [
                keras.Input(X.shape[1:]),
                layers.Conv2D(3, 3, activation="relu", name="conv"),
                layers.Flatten(name="flatten"),
                layers.Dense(8, activation="tanh", name="hidden"),
                layers.Dense(3, name="readout"),
            ],
            name="network",
        ),
        method,
    )
    model.compile(keras.optimizers.SGD(0.5, weight_decay=0.01), "mse")
    return model


def values(model: keras.Model) -> list[np.ndarray]:
    """All that a model reads in a step."""
    return [array(variable) for variable in all_variables(model)]


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_is_all_there_is(method: str) -> None:
    """B, its maps, fixed signs and norms go to a model of other weights."""
    trained, fresh = network(method, 0), network(method, 1)
    trained.fit(X, Y, shuffle=False, verbose=0)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    for _ in range(2):
        for ours, theirs in zip(values(fresh), values(trained)):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(array(fresh(X)), array(trained(X)))
        for model in (fresh, trained):  # signs and norms hold, B carries errors
            model.fit(X, Y, shuffle=False, verbose=0)


@pytest.mark.parametrize("method", METHODS)
def test_to_moves_all_of_it(method: str) -> None:
    model, before = network(method, 0), network(method, 0)
    assert model.to(torch.float64) is model
    for variable, was in zip(all_variables(model), all_variables(before)):
        floating = was.value.is_floating_point()
        wanted = torch.float64 if floating else was.value.dtype
        assert variable.value.dtype == wanted, variable.path
        np.testing.assert_array_equal(array(variable), array(was))
    model.to("cpu", torch.float32).fit(X, Y, shuffle=False, verbose=0)
    before.fit(X, Y, shuffle=False, verbose=0)
    for ours, theirs in zip(values(model), values(before)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("method", ["fa", "dfa", "kolen_pollack"])
def test_a_loop_of_one_s_own(method: str) -> None:
    """An optimizer of PyTorch's, to which Keras's constraints say nothing."""
    model, by_keras = network(method, 0), network(method, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.01)
    (model(X) - torch.from_numpy(Y)).square().mean().backward()
    optimizer.step()
    by_keras.fit(X, Y, shuffle=False, verbose=0)
    for ours, theirs in zip(values(model), values(by_keras)):
        references.assert_close(ours, theirs)


# The benchmark's process of BioTorch, with no more of BioTorch than its name.
STAND_IN = """
class BioModule:
    def __new__(cls, module, mode):
        print("a word that is no answer")
        return module
"""


def test_a_peer_trains_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "biotorch" / "module"
    module.mkdir(parents=True)
    for path in (module.parent, module):
        (path / "__init__.py").touch()
    (module / "biomodule.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = networks.build("digits", 10)
    with biotorch.BioTorch(model, "fa", batch_size=2, steps=1) as peer:
        assert peer.block() > 0
        assert peer.block() > 0
