"""Faults inside a run, made for real: nothing is lost, nothing doubled, and nobody else's picture changes."""

import json
import os
import signal
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cloudpickle import register_pickle_by_value

from cluster.dataset.documents import Plan
from cluster.dataset.verify import verify
from cluster.generation.limits import FaultPolicy
from cluster.generation.pipeline import GenerationResult, run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.regenerate import regenerate
from cluster.generation.retry_quarantined import retry_quarantined
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store
from pcm.errors import InputError
from tests.helpers import faulty_generators
from tests.helpers.faulty_generators import (
    CRASHES,
    HANGS,
    NEEDS_MEMORY,
    RAISES,
    DrawBroken,
    DrawFaulty,
    DrawPixels,
    DrawTiring,
    DrawUseless,
)
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_generation import CAPTIONS, draw_in_process, plan_dataset, tiny_spec, write_corpus

#: Ray's workers do not have the tests on their path.
register_pickle_by_value(faulty_generators)


def run(
    out: Path, captions: list[str], t2i: Path, *, draw: type[DrawShard], generators: int = 1, shard_size: int = 8,
    **policy: float,
) -> tuple[Store, Plan, GenerationResult]:  # fmt: skip
    """Plan and generate with a faulty generator; Ray must be running."""
    out.mkdir()
    spec = tiny_spec(t2i, num_inference_steps=1)
    store, plan = plan_dataset(out / "data", write_corpus(out, captions), spec, shard_size=shard_size)
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=generators)
    return store, plan, run_pipeline(store, plan, pools, faults=FaultPolicy(**policy), draw=draw)


def pictures(store: Store) -> dict[str, tuple[str, bytes]]:
    """(caption, image bytes) by sample id."""
    rows = [row for key in store.list("shards") for row in pq.read_table(f"{store.prefix}/{key}").to_pylist()]
    return {row["sample_id"]: (row["caption"], row["image"]["bytes"]) for row in rows}


def quarantine(store: Store) -> dict[str, str]:
    """Reason by caption."""
    rows = [row for key in store.list("quarantine") for row in pq.read_table(f"{store.prefix}/{key}").to_pylist()]
    return {row["caption"]: row["reason"] for row in rows}


def check(store: Store, plan: Plan, lost: dict[str, str], undisturbed: dict[str, tuple[str, bytes]]) -> None:
    """Proven, exactly these captions quarantined for these reasons, and every other picture as without faults."""
    report = verify(store)
    assert report["ok"], report
    assert quarantine(store) == lost
    made = pictures(store)
    assert len(made) == plan.expected - len(lost)
    assert made == {sample: undisturbed[sample] for sample in made}


def own_generators() -> list[int]:
    """Process ids of the generator actors of this process's own Ray."""
    import psutil

    def is_generator(process: psutil.Process) -> bool:
        try:
            return "(Generator)" in " ".join(process.cmdline())
        except psutil.Error:
            return False

    return [process.pid for process in psutil.Process().children(recursive=True) if is_generator(process)]


def undisturbed(plan: Plan, folder: Path, draw: type[DrawShard]) -> dict[str, tuple[str, bytes]]:
    """What a generator without faults makes of the same corpus, in one process and without Ray."""
    store, again = plan_dataset(folder / "undisturbed", folder / "captions.txt", plan.spec, shard_size=plan.shard_size)
    draw_in_process(store, again, range(again.num_shards), draw=draw)
    return pictures(store)


def test_captions_that_raise_crash_hang_or_break_are_quarantined_and_no_other(
    tiny_t2i: Path, tmp_path: Path, ray_session: None
) -> None:
    captions = [*CAPTIONS[:5], RAISES, CRASHES, *CAPTIONS[5:14], HANGS, *CAPTIONS[14:16]]
    store, plan, _ = run(tmp_path / "run", captions, tiny_t2i, draw=DrawFaulty, batch_timeout=5, max_deaths=2)
    lost = {RAISES: "generator_error", CRASHES: "generator_crashed", HANGS: "generator_hung"}
    check(store, plan, lost, undisturbed(plan, tmp_path / "run", DrawPixels))
    stats = json.loads(store.read_bytes("stats/part-000000.json"))
    said = {entry["sample_id"]: entry["error"] for entry in stats["errors"]}
    assert said["000000005-00"] == "generator_error: ValueError: no such colour"
    assert said["000000006-00"] == "generator_crashed: its process died, 2 times"
    assert "faulty_generators.py" in json.loads(store.read_bytes("stats/part-000002.json"))["errors"][0]["error"]
    assert stats["batch_sizes"] == {"4": 6} and stats["device_name"]
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    summary = retry_quarantined(store, plan, "all-generator", pools, draw=DrawPixels)
    assert (summary["tried_again"], summary["stored"], summary["quarantined"]) == (3, len(captions), 0)
    assert (summary["generated"], summary["skipped"]) == (3, len(captions) - 3), "this run made no more than these"
    check(store, plan, {}, undisturbed(plan, tmp_path / "run", DrawPixels))


@pytest.mark.slow
def test_a_generator_whose_processes_tire_is_restarted_and_changes_nothing(
    tiny_t2i: Path, tmp_path: Path, ray_session: None
) -> None:
    captions = [f"tired caption {index}" for index in range(32)]
    store, plan, _ = run(tmp_path / "run", captions, tiny_t2i, draw=DrawTiring, shard_size=16)
    check(store, plan, {}, undisturbed(plan, tmp_path / "run", DrawPixels))


@pytest.mark.slow
def test_a_generator_that_is_killed_at_any_time_changes_nothing(
    tiny_t2i: Path, tmp_path: Path, ray_session: None
) -> None:
    captions = [f"caption number {index}" for index in range(160)]
    killed: list[int] = []
    over = threading.Event()

    def kill_generators() -> None:
        """Whenever another shard has been stored, kill a generator at once."""
        stored = 0
        while not over.wait(0.05) and len(killed) < 3:
            now = shards_stored(tmp_path / "run/data")
            if now > stored and (generators := own_generators()):
                os.kill(generators[0], signal.SIGKILL)
                killed.append(generators[0])
                stored = now

    killer = threading.Thread(target=kill_generators)
    killer.start()
    try:
        store, plan, _ = run(tmp_path / "run", captions, tiny_t2i, draw=DrawShard, generators=2)
    finally:
        over.set()
        killer.join()
    assert len(killed) >= 2, "the run was over too soon for this test to say anything"
    check(store, plan, {}, undisturbed(plan, tmp_path / "run", DrawShard))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "said"),
    [
        pytest.param(
            DrawBroken,
            "4 starts of a generator in a row without a picture (RuntimeError: CUDA error: device-side",
            id="broken",
        ),
        pytest.param(
            DrawUseless,
            "64 of 64 samples failed in the generator, more than the share of 0.5 allowed (last: RuntimeError",
            id="useless",
        ),
    ],
)
def test_a_generator_that_is_good_for_nothing_stops_the_run_in_one_line(
    draw: type[DrawShard], said: str, tiny_t2i: Path, tmp_path: Path, ray_session: None
) -> None:
    captions = [f"caption number {index}" for index in range(80)]
    with pytest.raises(InputError) as stop:
        run(tmp_path / "run", captions, tiny_t2i, draw=draw, shard_size=16)
    assert said in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "run/data/dataset.json").exists()


def test_rows_drawn_in_a_smaller_batch_say_so_and_are_drawn_again_in_it(tiny_t2i: Path, tmp_path: Path) -> None:
    from tests.helpers.faulty_pipeline import DrawFaultyPipeline

    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    captions = [*CAPTIONS[:5], NEEDS_MEMORY, CAPTIONS[5]]
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, captions), spec, shard_size=8)
    write_manifest(store, plan, draw_in_process(store, plan, [0], draw=DrawFaultyPipeline))
    assert verify(store)["ok"]
    rows = pq.read_table(f"{store.prefix}/shards/part-000000.parquet").to_pylist()
    assert [row["batch_size"] for row in rows] == [4, 4, 4, 4, 2, 2, 2]
    assert json.loads(store.read_bytes("stats/part-000000.json"))["batch_sizes"] == {"2": 3, "4": 4}
    for sample in ("000000001-00", "000000005-00"):
        assert regenerate(store, sample)["matches"] is True
