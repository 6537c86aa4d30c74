"""What a user can ask of a job: frozen dataclasses, whose fields hold an option's name, type, default and text.

The command line, a --config file and Python callers all read these fields, so a default stands once. Options that
several requests share are a class of their own, from which the requests inherit; its docstring is the title of the
group in --help. The modules that define requests import neither torch nor Ray, so that --help is fast.
"""

import contextlib
import dataclasses
import functools
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set, ValuesView
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pcm.credentials import refuse_credentials_in
from pcm.errors import InputError, not_known
from pcm.name_value import read_value, split_name_value


@dataclass(frozen=True, kw_only=True)
class Option:
    """What --help and the command line need to know of a field besides its name, type and default."""

    help: str
    #: Name on the command line, where it is not the field's.
    flag: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    #: The value of one argument's text; None: by the field's type.
    parse: Callable[[str], Any] | None = None
    #: What --help says of a default that is None.
    unset: str = "none"
    #: What the flag means without a value; None: it needs one.
    bare: str | None = None
    #: Given without a flag.
    positional: bool = False
    #: What the job makes at the path or URI that is given: checked before it begins (cluster.store.outputs).
    writes: Literal["folder", "file"] | None = None


def option(default: Any = dataclasses.MISSING, **described: Any) -> Any:
    """A field of a request; `described` as in `Option`. Without a default it is required."""
    metadata = {"option": Option(**described)}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


#: `Request.AGAIN` of jobs that take --resume, and of those that keep nothing to go on with.
WITH_RESUME = "run the same command again with --resume to go on"
BEGINS_ANEW = "run the same command again; it begins anew"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base of all requests. Raises InputError for a value of another type than its field's, one that is none of an
    option's choices, and one that has a credential.

    Where several values may stand, one is taken too, and a set (sorted), a dict's keys or a generator; where a text, a
    path; where a whole number, 8.0; where an option has a form of its own, such as NAME=VALUE, a text of this form.
    """

    #: What a job that was stopped says of how it goes on.
    AGAIN: ClassVar[str] = "run the same command again to go on"
    #: What a --config file of this request may hold besides its fields.
    FILE_HELP: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in options_of(type(self)):
            object.__setattr__(self, name, _listed(getattr(self, name)))
        refuse_credentials_in(self)  # errors show values
        hints = typing.get_type_hints(type(self))
        for name, described in options_of(type(self)).items():
            value = value_of(described, hints[name], getattr(self, name), shown=flag(type(self), name))
            object.__setattr__(self, name, value)
            if described.choices and value is not None and value not in described.choices:
                raise not_known(flag(type(self), name), value, described.choices)

    @classmethod
    def settable(cls) -> Collection[str]:
        """Names that --set takes, where the job has it and they are known."""
        return ()

    @classmethod
    def file_fields(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a --config file means."""
        return dict(values)


def options_of(request: type[Request]) -> dict[str, Option]:
    """Field name -> Option, of every field that the command line knows."""
    return {entry.name: entry.metadata["option"] for entry in dataclasses.fields(request) if "option" in entry.metadata}


def flag(request: type[Request], name: str) -> str:
    """ "--clip-gpus" of the field clip_gpus; the metavar of one that is given without a flag."""
    described = options_of(request)[name]
    if described.positional:
        return described.metavar or name.upper()
    return f"--{(described.flag or name).replace('_', '-')}"


def value_of(described: Option, hint: Any, given: object, *, shown: str) -> Any:
    """The value of a field, as its type `hint` has it. Raises InputError, which calls the field `shown`."""
    parse = described.parse and functools.partial(parsed, described, shown=shown)
    if int in _members(hint) and isinstance(given, float) and given.is_integer():
        given = int(given)
    try:
        if parse and typing.get_origin(hint) is Mapping and not isinstance(given, Mapping):
            given = named_once((parse(_as_type(str, text)) for text in _several(given)), shown=shown)
        return _as_type(hint, given, parse)
    except TypeError:
        text = " ".join(repr(given).split())[:100]
        form = f", or a text {described.metavar}" if described.parse and described.metavar else ""
        raise InputError(f"{shown} {text}: must be {in_words(hint)}{form}") from None


def parsed(described: Option, text: str, *, shown: str) -> Any:
    """What a text means to an option that has a form of its own. Raises InputError."""
    assert described.parse is not None
    try:
        return described.parse(text)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(shown) else f"{shown} {text}: {message}") from None


def named_once(pairs: Iterable[tuple[str, Any]], *, shown: str) -> dict[str, Any]:
    """NAME=VALUE pairs as a dict. Raises InputError for a name that is given twice: the first would be lost."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{shown} {name}: is given twice; give it once")
        found[name] = value
    return found


def given(request: Request) -> list[str]:
    """Fields whose value is not the default."""
    return [
        entry.name
        for entry in dataclasses.fields(request)
        if "option" in entry.metadata and getattr(request, entry.name) != _default(entry)
    ]


def shared(request: Request, wanted: type) -> dict[str, Any]:
    """The values of `request` for the fields that `wanted`, a dataclass, has too."""
    names = {entry.name for entry in dataclasses.fields(request)}
    return {entry.name: getattr(request, entry.name) for entry in dataclasses.fields(wanted) if entry.name in names}


def refuse_others(request: Request, because: str, allowed: Iterable[str], *, why: str) -> None:
    """Raises InputError for a given option without effect beside the field `because`: nothing is silently ignored."""
    kind = type(request)
    if useless := [name for name in given(request) if name not in (because, *allowed)]:
        flags = ", ".join(flag(kind, name) for name in useless)
        raise InputError(f"{flags}: without effect beside {flag(kind, because)}, {why}; leave it out")


def refuse_without(request: Request, needed: str, *names: str) -> None:
    """Raises InputError for a given option that has no effect where the field `needed` is not given."""
    kind, present = type(request), given(request)
    if needed not in present:
        for name in names:
            if name in present:
                raise InputError(f"{flag(kind, name)} {_shown(getattr(request, name))}needs {flag(kind, needed)}")


def check_gpu_share(request: Request, name: str) -> None:
    """Raises InputError for a GPU share that is none, or one that the device `cpu` leaves without effect."""
    share, shown = getattr(request, name), flag(type(request), name)
    if not 0 < share <= 1:
        raise InputError(f"{shown} {share:g}: must be more than 0 and at most 1")
    if name in given(request) and getattr(request, "device", None) == "cpu":
        raise InputError(f"{shown} {share:g}: without effect with --device cpu; leave it out")


def check_at_least(request: Request, least: int, *names: str) -> None:
    """Raises InputError for a number that is too small; None is none."""
    for name in names:
        value = getattr(request, name)
        lowest = value[0] if isinstance(value, tuple) else value
        if lowest is not None and lowest < least:
            raise InputError(f"{flag(type(request), name)} {lowest}: must be at least {least}")


def parse_count(text: str) -> int | tuple[int, int]:
    """8 of "8", (2, 8) of "2:8". Raises InputError."""
    least, colon, most = text.partition(":")
    counts = [int(part) for part in ((least, most) if colon else (least,)) if part.isdecimal()]
    if len(counts) != (2 if colon else 1) or counts != sorted(counts) or counts[0] < 1:
        raise InputError("write a number such as 8, or MIN:MAX such as 2:8")
    return (counts[0], counts[1]) if colon else counts[0]


def parse_label(text: str, *, option: str, form: str, example: str) -> tuple[str, str]:
    """(name, value) of a label that nodes are to have. Raises InputError, also for Ray's operators: !value, in(a,b)."""
    name, value = split_name_value(text, option=option, form=form, example=example)
    if not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?", value):
        raise InputError(f"{option} {text!r}: a value has letters, digits, '-', '_' and '.' alone, as in {example}")
    return name, value


def parse_setting(text: str) -> tuple[str, Any]:
    """("top_concepts", 3) of "top_concepts=3": JSON where it is, else text. Raises InputError."""
    name, value = split_name_value(text, option="--set", form="FIELD=VALUE", example="top_concepts=3")
    return name, read_value(value)


def _shown(value: object) -> str:
    return "" if value is True else f"{value}: "


def _default(entry: dataclasses.Field) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another type, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _listed(value: Any) -> Any:
    """A set, a view of a dict or an iterator as a list; anything else as it is."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, (Set, ValuesView, Iterator)) else value


def _several(value: Any) -> Any:
    """A list or tuple, or a text or path alone as one of them. Raises TypeError."""
    if isinstance(value, (str, os.PathLike)):
        return [value]
    if isinstance(value, (list, tuple)):
        return value
    raise TypeError


def _as_type(hint: Any, value: Any, parse: Callable[[str], Any] | None = None) -> Any:
    """`value` as the type `hint` has it; `parse` reads texts of a form of their own. Raises TypeError, InputError."""
    if len(members := _members(hint)) > 1:
        for member in members:
            with contextlib.suppress(TypeError):
                return _as_type(member, value, parse)
        raise TypeError
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and parts[-1] is Ellipsis:
        return tuple(_as_type(parts[0], each, parse) for each in _several(value))
    if parse and isinstance(value, str):
        return parse(value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(parts):
        return tuple(map(_as_type, parts, value))
    if origin is Mapping and isinstance(value, Mapping):
        return {_as_type(parts[0], name): _as_type(parts[1], each) for name, each in value.items()}
    if hint is str and isinstance(text := os.fspath(value), str):
        return text
    if hint is Path:
        return Path(value)
    if hint in (int, float):
        if isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool):
            return value if type(value) is int else hint(value)  # a spec's digest tells 7 from 7.0
    elif hint is Any or (origin is None and isinstance(value, hint)):
        return value
    raise TypeError


def in_words(hint: Any) -> str:
    """What values a type has."""
    members = [member for member in _members(hint) if member is not type(None)]
    for member in members:
        if typing.get_origin(member) is tuple and typing.get_args(member)[-1] is Ellipsis:
            return f"{in_words(typing.get_args(member)[0])}, or several in a list"
    if len(members) > 1:
        return " or ".join(map(in_words, members))
    origin, parts = typing.get_origin(members[0]), typing.get_args(members[0])
    if origin is Mapping:
        return "a mapping" + ("" if parts[1] is Any else f", each value {in_words(parts[1])}")
    if origin is tuple:
        return f"({', '.join(map(in_words, parts))})"
    return _KINDS.get(members[0], members[0].__name__)
