"""Assembles the pack: models, test sets, corpus, licences and a model card with freshly measured figures."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from pcm.embedded.captions import corpus
from pcm.embedded.cards import LICENSES, model_card
from pcm.embedded.clip_training import save_clip
from pcm.embedded.judging import contact_sheet, judge_clip, judge_scenes, paint, recognised
from pcm.embedded.scenes import SceneSet
from pcm.embedded.test_sets import write_test_set
from pcm.errors import InputError

log = logging.getLogger(__name__)

CORPUS_SIZE = 24_000
CORPUS_SEED, VAL_SEED, TEST_SEED = 1000, 2000, 3000
LIMIT_BYTES = 30_000_000


def write_pack(work: Path, art_folder: Path, pack: Path) -> dict:
    """Writes the whole pack into `pack` and returns its figures. Raises InputError when a model is not trained yet."""
    for name in ("clip.pt", "t2i/model_index.json"):
        if not (work / name).exists():
            raise InputError(f"{work / name} not found: run the stages art, clip and t2i first")
    pack.mkdir(parents=True, exist_ok=True)
    clip_state = torch.load(work / "clip.pt", weights_only=True)
    _write_clip(clip_state["model"], pack / "clip")
    shutil.rmtree(pack / "t2i", ignore_errors=True)
    shutil.copytree(work / "t2i", pack / "t2i")
    (pack / "captions.txt").write_text("\n".join(corpus(random.Random(CORPUS_SEED), CORPUS_SIZE)) + "\n")
    write_test_set(pack / "photos_val.parquet", split="val", seed=VAL_SEED, count=100, art_folder=art_folder)
    write_test_set(pack / "photos_test.parquet", split="test", seed=TEST_SEED, count=200, art_folder=art_folder)
    (pack / "LICENSES.md").write_text(LICENSES)
    log.info("measuring")
    check = {name: SceneSet.load(work / "data" / f"check_{name}.npz") for name in ("seen", "unseen")}
    figures: dict = {"captions": CORPUS_SIZE, "clip": judge_clip(pack / "clip", check)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seconds a picture are stated for one core
    painted = paint(pack / "t2i", judge_scenes())
    torch.set_num_threads(threads)
    figures["t2i"] = recognised(pack / "clip", painted) | {
        "cpu_seconds_a_picture": round(painted.cpu_seconds_a_picture, 3)
    }
    contact_sheet(painted, pack / "samples.png")
    figures["training"] = _training(work, clip_state)
    size = sum(file.stat().st_size for file in pack.rglob("*") if file.is_file())
    figures["megabytes"] = round(size / 1e6, 1)
    (pack / "MODEL_CARD.md").write_text(model_card(figures))
    (pack / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if size > LIMIT_BYTES:
        raise InputError(f"the pack in {pack} has {size} bytes: at most {LIMIT_BYTES} are allowed; use smaller models")
    return figures


def _write_clip(state: dict[str, torch.Tensor], folder: Path) -> None:
    import open_clip

    from pcm.embedded.clip_training import model_config

    config = model_config(state["token_embedding.weight"].shape[0])
    config["text_cfg"].pop("hf_tokenizer_name")
    model: Any = open_clip.CLIP(**config)
    model.load_state_dict(state)
    save_clip(model, folder, half=True)


def _training(work: Path, clip_state: dict) -> dict:
    found = {"clip": {"steps": clip_state["step"], "seconds": round(clip_state["seconds"])}}
    for name, file in (("vae", "vae.pt"), ("denoiser", "denoiser.pt")):
        state = torch.load(work / file, weights_only=True)
        found[name] = {"steps": state["step"], "seconds": round(state["seconds"])}
    found["text_tower"] = {"clip_step": torch.load(work / "text_tower.pt", weights_only=True)["clip_step"]}
    return found
