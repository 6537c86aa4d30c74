"""The main job end to end on embedded models: captions in, pictures, a captioner and its COCO metrics out."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.dataset.request import VerifyRequest
from cluster.evaluation.request import EvaluateRequest
from cluster.generation.request import GenerateRequest
from cluster.options import Request, check_at_least, given, option
from cluster.report.request import ReportRequest
from cluster.training.request import TrainRequest
from jobs.command_line import Job
from jobs.endings import print_text
from pcm import embedded
from pcm.errors import InputError
from pcm.spec import DEVICES

if TYPE_CHECKING:
    from PIL import Image

    from cluster.store.store import Store

log = logging.getLogger("demo")

SHEET_CELLS = 24
SHARD_SIZE = 125  # small enough that two cores have something to share


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Request):
    """What the demo is asked for."""

    out: str = option("demo", metavar="DIR", writes="folder", help="local folder; run again to resume")
    captions: int = option(2000, help="captions to draw and train on")
    epochs: int | None = option(None, help="training epochs", unset="the embedded preset's")
    seed: int = option(GenerateRequest.seed, help="of drawing and of training")
    device: str = option(
        "auto", choices=DEVICES, help="where to draw, train and evaluate; auto is cuda where there is a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "captions", "epochs")


def run(request: DemoRequest) -> dict[str, Any]:
    from cluster.dataset.verify import verify
    from cluster.evaluation.evaluate import evaluate
    from cluster.generation import generate
    from cluster.report.make import make_report
    from cluster.store.store import open_store
    from cluster.training.train import train

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
    print_text(table(generated, trained, metrics, stages))
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


def pictures_sheet(store: "Store") -> "Image.Image":
    """The best, middle and worst pictures of a dataset by clip score, a third of the sheet each."""
    from cluster.dataset.documents import load_manifest
    from cluster.dataset.parquet import read_table
    from pcm.contact_sheet import Cell, contact_sheet
    from pcm.images import open_image

    columns = ["sample_id", "caption", "image", "clip_score"]
    rows = [
        row for shard in load_manifest(store).shards for row in read_table(store, shard["key"], columns).to_pylist()
    ]
    rows.sort(key=lambda row: (-row["clip_score"], row["sample_id"]))
    third = SHEET_CELLS // 3
    middle = max(0, len(rows) // 2 - third // 2)
    chosen = rows if len(rows) <= SHEET_CELLS else rows[:third] + rows[middle : middle + third] + rows[-third:]
    return contact_sheet(
        [Cell(open_image(row["image"]["bytes"]), (f"{row['clip_score']:.3f}", row["caption"])) for row in chosen]
    )


def captions_sheet(results: Path) -> "Image.Image":
    """Held-out real pictures with the caption made for each, and the first reference."""
    from cluster.dataset.parquet import read_table
    from cluster.store.store import open_store
    from pcm.contact_sheet import Cell, contact_sheet
    from pcm.images import open_image

    made = {
        entry["image_id"]: entry["caption"]
        for entry in json.loads((results / "captions.json").read_text(encoding="utf-8"))
    }
    photos = read_table(open_store(embedded.test_set_path("test")), "").to_pylist()
    return contact_sheet(
        [
            Cell(open_image(photo["image"]["bytes"]), (made[photo["image_id"]], f"({photo['references'][0]})"))
            for photo in photos[:SHEET_CELLS]
        ]
    )


def table(generated: dict, trained: dict, metrics: dict, stages: dict[str, float]) -> str:
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


JOB = Job("demo", __doc__ or "", DemoRequest, run)

if __name__ == "__main__":
    JOB.main()
