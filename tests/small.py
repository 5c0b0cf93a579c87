"""main.py with a small network in place of digits' own.

A program of its own, and an entry for tests that run main.py in their process.
"""

import sys
from typing import Any

import main  # before all that imports Keras

# isort: split
from keras import layers

from experiment import networks
from experiment.networks.layers import drop


def network(x: Any, classes: int, dropout: float = 0.0) -> Any:
    """A convolution and a readout, of 24 thousand parameters."""
    x = layers.Conv2D(64, 3, activation="relu", name="conv")(x)
    x = layers.Flatten(name="flatten")(x)
    return layers.Dense(classes, dtype="float32", name="fc")(drop(x, dropout))


NETWORKS = {"digits": networks.NETWORKS["digits"]._replace(logits=network)}

if __name__ == "__main__":
    networks.NETWORKS.update(NETWORKS)
    sys.exit(main.run(["main.py", *sys.argv[1:]]))
