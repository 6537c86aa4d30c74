"""NAME=VALUE after an option."""

import pytest

from pcm.errors import InputError
from pcm.name_value import read_value, split_name_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tau=0.1", ("tau", "0.1")),
        (" tau = log:0.01:1 ", ("tau", "log:0.01:1")),
        ("pcmnet.io/role=generation", ("pcmnet.io/role", "generation")),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_a_name_ends_at_the_first_equals_sign(text: str, expected: tuple[str, str]) -> None:
    assert split_name_value(text, option="--set", example="tau=0.1") == expected


@pytest.mark.parametrize("text", ["", "tau", "tau=", "=3", " = ", "tau= "])
def test_without_name_or_value_the_error_shows_how_to_write_it(text: str) -> None:
    with pytest.raises(InputError) as caught:
        split_name_value(text, option="--set", form="FIELD=VALUE", example="tau=0.1")
    assert str(caught.value) == f"--set {text!r}: write FIELD=VALUE, such as tau=0.1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("null", None), (' "x" ', "x"), (" trailing ", "trailing"), ("", "")],
)
def test_a_value_is_json_where_it_reads_as_json(text: str, expected: object) -> None:
    assert read_value(text) == expected and type(read_value(text)) is type(expected)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000], ids=["a number of 5,000 digits", "deep JSON"])
def test_a_value_that_no_parser_takes_is_text(text: str) -> None:
    assert read_value(text) == text
