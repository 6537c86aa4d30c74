"""Captions in gzip are read; a file that stands for much more than captions do is refused, in bounded memory."""

import gzip
import io
from pathlib import Path

import pytest

from cluster.sources.corpus import read_corpus
from pcm.errors import InputError
from pcm.text import gzip_files
from pcm.text.gzip_files import open_gzip
from pcm.text.references import load_references


def endless(path: Path, *, lines: bool) -> Path:
    """A file of one line, or of many, that compresses some four hundredfold or more."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write((b"a dog\n" if lines else b"aaaaaa") * (1 << 21))
    return path


def test_captions_in_gzip_are_read() -> None:
    text = b"a dog\n" * 1000
    assert open_gzip(io.BytesIO(gzip.compress(text)), name="x").read() == text


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", ["captions.txt.gz", "captions.json.gz"])
def test_gzip_that_grows_without_end_is_refused(
    name: str, lines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_files, "FREE_BYTES", 1 << 20)
    path = endless(tmp_path / name, lines=lines)
    for read in (lambda: list(read_corpus(str(path))), lambda: load_references(path)):
        with pytest.raises(InputError, match="grows to more than 200 times its size"):
            read()
