"""Markup that text cannot break out of."""

from cluster.charts.markup import Html, rendered, tag
from tests.helpers.page_reader import Page

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\x1b\ud800 end"


def test_text_never_becomes_markup() -> None:
    found = Page(tag("p", NASTY, title=NASTY))
    assert found.names == ["p"]
    shown = "<script>alert('x')</script> & \"quoted\" \u2400\u241b\ufffd end"
    assert found.text == shown and found.attributes == [{"title": shown}]
    tag("p", NASTY).encode()  # a lone surrogate would not go into a file


def test_markup_is_not_escaped_twice_and_nothing_leaves_nothing() -> None:
    inner = tag("b", 1)
    assert tag("p", inner, None, False, [0.5, " & "], class_="x", hidden=True, id=None) == (
        '<p class="x" hidden><b>1</b>0.5 &amp; </p>'
    )
    assert isinstance(rendered(inner), Html) and tag("img", alt="") == '<img alt="">'
