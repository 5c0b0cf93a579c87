"""A worker: runs of main.py, one after the other, on a network of the tests.

python workers.py "--epochs=1 ..." "--epochs=2 ..."

With STOP=n in the environment it sends itself SIGTERM at the end of the n-th
step of the second epoch.
"""

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import main  # before all that imports Keras

# isort: split
from keras import layers

from experiment import devices
from experiment import networks
from experiment.runfolder import writer


def network(x: Any, classes: int, dropout: float = 0.0) -> Any:
    """Two convolutions with batch normalization, and a readout.

    It is smooth: rounding turns no unit on or off.
    """
    for number in (1, 2):
        x = layers.Conv2D(8, 3, use_bias=False, name=f"conv{number}")(x)
        x = layers.BatchNormalization(name=f"norm{number}")(x)
        x = layers.Activation("tanh", name=f"tanh{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    return layers.Dense(classes, dtype="float32", name="readout")(x)


NETWORKS = {"digits": networks.NETWORKS["digits"]._replace(logits=network)}


def stop_at(number: int) -> None:
    """Sends this process SIGTERM at the end of a step of the second epoch.

    Once: a run that goes on in this process is left alone.
    """
    unpatched = writer.RunWriter.on_train_batch_end
    places = [(1, number - 1)]

    def terminated(self: Any, batch: int, logs: Any = None) -> None:
        if (self.progress.epoch, batch) in places:
            places.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        unpatched(self, batch, logs)

    writer.RunWriter.on_train_batch_end = terminated


def joined_once(strategy: devices.Strategy) -> devices.Strategy:
    """A strategy whose devices are opened by the first run for all."""
    opened: list[devices.OneDevice] = []

    def open(config: SimpleNamespace) -> devices.OneDevice:
        if not opened:
            opened.append(strategy.open(config))
        return opened[0]

    return strategy._replace(open=open)


if __name__ == "__main__":
    if "STOP" in os.environ:
        stop_at(int(os.environ["STOP"]))
    networks.NETWORKS.update(NETWORKS)
    for name in ("multi_worker", "data_parallel"):
        devices.STRATEGIES[name] = joined_once(devices.STRATEGIES[name])
    for command_line in sys.argv[1:]:
        status = main.run(["main.py", *command_line.split()])
        if status:
            sys.exit(status)
