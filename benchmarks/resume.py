"""How long a rerun of `jobs.generate` takes over many committed shards: nothing to do, and one shard missing.

    python -m benchmarks.resume                      # 10,000 shards, on local disk
    python -m benchmarks.resume --s3                 # and on SeaweedFS, started here
    python -m benchmarks.resume --shards 1000

The shards are real ones of the null generator, two captions each, put there by the stages without Ray. A JSON line for
each store and case: seconds of the whole job, and seconds of finding out what is missing alone (`committed`), of which
Ray has no part. "first" is the first rerun, which also collects the statistics into the manifest.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from benchmarks.synthetic_captions import write_captions
from cluster.dataset.committed import committed
from cluster.dataset.documents import Plan
from cluster.dataset.keys import shard_key
from cluster.dataset.parquet import read_table
from cluster.dataset.plan import make_plan
from cluster.generation.pinning import dataset_spec
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard
from cluster.sources.corpus import read_corpus
from cluster.store.store import Store, open_store
from jobs.generate import JOB
from pcm.records import SCHEMA_VERSION

ROOT = Path(__file__).parent.parent
ROWS_A_SHARD = 2


def job_arguments(corpus: Path, out: str) -> list[str]:
    return ["--corpus", str(corpus), "--out", out, "--t2i", "null", "--shard-size", str(ROWS_A_SHARD)]


def build(corpus: Path, out: str) -> tuple[Store, Plan]:
    """Plan and every shard, as a driver leaves them that dies before the manifest."""
    spec = dataset_spec(JOB.read(job_arguments(corpus, out)), gpus=0)
    store = open_store(out)
    plan = make_plan(
        store, read_corpus(str(corpus), split="train"), spec, corpus=str(corpus), shard_size=ROWS_A_SHARD,
        is_truncated=lambda prompt: False,
    )  # fmt: skip
    draw, featurise, write = DrawShard(store, spec), FeaturiseShard(spec.clip), WriteShard(store, SCHEMA_VERSION)
    times = {"start_time": 0.0, "draw_seconds": 0.0, "featurise_seconds": 0.0}

    def make(shard: int) -> None:
        drawn = draw.draw(read_table(store, plan.part_key(shard)))
        write.write(ShardRow(shard, featurise.featurise(drawn), times))

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(make, range(plan.num_shards)):
            pass
    return store, plan


def rerun(corpus: Path, out: str) -> tuple[float, dict]:
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.generate", *job_arguments(corpus, out)],
        cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return time.time() - started, json.loads(done.stdout.splitlines()[-1])


def measure(name: str, corpus: Path, out: str) -> Iterator[dict]:
    started = time.time()
    store, plan = build(corpus, out)
    common = {"store": name, "shards": plan.num_shards, "build_seconds": round(time.time() - started, 1)}
    for case in ("first", "nothing to do", "one shard missing"):
        if case == "one shard missing":
            store.delete(shard_key(plan.num_shards // 2))
        load = os.getloadavg()[0]
        started = time.time()
        found = committed(store, plan)
        finding = time.time() - started
        missing = sum(shard not in found for shard in range(plan.num_shards))
        seconds, summary = rerun(corpus, out)
        yield common | {
            "case": case, "job_seconds": round(seconds, 1), "committed_seconds": round(finding, 2),
            "missing": missing, "skipped": summary["skipped"], "load_before": round(load, 1),
        }  # fmt: skip


@contextlib.contextmanager
def places(folder: str, *, s3: bool) -> Iterator[dict[str, str]]:
    local = {"disk": f"{folder}/disk"}
    if not s3:
        yield local
        return
    from tests.helpers.seaweedfs import seaweedfs

    (Path(folder) / "weed").mkdir()
    with seaweedfs(Path(folder) / "weed") as server:
        os.environ |= server.environment
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield local | {"SeaweedFS": f"{server.uri}/resume"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--s3", action="store_true", help="on SeaweedFS too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pcm-resume-") as folder:
        corpus = Path(folder) / "captions.txt"
        write_captions(corpus, args.shards * ROWS_A_SHARD)
        with places(folder, s3=args.s3) as found:
            for name, out in found.items():
                for line in measure(name, corpus, out):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
