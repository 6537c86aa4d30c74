"""Evaluation as the field does it: captions of real pictures by beam search, and every COCO metric of them.

Under OUT: captions.json in COCO's results format, and metrics.json with the metrics and what they were computed on. Of
every epoch: a folder an epoch with these, and epochs.json.
"""

import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluation.captioners import check_clip, epoch_checkpoints, load_captioner, weights_sha256
from cluster.evaluation.captioning import CaptionerSource, caption_on_cluster, caption_pictures, load_pictures
from cluster.evaluation.experiments import EXPERIMENTS, comparison, comparison_table, experiments_table
from cluster.evaluation.request import EvaluateRequest
from cluster.sources.concept_file import read_concepts
from cluster.sources.pictures import (
    candidate_ids,
    coco_pictures,
    picture_references,
    reference_names,
    source_anywhere,
)
from cluster.store.store import Store, join, open_store, read_uri
from cluster.store.temporary import temporary_folder
from pcm.captioners.captioner import Captioner
from pcm.clip.encoder import ClipEncoder
from pcm.clip.names import clip_anywhere
from pcm.documents import document_bytes, json_bytes, read_document
from pcm.errors import InputError, StoreFailure, first_line
from pcm.text.metrics import (
    JavaFailed,
    cider_only,
    clip_scores,
    clipscore_text,
    coco_metrics,
    require_metrics,
    require_spice,
)
from pcm.text.references import CocoPicture
from pcm.text.spice import SPICE_HOME_VARIABLE, SPICE_MODELS

log = logging.getLogger(__name__)

RESULTS_KEY = "captions.json"
EVALUATION_KEY = "metrics.json"
EPOCHS_KEY = "epochs.json"  # of --every-epoch, beside a folder an epoch


def epoch_folder(epoch: int) -> str:
    """Under OUT of --every-epoch."""
    return f"epoch-{epoch:03d}"


def evaluate(request: EvaluateRequest) -> dict[str, Any]:
    """Metrics as fractions (CIDEr 1.138 is "113.8"), and n, the number of pictures they are over.

    Pictures that cannot be read, pictures without references and references without a picture are left out and counted:
    unreadable, without_references, without_picture. A metric that could not be computed is None, with its reason.
    With `results` in the request they are scored, without a model; CLIPScore is then None. With `every_epoch` there are
    metrics of each epoch's checkpoint. With `list_experiments` the paper's experiments are all that is given. Raises
    InputError when checkpoint, results, pictures or references cannot be used.
    """
    if request.list_experiments:
        log.info("experiments of arXiv 2501.00437:\n%s", experiments_table())
        return {"experiments": {name: {"train": found.training, **found.paper} for name, found in EXPERIMENTS.items()}}
    require_metrics()
    with _spice_folder(request) as spice_folder:
        if request.results is not None:
            return _evaluate_results(request, request.results, spice_folder=spice_folder)
        if request.every_epoch:
            return _evaluate_every_epoch(request, spice_folder=spice_folder)
        started = time.monotonic()
        captioner = load_captioner(request.checkpoints, _here(request))
        return _evaluate(request, captioner, spice_folder=spice_folder, started=started)


def _evaluate(
    request: EvaluateRequest, captioner: Captioner, *, spice_folder: Path | None, started: float
) -> dict[str, Any]:
    """The metrics of one captioner, that of the request's checkpoints; `started`: when its loading began."""
    pictures = load_pictures(request.pictures, limit=request.limit)
    check_clip(captioner, pictures)
    if request.num_workers is None:
        found = caption_pictures(captioner, pictures)
    else:
        source = _source(request)
        found = caption_on_cluster(
            source, pictures=len(pictures), num_workers=request.num_workers, gpus_per_worker=request.gpus_per_worker
        )
    captions = found.captions
    if not captions:
        first = next(iter(found.unreadable.values()), "")
        raise InputError(f"{request.pictures.images}: none of its {len(pictures)} pictures can be read ({first})")
    references = {image_id: pictures.references[image_id] for image_id in captions}
    known = {} if request.pictures.references is None and request.features else coco_pictures(request.pictures)
    _store_captions(request, captions, known)
    with _captions_kept(request):
        summary, reasons = scored(captions, references, _domains(known), spice_folder=spice_folder)
        if request.features is None or request.clip is not None:
            summary |= _clip_metrics(captioner.clip, found.global_feature, captions, references)
        else:
            for name in ("CLIPScore", "RefCLIPScore"):
                summary[name] = None
                reasons[name] = "needs CLIP's text tower, which is not loaded with --features; name it with --clip"
        if request.shuffled_baseline:
            _shuffled(summary, reasons, captions, references, seed=request.seed)
    summary |= {
        "n": len(captions),
        "unreadable": len(found.unreadable),
        "without_references": pictures.without_references,
        "without_picture": pictures.without_picture,
        "bad_references": pictures.bad_references,
        "captions_per_second": round(len(captions) / found.seconds, 2),
        "seconds": round(time.monotonic() - started, 2),
    }
    return _finished(summary, reasons, request, captions, known, unreadable=found.unreadable)


def _shuffled(
    summary: dict[str, Any],
    reasons: dict[str, str],
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    seed: int,
) -> None:
    """Put the CIDEr of the captions given to other pictures into the summary, or the reason why there is none."""
    shuffled = deranged(captions, seed=seed)
    summary["CIDEr_shuffled"] = cider_only(shuffled, references) if shuffled else None
    if not shuffled:
        reasons["CIDEr_shuffled"] = "one picture cannot take another's caption"


def _store_captions(request: EvaluateRequest, captions: Mapping[str, str], known: Mapping[str, CocoPicture]) -> None:
    """Under OUT, where one is given, in place of an earlier evaluation's: its metrics go, for they are of others."""
    if request.out is None:
        return
    store = open_store(request.out)
    store.write_bytes(RESULTS_KEY, results_json(captions, known))
    _delete_earlier(store, EVALUATION_KEY)


def _delete_earlier(store: Store, key: str) -> None:
    """An object of an earlier evaluation under the same OUT."""
    try:
        if store.exists(key):
            store.delete(key)
    except (OSError, StoreFailure) as error:
        place = join(store.root, key)
        log.warning("%s: is of an earlier evaluation and cannot be deleted (%s)", place, first_line(error))


@contextmanager
def _captions_kept(request: EvaluateRequest) -> Iterator[None]:
    """What ends the metrics is one line, which says where the captions are: they took most of the time."""
    try:
        yield
    except (InputError, JavaFailed) as error:
        if request.results is not None:
            raise InputError(str(error)) from None
        kept = "the captions are not kept without --out"
        if request.out is not None:
            kept = f"the captions are there: score {join(open_store(request.out).root, RESULTS_KEY)} with --results"
        raise InputError(f"{error}; {kept}") from None


def _here(request: EvaluateRequest) -> EvaluateRequest:
    """What is asked of this process: where others caption, only CLIPScore's texts, on whatever this machine has."""
    if request.num_workers is None or request.device == "cpu":
        return request
    return replace(request, device="auto")


def _evaluate_every_epoch(request: EvaluateRequest, *, spice_folder: Path | None) -> dict[str, Any]:
    """The metrics of each epoch's checkpoint that a run has, and which epoch is the best by CIDEr. One that cannot be
    loaded is left out, and said.

    Raises InputError where the run has none that can.
    """
    started = time.monotonic()
    (run,) = request.checkpoints
    checkpoints, trained = epoch_checkpoints(run)
    epochs: list[dict[str, Any]] = []
    damaged: dict[int, InputError] = {}
    clip = None
    for epoch, checkpoint in checkpoints.items():
        begun = time.monotonic()
        out = None if request.out is None else join(request.out, epoch_folder(epoch))
        asked = replace(request, checkpoint=checkpoint, every_epoch=False, out=out)
        try:
            captioner = load_captioner(asked.checkpoints, _here(asked), clip=clip)
        except InputError as error:
            log.warning("epoch %d: left out, its checkpoint cannot be loaded (%s)", epoch, error)
            damaged[epoch] = error
            continue
        metrics = _evaluate(asked, captioner, spice_folder=spice_folder, started=begun)
        if request.features is None:
            clip = captioner.clip  # once loaded, for all epochs
        epochs.append({"epoch": epoch, **metrics})
        log.info("epoch %d of %d: CIDEr %s", epoch, trained, metrics["CIDEr"])
    if not epochs:
        raise next(iter(damaged.values()))
    gone = sorted(set(range(1, trained + 1)) - set(checkpoints))
    if gone:
        log.warning("epochs %s: not kept; train with --keep-checkpoints %d", ", ".join(map(str, gone)), trained)
    # Of equal ones the last, as in training.
    best = max(reversed(epochs), key=lambda row: -math.inf if row["CIDEr"] is None else row["CIDEr"])
    summary = {
        "epochs": epochs,
        "best": best,
        "not_kept": gone,
        **({"damaged": {str(epoch): str(error) for epoch, error in damaged.items()}} if damaged else {}),
        "seconds": round(time.monotonic() - started, 2),
    }
    if request.out is not None:
        document = {"metrics": summary, "request": asdict(request)}
        store = open_store(request.out)
        store.write_bytes(EPOCHS_KEY, document_bytes(document))
        for key in (EVALUATION_KEY, RESULTS_KEY):  # of one checkpoint; reports would show it
            _delete_earlier(store, key)
    return summary


@contextmanager
def _spice_folder(request: EvaluateRequest) -> Iterator[Path | None]:
    """A local folder with SPICE's models, None where there is none. Raises InputError for one that lacks them."""
    home = request.spice_home or os.environ.get(SPICE_HOME_VARIABLE)
    store = open_store(home) if home else None
    if store is None or store.is_local:
        yield require_spice(None if store is None else store.prefix)
        return
    if missing := [name for name in SPICE_MODELS if not store.exists(name)]:
        raise InputError(f"--spice-home {home}: has no {' and no '.join(missing)}")
    with temporary_folder("spice") as folder:
        for name in SPICE_MODELS:
            (folder / name).write_bytes(store.read_bytes(name))
        yield folder


def _evaluate_results(request: EvaluateRequest, results: str, *, spice_folder: Path | None) -> dict[str, Any]:
    """The metrics of a COCO results file, whoever made it.

    An image id is the number that the references' file gives the picture, or any name that a picture of it might have
    (`candidate_ids`). Captions of pictures without references are left out and counted (without_references), as are
    references without a caption (without_picture). Raises InputError when the file or the references cannot be used.
    """
    started = time.monotonic()
    given = read_results(read_uri(results), source=results)
    read = picture_references(request.pictures)
    references, known = read.by_image, coco_pictures(request.pictures)
    matched = _matched(given, references, known, source=results)
    captions = {image_id: matched[image_id] for image_id in sorted(matched)[: request.limit]}
    if not captions:
        raise InputError(
            f"{results}: none of its {len(given)} image ids (such as {next(iter(given))!r}) is among the "
            f"{len(references)} of the references (such as {next(iter(references))!r}); check --references and --split"
        )
    kept = {image_id: references[image_id] for image_id in captions}
    with _captions_kept(request):
        summary, reasons = scored(captions, kept, _domains(known), spice_folder=spice_folder)
        if request.shuffled_baseline:
            _shuffled(summary, reasons, captions, kept, seed=request.seed)
    for name in ("CLIPScore", "RefCLIPScore"):
        summary[name] = None
        reasons[name] = "needs --checkpoint and --images"
    summary |= {
        "n": len(captions),
        "without_references": len(given) - len(matched),
        "without_picture": len(references) - len(matched),
        "bad_references": read.left_out.total(),
        "seconds": round(time.monotonic() - started, 2),
    }
    return _finished(summary, reasons, request, captions, known, unreadable={})


def _matched(
    given: Mapping[str, str], references: Collection[str], known: Mapping[str, CocoPicture], *, source: str
) -> dict[str, str]:
    """Image id of the references -> caption. Raises InputError for two captions of one picture."""
    by_number = {str(picture.number): image_id for image_id, picture in known.items()}
    names = reference_names(references)
    matched: dict[str, str] = {}
    for name, caption in given.items():
        candidates = (by_number.get(name), *candidate_ids(name))
        image_id = next((names[each] for each in candidates if each is not None and each in names), None)
        if image_id in matched:
            raise InputError(f"{source}: two captions for image id {image_id} ({name!r} is the second); keep one")
        if image_id is not None:
            matched[image_id] = caption
    return matched


def _domains(known: Mapping[str, CocoPicture]) -> dict[str, str]:
    return {image_id: picture.domain for image_id, picture in known.items() if picture.domain is not None}


def scored(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str],
    *,
    spice_folder: Path | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """(COCO metrics, reasons of those that are None). Where references name domains, as those of NoCaps do,
    "domains" holds the metrics of each domain's pictures by themselves, as its benchmark reports them.
    """
    summary = coco_metrics(captions, references, spice_folder=spice_folder)
    reasons = summary.pop("reasons")
    named = {domains[image_id] for image_id in captions if image_id in domains}
    if named:
        summary["domains"] = {}
    for domain in sorted(named):
        inside = {image_id: caption for image_id, caption in captions.items() if domains.get(image_id) == domain}
        metrics = coco_metrics(
            inside, {image_id: references[image_id] for image_id in inside}, spice_folder=spice_folder
        )
        metrics.pop("reasons")
        summary["domains"][domain] = {**metrics, "n": len(inside)}
    return summary, reasons


def _source(request: EvaluateRequest) -> CaptionerSource:
    return CaptionerSource(
        checkpoint=tuple(open_store(checkpoint).address for checkpoint in request.checkpoints),
        clip=request.clip and clip_anywhere(request.clip),
        device=request.device,
        beam_size=request.beam_size,
        pictures=source_anywhere(request.pictures),
        limit=request.limit,
        concepts=None if request.concepts is None else read_concepts(request.concepts),
        weights=tuple(map(weights_sha256, request.checkpoints)),
    )


def _finished(
    summary: dict[str, Any],
    reasons: dict[str, str],
    request: EvaluateRequest,
    captions: Mapping[str, str],
    known: Mapping[str, CocoPicture],
    *,
    unreadable: Mapping[str, str],
) -> dict[str, Any]:
    """The summary with the experiment's comparison, written under OUT, where one is given, right after its captions:
    while the metrics were computed, another evaluation may have put its own there."""
    if reasons:
        summary["reasons"] = reasons
    if request.experiment is not None:
        summary["paper"] = comparison(request.experiment, summary)
        log.info("%s", comparison_table(request.experiment, summary["paper"]))
    if request.out is not None:
        store = open_store(request.out)
        _store_captions(request, captions, known)
        asked = {**asdict(request), "pictures": asdict(request.pictures)}
        document = {"metrics": summary, "request": asked, "unreadable": unreadable}
        store.write_bytes(EVALUATION_KEY, document_bytes(document))
        summary["results"] = join(store.root, RESULTS_KEY)
    return summary


def read_results(data: bytes, *, source: str) -> dict[str, str]:
    """Image id -> caption of a COCO results file: [{"image_id": 42, "caption": "..."}]."""
    try:
        rows = read_document(data)
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error}); a COCO results file is a list of image_id, caption") from None
    captions: dict[str, str] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        image_id, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if type(image_id) not in (int, str) or not isinstance(caption, str):
            raise InputError(f"{source}: {str(row)[:80]!r} is not {{'image_id': ..., 'caption': '...'}}")
        if str(image_id) in captions:
            raise InputError(f"{source}: two captions for image id {image_id}; keep one")
        captions[str(image_id)] = caption
    if not captions:
        raise InputError(f"{source}: holds no captions")
    return captions


def results_json(captions: Mapping[str, str], known: Mapping[str, CocoPicture] | None = None) -> bytes:
    """COCO's results file. Ids are the numbers of the references' file where it has them, as COCO's tools expect."""
    numbers = {image_id: picture.number for image_id, picture in (known or {}).items()}
    results = [
        {
            "image_id": numbers.get(image_id, int(image_id) if _is_number(image_id) else image_id),
            "caption": caption,
        }
        for image_id, caption in captions.items()
    ]
    return json_bytes(json.dumps(results, ensure_ascii=False, indent=0) + "\n")


def deranged(captions: Mapping[str, str], *, seed: int) -> dict[str, str]:
    """The captions given to other pictures: one random cycle through all (Sattolo), so no picture keeps its own.

    Empty where there is only one picture.
    """
    image_ids = list(captions)
    if len(image_ids) < 2:
        return {}
    random = np.random.default_rng(seed)
    order = np.arange(len(image_ids))
    for i in range(len(order) - 1, 0, -1):
        j = random.integers(i)  # below i: what makes it one cycle
        order[i], order[j] = order[j], order[i]
    return {image_id: captions[image_ids[other]] for image_id, other in zip(image_ids, order, strict=True)}


def _clip_metrics(
    clip: ClipEncoder, global_feature: np.ndarray, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """CLIPScore and RefCLIPScore with the captioner's own CLIP."""
    candidates = clip.encode_texts([clipscore_text(caption) for caption in captions.values()])  # (n, D)
    flat = [clipscore_text(text) for image_id in captions for text in references[image_id]]
    ends = np.cumsum([len(references[image_id]) for image_id in captions])
    return clip_scores(global_feature, candidates, np.split(clip.encode_texts(flat), ends[:-1]))


def _is_number(image_id: str) -> bool:
    return image_id.isdecimal() and len(image_id) < 19 and str(int(image_id)) == image_id
