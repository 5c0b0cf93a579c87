"""Times each method against the stock Keras model that it is made of.

From the root of the project:

    python train/benchmark.py
    python train/benchmark.py --networks=cifar10_1 --methods=fa,fa_usf_sn,dfa
    python train/benchmark.py --helpfull

It prints a table for each network and dtype policy and writes <out>.md and,
with every single time, <out>.json.

How time is measured. One stock model is built and converted to each method;
all are compiled alike (SGD with momentum 0.9) and fed one batch of random
images again and again, so that no data pipeline is measured. After a block
that traces and compiles, they train in turn: in every round each model trains
one block of --steps steps through `fit`, with the callbacks of its method, in
an order drawn anew for each round. A block's time runs from the end of its
first execution, when the loss has been read and so the device is idle, to the
end of the epoch, where Keras has read the loss of the last one. A ratio is
that of two blocks of the same round, so that what slows the whole machine
down for a while falls out. Reported are the median over the rounds, the
quartiles, and the number of rounds. Then, in turn as well, each model predicts
blocks of --steps batches.

Feedback bytes are those of all variables which the converted model has and
the stock model has not; the memory of a compiled step comes on top. The peak
of memory is that of a process of its own which builds the model and trains a
few steps, less what it held before: resident memory on a CPU, the device's
own count on an accelerator. The alignment monitor's row is one measurement on
a probe of 256 images, as a multiple of one training step on a batch. With
--input, training batches of ImageNet are made and dropped, in turn by the
pipeline that training has and by one which decodes each photo whole before it
cuts out the window; all else in the two is the same. With --peak_tflops, the
share of the peak is that of the operations that backpropagation needs,

    2 batch (3 (sum of all layers' multiply-adds) - (the first layer's)),

the forward pass, the gradient of each kernel and that of each layer's input
but the first's, for whatever method: normalizations and activations are not
counted.
"""

import startup  # before anything imports Keras

# isort: split
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import commandline
import data
import files
import keras
import models
import numpy as np
import peers
from absl import flags
from errors import UserError
from strategies import Share

import keras_fa
from keras_fa.alignment import alignment_function
from keras_fa.layers.feedback import all_variables
from keras_fa.methods import METHODS

BACKEND = keras.backend.backend()
PROBE_SIZE = 256
MONITOR = f"alignment monitor, {PROBE_SIZE} images"
MEMORY_STEPS = 3
INPUT_SIZE = 224
# Environment variables that change what is timed.
ENVIRONMENT = (
    "KERAS_BACKEND",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
DTYPE_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")

# With as many classes as the data sets of their images have.
NETWORKS: dict[str, Callable[[], keras.Model]] = {
    name: functools.partial(models.build, name, dataset.classes)
    for dataset in data.DATASETS.values()
    for name, network in models.NETWORKS.items()
    if network.image_shape == dataset.image_shape
}

FLAGS = flags.FlagValues()
flags.DEFINE_list(
    "networks",
    ["cifar10_1", "cifar10_2"],
    f"Networks, of {', '.join(NETWORKS)}.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "methods",
    list(METHODS),
    f"Methods, of {', '.join(METHODS)}. The stock model is always there; a "
    "method whose maps do not fit into memory is left out, with a line that "
    "says so.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "dtype_policies",
    ["float32", "mixed_bfloat16"],
    f"Policies, of {', '.join(DTYPE_POLICIES)}. On a CPU without bfloat16 "
    "arithmetic a convolution's gradients take some 30 times as long in it.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size", 128, "Images a step.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
    "steps",
    10,
    "Training steps in a block, a multiple of --steps_per_execution.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "rounds",
    10,
    "Blocks that each model trains, at least 2.",
    lower_bound=2,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "steps_per_execution",
    1,
    "Training steps per call of the compiled function.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "feedback_maps",
    "dense",
    ["dense", "convolutional"],
    "Form of the fixed maps of DFA and DenseFA.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "monitor",
    True,
    f"Whether to time the alignment monitor, too, on {PROBE_SIZE} images.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "memory",
    True,
    "Whether to measure the peak of memory: a process for each row.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "profile",
    False,
    "Whether to tell where the time goes: the milliseconds of each kind of "
    "operation in a step, by TensorFlow's profiler, on a CPU.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "peak_tflops",
    0.0,
    "What the accelerator can do in the dtype policy at hand, in 10^12 "
    "operations a second, to tell the share of it; 0 leaves the column out.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "peer",
    None,
    ["biotorch"],
    "Another implementation to time in turn with ours, on the CPU in float32. "
    f"biotorch: {peers.INSTALL}",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "input",
    None,
    "The --data_dir of ImageNet, to measure how fast its training batches are "
    "made. To measure nothing else: --networks= with it.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "out",
    "runs/benchmark",
    "Where to write: <out>.json and <out>.md.",
    flag_values=FLAGS,
)
for _name, _allowed in {
    "networks": NETWORKS,
    "methods": METHODS,
    "dtype_policies": DTYPE_POLICIES,
}.items():
    flags.register_validator(
        _name,
        lambda given, allowed=_allowed: set(given) <= set(allowed),
        "not one of those there are",
        flag_values=FLAGS,
    )
for _name in ("methods", "dtype_policies"):
    flags.register_validator(
        _name, bool, "there has to be one", flag_values=FLAGS
    )
flags.register_multi_flags_validator(
    ["networks", "input"],
    lambda given: given["networks"] or given["input"],
    "--networks and --input are empty: there is nothing to measure",
    flag_values=FLAGS,
)
flags.register_multi_flags_validator(
    ["steps", "steps_per_execution"],
    lambda given: given["steps"] % given["steps_per_execution"] == 0,
    "--steps must be a multiple of --steps_per_execution",
    flag_values=FLAGS,
)


# What is timed: each has a `block()` that returns the seconds of one step.


class Trainee:
    """A compiled model that trains block by block.

    Args:
        model: A compiled model.
        callbacks: Its method's callbacks, the same in all blocks.
        batch: Images and labels.
        steps: Steps in a block.
    """

    def __init__(
        self,
        model: keras.Model,
        callbacks: list[keras.callbacks.Callback],
        batch: tuple[np.ndarray, np.ndarray],
        steps: int,
    ) -> None:
        self.model = model
        self.callbacks = callbacks
        self.data = forever(batch)
        self.steps = steps

    def block(self) -> float:
        """Trains a block; the seconds of one step in it."""
        timer = Timer()
        self.model.fit(
            self.data,
            epochs=1,
            steps_per_epoch=self.model.steps_per_execution + self.steps,
            callbacks=[*self.callbacks, timer],
            shuffle=False,
            verbose=0,
        )
        return timer.seconds / self.steps


class Timer(keras.callbacks.Callback):
    """The time from the end of an epoch's first execution to its end."""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.began = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.began is None:
            float(logs["loss"])  # waits for the device
            self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.began


class Predictor:
    """A model that predicts block by block.

    Args:
        model: A compiled model.
        batch: Images and labels, of which the images are predicted.
        steps: Batches in a block.
    """

    def __init__(
        self,
        model: keras.Model,
        batch: tuple[np.ndarray, np.ndarray],
        steps: int,
    ) -> None:
        self.model = model
        self.data = forever(batch)
        self.steps = steps

    def block(self) -> float:
        """Predicts a block; the seconds of one batch of it."""
        timer = PredictionTimer()
        self.model.predict(
            self.data,
            steps=self.model.steps_per_execution + self.steps,
            callbacks=[timer],
            verbose=0,
        )
        return timer.seconds / self.steps


class PredictionTimer(keras.callbacks.Callback):
    """The time from the end of the first execution to that of the last one."""

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self.began = None

    def on_predict_batch_end(
        self, batch: int, logs: dict | None = None
    ) -> None:
        np.asarray(logs["outputs"])  # waits for the device
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        self.seconds = now - self.began


class Monitor:
    """The alignment of a model, measured on a probe.

    Args:
        model: A compiled model with FA layers.
        probe: Images and labels.
    """

    def __init__(
        self, model: keras.Model, probe: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.measure = alignment_function(model)
        self.probe = probe

    def block(self) -> float:
        """Measures once; the seconds that it takes."""
        began = time.perf_counter()
        self.measure(*self.probe)  # returns floats: the device is done
        return time.perf_counter() - began


class Input:
    """Batches that are made and dropped.

    Args:
        batches: A `tf.data.Dataset`.
        steps: Batches in a block.
    """

    def __init__(self, batches: Any, steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def block(self) -> float:
        """Makes a block of batches; the seconds of one of them."""
        batches = iter(self.batches)  # it ends with the block: no other one
        next(batches)  # finds batches made in its time
        began = time.perf_counter()
        for _ in range(self.steps):
            next(batches)
        return (time.perf_counter() - began) / self.steps


def profile(trainee: Trainee) -> dict[str, float]:
    """The milliseconds of each kind of operation in a step of a block."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(
            folder, tf.profiler.experimental.ProfilerOptions(3, 0)
        )
        trainee.block()
        tf.profiler.experimental.stop()
        (file,) = Path(folder).rglob("*.xplane.pb")
        space.ParseFromString(file.read_bytes())
    steps = trainee.model.steps_per_execution + trainee.steps
    spent = collections.Counter()
    for plane in space.planes:
        for event in (e for line in plane.lines for e in line.events):
            # Operations are called "name:Kind", with or without "#...".
            label = plane.event_metadata[event.metadata_id].name
            match = re.fullmatch(r"[^:=]+:(_?[A-Z]\w+)(#.*)?", label)
            if match:
                spent[match[1]] += event.duration_ps / 1e9 / steps
    for around in ("StatefulPartitionedCall", "PartitionedCall"):
        spent.pop(around, None)
    return dict(spent.most_common())


def forever(batch: tuple[np.ndarray, np.ndarray]) -> Any:
    """A batch again and again, at no cost, in the form that `fit` takes."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.data.Dataset.from_tensors(batch).repeat()
    batch = tuple(map(keras.ops.convert_to_tensor, batch))

    def batches() -> Iterator[tuple]:
        while True:
            yield batch

    return batches()


def random_batch(
    model: keras.Model, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standardised images of random pixels, and labels, for a model."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, *model.input_shape[1:]))
    images = ((pixels - 127.5) / 73.9).astype("float32")
    return images, rng.integers(0, model.output_shape[-1], size)


def compile_alike(model: keras.Model, steps_per_execution: int) -> None:
    """Compiles a model, as train/main.py does unless told otherwise."""
    model.compile(
        # So small that nothing diverges on labels that mean nothing.
        keras.optimizers.SGD(1e-4, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=BACKEND != "tensorflow",
        steps_per_execution=steps_per_execution,
    )


def build(network: str, dtype_policy: str) -> keras.Model:
    """A stock model under a dtype policy, the same at each call."""
    keras.utils.set_random_seed(0)
    with policy(dtype_policy):
        return NETWORKS[network]()


@contextlib.contextmanager
def policy(name: str) -> Iterator[None]:
    """A scope in which a dtype policy is the default."""
    outer = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(outer)


# Bytes and operations.


def bytes_of(model: keras.Model) -> int:
    """The bytes of all that a model holds."""
    return sum(
        math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        for variable in all_variables(model)
    )


def operations_of(model: keras.Model, batch_size: int) -> int:
    """Operations of a step of backpropagation; the module has the formula."""
    multiply_adds = [
        math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
        for layer in model.layers
        if hasattr(layer, "kernel")
    ]
    return 2 * batch_size * (3 * sum(multiply_adds) - multiply_adds[0])


def accelerator() -> str | None:
    """The name of the accelerator that Keras computes on, if there is one."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        if not found:
            return None
        details = tf.config.experimental.get_device_details(found[0])
        return details.get("device_name", found[0].name)
    import jax

    device = jax.local_devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    if accelerator() is None:
        # Not getrusage's: a new process starts with that of its parent there.
        status = Path("/proc/self/status").read_text().split()
        return 1024 * int(status[status.index("VmHWM:") + 1])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def peak_of_training(
    network: str,
    dtype_policy: str,
    method: str | None,
    feedback_maps: str,
    batch_size: int,
    steps_per_execution: int,
) -> int:
    """What building and training a model adds to this process's peak."""
    warm_up = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    train_few_steps(warm_up, [], 1, 1)  # the backend's own memory
    before = peak_bytes()
    model = build(network, dtype_policy)
    callbacks = []
    if method is not None:
        model = converted(model, method, feedback_maps)
        callbacks = METHODS[method].callbacks()
    train_few_steps(model, callbacks, batch_size, steps_per_execution)
    return peak_bytes() - before


def converted(
    model: keras.Model, method: str, feedback_maps: str
) -> keras.Model:
    """A model under a method, with fixed maps of a form where it has any."""
    if METHODS[method].wiring == "chain":
        return keras_fa.convert(model, method)
    return keras_fa.convert(model, method, feedback_maps=feedback_maps)


def train_few_steps(
    model: keras.Model,
    callbacks: list[keras.callbacks.Callback],
    batch_size: int,
    steps_per_execution: int,
) -> None:
    """Compiles and trains a model."""
    compile_alike(model, steps_per_execution)
    batch = random_batch(model, batch_size)
    Trainee(model, callbacks, batch, MEMORY_STEPS * steps_per_execution).block()


def peak_in_new_process(*arguments: Any) -> int | None:
    """`peak_of_training` in a process of its own.

    Returns:
        The bytes, or `None` for a model that does not fit into memory.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as pool:
        try:
            return pool.submit(peak_of_training, *arguments).result()
        except (ValueError, concurrent.futures.process.BrokenProcessPool):
            return None


# A network under a dtype policy.


def measure(
    network: str, dtype_policy: str, peaks: dict[str, int | None]
) -> dict[str, Any]:
    """Times all methods on one network under one dtype policy.

    Args:
        network: One of `NETWORKS`.
        dtype_policy: One of `DTYPE_POLICIES`.
        peaks: The peak of memory of each row, where it is known.

    Returns:
        An entry of `results` in the JSON file.
    """
    stock = build(network, dtype_policy)
    timed, left_out = {"stock": stock}, {}
    for name in FLAGS.methods:
        try:
            timed[name] = converted(stock, name, FLAGS.feedback_maps)
        except ValueError as wrong:
            left_out[name] = " ".join(str(wrong).split())
    extra = {
        name: bytes_of(model) - bytes_of(stock) for name, model in timed.items()
    }
    batch = random_batch(stock, FLAGS.batch_size)
    for name, model in timed.items():
        compile_alike(model, FLAGS.steps_per_execution)
        callbacks = METHODS[name].callbacks() if name in METHODS else []
        timed[name] = Trainee(model, callbacks, batch, FLAGS.steps)
    predictions, _ = in_turn(
        {
            name: Predictor(trainee.model, batch, FLAGS.steps)
            for name, trainee in timed.items()
        },
        FLAGS.rounds,
    )
    if FLAGS.monitor:
        watched = keras_fa.convert(stock, "fa_usf_sn")
        timed[MONITOR] = Monitor(watched, random_batch(stock, PROBE_SIZE))
    with contextlib.ExitStack() as stack:
        if FLAGS.peer:
            for name, mode in peers.MODES.items():
                timed[name] = stack.enter_context(
                    peers.BioTorch(stock, mode, FLAGS.batch_size, FLAGS.steps)
                )
        seconds, order = in_turn(timed, FLAGS.rounds)
    profiles = {name: profile(timed[name]) for name in extra if FLAGS.profile}
    operations = operations_of(stock, FLAGS.batch_size)
    rows = []
    for name, times in seconds.items():
        row = {
            "name": name,
            "seconds_per_step": times,
            "median_seconds": statistics.median(times),
            "ratio": spread(times, seconds["stock"]),
        }
        if name != MONITOR:
            row["images_per_second"] = FLAGS.batch_size / row["median_seconds"]
        if name in profiles:
            row["milliseconds_by_operation"] = profiles[name]
        if name in extra:
            row["feedback_bytes"] = extra[name]
            row["seconds_per_prediction"] = predictions[name]
            row["prediction_ratio"] = spread(
                predictions[name], predictions["stock"]
            )
            row["peak_memory_bytes"] = peaks.get(name)
            if FLAGS.peak_tflops:
                speed = operations / row["median_seconds"]
                row["share_of_peak"] = speed / (1e12 * FLAGS.peak_tflops)
        if name in peers.COUNTERPARTS:
            ours = seconds.get(peers.COUNTERPARTS[name])
            row["ours_is_faster_by"] = ours and spread(times, ours)
        rows.append(row)
    return {
        "network": network,
        "dtype_policy": dtype_policy,
        "input_shape": stock.input_shape[1:],
        "parameters": stock.count_params(),
        "operations_per_step": operations,
        "rows": rows,
        "order": order,
        "left_out": left_out,
    }


def measure_input(photos: Any) -> dict[str, Any]:
    """Times the input of ImageNet, with two ways to decode.

    Args:
        photos: A `photos.Photos`.

    Returns:
        The entry `input` in the JSON file.
    """
    import tensorflow as tf

    def cut_whole(photo: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        whole = tf.io.decode_jpeg(photo, channels=3)
        y, x, height, width = tf.unstack(window)
        return whole[y : y + height, x : x + width]

    size = FLAGS.batch_size
    run = {
        "share": Share(),
        "batch_size": size,
        "steps_per_epoch": photos.training_images // size,
        "seed": 0,
        "first_step": 0,
        "epochs": 1_000_000,
    }
    seconds, order = in_turn(
        {
            "windows decoded": Input(photos.training(**run), FLAGS.steps),
            "whole photos decoded": Input(
                photos.training(**run, decode=cut_whole), FLAGS.steps
            ),
        },
        FLAGS.rounds,
    )
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "name": name,
                "seconds_per_step": times,
                "median_seconds": median,
                "images_per_second": size / median,
                "images_per_second_and_core": size / median / _cores(),
                "ours_is_faster_by": spread(times, seconds["windows decoded"]),
            }
        )
    return {
        "image_size": INPUT_SIZE,
        "photos": photos.training_images,
        "rows": rows,
        "order": order,
    }


def in_turn(
    timed: dict[str, Any], rounds: int
) -> tuple[dict[str, list[float]], list[list[str]]]:
    """A block of each, again and again.

    Returns:
        The seconds of a step in each round by name, and the order in each.
    """
    for one in timed.values():
        one.block()
    seconds, orders = {name: [] for name in timed}, []
    for index in range(rounds):
        order = list(timed)
        random.Random(index).shuffle(order)
        for name in order:
            seconds[name].append(timed[name].block())
        orders.append(order)
    return seconds, orders


def spread(times: list[float], others: list[float]) -> dict[str, float]:
    """The ratio of times to others in the same rounds, and how it varies."""
    ratios = [a / b for a, b in zip(times, others)]
    first, median, third = statistics.quantiles(ratios, method="inclusive")
    return {
        "median": median,
        "first_quartile": first,
        "third_quartile": third,
        "n": len(ratios),
    }


# The report.


def table(result: dict[str, Any]) -> str:
    """An entry of `results` as Markdown."""
    stock = result["rows"][0]
    heads = ["method", "ms/step", "ratio (quartiles)", "images/s"]
    heads += ["predict, ratio (quartiles)"]
    heads += ["feedback bytes", "peak memory"]
    peak = "share_of_peak" in stock
    heads += ["share of peak"] if peak else []
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in result["rows"]:
        cells = [
            row["name"],
            f"{1e3 * row['median_seconds']:.2f}",
            _spread(row["ratio"]),
            _number(row.get("images_per_second"), ",.0f"),
            _spread(row.get("prediction_ratio")),
            _number(row.get("feedback_bytes"), ",d"),
            _memory(row.get("peak_memory_bytes"), stock["peak_memory_bytes"]),
        ]
        cells += [_number(row.get("share_of_peak"), ".1%")] if peak else []
        lines.append(cells)
    text = [
        f"## {result['network']}, {result['dtype_policy']}\n",
        *("| " + " | ".join(cells) + " |" for cells in lines),
        "",
    ]
    for row in result["rows"]:
        if row.get("ours_is_faster_by"):
            text.append(
                f"- {peers.COUNTERPARTS[row['name']]}: "
                f"{_spread(row['ours_is_faster_by'])} times the images/s of "
                f"{row['name']}"
            )
    for row in result["rows"]:
        spent = row.get("milliseconds_by_operation", {})
        if spent:
            text.append(
                f"- {row['name']}, {sum(spent.values()):.1f} ms of operations "
                "a step: "
                + ", ".join(f"{k} {v:.1f}" for k, v in [*spent.items()][:12])
            )
    for name, why in result["left_out"].items():
        text.append(f"- left out: {name}: {why}")
    return "\n".join(text).rstrip() + "\n"


def input_table(result: dict[str, Any]) -> str:
    """The entry `input` as Markdown."""
    size = result["image_size"]
    lines = [
        f"## input, {result['photos']:,d} photos of ImageNet to {size}x{size}",
        "",
        "| input | images/s | images/s a core | ours is faster by (quartiles) "
        "|",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['images_per_second']:,.0f} | "
            f"{row['images_per_second_and_core']:,.0f} | "
            f"{_spread(row['ours_is_faster_by'])} |"
        )
    return "\n".join(lines) + "\n"


def _spread(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return "-"
    return (
        f"{ratio['median']:.3f} ({ratio['first_quartile']:.3f} to "
        f"{ratio['third_quartile']:.3f})"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _memory(value: int | None, stock: int | None) -> str:
    if value is None or not stock:
        return "-"
    return f"{value / 2**20:,.0f} MiB ({value / stock:.2f})"


def report(results: dict[str, Any]) -> str:
    """The Markdown file."""
    machine, versions = results["machine"], results["versions"]
    git = results["git"] or {"commit": "not known", "dirty": False}
    settings = results["settings"]
    environment = [f"{k}={v}" for k, v in results["environment"].items()]
    return "\n".join(
        [
            "# Benchmark\n",
            f"- command: `{' '.join([*environment, *results['command']])}`",
            f"- date: {results['date']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, accelerator: "
            f"{machine['accelerator'] or 'none'}",
            "- versions: "
            + ", ".join(f"{name} {v}" for name, v in versions.items()),
            f"- commit: {git['commit']}"
            + (", changed" if git["dirty"] else ""),
            f"- batch {settings['batch_size']}, SGD with momentum 0.9, "
            f"{settings['rounds']} rounds of {settings['steps']} steps, "
            f"{settings['steps_per_execution']} a call\n",
            *([input_table(results["input"])] if "input" in results else []),
            *map(table, results["results"]),
        ]
    )


def surroundings() -> dict[str, Any]:
    """What a reader has to know of the machine and the software."""
    peers = ["biotorch", "torch"] if FLAGS.peer else []
    return {
        "command": ["python", "train/benchmark.py", *sys.argv[1:]],
        "environment": {
            name: os.environ[name] for name in ENVIRONMENT if name in os.environ
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": _cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE")
            * os.sysconf("SC_PHYS_PAGES"),
            "accelerator": accelerator(),
        },
        "versions": {
            **startup.versions("keras_fa", "keras", BACKEND),
            **{peer: metadata.version(peer) for peer in peers},
        },
        "git": _git(),
        "settings": {"backend": BACKEND, **FLAGS.flag_values_dict()},
    }


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # those that we may use
    return os.cpu_count()


def _git() -> dict[str, Any] | None:
    """The commit of this checkout, or `None` where it is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def benchmark() -> None:
    """The program."""
    out = Path(FLAGS.out).expanduser()
    parent = next(p for p in out.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--out={out}: {parent} is not a folder that can be written to. "
            "Give the path of the files without their suffix."
        )
    if FLAGS.profile and (BACKEND != "tensorflow" or accelerator()):
        raise UserError(
            "--profile: operations are told apart by TensorFlow on a CPU, and "
            f"Keras computes with {BACKEND} on {accelerator() or 'the CPU'}. "
            "Leave it out."
        )
    if FLAGS.peer:
        peers.check()
        if accelerator():
            raise UserError(
                f"--peer={FLAGS.peer} is timed on the CPU, and Keras computes "
                f"on {accelerator()}. Hide it (CUDA_VISIBLE_DEVICES=''), or "
                "leave --peer out."
            )
    if FLAGS.input:
        if not startup.installed("tensorflow", "tensorflow_datasets"):
            raise UserError(
                f"--input={FLAGS.input}: photos are read by TensorFlow "
                "Datasets. Install tensorflow and tensorflow-datasets, or "
                "leave --input out."
            )
        from photos import Photos

        photos = Photos(FLAGS.input, INPUT_SIZE)
    # Before this process itself takes an accelerator.
    cases = [(n, p) for n in FLAGS.networks for p in FLAGS.dtype_policies]
    peaks = {case: {} for case in cases}
    for case in cases if FLAGS.memory else []:
        for name in ["stock", *FLAGS.methods]:
            peaks[case][name] = peak_in_new_process(
                *case,
                name if name in METHODS else None,
                FLAGS.feedback_maps,
                FLAGS.batch_size,
                FLAGS.steps_per_execution,
            )
    results = surroundings()
    if FLAGS.input:
        results["input"] = measure_input(photos)
        print(input_table(results["input"]), flush=True)
    results["results"] = []
    for case in cases:
        results["results"].append(measure(*case, peaks[case]))
        print(table(results["results"][-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in {
        ".json": json.dumps(results, indent=1) + "\n",
        ".md": report(results),
    }.items():
        path = out.with_name(out.name + suffix)
        files.replace(path, lambda aside, text=text: aside.write_text(text))
        print(path)


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv, FLAGS, benchmark, __doc__, "Nothing was written."
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
