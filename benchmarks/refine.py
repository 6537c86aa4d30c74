"""How many pairs a second `jobs.refine --method sync` matches, and in how much memory, by their number.

    python -m benchmarks.refine                         # 10,000 and 100,000 pairs
    python -m benchmarks.refine --pairs 1000000 --device cuda
    python -m benchmarks.refine --ray                   # as tasks on Ray, in place of one process

Everything but the encoders: synthetic vectors of CLIP (512) and of a sentence encoder (384), pictures near their
captions, lie on the local disk as the job puts them there, and its stages run over them. A process for each number, a
JSON line each: seconds and processor seconds by stage, and the peak memory of the process (with --ray, of the driver).
Processor seconds say most where other work shares the machine; OMP_NUM_THREADS sets the threads. The last line says
what a million pairs would take: two stages compare all captions with all pictures, so their time grows with the square
of the number, and the others' with the number.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cluster.curation.sync.settings import SyncSettings
from cluster.curation.sync.stages import Vectors, match
from cluster.curation.sync.vectors import (
    CAPTIONS,
    GROUP_ROWS,
    PICTURES,
    SENTENCES,
    Captions,
    StoredParts,
    array_bytes,
    piece_key,
    unit,
)
from cluster.curation.tasks import InThisProcess, OnRay, Tasks
from cluster.store.store import Store, open_store
from tests.helpers.paths import ROOT

CLIP_DIM, SENTENCE_DIM = 512, 384
#: Stages whose work grows with the square of the number of pairs.
SQUARE = ("candidates", "describers")
MILLION = 1_000_000


class Timed:
    """Tasks whose stages are timed."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def share(self, value: object) -> object:
        return self._tasks.share(value)

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str) -> None:
        started, cpu = time.monotonic(), time.process_time()
        self._tasks.run(function, calls, what=what)
        self.seconds[what], self.cpu_seconds[what] = time.monotonic() - started, time.process_time() - cpu


def write_vectors(out: Store, pairs: int) -> Vectors:
    """As the job's first stage leaves them."""
    sizes = [min(GROUP_ROWS, pairs - start) for start in range(0, pairs, GROUP_ROWS)]
    for number, rows in enumerate(sizes):
        rng = np.random.default_rng(number)
        captions = unit(rng.standard_normal((rows, CLIP_DIM), np.float32))
        noise = rng.standard_normal((rows, CLIP_DIM), np.float32) / CLIP_DIM**0.5
        arrays = {
            CAPTIONS: captions,
            PICTURES: unit(0.3 * captions + noise),
            SENTENCES: unit(rng.standard_normal((rows, SENTENCE_DIM), np.float32)),
        }
        for kind, array in arrays.items():
            out.write_bytes(piece_key("work", kind, number), array_bytes(array))

    def parts(kind: str) -> StoredParts:
        return StoredParts(out, [piece_key("work", kind, number) for number in range(len(sizes))], sizes)

    rows = np.arange(pairs)
    members = np.stack([rows, np.full(pairs, -1)], axis=1)
    return Vectors(parts(PICTURES), parts(CAPTIONS), parts(SENTENCES), Captions(rows, rows, members))


def measure(pairs: int, *, block_size: int, device: str, on_ray: bool) -> dict:
    """One number of pairs, in this process."""
    if on_ray:
        from cluster.session import start_ray

        start_ray()
    tasks = Timed(OnRay(gpus=device == "cuda") if on_ray else InThisProcess())
    with tempfile.TemporaryDirectory() as folder:
        out = open_store(folder)
        vectors = write_vectors(out, pairs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        choice, _ = match(out, "work", vectors, SyncSettings(), tasks, block_size=block_size, device=device)
        seconds = time.monotonic() - started
    square = sum(tasks.seconds[stage] for stage in SQUARE)
    return {
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "pairs_per_second": round(pairs / seconds, 1),
        "by_stage": {stage: round(taken, 2) for stage, taken in tasks.seconds.items()},
        "cpu_seconds_by_stage": {stage: round(taken, 2) for stage, taken in tasks.cpu_seconds.items()},
        "gflops": round(2 * 2 * CLIP_DIM * pairs**2 / square / 1e9, 1),
        "own_picture": round(float((choice.picture == np.arange(pairs)).mean()), 4),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_mb_before": round(before / 1024),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
    }


def projected(measured: dict, pairs: int) -> dict:
    """Hours at another number of pairs, from one that was measured."""
    times = pairs / measured["pairs"]
    found: dict = {"projected_pairs": pairs, "from": measured["pairs"]}
    for name in ("by_stage", "cpu_seconds_by_stage"):
        square = sum(measured[name][stage] for stage in SQUARE)
        found[{"by_stage": "hours", "cpu_seconds_by_stage": "cpu_hours"}[name]] = round(
            (square * times**2 + (sum(measured[name].values()) - square) * times) / 3600, 2
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, action="append", help="repeatable; default: 10000 and 100000")
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ray", action="store_true", help="tasks on Ray")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a process of its own, for its peak memory
    asked = parser.parse_args()
    if asked.one:
        found = measure(asked.one, block_size=asked.block_size, device=asked.device, on_ray=asked.ray)
        print(json.dumps(found), flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.refine", "--block-size", str(asked.block_size)]
    command += ["--device", asked.device, *(["--ray"] if asked.ray else [])]
    measured = {}
    for pairs in asked.pairs or (10_000, 100_000):
        done = subprocess.run([*command, "--one", str(pairs)], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
        line = done.stdout.splitlines()[-1]
        print(line, flush=True)
        measured = json.loads(line)
    if measured["pairs"] != MILLION:
        print(json.dumps(projected(measured, MILLION)))


if __name__ == "__main__":
    main()
