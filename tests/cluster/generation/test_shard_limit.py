"""More shards than a plan has numbers for are told before planning, and a shard size that is measured avoids them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.generation.make import prepare
from cluster.generation.request import GenerateRequest
from cluster.generation.shard_limit import LEAST_BYTES, least_shard_size
from cluster.store.store import open_store
from pcm.errors import InputError


@pytest.fixture
def few_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("cluster.dataset.plan.MAX_SHARDS", 10)
    return 10


def corpus(folder: Path, captions: int) -> Path:
    file = folder / "captions.txt"
    file.write_text("".join(f"a picture of a red house number {number:04d}\n" for number in range(captions)))
    return file


def test_the_least_shard_size_that_has_room_is_found(tmp_path: Path, few_shards: int) -> None:
    file = corpus(tmp_path, 95)

    def least(shard_size: int, *, images: int = 1, limit: int | None = None) -> int:
        records = range(95 if limit is None else min(95, limit))
        return least_shard_size(
            str(file), lambda: records, shard_size=shard_size, images_per_caption=images, limit=limit
        )

    assert [least(shard_size) for shard_size in (1, 9, 10, 256)] == [10, 10, 10, 256]
    assert least(9, images=2) == 19
    assert least(4, limit=40) == 4 and least(4, limit=41) == 5


def test_a_corpus_is_not_counted_where_its_bytes_tell_enough(tmp_path: Path, few_shards: int) -> None:
    file = corpus(tmp_path, 95)

    def read() -> Iterator[object]:
        raise AssertionError("was read")

    enough = -(-file.stat().st_size // LEAST_BYTES) // few_shards + 1
    assert least_shard_size(str(file), read, shard_size=enough, images_per_caption=1, limit=None) == enough


def test_a_size_that_is_given_and_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, few_shards: int
) -> None:
    out = tmp_path / "out"
    request = GenerateRequest(corpus=str(corpus(tmp_path, 95)), out=str(out), t2i="null", shard_size=9)
    with pytest.raises(InputError, match=r"^--shard-size 9: .* would have more than .* shards; give 10 or more$"):
        prepare(open_store(out), request)
    assert not list(out.rglob("*"))
