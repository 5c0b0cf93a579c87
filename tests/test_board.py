"""What TensorBoard is given of a run, read back as TensorBoard reads it."""

import io
import re
from pathlib import Path
from typing import Any

import keras
import matplotlib.image
import numpy as np
import pytest
from keras import layers

from keras_fa import convert
from keras_fa.callbacks import AlignmentMonitor

tf = pytest.importorskip("tensorflow")
accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
)

from tensorboard.plugins.custom_scalar import layout_pb2  # noqa: E402
from tensorboard.plugins.hparams import api_pb2  # noqa: E402
from tensorboard.plugins.hparams import plugin_data_pb2  # noqa: E402

from experiment import board  # noqa: E402

SETTINGS = {"method": "fa", "seed": 3, "learning_rate": 0.5, "dropout": None}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6, 6, 1)).astype("float32")
Y = RNG.integers(0, 3, 8)


def model_of(method: str, channels: int = 1, strides: int = 2) -> keras.Model:
    """A small convolutional network that measures its accuracy."""
    stock = keras.Sequential(
        [
            keras.Input((6, 6, channels)),
            layers.Conv2D(5, 3, strides=strides, name="conv"),
            layers.Flatten(),
            layers.Dense(3, name="readout"),
        ]
    )
    model = convert(stock, method)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"], run_eagerly=True)
    return model


def fit(
    model: keras.Model, *callbacks: keras.callbacks.Callback, **options: Any
) -> dict[str, list[float]]:
    return model.fit(
        X,
        Y,
        validation_data=(X[:4], Y[:4]),
        verbose=0,
        callbacks=list(callbacks),
        **{"epochs": 2, **options},
    ).history


def read(folder: Path) -> accumulator.EventAccumulator:
    return accumulator.EventAccumulator(
        str(folder), size_guidance={"tensors": 0}
    ).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, Any]]:
    """Steps and values in order of the steps.

    The files are read by name: those of one second in no order of writing.
    """
    events = sorted(read(folder).Tensors(tag), key=lambda event: event.step)
    return [
        (event.step, tf.make_ndarray(event.tensor_proto)) for event in events
    ]


def hparams(folder: Path) -> dict[str, list[Any]]:
    """All that is written for the page HParams, by tag."""
    found: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    data = plugin_data_pb2.HParamsPluginData.FromString(
                        value.metadata.plugin_data.content
                    )
                    found.setdefault(value.tag, []).append(data)
    return found


# The page of alignment -------------------------------------------------------


def layout(folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Parts of the page, each with the titles and patterns of its charts."""
    ((_, text),) = points(folder, "custom_scalars__config__")
    return [
        (part.title, [(c.title, *c.multiline.tag) for c in part.chart])
        for part in layout_pb2.Layout.FromString(text.item()).category
    ]


def test_each_chart_shows_one_measure_of_all_layers(tmp_path: Path) -> None:
    fit(model_of("fa"), AlignmentMonitor((X, Y), tmp_path), epochs=1)
    page = layout(tmp_path)
    assert [len(charts) for _, charts in page] == [2, 2]
    assert "0 is backpropagation, 90 is chance" in page[0][0]
    charts = [chart for _, part in page for chart in part]
    tags = read(tmp_path).Tags()["tensors"]
    shown = [
        {tag for tag in tags if re.match(pattern, tag)} for _, pattern in charts
    ]
    assert shown == [
        {f"alignment/{measure}/{layer}" for layer in ("conv", "readout")}
        for measure in (
            "angle",
            "gradient_angle",
            "sign_agreement",
            "norm_ratio",
        )
    ]


def test_a_ratio_that_is_one_by_definition_is_left_out(tmp_path: Path) -> None:
    for name, method in {"sn": "fa_usf_sn", "bp": "bp"}.items():
        monitor = AlignmentMonitor((X, Y), tmp_path / name)
        fit(model_of(method), monitor, epochs=1)
        assert "alignment/norm_ratio/conv" in monitor.history[0]
        tags = read(tmp_path / name).Tags()["tensors"]
        assert "alignment/sign_agreement/conv" in tags
        assert not [tag for tag in tags if "norm_ratio" in tag]
        charts = [c for _, part in layout(tmp_path / name) for c in part]
        assert not [tag for _, tag in charts if "norm_ratio" in tag]


def test_scalars_say_what_says_nothing(tmp_path: Path) -> None:
    fit(model_of("fa"), AlignmentMonitor((X, Y), tmp_path), epochs=1)
    events = read(tmp_path)
    said = {
        measure: events.SummaryMetadata(
            f"alignment/{measure}/conv"
        ).summary_description
        for measure in ("angle", "gradient_angle")
    }
    assert "first layer, whose B carries no error" in said["angle"]
    assert "The readout's is 0" in said["gradient_angle"]


def test_the_page_has_what_is_measured(tmp_path: Path) -> None:
    fit(model_of("dfa"), AlignmentMonitor((X, Y), tmp_path), epochs=1)
    ((_, ((_, pattern),)),) = layout(tmp_path)
    assert pattern == "^alignment/gradient_angle/.+$"


# Board -----------------------------------------------------------------------


def test_errors_are_in_percent(tmp_path: Path) -> None:
    history = fit(model_of("fa"), board.Board(tmp_path, SETTINGS))
    for tag, name in [
        ("Error/train", "accuracy"),
        ("Error/validation", "val_accuracy"),
    ]:
        steps, values = zip(*points(tmp_path, tag))
        assert steps == (1, 2)
        wanted = [100 * (1 - accuracy) for accuracy in history[name]]
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
        assert max(values) > 1  # no share
    tags = read(tmp_path).Tags()["tensors"]
    assert not [t for t in tags if t.startswith(("Error/test", "filters"))]
    board.finish(tmp_path, {"test_error": 12.5, "epochs": 2})
    assert points(tmp_path, "Error/test") == [(2, 12.5)]


def test_no_test_error(tmp_path: Path) -> None:
    board.finish(tmp_path, {"test_error": None, "epochs": 2})
    assert set(hparams(tmp_path)) == {"_hparams_/session_end_info"}


def test_settings_are_there_once(tmp_path: Path) -> None:
    fit(model_of("fa"), board.Board(tmp_path, SETTINGS))
    board.finish(tmp_path, {"test_error": 12.5, "epochs": 2})
    longer = {**SETTINGS, "epochs": 4, "runs_dir": "runs"}
    fit(
        model_of("fa"),
        board.Board(tmp_path, longer),
        initial_epoch=2,
        epochs=4,
    )
    assert set(hparams(tmp_path)) == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
    }  # it goes on: no end
    board.finish(tmp_path, {"test_error": 10.0, "epochs": 4})
    assert [step for step, _ in points(tmp_path, "Error/train")] == [1, 2, 3, 4]
    found = hparams(tmp_path)
    (start,) = found["_hparams_/session_start_info"]
    values = start.session_start_info.hparams
    assert {name: values[name].WhichOneof("kind") for name in values} == {
        "method": "string_value",
        "seed": "number_value",
        "learning_rate": "number_value",
        "epochs": "number_value",
    }
    assert values["epochs"].number_value == 4
    assert values["method"].string_value == "fa"
    (end,) = found["_hparams_/session_end_info"]
    assert end.session_end_info.status == api_pb2.STATUS_SUCCESS
    (page,) = found["_hparams_/experiment"]
    metrics = [
        (metric.name.tag, metric.dataset_type)
        for metric in page.experiment.metric_infos
    ]
    assert metrics == [
        ("Error/test", api_pb2.DATASET_UNKNOWN),
        ("Error/validation", api_pb2.DATASET_VALIDATION),
        ("Error/train", api_pb2.DATASET_TRAINING),
    ]
    columns = sorted(  # as TensorBoard does
        page.experiment.hparam_infos, key=lambda c: (not c.differs, c.name)
    )
    assert columns[0].name == "method"


@pytest.mark.parametrize(
    ("method", "names"), [("fa", ["feedback", "kernel"]), ("bp", ["kernel"])]
)
def test_first_filters(method: str, names: list[str], tmp_path: Path) -> None:
    model = model_of(method)
    fit(model, board.Board(tmp_path, SETTINGS, every=2))
    tags = read(tmp_path).Tags()["tensors"]
    found = [tag for tag in tags if tag.startswith("filters/")]
    assert sorted(found) == [f"filters/{name}" for name in names]
    layer = model.get_layer("conv")
    for name in names:
        ((step, (width, height, png)),) = points(tmp_path, f"filters/{name}")
        assert step == 2
        image = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        feedback = name == "feedback"
        kernel = layer.effective_feedback_kernel() if feedback else layer.kernel
        kernel = np.array(kernel)
        np.testing.assert_allclose(image, board.grid(kernel), atol=1 / 255)
        assert (int(width), int(height)) == image.shape[1::-1]


def test_no_image_of_other_first_layers() -> None:
    assert set(board.first_kernels(model_of("fa", channels=3))) == {
        "kernel",
        "feedback",
    }
    assert not board.first_kernels(model_of("fa", channels=2))
    dense = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    assert not board.first_kernels(convert(dense, "fa"))


def test_the_grid_of_filters() -> None:
    kernel = np.zeros((2, 3, 1, 5), "float32")
    kernel[0, 1, 0, 0] = -4.0
    kernel[1, 2, 0, 4] = 2.0
    image = board.grid(kernel)
    times = board.GRID_PIXELS // 13
    assert image.shape == (7 * times, 13 * times, 3)
    small = image[::times, ::times]
    assert np.array_equal(small.repeat(times, 0).repeat(times, 1), image)
    between = np.isclose(small, board.BETWEEN).all(-1)
    assert between[0].all()
    assert between[:, 4].all()
    assert between[4:, 9:].all()
    assert (~between).sum() == 5 * 6
    assert np.array_equal(small[1, 2], [0.0] * 3)  # the largest, negative
    assert np.array_equal(small[5, 7], [0.75] * 3)
    assert np.array_equal(small[1, 5], [0.5] * 3)
    assert np.array_equal(board.grid(0 * kernel)[times, times], [0.5] * 3)
    colours = np.zeros((1, 1, 3, 1))
    colours[0, 0, :, 0] = 1, -1, 0
    middle = board.grid(colours)[200, 200]
    assert np.array_equal(middle, [1.0, 0.0, 0.5])


def test_worker_that_does_not_write(tmp_path: Path) -> None:
    """It computes what the chief shows, and leaves the folder alone."""
    shown = board.Board(tmp_path, SETTINGS, 1, writes=False)
    fit(model_of("fa"), shown, epochs=1)
    assert not list(tmp_path.iterdir())
