"""JSON documents: the same values give the same bytes, and a person can read them."""

import json
from collections.abc import Mapping
from typing import Any


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as a file: sorted keys, a line each, UTF-8, a line end last.

    Half of a surrogate pair, as in a path whose bytes are no UTF-8, becomes its JSON escape.
    """
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
