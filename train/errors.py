"""The exceptions that mean: the user can put this right."""

import os


class UserError(Exception):
    """Ends the program with its message as the one line on standard error.

    The message says what was given, what is allowed and what to do.
    """

    status = 1


class Busy(UserError):
    """Another process is at it; the exit status says so."""

    status = os.EX_TEMPFAIL


class Diverged(UserError):
    """The loss stopped being a number; the exit status says so."""

    status = os.EX_SOFTWARE
