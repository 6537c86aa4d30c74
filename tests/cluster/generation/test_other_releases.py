"""A run says where other releases of the libraries draw, and writes no shard anew by another pyarrow unasked."""

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.dataset.committed import committed
from cluster.dataset.environment import DRAWN_IN, store_environment, versions
from cluster.dataset.keys import shard_key
from cluster.dataset.parquet import pyarrow_here, pyarrow_of
from cluster.generation.other_releases import needed_pyarrow, warn_of_mixed_releases
from cluster.generation.stages.write import WriteShard
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, null_spec, plan_dataset, write_corpus


def test_a_machine_that_draws_with_other_releases_than_the_driver_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, here, seen = open_store(tmp_path), versions(), set[str]()
    others = {**here, "torch": "2.13.1", "diffusers": "0.42.0"}
    on_gpu = {**here, "torch": here["torch"].partition("+")[0] + "+cu128", "cuda": "12.8"}
    machines = [on_gpu, others, others, {"torch": "2.13.1"}]
    for shard, found in enumerate(machines):
        digest = store_environment(store, {"versions": found, "processor": "x86_64", "gpu": None})
        warn_of_mixed_releases(store, {"shard": shard, DRAWN_IN: digest}, seen)
    warn_of_mixed_releases(store, {"shard": 9}, seen)  # as an earlier release has it
    of_torch = f"torch {here['torch']} and 2.13.1"
    of_diffusers = f"diffusers {here['diffusers']} and 0.42.0"
    assert [record.getMessage() for record in caplog.records] == [
        f"shard {shard} was drawn with other releases than the driver has: {named}; pictures may differ between them: "
        "run one image on all nodes"
        for shard, named in ((1, f"{of_torch}, {of_diffusers}"), (3, of_torch))
    ]


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.generation.other_releases.pyarrow_here", lambda: "99.0.0")


def test_shards_of_a_finished_dataset_are_not_made_again_by_another_pyarrow(tmp_path: Path, upgraded: None) -> None:
    corpus = write_corpus(tmp_path)
    store, plan, _ = make_dataset_in_process(tmp_path / "data", corpus, null_spec(), finish=False)
    assert plan.num_shards == 5 and pyarrow_of(store, shard_key(0)) == pyarrow_here() == pa.__version__
    needed_pyarrow(store, plan, [0], committed(store, plan))  # of an unfinished dataset there are no views
    make_dataset_in_process(tmp_path / "data", corpus, null_spec())
    store.delete(shard_key(0))
    with pytest.raises(InputError) as caught:
        needed_pyarrow(store, plan, [0, 1, 4], committed(store, plan))
    assert str(caught.value) == (
        f"{store.root}: its shards were written by pyarrow {pa.__version__}, and this is 99.0.0, which would make 3 of "
        "them again with the same rows in other bytes: views, runs and exports would not know this dataset again; "
        f"install pyarrow {pa.__version__}, or run jobs.verify --repair --other-bytes and make those anew"
    )


def test_of_shards_of_two_releases_none_is_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    monkeypatch.setattr(
        "cluster.generation.other_releases.pyarrow_of", lambda _, key: "26.0.1" if key < shard_key(2) else "27.0.0"
    )
    for here in ("26.0.1", "27.0.0", "99.0.0"):
        monkeypatch.setattr("cluster.generation.other_releases.pyarrow_here", lambda here=here: here)
        with pytest.raises(InputError) as caught:
            needed_pyarrow(store, plan, [0, 4], committed(store, plan))
        said = str(caught.value)
        assert f"by pyarrow 26.0.1 and 27.0.0, and this is {here}, which would make some of them again" in said
        assert said.endswith(
            "; none of these releases makes all of them: run jobs.verify --repair --other-bytes and make those anew"
        )


def test_shards_are_made_again_where_none_says_which_pyarrow_wrote_them(tmp_path: Path, upgraded: None) -> None:
    store, plan, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    needed_pyarrow(store, plan, [0, 1, 2, 3, 4], committed(store, plan))
    store.write_bytes(shard_key(3), b"PAR1")
    assert needed_pyarrow(store, plan, [4], committed(store, plan)) is None


def test_shards_that_are_new_are_made_by_another_pyarrow(tmp_path: Path, upgraded: None) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    longer = write_corpus(tmp_path, [*CAPTIONS, *(f"More of {caption}" for caption in CAPTIONS)])
    store, plan = plan_dataset(tmp_path / "data", longer, null_spec())
    assert plan.num_shards > 5
    needed_pyarrow(store, plan, range(5, plan.num_shards), committed(store, plan))


def test_shards_are_made_again_by_the_same_pyarrow(tmp_path: Path) -> None:
    store, plan, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    assert needed_pyarrow(store, plan, [0, 1], committed(store, plan)) == pa.__version__
    WriteShard(store, plan.schema_version, pyarrow=pa.__version__).check_pyarrow()
    with pytest.raises(InputError, match=rf"by pyarrow 1\.0, and this machine has {pa.__version__}, .* install"):
        WriteShard(store, plan.schema_version, pyarrow="1.0").check_pyarrow()
