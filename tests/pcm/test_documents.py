"""JSON documents have one form."""

import json
import os

import pytest

from pcm.documents import document_bytes


def test_the_bytes_follow_from_the_values_alone() -> None:
    lines = ["{", ' "a": {', '  "c": "é",', '  "d": []', " },", ' "b": 1', "}", ""]
    assert document_bytes({"b": 1, "a": {"d": [], "c": "é"}}) == "\n".join(lines).encode()
    assert document_bytes({"a": 1, "b": 2}) == document_bytes({"b": 2, "a": 1})


@pytest.mark.parametrize("text", ["é 犬 🐶", os.fsdecode(b"caf\xe9.txt"), 'a "b" \\ c\n'])
def test_any_text_comes_back_as_it_was(text: str) -> None:
    assert json.loads(document_bytes({text: text})) == {text: text}
