"""Bytes and operations."""

import concurrent.futures
import math
import multiprocessing
from pathlib import Path
from typing import Any

import keras
import numpy as np

from experiment.timing.trainees import BACKEND
from experiment.timing.trainees import Trainee
from experiment.timing.trainees import build
from experiment.timing.trainees import compile_alike
from experiment.timing.trainees import converted
from experiment.timing.trainees import random_batch
from keras_fa.layers.feedback import all_variables
from keras_fa.methods import METHODS

MEMORY_STEPS = 3
STATUS = Path("/proc/self/status")  # of Linux


def bytes_of(model: keras.Model) -> int:
    """The bytes of all that a model holds."""
    return sum(
        math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        for variable in all_variables(model)
    )


def operations_of(model: keras.Model, batch_size: int) -> int:
    """Operations of a step of backpropagation, by the package's formula."""
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
    if BACKEND == "torch":
        import torch

        found = torch.cuda.is_available()
        return torch.cuda.get_device_name() if found else None
    import jax

    device = jax.local_devices()[0]
    return None if device.platform == "cpu" else device.device_kind


def peak_bytes() -> int | None:
    """The most memory that this process has held; `None` if it is not known."""
    if accelerator() is None:
        # getrusage's is at first that of the parent.
        try:
            status = STATUS.read_text().split()
        except OSError:
            return None
        return 1024 * int(status[status.index("VmHWM:") + 1])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if BACKEND == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def peak_of_training(
    network: str,
    dtype_policy: str,
    method: str | None,
    feedback_maps: str,
    batch_size: int,
    steps_per_execution: int,
) -> int | None:
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
    return None if before is None else peak_bytes() - before


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
        The bytes; `None` if they are not known, or do not fit into memory.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as pool:
        try:
            return pool.submit(peak_of_training, *arguments).result()
        except (ValueError, concurrent.futures.process.BrokenProcessPool):
            return None
