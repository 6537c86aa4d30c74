"""Streaming, a sweep and an evaluation over several hosts, with a fault each: the results are those without one."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.dataset.verify import verify
from cluster.store.store import open_store
from tests.helpers.hosts import Hosts, Job, can_make_hosts, longest_pause, several_hosts
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_dataset import TINY, write_checkpoint, write_dataset, write_pictures
from tests.helpers.tiny_generation import write_corpus
from tests.helpers.trained import step_losses
from tests.helpers.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and the right to make namespaces"),
]

SETTINGS = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
CUT_SECONDS = 25


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """A head without CPUs, and three hosts."""
    with several_hosts(4) as made:
        head, *workers = made.hosts
        head.join(cpus=0, head=True)
        for worker in workers:
            worker.join(cpus=2)
        made.wait_for_cpus(6)
        yield made


def epochs(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def took(summary: dict, undisturbed: dict) -> str:
    return f"{summary['seconds']:.0f} s in all; undisturbed {undisturbed['seconds']:.0f} s"


def at_work(job: Job, what: bool) -> bool:
    """Whether it is at it; a job that is over is waited for no longer."""
    assert not job.is_over(), job.said.read_text()[-3000:]
    return what


def test_streaming_over_hosts_is_cut_off_from_one_and_loses_another(
    hosts: Hosts, tmp_path: Path, tiny_clip: Path, tiny_t2i: Path
) -> None:
    """The first is cut off while pictures are drawn, the second is lost while the captioner is trained."""
    rows, length = 60, 12
    corpus = write_corpus(tmp_path, [f"A red circle on a blue ground, number {number}." for number in range(rows)])
    models = ["--t2i", str(tiny_t2i), "--clip", str(tiny_clip), "--steps=2", "--shard-size=5", "--set=top_concepts=2"]

    def stream(out: Path) -> Job:
        return hosts.job(
            "jobs.stream", "--corpus", str(corpus), "--out", str(out), f"--epochs={length}", "--device=cpu",
            "--generators=3", *models, *SETTINGS,
        )  # fmt: skip

    run = tmp_path / "run"

    def moved() -> int:
        return shards_stored(run / "dataset") + epochs(run / "run")

    _, one, two, _ = hosts.hosts
    with longest_pause(moved) as pause:
        job = stream(run)
        wait_until(lambda: at_work(job, moved() > 2), seconds=400, said="nothing is drawn")
        one.cut()
        time.sleep(CUT_SECONDS)
        one.heal()
        wait_until(lambda: at_work(job, epochs(run / "run") > 0), seconds=400, said="no epoch ended")
        two.lose()
        summary = job.summary()
    undisturbed = stream(tmp_path / "undisturbed").summary()
    reports = [verify(open_store(tmp_path / name / "dataset")) for name in ("run", "undisturbed")]
    assert all(report["ok"] and report["stored"] == rows for report in reports)
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]
    assert summary["epochs"] == undisturbed["epochs"] == length
    steps, values = zip(*step_losses(run / "run"), strict=True)
    wanted_steps, wanted = zip(*step_losses(tmp_path / "undisturbed/run"), strict=True)
    assert steps == wanted_steps and values == pytest.approx(wanted, rel=1e-4)
    again, shards = summary["shards_begun_again"], rows // 5
    print(
        f"stream, a link cut and a host lost: {again} of {shards} shards drawn again ({100 * again / shards:.0f} %), "
        f"one of {length} epochs at most trained again, longest pause {pause():.0f} s, {took(summary, undisturbed)}"
    )


def test_a_sweep_over_hosts_loses_one(hosts: Hosts, tmp_path: Path, tiny_clip: Path) -> None:
    data, trials, length = write_dataset(tmp_path / "data", tiny_clip, rows=96), 8, 6
    grid = "--param=lr_factor=" + ",".join(f"{0.1 * (1 + number):.1f}" for number in range(trials))

    def sweep(out: Path) -> Job:
        return hosts.job(
            "jobs.sweep", "--data", str(data), "--out", str(out), grid, "--search=grid", "--scheduler=none",
            "--epochs", str(length), *SETTINGS,
        )  # fmt: skip

    run = tmp_path / "run"

    def moved() -> int:
        return sum(len(file.read_text().splitlines()) for file in run.glob("trials/*/metrics.jsonl"))

    with longest_pause(moved) as pause:
        job = sweep(run)
        wait_until(lambda: at_work(job, moved() > 4), seconds=400, said="no epoch ended")
        hosts.hosts[1].lose()
        summary = job.summary()
    undisturbed = sweep(tmp_path / "undisturbed").summary()
    assert summary["by_status"] == undisturbed["by_status"] == {"finished": trials}
    assert summary["best"]["settings"] == undisturbed["best"]["settings"]
    assert learnt(run) == learnt(tmp_path / "undisturbed")
    print(
        f"sweep, host lost: 2 of {trials * length} epochs at most trained again ({100 * 2 / (trials * length):.0f} %), "
        f"longest time without an epoch's end {pause():.0f} s, {took(summary, undisturbed)}"
    )


def learnt(sweep: Path) -> dict[str, list]:
    """Of each trial, by its settings: every epoch's loss and CIDEr, and every step's loss."""
    found = {}
    for file in sweep.glob("trials/*/result.json"):
        result = json.loads(file.read_text())
        rows = [(row["epoch"], row["step"], row["loss"], row["CIDEr"]) for row in result["history"]]
        found[json.dumps(result["overrides"], sort_keys=True)] = [rows, step_losses(file.parent)]
    return found


def test_an_evaluation_over_hosts_loses_one(hosts: Hosts, tmp_path: Path, tiny_clip: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", write_dataset(tmp_path / "data", tiny_clip, rows=30))
    count = 64 * 50
    pictures = write_pictures(tmp_path / "pictures", count=count)

    def evaluate(out: str, *workers: str) -> Job:
        return hosts.job(
            "jobs.evaluate", "--checkpoint", str(checkpoint), "--images", str(pictures), "--references",
            f"{tmp_path}/references.csv", "--out", f"{tmp_path}/{out}", "--device=cpu", *workers,
        )  # fmt: skip

    job = evaluate("run", "--num-workers=3")
    wait_until(
        lambda: at_work(job, "pictures captioned" in job.said.read_text()), seconds=400, said="nothing is captioned"
    )
    hosts.hosts[1].lose()
    summary = job.summary()
    alone = evaluate("alone").summary()
    assert summary["n"] == alone["n"] == count
    assert (tmp_path / "run/captions.json").read_bytes() == (tmp_path / "alone/captions.json").read_bytes()
    figures = {name for name, value in alone.items() if isinstance(value, float)} - {"seconds", "captions_per_second"}
    assert "CIDEr" in figures
    assert {name: summary[name] for name in figures} == pytest.approx({name: alone[name] for name in figures}, rel=1e-5)
    print(f"evaluation, host lost: {took(summary, alone)} in one process")
