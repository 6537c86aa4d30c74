"""Generators that fail, are slow, or draw one shard twice: the run goes on, and each shard is one generator's whole."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.cloudpickle import register_pickle_by_value

from cluster.dataset.keys import quarantine_key, shard_key, stats_key
from cluster.generation.limits import FaultPolicy
from cluster.generation.pipeline import run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.retrying import Retry
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.generator import Generator
from cluster.generation.stages.guard import RunGuard
from cluster.generation.stages.monitor import ShardOutcome, start_monitor
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard
from pcm.errors import InputError
from pcm.generation.drawing import Drawing, Guard, Request
from tests.helpers import faulty_generators
from tests.helpers.faulty_generators import (
    DrawNotLoaded,
    DrawPixels,
    loaded_by_the_first_alone,
    not_loaded_by_the_first,
    slow_at_first,
)
from tests.helpers.stored import proven
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, plan_dataset, tiny_spec, write_corpus

#: Ray's workers do not have the tests on their path.
register_pickle_by_value(faulty_generators)

CAPTIONS = [f"caption number {number}" for number in range(12)]
TWO = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=2)


def made_with(draw: type[DrawShard], out: Path, t2i: Path, pools: Pools = TWO) -> str:
    """The fingerprint of a dataset that generators made on Ray."""
    spec = tiny_spec(t2i, num_inference_steps=1)
    store, plan = plan_dataset(out, write_corpus(out.parent, CAPTIONS), spec, shard_size=1)
    run_pipeline(store, plan, pools, draw=draw)
    return proven(store)["fingerprint"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path, _ray_at_end: None) -> str:
    from cluster.session import start_ray

    start_ray(num_cpus=2)
    return made_with(DrawPixels, tmp_path_factory.mktemp("undisturbed") / "data", tiny_t2i)


def test_one_generator_that_cannot_load_its_model_ends_nothing(
    undisturbed: str, tmp_path: Path, tiny_t2i: Path, ray_session: None
) -> None:
    draw = not_loaded_by_the_first(tmp_path / "claim")
    assert made_with(draw, tmp_path / "data", tiny_t2i) == undisturbed
    assert (tmp_path / "claim").exists(), "none failed, so this says nothing"


def test_the_one_generator_that_can_draw_draws_everything(
    undisturbed: str, tmp_path: Path, tiny_t2i: Path, ray_session: None
) -> None:
    """The others hold as many turns as Ray Data binds to them, and nobody else gets these."""
    three = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=3)
    draw = loaded_by_the_first_alone(tmp_path / "claim")
    assert made_with(draw, tmp_path / "data", tiny_t2i, three) == undisturbed


def test_an_error_of_the_driver_holds_no_cpus_whoever_keeps_it(
    tmp_path: Path, tiny_t2i: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise InputError("the gate is closed")

    there = ray.cluster_resources()["CPU"]
    monkeypatch.setattr("cluster.generation.pipeline.check_gate", full)
    with pytest.raises(InputError, match="the gate is closed") as kept:
        made_with(DrawPixels, tmp_path / "data", tiny_t2i)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != there and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == there
    assert kept.value.__traceback__ is not None


def test_what_a_dead_process_left_in_quarantine_goes_when_the_sample_is_drawn(tmp_path: Path, tiny_t2i: Path) -> None:
    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:2]), spec, shard_size=2)
    score, write = FeaturiseShard(spec.clip), WriteShard(store, plan.schema_version)
    wanted = pa.table({"shard": [0], "part": [plan.part_key(0)]})
    store.write_bytes(quarantine_key(0), b"of a process that found too little memory, and died")
    write(score(DrawShard(store, plan.spec)(wanted)))
    write_manifest(store, plan, score.features)
    assert proven(store) and not store.exists(quarantine_key(0))


def test_a_shard_that_one_generator_does_not_end_is_drawn_by_another(
    undisturbed: str, tmp_path: Path, tiny_t2i: Path, ray_session: None
) -> None:
    draw = slow_at_first(tmp_path / "claim")
    assert made_with(draw, tmp_path / "data", tiny_t2i) == undisturbed
    assert (tmp_path / "claim").exists(), "none was slow, so this says nothing"


def test_a_model_that_no_generator_can_load_is_one_line(tmp_path: Path, tiny_t2i: Path, ray_session: None) -> None:
    with pytest.raises(InputError, match="mend the model"):
        made_with(DrawNotLoaded, tmp_path / "data", tiny_t2i)
    assert not (tmp_path / "data/dataset.json").exists()


@pytest.mark.slow
def test_a_caption_that_kills_takes_the_shard_that_is_being_stored_along_at_most_once(
    tmp_path: Path, tiny_t2i: Path, ray_session: None
) -> None:
    captions = [CAPTIONS[0], faulty_generators.CRASHES]
    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, captions), spec, shard_size=1)
    slow = faulty_generators.SlowStore(store.root, store.fs, store.prefix, store._single)
    one, deaths = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1), 3
    result = run_pipeline(slow, plan, one, faults=FaultPolicy(max_deaths=deaths), draw=faulty_generators.DrawFaulty)
    assert result.manifest is not None
    assert result.manifest.quarantined_by_reason == {"generator_crashed": 1}
    assert result.begun_again is not None
    assert result.begun_again < 2 * deaths, "the shard beside it would be begun again after each death"


@pytest.mark.parametrize("again", [True, False])
def test_a_shard_that_was_begun_before_is_drawn_once_nothing_is_left_to_store(
    tmp_path: Path, tiny_t2i: Path, ray_session: None, again: bool
) -> None:
    found = []

    class Looks(DrawPixels):
        def draw(self, plan: pa.Table) -> pa.Table:
            found.append(self._store.exists(shard_key(0)))
            return super().draw(plan)

    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:2]), spec, shard_size=1)
    slow = faulty_generators.SlowStore(store.root, store.fs, store.prefix, store._single)
    policy = FaultPolicy()
    monitor = start_monitor(policy)
    ray.get(monitor.begin_pass.remote([0, 1], 1))
    if again:
        ray.get(monitor.begin_shard.remote(1))
    generator = Generator(Looks, slow, plan, (monitor, policy), frozenset(), scores=True)
    with ThreadPoolExecutor(2) as calls:  # as Ray Data calls it
        stored = calls.map(generator, [pa.table({"turn": [0]}), pa.table({"turn": [1]})])
        assert [len(table) for table in stored] == [1, 1]
    assert found == [False, again]


def test_of_two_that_drew_a_shard_one_is_stored_whole(tmp_path: Path, tiny_t2i: Path, ray_session: None) -> None:
    """Drawn in batches of four by one and, after an out-of-memory, of two by the other: no part of both is stored."""
    captions = [*CAPTIONS[:2], faulty_generators.NEEDS_MEMORY, *CAPTIONS[2:5], faulty_generators.RAISES]
    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, captions), spec, shard_size=8)
    score, monitor = FeaturiseShard(spec.clip), start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote([0], 2))
    write = WriteShard(store, plan.schema_version, monitor)

    def drawn_by(draw: type[DrawShard], turn: int) -> pa.Table:
        wanted = pa.table({"shard": [0], "part": [plan.part_key(0)], "turn": [turn]})
        return score(draw(store, plan.spec)(wanted))

    from tests.helpers.faulty_pipeline import DrawFaultyPipeline

    first, second = drawn_by(DrawFaultyPipeline, -1), drawn_by(DrawShard, 0)
    assert batch_sizes(first) != batch_sizes(second)
    said = write(first)
    stats = json.loads(said["stats"][0].as_py())
    objects = [store.read_bytes(key) for key in (shard_key(0), quarantine_key(0), stats_key(0))]
    assert len(write(second)) == 0, "another drawer's is stored"
    assert [store.read_bytes(key) for key in (shard_key(0), quarantine_key(0), stats_key(0))] == objects
    assert len(write(first)) == 1, "its process may have died before it said so, and is run again"
    ray.get(monitor.committed.remote(0))
    assert len(write(second)) == 0
    write_manifest(store, plan, score.features)
    assert proven(store)
    assert stats["batch_sizes"] == {"2": 6}
    assert stats["quarantined_by_reason"] == {"generator_error": 1}, "of the one that is stored; the other drew all"


class Told(RunGuard):
    """A guard that keeps what it asks a monitor."""

    def __init__(self) -> None:
        self.errors: list[tuple[int, str]] = []
        self.asked: list[tuple] = []

    def begin_shard(self, shard: int) -> None:
        self._shard = shard  # nothing is known of it

    def _ask(self, method: str, *arguments: object) -> str:
        self.asked.append((method, *arguments))
        return ""


class SometimesBlank:
    """Draws one picture well, two blank and one that a safety checker blanks; at one caption it raises."""

    device_name = "none"

    def draw(self, requests: Sequence[Request], guard: Guard) -> list[Drawing]:
        reasons = ["", "nan_image", "nsfw_flagged", "generator_error", "black_image"] * len(requests)
        return [
            Drawing(b"" if reason else b"x", 8, 8, request.seed, 3, 4, reason)
            for request, reason in zip(requests, reasons, strict=False)
        ]


def test_blank_pictures_are_told_as_failures_but_not_of_a_retry(tmp_path: Path) -> None:
    captions = [f"a {colour} bus" for colour in ("red", "green", "blue", "old", "new")]
    corpus = write_corpus(tmp_path, [*captions, "\a"])
    store, plan, _ = make_dataset_in_process(tmp_path / "data", corpus, null_spec(), shard_size=6)
    wanted = pa.table({"shard": [0], "part": [plan.part_key(0)]})
    told = []
    for retry in (None, Retry(frozenset({"nan_image"}), "id")):
        draw, guard = DrawShard(store, plan.spec, retry=retry), Told()
        draw._guard, draw._generator = guard, SometimesBlank()
        draw(wanted)
        told += guard.asked
    outcome = ShardOutcome(samples=5, failed=3, blank=2, blank_pictures=6, blank_reason="black_image")
    assert told == [("end_shard", 0, outcome), ("end_shard", 0, ShardOutcome())]


def batch_sizes(block: pa.Table) -> list[int]:
    return ShardRow.from_block(block).samples["batch_size"].to_pylist()
