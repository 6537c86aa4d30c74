"""Files of results: one a run, named by the digest of all that its numbers depend on; the marked section of a report.

Both programs of experiments keep theirs here, each in its own folder: the paper's in OUT, what each step is worth in
OUT/worth.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Round the section of RESULTS.md that `worth` writes and `report` keeps.
BEGIN, END = "<!-- worth: begin -->", "<!-- worth: end -->"


def key_of(identity: Mapping[str, Any], *, digits: int) -> str:
    """The name of a run's result; `identity`: what its numbers depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:digits]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_result(folder: Path, key: str) -> dict[str, Any] | None:
    """What `write_result` wrote; None while the run is not done."""
    try:
        return json.loads(_result_path(folder, key).read_text())
    except FileNotFoundError:
        return None


def write_result(folder: Path, key: str, result: Mapping[str, Any], *, indent: int | None = None) -> None:
    write_whole(_result_path(folder, key), json.dumps(result, indent=indent) + "\n")


def _result_path(folder: Path, key: str) -> Path:
    return folder / "results" / f"{key}.json"


def write_whole(path: Path, text: str) -> None:
    """All or nothing, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


def section_of(text: str) -> str:
    """The section between the marks, marks included; "" where there is none."""
    _, begin, rest = text.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    return f"{begin}{inside}{end}" if begin and end else ""


def with_section(text: str, section: str) -> str:
    """The text with this section before its first heading of the second level, in place of the one that it had."""
    marked = f"{BEGIN}\n{section.strip()}\n{END}"
    if old := section_of(text):
        return text.replace(old, marked)
    head, heading, rest = text.partition("\n## ")
    return f"{head.rstrip()}\n\n{marked}\n{heading}{rest}"
