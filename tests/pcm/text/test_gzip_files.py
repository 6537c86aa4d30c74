"""Captions in gzip are read; a file that stands for much more than captions do is refused, in bounded memory."""

import gzip
import io
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.sources.corpus import read_corpus
from pcm.errors import InputError
from pcm.text.gzip_files import FREE_BYTES, open_gzip
from pcm.text.references import load_references
from tests.helpers.paths import ROOT


def endless(path: Path, *, lines: bool, megabytes: int = 200) -> Path:
    """A file of one line, or of many, that compresses a thousandfold."""
    piece = (b"a dog\n" if lines else b"aaaaaa") * (1 << 20)
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(megabytes // 6):
            file.write(piece)
    return path


def test_captions_in_gzip_are_read() -> None:
    text = b"a dog\n" * 1000
    assert open_gzip(io.BytesIO(gzip.compress(text)), name="x").read() == text


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", ["captions.txt.gz", "captions.json.gz", "captions.csv.gz"])
def test_gzip_that_grows_without_end_is_refused(name: str, lines: bool, tmp_path: Path) -> None:
    path = endless(tmp_path / name, lines=lines)
    assert path.stat().st_size < FREE_BYTES / 300
    with pytest.raises(InputError, match=r"grows to more than 200 times its size|header|JSON"):
        list(read_corpus(str(path)))
    with pytest.raises(InputError, match=r"grows to more than 200 times its size|header|JSON"):
        load_references(path)


def test_one_endless_line_takes_little_memory(tmp_path: Path) -> None:
    path = endless(tmp_path / "captions.txt.gz", lines=False, megabytes=1200)
    program = (
        "import resource, sys; from cluster.sources.corpus import read_corpus\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(read_corpus(sys.argv[1]))\n"
        "except ValueError as error: print(type(error).__name__)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    refused, grown = run.stdout.split()
    assert refused == "InputError" and int(grown) < 200
