"""What the pipeline itself costs a row: `jobs.generate --t2i null`, 1x1 pictures and no model, at growing sizes.

    python -m benchmarks.null_scale                       # 10,000, 100,000 and 1,000,000 captions
    python -m benchmarks.null_scale --rows 10000 --shard-size 1000
    python -m benchmarks.null_scale --rows 2000 --shard-size 1 --generators 4     # what a shard leaves in memory

A JSON line for each size: rows a second (of the whole job after Ray's start, planning and vocabulary included, and of
the drawing alone), the peak memory of driver and raylet (sampled by another process), of 1,000 shards or more by how
much it grows with each, and the store's operations of one shard on its way through the stages.

Shards of one row say nothing about speed. Ray Data looks for blocks that are done every tenth of a second, and a
generator has at most two shards that are not stored.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.synthetic_captions import write_captions
from cluster.dataset.documents import load_plan
from cluster.dataset.keys import quarantine_key, shard_key, stats_key
from cluster.dataset.parquet import read_table
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard
from cluster.store.store import Store, open_store
from pcm.records import SCHEMA_VERSION
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec

ROOT = Path(__file__).parent.parent
#: From so many shards on their memory shows.
ENOUGH_SHARDS = 1000


def resident(pid: int | str) -> int:
    """Resident memory of a process, bytes; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def raylets(pid: int) -> list[str]:
    """The raylet that a driver has started, as a list."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [child for child in children if Path(f"/proc/{child}/comm").read_text().strip() == "raylet"]
    except (FileNotFoundError, ProcessLookupError):
        return []


@dataclass(frozen=True)
class Sample:
    """Resident memory at a moment, bytes, and the shards that were stored by then."""

    shards: int
    driver: int
    raylet: int


def watch(process: subprocess.Popen, shards: Path) -> list[Sample]:
    """Samples until the driver ends, a few times a second."""
    samples = []
    while process.poll() is None:
        stored = len(os.listdir(shards)) if shards.is_dir() else 0
        samples.append(Sample(stored, resident(process.pid), max(map(resident, raylets(process.pid)), default=0)))
        time.sleep(0.2)
    return samples


def kilobytes_a_shard(samples: list[Sample]) -> dict[str, float | None]:
    """By how much the resident memory of driver and raylet grows with each shard: the slope of the line through the
    samples of the last three quarters of the shards, when all code is loaded and all caches are full. None of few
    shards, beside which all else moves more."""
    total = samples[-1].shards
    late = [sample for sample in samples if total / 4 <= sample.shards < total]  # the end frees it
    found: dict[str, float | None] = {}
    for name in ("driver", "raylet"):
        slope = None
        if total >= ENOUGH_SHARDS:
            memory = [getattr(sample, name) / 1e3 for sample in late]
            slope = round(float(np.polyfit([sample.shards for sample in late], memory, 1)[0]), 2)
        found[f"{name}_kb_a_shard"] = slope
    return found


def shard_operations(folder: Path, spec: DatasetSpec) -> dict[str, int]:
    """Store operations of the first shard on its way through the stages, where it is not there yet: it is deleted."""
    store = open_store(folder)
    plan = load_plan(store)
    assert plan is not None
    counts: dict[str, int] = {}

    def counted(name: str):
        original = getattr(Store, name)

        def operation(self: Store, *args: object):
            counts[name] = counts.get(name, 0) + 1
            return original(self, *args)

        return operation

    for key in (shard_key(0), quarantine_key(0), stats_key(0)):
        store.delete(key)
    names = ("read_bytes", "write_bytes", "create_bytes", "exists", "size", "list", "delete")
    draw, featurise, write = DrawShard(store, spec), FeaturiseShard(spec.clip), WriteShard(store, SCHEMA_VERSION)
    with patch.multiple(Store, **{name: counted(name) for name in names}):
        drawn = draw.draw(read_table(store, plan.part_key(0)))
        times = {"start_time": 0.0, "draw_seconds": 0.0, "featurise_seconds": 0.0}
        write.write(ShardRow(0, featurise.featurise(drawn), times))
    return counts


def measure(rows: int, shard_size: int, generators: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="pcm-null-") as folder:
        corpus, out = Path(folder) / "captions.txt", Path(folder) / "data"
        write_captions(corpus, rows)
        command = [
            sys.executable, "-m", "jobs.generate", "--corpus", str(corpus), "--out", str(out), "--t2i", "null",
            "--shard-size", str(shard_size), "--generators", str(generators),
        ]  # fmt: skip
        load, started = os.getloadavg()[0], time.time()
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
        samples = watch(driver, out / "shards")
        printed = driver.communicate()[0].splitlines()
        seconds = time.time() - started
        if driver.returncode:
            raise SystemExit(driver.returncode)
        summary = json.loads(printed[-1])
        planned = (out / "plan.json").stat().st_mtime
        stored = max(path.stat().st_mtime for path in (out / "shards").iterdir())
        first = min(path.stat().st_mtime for path in (out / "shards").iterdir())
        spec = DatasetSpec(generator=GeneratorSpec(model="null", revision=""), clip=ClipSpec(model="null", revision=""))
        return {
            "rows": rows,
            "shards": -(-rows // shard_size),
            "job_seconds": round(seconds, 1),
            "plan_to_last_shard_seconds": round(stored - planned, 1),
            "rows_per_second": round(rows / (stored - planned)),
            "rows_per_second_drawing": round((rows - shard_size) / max(stored - first, 1e-3)),
            "driver_peak_mb": round(max(sample.driver for sample in samples) / 2**20),
            "raylet_peak_mb": round(max(sample.raylet for sample in samples) / 2**20),
            **kilobytes_a_shard(samples),
            "operations_a_shard": shard_operations(out, spec),
            "stored": summary["stored"],
            "load_before": round(load, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard-size", type=int, default=2_000)
    parser.add_argument("--generators", type=int, default=2)
    args = parser.parse_args()
    for rows in args.rows:
        print(json.dumps(measure(rows, args.shard_size, args.generators)), flush=True)


if __name__ == "__main__":
    main()
