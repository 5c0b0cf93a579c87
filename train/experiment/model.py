"""A network under a method, compiled with its optimizer.

An optimizer is added as one entry of `OPTIMIZERS`.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import keras

import keras_fa
from experiment import networks
from experiment.datasets import DATASETS
from experiment.errors import UserError
from experiment.networks.fused import fuse
from keras_fa.alignment import named_paths
from keras_fa.constraints import Chain
from keras_fa.constraints import FixedSign
from keras_fa.constraints import SignConcordance
from keras_fa.constraints import parts_of
from keras_fa.methods import METHODS
from keras_fa.methods import Method

# A metric of the model, and what its error is called in result.json.
ACCURACIES = {"accuracy": "error", "top5_accuracy": "top5_error"}


class Optimizer(NamedTuple):
    """An optimizer: what makes it, and its defaults.

    Attributes:
        make: A function of the model, a learning rate and a weight decay.
        learning_rate: Default.
        weight_decay: Default.
    """

    make: Callable[..., keras.optimizers.Optimizer]
    learning_rate: float
    weight_decay: float = 0.0


def _adam(model: keras.Model, **options: object) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(**options)


def _sgd(model: keras.Model, **options: object) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(momentum=0.9, **options)


def _muon(model: keras.Model, **options: object) -> keras.optimizers.Optimizer:
    # Of the whole layer: feedback that learns takes its kernel's steps.
    readout = [*named_paths(model).values()][-1].kernel.path.rpartition("/")[0]
    return keras_fa.optimizers.Muon(
        **options,
        adam_weight_decay=options["weight_decay"],
        exclude_layers=[f"^{re.escape(readout)}/"],
    )


OPTIMIZERS = {
    "adam": Optimizer(_adam, 1e-3),
    "adamw": Optimizer(_adam, 1e-3, 0.004),
    "sgd": Optimizer(_sgd, 0.05),
    "muon": Optimizer(_muon, 1e-3),
}


def build(config: SimpleNamespace) -> keras.Model:
    """The network under the method, which takes the data set's raw images."""
    dataset = DATASETS[config.dataset]
    network = networks.NETWORKS[config.model]
    stock = networks.build(
        config.model,
        dataset.classes,
        dataset.preprocessing(network.input_shape, network.pad),
        kernel_scale=config.kernel_scale,
        dropout=config.dropout,
        normalization=config.normalization,
        image_size=config.image_size,
        # JAX's batches are global ones.
        synchronized=config.strategy != "none" and config.backend != "jax",
    )
    method = scaled(METHODS[config.method], config.feedback_scale)
    if config.fixed_signs == "unit":
        method = signs_by_unit(method)
    try:
        with warnings.catch_warnings():
            # The weights have just been drawn, and nobody knows them.
            warnings.filterwarnings("ignore", r"FixedSign\(per='unit'\)")
            model = keras_fa.convert(
                stock, method, feedback_maps=config.feedback_maps
            )
    except ValueError as error:  # a rule that a layer lacks, maps too large
        named = "method" if method.wiring == "chain" else "feedback_maps"
        raise UserError(
            f"--{named}={getattr(config, named)}: {error}"
        ) from error
    if config.backend == "tensorflow":
        fuse(model)
    if config.backend == "jax":
        # RandomTranslation denies it because of TensorFlow, whose XLA lacks
        # an operation; JAX compiles all that it can run.
        for layer in model.layers:
            layer.supports_jit = True
    return model


def parameters(model: keras.Model) -> int:
    """How many the network learns, those included that its method freezes."""
    kernels = [path.kernel for path in named_paths(model).values()]
    counted = {id(v): v for v in (*model.trainable_variables, *kernels)}
    return sum(math.prod(variable.shape) for variable in counted.values())


def draws(method: Method) -> bool:
    """Whether errors are sent through feedback that is drawn at the start."""
    fixed = isinstance(method.feedback_constraint, SignConcordance)
    return (
        method.wiring != "chain"
        or (fixed and not method.feedback_constraint.strict)
        or (method.feedback_constraint is method.feedback_initializer is None)
    )


def learns_between_steps(method: Method) -> bool:
    """Whether its feedback learns from a callback, after a training step."""
    learning = method.feedback_learning
    return learning is not None and not learning.in_step


def takes_units(method: Method) -> bool:
    """Whether it fixes signs, and learns something where units have them.

    Not under feedback of one magnitude, as `FeedbackPath.warn_if_equal` says.
    """
    rule = method.feedback_constraint
    return not (isinstance(rule, SignConcordance) and rule.strict) and any(
        isinstance(part, FixedSign)
        for part in parts_of(method.kernel_constraint)
    )


def signs_by_unit(method: Method) -> Method:
    """The method whose fixed signs are those of presynaptic units."""
    parts = [
        FixedSign(per="unit", silent_zeros=part.silent_zeros)
        if isinstance(part, FixedSign)
        else part
        for part in parts_of(method.kernel_constraint)
    ]
    return dataclasses.replace(method, kernel_constraint=Chain(parts))


def scaled(method: Method, scale: float) -> Method:
    """The method whose random feedback is drawn `scale` times as large.

    B_0 is then `scale` times he_normal, whatever W_0 is; the maps of direct
    errors are `scale` times what they are by default.
    """
    if scale == 1:
        return method
    if method.wiring == "chain":
        return dataclasses.replace(
            method,
            feedback_initializer=keras.initializers.VarianceScaling(
                2.0 * scale**2, "fan_in", "truncated_normal"
            ),
        )
    maps = keras.initializers.get(method.map_initializer)
    return dataclasses.replace(
        method,
        map_initializer=keras.initializers.VarianceScaling(
            maps.scale * scale**2, maps.mode, maps.distribution
        ),
    )


def learning_rate(
    config: SimpleNamespace, steps_per_epoch: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """A linear warm-up, then half a cosine down to 0 at the last step."""
    steps = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else config.learning_rate,
        decay_steps=steps - warmup,
        warmup_target=config.learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def compile_model(
    model: keras.Model, config: SimpleNamespace, steps_per_epoch: int
) -> None:
    """Compiles a model with the optimizer, the loss and the metrics."""
    optimizer = OPTIMIZERS[config.optimizer].make(
        model,
        learning_rate=learning_rate(config, steps_per_epoch),
        weight_decay=config.weight_decay or None,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if config.label_smoothing:
        loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.label_smoothing
        )
        first = keras.metrics.CategoricalAccuracy
        five = keras.metrics.TopKCategoricalAccuracy
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        first = keras.metrics.SparseCategoricalAccuracy
        five = keras.metrics.SparseTopKCategoricalAccuracy
    made = {
        "accuracy": lambda name: first(name=name),
        "top5_accuracy": lambda name: five(k=5, name=name),
    }
    model.compile(
        optimizer,
        loss=loss,
        weighted_metrics=[made[name](name) for name in metrics_of(config)],
        jit_compile=config.jit_compile,
        steps_per_execution=config.steps_per_execution,
    )
    # Else the first step makes its variables, and TensorFlow traces it twice.
    model.optimizer.build(model.trainable_variables)


def metrics_of(config: SimpleNamespace) -> list[str]:
    """Those of `ACCURACIES` that tell something with so many classes."""
    few = DATASETS[config.dataset].classes <= 10
    return [*ACCURACIES][: 1 if few else 2]
