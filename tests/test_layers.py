"""FA layers against stock Keras layers with their kernels swapped."""

import copy
import inspect
import pickle
from typing import Any

import backends
import forks
import keras
import numpy as np
import pytest
import references
from references import BASE_KINDS
from references import KINDS
from references import RULES

import keras_fa
from keras_fa import FAConv2D
from keras_fa import FADense
from keras_fa import FASeparableConv2D
from keras_fa.callbacks import StrictNormalization
from keras_fa.constraints import ConstantNorm
from keras_fa.constraints import FeedbackConstraint
from keras_fa.constraints import FixedSign
from keras_fa.constraints import NoisyKernel
from keras_fa.regularizers import Alignment

pytestmark = pytest.mark.usefixtures("optimized_graphs")

VARIANTS = [name for name in KINDS if name not in BASE_KINDS]


def made(
    kind: references.Kind, rule: references.Rule, **more: Any
) -> tuple[Any, list[np.ndarray]]:
    """An FA layer under a rule and the signs that its kernels started with.

    Where the signs are fixed, some weights are put at zero.
    """
    layer = kind.make(kind.fa, **rule.made_for(kind), **more)
    signs = initial_signs(layer)
    if rule.kernel_constraint is not None:
        for kernel in references.kernels_of(layer):
            values = references.array(kernel)
            values.flat[::3] = 0.0
            kernel.assign(values)
    return layer, signs


def initial_signs(layer: Any) -> list[np.ndarray]:
    """The signs of the kernels; a zero is excitatory."""
    return [
        np.where(references.array(kernel) >= 0, 1.0, -1.0)
        for kernel in references.kernels_of(layer)
    ]


def feedback(
    layer: Any, rule: references.Rule, signs: list, step: int = 0
) -> list[np.ndarray]:
    """B of each kernel by the rule in NumPy."""
    return [
        rule.expected(b, references.array(kernel), s, step)
        for b, kernel, s in zip(
            references.stored_of(layer), references.kernels_of(layer), signs
        )
    ]


def rewind(layer: Any) -> None:
    """Takes what a layer draws back to its first step."""
    for path in layer.feedback_paths:
        if hasattr(path.rule, "seed_generator"):
            path.rule.seed_generator.state.assign([references.SEED, 0])


def check(
    kind: references.Kind,
    rule: references.Rule,
    ways: tuple[bool, ...] = (False, True),
    **more: Any,
) -> None:
    """One layer under one rule against the reference, eager and compiled."""
    layer, signs = made(kind, rule, **more)
    x = kind.inputs()
    dy = references.error_for(layer, x)
    b = feedback(layer, rule, signs)
    wanted = references.reference(kind, layer, b, x, dy, **more)
    stock = kind.make(kind.stock, **more)
    for ours, theirs in zip(layer.weights, stock.weights):
        theirs.assign(ours)
    for compiled in ways:
        rewind(layer)
        got = references.computed(layer, x, dy, compiled)
        references.assert_gradients(got, wanted)
        run = backends.compiled(stock, stock.variables) if compiled else stock
        np.testing.assert_array_equal(got.y, run(x))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (kind, rule)
        for kind in BASE_KINDS
        for rule in RULES
        # All rules with one kernel and with two; of others one of each sort:
        # a fixed B, one of stored signs, one of random state.
        if kind in ("dense", "separable2d")
        or rule in ("fa", "fixed_sign", "noisy_kernel")
    ],
)
def test_gradients(kind: str, rule: str) -> None:
    check(KINDS[kind], RULES[rule])


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_of_variants(kind: str) -> None:
    # Eagerly on TensorFlow: compiled, a class computes no other way.
    ways = (False,) if backends.ON_TENSORFLOW else (False, True)
    check(KINDS[kind], RULES["fixed_sign"], ways)


@pytest.mark.parametrize("kind", ["dense", "conv2d", "separable2d"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"activation": "relu"},
        {"activation": "tanh", "use_bias": False},
        {"use_bias": False},
    ],
    ids=["relu", "tanh_no_bias", "no_bias"],
)
def test_gradients_with_activation(kind: str, arguments: dict) -> None:
    check(KINDS[kind], RULES["fa"], **arguments)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(kind, "fixed_sign") for kind in BASE_KINDS]
    + [("dense", rule) for rule in RULES if rule != "fixed_sign"]
    + [("conv1d_causal", "fa")],
)
def test_mixed_precision(kind: str, rule: str) -> None:
    dtype = "mixed_bfloat16"
    kind, rule = KINDS[kind], RULES[rule]
    layer, signs = made(kind, rule, dtype=dtype, activation="tanh")
    x = kind.inputs()
    dy = references.error_for(layer, x)
    b = feedback(layer, rule, signs)
    wanted = references.reference(kind, layer, b, x, dy, dtype=dtype)
    got = references.computed(layer, x, dy, compiled=True)

    assert all(b.dtype == "float32" for b in references.effective_of(layer))
    references.assert_gradients(got, wanted, tolerance=2e-2)
    references.assert_close(got.y, wanted.y, tolerance=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "float64", "mixed_float16"])
def test_other_precisions(dtype: str) -> None:
    kind, rule = KINDS["conv2d"], RULES["sign_concordance"]
    layer, signs = made(kind, rule, dtype=dtype)
    x = kind.inputs()
    dy = references.error_for(layer, x)
    b = feedback(layer, rule, signs)
    wanted = references.reference(kind, layer, b, x, dy, dtype=dtype)
    tolerance = 1e-5 if dtype == "float64" else 5e-3
    got = references.computed(layer, x, dy, compiled=True)
    references.assert_gradients(got, wanted, tolerance)


def constrained_model(silent_zeros: bool = False) -> keras.Model:
    """A small net under E/I and Const., uSF feedback."""
    arguments = {
        "feedback_constraint": "sign_concordance",
        "kernel_constraint": [
            FixedSign(silent_zeros=silent_zeros),
            "constant_norm",
        ],
    }
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            FAConv2D(4, 3, activation="relu", **arguments),
            keras.layers.Flatten(),
            FADense(3, **arguments),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


# Mistakes that show no error.


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_feedback_is_not_backpropagation(kind: str) -> None:
    kind = KINDS[kind]
    layer = kind.make(kind.fa)
    for b, kernel in zip(
        references.effective_of(layer), references.kernels_of(layer)
    ):
        assert 20 < references.angle(b, references.array(kernel)) < 160
    x = kind.inputs()
    dy = references.error_for(layer, x)
    got = references.computed(layer, x, dy, compiled=True)
    exact = references.reference(
        kind, layer, references.kernels_of(layer), x, dy
    )
    assert references.angle(got.dx, exact.dx) > 10


def test_first_separable_update_uses_the_error_through_feedback() -> None:
    kind = KINDS["separable2d"]
    layer = kind.make(kind.fa)
    x = kind.inputs()
    dy = references.error_for(layer, x)
    got = references.computed(layer, x, dy, compiled=True)
    exact = references.reference(
        kind, layer, references.kernels_of(layer), x, dy
    )
    assert references.angle(got.kernels[0], exact.kernels[0]) > 10
    references.assert_close(got.kernels[1], exact.kernels[1])


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_a_scaled_error_is_noticed(factor: float) -> None:
    kind = KINDS["dense"]
    layer = kind.make(kind.fa)
    x = kind.inputs()
    dy = references.error_for(layer, x)
    got = references.computed(layer, x, dy, compiled=False)
    wanted = references.reference(
        kind, layer, [factor * b for b in references.stored_of(layer)], x, dy
    )
    with pytest.raises(AssertionError):
        references.assert_gradients(got, wanted)


TRAINED = {
    **{name: (rule, None, []) for name, rule in RULES.items()},
    "strict_normalization": (
        references.Rule(
            RULES["sign_concordance_constant"].arguments,
            lambda b, w, s, t: (
                np.linalg.norm(w) * np.sign(w) / np.linalg.norm(np.sign(w))
            ),
        ),
        None,
        [StrictNormalization],
    ),
    "constant_norm": (
        references.Rule(
            RULES["sign_concordance_constant"].arguments,
            lambda b, w, s, t: b * np.sign(w),
            "constant_norm",
        ),
        "constant_norm",
        [],
    ),
}


class Recorder(keras.callbacks.Callback):
    """Keeps both kernels and the effective B after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        backends.synchronize(self.model)
        first, last = self.model.layers
        self.steps.append(
            [
                references.array(first.kernel),
                references.array(last.kernel),
                references.effective_of(last)[0],
            ]
        )


@pytest.mark.parametrize("name", TRAINED)
def test_feedback_is_never_stale_in_fit(name: str) -> None:
    """A linear net trained by `fit` and, step by step, by hand.

    The update of the first kernel is `x^T (e B^T)`: it tells which B the error
    came through inside the compiled step.
    """
    rule, _, callbacks = TRAINED[name]
    rate, batch, steps = 0.3, 4, 5
    last = FADense(
        3,
        use_bias=False,
        kernel_constraint=rule.kernel_constraint,
        **rule.arguments,
    )
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, use_bias=False), last]
    )
    model.compile(keras.optimizers.SGD(rate), "mse")
    x = references.normal((batch * steps, 5), 1)
    targets = references.normal((batch * steps, 3), 2)
    u, w = (references.array(layer.kernel) for layer in model.layers)
    stored, signs = references.stored_of(last)[0], initial_signs(last)[0]
    norm = np.linalg.norm(w)
    recorder = Recorder()
    model.fit(
        x,
        targets,
        batch_size=batch,
        shuffle=False,
        verbose=0,
        callbacks=[*(make() for make in callbacks), recorder],
    )
    crossings = 0
    for t, (new_u, new_w, new_b) in enumerate(recorder.steps):
        part = slice(t * batch, (t + 1) * batch)
        h = x[part] @ u
        e = 2 * (h @ w - targets[part]) / (batch * 3)
        b = rule.expected(stored, w, signs, t)
        updated = w - rate * h.T @ e
        crossings += np.sum(np.sign(updated) != np.sign(w))
        u, w = u - rate * x[part].T @ (e @ b.T), updated
        if rule.kernel_constraint == "fixed_sign":
            w = np.where(w * signs > 0, w, 0.0)
        if rule.kernel_constraint == "constant_norm":
            w = w * norm / np.linalg.norm(w)
        references.assert_close(new_u, u)
        references.assert_close(new_w, w)
        references.assert_close(new_b, rule.expected(stored, w, signs, t + 1))
        u, w = new_u, new_w
    assert crossings > 0  # else a stale sign would not show


@keras.saving.register_keras_serializable(package="tests")
class CopiedKernel(FeedbackConstraint):
    """B = W by way of a rule, so that a stale B shows in every step."""

    stores_feedback_kernel = False

    def __call__(self, feedback_kernel: Any, kernel: Any) -> Any:
        return 1.0 * kernel


def trajectory(rule: Any, callbacks: list, eager: bool) -> np.ndarray:
    """The first kernel of a net after each of many fast steps of `fit`."""
    keras.utils.set_random_seed(1)
    layer = FADense(3, feedback_constraint=rule)
    first = keras.layers.Dense(4, use_bias=False)
    model = keras.Sequential([keras.Input((5,)), first, layer])
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eager)
    x, y = references.normal((240, 5), 1), references.normal((240, 3), 2)
    recorder = Recorder()
    model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=[*(make() for make in callbacks), recorder],
    )
    return np.array([step[0] for step in recorder.steps])


@pytest.mark.parametrize(
    ("rule", "same_as", "callbacks"),
    [
        (CopiedKernel(), "tied_kernel", []),
        (NoisyKernel(60.0, seed=1), NoisyKernel(60.0, seed=1), []),
        ("sign_concordance", "sign_concordance", [StrictNormalization]),
    ],
    ids=["kernel", "noise", "strict_normalization"],
)
def test_compiled_step_reads_before_it_writes(
    rule: Any, same_as: Any, callbacks: list
) -> None:
    """TensorFlow orders a variable's reads and writes; B must be part of it.

    A race: what is wrong here fails often, not always.
    """
    got = trajectory(rule, callbacks, eager=False)
    wanted = trajectory(same_as, callbacks, eager=True)
    apart = np.abs(got - wanted).max(axis=(1, 2))
    assert (apart < 1e-4).all(), f"apart from step {np.argmax(apart >= 1e-4)}"


def test_compiled_step_uses_the_kernel_of_its_call() -> None:
    layer = FADense(3, feedback_constraint="sign_concordance")
    layer.build((None, 5))
    step = backends.compiled(
        lambda x, dy: references.gradients(layer, x, dy), layer.variables
    )
    x, dy = KINDS["dense"].inputs(), np.ones((4, 3), "f")
    for seed in range(3):
        w = references.normal((5, 3), seed)
        layer.kernel.assign(w)
        b = np.abs(references.array(layer.feedback_kernel)) * np.sign(w)
        _, dx, _, _ = step(x, dy)
        references.assert_close(references.array(dx), dy @ b.T)
        references.assert_close(references.effective_of(layer)[0], b)


@pytest.mark.parametrize("rule", ["fa", "sign_concordance"])
def test_stored_feedback_does_not_drift(rule: str) -> None:
    layer = FADense(3, **RULES[rule].arguments)
    model = keras.Sequential([keras.Input((5,)), layer, FADense(2)])
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    model.compile(optimizer, "mse")
    before = references.array(layer.feedback_kernel)
    kernel = references.array(layer.kernel)
    x, y = references.normal((80, 5), 1), references.normal((80, 2), 2)
    model.fit(x, y, batch_size=4, verbose=0)
    np.testing.assert_array_equal(
        before, references.array(layer.feedback_kernel)
    )
    assert not np.array_equal(kernel, references.array(layer.kernel))
    stored = layer.feedback_kernel
    assert all(v is not stored for v in model.trainable_variables)
    assert any(v is stored for v in model.non_trainable_variables)
    assert not any("feedback" in v.path for v in optimizer.variables)


# What users do.


def test_shared_layer_adds_up_both_calls() -> None:
    layer = FADense(5, use_bias=False)
    layer.build((None, 5))
    x, dy = KINDS["dense"].inputs(), np.ones((4, 5), "f")
    _, (dx,), (dw,) = backends.vjp(layer, lambda x: layer(layer(x)), [x], dy)
    b = references.array(layer.feedback_kernel)
    dh = dy @ b.T
    references.assert_close(references.array(dx), dh @ b.T)
    wanted = references.array(layer(x)).T @ dy + x.T @ dh
    references.assert_close(references.array(dw), wanted)


def test_frozen_layer_still_sends_error_through_feedback() -> None:
    layer = FADense(3, trainable=False, use_bias=False)
    first = keras.layers.Dense(4, use_bias=False)
    model = keras.Sequential([keras.Input((5,)), first, layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    kernel, u = references.array(layer.kernel), references.array(first.kernel)
    x, y = references.normal((4, 5), 1), references.normal((4, 3), 2)
    model.fit(x, y, batch_size=4, verbose=0)
    np.testing.assert_array_equal(kernel, references.array(layer.kernel))
    e = 2 * (x @ u @ kernel - y) / 12
    b = references.array(layer.feedback_kernel)
    references.assert_close(references.array(first.kernel), u - x.T @ (e @ b.T))


def test_the_error_can_be_differentiated() -> None:
    """Of dx, which is linear in dy, with respect to dy."""
    layer = FADense(3, use_bias=False)
    layer.build((None, 5))
    x, dy = KINDS["dense"].inputs(), np.ones((4, 3), "f")
    _, (got,), _ = backends.vjp(
        layer, lambda dy: backends.vjp(layer, layer, [x], dy)[1][0], [dy]
    )
    b = references.array(layer.feedback_kernel)
    references.assert_close(references.array(got), np.ones((4, 5), "f") @ b)


@pytest.mark.parametrize("rule", ["fa", "fixed_sign", "noisy_kernel"])
def test_jit_compiled_fit_equals_plain_fit(rule: str) -> None:
    x, y = references.normal((8, 5), 1), references.normal((8, 2), 2)
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(1)
        kind = KINDS["dense"]
        layer = FADense(4, activation="relu", **RULES[rule].made_for(kind))
        model = keras.Sequential([keras.Input((5,)), layer, FADense(2)])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for plain, jitted in zip(*results):
        # Compiled, other noise is drawn.
        if rule != "noisy_kernel":
            references.assert_close(plain, jitted, 1e-5)
        assert np.isfinite(jitted).all()


def test_stateless_call_follows_the_given_kernel() -> None:
    layer = FADense(3, feedback_constraint="sign_concordance")
    layer.build((None, 5))
    x, w = KINDS["dense"].inputs(), references.normal((5, 3), 9)
    state = [variable.value for variable in layer.non_trainable_variables]
    y, (dx,), _ = backends.vjp(
        layer,
        lambda x: layer.stateless_call([w, np.zeros(3, "f")], state, x)[0],
        [x],
    )
    references.assert_close(references.array(y), x @ w)
    b = np.abs(references.array(layer.feedback_kernel)) * np.sign(w)
    references.assert_close(references.array(dx), np.ones((4, 3), "f") @ b.T)


def test_sequence_model_with_masks_and_any_batch() -> None:
    model = keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(9, 5, mask_zero=True),
            FADense(4, activation="relu"),
            keras.layers.TimeDistributed(FADense(3)),
            keras.layers.LSTM(2),
        ]
    )
    model.compile("sgd", "mse")
    tokens = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 1]])
    masked = model.layers[1](model.layers[0](tokens))
    np.testing.assert_array_equal(masked._keras_mask, tokens != 0)
    model.fit(tokens, np.ones((3, 2)), batch_size=2, verbose=0)
    assert model.predict(tokens, batch_size=2, verbose=0).shape == (3, 2)
    assert np.isfinite(model.evaluate(tokens, np.ones((3, 2)), verbose=0))


def test_activation_with_weights_is_trained() -> None:
    layer = FADense(4, activation=keras.layers.PReLU("ones"))
    layer.build((None, 5))
    x = KINDS["dense"].inputs()
    layer(x)
    assert len(layer.trainable_variables) == 3
    _, _, gradients = backends.vjp(layer, layer, [x])
    z = x @ references.array(layer.kernel)
    wanted = np.minimum(z, 0).sum(axis=0)
    references.assert_close(references.array(gradients[-1]), wanted)


def test_rematerialized_layer_has_the_same_gradient() -> None:
    with keras.RematScope(mode="list_of_layers", layer_names=["again"]):
        layer = FADense(3, name="again")
    kind = KINDS["dense"]
    layer.build((None, 5))
    x, dy = kind.inputs(), references.normal((4, 3), 5)
    wanted = references.reference(
        kind, layer, references.stored_of(layer), x, dy
    )
    got = references.computed(layer, x, dy, compiled=True)
    references.assert_gradients(got, wanted)


@keras.saving.register_keras_serializable(package="tests")
class GatedDense(FADense):
    """A user's subclass, with a weight and an argument of its own."""

    def __init__(self, units: int, slope: float = 1.0, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.slope = slope

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.gate = self.add_weight(shape=(self.units,), name="gate")

    def call(self, inputs: Any) -> Any:
        return self.slope * self.gate * super().call(inputs)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["gate"] = self.gate

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self.gate.assign(store["gate"])

    def get_config(self) -> dict:
        return {**super().get_config(), "slope": self.slope}


@keras.saving.register_keras_serializable(package="tests")
class OwnModel(backends.OwnStep, keras.Model):
    """A subclassed model with a train_step of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = GatedDense(4, slope=2.0, kernel_constraint="fixed_sign")
        self.readout = FADense(2, feedback_constraint="sign_concordance")

    def call(self, x: Any) -> Any:
        return self.readout(self.hidden(x))


def test_subclasses_train_and_survive_saving(tmp_path: Any) -> None:
    model = OwnModel()
    model.compile("adam", "mse")
    x, y = references.normal((16, 5), 1), references.normal((16, 2), 2)
    losses = model.fit(x, y, epochs=5, verbose=0).history["own_loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "own.keras")
    loaded = keras.saving.load_model(tmp_path / "own.keras")
    assert loaded.hidden.slope == 2.0
    np.testing.assert_array_equal(model(x), loaded(x))
    np.testing.assert_array_equal(
        model.hidden.kernel.constraint.excitatory,
        loaded.hidden.kernel.constraint.excitatory,
    )
    signature = inspect.signature(GatedDense)
    assert list(signature.parameters) == ["units", "slope", "kwargs"]


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        keras.models.clone_model,
    ],
    ids=["deepcopy", "pickle", "clone_model"],
)
def test_copies_are_models_of_their_own(duplicate: Any) -> None:
    model = constrained_model()
    other = duplicate(model)
    other.set_weights(model.get_weights())
    keras_fa.refresh(other)
    other.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = references.normal((4, 6, 6, 2), 1), references.normal((4, 3), 2)
    np.testing.assert_array_equal(model(x), other(x))
    before = model.get_weights()
    other.fit(x, y, verbose=0)
    for kept, weight in zip(before, model.get_weights()):
        np.testing.assert_array_equal(kept, weight)
    kernel = other.layers[0].kernel
    assert not np.array_equal(before[0], references.array(kernel))
    excitatory = references.array(
        model.layers[0].kernel.constraint.state["excitatory"]
    )
    signs = np.where(excitatory, 1, -1)
    assert (references.array(kernel) * signs >= 0).all()
    np.testing.assert_array_equal(
        excitatory, references.array(kernel.constraint.state["excitatory"])
    )


# Arguments.


def argument_cases() -> dict[str, dict[str, Any]]:
    """Feedback arguments, each of another form."""
    return {
        "strings": {
            "feedback_initializer": "constant",
            "feedback_regularizer": "alignment",
            "feedback_constraint": "sign_concordance",
        },
        "instances": {
            "feedback_initializer": keras.initializers.HeNormal(seed=4),
            "feedback_regularizer": Alignment(0.5),
            "feedback_constraint": NoisyKernel(30.0, seed=3),
        },
        "stock": {
            "feedback_initializer": keras.initializers.Constant(0.25),
            "feedback_regularizer": "l2",
            "feedback_constraint": keras.constraints.MaxNorm(2.0),
        },
        "none": {},
    }


@pytest.mark.parametrize("case", argument_cases())
@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip(kind: str, case: str) -> None:
    kind = KINDS[kind]
    arguments = {
        **kind.arguments,
        **argument_cases()[case],
        **kind.constrained([FixedSign("unit", 0.5, seed=2), "constant_norm"]),
        "activation": "relu",
        "dtype": "mixed_bfloat16",
    }
    layer = kind.fa(**arguments)
    config = layer.get_config()
    again = kind.fa.from_config(config)
    assert again.get_config() == config
    keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    for name, value in argument_cases()[case].items():
        got = getattr(again, name)
        if not isinstance(value, str):
            inner = getattr(got, "constraint", got)
            assert type(inner) is type(value)
            assert inner.get_config() == value.get_config()
        assert got is not None
    (chain,) = {
        type(getattr(again, argument))
        for argument in again.kernel_constraint_arguments
    }
    assert chain.__name__ == "Chain"


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_signature_is_that_of_stock_with_feedback(kind: str) -> None:
    kind = KINDS[kind]
    refused = {"lora_rank", "lora_alpha", "quantization_config"}
    stock = list(inspect.signature(kind.stock).parameters)
    ours = inspect.signature(kind.fa).parameters
    family = [
        "feedback_initializer",
        "feedback_regularizer",
        "feedback_constraint",
        "feedback_learning",
    ]
    expected = [p for p in stock if p not in refused]
    assert [p for p in ours if p not in family] == expected
    assert all(ours[name].default is None for name in family)
    assert list(ours)[-1] == "kwargs"
    positional = list(kind.arguments.values())[:1]
    assert kind.fa(*positional, **dict(list(kind.arguments.items())[1:]))


def test_models_load_with_the_package_alone(tmp_path: Any) -> None:
    inputs = keras.Input((8, 8, 2))
    x = FAConv2D(
        4,
        3,
        feedback_initializer="constant",
        feedback_constraint="sign_concordance",
        kernel_constraint=["fixed_sign", "constant_norm"],
    )(inputs)
    x = FASeparableConv2D(3, 3, feedback_constraint="noisy_kernel")(x)
    x = keras.layers.Flatten()(x)
    x = FADense(
        2, feedback_constraint="tied_kernel", feedback_regularizer="alignment"
    )(x)
    model = keras.Model(inputs, x)
    data = references.normal((2, 8, 8, 2), 1)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", data)
    np.save(tmp_path / "y.npy", model(data))
    code = """
import keras, keras_fa, numpy as np
model = keras.saving.load_model("model.keras")
assert type(model.layers[1]) is keras_fa.FAConv2D
y = keras.ops.convert_to_numpy(model(np.load("x.npy")))
np.testing.assert_allclose(y, np.load("y.npy"), rtol=1e-5, atol=1e-6)
"""
    done = forks.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_weights_round_trip(kind: str, tmp_path: Any) -> None:
    kind = KINDS[kind]
    arguments = {
        **RULES["fixed_sign"].arguments,
        **kind.constrained(["fixed_sign", "constant_norm"]),
    }
    models = [
        keras.Sequential(
            [
                keras.Input(kind.shape),
                kind.fa(**kind.arguments, **arguments, name="layer"),
            ]
        )
        for _ in range(2)
    ]
    path = tmp_path / "model.weights.h5"
    models[0].save_weights(path)
    models[1].load_weights(path)
    ours, theirs = (model.layers[0] for model in models)
    for a, b in zip(ours.weights, theirs.weights):
        np.testing.assert_array_equal(references.array(a), references.array(b))
    for a, b in zip(references.stored_of(ours), references.stored_of(theirs)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(references.kernels_of(ours), references.kernels_of(theirs)):
        for name, value in a.constraint.state.items():
            other = b.constraint.state[name]
            np.testing.assert_array_equal(
                references.array(value), references.array(other)
            )


def test_set_weights_takes_what_get_weights_gives() -> None:
    layer = FADense(3)
    layer.build((None, 5))
    weights = layer.get_weights()
    assert [w.shape for w in weights] == [(5, 3), (3,), (5, 3)]
    layer.set_weights([w + 1 for w in weights])
    np.testing.assert_array_equal(layer.feedback_kernel, weights[2] + 1)


QUANTIZED = {
    "lora_rank": lambda: FADense(3, lora_rank=2),
    "lora_alpha": lambda: FADense(3, lora_alpha=2),
    "dtype": lambda: FADense(3, dtype="int8_from_float32"),
    "quantization_config": lambda: FADense(
        3, quantization_config=keras.quantizers.Int8QuantizationConfig()
    ),
    "enable_lora": lambda: built_dense().enable_lora(2),
}


def built_dense() -> FADense:
    """An FADense with a kernel."""
    layer = FADense(3)
    layer.build((None, 5))
    return layer


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
@pytest.mark.parametrize("case", QUANTIZED)
def test_lora_and_quantization_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="neither LoRA nor quantization"):
        QUANTIZED[case]()


def test_a_quantized_policy_by_the_path_is_refused() -> None:
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["by_path"] = keras.dtype_policies.get("int8_from_float32")
    layer = FADense(2, dtype=policies, name="by_path")
    with pytest.raises(ValueError, match="neither LoRA nor quantization"):
        layer.build((None, 3))


@pytest.mark.parametrize(
    "policy", ["int8_from_float32", "int4_from_float32", "float8_from_float32"]
)
@pytest.mark.parametrize("built", [False, True])
def test_quantized_policies_are_refused_unchanged(
    policy: str, built: bool
) -> None:
    layer, x = FADense(3), references.normal((2, 5), 1)
    if built:
        before = references.array(layer(x))
    with pytest.raises(ValueError, match="neither LoRA nor quantization"):
        layer.dtype_policy = policy
    assert layer.dtype_policy.name == "float32"
    after = references.array(layer(x))
    if built:
        np.testing.assert_array_equal(after, before)
    layer.dtype_policy = "mixed_bfloat16"  # others are the layer's, as ever
    assert layer.compute_dtype == "bfloat16"


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
@pytest.mark.parametrize("filters", [None, "one"])
def test_model_quantize_says_what_it_leaves(filters: str | None) -> None:
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4), FADense(3, name="one")]
    )
    kernel = references.array(model.layers[-1].kernel)
    with pytest.warns(UserWarning, match="'?one'?.*mode='int8'"):
        model.quantize("int8", filters=filters)
    np.testing.assert_array_equal(model.layers[-1].kernel, kernel)
    with pytest.raises(NotImplementedError, match="neither LoRA nor"):
        model.layers[-1].quantize("int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feedback_constraint": "fixed_sign"}, "`kernel_constraint`"),
        ({"feedback_constraint": ConstantNorm()}, "`kernel_constraint`"),
        ({"kernel_constraint": "noisy_kernel"}, "`feedback_constraint`"),
        (
            {"kernel_constraint": ["non_neg", "tied_kernel"]},
            "`feedback_constraint`",
        ),
        ({"feedback_constraint": "sgn"}, "Unknown constraint 'sgn'"),
        ({"kernel_constraint": "sgn"}, "Unknown constraint 'sgn'"),
        ({"feedback_initializer": "sgn"}, "sgn"),
        ({"feedback_regularizer": "sgn"}, "sgn"),
        ({"feedback_constraint": 3}, "3"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FADense(3, **arguments)


def test_feedback_before_build_is_refused() -> None:
    layer = FADense(3, name="early")
    for read in (
        lambda: layer.feedback_kernel,
        layer.effective_feedback_kernel,
    ):
        with pytest.raises(AttributeError, match="Build the layer first"):
            read()


def test_a_layer_itself_may_be_compiled() -> None:
    layer = FADense(3, activation="relu")
    x = references.normal((4, 5), 1)
    layer.build(x.shape)
    run = backends.compiled(layer, layer.variables)
    references.assert_close(
        references.array(run(x)), references.array(layer(x))
    )
