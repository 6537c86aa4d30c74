"""The plan: every caption of the corpus becomes samples with ids and seeds, and a resume must ask for the same."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from cluster.dataset.documents import CorpusSource, Plan, load_manifest, load_plan, read_plan_part
from cluster.dataset.keys import VOCABULARIES_KEY, VOCABULARY_KEY, claim_key
from cluster.dataset.parquet import read_table
from cluster.dataset.plan import make_plan, parse_sample_id, sample_id
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import (
    count_corpus_words,
    planned_captions,
    store_vocabularies,
    vocabularies_stored,
)
from cluster.shard_work import PROCESS, RAY
from cluster.sources.corpus import CorpusRecord, read_corpus, source_digest
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.spec import ClipSpec, DatasetSpec
from pcm.text.concepts import lexicon_nouns, most_frequent
from pcm.text.vocabulary import Vocabulary, tokenise
from tests.helpers.stored import file_contents
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, null_spec, plan_dataset, write_corpus

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
    plan = load_plan(store)
    assert plan is not None
    keys = [plan.part_key(shard) for shard in range(plan.num_shards)]
    return [row for key in keys for row in read_table(store, key).to_pylist()]


def corpus_of(tmp_path: Path, captions: Sequence[str]) -> Path:
    """A CSV-free way to hold any caption, empty ones too: JSON lines."""
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
    before = file_contents(tmp_path / "out")
    times = {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in before}
    assert plan_dataset(tmp_path / "out", corpus, SPEC)[1] == plan == load_plan(store)
    assert file_contents(tmp_path / "out") == before
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
    before = file_contents(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        plan_dataset(tmp_path / "out", write_corpus(tmp_path, captions), spec, shard_size=shard_size)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert file_contents(tmp_path / "out") == before


def test_a_corpus_without_a_usable_caption_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable caption"):
        plan_dataset(tmp_path / "out", corpus_of(tmp_path, ["", " ", "\x00"] * 20), SPEC)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no usable caption among 0 records"):
        make_plan(open_store(tmp_path / "out"), [], SPEC, corpus="x", shard_size=5, is_truncated=lambda prompt: False)
    assert not (tmp_path / "out").exists()


def test_a_corpus_whose_name_carries_a_credential_is_not_planned(tmp_path: Path) -> None:
    store, records = open_store(tmp_path / "out"), read_corpus(str(write_corpus(tmp_path)))
    with pytest.raises(InputError, match="carries a credential") as caught:
        make_plan(
            store, records, SPEC, corpus="s3://key:very-secret@bucket/c.txt", shard_size=4, is_truncated=lambda _: False
        )
    assert "very-secret" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_corpus_whose_first_shards_are_unusable_is_planned_whole(tmp_path: Path) -> None:
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, [""] * 12 + ["A cat."]), SPEC, shard_size=3)
    assert len(planned(store)) == plan.expected == 13 and plan.usable == 1
    assert store.list("plan/") == [plan.part_key(shard) for shard in range(5)]


def test_the_plan_document_is_written_last(tmp_path: Path) -> None:
    """A driver that dies while planning leaves parts without plan.json, and the next one plans again."""
    corpus = write_corpus(tmp_path)
    whole, plan = plan_dataset(tmp_path / "whole", corpus, SPEC)
    broken = open_store(tmp_path / "broken")
    broken.write_bytes(plan.part_key(0), b"half a plan part")
    assert load_plan(broken) is None
    assert plan_dataset(tmp_path / "broken", corpus, SPEC)[1] == plan
    assert file_contents(tmp_path / "broken") == file_contents(tmp_path / "whole")
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


NEW = ["A new one.", "\x00", "Another new one.", "A dog.", "A last one."]


def grow(folder: Path, captions: Sequence[str], **arguments: object) -> tuple[Store, Plan]:
    return plan_dataset(folder / "out", write_corpus(folder, captions), SPEC, **arguments)


def test_captions_that_were_appended_are_planned_in_shards_of_their_own(tmp_path: Path) -> None:
    store, begun = grow(tmp_path, CAPTIONS)  # 24 captions in shards of 5: the last has 4
    before = {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in store.list("plan/")}
    _, plan = grow(tmp_path, [*CAPTIONS, *NEW, *NEW])
    assert plan.segments[0] == begun.segments[0] and len(plan.segments) == 2
    assert (plan.records, plan.expected, plan.usable, plan.num_shards) == (34, 34, 32, 7)
    assert [plan.shard_rows(shard) for shard in range(7)] == [5, 5, 5, 5, 4, 5, 5]
    assert {key: (tmp_path / "out" / key).stat().st_mtime_ns for key in before} == before
    assert [len(read_table(store, plan.part_key(shard))) for shard in range(7)] == [5, 5, 5, 5, 4, 5, 5]
    (tmp_path / "once").mkdir()
    at_once, whole = grow(tmp_path / "once", [*CAPTIONS, *NEW, *NEW], shard_size=100)
    assert planned(store) == planned(at_once) and plan.corpus_fingerprint == whole.corpus_fingerprint
    assert load_plan(store) == plan


def test_models_that_moved_are_loaded_where_they_are_and_recorded_where_they_were(tmp_path: Path) -> None:
    def at(place: str) -> DatasetSpec:
        generator = dataclasses.replace(SPEC.generator, model=f"{place}/t2i", revision="sha256:1")
        return DatasetSpec(generator=generator, clip=ClipSpec(model=f"{place}/clip", revision="sha256:2"))

    old, new = at("/old"), at("/new")
    store, begun = plan_dataset(tmp_path / "data", write_corpus(tmp_path), old)
    stored = store.read_bytes("plan.json")
    assert begun.spec_to_load == old and load_plan(store).spec_to_load == old
    _, again = plan_dataset(tmp_path / "data", write_corpus(tmp_path), new)
    assert (again.spec, again.spec_to_load) == (old, new) and again == begun
    assert store.read_bytes("plan.json") == stored == again.to_json()
    _, grown = plan_dataset(tmp_path / "data", write_corpus(tmp_path, [*CAPTIONS, "A zebra."]), new)
    assert (grown.spec, grown.spec_to_load) == (old, new) and load_plan(store) == grown
    plan_dataset(tmp_path / "whole", write_corpus(tmp_path, [*CAPTIONS, "A zebra."]), new, shard_size=30)
    assert [row["seed"] for row in planned(store)] == [row["seed"] for row in planned(open_store(tmp_path / "whole"))]


@pytest.mark.parametrize(("before", "now"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_another_device_of_the_cluster_is_told_of_with_the_option_that_names_the_first(
    tmp_path: Path, before: str, now: str
) -> None:
    def on(device: str, **clip: object) -> DatasetSpec:
        dtype = "bfloat16" if device == "cuda" else "float32"
        parts = dataclasses.replace(SPEC.generator, device=device, dtype=dtype)
        return DatasetSpec(generator=parts, clip=dataclasses.replace(SPEC.clip, device=device, dtype=dtype, **clip))

    plan_dataset(tmp_path / "data", write_corpus(tmp_path), on(before))
    there = " where there is a GPU" if before == "cuda" else ""
    with pytest.raises(InputError, match=f"begun on {before}, and this is {now}; give --device {before}{there}, or an"):
        plan_dataset(tmp_path / "data", write_corpus(tmp_path), on(now))
    with pytest.raises(InputError, match=r"clip.batch_size: 32 -> 4\); use the same arguments"):
        plan_dataset(tmp_path / "data", write_corpus(tmp_path), on(now, batch_size=4))


def test_a_larger_limit_is_growth(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    store = open_store(tmp_path / "out")
    for limit in (5, 11, 24, 1000):
        plan = make_plan(
            store, read_corpus(str(corpus), limit=limit), SPEC, corpus=str(corpus), shard_size=4,
            is_truncated=lambda prompt: False,
        )  # fmt: skip
        assert plan.records == min(limit, 24)
    assert [segment.records for segment in plan.segments] == [5, 6, 13]
    with pytest.raises(InputError, match=r"24 records; now .*: 23 records\)"):
        make_plan(
            store, read_corpus(str(corpus), limit=23), SPEC, corpus=str(corpus), shard_size=4,
            is_truncated=lambda prompt: False,
        )  # fmt: skip


@pytest.mark.parametrize("images_per_caption", [1, 3])
def test_every_sample_of_a_grown_plan_has_its_place(images_per_caption: int, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, images_per_caption=images_per_caption)
    for count in (7, 8, 20, 24):
        store, plan = plan_dataset(tmp_path / "out", write_corpus(tmp_path, CAPTIONS[:count]), spec, shard_size=4)
    assert len(plan.segments) == 4
    parts = [read_table(store, plan.part_key(shard)).to_pylist() for shard in range(plan.num_shards)]
    assert [len(part) for part in parts] == [plan.shard_rows(shard) for shard in range(plan.num_shards)]
    for position in range(plan.expected):
        shard, row = plan.shard_of(position)
        assert plan.shard_positions(shard)[row] == position
        assert parts[shard][row]["sample_id"] == sample_id(*divmod(position, images_per_caption))
    for beyond in (-1, plan.expected):
        with pytest.raises(IndexError):
            plan.shard_of(beyond)
    with pytest.raises(IndexError):
        plan.shard_rows(plan.num_shards)


def test_growth_of_captions_that_cannot_be_used_is_growth(tmp_path: Path) -> None:
    grow(tmp_path, CAPTIONS)
    store, plan = grow(tmp_path, [*CAPTIONS, "\x00", "\x01"])
    assert (plan.records, plan.usable, plan.num_shards) == (26, 24, 6)
    assert [row["reason"] for row in planned(store)[24:]] == ["control_characters"] * 2


@pytest.mark.parametrize(
    "captions",
    [[*CAPTIONS[1:], *NEW], [*NEW, *CAPTIONS], [*CAPTIONS[:-1], "Changed.", *NEW], [*CAPTIONS[:-1], *NEW]],
    ids=["one gone", "put in front", "one changed", "last gone"],
)
def test_a_corpus_that_did_not_only_grow_is_refused(captions: list[str], tmp_path: Path) -> None:
    grow(tmp_path, CAPTIONS)
    before = file_contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"another corpus .*: 24 records; now .*: the first 24 differ"):
        grow(tmp_path, captions)
    assert file_contents(tmp_path / "out") == before


def dying_at(key: str, store: Store) -> Store:
    """A store whose process dies when it is about to write an object."""

    class Dying(Store):
        def write_bytes(self, written: str, data: bytes) -> None:
            if written.endswith(key):
                raise KeyboardInterrupt
            super().write_bytes(written, data)

    return Dying(**{field.name: getattr(store, field.name) for field in dataclasses.fields(store)})


@pytest.mark.parametrize("key", ["plan.json", "/part-000005.parquet", "/part-000006.parquet"])
def test_a_driver_that_dies_while_it_plans_what_is_new_leaves_the_old_plan(key: str, tmp_path: Path) -> None:
    store, begun = grow(tmp_path, CAPTIONS)
    old = file_contents(tmp_path / "out")
    corpus = write_corpus(tmp_path, [*CAPTIONS, *NEW, *NEW])
    arguments = {"corpus": str(corpus), "shard_size": 5, "is_truncated": lambda prompt: False}
    with pytest.raises(KeyboardInterrupt):
        make_plan(dying_at(key, store), read_corpus(str(corpus)), SPEC, **arguments)
    assert load_plan(store) == begun
    assert {name: data for name, data in file_contents(tmp_path / "out").items() if name in old} == old
    assert grow(tmp_path, CAPTIONS)[1] == begun, "the shorter corpus resumes as if nothing had been tried"
    write_corpus(tmp_path, [*CAPTIONS, *NEW, *NEW])
    other = make_plan(store, read_corpus(str(corpus), limit=27), SPEC, **arguments)
    assert other.records == 27 and planned_rows(store, other) == 27, "and may grow by less than was tried"
    plan = make_plan(store, read_corpus(str(corpus)), SPEC, **arguments)
    assert plan.records == 34 and planned_rows(store, plan) == 34


def planned_rows(store: Store, plan: Plan) -> int:
    return sum(len(read_table(store, plan.part_key(shard))) for shard in range(plan.num_shards))


def test_two_drivers_that_plan_different_growth_do_not_mix_their_plans(tmp_path: Path) -> None:
    store, _ = grow(tmp_path, CAPTIONS)
    corpus = write_corpus(tmp_path, [*CAPTIONS, *NEW])

    def records() -> Iterator[CorpusRecord]:
        """The other driver plans its captions while this one reads."""
        yield from read_corpus(str(corpus), limit=26)
        make_plan(
            store, read_corpus(str(corpus)), SPEC, corpus=str(corpus), shard_size=5, is_truncated=lambda prompt: False
        )

    with pytest.raises(InputError, match=r"another run planned 29 records here meanwhile \(this one 26\)"):
        make_plan(store, records(), SPEC, corpus=str(corpus), shard_size=5, is_truncated=lambda prompt: False)
    _, plan = grow(tmp_path, [*CAPTIONS, *NEW])
    assert plan.records == 29


def other_captions(folder: Path) -> Path:
    (folder / "other").mkdir(exist_ok=True)
    return write_corpus(folder / "other", [f"{caption} Again." for caption in CAPTIONS])


class Meeting(Store):
    """A store whose user meets another at an operation: `at` is called once, before it."""

    def __new__(cls, store: Store, operation: str, at: Callable[[], object]) -> "Meeting":
        meeting = super().__new__(cls)
        for field in dataclasses.fields(store):
            object.__setattr__(meeting, field.name, getattr(store, field.name))
        object.__setattr__(meeting, "_awaited", [(operation, at)])
        return meeting

    def __init__(self, *_: object) -> None:
        pass

    def _meet(self, operation: str) -> None:
        if self._awaited and self._awaited[0][0] == operation:  # type: ignore[attr-defined]
            self._awaited.pop()[1]()  # type: ignore[attr-defined]

    def list(self, prefix: str = "") -> list[str]:
        self._meet(f"list {prefix}")
        return super().list(prefix)

    def write_bytes(self, key: str, data: bytes) -> None:
        self._meet("claim" if key.startswith("planning/") else f"write {key}")
        super().write_bytes(key, data)


def mine_is_whole(store: Store, corpus: Path) -> bool:
    """Whether plan.json and all of its parts are of this corpus."""
    plan = load_plan(store)
    captions = [row["caption"] for row in planned(store)]
    return (
        plan is not None
        and plan.corpus == str(corpus)
        and captions == [record.caption for record in read_corpus(str(corpus))]
    )


@pytest.mark.parametrize("operation", ["claim", "list planning/", "write plan.json"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_drivers_that_plan_different_things_at_one_moment_one_plans_and_nothing_mixes(
    operation: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "out")
    if where == "s3":
        place = f"{request.getfixturevalue('s3').uri}/race-{operation.replace(' ', '-').replace('/', '')}"
    one, two = write_corpus(tmp_path), other_captions(tmp_path)
    refused: list[str] = []

    def plan(store: Store, corpus: Path) -> None:
        source = CorpusSource(source_digest(str(corpus)), "auto", None, None)
        try:
            make_plan(
                store, read_corpus(str(corpus)), SPEC, corpus=str(corpus), shard_size=5,
                is_truncated=lambda prompt: False, source=source,
            )  # fmt: skip
        except InputError as error:
            refused.append(str(error))

    store = open_store(place)
    plan(Meeting(store, operation, lambda: plan(store, two)), one)
    assert len(refused) == 1 and "\n" not in refused[0] and "another run plan" in refused[0]
    assert mine_is_whole(store, one) != mine_is_whole(store, two)
    assert store.list("planning/") == []


def test_a_claim_of_a_driver_that_was_killed_stops_others_and_not_the_same_command(tmp_path: Path) -> None:
    store, corpus = open_store(tmp_path / "out"), write_corpus(tmp_path)
    asked, _ = plan_dataset(tmp_path / "elsewhere", corpus, SPEC)
    plan = load_plan(asked)
    assert plan is not None
    digest = hashlib.sha256(plan.asked().to_json()).hexdigest()[:16]
    store.write_bytes(claim_key(digest, "killed"), b"")
    with pytest.raises(InputError, match=r"planning/.*-killed.json.*delete this object"):
        plan_dataset(tmp_path / "out", other_captions(tmp_path), SPEC)
    assert load_plan(store) is None
    assert plan_dataset(tmp_path / "out", corpus, SPEC)[1] == plan


def test_two_drivers_that_plan_the_same_at_one_moment_both_go_on(tmp_path: Path) -> None:
    store, corpus = open_store(tmp_path / "out"), write_corpus(tmp_path)
    plans: list[Plan] = []

    def plan(store: Store) -> None:
        plans.append(
            make_plan(
                store, read_corpus(str(corpus)), SPEC, corpus=str(corpus), shard_size=5, is_truncated=lambda _: False
            )
        )

    plan(Meeting(store, "claim", lambda: plan(store)))
    assert plans[0] == plans[1] == load_plan(store) and mine_is_whole(store, corpus)


def test_a_plan_of_an_earlier_release_is_read_and_grows(tmp_path: Path) -> None:
    """Its parts lie in plan/ itself, and its plan.json names no folder."""
    store, plan = grow(tmp_path, CAPTIONS)
    for shard in range(plan.num_shards):
        store.write_bytes(f"plan/part-{shard:06d}.parquet", store.read_bytes(plan.part_key(shard)))
        store.delete(plan.part_key(shard))
    document = json.loads(store.read_bytes("plan.json"))
    for segment in document["segments"]:
        del segment["parts"]
    store.write_bytes("plan.json", json.dumps(document).encode())
    begun = load_plan(store)
    assert begun is not None and planned(store) and begun.part_key(1) == "plan/part-000001.parquet"
    _, grown = grow(tmp_path, [*CAPTIONS, *NEW])
    assert grown.segments[0] == begun.segments[0] and planned_rows(store, grown) == 29


def test_an_unchanged_source_is_not_read_and_a_changed_one_is(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    store = open_store(tmp_path / "out")

    def plan(records: Iterable[CorpusRecord], limit: int | None = None) -> Plan:
        source = CorpusSource(source_digest(str(corpus)), "auto", "train", limit)
        return make_plan(
            store, records, SPEC, corpus=str(corpus), shard_size=5, is_truncated=lambda prompt: False, source=source
        )

    def unread() -> Iterator[CorpusRecord]:
        raise AssertionError("the corpus was read")
        yield

    begun = plan(read_corpus(str(corpus)))
    assert plan(unread()) == begun == load_plan(store)
    with pytest.raises(AssertionError, match="was read"):
        plan(unread(), limit=7)
    stat = corpus.stat()
    corpus.write_text(corpus.read_text().replace("cat", "rat"))
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (corpus.stat().st_size, corpus.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    with pytest.raises(InputError, match="another corpus"):
        plan(read_corpus(str(corpus)))


def test_more_shards_than_keys_have_digits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.dataset.plan.MAX_SHARDS", 4)
    with pytest.raises(InputError, match="more than 4 shards: give a larger --shard-size"):
        grow(tmp_path, CAPTIONS)
    assert load_plan(open_store(tmp_path / "out")) is None


def test_a_dataset_that_grew_is_the_dataset_made_at_once(tmp_path: Path) -> None:
    """Only what is new is drawn, and until that is done readers keep the manifest they had."""
    make_dataset_in_process(tmp_path / "out", write_corpus(tmp_path), SPEC)
    old = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out/shards").iterdir()}
    manifest, words = ((tmp_path / "out" / name).read_bytes() for name in ("dataset.json", "stats/part-000004.json"))

    corpus = write_corpus(tmp_path, [*CAPTIONS, *NEW])
    store, plan, _ = make_dataset_in_process(tmp_path / "out", corpus, SPEC, finish=False)
    assert store.read_bytes("dataset.json") == manifest and load_manifest(store).expected == 24
    report = verify(store)
    assert (report["complete"], report["ok"], report["missing"]) == (False, False, 0)
    assert "the corpus has grown: 29 are planned" in report["problems"][0]

    make_dataset_in_process(tmp_path / "out", corpus, SPEC)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in old} == old
    assert store.read_bytes("stats/part-000004.json") == words
    grown = verify(store)
    assert grown["ok"] and grown["expected"] == 29 and len(load_manifest(store).shards) == plan.num_shards == 6
    at_once, _, _ = make_dataset_in_process(tmp_path / "once", corpus, SPEC, shard_size=7)
    assert grown["fingerprint"] == verify(at_once)["fingerprint"]


def test_words_follow_a_corpus_that_grows(tmp_path: Path) -> None:
    store, plan = grow(tmp_path, CAPTIONS)
    store_vocabularies(store, plan)
    assert b"zebra" not in store.read_bytes("vocabulary.txt")
    before = store.read_bytes("vocabulary.txt")
    _, plan = grow(tmp_path, [*CAPTIONS, "A zebra."])
    assert not vocabularies_stored(store, plan)
    store_vocabularies(store, plan)
    assert vocabularies_stored(store, plan) and b"zebra" in store.read_bytes("vocabulary.txt") != before
    stamp = (tmp_path / "out/vocabulary.txt").stat().st_mtime_ns
    store_vocabularies(store, plan)
    assert (tmp_path / "out/vocabulary.txt").stat().st_mtime_ns == stamp
    store.delete("vocabulary.txt")
    assert not vocabularies_stored(store, plan)


#: More than a task takes, with captions of every kind among them.
MANY = [f"{caption} {number}" if number % 7 else caption for number, caption in enumerate(600 * (*CAPTIONS, *MIXED))]


@pytest.mark.parametrize(("images_per_caption", "shard_size"), [(1, 256), (3, 100)])
def test_ray_plans_what_one_process_plans(
    ray_session: None, tmp_path: Path, images_per_caption: int, shard_size: int
) -> None:
    """Byte for byte, a new plan and what it grows by."""
    spec = dataclasses.replace(SPEC, images_per_caption=images_per_caption)
    corpus = corpus_of(tmp_path, MANY)
    for run_on in (PROCESS, RAY):
        for limit in (len(MANY) // 3, None):
            make_plan(
                open_store(tmp_path / run_on), read_corpus(str(corpus), limit=limit), spec, corpus="captions",
                shard_size=shard_size, is_truncated=lambda prompt: len(prompt) > 500, run_on=run_on,
                source=CorpusSource("digest", "auto", None, limit),
            )  # fmt: skip
    assert file_contents(tmp_path / PROCESS) == file_contents(tmp_path / RAY)
    rows = planned(open_store(tmp_path / RAY))
    assert len(rows) == images_per_caption * len(MANY) and {row["reason"] for row in rows} > {"", "empty"}


def test_a_task_that_cannot_write_ends_planning_with_its_line(ray_session: None, tmp_path: Path) -> None:
    """And leaves no plan."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/plan").write_text("a file where parts are to go")
    store = open_store(tmp_path / "out")
    with pytest.raises((InputError, OSError), match="plan"):
        make_plan(
            store, read_corpus(str(corpus_of(tmp_path, MANY))), SPEC, corpus="captions", shard_size=256,
            is_truncated=lambda prompt: False, run_on=RAY,
        )  # fmt: skip
    assert load_plan(store) is None


def test_tasks_write_parts_only_where_they_see_the_folder(ray_session: None, tmp_path: Path) -> None:
    """A node that comes for these tasks may have a disk of its own there: here what all see goes instead."""
    corpus, out = corpus_of(tmp_path, MANY), tmp_path / "out"

    def records() -> Iterator[CorpusRecord]:
        for seen in out.iterdir():
            seen.unlink()
        yield from read_corpus(str(corpus))

    with pytest.raises(InputError, match=r"out: a folder of one machine, which node \S+ does not see; give a URI"):
        make_plan(
            open_store(out), records(), SPEC, corpus="captions", shard_size=256, is_truncated=lambda prompt: False,
            run_on=RAY,
        )  # fmt: skip
    assert not list(out.iterdir())


def test_a_part_of_the_plan_that_is_missing_is_told_in_one_line(tmp_path: Path) -> None:
    store, plan = grow(tmp_path, CAPTIONS)
    store.delete(plan.part_key(1))
    with pytest.raises(InputError, match=r"part-000001.parquet: a part of the plan is missing; run jobs.verify"):
        store_vocabularies(store, plan)


def test_a_part_of_the_plan_that_is_damaged_is_told_in_one_line(tmp_path: Path) -> None:
    """Whatever byte is another: Arrow raises errors of several classes."""
    store, plan = grow(tmp_path, CAPTIONS)
    key = plan.part_key(1)
    whole, told = store.read_bytes(key), 0
    for position in range(4, len(whole), 37):
        store.write_bytes(key, whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_plan_part(store, key)
        except InputError as error:
            told += 1
            assert "a part of the plan is damaged" in str(error) and "\n" not in str(error)
    assert told > 10


@pytest.mark.parametrize("times, least, words", [(4, 1, 11), (5, 1, 11), (9, 5, 2)])
def test_where_few_words_of_a_large_corpus_are_frequent_all_are_kept(
    times: int,
    least: int,
    words: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Captions without spaces are one word each, and cannot be given a smaller count."""
    monkeypatch.setattr("cluster.dataset.vocabularies.SMALL_CORPUS", 10)
    captions = [f"一只狗在草地上奔跑{number}" for number in range(9)]
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, [*captions, *["a"] * times]), SPEC)
    store_vocabularies(store, plan)
    assert len(Vocabulary.from_text(store.read_bytes(VOCABULARY_KEY).decode()).words) == words
    assert json.loads(store.read_bytes(VOCABULARIES_KEY))["min_count"] == least
    assert ("so all 10 different words are kept" in caplog.text) == (least == 1)


def test_captions_without_any_word_have_no_vocabulary(tmp_path: Path) -> None:
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, ["...", "?!"]), SPEC)
    with pytest.raises(InputError, match="the captions have no word, only punctuation"):
        store_vocabularies(store, plan)


def test_ray_counts_the_words_that_one_process_counts(ray_session: None, tmp_path: Path) -> None:
    """As of the captions one after the other."""
    store, plan = plan_dataset(tmp_path / "out", corpus_of(tmp_path, MANY), SPEC, shard_size=100)
    plan = dataclasses.replace(
        plan, spec=dataclasses.replace(SPEC, clip=ClipSpec(model="ViT-B-32/openai", revision=""))
    )
    one, many = (count_corpus_words(store, plan, run_on=run_on) for run_on in (PROCESS, RAY))
    assert one == many
    captions = list(planned_captions(store, plan))
    counts = Counter(word for caption in captions for word in tokenise(caption))
    assert one.vocabulary == Vocabulary.of_counts(counts, min_count=5)
    nouns = Counter(noun for caption in captions for noun in lexicon_nouns([caption]))
    assert one.nouns == tuple(most_frequent(nouns, 400)) and len(one.nouns) > 5
