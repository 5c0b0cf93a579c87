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
from keras_fa import methods
from keras_fa import regularizers
from keras_fa.conversion import convert
from keras_fa.conversion import load_stock_weights
from keras_fa.conversion import refresh
from keras_fa.conversion import to_backprop
from keras_fa.layers import FAConv1D
from keras_fa.layers import FAConv1DTranspose
from keras_fa.layers import FAConv2D
from keras_fa.layers import FAConv2DTranspose
from keras_fa.layers import FAConv3D
from keras_fa.layers import FAConv3DTranspose
from keras_fa.layers import FADense
from keras_fa.layers import FADepthwiseConv1D
from keras_fa.layers import FADepthwiseConv2D
from keras_fa.layers import FAEinsumDense
from keras_fa.layers import FASeparableConv1D
from keras_fa.layers import FASeparableConv2D

__version__ = "0.1.0"

__all__ = [
    "FAConv1D",
    "FAConv1DTranspose",
    "FAConv2D",
    "FAConv2DTranspose",
    "FAConv3D",
    "FAConv3DTranspose",
    "FADense",
    "FADepthwiseConv1D",
    "FADepthwiseConv2D",
    "FAEinsumDense",
    "FASeparableConv1D",
    "FASeparableConv2D",
    "alignment",
    "callbacks",
    "constraints",
    "convert",
    "initializers",
    "layers",
    "load_stock_weights",
    "methods",
    "refresh",
    "regularizers",
    "to_backprop",
]
