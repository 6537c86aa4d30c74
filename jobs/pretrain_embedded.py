"""Draw the embedded world and train its CLIP and text-to-image models.

Stages run in this order, each resumable (a rerun continues from the last checkpoint): `art` fetches the drawings and
draws the training sets, `clip`, `judge` (the classifier that judges generated pictures) and `t2i` train, `pack`
measures and writes the pack that `pcm.embedded` ships.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.options import Request, check_at_least, option, shared
from jobs.command_line import Job
from pcm.embedded.making.stages import STAGES, MakingSettings, run_stages
from pcm.errors import InputError


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
    scenes: int = option(MakingSettings.scenes, help="training pictures per model")
    clip_steps: int = option(MakingSettings.clip_steps, help="optimiser steps of CLIP")
    clip_start: Path | None = option(
        None, parse=Path, metavar="DIR", help="clip folder of an earlier pack to begin CLIP with"
    )
    t2i_start: Path | None = option(
        None, parse=Path, metavar="DIR", help="t2i folder of an earlier pack to begin t2i with"
    )
    vae_steps: int = option(MakingSettings.vae_steps, help="optimiser steps of the autoencoder")
    t2i_steps: int = option(MakingSettings.t2i_steps, help="optimiser steps of the denoiser")
    threads: int = option(MakingSettings.threads, help="CPU threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 512, "scenes")
        check_at_least(self, 1, "clip_steps", "vae_steps", "t2i_steps", "threads")
        for folder in (self.clip_start, self.t2i_start):
            if folder is not None and not folder.is_dir():
                raise InputError(f"{folder}: no such folder; give a part of an earlier pack")


def run(request: PretrainRequest) -> dict[str, Any]:
    stages = STAGES if request.stage == "all" else (request.stage,)
    figures = run_stages(stages, MakingSettings(**shared(request, MakingSettings)))
    return {"ok": True, "out": str(request.out), **figures}


JOB = Job("pretrain_embedded", __doc__ or "", PretrainRequest, run)

if __name__ == "__main__":
    JOB.main()
