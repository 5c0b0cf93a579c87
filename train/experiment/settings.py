"""The settings of a run: one table, from which all else follows.

Flags of main.py with their bounds and help, what a run folder is named after,
what a run that goes on has to share with the one that was left, what the runs
of a cell share, the columns of TensorBoard's page "HParams": a new setting is
one row here, and its use.
"""

import dataclasses
import enum
import functools
from collections.abc import Collection
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import keras
from absl import flags

from experiment import commandline
from experiment.datasets import DATASETS
from experiment.devices import STRATEGIES
from experiment.errors import UserError
from experiment.model import OPTIMIZERS
from experiment.model import draws
from experiment.model import learns_between_steps
from experiment.model import takes_units
from experiment.networks import NETWORKS
from keras_fa.methods import METHODS


class Role(enum.Enum):
    """What a setting is there for.

    Those of the first three are in `result.json`; all workers share them.
    """

    NAMING = "names the run's folder"
    RECIPE = "decides what is learned: the runs of a cell share it"
    EXECUTION = "how it is computed: runs of one cell may differ in it"
    PLACE = "where from, where to, how long: may change on the way"


@dataclasses.dataclass(frozen=True)
class Of:
    """A default that is an attribute of what another setting chooses.

    Args:
        setting: The other one.
        entries: What it chooses from, by name.
        attribute: Of an entry.
    """

    setting: str
    entries: Mapping[str, Any]
    attribute: str

    def value(self, config: Mapping[str, Any]) -> Any:
        """The default beside other settings."""
        return getattr(self.entries[config[self.setting]], self.attribute)

    def __str__(self) -> str:
        word = "on" if self.setting == "dataset" else "for"
        return ", ".join(
            f"{getattr(entry, self.attribute)} {word} {name}"
            for name, entry in self.entries.items()
            if getattr(entry, self.attribute) is not None
        )


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the table.

    Args:
        role: What it is there for.
        name: The flag's, without dashes.
        kind: `bool`, `int`, `float` or `str`, or the names to choose from.
        default: Its value where none is given, or an `Of`; a run that is older
            than the setting was made with this, too.
        help: A sentence on what it does, and what more there is to say.
        bounds: An interval, such as "[0, 1)".
        kept: Whether a run goes on with the value that it was begun with. By
            default what is learned and where it is written.
        flag: Whether it is a flag.
    """

    role: Role
    name: str
    kind: type | Collection[str]
    default: Any
    help: str
    bounds: str = ""
    kept: bool | None = None
    flag: bool = True

    @property
    def fixed(self) -> bool:
        """Whether a run goes on with the value that it was begun with."""
        if self.kept is None:
            return self.role in (Role.NAMING, Role.RECIPE)
        return self.kept

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers."""
        return self.kind in (int, float)

    def allows(self, value: Any) -> bool:
        """Whether a value lies within the bounds."""
        if value is None or not self.bounds:
            return True
        low, high = map(float, self.bounds[1:-1].split(","))
        above = value >= low if self.bounds[0] == "[" else value > low
        below = value <= high if self.bounds[-1] == "]" else value < high
        return above and below

    @property
    def limits(self) -> str:
        """The bounds in words."""
        low, high = self.bounds[1:-1].split(", ")
        least = f"at least {low}" if self.bounds[0] == "[" else f"above {low}"
        if high == "inf":
            return least
        if self.bounds[-1] == ")":
            return f"from {low} to below {high}"
        if self.bounds[0] == "(":
            return f"{least} and at most {high}"
        return f"{low} to {high}"

    def define(self, values: flags.FlagValues) -> None:
        """Defines the flag."""
        text = self.help
        if self.bounds:
            text += f" Allowed: {self.limits}."
        default = self.default
        if isinstance(default, Of):
            text += f" By default {default}."
            default = None
        define = commandline.definers(values)
        if isinstance(self.kind, type):
            kind = {int: "integer", str: "string"}.get(
                self.kind, self.kind.__name__
            )
            getattr(define, kind)(self.name, default, text)
        else:
            define.enum(self.name, default, list(self.kind), text)
        if self.bounds:
            flags.register_validator(
                self.name,
                self.allows,
                f"it must be a number: {self.limits}",
                flag_values=values,
            )


_naming, _recipe, _execution, _place = (
    functools.partial(Setting, role) for role in Role
)
_BY_DATASET = ("dataset", DATASETS)
_BY_OPTIMIZER = ("optimizer", OPTIMIZERS)

TABLE = (
    _naming(
        "dataset",
        DATASETS,
        "digits",
        "Data set. digits comes with scikit-learn, the others are read from "
        "--data_dir.",
    ),
    _naming(
        "model",
        NETWORKS,
        Of(*_BY_DATASET, "model"),
        "Network.",
    ),
    _naming(
        "method",
        METHODS,
        "fa_usf_sn",
        "How errors are sent back; the rows of the paper's table. The default "
        "is sign-concordant feedback with strict normalization, its best one.",
    ),
    _naming(
        "seed",
        int,
        0,
        "Of weights, feedback, order and augmentation. The split of the data "
        "does not depend on it.",
        f"[0, {2**31 - 1}]",
    ),
    _recipe(
        "epochs",
        int,
        Of(*_BY_DATASET, "epochs"),
        "Passes over the training data. A run can go on with more.",
        "[1, 100000]",
        kept=False,
    ),
    _recipe(
        "batch_size",
        int,
        Of(*_BY_DATASET, "batch_size"),
        "Images per step, over all replicas.",
        "[1, inf)",
    ),
    _recipe(
        "optimizer",
        OPTIMIZERS,
        Of(*_BY_DATASET, "optimizer"),
        "Optimizer; sgd has momentum 0.9, adamw is adam with weight decay, "
        "muon takes orthogonal steps, and those of adam for the readout and "
        "biases.",
    ),
    _recipe(
        "learning_rate",
        float,
        Of(*_BY_OPTIMIZER, "learning_rate"),
        "Learning rate at its height; it falls to 0 along half a cosine.",
        "(0, inf)",
    ),
    _recipe(
        "warmup_epochs",
        float,
        Of(*_BY_DATASET, "warmup_epochs"),
        "Epochs over which the learning rate rises from 0 at the start; "
        "shortened to the run where it is longer.",
        "[0, inf)",
    ),
    _recipe(
        "weight_decay",
        float,
        Of(*_BY_OPTIMIZER, "weight_decay"),
        "Each step takes learning rate x weight decay off every kernel "
        "(decoupled from the gradient; biases are left alone).",
        "[0, inf)",
    ),
    _recipe(
        "kernel_scale",
        float,
        1.0,
        "The kernels start as this many times he_normal.",
        "(0, inf)",
    ),
    _recipe(
        "feedback_scale",
        float,
        1.0,
        "Random feedback starts as this many times what it is by default: "
        "B_0 times he_normal, or the maps of direct errors. "
        "Adam's steps do not depend on the scale of B_0 or of DFA's maps.",
        "(0, inf)",
    ),
    _recipe(
        "feedback_maps",
        ("dense", "convolutional"),
        "dense",
        "Form of the fixed maps of DFA and DenseFA. dense: a matrix between "
        "two feature maps; convolutional: a small kernel, shared in space.",
    ),
    _recipe(
        "fixed_signs",
        ("synapse", "unit"),
        "synapse",
        "Whose signs an E/I method fixes. synapse: those of W_0; unit: all "
        "weights out of a presynaptic unit have one that is drawn for it "
        "(Dale's law). With unit add --normalization=batch where filters see "
        "one channel, for all of a filter's weights have one sign there.",
    ),
    _recipe(
        "dropout",
        float,
        0.0,
        "Rate at which the inputs of the readout are dropped in training; not "
        "for cifar10_2 and imagenet_2, which have dropout of their own.",
        "[0, 1)",
    ),
    _recipe(
        "normalization",
        ("none", "batch"),
        "none",
        "batch: BatchNormalization in front of the ReLU of each hidden layer "
        "with a kernel, in place of its bias; not for the residual networks, "
        "which have it anyway.",
    ),
    _recipe(
        "label_smoothing",
        float,
        0.0,
        "Share of a label that is spread evenly over all classes in the loss.",
        "[0, 1)",
    ),
    _recipe(
        "image_size",
        int,
        Of(*_BY_DATASET, "image_size"),
        "Height and width that photos are resized to, in pixels; not for data "
        "sets whose images have a size of their own.",
        "[8, 2048]",
    ),
    _recipe(
        "crop_area",
        float,
        Of(*_BY_DATASET, "crop_area"),
        "Least share of a photo's area that its window has in training; not "
        "for data sets whose images have a size of their own.",
        "(0, 1]",
    ),
    _recipe(
        "dtype_policy",
        ("float32", "mixed_bfloat16", "mixed_float16"),
        "float32",
        "Keras's dtype policy of the model.",
    ),
    _execution(
        "backend",
        str,
        "tensorflow",
        "Keras's backend.",
        kept=True,
        flag=False,
    ),
    _execution(
        "steps_per_execution",
        int,
        1,
        "Training steps per call of the compiled function. An epoch is rounded "
        "down to a multiple of them, an evaluation filled up.",
        "[1, inf)",
        kept=True,
    ),
    _execution(
        "jit_compile",
        bool,
        None,
        "Whether to compile the training step with XLA. By default not on "
        "TensorFlow; JAX always does.",
    ),
    _execution(
        "strategy",
        STRATEGIES,
        "none",
        "none: one device. On TensorFlow also mirrored: all GPUs of this "
        "machine, or its CPU; multi_worker: those of all machines in the "
        "environment variable TF_CONFIG, each of which runs this command; tpu: "
        "a TPU. On JAX data_parallel: all devices of this machine, or of all "
        "in the environment variables KERAS_DISTRIBUTION_..., or of a TPU "
        "slice, each of which runs this command.",
    ),
    _execution(
        "tpu",
        str,
        None,
        "With --strategy=tpu: the TPU's name or grpc:// address; by default "
        "local, that of the TPU VM this runs on.",
    ),
    _execution(
        "virtual_devices",
        int,
        0,
        "With --strategy=mirrored: number of logical devices to split the GPU "
        "or CPU into; with data_parallel, of CPU devices; 0 splits nothing.",
        "[0, 64]",
    ),
    _execution(
        "alignment_every",
        int,
        0,
        "Measure the alignment of every layer after each so many epochs; 0 is "
        "never.",
        "[0, inf)",
    ),
    _place(
        "test",
        bool,
        True,
        "Whether to look at the test images, once, at the end. A search for "
        "settings does not, and goes by the validation error. ImageNet's test "
        "error is that of its validation photos; with --notest a hundredth of "
        "the training photos is held out in their place.",
    ),
    _place(
        "data_dir",
        str,
        None,
        "Folder that holds <dataset>.npz, as train/export.py writes it, or "
        "else one of TensorFlow Datasets, as imagenet2012 needs; the default "
        "is that of the latter ($TFDS_DATA_DIR or ~/tensorflow_datasets).",
    ),
    _place(
        "download",
        bool,
        False,
        "Whether to fetch a data set that --data_dir does not hold.",
    ),
    _place(
        "runs_dir",
        str,
        "runs",
        "Folder in which run folders are made.",
    ),
    _place(
        "resume",
        bool,
        False,
        "Whether to continue the run if its folder exists: an unfinished one "
        "from its last checkpoint, a finished one if --epochs is larger.",
    ),
    _place(
        "checkpoint_minutes",
        float,
        30.0,
        "Minutes after which a checkpoint is written inside an epoch; 0: only "
        "at the end of each epoch, and when the run is asked to end.",
        "[0, inf)",
    ),
    _place(
        "keep_checkpoints",
        int,
        2,
        "Number of last checkpoints that are kept: model.keras, "
        "model.1.keras, ...",
        "[1, 100]",
    ),
)
BY_NAME = {setting.name: setting for setting in TABLE}


def names(*roles: Role) -> tuple[str, ...]:
    """The names of the settings of some roles."""
    return tuple(setting.name for setting in TABLE if setting.role in roles)


NAMING = names(Role.NAMING)
RECIPE = names(Role.RECIPE)
RECORDED = names(Role.NAMING, Role.RECIPE, Role.EXECUTION)
FIXED = tuple(setting.name for setting in TABLE if setting.fixed)

FLAGS = flags.FLAGS
for _setting in TABLE:
    if _setting.flag:
        _setting.define(FLAGS)


def given() -> SimpleNamespace:
    """The flags; where none is given, what the other settings make of it."""
    config = {
        setting.name: FLAGS[setting.name].value
        for setting in TABLE
        if setting.flag
    }
    config["backend"] = keras.backend.backend()
    if config["jit_compile"] is None:
        config["jit_compile"] = config["backend"] == "jax"
    return SimpleNamespace(**_filled(config))


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as it was saved, and those younger than it is.

    A setting that a run lacks equals its default.
    """
    younger = {
        setting.name: None
        if isinstance(setting.default, Of)
        else setting.default
        for setting in TABLE
        if setting.name in RECORDED and setting.name not in settings
    }
    return _filled({**younger, **settings})


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    for setting in TABLE:  # in the order in which they depend on each other
        default = setting.default
        if (
            isinstance(default, Of)
            and config.get(setting.name) is None
            and str(config.get(default.setting)) in default.entries
        ):
            config[setting.name] = default.value(config)
    return config


def difference(
    one: Mapping[str, Any], other: Mapping[str, Any], compared: Collection[str]
) -> str | None:
    """The first of some settings in which two runs differ; `None` if none."""
    one, other = completed(one), completed(other)
    for name in compared:
        if one.get(name) != other.get(name):
            return name
    return None


def is_default(name: str, value: Any) -> bool:
    """Whether it goes without saying; `None`: there is nothing to set."""
    known = BY_NAME.get(name)
    return known is not None and value in (None, known.default)


def flag(name: str) -> str:
    """What a user sets a setting with."""
    return f"--{name}" if BY_NAME[name].flag else f"KERAS_{name.upper()}"


def check(config: SimpleNamespace) -> None:
    """Refuses settings that do not go together."""
    dataset = DATASETS[config.dataset]
    network = NETWORKS[config.model]
    if network.image_shape != dataset.image_shape:
        fitting = [
            name
            for name, network in NETWORKS.items()
            if network.image_shape == dataset.image_shape
        ]
        raise UserError(
            f"--model={config.model} does not fit the {dataset.image_shape} "
            f"images of --dataset={config.dataset}. Choose "
            f"--model={'|'.join(fitting)}, or another data set."
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
    if config.feedback_scale != 1 and not draws(METHODS[config.method]):
        drawing = [name for name, method in METHODS.items() if draws(method)]
        raise UserError(
            f"--feedback_scale={config.feedback_scale}: {config.method} has no "
            "random feedback to scale. Leave it out, or choose "
            f"--method={'|'.join(drawing)}."
        )
    if config.fixed_signs == "unit" and not takes_units(METHODS[config.method]):
        taking = [name for name, m in METHODS.items() if takes_units(m)]
        raise UserError(
            f"--fixed_signs=unit: {config.method} fixes no signs, or sends "
            "errors through feedback of one magnitude, by which units of one "
            "sign learn nothing. Leave it out, or choose "
            f"--method={'|'.join(taking)}."
        )
    if config.steps_per_execution > 1 and learns_between_steps(
        METHODS[config.method]
    ):
        raise UserError(
            f"--steps_per_execution={config.steps_per_execution}: the feedback "
            f"of {config.method} learns between training steps, which would "
            "happen once for so many. Leave it out."
        )
    for name in ("image_size", "crop_area"):
        value = getattr(config, name)
        if value is not None and not network.resizable:
            raise UserError(
                f"--{name}={value}: the images of {config.dataset} have a size "
                "of their own. Leave it out."
            )
    strategy = STRATEGIES[config.strategy]
    if config.virtual_devices and not strategy.splits:
        splitting = [name for name, s in STRATEGIES.items() if s.splits]
        raise UserError(
            f"--virtual_devices={config.virtual_devices} are replicas of one "
            f"machine. Add --strategy={'|'.join(splitting)}, or leave it out."
        )
    if config.tpu is not None and config.strategy != "tpu":
        raise UserError(
            f"--tpu={config.tpu} needs --strategy=tpu. Add it, or leave it out."
        )
    remote = config.tpu not in (None, "local")
    if remote and not dataset.streamed:
        raise UserError(
            f"--tpu={config.tpu}: {config.dataset} is fed from this machine's "
            "memory, which a remote TPU cannot read. Run it on the TPU VM "
            "itself, with --tpu=local, or choose --dataset=imagenet2012."
        )
    if strategy.backend not in (None, config.backend):
        fitting = [
            name
            for name, s in STRATEGIES.items()
            if s.backend in (None, config.backend)
        ]
        raise UserError(
            f"--strategy={config.strategy} is one of {strategy.backend}, and "
            f"Keras runs on {config.backend}. Choose "
            f"--strategy={'|'.join(fitting)}, or set "
            f"KERAS_BACKEND={strategy.backend}."
        )
    if config.backend == "torch" and config.steps_per_execution > 1:
        raise UserError(
            f"--steps_per_execution={config.steps_per_execution}: Keras runs "
            "one on torch. Leave it out, or set KERAS_BACKEND=tensorflow or "
            "jax."
        )
    if config.backend == "jax" and not config.jit_compile:
        raise UserError(
            "--nojit_compile: JAX always compiles. Leave it out, or set "
            "KERAS_BACKEND=tensorflow."
        )
    if config.backend != "tensorflow":
        return
    if config.strategy != "none" and config.jit_compile:
        raise UserError(
            f"--jit_compile does not work under --strategy={config.strategy}, "
            "and a TPU compiles anyway. Leave one of the two out."
        )
    if network.windowed and (config.jit_compile or config.strategy == "tpu"):
        flag = "--jit_compile" if config.jit_compile else "--strategy=tpu"
        raise UserError(
            f"{flag}: TensorFlow cannot compile the random windows that "
            f"--model={config.model} sees with XLA. Leave it out, or set "
            "KERAS_BACKEND=jax."
        )
