"""What is timed: each has a `block()` that returns the seconds of one step."""

import collections
import contextlib
import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_fa
from experiment import networks
from experiment.datasets import DATASETS
from keras_fa.alignment import alignment_function
from keras_fa.methods import METHODS

BACKEND = keras.backend.backend()

DTYPE_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")

# With as many classes as the data sets of their images have.
NETWORKS: dict[str, Callable[[], keras.Model]] = {
    name: functools.partial(networks.build, name, dataset.classes)
    for dataset in DATASETS.values()
    for name, network in networks.NETWORKS.items()
    if network.image_shape == dataset.image_shape
}


@dataclasses.dataclass
class Trainee:
    """A compiled model that trains on one batch, in blocks of some steps."""

    model: keras.Model
    callbacks: list[keras.callbacks.Callback]
    batch: tuple[np.ndarray, np.ndarray]
    steps: int

    def block(self) -> float:
        """Trains a block; the seconds of one step in it."""
        timer = Timer()
        self.model.fit(
            forever(self.batch),
            epochs=1,
            steps_per_epoch=self.model.steps_per_execution + self.steps,
            callbacks=[*self.callbacks, timer],
            shuffle=False,
            verbose=0,
        )
        return timer.seconds / self.steps


class Timer(keras.callbacks.Callback):
    """The time from the end of the first execution to that of the last one."""

    began = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.began is None:
            self._note(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._note(logs["loss"])

    def on_predict_batch_end(
        self, batch: int, logs: dict | None = None
    ) -> None:
        self._note(logs["outputs"])

    def _note(self, result: Any) -> None:
        np.asarray(result)  # waits for the device
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        self.seconds = now - self.began


@dataclasses.dataclass
class Predictor:
    """A compiled model that predicts one batch, in blocks of some steps."""

    model: keras.Model
    batch: tuple[np.ndarray, np.ndarray]
    steps: int

    def block(self) -> float:
        """Predicts a block; the seconds of one batch of it."""
        timer = Timer()
        self.model.predict(
            forever(self.batch),
            steps=self.model.steps_per_execution + self.steps,
            callbacks=[timer],
            verbose=0,
        )
        return timer.seconds / self.steps


class Monitor:
    """The alignment of a compiled model, measured on a probe."""

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


@dataclasses.dataclass
class Input:
    """Batches of a `tf.data.Dataset` that are made and dropped."""

    batches: Any
    steps: int

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
    """Standardized images of random pixels, and labels, for a model."""
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
        jit_compile=BACKEND == "jax",
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


def converted(
    model: keras.Model, method: str, feedback_maps: str
) -> keras.Model:
    """A model under a method, with fixed maps of a form where it has any."""
    if METHODS[method].wiring == "chain":
        return keras_fa.convert(model, method)
    return keras_fa.convert(model, method, feedback_maps=feedback_maps)
