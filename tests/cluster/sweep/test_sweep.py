"""Sweeps through Ray Tune: trials are trainings, failures are kept, and what is done is not done again."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.tune.search.basic_variant import BasicVariantGenerator

from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.rows import preload, read_shard
from cluster.only_job import TRAINS, only_job
from cluster.store.store import open_store
from cluster.sweep.request import SweepRequest
from cluster.sweep.sweep import SWEEP_KEY, _check_device, _check_out, _in_turn, _settings, sweep
from cluster.sweep.trial import OVERRIDES, shared_tables
from cluster.training.config import TrainConfig
from cluster.training.data.shuffled import ROW_ORDER
from cluster.training.feed import DataChanged
from cluster.training.train import train
from jobs.train import JOB
from pcm.documents import document_bytes
from pcm.errors import InputError, OneLineError
from tests.helpers.job_runs import kill_once
from tests.helpers.ray_gpu import ray_told_of_a_gpu
from tests.helpers.tiny_dataset import TINY, write_dataset, write_pictures
from tests.helpers.trained import history, science, step_losses

#: The second is a learning rate at which nothing stays a number.
PARAMS = {"lr_factor": "0.4,1e30"}
SEEDS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("sweep") / "data", tiny_clip, rows=48)


def request(data: Path, **settings) -> SweepRequest:
    given = {"params": PARAMS, "search": "grid", "seeds": SEEDS, "scheduler": "none", "overrides": TINY, **settings}
    return SweepRequest(**{"data": str(data), "out": str(data.parent / "sweep"), **given})


@pytest.fixture(scope="module")
def swept(data: Path, _ray_at_end: None) -> tuple[dict, Path]:
    from cluster.session import start_ray

    start_ray(num_cpus=2)
    return sweep(request(data)), data.parent / "sweep"


def results(out: Path) -> dict[tuple, dict]:
    """(lr_factor, seed) -> result.json."""
    found = [json.loads(path.read_text()) for path in out.glob("trials/*/result.json")]
    return {(result["overrides"]["lr_factor"], result["overrides"]["seed"]): result for result in found}


def test_a_trial_learns_what_jobs_train_learns_from_the_best_config(swept: tuple[dict, Path], data: Path) -> None:
    summary, out = swept
    assert summary["best"]["settings"] == {"lr_factor": 0.4} and summary["best"]["seeds"] == SEEDS
    run = data.parent / "run"
    seed = max(seed for lr_factor, seed in results(out) if lr_factor == 0.4)
    found = JOB.read(["--config", summary["config"], "--data", str(data), "--out", str(run), "--seed", str(seed)])
    train(replace(found, cpus_per_worker=1))
    rows = history(run)
    assert science(rows) == science(results(out)[0.4, seed]["history"])


def test_a_trial_that_fails_is_kept_with_its_reason(swept: tuple[dict, Path]) -> None:
    summary, out = swept
    failed = [result for result in results(out).values() if result["status"] == "failed"]
    assert len(failed) == SEEDS and summary["by_status"] == {"failed": SEEDS, "finished": SEEDS}
    assert all("loss is" in result["reason"] for result in failed)
    assert "failed: loss is" in (out / "table.txt").read_text()


def test_the_best_is_chosen_by_the_mean_over_seeds(swept: tuple[dict, Path]) -> None:
    summary, out = swept
    histories = [found["history"] for (lr_factor, _), found in results(out).items() if lr_factor == 0.4]
    best = [max(row["CIDEr"] for row in history) for history in histories]
    assert summary["best"]["CIDEr"] == pytest.approx(sum(best) / SEEDS) and len(best) == SEEDS
    assert (Path(summary["checkpoint"]) / "model.safetensors").exists()


def test_a_finished_sweep_trains_nothing_again(swept: tuple[dict, Path], data: Path) -> None:
    summary, out = swept
    logs = list(out.glob("trials/*/metrics.jsonl"))
    for file in logs:
        file.unlink()  # a trial that trained would write it
    again = sweep(request(data, resume=True))
    assert not any(file.exists() for file in logs)
    assert len(list(out.glob("tune/experiment_state-*.json"))) == 1, "that of the job before is deleted"
    assert again["best"] == summary["best"] and again["by_status"] == summary["by_status"]


def test_the_first_of_many_trials_begins_at_once(tmp_path: Path) -> None:
    """Those of a grid of 1,000 took 20 s, and of 10,000 half an hour: Ray Tune copies it for each of its points."""
    settings = [{"lr_factor": 0.1 + number, "seed": number} for number in range(1_000)]
    experiment = ray.tune.Experiment(
        "tune", lambda config: None, config=_in_turn(settings), num_samples=len(settings), storage_path=str(tmp_path)
    )
    search = BasicVariantGenerator()
    started = time.monotonic()
    search.add_configurations([experiment])
    begun = [search.next_trial().config[OVERRIDES] for _ in range(3)]
    assert time.monotonic() - started < 5 and search.total_samples == len(settings)
    begun += [search.next_trial().config[OVERRIDES] for _ in settings[3:]]
    assert begun == settings and search.next_trial() is None


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [
        ({}, False, "holds a sweep; add --resume"),
        ({"params": {"lr_factor": "0.4,0.5"}}, True, "begun with another params.lr_factor"),
        ({"seeds": 3}, True, "begun with another seeds"),
        ({"trials": 5}, True, "the grid has 2 settings"),
        ({"search": "random"}, True, "give --trials N"),
        ({"search": "optuna", "trials": 3}, True, "--seeds 2 with --search optuna"),
        ({"concurrent": 0}, True, "--concurrent 0: must be at least 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(
    swept: tuple[dict, Path], data: Path, settings: dict, resume: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sweep(request(data, resume=resume, **settings))


def test_optuna_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    asked = request(tmp_path / "data", search="optuna", trials=3, seeds=1)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[optuna\]'"):
        _settings(asked, {}, TrainConfig())


@pytest.mark.parametrize("content", [b"", b"[1]", b"[" * 200_000])
def test_a_damaged_record_of_a_sweep_is_one_line(data: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / SWEEP_KEY).write_bytes(content)
    with pytest.raises(InputError, match=rf"{tmp_path}/{SWEEP_KEY}: damaged \(.*restore it, or give another --out"):
        sweep(replace(request(data, resume=True), out=str(tmp_path)))


def test_a_sweep_of_another_release_goes_on_where_a_run_would(
    swept: tuple[dict, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that lacks a setting at its default goes on, and keeps the releases that trained it."""
    _, out = swept
    shutil.copytree(out, tmp_path / "sweep")
    asked = replace(request(data, resume=True), out=str(tmp_path / "sweep"))
    document = json.loads((out / SWEEP_KEY).read_bytes())
    run = document["run"]
    earlier = {name: value for name, value in run["train"].items() if name != "feature_dtype"}
    begun = {**document, "run": {**run, "train": earlier, "versions": {**run["versions"], "torch": "1.0"}}}
    (tmp_path / "sweep" / SWEEP_KEY).write_bytes(document_bytes(begun))
    sweep(asked)
    found = json.loads((tmp_path / "sweep" / SWEEP_KEY).read_bytes())["run"]
    assert found["versions"]["torch"] == f"1.0 and {run['versions']['torch']}" and found["train"] == run["train"]
    assert f"goes on with other releases than before (torch: 1.0 -> {run['versions']['torch']})" in caplog.text
    for changed, said in (
        ({"train": {**run["train"], "warm_restarts": 3}}, "'warm_restarts': not known to this release; finish it with"),
        ({"row_order": 1}, "takes its rows in order 1, this release in order 2; finish it with the release"),
    ):
        (tmp_path / "sweep" / SWEEP_KEY).write_bytes(document_bytes({**document, "run": {**run, **changed}}))
        with pytest.raises(InputError, match=said):
            sweep(asked)


#: Of sweep.json, what runs of every release have.
RUN = {"train": TrainConfig().to_dict(), "row_order": ROW_ORDER}


def test_pictures_and_concepts_of_a_sweep_may_move(tmp_path: Path) -> None:
    out = open_store(tmp_path)
    begun = {
        **RUN,
        "validation": {"images": "/a/pictures", "references": "/a/r.json", "split": "val"},
        "concepts": {"path": "/a/concepts", "sha256": "1"},
    }
    out.write_bytes(SWEEP_KEY, document_bytes({"run": begun}))
    moved = {**begun, "concepts": {"path": "/b/concepts", "sha256": "1"}, "references_sha256": "2"}
    moved["vocabularies"] = {"words": "1"}
    _check_out(out, {"run": moved}, resume=True)
    moved["validation"] = {**begun["validation"], "images": "/b/pictures"}
    with pytest.raises(InputError, match=r"begun with another run\.validation \("):  # of an earlier release
        _check_out(out, {"run": moved}, resume=True)
    recorded = {"references_sha256": "2", "vocabularies": {"words": "1"}}
    out.write_bytes(SWEEP_KEY, document_bytes({"run": {**begun, **recorded}}))
    assert _check_out(out, {"run": moved}, resume=True) == {"run": {**begun, **recorded}}
    with pytest.raises(InputError, match=r"begun with another run\.validation \("):
        edited = {"validation": begun["validation"], "references_sha256": "3"}
        _check_out(out, {"run": moved | edited}, resume=True)
    with pytest.raises(InputError, match=r"begun with another run\.concepts\.sha256 \("):
        _check_out(out, {"run": {**moved, "concepts": {"path": "/b/concepts", "sha256": "3"}}}, resume=True)
    with pytest.raises(InputError, match=r"begun with another run\.vocabularies\.words \("):
        _check_out(out, {"run": {**moved, "vocabularies": {"words": "3"}}}, resume=True)


def test_the_clip_of_a_sweeps_pictures_may_lie_elsewhere_and_is_no_other(tmp_path: Path) -> None:
    out = open_store(tmp_path)

    def swept_with(model: str, revision: str) -> dict:
        clip = {"model": model, "revision": revision, "weights": "sha256:w"}
        return {"run": {**RUN, "validation": {"images": "/v"}, "references_sha256": "1", "clip": clip}}

    out.write_bytes(SWEEP_KEY, document_bytes(swept_with("ViT-L-14/openai", "a" * 40)))
    _check_out(out, swept_with("s3://bucket/clip", "sha256:1"), resume=True)
    with pytest.raises(InputError, match=r"begun with another run\.clip \("):
        _check_out(out, swept_with("ViT-B-32/openai", "a" * 40), resume=True)


def test_a_sweep_goes_on_on_the_device_on_which_it_began(tmp_path: Path) -> None:
    out = open_store(tmp_path)
    _check_device(out, "cuda")  # nothing is there yet
    for before in ({}, {"device": "cuda"}):  # an earlier release did not say
        out.write_bytes(SWEEP_KEY, document_bytes(before))
        _check_device(out, "cuda")
    with pytest.raises(InputError, match="was begun on cuda, and this is cpu; give --device cuda"):
        _check_device(out, "cpu")


def test_more_than_the_cluster_has_is_refused(data: Path, ray_session: None) -> None:
    out = data.parent / "greedy"
    for asked, message in (
        (
            {"gpus_per_trial": 0.5},
            r"--gpus-per-trial 0\.5: the cluster has no GPU; leave it out, or give --device cuda",
        ),
        (
            {"device": "cuda"},
            r"--device cuda: the cluster has no GPU; leave it out, or join one that has \(RAY_ADDRESS\)",
        ),
        ({"cpus_per_trial": 3}, "--cpus-per-trial 3: the cluster has 2; take fewer"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(request(data, out=str(out), **asked))
    assert not out.exists()
    with pytest.raises(InputError, match=r"--gpus-per-trial 0: must be more than 0"):
        request(data, gpus_per_trial=0.0)
    with pytest.raises(InputError, match=r"--gpus-per-trial 0\.5: without effect with --device cpu"):
        request(data, gpus_per_trial=0.5, device="cpu")


def test_a_gpu_that_this_machine_lacks_is_one_line_before_ray(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("cluster.sweep.sweep.start_ray", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=r"^--device cuda: torch finds no GPU on this machine; leave --device out"):
        sweep(request(data, out=str(tmp_path / "out"), device="cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("search", ["grid", "optuna"])
def test_a_first_epoch_that_the_data_has_not_is_refused_before_the_first_trial(
    data: Path, tmp_path: Path, search: str
) -> None:
    params = {"first_epoch": "shuffled,plan"}
    asked = request(data, out=str(tmp_path / "out"), params=params, search=search, seeds=1, trials=2)
    with pytest.raises(InputError, match=r"first_epoch plan: \S+ has no plan\.json; use first_epoch shuffled"):
        sweep(asked)
    assert not (tmp_path / "out").exists()


def test_shards_are_read_once_and_shared(data: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store, columns = open_store(data), ["sample_id", "clip_score"]
    shards = load_manifest(store).stored_shards
    expected = [read_shard(store, shard, columns) for shard in shards]
    shared = shared_tables(store, shards)
    monkeypatch.setattr("cluster.dataset.rows._PRELOADED", {})
    preload({path: ray.get(table) for path, table in shared.items()})
    elsewhere = (data / "shards").rename(data / "moved")
    try:
        assert [read_shard(store, shard, columns) for shard in shards] == expected
    finally:
        elsewhere.rename(data / "shards")


def test_a_sweep_whose_data_changes_ends_before_its_next_trial(
    tmp_path: Path, tiny_clip: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=48), tmp_path / "out"

    def change() -> None:
        """Once the first trial has ended."""
        while not list(out.glob("trials/*/result.json")):
            time.sleep(0.05)
        document = json.loads((data / MANIFEST_KEY).read_text())
        (data / MANIFEST_KEY).write_text(json.dumps(document | {"corpus_fingerprint": "another"}))

    changing = threading.Thread(target=change, daemon=True)
    changing.start()
    asked = request(data, out=str(out), params={"lr_factor": "0.1,0.2,0.3,0.4,0.5"}, seeds=1, concurrent=1)
    with pytest.raises(DataChanged, match=rf"^{data}: has changed since this run began"):
        sweep(asked)
    changing.join()
    assert 1 <= len(results(out)) < 5 and not (out / "best.json").exists()
    assert caplog.text.count("a trial is tried again") <= 1


@pytest.mark.parametrize(
    "settings", [{"overrides": TINY | {"holdout_fraction": 1e-9}}, {"params": {"holdout_fraction": "0.5,1e-9"}}]
)
def test_data_that_holds_nothing_out_is_told_once_before_the_first_trial(
    data: Path, tmp_path: Path, settings: dict
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"validation: of 48 pairs, holdout_fraction=1e-09 leaves none to choose"):
        sweep(request(data, out=str(out), **settings))
    assert not out.exists()  # so the sweep may be asked for with another fraction


def test_what_is_held_out_is_looked_at_once_however_many_settings_there_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(data, out=str(tmp_path), params={"holdout_fraction": "0.2,0.1,0.3"}, seeds=100)
    looked: list[float] = []

    def look(config: TrainConfig, sets: object) -> None:
        looked.append(config.holdout_fraction)
        raise InputError("enough")

    monkeypatch.setattr("cluster.sweep.sweep.check_hold_out", look)
    with pytest.raises(InputError, match="enough"):
        sweep(asked)
    assert looked == [0.1], "the least"


def test_validation_pictures_that_cannot_be_read_end_a_sweep_once(
    data: Path, tmp_path: Path, tiny_clip: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = write_pictures(tmp_path / "pictures", count=2)
    (pictures / "scene1000.png").write_bytes(b"no picture")
    asked = request(
        data, out=str(tmp_path / "out"), seeds=1, concurrent=1, clip=str(tiny_clip),
        val_images=str(pictures), val_references=str(tmp_path / "references.csv"),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"--val-images \S+: 1 of its pictures can be read, where 2 are needed"):
        sweep(asked)
    assert caplog.text.count("a trial is tried again") <= 1


def test_a_sweep_of_which_every_trial_fails_is_one_line(data: Path, tmp_path: Path, ray_session: None) -> None:
    asked = request(data, out=str(tmp_path / "out"), params={"lr_factor": "1e30"}, seeds=1)
    with pytest.raises(OneLineError, match=r"^none of 1 trials came to a result: loss is") as caught:
        sweep(asked)
    assert "\n" not in str(caught.value)


@pytest.fixture
def ray_with_a_gpu() -> Iterator[None]:
    """Ray that was told of a GPU, whether or not there is one."""
    with ray_told_of_a_gpu(num_cpus=2):
        yield


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they would take the real one")
def test_what_torch_takes_for_no_gpu_is_shared_by_trials_and_trained_on_as_a_cpu(
    data: Path, ray_with_a_gpu: None
) -> None:
    """Two trials at a time with half of it each; then jobs.train with all of it, and with the half that is left."""
    together = request(
        data, out=str(data.parent / "shared"), params={"lr_factor": "0.4,0.5"}, epochs=1, seeds=1, gpus_per_trial=0.5,
        concurrent=2,
    )  # fmt: skip
    assert sweep(together)["by_status"] == {"finished": 2}
    on_cpu = replace(together, out=str(data.parent / "cpu"), gpus_per_trial=1.0, device="cpu")
    assert sweep(on_cpu)["by_status"] == {"finished": 2}
    alone = replace(together.train, out=str(data.parent / "alone"), cpus_per_worker=1)
    assert train(alone)["epochs"] == 1
    with half_a_gpu_taken():
        shared = replace(alone, out=str(data.parent / "half"), num_workers=1, gpus_per_worker=0.5)
        assert train(shared)["epochs"] == 1
    assert step_losses(data.parent / "half") == step_losses(data.parent / "alone")


@contextmanager
def half_a_gpu_taken() -> Iterator[None]:
    @ray.remote(num_gpus=0.5, num_cpus=0)
    class Holder:
        def holds(self) -> list:
            return ray.get_gpu_ids()

    holder = Holder.remote()
    assert ray.get(holder.holds.remote()) == [0]
    yield
    ray.kill(holder)


@pytest.mark.parametrize("begun", [True, False])
def test_a_second_sweep_into_one_place_is_refused(
    swept: tuple[dict, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr("cluster.only_job.PATIENCE_SECONDS", 0.0)
    out = open_store(swept[1] if begun else tmp_path / "fresh")
    before = {key: out.read_bytes(key) for key in out.list()}
    said = "another job on this cluster trains into it; wait for its end"
    with only_job(out, TRAINS, waits=False), pytest.raises(InputError, match=said):
        sweep(request(data, out=out.root, resume=begun))
    assert {key: out.read_bytes(key) for key in out.list()} == before


def test_a_sweep_that_another_job_has_begun_meanwhile_is_not_begun_anew(
    data: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked at an empty place, and started Ray since."""
    out, said = open_store(tmp_path), document_bytes({"run": {"validation": None}})
    monkeypatch.setattr("cluster.sweep.sweep.start_ray", lambda **settings: out.write_bytes(SWEEP_KEY, said))
    with pytest.raises(InputError, match="holds a sweep; add --resume"):
        sweep(request(data, out=out.root))
    assert out.list() == [SWEEP_KEY] and out.read_bytes(SWEEP_KEY) == said


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_is_left(data: Path, run_job) -> None:
    """Optuna and ASHA, one trial at a time, SIGKILL after the first."""
    out = data.parent / "killed"
    fixed = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    arguments = [
        *("--data", data, "--out", out, "--epochs", 2, "--trials", 3, "--search", "optuna", "--concurrent", 1, *fixed),
        *("--param", "lr_factor=log:0.1:1", "--param", "top_concepts=1,3"),
    ]
    command = [sys.executable, "-m", "jobs.sweep", *arguments]
    kill_once(lambda: any(out.glob("trials/*/result.json")), command, seconds=400)
    before = list(out.glob("trials/*/result.json"))
    files = [path.parent / name for path in before for name in ("result.json", "metrics.jsonl")]
    times = [file.stat().st_mtime_ns for file in files]

    resumed = run_job("sweep", *arguments, "--resume", timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.summary["trials"] == 3 and len(list(out.glob("trials/*/result.json"))) == 3
    assert [file.stat().st_mtime_ns for file in files] == times
    assert resumed.summary["by_status"].keys() <= {"finished", "stopped"}
