"""Where a model is trained: on one device, on several, on several machines.

One more way is added here, as one entry of `STRATEGIES`.
"""

import json
import os
import socket
from collections.abc import Callable

from experiment.devices.distributed import Distributed
from experiment.devices.one import OneDevice
from experiment.errors import UserError

PATIENCE = 10  # seconds in which a TPU has to answer


def one_device(virtual_devices: int, tpu_name: str | None) -> OneDevice:
    """The device that the backend chooses by itself."""
    del virtual_devices, tpu_name
    return OneDevice()


def mirrored(virtual_devices: int, tpu_name: str | None) -> Distributed:
    """All GPUs of this machine, or else its CPU, each with a replica."""
    import tensorflow as tf

    del tpu_name

    def devices() -> list[str]:
        return [device.name for device in tf.config.list_logical_devices(kind)]

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if not virtual_devices:
        return Distributed(tf.distribute.MirroredStrategy(devices()))
    device = tf.config.list_physical_devices(kind)[0]
    tf.config.set_visible_devices(device, kind)
    part = tf.config.LogicalDeviceConfiguration(
        memory_limit=4096 if kind == "GPU" else None
    )
    tf.config.set_logical_device_configuration(device, [part] * virtual_devices)
    # Devices that share one GPU cannot use its own means of communication.
    return Distributed(
        tf.distribute.MirroredStrategy(
            devices(), tf.distribute.ReductionToOneDevice()
        )
    )


def multi_worker(virtual_devices: int, tpu_name: str | None) -> Distributed:
    """The GPUs, or else the CPUs, of all the machines in TF_CONFIG."""
    import tensorflow as tf

    del virtual_devices, tpu_name
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
            f"not join the others ({_first_line(error)}). Start the same "
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


def tpu(virtual_devices: int, tpu_name: str | None) -> Distributed:
    """All cores of a TPU or of a slice of them."""
    import tensorflow as tf

    del virtual_devices
    tpu_name = tpu_name or "local"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu_name)
        _reach(resolver.master())  # TensorFlow would wait for ever
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except Exception as error:  # of TensorFlow, of Google's API, of the network
        raise UserError(
            f"--strategy=tpu --tpu={tpu_name}: no TPU can be used "
            f"({_first_line(error)}). Run this on a TPU VM with --tpu=local, "
            "or give a TPU's name or grpc:// address; without a TPU choose "
            "--strategy=none|mirrored|multi_worker."
        ) from error
    return Distributed(strategy)


def _reach(address: str) -> None:
    """Connects to an address `grpc://host:port`, if it is one, for a moment."""
    if address.startswith("grpc://"):
        host, _, port = address.removeprefix("grpc://").rpartition(":")
        socket.create_connection((host, int(port)), PATIENCE).close()


def _first_line(error: Exception) -> str:
    message = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {message}"


STRATEGIES: dict[str, Callable[[int, str | None], OneDevice]] = {
    "none": one_device,
    "mirrored": mirrored,
    "multi_worker": multi_worker,
    "tpu": tpu,
}
