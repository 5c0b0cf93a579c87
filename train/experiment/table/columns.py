"""The columns of the paper's table: a data set, a network, and the rows."""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from absl import flags

from experiment import commandline
from experiment import files
from experiment.errors import UserError
from experiment.table.sweep import Failure
from keras_fa.methods import METHODS

CHAIN_ROWS = tuple(
    "bp bp_noise bp_alignment fa fa_usf_init_ei fa_usf_init fa_usf_sn".split()
)
ROWS = (*CHAIN_ROWS, "dfa", "dense_fa")

# Where fixed signs cost much, BP E/I says what they cost by themselves, SN E/I
# whether the magnitudes are to blame, and silent zeros whether the errors are
# that B sends past weights that have stopped at zero. Frozen says what the
# readout achieves alone.
_CONTROLS = ("bp_ei", "fa_usf_sn_ei", "fa_usf_init_ei_silent", "frozen")
# Rules that are no rows of the paper's table.
_BEYOND = tuple(
    "fixed_sign_feedback brsf kolen_pollack weight_mirror activation_alignment "
    "drtp direct_kolen_pollack".split()
)

SETTLED = ("dataset", "model", "method", "flagfile")


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        dataset: As main.py's flag.
        model: As main.py's flag.
        methods: Its rows.
        recipe: What is not searched: flags of main.py that all cells share.
        overrides: The same for single methods, in which it differs.
    """

    dataset: str
    model: str
    methods: tuple[str, ...]
    recipe: tuple[str, ...] = ()
    overrides: Mapping[str, tuple[str, ...]] = MappingProxyType({})


# As ImageNet is commonly trained; 0.01 is AlexNet's rate, for networks without
# BatchNormalization. A weight decay of 1e-4 that is added to the gradients
# takes learning rate x 1e-4 / (1 - 0.9) off a kernel each step, once momentum
# 0.9 has summed it up; main.py takes learning rate x its own.
_IMAGENET = (
    "--epochs=90",
    "--batch_size=256",
    "--optimizer=sgd",
    "--learning_rate=0.01",
    "--warmup_epochs=5",
    "--weight_decay=0.001",
    "--label_smoothing=0.1",
)

# They diverged at 0.01 within 60 steps of imagenet_1 on 250 photos.
_SLOWER = {
    "fa": ("--learning_rate=0.001",),
    "fa_usf_init_ei": ("--learning_rate=0.003",),
}


def _decaying(rate: float, *names: str) -> dict[str, tuple[str, ...]]:
    """What aligns as far as weights decay."""
    return dict.fromkeys(names, (f"--weight_decay={rate:g}",))


# What sends errors from layer to layer, and so back in time. Kunin's rules do
# not: they learn from the x and y of a step, and a recurrent layer has many.
_RECURRENT = (
    *CHAIN_ROWS,
    *"bp_const fa_usf_const fa_usf_const_ei bp_ei fa_usf_sn_ei".split(),
    *"fa_usf_init_ei_silent brsf fixed_sign_feedback frozen".split(),
    *"kolen_pollack weight_mirror pfa".split(),
)
# All-CNN-C's dense maps between feature maps would fill 124 GB.
_SMALL_MAPS = {"dense_fa": ("--feedback_maps=convolutional",)}

COLUMNS = {
    "mnist": Column(
        "mnist",
        "mnist",
        (*ROWS, *_CONTROLS, *_BEYOND),
        ("--epochs=6", "--dropout=0.5"),
        # Without normalization more decay keeps it from learning. What starts
        # small, W_0 and B_0 alike, has less to forget.
        _decaying(0.5, "direct_kolen_pollack")
        | {
            "kolen_pollack": (
                "--weight_decay=0.5",
                "--kernel_scale=0.1",
                "--feedback_scale=0.1",
            )
        },
    ),
    "cifar10_1": Column(
        "cifar10",
        "cifar10_1",
        (*ROWS, *_CONTROLS, *_BEYOND),
        ("--epochs=30", "--normalization=batch", "--weight_decay=0.5"),
        _decaying(2, "kolen_pollack") | _decaying(1, "direct_kolen_pollack"),
    ),
    "cifar10_2": Column(
        "cifar10",
        "cifar10_2",
        (*ROWS, *_CONTROLS, *_BEYOND),
        ("--epochs=120", "--normalization=batch"),
        _SMALL_MAPS | _decaying(0.1, "kolen_pollack", "direct_kolen_pollack"),
    ),
    "imagenet_1": Column(
        "imagenet2012", "imagenet_1", CHAIN_ROWS, _IMAGENET, _SLOWER
    ),
    "imagenet_2": Column(
        "imagenet2012",
        "imagenet_2",
        (*CHAIN_ROWS, "bp_const", "fa_usf_const", "fa_usf_const_ei"),
        _IMAGENET,
        _SLOWER,
    ),
    "digits": Column("digits", "digits", tuple(METHODS), ("--epochs=30",)),
    "digits_lstm": Column(
        "digits",
        "digits_lstm",
        _RECURRENT,
        ("--epochs=30", "--learning_rate=0.003"),
        _decaying(1, "kolen_pollack"),
    ),
}


def file_of(column: str, method: str) -> Path:
    """The flag file of a cell of the table."""
    return commandline.FLAGFILES / f"{column}_{method}.flags"


def cell(column: str, method: str) -> list[str]:
    """The arguments of main.py for a cell of the table: its flag file.

    Raises:
        UserError: If there is none.
    """
    file = file_of(column, method)
    if not file.is_file():
        raise UserError(
            f"--methods: the cell {column} {method} has no recipe, for there "
            f"is no {file}. Search one: python train/search.py "
            f"--column={column} --methods={method} --write, or --nosearch "
            "in the place of --write for the column's own."
        )
    return [f"--flagfile={file}"]


def write(
    column: str, method: str, remarks: Sequence[str], arguments: Sequence[str]
) -> None:
    """Writes the flag file of a cell, with remarks on where it comes from."""
    lines = [f"{METHODS[method].title}, column {column}.", *remarks]
    text = "\n".join([*(f"# {line}" for line in lines), *arguments, ""])
    file = file_of(column, method)
    files.replace(file, lambda aside: aside.write_text(text, "utf-8"))
    print(f"Wrote {file}.")


def unsearched(column: str, method: str) -> list[str]:
    """The arguments of main.py for a cell, but for what is searched."""
    dataset, model, _, recipe, overrides = COLUMNS[column]
    own = overrides.get(method, ())
    replaced = {name(flag) for flag in own}
    return [
        f"--dataset={dataset}",
        f"--model={model}",
        f"--method={method}",
        *(flag for flag in recipe if name(flag) not in replaced),
        *own,
        "--alignment_every=1",
    ]


def name(argument: str) -> str:
    """The name of the flag `--name=value`."""
    return argument.lstrip("-").partition("=")[0]


def refuse(arguments: list[str], names: Sequence[str], why: str) -> None:
    """Refuses arguments that are flags of some names, and says why.

    Raises:
        UserError: If there is one.
    """
    for argument in arguments:
        if name(argument) in names:
            raise UserError(f"{argument} cannot be given here. {why}")


def fail(failed: Mapping[str, Failure]) -> None:
    """Ends a program whose runs failed with a line on each.

    Raises:
        UserError: If there are any.
    """
    if failed:
        raise UserError(
            f"{len(failed)} run(s) failed: "
            + "; ".join(f"{name}: {f.reason}" for name, f in failed.items())
        )


def define_flags(values: flags.FlagValues) -> None:
    """The flags that choose cells of the table."""
    define = commandline.definers(values)
    define.enum(
        "column", None, list(COLUMNS), "Column of the table.", required=True
    )
    commandline.define_names(
        values,
        "methods",
        None,
        METHODS,
        "Rows of the table, separated by commas. By default all of the "
        "column's.",
    )


def chosen_methods(column: str, names: list[str] | None) -> list[str]:
    """The methods that a user names, or else all of the column's."""
    return list(dict.fromkeys(names or COLUMNS[column].methods))
