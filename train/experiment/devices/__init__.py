"""Where a model is trained: on one device, on several, on several machines.

One more way is added here, as one entry of `STRATEGIES`.
"""

import json
import os
import re
import socket
from collections.abc import Callable
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import keras

from experiment import startup
from experiment.devices.distributed import Distributed
from experiment.devices.one import OneDevice
from experiment.errors import UserError
from experiment.errors import reason

PATIENCE = 10  # seconds in which a TPU has to answer
# What `keras.distribution.initialize` reads.
PROCESSES = tuple(
    f"KERAS_DISTRIBUTION_{name}"
    for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
)


class Strategy(NamedTuple):
    """A way to distribute.

    Attributes:
        open: Settings to the devices.
        backend: The one that it is of. Default `None`: any.
        splits: Whether it splits a device into --virtual_devices.
    """

    open: Callable[[SimpleNamespace], OneDevice]
    backend: str | None = None
    splits: bool = False


def mirrored(config: SimpleNamespace) -> Distributed:
    """All GPUs of this machine, or else its CPU, each with a replica."""
    import tensorflow as tf

    def devices() -> list[str]:
        return [device.name for device in tf.config.list_logical_devices(kind)]

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if not config.virtual_devices:
        return Distributed(tf.distribute.MirroredStrategy(devices()))
    device = tf.config.list_physical_devices(kind)[0]
    tf.config.set_visible_devices(device, kind)
    part = tf.config.LogicalDeviceConfiguration(
        memory_limit=4096 if kind == "GPU" else None
    )
    tf.config.set_logical_device_configuration(
        device, [part] * config.virtual_devices
    )
    # Devices that share one GPU cannot use its own means of communication.
    return Distributed(
        tf.distribute.MirroredStrategy(
            devices(), tf.distribute.ReductionToOneDevice()
        )
    )


def multi_worker(config: SimpleNamespace) -> Distributed:
    """The GPUs, or else the CPUs, of all the machines in TF_CONFIG."""
    import tensorflow as tf

    worker, addresses = cluster(os.environ.get("TF_CONFIG"))
    print(
        f"Worker {worker} of {len(addresses)} at {addresses[worker]}: waiting "
        "for the others.",
        flush=True,
    )
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Worker {worker} of {len(addresses)} at {addresses[worker]} could "
            f"not join the others ({reason(error)}). Start the same "
            "command once for each address of TF_CONFIG, with its own index, "
            "and see that the ports are free and reachable."
        ) from error
    return Distributed(strategy, worker, len(addresses))


def cluster(text: str | None) -> tuple[int, list[str]]:
    """Reads TF_CONFIG.

    Args:
        text: The environment variable's.

    Returns:
        The place of this process, and the addresses of all workers.

    Raises:
        UserError: If it is missing, or says something else.
    """
    form = (
        'Set it to {"cluster": {"worker": ["host0:port", "host1:port"]}, '
        '"task": {"type": "worker", "index": 0}}, with another index on each '
        "machine."
    )
    if not text:
        raise UserError(
            f"--strategy=multi_worker needs TF_CONFIG to be set. {form}"
        )
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"TF_CONFIG={text!r} is not JSON ({error}). {form}"
        ) from error
    match found:
        case {
            "cluster": {"worker": [*workers], **others},
            "task": {"type": "worker", "index": int(index)},
        } if (
            not others
            and all(isinstance(address, str) for address in workers)
            and 0 <= index < len(workers)
        ):
            return index, workers
    raise UserError(
        f"TF_CONFIG={text!r} does not describe workers and the place of "
        f"this one among them. {form}"
    )


def tpu(config: SimpleNamespace) -> Distributed:
    """All cores of a TPU or of a slice of them."""
    import tensorflow as tf

    name = config.tpu or "local"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
        _reach(resolver.master())  # TensorFlow would wait for ever
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except Exception as error:  # of TensorFlow, of Google's API, of the network
        raise UserError(
            f"--strategy=tpu --tpu={name}: no TPU can be used "
            f"({reason(error)}). Run this on a TPU VM with --tpu=local, "
            "or give a TPU's name or grpc:// address; without a TPU choose "
            "--strategy=none|mirrored|multi_worker."
        ) from error
    return Distributed(strategy)


def data_parallel(config: SimpleNamespace) -> OneDevice:
    """All devices that JAX has, on this machine or on several."""
    import jax

    from experiment.devices.parallel import Parallel

    if config.virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.virtual_devices)
    given = processes(os.environ)
    # TPU VMs know of each other by themselves.
    if given or (startup.installed("libtpu") and not config.virtual_devices):
        place = "This process"
        if given:
            place = "Worker {} of {} at {}".format(*given)
            print(f"{place}: waiting for the others.", flush=True)
        try:
            keras.distribution.initialize()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{place} could not join the others ({reason(error)}). "
                "Start the same command on each machine, with its own "
                f"{PROCESSES[2]}, and see that the first address of "
                f"{PROCESSES[0]} is free and reachable."
            ) from error
    return Parallel()


def processes(environment: Mapping[str, str]) -> tuple[int, int, str] | None:
    """Reads what `keras.distribution.initialize` is to be told.

    Args:
        environment: The environment variables.

    Returns:
        The place of this process, the number of all, and their addresses;
        `None` if there is nothing to read.

    Raises:
        UserError: If some of it is missing, or says something else.
    """
    values = [environment.get(name, "") for name in PROCESSES]
    if not any(values):
        return None
    addresses, number, place = values
    if (
        re.fullmatch(r"[^,\s]+:\d+(,[^,\s]+:\d+)*", addresses)
        and number.isdecimal()
        and place.isdecimal()
        and int(place) < int(number)
        and addresses.count(",") in (0, int(number) - 1)
    ):
        return int(place), int(number), addresses
    given = ", ".join(f"{n}={v!r}" for n, v in zip(PROCESSES, values))
    raise UserError(
        f"{given} do not describe processes and the place of this one among "
        "them. Set them to host0:port (or all addresses, separated by "
        "commas), to the number of processes, and to 0, 1, ... on each "
        "machine, or set none of them."
    )


def _reach(address: str) -> None:
    """Connects to an address `grpc://host:port`, if it is one, for a moment."""
    if address.startswith("grpc://"):
        host, _, port = address.removeprefix("grpc://").rpartition(":")
        socket.create_connection((host, int(port)), PATIENCE).close()


STRATEGIES = {
    "none": Strategy(lambda config: OneDevice()),
    "mirrored": Strategy(mirrored, "tensorflow", splits=True),
    "multi_worker": Strategy(multi_worker, "tensorflow"),
    "tpu": Strategy(tpu, "tensorflow"),
    "data_parallel": Strategy(data_parallel, "jax", splits=True),
}
