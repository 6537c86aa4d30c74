"""HTML as values: what is not made here is text, and text is escaped."""

import base64
import re
from collections.abc import Iterable

__all__ = ["Html", "Node", "data_uri", "join", "rendered", "tag"]

_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})
#: HTML has no way to write most control characters, and UTF-8 none for a lone surrogate.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Markup that was made here and is not escaped again."""

    __slots__ = ()


#: What an element may hold: markup, text, numbers; None and False leave nothing.
Node = Html | str | int | float | None | Iterable["Node"]


def tag(name: str, /, *children: Node, **attributes: str | int | float | bool | None) -> Html:
    """One element. Attribute names: a trailing underscore is dropped, others become hyphens (class_, aria_label).

    None and False leave an attribute out; True writes its name alone.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(nodes: Iterable[Node]) -> Html:
    return Html("".join(map(rendered, nodes)))


def rendered(node: Node) -> Html:
    """A node as markup: text is escaped, a number written, a sequence one after another."""
    if node is None or node is False:
        return Html("")
    if isinstance(node, Html):
        return node
    if isinstance(node, str):
        return Html(_escaped(node))
    if isinstance(node, int | float):
        return Html(str(node))
    return join(node)


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")  # SVG's viewBox and preserveAspectRatio stay as they are
    return f" {name}" if value is True else f' {name}="{_escaped(str(value))}"'


def _escaped(text: str) -> str:
    return _UNWRITABLE.sub(_visible, text).translate(_ESCAPES)


def _visible(match: re.Match[str]) -> str:
    """The picture of a control character where Unicode has one (NUL: U+2400), else U+FFFD."""
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
