"""How well feedback and forward weights align, layer by layer.

For each kernel of an FA layer:

- `angle`: between B and W, in degrees. 0 is backpropagation, 90 is chance.
- `norm_ratio`: `||B|| / ||W||`.
- `sign_agreement`: the share of weights whose B and W have the same sign, in
  percent. 50 is chance.
- `gradient_angle`: between the gradient that the kernel receives and the one
  that backpropagation would give it, on a probe batch, in degrees. Below 90
  the update goes downhill.

An angle with a vector of zeros (a dead layer) is NaN, and so is the angle of
gradients where that of backpropagation has a norm below 1e-7: it would be that
of rounding errors.

`diagnose` looks at all of it once and says what is wrong: is it feedback, and
does it teach?
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa._cloning import held_names
from keras_fa._types import Identifier
from keras_fa._types import Tensor
from keras_fa.layers.direct import StopError
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import FeedbackPath
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import all_variables
from keras_fa.layers.feedback import feedback_layers

# Below this norm a gradient is taken for none, and its angle for nothing.
NO_GRADIENT = 1e-7
# Below this share of it the gradient through the feedback is rounding errors.
NO_ERROR = 1e-5
# From a kernel layer to the next, activity that grows faster explodes.
EXPLODING = 50.0


def alignment(
    model: keras.Model, x: Tensor, y: Tensor, loss: Identifier = None
) -> dict[str, dict[str, float]]:
    """Measures the alignment of every FA layer of a model on one batch.

    The two gradients of `gradient_angle` are those of the loss between `y` and
    the model's output in training mode, without regularization penalties,
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
    paths = named_paths(model)
    kernels = [path.kernel for path in paths.values()]
    direct = _is_direct(model)

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
            row["gradient_angle"] = gradient_angle(got, wanted, scale)
            rows.append(row)
        return rows, _all_finite([*received, *exact])

    look = _look(model, measure)

    def measured(x, y):
        return {
            name: {measure: float(value) for measure, value in row.items()}
            for name, row in zip(paths, look(x, y))
        }

    return measured


def _look(
    model: keras.Model, measure: Callable[[Tensor, Tensor, Tensor], tuple]
) -> Callable[[Tensor, Tensor], list[dict[str, Tensor]]]:
    """A measure of a batch, compiled.

    Args:
        model: What it looks at.
        measure: A function of inputs, targets and what to multiply the loss
            by, that returns the measures and whether all of it is finite.
    """
    # Gradients of half precision vanish below 6e-8: they are taken of the loss
    # times a scale, of which angles do not depend.
    half = any(inner.compute_dtype == "float16" for inner in all_layers(model))
    measure = _gradients.backend.compiled(measure, reads=all_variables(model))

    def look(x, y):
        if hasattr(model, "jax_state_sync"):  # `fit` on JAX holds the weights
            model.jax_state_sync()
        x, y = keras.tree.map_structure(ops.convert_to_tensor, (x, y))
        for exponent in (15, 11, 7, 3, 0) if half else (0,):
            scale = ops.convert_to_tensor(2.0**exponent, "float32")
            rows, finite = measure(x, y, scale)
            if finite:
                break
        return rows

    return look


def _is_direct(model: keras.Model) -> bool:
    """Whether it is DFA's, where no error passes through B."""
    return any(isinstance(inner, StopError) for inner in all_layers(model))


def _all_finite(tensors: list[Tensor]) -> Tensor:
    return ops.all(ops.isfinite(ops.stack([ops.sum(t) for t in tensors])))


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
    if len(getattr(model, "outputs", None) or [None]) > 1:
        raise ValueError(
            "Alignment is measured on models with one output. Received: model "
            f"'{model.name}' with {len(model.outputs)} outputs."
        )
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        loss = _LossOfFunction(loss)
    return lambda y, output: ops.mean(loss(_of_rank(y, output), output))


class _LossOfFunction(keras.losses.Loss):
    """A loss function as `fit` takes it: where there is a mask, it counts."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(name="loss")
        self._function = function

    def call(self, y: Tensor, output: Tensor) -> Tensor:
        return self._function(y, output)


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
        "sign_agreement": sign_agreement(
            feedback, path.fixed.signed(ops.cast(kernel, path.full_dtype))
        ),
    }


def named_paths(model: keras.layers.Layer) -> dict[str, FeedbackPath]:
    """The feedback paths of a model, by the names that measures go by.

    Args:
        model: A built model or layer.

    Returns:
        A dict of `"<layer>"`, or `"<layer>/<kernel>"` for layers with two
        kernels, to path. The name of a layer that another layer holds is led
        by that one's: `"<attention>/query"`. A name that nested models repeat
        is numbered.

    Raises:
        ValueError: If there is no FA layer, or one that is not built.
    """
    paths, names, taken = {}, held_names(model), set()
    for layer in feedback_layers(model):
        if not layer.built:
            raise ValueError(
                f"FA layer '{layer.name}' is not built. Call the model on data "
                "first."
            )
        name, count = names[layer], 0
        while name in taken:
            count += 1
            name = f"{names[layer]}_{count}"
        taken.add(name)
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


def gradient_angle(
    received: Tensor, exact: Tensor, scale: Tensor | float = 1.0
) -> Tensor:
    """The angle between a gradient and that of backpropagation.

    Args:
        received: The gradient, times `scale`.
        exact: That of backpropagation, times `scale`.
        scale: What the loss was multiplied by. Default: 1.

    Returns:
        A scalar tensor, degrees in [0, 180]; NaN if one of them is zero, or
        backpropagation's has a norm below 1e-7.
    """
    there = _norm(exact) >= NO_GRADIENT * scale
    return ops.where(there, angle(received, exact), np.nan)


def effective_rank(errors: Tensor) -> Tensor:
    """In how many directions the errors of a batch differ.

    With the singular values s of the matrix E `(batch, units)`, the
    participation ratio of their squares, `(sum s^2)^2 / sum s^4`, which is
    `tr(E E^T)^2 / ||E E^T||^2`. It is 1 where all examples send one error up to
    a factor, and k where k orthogonal ones are equally strong. E is taken as
    it is, without subtracting its mean.

    Args:
        errors: A tensor of shape `(batch, ...)`.

    Returns:
        A scalar tensor, from 1 to min(batch, units); NaN if all is zero.

    Source: the participation ratio as a dimension, Gao et al. (2017), "A theory
    of multineuronal dimensionality, dynamics and measurement".

    Example:

    ```python
    import numpy as np
    from keras_fa.alignment import effective_rank

    assert np.isclose(effective_rank(np.eye(4)), 4)
    assert np.isclose(effective_rank(np.ones((5, 3))), 1)
    ```
    """
    matrix = ops.reshape(_float(errors), (ops.shape(errors)[0], -1))
    matrix = matrix / _nonzero(ops.max(ops.abs(matrix)))
    gram = ops.matmul(matrix, ops.transpose(matrix))
    return ops.square(ops.trace(gram)) / ops.sum(ops.square(gram))


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


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """What `diagnose` finds of one kernel. A number that is not there is NaN.

    Attributes:
        angle: Between B and W, degrees. NaN under DFA, as the next two.
        norm_ratio: `||B|| / ||W||`.
        sign_agreement: Weights whose B and W have the same sign, percent.
        activity: Root mean square of the layer's outputs, activation included.
        activity_ratio: Of the activity to that of the kernel layer called
            before it; NaN for the first one.
        received_norm: Norm of the gradient that the kernel receives.
        gradient_norm: Norm of its gradient under backpropagation.
        gradient_angle: Between the two, degrees. NaN where the latter's norm
            is below 1e-7.
        error_rank: `effective_rank` of the error that arrives at the layer's
            output, before its activation function: `dy` in `dW = x^T dy`.
        backprop_error_rank: The same under backpropagation.
        findings: What is wrong, a sentence each.
    """

    angle: float
    norm_ratio: float
    sign_agreement: float
    activity: float
    activity_ratio: float
    received_norm: float
    gradient_norm: float
    gradient_angle: float
    error_rank: float
    backprop_error_rank: float
    findings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds; `str()` of it is a table and what is wrong.

    Attributes:
        layers: A `LayerDiagnosis` for each kernel, by the names of `alignment`.
    """

    layers: Mapping[str, LayerDiagnosis]

    @property
    def findings(self) -> dict[str, tuple[str, ...]]:
        """What is wrong, by the kernels that it is wrong with."""
        return {
            k: row.findings for k, row in self.layers.items() if row.findings
        }

    def __str__(self) -> str:
        rows = [("layer", *_HEADS.values())]
        for name, row in self.layers.items():
            values = [getattr(row, field) for field in _HEADS]
            cells = ("-" if math.isnan(v) else f"{v:.3g}" for v in values)
            rows.append((name, *cells))
        widths = [max(map(len, column)) for column in zip(*rows)]
        found = [
            f"{name}: {finding}"
            for name, findings in self.findings.items()
            for finding in findings
        ]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        ]
        return "\n".join([*lines, "", *(found or ["Nothing found."])])


_HEADS = {
    "angle": "angle",
    "norm_ratio": "|B|/|W|",
    "sign_agreement": "signs %",
    "activity": "activity",
    "activity_ratio": "growth",
    "received_norm": "|dW|",
    "gradient_norm": "of BP",
    "gradient_angle": "dW angle",
    "error_rank": "error rank",
    "backprop_error_rank": "of BP",
}


def diagnose(
    model: keras.Model,
    x: Tensor,
    y: Tensor,
    loss: Identifier = None,
    before: Mapping[str, np.ndarray] | None = None,
) -> Diagnosis:
    """Is it feedback, and does it teach? Looks at every kernel of a model.

    It finds

    - that B is W, and the rule is not that of backpropagation;
    - that B lacks signs of W under a rule whose B has them (one with
      `sign_concordant`);
    - of feedback that is trained, that it has not moved from `before`, or,
      without that, as a hint, that it stands across W (above 80 degrees);
    - that activity grows more than 50-fold from a kernel layer to the next;
    - that there is no gradient under backpropagation (a norm below 1e-7);
    - that no error arrives through the feedback (a gradient below 1e-5 of it);
    - that all units receive one error: its `effective_rank` is below 1.2, and
      above 1.5 under backpropagation.

    The gradients are those of `alignment`, in training mode; nothing of the
    model's state moves. Of a layer that is called several times, the call of
    least rank and that of the largest growth count. Models with FA layers in
    loops (recurrent cells) are not supported: from outside, an error in there
    cannot be looked at.

    Args:
        model: A built model with one output.
        x: A batch of inputs. No rank is above its size.
        y: The batch's targets.
        loss: As for `alignment`.
        before: Feedback kernels of an earlier time by the names of `alignment`,
            to see whether those that are trained have moved. Default `None`.
            `AlignmentMonitor.diagnose` has those of the start.

    Returns:
        A `Diagnosis`: a `LayerDiagnosis` for each kernel, and a text.

    Raises:
        ValueError: As `alignment`.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_fa import FADense
    from keras_fa.alignment import diagnose

    model = keras.Sequential(
        [
            keras.Input((8,)),
            FADense(16, activation="tanh", name="hidden"),
            FADense(4, name="readout"),
        ]
    )
    readout = model.get_layer("readout")
    readout.feedback_kernel.assign(readout.kernel)  # a mistake
    x, y = np.random.normal(size=(32, 8)), np.random.normal(size=(32, 4))
    diagnosis = diagnose(model, x, y, loss="mse")
    print(diagnosis)
    assert list(diagnosis.findings) == ["readout"]
    assert "B is W" in diagnosis.findings["readout"][0]
    assert diagnosis.layers["hidden"].error_rank > 1.5
    ```
    """
    loss = _loss_function(model, loss)
    paths, direct = named_paths(model), _is_direct(model)
    layers, state = feedback_layers(model), all_variables(model)
    kernels = [path.kernel for path in paths.values()]
    of_layer = [layer for layer in layers for _ in layer.feedback_paths]

    def measure(x, y, scale):
        calls = []

        def note(layer, activation, z):
            calls.append((layer, z, activation(z)))
            return calls[-1][-1]

        def gradients():
            """Those of the kernels, and the error at each call's output."""

            def of(*values):
                errors = iter(values[len(kernels) :])
                with (
                    _gradients.isolated(state, zip(kernels, values)),
                    _tapped(layers, lambda _, f, z: f(z + next(errors))),
                ):
                    value = loss(y, model(x, training=True))
                    return ops.cast(scale, value.dtype) * value

            with _gradients.isolated(state):
                values = [ops.convert_to_tensor(kernel) for kernel in kernels]
                values += [ops.zeros_like(z) for _, z, _ in calls]
                found = _gradients.backend.pullback(of, values)
            return found[: len(kernels)], found[len(kernels) :]

        with _gradients.isolated(state), _tapped(layers, note):
            model(x, training=True)
        received, errors = gradients()
        with _gradients.backpropagation():
            exact, exact_errors = gradients()
        ranks = [
            tuple(map(effective_rank, e)) for e in zip(errors, exact_errors)
        ]
        sizes = [ops.sqrt(ops.mean(ops.square(_float(h)))) for *_, h in calls]
        rows = []
        for layer, path, got, wanted in zip(
            of_layer, paths.values(), received, exact
        ):
            own = [i for i, call in enumerate(calls) if call[0] is layer]
            kernel = ops.convert_to_tensor(path.kernel)
            same = ops.all(ops.equal(path.current(), kernel))
            rows.append(
                {
                    **({} if direct else _of_path(path)),
                    "received_norm": _norm(got) / scale,
                    "gradient_norm": _norm(wanted) / scale,
                    "gradient_angle": gradient_angle(got, wanted, scale),
                    "same": ops.cast(same, "float32"),
                    "activity": [sizes[i] for i in own],
                    "activity_ratio": [
                        sizes[i] / sizes[i - 1] for i in own if i
                    ],
                    "error_rank": [ranks[i][0] for i in own],
                    "backprop_error_rank": [ranks[i][1] for i in own],
                }
            )
        return rows, _all_finite([*received, *exact])

    found = {}
    for (name, path), row in zip(paths.items(), _look(model, measure)(x, y)):
        values = dict.fromkeys(
            ("angle", "norm_ratio", "sign_agreement"), np.nan
        )
        for key, value in row.items():
            several = [float(v) for v in keras.tree.flatten(value)] or [np.nan]
            values[key] = (min if "rank" in key else max)(several)
        same = bool(values.pop("same"))
        diagnosed = LayerDiagnosis(**values)
        start = (before or {}).get(name)
        findings = tuple(_findings(path, diagnosed, same, start))
        found[name] = dataclasses.replace(diagnosed, findings=findings)
    return Diagnosis(found)


def _findings(
    path: FeedbackPath,
    row: LayerDiagnosis,
    same: bool,
    before: np.ndarray | None,
) -> Iterator[str]:
    """What is wrong with a kernel, in words.

    Args:
        path: Its path.
        row: Its numbers.
        same: Whether B is W.
        before: Its stored B of an earlier time.
    """
    rule, stored = type(path.rule).__name__, path.feedback_kernel
    if same and not path.tied:
        yield "B is W, to the last bit: this is backpropagation."
    if path.rule.sign_concordant and row.sign_agreement < 100:
        yield (
            f"{row.sign_agreement:.1f} % of B have the sign of W; under {rule} "
            "all have."
        )
    if path.moves:
        if before is not None and np.array_equal(before, stored):
            yield "B is trained, and is what it was at the start."
        elif before is None and row.angle > 80:
            yield (
                f"a hint: B is trained and at {row.angle:.0f} degrees to W. "
                "Has it moved?"
            )
    if not math.isfinite(row.activity) and not path.in_loop:
        yield "its activity is not finite."
    elif row.activity_ratio > EXPLODING:
        yield (
            f"its activity is {row.activity_ratio:.0f} times that of the "
            "kernel layer before: the forward pass explodes."
        )
    if row.gradient_norm < NO_GRADIENT:
        yield (
            f"its gradient vanishes (norm {row.gradient_norm:.1g} under "
            "backpropagation), and an angle of it means nothing."
        )
    elif row.received_norm < NO_ERROR * row.gradient_norm:
        yield (
            "no error arrives through the feedback: its gradient has the norm "
            f"{row.received_norm:.1g}, under backpropagation "
            f"{row.gradient_norm:.1g}."
        )
    elif row.error_rank < 1.2 and row.backprop_error_rank > 1.5:
        yield (
            f"the errors that arrive are one error (effective rank "
            f"{row.error_rank:.1f}, backpropagation "
            f"{row.backprop_error_rank:.1f})."
        )


@contextlib.contextmanager
def _tapped(
    layers: list[FeedbackLayer],
    tap: Callable[[FeedbackLayer, Callable, Tensor], Tensor],
) -> Iterator[None]:
    """A scope with `tap(layer, activation, z)` in each activation's place.

    z is what the layer has computed of its kernels and bias.
    """
    activations = {
        layer: layer.activation for layer in layers if not layer.in_loop
    }
    try:
        for layer, activation in activations.items():
            # Not by setattr, of which Keras takes notice.
            given = activation or keras.activations.linear
            vars(layer)["activation"] = functools.partial(tap, layer, given)
        yield
    finally:
        for layer, activation in activations.items():
            vars(layer)["activation"] = activation
