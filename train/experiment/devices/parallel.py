"""The devices of JAX, of one machine or of several.

Keras distributes: each device has all variables, a global batch is cut into
one part for each, and the compiled step is that of the whole batch, whose sums
XLA takes over the devices. What one device learns they learn, to rounding,
statistics and random numbers included. Whatever a process computes of the
variables all of them have to compute, since each has a part of every array;
the chief is the only one that reads and writes files.
"""

import contextlib
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from experiment.devices.one import OneDevice
from experiment.devices.one import Share
from experiment.devices.one import is_loss
from experiment.devices.one import loss


class Parallel(OneDevice):
    """All devices that JAX has, under `keras.distribution.DataParallel`."""

    def __init__(self) -> None:
        # A Share is a shard of the data set already.
        self.distribution = keras.distribution.DataParallel(
            auto_shard_dataset=False
        )
        self.replicas = self.distribution.num_model_replicas
        self.worker = jax.process_index()
        self.workers = jax.process_count()
        self.chief = self.worker == 0

    def feed(self, batches: Callable[[Share], Any]) -> Any:
        # Keras cuts a process's part of a batch into those of its devices.
        return batches(Share(self.workers, self.worker, 1))

    def agree(self, wish: bool) -> bool:
        if self.workers == 1:
            return wish
        return bool(multihost_utils.process_allgather(np.array(wish)).any())

    def restore(
        self, model: keras.Model, file: Path, load: Callable[[Path], None]
    ) -> None:
        if self.workers == 1:
            return load(file)
        # Arrays are assigned by all processes at once, or by none.
        content = self._sent(file.read_bytes() if self.chief else b"")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / file.name
            copy.write_bytes(content)
            return load(copy)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        try:
            with self.distribution.scope():
                yield
        except jax.errors.JaxRuntimeError as error:
            if self.workers == 1 or not is_loss(str(error)):
                raise
            raise loss(self.worker, self.workers, error) from error

    def _sent(self, content: bytes) -> bytes:
        sent = np.frombuffer(content, np.uint8)
        length = multihost_utils.broadcast_one_to_all(np.int32(len(sent)))
        if not self.chief:
            sent = np.zeros(int(length), np.uint8)
        return multihost_utils.broadcast_one_to_all(sent).tobytes()
