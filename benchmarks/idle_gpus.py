"""How much of a growing cluster's GPU time nothing is drawn in, from zero to the last shard; two commits in one run.

    python -m benchmarks.idle_gpus --trees . ../before --rounds 2

Hosts made of namespaces (tests.helpers.hosts; needs root and iproute2): a head without CPUs, on which `jobs.generate`
begins with as many generators as there will be, then hosts of 4 CPUs and one GPU each, which join one by one. The GPUs
are numbers that Ray was told: a model that loads for `--load-seconds` and draws a shard for `--shard-seconds` only
waits, so that one machine can be four. All else is a real run: Ray, Ray Data, processes, stages, store.

Counted is each GPU from the moment Ray has it to the last picture of the run, by what its host was doing:

    drawing; starting (no generator's process yet), loading, between (a generator that is loaded waits for its next
    shard, or has died), end (after its last shard, while others draw).

Each tree is a checkout; the rounds alternate. The last line of stdout is JSON: medians of each tree.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SHARD_SIZE = 4
CAUSES = ("drawing", "starting", "loading", "between", "end")
FOLDER, LOAD, SHARD = "PCM_IDLE_FOLDER", "PCM_IDLE_LOAD_SECONDS", "PCM_IDLE_SHARD_SECONDS"


def note(folder: str, *, node: str, what: str) -> None:
    """A line of this process's own file: seconds since 1970, node, what happened."""
    with Path(folder, f"{node}-{os.getpid()}.log").open("a") as file:
        file.write(f"{time.time()} {node} {what}\n")


def drive(arguments: list[str]) -> None:
    """`jobs.generate` of the checkout that PYTHONPATH names, with the model that waits."""
    folder, load_seconds, shard_seconds = os.environ[FOLDER], float(os.environ[LOAD]), float(os.environ[SHARD])
    try:
        where: Any = importlib.import_module("cluster.generation.make")
        stage: Any = importlib.import_module("cluster.generation.stages.draw").DrawShard
        run = "run_pipeline"
    except ImportError:  # a checkout from before there were folders in cluster/
        where = importlib.import_module("jobs.generate")
        stage = importlib.import_module("cluster.stages.draw").DrawShard
        run = "generate"

    class WaitingDraw(stage):
        """Draws black pictures in the time that it is told, and notes when."""

        def __init__(self, *given: Any, **named: Any) -> None:
            import ray

            self._node = ray.get_runtime_context().get_node_id()
            note(folder, node=self._node, what="started")
            time.sleep(load_seconds)
            super().__init__(*given, **named)
            note(folder, node=self._node, what="loaded")

        def draw(self, plan: Any) -> Any:
            note(folder, node=self._node, what="begin")
            time.sleep(shard_seconds)
            drawn = super().draw(plan)
            note(folder, node=self._node, what="end")
            return drawn

    setattr(where, run, functools.partial(getattr(where, run), draw=WaitingDraw))
    threading.Thread(target=_note_nodes, args=(folder,), daemon=True).start()
    sys.argv = ["jobs.generate", *arguments]
    job: Any = importlib.import_module("jobs.generate")
    if hasattr(job, "JOB"):
        job.JOB.main(arguments)
    else:
        job.run_job(job.parser(), job.run)


def _note_nodes(folder: str) -> None:
    """Notes each node with a GPU as soon as Ray has it."""
    import ray

    known: set[str] = set()
    while True:
        time.sleep(0.2)
        if not ray.is_initialized():
            continue
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("GPU") and node["NodeID"] not in known:
                known.add(node["NodeID"])
                note(folder, node=node["NodeID"], what="joined")


def read_notes(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """(when, what happened) of each node."""
    by_node: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for file in folder.glob("*.log"):
        for line in file.read_text().splitlines():
            at, node, what = line.split()
            by_node[node].append((float(at), what))
    return by_node


def hosts_that_drew(folder: Path) -> int:
    return sum(any(what == "begin" for _, what in notes) for notes in read_notes(folder).values())


def seconds_by_cause(folder: Path) -> dict[str, float]:
    """GPU seconds of a run by what the GPU's host was doing, from the notes."""
    by_node = read_notes(folder)
    over = max(at for notes in by_node.values() for at, what in notes if what == "end")
    spent = dict.fromkeys(CAUSES, 0.0)
    for notes in by_node.values():
        notes.sort(key=lambda found: found[0])
        last = max((at for at, what in notes if what == "end"), default=over)
        state, since = "starting", next(at for at, what in notes if what == "joined")
        for at, what in [*notes, (over, "over")]:
            if at > since:
                spent["end" if since >= last and state != "drawing" else state] += min(at, over) - since
                since = min(at, over)
            state = {"started": "loading", "loaded": "between", "begin": "drawing", "end": "between"}.get(what, state)
    return spent


def measured(tree: Path, args: argparse.Namespace) -> tuple[dict[str, float], int]:
    """GPU seconds of one run of a checkout by cause, and how many hosts drew."""
    from tests.helpers.hosts import several_hosts

    with tempfile.TemporaryDirectory(prefix="pcm-idle-") as name:
        folder = Path(name)
        (folder / "notes").mkdir()
        rows = args.shards * SHARD_SIZE
        (folder / "captions.txt").write_text("".join(f"caption number {row}\n" for row in range(rows)))
        os.environ["PYTHONPATH"] = str(tree)  # of all that runs on the hosts
        with several_hosts(args.hosts + 1) as hosts:
            head, *others = hosts.hosts
            head.join(cpus=0, head=True)
            hosts.wait_for_cpus(0)
            environment = {
                "RAY_ADDRESS": hosts.ray_address, FOLDER: str(folder / "notes"), LOAD: str(args.load_seconds),
                SHARD: str(args.shard_seconds),
            }  # fmt: skip
            job = [
                "--corpus", str(folder / "captions.txt"), "--out", str(folder / "data"), "--t2i", "null", "--clip",
                "null", "--device", "cuda", "--generators", str(args.hosts), "--shard-size", str(SHARD_SIZE),
            ]  # fmt: skip
            with (folder / "said").open("w+") as said:
                process = head.start(
                    "env", *(f"{key}={value}" for key, value in environment.items()), sys.executable,
                    str(Path(__file__).resolve()), "--drive", *job, stdout=subprocess.DEVNULL, stderr=said,
                )  # fmt: skip
                for host in others:
                    host.join(cpus=4, gpus=1)
                    time.sleep(args.join_seconds)
                if process.wait(timeout=args.timeout) != 0:
                    raise SystemExit(f"{tree}: the run failed\n{(folder / 'said').read_text()[-3000:]}")
        return seconds_by_cause(folder / "notes"), hosts_that_drew(folder / "notes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path()], help="checkouts to measure side by side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=4, help="with a GPU each")
    parser.add_argument("--join-seconds", type=float, default=10.0, help="from the start of one host to the next one's")
    parser.add_argument("--load-seconds", type=float, default=5.0)
    parser.add_argument("--shard-seconds", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a run from the last host on")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(args.rounds):
        for tree in args.trees:
            spent, drew = measured(tree.resolve(), args)
            runs[str(tree)].append(spent)
            whole = sum(spent.values())
            shares = ", ".join(f"{cause} {100 * spent[cause] / whole:.1f} %" for cause in CAUSES)
            print(
                f"{tree}, round {number + 1}: {whole:.0f} GPU seconds, {drew} hosts drew: {shares}",
                file=sys.stderr,
                flush=True,
            )
    summary = {
        tree: {
            "idle_share": [round(1 - spent["drawing"] / sum(spent.values()), 4) for spent in found],
            "gpu_seconds": round(statistics.median(sum(spent.values()) for spent in found), 1),
            **{
                cause: round(statistics.median(spent[cause] / sum(spent.values()) for spent in found), 4)
                for cause in CAUSES
            },
        }
        for tree, found in runs.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2:])
    else:
        main()
