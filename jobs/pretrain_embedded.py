"""python -m jobs.pretrain_embedded: draws the embedded world and trains its CLIP and text-to-image models.

Stages run in this order, each resumable (a rerun continues from the last checkpoint): `art` fetches the drawings and
draws the training sets, `clip`, `judge` (the classifier that judges generated pictures) and `t2i` train, `pack`
measures and writes the pack that `pcm.embedded` ships.
"""

import argparse
import os
from pathlib import Path

from jobs.cli import make_parser, run_job
from pcm.embedded.making.world import FIRST, MIXED, PAINTER_STYLE, SECOND
from pcm.errors import InputError

STAGES = ("art", "clip", "judge", "t2i", "pack")


def parser() -> argparse.ArgumentParser:
    p = make_parser("pretrain_embedded", "Draw the embedded world and train the embedded models.")
    p.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to do; all = every stage in order")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="work folder: training sets and checkpoints")
    p.add_argument("--art", type=Path, metavar="DIR", help="where the icon packages are kept; default in ~/.cache")
    p.add_argument("--pack", type=Path, metavar="DIR", help="where to write the pack; default the one in this checkout")
    p.add_argument("--scenes", type=int, default=32_000, metavar="N", help="training pictures per model")
    p.add_argument("--clip-steps", type=int, default=4500, metavar="N", help="optimiser steps of CLIP")
    p.add_argument("--clip-start", type=Path, metavar="DIR", help="clip folder of an earlier pack to begin CLIP with")
    p.add_argument("--t2i-start", type=Path, metavar="DIR", help="t2i folder of an earlier pack to begin t2i with")
    p.add_argument("--vae-steps", type=int, default=2000, metavar="N", help="optimiser steps of the autoencoder")
    p.add_argument("--t2i-steps", type=int, default=3400, metavar="N", help="optimiser steps of the denoiser")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads")
    return p


def run(args: argparse.Namespace) -> dict:
    if args.scenes < 512:
        raise InputError(f"--scenes {args.scenes}: expected at least 512")
    args.out.mkdir(parents=True, exist_ok=True)
    stages = STAGES if args.stage == "all" else (args.stage,)
    steps = {"art": _art, "clip": _clip, "judge": _judge, "t2i": _t2i, "pack": _pack}
    return {"ok": True, "out": str(args.out), **{stage: steps[stage](args) for stage in stages}}


def _art_folder(args: argparse.Namespace) -> Path:
    from pcm.embedded.making.art import DEFAULT_ART_FOLDER

    return args.art or DEFAULT_ART_FOLDER


def _art(args: argparse.Namespace) -> dict:
    """Fetches the art and draws the training sets and the check sets, those that are missing."""
    from pcm.embedded.making.art import fetch_art
    from pcm.embedded.making.scenes import draw_scenes, sample_scenes

    folder = fetch_art(_art_folder(args))
    both, painter = (FIRST, SECOND), PAINTER_STYLE
    wild = ("plain", "varied", "wild", "wild", "wild")
    plans = {
        "clip_train": dict(seed=1, count=args.scenes, style=MIXED, varieties=wild, domains=both),
        "paint_train": dict(seed=2, count=args.scenes, style=painter, varieties=("plain",), domains=both),
        "judge_train": dict(seed=5, count=args.scenes // 2, style=painter, varieties=("plain", "varied"), domains=both),
        "judge_check": dict(seed=6, count=768, style=painter, varieties=("plain", "varied"), domains=both),
        "check_seen": dict(seed=3, count=768, style=MIXED, varieties=("varied",)),
        "check_unseen": dict(seed=4, count=768, style=FIRST.unseen_style, varieties=("varied",)),
        "check_second": dict(seed=7, count=768, style=SECOND.unseen_style, varieties=("varied",), domains=(SECOND,)),
    }
    drawn = {}
    for name, plan in plans.items():
        path = _data(args, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_scenes(sample_scenes(**plan), folder, plan["seed"], processes=args.threads).save(path)
            drawn[name] = plan["count"]
    return {"drawn": drawn}


def _clip(args: argparse.Namespace) -> dict:
    import torch

    from pcm.embedded.making.clip_training import ClipTraining, train_clip
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(args.threads)
    check = {name: SceneSet.load(_need(args, f"check_{name}")) for name in ("seen", "unseen", "second")}
    data = SceneSet.load(_need(args, "clip_train"))
    return train_clip(data, check, args.out, ClipTraining(steps=args.clip_steps), args.clip_start)


def _judge(args: argparse.Namespace) -> dict:
    import torch

    from pcm.embedded.making.classifier import train_classifier
    from pcm.embedded.making.scenes import SceneSet

    torch.set_num_threads(args.threads)
    data, check = (SceneSet.load(_need(args, name)) for name in ("judge_train", "judge_check"))
    return train_classifier(data, check, args.out)


def _t2i(args: argparse.Namespace) -> dict:
    import torch

    from pcm.embedded.making.autoencoder_training import AutoencoderTraining
    from pcm.embedded.making.denoiser_training import DenoiserTraining
    from pcm.embedded.making.scenes import SceneSet
    from pcm.embedded.making.t2i_training import PainterTraining, train_painter

    torch.set_num_threads(args.threads)
    settings = PainterTraining(
        autoencoder=AutoencoderTraining(steps=args.vae_steps), denoiser=DenoiserTraining(steps=args.t2i_steps)
    )
    return train_painter(SceneSet.load(_need(args, "paint_train")), args.out, settings, args.t2i_start)


def _pack(args: argparse.Namespace) -> dict:
    import torch

    from pcm.embedded import PACK
    from pcm.embedded.making.packing import write_pack

    torch.set_num_threads(args.threads)
    return write_pack(args.out, _art_folder(args), args.pack or PACK)


def _data(args: argparse.Namespace, name: str) -> Path:
    return args.out / "data" / f"{name}.npz"


def _need(args: argparse.Namespace, name: str) -> Path:
    path = _data(args, name)
    if not path.exists():
        raise InputError(f"{path} not found: run --stage art first, with the same --out")
    return path


if __name__ == "__main__":
    run_job(parser(), run)
