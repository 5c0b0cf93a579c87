"""Errors that leave the chain: what DFA and DenseFA insert into a model."""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa import initializers
from keras_fa import learning
from keras_fa._types import Identifier
from keras_fa._types import Store
from keras_fa._types import Tensor

FEEDBACK_MAPS = ("dense", "convolutional")
SIGNALS = ("error", "softmax_target", "sigmoid_target")


@keras.saving.register_keras_serializable(package="keras_fa")
class StopError(keras.layers.Layer):
    """The identity that no error passes: `y = x`, `dx = 0`.

    Input and output shape: any, the same.

    Example:

    ```python
    import numpy as np
    from keras_fa.layers.direct import StopError

    x = np.ones((2, 3), "float32")
    assert np.array_equal(StopError()(x), x)
    ```
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # whatever the dtype of what it stands behind
        self.supports_masking = True

    def call(self, inputs: Tensor) -> Tensor:
        if _gradients.in_backpropagation():
            return inputs
        return ops.stop_gradient(inputs)


@keras.saving.register_keras_serializable(package="keras_fa")
class SendError(keras.layers.Layer):
    """The identity on a tensor whose error also goes to other tensors.

    Called as `SendError(names)([source, *receivers])`, it returns `source`.
    With e the error at its output, `source` receives e and receiver l receives
    `M_l e`, where M_l is a fixed random linear map whose kernel is a
    non-trainable weight. With n and N the sizes per example of source and
    receiver, and maps channels last:

    | `feedback_maps` | source | receiver | kernel | `M_l e` |
    |---|---|---|---|---|
    | "dense" | any | any | (n, N) | `e B`, on e flattened |
    | "convolutional" | any | vector | (n, N) | the same |
    | | (h, w, c) | (H, W, C) | (k, k, c, C) | `resize(conv(e, B))` |
    | | any other | (H, W, C) | (g, g, n, C) | `resize(e B)` on a g x g grid |

    A map of one place counts as a vector. conv has stride 1 and "same"
    padding. resize is by nearest neighbour to (H, W), value i of H being value
    `floor(i h / H)` of h, and all values are multiplied with
    `sqrt(places before / places after)`: copying leaves the norm of the error
    what it was. Maps with one or three dimensions of space are treated alike.

    So with a law of the variance `scale * 2 / (fan_in + fan_out)`, such as
    Glorot's (scale 1), the expected `||M_l e||^2 / ||e||^2` is
    `scale * 2 N / (n + N)` for dense maps and (but for what the convolution
    loses at the borders) `scale * 2 C / (c + C)` for convolutional ones, with
    n for c where the source is not such a map: not the same, but of one order
    where channels are not far fewer than they are at the source.

    Args:
        receivers: The names of the receivers, one for each.
        feedback_initializer: The law of each kernel, drawn at the kernel's own
            shape and independently of the others. Default "glorot_uniform"
            (our choice).
        feedback_maps: "dense" (default) or "convolutional".
        kernel_size: k, of convolutional maps in each dimension of space.
            Default 3 (our choice).
        feedback_learning: What moves the maps, which are then trained. `None`
            (default): nothing. `"kolen_pollack"`: the map receives the product
            of e and the receiver's activity r_l, the gradient of
            `<M_l e, r_l>`; it aligns where maps and kernels decay. Of a
            `keras_fa.learning.FeedbackLearning` `gradient` is used.
        signal: What is sent to receivers: "error" (default), e itself, or the
            target in its place, "softmax_target" or "sigmoid_target":
            `-s t` with t = 1 where e < 0 and 0 elsewhere, and s the norm of e
            over that of `p - t`, `p` the softmax or sigmoid of the source. For
            the cross-entropies of the two with targets of 0 and 1,
            `e = s (p - t)`, and s is the weight of the example in the loss.
        grid_size: g, how finely an error without places varies over a
            receiver; less where the receiver is smaller. Default 4 (our
            choice: of the maps that fit it is one that varies at all, is
            there from the start, and needs no random numbers in the step).

    Input shape: a list of tensors `(batch, ...)`, static but for the batch.
    Output shape: that of the first.

    Raises:
        ValueError: If `feedback_maps` or `signal` is unknown, `kernel_size` or
            `grid_size` is no positive integer, the number of tensors is not
            that of the names, or a size is not known.

    Source: Nokland (2016), direct feedback alignment, for dense maps. The
    convolutional ones are ours. Webster et al. (2021) for maps that learn,
    Frenkel et al. (2021) for targets; there the magnitude is 1 for s.

    Example:

    ```python
    import numpy as np
    from keras_fa.layers.direct import SendError

    logits = np.ones((2, 3), "float32")
    hidden = np.ones((2, 8, 8, 5), "float32")
    send = SendError(["hidden"])
    assert np.array_equal(send([logits, hidden]), logits)
    assert send.maps[0].shape == (3, 8 * 8 * 5)
    send = SendError(["hidden"], feedback_maps="convolutional")
    assert np.array_equal(send([logits, hidden]), logits)
    assert send.maps[0].shape == (4, 4, 3, 5)
    ```
    """

    def __init__(
        self,
        receivers: Sequence[str],
        feedback_initializer: Identifier = "glorot_uniform",
        feedback_maps: str = "dense",
        kernel_size: int = 3,
        grid_size: int = 4,
        feedback_learning: Identifier = None,
        signal: str = "error",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        check_feedback_maps(feedback_maps)
        if signal not in SIGNALS:
            raise ValueError(
                f"`signal` is one of {', '.join(SIGNALS)}. Received: "
                f"signal={signal!r}"
            )
        for name, size in (
            ("kernel_size", kernel_size),
            ("grid_size", grid_size),
        ):
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"`{name}` of SendError '{self.name}' is a positive "
                    f"integer. Received: {name}={size!r}"
                )
        self.autocast = False  # whatever the dtype of what it stands behind
        self.supports_masking = True
        self.receivers = list(receivers)
        self.feedback_initializer = keras.initializers.get(feedback_initializer)
        self.feedback_maps = feedback_maps
        self.kernel_size = kernel_size
        self.grid_size = grid_size
        self.feedback_learning = learning.get(feedback_learning)
        self.signal = signal

    def build(self, input_shape: list[tuple]) -> None:
        source, *receivers = input_shape
        if len(receivers) != len(self.receivers):
            raise ValueError(
                f"SendError '{self.name}' has {len(self.receivers)} names of "
                f"receivers. Received: {len(receivers)} receivers."
            )
        self._carriers = [
            map_between(
                source,
                receiver,
                self.feedback_maps,
                self.kernel_size,
                self.grid_size,
            )
            for receiver in receivers
        ]
        for index, carry in enumerate(self._carriers):
            matrix = self.add_weight(
                shape=carry.kernel_shape,
                initializer=initializers.reseeded(
                    self.feedback_initializer, index
                ),
                trainable=self.feedback_learning is not None,
                name=f"feedback_{self.receivers[index]}",
            )
            # Attributes, since tf.train.Checkpoint finds no lists of weights.
            setattr(self, f"map_{index}", matrix)

    @property
    def maps(self) -> list[keras.Variable]:
        """The kernels of the maps, one for each receiver."""
        return [getattr(self, f"map_{i}") for i in range(len(self.receivers))]

    def stored_feedback(self) -> dict[str, keras.Variable]:
        """The kernels of the maps, by their receivers."""
        return dict(zip(self.receivers, self.maps))

    def law_of(self, stored: str) -> object:
        """The argument that says what a weight of `stored_feedback` is."""
        return self.feedback_initializer

    def call(self, inputs: list[Tensor]) -> Tensor:
        source, *receivers = inputs
        if _gradients.in_backpropagation():
            return source
        rule = self.feedback_learning
        return _gradients.send_error(
            source,
            receivers,
            self.maps,
            self._carriers,
            None if rule is None else rule.of_kernels,
            None if self.signal == "error" else _targets[self.signal],
        )

    def compute_output_spec(
        self, inputs: list[keras.KerasTensor]
    ) -> keras.KerasTensor:
        return keras.KerasTensor(inputs[0].shape, dtype=inputs[0].dtype)

    def compute_mask(
        self, inputs: list[Tensor], previous_mask: list[Tensor | None] | None
    ) -> Tensor | None:
        return None if previous_mask is None else previous_mask[0]

    def load_own_variables(self, store: Store) -> None:
        if list(store.keys()):  # a file of stock layers has no maps
            super().load_own_variables(store)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "receivers": self.receivers,
            "feedback_initializer": keras.initializers.serialize(
                self.feedback_initializer
            ),
            "feedback_maps": self.feedback_maps,
            "kernel_size": self.kernel_size,
            "grid_size": self.grid_size,
            "feedback_learning": keras.saving.serialize_keras_object(
                self.feedback_learning
            ),
            "signal": self.signal,
        }


@dataclasses.dataclass(frozen=True)
class FeedbackMap:
    """Carries an error between tensors of two shapes.

    Called with an error `(batch, *source)` and the kernel, it returns the
    error `(batch, *receiver)`: `e B` on e flattened per example, or
    `resize(e B)` with a matrix for each place, or `resize(conv(e, B))`. The
    convolution is done at the source's resolution, the smaller one as a rule.

    Attributes:
        source: The shape of the source's error per example.
        receiver: The shape of the receiver's.
        places: Where errors are made before they are resized, in each
            dimension of space: the source's places, or those that have a
            matrix each; `()` for one matrix that gives the whole error.
        window: The sizes of the convolution; `()` for matrices.
    """

    source: tuple[int, ...]
    receiver: tuple[int, ...]
    places: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """`(*window, channels, channels)`, or `(*places, size, size)`."""
        if self.window:
            return *self.window, self.source[-1], self.receiver[-1]
        size = math.prod(self.receiver[len(self.places) :])
        return *self.places, math.prod(self.source), size

    def __call__(self, error: Tensor, kernel: Tensor) -> Tensor:
        batch = ops.shape(error)[0]
        if self.window:
            error = ops.reshape(error, (batch, *self.source))
            error = ops.conv(
                error, kernel, padding="same", data_format="channels_last"
            )
        else:
            error = ops.reshape(error, (batch, math.prod(self.source)))
            error = ops.tensordot(error, kernel, [[1], [len(self.places)]])
        if self.places:
            return _resize(error, self.places, self.receiver[:-1])
        return ops.reshape(error, (batch, *self.receiver))


def map_between(
    source: tuple,
    receiver: tuple,
    feedback_maps: str,
    kernel_size: int = 3,
    grid_size: int = 4,
) -> FeedbackMap:
    """What carries an error between tensors of two shapes.

    Args:
        source: Shape `(batch, ...)` of the tensor whose error is sent.
        receiver: Shape `(batch, ...)` of the tensor that receives it.
        feedback_maps: As the argument of `SendError`.
        kernel_size: As the argument of `SendError`.
        grid_size: As the argument of `SendError`.

    Returns:
        A function of an error `(batch, *source)` and a kernel of its
        `kernel_shape`. No weight is made.

    Raises:
        ValueError: If a dimension after the first is not known.
    """
    source, receiver = _per_example(source), _per_example(receiver)
    if feedback_maps == "dense" or len(receiver) < 2:
        return FeedbackMap(source, receiver)
    if len(source) == len(receiver) and math.prod(source[:-1]) > 1:
        places = source[:-1]
        return FeedbackMap(
            source, receiver, places, (kernel_size,) * len(places)
        )
    grid = tuple(min(grid_size, places) for places in receiver[:-1])
    return FeedbackMap(source, receiver, grid)


def _target(
    probabilities: Callable[[Tensor], Tensor], e: Tensor, source: Tensor
) -> Tensor:
    """`-s t` for an error `e = s (p - t)`."""
    t = ops.cast(e < 0, "float32")
    off = probabilities(ops.cast(source, "float32")) - t
    s = ops.divide_no_nan(_norms(ops.cast(e, "float32")), _norms(off))
    return -s * t


def _norms(vectors: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(vectors), axis=-1, keepdims=True))


def target_signal(loss: Identifier | keras.losses.Loss) -> str:
    """The `signal` of `SendError` that stands for the error of a loss.

    Args:
        loss: A loss, or its name.

    Raises:
        ValueError: If it is neither the categorical nor the binary
            cross-entropy, or has label smoothing.
    """
    if isinstance(loss, list | tuple | dict) and len(loss) == 1:
        (loss,) = keras.tree.flatten(loss)  # of the only output
    resolved = keras.losses.get(loss)
    if smoothing := getattr(resolved, "label_smoothing", 0):
        raise ValueError(
            "DRTP tells targets by the sign of the error, which takes targets "
            f"of 0 and 1. Received: a loss with label_smoothing={smoothing}. "
            "Leave it out, or convert to 'dfa', which sends the error of any "
            "loss."
        )
    name = getattr(resolved, "__name__", type(resolved).__name__)
    plain = name.lower().replace("_", "")
    if plain in ("categoricalcrossentropy", "sparsecategoricalcrossentropy"):
        return "softmax_target"
    if plain == "binarycrossentropy":
        return "sigmoid_target"
    raise ValueError(
        "DRTP sends the target of a cross-entropy. Received: "
        f"loss={name}. Train with (sparse) categorical or binary "
        "cross-entropy, or convert to 'dfa', which sends the error of any loss."
    )


_targets = {
    "softmax_target": functools.partial(_target, ops.softmax),
    "sigmoid_target": functools.partial(_target, ops.sigmoid),
}


def check_feedback_maps(feedback_maps: str) -> None:
    """Refuses a kind of maps that there is not.

    Raises:
        ValueError: If it is neither "dense" nor "convolutional".
    """
    if feedback_maps not in FEEDBACK_MAPS:
        raise ValueError(
            "`feedback_maps` is 'dense' or 'convolutional'. Received: "
            f"feedback_maps={feedback_maps!r}"
        )


def _per_example(shape: tuple | None) -> tuple[int, ...]:
    if shape is None or None in shape[1:]:
        raise ValueError(
            "A fixed feedback map needs static shapes. Received: a tensor of "
            f"shape {shape}. Give the model an Input of fixed size."
        )
    return tuple(shape[1:])


def _resize(
    error: Tensor, before: tuple[int, ...], after: tuple[int, ...]
) -> Tensor:
    """Nearest neighbours, `(batch, *places, channels)`; keeps the norm."""
    error = error * math.sqrt(math.prod(before) / math.prod(after))
    for axis, (old, new) in enumerate(zip(before, after), start=1):
        if old != new:
            nearest = np.arange(new) * old // new
            error = ops.take(error, nearest, axis=axis)
    return error
