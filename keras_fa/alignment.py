"""How well feedback and forward weights align, layer by layer.

For each kernel of an FA layer:

- `angle`: between B and W, in degrees. 0 is backpropagation, 90 is chance.
- `norm_ratio`: `||B|| / ||W||`.
- `sign_agreement`: the share of weights whose B and W have the same sign, in
  percent. 50 is chance.
- `gradient_angle`: between the gradient that the kernel receives and the one
  that backpropagation would give it, on a probe batch, in degrees. Below 90
  the update goes downhill.

An angle with a vector of zeros (a dead layer) is NaN.
"""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa._types import Identifier
from keras_fa._types import Tensor
from keras_fa.layers.direct import StopError
from keras_fa.layers.feedback import FeedbackPath
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import all_variables
from keras_fa.layers.feedback import feedback_layers


def alignment(
    model: keras.Model, x: Tensor, y: Tensor, loss: Identifier = None
) -> dict[str, dict[str, float]]:
    """Measures the alignment of every FA layer of a model on one batch.

    The two gradients of `gradient_angle` are those of the loss between `y` and
    the model's output in training mode, without regularisation penalties,
    before the optimizer. Both are taken with the same weights, dropout masks
    and batch statistics; nothing of the model's state moves.

    Args:
        model: A built model.
        x: A batch of inputs.
        y: The batch's targets.
        loss: A Keras loss, its name or a function of `(y, output)`. Default
            `None`: the one that the model was compiled with.

    Returns:
        A dict of layer name to a dict of `angle` (degrees), `norm_ratio`,
        `sign_agreement` (percent) and `gradient_angle` (degrees). Layers with
        two kernels have an entry for each, `"<layer>/<kernel>"`. Under DFA,
        where no error passes through B, only `gradient_angle`.

    Raises:
        ValueError: If there is no loss, no FA layer or a layer that is not
            built, or if the model has several outputs.

    Example:

    ```python
    import numpy as np
    import keras
    from keras_fa import FADense
    from keras_fa.alignment import alignment

    model = keras.Sequential(
        [
            keras.Input((8,)),
            FADense(16, activation="relu", name="hidden"),
            FADense(4, name="readout"),
        ]
    )
    x, y = np.random.normal(size=(32, 8)), np.zeros((32, 4))
    measures = alignment(model, x, y, loss="mse")
    assert measures["readout"]["gradient_angle"] < 0.1  # its update is exact
    assert measures["hidden"]["gradient_angle"] > 1.0
    ```
    """
    return alignment_function(model, loss)(x, y)


def alignment_function(
    model: keras.Model, loss: Identifier = None
) -> Callable[[Tensor, Tensor], dict[str, dict[str, float]]]:
    """As `alignment`, compiled once for many batches.

    Args:
        model: A built model.
        loss: As for `alignment`.

    Returns:
        A function of `(x, y)` that returns what `alignment` does.

    Raises:
        ValueError: As `alignment`.
    """
    loss = _loss_function(model, loss)
    if len(getattr(model, "outputs", None) or [None]) > 1:
        raise ValueError(
            "Alignment is measured on models with one output. Received: model "
            f"'{model.name}' with {len(model.outputs)} outputs."
        )
    paths = named_paths(model)
    kernels = [path.kernel for path in paths.values()]
    direct = any(isinstance(inner, StopError) for inner in all_layers(model))

    # Gradients of half precision vanish below 6e-8: they are taken of the loss
    # times a scale, of which angles do not depend.
    half = any(inner.compute_dtype == "float16" for inner in all_layers(model))

    def kernel_gradients(x, y, scale):
        # What the forward pass assigns (statistics, random state) is dropped,
        # so that both passes start from the same state and leave none behind.
        def scaled():
            value = loss(y, model(x, training=True))
            return ops.cast(scale, value.dtype) * value

        return _gradients.gradients_of(
            scaled, kernels, state=all_variables(model)
        )

    def measure(x, y, scale):
        received = kernel_gradients(x, y, scale)
        with _gradients.backpropagation():
            exact = kernel_gradients(x, y, scale)
        rows = []
        for path, got, wanted in zip(paths.values(), received, exact):
            row = {} if direct else _of_path(path)
            row["gradient_angle"] = angle(got, wanted)
            rows.append(row)
        sums = [ops.sum(g) for g in (*received, *exact)]
        return rows, ops.all(ops.isfinite(ops.stack(sums)))

    measure = _gradients.backend.compiled(measure, reads=all_variables(model))

    def measured(x, y):
        if hasattr(model, "jax_state_sync"):  # `fit` on JAX holds the weights
            model.jax_state_sync()
        x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
        for exponent in (15, 11, 7, 3, 0) if half else (0,):
            scale = ops.convert_to_tensor(2.0**exponent, "float32")
            rows, finite = measure(x, y, scale)
            if finite:
                break
        return {
            name: {measure: float(value) for measure, value in row.items()}
            for name, row in zip(paths, rows)
        }

    return measured


def _loss_function(
    model: keras.Model, loss: Identifier
) -> Callable[[Tensor, Tensor], Tensor]:
    if loss is None:
        loss = getattr(model, "loss", None)
    if not isinstance(loss, str) and not callable(loss):
        raise ValueError(
            "The gradient's angle needs one loss function: give `loss`, or "
            "compile the model with a single loss. Received: "
            f"loss={loss}"
        )
    loss = keras.losses.get(loss)
    return lambda y, output: ops.mean(loss(_of_rank(y, output), output))


def _of_rank(y: Tensor, output: Tensor) -> Tensor:
    """Targets `(batch,)` for outputs `(batch, 1)`, as `fit` takes them."""
    if len(np.shape(y)) == 1 and tuple(np.shape(output)[1:]) == (1,):
        return ops.expand_dims(y, -1)
    return y


def _of_path(path: FeedbackPath) -> dict[str, Tensor]:
    kernel, feedback = ops.convert_to_tensor(path.kernel), path.current()
    return {
        "angle": angle(feedback, kernel),
        "norm_ratio": norm_ratio(feedback, kernel),
        "sign_agreement": sign_agreement(feedback, path.fixed.signed(kernel)),
    }


def named_paths(model: keras.layers.Layer) -> dict[str, FeedbackPath]:
    """The feedback paths of a model, by the names that measures go by.

    Args:
        model: A built model or layer.

    Returns:
        A dict of `"<layer>"`, or `"<layer>/<kernel>"` for layers with two
        kernels, to path. A name that nested models repeat is numbered.

    Raises:
        ValueError: If there is no FA layer, or one that is not built.
    """
    paths = {}
    for layer in feedback_layers(model):
        if not layer.built:
            raise ValueError(
                f"FA layer '{layer.name}' is not built. Call the model on data "
                "first."
            )
        name, count = layer.name, 0
        while any(known.split("/")[0] == name for known in paths):
            count += 1
            name = f"{layer.name}_{count}"
        for path in layer.feedback_paths:
            several = len(layer.feedback_paths) > 1
            paths[f"{name}/{path.kernel.name}" if several else name] = path
    if not paths:
        raise ValueError(
            f"Model '{model.name}' has no FA layer. Build it with layers of "
            "keras_fa, or use keras_fa.convert(model, method)."
        )
    return paths


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between two tensors, taken as vectors.

    `2 atan2(||u - v||, ||u + v||)` with u and v the unit vectors, which is
    exact near 0 and 180, where the arc cosine is not.

    Args:
        a: A tensor.
        b: A tensor of the same shape.

    Returns:
        A scalar tensor, degrees in [0, 180]; NaN if one of them is zero.

    Example:

    ```python
    import numpy as np
    from keras_fa.alignment import angle

    a, b = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    assert abs(float(angle(a, b)) - 45) < 1e-4
    ```
    """
    u, v = _unit(a), _unit(b)
    half = ops.arctan2(_norm(u - v), _norm(u + v))
    return 2.0 * half * (180.0 / np.pi)


def norm_ratio(a: Tensor, b: Tensor) -> Tensor:
    """`||a|| / ||b||`, a scalar tensor; NaN if b is zero.

    Args:
        a: A tensor.
        b: A tensor.
    """
    return _norm(a) / _nonzero(_norm(b))


def sign_agreement(a: Tensor, b: Tensor) -> Tensor:
    """The share of elements of equal sign, in percent, a scalar tensor.

    Args:
        a: A tensor.
        b: A tensor of the same shape.
    """
    unequal = ops.not_equal(ops.sign(_float(a)), ops.sign(_float(b)))
    return 100.0 - 100.0 * ops.mean(ops.cast(unequal, "float32"))


def _float(a: Tensor) -> Tensor:
    return ops.cast(ops.convert_to_tensor(a), "float32")


def _norm(a: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(_float(a))))


def _unit(a: Tensor) -> Tensor:
    # Scaled by the largest element first: squares of small gradients vanish.
    a = _float(a)
    a = a / _nonzero(ops.max(ops.abs(a)))
    return a / _norm(a)


def _nonzero(value: Tensor) -> Tensor:
    return ops.where(value > 0, value, np.nan)
