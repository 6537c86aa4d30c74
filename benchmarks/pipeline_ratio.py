"""What the pipeline costs over the models it runs: images/s of `jobs.generate` over images/s of bare processes.

    python -m benchmarks.pipeline_ratio                                   # the embedded models
    python -m benchmarks.pipeline_ratio --t2i FOLDER --clip FOLDER --steps 4

Both draw the same captions with the same spec, and compute the same CLIP scores and features: the bare processes call
`pcm` directly, one torch thread each, and neither start Ray nor write anything. Rounds alternate within the run, so
that a busy machine slows both; medians are reported. Start-up (imports, Ray, models, the first shard or batch of each
worker) is left out of the rates and reported by itself. Processor time is counted too (Linux), because it tells what
a pipeline costs apart from what else the machine does: of the stages' own processes an image, over the bare processes'
(`stage_cpu_ratio`), and of the driver and Ray's own processes, in cores (`background_cores`), which is the same for one
image a second and for thousands. The last line of stdout is JSON.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

from cluster.generation.pinning import dataset_spec
from jobs.generate import JOB
from pcm.generation.seeds import sample_seed
from pcm.spec import DatasetSpec

ROOT = Path(__file__).parent.parent
#: Ray lowers its workers' priority by so much: whatever else runs on the machine must take as much from bare processes.
RAY_NICENESS = 15

NOUNS = ("apple", "tree", "house", "dog", "cat", "car", "umbrella", "clock")
PLACES = ("on the grass", "on a table", "at the beach", "in the street", "in the snow")


def captions(count: int) -> list[str]:
    pairs = [f"A {noun} {place}, number {number}." for number in range(count) for noun in NOUNS for place in PLACES]
    return pairs[:count]


def bare_worker(spec: DatasetSpec, part: list[tuple[int, str]], ready: Barrier, results: multiprocessing.Queue) -> None:
    """Load both models, warm them up with one batch, then draw and featurise this process's captions."""
    os.nice(RAY_NICENESS)
    from pcm.clip.encoder import ClipEncoder
    from pcm.generation.drawing import Request
    from pcm.generation.loading import load_generator
    from pcm.images import open_image

    generator = load_generator(spec.generator)
    encoder = None
    if spec.clip.model != "null":
        encoder = ClipEncoder(spec.clip.model, dtype=spec.clip.dtype, batch_size=spec.clip.batch_size)
    seconds = {"draw": 0.0, "featurise": 0.0}

    def work(numbered: list[tuple[int, str]]) -> None:
        started = time.perf_counter()
        drawings = generator.draw(
            [Request(position=at, caption=text, seed=sample_seed(spec, str(at), 0)) for at, text in numbered]
        )
        drawn = time.perf_counter()
        if encoder:
            encoder.encode_images([open_image(drawing.image) for drawing in drawings if drawing.image])
            encoder.encode_texts([text for _, text in numbered])
        seconds["draw"] += drawn - started
        seconds["featurise"] += time.perf_counter() - drawn

    size = spec.generator.batch_size
    work(part[:size])
    seconds.update(draw=0.0, featurise=0.0)
    ready.wait()
    started, processor = time.time(), time.process_time()
    # As many at once as fill a batch of either model: both pad their last batch, and the pipeline's shards fill it too.
    chunk = max(size, spec.clip.batch_size)
    for first in range(0, len(part), chunk):
        work(part[first : first + chunk])
    used = time.process_time() - processor
    results.put({"started": started, "ended": time.time(), "images": len(part), "cpu": used, **seconds})


def bare_round(spec: DatasetSpec, texts: list[str], processes: int) -> dict:
    """Images/s of bare processes, and of their drawing alone."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(processes), context.Queue()
    size = spec.generator.batch_size
    batches = [list(enumerate(texts))[first : first + size] for first in range(0, len(texts), size)]
    parts = [[item for batch in batches[worker::processes] for item in batch] for worker in range(processes)]
    workers = [context.Process(target=bare_worker, args=(spec, part, ready, results)) for part in parts]
    for worker in workers:
        worker.start()
    reports = [results.get(timeout=3600) for _ in workers]
    for worker in workers:
        worker.join()
    elapsed = max(report["ended"] for report in reports) - min(report["started"] for report in reports)
    drawing = sum(report["images"] / report["draw"] for report in reports)
    return {
        "images_per_second": len(texts) / elapsed,
        "drawing_images_per_second": drawing,
        "cpu_seconds_per_image": sum(report["cpu"] for report in reports) / len(texts),
    }


class ProcessorTime:
    """Samples, twice a second, the processor time of a process and of all that descend from it (from /proc)."""

    def __init__(self, pid: int) -> None:
        self._root = pid
        self._samples: list[tuple[float, dict[str, tuple[str, float]]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> tuple[float, float]:
        """(of the stages' actors, of all others) in seconds, between two times of the clock."""
        first, last = (min(self._samples, key=lambda sample: abs(sample[0] - at))[1] for at in (begin, end))
        stages = others = 0.0
        for pid, (name, seconds) in last.items():
            spent = seconds - first.get(pid, ("", 0.0))[1]
            if name.startswith("ray::MapWorker"):
                stages += spent
            else:
                others += spent
        return stages, others

    def _run(self) -> None:
        while not self._over.wait(0.5):
            self._samples.append((time.time(), self._sample()))

    def _sample(self) -> dict[str, tuple[str, float]]:
        parents, seconds = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                name = (folder / "cmdline").read_text()
            except OSError:  # it has ended
                continue
            parents[folder.name] = fields[1]
            seconds[folder.name] = (name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        return {pid: seconds[pid] for pid in seconds if self._descends(pid, parents)}

    def _descends(self, pid: str | None, parents: dict[str, str]) -> bool:
        while pid and pid != str(self._root):
            pid = parents.get(pid)
        return bool(pid)


def pipeline_round(arguments: list[str], generators: int) -> dict:
    """One whole `jobs.generate`: its steady rate, its start-up, and the share of stage time spent in storage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jobs.generate", *arguments, "--out", folder, "--generators", str(generators)]
        started = time.time()
        job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processor = ProcessorTime(job.pid)
        output, errors = job.communicate()
        ended = time.time()
        processor.close()
        if job.returncode:
            sys.exit(f"jobs.generate failed:\n{errors[-3000:]}")
        stats = [json.loads(path.read_text()) for path in Path(folder).glob("stats/*.json")]
    stages = json.loads(output.splitlines()[-1])["stage_seconds"]
    stats.sort(key=lambda part: part["end_time"])
    # The first shard of every generator loads code and fills caches: the clock starts when those are done.
    steady = stats[generators:]
    images = sum(part["successes"] for part in steady)
    begin, end = stats[generators - 1]["end_time"], steady[-1]["end_time"]
    stages_cpu, others_cpu = processor.between(begin, end)
    return {
        "images_per_second": images / (end - begin),
        "cpu_seconds_per_image": stages_cpu / images,
        "background_cores": others_cpu / (end - begin),
        "startup_seconds": min(part["start_time"] for part in stats) - started,
        "seconds": ended - started,
        "storage_share": stages["store"] / sum(stages.values()),
        "encode_share": stages["encode"] / sum(stages.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t2i", default="embedded")
    parser.add_argument("--clip", default="embedded")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--generators", type=int, default=2)
    parser.add_argument(
        "--shards", type=int, default=20, help="shards of a round; the first of each generator is warm-up"
    )
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    texts = captions(args.shards * args.shard_size)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "captions.txt"
        corpus.write_text("".join(f"{text}\n" for text in texts))
        arguments = [
            "--corpus", str(corpus), "--t2i", args.t2i, "--clip", args.clip, "--steps", str(args.steps),
            "--batch-size", str(args.batch_size), "--shard-size", str(args.shard_size), "--device", "cpu",
        ]  # fmt: skip
        spec = dataset_spec(JOB.read([*arguments, "--out", folder]), gpus=0)
        bare, pipeline = [], []
        for number in range(args.rounds):
            bare.append(bare_round(spec, texts, args.generators))
            pipeline.append(pipeline_round(arguments, args.generators))
            print(f"round {number + 1}: bare {bare[-1]}, pipeline {pipeline[-1]}", file=sys.stderr, flush=True)

    def middle(rounds: list[dict], name: str) -> float:
        return round(median(one[name] for one in rounds), 4)

    def ratio(above: list[dict], below: list[dict], name: str) -> float:
        """Neighbours in time are compared with each other, then the median is taken."""
        return round(median(a[name] / b[name] for a, b in zip(above, below, strict=True)), 4)

    print(
        json.dumps(
            {
                "ratio": ratio(pipeline, bare, "images_per_second"),
                "stage_cpu_ratio": ratio(pipeline, bare, "cpu_seconds_per_image"),
                "background_cores": middle(pipeline, "background_cores"),
                "pipeline_images_per_second": middle(pipeline, "images_per_second"),
                "bare_images_per_second": middle(bare, "images_per_second"),
                "bare_drawing_images_per_second": middle(bare, "drawing_images_per_second"),
                "startup_seconds": middle(pipeline, "startup_seconds"),
                "job_seconds": middle(pipeline, "seconds"),
                "storage_share": middle(pipeline, "storage_share"),
                "encode_share": middle(pipeline, "encode_share"),
                "images": len(texts),
                "rounds": args.rounds,
                "processes": args.generators,
            }
        )
    )


if __name__ == "__main__":
    main()
