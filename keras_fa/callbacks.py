"""Callbacks: strict normalization, a look at alignment, a check of averages."""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterator
from importlib.util import find_spec
from os import PathLike

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa._types import Tensor
from keras_fa.alignment import Diagnosis
from keras_fa.alignment import alignment_function
from keras_fa.alignment import diagnose
from keras_fa.alignment import named_paths
from keras_fa.constraints import KernelConstraint
from keras_fa.constraints import SignConcordance
from keras_fa.constraints import parts_of
from keras_fa.layers.direct import SendError
from keras_fa.layers.direct import target_signal
from keras_fa.layers.feedback import FeedbackLayer
from keras_fa.layers.feedback import FeedbackPath
from keras_fa.layers.feedback import all_layers
from keras_fa.layers.feedback import all_variables
from keras_fa.layers.feedback import feedback_layers
from keras_fa.learning import Local


class StrictNormalization(keras.callbacks.Callback):
    """Strict normalization for a training: `B = ||W|| sign(W) / ||sign(W)||`.

    From the start of `fit` to its end every sign-concordant rule of the model
    is strict (`SignConcordance(strict=True)`): B is computed from W inside the
    compiled step, with the norm of the W of that very step, whatever
    `steps_per_execution` is. So a model of uSF Init. trains as uSF SN; its
    stored magnitudes stay, and are back when `fit` ends. Models of
    `fa_usf_sn` are strict by themselves, with this callback or without.

    In a loop of one's own call `apply` once, before the training step is
    compiled. A `fit` that an exception ends leaves the rules strict.

    Source: Moskovitz et al. (2018), "strict normalization".

    Example:

    ```python
    import numpy as np
    import keras
    from keras_fa import FADense
    from keras_fa.callbacks import StrictNormalization

    model = keras.Sequential(
        [
            keras.Input((8,)),
            FADense(4, feedback_constraint="sign_concordance"),
        ]
    )
    model.compile("adam", "mse")
    x, y = np.ones((16, 8)), np.ones((16, 4))
    model.fit(x, y, callbacks=[StrictNormalization()], verbose=0)

    # For a training loop of one's own:
    StrictNormalization().apply(model)
    layer = model.layers[-1]
    norms = [
        np.linalg.norm(kernel)
        for kernel in (layer.effective_feedback_kernel(), layer.kernel)
    ]
    assert np.isclose(*norms)
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._made_strict = []

    def apply(self, model: keras.layers.Layer) -> None:
        """Makes the sign-concordant rules of a model or layer strict, to stay.

        Args:
            model: A model or layer. What is made strict is the model as it
                runs: a built one is saved with its stored magnitudes and has
                to be made strict again after loading.
        """
        _recompile(model, _make_strict(model))

    def on_train_begin(self, logs: dict | None = None) -> None:
        made_strict = _make_strict(self.model)
        _recompile(self.model, made_strict)
        self._made_strict += made_strict  # after an exception some are left

    def on_train_end(self, logs: dict | None = None) -> None:
        for rule in self._made_strict:
            rule.strict = False
        _recompile(self.model, self._made_strict)
        self._made_strict = []


def _make_strict(model: keras.layers.Layer) -> list[SignConcordance]:
    """Makes rules strict; returns those of built layers that were not."""
    loose = []
    for layer in feedback_layers(model):
        if layer.built:
            loose += layer.feedback_paths
            continue
        for name in layer.feedback_arguments():
            # Keras builds some models at their first batch. Such a layer is
            # strict for good: there are no magnitudes to come back to.
            rule = getattr(layer, name)
            if isinstance(rule, SignConcordance):
                rule.strict = True
    loose = [
        path
        for path in loose
        if isinstance(path.rule, SignConcordance) and not path.rule.strict
    ]
    for path in loose:
        path.rule.strict = True
        path.warn_if_equal()
    return [path.rule for path in loose]


def _recompile(model: keras.layers.Layer, changed: list) -> None:
    """A training step that was traced with other rules is made anew."""
    if changed and getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)


class RefuseAverages(keras.callbacks.Callback):
    """Refuses to train fixed signs and norms with `use_ema=True`.

    At the end of `fit` such an optimizer overwrites each kernel with the
    average of its values before `FixedSign` and `ConstantNorm` had run, which
    have other signs and another norm. The methods with such constraints bring
    this callback, and `convert` checks a compiled model by itself. For models
    written by hand it is to be given to `fit`.

    Raises:
        ValueError: At the beginning of `fit`, if the optimizer has
            `use_ema=True` and a kernel has a `KernelConstraint`.

    Example:

    ```python
    import numpy as np
    import keras
    from keras_fa import FADense
    from keras_fa.callbacks import RefuseAverages

    layer = FADense(4, kernel_constraint="constant_norm")
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile(keras.optimizers.Adam(use_ema=True), "mse")
    x, y = np.ones((16, 8)), np.ones((16, 4))
    try:
        model.fit(x, y, callbacks=[RefuseAverages()], verbose=0)
    except ValueError as error:
        assert "use_ema=True" in str(error)
    ```
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        refuse_averages(self.model)


def refuse_averages(model: keras.Model) -> None:
    """What `RefuseAverages` does, for a compiled model.

    Raises:
        ValueError: As the callback.
    """
    optimizer = getattr(model, "optimizer", None)
    # Under mixed_float16 Keras wraps the optimizer.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not getattr(optimizer, "use_ema", False):
        return
    for layer in all_layers(model):
        stock = ("kernel_constraint",)
        for name in getattr(layer, "kernel_constraint_arguments", stock):
            for part in parts_of(getattr(layer, name, None)):
                if isinstance(part, KernelConstraint):
                    raise ValueError(
                        f"{type(optimizer).__name__}(use_ema=True) overwrites "
                        "kernels with averages after "
                        f"{type(part).__name__} of layer '{layer.name}' has "
                        "run, which then no longer holds. Use use_ema=False, "
                        "or a method without fixed signs and norms."
                    )


class MirrorPhase(keras.callbacks.Callback):
    """Weight mirror: B learns of noise between the batches of training.

    After every `every` updates of the optimizer, counted on from epoch to
    epoch, each layer whose `feedback_learning` is a `WeightMirror`, or another
    one that is not `in_step`, is sent `batches` batches of Gaussian noise of
    its own, and after each of them its B moves by `-rate` times the gradient of
    that one's `loss`. W and all else stay as they are, and layers that are not
    trainable do whole. Under
    `steps_per_execution` Keras tells callbacks of the last batch of an
    execution alone: there is one phase after it if any was due.

    The noise depends on `seed` and the optimizer's number of iterations, so
    that a resumed training goes on as it would have.

    In a loop of one's own call `mirror` after the training step.

    Args:
        every: Positive integer. Default 1.
        batches: Positive integer. Default 1.
        batch_size: Positive integer, examples of noise. Default 128.
        rate: Positive float. Default 0.02.
        noise: Positive float: the standard deviation of the noise. Default 1.
        seed: Integer. Default 0.

    A dimension of the layer's input that is not known counts as 32.

    Raises:
        ValueError: If an argument is not positive.

    Source: Akrout et al. (2019). The defaults are our choice.

    Example:

    ```python
    import numpy as np
    import keras
    from keras_fa import FADense
    from keras_fa.callbacks import MirrorPhase

    layer = FADense(4, feedback_learning="weight_mirror")
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile("adam", "mse")
    x, y = np.ones((16, 8)), np.ones((16, 4))
    model.fit(x, y, callbacks=[MirrorPhase(batches=300)], verbose=0)
    w, b = np.ravel(layer.kernel), np.ravel(layer.feedback_kernel)
    assert w @ b > 0.9 * np.linalg.norm(w) * np.linalg.norm(b)
    ```
    """

    def __init__(
        self,
        every: int = 1,
        batches: int = 1,
        batch_size: int = 128,
        rate: float = 0.02,
        noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {
            "every": every,
            "batches": batches,
            "batch_size": batch_size,
            "rate": rate,
            "noise": noise,
        }
        for name, value in given.items():
            if value <= 0:
                raise ValueError(
                    f"`{name}` must be positive. Received: {name}={value}"
                )
        self.every = every
        self.batches = batches
        self.batch_size = batch_size
        self.rate = rate
        self.noise = noise
        self.seed = seed
        self._generator = keras.random.SeedGenerator(seed)
        self._step = None
        self._of = None
        self._updates = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._step = None  # layers may have come or gone
        self._updates = self._iterations()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        before, self._updates = self._updates, self._iterations()
        if self._updates // self.every > before // self.every:
            self.mirror(self.model, self._updates)

    def _iterations(self) -> int:
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def mirror(self, model: keras.layers.Layer, step: int) -> None:
        """One mirror phase.

        Args:
            model: A built model or layer.
            step: What tells the phases apart: each draws other noise.
        """
        if self._step is None or self._of is not model:
            self._of = model
            self._layers = [
                layer
                for layer in feedback_layers(model)
                if layer.trainable
                and layer.built
                and any(path.mirrored for path in layer.feedback_paths)
            ]
            self._reads = [*all_variables(model), self._generator.state]
            self._step = _gradients.backend.compiled(self._moved, self._reads)
        for batch in range(self.batches):
            key = ops.convert_to_tensor(
                [self.seed, step * self.batches + batch]
            )
            self._generator.state.assign(key)
            for layer, moved in zip(self._layers, self._step()):
                mirrored = [p for p in layer.feedback_paths if p.mirrored]
                for path, value in zip(mirrored, moved):
                    path.feedback_kernel.assign(value)

    def _moved(self) -> list[list[Tensor]]:
        """The stored feedback kernels of each layer after one batch."""
        with _gradients.isolated(self._reads):
            return [self._moved_in(layer) for layer in self._layers]

    def _moved_in(self, layer: FeedbackLayer) -> list[Tensor]:
        shape = (self.batch_size, *(n or 32 for n in layer.built_shape[1:]))
        dtype = layer.compute_dtype
        kernels = [ops.cast(p.kernel, dtype) for p in layer.feedback_paths]

        def at_rest() -> Iterator[Local]:
            feedback = map(
                FeedbackPath.effective, layer.feedback_paths, kernels
            )
            return layer.locals(ops.zeros(shape, dtype), kernels, feedback)

        noise = [
            keras.random.normal(
                local.x.shape,
                stddev=self.noise,
                dtype=dtype,
                seed=self._generator,
            )
            for local in at_rest()
        ]

        def loss() -> Tensor:
            return sum(
                path.learning.loss(dataclasses.replace(local, x=xi))
                for path, local, xi in zip(
                    layer.feedback_paths, at_rest(), noise
                )
                if path.mirrored
            )

        stored = [p.feedback_kernel for p in layer.feedback_paths if p.mirrored]
        gradients = _gradients.gradients_of(loss, stored, self._reads)
        return [b - self.rate * g for b, g in zip(stored, gradients)]


class TargetLoss(keras.callbacks.Callback):
    """Refuses to train DRTP under a loss whose target it does not send.

    Raises:
        ValueError: At the start of `fit`, if the loss of a model that sends
            targets (`SendError`) is not the cross-entropy that they are of.

    Example:

    ```python
    from keras_fa.methods import METHODS

    names = [type(c).__name__ for c in METHODS["drtp"].callbacks()]
    assert names == ["TargetLoss"]
    ```
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        for layer in all_layers(self.model):
            if isinstance(layer, SendError) and layer.signal != "error":
                sent = target_signal(self.model.loss)
                if sent != layer.signal:
                    raise ValueError(
                        f"The model sends the {layer.signal} and its loss has "
                        f"the {sent}. Compile the stock model, then convert it."
                    )


# How TensorBoard's page tells to read its charts: the measures of each part,
# and their titles. What is longer it cuts off.
PAGE = {
    "Angles of each layer, in degrees: 0 is backpropagation, 90 is chance": {
        "angle": "Angle between B and W",
        "gradient_angle": "Angle between gradient and backpropagation's",
    },
    "Signs and norms of B and W: backpropagation has 100 percent and 1; "
    "50 percent is chance": {
        "sign_agreement": "Weights of equal sign (percent)",
        "norm_ratio": "Norm of B / norm of W",
    },
}
_OF_B = " It says nothing of a first layer, whose B carries no error to anyone."
# What TensorBoard says of each scalar.
DESCRIPTIONS = {
    "angle": "Between B and W, in degrees: 0 is backpropagation, 90 is chance."
    + _OF_B,
    "gradient_angle": "Between the gradient that the kernel receives and that "
    "of backpropagation, in degrees: below 90 it goes downhill. The readout's "
    "is 0, for its update is exact.",
    "sign_agreement": "Weights of B and W of equal sign, in percent: 50 is "
    "chance." + _OF_B,
    "norm_ratio": "Norm of B / norm of W. It is left out where the rule makes "
    "it 1." + _OF_B,
}


class AlignmentMonitor(keras.callbacks.Callback):
    """Measures alignment while training, for TensorBoard and for tables.

    Every `every` epochs it calls what `keras_fa.alignment.alignment` computes,
    on one probe batch. With a `log_dir` it writes scalars
    `alignment/<measure>/<layer>` and histograms of W and B into that folder.
    The norm ratios of rules that make them 1 (SN, B = W) are left out there.
    A step is the number of epochs that were trained: 1 after the first. Where
    tensorboard is installed, its page "Custom Scalars" then has a chart for
    each measure, which says how it is read, with a line for each layer.

    Args:
        probe: A pair `(x, y)` of arrays: the batch on which gradients are
            compared.
        log_dir: String or path: a TensorBoard folder, or `None` (default) to
            write no events.
        every: Positive integer: epochs between two measurements. Default 1.
        loss: The loss function of the gradients. Default `None`: the one that
            the model was compiled with.
        in_logs: Whether the last measures join the logs of each epoch, which
            the callbacks after this one, `History` and the progress bar see.
            Default `False`.

    Attributes:
        start: The measures at the beginning of the last `fit`: a dict of
            column to float. A curve of `history` begins with it.
        columns: The names of all measures, `"alignment/<measure>/<layer>"`,
            known once training has begun.
        history: A dict of epoch (from 0, as Keras counts) to the measures
            taken at its end: a dict of column to float, in degrees, percent or
            as a ratio.

    Raises:
        ValueError: If `every` is not a positive integer.
        ImportError: If there is a `log_dir` and TensorFlow, which writes
            TensorBoard's events on every backend, is not installed.

    Example:

    ```python
    import numpy as np
    import keras
    from keras_fa import FADense
    from keras_fa.callbacks import AlignmentMonitor

    model = keras.Sequential([keras.Input((8,)), FADense(4, name="fc")])
    model.compile("adam", "mse")
    x, y = np.random.normal(size=(16, 8)), np.ones((16, 4))
    monitor = AlignmentMonitor(probe=(x, y))
    model.fit(x, y, callbacks=[monitor], verbose=0)
    assert 0 < monitor.history[0]["alignment/angle/fc"] < 180

    # Training ends once the angle no longer falls.
    angle = "alignment/angle/fc"
    stop = keras.callbacks.EarlyStopping(angle, patience=2, mode="min")
    monitor = AlignmentMonitor(probe=(x, y), in_logs=True)
    history = model.fit(x, y, epochs=3, callbacks=[monitor, stop], verbose=0)
    assert history.history[angle][0] == monitor.history[0][angle]

    print(monitor.diagnose())  # is it feedback, and does it teach?
    ```
    """

    def __init__(
        self,
        probe: tuple[Tensor, Tensor],
        log_dir: str | PathLike | None = None,
        every: int = 1,
        loss: str | Callable | None = None,
        in_logs: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`every` must be a positive integer. Received: every={every}"
            )
        if not isinstance(probe, (tuple, list)) or len(probe) != 2:
            raise ValueError(
                "`probe` must be a pair (x, y) of arrays. Received: an object "
                f"of type {type(probe).__name__}"
            )
        if log_dir is not None and find_spec("tensorflow") is None:
            raise ImportError(
                "TensorBoard events are written by TensorFlow, which is not "
                f"installed. Received: log_dir={log_dir}. Install tensorflow, "
                "or leave log_dir out: the measures are in `history`."
            )
        self.probe = probe
        self.log_dir = log_dir
        self.every = every
        self.loss = loss
        self.in_logs = in_logs
        self.columns = []
        self.start = {}
        self.history = {}
        self._writer = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.model.built:
            self.model(self.probe[0])
        self._measure = alignment_function(self.model, self.loss)
        self._before = {
            name: np.array(path.feedback_kernel)
            for name, path in named_paths(self.model).items()
            if path.moves
        }
        self._last = self.start = _flat(self._measure(*self.probe))
        self.columns = list(self.start)
        if self.log_dir is not None and self._writer is None:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(self.log_dir))
            if find_spec("tensorboard") is not None:
                shown = set(self.columns) - _settled(self.model)
                with self._writer.as_default():
                    tf.summary.experimental.write_raw_pb(_page(shown), step=0)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if (epoch + 1) % self.every == 0:
            self._last = self.history[epoch] = _flat(self._measure(*self.probe))
            if self._writer is not None:
                self._write(epoch, self._last)
        if self.in_logs and logs is not None:
            logs.update(self._last)

    def diagnose(self) -> Diagnosis:
        """What `keras_fa.alignment.diagnose` finds on the probe batch now.

        And whether feedback that is trained has moved since the beginning of
        the last `fit`, which one look cannot tell.

        Raises:
            ValueError: If no training has begun.
        """
        if not self.columns:
            raise ValueError(
                "AlignmentMonitor.diagnose() compares with the beginning of a "
                "training. Give the monitor to `fit` first, or call "
                "keras_fa.alignment.diagnose(model, x, y)."
            )
        return diagnose(self.model, *self.probe, self.loss, self._before)

    def _write(self, epoch: int, measures: dict[str, float]) -> None:
        import tensorflow as tf

        settled = _settled(self.model)
        with self._writer.as_default(step=epoch + 1):
            for name, value in measures.items():
                if not math.isnan(value) and name not in settled:
                    about = DESCRIPTIONS[name.split("/")[1]]
                    tf.summary.scalar(name, value, description=about)
            for name, path in named_paths(self.model).items():
                tf.summary.histogram(f"kernel/{name}", path.kernel.value)
                if not path.tied:
                    tf.summary.histogram(f"feedback/{name}", path.current())
        self._writer.flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _flat(measures: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"alignment/{measure}/{layer}": value
        for layer, values in measures.items()
        for measure, value in values.items()
    }


def _settled(model: keras.layers.Layer) -> set[str]:
    """The columns whose values are 1 by definition, and noise around it."""
    return {
        f"alignment/norm_ratio/{name}"
        for name, path in named_paths(model).items()
        if path.tied
        or (isinstance(path.rule, SignConcordance) and path.rule.strict)
    }


def _page(columns: set[str]) -> bytes:
    """What TensorBoard's page of custom scalars reads: its charts.

    A chart names its lines by a pattern and not by layer, since TensorBoard
    puts the pages of all runs together and drops equal charts.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar import summary

    measured = {column.split("/")[1] for column in columns}
    layout = layout_pb2.Layout()
    for explanation, measures in PAGE.items():
        if measured.intersection(measures):
            part = layout.category.add(title=explanation)
        for measure, title in measures.items():
            if measure in measured:
                chart = part.chart.add(title=title)
                chart.multiline.tag.append(f"^alignment/{measure}/.+$")
    return summary.pb(layout).SerializeToString()
