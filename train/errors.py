"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Ends the program with its message as the one line on standard error.

    The message says what was given, what is allowed and what to do.
    """
