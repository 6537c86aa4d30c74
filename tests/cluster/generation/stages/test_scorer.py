"""An actor of CLIP alone that cannot load it ends no run: it gives back what it was given, and holds its calls."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.actor import ActorHandle
from ray.cloudpickle import register_pickle_by_value

from cluster.dataset.documents import Plan
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import ConceptsOfShard
from cluster.generation.limits import FaultPolicy
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import CALLS, Pools
from cluster.generation.stages.monitor import Turn, start_monitor
from cluster.generation.stages.scorer import Scorer
from cluster.generation.stages.shard_row import ShardRow
from cluster.store.store import Store
from pcm.errors import InputError
from tests.helpers import faulty_scorers
from tests.helpers.faulty_scorers import loaded_by_the_first_alone
from tests.helpers.tiny_generation import CAPTIONS, null_spec, plan_dataset, tiny_spec, write_corpus

#: Ray's workers do not have the tests on their path.
register_pickle_by_value(faulty_scorers)


@pytest.fixture
def without_clip(tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> tuple[Store, Plan]:
    """Planned with a CLIP that is not on this machine now."""
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    spec = tiny_spec(tiny_t2i, clip)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, ["A cat."]), spec)
    shutil.rmtree(clip)
    return store, plan


def scorer_of(monitor: ActorHandle, store: Store, plan: Plan) -> Scorer:
    return Scorer(store, plan, (monitor, FaultPolicy()), ConceptsOfShard.of(store, plan, 0))


def drawn(monitor: ActorHandle, shard: int = 0) -> pa.Table:
    """The next shard, this one, without a sample, drawn in the turn of the same number."""
    assert ray.get(monitor.turn.remote("g", shard)) == Turn(shard)
    ray.get(monitor.handed_on.remote(shard))
    return ShardRow(shard, pa.table({"sample_id": []}), {}, turn=shard).to_block()


def test_it_gives_its_shard_back_and_holds_the_call_until_another_one_has_scored_it(
    without_clip: tuple[Store, Plan], ray_session: None
) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote([0], 1, 2))
    assert ray.get(monitor.start.remote("another", "gpu-8", scores=True)) == ""
    with ThreadPoolExecutor(1) as calls:
        call = calls.submit(scorer_of(monitor, *without_clip), drawn(monitor))
        while ray.get(monitor.turn.remote("h", 1)) != Turn(0):
            assert not call.done(), "it would be given the next shard"
            time.sleep(0.1)
        ray.get(monitor.committed.remote(0))
        assert len(call.result()) == 0


def test_it_gives_back_all_that_it_was_given_at_once(without_clip: tuple[Store, Plan], ray_session: None) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote([0, 1], 1, 2))
    assert ray.get(monitor.start.remote("another", "gpu-8", scores=True)) == ""
    scorer = scorer_of(monitor, *without_clip)
    with ThreadPoolExecutor(CALLS) as calls:
        held = [calls.submit(scorer, drawn(monitor, shard)) for shard in range(CALLS)]
        again = set()
        try:
            for turn in range(CALLS, 2 * CALLS):
                deadline = time.monotonic() + 30
                while (answer := ray.get(monitor.turn.remote("h", turn))).wait and time.monotonic() < deadline:
                    time.sleep(0.1)
                again.add(answer.shard)
            assert again == {0, 1}, "what is not given back is waited for, for ever"
            assert not any(call.done() for call in held), "each would be given the next shard"
        finally:
            for shard in range(CALLS):
                ray.get(monitor.committed.remote(shard))
        assert [len(call.result()) for call in held] == [0, 0]


def test_where_it_is_the_only_one_the_run_ends_with_one_line(
    without_clip: tuple[Store, Plan], ray_session: None
) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote([0], 1, 1))
    scorer = scorer_of(monitor, *without_clip)
    with pytest.raises(InputError, match=r"clip.* \(on .*node"):
        scorer(drawn(monitor))


@pytest.mark.slow
def test_the_one_actor_of_clip_that_can_load_it_scores_everything(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others give back more shards than the generator has turns to spare."""
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1, scorers=4)
    scorer = loaded_by_the_first_alone(tmp_path, others=3)
    monkeypatch.setattr("cluster.generation.pipeline.Scorer", scorer)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path, CAPTIONS[:4]), null_spec(), shard_size=1)
    assert pools.turns(4) - 4 - CALLS * 4 < CALLS * 3, "else this says nothing"
    run_pipeline(store, plan, pools)
    assert verify(store)["stored"] == 4
