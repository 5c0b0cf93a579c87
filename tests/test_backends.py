"""One backend against the others: files, and one step of training.

A process has one backend, so this file is also a program: run as
`python test_backends.py FOLDER write` it writes models there, and with `read`
it reads those that all backends wrote.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from references import array
from references import assert_close
from references import effective_of
from references import kernels_of
from references import normal
from references import stored_of

from keras_fa import convert
from keras_fa.layers.direct import SendError
from keras_fa.layers.feedback import feedback_layers
from keras_fa.methods import METHODS

OWN = keras.backend.backend()
# Where PyTorch is not installed the other two are compared.
BACKENDS = ("tensorflow", "jax") + (
    ("torch",) if importlib.util.find_spec("torch") else ()
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 8, 8, 3)).astype("float32")
Y = RNG.normal(size=(4, 3)).astype("float32")
# Method and feedback maps.
CASES = {
    **{name: (name, "dense") for name in METHODS},
    "dfa_convolutional": ("dfa", "convolutional"),
    "dense_fa_convolutional": ("dense_fa", "convolutional"),
}
DRAWING = ("bp_noise", "brsf")  # at every step
# Those whose step is compared: of each sort one, and both forms of maps.
STEPPED = (
    "kolen_pollack",
    "information_alignment",
    "pfa",
    "bp_noise",
    "bp_alignment",
    "fa_usf_init_ei",
    "fa_usf_sn",
    "fa_usf_const_ei",
    "dfa",
    "dense_fa",
    "dfa_convolutional",
    "dense_fa_convolutional",
)
MISSING = [name for name in BACKENDS if not importlib.util.find_spec(name)]
needs_all = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"
)


def network() -> keras.Model:
    """A convnet with a layer of two kernels and one with statistics."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
            layers.SeparableConv2D(4, 3, use_bias=False, name="separable"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(name="flatten"),
            layers.Dense(5, activation="tanh", name="hidden"),
            layers.Dense(3, name="readout"),
        ]
    )


def seen(model: keras.Model) -> dict[str, np.ndarray]:
    """What a model computes and remembers."""
    found = {"output": array(model(X))}
    for layer in feedback_layers(model):
        for i, kernel in enumerate(kernels_of(layer)):
            name = f"{layer.name}/{i}"
            if stored_of(layer)[i] is not None:
                found[f"{name}/stored"] = stored_of(layer)[i]
            found[f"{name}/effective"] = effective_of(layer)[i]
            state = getattr(kernel.constraint, "state", {})
            for key, value in state.items():
                found[f"{name}/{key}"] = array(value)
    for layer in model.layers:
        if isinstance(layer, SendError):
            for name, matrix in zip(layer.receivers, layer.maps):
                found[f"{layer.name}/{name}"] = array(matrix)
    return found


def trained(model: keras.Model, case: str) -> dict[str, np.ndarray]:
    """A model's weights after one update of SGD, inside `fit`."""
    # On TensorFlow tracing takes longer than a step.
    eagerly = OWN == "tensorflow"
    model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=eagerly)
    callbacks = METHODS[CASES[case][0]].callbacks()
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=callbacks)
    # What constraints remember is a weight on one of the backends alone.
    remembered = ("kernel_excitatory", "kernel_norm")
    return {
        weight.path: array(weight)
        for weight in model.weights
        if not weight.path.endswith(remembered)
    }


def write(folder: Path) -> None:
    """Saves a model of each case whose kernels are not those of its start."""
    for case, (method, form) in CASES.items():
        keras.utils.set_random_seed(1)
        model = convert(network(), method, feedback_maps=form)
        for seed, weight in enumerate(model.trainable_weights):
            weight.assign(weight + 0.1 * normal(weight.shape, seed))
        model.save(folder / f"{OWN}-{case}.keras")


def read(folder: Path, writer: str) -> None:
    """Notes what the models that a backend wrote do on this one.

    Some are trained, too, where they are TensorFlow's, the reference.
    """
    for case in CASES:
        name = f"{writer}-{case}"
        model = keras.models.load_model(folder / f"{name}.keras")
        np.savez(folder / f"{name}-on-{OWN}.npz", **seen(model))
        if writer == "tensorflow" and case in STEPPED:
            weights = trained(model, case)
            np.savez(folder / f"{name}-trained-on-{OWN}.npz", **weights)


def run_on(backend: str, *arguments: object) -> str:
    """Runs Python on a backend in a process of its own; its output."""
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join(map(str, (tests.parent, tests)))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all backends, each read on all."""
    folder = tmp_path_factory.mktemp("backends")
    others = [name for name in BACKENDS if name != OWN]
    write(folder)
    for other in others[:-1]:
        run_on(other, __file__, folder, "write")
    run_on(others[-1], __file__, folder, "write", "read")
    for other in others[:-1]:
        run_on(other, __file__, folder, "read")
    for writer in BACKENDS:
        read(folder, writer)
    return folder


def compare(folder: Path, name: str, drawn: Callable[[str], bool]) -> None:
    """Compares what all backends noted, but for what they draw by chance."""
    ours, *others = (
        dict(np.load(folder / f"{name}-on-{backend}.npz"))
        for backend in BACKENDS
    )
    for theirs in others:
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            if not drawn(key):
                assert_close(theirs[key], value, 1e-5)


# One test for all cases of a writer: tests of one folder, of which pytest-xdist
# would give each of its processes some, would make it in each.
@needs_all
@pytest.mark.slow
@pytest.mark.parametrize("writer", BACKENDS)
def test_models_of_one_backend_are_the_same_on_the_others(
    writer: str, folder: Path
) -> None:
    for case in CASES:
        noisy = case in DRAWING
        compare(
            folder,
            f"{writer}-{case}",
            drawn=lambda key, noisy=noisy: noisy and key.endswith("effective"),
        )


@needs_all
@pytest.mark.slow
def test_a_step_is_the_same_on_all_backends(folder: Path) -> None:
    for case in STEPPED:
        start = keras.models.load_model(folder / f"tensorflow-{case}.keras")
        name = f"tensorflow-{case}-trained"
        moved = dict(np.load(folder / f"{name}-on-{OWN}.npz"))
        for weight in start.trainable_weights:
            assert not np.allclose(moved[weight.path], weight, rtol=1e-3)
        # Noise has no part in the readout's own update.
        noisy = case in DRAWING
        compare(
            folder,
            name,
            drawn=lambda key, noisy=noisy: noisy and "readout" not in key,
        )


_LEAN = """
import sys
import keras
import numpy as np
import keras_fa
from keras_fa.alignment import alignment
from keras_fa.methods import METHODS

print(keras.backend.backend(), "tensorflow" in sys.modules)
# Keras itself imports it to write configs, if it is there. Now it is not.
sys.modules["tensorflow"] = None
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
model = keras_fa.convert(model, "fa_usf_sn")
model.compile("sgd", "mse")
x, y = np.ones((4, 4)), np.ones((4, 3))
model.fit(x, y, verbose=0, callbacks=METHODS["fa_usf_sn"].callbacks())
print(alignment(model, x, y)["fc"]["norm_ratio"])
"""


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_needs_no_tensorflow(name: str) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"not installed: {name}")
    backend, imported, ratio = run_on(name, "-c", _LEAN).split()
    assert (backend, imported) == (name, "False")
    np.testing.assert_allclose(float(ratio), 1, rtol=1e-6)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if "write" in sys.argv:
        write(target)
    if "read" in sys.argv:
        for name in BACKENDS:
            read(target, name)
