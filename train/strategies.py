"""Where a model is trained: on one device, on several, on several machines.

TensorFlow's `tf.distribute` replicates the model and adds up gradients. The
loop is Keras's `fit`, with a train and a test function of ours in it: Keras's
own fail under several workers, and under replicas with steps_per_execution
above 1. What a process has to know of the others is told by the chief, which
is the only one that reads and writes files.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from errors import UserError

from keras_fa.layers.feedback import all_variables

PATIENCE = 10  # seconds in which a TPU has to answer
# In what TensorFlow says where a worker is gone.
LOST = ("collective", "unhealthy", "heartbeat", "connection reset")


class Share(NamedTuple):
    """The replicas that a process feeds: `count` of them from `first` on.

    Attributes:
        replicas: The number of all replicas, which share each batch evenly.
        first: The first one of this process.
        count: How many it has.
    """

    replicas: int = 1
    first: int = 0
    count: int = 1

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """The part of what lies from `start` to `stop` that is its own."""
        n, last = stop - start, self.first + self.count
        return (
            start + n * self.first // self.replicas,
            start + n * last // self.replicas,
        )


class OneDevice:
    """The device that the backend chooses by itself.

    Attributes:
        replicas: The number of copies of the model, over all workers.
        workers: The number of processes.
        chief: Whether this process is the one that writes.
    """

    replicas = 1
    workers = 1
    chief = True

    def scope(self) -> AbstractContextManager:
        """Where the variables of a model are made."""
        return contextlib.nullcontext()

    def adopt(
        self, model: keras.Model, compiled: Callable[[keras.Model], None]
    ) -> keras.Model:
        """Compiles a model for `fit` and `evaluate`.

        Args:
            model: A model made in `scope`.
            compiled: Calls its `compile`.

        Returns:
            The model to train, of the same layers.
        """
        compiled(model)
        return model

    def feed(self, batches: Callable[[Share], Any]) -> Any:
        """The batches for `fit`.

        Args:
            batches: Makes those of a share: of one replica's size, for each
                step one for each replica of the share.
        """
        return batches(Share())

    def tell(self, find: Callable[[], Any]) -> Any:
        """What the chief finds out, in every worker; it is made of JSON.

        Raises:
            UserError: If the chief does, in every worker.
        """
        return find()

    def gather(self, found: Any) -> list[Any]:
        """What each worker, at the same point, has; it is made of JSON."""
        return [found]

    def agree(self, wish: bool) -> bool:
        """Whether any of the workers, at the same point, has the wish."""
        return wish

    def spread(self, model: keras.Model) -> None:
        """Gives the chief's model and optimiser to the other workers."""

    def watched(self) -> AbstractContextManager:
        """A scope in which the loss of a worker is an error of one line."""
        return contextlib.nullcontext()


class Distributed(OneDevice):
    """The replicas of a `tf.distribute.Strategy`.

    Args:
        strategy: The strategy.
        worker: The place of this process among the workers.
        workers: The number of processes.
    """

    def __init__(
        self, strategy: Any, worker: int = 0, workers: int = 1
    ) -> None:
        self.strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        self.worker = worker
        self.workers = workers
        self.chief = worker == 0
        self._sum = None

    def scope(self) -> AbstractContextManager:
        return self.strategy.scope()

    def adopt(
        self, model: keras.Model, compiled: Callable[[keras.Model], None]
    ) -> keras.Model:
        # Made outside the scope, so that Keras leaves the strategy to us.
        model = keras.Model(model.inputs, model.outputs, name=model.name)
        with self.scope():
            compiled(model)
            model.optimizer.build(model.trainable_variables)

        def make_train_function(force: bool = False) -> None:
            if force or model.train_function is None:
                model.train_function = self._function(
                    model.train_step, model.steps_per_execution
                )

        def make_test_function(force: bool = False) -> None:
            if force or model.test_function is None:
                model.test_function = self._function(
                    model.test_step, model.steps_per_execution
                )

        model.make_train_function = make_train_function
        model.make_test_function = make_test_function
        return model

    def _function(self, step: Callable[[Any], Any], steps: int) -> Callable:
        """Some steps of all replicas as one compiled function of an iterator.

        Args:
            step: Of one replica: a batch to a dict of scalars.
            steps: How many.

        Returns:
            A function that returns the scalars of the last step, averaged.
        """
        import tensorflow as tf

        @tf.function(reduce_retracing=True)
        def function(iterator):
            logs = self.strategy.run(step, args=(next(iterator),))
            if steps > 1:  # or it would be traced in vain
                for _ in tf.range(steps - 1):
                    logs = self.strategy.run(step, args=(next(iterator),))
            return {
                name: self.strategy.reduce("MEAN", value, axis=None)
                for name, value in logs.items()
            }

        return function

    def feed(self, batches: Callable[[Share], Any]) -> Any:
        def own(context):
            count = self.replicas // context.num_input_pipelines
            return batches(
                Share(self.replicas, count * context.input_pipeline_id, count)
            )

        return self.strategy.distribute_datasets_from_function(own)

    def tell(self, find: Callable[[], Any]) -> Any:
        if self.workers == 1:
            return find()
        said, failure = {}, None
        if self.chief:
            try:
                said["found"] = find()
            except Exception as error:
                failure = error
                said["refused"] = str(error) or type(error).__name__
        said = self._said(0, said)
        if failure is not None:
            raise failure
        if "refused" in said:
            raise UserError(f"Worker 0 refused the run: {said['refused']}")
        return said["found"]

    def gather(self, found: Any) -> list[Any]:
        if self.workers == 1:
            return [found]
        return [self._said(worker, found) for worker in range(self.workers)]

    def agree(self, wish: bool) -> bool:
        if self.workers == 1:
            return wish
        return bool(self._added_up(np.array([wish], np.float32)).any())

    def spread(self, model: keras.Model) -> None:
        if self.workers == 1:
            return
        for variable in [*all_variables(model), *model.optimizer.variables]:
            value = np.asarray(variable)
            sent = self._sent(0, np.frombuffer(value.tobytes(), np.uint8))
            variable.assign(
                np.frombuffer(sent, value.dtype).reshape(value.shape)
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        import tensorflow as tf

        try:
            yield
        except tf.errors.OpError as error:
            if self.workers == 1 or not (
                isinstance(error, tf.errors.UnavailableError)
                or any(sign in error.message.lower() for sign in LOST)
            ):
                raise
            raise UserError(
                f"Worker {self.worker} of {self.workers} lost another one ("
                f"{type(error).__name__}: {error.message.splitlines()[0]}). "
                "Look at what that one said, and start all workers again "
                "with --resume."
            ) from error

    def _said(self, worker: int, what: Any) -> Any:
        """What a worker says, in all of them; it is made of JSON."""
        text = np.frombuffer(json.dumps(what).encode(), np.uint8)
        length = self._sent(worker, np.array([len(text)]).view(np.uint8))
        if worker != self.worker:
            text = np.zeros(int(length.view(np.int64)[0]), np.uint8)
        return json.loads(self._sent(worker, text).tobytes())

    def _sent(self, worker: int, content: np.ndarray) -> np.ndarray:
        """A worker's bytes; the others give as many, whatever they are."""
        # Every means of communication adds float32 up, and bytes exactly.
        content = content.astype(np.float32)
        if worker != self.worker:
            content = np.zeros_like(content)
        return self._added_up(content).astype(np.uint8)

    def _added_up(self, values: np.ndarray) -> np.ndarray:
        """The sum of the workers' float32 values, each counted once."""
        import tensorflow as tf

        if self._sum is None:
            local = self.replicas // self.workers

            def added(values):
                context = tf.distribute.get_replica_context()
                own = context.replica_id_in_sync_group % local == 0
                values = tf.where(own, values, tf.zeros_like(values))
                return context.all_reduce("SUM", values)

            self._sum = tf.function(
                lambda values: self.strategy.run(added, args=(values,)),
                reduce_retracing=True,
            )
        summed = self._sum(tf.constant(values))
        return self.strategy.experimental_local_results(summed)[0].numpy()


# How each is found.


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
    try:
        workers, task = found["cluster"]["worker"], found["task"]
        index = task["index"]
        fits = (
            set(found["cluster"]) == {"worker"}
            and task["type"] == "worker"
            and isinstance(workers, list)
            and all(isinstance(address, str) for address in workers)
            and isinstance(index, int)
            and 0 <= index < len(workers)
        )
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(
            f"TF_CONFIG={text!r} does not describe workers and the place of "
            f"this one among them. {form}"
        )
    return index, workers


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
