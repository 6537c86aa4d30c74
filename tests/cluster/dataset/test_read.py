"""read_dataset: rows for any Python program."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.dataset import DatasetRow, read_dataset
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.paths import ROOT
from tests.helpers.seaweedfs import S3Server
from tests.helpers.shards import describe_anew
from tests.helpers.tiny_dataset import scene, write_dataset
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

ROWS = 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("read") / "data", tiny_clip, rows=ROWS, shard_size=3)


def test_rows_hold_picture_caption_features_and_score(dataset: Path) -> None:
    rows = list(read_dataset(dataset))
    assert [row.sample_id for row in rows] == [f"{number:09d}-00" for number in range(ROWS)]
    tables = [pq.read_table(dataset / shard["key"]) for shard in load_manifest(open_store(dataset)).shards]
    stored = [row for table in tables for row in table.to_pylist()]
    for number, (row, expected) in enumerate(zip(rows, stored, strict=True)):
        caption, picture = scene(number)
        assert (row.caption, row.clip_score) == (caption, expected["clip_score"])
        np.testing.assert_array_equal(np.asarray(row.image), np.asarray(picture))
        assert row.image_bytes == expected["image"]["bytes"]
        assert row.patch_features is not None and row.patch_features.shape == (16, 64)
        assert row.patch_features.tobytes() == expected["patch_features"]
        np.testing.assert_array_equal(row.global_feature, np.float16(expected["global_feature"]))


def test_what_is_not_asked_for_is_not_read(dataset: Path, tmp_path: Path) -> None:
    row = next(read_dataset(dataset, columns=("caption", "patch_features")))
    assert row == DatasetRow(caption=row.caption, patch_features=row.patch_features)
    assert row.caption and row.patch_features is not None
    assert next(read_dataset(dataset, columns="caption")) == DatasetRow(caption=row.caption)
    with pytest.raises(InputError, match="image: no picture was read; name 'image' in columns"):
        _ = row.image
    store = open_store(tmp_path)
    store.write_bytes(MANIFEST_KEY, (dataset / MANIFEST_KEY).read_bytes())
    for shard in load_manifest(store).shards:  # of which nothing but captions is there
        sink = io.BytesIO()
        pq.write_table(pq.read_table(dataset / shard["key"], columns=["caption"]), sink)
        store.write_bytes(shard["key"], sink.getvalue())
    describe_anew(store)
    assert [row.caption for row in read_dataset(tmp_path, columns=["caption"])] == [scene(n)[0] for n in range(ROWS)]
    with pytest.raises(InputError, match="no column clip_score"):
        list(read_dataset(tmp_path, columns=["clip_score"]))


def test_a_row_that_is_kept_keeps_no_shard(dataset: Path) -> None:
    first, second, *_ = read_dataset(dataset)
    for name in ("patch_features", "global_feature"):
        array = getattr(first, name)
        assert array.base is None and not np.shares_memory(array, getattr(second, name))
        array[:] = 0  # and it is the reader's own


def test_a_dataset_on_a_store_is_read_by_its_uri(dataset: Path, s3: S3Server) -> None:
    store = open_store(f"{s3.uri}/read")
    for path in dataset.rglob("*"):
        if path.is_file():
            store.write_bytes(str(path.relative_to(dataset)), path.read_bytes())
    here, there = list(read_dataset(dataset)), list(read_dataset(f"{s3.uri}/read"))
    assert [row.image_bytes for row in here] == [row.image_bytes for row in there]
    for one, two in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.patch_features, two.patch_features)


def test_an_unfinished_dataset_is_read_if_asked_for(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    make_dataset_in_process(tmp_path / "data", corpus, null_spec(), shard_size=5, finish=False)
    (tmp_path / "data" / shard_key(1)).unlink()
    with pytest.raises(InputError, match="an unfinished dataset"):
        read_dataset(tmp_path / "data")
    rows = list(read_dataset(tmp_path / "data", unfinished=True))
    assert len(rows) == 24 - 5 and rows[5].sample_id == "000000010-00"
    assert rows[0].image.size == (1, 1)
    finished = tmp_path / "finished"
    make_dataset_in_process(finished, corpus, null_spec(), shard_size=5)
    assert len(list(read_dataset(finished, unfinished=True))) == len(list(read_dataset(finished))) == 24


def test_what_cannot_be_read_is_one_clear_line(dataset: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (lambda: read_dataset(tmp_path), "not a dataset"),
        (lambda: read_dataset(tmp_path, unfinished=True), "not a dataset"),
        (lambda: read_dataset(dataset, columns=["captions"]), "column 'captions': allowed are sample_id, caption"),
        (lambda: DatasetRow(sample_id="x").image, "x: no picture was read"),
        (lambda: DatasetRow(sample_id="x", image_bytes=b"x").image, "x: not a picture"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_reading_needs_neither_torch_nor_ray(dataset: Path) -> None:
    """Seconds to import, and a program that looks at rows may have neither."""
    program = (
        "import json, sys; from cluster.dataset import read_dataset; "
        f"rows = [row.caption for row in read_dataset({str(dataset)!r})]; "
        "print(json.dumps([len(rows), sorted({'torch', 'ray'} & set(sys.modules))]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [ROWS, []]


def test_an_unfinished_datasets_shard_is_compared_with_its_stats(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, ["A cat.", "A dog."])
    store, _, _ = make_dataset_in_process(tmp_path / "out", corpus, null_spec(), shard_size=2)
    store.delete(MANIFEST_KEY)
    assert len(list(read_dataset(tmp_path / "out", columns=["caption"], unfinished=True))) == 2
    store.write_bytes(shard_key(0), store.read_bytes(shard_key(0)) + b" ")
    with pytest.raises(InputError, match=r"part-000000.parquet: not the shard .* bytes instead of .*run jobs.verify"):
        list(read_dataset(tmp_path / "out", columns=["caption"], unfinished=True))
