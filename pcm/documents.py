"""JSON documents: the same values give the same bytes, and a person can read them."""

import json
from collections.abc import Mapping
from typing import Any


def read_document(data: bytes | str) -> Any:
    """What a JSON document says. Raises ValueError with one line where it is none, also where it is nested so deeply,
    or has numbers of so many digits, that Python does not read it.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as a file: sorted keys, a line each, UTF-8, a line end last.

    Half of a surrogate pair, as in a path whose bytes are no UTF-8, becomes its JSON escape.
    """
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
