"""Parquet parts as one corpus: a folder, or a pattern, on a disk or a store."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.sources.corpus import corpus_parts, read_corpus, source_digest
from cluster.store.store import Store, open_store
from pcm.errors import InputError


def write_part(folder: Path, name: str, rows: list[tuple[object, str]]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image_id": [row[0] for row in rows], "caption": [row[1] for row in rows]}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three parts of two splits, written out of order, whose image ids are numbers, texts and floats; and litter."""
    folder = tmp_path / "hf [v1]"
    write_part(folder, "data/train-00001-of-00002.parquet", [("7", "a cat sleeps on a mat"), ("x", "a red bus stops")])
    write_part(folder, "data/validation-00000-of-00001.parquet", [(9.0, "a bird sings in a tree"), (None, "two boats")])
    write_part(folder, "data/train-00000-of-00002.parquet", [(5, "a dog runs over grass"), (6, "a man rides a horse")])
    write_part(folder, "_delta/part.parquet", [(1, "litter of a table format")])
    (folder / "data/._train.parquet").write_bytes(b"litter of macOS")
    (folder / "README.md").write_text("a card")
    return folder


def records(uri: object, **settings: object) -> list[tuple]:
    return [(each.corpus_id, each.image_id, each.caption) for each in read_corpus(str(uri), **settings)]  # type: ignore[arg-type]


TRAIN = [
    ("0", "5", "a dog runs over grass"),
    ("1", "6", "a man rides a horse"),
    ("2", "7", "a cat sleeps on a mat"),
    ("3", "x", "a red bus stops"),
]


def test_a_folder_is_one_corpus_in_the_order_of_its_names(folder: Path) -> None:
    assert records(folder, split="train") == TRAIN
    assert records(folder, split="validation") == [("4", "9", "a bird sings in a tree"), ("5", None, "two boats")]
    assert len(records(folder)) == 6 and records(folder, limit=3) == TRAIN[:3]


def test_a_pattern_takes_what_it_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for pattern in ("data/train-*.parquet", "data/train-0000?-of-*.parquet", "*/train-*"):
        assert records(pattern) == TRAIN, pattern
    assert records("data/train-00000-of-00002.parquet") == TRAIN[:2]
    for nothing in ("data/test-*.parquet", "none/*.parquet"):
        with pytest.raises(InputError, match="no Parquet file is so named"):
            records(nothing)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder: Path) -> None:
    write_part(folder, "odd[1].parquet", [(1, "a bench in a park")])
    assert records(folder / "odd[1].parquet") == [("0", "1", "a bench in a park")]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a dog runs\n")
    with pytest.raises(InputError, match="a folder; name one caption file"):
        records(tmp_path)


def test_other_formats_are_not_read_as_parts(folder: Path) -> None:
    with pytest.raises(InputError, match="only where they are Parquet, not csv"):
        records(folder, format="csv")


def test_parts_on_a_store_are_those_on_a_disk(folder: Path, s3) -> None:
    remote = open_store(f"{s3.uri}/parts")
    for key in open_store(folder).list():
        remote.write_bytes(key, open_store(folder).read_bytes(key))
    assert records(f"{s3.uri}/parts/data/train-*.parquet") == TRAIN
    assert source_digest(f"{s3.uri}/parts") == source_digest(str(folder))


def test_the_order_of_a_listing_changes_neither_digest_nor_records(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_digest(str(folder)), records(folder)
    found = Store._find
    monkeypatch.setattr(Store, "_find", lambda self, prefix: reversed(list(found(self, prefix))))
    assert (source_digest(str(folder)), records(folder)) == before
    assert [Path(part).name for part in corpus_parts(str(folder))] == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"
    ]  # fmt: skip


def test_a_changed_part_is_another_source(folder: Path) -> None:
    before = source_digest(str(folder))
    write_part(folder, "data/train-00001-of-00002.parquet", [("7", "a cat sleeps on a mat"), ("x", "a blue bus stops")])
    assert source_digest(str(folder)) != before


def test_a_part_has_the_split_of_its_folder_where_its_name_says_none(tmp_path: Path) -> None:
    for name in (
        "default/train/0000",
        "default/validation/0000",
        "default/partial-test/0000",
        "default/split=dev/0000",
    ):
        write_part(tmp_path, f"{name}.parquet", [(1, f"a caption of {name}")])
    write_part(tmp_path, "default/test/train-00000-of-00001.parquet", [(1, "its own name counts")])
    found = {split: [row[2] for row in records(tmp_path / "default/*/*.parquet", split=split)] for split in SPLITS}
    assert found == {
        "train": ["its own name counts", "a caption of default/train/0000"],
        "validation": ["a caption of default/validation/0000"],
        "test": ["a caption of default/partial-test/0000"],
        "dev": ["a caption of default/split=dev/0000"],
    }


SPLITS = ("train", "validation", "test", "dev")


def test_what_is_named_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    """A file, or the folder of the parts: people work in folders that are called dev and test."""
    for name in ("dev/validation-00000-of-00001", "test/0000", "test/0001"):
        write_part(tmp_path, f"{name}.parquet", [(1, name)])
    assert len(records(tmp_path / "dev/validation-00000-of-00001.parquet", split="train")) == 1
    assert len(records(tmp_path / "test", split="train")) == 2
    assert len(records(tmp_path / "test/*.parquet", split="train")) == 2


def test_a_star_stays_within_a_folder_and_two_cross_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "old/b", "old/older/c"):
        write_part(tmp_path, f"p/{name}.parquet", [(1, name)])
    caplog.set_level("INFO")
    captions = {
        pattern: [row[2] for row in records(tmp_path / pattern)]
        for pattern in ("p/*.parquet", "*/*/*.parquet", "p/**/*.parquet", "**/b.parquet", "p/**", "p/old/**/c.parquet")
    }
    every = ["a", "old/b", "old/older/c"]
    assert captions == {
        "p/*.parquet": ["a"], "*/*/*.parquet": ["old/b"], "p/**/*.parquet": every, "**/b.parquet": ["old/b"],
        "p/**": every, "p/old/**/c.parquet": ["old/older/c"],
    }  # fmt: skip
    assert "3 Parquet files, from " in caplog.text
    with pytest.raises(InputError, match="no Parquet file is so named"):
        records(tmp_path / "*.parquet")


def test_a_folder_with_a_bracket_in_its_name_stands_before_a_pattern(folder: Path) -> None:
    assert "[" in folder.name
    assert records(folder / "data/train-*.parquet") == TRAIN
    write_part(folder, "data/[a]/train-0.parquet", [(1, "of brackets")])
    write_part(folder, "data/a/train-0.parquet", [(1, "of a class of letters")])
    assert records(folder / "data/[a]/*.parquet") == [("0", "1", "of brackets")]
    assert records(folder / "data/[ab]/*.parquet") == [("0", "1", "of a class of letters")]
