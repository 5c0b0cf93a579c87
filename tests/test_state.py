"""Whatever way a model's state goes, training goes on as it would have."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import references
from backends import ON_JAX
from backends import ON_TENSORFLOW
from backends import requires_tensorflow
from keras import layers
from references import array

import keras_fa
from keras_fa import FADense
from keras_fa import convert
from keras_fa import load_stock_weights
from keras_fa import to_backprop
from keras_fa.callbacks import StrictNormalization
from keras_fa.constraints import FeedbackConstraint
from keras_fa.constraints import FixedSign
from keras_fa.constraints import NoisyKernel
from keras_fa.layers.feedback import feedback_layers
from keras_fa.methods import METHODS

X = references.normal((32, 6, 6, 2), 1)
Y = references.normal((32, 3), 2)


def network() -> keras.Model:
    """A convnet with a layer of each sort of kernel."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="tanh", name="conv"),
            layers.SeparableConv2D(4, 2, activation="tanh", name="separable"),
            layers.Flatten(name="flatten"),
            layers.Dense(3, name="readout"),
        ],
        name="net",  # part of the variables' paths in a state tree
    )


def train(
    model: keras.Model, steps: int = 6, run_eagerly: bool = False
) -> None:
    """Updates that make weights cross zero and change norms."""
    model.compile(keras.optimizers.SGD(0.3), "mse", run_eagerly=run_eagerly)
    for step in range(steps):
        batch = slice(8 * (step % 4), 8 * (step % 4) + 8)
        model.train_on_batch(X[batch], Y[batch])


def by_file(model: keras.Model, method: str, folder: Path) -> keras.Model:
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def by_weights_file(
    model: keras.Model, method: str, folder: Path
) -> keras.Model:
    model.save_weights(folder / "model.weights.h5")
    other = convert(network(), method)
    other.load_weights(folder / "model.weights.h5")
    return other


def by_legacy_file(
    model: keras.Model, method: str, folder: Path
) -> keras.Model:
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5", compile=False)


def by_checkpoint(model: keras.Model, method: str, folder: Path) -> keras.Model:
    import tensorflow as tf

    path = tf.train.Checkpoint(model).write(str(folder / "checkpoint"))
    other = convert(network(), method)
    status = tf.train.Checkpoint(other).read(path)
    status.assert_existing_objects_matched()
    return other


def by_weights(model: keras.Model, method: str, folder: Path) -> keras.Model:
    other = convert(network(), method)
    other.set_weights(model.get_weights())
    return other


def by_clone(model: keras.Model, method: str, folder: Path) -> keras.Model:
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


def by_state_tree(model: keras.Model, method: str, folder: Path) -> keras.Model:
    model.compile("sgd", "mse")  # the tree has the optimizer's state, too
    tree = model.get_state_tree(value_format="numpy_array")
    other = convert(network(), method)
    parts = ("trainable_variables", "non_trainable_variables")
    other.set_state_tree({part: tree[part] for part in parts})
    return other


def by_pickle(model: keras.Model, method: str, folder: Path) -> keras.Model:
    return pickle.loads(pickle.dumps(model))


def by_convert(model: keras.Model, method: str, folder: Path) -> keras.Model:
    return convert(model, method)


# Those that tell a layer, and those that assign its weights one by one.
TELLING = [by_file, by_weights_file, by_pickle, by_convert]
ASSIGNING = [by_legacy_file, by_weights, by_clone, by_state_tree]
WAYS = [*TELLING, by_checkpoint, *ASSIGNING]
# A way knows variables, and not what they are for: what a constraint, a layer
# and a map of a model keep goes each way, the rest one of each sort.
EVERY_WAY = "fa_usf_const_ei", "direct_kolen_pollack"
SOME = [by_file, by_convert, by_weights]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("method", references.KEEPING)
def test_training_goes_on(method: str, tmp_path: Path) -> None:
    """Trained on, a model and what any way makes of it stay equal."""
    model = convert(network(), method)
    train(model)
    if "_ei" in method:  # some have stopped at zero
        assert not np.all(model.get_layer("readout").kernel)
    others = {}
    for way in WAYS if method in EVERY_WAY else SOME:
        if way is by_checkpoint and not ON_TENSORFLOW:
            continue  # TensorFlow's own
        if way is by_convert and METHODS[method].wiring != "chain":
            continue  # its maps are in test_conversion
        folder = tmp_path / way.__name__
        folder.mkdir()
        others[way.__name__] = other = way(model, method, folder)
        if way in ASSIGNING and ON_JAX:
            keras_fa.refresh(other)
        for ours, theirs in zip(feedback_layers(other), feedback_layers(model)):
            for got, wanted in zip(
                references.effective_of(ours), references.effective_of(theirs)
            ):
                references.assert_close(got, wanted)
    train(model, 3, run_eagerly=ON_TENSORFLOW)
    for name, other in others.items():
        # Traced once, for the time that it takes.
        train(other, 3, run_eagerly=ON_TENSORFLOW and name != "by_file")
        for ours, theirs in zip(
            other.trainable_weights, model.trainable_weights
        ):
            references.assert_close(array(ours), array(theirs), 1e-4)


@pytest.mark.skipif(not ON_JAX, reason="JAX's own: constants of a step")
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize("method", ["fa_usf_init_ei", "bp_const"])
@pytest.mark.parametrize("way", ASSIGNING)
def test_a_step_that_holds_other_constants_says_so(
    way: Callable, method: str, tmp_path: Path
) -> None:
    import jax

    def step(model: keras.Model) -> None:
        train(model, steps=1)
        jax.effects_barrier()

    model = convert(network(), method)
    model.get_layer("readout").kernel.assign(
        -3 * model.get_layer("readout").kernel
    )
    keras_fa.refresh(model)
    other = way(model, method, tmp_path)
    with pytest.warns(UserWarning, match=r"keras_fa\.refresh\(model\)"):
        step(other)
    keras_fa.refresh(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)


@pytest.mark.skipif(not ON_JAX, reason="JAX's own: constants of a step")
@pytest.mark.parametrize("method", ["fa_usf_const_ei", "bp_const"])
@pytest.mark.parametrize("trained_by", ["fit", "train_on_batch", "evaluate"])
def test_weights_set_between_compiled_steps_are_noticed(
    trained_by: str, method: str
) -> None:
    """Without a new trace, and without a word of what is as it should be."""
    model = convert(network(), method)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    step = getattr(model, trained_by)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            step(X, Y)
    model.set_weights([-2 * w for w in model.get_weights()])
    with pytest.warns(UserWarning, match=r"keras_fa\.refresh\(model\)"):
        step(X, Y)
    model.set_weights([-2 * w for w in model.get_weights()])
    keras_fa.refresh(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(X, Y)


@pytest.mark.skipif(not ON_JAX, reason="about JAX itself")
def test_compiled_steps_wait_for_no_look_at_constants() -> None:
    """A branch or a callback of a step makes a GPU and its host meet."""
    import jax

    model = convert(network(), "fa_usf_const_ei")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)

    def step(trainable: list, of_optimizer: list) -> object:
        def loss(trainable: list) -> object:
            others = model.non_trainable_variables
            others = [variable.value for variable in others]
            y, _ = model.stateless_call(trainable, others, X, training=True)
            return (y**2).mean()

        gradients = jax.grad(loss)(trainable)
        return model.optimizer.stateless_apply(
            of_optimizer, gradients, trainable
        )

    program = str(
        jax.make_jaxpr(step)(
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.optimizer.variables],
        )
    )
    assert "conv" in program
    assert "callback" not in program
    assert "cond" not in program


def test_zeros_keep_their_signs_through_plain_keras(tmp_path: Path) -> None:
    """Inhibitory weights at zero are -0.0, in any file of any model."""
    model = convert(network(), "fa_usf_init_ei")
    train(model, 12)
    wanted = [
        array(layer.kernel.constraint.state["excitatory"])
        for layer in feedback_layers(model)
        if hasattr(layer, "kernel")
    ]
    to_backprop(model).save_weights(tmp_path / "stock.weights.h5")
    other = convert(network(), "fa_usf_init_ei")
    other.load_weights(tmp_path / "stock.weights.h5")
    stopped = 0
    for signs, layer in zip(
        wanted,
        [each for each in feedback_layers(other) if hasattr(each, "kernel")],
    ):
        state = layer.kernel.constraint.state["excitatory"]
        np.testing.assert_array_equal(array(state), signs)
        stopped += np.sum(array(layer.kernel)[~signs] == 0)
    assert stopped > 0


# Stock files ---------------------------------------------------------------


def mixed(*classes: type, names: str = "abc") -> keras.Model:
    """Layers of one shape that one could mistake for each other."""
    return keras.Sequential(
        [keras.Input((4,))]
        + [cls(4, name=name) for cls, name in zip(classes, names)]
    )


MIXES = [
    (layers.Dense, FADense),
    (FADense, layers.Dense),
    (FADense, layers.Dense, FADense),
    (FADense, FADense),
]


@pytest.mark.parametrize("classes", MIXES)
@pytest.mark.parametrize("names", ["abc", "bca", "xyz"])
def test_no_layer_takes_the_weights_of_another(
    names: str, classes: tuple, tmp_path: Path
) -> None:
    stock = mixed(*[layers.Dense] * len(classes))
    stock.save_weights(tmp_path / "stock.weights.h5")
    model = mixed(*classes, names=names)
    with pytest.raises(ValueError, match="load_stock_weights"):
        model.load_weights(tmp_path / "stock.weights.h5")
    load_stock_weights(model, tmp_path / "stock.weights.h5")
    for ours, theirs in zip(model.layers, stock.layers):
        np.testing.assert_array_equal(ours.kernel, theirs.kernel)


def auto_named(order: str) -> keras.Model:
    """A net whose layers are named in the order of their making."""
    keras.utils.clear_session(free_memory=False)
    made = {name: layers.Dense(4) for name in order}
    inputs = keras.Input((4,))
    return keras.Model(inputs, made["b"](made["a"](inputs)))


def test_names_that_mean_other_layers_are_refused(tmp_path: Path) -> None:
    stock, path = auto_named("ba"), tmp_path / "stock.weights.h5"
    stock.save_weights(path)
    x = references.normal((2, 4), 1)
    wanted = array(stock(x))
    same, other = (convert(auto_named(order), "fa") for order in ("ba", "ab"))
    same.load_weights(path)
    np.testing.assert_array_equal(same(x), wanted)
    with pytest.raises(ValueError, match="load_stock_weights"):
        other.load_weights(path)
    load_stock_weights(other, path)
    np.testing.assert_array_equal(other(x), wanted)


def test_a_converted_layer_beside_a_stock_one(tmp_path: Path) -> None:
    mixed(layers.Dense, layers.Dense).save_weights(tmp_path / "a.weights.h5")
    base = convert(mixed(layers.Dense), "fa")
    model = keras.Sequential(
        [keras.Input((4,)), base.layers[0], layers.Dense(4, name="b")]
    )
    with pytest.raises(ValueError, match="load_stock_weights"):
        model.load_weights(tmp_path / "a.weights.h5")


def test_layers_of_ones_own_load_stock_files_by_name(tmp_path: Path) -> None:
    class Own(FADense):
        """A user's subclass."""

    stock = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="a"),
            layers.Dense(3, name="b"),
        ]
    )
    stock.save_weights(tmp_path / "stock.weights.h5")
    model = keras.Sequential(
        [keras.Input((4,)), Own(5, name="a"), FADense(3, name="b")]
    )
    model.load_weights(tmp_path / "stock.weights.h5")
    for ours, theirs in zip(model.layers, stock.layers):
        np.testing.assert_array_equal(ours.kernel, theirs.kernel)


@pytest.mark.parametrize("kind", ["dense", "conv2d", "separable2d"])
def test_files_of_other_layers_are_refused(kind: str, tmp_path: Path) -> None:
    """As stock layers refuse them, whichever of the two has more weights."""
    kind = references.KINDS[kind]

    def model(**arguments: object) -> keras.Model:
        layer = kind.fa(**kind.arguments, **arguments)
        return keras.Sequential([keras.Input(kind.shape), layer])

    for first, second in ((True, False), (False, True)):
        model(use_bias=first).save_weights(tmp_path / "model.weights.h5")
        with pytest.raises(ValueError, match="another layer"):
            model(use_bias=second).load_weights(tmp_path / "model.weights.h5")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize(
    "method", ["fa", "fa_usf_sn", "fa_usf_const_ei", "dfa", "bp_const"]
)
def test_stock_files_of_the_old_layout(method: str, tmp_path: Path) -> None:
    stock = network()
    stock.save(tmp_path / "stock.h5")
    model = convert(network(), method)
    load_stock_weights(model, tmp_path / "stock.h5")
    for layer in feedback_layers(model):
        twin = stock.get_layer(layer.name)
        for ours, theirs in zip(
            references.kernels_of(layer), references.kernels_of(twin)
        ):
            np.testing.assert_array_equal(ours, theirs)
            for name, value in getattr(ours.constraint, "state", {}).items():
                if name == "norm":
                    wanted = np.linalg.norm(theirs)
                    np.testing.assert_allclose(value, wanted, rtol=1e-6)
                else:
                    np.testing.assert_array_equal(value, array(theirs) >= 0)


# Rules with variables of their own ------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Counting(FeedbackConstraint):
    """A user's rule that counts its steps, and sends more error each time."""

    def build(self, kernel: keras.Variable, add_weight: Callable) -> None:
        self.count = add_weight(
            shape=(), initializer="zeros", name="count", autocast=False
        )

    def __call__(self, feedback_kernel: object, kernel: object) -> object:
        self.count.assign(self.count + 1.0)
        return feedback_kernel * keras.ops.convert_to_tensor(self.count)


def counting() -> keras.Model:
    """A model with a plain layer below one with that rule."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="below"),
            FADense(3, name="top", feedback_constraint=Counting()),
        ]
    )


def test_variables_of_a_rule_are_the_layers(tmp_path: Path) -> None:
    model = counting()
    model.compile("sgd", "mse")
    x, y = references.normal((12, 4), 1), references.normal((12, 3), 2)
    model.fit(x, y, batch_size=4, verbose=0)
    (path,) = model.get_layer("top").feedback_paths
    assert any(v is path.rule.count for v in model.variables)
    assert float(path.rule.count) == 3
    count = float(path.rule.count)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.get_layer("top").feedback_paths[0].rule.count) == count
    loaded.fit(x[:4], y[:4], verbose=0)
    moved = loaded.get_layer("top").feedback_paths[0].rule.count
    assert float(moved) == count + 1


@pytest.mark.parametrize("name", ["feedback_kernel", "path", "norm", None])
def test_weights_of_a_rule_need_names_of_their_own(name: str | None) -> None:
    class Wrong(Counting):
        """Names a weight as another one, or not at all."""

        def build(self, kernel: keras.Variable, add_weight: Callable) -> None:
            weight = add_weight(shape=(), name="weight")
            setattr(self, name or "weights", weight if name else [weight])

    with pytest.raises(ValueError, match=r"Wrong\.build has to assign"):
        FADense(3, feedback_constraint=Wrong()).build((None, 4))


@requires_tensorflow
def test_a_checkpoint_has_what_a_rule_keeps(tmp_path: Path) -> None:
    import tensorflow as tf

    model, other = counting(), counting()
    model.get_layer("top").feedback_paths[0].rule.count.assign(7.0)
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(other).read(path).assert_existing_objects_matched()
    assert float(other.get_layer("top").feedback_paths[0].rule.count) == 7


# One instance in several layers ---------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"feedback_initializer": keras.initializers.HeNormal(seed=1)},
        {"feedback_initializer": keras.initializers.HeNormal()},
        {"feedback_constraint": NoisyKernel(seed=1)},
    ],
)
def test_one_instance_draws_other_values_for_each_layer(
    arguments: dict, tmp_path: Path
) -> None:
    w = keras.initializers.HeNormal(seed=2)
    model = keras.Sequential(
        [keras.Input((40,))]
        + [FADense(40, kernel_initializer=w, **arguments) for _ in range(3)]
    )
    b = [references.effective_of(layer)[0] for layer in model.layers]
    noise = [each - array(model.layers[0].kernel) for each in b]
    drawn = noise if "feedback_constraint" in arguments else b
    for i in range(3):
        for j in range(i):
            assert 80 < references.angle(drawn[i], drawn[j]) < 100
    clone = keras.models.clone_model(model)
    again = [references.effective_of(layer)[0] for layer in clone.layers]
    for i in range(3):
        for j in range(i):
            assert not np.allclose(again[i], again[j])


def test_a_method_is_left_as_it_is() -> None:
    rule = METHODS["fa_usf_init"].feedback_constraint
    model = keras.Sequential([FADense(4, feedback_constraint=rule)])
    StrictNormalization().apply(model)
    model(np.ones((2, 3), "float32"))
    assert model.layers[0].feedback_kernel is None
    assert not rule.strict


def test_one_seeded_constraint_fixes_other_units_for_each_layer() -> None:
    constraint = FixedSign(per="unit", excitatory_fraction=0.5, seed=1)
    a, b = (FADense(3, kernel_constraint=constraint) for _ in range(2))
    for layer in (a, b):
        layer.build((None, 40))
    a, b = (
        array(layer.kernel.constraint.state["excitatory"]) for layer in (a, b)
    )
    assert not np.array_equal(a, b)


def test_a_model_function_draws_the_same_twice() -> None:
    def model() -> list[np.ndarray]:
        shared = keras.initializers.HeNormal(seed=1)
        made = [FADense(4, feedback_initializer=shared) for _ in range(2)]
        for layer in made:
            layer.build((None, 4))
        return [array(layer.feedback_kernel) for layer in made]

    np.testing.assert_array_equal(model(), model())
