"""What training while generation runs costs or saves: `jobs.stream` beside `jobs.generate` and then `jobs.train`.

python -m benchmarks.stream [--captions 192] [--shard-size 16] [--epochs 1] [--rounds 1] [--folder DIR]

The embedded models, captions, preset and CPUs, each job a process as a user types it, start-up included; the two ways
take turns. `stream_over_both` is the wall time of stream over that of the two jobs: below 1, overlapping saves time.
`first_step_seconds` is when training takes its first step, from stream's call; the two jobs take theirs not before
generation has ended. `epoch_over_alone` says what sharing the machine costs the first epoch (or waiting for pictures),
and `generation_over_alone` generation. Medians of the rounds; the last line of stdout is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.matmul_rate import machine

ROOT = Path(__file__).parent.parent


def job(name: str, *arguments: object) -> dict[str, Any]:
    """The job's summary, and `wall`: seconds of the process. Raises CalledProcessError when it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - started}


def first_epoch_seconds(run: Path) -> float:
    """Of its training alone, validation aside."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["seconds"]


def one_round(folder: Path, *, captions: int, shard_size: int, epochs: int, seed: int) -> dict[str, float]:
    made = ("--corpus", "embedded", "--limit", captions, "--shard-size", shard_size, "--seed", seed)
    trained = ("--preset", "embedded", "--epochs", epochs)
    streamed = job("stream", *made, *trained, "--out", folder / "streamed")
    generated = job("generate", *made, "--out", folder / "dataset")
    alone = job("train", *trained, "--seed", seed, "--data", folder / "dataset", "--out", folder / "run")
    return {
        "stream_seconds": streamed["wall"],
        "first_step_seconds": streamed["first_step_seconds"],
        "stream_generation_seconds": streamed["generation_seconds"],
        "stream_first_epoch_seconds": first_epoch_seconds(folder / "streamed" / "run"),
        "generate_seconds": generated["wall"],
        "generation_alone_seconds": generated["seconds"],
        "train_seconds": alone["wall"],
        "first_epoch_alone_seconds": first_epoch_seconds(folder / "run"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write for the time of the run")
    arguments = parser.parse_args()
    sizes = {"captions": arguments.captions, "shard_size": arguments.shard_size, "epochs": arguments.epochs}
    rounds = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="pcm-stream-", dir=arguments.folder) as folder:
            rounds.append(one_round(Path(folder), **sizes, seed=number))
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    seconds = {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}
    both = seconds["generate_seconds"] + seconds["train_seconds"]
    result = {
        "stream_over_both": round(seconds["stream_seconds"] / both, 3),
        "epoch_over_alone": round(seconds["stream_first_epoch_seconds"] / seconds["first_epoch_alone_seconds"], 2),
        "generation_over_alone": round(seconds["stream_generation_seconds"] / seconds["generation_alone_seconds"], 2),
        **{name: round(value, 1) for name, value in seconds.items()},
        **sizes,
        "rounds": arguments.rounds,
        **machine("cpu"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
