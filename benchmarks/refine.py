"""How many pairs a second `jobs.refine --method sync` matches, and in how much memory, by their number.

    python -m benchmarks.refine                         # 10,000 and 100,000 pairs
    python -m benchmarks.refine --pairs 1000000 --device cuda
    python -m benchmarks.refine --pairs 1000000 --blocks 2   # that many blocks of each stage that compares all
    python -m benchmarks.refine --ray                   # as tasks on Ray, in place of one process
    python -m benchmarks.refine --probes                # what `--probes` finds, and in which time: 100,000 pairs
    python -m benchmarks.refine --probes --data P       # what it changes in a view (of embedded features)

Everything but the encoders: synthetic vectors of CLIP (512) and of a sentence encoder (384), pictures near their
captions, lie on the local disk as the job puts them there, and its stages run over them. A process for each number, a
JSON line each: seconds and processor seconds by stage, and the peak memory of the process (with --ray, of the driver).
Processor seconds say most where other work shares the machine; OMP_NUM_THREADS sets the threads. The last line says
what a million pairs would take at most: two stages compare all captions with all pictures, and one reads all sentence
vectors for each block, so their time is taken to grow with the square of the number, and the others' with the number.

`--blocks` runs the first blocks alone of the two stages that compare all with all, over all vectors, and says what all
blocks would take: each takes as long as the others.

`--probes` compares some queries of either side with all vectors, and with those of 1, 4, 16 and 64 cells, in one
process: recall, and processor seconds over those of the exact comparison. It does so for vectors without any structure,
where an index can help least, and for vectors in groups, with the gap between pictures and captions that CLIP has.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cluster.curation.sync.cells import cells_of, store_cells
from cluster.curation.sync.nearest import nearest
from cluster.curation.sync.sentences import SentenceSpec
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
from cluster.curation.sync.view import RECALL
from cluster.curation.tasks import InThisProcess, OnRay, Tasks
from cluster.dataset.read import read_dataset
from cluster.store.store import Store, open_store
from tests.helpers.paths import ROOT
from tests.helpers.refined import sync_in_process

CLIP_DIM, SENTENCE_DIM = 512, 384
#: Stages that compare all with all: their products grow with the square of the number of pairs.
SQUARE = ("candidates", "describers")
#: A stage whose blocks read all sentence vectors: its products grow with the number, its reading with the square.
READING = ("choices",)
MILLION = 1_000_000
PROBES = (1, 4, 16, 64)
#: Pairs of a group, and queries of either side, with --probes.
GROUP_OF, QUERIES = 100, 2048
UNIFORM, GROUPS = "uniform", "groups"


class Timed:
    """Tasks whose stages are timed."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def share(self, value: object) -> object:
        return self._tasks.share(value)

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str, on_device: bool = False) -> None:
        started, cpu = time.monotonic(), time.process_time()
        self._tasks.run(function, calls, what=what, on_device=on_device)
        self.seconds[what], self.cpu_seconds[what] = time.monotonic() - started, time.process_time() - cpu


def write_vectors(out: Store, pairs: int, kind: str = UNIFORM) -> Vectors:
    """As the job's first stage leaves them: without structure, or in groups."""
    sizes = [min(GROUP_ROWS, pairs - start) for start in range(0, pairs, GROUP_ROWS)]
    for number, rows in enumerate(sizes):
        rng = np.random.default_rng(number)
        captions, pictures = (uniform if kind == UNIFORM else in_groups)(rng, rows, pairs)
        arrays = {
            CAPTIONS: captions,
            PICTURES: pictures,
            SENTENCES: unit(rng.standard_normal((rows, SENTENCE_DIM), np.float32)),
        }
        for what, array in arrays.items():
            out.write_bytes(piece_key("work", what, number), array_bytes(array))

    def parts(kind: str) -> StoredParts:
        return StoredParts(out, [piece_key("work", kind, number) for number in range(len(sizes))], sizes)

    rows = np.arange(pairs)
    members = np.stack([rows, np.full(pairs, -1)], axis=1)
    return Vectors(parts(PICTURES), parts(CAPTIONS), parts(SENTENCES), Captions(rows, rows, members))


def uniform(rng: np.random.Generator, rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions in all directions, and pictures of which each is a little nearer to its own caption."""
    captions = unit(rng.standard_normal((rows, CLIP_DIM), np.float32))
    noise = rng.standard_normal((rows, CLIP_DIM), np.float32) / CLIP_DIM**0.5
    return captions, unit(0.3 * captions + noise)


def in_groups(rng: np.random.Generator, rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """A caption and its picture have a cosine of 0.36, of one group 0.18, of two groups 0; two pictures of one group
    0.67, of two groups 0.49, and so two captions."""
    centres = unit(np.random.default_rng(0).standard_normal((pairs // GROUP_OF, CLIP_DIM), np.float32))
    own = centres[rng.integers(0, len(centres), rows)] + unit(rng.standard_normal((rows, CLIP_DIM), np.float32))
    found = []
    for side in range(2):
        noise = unit(rng.standard_normal((rows, CLIP_DIM), np.float32))
        vectors = 0.6 * unit(own) + 0.4 * noise
        vectors[:, side] += 0.7
        found.append(unit(vectors))
    return found[0], found[1]


def measure_probes(pairs: int, kind: str, *, device: str) -> dict:
    """Recall, and processor seconds over those of the exact comparison, of one kind of vectors."""
    settings = SyncSettings()
    exact_seconds = index_seconds = 0.0
    seconds = dict.fromkeys(PROBES, 0.0)
    found: dict = {"vectors": kind, "pairs": pairs, "cells": cells_of(pairs)}
    with tempfile.TemporaryDirectory() as folder:
        out = open_store(folder)
        given = write_vectors(out, pairs, kind)
        for name, queries, vectors, k in (
            ("candidates", given.captions, given.pictures, settings.candidates),
            ("describers", given.pictures, given.captions, settings.captions_per_picture),
        ):
            some = queries.rows(0, min(QUERIES, pairs))
            before = time.process_time()
            exact = nearest(some, vectors, k, device=device).indices
            exact_seconds += time.process_time() - before
            before = time.process_time()
            cells = store_cells(out, "work", name, vectors, InThisProcess(), device=device)
            index_seconds += time.process_time() - before
            for probes in PROBES:
                before = time.process_time()
                indices = cells.nearest(some, k, probes, device=device).indices
                seconds[probes] += time.process_time() - before
                recall = (exact[:, :, np.newaxis] == indices[:, np.newaxis, :]).any(axis=2).mean()
                found.setdefault(f"recall_{name}", {})[probes] = round(float(recall), 4)
    rounds = pairs / min(QUERIES, pairs)
    return {
        **found,
        "exact_over_probes": {probes: round(exact_seconds / taken, 1) for probes, taken in seconds.items()},
        "exact_over_index": round(exact_seconds * rounds / index_seconds, 1),
        "exact_cpu_seconds": round(exact_seconds, 1),
    }


def measure_views(data: str) -> list[dict]:
    """What probes change in the view of a dataset whose CLIP is the embedded one."""
    pictures = {row.image_bytes: row.sample_id for row in read_dataset(data)}

    def view(folder: Path, probes: int | None) -> tuple[dict[str, str | None], dict]:
        made = sync_in_process(Path(data), folder, SentenceSpec(model="clip"), probes=probes)
        assert made.lineage is not None
        return {row.sample_id: pictures[row.image_bytes] for row in read_dataset(folder)}, made.lineage.facts

    found = []
    with tempfile.TemporaryDirectory() as folder:
        exact, _ = view(Path(folder) / "exact", None)
        for probes in PROBES:
            kept, facts = view(Path(folder) / str(probes), probes)
            both = exact.keys() & kept.keys()
            found.append(
                {
                    "pairs": len(pictures),
                    "cells": cells_of(len(pictures)),
                    "probes": probes,
                    **{name: round(facts[name], 4) for name in (*RECALL, "mean_score_after", "mean_sync_score")},
                    "kept_by_both": round(len(both) / len(exact), 4),
                    "same_picture": round(sum(exact[one] == kept[one] for one in both) / len(both), 4),
                }
            )
    return found


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


def measure_blocks(pairs: int, blocks: int, *, block_size: int, device: str) -> dict:
    """The first blocks of the stages that compare all with all, in this process."""
    settings = SyncSettings()
    queries = min(blocks * block_size, pairs)
    cpu_seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        given = write_vectors(open_store(folder), pairs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, some, vectors, k in (
            ("candidates", given.captions, given.pictures, settings.candidates),
            ("describers", given.pictures, given.captions, settings.captions_per_picture),
        ):
            started = time.process_time()
            for start in range(0, queries, block_size):
                nearest(some.rows(start, min(start + block_size, queries)), vectors, k, device=device)
            cpu_seconds[name] = time.process_time() - started
    total = sum(cpu_seconds.values())
    return {
        "pairs": pairs,
        "queries": queries,
        "cpu_seconds_by_stage": {stage: round(taken, 4) for stage, taken in cpu_seconds.items()},
        "gflops_a_cpu_second": round(2 * 2 * CLIP_DIM * queries * pairs / total / 1e9, 1),
        "cpu_hours_of_all_blocks": round(total * pairs / queries / 3600, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_mb_before": round(before / 1024),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
    }


def projected(measured: dict, pairs: int) -> dict:
    """Hours at another number of pairs, from one that was measured. At most: part of READING grows with the number."""
    times = pairs / measured["pairs"]
    found: dict = {"projected_pairs": pairs, "from": measured["pairs"]}
    for name in ("by_stage", "cpu_seconds_by_stage"):
        square = sum(measured[name][stage] for stage in (*SQUARE, *READING))
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
    parser.add_argument("--blocks", type=int, help="so many blocks of the stages that compare all, in one process")
    parser.add_argument("--probes", action="store_true", help="recall and time of `jobs.refine --probes`")
    parser.add_argument("--data", help="with --probes: a dataset whose views are compared")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a process of its own, for its peak memory
    asked = parser.parse_args()
    if asked.one:
        found = measure(asked.one, block_size=asked.block_size, device=asked.device, on_ray=asked.ray)
        print(json.dumps(found), flush=True)
        return
    if asked.blocks:
        for pairs in asked.pairs or (100_000,):
            print(json.dumps(measure_blocks(pairs, asked.blocks, block_size=asked.block_size, device=asked.device)))
        return
    if asked.probes:
        if asked.data:
            measured = measure_views(asked.data)
        else:
            many = (asked.pairs or [100_000])[0]
            measured = [measure_probes(many, kind, device=asked.device) for kind in (UNIFORM, GROUPS)]
        for line in measured:
            print(json.dumps(line), flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.refine", "--block-size", str(asked.block_size)]
    command += ["--device", asked.device, *(["--ray"] if asked.ray else [])]
    last: dict = {}
    for pairs in asked.pairs or (10_000, 100_000):
        done = subprocess.run([*command, "--one", str(pairs)], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
        line = done.stdout.splitlines()[-1]
        print(line, flush=True)
        last = json.loads(line)
    if last["pairs"] != MILLION:
        print(json.dumps(projected(last, MILLION)))


if __name__ == "__main__":
    main()
