"""The paper's experiments in small, one command each; run a command again to go on where it was interrupted.

python -m benchmarks.experiments prepare --out DIR            # datasets: drawn, rendered, text only
python -m benchmarks.experiments ablation --out DIR           # or data, K, M, w, focal, threshold, anchors, cross
python -m benchmarks.experiments all --out DIR                # all of them
python -m benchmarks.experiments try --set epochs=8 --out DIR # one variant on the validation pictures alone
python -m benchmarks.experiments dissect --out DIR            # what the mix-up and the scores do
python -m benchmarks.experiments worth --out DIR              # what each step is worth; --minutes 60 ends in time
python -m benchmarks.experiments report --out DIR             # benchmarks/RESULTS.md, of what lies in DIR
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.dissect import dissect
from benchmarks.experiments.prepare import prepare
from benchmarks.experiments.report import write_report
from benchmarks.experiments.results import read_result
from benchmarks.experiments.runs import data_path, planned, run_all
from benchmarks.experiments.settings import CAPTIONS, CLIP_FACTOR, DOMAINS, EXPERIMENTS, MAIN, SEEDS, Variant
from benchmarks.experiments.worth.command import worth
from benchmarks.experiments.worth.pictures import worth_folder
from benchmarks.experiments.worth.report import write_worth
from benchmarks.experiments.worth.settings import PARTS
from benchmarks.experiments.worth.settings import SEEDS as WORTH_SEEDS
from cluster.options import Request, check_at_least, flag, given, option, parse_setting
from jobs.command_line import Job
from pcm.errors import InputError, not_known

WORTH = "worth"
STEPS = ("prepare", *EXPERIMENTS, "all", "try", "dissect", WORTH, "report")


#: Which options a step listens to besides --out; the experiments, and "all", to those of _OF_EXPERIMENTS.
_OF_EXPERIMENTS = ("seeds", "processes")
_OF_STEP = {
    "prepare": ("captions", "art"),
    "try": ("seeds", "processes", "settings", "clip_factor", "domain", "data"),
    "dissect": ("judge",),
    WORTH: ("seeds", "art", "parts", "minutes"),
    "report": ("seeds",),
}


@dataclass(frozen=True, kw_only=True)
class ExperimentsRequest(Request):
    """What is to be prepared, run, tried or reported."""

    what: str = option(
        positional=True, choices=STEPS,
        help="an experiment, all of them, or a step before or after: " + ", ".join(STEPS),
    )  # fmt: skip
    out: Path = option(parse=Path, metavar="DIR", help="local folder of datasets and results")
    seeds: int | None = option(None, help="runs of every variant", unset=f"{SEEDS}; worth {WORTH_SEEDS}")
    processes: int = option(os.cpu_count() or 1, help="runs at a time, one core each")
    art: Path | None = option(
        None, parse=Path, metavar="DIR", help="prepare, worth: folder of the icon packages", unset="in ~/.cache"
    )
    captions: int = option(CAPTIONS, help="prepare: of each domain")
    settings: Mapping[str, Any] = option(
        {}, flag="set", metavar="FIELD=VALUE", parse=parse_setting, help="try: a field of TrainConfig"
    )
    clip_factor: float = option(CLIP_FACTOR, help="try: w x mean cosine; 0 = no CXE")
    judge: Path | None = option(
        None, parse=Path, metavar="DIR", help="dissect: folder of the classifier that pretrain_embedded trains"
    )
    domain: str = option(MAIN, choices=tuple(DOMAINS), help="try")
    data: str = option("drawn", choices=("drawn", "rendered", "text"), help="try")

    parts: tuple[str, ...] = option((), metavar="PART", help="worth: " + ", ".join(PARTS), unset="all, in this order")
    minutes: float | None = option(
        None, help="worth: begin no run and no dataset later than this; what is under way is finished", unset="no end"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "seeds", "processes", "captions")
        for name in self.parts:
            if name not in PARTS:
                raise not_known("--parts", name, PARTS)
        for name in given(self):
            if name not in ("what", "out", *_OF_STEP.get(self.what, _OF_EXPERIMENTS)):
                raise InputError(f"{flag(type(self), name)}: without effect with {self.what}; leave it out")
        if self.minutes is not None and self.minutes <= 0:
            raise InputError(f"--minutes {self.minutes:g}: must be above 0")


def run(request: ExperimentsRequest) -> dict[str, Any]:
    if request.what == "prepare":
        return prepare(request.out, captions=request.captions, art=request.art, domains=tuple(DOMAINS))
    if request.what == "try":
        return _try(request)
    if request.what == "dissect":
        return dissect(request.out, judge=request.judge)
    if request.what == WORTH:
        seeds = request.seeds or WORTH_SEEDS
        return worth(request.out, art=request.art, parts=request.parts, seeds=seeds, minutes=request.minutes)
    if request.what == "report":
        return _report(request)
    seeds = request.seeds or SEEDS
    names = list(EXPERIMENTS) if request.what == "all" else [request.what]
    jobs = planned((variant for name in names for variant in EXPERIMENTS[name].variants), request.out, seeds=seeds)
    return {"runs": len(jobs), "done_now": run_all(jobs, request.out, processes=request.processes)}


def _report(request: ExperimentsRequest) -> dict[str, Any]:
    """The tables of what lies in OUT; those of the other experiments stay as they are."""
    made: dict[str, Any] = {}
    if data_path(request.out, MAIN, "drawn").exists():
        made = write_report(request.out, seeds=request.seeds or SEEDS)
    if worth_folder(request.out).exists():
        made |= write_worth(request.out, seeds=request.seeds or WORTH_SEEDS)
    if not made:
        raise InputError(f"--out {request.out}: nothing to report; run an experiment, or worth, first")
    return made


def _try(request: ExperimentsRequest) -> dict[str, Any]:
    """Settings tried on validation pictures; the test pictures are not looked at."""
    variant = Variant(
        name="try", domain=request.domain, data=request.data, clip_factor=request.clip_factor or None,
        overrides=dict(request.settings),
    )  # fmt: skip
    jobs = planned([variant], request.out, seeds=request.seeds or SEEDS, test=False)
    run_all(jobs, request.out, processes=request.processes)
    found = [read_result(request.out, job.key) for job in jobs]
    return {
        "validation_CIDEr": [[round(row["CIDEr"], 3) for row in each["validation"]["history"]] for each in found],
        "loss": [[round(row["loss"], 3) for row in each["validation"]["history"]] for each in found],
        "steps": found[0]["steps"],
        "cpu_seconds": [each["cpu_seconds"]["training"] for each in found],
    }


JOB = Job("experiments", __doc__ or "", ExperimentsRequest, run, package="benchmarks")

if __name__ == "__main__":
    JOB.main()
