"""The errors that end a job in one line, and what any error says in one line."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class OneLineError(Exception):
    """What ends a job in one line: the message. Jobs print it and exit with status 2.

    passes: it may be over without the user, as where a store does not answer: worth another try, later or elsewhere.
    """

    def __init__(self, message: str, *, passes: bool = False) -> None:
        super().__init__(message)
        self.passes = passes


class InputError(OneLineError, ValueError):
    """A value the user gave cannot be used. The message is the value, what is allowed, what to do."""


class NotKnown(InputError):
    """A name that is none of those allowed: misspelt or, in what a job has written, of a later release."""


def known_fields(kind: type, values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The values. Raises NotKnown where one is of no field of the dataclass, as a later release may have written it."""
    if later := sorted(values.keys() - {entry.name for entry in dataclasses.fields(kind)}):
        raise NotKnown(f"{what} field {later[0]!r}: not known to this release")
    return values


class StoreFailure(OneLineError):
    """A store or a disk refuses, is full or does not answer: nothing is known of what lies there.

    No InputError and no ValueError: who takes these for a damaged object must not take this for one.
    """


def not_known(what: str, value: object, allowed: Iterable[str], *, why: str = "not known") -> NotKnown:
    """The error for a name that is none of those allowed, with the nearest one. `what`: "preset", "--dtype", ..."""
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return NotKnown(f"{what} {value!r}: {why}; {guess}allowed are {', '.join(names)}")


def one_line(error: BaseException, *, longest: int | None = None) -> str:
    """All that an error says, its lines joined by blanks and cut after `longest` characters.

    For libraries whose first line is a heading and whose reasons follow, such as torch's list of missing weights. The
    error's type where it says nothing.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    return said if longest is None else said[:longest]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without white space around it; its type where it says nothing.

    For libraries whose first line has the reason, and whose others are advice to programmers.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()


def typed_first_line(error: BaseException) -> str:
    """The type of an error and its first line, for errors that only together say what went wrong: "KeyError: 'x'"."""
    kind, said = type(error).__name__, first_line(error)
    return said if said == kind else f"{kind}: {said}"
