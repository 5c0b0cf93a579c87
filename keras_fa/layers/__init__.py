"""FA layers: each stock Keras layer with a kernel, with feedback.

Each is a class statement over `keras_fa.layers.feedback.FeedbackLayer`, which
says what the `feedback_*` arguments mean. In the layers' own docstrings W is
the forward kernel, B the kernel that carries the error down, dy the error at
the pre-activation, and op^T(., B) the transpose of the layer's linear operation
with B in the place of W. dW and db are always exact.
"""

from keras_fa.layers.attention import FAGroupQueryAttention
from keras_fa.layers.attention import FAMultiHeadAttention
from keras_fa.layers.convolutional import FAConv1D
from keras_fa.layers.convolutional import FAConv1DTranspose
from keras_fa.layers.convolutional import FAConv2D
from keras_fa.layers.convolutional import FAConv2DTranspose
from keras_fa.layers.convolutional import FAConv3D
from keras_fa.layers.convolutional import FAConv3DTranspose
from keras_fa.layers.convolutional import FADepthwiseConv1D
from keras_fa.layers.convolutional import FADepthwiseConv2D
from keras_fa.layers.convolutional import FASeparableConv1D
from keras_fa.layers.convolutional import FASeparableConv2D
from keras_fa.layers.dense import FADense
from keras_fa.layers.dense import FAEinsumDense
from keras_fa.layers.recurrent import FAGRU
from keras_fa.layers.recurrent import FALSTM
from keras_fa.layers.recurrent import FAGRUCell
from keras_fa.layers.recurrent import FALSTMCell
from keras_fa.layers.recurrent import FASimpleRNN
from keras_fa.layers.recurrent import FASimpleRNNCell

__all__ = [
    "FAGRU",
    "FALSTM",
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
    "FAGRUCell",
    "FAGroupQueryAttention",
    "FALSTMCell",
    "FAMultiHeadAttention",
    "FASeparableConv1D",
    "FASeparableConv2D",
    "FASimpleRNN",
    "FASimpleRNNCell",
]
