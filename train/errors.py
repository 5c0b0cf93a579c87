"""The exceptions that mean: the user can put this right."""


class UserError(Exception):
    """Ends the program with its message as the one line on standard error.

    The message says what was given, what is allowed and what to do.
    """


class Busy(UserError):
    """Another process is at it. `SIGN` is in the message, for who reads it."""

    SIGN = "another process is training this run"


class Diverged(UserError):
    """What was trained is no longer a number. `SIGN` is in the message."""

    SIGN = "the loss stopped being a number"
