"""The table of methods, as PAPER's rows define them."""

import re

import keras
import numpy as np
import pytest
import references
from keras import layers

from keras_fa import convert
from keras_fa import methods
from keras_fa.callbacks import MirrorPhase
from keras_fa.callbacks import RefuseAverages
from keras_fa.callbacks import StrictNormalization
from keras_fa.callbacks import TargetLoss
from keras_fa.methods import METHODS

ROWS = {
    "bp": "BP",
    "bp_noise": "BP + Noise",
    "bp_alignment": "BP + Alignment",
    "fa": "FA",
    "fa_usf_init_ei": "FA-uSF Init. E/I",
    "fa_usf_init": "FA-uSF Init.",
    "fa_usf_sn": "FA-uSF SN",
    "dfa": "DFA",
    "dense_fa": "DenseFA",
    "bp_const": "BP Const.",
    "fa_usf_const": "FA-uSF Const.",
    "fa_usf_const_ei": "FA-uSF Const. E/I",
    "bp_ei": "BP E/I",
    "fa_usf_sn_ei": "FA-uSF SN E/I",
    "fa_usf_init_ei_silent": "FA-uSF Init. E/I, silent zeros",
    "brsf": "brSF",
    "fixed_sign_feedback": "FA of initial signs",
    "frozen": "Frozen",
    "kolen_pollack": "Kolen-Pollack",
    "weight_mirror": "Weight mirror",
    "symmetric_alignment": "Symmetric alignment",
    "activation_alignment": "Activation alignment",
    "information_alignment": "Information alignment",
    "pfa": "PFA",
    "direct_kolen_pollack": "Direct Kolen-Pollack",
    "drtp": "DRTP",
}
OURS = {
    "bp_noise",
    "bp_alignment",
    "dense_fa",
    "fa_usf_const",
    "fa_usf_const_ei",
}
X = np.random.default_rng(0).normal(size=(16, 12)).astype("float32")


def trained(method: str, steps: int = 4) -> tuple[np.ndarray, layers.Layer]:
    """A hidden kernel at the start, and its layer after some steps."""
    stock = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(10, activation="relu", name="hidden"),
            layers.Dense(4, name="readout"),
        ]
    )
    model = convert(stock, method)
    start = np.array(model.get_layer("hidden").kernel)
    loss = references.loss_of(method)
    model.compile(keras.optimizers.Adam(0.15), loss, run_eagerly=True)
    model.fit(
        np.tile(X, (steps, 1)),
        np.tile(X[:, :4] ** 2, (steps, 1)),
        batch_size=len(X),
        verbose=0,
        callbacks=METHODS[method].callbacks(),
    )
    return start, model.get_layer("hidden")


def test_rows() -> None:
    assert {name: m.title for name, m in METHODS.items()} == ROWS
    assert all(name == m.name for name, m in METHODS.items())
    ours = {n for n, m in METHODS.items() if m.standing == "our reading"}
    assert ours == OURS
    assert all(m.definition and m.standing for m in METHODS.values())


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_are_fresh(method: str) -> None:
    first, second = (METHODS[method].callbacks() for _ in range(2))
    strict = method in ("fa_usf_sn", "dense_fa")
    fixed = METHODS[method].kernel_constraint is not None
    assert [type(c) for c in first] == [
        *[StrictNormalization] * strict,
        *[RefuseAverages] * fixed,
        *[MirrorPhase] * (method == "weight_mirror"),
        *[TargetLoss] * (method == "drtp"),
    ]
    assert first is not second
    assert all(a is not b for a, b in zip(first, second))


@pytest.mark.parametrize("method", METHODS)
def test_what_the_definition_says_holds_after_training(method: str) -> None:
    start, layer = trained(method)
    kernel = np.array(layer.kernel)
    feedback = np.array(layer.effective_feedback_kernel())
    signs = np.sign(kernel)
    norm = np.linalg.norm
    assert np.array_equal(kernel, start) == (method == "frozen")
    if method in ("bp", "bp_const", "bp_alignment", "dfa", "frozen"):
        assert np.array_equal(feedback, kernel)
    if method == "bp_ei":  # its zeros have signs
        np.testing.assert_allclose(feedback, kernel, rtol=0, atol=2e-38)
    if method == "fa":
        assert np.array_equal(feedback, layer.feedback_kernel)
    if "init" in method:
        magnitudes = np.abs(np.array(layer.feedback_kernel))
        if method.endswith("_silent"):
            magnitudes *= kernel != 0
        np.testing.assert_array_equal(np.abs(feedback), magnitudes)
        assert magnitudes.std() > 0
    if "usf" in method or method == "dense_fa":
        alive = kernel != 0
        assert np.array_equal(np.sign(feedback)[alive], signs[alive])
    if method == "brsf":
        assert np.array_equal(np.sign(feedback), signs)
        assert np.abs(feedback).std() > 0
    if method == "fixed_sign_feedback":
        assert np.array_equal(feedback, layer.feedback_kernel)
        uniform = norm(start) / np.sqrt(start.size)
        np.testing.assert_allclose(
            feedback, uniform * np.sign(start), rtol=1e-5
        )
    if method in ("fa_usf_sn", "dense_fa"):
        uniform = norm(kernel) / np.sqrt(kernel.size)
        np.testing.assert_allclose(np.abs(feedback), uniform, rtol=1e-5)
    if "const" in method:
        np.testing.assert_allclose(norm(kernel), norm(start), rtol=1e-5)
    if "usf_const" in method:
        uniform = norm(start) / np.sqrt(kernel.size)
        np.testing.assert_allclose(np.abs(feedback), uniform, rtol=1e-5)
    if "_ei" in method:
        assert (kernel * start >= 0).all()
        assert (kernel == 0).any()  # some stopped there,
        kept = signs if method.endswith("_silent") else np.sign(start)
        assert np.array_equal(np.sign(feedback), kept)  # and keep it, or not
    elif method != "frozen":
        assert (kernel * start < 0).any()
    if method == "bp_noise":
        cosine = np.vdot(kernel, feedback) / norm(kernel) / norm(feedback)
        wanted = np.abs(kernel).sum() / np.sqrt(kernel.size) / norm(kernel)
        np.testing.assert_allclose(cosine, wanted, rtol=1e-4)


def test_alignment_penalty_pulls_towards_the_target() -> None:
    stock = keras.Sequential([keras.Input((12,)), layers.Dense(4, name="fc")])
    model = convert(stock, "bp_alignment")
    target = np.array(model.get_layer("fc").feedback_kernel)

    def moved(model: keras.Model) -> float:
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(X, X[:, :4] ** 2, batch_size=16, verbose=0)
        return references.angle(model.get_layer("fc").kernel, target)

    assert moved(model) < moved(convert(stock, "bp"))


@pytest.mark.parametrize("name", ["", "BP", "usf", 3, None, METHODS])
def test_unknown_names(name: object) -> None:
    with pytest.raises(ValueError, match=re.escape("Allowed: bp, bp_noise")):
        methods.get(name)


def test_get() -> None:
    assert methods.get("fa") is METHODS["fa"]
    assert methods.get(METHODS["dfa"]) is METHODS["dfa"]
    assert methods.get("frsf") is METHODS["fa_usf_init"]
    assert "frsf" not in METHODS
