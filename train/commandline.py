"""Flags, flagfiles, and how a program ends: with one line where it fails."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from absl import logging
from errors import UserError

HELP = {"-help", "--help", "-helpfull", "--helpfull"}
FLAGFILES = Path(__file__).resolve().parent / "flags"


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
            raise UserError(
                f"--flagfile={name}: no such file, here or in {FLAGFILES}. "
                "There are "
                + ", ".join(sorted(f.name for f in FLAGFILES.glob("*.flags")))
                + "; or give the path of your own."
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
        message = str(wrong).replace(" ?", "?")
        raise UserError(f"{message} --helpfull lists all flags.") from wrong
    except flags.Error as wrong:
        name = str(wrong).removeprefix("flag --").partition("=")[0]
        about = "--helpfull tells more."
        if name in values and not isinstance(values[name], flags.EnumFlag):
            about = f"--{name}: {values[name].help}"
        raise UserError(f"{str(wrong).rstrip('.')}. {about}") from wrong
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
        interrupted: What to tell a user who stops the program.
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
        print(f"{name}: {_one_line(wrong)}", file=sys.stderr)
        return 2
    try:
        program(*[rest] if others else [])
    except UserError as wrong:
        print(f"{name}: {_one_line(wrong)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted. {interrupted}", file=sys.stderr)
        return 130
    return 0


def _one_line(wrong: Exception) -> str:
    return " ".join(str(wrong).split())
