"""What the mix-up and the clip scores do on the data, before any training: which patches become textual, whether their
concepts are right, whether scores tell good pictures from bad ones.

Nothing here is learned, so one pass over a dataset tells all. The scene behind every caption is known: its things, and
the boxes at which the text-to-image model was taught to draw them.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from benchmarks.experiments.runs import data_path, planned
from benchmarks.experiments.scenes import scenes_of, thing_masks
from benchmarks.experiments.settings import DOMAINS, EXPERIMENTS, MAIN
from cluster.dataset.documents import StoredShard, load_manifest
from cluster.dataset.rows import Rows, read_rows, read_shard
from cluster.store.store import Store, open_store
from cluster.training.run_spec import RunSpec
from pcm.captioners.pcmnet.model import PCMNet
from pcm.clip.encoder import ClipEncoder
from pcm.embedded.making.world import NOUNS, SIZE, Scene
from pcm.images import open_image
from pcm.text.concepts import ConceptVocabulary, embed, lexicon_nouns

log = logging.getLogger(__name__)

#: A patch is on a thing if the thing's box covers this share of it.
COVERED = 0.5
BATCH = 250
OBJECTS = tuple(noun.name for noun in NOUNS)


@dataclass(frozen=True)
class Findings:
    """The mix-up's findings for n pictures."""

    concepts: np.ndarray  # (n, K) indices of concepts, most probable first
    probabilities: np.ndarray  # (n, K)
    pair_patches: np.ndarray  # (n, M) patches of the selected pairs, best first
    pair_concepts: np.ndarray  # (n, M) their concepts: indices of the vocabulary
    textual: np.ndarray  # (n, N) boolean


def dissect(out: Path, *, judge: Path | None) -> dict[str, Any]:
    """Figures of the main domain's drawn and rendered pictures, also written to OUT/dissect.json."""
    run = planned([EXPERIMENTS["ablation"].variants[-1]], out, seeds=1)[0].run
    names = ConceptVocabulary.from_bytes(run.vocabularies.concepts).names
    found: dict[str, Any] = {
        "concepts": len(names),
        "objects_that_are_concepts": sorted(set(OBJECTS) & set(names)),
        "objects_that_are_not": sorted(set(OBJECTS) - set(names)),
        "K": run.config.model.top_concepts,
        "M": run.config.model.top_patches,
        "judge": "independent classifier" if judge else "the packed CLIP, zero-shot (not independent)",
    }
    for data in ("drawn", "rendered"):
        store = open_store(data_path(out, MAIN, data))
        if store.exists("dataset.json"):
            found[data] = _of_dataset(store, run, names, judge)
    (out / "dissect.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _of_dataset(store: Store, run: RunSpec, names: Sequence[str], judge: Path | None) -> dict[str, Any]:
    manifest = load_manifest(store)
    clip = manifest.spec.clip
    encoder = ClipEncoder(clip.model, device="cpu", batch_size=clip.batch_size)
    rows = Rows.concatenate([read_rows(store, shard, None, manifest.features) for shard in manifest.stored_shards])
    images = np.concatenate([_images(store, shard) for shard in manifest.stored_shards])
    pairs = scenes_of(DOMAINS[MAIN], manifest.expected)
    scenes = [pairs[int(sample_id.partition("-")[0])][0] for sample_id in rows.sample_ids]
    findings = found_pairs(run, rows)
    seen = recognised(images, scenes, rows, encoder, judge)
    return {
        "pictures": len(rows),
        "things_recognised": _share([value for each in seen for value in each]),
        "pictures_with_all_things": _share([all(each) for each in seen]),
        "concepts": concept_figures(findings, rows.captions.tolist(), scenes, names),
        "patches": patch_figures(findings, scenes, seen, names),
        "scores": score_figures(rows, encoder, seen, weight=run.config.clip_weight),
    }


def _images(store: Store, shard: StoredShard) -> np.ndarray:
    """(n, SIZE, SIZE, 3) uint8 pictures of a shard."""
    pictures = [open_image(row["bytes"]) for row in read_shard(store, shard, ["image"])["image"].to_pylist()]
    return np.stack(
        [np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)) for picture in pictures]
    )


def found_pairs(run: RunSpec, rows: Rows) -> Findings:
    """Eqs. 1 and 2 and the selection with the run's settings; no trained weight takes part."""
    model = PCMNet(run.config.model)
    model.set_concepts(torch.from_numpy(ConceptVocabulary.from_bytes(run.vocabularies.concepts).embeddings))
    model.set_clip_head(safetensors.torch.load(run.vocabularies.clip_head))
    parts = []
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        found = model.find_pairs(
            torch.from_numpy(rows.global_feature[part]).float(), torch.from_numpy(rows.patch_features[part]).float()
        )
        patches, places = (
            found.selected_pairs // run.config.model.top_concepts,
            found.selected_pairs % run.config.model.top_concepts,
        )
        parts.append(
            (found.top_concepts, found.top_probabilities, patches, found.top_concepts.gather(1, places), found.mix_mask)
        )
    return Findings(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def recognised(
    images: np.ndarray, scenes: Sequence[Scene], rows: Rows, encoder: ClipEncoder, judge: Path | None
) -> list[list[bool]]:
    """For every thing of every scene: whether its noun is among the picture's likeliest, as many as the scene has."""
    if judge is not None:
        from pcm.embedded.making.classifier import judge as verdict

        scores = verdict(judge, images).nouns  # (n, nouns)
    else:
        scores = rows.global_feature.astype(np.float32) @ embed(OBJECTS, encoder.encode_texts).T
    order = np.argsort(-scores, axis=1)
    top = [{OBJECTS[index] for index in ranks[: len(scene.nouns)]} for ranks, scene in zip(order, scenes, strict=True)]
    return [[thing.noun in found for thing in scene.things] for found, scene in zip(top, scenes, strict=True)]


def concept_figures(
    findings: Findings, captions: Sequence[str], scenes: Sequence[Scene], names: Sequence[str]
) -> dict[str, Any]:
    """How often retrieved concepts are right, by K: precision and recall against the caption's nouns that are concepts,
    and recall of the scene's things."""
    said = [set(lexicon_nouns([caption])) & set(names) for caption in captions]
    result: dict[str, Any] = {
        "mean_nouns_in_caption": round(float(np.mean([len(each) for each in said])), 2),
        "probability_of_the_first": round(float(findings.probabilities[:, 0].mean()), 3),
    }
    for count in range(1, findings.concepts.shape[1] + 1):
        retrieved = [{names[index] for index in row[:count]} for row in findings.concepts]
        wrong = [len((each & set(OBJECTS)) - scene.nouns) for each, scene in zip(retrieved, scenes, strict=True)]
        result[f"K={count}"] = {
            "precision": _share([len(a & b) / count for a, b in zip(retrieved, said, strict=True)]),
            "recall": _share([len(a & b) / len(b) for a, b in zip(retrieved, said, strict=True) if b]),
            "things_recalled": _share(
                [noun in a for a, scene in zip(retrieved, scenes, strict=True) for noun in scene.nouns]
            ),
            "things_not_in_the_scene": round(float(np.mean(wrong)), 2),
        }
    return result


def patch_figures(
    findings: Findings, scenes: Sequence[Scene], seen: Sequence[Sequence[bool]], names: Sequence[str]
) -> dict[str, Any]:
    """Where the selected pairs lie, what they say, and whether things that are not recognised are mixed up more."""
    grid = round(findings.textual.shape[1] ** 0.5)
    on_thing, area, kinds, place = [], [], [], []
    by_fate: dict[bool, dict[str, list[float]]] = {
        fate: {"selected": [], "named": [], "misnamed": []} for fate in (True, False)
    }
    for row, (scene, fates) in enumerate(zip(scenes, seen, strict=True)):
        masks = thing_masks(scene, side=SIZE, grid=grid) >= COVERED  # (things, N)
        covered = masks.any(axis=0)
        area.append(float(covered.mean()))
        concepts = [names[index] for index in findings.pair_concepts[row]]
        patches = findings.pair_patches[row]
        on_thing += covered[patches].tolist()
        for patch, concept in zip(patches, concepts, strict=True):
            is_object = concept in OBJECTS
            kinds.append(
                "thing of the scene" if concept in scene.nouns else "other thing" if is_object else "other word"
            )
            if concept in scene.nouns:
                own = masks[[thing.noun == concept for thing in scene.things]]
                place.append(bool(own.any(axis=0)[patch]))
        for thing, fate, mask in zip(scene.things, fates, masks, strict=True):
            inside = [concept for patch, concept in zip(patches, concepts, strict=True) if mask[patch]]
            by_fate[fate]["selected"].append(float(findings.textual[row][mask].mean()))
            by_fate[fate]["named"].append(float(thing.noun in inside))
            by_fate[fate]["misnamed"].append(float(any(c in OBJECTS and c != thing.noun for c in inside)))
    return {
        "textual_patches_a_picture": round(float(findings.textual.sum(axis=1).mean()), 2),
        "selected_pairs_on_things": _share(on_thing),
        "share_of_patches_on_things": _share(area),
        "pairs_that_name": {kind: _share([found == kind for found in kinds]) for kind in sorted(set(kinds))},
        "pairs_that_name_a_thing_of_the_scene_and_lie_on_it": _share(place),
        "things": {
            "recognised" if fate else "not recognised": {
                "things": len(values["selected"]),
                "share_of_its_patches_made_textual": _share(values["selected"]),
                "a_patch_says_its_name": _share(values["named"]),
                "a_patch_says_another_things_name": _share(values["misnamed"]),
            }
            for fate, values in by_fate.items()
        },
    }


def score_figures(rows: Rows, encoder: ClipEncoder, seen: Sequence[Sequence[bool]], *, weight: float) -> dict[str, Any]:
    """Scores of the pairs, of shuffled pairs, and of pictures with and without all their things."""
    texts = encoder.encode_texts(rows.captions.tolist())
    images = rows.global_feature.astype(np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = (images[order] * texts[np.roll(order, 1)]).sum(axis=1)  # one cycle through all: nobody keeps its own
    good = np.array([all(each) for each in seen])
    scores = rows.clip_score
    weights = np.clip(weight * scores, 0, 1)
    return {
        "mean": round(float(scores.mean()), 4),
        "std": round(float(scores.std()), 4),
        "shuffled_mean": round(float(shuffled.mean()), 4),
        "matched_above_shuffled": auc(scores, shuffled),
        "mean_all_things_recognised": _mean(scores[good]),
        "mean_not_all_recognised": _mean(scores[~good]),
        "all_recognised_above_not": auc(scores[good], scores[~good]),
        "share_recognised_by_quarter_of_score": [
            _share(good[part].tolist()) for part in np.array_split(np.argsort(scores), 4)
        ],
        "w": weight,
        "loss_weight_mean": round(float(weights.mean()), 4),
        "loss_weight_std": round(float(weights.std()), 4),
        "loss_weight_share_at_1": _share((weights >= 1).tolist()),
    }


def auc(higher: np.ndarray, lower: np.ndarray) -> float | None:
    """Probability that a random one of `higher` is above a random one of `lower`; ties count half."""
    if not len(higher) or not len(lower):
        return None
    values = np.concatenate([higher, lower])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, the mean of ties
    total = ranks[: len(higher)].sum() - len(higher) * (len(higher) + 1) / 2
    return round(float(total / (len(higher) * len(lower))), 4)


def _share(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
