"""What TensorBoard shows of a run: all of it in the run's folder, as one run.

    Error/train, Error/validation   percent, after each epoch; also Top5_error
    Error/test                      percent, at the end, if it was looked at
    Loss/train, Loss/validation     after each epoch
    Learning_rate                   at its end
    alignment/..., kernel/..., feedback/...  of `AlignmentMonitor`
    filters/kernel                  the filters of the first layer, and
    filters/feedback                its feedback kernel, where there is one

Keras's own callback would make two runs more, so that a chart has lines of
training and validation. Here the methods are compared: a line is a run, and
training and validation are charts side by side. Curves come before what is
measured of each layer, since TensorBoard sorts capitals first. A step is the
number of epochs that are trained, as in `history.csv` and on the console.

The settings of the run and these errors are a row of the page "HParams". A
file of their own holds the settings, so that a run that is continued has them
once, as they are now. It is written by messages, since
`tensorboard.plugins.hparams.api` says neither which columns come first nor,
without its Keras callback, that a run is at its end. TensorFlow and tensorboard
are imported here alone.
"""

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary

from experiment import settings
from experiment.model import ACCURACIES
from experiment.settings import NAMING
from experiment.settings import RECIPE
from keras_fa.layers.feedback import feedback_layers

# The page has these columns first, and the others in the alphabet's order.
FIRST = ("method", "model", "seed")
SETTINGS = {
    name: api_pb2.DATA_TYPE_FLOAT64
    if settings.BY_NAME[name].is_number
    else api_pb2.DATA_TYPE_STRING
    for name in (*FIRST, *sorted({*NAMING, *RECIPE} - {*FIRST}))
}
# Tag: how the page calls it, and of which images it is.
ERRORS = {
    "Error/test": ("test error, %", api_pb2.DATASET_UNKNOWN),
    "Error/validation": ("validation error, %", api_pb2.DATASET_VALIDATION),
    "Error/train": ("training error, %", api_pb2.DATASET_TRAINING),
}
SUFFIX = ".hparams"
GRID_PIXELS = 400
BETWEEN = (0.6, 0.8, 1.0)  # between filters: light blue, which no grey one has
EXPLANATION = (
    "Filters of the first layer. Zero is grey, the largest weight of the "
    "kernel black or white."
)


class Board(keras.callbacks.Callback):
    """Writes a run's settings, curves and first filters for TensorBoard.

    Args:
        folder: The run's.
        recorded: The run's settings, by name; those of `SETTINGS` are shown.
        every: Epochs between two images of the filters. Default 0: none.
        writes: Whether this is the worker that writes. Default: it is.
    """

    def __init__(
        self,
        folder: Path,
        recorded: dict[str, Any],
        every: int = 0,
        writes: bool = True,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.settings = {
            name: recorded[name]
            for name in SETTINGS
            if recorded.get(name) is not None
        }
        self.every = every
        self.writes = writes
        self._writer = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.writes:
            self._writer = tf.summary.create_noop_writer()
            return
        for file in self.folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            file.unlink()
        write_hparams(
            self.folder, experiment(), summary.session_start_pb(self.settings)
        )
        self._writer = tf.summary.create_file_writer(str(self.folder))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with self._writer.as_default(step=epoch + 1):
            for tag, value in curves(logs or {}).items():
                if math.isfinite(value):
                    tf.summary.scalar(tag, value)
            rate = self.model.optimizer.learning_rate
            tf.summary.scalar("Learning_rate", float(rate))
            if self.every and (epoch + 1) % self.every == 0:
                for name, kernel in first_kernels(self.model).items():
                    tf.summary.image(
                        f"filters/{name}",
                        grid(kernel)[None],
                        description=EXPLANATION,
                    )
        self._writer.flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()


def curves(logs: dict[str, float]) -> dict[str, float]:
    """The logs of an epoch as tags and values, errors in percent."""
    found = {}
    for prefix, part in (("", "train"), ("val_", "validation")):
        if prefix + "loss" in logs:
            found[f"Loss/{part}"] = logs[prefix + "loss"]
        for name, kind in ACCURACIES.items():
            if prefix + name in logs:
                error = 100 * (1 - logs[prefix + name])
                found[f"{kind.capitalize()}/{part}"] = error
    return found


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Writes that a run is finished, and its test error if there is one.

    Args:
        folder: The run's.
        result: Its `result.json`.
    """
    if result["test_error"] is not None:
        writer = tf.summary.create_file_writer(str(folder))
        with writer.as_default(step=result["epochs"]):
            tf.summary.scalar("Error/test", result["test_error"])
        writer.close()
    write_hparams(folder, summary.session_end_pb(api_pb2.STATUS_SUCCESS))


def write_hparams(folder: Path, *messages: Any) -> None:
    """Writes summaries that tensorboard has made, to a file of their own."""
    writer = tf.summary.create_file_writer(str(folder), filename_suffix=SUFFIX)
    with writer.as_default():
        for message in messages:
            tf.summary.experimental.write_raw_pb(
                message.SerializeToString(), step=0
            )
    writer.close()


def experiment() -> Any:
    """The columns of the page "HParams", the same for every run."""
    return summary.experiment_pb(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kind, differs=name in FIRST)
            for name, kind in SETTINGS.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(
                name=api_pb2.MetricName(tag=tag),
                display_name=title,
                dataset_type=images,
            )
            for tag, (title, images) in ERRORS.items()
        ],
    )


def first_kernels(model: keras.Model) -> dict[str, np.ndarray]:
    """The first layer's "kernel", and "feedback" where it stores that.

    None at all unless the layer is a convolution of grey or coloured images.

    Args:
        model: A built model with FA layers.

    Returns:
        Arrays (height, width, channels, filters).
    """
    layer = feedback_layers(model)[0]
    if not isinstance(layer, keras.layers.Conv2D):
        return {}
    if layer.kernel.shape[2] not in (1, 3):
        return {}
    kernels = {"kernel": layer.kernel}
    if layer.feedback_kernel is not None:
        kernels["feedback"] = layer.effective_feedback_kernel()
    return {
        name: np.array(keras.ops.convert_to_numpy(kernel), "float32")
        for name, kernel in kernels.items()
    }


def grid(kernel: np.ndarray) -> np.ndarray:
    """Filters side by side as one image, large enough to be seen.

    Zero is grey, and the largest weight of the kernel black or white. Pixels
    are repeated until the image is about `GRID_PIXELS` wide.

    Args:
        kernel: An array (height, width, channels, filters) of 1 or 3 channels.

    Returns:
        An array (height, width, 3) in [0, 1].
    """
    height, width, _, filters = kernel.shape
    columns = math.ceil(math.sqrt(filters))
    rows = math.ceil(filters / columns)
    image = np.empty((rows * (height + 1) + 1, columns * (width + 1) + 1, 3))
    image[:] = BETWEEN
    values = 0.5 + 0.5 * kernel / (np.abs(kernel).max() or 1.0)
    for index in range(filters):
        top = 1 + index // columns * (height + 1)
        left = 1 + index % columns * (width + 1)
        image[top : top + height, left : left + width] = values[..., index]
    times = max(1, GRID_PIXELS // image.shape[1])
    return image.repeat(times, 0).repeat(times, 1)
