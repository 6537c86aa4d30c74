"""The whole way at real size without any real weight: does it fit, and what does each process take?

    python -m benchmarks.dry_run --folder FOLDER               # 6 GB of disk, 8 GB of memory; minutes on two cores
    python -m benchmarks.dry_run --folder FOLDER --size tiny   # only that it runs

Stable Diffusion 1.5 and CLIP ViT-L/14 in their own sizes with random weights are written to FOLDER (once). Then
jobs.generate draws two captions at 512x512 with them in float32, one step each and one at a time, and jobs.train
--preset coco_l14 takes three steps on what was written. Pictures and captions mean nothing. The last line of stdout is
JSON: seconds, bytes and the peak memory of each process, as Linux counts it (VmHWM: with the shared memory and the
mapped files that it touched).
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip

from benchmarks.diffusion import save_stable_diffusion
from benchmarks.process_tree import ProcessTree

ROOT = Path(__file__).parent.parent
CAPTIONS = ("A red bus drives along a street in the rain.", "Two dogs play with a ball on the beach.")
STEPS = 3
SAMPLE_SECONDS = 0.2
#: Smaller ones are not listed.
LISTED_MEGABYTES = 100
#: open_clip's architecture of each size; the weights of the published runs need QuickGELU.
CLIPS = {"real": "ViT-L-14-quickgelu", "tiny": "ViT-S-32"}


def save_models(folder: Path, size: str) -> tuple[Path, str]:
    """(folder of the pipeline, NAME of the CLIP), written where they are not there yet."""
    t2i, clip = folder / "t2i", folder / "clip.safetensors"
    if not (t2i / "model_index.json").is_file():
        save_stable_diffusion(t2i, size="tiny" if size == "tiny" else "sd15")
    if not clip.is_file():
        torch.manual_seed(0)
        save_file(open_clip.create_model(CLIPS[size]).state_dict(), clip)
    return t2i, f"{CLIPS[size]}/{clip.resolve()}"


def run_job(name: str, *arguments: str) -> dict[str, Any]:
    """A job's summary, its seconds, and the peak memory of it and of every process below it, in megabytes."""
    started = time.perf_counter()
    job = subprocess.Popen(
        [sys.executable, "-m", f"jobs.{name}", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr,
        text=True,
    )  # fmt: skip
    tree, over = ProcessTree(job.pid), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            tree.sample()

    watch = threading.Thread(target=sample, daemon=True)
    watch.start()
    printed = job.communicate()[0].splitlines()
    over.set()
    watch.join()
    if job.returncode:
        raise SystemExit(job.returncode)
    by_peak = sorted(tree.taken(), key=lambda taken: -taken.peak_bytes)
    listed = [(short(taken.name), round(taken.peak_bytes / 1e6)) for taken in by_peak]
    seconds = round(time.perf_counter() - started, 1)
    return {
        "summary": json.loads(printed[-1]), "seconds": seconds,
        "peak_megabytes": [(name, peak) for name, peak in listed if peak >= LISTED_MEGABYTES],
    }  # fmt: skip


def short(name: str) -> str:
    """Such as "Generator", "jobs.train" or "raylet"."""
    if stage := re.search(r"Generator|Scorer", name):
        return stage.group()
    if job := re.search(r"-m (jobs\.\w+)", name):
        return job.group(1)
    return name if name.startswith("ray::") else name.partition(" ")[0]


def dry_run(folder: Path, size: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    t2i, clip = save_models(folder, size)
    written = round(time.perf_counter() - started, 1)
    corpus, data, run = folder / "captions.txt", folder / "dataset", folder / "run"
    corpus.write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    if run.exists():
        raise SystemExit(f"{run}: is there from a run before; remove it, or give another --folder")
    models = ("--t2i", str(t2i), "--clip", clip)
    one = (
        "--shard-size",
        "2",
        "--batch-size",
        "1",
        "--generators",
        "1",
        "--scorers",
        "1",
        "--steps",
        "1",
        "--dtype",
        "float32",
    )
    side = ("--width", "512", "--height", "512") if size == "real" else ()
    made: dict[str, Any] | str = "done by a run before"
    if not (data / "dataset.json").is_file():
        made = run_job("generate", "--corpus", str(corpus), "--out", str(data), "--device", "cpu", *models, *one, *side)
        if made["summary"]["stored"] != len(CAPTIONS):
            raise SystemExit(f"{made['summary']['stored']} of {len(CAPTIONS)} pictures were stored: {made['summary']}")
        print(json.dumps(made), file=sys.stderr, flush=True)
    # With this seed one of the two pairs is held out, so an epoch is one step.
    few = ("--preset", "coco_l14", "--epochs", str(STEPS), "--num-workers", "1", "--seed", "4")
    half = ("--set", "holdout_fraction=0.5")
    trained = run_job("train", "--data", str(data), "--out", str(run), *few, *half)
    if trained["summary"]["steps"] != STEPS:
        raise SystemExit(f"{trained['summary']['steps']} steps were taken: {trained['summary']}")
    weights = sum(file.stat().st_size for file in (*t2i.rglob("*.safetensors"), folder / "clip.safetensors"))
    return {
        "size": size, "weights_gigabytes": round(weights / 1e9, 2), "seconds_to_write_them": written,
        "generate": made, "train": trained,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="models and a dataset that are there stay")
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    arguments = parser.parse_args()
    print(json.dumps(dry_run(arguments.folder, arguments.size)))


if __name__ == "__main__":
    main()
