"""Convolutional FA layers.

`conv^T(., B)` is the transpose of a convolution with kernel B: the feedback
weights are shared in space as the forward weights are.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_fa import constraints
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.learning import Stage


class _Convolution(FeedbackLayer):
    """Mixin of the convolutions that may be grouped."""

    def presynaptic_units(self, name: str, shape: tuple) -> np.ndarray:
        """The input channel of each weight, of its own group of channels."""
        if self.groups == 1:
            return super().presynaptic_units(name, shape)
        *window, per_group, filters = shape
        group = np.arange(filters) // (filters // self.groups)
        units = group * per_group + np.arange(per_group)[:, None]
        return units.reshape((1,) * len(window) + units.shape)


class _Transposed(FeedbackLayer):
    """Mixin of the transposed convolutions."""

    def presynaptic_units(self, name: str, shape: tuple) -> np.ndarray:
        """The input channel of each weight: here the last axis."""
        return constraints.units_along(shape, -1)


class _Depthwise(FeedbackLayer):
    """Mixin of the depthwise convolutions."""

    kernel_constraint_arguments = ("depthwise_constraint",)
    depthwise_kernels = ("kernel",)


class _Separable(FeedbackLayer):
    """Mixin of the layers with a depthwise and a pointwise kernel.

    Each of the two is a feedback step of its own: the error goes through the
    pointwise feedback kernel to the depthwise outputs, where it meets the
    depthwise kernel's exact update, and on through the depthwise one.
    """

    kernel_names = ("depthwise_kernel", "pointwise_kernel")
    depthwise_kernels = ("depthwise_kernel",)
    kernel_constraint_arguments = (
        "depthwise_constraint",
        "pointwise_constraint",
    )

    def stages(self) -> list[Stage]:
        """The depthwise convolution, and the pointwise one."""
        depthwise = functools.partial(
            ops.depthwise_conv,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        return [
            depthwise,
            functools.partial(ops.conv, data_format=self.data_format),
        ]


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv1D(_Convolution, keras.layers.Conv1D):
    """`Conv1D` with feedback: `y = act(conv(x, W) + b)`, `dx = conv^T(dy, B)`.

    W and B: `(size, channels // groups, filters)`.
    Presynaptic units are x's channels, under groups too.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv1D

    layer = FAConv1D(4, 3, groups=2)
    layer.build((None, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 4)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv2D(_Convolution, keras.layers.Conv2D):
    """`Conv2D` with feedback: `y = act(conv(x, W) + b)`, `dx = conv^T(dy, B)`.

    W and B: `(height, width, channels // groups, filters)`.
    Presynaptic units are x's channels.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv2D

    layer = FAConv2D(4, 3, strides=2)
    layer.build((None, 8, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 6, 4)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv3D(_Convolution, keras.layers.Conv3D):
    """`Conv3D` with feedback: `y = act(conv(x, W) + b)`, `dx = conv^T(dy, B)`.

    W and B: `(depth, height, width, channels // groups, filters)`.
    Presynaptic units are x's channels.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv3D

    layer = FAConv3D(4, 3)
    layer.build((None, 8, 8, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 3, 6, 4)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv1DTranspose(_Transposed, keras.layers.Conv1DTranspose):
    """`Conv1DTranspose` with feedback: the error goes down by a convolution.

    `y = act(conv^T(x, W) + b)`, `dx = conv(dy, B)`. Presynaptic units
    are x's channels. W and B: `(size, filters, channels)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv1DTranspose

    layer = FAConv1DTranspose(4, 3)
    layer.build((None, 8, 6))
    assert layer.feedback_kernel.shape == (3, 4, 6)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv2DTranspose(_Transposed, keras.layers.Conv2DTranspose):
    """`Conv2DTranspose` with feedback: the error goes down by a convolution.

    `y = act(conv^T(x, W) + b)`, `dx = conv(dy, B)`. Presynaptic units
    are x's channels. W and B: `(height, width, filters, channels)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv2DTranspose

    layer = FAConv2DTranspose(4, 3, strides=2)
    layer.build((None, 8, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 4, 6)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv3DTranspose(_Transposed, keras.layers.Conv3DTranspose):
    """`Conv3DTranspose` with feedback: the error goes down by a convolution.

    `y = act(conv^T(x, W) + b)`, `dx = conv(dy, B)`. Presynaptic units
    are x's channels. W and B: `(depth, height, width, filters, channels)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FAConv3DTranspose

    layer = FAConv3DTranspose(4, 3)
    layer.build((None, 8, 8, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 3, 4, 6)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FADepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """`DepthwiseConv1D` with feedback: each channel's error stays its own.

    `y = act(depthwise(x, W) + b)`, `dx = depthwise^T(dy, B)`. Presynaptic
    units: channels. W and B: `(size, channels, depth_multiplier)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FADepthwiseConv1D

    layer = FADepthwiseConv1D(3)
    layer.build((None, 8, 6))
    assert layer.feedback_kernel.shape == (3, 6, 1)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FADepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """`DepthwiseConv2D` with feedback: each channel's error stays its own.

    `y = act(depthwise(x, W) + b)`, `dx = depthwise^T(dy, B)`. Presynaptic
    units: channels. W and B: `(height, width, channels, depth_multiplier)`.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FADepthwiseConv2D

    layer = FADepthwiseConv2D(3, depth_multiplier=2)
    layer.build((None, 8, 8, 6))
    assert layer.feedback_kernel.shape == (3, 3, 6, 2)
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FASeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """`SeparableConv1D` with feedback: the error goes through B_p, then B_d.

    `u = depthwise(x, W_d)`, `y = act(conv(u, W_p) + b)`;
    `du = conv^T(dy, B_p)`, `dx = depthwise^T(du, B_d)`. W_d and B_d:
    `(size, channels, depth_multiplier)`, W_p and B_p:
    `(1, channels * depth_multiplier, filters)`. Presynaptic units are the
    channels of x and of u.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FASeparableConv1D

    layer = FASeparableConv1D(4, 3)
    layer.build((None, 8, 6))
    assert [b.shape[-1] for b in layer.feedback_kernel] == [1, 4]
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FASeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """`SeparableConv2D` with feedback: the error goes through B_p, then B_d.

    `u = depthwise(x, W_d)`, `y = act(conv(u, W_p) + b)`;
    `du = conv^T(dy, B_p)`, `dx = depthwise^T(du, B_d)`. W_d and B_d:
    `(height, width, channels, depth_multiplier)`, W_p and B_p:
    `(1, 1, channels * depth_multiplier, filters)`. Presynaptic units are the
    channels of x and of u.

    Args: those of Keras's and of `keras_fa.layers.feedback.FeedbackLayer`.
    Input and output: as there. Raises: as both. Source: Moskovitz et al., 2018.

    ```python
    from keras_fa import FASeparableConv2D

    layer = FASeparableConv2D(4, 3)
    layer.build((None, 8, 8, 6))
    assert [b.shape[-1] for b in layer.feedback_kernel] == [1, 4]
    ```
    """
