"""What a plan costs: CPU seconds and memory of the driver and of its tasks, by the number of captions.

    python -m benchmarks.planning                          # 500,000 and 5,000,000 captions
    python -m benchmarks.planning --captions 20000 40000

For each number: captions of a text file, the same steps as `jobs.generate` takes before it draws (check, start Ray,
plan; then count the words, and the nouns of the concepts), and the first of them once more, in another process, as a
rerun that finds the plan. Nothing is drawn. A JSON line each, with what was taken by the end of each step:

- `driver_cpu_seconds`, `task_cpu_seconds` (all of Ray's workers), `ray_cpu_seconds` (its own processes)
- peak memory of the driver and of the largest worker: what is its own (RssAnon, sampled), and as Linux counts it
  (VmHWM: with Ray's shared memory and the mapped files that it touched)

The last line has the straight line through the first and the last size: its constant part, its slope for a million
captions, and what follows for `--projected` captions. Measure a third size to see whether it is one. CPU seconds can be
compared on a busy machine too.
"""

import argparse
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.process_tree import ProcessTree
from benchmarks.synthetic_captions import write_captions
from cluster.dataset.vocabularies import count_corpus_words
from cluster.generation.make import prepare
from cluster.generation.request import GenerateRequest
from cluster.shard_work import AUTO
from cluster.store.store import open_store

SAMPLE_SECONDS = 0.2
MB = 1e6
#: What grows with the captions.
GROWING = ("driver_cpu_seconds", "task_cpu_seconds", "ray_cpu_seconds")


def plan(corpus: str, out: str, shard_size: int, steps: "Queue[Any]") -> None:
    """A driver: says when each step has ended, with its own CPU seconds until then."""

    def ended(step: str) -> None:
        steps.put((step, {"driver_cpu_seconds": round(time.process_time(), 1)}))

    store = open_store(out)
    request = GenerateRequest(corpus=corpus, out=out, t2i="null", clip="embedded", shard_size=shard_size)
    planned = prepare(store, request).plan
    ended("plan")
    words = count_corpus_words(store, planned, run_on=AUTO)
    ended("words")
    steps.put(("end", {"vocabulary": len(words.vocabulary), "concepts": len(words.nouns)}))


def replan(corpus: str, out: str, shard_size: int, steps: "Queue[Any]") -> None:
    """A driver that finds the plan."""
    started = time.perf_counter()
    request = GenerateRequest(corpus=corpus, out=out, t2i="null", clip="embedded", shard_size=shard_size)
    prepare(open_store(out), request)
    said = {"seconds": round(time.perf_counter() - started, 1), "driver_cpu_seconds": round(time.process_time(), 1)}
    steps.put(("end", said))


def watched(driver: Any, *arguments: Any) -> dict[str, Any]:
    """What a driver says at the end of each step, and what the processes that it started have taken by then."""
    context = multiprocessing.get_context("spawn")  # its memory is its own
    steps: Queue[Any] = context.Queue()
    process = context.Process(target=driver, args=(*arguments, steps))
    started = time.perf_counter()
    process.start()
    assert process.pid
    tree, found = ProcessTree(process.pid), {}
    while "end" not in found:
        try:
            step, said = steps.get(timeout=SAMPLE_SECONDS)
        except queue.Empty:
            if not process.is_alive():
                raise SystemExit(f"a driver ended with status {process.exitcode}") from None
            tree.sample()
            continue
        tree.sample()
        driver_taken = tree.of(process.pid)
        workers = [taken for taken in tree.taken() if taken.name.startswith("ray::")]
        task_seconds = sum(taken.cpu_seconds for taken in workers)
        found[step] = said | {
            "seconds": round(time.perf_counter() - started, 1),
            "task_cpu_seconds": round(task_seconds, 1),
            "ray_cpu_seconds": round(tree.cpu_seconds - task_seconds - driver_taken.cpu_seconds, 1),
            "driver_own_mb": round(driver_taken.own_bytes / MB),
            "driver_peak_mb": round(driver_taken.peak_bytes / MB),
            "task_own_mb": round(max((taken.own_bytes for taken in workers), default=0) / MB),
            "task_peak_mb": round(max((taken.peak_bytes for taken in workers), default=0) / MB),
        }
        print(f"{step}: {found[step]}", file=sys.stderr, flush=True)
    process.join()
    return found


def measure(captions: int, *, shard_size: int, folder: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pcm-planning-", dir=folder) as place:
        corpus, out = f"{place}/captions.txt", f"{place}/dataset"
        write_captions(Path(corpus), captions)
        found = watched(plan, corpus, out, shard_size)
        parts = [path.stat().st_size for path in Path(out).rglob("*") if path.is_file()]
        again = watched(replan, corpus, out, shard_size)["end"]
        corpus_mb = Path(corpus).stat().st_size / MB
    end = found.pop("end")
    return {
        "captions": captions,
        "corpus_mb": round(corpus_mb, 1),
        "plan_mb": round(sum(parts) / MB, 1),
        "objects": len(parts),
        "vocabulary": end["vocabulary"],
        "concepts": end["concepts"],
        **found,
        "rerun": {name: again[name] for name in ("seconds", "driver_cpu_seconds")},
        "load_1min": round(os.getloadavg()[0], 1),
    }


def line_through(small: dict[str, Any], large: dict[str, Any], captions: int) -> dict[str, Any]:
    """The straight line through two sizes: its constant part, its slope, and where it is at so many captions."""

    def line(of_small: float, of_large: float) -> dict[str, float]:
        slope = (of_large - of_small) / (large["captions"] - small["captions"])
        constant = of_small - slope * small["captions"]
        return {
            "constant": round(constant, 1),
            "a_million": round(1e6 * slope, 2),
            "projected": round(constant + slope * captions, 1),
        }

    found: dict[str, Any] = {"projected_captions": captions, "plan_mb": line(small["plan_mb"], large["plan_mb"])}
    for name in GROWING:
        planned = [each["plan"][name] for each in (small, large)]
        counted = [each["words"][name] - each["plan"][name] for each in (small, large)]
        found[f"plan_{name}"], found[f"words_{name}"] = line(*planned), line(*counted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, nargs="+", default=[500_000, 5_000_000])
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--projected", type=int, default=100_000_000)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    asked = parser.parse_args()
    found = []
    for captions in asked.captions:
        found.append(measure(captions, shard_size=asked.shard_size, folder=asked.folder))
        print(json.dumps(found[-1]), flush=True)
    if len(found) > 1:
        print(json.dumps(line_through(found[0], found[-1], asked.projected)))


if __name__ == "__main__":
    main()
