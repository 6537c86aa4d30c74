"""benchmarks/worth.json: the calibration and every run that is in RESULTS.md, with the scores of each test picture.

OUT is on one machine, and this file is in the repository: with an empty OUT, `worth` goes on where the file ends, with
the learning rate and the steps that were chosen before. A run is known here by its setting, seed, steps and learning
rate: on a processor of another kind the drawn pictures differ in their last bits, so digests would match nothing. The
first 95 runs have no scores by picture ("pictures"), only their means.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.worth.settings import VERSION, Setting

ARCHIVE = Path(__file__).parents[2] / "worth.json"

#: Scores of each test picture in a result, with the type that holds them; CIDEr is kept in thousandths.
_BY_PICTURE = {"cider": np.dtype("<u2"), "said": np.dtype("u1"), "seen_said": np.dtype("u1")}
_KEPT = ("setting", "seed", "steps", "loss", "cpu_seconds", "train")


def record(result: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """A result with its means as the file has it."""
    found = {name: result[name] for name in (*_KEPT, *metrics)} | {"version": VERSION}
    found["datasets"] = [each["sha256"] for each in result["datasets"]]
    return found | ({"pictures": _packed(result)} if "cider" in result else {})


def write_archive(path: Path, *, calibration: Mapping[str, Any] | None, records: Iterable[Mapping[str, Any]]) -> None:
    """One run a line."""
    lines = ",\n".join(json.dumps(each, sort_keys=True) for each in records)
    path.write_text(f'{{"calibration": {json.dumps(calibration, sort_keys=True)},\n"runs": [\n{lines}\n]}}\n')


@dataclass(frozen=True)
class Archive:
    """What the file has. calibration: as calibration.kept makes it."""

    calibration: dict[str, Any] | None
    records: dict[tuple[Setting, int, int, float], dict[str, Any]]

    def result(self, setting: Setting, seed: int, *, steps: int, lr_factor: float) -> dict[str, Any] | None:
        """As `do_run` made it but for its captions, and the means; None where there is no such run. `steps`: that it
        was trained."""
        found = self.records.get((setting, seed, steps, lr_factor))
        if found is None:
            return None
        by_picture = _unpacked(found["pictures"]) if "pictures" in found else {}
        return {**found, "datasets": [{"sha256": each} for each in found["datasets"]], **by_picture}


def read_archive() -> Archive:
    """Nothing is in a file that is not there; runs of another VERSION are left out."""
    kept = json.loads(ARCHIVE.read_text()) if ARCHIVE.exists() else {"calibration": None, "runs": []}
    known = {
        (Setting(**each["setting"]), each["seed"], each["steps"], each["train"]["lr_factor"]): each
        for each in kept["runs"]
        if each["version"] == VERSION
    }
    return Archive(kept["calibration"], known)


def _packed(result: Mapping[str, Any]) -> str:
    scores = {**result, "cider": np.rint(1000 * np.array(result["cider"]))}
    data = b"".join(np.asarray(scores[name]).astype(kind).tobytes() for name, kind in _BY_PICTURE.items())
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> dict[str, list[Any]]:
    data = zlib.decompress(base64.b64decode(text))
    count = len(data) // sum(kind.itemsize for kind in _BY_PICTURE.values())
    found, at = {}, 0
    for name, kind in _BY_PICTURE.items():
        found[name] = np.frombuffer(data, kind, count, at).tolist()
        at += count * kind.itemsize
    return {**found, "cider": [score / 1000 for score in found["cider"]]}
