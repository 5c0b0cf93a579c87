"""The larger networks: ResNets, and those of the columns of ImageNet."""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import array
from backends import requires_tensorflow

from experiment import commandline
from experiment import networks
from experiment.errors import UserError
from experiment.networks import residual
from experiment.networks.fused import fuse
from experiment.networks.layers import mean_logits
from experiment.table import columns
from keras_fa import convert
from keras_fa.layers.feedback import feedback_layers

# Parameters, without the moving statistics. Published for 1000 or 10 classes:
# torchvision's alexnet, resnet18 and resnet50; 0.27 and 0.85 million by He et
# al. (2016), with shortcuts that have none. imagenet_1 is counted by hand.
PARAMETERS = {
    "imagenet_1": 1_392_816 + 7 * 7 * 384 * 1000 + 1000,
    "imagenet_2": 61_100_840,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet20": 269_722,
    "resnet56": 853_018,
}
# Layers with a kernel on the longest path.
DEPTHS = {
    "imagenet_1": 8,
    "imagenet_2": 8,
    "resnet18": 18,
    "resnet50": 50,
    "resnet20": 20,
    "resnet56": 56,
}


@functools.cache
def small(name: str, **options: bool | float) -> keras.Model:
    """A network for ten classes and the smallest images that it takes.

    In single precision, and made once: no test changes it.
    """
    size = networks.NETWORKS[name].least_size
    return networks.build(name, 10, image_size=size, **options)


@pytest.fixture(scope="module", autouse=True)
def _free() -> Iterator[None]:
    yield
    small.cache_clear()


def noise(model: keras.Model, images: int = 2) -> np.ndarray:
    """Images of noise for a model."""
    shape = (images, *model.input_shape[1:])
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    network = networks.NETWORKS[name]
    model = networks.build(name, 1000 if network.resizable else 10)
    sizes = [math.prod(v.shape) for v in model.trainable_variables]
    assert sum(sizes) == PARAMETERS[name]
    path = [
        layer.name
        for layer in model.layers
        if hasattr(layer, "kernel") and "shortcut" not in layer.name
    ]
    assert len(path) == DEPTHS[name]
    assert model.input_shape == (None, *network.input_shape)
    for layer in model.layers:
        assert None not in layer.output.shape[1:], layer.name
        if isinstance(layer, keras.layers.BatchNormalization):
            assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)


LARGE = ("resnet18", "resnet50", "imagenet_2")
STEPS = [
    pytest.param(name, "float32", marks=[pytest.mark.slow] * (name in LARGE))
    for name in PARAMETERS
    if name != "resnet56"
]


@pytest.mark.parametrize(
    ("name", "policy"),
    [*STEPS, ("imagenet_1", "mixed_bfloat16"), ("resnet20", "mixed_bfloat16")],
)
def test_a_step(name: str, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = small if policy == "float32" else small.__wrapped__
        model = convert(model(name), "fa_usf_sn")
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(
        keras.optimizers.SGD(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,  # tracing takes longer than a step
    )
    kernels = [layer.kernel for layer in feedback_layers(model)]
    before = [array(kernel) for kernel in kernels]
    loss = model.train_on_batch(noise(model), np.array([3, 7]))
    assert np.isfinite(loss)
    for old, kernel in zip(before, kernels):
        assert np.isfinite(array(kernel)).all(), kernel.path
        assert not np.array_equal(old, array(kernel)), kernel.path
    assert model.layers[1].compute_dtype == policy.removeprefix("mixed_")
    assert model.output.dtype == "float32"


def short_resnet() -> keras.Model:
    """Two of resnet18's eight blocks: all that it is made of."""
    x = inputs = keras.Input((32, 32, 3))
    x = residual._stages(
        residual._stem(x), residual._basic, 64, (1, 1), residual._projection
    )
    return keras.Model(inputs, mean_logits(x, 10, dropout=0.0))


@pytest.mark.slow
@requires_tensorflow
def test_a_step_compiles_with_xla() -> None:
    """As on a TPU: forward, backward and update are one program."""
    import tensorflow as tf

    model = convert(short_resnet(), "fa_usf_sn")
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        logs = model.train_step((x, y))
        return logs["loss"]

    before = [array(v) for v in model.trainable_variables]
    assert np.isfinite(step(noise(model), np.array([3, 7])))
    for old, variable in zip(before, model.trainable_variables):
        assert np.isfinite(array(variable)).all(), variable.path
        assert not np.array_equal(old, array(variable)), variable.path
    for layer in feedback_layers(model):
        norms = [
            np.linalg.norm(array(kernel).astype("float64"))
            for kernel in (layer.effective_feedback_kernel(), layer.kernel)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "maps"),
    [
        ("fa_usf_sn", "dense"),
        ("dfa", "convolutional"),
    ],
)
def test_conversion_keeps_the_shortcuts(
    method: str, maps: str, tmp_path: Path
) -> None:
    source = networks.build("resnet20", 10)
    images = noise(source)
    wanted = array(source(images))
    model = convert(source, method, feedback_maps=maps)
    assert np.array_equal(array(model(images)), wanted)
    assert [layer.name for layer in feedback_layers(model)] == [
        layer.name for layer in source.layers if hasattr(layer, "kernel")
    ]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(array(loaded(images)), wanted)
    # So that nothing but `import keras_fa` is needed to load it.
    modules = {type(layer).__module__.split(".")[0] for layer in model.layers}
    assert modules == {"keras", "keras_fa"}


def test_shortcut_without_parameters() -> None:
    model = networks.build("resnet20", 10)
    below, above = keras.Model(
        model.input,
        [
            model.get_layer("stage1_block3_relu").output,
            model.get_layer("stage2_block1_shortcut_pad").output,
        ],
    )(noise(model))
    places = array(below)[:, ::2, ::2]
    wanted = np.pad(places, [(0, 0), (0, 0), (0, 0), (8, 8)])
    assert np.array_equal(array(above), wanted)
    assert wanted.any()


def test_stride_of_a_bottleneck() -> None:
    """It is in the 3x3 convolution."""
    model = small("resnet50")
    strides = [
        model.get_layer(f"stage2_block1_{name}").strides
        for name in ("conv1", "conv2", "conv3", "shortcut")
    ]
    assert strides == [(1, 1), (2, 2), (1, 1), (2, 2)]


def test_size_of_images() -> None:
    for name, network in networks.NETWORKS.items():
        least = network.least_size
        if least is None:
            with pytest.raises(ValueError, match="one size only"):
                network.resized(32)
            continue
        assert network.resized(least).image_shape == (least, least, 3)
        with pytest.raises(
            UserError,
            match=rf"--image_size={least - 1} is too small for {name}\. "
            f"Give at least {least},",
        ):
            networks.build(name, 10, image_size=least - 1)
    model = networks.build("imagenet_1", 10, image_size=40)
    assert model.input_shape == (None, 40, 40, 3)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "mnist",
        "cifar10_1",
        "cifar10_2",
        pytest.param("imagenet_2", marks=pytest.mark.slow),
    ],
)
def test_normalization(name: str) -> None:
    """In front of each ReLU but the readout's, and nothing else is changed."""
    options = {}
    if networks.NETWORKS[name].resizable:
        options["image_size"] = networks.NETWORKS[name].least_size
    plain = networks.build(name, 10, **options)
    model = networks.build(name, 10, normalization="batch", **options)
    *hidden, readout = [x for x in plain.layers if hasattr(x, "kernel")]
    expected = []
    for layer in plain.layers[1:]:
        expected.append(layer.name)
        if layer in hidden:
            expected += [f"{layer.name}_bn", f"{layer.name}_relu"]
    assert [layer.name for layer in model.layers[1:]] == expected
    for layer in hidden:
        other = model.get_layer(layer.name)
        assert other.kernel.shape == layer.kernel.shape
        assert other.activation is keras.activations.linear
        assert not other.use_bias
    other = model.get_layer(readout.name)
    assert other.get_config() == readout.get_config()
    x = noise(model, 64 if name != "imagenet_2" else 8)
    inner = keras.Model(
        model.input, model.get_layer(f"{hidden[0].name}_bn").output
    )
    y = array(inner(x, training=True))
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    assert np.allclose(mean, 0, atol=1e-3)
    assert np.allclose(variance, 1, atol=1e-2)
    assert array(model(x)).dtype == "float32"


def test_scale_of_normalized_kernels() -> None:
    model = networks.build("mnist", 10, normalization="batch", kernel_scale=0.1)
    kernel = array(model.get_layer("fc1").kernel)
    he_normal = np.sqrt(2 / kernel.shape[0])
    assert np.std(kernel) == pytest.approx(0.1 * he_normal, rel=0.05)


def test_which_networks_have_normalization_of_their_own() -> None:
    for name, network in networks.NETWORKS.items():
        layers = (
            small(name).layers
            if network.resizable
            else (networks.build(name, 10).layers)
        )
        normalizes = any(
            isinstance(layer, keras.layers.BatchNormalization)
            for layer in layers
        )
        assert network.normalizes == normalizes, name


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet20", {}), ("digits", {"normalization": "batch"})],
)
def test_batch_statistics_over_replicas(
    name: str, options: dict[str, str]
) -> None:
    for synchronized in (False, True):
        model = networks.build(name, 10, synchronized=synchronized, **options)
        assert {
            layer.get_config()["synchronized"]
            for layer in model.layers
            if isinstance(layer, keras.layers.BatchNormalization)
        } == {synchronized}


@requires_tensorflow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fused_normalization_is_keras_own(policy: str, compiled: bool) -> None:
    """Losses, hence gradients, outputs and moving averages."""
    x = np.random.default_rng(0).normal(3, 2, (8, 6, 6, 4)).astype("float32")
    found = []
    for fused in (True, False):
        layer = keras.layers.BatchNormalization(dtype=policy)
        model = keras.Sequential([keras.Input(x.shape[1:]), layer])
        layer.gamma.assign([1, 2, 3, 4])
        layer.beta.assign([4, 3, 2, 1])
        if fused:
            fuse(model)
            assert "call" in vars(layer)
        model.compile("sgd", "mse", run_eagerly=not compiled, jit_compile=False)
        losses = [float(model.train_on_batch(x, x)) for _ in range(3)]
        outputs = model.predict(x, verbose=0)
        found.append([losses, outputs, *map(array, layer.weights)])
    tolerance = 1e-5 if policy == "float32" else 2e-2
    for ours, stock in zip(*found):
        np.testing.assert_allclose(ours, stock, tolerance, tolerance)


def test_dropout() -> None:
    *_, drop, readout = networks.build("resnet20", 10, dropout=0.3).layers
    assert (drop.rate, readout.name) == (0.3, "fc")
    assert not networks.NETWORKS["imagenet_2"].drops
    rates = [
        layer.rate
        for layer in small("imagenet_2").layers
        if isinstance(layer, keras.layers.Dropout)
    ]
    assert rates == [0.5, 0.5]


@pytest.mark.parametrize("column", ["imagenet_1", "imagenet_2"])
def test_flag_files_say_what_the_column_says(column: str) -> None:
    for method in columns.COLUMNS[column].methods:
        (argument,) = columns.cell(column, method)
        text = Path(argument.removeprefix("--flagfile=")).read_text("utf-8")
        notes, recipe = (
            list(lines)
            for _, lines in itertools.groupby(
                text.splitlines(), lambda line: line.startswith("#")
            )
        )
        assert "Not searched" in " ".join(notes)
        assert recipe == columns.unsearched(column, method)
        names = [columns.name(flag) for flag in recipe]
        assert len(names) == len(set(names))


def test_flag_file_of_the_main_job() -> None:
    text = (commandline.FLAGFILES / "imagenet_usf.flags").read_text("utf-8")
    flags = [line for line in text.splitlines() if not line.startswith("#")]
    assert {"--dataset=imagenet2012", "--model=resnet18"} < set(flags)
    assert {"--method=fa_usf_sn", "--epochs=90"} < set(flags)
    assert "Not searched" in text
