"""The one error a user can cause."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value the user gave cannot be used.

    The message is one line: the value, what is allowed, what to do. Jobs print it and exit with status 2.
    """


def not_known(what: str, value: object, allowed: Iterable[str], *, why: str = "not known") -> InputError:
    """The error for a name that is none of those allowed, with the nearest one. `what`: "preset", "--dtype", ..."""
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"{what} {value!r}: {why}; {guess}allowed are {', '.join(names)}")
