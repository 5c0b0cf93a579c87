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
