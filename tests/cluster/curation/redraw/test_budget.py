"""A budget becomes a number of pictures by what the source's statistics say."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.curation.redraw.budget import pictures_of, seconds_per_picture
from cluster.curation.redraw.settings import GPU_SECONDS, MONEY, PICTURES
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.opened import open_dataset
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, plan_dataset, write_corpus


def test_pictures_seconds_and_money() -> None:
    def bought(budget: float, unit: str, price: float | None = None) -> int:
        return pictures_of(budget, unit, seconds=2.5, price_per_hour=price, data="data")

    assert bought(70, PICTURES) == 70
    assert bought(101, GPU_SECONDS) == 40
    assert bought(1.0, MONEY, 3.0) == 480, "an hour of 1,440 pictures costs 3"
    with pytest.raises(InputError, match=r"--budget 2: buys no picture; one takes 2.5 s"):
        bought(2, GPU_SECONDS)
    with pytest.raises(InputError, match="nothing says how long the pictures of data took"):
        pictures_of(9, GPU_SECONDS, seconds=None, price_per_hour=None, data="data")


def drawn_in(folder: Path, *, seconds: float) -> Store:
    """24 pictures in shards of six, each shard drawn and scored in so many seconds."""
    make_dataset_in_process(folder, write_corpus(folder.parent), null_spec(), shard_size=6)
    store = open_store(folder)
    for key in store.list("stats/"):
        stats = json.loads(store.read_bytes(key)) | {"draw_seconds": seconds - 3.0, "featurise_seconds": 3.0}
        store.write_bytes(key, json.dumps(stats).encode())
    return store


def test_seconds_are_those_of_drawing_and_scoring(tmp_path: Path) -> None:
    store = drawn_in(tmp_path / "data", seconds=9.0)
    assert seconds_per_picture(open_dataset(store)) == pytest.approx(9.0 / 6)
    view, written = tmp_path / "view", tmp_path / "written"
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(view), min_words=5))
    curate(CurateRequest(data=(str(view),), out=str(written), min_words=5, materialise=True))
    for derived in (view, written):
        assert seconds_per_picture(open_dataset(open_store(derived))) == pytest.approx(9.0 / 6), "as its source says"
    store.write_bytes("stats/part-000001.json", b"{")
    with pytest.raises(InputError, match=r"part-000001\.json: damaged"):
        seconds_per_picture(open_dataset(store))
    shutil.rmtree(view)
    assert seconds_per_picture(open_dataset(open_store(written))) is None, "its source is gone"


@pytest.mark.parametrize("materialise", [False, True])
def test_the_times_of_another_dataset_at_the_sources_place_are_not_taken(tmp_path: Path, materialise: bool) -> None:
    drawn_in(tmp_path / "data", seconds=9.0)
    derived = tmp_path / "derived"
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(derived), min_words=5, materialise=materialise))
    shutil.rmtree(tmp_path / "data")
    plan_dataset(tmp_path / "data", write_corpus(tmp_path), null_spec())  # just begun
    assert seconds_per_picture(open_dataset(open_store(derived))) is None
    shutil.rmtree(tmp_path / "data")
    other = drawn_in(tmp_path / "data", seconds=90.0)
    manifest = json.loads(other.read_bytes(MANIFEST_KEY))
    other.write_bytes(MANIFEST_KEY, json.dumps(manifest | {"corpus": "another"}).encode())
    assert seconds_per_picture(open_dataset(open_store(derived))) is None


def test_the_times_of_a_source_that_was_unfinished_are_found_when_it_has_grown(tmp_path: Path) -> None:
    drawn_in(tmp_path / "data", seconds=9.0)
    shard, manifest = tmp_path / "data/shards/part-000002.parquet", tmp_path / "data" / MANIFEST_KEY
    late = {place: place.read_bytes() for place in (shard, manifest)}
    for place in late:
        place.unlink()
    view, again, written = (tmp_path / name for name in ("view", "again", "written"))
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(view), min_words=5, unfinished=True))
    curate(CurateRequest(data=(str(view),), out=str(again), min_words=5))
    curate(CurateRequest(data=(str(view),), out=str(written), min_words=5, materialise=True))
    for place, data in late.items():
        place.write_bytes(data)
    for derived in (view, again, written):
        assert seconds_per_picture(open_dataset(open_store(derived))) == pytest.approx(9.0 / 6)
