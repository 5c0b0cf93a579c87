"""A network under a dtype policy, and the input of ImageNet, timed in turn."""

import contextlib
import random
import statistics
from typing import Any

import keras_fa
from experiment.devices.one import Share
from experiment.errors import one_line
from experiment.timing import biotorch
from experiment.timing.memory import bytes_of
from experiment.timing.memory import operations_of
from experiment.timing.options import FLAGS
from experiment.timing.options import MONITOR
from experiment.timing.options import PROBE_SIZE
from experiment.timing.report import cores
from experiment.timing.trainees import Input
from experiment.timing.trainees import Monitor
from experiment.timing.trainees import Predictor
from experiment.timing.trainees import Trainee
from experiment.timing.trainees import build
from experiment.timing.trainees import compile_alike
from experiment.timing.trainees import converted
from experiment.timing.trainees import profile
from experiment.timing.trainees import random_batch
from keras_fa.methods import METHODS

INPUT_SIZE = 224


def measure(
    network: str, dtype_policy: str, peaks: dict[str, int | None]
) -> dict[str, Any]:
    """Times all methods on one network under one dtype policy.

    Of the rows whose peak of memory is known it is told, too.

    Returns:
        An entry of `results` in the JSON file.
    """
    stock = build(network, dtype_policy)
    timed, left_out = {"stock": stock}, {}
    for name in FLAGS.methods:
        try:
            timed[name] = converted(stock, name, FLAGS.feedback_maps)
        except ValueError as wrong:
            left_out[name] = one_line(wrong)
    extra = {
        name: bytes_of(model) - bytes_of(stock) for name, model in timed.items()
    }
    batch = random_batch(stock, FLAGS.batch_size)
    for name, model in timed.items():
        compile_alike(model, FLAGS.steps_per_execution)
        callbacks = METHODS[name].callbacks() if name in METHODS else []
        timed[name] = Trainee(model, callbacks, batch, FLAGS.steps)
    predictions, _ = in_turn(
        {
            name: Predictor(trainee.model, batch, FLAGS.steps)
            for name, trainee in timed.items()
        },
        FLAGS.rounds,
    )
    if FLAGS.monitor:
        watched = keras_fa.convert(stock, "fa_usf_sn")
        timed[MONITOR] = Monitor(watched, random_batch(stock, PROBE_SIZE))
    with contextlib.ExitStack() as stack:
        if FLAGS.peer:
            for name, mode in biotorch.MODES.items():
                timed[name] = stack.enter_context(
                    biotorch.BioTorch(
                        stock, mode, FLAGS.batch_size, FLAGS.steps
                    )
                )
        seconds, order = in_turn(timed, FLAGS.rounds)
    profiles = {name: profile(timed[name]) for name in extra if FLAGS.profile}
    operations = operations_of(stock, FLAGS.batch_size)
    rows = []
    for name, times in seconds.items():
        row = {
            "name": name,
            "seconds_per_step": times,
            "median_seconds": statistics.median(times),
            "ratio": spread(times, seconds["stock"]),
        }
        if name != MONITOR:
            row["images_per_second"] = FLAGS.batch_size / row["median_seconds"]
        if name in profiles:
            row["milliseconds_by_operation"] = profiles[name]
        if name in extra:
            row["feedback_bytes"] = extra[name]
            row["seconds_per_prediction"] = predictions[name]
            row["prediction_ratio"] = spread(
                predictions[name], predictions["stock"]
            )
            row["peak_memory_bytes"] = peaks.get(name)
            if FLAGS.peak_tflops:
                speed = operations / row["median_seconds"]
                row["share_of_peak"] = speed / (1e12 * FLAGS.peak_tflops)
        if name in biotorch.COUNTERPARTS:
            ours = seconds.get(biotorch.COUNTERPARTS[name])
            row["ours_is_faster_by"] = ours and spread(times, ours)
        rows.append(row)
    return {
        "network": network,
        "dtype_policy": dtype_policy,
        "input_shape": stock.input_shape[1:],
        "parameters": stock.count_params(),
        "operations_per_step": operations,
        "rows": rows,
        "order": order,
        "left_out": left_out,
    }


def measure_input(photos: Any) -> dict[str, Any]:
    """Times the input of ImageNet.

    Args:
        photos: A `photos.Photos`.

    Returns:
        The entry `input` in the JSON file.
    """
    size = FLAGS.batch_size
    batches = photos.training(
        Share(),
        batch_size=size,
        steps_per_epoch=photos.training_images // size,
        seed=0,
        first_step=0,
        epochs=1_000_000,
    )
    timed = Input(batches, FLAGS.steps)
    times = [timed.block() for _ in range(1 + FLAGS.rounds)][1:]
    median = statistics.median(times)
    return {
        "image_size": INPUT_SIZE,
        "photos": photos.training_images,
        "seconds_per_step": times,
        "median_seconds": median,
        "images_per_second": size / median,
        "images_per_second_and_core": size / median / cores(),
    }


def in_turn(
    timed: dict[str, Any], rounds: int
) -> tuple[dict[str, list[float]], list[list[str]]]:
    """A block of each, again and again.

    Returns:
        The seconds of a step in each round by name, and the order in each.
    """
    for one in timed.values():
        one.block()
    seconds, orders = {name: [] for name in timed}, []
    for index in range(rounds):
        order = list(timed)
        random.Random(index).shuffle(order)
        for name in order:
            seconds[name].append(timed[name].block())
        orders.append(order)
    return seconds, orders


def spread(times: list[float], others: list[float]) -> dict[str, float]:
    """The ratio of times to others in the same rounds, and how it varies."""
    ratios = [a / b for a, b in zip(times, others)]
    first, median, third = statistics.quantiles(ratios, method="inclusive")
    return {
        "median": median,
        "first_quartile": first,
        "third_quartile": third,
        "n": len(ratios),
    }
