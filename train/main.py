"""Trains a network on a data set by one of the methods of the paper.

From the root of the project:

    python train/main.py --flagfile=digits_usf.flags
    python train/main.py --dataset=mnist --method=fa --download
    python train/main.py --helpfull

A bare flagfile name is looked up in the current folder, then in train/flags.
Flags given after a flagfile win over it. The run is written to the folder
<runs_dir>/<dataset>-<model>-<method>-s<seed>; runs.py says what is in it.
"""

import startup  # before anything imports Keras

# isort: split
import dataclasses
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commandline
import data
import keras
import models
import runs
from absl import flags
from errors import Diverged
from errors import Stopped
from errors import UserError
from strategies import STRATEGIES
from strategies import OneDevice

import keras_fa
from keras_fa.callbacks import AlignmentMonitor
from keras_fa.constraints import SignConcordance
from keras_fa.methods import METHODS
from keras_fa.methods import Method

PROBE_SIZE = 256
EVALUATION_BATCH_SIZE = 256
PHOTO_PROBE_SIZE = 64  # of 224x224 pixels, on one device
# A metric of the model, and what its error is called in result.json.
ACCURACIES = {"accuracy": "error", "top5_accuracy": "top5_error"}

# Settings that change nothing of what is learned, and may change on the way.
NO_RECIPE = (
    "data_dir",
    "download",
    "runs_dir",
    "resume",
    "test",
    "checkpoint_minutes",
    "keep_checkpoints",
)

# name: class, default learning rate, default weight decay
OPTIMIZERS = {
    "adam": (keras.optimizers.Adam, 1e-3, 0.0),
    "adamw": (keras.optimizers.Adam, 1e-3, 0.004),
    "sgd": (
        lambda **options: keras.optimizers.SGD(momentum=0.9, **options),
        0.05,
        0.0,
    ),
}

flags.DEFINE_enum(
    "dataset",
    "digits",
    list(data.DATASETS),
    "Data set. digits comes with scikit-learn, the others are read from "
    "--data_dir.",
)
flags.DEFINE_enum(
    "model",
    None,
    list(models.NETWORKS),
    "Network; the data set's own by default.",
)
flags.DEFINE_enum(
    "method",
    "fa_usf_sn",
    list(METHODS),
    "How errors are sent back; the rows of the paper's table. The default is "
    "sign-concordant feedback with strict normalisation, its best one.",
)
flags.DEFINE_integer(
    "epochs",
    None,
    "Passes over the training data, 1 to 100000. By default "
    + ", ".join(f"{d.epochs} on {n}" for n, d in data.DATASETS.items())
    + ".",
    lower_bound=1,
    upper_bound=100_000,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Images per step, over all replicas, at least 1. By default "
    + ", ".join(f"{d.batch_size} on {n}" for n, d in data.DATASETS.items())
    + ".",
    lower_bound=1,
)
flags.DEFINE_enum(
    "optimizer",
    None,
    list(OPTIMIZERS),
    "Optimiser; sgd has momentum 0.9, adamw is adam with weight decay. By "
    "default "
    + ", ".join(f"{d.optimizer} on {n}" for n, d in data.DATASETS.items())
    + ".",
)
flags.DEFINE_float(
    "learning_rate",
    None,
    "Learning rate at its height, above 0; it falls to 0 along half a cosine. "
    "By default "
    + ", ".join(f"{v[1]} for {n}" for n, v in OPTIMIZERS.items())
    + ".",
)
flags.DEFINE_float(
    "warmup_epochs",
    None,
    "Epochs over which the learning rate rises from 0 at the start, at least "
    "0; shortened to the run where it is longer. By default "
    + ", ".join(f"{d.warmup_epochs} on {n}" for n, d in data.DATASETS.items())
    + ".",
)
flags.DEFINE_float(
    "weight_decay",
    None,
    "At least 0. Each step takes learning rate x weight decay off every "
    "kernel (decoupled from the gradient; biases are left alone). By default "
    + ", ".join(f"{v[2]} for {n}" for n, v in OPTIMIZERS.items())
    + ".",
)
flags.DEFINE_float(
    "kernel_scale",
    runs.DEFAULTS["kernel_scale"],
    "The kernels start as this many times he_normal, above 0.",
)
flags.DEFINE_float(
    "feedback_scale",
    runs.DEFAULTS["feedback_scale"],
    "Fixed random feedback starts as this many times what it is by default, "
    "above 0: B_0 times he_normal, or the fixed maps of DFA and DenseFA.",
)
flags.DEFINE_enum(
    "feedback_maps",
    runs.DEFAULTS["feedback_maps"],
    ["dense", "convolutional"],
    "Form of the fixed maps of DFA and DenseFA. dense: a matrix between two "
    "feature maps; convolutional: a small kernel, shared in space.",
)
flags.DEFINE_float(
    "dropout",
    runs.DEFAULTS["dropout"],
    "Rate at which the inputs of the readout are dropped in training, from 0 "
    "to below 1; not for cifar10_2 and imagenet_2, which have dropout of their "
    "own.",
)
flags.DEFINE_enum(
    "normalization",
    runs.DEFAULTS["normalization"],
    ["none", "batch"],
    "batch: BatchNormalization in front of the ReLU of each hidden layer with "
    "a kernel, in place of its bias; not for the residual networks, which have "
    "it anyway.",
)
flags.DEFINE_float(
    "label_smoothing",
    runs.DEFAULTS["label_smoothing"],
    "Share of a label that is spread evenly over all classes in the loss, "
    "from 0 to below 1.",
)
flags.DEFINE_integer(
    "image_size",
    runs.DEFAULTS["image_size"],
    "Height and width that photos are resized to, in pixels, on imagenet2012 "
    "alone; by default 224.",
    lower_bound=8,
    upper_bound=2048,
)
flags.DEFINE_float(
    "crop_area",
    runs.DEFAULTS["crop_area"],
    "Least share of a photo's area that its window has in training, above 0 "
    "and at most 1, on imagenet2012 alone; by default 0.08.",
)
flags.DEFINE_bool(
    "test",
    True,
    "Whether to look at the test images, once, at the end. A search for "
    "settings does not, and goes by the validation error. ImageNet's test "
    "error is that of its validation photos; with --notest a hundredth of "
    "the training photos is held out in their place.",
)
flags.DEFINE_integer(
    "seed",
    0,
    "Of weights, feedback, order and augmentation, 0 to 2147483647. The "
    "split of the data does not depend on it.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder that holds <dataset>.npz, as train/export.py writes it, or else "
    "one of TensorFlow Datasets, as imagenet2012 needs; the default is that "
    "of the latter ($TFDS_DATA_DIR or ~/tensorflow_datasets).",
)
flags.DEFINE_bool(
    "download",
    False,
    "Whether to fetch a data set that --data_dir does not hold.",
)
flags.DEFINE_string("runs_dir", "runs", "Folder in which run folders are made.")
flags.DEFINE_bool(
    "resume",
    False,
    "Whether to continue the run if its folder exists: an unfinished one "
    "from its last checkpoint, a finished one if --epochs is larger.",
)
flags.DEFINE_float(
    "checkpoint_minutes",
    30.0,
    "Minutes after which a checkpoint is written inside an epoch, at least 0; "
    "0: only at the end of each epoch, and when the run is asked to end by "
    "SIGTERM.",
)
flags.DEFINE_integer(
    "keep_checkpoints",
    2,
    "Number of last checkpoints that are kept, 1 to 100: model.keras, "
    "model.1.keras, ...",
    lower_bound=1,
    upper_bound=100,
)
flags.DEFINE_enum(
    "strategy",
    runs.DEFAULTS["strategy"],
    list(STRATEGIES),
    "none: one device. On TensorFlow also mirrored: all GPUs of this machine, "
    "or its CPU; multi_worker: those of all machines in the environment "
    "variable TF_CONFIG, each of which runs this command; tpu: a TPU.",
)
flags.DEFINE_string(
    "tpu",
    runs.DEFAULTS["tpu"],
    "With --strategy=tpu: the TPU's name or grpc:// address; by default local, "
    "that of the TPU VM this runs on.",
)
flags.DEFINE_integer(
    "virtual_devices",
    runs.DEFAULTS["virtual_devices"],
    "With --strategy=mirrored: number of logical devices to split the GPU or "
    "CPU into, at least 0; 0 splits nothing.",
    lower_bound=0,
    upper_bound=64,
)
flags.DEFINE_enum(
    "dtype_policy",
    runs.DEFAULTS["dtype_policy"],
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Keras's dtype policy of the model.",
)
flags.DEFINE_bool(
    "jit_compile",
    None,
    "Whether to compile the training step with XLA. By default not on "
    "TensorFlow; JAX always does.",
)
flags.DEFINE_integer(
    "steps_per_execution",
    runs.DEFAULTS["steps_per_execution"],
    "Training steps per call of the compiled function, at least 1. An epoch "
    "is rounded down to a multiple of them, an evaluation filled up.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "alignment_every",
    0,
    "Measure the alignment of every layer after each so many epochs, at "
    "least 0; 0 is never.",
    lower_bound=0,
)
for _name in ("learning_rate", "kernel_scale", "feedback_scale"):
    flags.register_validator(
        _name,
        lambda value: value is None or 0 < value < math.inf,
        "it must be a finite number above 0",
    )
for _name in ("dropout", "label_smoothing"):
    flags.register_validator(
        _name,
        lambda value: 0 <= value < 1,
        "it must be a number from 0 to below 1",
    )
flags.register_validator(
    "crop_area",
    lambda value: value is None or 0 < value <= 1,
    "it must be a number above 0 and at most 1",
)
for _name in ("warmup_epochs", "weight_decay", "checkpoint_minutes"):
    flags.register_validator(
        _name,
        lambda value: value is None or 0 <= value < math.inf,
        "it must be a finite number, at least 0",
    )

FLAGS = flags.FLAGS


def settings() -> SimpleNamespace:
    """The flags; where none is given, the data set's and optimiser's own."""
    names = """dataset model method epochs batch_size optimizer learning_rate
        warmup_epochs weight_decay kernel_scale feedback_scale feedback_maps
        dropout test seed data_dir download runs_dir resume
        checkpoint_minutes keep_checkpoints strategy tpu virtual_devices
        dtype_policy jit_compile steps_per_execution alignment_every
        label_smoothing image_size crop_area normalization""".split()
    chosen = SimpleNamespace(**{name: FLAGS[name].value for name in names})
    chosen.backend = keras.backend.backend()
    if chosen.jit_compile is None:
        chosen.jit_compile = chosen.backend == "jax"
    dataset = data.DATASETS[chosen.dataset]
    defaults = {
        name: getattr(dataset, name)
        for name in (
            "model",
            "epochs",
            "batch_size",
            "optimizer",
            "warmup_epochs",
        )
    }
    for name, value in defaults.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    _, learning_rate, weight_decay = OPTIMIZERS[chosen.optimizer]
    if chosen.learning_rate is None:
        chosen.learning_rate = learning_rate
    if chosen.weight_decay is None:
        chosen.weight_decay = weight_decay
    return chosen


def check(config: SimpleNamespace) -> None:
    """Refuses settings that do not go together."""
    image_shape = data.DATASETS[config.dataset].image_shape
    network = models.NETWORKS[config.model]
    if network.image_shape != image_shape:
        fitting = [
            name
            for name, network in models.NETWORKS.items()
            if network.image_shape == image_shape
        ]
        raise UserError(
            f"--model={config.model} does not fit the {image_shape} images of "
            f"--dataset={config.dataset}. Choose --model={'|'.join(fitting)}, "
            "or another data set."
        )
    if config.dropout and not network.drops:
        raise UserError(
            f"--dropout={config.dropout}: {config.model} has dropout of its "
            "own. Leave it out, or choose another --model."
        )
    if config.normalization != "none" and network.normalizes:
        raise UserError(
            f"--normalization={config.normalization}: {config.model} has "
            "BatchNormalization of its own. Leave it out, or choose another "
            "--model."
        )
    wiring = METHODS[config.method].wiring
    if config.feedback_maps != "dense" and wiring == "chain":
        raise UserError(
            f"--feedback_maps={config.feedback_maps}: {config.method} has no "
            "fixed maps. Leave it out, or choose --method=dfa|dense_fa."
        )
    if config.feedback_scale != 1 and not _draws(METHODS[config.method]):
        drawing = [name for name, method in METHODS.items() if _draws(method)]
        raise UserError(
            f"--feedback_scale={config.feedback_scale}: {config.method} has no "
            "fixed random feedback to scale. Leave it out, or choose "
            f"--method={'|'.join(drawing)}."
        )
    for name in ("image_size", "crop_area"):
        value = getattr(config, name)
        if value is not None and not network.resizable:
            raise UserError(
                f"--{name}={value}: the images of {config.dataset} have a size "
                "of their own. Leave it out."
            )
    if config.virtual_devices and config.strategy != "mirrored":
        raise UserError(
            f"--virtual_devices={config.virtual_devices} are replicas of one "
            "machine. Add --strategy=mirrored, or leave it out."
        )
    if config.tpu is not None and config.strategy != "tpu":
        raise UserError(
            f"--tpu={config.tpu} needs --strategy=tpu. Add it, or leave it out."
        )
    remote = config.tpu not in (None, "local")
    if remote and data.DATASETS[config.dataset].load is not None:
        raise UserError(
            f"--tpu={config.tpu}: {config.dataset} is fed from this machine's "
            "memory, which a remote TPU cannot read. Run it on the TPU VM "
            "itself, with --tpu=local, or choose --dataset=imagenet2012."
        )
    cropped = network.input_shape != network.image_shape
    if config.backend == "jax":
        if config.strategy != "none":
            raise UserError(
                f"--strategy={config.strategy} is TensorFlow's, and Keras runs "
                "on jax. Set KERAS_BACKEND=tensorflow, or leave it out."
            )
        if not config.jit_compile:
            raise UserError(
                "--nojit_compile: JAX always compiles. Leave it out, or set "
                "KERAS_BACKEND=tensorflow."
            )
    elif config.strategy != "none" and config.jit_compile:
        raise UserError(
            f"--jit_compile does not work under --strategy={config.strategy}, "
            "and a TPU compiles anyway. Leave one of the two out."
        )
    elif cropped and (config.jit_compile or config.strategy == "tpu"):
        flag = "--jit_compile" if config.jit_compile else "--strategy=tpu"
        raise UserError(
            f"{flag}: TensorFlow cannot compile the random windows that "
            f"--model={config.model} sees with XLA. Leave it out, or set "
            "KERAS_BACKEND=jax."
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


def run_folder(config: SimpleNamespace) -> Path:
    """Where a run is written."""
    return Path(config.runs_dir).expanduser() / (
        f"{config.dataset}-{config.model}-{config.method}-s{config.seed}"
    )


def train(config: SimpleNamespace) -> None:
    """The experiment, from the devices to the report.

    Of several workers each does this, and the chief alone uses the folder.
    """
    check(config)
    folder = run_folder(config)
    try:
        placement = STRATEGIES[config.strategy](
            config.virtual_devices, config.tpu
        )
        # After that: TensorFlow's workers hear SIGTERM themselves.
        with runs.Termination() as termination, ExitStack() as stack:
            stack.enter_context(placement.watched())
            train_in(folder, config, placement, termination, stack)
    except Stopped as stopped:
        print(stopped, flush=True)


def train_in(
    folder: Path,
    config: SimpleNamespace,
    placement: OneDevice,
    termination: runs.Termination,
    stack: ExitStack,
) -> None:
    """The experiment on its devices, in a folder that `stack` keeps."""
    progress = runs.Progress()

    def begin() -> dict[str, Any]:
        nonlocal progress, make_folder
        make_folder = stack.enter_context(runs.held(folder))
        progress = runs.look(folder, vars(config), config.resume)
        return {"progress": progress.told(), "settings": recipe}

    def stop_if_asked(batch: int = 0, logs: Any = None) -> None:
        if placement.agree(termination.asked):
            raise Stopped(f"{folder}: stopped; go on with --resume.")

    make_folder = None
    recipe = {
        name: value
        for name, value in vars(config).items()
        if name not in NO_RECIPE
    }
    told = placement.tell(begin)
    others = [n for n, value in recipe.items() if told["settings"][n] != value]
    if placement.agree(bool(others)):
        named = ", ".join(f"--{name}" for name in others) or "other flags"
        raise UserError(
            f"The workers were started with different flags (here: {named}). "
            "Start all of them with the same command."
        )
    if not placement.chief:
        progress = runs.Progress.of(told["progress"])
    if progress.result is not None and progress.epoch >= config.epochs:
        print(f"{folder}: finished already, after {progress.epoch} epochs.")
        report(folder, progress.result)
        return
    if config.batch_size % placement.replicas:
        raise UserError(
            f"--batch_size={config.batch_size} cannot be shared by "
            f"{placement.replicas} replicas. Give a multiple of "
            f"{placement.replicas}."
        )
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.dtype_policy)

    # Data.
    source = images(config)
    recipe["training_images"] = source.training_images
    recipe["workers"] = placement.workers
    runs.check_data(folder, progress, recipe)
    source.skipped.update(progress.skipped)
    steps_per_epoch = source.training_images // config.batch_size
    steps_per_epoch -= steps_per_epoch % config.steps_per_execution
    if not steps_per_epoch:
        raise UserError(
            f"--batch_size={config.batch_size} with --steps_per_execution="
            f"{config.steps_per_execution} needs more than the "
            f"{source.training_images} training images of {config.dataset}. "
            "Give smaller ones."
        )

    def training(first_step: int) -> Any:
        return placement.feed(
            lambda share: source.training(
                share,
                batch_size=config.batch_size,
                steps_per_epoch=steps_per_epoch,
                seed=config.seed,
                first_step=first_step,
                epochs=config.epochs,
            )
        )

    def evaluation(batches: Callable[..., Any], number: int) -> dict[str, Any]:
        batch_size, steps = data.evaluation_steps(
            number,
            EVALUATION_BATCH_SIZE,
            placement.replicas,
            config.steps_per_execution,
        )
        return {
            "x": placement.feed(
                lambda share: batches(share, batch_size, steps)
            ),
            "steps": steps,
        }

    # Model and optimiser.
    with placement.scope():
        model = build(config)
    model = placement.adopt(
        model, lambda model: compile_model(model, config, steps_per_epoch)
    )
    if progress.checkpoint is not None:
        placement.tell(lambda: runs.restore(progress, model))
        placement.spread(model)

    # Training.
    stop_if_asked()
    placement.tell(lambda: make_folder())
    done = f"{progress.epoch} of {config.epochs} epochs are trained"
    if progress.partial.step:
        done += f", and {progress.partial.step} of {steps_per_epoch} steps"
    tested = source.test_images if config.test else 0
    print(
        f"{config.method} on {config.dataset}: {source.training_images} "
        f"training, {source.validation_images} validation and {tested} test "
        f"images; {done}."
    )
    if progress.lengths and progress.lengths[-1] != config.epochs:
        progress.lengths.append(config.epochs)
    if len(progress.lengths) > 1:
        # Not what a run of this length in one piece would have been.
        recipe["lengths"] = progress.lengths
    with source.reading(), runs.written_to(folder, progress):
        callbacks = METHODS[config.method].callbacks()
        monitor = None
        if placement.chief:
            watching, monitor = watchers(folder, recipe, config, source)
            callbacks += watching
        callbacks += [
            keras.callbacks.TerminateOnNaN(),
            runs.RunWriter(
                folder,
                recipe,
                progress,
                examples_per_epoch=steps_per_epoch * config.batch_size,
                metrics=metrics_of(config),
                monitor=monitor,
                minutes=config.checkpoint_minutes,
                keep=config.keep_checkpoints,
                skipped=source.skipped,
                terminated=lambda: termination.asked,
                agree=placement.agree,
                writes=placement.chief,
            ),
        ]
        validation = evaluation(source.validation, source.validation_images)
        try:
            while progress.epoch < config.epochs:
                fit(
                    model,
                    progress,
                    callbacks,
                    training,
                    validation,
                    steps_per_epoch,
                    config.epochs,
                    verbose=placement.chief,
                )
        except (Stopped, Diverged):
            for callback in callbacks:
                callback.on_train_end()
            raise

        # Report. This is the only use of the test images.
        stop_if_asked()
        last = progress.rows[-1]
        tests = {}
        if config.test and source.test_images:
            tests = model.evaluate(
                **evaluation(source.test, source.test_images),
                callbacks=[
                    keras.callbacks.LambdaCallback(
                        on_test_batch_end=stop_if_asked
                    )
                ],
                verbose=0,
                return_dict=True,
            )
        elif config.test:
            # ImageNet's test labels are not public.
            tests = {name: last[f"val_{name}"] for name in ACCURACIES}
        skipped = placement.gather(sorted(source.skipped))
        if not placement.chief:
            return
        result = {
            **recipe,
            **errors("test", tests),
            **errors("train", last),
            **errors("validation", last, "val_"),
            "seconds": round(progress.seconds, 2),
            "examples_per_second": round(progress.examples_per_second, 1),
            "steps_per_epoch": steps_per_epoch,
            "replicas": placement.replicas,
            "skipped_images": sorted(set().union(*skipped)),
            "parameters": sum(
                math.prod(variable.shape)
                for variable in model.trainable_variables
            ),
            "versions": startup.versions("keras_fa", "keras", config.backend),
        }
        if startup.installed("tensorflow", "tensorboard"):
            import board

            board.finish(folder, result)
        runs.write_result(folder, result)
    report(folder, result)


def images(config: SimpleNamespace) -> Any:
    """The images of a run, in memory or as a stream."""
    dataset = data.DATASETS[config.dataset]
    if dataset.load is not None:
        return data.Arrays(
            dataset.load(config.data_dir, config.download),
            dataset.classes if config.label_smoothing else None,
        )
    if config.download:
        raise UserError(
            f"--download: {config.dataset} cannot be fetched without an "
            "account. Leave it out, and prepare it as TensorFlow Datasets "
            "describes for --data_dir."
        )
    if not startup.installed("tensorflow", "tensorflow_datasets"):
        raise UserError(
            f"--dataset={config.dataset} is read by TensorFlow Datasets. "
            "Install tensorflow and tensorflow-datasets."
        )
    import photos

    return photos.Photos(
        config.data_dir,
        config.image_size or dataset.image_shape[0],
        hold_out=not config.test,
        one_hot=bool(config.label_smoothing),
        crop_area=config.crop_area or photos.CROP_AREA,
    )


def compile_model(
    model: keras.Model, config: SimpleNamespace, steps_per_epoch: int
) -> None:
    """Compiles a model with the optimiser, the loss and the metrics."""
    optimizer = OPTIMIZERS[config.optimizer][0](
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


def metrics_of(config: SimpleNamespace) -> list[str]:
    """Those of `ACCURACIES` that tell something with so many classes."""
    few = data.DATASETS[config.dataset].classes <= 10
    return [*ACCURACIES][: 1 if few else 2]


def watchers(
    folder: Path, recipe: dict[str, Any], config: SimpleNamespace, source: Any
) -> tuple[list[keras.callbacks.Callback], AlignmentMonitor | None]:
    """The callbacks that look on, and the monitor of alignment among them."""
    curves = startup.installed("tensorflow", "tensorboard")
    streamed = data.DATASETS[config.dataset].load is None
    callbacks, monitor = [], None
    if config.alignment_every:
        monitor = AlignmentMonitor(
            probe=tuple(
                source.probe(PHOTO_PROBE_SIZE if streamed else PROBE_SIZE)
            ),
            log_dir=str(folder) if curves else None,
            every=config.alignment_every,
        )
        callbacks.append(monitor)
    if curves:
        from board import Board

        callbacks += [
            keras.callbacks.TensorBoard(str(folder), write_graph=False),
            Board(folder, recipe, config.alignment_every),
        ]
    else:
        print("No TensorBoard files: tensorflow or tensorboard is missing.")
    return callbacks, monitor


def fit(
    model: keras.Model,
    progress: runs.Progress,
    callbacks: list[keras.callbacks.Callback],
    training: Callable[[int], Any],
    validation: dict[str, Any],
    steps_per_epoch: int,
    epochs: int,
    verbose: bool,
) -> None:
    """Trains to the end, or, where an epoch was left inside, to its end.

    Args:
        model: The compiled model.
        progress: How far it is; the `RunWriter` among the callbacks adds to it.
        callbacks: Of the training.
        training: Gives the batches from a step on, counted over all epochs.
        validation: Batches and steps of the evaluation after each epoch.
        steps_per_epoch: Steps in a whole epoch.
        epochs: The number of the last epoch.
        verbose: Whether to tell how it goes.
    """
    done = progress.partial.step
    if done == steps_per_epoch:
        runs.finish_epoch(
            model,
            progress,
            callbacks,
            lambda events: model.evaluate(
                **validation, callbacks=events, verbose=0, return_dict=True
            ),
        )
        return
    if done:
        # It makes the metrics' variables, whose values are then put back.
        model.evaluate(
            validation["x"], steps=model.steps_per_execution, verbose=0
        )
    model.fit(
        training(progress.epoch * steps_per_epoch + done),
        validation_data=validation["x"],
        validation_steps=validation["steps"],
        epochs=epochs,
        initial_epoch=progress.epoch,
        steps_per_epoch=steps_per_epoch - done,
        callbacks=callbacks,
        shuffle=False,
        verbose=(1 if sys.stdout.isatty() else 2) if verbose else 0,
    )


def build(config: SimpleNamespace) -> keras.Model:
    """The network under the method, which takes the data set's raw images."""
    dataset = data.DATASETS[config.dataset]
    network = models.NETWORKS[config.model]
    stock = models.build(
        config.model,
        dataset.classes,
        data.preprocessing(dataset, network.input_shape),
        kernel_scale=config.kernel_scale,
        dropout=config.dropout,
        normalization=config.normalization,
        image_size=config.image_size,
        synchronized=config.strategy != "none",
    )
    method = scaled(METHODS[config.method], config.feedback_scale)
    try:
        model = keras_fa.convert(
            stock, method, feedback_maps=config.feedback_maps
        )
    except ValueError as error:  # maps that are too large
        raise UserError(
            f"--feedback_maps={config.feedback_maps}: {error}"
        ) from error
    if config.backend == "jax":
        # RandomTranslation denies it because of TensorFlow, whose XLA lacks
        # an operation; JAX compiles all that it can run.
        for layer in model.layers:
            layer.supports_jit = True
    return model


def _draws(method: Method) -> bool:
    """Whether errors are sent through feedback that is random and fixed."""
    fixed = isinstance(method.feedback_constraint, SignConcordance)
    return (
        method.wiring != "chain"
        or (fixed and not method.feedback_constraint.strict)
        or method.feedback_constraint is None
    )


def scaled(method: Method, scale: float) -> Method:
    """The method whose fixed random feedback is drawn `scale` times as large.

    B_0 is then `scale` times he_normal, whatever W_0 is; the fixed maps of DFA
    and DenseFA are `scale` times what they are by default.
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


def error(accuracy: float) -> float:
    """The share of wrong answers in percent."""
    return round(100 * (1 - accuracy), 4)


def errors(
    part: str, metrics: dict[str, float], prefix: str = ""
) -> dict[str, float | None]:
    """The entries of `result.json` on a part of the data.

    Args:
        part: As it is called there.
        metrics: The accuracies; if there are none, it was not looked at.
        prefix: Of their names.
    """
    found = {
        f"{part}_{kind}": error(metrics[prefix + name])
        for name, kind in ACCURACIES.items()
        if prefix + name in metrics
    }
    return found or {f"{part}_error": None}


def report(folder: Path, result: dict) -> None:
    """The last words on the console."""
    if result["test_error"] is None:
        print("The test images were not looked at.")
    else:
        print(f"Test error {result['test_error']:.2f} %{_top5(result)}.")
    print(
        f"Training error {result['train_error']:.2f} %, validation error "
        f"{result['validation_error']:.2f} % after {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s."
    )
    if result.get("skipped_images"):
        print(f"{len(result['skipped_images'])} images did not decode.")
    print(f"Run folder: {folder}")
    if startup.installed("tensorboard"):
        print(f"Curves: tensorboard --logdir {folder.parent}")


def _top5(result: dict) -> str:
    if result.get("test_top5_error") is None:
        return ""
    return f", top-5 {result['test_top5_error']:.2f} %"


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv,
        FLAGS,
        lambda: train(settings()),
        __doc__,
        "--resume continues.",
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
