"""The one error a user can cause."""


class InputError(ValueError):
    """A value the user gave cannot be used.

    The message is one line: the value, what is allowed, what to do. Jobs print it and exit with status 2.
    """
