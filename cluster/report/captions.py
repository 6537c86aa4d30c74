"""Sample captions of pictures, with what the mix-up saw in each: its concepts, and the patches it made textual."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from cluster.evaluation.captioners import load_captioner
from cluster.evaluation.request import CaptionerOptions
from cluster.report.gallery import thumbnail
from cluster.sources.pictures import PictureSet, PictureSource, load_picture_set
from cluster.store.store import open_store
from pcm.captioners.captioner import MODEL_FILE
from pcm.captioners.pcmnet.patch_overlay import TextualPatch, textual_patches
from pcm.errors import InputError

SAMPLES = 12


@dataclass(frozen=True, kw_only=True)
class CaptionedPicture:
    """A picture as CLIP sees it, its caption, and what led to it."""

    image_id: str
    uri: str  # the picture as a data URI
    caption: str
    references: tuple[str, ...]
    concepts: tuple[tuple[str, float, bool], ...]  # the K retrieved: (name, probability, above the threshold)
    patches: tuple[TextualPatch, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionSamples:
    """Pictures drawn by a seed, on a grid of rows x columns patches; those that could not be read are named."""

    pictures: tuple[CaptionedPicture, ...]
    total: int
    source: str
    rows: int
    columns: int
    unreadable: tuple[str, ...]


def has_checkpoint(run: str) -> bool:
    """Whether a run (or a checkpoint's folder) has a captioner yet."""
    store = open_store(run)
    return store.exists(MODEL_FILE) or store.exists(f"best/{MODEL_FILE}")


@torch.inference_mode()
def caption_samples(
    checkpoint: str, source: PictureSource, *, seed: int, clip: str | None = None, device: str = "auto"
) -> CaptionSamples:
    """Caption SAMPLES pictures in this process. Raises InputError as jobs.evaluate does."""
    pictures = load_picture_set(source)
    captioner = load_captioner((checkpoint,), CaptionerOptions(clip=clip, device=device))
    order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
    opened, unreadable = _opened(pictures, sorted(order[:SAMPLES]))
    if not opened:
        raise InputError(f"{source.images}: none of the {len(unreadable)} pictures that were drawn can be read")
    clip_encoder = captioner.clip
    features = clip_encoder.encode_images(list(opened.values()))
    found = captioner.model.find_pairs(
        *(
            torch.from_numpy(array).to(captioner.model.concept_embeddings.device)
            for array in (features.global_feature, features.patch_features)
        )
    )
    columns = clip_encoder.patch_columns
    described = captioner.describe(features)
    return CaptionSamples(
        pictures=tuple(
            CaptionedPicture(
                image_id=pictures.image_ids[position],
                uri=thumbnail(clip_encoder.seen(image)),
                caption=described[index].caption,
                references=tuple(pictures.references[pictures.image_ids[position]]),
                concepts=tuple(
                    (captioner.concepts.names[concept], probability, kept)
                    for concept, probability, kept in zip(
                        found.top_concepts[index].tolist(),
                        found.top_probabilities[index].tolist(),
                        found.kept[index].tolist(),
                        strict=True,
                    )
                ),
                patches=tuple(textual_patches(found, index, columns=columns)),
            )
            for index, (position, image) in enumerate(opened.items())
        ),
        total=len(pictures),
        source=source.images,
        rows=clip_encoder.num_patches // columns,
        columns=columns,
        unreadable=tuple(unreadable),
    )


def _opened(pictures: PictureSet, positions: list[int]) -> tuple[dict[int, Image.Image], list[str]]:
    opened: dict[int, Image.Image] = {}
    unreadable = []
    for position in positions:
        try:
            opened[position] = pictures.open(position)
        except InputError as error:
            unreadable.append(str(error))
    return opened, unreadable
