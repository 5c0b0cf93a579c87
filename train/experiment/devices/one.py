"""One device, and what a place to train offers."""

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras

from experiment.errors import UserError
from experiment.errors import reason

# In what a backend says where a worker is gone.
_LOST = (
    "collective",
    "unhealthy",
    "heartbeat",
    "connection reset",
    "connection closed",
)


def is_loss(message: str) -> bool:
    """Whether an error of the backend says that a worker is gone."""
    return any(sign in message.lower() for sign in _LOST)


def loss(worker: int, workers: int, error: Exception) -> UserError:
    """What a worker says that has lost another one by an error."""
    return UserError(
        f"Worker {worker} of {workers} lost another one ({reason(error)}). "
        "Look at what that one said, and start all workers again with --resume."
    )


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
        measures: Whether it computes what is measured of the model.
    """

    replicas = 1
    workers = 1
    chief = True
    measures = True

    def scope(self) -> AbstractContextManager:
        """Where the variables of a model are made."""
        return contextlib.nullcontext()

    def adopt(
        self, model: keras.Model, compiled: Callable[[keras.Model], None]
    ) -> keras.Model:
        """Compiles a model made in `scope`.

        Returns:
            The model to train, of the same layers.
        """
        compiled(model)
        return model

    def feed(self, batches: Callable[[Share], Any]) -> Any:
        """The batches for `fit`, of what makes those of a share.

        They are of one replica's size, for each step one for each replica.
        """
        return batches(Share())

    def tell(self, find: Callable[[], Any]) -> Any:
        """What the chief finds out, in every worker; it is made of JSON.

        Raises:
            UserError: If the chief does, in every worker.
        """
        if self.workers == 1:
            return find()
        said, failure = {}, None
        if self.chief:
            try:
                said["found"] = find()
            except Exception as error:
                failure = error
                said["refused"] = str(error) or type(error).__name__
        said = self._said(said)
        if failure is not None:
            raise failure
        if "refused" in said:
            raise UserError(f"Worker 0 refused the run: {said['refused']}")
        return said["found"]

    def _said(self, what: Any) -> Any:
        """What the chief says, in all workers; it is made of JSON."""
        return json.loads(self._sent(json.dumps(what).encode()))

    def _sent(self, content: bytes) -> bytes:
        """The chief's bytes, in all workers."""
        raise NotImplementedError

    def agree(self, wish: bool) -> bool:
        """Whether any of the workers, at the same point, has the wish."""
        return wish

    def restore(
        self, model: keras.Model, file: Path, load: Callable[[Path], None]
    ) -> None:
        """Loads a checkpoint, which need be there for the chief alone.

        Args:
            model: The model, compiled.
            file: The checkpoint.
            load: Loads it, or a copy of it, into the model and its optimizer.
        """
        load(file)

    def watched(self) -> AbstractContextManager:
        """The scope of a run; the loss of a worker is an error of one line."""
        return contextlib.nullcontext()
