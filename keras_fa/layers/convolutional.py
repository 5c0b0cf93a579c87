"""Convolutional FA layers.

For a convolution `op^T(., B)` is the transposed convolution with kernel B: the
feedback weights are shared in space as the forward weights are.
"""

import keras
import numpy as np

from keras_fa import constraints
from keras_fa.layers.feedback import FeedbackLayer


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


class _Separable(FeedbackLayer):
    """Mixin of the layers with a depthwise and a pointwise kernel.

    Each of the two is a feedback step of its own: the error goes through the
    pointwise feedback kernel to the depthwise outputs, where it meets the
    depthwise kernel's exact update, and on through the depthwise one.
    """

    kernel_names = ("depthwise_kernel", "pointwise_kernel")
    kernel_constraint_arguments = (
        "depthwise_constraint",
        "pointwise_constraint",
    )


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv1D(_Convolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with feedback.

    `y = activation(conv(x, W) + b)`; the error goes down through
    the same operation's transpose with B in the place of W; dW and db are
    exact.

    Args:
        filters: Integer, and all other arguments of `Conv1D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv1D`.
    Kernel and feedback kernel: `window + (channels // groups, filters)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv1D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv1D

    layer = FAConv1D(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv2D(_Convolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with feedback.

    `y = activation(conv(x, W) + b)`; the error goes down through
    the same operation's transpose with B in the place of W; dW and db are
    exact.

    Args:
        filters: Integer, and all other arguments of `Conv2D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv2D`.
    Kernel and feedback kernel: `window + (channels // groups, filters)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv2D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv2D

    layer = FAConv2D(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv3D(_Convolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with feedback.

    `y = activation(conv(x, W) + b)`; the error goes down through
    the same operation's transpose with B in the place of W; dW and db are
    exact.

    Args:
        filters: Integer, and all other arguments of `Conv3D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv3D`.
    Kernel and feedback kernel: `window + (channels // groups, filters)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv3D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv3D

    layer = FAConv3D(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 8, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv1DTranspose(_Transposed, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` with feedback.

    `y = activation(conv_transpose(x, W) + b)`; the error goes down
    through the same operation's transpose with B in the place of W; dW and db
    are exact.

    Args:
        filters: Integer, and all other arguments of `Conv1DTranspose`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv1DTranspose`.
    Kernel and feedback kernel: `window + (filters, channels)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv1DTranspose` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv1DTranspose

    layer = FAConv1DTranspose(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv2DTranspose(_Transposed, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with feedback.

    `y = activation(conv_transpose(x, W) + b)`; the error goes down
    through the same operation's transpose with B in the place of W; dW and db
    are exact.

    Args:
        filters: Integer, and all other arguments of `Conv2DTranspose`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv2DTranspose`.
    Kernel and feedback kernel: `window + (filters, channels)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv2DTranspose` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv2DTranspose

    layer = FAConv2DTranspose(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FAConv3DTranspose(_Transposed, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` with feedback.

    `y = activation(conv_transpose(x, W) + b)`; the error goes down
    through the same operation's transpose with B in the place of W; dW and db
    are exact.

    Args:
        filters: Integer, and all other arguments of `Conv3DTranspose`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `Conv3DTranspose`.
    Kernel and feedback kernel: `window + (filters, channels)`.

    Raises:
        ValueError: For LoRA and quantization, and as `Conv3DTranspose` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FAConv3DTranspose

    layer = FAConv3DTranspose(4, 3, activation="relu")
    y = layer(np.ones((2, 4, 4, 4, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FADepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` with feedback.

    `y = activation(depthwise_conv(x, W) + b)`; the error goes down
    through the same operation's transpose with B in the place of W; dW and db
    are exact.

    Args:
        kernel_size: Integer or tuple, and all other arguments of
            `DepthwiseConv1D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `DepthwiseConv1D`.
    Kernel and feedback kernel: `window + (channels, depth_multiplier)`.

    Raises:
        ValueError: For LoRA and quantization, and as `DepthwiseConv1D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FADepthwiseConv1D

    layer = FADepthwiseConv1D(3, activation="relu")
    y = layer(np.ones((2, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FADepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with feedback.

    `y = activation(depthwise_conv(x, W) + b)`; the error goes down
    through the same operation's transpose with B in the place of W; dW and db
    are exact.

    Args:
        kernel_size: Integer or tuple, and all other arguments of
            `DepthwiseConv2D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `DepthwiseConv2D`.
    Kernel and feedback kernel: `window + (channels, depth_multiplier)`.

    Raises:
        ValueError: For LoRA and quantization, and as `DepthwiseConv2D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FADepthwiseConv2D

    layer = FADepthwiseConv2D(3, activation="relu")
    y = layer(np.ones((2, 8, 8, 3), "float32"))
    assert layer.feedback_kernel.shape == layer.kernel.shape
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FASeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` with feedback.

    `y = activation(conv(depthwise_conv(x, W_d), W_p) + b)`; the error goes
    down through B_p and then B_d, and each kernel's update is the exact
    product of its own input and error.

    Args:
        filters: Integer, and all other arguments of `SeparableConv1D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `SeparableConv1D`. `feedback_kernel`
    is the pair of the depthwise and the pointwise one, each of its kernel's
    shape.

    Raises:
        ValueError: For LoRA and quantization, and as `SeparableConv1D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FASeparableConv1D

    layer = FASeparableConv1D(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 3), "float32"))
    assert len(layer.feedback_kernel) == 2
    ```
    """


@keras.saving.register_keras_serializable(package="keras_fa")
class FASeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with feedback.

    `y = activation(conv(depthwise_conv(x, W_d), W_p) + b)`; the error goes
    down through B_p and then B_d, and each kernel's update is the exact
    product of its own input and error.

    Args:
        filters: Integer, and all other arguments of `SeparableConv2D`.
        feedback_initializer: Initializer of the feedback kernel. Default
            `None`: the kernel's law, drawn independently.
        feedback_regularizer: Penalty on the feedback kernel. Default `None`.
        feedback_constraint: The rule that gives B. Default `None`: FA.

    Input and output shapes: those of `SeparableConv2D`. `feedback_kernel`
    is the pair of the depthwise and the pointwise one, each of its kernel's
    shape.

    Raises:
        ValueError: For LoRA and quantization, and as `SeparableConv2D` does.

    Source: Moskovitz et al. (2018).

    Example:

    ```python
    import numpy as np
    from keras_fa import FASeparableConv2D

    layer = FASeparableConv2D(4, 3, activation="relu")
    y = layer(np.ones((2, 8, 8, 3), "float32"))
    assert len(layer.feedback_kernel) == 2
    ```
    """
