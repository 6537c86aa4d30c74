"""The main job end to end on embedded models: captions in, pictures, a captioner and its COCO metrics out."""

import argparse
import json
import logging
import time
from pathlib import Path
from types import ModuleType

from PIL import Image

from cluster.dataset.layout import load_manifest, read_table
from cluster.store.store import Store, open_store
from jobs import evaluate, generate, report, train, verify
from jobs.cli import make_parser, run_job
from pcm import embedded
from pcm.contact_sheet import Cell, contact_sheet
from pcm.errors import InputError
from pcm.images import open_image

log = logging.getLogger("demo")

SHEET_CELLS = 24


def parser() -> argparse.ArgumentParser:
    result = make_parser("demo", __doc__)
    result.add_argument("--out", default="demo", help="local folder; run again to resume")
    result.add_argument("--captions", type=int, default=2000, help="captions to draw and train on")
    result.add_argument("--epochs", type=int, help="training epochs; default: the embedded preset's")
    result.add_argument("--seed", type=int, default=0)
    return result


def run(args: argparse.Namespace) -> dict:
    out = Path(args.out)
    dataset, captioner, results = (str(out / name) for name in ("dataset", "captioner", "evaluation"))
    stages: dict[str, float] = {}

    def stage(name: str, job: ModuleType, *arguments: str) -> dict:
        log.info("== %s: python -m jobs.%s %s", name, job.__name__.rpartition(".")[2], " ".join(arguments))
        started = time.monotonic()
        summary = job.run(job.parser().parse_args(list(arguments)))
        stages[name] = round(time.monotonic() - started, 1)
        return summary

    generated = stage(
        "generate", generate, "--corpus", "embedded", "--out", dataset, "--limit", str(args.captions),
        "--shard-size", "125", "--seed", str(args.seed),
    )  # fmt: skip
    verified = stage("verify", verify, dataset)
    if not verified["ok"]:
        raise InputError(f"{dataset}: failed verification ({verified['problems'][:1]}); delete it and run again")
    epochs = ("--epochs", str(args.epochs)) if args.epochs else ()
    resume = ("--resume",) if (Path(captioner) / "config.json").exists() else ()
    trained = stage(
        "train", train, "--data", dataset, "--out", captioner, "--preset", "embedded", "--seed", str(args.seed),
        "--val-images", "embedded:val", "--val-references", "embedded:val", *epochs, *resume,
    )  # fmt: skip
    metrics = stage(
        "evaluate", evaluate, "--checkpoint", captioner, "--images", "embedded:test", "--references", "embedded:test",
        "--out", results, "--shuffled-baseline",
    )  # fmt: skip
    sheet = out / "contact_sheet.png"
    pictures_sheet(open_store(dataset)).save(sheet)
    captions = out / "captions.png"
    captions_sheet(Path(results)).save(captions)
    page = str(out / "report.html")
    stage(
        "report", report, "--data", dataset, "--run", captioner, "--evaluation", results,
        "--images", "embedded:test", "--references", "embedded:test", "--out", page,
    )  # fmt: skip
    print(table(generated, trained, metrics, stages), flush=True)
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


def pictures_sheet(store: Store) -> Image.Image:
    """The best, middle and worst pictures of a dataset by clip score, a third of the sheet each."""
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


def captions_sheet(results: Path) -> Image.Image:
    """Held-out real pictures with the caption made for each, and the first reference."""
    made = {entry["image_id"]: entry["caption"] for entry in json.loads((results / "captions.json").read_text())}
    photos = read_table(open_store(embedded.test_set_path("test")), "").to_pylist()
    return contact_sheet(
        [
            Cell(open_image(photo["image"]["bytes"]), (made[photo["image_id"]], f"({photo['references'][0]})"))
            for photo in photos[:SHEET_CELLS]
        ]
    )


def table(generated: dict, trained: dict, metrics: dict, stages: dict[str, float]) -> str:
    lines = [
        f"{'images stored':24}{generated['stored']}  ({generated['quarantined']} quarantined)",
        f"{'images per second':24}{generated['images_per_second']:.2f}",
        f"{'mean clip score':24}{generated['clip_score_mean']:.3f}",
        f"{'epochs, steps':24}{trained['epochs']}, {trained['steps']}",
    ]
    for name in ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE", "CLIPScore", "RefCLIPScore"):
        value = metrics.get(name)
        lines.append(f"{name:24}{'not available' if value is None else f'{value:.3f}'}")
    lines.append(f"{'CIDEr, shuffled':24}{metrics['CIDEr_shuffled']:.3f}")
    lines += [f"{name + ', seconds':24}{seconds:.1f}" for name, seconds in stages.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(parser(), run)
