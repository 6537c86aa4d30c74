"""SPICE by pycocoevalcap's scorer, with Stanford CoreNLP from wherever a user has it.

pycocoevalcap brings the scorer without CoreNLP's 400 MB of models, which it downloads into its own installed folder.
Here nothing is downloaded and nothing is written there: the two jars are named on the class path, and the cache is a
temporary folder.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pcm.errors import InputError

#: A folder with SPICE_MODELS, where none is given.
SPICE_HOME_VARIABLE = "PCM_SPICE_HOME"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

_SCORER = "edu.anu.spice.SpiceScorer"
_JAR = "spice-1.0.jar"


def spice_home(given: str | Path | None, *, installed: Path) -> Path | None:
    """The folder with CoreNLP: the one given, that of PCM_SPICE_HOME, or pycocoevalcap's own (`installed`) where a user
    put the jars there; None where none is said and none is there.

    Raises InputError for a folder that was named and lacks a jar.
    """
    named = given or os.environ.get(SPICE_HOME_VARIABLE)
    folder = Path(named) if named else installed / "lib"
    missing = [name for name in SPICE_MODELS if not (folder / name).is_file()]
    if not missing:
        return folder
    if not named:
        return None
    said = f"--spice-home {named}" if given else f"{SPICE_HOME_VARIABLE}={named}"
    raise InputError(
        f"{said}: has no {' and no '.join(missing)}; unpack stanford-corenlp-full-2015-12-09.zip of "
        "stanfordnlp.github.io/CoreNLP/history.html and give its folder"
    )


def spice(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, Sequence[str]],
    *,
    home: Path,
    installed: Path,
    java: str,
) -> float:
    """Mean F-score over the images, as pycocoevalcap's `Spice().compute_score`. Tokenised captions by image id.

    Raises RuntimeError where the scorer fails, with its last line.
    """
    rows = [
        {"image_id": image_id, "test": candidates[image_id][0], "refs": list(references[image_id])}
        for image_id in sorted(references)
    ]
    jars = [installed / _JAR, *sorted((installed / "lib").glob("*.jar")), *(home / name for name in SPICE_MODELS)]
    with tempfile.TemporaryDirectory(prefix="pcm-tmp-spice-") as folder:
        given, found, cache = (Path(folder, name) for name in ("in.json", "out.json", "cache"))
        given.write_text(json.dumps(rows), encoding="utf-8")
        cache.mkdir()
        path = os.pathsep.join(map(str, jars))
        command = [java, "-Xmx8G", "-cp", path, _SCORER, str(given), "-cache", str(cache), "-out", str(found)]
        done = subprocess.run([*command, "-subset", "-silent"], cwd=installed, capture_output=True, check=False)
        if done.returncode or not found.is_file():
            said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"SPICE's Java process ended with status {done.returncode}: {said[-1]}")
        scores = [row["scores"]["All"]["f"] for row in json.loads(found.read_text(encoding="utf-8"))]
    if len(scores) != len(rows) or None in scores:
        raise RuntimeError(f"SPICE scored {len(scores) - scores.count(None)} of {len(rows)} images")
    return math.fsum(scores) / len(scores)
