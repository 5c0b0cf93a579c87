"""Feedback that learns, against formulas worked out in NumPy."""

import warnings
from collections.abc import Callable

import backends
import keras
import numpy as np
import pytest
import references
from backends import ON_TENSORFLOW
from backends import array
from keras import layers
from references import KINDS
from references import assert_close
from references import normal

import keras_fa
from keras_fa import FAConv2D
from keras_fa import FADense
from keras_fa import FASeparableConv2D
from keras_fa import constraints
from keras_fa import convert
from keras_fa import learning
from keras_fa.callbacks import MirrorPhase
from keras_fa.layers.direct import SendError
from keras_fa.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:KolenPollack aligns"),
    pytest.mark.usefixtures("optimized_graphs"),
]

LEARNED = [name for name, m in METHODS.items() if m.feedback_learning]
LOSSES = ("symmetric_alignment", "activation_alignment")
LOSSES += ("information_alignment",)


def stored_variables(layer: layers.Layer) -> list[keras.Variable]:
    return [path.feedback_kernel for path in layer.feedback_paths]


# --- Kolen-Pollack -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", references.BASE_KINDS)
def test_kolen_pollack_gives_b_the_gradient_of_w(
    name: str, compiled: bool, dtype: str
) -> None:
    kind = KINDS[name]
    if dtype != "float32" and (compiled or not ON_TENSORFLOW):
        pytest.skip("one of each")
    layer = kind.make(
        kind.fa,
        feedback_learning="kolen_pollack",
        activation="tanh",
        dtype=dtype,
    )
    x = kind.inputs()
    dy = references.error_for(layer, x)
    stored = stored_variables(layer)
    kernels = references.kernels_of(layer)
    assert {id(v) for v in stored} <= {id(v) for v in layer.trainable_weights}

    def run(x: object, dy: object) -> tuple:
        _, dx, moved = backends.vjp(layer, layer, [x], dy, [*kernels, *stored])
        return dx[0], moved

    if compiled:
        run = backends.compiled(run, layer.variables)
    given = (
        keras.ops.convert_to_tensor(z, layer.compute_dtype) for z in (x, dy)
    )
    dx, moved = run(*given)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    wanted = references.reference(
        kind,
        layer,
        list(map(array, stored)),
        x,
        dy,
        **({} if dtype == "float32" else {"dtype": dtype}),
    )
    assert_close(references.floats(dx), wanted.dx, tolerance)
    for of_w, of_b, dw in zip(moved, moved[len(kernels) :], wanted.kernels):
        assert_close(references.floats(of_w), dw, tolerance)
        np.testing.assert_array_equal(array(of_b), array(of_w))


def two_layers(**arguments: object) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            FAConv2D(4, 3, activation="tanh", name="conv", **arguments),
            FASeparableConv2D(3, 2, name="separable", **arguments),
            layers.Flatten(),
            FADense(3, name="readout", **arguments),
        ]
    )


X = normal((32, 6, 6, 2), 1)
Y = normal((32, 3), 2)


def differences(model: keras.Model) -> list[np.ndarray]:
    """W - B of every kernel."""
    return [
        array(path.kernel) - array(path.feedback_kernel)
        for layer in keras_fa.layers.feedback.feedback_layers(model)
        for path in layer.feedback_paths
    ]


@pytest.mark.parametrize(
    ("optimizer", "decay"),
    [
        (lambda: keras.optimizers.SGD(0.1, weight_decay=0.2), 0.02),
        (lambda: keras.optimizers.AdamW(0.01, weight_decay=2.0), 0.02),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 0.0),
        (
            lambda: keras_fa.optimizers.Muon(
                0.01, weight_decay=2.0, adam_weight_decay=2.0
            ),
            0.02,
        ),
    ],
    ids=["sgd", "adamw", "no_decay", "muon"],
)
def test_w_minus_b_shrinks_by_exactly_the_decay(
    optimizer: Callable, decay: float
) -> None:
    model = two_layers(feedback_learning="kolen_pollack")
    model.compile(optimizer(), "mse")
    before = differences(model)
    start = array(model.get_layer("conv").kernel)
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert not np.allclose(start, array(model.get_layer("conv").kernel))
    for old, new in zip(before, differences(model)):
        assert_close(new, old * (1 - decay) ** 8, 2e-5)


def test_a_kernels_regularizer_is_bs_too() -> None:
    penalty = keras.regularizers.L2(0.5)
    conv = {"kernel_regularizer": penalty}
    layer = FADense(3, feedback_learning="kolen_pollack", **conv)
    model = keras.Sequential([keras.Input((5,)), layer])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = FADense(3, feedback_learning="kolen_pollack", **conv)
        model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = array(layer.kernel) - array(layer.feedback_kernel)
    model.fit(normal((8, 5), 1), normal((8, 3), 2), verbose=0)
    after = array(layer.kernel) - array(layer.feedback_kernel)
    assert_close(after, before * (1 - 0.1 * 2 * 0.5))  # d(l |w|^2) = 2 l w
    own = FADense(
        3,
        feedback_learning="kolen_pollack",
        feedback_regularizer="l1",
        **conv,
    )
    own.build((None, 5))
    assert isinstance(own.feedback_kernel.regularizer, keras.regularizers.L1)


def test_without_decay_it_says_that_nothing_aligns() -> None:
    layer = FADense(3, feedback_learning="kolen_pollack")
    with pytest.warns(UserWarning, match="Give the optimizer a weight_decay"):
        layer.build((None, 5))
    # A kernel's regularizer is B's where B is stored as it is, and not R's.
    given = {"feedback_learning": "kolen_pollack", "kernel_regularizer": "l2"}
    rule = "product_feedback"
    with pytest.warns(UserWarning, match="a weight_decay; else"):
        FADense(3, feedback_constraint=rule, **given).build((None, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FADense(3, **given).build((None, 5))


# --- Kunin's losses ----------------------------------------------------------


def patches(x: np.ndarray, k: int) -> np.ndarray:
    """All k x k windows of images, as rows: a "valid" convolution's x."""
    n, height, width, c = x.shape
    rows = [
        x[:, i : i + k, j : j + k].reshape(n, -1)
        for i in range(height - k + 1)
        for j in range(width - k + 1)
    ]
    return np.stack(rows, 1).reshape(-1, k * k * c)


def spread(rows: np.ndarray, shape: tuple, k: int) -> np.ndarray:
    """The transpose of `patches`."""
    n, _, width, c = shape
    across = width - k + 1
    rows = rows.reshape(n, -1, k, k, c)
    x = np.zeros(shape)
    for place in range(rows.shape[1]):
        i, j = divmod(place, across)
        x[:, i : i + k, j : j + k] += rows[:, place]
    return x


def of_loss(rule: object, x: np.ndarray, w: np.ndarray, b: np.ndarray, k: int):
    """The gradient of a rule's loss by hand: k is 0 for a dense layer."""
    shape, power = b.shape, np.sum(np.square(x, dtype="float64"))
    w, b = (z.reshape(-1, shape[-1]).astype("float64") for z in (w, b))
    rows = patches(x, k).astype("float64") if k else x.astype("float64")
    y = rows @ w
    amp, sparse = -rows.T @ y, rows.T @ (rows @ b)
    back = y @ b.T
    if k:  # |op^T(y, B)|^2 / 2, summed where windows overlap
        back = patches(spread(back, x.shape, k), k)
    null = back.T @ y
    if isinstance(rule, learning.SymmetricAlignment):
        gradient = rule.a * b - rule.b * w
    elif isinstance(rule, learning.ActivationAlignment):
        gradient = (rule.a * sparse + rule.b * amp) / power
    else:
        gradient = (rule.a * amp + rule.b * null) / power + rule.c * b
    return gradient.reshape(shape)


RULES = {
    "symmetric": learning.SymmetricAlignment(0.7, 0.4),
    "activation": learning.ActivationAlignment(0.7, 0.4),
    "information": learning.InformationAlignment(0.7, 0.4, 0.2),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [  # what a loss computes of a kernel is the same in all of them
        ("dense", "eager"),
        ("conv", "eager"),
        ("conv", "compiled"),
        ("dense", "mixed"),
        ("dense", "replicas"),
    ],
)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_losses_move_b_as_worked_out_by_hand(
    rule: learning.FeedbackLearning,
    kind: str,
    way: str,
    request: pytest.FixtureRequest,
) -> None:
    dtype = "mixed_bfloat16" if way == "mixed" else "float32"
    conv = kind == "conv"

    def make(
        run_eagerly: bool, **arguments: object
    ) -> tuple[keras.Model, layers.Layer]:
        keras.utils.set_random_seed(3)
        layer = (
            FAConv2D(3, 2, dtype=dtype, **arguments)
            if conv
            else FADense(3, dtype=dtype, **arguments)
        )
        shape = (4, 5, 2) if conv else (5,)
        model = keras.Sequential([keras.Input(shape), layer, layers.Flatten()])
        model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=run_eagerly)
        return model, layer

    if way == "replicas":
        strategy = request.getfixturevalue("strategy")
        with strategy.scope():
            model, layer = make(False, feedback_learning=rule)
    else:
        model, layer = make(way == "eager", feedback_learning=rule)
    plain, untouched = make(
        way == "eager" or (ON_TENSORFLOW and way != "mixed")
    )
    x = normal((8, *model.input_shape[1:]), 4)
    y = normal((8, *model.output_shape[1:]), 5)
    layer.bias.assign(normal(layer.bias.shape, 6))  # no part of y
    untouched.bias.assign(array(layer.bias))
    w, b = array(layer.kernel), array(layer.feedback_kernel)
    np.testing.assert_array_equal(b, array(untouched.feedback_kernel))
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    (loss,) = model.fit(x, y, **fit).history["loss"]
    parts = [x[:4], x[4:]] if way == "replicas" else [x]
    wanted = np.mean([of_loss(rule, p, w, b, 2 * conv) for p in parts], axis=0)
    moved = (b - array(layer.feedback_kernel)) / 0.5
    assert_close(
        moved, wanted.astype("float32"), 5e-2 if way == "mixed" else 2e-5
    )
    # Nothing of it reaches another weight or the loss that is shown.
    assert plain.fit(x, y, **fit).history["loss"] == pytest.approx([loss])
    assert_close(array(layer.kernel), array(untouched.kernel))
    assert_close(array(layer.bias), array(untouched.bias))


def test_losses_of_a_separable_layer_are_those_of_its_two_stages() -> None:
    rule = learning.ActivationAlignment()
    layer = FASeparableConv2D(
        3, 2, depth_multiplier=2, feedback_learning=rule, use_bias=False
    )
    model = keras.Sequential([keras.Input((4, 5, 2)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    depthwise, pointwise = layer.feedback_paths
    w, b = array(depthwise.kernel), array(depthwise.feedback_kernel)
    v, c = array(pointwise.kernel), array(pointwise.feedback_kernel)
    x = normal((8, 4, 5, 2), 4)
    hidden = np.zeros((8, 3, 4, 4), "float32")
    wanted = np.zeros_like(w)
    for channel in range(2):
        rows = patches(x[..., channel, None], 2)
        flat = (z[:, :, channel].reshape(4, 2) for z in (w, b))
        ww, bb = flat
        hidden[..., 2 * channel : 2 * channel + 2] = (rows @ ww).reshape(
            8, 3, 4, 2
        )
        wanted[:, :, channel] = (rows.T @ (rows @ (bb - ww))).reshape(2, 2, 2)
    model.train_on_batch(x, np.zeros((8, 3, 4, 3), "float32"))
    assert_close(
        b - array(depthwise.feedback_kernel), wanted / np.sum(x**2), 1e-4
    )
    at_rest = of_loss(rule, hidden.reshape(-1, 4), v, c, 0)
    assert_close(
        c - array(pointwise.feedback_kernel), at_rest.astype("float32"), 1e-4
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_taken_in_training_alone(name: str) -> None:
    layer = FADense(3, feedback_learning=name)
    x = normal((4, 5), 1)
    layer(x)
    assert not layer.losses
    layer(x, training=False)
    assert not layer.losses
    layer(x, training=True)
    assert [float(loss) for loss in layer.losses] == [0.0]


# --- Weight mirror -----------------------------------------------------------


def mirrored(
    layer: layers.Layer, shape: tuple, phases: int, **arguments: object
) -> list[tuple[float, float]]:
    """Angles between B and W, and the ratios of their norms, at the end."""
    model = keras.Sequential([keras.Input(shape), layer])
    before = [array(v) for v in model.weights]
    phase = MirrorPhase(batches=phases, **arguments)
    phase.mirror(model, 0)
    moved = {id(v) for v in stored_variables(layer)}
    for old, new in zip(before, model.weights):
        assert np.array_equal(old, array(new)) == (id(new) not in moved)
    return [
        (
            references.angle(path.kernel, path.feedback_kernel),
            np.linalg.norm(path.feedback_kernel) / np.linalg.norm(path.kernel),
        )
        for path in layer.feedback_paths
    ]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (FADense, (20,)),
        (lambda n, **kw: FAConv2D(n, 3, padding="same", **kw), (8, 8, 2)),
        (lambda n, **kw: FAConv2D(n, 3, strides=2, **kw), (None, 9, 2)),
        (lambda n, **kw: FASeparableConv2D(n, 3, **kw), (8, 8, 2)),
    ],
    ids=["dense", "same", "strides", "separable"],
)
def test_mirror_brings_b_to_w(make: Callable, shape: tuple) -> None:
    """On white noise its fixed point is `B = (v / decay) W`."""
    layer = make(6, feedback_learning=learning.WeightMirror(decay=2.0))
    results = mirrored(layer, shape, 150, noise=0.5, rate=0.05)
    for angle, ratio in results:
        assert angle < 15
        # Where the border is padded, weights are used unequally often.
        assert ratio == pytest.approx(0.25 / 2, rel=0.1)


def test_a_mirror_step_is_the_correlation_of_noise_with_its_image() -> None:
    layer = FADense(3, feedback_learning="weight_mirror")
    model = keras.Sequential([keras.Input((5,)), layer])
    layer.bias.assign([5.0, 5.0, 5.0])  # takes no part
    w, b = array(layer.kernel), array(layer.feedback_kernel)
    MirrorPhase(batch_size=16, rate=0.1, noise=2.0, seed=7).mirror(model, 11)
    generator = keras.random.SeedGenerator(0)
    generator.state.assign(keras.ops.convert_to_tensor([7, 11], "uint32"))
    xi = array(keras.random.normal((16, 5), stddev=2.0, seed=generator))
    wanted = b + 0.1 * (xi.T @ (xi @ w) / 16 - b)
    assert_close(array(layer.feedback_kernel), wanted)


def test_the_phase_goes_with_fit_and_with_a_resumed_one() -> None:
    def trained(*parts: int) -> np.ndarray:
        keras.utils.set_random_seed(1)
        model = two_layers(feedback_learning="weight_mirror")
        model.compile(keras.optimizers.SGD(0.1), "mse")
        done = 0
        for epochs in parts:
            model.fit(
                X,
                Y,
                batch_size=8,
                epochs=done + epochs,
                initial_epoch=done,
                shuffle=False,
                verbose=0,
                callbacks=[MirrorPhase(every=2)],
            )
            done += epochs
        assert all(p.kernel.trainable for p in model.layers[0].feedback_paths)
        return array(model.get_layer("readout").feedback_kernel)

    whole = trained(2)
    assert_close(trained(1, 1), whole)
    assert not np.allclose(trained(1), whole)


@pytest.mark.parametrize(
    ("every", "at_once", "accumulated", "wanted"),
    [
        (4, 1, None, [4, 8, 12]),  # counted on from epoch to epoch
        (20, 1, None, []),
        (2, 3, None, [3, 6, 9, 12]),
        (4, 3, None, [6, 9, 12]),
        (1, 1, 3, [1, 2, 3, 4]),  # each with noise of its own
    ],
)
def test_the_phase_comes_after_so_many_updates(
    every: int, at_once: int, accumulated: int | None, wanted: list
) -> None:
    steps = []

    class Phase(MirrorPhase):
        def mirror(self, model: keras.Model, step: int) -> None:
            steps.append(step)

    model = two_layers(feedback_learning="weight_mirror")
    optimizer = keras.optimizers.SGD(
        0.1, gradient_accumulation_steps=accumulated
    )
    model.compile(optimizer, "mse", steps_per_execution=at_once)
    x, y = X[:24], Y[:24]
    phase = Phase(every=every)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[phase])
    assert steps == wanted


def test_a_phase_moves_the_model_that_it_is_given() -> None:
    phase = MirrorPhase()
    for _ in range(2):
        layer = FADense(3, feedback_learning="weight_mirror")
        model = keras.Sequential([keras.Input((5,)), layer])
        before = array(layer.feedback_kernel)
        phase.mirror(model, 0)
        assert not np.allclose(layer.feedback_kernel, before)


def test_a_phase_leaves_frozen_layers_alone() -> None:
    layer = FADense(3, feedback_learning="weight_mirror", trainable=False)
    model = keras.Sequential([keras.Input((5,)), layer])
    before = array(layer.feedback_kernel)
    MirrorPhase().mirror(model, 0)
    np.testing.assert_array_equal(array(layer.feedback_kernel), before)


def test_a_phase_moves_what_another_rule_leaves_to_it() -> None:
    class Drawn(learning.FeedbackLearning):
        in_step = False

        def loss(self, local: learning.Local) -> object:
            return local.decay() + local.concordance()

    layer = FADense(3, feedback_learning=Drawn())
    model = keras.Sequential([keras.Input((5,)), layer])
    w, b = array(layer.kernel), array(layer.feedback_kernel)
    MirrorPhase(rate=0.1).mirror(model, 0)
    assert_close(array(layer.feedback_kernel), b + 0.1 * (w - b))


def test_the_phase_on_two_replicas(strategy: object) -> None:
    def trained() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = two_layers(feedback_learning="weight_mirror")
        model.compile(keras.optimizers.SGD(0.1), "mse")
        phase = MirrorPhase(batches=2)
        model.fit(
            X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[phase]
        )
        return model

    with strategy.scope():
        ours = trained()
    for got, wanted in zip(ours.weights, trained().weights):
        assert_close(array(got), array(wanted), 1e-4)
        replicas = strategy.experimental_local_results(got.value)
        np.testing.assert_array_equal(*map(np.array, replicas))


# --- Product feedback --------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["dense", "conv2d"])
def test_product_feedback(name: str, compiled: bool) -> None:
    kind = KINDS[name]
    rule = constraints.ProductFeedback(expansion=4, seed=3)
    layer = kind.make(
        kind.fa, feedback_constraint=rule, feedback_learning="kolen_pollack"
    )
    (path,) = layer.feedback_paths
    r, m = path.rule.projection, path.rule.mixing
    assert r.trainable
    assert not m.trainable
    assert path.feedback_kernel is None
    b = np.tensordot(array(r), array(m), 1)
    assert_close(references.effective_of(layer)[0], b)
    x = kind.inputs()
    dy = references.error_for(layer, x)

    def run(x: object, dy: object) -> tuple:
        _, dx, (dr,) = backends.vjp(layer, layer, [x], dy, [r])
        return dx[0], dr

    if compiled:
        run = backends.compiled(run, layer.variables)
    dx, dr = run(*map(keras.ops.convert_to_tensor, (x, dy)))
    wanted = references.reference(kind, layer, [b], x, dy)
    assert_close(array(dx), wanted.dx)
    assert_close(array(dr), np.tensordot(wanted.kernels[0], array(m).T, 1))


def test_product_feedback_starts_with_the_norm_of_w() -> None:
    layer = FADense(40, feedback_constraint="product_feedback")
    layer.build((None, 50))
    b = layer.effective_feedback_kernel()
    norms = [np.linalg.norm(z) for z in (b, layer.kernel)]
    assert norms[0] == pytest.approx(norms[1], rel=0.2)
    assert 80 < references.angle(b, layer.kernel) < 100


# --- What holds for all ------------------------------------------------------


def test_product_feedback_that_learns_of_nothing_stays() -> None:
    layer = FADense(3, feedback_constraint="product_feedback")
    model = keras.Sequential([keras.Input((5,)), FADense(4), layer])
    before = array(layer.effective_feedback_kernel())
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), "mse")
    model.fit(normal((8, 5), 1), np.ones((8, 3)), verbose=0)
    assert_close(array(layer.effective_feedback_kernel()), before)


@pytest.mark.parametrize("method", LEARNED)
def test_learned_feedback_survives_and_goes(method: str) -> None:
    stock = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="tanh", name="conv"),
            layers.Flatten(),
            layers.Dense(3, name="readout"),
        ]
    )
    model = convert(stock, method)
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.1), "mse")
    start = references.effective_of(model.get_layer("conv"))[0]
    kept = METHODS[method].callbacks()
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=kept)
    moved = references.effective_of(model.get_layer("conv"))[0]
    assert not np.allclose(start, moved)
    if method != "pfa":
        other = convert(model, "fa")  # goes on with what was learned
        assert_close(array(other.get_layer("conv").feedback_kernel), moved)
    plain = keras_fa.to_backprop(model)
    assert [type(layer) for layer in plain.layers] == [
        type(layer) for layer in stock.layers
    ]
    assert len(plain.weights) == len(stock.weights)
    np.testing.assert_array_equal(
        plain.predict(X, verbose=0), model.predict(X, verbose=0)
    )


def optimized(function: object) -> list:
    """The nodes of a concrete function, as TensorFlow's optimizer leaves it."""
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.core.protobuf import meta_graph_pb2
    from tensorflow.python.grappler import tf_optimizer

    graph = function.graph
    meta = meta_graph_pb2.MetaGraphDef()
    meta.graph_def.CopyFrom(graph.as_graph_def())
    ends = [z.op.name for z in graph.outputs]
    ends += [operation.name for operation in graph.control_outputs]
    meta.collection_def["train_op"].node_list.value.extend(ends)
    config = config_pb2.ConfigProto()
    config.graph_options.rewrite_options.min_graph_nodes = -1
    return tf_optimizer.OptimizeGraph(config, meta).node


@backends.requires_tensorflow
@pytest.mark.parametrize("method", [*LEARNED, "direct_kolen_pollack"])
def test_a_compiled_step_reads_feedback_before_it_is_written(
    method: str,
) -> None:
    """Each read of a trained variable is on the way to its write."""
    import tensorflow as tf

    stock = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh"),
            layers.Dense(4, activation="tanh"),
            layers.Dense(3),
        ]
    )
    model = convert(stock, method)
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            loss += sum(model.losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    function = step.get_concrete_function(
        tf.TensorSpec((8, 6)), tf.TensorSpec((8, 3))
    )
    nodes = {node.name: node for node in optimized(function)}
    inputs = {
        name: {given.lstrip("^").split(":")[0] for given in node.input}
        for name, node in nodes.items()
    }

    def before(name: str) -> set[str]:
        found, left = set(), [name]
        while left:
            new = inputs[left.pop()] - found
            found |= new
            left += new
        return found

    writes = [name for name, n in nodes.items() if n.op.startswith("Assign")]
    assert len(writes) >= len(model.trainable_variables)
    for write in writes:
        (resource,) = (i for i in nodes[write].input[:1])
        reads = [
            name
            for name, node in nodes.items()
            if node.op == "ReadVariableOp" and resource in node.input
        ]
        assert set(reads) <= before(write), nodes[write]


def test_a_frozen_layer_learns_no_feedback() -> None:
    model = two_layers(feedback_learning="kolen_pollack")
    model.get_layer("conv").trainable = False
    model.compile(keras.optimizers.SGD(0.1, weight_decay=0.5), "mse")
    before = [array(w) for w in model.get_layer("conv").weights]
    model.fit(X, Y, verbose=0)
    for old, new in zip(before, model.get_layer("conv").weights):
        np.testing.assert_array_equal(old, array(new))


def test_learning_of_ones_own() -> None:
    class Own(learning.FeedbackLearning):
        def gradient(self, kernel_gradient: object) -> object:
            return 2.0 * kernel_gradient

        def loss(self, local: learning.Local) -> object:
            return 3.0 * local.decay()

    layer = FADense(3, feedback_learning=Own, use_bias=False)
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = normal((8, 5), 1), normal((8, 3), 2)
    w, b = array(layer.kernel), array(layer.feedback_kernel)
    model.train_on_batch(x, y)
    dw = (w - array(layer.kernel)) / 0.1
    assert_close((b - array(layer.feedback_kernel)) / 0.1, 2 * dw + 3 * b, 1e-4)


def test_signs_and_stock_constraints_pass_the_gradient_on() -> None:
    layer = FADense(
        3,
        feedback_constraint="sign_concordance",
        feedback_learning="kolen_pollack",
    )
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    w, b = array(layer.kernel), array(layer.feedback_kernel)
    model.train_on_batch(normal((8, 5), 1), normal((8, 3), 2))
    dw = w - array(layer.kernel)
    # d(|b| sign(w)) / db = sign(b) sign(w)
    wanted = dw * np.sign(b) * np.sign(w)
    assert_close(b - array(layer.feedback_kernel), wanted, 1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feedback_learning": "kolen"}, "Allowed: kolen_pollack, weight"),
        ({"feedback_learning": 3}, "Unknown feedback learning 3"),
        (
            {"feedback_learning": learning.FeedbackLearning},
            "FeedbackLearning teaches nothing",
        ),
        (
            {
                "feedback_learning": "weight_mirror",
                "feedback_constraint": "tied_kernel",
            },
            "WeightMirror moves a stored feedback kernel, and TiedKernel",
        ),
        (
            {
                "feedback_learning": "weight_mirror",
                "feedback_constraint": "product_feedback",
            },
            "WeightMirror moves a stored feedback kernel, and ProductFeedback",
        ),
    ],
)
def test_what_cannot_learn_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FADense(3, **given).build((None, 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: learning.WeightMirror(decay=0.0),
        lambda: learning.SymmetricAlignment(a=-1.0),
        lambda: learning.InformationAlignment(c=-1.0),
        lambda: MirrorPhase(every=0),
        lambda: MirrorPhase(noise=0.0),
        lambda: constraints.ProductFeedback(expansion=0),
    ],
)
def test_bad_coefficients(make: Callable) -> None:
    with pytest.raises(ValueError, match="Received: "):
        make()


# --- Direct errors -----------------------------------------------------------


def direct_model(method: str, activation: str | None = None) -> keras.Model:
    stock = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, activation="tanh", name="h1"),
            layers.Dense(6, activation="tanh", name="h2"),
            layers.Dense(3, activation=activation, name="readout"),
        ]
    )
    return convert(stock, method)


def sent(model: keras.Model) -> dict[str, keras.Variable]:
    (send,) = (z for z in model.layers if isinstance(z, SendError))
    return send.stored_feedback()


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_direct_kolen_pollack_by_hand(run_eagerly: bool) -> None:
    model = direct_model("direct_kolen_pollack")
    x, y = normal((8, 5), 1), normal((8, 3), 2)
    maps = sent(model)
    before = {name: array(m) for name, m in maps.items()}
    weights = {n: array(model.get_layer(n).kernel) for n in ("h1", "h2")}
    weights["readout"] = array(model.get_layer("readout").kernel)
    h1 = np.tanh(x @ weights["h1"])
    h2 = np.tanh(h1 @ weights["h2"])
    e = 2 * (h2 @ weights["readout"] - y) / y.size
    optimizer = keras.optimizers.SGD(0.5, weight_decay=0.1)
    model.compile(optimizer, "mse", run_eagerly=run_eagerly)
    model.train_on_batch(x, y)
    for name, h in (("h1", h1), ("h2", h2)):
        wanted = before[name] * (1 - 0.05) - 0.5 * e.T @ h
        assert_close(array(maps[name]), wanted, 1e-4)
    # Errors go through the map as it was.
    error = (e @ before["h1"]) * (1 - h1**2)
    wanted = weights["h1"] * (1 - 0.05) - 0.5 * x.T @ error
    assert_close(array(model.get_layer("h1").kernel), wanted, 1e-4)


def test_convolutional_maps_learn_the_gradient_of_their_product() -> None:
    send = SendError(
        ["r"], feedback_maps="convolutional", feedback_learning="kolen_pollack"
    )
    source, receiver = normal((2, 3, 3, 2), 1), normal((2, 6, 6, 4), 2)
    send([source, receiver])
    e = normal(source.shape, 3)
    (m,) = send.maps
    _, _, (dm,) = backends.vjp(
        send, lambda s, r: send([s, r]), [source, receiver], e, [m]
    )

    def product(kernel: np.ndarray) -> float:
        carried = send._carriers[0](
            *map(keras.ops.convert_to_tensor, (e, kernel))
        )
        return float(np.sum(array(carried) * receiver))

    for index in [(0, 0, 0, 0), (1, 2, 1, 3)]:
        one = np.zeros(m.shape, "float32")
        one[index] = 1.0  # linear in the map
        assert array(dm)[index] == pytest.approx(product(one), rel=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_drtp_sends_the_target(activation: str, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = direct_model("drtp", activation)
    maps = {name: array(m) for name, m in sent(model).items()}
    x = normal((8, 5), 1)
    t = np.zeros((8, 3), "float32")
    t[np.arange(8), np.arange(8) % 3] = 1
    if activation == "sigmoid":
        t[:, 0] = 1
        loss, each = "binary_crossentropy", 1 / 3
    else:
        loss, each = "categorical_crossentropy", 1
    w1 = array(model.get_layer("h1").kernel)
    h1 = np.tanh(x @ w1)
    optimizer = keras.optimizers.SGD(0.5)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 256.0)
    model.compile(optimizer, loss)
    weight = np.linspace(0.5, 2.0, 8).astype("float32")
    model.train_on_batch(x, t, sample_weight=weight)
    s = each * weight[:, None] / 8
    error = (-s * t @ maps["h1"]) * (1 - h1**2)
    moved = (w1 - array(model.get_layer("h1").kernel)) / 0.5
    assert_close(moved, x.T @ error, 1e-3 if policy == "float32" else 2e-2)


def test_drtp_takes_the_target_from_the_loss() -> None:
    stock = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4), layers.Dense(3, name="readout")]
    )

    def signal(loss: object) -> str:
        stock.compile("sgd", loss)
        model = convert(stock, "drtp")
        return next(z for z in model.layers if isinstance(z, SendError)).signal

    cross = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert signal(cross) == "softmax_target"
    cross = keras.losses.BinaryCrossentropy(from_logits=True)
    assert signal(cross) == "sigmoid_target"
    assert signal(["binary_crossentropy"]) == "sigmoid_target"
    assert signal({"readout": "binary_crossentropy"}) == "sigmoid_target"
    with pytest.raises(ValueError, match="target of a cross-entropy"):
        signal("mse")
    model = direct_model("drtp")
    for loss, message in (
        ("mse", "target of a cross-entropy"),
        ("binary_crossentropy", "sends the softmax_target"),
    ):
        model.compile("sgd", loss)
        with pytest.raises(ValueError, match=message):
            model.fit(
                normal((8, 5), 1),
                np.ones((8, 3)),
                verbose=0,
                callbacks=METHODS["drtp"].callbacks(),
            )
    with pytest.raises(ValueError, match="`signal` is one of error"):
        SendError(["a"], signal="no")


@pytest.mark.parametrize("method", ["direct_kolen_pollack", "drtp"])
def test_direct_methods_are_saved(method: str, tmp_path: object) -> None:
    model = direct_model(method, "softmax")
    model.compile("sgd", "categorical_crossentropy")
    x, y = normal((8, 5), 1), np.eye(3, dtype="float32")[np.arange(8) % 3]
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, other):
        each.compile("sgd", "categorical_crossentropy")
        each.train_on_batch(x, y)
    for got, wanted in zip(other.weights, model.weights):
        assert_close(array(got), array(wanted))


@pytest.mark.parametrize(
    "loss",
    [keras.losses.CategoricalCrossentropy, keras.losses.BinaryCrossentropy],
)
def test_drtp_refuses_label_smoothing(loss: type) -> None:
    model = direct_model("drtp", "softmax")
    model.compile("sgd", loss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="label_smoothing"):
        model.fit(
            np.ones((2, *model.input_shape[1:])),
            np.eye(model.output_shape[-1])[:2],
            callbacks=METHODS["drtp"].callbacks(),
            verbose=0,
        )


def test_a_class_that_is_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown feedback learning"):
        FADense(3, feedback_learning=layers.Dense)
