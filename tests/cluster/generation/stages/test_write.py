"""Writers of one shard that know nothing of each other: which one's shard, quarantine part and statistics stay."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.dataset.keys import quarantine_key, shard_key, stats_key
from cluster.dataset.verify import verify
from cluster.generation.pipeline import write_manifest
from cluster.generation.stages import write
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.write import ROW_INDEX, WriteShard
from cluster.store.store import Store, open_store
from pcm.records import NULL_FEATURES
from tests.helpers.faulty_generators import RAISES, DrawFaulty
from tests.helpers.tiny_generation import CAPTIONS, null_spec, plan_dataset, write_corpus

KEYS = [shard_key(0), quarantine_key(0), stats_key(0)]


class Drawn:
    """A shard of a plan as two generators draw it: with one, a sample fails that the other one draws."""

    def __init__(self, place: str, folder: Path) -> None:
        self.store, self.plan = plan_dataset(place, write_corpus(folder, [*CAPTIONS[:3], RAISES]), null_spec())
        self.faulty, self.whole = (self._by(draw) for draw in (DrawFaulty, DrawShard))

    def _by(self, draw: type[DrawShard]) -> pa.Table:
        spec = self.plan.spec
        wanted = pa.table({"shard": [0], "part": [self.plan.part_key(0)]})
        return FeaturiseShard(spec.clip)(draw(self.store, spec)(wanted))

    def writer(self, *, again: tuple[int, ...] = ()) -> WriteShard:
        return WriteShard(self.store, self.plan.schema_version, again=again)

    def objects(self) -> dict[str, bytes]:
        return {key: self.store.read_bytes(key) for key in KEYS if self.store.exists(key)}

    def is_whole(self) -> bool:
        write_manifest(self.store, self.plan, NULL_FEATURES)
        return verify(self.store)["ok"]


@pytest.fixture(params=["local", "s3"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> Drawn:
    place = str(tmp_path / "data")
    if request.param == "s3":
        place = f"{request.getfixturevalue('s3').uri}/writers/{abs(hash(request.node.name))}"
    return Drawn(place, tmp_path)


def told(stored: pa.Table) -> dict:
    return json.loads(stored["stats"][0].as_py())


@pytest.mark.parametrize("first", ["faulty", "whole"])
def test_the_first_of_two_writers_wins(first: str, drawn: Drawn, caplog: pytest.LogCaptureFixture) -> None:
    blocks = {"faulty": drawn.faulty, "whole": drawn.whole}
    writers = [drawn.writer(), drawn.writer()]
    ours = told(writers[0](blocks.pop(first)))
    before = drawn.objects()
    (other,) = blocks.values()
    theirs = told(writers[1](other))
    assert drawn.objects() == before and "shard 0 was committed by another writer meanwhile" in caplog.text
    assert (theirs["successes"], theirs["sha256"]) == (ours["successes"], ours["sha256"]), "what the driver is told"
    assert ROW_INDEX not in theirs and theirs["store_seconds"] >= 0
    assert drawn.is_whole()


def test_one_that_still_stores_its_shard_is_waited_for(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has put its statistics, and is slow with the rest."""
    writers = [drawn.writer(), drawn.writer()]
    reached, go_on = threading.Event(), threading.Event()
    store_quarantine = write.store_quarantine

    def slow(store: Store, shard: int, quarantined: pa.Table) -> None:
        if threading.current_thread() is slow_one:
            reached.set()
            assert go_on.wait(60)
        store_quarantine(store, shard, quarantined)

    monkeypatch.setattr(write, "store_quarantine", slow)
    slow_one = threading.Thread(target=writers[0], args=(drawn.faulty,))
    slow_one.start()
    assert reached.wait(60) and sorted(drawn.objects()) == [stats_key(0)]
    second = threading.Thread(target=writers[1], args=(drawn.whole,))
    second.start()
    second.join(2)
    assert second.is_alive() and sorted(drawn.objects()) == [stats_key(0)]
    go_on.set()
    for thread in (slow_one, second):
        thread.join(60)
    assert json.loads(drawn.objects()[stats_key(0)])["failed_to_generate"] == 1 and drawn.is_whole()


def test_one_that_died_before_this_writer_began_is_not_waited_for(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "STORING_SECONDS", 3600.0)
    drawn.writer()(drawn.faulty)
    drawn.store.delete(shard_key(0))  # as one that died before its last put
    drawn.writer()(drawn.whole)
    assert sorted(drawn.objects()) == [shard_key(0), stats_key(0)] and drawn.is_whole(), "nothing of the dead one"


def test_one_that_died_since_is_waited_for_no_longer_than_a_while(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "STORING_SECONDS", 1.0)
    late = drawn.writer()
    drawn.writer()(drawn.faulty)
    drawn.store.delete(shard_key(0))
    late(drawn.whole)
    assert sorted(drawn.objects()) == [shard_key(0), stats_key(0)] and drawn.is_whole()


def test_what_is_to_be_made_again_is_put_in_its_place(drawn: Drawn) -> None:
    drawn.writer()(drawn.faulty)
    drawn.writer(again=(0,))(drawn.whole)
    assert sorted(drawn.objects()) == [shard_key(0), stats_key(0)] and drawn.is_whole()


def test_statistics_that_are_no_json_keep_nobody_waiting(tmp_path: Path) -> None:
    drawn = Drawn(str(tmp_path / "data"), tmp_path)
    open_store(tmp_path / "data").write_bytes(stats_key(0), b"{")
    drawn.writer()(drawn.whole)
    assert drawn.is_whole()
