"""Evaluation as the field does it: captions of real pictures by beam search, and every COCO metric of them.

Under OUT: captions.json in COCO's results format, and metrics.json with the metrics and what they were computed on.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.pictures import PictureSource, encode_pictures, load_picture_set
from cluster.storage import join, local_copy, open_store
from pcm.captioner import MODEL_FILE, Captioner
from pcm.clip import ClipEncoder
from pcm.errors import InputError
from pcm.metrics import cider_only, clip_scores, clipscore_text, coco_metrics

log = logging.getLogger(__name__)

RESULTS_KEY = "captions.json"
METRICS_KEY = "metrics.json"
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What a user asks for; paths or URIs."""

    checkpoint: str
    pictures: PictureSource
    out: str | None = None
    beam_size: int = 3
    limit: int | None = None  # the first pictures by image id only
    shuffled_baseline: bool = False  # also CIDEr of the same captions given to other pictures
    seed: int = 0  # of the shuffling
    clip: str | None = None  # where the checkpoint's CLIP has moved
    device: str = "auto"


def evaluate(request: EvaluateRequest) -> dict[str, Any]:
    """Metrics as fractions (CIDEr 1.138 is "113.8"), and n, the number of pictures they are over.

    Pictures that cannot be read, pictures without references and references without a picture are left out and counted:
    unreadable, without_references, without_picture. A metric that could not be computed is None, with its reason.
    Raises InputError when checkpoint, pictures or references cannot be used.
    """
    started = time.monotonic()
    captioner = Captioner.load(
        local_checkpoint(request.checkpoint), clip=request.clip, device=request.device, beam_size=request.beam_size
    )
    pictures = load_picture_set(request.pictures, limit=request.limit)
    captions: dict[str, str] = {}
    global_features = []
    unreadable: dict[str, str] = {}
    last_line = time.monotonic()
    for batch in encode_pictures(pictures, captioner.clip):
        described = captioner.describe(batch.features)
        captions |= {image_id: found.caption for image_id, found in zip(batch.image_ids, described, strict=True)}
        global_features.append(batch.features.global_feature)
        unreadable |= batch.unreadable
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            log.info("%d of %d pictures captioned", len(captions) + len(unreadable), len(pictures))
    if not captions:
        raise InputError(f"{request.pictures.images}: none of its {len(pictures)} pictures can be read")
    captioned = time.monotonic()
    references = {image_id: pictures.references[image_id] for image_id in captions}
    metrics = coco_metrics(captions, references)
    reasons = metrics.pop("reasons")
    summary = {
        **metrics,
        **_clip_metrics(captioner.clip, np.concatenate(global_features), captions, references),
        "n": len(captions),
        "unreadable": len(unreadable),
        "without_references": pictures.without_references,
        "without_picture": pictures.without_picture,
        "captions_per_second": round(len(captions) / (captioned - started), 2),
    }
    if request.shuffled_baseline:
        shuffled = deranged(captions, seed=request.seed)
        summary["CIDEr_shuffled"] = cider_only(shuffled, references) if shuffled else None
        if not shuffled:
            reasons["CIDEr_shuffled"] = "one picture cannot take another's caption"
    if reasons:
        summary["reasons"] = reasons
    if request.out is not None:
        store = open_store(request.out)
        store.write_bytes(RESULTS_KEY, results_json(captions))
        document = {"metrics": summary, "request": asdict(request), "unreadable": unreadable}
        store.write_bytes(METRICS_KEY, (json.dumps(document, indent=1) + "\n").encode())
        summary["results"] = join(store.root, RESULTS_KEY)
    return summary


def local_checkpoint(uri: str) -> Path:
    """A local folder with the captioner at `uri`: a checkpoint, or a run, whose best one it is."""
    store = open_store(uri)
    in_run = not store.exists(MODEL_FILE) and store.exists(f"best/{MODEL_FILE}")
    return local_copy(join(uri, "best") if in_run else uri)


def results_json(captions: Mapping[str, str]) -> bytes:
    """COCO's results file. Ids that are COCO's numbers are written as numbers, as its own tools expect."""
    results = [
        {"image_id": int(image_id) if _is_number(image_id) else image_id, "caption": caption}
        for image_id, caption in captions.items()
    ]
    return (json.dumps(results, ensure_ascii=False, indent=0) + "\n").encode()


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
    return image_id.isdecimal() and str(int(image_id)) == image_id
