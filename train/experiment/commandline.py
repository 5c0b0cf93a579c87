"""Flags, flagfiles, and how a program ends: with one line where it fails."""

import difflib
import functools
import re
import sys
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from absl import flags
from absl import logging

from experiment.errors import UserError
from experiment.errors import one_line

HELP = {"-help", "--help", "-helpfull", "--helpfull"}
FLAGFILES = Path(__file__).resolve().parents[1] / "flags"


def find_flagfiles(argv: list[str]) -> list[str]:
    """Replaces bare flagfile names by the files of that name."""
    found = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, name = argument.partition("=")
        if flag not in ("-flagfile", "--flagfile"):
            found.append(argument)
            continue
        if not equals:
            name = next(arguments, "")
        path = Path(name).expanduser()
        if not path.is_file() and path.name == name:
            path = FLAGFILES / name
        if not name or not path.is_file():
            there = sorted(file.name for file in FLAGFILES.glob("*.flags"))
            raise UserError(
                f"--flagfile={name}: no such file, here or in {FLAGFILES}"
                f"{_meant(path.name, there)}. Those there are called "
                "<column>_<method>.flags; or give the path of your own."
            )
        try:
            path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as wrong:
            raise UserError(
                f"--flagfile={path}: cannot be read as text ({wrong}). A "
                "flagfile has a --name=value on each line."
            ) from wrong
        found.append(f"--flagfile={path}")
    return found


def definers(values: flags.FlagValues) -> SimpleNamespace:
    """What defines flags of a program: `integer`, `bool` and so on."""
    kinds = "bool enum float integer multi_string string".split()
    makers = [getattr(flags, f"DEFINE_{kind}") for kind in kinds]
    bound = [functools.partial(make, flag_values=values) for make in makers]
    return SimpleNamespace(**dict(zip(kinds, bound)))


def define_names(
    values: flags.FlagValues,
    flag: str,
    default: Sequence[str] | None,
    allowed: Collection[str],
    text: str,
    least: int = 0,
) -> None:
    """Defines a flag of names, separated by commas.

    Args:
        values: The program's flags.
        flag: Its name.
        default: Its value where none is given.
        allowed: The names there are; the help lists them.
        text: The rest of the help.
        least: How many there have to be.
    """

    def check(given: Sequence[str] | None) -> bool:
        for name in given or ():
            if name not in allowed:
                raise UserError(_not_among(flag, name, allowed, "name"))
        if given is not None and len(given) < least:
            raise UserError(f"--{flag}= is empty. Name one, or leave it out.")
        return True

    text = f"{text} Names: {', '.join(allowed)}."
    flags.DEFINE_list(flag, default, text, flag_values=values)
    flags.register_validator(flag, check, flag_values=values)


def parse(
    values: flags.FlagValues, argv: list[str], others: bool = False
) -> list[str]:
    """Sets flags from a command line.

    Args:
        values: The program's flags.
        argv: The command line, the program's name first.
        others: Whether there may be flags of another program on it.

    Returns:
        The flags of the other program, as they are given.

    Raises:
        UserError: If the command line is not understood.
    """
    values.unparse_flags()
    try:
        rest = values(find_flagfiles(argv), known_only=others)[1:]
    except flags.UnrecognizedFlagError as wrong:
        raise UserError(
            f"--{wrong.flagname}: no such flag"
            f"{_meant(wrong.flagname, list(values))}. --helpfull lists all."
        ) from wrong
    except flags.Error as wrong:
        given = re.match(r"flag --(\w+)=(.*?): ", str(wrong))
        about = ""
        if given and given[1] in values:
            name, value = given.groups()
            if isinstance(values[name], flags.EnumFlag):
                names = values[name].parser.enum_values
                raise UserError(_not_among(name, value, names, name)) from wrong
            about = f" --{name}: {values[name].help}"
        raise UserError(f"{str(wrong).rstrip('.')}.{about}") from wrong
    if rest and not others:
        raise UserError(
            f"{rest[0]!r} is not a flag. Settings are given as --name=value; "
            "--helpfull lists them."
        )
    return rest


def run(
    argv: list[str],
    values: flags.FlagValues,
    program: Callable[..., None],
    about: str,
    interrupted: str,
    others: bool = False,
) -> int:
    """Runs a program on a command line.

    Args:
        argv: The command line, the program's name first.
        values: Its flags.
        program: What it does, once they are set. With `others` it is given
            the flags that are not its own.
        about: What `--help` says before it lists the flags.
        interrupted: What to tell a user who stops the program, where the
            interrupt itself says nothing.
        others: Whether there may be flags of another program on it.

    Returns:
        The exit status.
    """
    name = Path(argv[0]).name
    if HELP.intersection(argv):
        print(f"{about}\nFlags:\n{values.get_help()}")
        return 0
    try:
        rest = parse(values, argv, others)
        # After the flags, whose --verbosity would set it back.
        logging.set_verbosity(logging.ERROR)
    except UserError as wrong:
        print(f"{name}: {one_line(wrong)}", file=sys.stderr)
        return 2
    try:
        program(*[rest] if others else [])
    except UserError as wrong:
        print(f"{name}: {one_line(wrong)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        said = str(stopped) or f"interrupted. {interrupted}"
        print(f"{name}: {said}", file=sys.stderr)
        return 130
    return 0


def _not_among(flag: str, value: str, names: Collection[str], kind: str) -> str:
    """What to say of a value that is none of those there are."""
    allowed = ", ".join(names)
    if value == "None":
        return f"--{flag} is needed: one of {allowed}."
    meant = _meant(value, names)
    rest = "--helpfull lists all." if meant else f"Allowed: {allowed}."
    return f"--{flag}={value}: no such {kind}{meant}. {rest}"


def _meant(given: str, names: Collection[str]) -> str:
    """Which names somebody may have meant, as a question in brackets."""
    lower = given.lower()
    close = [
        name
        for name in names
        if lower in (name, "".join(word[0] for word in name.split("_")))
    ] or difflib.get_close_matches(lower, names)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
