"""The paper's experiments in small, one command each; run a command again to go on where it was interrupted.

python -m benchmarks.experiments prepare --out DIR            # datasets: drawn, rendered, text only
python -m benchmarks.experiments ablation --out DIR           # or data, K, M, w, focal, threshold, anchors, cross
python -m benchmarks.experiments all --out DIR                # all of them
python -m benchmarks.experiments try --set epochs=8 --out DIR # one variant on the validation pictures alone
python -m benchmarks.experiments dissect --out DIR            # what the mix-up and the scores do
python -m benchmarks.experiments report --out DIR             # benchmarks/RESULTS.md
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.experiments.dissect import dissect
from benchmarks.experiments.prepare import prepare
from benchmarks.experiments.report import write_report
from benchmarks.experiments.runs import planned, read_result, run_all
from benchmarks.experiments.settings import CAPTIONS, CLIP_FACTOR, DOMAINS, EXPERIMENTS, MAIN, SEEDS, Variant
from cluster.training.config import parse_override
from jobs.cli import checked, make_parser, run_job


def parser() -> argparse.ArgumentParser:
    result = make_parser("experiments", __doc__)
    result.prog = "python -m benchmarks.experiments"
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    result.add_argument("what", choices=("prepare", *EXPERIMENTS, "all", "try", "dissect", "report"))
    result.add_argument("--out", type=Path, required=True, help="local folder of datasets and results")
    result.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of every variant (default {SEEDS})")
    result.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each (default: the cores)"
    )
    result.add_argument("--art", type=Path, help="prepare: folder of the icon packages (default: ~/.cache)")
    result.add_argument("--captions", type=int, default=CAPTIONS, help=f"prepare: of each domain (default {CAPTIONS})")
    result.add_argument(
        "--set", type=checked(parse_override), action="append", default=[], metavar="FIELD=VALUE", dest="settings",
        help="try: a field of TrainConfig",
    )  # fmt: skip
    result.add_argument("--clip-factor", type=float, default=CLIP_FACTOR, help="try: w x mean cosine; 0 = no CXE")
    result.add_argument("--judge", type=Path, help="dissect: folder of the classifier that pretrain_embedded trains")
    result.add_argument("--domain", default=MAIN, help="try")
    result.add_argument("--data", default="drawn", choices=("drawn", "rendered", "text"), help="try")
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.what == "prepare":
        return prepare(args.out, captions=args.captions, art=args.art, domains=tuple(DOMAINS))
    if args.what == "try":
        return _try(args)
    if args.what == "dissect":
        return dissect(args.out, judge=args.judge)
    if args.what == "report":
        return write_report(args.out, seeds=args.seeds)
    names = list(EXPERIMENTS) if args.what == "all" else [args.what]
    jobs = planned((variant for name in names for variant in EXPERIMENTS[name].variants), args.out, seeds=args.seeds)
    return {"runs": len(jobs), "done_now": run_all(jobs, args.out, processes=args.processes)}


def _try(args: argparse.Namespace) -> dict[str, Any]:
    """Settings tried on validation pictures; the test pictures are not looked at."""
    variant = Variant(
        name="try", domain=args.domain, data=args.data, clip_factor=args.clip_factor or None,
        overrides=dict(args.settings),
    )  # fmt: skip
    jobs = planned([variant], args.out, seeds=args.seeds, test=False)
    run_all(jobs, args.out, processes=args.processes)
    found = [read_result(args.out, job.key) for job in jobs]
    return {
        "validation_CIDEr": [[round(row["CIDEr"], 3) for row in each["validation"]["history"]] for each in found],
        "loss": [[round(row["loss"], 3) for row in each["validation"]["history"]] for each in found],
        "steps": found[0]["steps"],
        "cpu_seconds": [each["cpu_seconds"]["training"] for each in found],
    }


if __name__ == "__main__":
    run_job(parser(), run)
