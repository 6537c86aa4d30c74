"""kill -9 at any moment while a derived dataset is made: the same command gives what an undisturbed one gives.

Nothing is replaced: real processes die of SIGKILL between two objects of the store (tests.helpers.killed). The quick
form dies a few times and the slow one at each object. The same of the jobs on Ray, at some moments:
tests/cluster/curation/ and tests/cluster/ingest/.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.curation.sync.sentences import SentenceSpec
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import store_vocabularies
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from tests.helpers.featurised import featurise_in_process
from tests.helpers.killed import kills_until_done
from tests.helpers.refined import redraw_in_process, sync_in_process
from tests.helpers.tiny_generation import make_dataset_in_process, tiny_spec, write_corpus
from tests.helpers.tiny_models import save_tiny_clip

CAPTIONS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path, tiny_clip: Path) -> Path:
    """data: drawn pictures, three shards. clip: another CLIP."""
    folder = tmp_path_factory.mktemp("world")
    spec = tiny_spec(tiny_t2i, tiny_clip)
    captions = [f"A red circle on a green ground, number {number}." for number in range(CAPTIONS)]
    store, plan, _ = make_dataset_in_process(folder / "data", write_corpus(folder, captions), spec, shard_size=4)
    store_vocabularies(store, plan, encoder=ClipEncoder.from_spec(spec.clip))
    save_tiny_clip(folder / "clip", seed=5)
    return folder


def by_curate(world: Path, out: Path, materialise: bool) -> None:
    curate(CurateRequest(data=(str(world / "data"),), out=str(out), drop_lowest=0.2, materialise=materialise))


def by_sync(world: Path, out: Path, materialise: bool) -> None:
    sync_in_process(
        world / "data", out, SentenceSpec(model="clip"), clean=True, block_size=6, candidates=3, materialise=materialise
    )


def by_probes(world: Path, out: Path, materialise: bool) -> None:
    sync_in_process(
        world / "data", out, SentenceSpec(model="clip"), clean=True, block_size=6, candidates=3, probes=1,
        materialise=materialise,
    )  # fmt: skip


def by_best_of_n(world: Path, out: Path, materialise: bool) -> None:
    redraw_in_process(world / "data", out, method="best-of-n", best_of=2, materialise=materialise)


def by_redraw(world: Path, out: Path, materialise: bool) -> None:
    redraw_in_process(world / "data", out, method="redraw", budget=6.0, rounds=2, materialise=materialise)


def by_featurise(world: Path, out: Path, materialise: bool) -> None:
    featurise_in_process(world / "data", out, world / "clip", clean=True)


#: What is made; whether its pictures are written out; how many objects get a name or are deleted on the way, at least.
CASES = {
    "curate": (by_curate, False, 7),
    "curate, written out": (by_curate, True, 7),
    "sync": (by_sync, False, 20),
    "sync, probing": (by_probes, False, 44),
    "best-of-n, written out": (by_best_of_n, True, 20),
    "redraw": (by_redraw, False, 25),
    "featurise": (by_featurise, False, 16),
}


@pytest.mark.parametrize("at", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_kills_leave_no_trace(world: Path, tmp_path: Path, name: str, at: str) -> None:
    make: Callable[[Path, Path, bool], None]
    make, materialise, moments = CASES[name]
    every = 2 if at == "all" else max(3, moments // 3)
    make(world, tmp_path / "whole", materialise)
    out = tmp_path / "out"
    kills = kills_until_done(out, make, world, out, materialise, every=every)
    assert kills >= (moments - 1) // (every - 1) - 1
    found = verify(open_store(out))
    assert found["ok"], found
    assert found["fingerprint"] == verify(open_store(tmp_path / "whole"))["fingerprint"]
    whole, there = open_store(tmp_path / "whole"), open_store(out)
    assert there.list() == whole.list(), "nothing is left of the work"
    own = [
        key for key in whole.list() if not key.endswith(".json") and "/stats/" not in key
    ]  # those name places, times
    assert [key for key in own if there.read_bytes(key) != whole.read_bytes(key)] == []
