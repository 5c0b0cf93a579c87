"""Where a model is trained: on one device, or on several at once."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple


class Placement(NamedTuple):
    """The scope in which a model is built, and how many replicas it has."""

    scope: AbstractContextManager
    replicas: int


def one_device(virtual_devices: int) -> Placement:
    """The device that the backend chooses by itself."""
    del virtual_devices
    return Placement(contextlib.nullcontext(), 1)


def mirrored(virtual_devices: int) -> Placement:
    """All GPUs, or else the CPU, each with a replica; TensorFlow alone."""
    import tensorflow as tf

    def devices() -> list[str]:
        return [device.name for device in tf.config.list_logical_devices(kind)]

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if not virtual_devices:
        strategy = tf.distribute.MirroredStrategy(devices())
    else:
        device = tf.config.list_physical_devices(kind)[0]
        tf.config.set_visible_devices(device, kind)
        part = tf.config.LogicalDeviceConfiguration(
            memory_limit=4096 if kind == "GPU" else None
        )
        tf.config.set_logical_device_configuration(
            device, [part] * virtual_devices
        )
        # Devices that share one GPU cannot use its own means of communication.
        strategy = tf.distribute.MirroredStrategy(
            devices(), tf.distribute.ReductionToOneDevice()
        )
    return Placement(strategy.scope(), strategy.num_replicas_in_sync)


STRATEGIES: dict[str, Callable[[int], Placement]] = {
    "none": one_device,
    "mirrored": mirrored,
}
