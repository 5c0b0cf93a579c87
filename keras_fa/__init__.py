"""Feedback alignment for Keras.

FA layers are stock Keras layers whose errors go down through a feedback kernel
of their own. `convert` gives a stock model any of the methods of Moskovitz,
Litwin-Kumar & Abbott (2018), `to_backprop` leads back.
"""

from keras_fa import alignment
from keras_fa import callbacks
from keras_fa import constraints
from keras_fa import initializers
from keras_fa import layers
from keras_fa import learning
from keras_fa import methods
from keras_fa import optimizers
from keras_fa import regularizers
from keras_fa._summary import summary
from keras_fa.conversion import convert
from keras_fa.conversion import load_stock_weights
from keras_fa.conversion import refresh
from keras_fa.conversion import to_backprop
from keras_fa.layers import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    *layers.__all__,
    "alignment",
    "callbacks",
    "constraints",
    "convert",
    "initializers",
    "layers",
    "learning",
    "load_stock_weights",
    "methods",
    "optimizers",
    "refresh",
    "regularizers",
    "summary",
    "to_backprop",
]
