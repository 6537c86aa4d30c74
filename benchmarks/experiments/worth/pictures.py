"""Test and validation pictures, and the classifier that judges pictures: made once, kept under OUT/worth.

The pictures are rendered scenes in the drawing style that no training sees, with five references each. What is in them
is known, so a caption's nouns can be checked, too. Their features are computed once for all runs.
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.experiments.results import write_whole
from benchmarks.experiments.worth.settings import (
    DRAWN,
    JUDGE_CHECK,
    JUDGE_SCENES,
    JUDGE_STEPS,
    SCENES_SEED,
    TEST_PICTURES,
    VALIDATION_PICTURES,
)
from cluster.dataset.documents import Manifest
from cluster.dataset.rows import read_shard
from cluster.store.store import Store
from pcm.clip.encoder import ClipEncoder
from pcm.embedded.making.captions import references
from pcm.embedded.making.classifier import ClassifierTraining, judge, train_classifier
from pcm.embedded.making.scenes import SceneSet, draw_scenes, sample_scenes
from pcm.embedded.making.test_sets import REFERENCES, test_scenes
from pcm.embedded.making.world import BY_NAME, FIRST, NOUNS, PAINTER_STYLE, SIZE
from pcm.images import open_image

_NAMES = tuple(noun.name for noun in NOUNS)
#: Seeds of the scenes that the classifier learns from and is checked on, as in pcm/embedded/making/stages.py.
_JUDGE_SEEDS = {"train": 5, "check": 6}


@dataclass(frozen=True)
class Pictures:
    """`n` pictures as features, and what is in them."""

    global_feature: np.ndarray  # (n, D) float16
    patch_features: np.ndarray  # (n, N, D_v) float16
    references: list[list[str]]
    nouns: list[list[str]]  # of the scene, each once
    recognised: list[list[str]]  # those of them that the classifier finds in the picture

    def __len__(self) -> int:
        return len(self.references)

    def references_by_id(self) -> dict[str, list[str]]:
        return {str(number): texts for number, texts in enumerate(self.references)}


def worth_folder(out: Path) -> Path:
    return out / "worth"


def data_folder(out: Path, painter: str, data: str = DRAWN) -> Path:
    return worth_folder(out) / "data" / painter / data.replace(", ", "-then-").replace(" ", "-")


def judge_folder(out: Path) -> Path:
    return worth_folder(out) / "judge"


def make_judge(out: Path, art: Path) -> dict[str, float]:
    """Train the classifier, or go on with it; the shares of held-out rendered scenes that it names."""
    return train_judge(judge_folder(out), art, seed=0, scene_seeds=_JUDGE_SEEDS)


def train_judge(folder: Path, art: Path, *, seed: int, scene_seeds: Mapping[str, int]) -> dict[str, float]:
    """The same of any classifier of this kind, in a folder of its own. `scene_seeds`: of "train" and "check"."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = []
    for name, count in (("train", JUDGE_SCENES), ("check", JUDGE_CHECK)):
        path, scene_seed = folder / f"{name}.npz", scene_seeds[name]
        if not path.exists():
            scenes = sample_scenes(
                scene_seed, count, style=PAINTER_STYLE, varieties=("plain", "varied"), domains=(FIRST,)
            )
            draw_scenes(scenes, art, scene_seed).save(path)
        sets.append(SceneSet.load(path))
    figures = train_classifier(*sets, folder, ClassifierTraining(steps=JUDGE_STEPS, seed=seed))
    write_whole(folder / "figures.json", json.dumps(figures))
    return figures


def make_pictures(out: Path, art: Path) -> None:
    """Render, featurise and judge the test and the validation pictures, those that are missing."""
    folder = worth_folder(out) / "pictures"
    if all((folder / f"{name}.npz").exists() for name in ("validation", "test")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    scenes = test_scenes(SCENES_SEED, TEST_PICTURES + VALIDATION_PICTURES)  # of different content, so no test scene
    words = random.Random(SCENES_SEED + 1)  # is a validation scene
    texts = [references(scene, words, REFERENCES) for scene in scenes]
    images = draw_scenes(scenes, art, SCENES_SEED).images
    encoder = ClipEncoder("embedded", device="cpu", batch_size=64)
    found = encoder.encode_images([Image.fromarray(image) for image in images])
    nouns = [sorted(scene.nouns) for scene in scenes]
    seen = recognised(out, images, nouns)
    for name, part in (("test", slice(TEST_PICTURES)), ("validation", slice(TEST_PICTURES, None))):
        path = folder / f"{name}.npz"
        known = {"references": texts[part], "nouns": nouns[part], "recognised": seen[part]}
        np.savez(
            path.with_suffix(".part.npz"),
            global_feature=found.global_feature[part].astype(np.float16),
            patch_features=found.patch_features[part].astype(np.float16),
            images=images[part],
            known=np.array(json.dumps(known)),
        )
        os.replace(path.with_suffix(".part.npz"), path)


def load_pictures(out: Path, name: str) -> Pictures:
    data = np.load(worth_folder(out) / "pictures" / f"{name}.npz")
    return Pictures(data["global_feature"], data["patch_features"], **json.loads(str(data["known"])))


def dataset_pictures(store: Store, manifest: Manifest) -> np.ndarray:
    """(n, SIZE, SIZE, 3) uint8, as the classifier takes them, in the order of the rows."""
    tables = [read_shard(store, shard, ["image"]) for shard in manifest.stored_shards]
    return np.stack([_pixels(row["bytes"]) for table in tables for row in table["image"].to_pylist()])


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def record_of(sample_id: str) -> int:
    """The number of the caption in its corpus."""
    return int(sample_id.partition("-")[0])


def recognised(out: Path, images: np.ndarray, nouns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Of each picture's k nouns those that are among the k that the classifier is surest of; images (n, 64, 64, 3)."""
    surest = np.argsort(-judge(judge_folder(out), images).nouns, axis=1, kind="stable")
    top = [{_NAMES[index] for index in row[: len(names)]} for row, names in zip(surest, nouns, strict=True)]
    return [[name for name in names if name in found] for names, found in zip(nouns, top, strict=True)]


def said(caption: str, nouns: Sequence[str]) -> int:
    """How many of these nouns a caption names, as one or as several."""
    words = set(caption.split())
    return sum(bool({name, BY_NAME[name].plural} & words) for name in nouns)


def one_thread() -> None:
    """Small networks gain little by a second thread, and the rest of the machine may be in use."""
    torch.set_num_threads(1)
