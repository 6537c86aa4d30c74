"""What an error says in one line."""

import pytest

from pcm.errors import first_line, one_line, typed_first_line

CASES = [
    (ValueError("plain"), "plain", "plain", "ValueError: plain"),
    (ValueError("  head:\n\tkey a\n\tkey b\n"), "head: key a key b", "head:", "ValueError: head:"),
    (ValueError("\n\nlate  words \n"), "late words", "late  words", "ValueError: late  words"),
    (KeyError("x"), "'x'", "'x'", "KeyError: 'x'"),
    (ValueError(""), "ValueError", "ValueError", "ValueError"),
    (ValueError(" \n "), "ValueError", "ValueError", "ValueError"),
]


@pytest.mark.parametrize(("error", "whole", "first", "typed"), CASES)
def test_an_error_says_one_line(error: Exception, whole: str, first: str, typed: str) -> None:
    assert (one_line(error), first_line(error), typed_first_line(error)) == (whole, first, typed)


def test_a_long_error_is_cut() -> None:
    assert one_line(ValueError("word " * 100), longest=9) == "word word"
