"""JSON documents: the same values give the same bytes, and a person can read them."""

import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pcm.errors import InputError, not_known


def read_document(data: bytes | str, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON document says. Raises ValueError with one line where it is none, also where it is nested so deeply,
    or has numbers of so many digits, that Python does not read it. `object_pairs_hook` is json.loads'.
    """
    try:
        return json.loads(data, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as a file: sorted keys, a line each, as `json_bytes`, a line end last."""
    return json_bytes(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def json_bytes(text: str) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, as in a path whose bytes are no UTF-8, becomes its JSON escape."""
    return text.encode("utf-8", "backslashreplace")


def typed_fields(
    record: type, values: Mapping[str, Any], what: str, *, prefix: str = "", why: str = "not known"
) -> dict[str, Any]:
    """`values` where they are fields of the dataclass `record`, of its types; an int is a float where one is wanted.

    Raises InputError, in which `what` says of what they are fields, and `prefix` comes before a name.
    """
    kinds = typing.get_type_hints(record)
    for name in values:
        if name not in kinds:
            raise not_known(f"{what} field", prefix + name, kinds, why=why)
    return {name: typed_value(f"{what} {prefix}{name}", value, kinds[name]) for name, value in values.items()}


def typed_value(what: str, value: Any, wanted: type) -> Any:
    """The value, an int as a float where one is wanted. Raises InputError for one of another type."""
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise InputError(f"{what} = {value!r}: must be of type {wanted.__name__}")
    return value
