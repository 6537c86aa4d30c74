"""Quarantined samples tried again: those that can be drawn now join their shards, and nothing else changes."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.dataset.committed import committed
from cluster.dataset.layout import MANIFEST_KEY, Plan, quarantine_key, shard_key, stats_key
from cluster.dataset.verify import verify
from cluster.generation.pipeline import write_manifest
from cluster.generation.regenerate import regenerate
from cluster.generation.retry_quarantined import parse_reason
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.generation.loading import load_generator
from pcm.records import NULL_FEATURES
from tests.helpers.faulty_generators import RAISES
from tests.helpers.faulty_pipeline import DrawFaultyPipeline
from tests.helpers.tiny_generation import CAPTIONS, draw_in_process, plan_dataset, tiny_spec, write_corpus

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


def proven(store: Store) -> dict:
    report = verify(store)
    assert report["ok"], report
    return report


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
    puts: int, then: type[DrawShard], faulty: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = faulty
    done = []

    def write_bytes(self: Store, key: str, data: bytes) -> None:
        if len(done) == puts:
            raise KeyboardInterrupt
        done.append(key)
        original(self, key, data)

    original = Store.write_bytes
    store.delete(MANIFEST_KEY)
    monkeypatch.setattr(Store, "write_bytes", write_bytes)
    with pytest.raises(KeyboardInterrupt):
        draw_in_process(store, plan, [0], retry=parse_reason("generator_error"))
    monkeypatch.undo()
    report = verify(store)
    assert not report["ok"] and report["missing"] == 0, "nothing is lost meanwhile"
    assert report["duplicated"] == (1 if puts == 1 else 0)
    assert json.loads(store.read_bytes(stats_key(0)))["quarantined_by_reason"]["generator_error"] == 1, "found again"
    retry(store, plan, "generator_error", draw=then)
    assert (proven(store)["stored"], list(reasons(store).values())) == (5, ["control_characters"])


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
