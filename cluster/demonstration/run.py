"""The whole method at once, on the embedded models: jobs.demo from request to summary."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.dataset.request import VerifyRequest
from cluster.dataset.verify import verify
from cluster.demonstration.request import DemoRequest
from cluster.demonstration.sheets import captions_sheet, pictures_sheet
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.request import EvaluateRequest
from cluster.generation.make import generate
from cluster.generation.request import GenerateRequest
from cluster.options import Request, given
from cluster.report.make import make_report
from cluster.report.request import ReportRequest
from cluster.store.store import open_store
from cluster.training.request import TrainRequest
from cluster.training.train import train
from pcm.errors import InputError

log = logging.getLogger("demo")

SHARD_SIZE = 125  # small enough that two cores have something to share


def run_demo(request: DemoRequest, *, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Generate, verify, train, evaluate and report into `request.out`; what an earlier run left there is gone on with.

    Returns the summary. `show` is given the table of figures, before the log says where the pictures are. Raises
    InputError where the dataset fails verification.
    """
    out = Path(request.out)
    dataset, captioner, results = (str(out / name) for name in ("dataset", "captioner", "evaluation"))
    stages: dict[str, float] = {}

    def stage(name: str, work: Callable[[Any], dict[str, Any]], asked: Request) -> dict[str, Any]:
        log.info("== %s: %s", name, ", ".join(f"{field} {getattr(asked, field)}" for field in given(asked)))
        started = time.monotonic()
        summary = work(asked)
        stages[name] = round(time.monotonic() - started, 1)
        return summary

    generated = stage(
        "generate",
        generate,
        GenerateRequest(
            corpus="embedded",
            out=dataset,
            limit=request.captions,
            shard_size=SHARD_SIZE,
            seed=request.seed,
            device=request.device,
        ),
    )
    verified = stage("verify", lambda asked: verify(open_store(asked.dataset)), VerifyRequest(dataset=dataset))
    if not verified["ok"]:
        raise InputError(f"{dataset}: failed verification ({verified['problems'][:1]}); delete it and run again")
    trained = stage(
        "train",
        train,
        TrainRequest(
            data=dataset,
            out=captioner,
            preset="embedded",
            seed=request.seed,
            epochs=request.epochs,
            device=request.device,
            val_images="embedded:val",
            val_references="embedded:val",
            resume=(Path(captioner) / "config.json").exists(),
        ),
    )
    test: dict[str, Any] = {"images": "embedded:test", "references": "embedded:test"}
    metrics = stage(
        "evaluate",
        evaluate,
        EvaluateRequest(checkpoint=captioner, out=results, shuffled_baseline=True, device=request.device, **test),
    )
    sheet = out / "contact_sheet.png"
    pictures_sheet(open_store(dataset)).save(sheet)
    captions = out / "captions.png"
    captions_sheet(Path(results)).save(captions)
    page = str(out / "report.html")
    stage("report", make_report, ReportRequest(data=dataset, run=captioner, evaluation=results, out=page, **test))
    show(table(generated, trained, metrics, stages))
    log.info("pictures: %s; captions of held-out real pictures: %s; all of it, in a browser: %s", sheet, captions, page)
    return {
        "CIDEr": metrics["CIDEr"],
        "CIDEr_shuffled": metrics["CIDEr_shuffled"],
        "METEOR": metrics["METEOR"],
        "Bleu_4": metrics["Bleu_4"],
        "stored": generated["stored"],
        "quarantined": generated["quarantined"],
        "images_per_second": generated["images_per_second"],
        "clip_score_mean": generated["clip_score_mean"],
        "fingerprint": verified["fingerprint"],
        "checkpoint": trained["checkpoint"],
        "seconds": stages,
        "contact_sheet": str(sheet),
        "captions_sheet": str(captions),
        "report": page,
    }


def table(generated: dict, trained: dict, metrics: dict, stages: dict[str, float]) -> str:
    """The summaries of the stages, and their seconds, as lines for people."""
    rate = generated["images_per_second"]  # None: all were there
    lines = [
        f"{'images stored':24}{generated['stored']}  ({generated['quarantined']} quarantined)",
        f"{'images per second':24}{'-' if rate is None else f'{rate:.2f}'}",
        f"{'mean clip score':24}{generated['clip_score_mean']:.3f}",
        f"{'epochs, steps':24}{trained['epochs']}, {trained['steps']}",
    ]
    for name in ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE", "CLIPScore", "RefCLIPScore"):
        value = metrics.get(name)
        lines.append(f"{name:24}{'not available' if value is None else f'{value:.3f}'}")
    lines.append(f"{'CIDEr, shuffled':24}{metrics['CIDEr_shuffled']:.3f}")
    lines += [f"{name + ', seconds':24}{seconds:.1f}" for name, seconds in stages.items()]
    return "\n".join(lines)
