"""Training while generation runs: the same steps as afterwards, whenever shards arrive and whoever is killed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.dataset.documents import Plan, load_manifest
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, shard_key, shard_number, stats_key
from cluster.dataset.state import state_digest
from cluster.generation.retrying import Retry
from cluster.only_job import TRAINS, only_job
from cluster.store.store import Store, open_store
from cluster.training.checkpoints import TrainingState
from cluster.training.data.arriving import ArrivingShards, finished_manifest
from cluster.training.data.batches import Batch, BatchShape
from cluster.training.data.mixture import arriving_set
from cluster.training.data.selection import RowFilter
from cluster.training.reporting import Reporter
from cluster.training.request import StreamRequest, TrainRequest
from cluster.training.stream import _generate_and_train, _pools
from cluster.training.train import planned_run, train
from cluster.training.worker import TrainWorker
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.vocabulary import Vocabulary
from tests.cluster.training.test_feed import data_of, plan_of
from tests.helpers.job_runs import JobRun, kill_once
from tests.helpers.tiny_dataset import TINY, write_dataset
from tests.helpers.tiny_generation import ANIMALS, PLACES, make_dataset_in_process, tiny_spec, write_corpus

CAPTIONS = [f"A {animal} near the {place}, number {n}." for n in range(2) for place in PLACES for animal in ANIMALS]
BATCH = 8


@pytest.fixture(scope="module")
def made(tiny_t2i: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    """48 captions, of which one is bad, in ten shards; not to be changed."""
    folder = tmp_path_factory.mktemp("stream")
    corpus = write_corpus(folder, [*CAPTIONS[:7], "\x00", *CAPTIONS[8:]])
    store, plan, _ = make_dataset_in_process(folder / "data", corpus, tiny_spec(tiny_t2i, tiny_clip))
    return store, plan


def arriving(store: Store, plan: Plan, *, rank: int = 0, num_workers: int = 1, **settings) -> ArrivingShards:
    # Of the tiny CLIP: 16 patches of 64, D = 32.
    features = FeatureShape(embed_dim=32, patch_dim=64, num_patches=16)
    shape = BatchShape(features=features, batch_size=BATCH, max_length=12, rank=rank, num_workers=num_workers)
    row_filter = settings.pop("row_filter", RowFilter(seed=1, held_out=0.1))
    vocabulary = Vocabulary.build(CAPTIONS, min_count=1)
    return ArrivingShards(store, plan, row_filter, shape, vocabulary, seed=3, **settings)


def ids(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.sample_ids for batch in batches]


def test_every_selected_row_comes_once_and_the_last_batch_says_so(made: tuple[Store, Plan]) -> None:
    batches = list(arriving(*made).batches())
    seen = [sample_id for batch in batches for sample_id in batch.sample_ids if sample_id]
    everything = list(arriving(*made, row_filter=RowFilter(seed=1)).batches())
    assert len(seen) == len(set(seen)) < 47
    assert sum(len([name for name in batch.sample_ids if name]) for batch in everything) == 47
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert [batch.step for batch in batches] == list(range(len(batches)))
    shards = [int(sample_id[:9]) // 5 for sample_id in seen]
    assert shards == sorted(shards), "in the order of the plan"
    assert seen != sorted(seen), "permuted inside a shard"


def test_a_run_does_not_go_into_a_dataset(made: tuple[Store, Plan], tmp_path: Path, call_job) -> None:
    store, _ = made
    there = store.list()
    run = call_job("stream", "--corpus", write_corpus(tmp_path), "--out", store.root)
    assert run.returncode == 2 and "holds a dataset (dataset.json); give another place" in run.stderr
    assert store.list() == there


def test_a_full_batch_at_the_very_end_is_the_last(made: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = made
    features = finished_manifest(store, plan).features
    shape = BatchShape(features=features, batch_size=47, max_length=12)
    whole = ArrivingShards(store, plan, RowFilter(seed=1), shape, Vocabulary.build(CAPTIONS, min_count=1), seed=3)
    assert [batch.last for batch in whole.batches()] == [True]


def test_any_step_can_be_resumed_at(made: tuple[Store, Plan]) -> None:
    whole = list(arriving(*made).batches())
    for step in (1, 3, len(whole) - 1):
        rest = list(arriving(*made).batches(start_step=step))
        assert ids(rest) == ids(whole)[step:]
        assert [batch.step for batch in rest] == [batch.step for batch in whole[step:]]
        np.testing.assert_array_equal(rest[0].patch_features, whole[step].patch_features)


def test_ranks_share_the_batches_of_one_worker(made: tuple[Store, Plan]) -> None:
    whole = list(arriving(*made).batches())
    ranks = [list(arriving(*made, rank=rank, num_workers=2).batches()) for rank in range(2)]
    assert [one + two for one, two in zip(ids(ranks[0]), ids(ranks[1]), strict=True)] == ids(whole)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_batches_do_not_depend_on_when_shards_arrive(made: tuple[Store, Plan], tmp_path: Path, order: str) -> None:
    store, plan = made
    growing = open_store(tmp_path / "data")
    keys = [shard_key(shard) for shard in range(plan.num_shards)]
    coming = keys if order == "backwards" else keys[::-1]  # the last one comes next

    def arrive(_seconds: float) -> None:
        key = coming.pop()
        for name in (stats_key(shard_number(key)), key):
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(store.prefix) / name, tmp_path / "data" / name)

    found = list(arriving(growing, plan, sleep=arrive).batches())
    assert ids(found) == ids(list(arriving(*made).batches()))
    assert not coming


def test_a_shard_that_is_not_the_one_of_its_statistics_is_named(made: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = made
    shutil.copytree(store.prefix, tmp_path / "data")
    shutil.copyfile(tmp_path / "data" / shard_key(0), tmp_path / "data" / shard_key(1))
    with pytest.raises(InputError, match=r"part-000001.parquet: not the shard .*run jobs.verify"):
        list(arriving(open_store(tmp_path / "data"), plan).batches())


def test_the_manifest_is_waited_for_and_an_older_one_is_not_taken(made: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = made
    later = open_store(tmp_path / "data")
    whole = json.loads(store.read_bytes(MANIFEST_KEY))
    documents = [whole, whole | {"corpus_fingerprint": "of fewer captions"}]

    def write(_seconds: float) -> None:
        later.write_bytes(MANIFEST_KEY, json.dumps(documents.pop()).encode())

    assert finished_manifest(later, plan, sleep=write).corpus_fingerprint == plan.corpus_fingerprint
    assert not documents


def test_a_stream_is_not_gone_on_with_on_other_rows(tiny_clip: Path, tmp_path: Path) -> None:
    """The plan stays the same when jobs.verify --repair or --retry-quarantined makes shards again."""
    place = write_dataset(tmp_path / "data", tiny_clip, rows=24, shard_size=6)
    (place / PLAN_KEY).write_bytes(plan_of(place).to_json())

    def opened(progress: TrainingState) -> None:
        data = data_of(place, first_epoch="plan", holdout_fraction=0.5)
        parts: dict[str, Any] = {name: None for name in ("out", "average", "step", "checkpoints")}
        worker = TrainWorker(
            run=data._run, rank=0, num_workers=1, device=torch.device("cpu"), bfloat16=False, data=data,
            vocabulary=data._vocabulary, module=torch.nn.Linear(1, 1), progress=progress,  # type: ignore[arg-type]
            reporter=Reporter(open_store(tmp_path / "run"), is_first=False), **parts,
        )  # fmt: skip
        worker.open_data()

    progress = TrainingState()
    opened(progress)
    assert progress.rows
    opened(TrainingState(**vars(progress)))
    document = json.loads((place / MANIFEST_KEY).read_text())
    document["shards"][3]["sha256"] = "0" * 64
    (place / MANIFEST_KEY).write_text(json.dumps(document))
    with pytest.raises(InputError, match="data: its rows are others than those that this run began on"):
        opened(progress)


@pytest.mark.parametrize("known_by", [PLAN_KEY, MANIFEST_KEY])
def test_the_run_of_a_stream_is_gone_on_with_by_jobs_train_as_well(
    tiny_clip: Path, tmp_path: Path, known_by: str
) -> None:
    """Its dataset is complete, and the corpus or the models may be gone. jobs.stream goes on with either's run, too."""
    store = open_store(write_dataset(tmp_path / "data", tiny_clip, rows=24, shard_size=6))
    plan = plan_of(Path(store.root))
    store.write_bytes(PLAN_KEY, plan.to_json())
    settings = TINY | {"epochs": 1, "first_epoch": "plan"}
    asked = TrainRequest(data=store.root, out=str(tmp_path / "run"), overrides=settings, resume=True)
    document = planned_run(asked, cpus=1).document
    document["datasets"][0]["sha256"] = state_digest(store.read_bytes(known_by))
    run = open_store(tmp_path / "run")
    run.write_bytes("config.json", json.dumps(document).encode())
    run.write_bytes("metrics.jsonl", b'{"epoch": 1, "step": 6, "CIDEr": 1.0}\n')
    jobs_stream = arriving_set(store, plan, load_manifest(store).features)
    assert train(asked)["epochs"] == train(asked, arriving=(jobs_stream,))["epochs"] == 1
    for key in (PLAN_KEY, MANIFEST_KEY):
        others = json.loads(store.read_bytes(key)) | {"corpus_fingerprint": "of other captions"}
        store.write_bytes(key, json.dumps(others).encode())
    with pytest.raises(InputError, match=r"was begun otherwise \(data: "):
        train(asked)


def test_a_second_stream_into_one_run_is_refused_before_it_draws(
    tmp_path: Path, tiny_clip: Path, call_job: Callable[..., JobRun], ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on with the run, whether or not it was told to."""
    monkeypatch.setattr("cluster.only_job.PATIENCE_SECONDS", 0.0)
    run = open_store(tmp_path / "both/run")
    run.write_bytes("config.json", b"of the first")
    with only_job(run, TRAINS, waits=False):
        done = call_job(
            "stream", "--corpus", write_corpus(tmp_path, CAPTIONS), "--out", tmp_path / "both", "--t2i", "null",
            "--clip", tiny_clip, "--shard-size", 8, "--cpus-per-worker", 1,
        )  # fmt: skip
    assert done.returncode == 2
    said = f"error: {run.root}: another job on this cluster trains into it; wait for its end"
    assert done.stderr.splitlines()[-1].startswith(said)
    assert run.list() == ["config.json"] and not (tmp_path / "both/dataset/shards").exists()


def test_one_place_for_dataset_and_run_is_refused(tmp_path: Path, call_job: Callable[..., JobRun]) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    done = call_job("stream", "--corpus", "x.txt", "--out", tmp_path / "a", "--data", tmp_path / "link/a")
    assert done.returncode == 2 and "is the place of the dataset too (--data); give two places" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_stream_killed_on_both_sides_learns_what_training_afterwards_learns(
    tiny_t2i: Path,
    tiny_clip: Path,
    tmp_path: Path,
    ray_session: None,
    run_job: Callable[..., JobRun],
    call_job: Callable[..., JobRun],
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    settings = TINY | {"batch_size": BATCH, "holdout_fraction": 0.2}
    science = [f"--set={name}={value}" for name, value in settings.items()]
    training = [*science, "--epochs", 2, "--seed", 5, "--cpus-per-worker", 1]
    command = [
        "--corpus", write_corpus(tmp_path, CAPTIONS), "--data", data, "--out", out, "--t2i", tiny_t2i, "--clip",
        tiny_clip, "--steps", 60, "--batch-size", 4, "--clip-batch-size", 4, "--shard-size", 4, "--generators", 1,
        "--checkpoint-every-steps", 1, *training,
    ]  # fmt: skip
    known = out / "checkpoints/checkpoint_manager_snapshot.json"  # of Ray Train: what a restart goes on from
    kill_once(lambda: known.exists() and "-step-" in known.read_text(), [sys.executable, "-m", "jobs.stream", *command])
    before = {path.name: path.stat().st_mtime_ns for path in (data / "shards").iterdir() if path.suffix == ".parquet"}
    assert 0 < len(before) < 12, "training had begun, and generation had not ended"

    done = run_job("stream", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = done.summary
    assert (summary["expected"], summary["stored"], summary["epochs"]) == (48, 48, 2)
    assert summary["skipped"] >= 4 * len(before) and summary["generated"] + summary["skipped"] == 48
    assert summary["first_step_seconds"] is None, "the first step was made before"
    assert summary["generation_seconds"] > 0
    assert summary["dataset"] == str(data)
    after = {name: (data / "shards" / name).stat().st_mtime_ns for name in before}
    assert after == before, "nothing was generated twice"

    afterwards = tmp_path / "afterwards"
    train = call_job("train", "--data", data, "--out", afterwards, *training, "--set", "first_epoch=plan")
    assert train.returncode == 0, train.err
    for name in ("losses/epoch-001.jsonl", "losses/epoch-002.jsonl"):
        assert (out / name).read_text() == (afterwards / name).read_text()
    assert (out / "best/model.safetensors").read_bytes() == (afterwards / "best/model.safetensors").read_bytes()


def test_a_retry_that_was_interrupted_is_ended_before_training_reads_its_shards(
    made: tuple[Store, Plan], tmp_path: Path
) -> None:
    store = open_store(shutil.copytree(made[0].prefix, tmp_path / "data"))
    Retry(frozenset(["generator_error"]), "killed").begin(store)
    train = TrainRequest(data=str(tmp_path / "data"), out=str(tmp_path / "run"), overrides=TINY)
    with pytest.raises(InputError, match=r"a --retry-quarantined was interrupted; end it with jobs\.verify"):
        _generate_and_train(store, made[1], train, lambda: pytest.fail("drawn"), cpus=1, gpus=0)


def test_pictures_without_features_are_not_trained_on(
    tiny_clip: Path, tmp_path: Path, call_job: Callable[..., JobRun], ray_session: None
) -> None:
    done = call_job(
        "stream", "--corpus", write_corpus(tmp_path, CAPTIONS), "--out", tmp_path / "both", "--t2i", "null", "--clip",
        "null", "--shard-size", 8,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: --clip null" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "both/run").exists()


def test_a_preset_of_neither_side_is_refused(tmp_path: Path, call_job: Callable[..., JobRun]) -> None:
    done = call_job("stream", "--corpus", "x.txt", "--out", tmp_path, "--preset", "coco")
    assert done.returncode == 2
    assert "synthimgcap_coco" in done.stderr and "coco_l14" in done.stderr


def test_training_takes_nothing_from_nodes_with_the_label_of_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": gpus}, "Labels": {"role": role}}
        for role, gpus in (("training", 4.0), ("generation", 2.0))
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setenv("RAY_ADDRESS", "there")
    label = ("role", "generation")
    apart = StreamRequest(corpus="embedded", out="run", node_label=label, worker_labels={"role": "training"})
    assert _pools(apart, device="cuda", cpus=4, gpus=2).generators == 2
    anywhere = StreamRequest(corpus="embedded", out="run", node_label=label)
    with pytest.raises(
        InputError, match="takes 4 CPUs and 2 GPUs, and nodes with role=generation have 16 and 2, which"
    ):
        _pools(anywhere, device="cuda", cpus=4, gpus=2)
