"""The stages in which the embedded world is drawn, its models trained and its pack written; `jobs.pretrain_embedded`.

Each stage leaves files in one work folder that the next ones read, and goes on with what an earlier run left there.
Light to import: what a stage needs is imported where it runs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcm.embedded.making.world import FIRST, MIXED, PAINTER_STYLE, SECOND
from pcm.errors import InputError

STAGES = ("art", "clip", "judge", "t2i", "pack")


@dataclass(frozen=True, kw_only=True)
class MakingSettings:
    """What is drawn and trained, and in which local folders."""

    out: Path  # training sets and checkpoints
    art: Path | None = None  # where the icon packages are kept; None: in ~/.cache
    pack: Path | None = None  # where the pack is written; None: the one of this checkout
    scenes: int = 32_000  # training pictures per model
    clip_steps: int = 4500
    clip_start: Path | None = None  # the clip folder of an earlier pack
    t2i_start: Path | None = None  # the t2i folder of an earlier pack
    vae_steps: int = 2000
    t2i_steps: int = 3400
    threads: int = os.cpu_count() or 1


def run_stages(stages: Sequence[str], settings: MakingSettings) -> dict[str, Any]:
    """Run these of STAGES, in this order. Returns stage -> its figures. Raises InputError where an earlier stage is
    missing, or has been run with other settings."""
    settings.out.mkdir(parents=True, exist_ok=True)
    steps = {"art": _art, "clip": _clip, "judge": _judge, "t2i": _t2i, "pack": _pack}
    return {stage: steps[stage](settings) for stage in stages}


def _art_folder(settings: MakingSettings) -> Path:
    from pcm.embedded.making.art import DEFAULT_ART_FOLDER

    return settings.art or DEFAULT_ART_FOLDER


def _art(settings: MakingSettings) -> dict:
    """Fetches the art and draws the training sets and the check sets, those that are missing. Raises InputError where
    one is there that another --scenes asked for."""
    from pcm.embedded.making.art import fetch_art
    from pcm.embedded.making.scenes import SceneSet, draw_scenes, sample_scenes

    both, painter = (FIRST, SECOND), PAINTER_STYLE
    wild = ("plain", "varied", "wild", "wild", "wild")
    half = settings.scenes // 2
    plans: dict[str, dict[str, Any]] = {
        "clip_train": dict(seed=1, count=settings.scenes, style=MIXED, varieties=wild, domains=both),
        "paint_train": dict(seed=2, count=settings.scenes, style=painter, varieties=("plain",), domains=both),
        "judge_train": dict(seed=5, count=half, style=painter, varieties=("plain", "varied"), domains=both),
        "judge_check": dict(seed=6, count=768, style=painter, varieties=("plain", "varied"), domains=both),
        "check_seen": dict(seed=3, count=768, style=MIXED, varieties=("varied",)),
        "check_unseen": dict(seed=4, count=768, style=FIRST.unseen_style, varieties=("varied",)),
        "check_second": dict(seed=7, count=768, style=SECOND.unseen_style, varieties=("varied",), domains=(SECOND,)),
    }
    for name, plan in plans.items():
        path = _data(settings, name)
        if path.exists() and (there := SceneSet.size(path)) != plan["count"]:
            raise InputError(
                f"--scenes {settings.scenes}: {path} holds {there} pictures, and would hold {plan['count']}; give the "
                "--scenes that it was drawn with, or another --out"
            )
    folder = fetch_art(_art_folder(settings))
    drawn = {}
    for name, plan in plans.items():
        path = _data(settings, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_scenes(sample_scenes(**plan), folder, plan["seed"], processes=settings.threads).save(path)
            drawn[name] = plan["count"]
    return {"drawn": drawn}


def _clip(settings: MakingSettings) -> dict:
    import torch

    from pcm.embedded.making.clip_training import ClipTraining, train_clip
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(settings.threads)
    check = {name: SceneSet.load(_need(settings, f"check_{name}")) for name in ("seen", "unseen", "second")}
    data = SceneSet.load(_need(settings, "clip_train"))
    return train_clip(data, check, settings.out, ClipTraining(steps=settings.clip_steps), settings.clip_start)


def _judge(settings: MakingSettings) -> dict:
    import torch

    from pcm.embedded.making.classifier import train_classifier
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(settings.threads)
    data, check = (SceneSet.load(_need(settings, name)) for name in ("judge_train", "judge_check"))
    return train_classifier(data, check, settings.out)


def _t2i(settings: MakingSettings) -> dict:
    import torch

    from pcm.embedded.making.autoencoder_training import AutoencoderTraining
    from pcm.embedded.making.denoiser_training import DenoiserTraining
    from pcm.embedded.making.scenes import SceneSet
    from pcm.embedded.making.t2i_training import PainterTraining, train_painter

    torch.set_num_threads(settings.threads)
    painter = PainterTraining(
        autoencoder=AutoencoderTraining(steps=settings.vae_steps), denoiser=DenoiserTraining(steps=settings.t2i_steps)
    )
    return train_painter(SceneSet.load(_need(settings, "paint_train")), settings.out, painter, settings.t2i_start)


def _pack(settings: MakingSettings) -> dict:
    import torch

    from pcm.embedded import PACK
    from pcm.embedded.making.packing import write_pack

    torch.set_num_threads(settings.threads)
    return write_pack(settings.out, _art_folder(settings), settings.pack or PACK)


def _data(settings: MakingSettings, name: str) -> Path:
    return settings.out / "data" / f"{name}.npz"


def _need(settings: MakingSettings, name: str) -> Path:
    path = _data(settings, name)
    if not path.exists():
        raise InputError(f"{path} not found: run --stage art first, with the same --out")
    return path
