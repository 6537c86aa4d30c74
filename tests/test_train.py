"""Training runs through Ray Train: what they write, that they resume exactly, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from seaweedfs import S3Server
from tiny_dataset import NO_NOISE, TINY, scene, write_dataset, write_pictures

from cluster.dataset import load_manifest
from cluster.evaluate import local_checkpoint
from cluster.loader import split_holdout
from cluster.pictures import PictureSource
from cluster.storage import open_store
from cluster.train import TrainingFailed, TrainRequest, train
from cluster.trainconfig import TrainConfig
from cluster.trainloop import step_seed
from pcm.captioner import Captioner
from pcm.errors import InputError

ROWS = 72
EPOCHS = 3
#: Losses after some steps on 1 and 2 workers: float32 sums in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """data/, pictures/ and references.csv."""
    folder = tmp_path_factory.mktemp("train")
    write_dataset(folder / "data", tiny_clip, rows=ROWS)
    write_pictures(folder / "pictures", count=10)
    return folder


def request(world: Path, out: Path, **settings) -> TrainRequest:
    overrides = TINY | {"epochs": EPOCHS} | settings.pop("overrides", {})
    return TrainRequest(data=str(world / "data"), out=str(out), overrides=overrides, cpus_per_worker=1, **settings)


def real_pictures(world: Path) -> PictureSource:
    return PictureSource(images=str(world / "pictures"), references=str(world / "references.csv"))


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def science(out: Path) -> list[tuple]:
    """metrics.jsonl without its times."""
    return [tuple(row[name] for name in ("epoch", "step", "loss", "lr", "CIDEr")) for row in history(out)]


@pytest.fixture(scope="module")
def trained(world: Path, _ray_at_end: None) -> Path:
    """A run with dropout and noise, validated on real pictures."""
    from cluster.session import start_ray

    start_ray(num_cpus=2)
    out = world / "run"
    summary = train(request(world, out, validation=real_pictures(world)))
    (world / "summary.json").write_text(json.dumps(summary))
    return out


def test_a_run_is_summarised_by_its_best_epoch(trained: Path, world: Path) -> None:
    summary = json.loads((world / "summary.json").read_text())
    rows = history(trained)
    assert summary["epochs"] == len(rows) == EPOCHS
    assert summary["steps"] == rows[-1]["step"] == EPOCHS * -(-ROWS // TINY["batch_size"])
    assert summary["best"] == max(rows, key=lambda row: row["CIDEr"])
    assert summary["checkpoint"] == str(trained / "best")


def test_the_loss_falls(trained: Path) -> None:
    losses = [row["loss"] for row in history(trained)]
    assert losses[-1] < 0.8 * losses[0]


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
    assert json.loads((trained / "best/config.json").read_text())["metrics"] == max(
        history(trained), key=lambda row: row["CIDEr"]
    )


def test_a_folder_with_a_run_is_not_overwritten(trained: Path, world: Path) -> None:
    with pytest.raises(InputError, match="holds a finished run; add --resume"):
        train(request(world, trained, validation=real_pictures(world)))


def test_resuming_a_finished_run_changes_nothing(trained: Path, world: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    summary = train(request(world, trained, validation=real_pictures(world), resume=True))
    assert summary["best"] == json.loads((world / "summary.json").read_text())["best"]
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resuming_with_other_settings_is_refused_with_the_difference(trained: Path, world: Path) -> None:
    changed = request(world, trained, resume=True, validation=real_pictures(world), overrides={"batch_size": 4})
    with pytest.raises(InputError, match=r"begun otherwise \(batch_size: 8 -> 4"):
        train(changed)
    with pytest.raises(InputError, match="validation: "):
        train(request(world, trained, resume=True))


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained: Path, world: Path, run_job) -> None:
    out = world / "killed"
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    arguments = [
        *("--data", world / "data", "--out", out, "--epochs", EPOCHS, *settings, "--cpus-per-worker", 1),
        *("--val-images", world / "pictures", "--val-references", world / "references.csv"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (out / "metrics.jsonl").exists() or not history(out):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done_before = len(history(out))
    assert done_before < EPOCHS

    refused = run_job("train", *arguments)
    assert refused.returncode == 2 and refused.stderr.strip().splitlines()[-1].endswith("or give another --out")
    resumed = run_job("train", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch" in resumed.stderr
    assert resumed.summary["epochs"] == EPOCHS
    assert science(out) == science(trained)
    assert (out / "best/model.safetensors").read_bytes() == (trained / "best/model.safetensors").read_bytes()


def test_a_run_can_live_on_an_object_store(world: Path, run_job, s3: S3Server) -> None:
    data, out = open_store(f"{s3.uri}/train/data"), f"{s3.uri}/train/run"
    for file in (world / "data").rglob("*"):
        if file.is_file():
            data.write_bytes(file.relative_to(world / "data").as_posix(), file.read_bytes())
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    done = run_job("train", "--data", data.root, "--out", out, "--epochs", 1, *settings, "--cpus-per-worker", 1)
    assert done.returncode == 0, done.stderr
    assert done.summary["checkpoint"] == f"{out}/best"
    keys = open_store(out).list()
    assert {"config.json", "metrics.jsonl", "checkpoints/epoch-001/optimizer.pt"} <= set(keys)
    assert Captioner.load(local_checkpoint(out), device="cpu").caption([scene(0)[1]])[0].caption


def test_two_workers_learn_what_one_learns(world: Path, ray_session: None) -> None:
    """Same global batches, same losses: without dropout nothing else is random."""
    slow = {"epochs": 2, "warmup_steps": 400, **NO_NOISE}
    runs = []
    for num_workers in (1, 2):
        out = world / f"workers{num_workers}"
        train(request(world, out, num_workers=num_workers, overrides=slow))
        runs.append(history(out))
    for one, two in zip(*runs, strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=TOLERANCE)


def test_a_loss_that_is_no_number_stops_the_run(world: Path, ray_session: None, tiny_clip: Path) -> None:
    store = open_store(world / "data")
    keys = [shard["key"] for shard in load_manifest(store).shards]
    config = TrainConfig().with_overrides(TINY)
    training, _ = split_holdout(
        store, keys, fraction=config.holdout_fraction, limit=config.holdout_limit, seed=config.seed
    )
    bad = int(training.rows[0][0])
    write_dataset(world / "nan", tiny_clip, rows=ROWS, nan_row=bad)
    broken = TrainRequest(data=str(world / "nan"), out=str(world / "nan-run"), overrides=TINY, cpus_per_worker=1)
    with pytest.raises(TrainingFailed, match=rf"loss is nan in epoch 1, step \d+, .*{bad:09d}-00"):
        train(broken)
    assert not (world / "nan-run/best").exists()


def test_step_seeds_differ_by_run_rank_and_step() -> None:
    seeds = {step_seed(seed, rank, step) for seed in range(3) for rank in range(3) for step in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A dataset that a test may break."""
    shutil.copytree(world / "data", tmp_path / "data")
    return tmp_path


def test_an_unfinished_dataset_is_refused(copied: Path) -> None:
    (copied / "data/dataset.json").unlink()
    (copied / "data/plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"an unfinished dataset \(no dataset\.json\)"):
        train(request(copied, copied / "out"))


@pytest.mark.parametrize("key", ["vocabulary.txt", "concepts.safetensors", "clip_head.safetensors"])
def test_a_dataset_without_its_vocabularies_is_refused(copied: Path, key: str) -> None:
    (copied / "data" / key).unlink()
    with pytest.raises(InputError, match=f"has no {key}"):
        train(request(copied, copied / "out"))


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


def test_preset_and_config_exclude_each_other(copied: Path) -> None:
    with pytest.raises(InputError, match="give one of the two"):
        train(request(copied, copied / "out", preset="coco_l14", config="config.json"))


def test_workers_that_the_cluster_cannot_place_are_refused(world: Path, ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--num-workers 8 with 1 CPUs each: the cluster has 2 CPUs"):
        train(request(world, tmp_path / "out", num_workers=8))
    with pytest.raises(InputError, match="batch size 8: cannot be divided evenly among 3 workers"):
        train(request(world, tmp_path / "other", num_workers=3))


def test_scenes_of_the_fixture_can_be_told_apart() -> None:
    """The fixture's pictures differ where their captions do, or nothing above could be learnt."""
    captions: dict[bytes, str] = {}
    for index in range(50):
        caption, image = scene(index)
        assert captions.setdefault(np.asarray(image).tobytes(), caption) == caption
