"""Quarantined samples tried again: those that can be drawn now join their shards, and nothing else changes."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.curation.redraw.budget import seconds_per_picture
from cluster.dataset.committed import CommittedShards, committed
from cluster.dataset.documents import Plan
from cluster.dataset.keys import MANIFEST_KEY, quarantine_key, shard_key, stats_key
from cluster.dataset.opened import open_dataset
from cluster.dataset.verify import verify
from cluster.generation.pipeline import run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.regenerate import regenerate
from cluster.generation.repair import repair_dataset
from cluster.generation.retry_quarantined import parse_reason, retry_quarantined
from cluster.generation.retrying import RETRIED_BY, Retry
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.write import OF_THIS_RUN, WriteShard
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.generation.loading import load_generator
from pcm.records import NULL_FEATURES
from tests.helpers.faulty_generators import RAISES, DrawFaulty
from tests.helpers.faulty_pipeline import DrawFaultyPipeline
from tests.helpers.stored import proven
from tests.helpers.tiny_generation import CAPTIONS, draw_in_process, null_spec, plan_dataset, tiny_spec, write_corpus

CORPUS = [*CAPTIONS[:3], RAISES, "\x00", CAPTIONS[4]]


@pytest.fixture
def faulty(tiny_t2i: Path, tmp_path: Path) -> tuple[Store, Plan]:
    """One shard: four pictures, one bad caption, and one on which the generator raised."""
    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CORPUS), spec, shard_size=8)
    write_manifest(store, plan, draw_in_process(store, plan, [0], draw=DrawFaultyPipeline))
    return store, plan


def retry(store: Store, plan: Plan, reason: str, draw: type[DrawShard] = DrawShard) -> dict:
    """What a retrying run does to shard 0, without Ray; the new stats."""
    committed(store, plan).forget([0])
    draw_in_process(store, plan, [0], draw=draw, retry=parse_reason(reason))
    write_manifest(store, plan, NULL_FEATURES)
    return json.loads(store.read_bytes(stats_key(0)))


def stored(store: Store) -> list[dict]:
    return pq.read_table(f"{store.prefix}/{shard_key(0)}").to_pylist()


def reasons(store: Store) -> dict[str, str]:
    rows = pq.read_table(f"{store.prefix}/{quarantine_key(0)}").to_pylist()
    return {row["sample_id"]: row["reason"] for row in rows}


@contextmanager
def killed_after(puts: int) -> Iterator[None]:
    """Whoever puts more is ended."""
    done, original = [], Store.write_bytes

    def write_bytes(self: Store, key: str, data: bytes) -> None:
        if len(done) == puts:
            raise KeyboardInterrupt
        done.append(key)
        original(self, key, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "write_bytes", write_bytes)
        yield


def test_a_sample_that_can_be_drawn_now_joins_its_shard(faulty: tuple[Store, Plan]) -> None:
    store, plan = faulty
    before = stored(store)
    assert reasons(store) == {"000000003-00": "generator_error", "000000004-00": "control_characters"}
    stats = retry(store, plan, "generator_error")
    after = stored(store)
    assert [row["caption"] for row in after] == [*CAPTIONS[:3], RAISES, CAPTIONS[4]], "in its place"
    assert [row for row in after if row["caption"] != RAISES] == before, "the others keep every byte"
    assert reasons(store) == {"000000004-00": "control_characters"}
    assert (stats["count"], stats["successes"], stats["quarantined_by_reason"]) == (6, 5, {"control_characters": 1})
    report = proven(store)
    assert (report["stored"], report["quarantined"]) == (5, 1)


def test_retried_to_the_end_it_is_the_dataset_that_never_failed(
    faulty: tuple[Store, Plan], tiny_t2i: Path, tmp_path: Path
) -> None:
    store, plan = faulty
    other, other_plan = plan_dataset(tmp_path / "other", tmp_path / "captions.txt", plan.spec, shard_size=8)
    write_manifest(other, other_plan, draw_in_process(other, other_plan, [0]))
    retry(store, plan, "all-generator")
    assert proven(store)["fingerprint"] == proven(other)["fingerprint"]
    assert store.read_bytes(shard_key(0)) == other.read_bytes(shard_key(0))


def test_a_sample_that_fails_again_stays_quarantined(faulty: tuple[Store, Plan]) -> None:
    store, plan = faulty
    before = store.read_bytes(shard_key(0))
    retry(store, plan, "generator_error", draw=DrawFaultyPipeline)
    assert store.read_bytes(shard_key(0)) == before
    assert reasons(store)["000000003-00"] == "generator_error"
    proven(store)


def test_the_times_of_a_shard_are_those_of_all_its_pictures(faulty: tuple[Store, Plan]) -> None:
    """What a redraw budget, a pilot and a report go by."""
    store, plan = faulty
    before = json.loads(store.read_bytes(stats_key(0)))
    slow = before | {"draw_seconds": 500.0, "featurise_seconds": 50.0, "encode_seconds": 5.0}
    store.write_bytes(stats_key(0), json.dumps(slow).encode())
    assert seconds_per_picture(open_dataset(store)) == pytest.approx(550 / 4)
    stats = retry(store, plan, "generator_error")
    for name, seconds in (("draw_seconds", 500.0), ("featurise_seconds", 50.0), ("encode_seconds", 5.0)):
        assert seconds <= stats[name] < seconds + 60, name
    assert (stats["start_time"], stats["end_time"]) == (before["start_time"], before["end_time"])
    assert 550 / 5 <= seconds_per_picture(open_dataset(store)) < 670 / 5


def test_what_the_run_did_is_told_of_the_retried_samples_alone(
    faulty: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = faulty
    before = json.loads(store.read_bytes(stats_key(0)))
    told, write = [], WriteShard.write
    monkeypatch.setattr(WriteShard, "write", lambda self, row: told.append(write(self, row)) or told[-1])
    after = retry(store, plan, "generator_error")
    assert (told[0]["count"], told[0]["successes"]) == (6, 5) and OF_THIS_RUN not in after
    run = told[0][OF_THIS_RUN]
    assert (run["count"], run["successes"], run["quarantined_by_reason"]) == (1, 1, {})
    assert (sum(run["clip_score_histogram"]), run["bytes"]) == (1, after["bytes"] - before["bytes"])
    assert run["draw_seconds"] == pytest.approx(after["draw_seconds"] - before["draw_seconds"])
    assert run["start_time"] > before["end_time"] and run["store_seconds"] == told[0]["store_seconds"]


def test_the_last_sample_to_leave_takes_the_quarantine_part_with_it(tiny_t2i: Path, tmp_path: Path) -> None:
    spec = tiny_spec(tiny_t2i, num_inference_steps=1)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, [RAISES, CAPTIONS[0]]), spec)
    draw_in_process(store, plan, [0], draw=DrawFaultyPipeline)
    retry(store, plan, "generator_error")
    assert not store.exists(quarantine_key(0)) and len(stored(store)) == 2
    proven(store)


@pytest.mark.parametrize(
    ("puts", "then"), [(1, DrawShard), (2, DrawShard), (1, DrawFaultyPipeline)], ids=["1", "2", "1, then it fails"]
)
def test_killed_between_its_puts_it_is_seen_and_ended_by_the_same_command(
    puts: int, then: type[DrawShard], faulty: tuple[Store, Plan]
) -> None:
    store, plan = faulty
    store.delete(MANIFEST_KEY)
    with killed_after(puts):
        draw_in_process(store, plan, [0], retry=parse_reason("generator_error"))
    report = verify(store)
    assert not report["ok"] and report["missing"] == 0, "nothing is lost meanwhile"
    assert report["duplicated"] == (1 if puts == 1 else 0)
    assert json.loads(store.read_bytes(stats_key(0)))["quarantined_by_reason"]["generator_error"] == 1, "found again"
    retry(store, plan, "generator_error", draw=then)
    assert (proven(store)["stored"], list(reasons(store).values())) == (5, ["control_characters"])


def retry_is_killed(folder: Path) -> tuple[Store, Plan]:
    """Of three shards with a sample each to try again the first was tried, in vain, and the second is half replaced."""
    corpus = write_corpus(folder, [CAPTIONS[0], RAISES, CAPTIONS[1], RAISES, CAPTIONS[2], RAISES])
    store, plan = plan_dataset(folder / "data", corpus, null_spec(), shard_size=2)
    write_manifest(store, plan, draw_in_process(store, plan, [0, 1, 2], draw=DrawFaulty))
    committed(store, plan).forget([0, 1, 2])
    retry = Retry(parse_reason("generator_error"), "killed")
    retry.begin(store)
    assert not store.exists(MANIFEST_KEY)
    draw_in_process(store, plan, [0], draw=DrawFaulty, retry=retry)
    with killed_after(1):
        draw_in_process(store, plan, [1], retry=retry)
    return store, plan


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs in this process: what they make and in which order, one shard after another."""

    def make_missing(store: Store, plan: Plan, pools: Pools, missing: list[int], made: CommittedShards, *_, **how):
        draw_in_process(store, plan, missing, draw=how["draw"], retry=how["retry"])
        for shard in missing:
            made.add(json.loads(store.read_bytes(stats_key(shard))))

    monkeypatch.setattr("cluster.generation.pipeline._make_missing", make_missing)
    monkeypatch.setattr("cluster.generation.pipeline.only_job", lambda *_, **how: nullcontext((None, False)))
    monkeypatch.setattr("cluster.generation.pipeline.shards_begun_again", lambda monitor: 0)
    monkeypatch.setattr("cluster.generation.repair.start_ray", lambda: None)
    monkeypatch.setattr("cluster.generation.repair.pools_of_cluster", lambda **how: ONE)


ONE = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)


def test_a_retry_that_was_killed_is_ended_and_tries_nothing_twice(without_ray: None, tmp_path: Path) -> None:
    store, plan = retry_is_killed(tmp_path)
    tried = store.read_bytes(stats_key(0))
    with pytest.raises(InputError, match="a retry of generator_error was interrupted; finish it first"):
        retry_quarantined(store, plan, "nan_image", ONE)
    again = retry_quarantined(store, plan, "generator_error", ONE)
    assert (again["tried_again"], again["stored"]) == (2, 5)
    assert store.read_bytes(stats_key(0)) == tried
    assert [json.loads(store.read_bytes(stats_key(shard)))[RETRIED_BY] for shard in (1, 2)] == ["killed"] * 2
    assert proven(store)["stored"] == 5 and not store.exists("retrying.json")
    again = retry_quarantined(store, plan, "generator_error", ONE)
    assert (again["tried_again"], again["stored"]) == (1, 6), "the next retry is another one"


@pytest.mark.parametrize("grows", [False, True])
def test_a_run_ends_a_retry_that_was_killed(grows: bool, without_ray: None, tmp_path: Path) -> None:
    store, plan = retry_is_killed(tmp_path)
    if grows:
        corpus = write_corpus(tmp_path, [*(tmp_path / "captions.txt").read_text().splitlines(), *CAPTIONS[3:6]])
        store, plan = plan_dataset(tmp_path / "data", corpus, plan.spec, shard_size=2)
    result = run_pipeline(store, plan, ONE)
    assert result.manifest is not None
    assert (result.manifest.stored, result.manifest.quarantined) == (8 if grows else 5, 1)
    proven(store)
    assert not store.exists("retrying.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        lambda store, plan: run_pipeline(store, plan, ONE),
        lambda store, plan: retry_quarantined(store, plan, "generator_error", ONE),
        lambda store, plan: repair_dataset(store.root),
    ],
    ids=["generate", "retry", "repair"],
)
def test_on_ray_a_retry_that_was_killed_is_ended(
    end: Callable[[Store, Plan], object], ray_session: None, tmp_path: Path
) -> None:
    store, plan = retry_is_killed(tmp_path)
    tried = store.read_bytes(stats_key(0))
    end(store, plan)
    assert proven(store)["stored"] == 5 and not store.exists("retrying.json")
    assert store.read_bytes(stats_key(0)) == tried, "in vain, and not once more"


def test_a_repair_ends_a_retry_that_was_killed(without_ray: None, tmp_path: Path) -> None:
    store, _ = retry_is_killed(tmp_path)
    report = repair_dataset(store.root)
    assert (report["ok"], report["repaired"], report["stored"]) == (True, 1, 5), report["problems"]
    assert not store.exists("retrying.json")


def test_defects_go_on_with_the_next_seeds(tiny_t2i: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_t2i, safety_checker=None)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    folder = tmp_path / "t2i"
    pipeline.save_pretrained(folder)
    spec = tiny_spec(folder, num_inference_steps=1, max_attempts=2)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:2]), spec)
    draw_in_process(store, plan, [0])
    first = pq.read_table(f"{store.prefix}/{quarantine_key(0)}").to_pylist()
    retry(store, plan, "nan_image")
    second = pq.read_table(f"{store.prefix}/{quarantine_key(0)}").to_pylist()
    assert [row["attempts"] for row in first] == [2, 2] and [row["attempts"] for row in second] == [4, 4]
    assert [row["seed"] - old["seed"] for row, old in zip(second, first, strict=True)] == [2, 2]
    mended = staticmethod(lambda spec: load_generator(dataclasses.replace(spec, model=str(tiny_t2i))))
    monkeypatch.setattr(DrawShard, "load", mended)
    retry(store, plan, "nan_image")
    rows = stored(store)
    assert [row["attempts"] for row in rows] == [5, 5]
    assert [row["seed"] - old["seed"] for row, old in zip(rows, first, strict=True)] == [3, 3]
    proven(store)
    assert regenerate(store, rows[0]["sample_id"])["matches"] is True, "one sample alone, with its fifth seed"


def test_the_job_says_in_one_line_what_cannot_be_tried_again(call_job, tmp_path: Path) -> None:
    for reason, said in (("empty", "retry of 'empty'"), ("nan_image", "not a dataset")):
        run = call_job("generate", "--out", tmp_path / "none", "--retry-quarantined", reason)
        assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1


def test_captions_that_are_bad_are_not_tried_again() -> None:
    for reason in ("empty", "bad_record", "generator"):
        with pytest.raises(InputError, match=f"retry of '{reason}': allowed are generator_error"):
            parse_reason(reason)
