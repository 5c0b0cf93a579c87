"""Callbacks: strict normalization, and a look at alignment while training."""

import math
import weakref
from importlib.util import find_spec
from typing import Any

import keras

from keras_fa import gradients
from keras_fa.alignment import alignment_function
from keras_fa.alignment import named_paths
from keras_fa.layers.feedback import FeedbackPath
from keras_fa.layers.feedback import all_variables
from keras_fa.layers.feedback import feedback_layers


class StrictNormalization(keras.callbacks.Callback):
    """Gives B the norm of W: at the start of training and after every batch.

    It rescales the stored feedback kernel of each layer so that
    `||B_t|| = ||W_t||` for the B that carries the error. With
    `feedback_initializer="constant"` and `SignConcordance` that is strict
    normalization, `B_t = ||W_t|| sign(W_t) / ||sign(W_t)||`. Left as they are:
    layers without a rule (FA), with nothing stored, and those whose rule has a
    `fixed_magnitude` (uSF Init.).

    In `fit` the normalization is the end of the compiled training step itself:
    it costs no call of its own, and holds within `steps_per_execution` too. A
    `fit` that an exception ends leaves it there, until one with this callback
    ends or the model is compiled again. In a loop of one's own call `apply`.

    Raises:
        RuntimeError: In `fit`, with Keras's NNX integration switched on, whose
            training step cannot be extended.

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
            FADense(
                4,
                feedback_initializer="constant",
                feedback_constraint="sign_concordance",
            ),
        ]
    )
    model.compile("adam", "mse")
    x, y = np.ones((16, 8)), np.ones((16, 4))
    model.fit(x, y, callbacks=[StrictNormalization()], verbose=0)

    # In a training loop of one's own, after each update:
    normalize = StrictNormalization()
    normalize.apply(model)
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._compiled = weakref.WeakKeyDictionary()

    def apply(self, model: keras.layers.Layer) -> None:
        """Normalizes the feedback of every FA layer in a model or layer now.

        Args:
            model: A model or layer; one that is not built yet has nothing to
                normalize. The compiled call is kept per model: keep the
                callback, too, when calling this in a loop.
        """
        gradients.synchronize(model)
        if model not in self._compiled:
            if not all(layer.built for layer in feedback_layers(model)):
                return  # Keras builds some models at their first batch
            paths = normalized_paths(model)
            self._compiled[model] = gradients.compiled(
                lambda: _normalize(paths),
                reads=all_variables(model),
                assigns=[path.feedback_kernel for path in paths],
            )
        self._compiled[model]()

    def on_train_begin(self, logs: dict | None = None) -> None:
        # Kept, since on JAX `self.model` makes weights readable every time.
        self._trained = self.model
        self._compiled.pop(self._trained, None)  # layers may have been built
        _normalize(normalized_paths(self._trained))
        _NormalizingFunction.install(self._trained)

    def on_train_batch_begin(
        self, batch: int, logs: dict | None = None
    ) -> None:
        # Another callback may have made a new train function.
        _NormalizingFunction.install(self._trained)

    def on_train_end(self, logs: dict | None = None) -> None:
        _NormalizingFunction.remove(self._trained)


class _NormalizingFunction:
    """A model's train function, every step of which ends normalized.

    Attributes:
        plain: The train function in whose place it stands.
    """

    def __init__(self, model: keras.Model) -> None:
        self.plain = model.train_function
        own = vars(model).get("train_step")
        model.train_step = gradients.followed_by(
            model, lambda: _normalize(normalized_paths(model))
        )
        try:
            model.make_train_function(force=True)
        finally:
            del model.train_step
            if own is not None:
                model.train_step = own
        self._function = model.train_function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    @classmethod
    def install(cls, model: keras.Model) -> None:
        """Puts one in the place of the plain train function."""
        plain = model.train_function
        if isinstance(plain, cls):
            return
        # Kept with the model, as Keras keeps what it has compiled.
        made = getattr(model, "_normalizing_function", None)
        if made is None or made.plain is not plain:
            model._normalizing_function = made = cls(model)
        model.train_function = made

    @classmethod
    def remove(cls, model: keras.Model) -> None:
        """Puts the plain train function back."""
        if isinstance(model.train_function, cls):
            model.train_function = model.train_function.plain


def normalized_paths(model: keras.layers.Layer) -> list[FeedbackPath]:
    """The feedback paths of a model that strict normalization rescales.

    Those of layers that are not built yet are not among them.
    """
    return [
        path
        for layer in feedback_layers(model)
        if layer.built
        for path in layer.feedback_paths
        if path.rule is not None
        and path.rule.stores_feedback_kernel
        and not path.rule.fixed_magnitude
    ]


def _normalize(paths: list[FeedbackPath]) -> None:
    for path in paths:
        path.feedback_kernel.assign(path.matched_feedback_kernel())


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


class AlignmentMonitor(keras.callbacks.Callback):
    """Measures alignment while training, for TensorBoard and for tables.

    Every `every` epochs it calls what `keras_fa.alignment.alignment` computes,
    on one probe batch. With a `log_dir` it writes scalars
    `alignment/<measure>/<layer>` and histograms of W and B, in a run of their
    own named "alignment" below that folder. Where tensorboard is installed,
    its page "Custom Scalars" then has a chart for each measure, which says how
    it is read, with a line for each layer.

    Args:
        probe: A pair `(x, y)` of arrays: the batch on which gradients are
            compared.
        log_dir: String or path: a TensorBoard folder, or `None` (default) to
            write no events.
        every: Positive integer: epochs between two measurements. Default 1.
        loss: The loss function of the gradients. Default `None`: the one that
            the model was compiled with.

    Attributes:
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
    ```
    """

    def __init__(
        self,
        probe: tuple[Any, Any],
        log_dir: Any = None,
        every: int = 1,
        loss: Any = None,
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
        self.columns = []
        self.history = {}
        self._writer = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.model.built:
            self.model(self.probe[0])
        self._measure = alignment_function(self.model, self.loss)
        self.columns = list(_flat(self._measure(*self.probe)))
        if self.log_dir is not None and self._writer is None:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(
                f"{self.log_dir}/alignment"
            )
            if find_spec("tensorboard") is not None:
                with self._writer.as_default():
                    tf.summary.experimental.write_raw_pb(
                        _page(self.columns), step=0
                    )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if (epoch + 1) % self.every:
            return
        measures = _flat(self._measure(*self.probe))
        self.history[epoch] = measures
        if self._writer is not None:
            self._write(epoch, measures)

    def _write(self, epoch: int, measures: dict[str, float]) -> None:
        import tensorflow as tf

        with self._writer.as_default(step=epoch):
            for name, value in measures.items():
                if not math.isnan(value):
                    tf.summary.scalar(name, value)
            for name, path in named_paths(self.model).items():
                kernel = keras.ops.convert_to_tensor(path.kernel)
                tf.summary.histogram(f"kernel/{name}", kernel)
                if path.feedback_kernel is not None:
                    feedback = path.effective(kernel)
                    tf.summary.histogram(f"feedback/{name}", feedback)
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


def _page(columns: list[str]) -> bytes:
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
