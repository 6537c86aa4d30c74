"""Kill -9 what a generation run is made of, at random moments, and prove that nothing came of it.

`python -m tests.chaos.chaos --kills 20 --seed 0` (or `make chaos`): a Ray cluster of three raylets on this machine, a
dataset on SeaweedFS behind a proxy that counts requests, and the driver started again whenever it is the victim.
Prints one JSON line; exit 1 when the fingerprint differs, something is missing or doubled, or a kill cost more than
the shard that each generator was drawing and the one it had drawn.
"""
# ruff: noqa: E402  Ray reads its environment when it is imported

import argparse
import contextlib
import json
import logging
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.paths import ROOT

for name, value in {
    "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

from cluster.dataset.verify import verify
from cluster.numbers import LOG_TIME
from cluster.store.store import open_store
from tests.helpers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.helpers.seaweedfs import S3Server, seaweedfs
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

log = logging.getLogger("chaos")

#: Parts of the titles that Ray gives to its workers' processes.
_WORKERS = {"generator": "(Generator", "scorer": "(Scorer", "monitor": "RunMonitor"}
VICTIMS = ("driver", *_WORKERS, "raylet", "store")
GENERATORS = 4
SHARD_SIZE = 2
SECONDS_A_KILL = 8.0  # of work that the run is paced to hold for each


@dataclass
class Cluster:
    """A head without work of its own and two workers: raylets of this machine, each a node to Ray."""

    mark: str = field(default_factory=lambda: f"pcm-chaos-{secrets.token_hex(8)}")

    def start(self) -> None:
        os.environ["PCM_CHAOS_MARK"] = self.mark  # inherited by all that the raylets start: so it can be found
        from ray.cluster_utils import Cluster as RayCluster

        memory = {"object_store_memory": 100_000_000}
        self._ray = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
        self._workers = [self._ray.add_node(num_cpus=2, **memory) for _ in range(2)]
        self._ray.wait_for_nodes()

    @property
    def address(self) -> str:
        return self._ray.address

    def kill_raylet(self, rng: random.Random) -> None:
        """One node is gone, with the actors and objects on it; another joins."""
        node = self._workers.pop(rng.randrange(len(self._workers)))
        (raylet,) = (info.process for info in node.all_processes["raylet"])
        os.kill(raylet.pid, signal.SIGKILL)
        self._workers.append(self._ray.add_node(wait=False, num_cpus=2, object_store_memory=100_000_000))

    def kill_actor(self, stage: str, rng: random.Random) -> bool:
        """False when no actor of the stage is alive at the moment."""
        pids = sorted(self._processes(_WORKERS[stage]))
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)

    def stop(self) -> None:
        self._ray.shutdown()
        for pid in self._processes(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, title: str) -> Iterator[int]:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                called = title in (folder / "cmdline").read_bytes().decode(errors="replace")
                if called and f"PCM_CHAOS_MARK={self.mark}".encode() in (folder / "environ").read_bytes():
                    yield int(folder.name)


@dataclass
class Driver:
    """`python -m jobs.generate`, the same command every time."""

    command: list[str]
    log: Path
    address: str
    process: subprocess.Popen | None = None
    starts: int = 0

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"RAY_ADDRESS": self.address}
            )
        self.starts += 1

    def returncode(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@dataclass
class Run:
    """A run under fire."""

    server: S3Server
    proxy: FaultyProxy
    cluster: Cluster
    driver: Driver
    shards: int
    rng: random.Random

    def committed(self) -> int:
        return len(set(self._committed()))

    def draws(self) -> int:
        return len(self._drawn())

    def in_hand(self) -> int:
        """Shards drawn and not committed: what a death may cost."""
        return len(set(map(_number, self._drawn())) - set(map(_number, self._committed())))

    def pace(self, kills_left: int) -> None:
        """Slow the drawing down so that the work that is left outlasts the kills that are left."""
        self.proxy.heal()
        if kills_left:
            left = max(1, self.shards - self.committed())
            delay = min(5.0, GENERATORS * SECONDS_A_KILL * kills_left / left)
            self.proxy.fail("slow", method="GET", path="/plan/", delay=delay)

    def wait_for_work(self, timeout: float = 240) -> None:
        """Until a shard is committed after now, then for a random while. Starts a driver that ended on its own."""
        before, deadline = self.committed(), time.monotonic() + timeout
        while self.committed() <= before and time.monotonic() < deadline:
            if self.driver.returncode() is not None:
                return
            time.sleep(0.05)
        assert time.monotonic() < deadline, f"no shard in {timeout} s\n{self.driver.log.read_text()[-5000:]}"
        time.sleep(self.rng.uniform(0, 2))

    def kill(self, victim: str) -> bool:
        """False when there was nothing to kill."""
        if victim == "driver":
            self.driver.kill()
            self.driver.start()
        elif victim == "raylet":
            self.cluster.kill_raylet(self.rng)
        elif victim == "store":
            self.server.kill()
            time.sleep(self.rng.uniform(0, 2))
            self.server.start()
        else:
            return self.cluster.kill_actor(victim, self.rng)
        return True

    def _committed(self) -> list[str]:
        return _parts(self.proxy.answers, "PUT", "shards")

    def _drawn(self) -> list[str]:
        """A generator reads a shard's plan part once a draw; before the first one, the vocabulary is made from them."""
        answers = self.proxy.answers
        puts = [at for at, (method, path, _) in enumerate(answers) if method == "PUT" and "/vocabularies.json" in path]
        return _parts(answers[puts[0] :], "GET", "plan") if puts else []


def _number(path: str) -> str:
    return path.rpartition("-")[2]


def _parts(answers: list[tuple[str, str, int]], method: str, folder: str) -> list[str]:
    """Paths of a folder's parts in the requests that succeeded, in order. Plan parts lie in a folder below."""
    done = [path for had, path, status in answers if had == method and status == 200]
    return [path for path in done if re.search(rf"/{folder}/(?:[^/]+/)?part-\d+\.parquet$", path)]


def chaos(folder: Path, *, victims: list[str], seed: int, captions: int) -> dict:
    """Run under fire, one kill after another in the order of `victims`; the report says whether all is well."""
    started = time.monotonic()
    corpus = write_corpus(folder, [f"caption number {index}" for index in range(captions)])
    store, *_ = make_dataset_in_process(folder / "undisturbed", corpus, null_spec(), shard_size=64)
    wanted = verify(store)["fingerprint"]
    with contextlib.ExitStack() as stack:
        (folder / "store").mkdir()
        server = stack.enter_context(seaweedfs(folder / "store"))
        proxy = stack.enter_context(faulty_proxy(server.ports["s3.port"]))
        saved = dict(os.environ)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(saved)))
        os.environ.update(server.environment | {"AWS_ENDPOINT_URL": proxy.url, "PCM_STORE_TIMEOUT_SECONDS": "5"})
        cluster = Cluster()
        cluster.start()
        stack.callback(cluster.stop)
        out = f"{server.uri}/chaos"
        command = [
            sys.executable, "-m", "jobs.generate", "--corpus", str(corpus), "--out", out, "--t2i", "null",
            "--shard-size", str(SHARD_SIZE), "--generators", str(GENERATORS), "--device", "cpu",
        ]  # fmt: skip
        if "scorer" in victims:  # else the generators score
            command += ["--scorers", "1"]
        driver = Driver(command, folder / "driver.log", cluster.address)
        stack.callback(lambda: driver.kill())
        run = Run(server, proxy, cluster, driver, -(-captions // SHARD_SIZE), random.Random(seed))
        driver.start()
        run.wait_for_work()
        run.pace(len(victims))
        killed: Counter[str] = Counter()
        failed, in_hand = 0, []
        for number, victim in enumerate(victims):
            run.wait_for_work()
            if driver.returncode() not in (None, 0):
                failed += 1
                log.warning("the driver ended with %s:\n%s", driver.returncode(), driver.log.read_text()[-3000:])
                driver.start()
                run.wait_for_work()
            assert driver.returncode() is None, "the run was over before the kills were; give it more captions"
            in_hand.append(run.in_hand())
            deadline = time.monotonic() + 60
            while not run.kill(victim):
                assert time.monotonic() < deadline, f"no {victim} to kill"
                time.sleep(0.1)
            killed[victim] += 1
            log.warning(
                "%4.0f s: kill %d, %s, with %d shards in hand; %d of %d shards committed", time.monotonic() - started,
                number + 1, victim, in_hand[-1], run.committed(), run.shards,
            )  # fmt: skip
            run.pace(len(victims) - number - 1)
        while (code := driver.process.wait(timeout=600)) != 0 and failed < 3:
            failed += 1
            log.warning("the driver ended with %s:\n%s", code, driver.log.read_text()[-3000:])
            driver.start()
        draws = run.draws()
        report = verify(open_store(out))
    redrawn = draws - run.shards
    equal = report["fingerprint"] == wanted
    return {
        "ok": bool(report["ok"] and equal and not failed and 0 <= redrawn <= 2 * GENERATORS * len(victims)),
        "kills": sum(killed.values()),
        "killed": dict(killed),
        "seed": seed,
        "fingerprint_equal": equal,
        "missing": report["missing"],
        "duplicated": report["duplicated"],
        "corrupt": report["corrupt"],
        "shards": run.shards,
        "generators": GENERATORS,
        "drawn_again": redrawn,
        "in_hand_at_kills": in_hand,
        "drivers_started": driver.starts,
        "drivers_that_failed": failed,
        "seconds": round(time.monotonic() - started, 1),
    }


def random_victims(kills: int, seed: int) -> list[str]:
    """Every kind that a run has by default as often as the others, or nearly, in random order."""
    rng = random.Random(f"victims-{seed}")
    kinds = [victim for victim in VICTIMS if victim != "scorer"]
    rounds = [rng.sample(kinds, len(kinds)) for _ in range(-(-kills // len(kinds)))]
    return [victim for one in rounds for victim in one][:kills]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", help=f"instead of --kills: these, in this order, of {', '.join(VICTIMS)}")
    parser.add_argument("--captions", type=int, help="default: 80 a kill, and at least 400")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt=LOG_TIME, stream=sys.stderr)
    victims = args.victims.split(",") if args.victims else random_victims(args.kills, args.seed)
    if unknown := set(victims) - set(VICTIMS):
        parser.error(f"--victims {', '.join(sorted(unknown))}: allowed are {', '.join(VICTIMS)}")
    # A short path, because sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="pcm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Ray's address file, too: whoever starts Ray here meanwhile would join a cluster that is being shot at.
        os.environ["RAY_TMPDIR"] = folder
        captions = args.captions or max(400, 80 * len(victims))
        report = chaos(Path(folder), victims=victims, seed=args.seed, captions=captions)
    print(json.dumps(report), flush=True)
    sys.exit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
