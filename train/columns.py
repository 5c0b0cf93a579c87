"""The columns of the paper's table: a data set, a network, and the rows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import commandline
from errors import UserError

from keras_fa.methods import METHODS

ROWS = tuple(
    "bp bp_noise bp_alignment fa fa_usf_init_ei fa_usf_init fa_usf_sn dfa "
    "dense_fa".split()
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


# All-CNN-C's dense maps between feature maps would fill 124 GB.
_SMALL_MAPS = {"dense_fa": ("--feedback_maps=convolutional",)}

COLUMNS = {
    "mnist": Column("mnist", "mnist", ROWS, ("--epochs=6", "--dropout=0.5")),
    # Where fixed signs cost much, BP E/I says what they cost by themselves.
    "cifar10_1": Column(
        "cifar10", "cifar10_1", (*ROWS, "bp_ei"), ("--epochs=60",)
    ),
    "cifar10_2": Column(
        "cifar10",
        "cifar10_2",
        (*ROWS, "bp_ei"),
        ("--epochs=100",),
        _SMALL_MAPS,
    ),
    "digits": Column("digits", "digits", tuple(METHODS)),
}


def cell(column: str, method: str) -> list[str]:
    """The arguments of main.py for a cell of the table.

    They are its flag file; on digits, a column that the paper lacks, there is
    none, and the defaults of the data set are the recipe of every method.
    """
    flagfile = commandline.FLAGFILES / f"{column}_{method}.flags"
    if flagfile.is_file():
        return [f"--flagfile={flagfile}"]
    return unsearched(column, method)


def unsearched(column: str, method: str) -> list[str]:
    """The arguments of main.py for a cell, but for what is searched."""
    dataset, model, _, recipe, overrides = COLUMNS[column]
    return [
        f"--dataset={dataset}",
        f"--model={model}",
        f"--method={method}",
        *recipe,
        *overrides.get(method, ()),
        "--alignment_every=1",
    ]


def name(argument: str) -> str:
    """The name of the flag `--name=value`."""
    return argument.lstrip("-").partition("=")[0]


def refuse(arguments: list[str], names: tuple[str, ...]) -> None:
    """Refuses flags of main.py that a column settles.

    Raises:
        UserError: If one of `names` is among the arguments.
    """
    for argument in arguments:
        if name(argument) in names:
            raise UserError(
                f"{argument}: the column says what is run. Leave it out; "
                "--column, --methods and the program's other flags choose."
            )


def chosen_methods(column: str, names: list[str] | None) -> list[str]:
    """The methods that a user names, or else all of the column's.

    Raises:
        UserError: If a name is unknown.
    """
    for method in names or []:
        if method not in METHODS:
            raise UserError(
                f"--methods: {method!r} is none. Allowed: {', '.join(METHODS)}."
            )
    return names or list(COLUMNS[column].methods)
