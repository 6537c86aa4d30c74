"""A budget becomes a number of pictures by what the source's statistics say."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.curation.curate import curate
from cluster.curation.redraw.budget import pictures_of, seconds_per_picture
from cluster.curation.redraw.settings import GPU_SECONDS, MONEY, PICTURES
from cluster.curation.request import CurateRequest
from cluster.dataset.opened import open_dataset
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus


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


def test_seconds_are_those_of_drawing_and_scoring(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=6)
    store = open_store(tmp_path / "data")
    for key in store.list("stats/"):
        stats = json.loads(store.read_bytes(key)) | {"draw_seconds": 6.0, "featurise_seconds": 3.0}
        store.write_bytes(key, json.dumps(stats).encode())
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
