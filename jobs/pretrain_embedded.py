"""Draw the embedded world and train its CLIP and text-to-image models.

Stages run in this order, each resumable (a rerun continues from the last checkpoint): `art` fetches the drawings and
draws the training sets, `clip`, `judge` (the classifier that judges generated pictures) and `t2i` train, `pack`
measures and writes the pack that `pcm.embedded` ships.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.options import Request, check_at_least, option
from jobs.command_line import Job
from pcm.embedded.making.world import FIRST, MIXED, PAINTER_STYLE, SECOND
from pcm.errors import InputError

STAGES = ("art", "clip", "judge", "t2i", "pack")


@dataclass(frozen=True, kw_only=True)
class PretrainRequest(Request):
    """What is to be drawn and trained; local folders."""

    stage: str = option("all", choices=(*STAGES, "all"), help="what to do; all = every stage in order")
    out: Path = option(parse=Path, metavar="DIR", writes="folder", help="work folder: training sets and checkpoints")
    art: Path | None = option(
        None, parse=Path, metavar="DIR", help="where the icon packages are kept", unset="in ~/.cache"
    )
    pack: Path | None = option(
        None, parse=Path, metavar="DIR", help="where to write the pack", unset="the one in this checkout"
    )
    scenes: int = option(32_000, help="training pictures per model")
    clip_steps: int = option(4500, help="optimiser steps of CLIP")
    clip_start: Path | None = option(
        None, parse=Path, metavar="DIR", help="clip folder of an earlier pack to begin CLIP with"
    )
    t2i_start: Path | None = option(
        None, parse=Path, metavar="DIR", help="t2i folder of an earlier pack to begin t2i with"
    )
    vae_steps: int = option(2000, help="optimiser steps of the autoencoder")
    t2i_steps: int = option(3400, help="optimiser steps of the denoiser")
    threads: int = option(os.cpu_count() or 1, help="CPU threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 512, "scenes")
        check_at_least(self, 1, "clip_steps", "vae_steps", "t2i_steps", "threads")
        for folder in (self.clip_start, self.t2i_start):
            if folder is not None and not folder.is_dir():
                raise InputError(f"{folder}: no such folder; give a part of an earlier pack")


def run(request: PretrainRequest) -> dict[str, Any]:
    request.out.mkdir(parents=True, exist_ok=True)
    stages = STAGES if request.stage == "all" else (request.stage,)
    steps = {"art": _art, "clip": _clip, "judge": _judge, "t2i": _t2i, "pack": _pack}
    return {"ok": True, "out": str(request.out), **{stage: steps[stage](request) for stage in stages}}


def _art_folder(request: PretrainRequest) -> Path:
    from pcm.embedded.making.art import DEFAULT_ART_FOLDER

    return request.art or DEFAULT_ART_FOLDER


def _art(request: PretrainRequest) -> dict:
    """Fetches the art and draws the training sets and the check sets, those that are missing. Raises InputError where
    one is there that another --scenes asked for."""
    from pcm.embedded.making.art import fetch_art
    from pcm.embedded.making.scenes import SceneSet, draw_scenes, sample_scenes

    both, painter = (FIRST, SECOND), PAINTER_STYLE
    wild = ("plain", "varied", "wild", "wild", "wild")
    half = request.scenes // 2
    plans: dict[str, dict[str, Any]] = {
        "clip_train": dict(seed=1, count=request.scenes, style=MIXED, varieties=wild, domains=both),
        "paint_train": dict(seed=2, count=request.scenes, style=painter, varieties=("plain",), domains=both),
        "judge_train": dict(seed=5, count=half, style=painter, varieties=("plain", "varied"), domains=both),
        "judge_check": dict(seed=6, count=768, style=painter, varieties=("plain", "varied"), domains=both),
        "check_seen": dict(seed=3, count=768, style=MIXED, varieties=("varied",)),
        "check_unseen": dict(seed=4, count=768, style=FIRST.unseen_style, varieties=("varied",)),
        "check_second": dict(seed=7, count=768, style=SECOND.unseen_style, varieties=("varied",), domains=(SECOND,)),
    }
    for name, plan in plans.items():
        path = _data(request, name)
        if path.exists() and (there := SceneSet.size(path)) != plan["count"]:
            raise InputError(
                f"--scenes {request.scenes}: {path} holds {there} pictures, and would hold {plan['count']}; give the "
                "--scenes that it was drawn with, or another --out"
            )
    folder = fetch_art(_art_folder(request))
    drawn = {}
    for name, plan in plans.items():
        path = _data(request, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_scenes(sample_scenes(**plan), folder, plan["seed"], processes=request.threads).save(path)
            drawn[name] = plan["count"]
    return {"drawn": drawn}


def _clip(request: PretrainRequest) -> dict:
    import torch

    from pcm.embedded.making.clip_training import ClipTraining, train_clip
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(request.threads)
    check = {name: SceneSet.load(_need(request, f"check_{name}")) for name in ("seen", "unseen", "second")}
    data = SceneSet.load(_need(request, "clip_train"))
    return train_clip(data, check, request.out, ClipTraining(steps=request.clip_steps), request.clip_start)


def _judge(request: PretrainRequest) -> dict:
    import torch

    from pcm.embedded.making.classifier import train_classifier
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(request.threads)
    data, check = (SceneSet.load(_need(request, name)) for name in ("judge_train", "judge_check"))
    return train_classifier(data, check, request.out)


def _t2i(request: PretrainRequest) -> dict:
    import torch

    from pcm.embedded.making.autoencoder_training import AutoencoderTraining
    from pcm.embedded.making.denoiser_training import DenoiserTraining
    from pcm.embedded.making.scenes import SceneSet
    from pcm.embedded.making.t2i_training import PainterTraining, train_painter

    torch.set_num_threads(request.threads)
    settings = PainterTraining(
        autoencoder=AutoencoderTraining(steps=request.vae_steps), denoiser=DenoiserTraining(steps=request.t2i_steps)
    )
    return train_painter(SceneSet.load(_need(request, "paint_train")), request.out, settings, request.t2i_start)


def _pack(request: PretrainRequest) -> dict:
    import torch

    from pcm.embedded import PACK
    from pcm.embedded.making.packing import write_pack

    torch.set_num_threads(request.threads)
    return write_pack(request.out, _art_folder(request), request.pack or PACK)


def _data(request: PretrainRequest, name: str) -> Path:
    return request.out / "data" / f"{name}.npz"


def _need(request: PretrainRequest, name: str) -> Path:
    path = _data(request, name)
    if not path.exists():
        raise InputError(f"{path} not found: run --stage art first, with the same --out")
    return path


JOB = Job("pretrain_embedded", __doc__ or "", PretrainRequest, run)

if __name__ == "__main__":
    JOB.main()
