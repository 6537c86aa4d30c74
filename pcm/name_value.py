"""NAME=VALUE, as a person writes it after an option; every option that takes it goes through here."""

import json
from typing import Any

from pcm.errors import InputError


def split_name_value(text: str, *, option: str, form: str = "NAME=VALUE", example: str) -> tuple[str, str]:
    """("tau", "log:0.01:1") of "tau=log:0.01:1": split at the first "=", white space around both sides removed.

    Raises InputError, which names the `option` and shows its `form` and an `example`, unless both sides are there.
    """
    name, _, value = (side.strip() for side in text.partition("="))
    if not (name and value):
        raise InputError(f"{option} {text!r}: write {form}, such as {example}")
    return name, value


def read_value(text: str) -> Any:
    """What a written value means: 3, 0.5, true, null, [1, 2] where it reads as JSON, else the text, stripped."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()
