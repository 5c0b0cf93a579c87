"""The replicas of a `tf.distribute` strategy, on one or several machines.

TensorFlow's `tf.distribute` replicates the model and adds up gradients. The
loop is Keras's `fit`, with a train and a test function of ours in it: Keras's
own fail under several workers, and under replicas with steps_per_execution
above 1. What a process has to know of the others is told by the chief, which
is the only one that reads and writes files.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from experiment.devices.one import OneDevice
from experiment.devices.one import Share
from experiment.devices.one import is_loss
from experiment.devices.one import loss
from keras_fa.layers.feedback import all_variables


class Distributed(OneDevice):
    """The replicas of a `tf.distribute.Strategy`.

    This process is that of a worker, of so many workers.
    """

    def __init__(
        self, strategy: Any, worker: int = 0, workers: int = 1
    ) -> None:
        self.strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        self.worker = worker
        self.workers = workers
        self.chief = self.measures = worker == 0
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

        def maker(kind: str) -> Callable[..., None]:
            def make(force: bool = False) -> None:
                if force or getattr(model, f"{kind}_function") is None:
                    step = getattr(model, f"{kind}_step")
                    made = self._function(step, model.steps_per_execution)
                    setattr(model, f"{kind}_function", made)

            return make

        model.make_train_function = maker("train")
        model.make_test_function = maker("test")
        return model

    def _function(self, step: Callable[[Any], Any], steps: int) -> Callable:
        """Some steps of all replicas as one compiled function of an iterator.

        A step takes a batch of one replica to a dict of scalars; the function
        returns those of the last one, averaged.
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

    def agree(self, wish: bool) -> bool:
        if self.workers == 1:
            return wish
        return bool(self._added_up(np.array([wish], np.float32)).any())

    def restore(
        self, model: keras.Model, file: Path, load: Callable[[Path], None]
    ) -> None:
        self.tell(lambda: load(file))
        if self.workers == 1:
            return
        for variable in [*all_variables(model), *model.optimizer.variables]:
            value = np.asarray(variable)
            sent = self._shared(np.frombuffer(value.tobytes(), np.uint8))
            variable.assign(
                np.frombuffer(sent, value.dtype).reshape(value.shape)
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        import tensorflow as tf

        try:
            yield
        except tf.errors.OpError as error:
            gone = isinstance(error, tf.errors.UnavailableError)
            if self.workers == 1 or not (gone or is_loss(error.message)):
                raise
            raise loss(self.worker, self.workers, error) from error

    def _sent(self, content: bytes) -> bytes:
        sent = np.frombuffer(content, np.uint8)
        length = self._shared(np.array([len(sent)]).view(np.uint8))
        if not self.chief:
            sent = np.zeros(int(length.view(np.int64)[0]), np.uint8)
        return self._shared(sent).tobytes()

    def _shared(self, content: np.ndarray) -> np.ndarray:
        """The chief's bytes; the others give as many, whatever they are."""
        # Every means of communication adds float32 up, and bytes exactly.
        content = content.astype(np.float32)
        if not self.chief:
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
