"""benchmarks/worth.json: the calibration and every run that is in RESULTS.md, with the scores of each test picture.

OUT is on one machine, and this file is in the repository: with an empty OUT, `worth` goes on where the file ends, with
the learning rate and the steps that were chosen before. A run is known here by its setting, seed, steps and learning
rate: on a processor of another kind the drawn pictures differ in their last bits, so digests would match nothing. The
first 95 runs have no scores by picture ("pictures"), only their means. "figures": what was found of the data of each
painter.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.results import write_whole
from benchmarks.experiments.worth.pictures import worth_folder
from benchmarks.experiments.worth.settings import VERSION, Setting

ARCHIVE = Path(__file__).parents[2] / "worth.json"

#: Scores of each test picture in a result, with the type that holds them; CIDEr is kept in thousandths.
_BY_PICTURE = {"cider": np.dtype("<u2"), "said": np.dtype("u1"), "seen_said": np.dtype("u1")}
_KEPT = ("setting", "seed", "steps", "loss", "cpu_seconds", "train")


def record(result: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """A result with its means as the file has it."""
    found = {name: result[name] for name in (*_KEPT, *metrics, "recognised_by")} | {"version": VERSION}
    found["datasets"] = [each["sha256"] for each in result["datasets"]]
    return found | ({"pictures": _packed(result)} if "cider" in result else {})


def digest_of(recognised: Sequence[Sequence[str]]) -> str:
    """Of the nouns of the test pictures that a classifier recognises: tells one classifier from another."""
    return hashlib.sha256(json.dumps(recognised).encode()).hexdigest()[:16]


def known_figures(out: Path, name: str) -> dict[str, Any] | None:
    """Of a painter's data, such as "coarse/SynC.json": in OUT, or else in the archive, or None."""
    path = _figures_folder(out) / name
    return json.loads(path.read_text()) if path.exists() else read_archive().figures.get(name)


def keep_figures(out: Path, name: str, found: Mapping[str, Any]) -> None:
    write_whole(_figures_folder(out) / name, json.dumps(found, indent=1) + "\n")


def all_figures(out: Path) -> dict[str, dict[str, Any]]:
    """By name, of OUT and of the archive."""
    folder = _figures_folder(out)
    own = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    return {**read_archive().figures, **own}


def _figures_folder(out: Path) -> Path:
    return worth_folder(out) / "figures"


def write_archive(
    path: Path,
    *,
    calibration: Mapping[str, Any] | None,
    figures: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
) -> None:
    """One run a line."""
    lines = ",\n".join(json.dumps(each, sort_keys=True) for each in records)
    head = "".join(
        f"{json.dumps(name)}: {json.dumps(found, sort_keys=True)},\n"
        for name, found in (("calibration", calibration), ("figures", figures))
    )
    path.write_text(f'{{{head}"runs": [\n{lines}\n]}}\n')


@dataclass(frozen=True)
class Archive:
    """What the file has. calibration: as calibration.kept makes it."""

    calibration: dict[str, Any] | None
    figures: dict[str, dict[str, Any]]
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
    kept = json.loads(ARCHIVE.read_text()) if ARCHIVE.exists() else {}
    known = {
        (Setting(**each["setting"]), each["seed"], each["steps"], each["train"]["lr_factor"]): each
        for each in kept.get("runs", ())
        if each["version"] == VERSION
    }
    return Archive(kept.get("calibration"), kept.get("figures", {}), known)


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
