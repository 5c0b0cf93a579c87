"""The exceptions that end the program with one line."""


class UserError(Exception):
    """Ends the program with its message as the one line on standard error.

    The message says what was given, what is allowed and what to do.
    """


class Busy(UserError):
    """Another process is at it. `SIGN` is in the message, for who reads it."""

    SIGN = "another process is training this run"


class Diverged(UserError):
    """What was trained is no longer a number. `SIGN` is in the message."""

    SIGN = "training diverged"


class Stopped(Exception):
    """The program was asked to end, and what it has done is on the disk."""


def reason(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    said = str(getattr(error, "message", error)).strip() or "no reason given"
    return f"{type(error).__name__}: {said.splitlines()[0]}"


def one_line(said: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(said).split())
