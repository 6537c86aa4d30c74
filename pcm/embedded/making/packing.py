"""Assembles the pack: models, test sets, corpus, licences and a model card with freshly measured figures."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from pcm.embedded import CORPORA, test_set_file
from pcm.embedded.making.captions import CORPUS_SIZE, corpus
from pcm.embedded.making.cards import LICENSES, model_card
from pcm.embedded.making.classifier import recognised
from pcm.embedded.making.clip_training import new_clip, save_clip
from pcm.embedded.making.graded_sheet import graded_sheet
from pcm.embedded.making.judging import Painted, contact_sheet, judge_clip, judge_scenes, paint
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.test_sets import write_test_set
from pcm.embedded.making.world import DOMAINS, PLACES
from pcm.errors import InputError

log = logging.getLogger(__name__)

TEST_SIZES = {"val": 100, "test": 200}
LIMIT_BYTES = 30_000_000


def write_pack(work: Path, art_folder: Path, pack: Path) -> dict:
    """Writes the whole pack into `pack` and returns its figures. Raises InputError when a model is not trained yet."""
    for name in ("clip.pt", "judge.pt", "t2i/model_index.json"):
        if not (work / name).exists():
            raise InputError(f"{work / name} not found: run the stages art, clip, judge and t2i first")
    pack.mkdir(parents=True, exist_ok=True)
    clip_state = torch.load(work / "clip.pt", weights_only=True)
    _write_clip(clip_state["model"], pack / "clip")
    shutil.rmtree(pack / "t2i", ignore_errors=True)
    shutil.copytree(work / "t2i", pack / "t2i")
    for domain in DOMAINS.values():
        captions = corpus(random.Random(domain.corpus_seed), CORPUS_SIZE, domain)
        (pack / CORPORA[domain.corpus]).write_text("\n".join(captions) + "\n")
        for split, count in TEST_SIZES.items():
            write_test_set(pack / test_set_file(domain.test_sets[split]), domain, split, count, art_folder)
    (pack / "LICENSES.md").write_text(LICENSES)
    log.info("measuring")
    check = {name: SceneSet.load(work / "data" / f"check_{name}.npz") for name in ("seen", "unseen", "second")}
    figures: dict = {"captions": CORPUS_SIZE, "clip": judge_clip(pack / "clip", check)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seconds a picture are stated for one core
    painted = paint(pack / "t2i", judge_scenes())
    torch.set_num_threads(threads)
    figures["judge"] = torch.load(work / "judge.pt", weights_only=True)["figures"]
    figures["t2i"] = _recognised(work, painted) | {"cpu_seconds_a_picture": round(painted.cpu_seconds_a_picture, 3)}
    contact_sheet(painted, pack / "samples.png")
    graded_sheet(pack / "clip", painted).save(pack / "samples_by_score.png", optimize=True)
    figures["training"] = _training(work, clip_state)
    size = sum(file.stat().st_size for file in pack.rglob("*") if file.is_file())
    figures["megabytes"] = round(size / 1e6, 1)
    (pack / "MODEL_CARD.md").write_text(model_card(figures))
    (pack / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if size > LIMIT_BYTES:
        raise InputError(f"the pack in {pack} has {size} bytes: at most {LIMIT_BYTES} are allowed; use smaller models")
    return figures


def _recognised(work: Path, painted: Painted) -> dict:
    """The shares of generated pictures in which the independent classifier finds what was asked for."""
    places = np.array([PLACES.index(scene.place) for scene in painted.scenes])
    return recognised(work, painted.images, [sorted(scene.nouns) for scene in painted.scenes], places)


def _write_clip(state: dict[str, torch.Tensor], folder: Path) -> None:
    model = new_clip(state["token_embedding.weight"].shape[0])
    model.load_state_dict(state)
    save_clip(model, folder, half=True)


def _training(work: Path, clip_state: dict) -> dict:
    """Steps and seconds of every training that left a checkpoint in `work`."""
    states = {"clip": clip_state}
    for name in ("judge", "vae", "text", "denoiser"):
        states[name] = torch.load(work / f"{name}.pt", weights_only=True)
    return {name: {"steps": state["step"], "seconds": round(state["seconds"])} for name, state in states.items()}
