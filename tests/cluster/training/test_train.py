"""Training runs through Ray Train: what they write, that they resume exactly, and what they refuse."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.torch
import torch
from ray.train import ControllerError, FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset.documents import Manifest, Plan, Segment, load_manifest
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY
from cluster.dataset.together import common_vocabularies, merged_concepts
from cluster.evaluation.captioners import load_captioner
from cluster.evaluation.request import CaptionerOptions
from cluster.generation.request import parse_node_label
from cluster.only_job import TRAINS, only_job
from cluster.ray_internals import CHECKPOINT_RECORD, FailureDecision
from cluster.store.store import Store, open_store
from cluster.training.checkpoints import TrainingState, best_epoch
from cluster.training.config import TrainConfig, preset, settable_fields
from cluster.training.data.mixture import DataSource, open_training_sets
from cluster.training.data.selection import RowFilter, all_rows, holdout_share, select_rows
from cluster.training.init_from import read_initial
from cluster.training.loop import NonFiniteLoss, _stop, _train_and_validate
from cluster.training.placement import group_sizes, placement_of
from cluster.training.ray_trainer import _FailurePolicy, _GroupSizes, check_labels, make_trainer, worker_input_error
from cluster.training.reporting import LossLog
from cluster.training.request import TrainRequest, parse_worker_label
from cluster.training.run_document import previous_run, refuse_other_run
from cluster.training.run_record import (
    run_versions,
    same_clip,
    same_validation,
    warn_of_moved_pictures,
    warn_of_other_releases,
)
from cluster.training.run_spec import RunSpec
from cluster.training.train import TrainingFailed, _summary, planned_run, train
from cluster.training.worker import build_network, set_up_worker
from cluster.weights.request import StageModelsRequest
from cluster.weights.stage import stage
from pcm.captioners.captioner import Captioner, captioner_files
from pcm.captioners.interface import MODEL_FILE
from pcm.clip.names import folder_revision
from pcm.errors import InputError, StoreFailure
from pcm.model_faults import OutOfMemory
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary
from tests.helpers.job_runs import JobRun, kill_once, running
from tests.helpers.seaweedfs import S3Server
from tests.helpers.tiny_dataset import TINY, scene, write_dataset, write_pictures
from tests.helpers.trained import history, science

ROWS = 72
EPOCHS = 3
STEPS = ROWS // TINY["batch_size"]  # an epoch, where all rows are trained on
CHECKPOINT_STEPS = 4
#: Losses of the first epochs on 1 and 2 workers: float32 sums in another order, which Adam's first steps amplify.
TOLERANCE = 1e-3
#: What every run of this module has, so that all can be compared: weights averaged, batches taken in two parts.
SHARED = TINY | {"epochs": EPOCHS, "ema_decay": 0.9, "grad_accumulation": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """data/, pictures/ and references.csv."""
    folder = tmp_path_factory.mktemp("train")
    write_dataset(folder / "data", tiny_clip, rows=ROWS)
    write_pictures(folder / "pictures", count=10)
    return folder


def request(world: Path, out: Path, **settings) -> TrainRequest:
    overrides = SHARED | settings.pop("overrides", {})
    return TrainRequest(data=str(world / "data"), out=str(out), overrides=overrides, cpus_per_worker=1, **settings)


def real_pictures(world: Path) -> dict[str, str]:
    """Of a run: pictures, and the CLIP that reads them, which the dataset alone may not name."""
    clip = json.loads((world / "data/dataset.json").read_text())["spec"]["clip"]["model"]
    return {"val_images": str(world / "pictures"), "val_references": str(world / "references.csv"), "clip": clip}


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for file in sorted((out / "losses").iterdir()) for line in file.read_text().splitlines()]


def test_the_losses_of_an_epoch_are_put_once_however_many_checkpoints_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, put = open_store(tmp_path), Store.write_bytes
    sizes: list[int] = []
    monkeypatch.setattr(Store, "write_bytes", lambda *given: (sizes.append(len(given[2])), put(*given)))

    def train(log: LossLog, last: int) -> None:
        """As `last` steps, a checkpoint after every tenth."""
        for step in range(len(log.step) + 1, last + 1):
            log.append(step=step, loss=1 / step, lr=0.1)
            if step % 10 == 0:
                log.write(at_end=False)

    def lines(last: int) -> list[dict]:
        return [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, last + 1)]

    def stored() -> list[dict]:
        return [json.loads(line) for key in store.list("losses/") for line in store.read_bytes(key).splitlines()]

    train(LossLog(store, epoch=1, until=0), 105)
    assert stored() == lines(100) and sum(sizes) == sum(store.size(key) for key in store.list("losses/"))
    log = LossLog(store, epoch=1, until=90)  # the lines were put, and the job was killed before its checkpoint was
    train(log, 95)
    assert (list(log.step), list(log.loss)) == (list(range(1, 96)), [1 / step for step in range(1, 96)])
    train(log, 120)
    assert stored() == lines(120) and len(store.list("losses/")) == 3
    log = LossLog(store, epoch=1, until=120)
    train(log, 125)
    log.write(at_end=True)
    assert stored() == lines(125) and [path.name for path in (tmp_path / "losses").iterdir()] == ["epoch-001.jsonl"]


def wait_for(found: Callable[[], object], *, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not found():
        assert alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)


def step_checkpoints(out: Path) -> list[str]:
    """Inside epochs, those that Ray Train knows of."""
    snapshot = out / "checkpoints/checkpoint_manager_snapshot.json"
    try:
        results = json.loads(snapshot.read_text())["checkpoint_results"]
    except (FileNotFoundError, json.JSONDecodeError):  # being written
        return []
    return [name for result in results if "-step-" in (name := result["checkpoint_dir_name"])]


@pytest.fixture(scope="module")
def trained(world: Path, _ray_at_end: None) -> Path:
    """A run with dropout and noise, validated on real pictures."""
    from cluster.session import start_ray

    start_ray(num_cpus=2)
    out = world / "run"
    summary = train(request(world, out, **real_pictures(world)))
    (world / "summary.json").write_text(json.dumps(summary))
    return out


def test_a_run_is_summarised_by_its_best_epoch(trained: Path, world: Path) -> None:
    summary = json.loads((world / "summary.json").read_text())
    rows = history(trained)
    assert summary["epochs"] == len(rows) == EPOCHS
    assert summary["steps"] == rows[-1]["step"] == EPOCHS * STEPS
    assert summary["best"] == best_epoch(rows)
    assert summary["checkpoint"] == str(trained / "best")
    assert summary["group_sizes"] == rows[-1]["group_sizes"] == [{"from_step": 1, "workers": 1}]
    assert "unfinished" not in summary


def test_the_loss_falls(trained: Path) -> None:
    losses = [row["loss"] for row in history(trained)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_of_every_step_is_kept_and_an_epochs_loss_is_their_mean(trained: Path) -> None:
    steps = losses(trained)
    assert [row["step"] for row in steps] == list(range(1, EPOCHS * STEPS + 1))
    for number, row in enumerate(history(trained)):
        of_epoch = [step["loss"] for step in steps[number * STEPS : (number + 1) * STEPS]]
        assert row["loss"] == pytest.approx(np.mean(of_epoch), rel=1e-12)


def test_the_captioner_has_the_averaged_weights(trained: Path) -> None:
    newest = trained / f"checkpoints/epoch-{EPOCHS:03d}"
    averaged, raw = (
        safetensors.torch.load_file(newest / name) for name in ("model.safetensors", "weights.safetensors")
    )
    name = "output.weight"
    assert not torch.equal(averaged[name], raw[name])
    assert (averaged[name] - raw[name]).abs().max() < 0.1 * raw[name].abs().max()


def test_the_exact_config_is_stored_with_run_and_checkpoint(trained: Path) -> None:
    document = json.loads((trained / "config.json").read_text())
    config = TrainConfig.from_dict(document["train"])
    assert config.epochs == EPOCHS and config.model.hidden_size == TINY["hidden_size"]
    assert config.model.vocab_size == len((trained / "best/vocabulary.txt").read_text().splitlines()) + 1
    assert json.loads((trained / "best/config.json").read_text())["model"] == document["train"]["model"]


def test_the_best_checkpoint_is_a_captioner(trained: Path, world: Path) -> None:
    captioner = Captioner.load(trained, device="cpu")
    results = captioner.caption(sorted((world / "pictures").iterdir()))
    assert all(result.caption.startswith("a ") for result in results)
    assert json.loads((trained / "best/config.json").read_text())["metrics"] == best_epoch(history(trained))


def test_a_folder_with_a_run_is_not_overwritten(trained: Path, world: Path) -> None:
    with pytest.raises(InputError, match="holds a finished run; add --resume"):
        train(request(world, trained, **real_pictures(world)))


def test_resuming_a_finished_run_changes_nothing(trained: Path, world: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    summary = train(request(world, trained, **real_pictures(world), resume=True))
    assert summary["best"] == json.loads((world / "summary.json").read_text())["best"]
    assert (trained / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("begun", [True, False])
def test_a_second_job_into_one_place_is_refused(
    trained: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Its epochs would replace the first one's captioner and checkpoints."""
    monkeypatch.setattr("cluster.only_job.PATIENCE_SECONDS", 0.0)
    out = open_store(trained if begun else tmp_path / "fresh")
    asked = request(world, Path(out.root), **real_pictures(world), resume=begun, overrides={"epochs": EPOCHS + 1})
    before = {key: out.read_bytes(key) for key in out.list()}
    said = "another job on this cluster trains into it; wait for its end, or end it"
    with only_job(out, TRAINS, waits=False), pytest.raises(InputError, match=said):
        train(asked)
    assert {key: out.read_bytes(key) for key in out.list()} == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_job_has_begun_meanwhile_is_not_begun_anew(
    world: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Both have looked at an empty place, and started Ray since."""
    out = open_store(tmp_path)
    asked = request(world, tmp_path, resume=resume)
    said = json.dumps(planned_run(asked, cpus=1).document).encode()
    monkeypatch.setattr("cluster.training.train.start_ray", lambda: out.write_bytes("config.json", said))
    with pytest.raises(InputError, match="changed this run meanwhile" if resume else "holds a run .* add --resume"):
        train(asked)
    assert out.list() == ["config.json"] and out.read_bytes("config.json") == said


@pytest.mark.slow
def test_of_two_jobs_with_a_ray_of_their_own_one_trains_and_a_killed_one_is_gone_on_with(
    world: Path, tmp_path: Path, run_job: Callable[..., JobRun]
) -> None:
    """On one machine, as on a laptop: the second comes to the folder while the first trains, and again once it has got
    SIGKILL."""
    out = tmp_path / "run"
    arguments = ["--data", world / "data", "--out", out, "--cpus-per-worker", 1]
    arguments += [f"--set={name}={value}" for name, value in (SHARED | {"epochs": 1000}).items()]

    command = [sys.executable, "-m", "jobs.train", *arguments]
    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for(lambda: (out / "metrics.jsonl").exists() and history(out), alive=lambda: first.poll() is None)
        second = run_job("train", *arguments, "--resume")
        assert second.returncode == 2, second.stderr
        assert second.stderr.splitlines()[-1].startswith(f"error: {out}: another job on this machine trains into it;")
        assert first.poll() is None
    done = len(history(out))
    kill_once(lambda: len(history(out)) > done + 1, [*command, "--resume"])
    assert [row["epoch"] for row in history(out)] == list(range(1, len(history(out)) + 1))


@pytest.mark.slow
def test_a_run_goes_on_from_a_captioner_on_a_view(
    trained: Path, world: Path, tmp_path: Path, ray_session: None, call_job: Callable[..., JobRun]
) -> None:
    """As after a stream: its data is curated, and its captioner trained on, with its own words."""
    ended = call_job("curate", "--data", world / "data", "--drop-word", "yellow", "--out", world / "view")
    assert ended.returncode == 0, ended.stderr
    one = {"epochs": 1, "batch_size": 2, "grad_accumulation": 1}

    settings = request(world, tmp_path / "begun", overrides=one, init_from=str(trained))
    train(replace(settings, data=str(world / "view")))
    assert losses(tmp_path / "begun")[0]["loss"] < losses(trained)[0]["loss"]  # of random weights
    vocabularies = [(folder / "best/vocabulary.txt").read_bytes() for folder in (trained, tmp_path / "begun")]
    assert vocabularies[0] == vocabularies[1]
    again = replace(request(world, tmp_path / "begun", overrides=one, resume=True), data=str(world / "view"))
    assert train(again)["epochs"] == 1, "its record names the captioner"
    with pytest.raises(InputError, match=r"was begun otherwise \(.*init_from: \w+ -> \w+\)"):
        train(replace(again, init_from=str(tmp_path / "begun")))


def captioner_at(folder: Path, run: RunSpec, *, seed: int) -> None:
    torch.manual_seed(seed)
    words, concepts = run.vocabularies.words, run.vocabularies.concepts
    files = captioner_files(build_network(run), document=run.document, vocabulary=words, concepts=concepts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_a_run_goes_on_without_the_captioner_that_it_began_with(world: Path, tmp_path: Path) -> None:
    """It has weights of its own; the other run may have been trained on, or be gone."""
    first, out = tmp_path / "first", tmp_path / "run"
    asked = request(world, out, resume=True, overrides={"epochs": 1})
    run = planned_run(asked, cpus=1)
    captioner_at(first / "best", run, seed=1)
    sha256 = read_initial(str(first)).sha256
    out.mkdir()
    document = {**run.document, "init_from": {"path": str(first), "sha256": sha256}}
    (out / "config.json").write_text(json.dumps(document))
    (out / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 1, "CIDEr": 1.0}) + "\n")
    assert train(replace(asked, init_from=str(first)))["epochs"] == 1
    captioner_at(first / "best", run, seed=2)
    with pytest.raises(InputError, match=r"was begun otherwise \(init_from: \w+ -> \w+\)"):
        train(asked)  # nothing is kept of the run but its record
    begins = replace(run, init_from=str(first), document=document)
    with pytest.raises(InputError, match=rf"--init-from {first}: its weights are others now \(.* began with") as caught:
        build_network(begins)
    assert "\n" not in str(caught.value)

    captioner_at(out / "checkpoints/epoch-001", run, seed=3)
    for init_from in (str(first), f"{first}/", None):
        assert train(replace(asked, init_from=init_from))["epochs"] == 1
    with pytest.raises(InputError, match=r"was begun otherwise \(init_from: \w+ -> \w+\)"):
        train(replace(asked, init_from=str(out / "checkpoints/epoch-001")))
    shutil.rmtree(first)
    assert train(asked)["epochs"] == 1


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_worker_reads_the_captioner_that_a_run_began_with_only_at_its_beginning(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    class Built(Exception):
        pass

    def build(run: RunSpec) -> None:
        raise Built(f"from {run.init_from}")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: context if goes_on else None)
    monkeypatch.setattr("cluster.training.worker._log_to_stderr", lambda: None)
    monkeypatch.setattr("cluster.training.worker.build_network", build)
    run = replace(planned_run(request(world, tmp_path), cpus=1), init_from="first", device="cpu")
    with pytest.raises(Built, match="from None" if goes_on else "from first"):
        set_up_worker(run)


def test_a_captioner_that_does_not_fit_is_one_line(trained: Path, world: Path, tmp_path: Path) -> None:
    other = request(world, tmp_path / "out", init_from=str(trained), overrides={"hidden_size": 16})
    with pytest.raises(InputError, match=r"--init-from .*/best: another network than this run's \(.* x .* -> "):
        train(other)
    with pytest.raises(InputError, match=r"--init-from .*: no captioner"):
        train(request(world, tmp_path / "out", init_from=str(world)))
    with pytest.raises(InputError, match=r"--init-from .*: no captioner"):
        train(request(world, tmp_path / "out", init_from=str(trained / "best" / MODEL_FILE)))
    assert not (tmp_path / "out").exists()


def test_a_captioner_of_another_clip_is_refused(trained: Path, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(trained / "best", folder)
    state = safetensors.torch.load_file(folder / MODEL_FILE)
    state["visual_embedding.clip_head.proj"] += 0.5
    safetensors.torch.save_file(state, folder / MODEL_FILE)
    with pytest.raises(InputError, match="was trained on another CLIP's features"):
        train(request(world, tmp_path / "out", init_from=str(folder)))


def test_resuming_with_other_settings_is_refused_with_the_difference(trained: Path, world: Path) -> None:
    changed = request(world, trained, resume=True, **real_pictures(world), overrides={"batch_size": 4})
    with pytest.raises(InputError, match=r"begun otherwise \(batch_size: 8 -> 4"):
        train(changed)
    with pytest.raises(InputError, match="validation: "):
        train(request(world, trained, resume=True))
    wider = request(world, trained, resume=True, **real_pictures(world), overrides={"hidden_size": 64})
    with pytest.raises(InputError, match=r"begun otherwise \(hidden_size: 32 -> 64\); resume with the same"):
        train(wider)


def test_validation_pictures_may_move(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = planned_run(request(world, world / "other", **real_pictures(world)), cpus=1).document
    monkeypatch.chdir(world)
    named = {"images": "pictures", "references": "references.csv", "split": None}
    assert same_validation(begun, {**begun, "validation": named})
    moved = {**begun, "validation": {**named, "images": "moved"}}
    assert same_validation(begun, moved)
    for place in (begun, moved):
        assert not same_validation(begun, {**place, "references_sha256": "another"})
    assert not same_validation(begun, {**begun, "validation": {**named, "split": "val"}})
    assert not same_validation(begun, {**begun, "validation": None})
    earlier = {name: value for name, value in begun.items() if name != "references_sha256"}
    assert same_validation(earlier, begun) and not same_validation(earlier, moved)


def test_validation_pictures_that_have_moved_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    begun = {"validation": {"images": "/a/pictures", "references": "/a/r.json", "split": None}}
    moved = {"validation": begun["validation"] | {"images": "/b/pictures"}}
    warn_of_moved_pictures(begun, begun)
    assert not caplog.messages
    warn_of_moved_pictures(begun, moved)
    assert caplog.messages == ["validation pictures are taken from /b/pictures, they were at /a/pictures"]


def test_a_recorded_store_whose_package_is_missing_is_no_damage(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    at_store = {"images": "gs://b/v", "references": "gs://b/r.json", "split": None}
    document = planned_run(request(world, tmp_path), cpus=1).document | {"validation": at_store}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert previous_run(open_store(tmp_path), resume=True) == document
    here = at_store | {"images": "/v", "references": "/r.json"}
    recorded = document | {"references_sha256": "1"}
    assert same_validation(recorded, recorded | {"validation": here})
    assert not same_validation(document, document | {"validation": here})


def test_a_run_goes_on_with_the_clip_of_its_validation_alone(
    world: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GoesOn(Exception):
        pass

    def goes_on(out: Store, *, done: int) -> None:
        raise GoesOn

    monkeypatch.setattr("cluster.training.train.check_checkpoints", goes_on)
    place, out = shutil.copytree(tiny_clip, tmp_path / "clip"), tmp_path / "run"
    pictures = real_pictures(world) | {"clip": str(place)}
    begun = planned_run(request(world, out, **pictures), cpus=1).document
    out.mkdir()
    (out / "config.json").write_text(json.dumps(begun))

    def resume(**settings: str | None) -> None:
        train(request(world, out, resume=True, **(pictures | settings)))

    with pytest.raises(GoesOn):
        resume(clip=None)
    moved = shutil.copytree(place, tmp_path / "moved")
    with pytest.raises(GoesOn):
        resume(clip=str(moved))
    (place / "README.md").write_text("other files")
    for clip in (None, str(place)):
        with pytest.raises(InputError, match=rf"clip: {place} \(sha256:\w+\) -> {place} \(sha256:"):
            resume(clip=clip)
    (out / "config.json").write_text(json.dumps(begun | {"clip": begun["clip"] | {"revision": "a" * 40}}))
    with pytest.raises(GoesOn):  # of a release that did not look at the place
        resume(clip=None)


TAG, COMMIT, DIGESTS, WEIGHTS = "ViT-L-14/openai", "a" * 40, ("sha256:1", "sha256:2"), {"weights": "sha256:w"}


@pytest.mark.parametrize(
    ("was", "now", "recorded", "same"),
    [
        ((TAG, COMMIT), ("ViT-B-32/openai", COMMIT), WEIGHTS, False),
        ((TAG, COMMIT), ("hf-hub:org/repo", COMMIT), {}, False),
        ((TAG, COMMIT), ("ViT-L-14-quickgelu/openai", COMMIT), {}, True),
        ((TAG, DIGESTS[0]), ("ViT-B-32/openai", DIGESTS[0]), {}, False),  # the dataset's CLIP is a folder
        ((TAG, DIGESTS[0]), ("/clip", DIGESTS[0]), {}, False),
        ((TAG, COMMIT), ("s3://bucket/clip", DIGESTS[0]), WEIGHTS, True),
        (("s3://bucket/clip", DIGESTS[0]), (TAG, COMMIT), WEIGHTS, True),
        ((TAG, COMMIT), ("s3://bucket/clip", DIGESTS[0]), {}, False),
        (("/clip", DIGESTS[0]), ("/moved", DIGESTS[0]), {}, True),
        (("/clip", DIGESTS[0]), ("/clip", DIGESTS[1]), WEIGHTS, False),
        (("/clip", COMMIT), ("/clip", DIGESTS[0]), {}, True),  # of a release that did not look at the place
        (("/clip", ""), ("/moved", DIGESTS[0]), {}, True),
    ],
)
def test_the_clip_of_a_resumed_run_is_proved_by_name_by_digest_or_when_it_is_loaded(
    was: tuple[str, str], now: tuple[str, str], recorded: dict[str, str], same: bool
) -> None:
    before, after = (
        {"clip": {"model": model, "revision": revision, **recorded}, "validation": {"images": "/v"}}
        for model, revision in (was, now)
    )
    assert same_clip(before, after) is same
    assert same_clip(before, after | {"validation": None})


def test_a_resume_fetches_no_staged_clip_to_compare_it_and_a_finished_run_needs_none(
    world: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCM_WEIGHTS_CACHE", str(tmp_path / "cache"))
    uri, out = f"file://{tmp_path}/clip", tmp_path / "run"
    stage(StageModelsRequest(clip=str(tiny_clip), out=uri))
    pictures = real_pictures(world)
    document = planned_run(request(world, out, **pictures | {"clip": uri}), cpus=1).document
    assert document["clip"]["revision"] == folder_revision(tiny_clip)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(document))
    shutil.rmtree(tmp_path / "clip")
    resumed = request(world, out, resume=True, **pictures | {"clip": None})
    with pytest.raises(InputError, match="so no weights are staged there"):
        train(resumed)
    rows = [{"epoch": epoch, "step": epoch, "CIDEr": 1.0} for epoch in range(1, EPOCHS + 1)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(resumed)["epochs"] == EPOCHS
    assert not (tmp_path / "cache").exists()


def test_a_run_goes_on_with_its_words_and_concepts_alone_and_keeps_its_versions(world: Path, tmp_path: Path) -> None:
    document = planned_run(request(world, tmp_path / "run"), cpus=1).document
    now = document["versions"]["torch"]
    assert [run_versions({"versions": {"torch": torch}})["torch"] for torch in ("1.0", f"1.0 and {now}", now)] == [
        f"1.0 and {now}", f"1.0 and {now}", now,
    ]  # fmt: skip
    out = open_store(tmp_path)
    refuse_other_run(out, {name: value for name, value in document.items() if name != "vocabularies"}, document)
    for name in ("words", "concepts"):
        begun = {**document, "vocabularies": {**document["vocabularies"], name: "a" * 64}}
        with pytest.raises(InputError, match=rf"begun otherwise \({name}: a{{17}} -> \w{{17}}\)"):
            refuse_other_run(out, begun, document)


@pytest.mark.parametrize("order", [None, 1, 3])  # none is recorded by releases before the second
def test_a_run_of_another_row_order_is_refused(world: Path, tmp_path: Path, order: int | None) -> None:
    document = planned_run(request(world, tmp_path / "run"), cpus=1).document
    assert document.pop("row_order") == 2
    document["train"]["window_shards"] = 8  # which the first order had
    document |= {} if order is None else {"row_order": order}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"takes its rows in order {order or 1}, this release in order 2; finish it"):
        train(request(world, tmp_path, resume=True))


def test_a_run_of_a_later_release_is_not_called_damaged(world: Path, tmp_path: Path) -> None:
    document = planned_run(request(world, tmp_path / "run"), cpus=1).document
    document["train"]["warm_restarts"] = 3
    for order, said in ((2, "config.json: training config field 'warm_restarts': not known"), (3, "in order 3")):
        (tmp_path / "config.json").write_text(json.dumps(document | {"row_order": order}))
        with pytest.raises(InputError, match=f"{said}.*; finish .* the release that began it") as caught:
            previous_run(open_store(tmp_path), resume=True)
        assert "damaged" not in str(caught.value)
    del document["train"]["warm_restarts"]
    document["validation"] = {"images": "/v", "references": "/r", "split": "val", "crop": 1}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"config\.json: validation field 'crop': not known to this release"):
        previous_run(open_store(tmp_path), resume=True)


def test_a_run_that_goes_on_with_other_releases_says_so(caplog: pytest.LogCaptureFixture) -> None:
    now = run_versions({})
    other_build = {"torch": f"{now['torch'].partition('+')[0]}+cu999"}
    for same in ({}, {"versions": now}, {"versions": {"torch": f"1.0 and {now['torch']}"}}, {"versions": other_build}):
        warn_of_other_releases(same)
    assert not caplog.text
    warn_of_other_releases({"versions": {**now, "torch": "1.0 and 1.1"}})
    assert f"goes on with other releases than before (torch: 1.1 -> {now['torch']}), and its losses may" in caplog.text


def test_a_captioner_of_a_later_release_is_not_called_damaged(world: Path, tmp_path: Path) -> None:
    document = planned_run(request(world, tmp_path / "run"), cpus=1).document
    document["train"]["warm_restarts"] = 3
    files = {"model.safetensors": b"", "vocabulary.txt": b"", "config.json": json.dumps(document).encode()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"'warm_restarts': not known.*; .* use the release that trained it"):
        read_initial(str(tmp_path))


@pytest.mark.parametrize("of_earlier_release", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_only_on_the_device_that_it_was_begun_on(
    trained: Path, world: Path, ray_session: None, tmp_path: Path, of_earlier_release: bool
) -> None:
    """The next epoch of a run on GPUs, while the cluster has CPUs alone."""
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    document = json.loads(config.read_bytes())
    assert document["device"] == "cpu"
    longer = request(world, tmp_path / "run", resume=True, **real_pictures(world), overrides={"epochs": EPOCHS + 1})
    if not of_earlier_release:
        config.write_text(json.dumps(document | {"device": "cuda"}))
        with pytest.raises(InputError, match="begun on cuda, and this is cpu; give --device cuda, or another --out"):
            train(longer)
        assert json.loads(config.read_bytes())["device"] == "cuda" and history(tmp_path / "run") == history(trained)
        return
    del document["device"]
    config.write_text(json.dumps(document))
    assert train(longer)["epochs"] == EPOCHS + 1
    assert json.loads(config.read_bytes())["device"] == "cpu"


def test_a_run_that_goes_on_waits_for_its_device_where_the_cluster_has_nothing_yet(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cluster.training.placement", "cluster.device"):
        monkeypatch.setattr(f"{name}.cluster_cpus", lambda labels=None: 0.0)
        monkeypatch.setattr(f"{name}.cluster_gpus", lambda labels=None: 0.0)
    config = preset("embedded").with_overrides(SHARED)
    place = placement_of(request(world, tmp_path / "run", resume=True), config, joined=True, before="cuda")
    assert (place.device, place.num_workers, place.gpus_per_worker) == ("cuda", 1, 1)
    with pytest.raises(InputError, match="--device auto: the cluster has no CPUs and GPUs for work now"):
        placement_of(request(world, tmp_path / "run", resume=True), config, joined=True)


@pytest.mark.slow
def test_a_run_of_one_worker_is_gone_on_with_by_two(trained: Path, world: Path, ray_session: None) -> None:
    out, alone = world / "one then two", world / "one then one"
    for each, workers in ((out, 2), (alone, 1)):
        shutil.copytree(trained, each)
        longer = request(
            world, each, resume=True, num_workers=workers, **real_pictures(world), overrides={"epochs": EPOCHS + 1}
        )
        assert train(longer)["epochs"] == EPOCHS + 1
    two, one = ([row["loss"] for row in losses(each)] for each in (out, alone))
    assert len(two) == (EPOCHS + 1) * STEPS and two == pytest.approx(one, rel=TOLERANCE)


@pytest.mark.slow
def test_a_run_whose_driver_and_worker_were_killed_inside_epochs_equals_an_undisturbed_one(
    trained: Path, world: Path, run_job, ray_session: None
) -> None:
    out = world / "killed"
    settings = [f"--set={name}={value}" for name, value in SHARED.items() if name != "epochs"]
    arguments = [
        *("--data", world / "data", "--out", out, "--epochs", EPOCHS, *settings, "--cpus-per-worker", 1),
        *(f"--{name.replace('_', '-')}={value}" for name, value in real_pictures(world).items()),
        *("--checkpoint-every-steps", CHECKPOINT_STEPS),
    ]
    kill_once(lambda: step_checkpoints(out), [sys.executable, "-m", "jobs.train", *arguments])
    assert len(history(out)) < EPOCHS
    with pytest.raises(InputError, match="or give another --out"):
        train(request(world, out, **real_pictures(world)))

    # Now the driver is this process, and its worker is killed inside the last epoch.
    resumed = request(world, out, **real_pictures(world), resume=True, checkpoint_every_steps=CHECKPOINT_STEPS)
    done: list[dict] = []
    driver = threading.Thread(target=lambda: done.append(train(resumed)))
    driver.start()
    wait_for(lambda: any(name.startswith("epoch-002-") for name in step_checkpoints(out)), alive=driver.is_alive)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.kill()
    driver.join()
    assert done and done[0]["epochs"] == EPOCHS
    assert losses(out) == losses(trained)
    assert science(history(out)) == science(history(trained))
    assert (out / "best/model.safetensors").read_bytes() == (trained / "best/model.safetensors").read_bytes()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    trained: Path, world: Path, ray_session: None, capfd: pytest.CaptureFixture
) -> None:
    """The epochs that it counted are trained again, and are the same; then the run goes on, and can be resumed. What a
    killed job has left of another checkpoint is deleted."""
    out = world / "damaged"
    shutil.copytree(trained, out)
    left = out / "checkpoints/epoch-001-step-000000099/optimizer.pt"
    left.parent.mkdir()
    left.write_bytes(b"")
    cut(out / f"checkpoints/epoch-{EPOCHS:03d}/optimizer.pt")
    longer = {"overrides": {"epochs": EPOCHS + 1}, **real_pictures(world)}
    summary = train(request(world, out, resume=True, **longer))
    assert summary["epochs"] == EPOCHS + 1 and science(history(out))[:EPOCHS] == science(history(trained))
    said = ""
    while "epoch-002 is used" not in said:  # a worker's lines come by way of Ray
        said += capfd.readouterr().err
        time.sleep(0.1)
    assert "damaged checkpoints are passed over (epoch-003: " in said
    assert not left.exists()
    names = {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()}
    assert f"epoch-{EPOCHS:03d}-again" in names and f"epoch-{EPOCHS + 1:03d}" in names


@pytest.mark.slow
def test_a_run_begun_under_another_ray_goes_on(trained: Path, world: Path, ray_session: None) -> None:
    out = world / "of another Ray"
    shutil.copytree(trained, out)
    record = out / "checkpoints" / CHECKPOINT_RECORD
    old = json.loads(record.read_bytes()) | {"ray_version": "2.55.1"}
    for later in ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names"):
        del old[later]
    record.write_text(json.dumps(old))
    longer = {"overrides": {"epochs": EPOCHS + 1}, **real_pictures(world)}
    assert train(request(world, out, resume=True, **longer))["epochs"] == EPOCHS + 1
    assert science(out)[:EPOCHS] == science(trained) and history(out)[-1]["step"] == (EPOCHS + 1) * STEPS
    assert json.loads(record.read_bytes())["ray_version"] == ray.__version__


@pytest.mark.slow
def test_a_run_of_which_all_checkpoints_are_damaged_is_one_line(trained: Path, world: Path, ray_session: None) -> None:
    out = world / "all damaged"
    shutil.copytree(trained, out)
    for folder in (out / "checkpoints").glob("epoch-*"):
        cut(folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"no checkpoint can be read \(epoch-003: .*train into another --out"
    ) as caught:
        train(request(world, out, resume=True, overrides={"epochs": EPOCHS + 1}, **real_pictures(world)))
    assert "\n" not in str(caught.value)


def test_a_clip_in_a_folder_here_is_found_by_workers_in_another(
    world: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts them in folders of their own, for training and for the trials of a sweep."""
    shutil.copytree(tiny_clip, tmp_path / "my_clip")
    monkeypatch.chdir(tmp_path)
    asked = request(world, tmp_path / "run", **(real_pictures(world) | {"clip": "my_clip"}))
    spec = planned_run(asked, cpus=1)
    assert spec.clip == spec.document["clip"]["model"] == spec.document["clip_option"] == str(tmp_path / "my_clip")


def test_a_run_without_its_checkpoints_is_refused_and_stays_as_it_is(trained: Path, world: Path) -> None:
    out = world / "no checkpoints"
    shutil.copytree(trained, out, ignore=lambda *_: ["checkpoints"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="no checkpoints/checkpoints: holds no checkpoint, though epochs are done"):
        train(request(world, out, resume=True, overrides={"epochs": EPOCHS + 1}, **real_pictures(world)))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
@pytest.mark.parametrize("data", [b'{"train": ', b"[]\n", b"[" * 100_000, b"{}\n"])
def test_a_damaged_document_of_a_resumed_run_is_one_line(name: str, data: bytes, trained: Path, world: Path) -> None:
    out = world / "damaged documents"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained, out)
    (out / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: damaged \(.*\); (restore it|delete it)") as caught:
        train(request(world, out, resume=True, overrides={"epochs": EPOCHS + 1}, **real_pictures(world)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_resumes_on_an_object_store_from_several_datasets(
    world: Path, tiny_clip: Path, run_job, s3: S3Server
) -> None:
    write_dataset(world / "more", tiny_clip, rows=20, first=300)
    out = f"{s3.uri}/train/run"
    sources = []
    for name, weight in (("data", "=1"), ("more", "=0.5")):
        store = open_store(f"{s3.uri}/train/{name}")
        sources += ["--data", store.root + weight]
        for file in (world / name).rglob("*"):
            if file.is_file():
                store.write_bytes(file.relative_to(world / name).as_posix(), file.read_bytes())
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    arguments = [*sources, "--out", out, *settings, "--cpus-per-worker", 1, "--fraction", 0.5]
    done = run_job("train", *arguments, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    other = run_job("train", *sources[:2], *arguments[4:], "--epochs", 2, "--resume")
    assert other.returncode == 2 and "begun otherwise (" in other.stderr and "data: " in other.stderr
    done = run_job("train", *arguments, "--epochs", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch 1" in done.stderr
    assert (done.summary["epochs"], done.summary["checkpoint"]) == (2, f"{out}/best")
    keys = open_store(out).list()
    assert {"config.json", "metrics.jsonl", "losses/epoch-002.jsonl", "checkpoints/epoch-002/optimizer.pt"} <= set(keys)
    document = json.loads(open_store(out).read_bytes("config.json"))
    assert [each["weight"] for each in document["datasets"]] == [1.0, 0.5] and document["train"]["fraction"] == 0.5
    captioner = load_captioner([out], CaptionerOptions(device="cpu", clip=str(tiny_clip)))
    assert captioner.caption([scene(0)[1]])[0].caption


def test_a_captioner_records_the_clip_that_was_given_and_is_told_where_it_is_another(
    world: Path, tiny_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / MANIFEST_KEY).read_text())
    manifest["spec"]["clip"]["revision"] = folder_revision(tiny_clip)
    (tmp_path / "data" / MANIFEST_KEY).write_text(json.dumps(manifest))

    def recorded(clip: str) -> tuple[str, str]:
        caplog.clear()
        document = planned_run(request(tmp_path, tmp_path / "run", clip=clip), cpus=1).document
        return document["clip"]["model"], document["clip"]["revision"]

    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    assert recorded(str(moved)) == (str(moved), folder_revision(tiny_clip))
    assert recorded("hf-hub:no/such") == ("hf-hub:no/such", folder_revision(tiny_clip))  # no hub is asked
    assert "its files are" not in caplog.text
    (moved / "README.md").write_text("how it was exported")
    assert recorded(str(moved)) == (str(moved), folder_revision(moved)) != (str(moved), folder_revision(tiny_clip))
    assert f"--clip {moved}: its files are {folder_revision(moved)}, but the CLIP of the dataset" in caplog.text


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(trained: Path, world: Path, ray_session: None) -> None:
    """Same batches, same dropout, same losses, step by step; with two workers and two parts each."""
    out = world / "workers2"
    train(request(world, out, num_workers=2, **real_pictures(world), overrides={"epochs": EPOCHS}))
    one, two = ([row["loss"] for row in losses(each)] for each in (trained, out))
    assert two == pytest.approx(one, rel=TOLERANCE)


@pytest.mark.slow  # test_shuffled.py has what a batch does; a run is 20 seconds
@pytest.mark.parametrize("feature_dtype", ["float16", "int8"])
def test_features_that_are_no_numbers_stop_the_run_with_their_shard(
    world: Path, ray_session: None, tiny_clip: Path, tmp_path: Path, feature_dtype: str, capfd: pytest.CaptureFixture
) -> None:
    store = open_store(world / "data")
    config = TrainConfig().with_overrides(TINY)
    share = holdout_share(fraction=config.holdout_fraction, limit=config.holdout_limit, rows=ROWS)
    keys = all_rows(load_manifest(store)).shards
    training, _ = select_rows(store, keys, RowFilter(seed=config.seed, held_out=share))
    bad = int(training.rows[0][0])
    write_dataset(tmp_path / "nan", tiny_clip, rows=ROWS, nan_row=bad)
    broken = TrainRequest(
        data=str(tmp_path / "nan"),
        out=str(tmp_path / "run"),
        overrides=TINY | {"feature_dtype": feature_dtype},
        cpus_per_worker=1,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(InputError) as caught:
        train(broken)
    assert str(caught.value) == (
        f"{tmp_path}/nan/shards/part-000000.parquet: the features or the score of sample {bad:09d}-00 are not finite; "
        "run jobs.verify on the dataset"
    )
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "run/best").exists()
    trained_on = {str(np.load(file, mmap_mode="r").dtype) for file in tmp_path.glob("cache/*/*/*/patch_features.npy")}
    assert trained_on == {feature_dtype}


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(world: Path, ray_session: None, tmp_path: Path) -> None:
    request = TrainRequest(
        data=str(world / "data"), out=str(tmp_path / "run"), overrides=TINY | {"lr_factor": 1e30}, cpus_per_worker=1
    )
    with pytest.raises(
        TrainingFailed, match=r"loss is \w+ in epoch 1, step \d+, .*-00 and 5 others, whose features are finite; lower"
    ):
        train(request)


def test_a_loss_that_is_no_number_names_three_samples_of_its_batch() -> None:
    """A batch may have thousands, and the line goes into the log, the error and Ray's."""
    batch = SimpleNamespace(sample_ids=[f"{k:09d}-00" for k in range(4096)], damaged=list, epoch=0, step=6)
    named = "000000000-00, 000000001-00, 000000002-00"
    for count, said in ((4096, f"{named} and 4,093 others"), (3, named)):
        batch.sample_ids = batch.sample_ids[:count]
        with pytest.raises(NonFiniteLoss, match=f"step 7, at the batch of samples {said}, whose"):
            _stop(SimpleNamespace(num_workers=1), batch, math.nan)  # type: ignore[arg-type]


def test_an_error_of_the_users_is_not_tried_again() -> None:
    policy = _FailurePolicy(FailureConfig(max_failures=3))
    for error in (InputError("shard 3: cannot be read"), OutOfMemory("out of memory; set batch_size lower")):
        users = WorkerGroupError("failed", {1: error})
        assert policy.make_decision(users) == FailureDecision.RAISE and worker_input_error(users) is error
    assert policy.make_decision(WorkerGroupError("failed", {0: OSError("gone")})) == FailureDecision.RETRY


def test_a_record_of_checkpoints_that_cannot_be_written_ends_in_one_line() -> None:
    full = StoreFailure("disk full at checkpoints/record.json")
    failed = ControllerError(full)
    assert _FailurePolicy(FailureConfig(max_failures=3)).make_decision(failed) == FailureDecision.RAISE
    assert worker_input_error(failed) is full


def test_a_gpu_that_this_machine_lacks_is_one_line_before_ray(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("cluster.training.train.start_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=r"^--device cuda: torch finds no GPU on this machine; leave --device out"):
        train(request(world, tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_worker_labels_need_a_cluster_and_reach_ray() -> None:
    with pytest.raises(InputError, match=r"--worker-label pcmnet\.io/role=training: only on a cluster"):
        check_labels({"pcmnet.io/role": "training"}, joined=False)
    trainer = make_trainer(
        lambda config: "", {}, out=open_store("/nowhere"), score="score", sizes=(2,), cpus=1, gpus=0,
        labels={"pcmnet.io/role": "training"}, keep_checkpoints=1, max_failures=0, joined=True,
    )  # fmt: skip
    assert trainer.scaling_config.label_selector == {"pcmnet.io/role": "training"}


def test_only_nodes_with_the_label_count_for_the_device_and_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that generation draws on are not training's: with them auto was cuda, and the group waited for ever."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 48.0, "GPU": 4.0}, "Labels": {"role": "generation"}},
        {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {"role": "training"}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    request = TrainRequest(data="data", out="run", worker_labels={"role": "training"})
    place = placement_of(request, TrainConfig(), joined=True)
    assert (place.device, place.sizes, place.cpus) == ("cpu", (1,), 8)
    assert placement_of(replace(request, worker_labels={}), TrainConfig(), joined=True).device == "cuda"
    with pytest.raises(InputError, match="nodes with role=training have 8 CPUs; take fewer"):
        placement_of(replace(request, num_workers=2, cpus_per_worker=6), TrainConfig(), joined=True)
    with pytest.raises(InputError, match="--device auto: nodes with role=late have no CPUs and GPUs for work now"):
        placement_of(replace(request, worker_labels={"role": "late"}), TrainConfig(), joined=True)


@pytest.mark.parametrize(("gpus", "workers"), [(4, 4), (6, 4), (12, 8), (64, 32)])
def test_a_run_takes_as_many_gpus_as_can_share_its_batch(
    gpus: int, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cluster.training.placement")
    node = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": float(gpus)}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    assert placement_of(TrainRequest(data="data", out="run"), TrainConfig(batch_size=32), joined=False).sizes == (
        workers,
    )
    said = f"training on {workers} of {gpus} GPUs: batch size 32 with grad_accumulation 1 cannot be divided evenly"
    assert (said in caplog.text) == (workers < gpus)


@pytest.mark.parametrize("value", ["!training", "in(training,spare)", "-"])
def test_a_label_is_no_expression(value: str) -> None:
    """Ray takes operators in a label's value, but what is counted is equal labels."""
    with pytest.raises(InputError, match=r"--worker-label 'role=.*': a value has letters, digits"):
        parse_worker_label(f"role={value}")
    with pytest.raises(InputError, match=r"--node-label 'role=.*': a value has letters, digits"):
        parse_node_label(f"role={value}")
    assert parse_node_label("ray.io/node-group=l4-spot_1.a") == ("ray.io/node-group", "l4-spot_1.a")


def test_a_group_that_follows_the_cluster_has_sizes_that_can_share_a_batch() -> None:
    config = TrainConfig(batch_size=32, grad_accumulation=2)
    assert group_sizes(config, (2, 10)) == (2, 4, 8)
    assert group_sizes(config, 16) == (16,)
    with pytest.raises(InputError, match="possible are 1, 2, 4, 8, 16, or change batch_size"):
        group_sizes(config, (9, 15))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a cluster of one node has, and what of it is free."""
    cpus = {"has": 7.0, "free": 5.0}
    node = {"NodeID": "node", "Alive": True, "Labels": {"role": "training"}}
    monkeypatch.setattr("ray.nodes", lambda: [node | {"Resources": {"CPU": cpus["has"]}}])
    monkeypatch.setattr("cluster.session.free_resources", lambda: {"node": {"CPU": cpus["free"]}})
    monkeypatch.setattr(_GroupSizes, "_get_reserved_resources", lambda self: {"node": {"CPU": cpus["has"]}})
    return cpus


def grouped(sizes: tuple[int, ...], **labels: str) -> tuple[_GroupSizes, list[float]]:
    """A policy, and when it has asked for its workers."""
    config = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0.0)
    policy = _GroupSizes(config, sizes, {"cpus": 1, "gpus": 0, "labels": labels})
    asked: list[float] = []
    policy._maybe_send_resource_request = lambda: asked.append(0.0)  # type: ignore[method-assign]
    return policy, asked


def decided(policy: _GroupSizes, *reported: int, workers: int, started: float = 0.0) -> int | None:
    """What is decided where these ranks have just reported: a new size, or None. As Checkpoints.save does it, the first
    has the checkpoint's files, the others report none.
    """
    group = SimpleNamespace(num_workers=workers, start_time=started)
    reports = {rank: _TrainingReport("files" if rank == 0 else None, {}, validation=False) for rank in reported}
    statuses = {rank: WorkerStatus(running=True, training_report=reports.get(rank)) for rank in range(workers)}
    decision = policy.make_decision_for_running_worker_group(group, WorkerGroupPollStatus(statuses))  # type: ignore[arg-type]
    return getattr(decision, "num_workers", None)


def test_a_group_grows_right_after_a_checkpoint_to_the_largest_size_there_is_room_for(room: dict[str, float]) -> None:
    policy, _ = grouped((1, 2, 4, 8))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 4  # type: ignore[attr-defined]
    assert decided(policy, workers=2) is None
    assert decided(policy, 0, workers=2) is None, "the checkpoint is not whole yet"
    assert decided(policy, 1, workers=2) == 4
    assert decided(policy, workers=2) is None
    assert decided(policy, 1, workers=2) is None, "the other rank's comes before the files"
    assert decided(policy, 0, workers=2) == 4
    room["has"] = 2.0
    assert decided(policy, 0, 1, workers=2) is None, "as many as there are"
    assert decided(policy, workers=1, started=1.0) is None, "another group, which has no checkpoint of its own yet"
    assert decided(policy, 0, workers=1, started=1.0) == 2


def test_a_group_does_not_stop_to_wait_for_what_another_job_has(room: dict[str, float]) -> None:
    policy, _ = grouped((1, 2, 4, 8))
    room.update(has=16.0, free=3.0)
    assert decided(policy, 0, 1, workers=2) == 4, "8 would wait for the other job to end"
    room["free"] = 1.0
    assert decided(policy, 0, 1, workers=2) is None


def test_a_group_asks_for_its_workers_between_checkpoints_too(room: dict[str, float]) -> None:
    """What is not asked for again Ray forgets, and a machine that came for it is given back before the checkpoint."""
    policy, asked = grouped((1, 2))
    for _ in range(3):
        decided(policy, workers=1)
    assert len(asked) == 3


def test_a_group_counts_the_nodes_with_its_label_only(room: dict[str, float]) -> None:
    for role, size in (("training", 4), ("drawing", None)):
        policy, _ = grouped((1, 2, 4), role=role)
        assert getattr(policy.make_decision_for_non_running_worker_group(), "num_workers", None) == size


def test_datasets_are_named_with_weights() -> None:
    assert DataSource.parse("s3://bucket/a") == DataSource("s3://bucket/a", 1.0)
    assert DataSource.parse("s3://bucket/part=x/a=0.25") == DataSource("s3://bucket/part=x/a", 0.25)
    assert DataSource.parse("part=x") == DataSource("part=x", 1.0)
    for wrong in ("a=0", "a=-1", "=2", "a=nan"):
        with pytest.raises(InputError, match="DATASET=WEIGHT with a weight above 0"):
            DataSource.parse(wrong)


def test_the_summary_says_how_much_of_an_unfinished_dataset_there_was(world: Path, trained: Path) -> None:
    sets = open_training_sets([DataSource(str(world / "data"))])
    unfinished = [replace(sets[0], extent="31 of 2,215 shards")]
    assert _summary(open_store(trained), unfinished, 0.0)["unfinished"] == {str(world / "data"): "31 of 2,215 shards"}


def test_several_datasets_share_words_and_concepts(world: Path, tmp_path: Path, tiny_clip: Path) -> None:
    write_dataset(tmp_path / "other", tiny_clip, rows=12, first=200)
    concepts = ConceptVocabulary(("zebra", "square", "tram"), np.eye(3, 32, dtype=np.float32), "test")
    concepts.save(tmp_path / "other/concepts.safetensors")
    sets = open_training_sets([DataSource(str(world / "data")), DataSource(str(tmp_path / "other"), 0.5)])
    both = common_vocabularies(sets)
    captions = [scene(index)[0] for index in (*range(ROWS), *range(200, 212))]
    assert both.words.decode() == Vocabulary.build(captions, min_count=1).to_text()
    names = ConceptVocabulary.from_bytes(both.concepts).names
    own = ConceptVocabulary.load(world / "data/concepts.safetensors").names
    assert names == ("square", "zebra", "circle", "bar", "tram", *own[3:])[: len(own)]
    alone = common_vocabularies(sets[:1])
    assert alone.words == (world / "data/vocabulary.txt").read_bytes()
    assert merged_concepts([concepts]).names == concepts.names


def test_datasets_of_different_clips_are_not_mixed(world: Path, copied: Path) -> None:
    head = copied / "data/clip_head.safetensors"
    tensors = safetensors.torch.load_file(head)
    safetensors.torch.save_file({**tensors, "proj": tensors["proj"] * 2}, head)
    both = [str(world / "data"), str(copied / "data")]
    with pytest.raises(InputError, match="features of another CLIP"):
        train(TrainRequest(data=both, out=str(copied / "out")))
    document = json.loads((copied / "data/dataset.json").read_text())
    document["features"]["num_patches"] = 9
    (copied / "data/dataset.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"features 9 x 64 and 32, but those of .* are 16 x 64 and 32"):
        train(TrainRequest(data=both, out=str(copied / "out")))
    with pytest.raises(InputError, match="a dataset twice"):
        train(TrainRequest(data=[both[0], both[0] + "=2"], out=str(copied / "out")))


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A dataset that a test may break."""
    shutil.copytree(world / "data", tmp_path / "data")
    return tmp_path


def plan_of(manifest: Manifest) -> Plan:
    """One by which the dataset may have been made."""
    return Plan(
        spec=manifest.spec,
        corpus=manifest.corpus,
        corpus_fingerprint=manifest.corpus_fingerprint,
        records=manifest.expected,
        expected=manifest.expected,
        usable=manifest.expected,
        shard_size=manifest.shards[0]["rows"],
        segments=(Segment(0, manifest.expected, 0, len(manifest.shards), manifest.corpus_fingerprint),),
    )


def test_an_unfinished_dataset_is_refused(copied: Path) -> None:
    store = open_store(copied / "data")
    store.write_bytes(PLAN_KEY, plan_of(load_manifest(store)).to_json())
    store.delete(MANIFEST_KEY)
    with pytest.raises(InputError, match=r"an unfinished dataset \(no dataset\.json\)"):
        train(request(copied, copied / "out"))


@pytest.mark.parametrize("key", ["vocabulary.txt", "concepts.safetensors", "clip_head.safetensors"])
def test_a_dataset_without_its_vocabularies_is_refused(copied: Path, key: str) -> None:
    (copied / "data" / key).unlink()
    said = f"has no {key}; it cannot be trained on"
    with pytest.raises(InputError, match=f"{said}$"):  # nothing repairs it without a plan
        train(request(copied, copied / "out"))
    store = open_store(copied / "data")
    store.write_bytes(PLAN_KEY, plan_of(load_manifest(store)).to_json())
    with pytest.raises(InputError, match=f"{said}; jobs.verify --repair makes it again$"):
        train(request(copied, copied / "out"))


def test_of_a_view_without_its_vocabulary_it_is_said_what_makes_the_view_again(world: Path, tmp_path: Path) -> None:
    """No repair does: it has no plan."""
    view = tmp_path / "view"
    curate(CurateRequest(data=world / "data", out=view, drop_word="yellow"))
    (view / "vocabulary.txt").unlink()
    with pytest.raises(InputError, match=r"; make the dataset again with jobs\.curate into another --out$"):
        open_training_sets([DataSource(str(view))])


@pytest.mark.parametrize("count, fewer", [(0, ""), (3, "--set top_concepts=3, ")])
def test_captions_of_too_few_concepts_are_one_line_that_says_what_to_give(copied: Path, count: int, fewer: str) -> None:
    """Such as captions of another language than the lexicon's."""
    names = ("zebra", "square", "tram")[:count]
    ConceptVocabulary(names, np.eye(3, 32, dtype=np.float32)[:count], "lexicon").save(
        copied / "data/concepts.safetensors"
    )
    said = rf"top_concepts 5: the captions of .*/data gave {count or 'no'} concepts \(lexicon\); give {fewer}--concepts"
    with pytest.raises(InputError, match=said):
        train(request(copied, copied / "out"))
    assert not (copied / "out").exists()


def test_features_of_another_size_are_refused(copied: Path) -> None:
    path = copied / "data/dataset.json"
    document = json.loads(path.read_text())
    document["features"]["patch_dim"] = 96
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"feature sizes \(D_v, D\) differ: dataset\.json \(96, 32\)"):
        train(request(copied, copied / "out"))
    assert not (copied / "out").exists()


def test_a_folder_with_something_else_is_not_a_run(copied: Path) -> None:
    (copied / "out").mkdir()
    (copied / "out/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty and not a training run"):
        train(request(copied, copied / "out"))


def test_a_preset_under_a_config_that_sets_every_field_is_refused(copied: Path) -> None:
    values = TrainConfig().to_dict()
    every = {name: value for name, value in {**values, **values["model"]}.items() if name in settable_fields()}
    with pytest.raises(InputError, match="--preset coco_l14: without effect, every field is set"):
        request(copied, copied / "out", preset="coco_l14", overrides=every)
    every.pop("tau")
    assert request(copied, copied / "out", preset="coco_l14", overrides=every).settings["epochs"] == values["epochs"]


@pytest.mark.parametrize("start", [train, lambda asked: planned_run(asked, cpus=1)], ids=["a run", "a sweep's trial"])
def test_a_first_epoch_in_the_order_of_a_plan_is_of_one_whole_dataset(
    world: Path, tmp_path: Path, start: Callable[[TrainRequest], object]
) -> None:
    asked = request(world, tmp_path / "out", overrides={"first_epoch": "plan"})
    another = shutil.copytree(world / "data", tmp_path / "another")
    for data in (f"{asked.data}=0.5", (str(asked.data), str(another))):
        with pytest.raises(InputError, match="first_epoch plan: takes one dataset without a weight"):
            start(dataclasses.replace(asked, data=data))
    with pytest.raises(InputError, match=r"first_epoch plan: \S+/data has no plan\.json; use first_epoch shuffled"):
        start(asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus_per_worker": 0.0}, "--gpus-per-worker 0: must be more than 0 and at most 1"),
        ({"gpus_per_worker": 1.5}, r"--gpus-per-worker 1\.5: must be more than 0 and at most 1"),
        ({"gpus_per_worker": 0.5}, r"--gpus-per-worker 0\.5: a share is for one worker.*; add --num-workers 1"),
        ({"gpus_per_worker": 0.5, "num_workers": (1, 2)}, "add --num-workers 1"),
        ({"gpus_per_worker": 0.5, "num_workers": 1, "device": "cpu"}, "without effect with --device cpu"),
    ],
)
def test_a_gpu_share_that_cannot_be_is_refused(world: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        request(world, tmp_path / "run", **settings)


def test_a_gpu_share_of_a_cluster_without_a_gpu_is_refused(world: Path, ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gpus-per-worker 0\.5: the cluster has no GPU; leave it out"):
        train(request(world, tmp_path / "run", gpus_per_worker=0.5, num_workers=1))


def test_workers_that_the_cluster_cannot_place_are_refused(world: Path, ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--num-workers 8 with 1 CPUs each: the cluster has 2 CPUs"):
        train(request(world, tmp_path / "out", num_workers=8, overrides={"grad_accumulation": 1}))
    with pytest.raises(
        InputError, match=r"--num-workers 3: batch size 8 .* possible are 1, 2, 4, or change batch_size"
    ):
        train(request(world, tmp_path / "other", num_workers=3))
    with pytest.raises(InputError, match=r"--num-workers 5:7: batch size 8 .* cannot be divided evenly"):
        train(request(world, tmp_path / "other", num_workers=(5, 7)))
    with pytest.raises(InputError, match="--num-workers 1:4: no nodes come to this machine"):
        train(request(world, tmp_path / "other", num_workers=(1, 4)))
    with pytest.raises(InputError, match=r"compile = 'default': for GPUs; .* set compile=none"):
        train(request(world, tmp_path / "compiled", overrides={"compile": "default", "grad_accumulation": 1}))
    assert not any(tmp_path.iterdir()), "a refused run left something behind"


def test_scenes_of_the_fixture_can_be_told_apart() -> None:
    """The fixture's pictures differ where their captions do, or nothing above could be learnt."""
    captions: dict[bytes, str] = {}
    for index in range(50):
        caption, image = scene(index)
        assert captions.setdefault(np.asarray(image).tobytes(), caption) == caption


def test_features_of_another_activation_are_not_mixed(world: Path, copied: Path, tmp_path: Path) -> None:
    """The same weights, and so the same CLIP head, run with GELU and with QuickGELU."""
    folders = [tmp_path / "gelu", tmp_path / "quick_gelu"]
    for folder in folders:
        shutil.copytree(copied / "data", folder)
        document = json.loads((folder / "dataset.json").read_text())
        document["spec"]["clip"]["activation"] = folder.name
        (folder / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"another CLIP.*activation: gelu -> quick_gelu"):
        open_training_sets([DataSource(str(folder)) for folder in folders])
    open_training_sets([DataSource(str(copied / "data")), DataSource(str(folders[0]))])  # one did not record it


class Interrupted(Exception):
    """Stands for a kill."""


def test_times_are_of_all_attempts_of_an_epoch_and_the_time_left_counts_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 s a step, 10 steps an epoch, 100 s a validation, a checkpoint every 4 steps; killed after step 6."""
    now, made, saved, said, rows = [0.0], [0], [], [], []
    for module in ("pcm.line_timer", "cluster.training.loop"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step(batch: object, number: int) -> tuple[torch.Tensor, float]:
        if made[0] == 6 and not said.count("killed"):
            said.append("killed")
            raise Interrupted
        made[0] += 1
        now[0] += 5
        return torch.tensor(1.0), 0.1

    def validate(*given: object, **options: object) -> float:
        now[0] += 100
        return 0.5

    def batches(epoch: int, start_step: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(step=k, last=k == 9, epoch=epoch, nbytes=1) for k in range(start_step, 10)]

    monkeypatch.setattr("cluster.training.loop.validation_cider", validate)
    nothing = lambda *given, **options: None  # noqa: E731
    worker: Any = SimpleNamespace(
        progress=TrainingState(), num_workers=1, out=open_store(tmp_path), average=None, vocabulary=None, step=step,
        config=SimpleNamespace(epochs=2, batch_size=8, grad_accumulation=1, validation_beam_size=1),
        run=SimpleNamespace(checkpoint_every_steps=4), module=SimpleNamespace(train=nothing),
        device=torch.device("cpu"),
        data=SimpleNamespace(
            is_open=True, plan=None, validation=None, steps_per_epoch=lambda: 10, batches=batches, open=nothing
        ),
        checkpoints=SimpleNamespace(save=lambda metrics, at, is_best: saved.append(json.dumps(vars(at)))),
        reporter=SimpleNamespace(
            say=said.append, track=nothing, write_losses=LossLog.write, write_metrics=rows.append
        ),
    )  # fmt: skip
    with pytest.raises(Interrupted):
        _train_and_validate(worker)
    assert said[0].endswith("1.6 samples/s, ETA 1 min 30 s without validation")
    worker.progress = TrainingState(**json.loads(saved[-1]))
    assert (worker.progress.step, worker.progress.seconds) == (4, 20)
    _train_and_validate(worker)
    assert rows[-1][0] | {"seconds": 50.0, "validation_seconds": 100.0, "samples_per_second": 1.6} == rows[-1][0]
    said.clear()
    _train_and_validate(worker)
    assert said[0].endswith("ETA 2 min 20 s"), "eight steps and a validation"
    assert rows[-1][1]["seconds"] == 50.0
