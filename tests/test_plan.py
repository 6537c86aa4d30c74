"""The plan: every caption of the corpus becomes samples with ids and seeds, and a resume must ask for the same."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_generation import CAPTIONS, null_spec, plan_dataset, write_corpus

from cluster.dataset import load_plan, plan_part_key, read_table
from cluster.plan import make_plan, parse_sample_id, sample_id
from cluster.storage import Store, open_store
from pcm.errors import InputError
from pcm.spec import DatasetSpec

SPEC = null_spec()
MIXED = [
    "A cat.",
    "",
    "  ",
    "A dog.",
    "A dog.",
    "x" * 5000,
    "A c\x07at.",
    "long " * 150,
    "מחשב על שולחן",
    "\N{CAT FACE}",
]


def planned(store: Store) -> list[dict]:
    return [row for key in store.list("plan/") for row in read_table(store, key).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def corpus_of(tmp_path: Path, captions: Sequence[str]) -> Path:
    """A CSV-free way to hold any caption, empty ones too: JSON lines."""
    import json

    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"id": index, "caption": text}) + "\n" for index, text in enumerate(captions)))
    return path


@pytest.mark.parametrize("images_per_caption", [1, 3])
def test_every_record_is_planned_whether_it_can_be_drawn_or_not(images_per_caption: int, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, images_per_caption=images_per_caption)
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, MIXED), spec, shard_size=4)
    rows = planned(store)
    assert plan.records == len(MIXED) and plan.expected == len(MIXED) * images_per_caption == len(rows)
    assert [row["sample_id"] for row in rows] == [
        sample_id(record, image) for record in range(len(MIXED)) for image in range(images_per_caption)
    ]
    reasons = [row["reason"] for row in rows[::images_per_caption]]
    expected = ["", "empty", "empty", "", "", "too_long", "control_characters", "prompt_truncated", "", ""]
    assert reasons == expected
    assert plan.usable == sum(reason in ("", "prompt_truncated") for reason in expected) * images_per_caption
    assert plan.num_shards == -(-plan.expected // 4) == len(store.list("plan/"))


def test_equal_captions_get_seeds_of_their_own(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, images_per_caption=2)
    store, _ = plan_dataset(tmp_path / "out", corpus_of(tmp_path, ["A dog."] * 5), spec)
    assert len({row["seed"] for row in planned(store)}) == 10


def test_ids_and_seeds_do_not_depend_on_shard_size_or_on_later_captions(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    small, _ = plan_dataset(tmp_path / "small", corpus, SPEC, shard_size=2)
    large, _ = plan_dataset(tmp_path / "large", corpus, SPEC, shard_size=100)
    assert planned(small) == planned(large)
    (tmp_path / "more").mkdir()
    longer, _ = plan_dataset(tmp_path / "longer", write_corpus(tmp_path / "more", [*CAPTIONS, "A new one."]), SPEC)
    assert planned(longer)[: len(CAPTIONS)] == planned(large)


def test_planning_again_reads_and_writes_nothing_new(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    store, plan = plan_dataset(tmp_path / "out", corpus, SPEC)
    before = contents(tmp_path / "out")
    times = {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in before}
    assert plan_dataset(tmp_path / "out", corpus, SPEC)[1] == plan == load_plan(store)
    assert contents(tmp_path / "out") == before
    assert {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in before} == times


OTHERS: dict[str, tuple[DatasetSpec, list[str], int, str]] = {
    "guidance": (
        dataclasses.replace(SPEC, generator=dataclasses.replace(SPEC.generator, guidance_scale=2.0)),
        list(CAPTIONS), 5, "generator.guidance_scale: 7.5 -> 2.0",
    ),
    "seed": (dataclasses.replace(SPEC, seed=1), list(CAPTIONS), 5, "seed: 0 -> 1"),
    "clip": (
        dataclasses.replace(SPEC, clip=dataclasses.replace(SPEC.clip, dtype="float16")),
        list(CAPTIONS), 5, "clip.dtype: 'float32' -> 'float16'",
    ),
    "images per caption": (
        dataclasses.replace(SPEC, images_per_caption=2), list(CAPTIONS), 5, "images_per_caption: 1 -> 2",
    ),
    "shard size": (SPEC, list(CAPTIONS), 6, "shard_size: 5 -> 6"),
    "a changed caption": (SPEC, [*CAPTIONS[:-1], "Something else."], 5, "another corpus"),
    "fewer captions": (SPEC, list(CAPTIONS[:-1]), 5, f"{len(CAPTIONS)} records"),
    "other order": (SPEC, list(CAPTIONS[::-1]), 5, "another corpus"),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
def test_a_resume_that_asks_for_something_else_is_refused_and_changes_nothing(change: str, tmp_path: Path) -> None:
    spec, captions, shard_size, said = OTHERS[change]
    plan_dataset(tmp_path / "out", write_corpus(tmp_path), SPEC)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        plan_dataset(tmp_path / "out", write_corpus(tmp_path, captions), spec, shard_size=shard_size)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_corpus_without_a_usable_caption_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable caption"):
        plan_dataset(tmp_path / "out", corpus_of(tmp_path, ["", " ", "\x00"] * 20), SPEC)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no usable caption among 0 records"):
        make_plan(open_store(tmp_path / "out"), [], SPEC, corpus="x", shard_size=5, is_truncated=lambda prompt: False)
    assert not (tmp_path / "out").exists()


def test_a_corpus_whose_first_shards_are_unusable_is_planned_whole(tmp_path: Path) -> None:
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, [""] * 12 + ["A cat."]), SPEC, shard_size=3)
    assert len(planned(store)) == plan.expected == 13 and plan.usable == 1
    assert store.list("plan/") == [plan_part_key(shard) for shard in range(5)]


def test_the_plan_document_is_written_last(tmp_path: Path) -> None:
    """A driver that dies while planning leaves parts without plan.json, and the next one plans again."""
    corpus = write_corpus(tmp_path)
    whole, plan = plan_dataset(tmp_path / "whole", corpus, SPEC)
    broken = open_store(tmp_path / "broken")
    broken.write_bytes(plan_part_key(0), b"half a plan part")
    assert load_plan(broken) is None
    assert plan_dataset(tmp_path / "broken", corpus, SPEC)[1] == plan
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert planned(broken) == planned(whole)


@pytest.mark.parametrize("value", ["", "7", "x-00", "000000007-", "-1-00", "000000007_00", "000000007-0x"])
def test_what_is_no_sample_id_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="must look like 000000123-00"):
        parse_sample_id(value)


def test_sample_ids_are_read_as_written() -> None:
    assert parse_sample_id(sample_id(123456789, 42)) == (123456789, 42)


def test_sizes_without_sense_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    with pytest.raises(InputError, match="shard size 0"):
        plan_dataset(tmp_path / "out", corpus, SPEC, shard_size=0)
    with pytest.raises(InputError, match="images per caption 101"):
        plan_dataset(tmp_path / "out", corpus, dataclasses.replace(SPEC, images_per_caption=101))
    assert not (tmp_path / "out").exists()
