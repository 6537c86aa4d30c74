"""jobs.featurise --data: the pictures, ids, captions and seeds of a dataset, another CLIP's scores and features."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset import read_dataset
from cluster.dataset.derived import claim
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.verify import verify
from cluster.generation.limits import FaultPolicy
from cluster.generation.pinning import clip_spec
from cluster.generation.pools import Pools
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.monitor import RunMonitor, start_monitor
from cluster.ingest.another_clip import (
    _FAULTS,
    _featurise_on_ray,
    featurise_dataset,
    keep_spec,
    lineage_of,
    missing_shards,
)
from cluster.ingest.featurise_again import WORK, FeaturiseAgain, ReadPictures, WriteFeaturised, read_facts
from cluster.ingest.request import FeaturiseRequest
from cluster.only_job import MAKES, only_job
from cluster.report.make import make_report
from cluster.report.request import ReportRequest
from cluster.store.store import Store, open_store
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError, StoreFailure
from pcm.images import open_image
from pcm.spec import ClipSpec
from pcm.text.concepts import ConceptVocabulary, embed
from tests.helpers.featurised import FailsOnOne, featurise_in_process
from tests.helpers.job_runs import JobRun, kill_once
from tests.helpers.paths import ROOT
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.helpers.tiny_models import save_tiny_clip
from tests.helpers.waiting import all_cpus_held_until, wait_until

CALL = Callable[..., JobRun]


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other weights and another width than tiny_clip."""
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "other", seed=5, width=96)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    scores = np.random.default_rng(2).integers(10, 45, 40) / 100
    return write_dataset(tmp_path_factory.mktemp("data") / "drawn", tiny_clip, rows=40, shard_size=7, scores=scores)


def test_pictures_ids_captions_and_seeds_stay_and_scores_and_features_are_the_other_clips(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    made = featurise_in_process(dataset, tmp_path / "out", other_clip)
    assert made is not None and made.stored == 40 and not made.is_view
    before, after = list(read_dataset(dataset)), list(read_dataset(tmp_path / "out"))
    encoder = ClipEncoder(str(other_clip))
    images = encoder.encode_images([open_image(row.image_bytes, name=row.sample_id) for row in after])
    texts = encoder.encode_texts([str(row.caption) for row in after])
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for name in ("sample_id", "caption", "image_bytes"):  # the seed is in the fingerprint
            assert getattr(new, name) == getattr(old, name)
        np.testing.assert_allclose(new.global_feature, images.global_feature[number], atol=2e-3)
        np.testing.assert_allclose(new.patch_features, images.patch_features[number], atol=2e-2, rtol=1e-2)
        assert new.clip_score == pytest.approx(float(images.global_feature[number] @ texts[number]), abs=1e-5)
    assert (made.features.patch_dim, made.features.num_patches) == (96, 16)
    lineage = load_manifest(open_store(tmp_path / "out")).lineage
    assert lineage is not None and (lineage.method, lineage.rows_in) == ("featurise", 40)
    assert lineage.sources[0].path == str(dataset)
    proof = verify(open_store(tmp_path / "out"))
    assert proof["ok"] and proof["stored"] == 40


def test_the_fingerprint_is_that_of_the_rows_whatever_the_clip(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    all_rows = curate(CurateRequest(data=(str(dataset),), out=str(tmp_path / "all")))
    made = featurise_in_process(dataset, tmp_path / "out", other_clip)
    assert made is not None and made.fingerprint == all_rows["fingerprint"]


def test_concepts_keep_their_names_and_words_stay(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    featurise_in_process(dataset, tmp_path / "out", other_clip)
    old, new = (ConceptVocabulary.load(place / "concepts.safetensors") for place in (dataset, tmp_path / "out"))
    assert new.names == old.names and new.source == old.source
    np.testing.assert_allclose(new.embeddings, embed(old.names, ClipEncoder(str(other_clip)).encode_texts), atol=1e-5)
    assert (tmp_path / "out" / "vocabulary.txt").read_bytes() == (dataset / "vocabulary.txt").read_bytes()


def test_a_view_is_featurised_with_its_own_captions_and_weights(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    curate(CurateRequest(data=(str(dataset),), out=str(tmp_path / "view"), drop_lowest=0.3))
    made = featurise_in_process(tmp_path / "view", tmp_path / "out", other_clip)
    assert made is not None and made.stored == 28
    assert [row.sample_id for row in read_dataset(tmp_path / "out")] == [
        row.sample_id for row in read_dataset(tmp_path / "view")
    ]
    assert made.fingerprint == load_manifest(open_store(tmp_path / "view")).fingerprint
    assert verify(open_store(tmp_path / "out"))["ok"]


def test_a_dataset_that_was_drawn_without_a_clip_gets_scores_words_and_concepts(
    other_clip: Path, tmp_path: Path
) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=5)
    made = featurise_in_process(tmp_path / "data", tmp_path / "out", other_clip)
    assert made is not None and made.lineage is not None
    assert made.lineage.facts["agreement"] is None, "there was no score before"
    assert "cat" in ConceptVocabulary.load(tmp_path / "out" / "concepts.safetensors").names
    assert all(row.clip_score for row in read_dataset(tmp_path / "out"))


def test_a_picture_on_which_the_clip_raises_is_left_out_and_counted(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    made = featurise_in_process(dataset, tmp_path / "out", other_clip, featurise=FailsOnOne)
    assert made is not None and made.lineage is not None
    assert made.stored == 39 and made.lineage.dropped == {"clip_error": 1}
    assert "000000009-00" not in {row.sample_id for row in read_dataset(tmp_path / "out")}
    assert verify(open_store(tmp_path / "out"))["ok"]


def test_what_is_there_is_not_made_again_and_the_result_is_the_same(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    whole = featurise_in_process(dataset, tmp_path / "whole", other_clip)
    featurise_in_process(dataset, tmp_path / "parts", other_clip, shards=3)
    store = open_store(tmp_path / "parts")
    lay_there = {key: os.stat(store.path(key)).st_mtime_ns for key in store.list("shards/")}
    assert len(lay_there) == 3
    resumed = featurise_in_process(dataset, tmp_path / "parts", other_clip)
    assert whole is not None and resumed is not None
    assert {key: os.stat(store.path(key)).st_mtime_ns for key in lay_there} == lay_there
    for number in range(len(whole.shards)):
        one, other = ((tmp_path / name / shard_key(number)).read_bytes() for name in ("whole", "parts"))
        assert one == other
    assert resumed.fingerprint == whole.fingerprint


class Killed(Exception):
    """Stands for kill -9."""


class DiesAtTheSecondWrite:
    """The store of a process that dies between the two objects of its first shard."""

    def __init__(self, store: Store) -> None:
        self._store, self._written = store, 0

    def write_bytes(self, key: str, data: bytes) -> None:
        self._written += 1
        if self._written == 2:
            raise Killed
        self._store.write_bytes(key, data)


def test_a_kill_between_facts_and_shard_is_made_good(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    whole = featurise_in_process(dataset, tmp_path / "whole", other_clip)
    featurise_in_process(dataset, tmp_path / "out", other_clip, shards=1)
    source, spec = open_dataset(open_store(dataset)), clip_spec(str(other_clip), device="cpu", dtype="float32")
    dying: Any = DiesAtTheSecondWrite(open_store(tmp_path / "out"))
    block = FeaturiseShard(spec)(ReadPictures(source)(pa.table({"shard": [1]})))
    with pytest.raises(Killed):
        WriteFeaturised(dying)(block)
    resumed = featurise_in_process(dataset, tmp_path / "out", other_clip)
    assert whole is not None and resumed is not None and resumed.fingerprint == whole.fingerprint


def test_a_shard_without_its_facts_is_named(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    featurise_in_process(dataset, tmp_path / "out", other_clip, shards=3)
    (tmp_path / "out" / WORK / "part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-000001.parquet: missing or damaged; delete shards/part-000001.parquet"):
        featurise_in_process(dataset, tmp_path / "out", other_clip)


def test_a_damaged_manifest_is_mended_by_the_same_command(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    """The facts of its shards were deleted when it was finished."""
    out = tmp_path / "out"
    whole = featurise_in_process(dataset, out, other_clip, clean=True)
    said = (out / MANIFEST_KEY).read_bytes()
    (out / MANIFEST_KEY).write_bytes(said[:100])
    assert missing_shards(open_dataset(open_store(dataset)), open_store(out)) == list(range(len(whole.shards)))
    assert featurise_in_process(dataset, out, other_clip) == whole and (out / MANIFEST_KEY).read_bytes() == said


def test_a_second_job_waits_and_finds_the_dataset(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It would store its own shards in the place of those that dataset.json speaks of."""
    caplog.set_level(logging.INFO)
    out = open_store(tmp_path / "out")
    asked = FeaturiseRequest(data=str(dataset), out=out.root, clip=str(other_clip))
    said: list[dict] = []
    second = threading.Thread(target=lambda: said.append(featurise_dataset(asked)))
    with only_job(out, MAKES, waits=True):
        featurise_in_process(dataset, tmp_path / "out", other_clip, shards=1)
        second.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        featurise_in_process(dataset, tmp_path / "out", other_clip, clean=True)
        made = {key: os.stat(out.path(key)).st_mtime_ns for key in out.list()}
    second.join(60)
    assert [(each["rows"], each["skipped"]) for each in said] == [(40, 40)] and "is complete" in caplog.text
    assert {key: os.stat(out.path(key)).st_mtime_ns for key in out.list()} == made


def test_a_job_of_another_cluster_that_has_finished_the_dataset_is_named(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    """Its facts are gone with that job's work, and none of its shards is to be deleted."""
    featurise_in_process(dataset, tmp_path / "out", other_clip, clean=True)
    with pytest.raises(InputError, match="out: a job of another cluster has finished this dataset meanwhile"):
        read_facts(open_store(tmp_path / "out"), 0)
    (tmp_path / "out" / MANIFEST_KEY).write_text("{")
    with pytest.raises(InputError, match=r"delete shards/part-000000.parquet beside it and run the same"):
        read_facts(open_store(tmp_path / "out"), 0)


def test_another_clip_or_source_is_not_mixed_with_what_was_begun(
    dataset: Path, other_clip: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    featurise_in_process(dataset, tmp_path / "out", other_clip, shards=2)
    with pytest.raises(InputError, match="was begun with other settings"):
        featurise_in_process(dataset, tmp_path / "out", tiny_clip)
    write_dataset(tmp_path / "else", tiny_clip, rows=40, shard_size=7, first=3)
    with pytest.raises(InputError, match="was begun of other data"):
        featurise_in_process(tmp_path / "else", tmp_path / "out", other_clip)
    on_gpu = ClipSpec(**{**clip_spec(str(other_clip), device="cpu", dtype="float32").to_dict(), "dtype": "bfloat16"})
    with pytest.raises(InputError, match="was begun on cpu in float32, and this is cpu in bfloat16"):
        keep_spec(open_store(tmp_path / "out"), on_gpu)


@pytest.mark.parametrize(("begun", "now"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_device_that_was_auto_is_named_on_another_cluster_and_can_be_given(
    dataset: Path,
    other_clip: Path,
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    begun: str,
    now: str,
) -> None:
    def goes_on(device: str, cluster: str, dtype: str = "auto") -> None:
        """Until CLIP would run."""

        def found(asked: str, *, before: str | None = None) -> str:
            return cluster if asked == "auto" else asked

        monkeypatch.setattr("cluster.ingest.another_clip.device_of_cluster", found)
        request = FeaturiseRequest(
            data=str(dataset), out=str(tmp_path / "out"), clip=str(other_clip), device=device, dtype=dtype
        )
        with pytest.raises(Reached):
            featurise_dataset(request)

    class Reached(Exception):
        pass

    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr("cluster.ingest.another_clip.missing_shards", reached)
    precision = {"cpu": "float32", "cuda": "bfloat16"}
    goes_on("auto", cluster=begun)
    with pytest.raises(InputError, match=rf"this is {now} .*give --device {begun} --dtype {precision[begun]}, or"):
        goes_on("auto", cluster=now)
    for dtype in ("auto", precision[begun]):
        goes_on(begun, cluster=now, dtype=dtype)
    goes_on("auto", cluster=begun)
    with pytest.raises(InputError, match=f"was begun on {begun} in {precision[begun]}, and this is {now}"):
        goes_on(now, cluster=begun)


def test_a_dataset_that_is_complete_is_not_given_for_one_of_another_device(
    dataset: Path, other_clip: Path, tmp_path: Path
) -> None:
    featurise_in_process(dataset, tmp_path / "out", other_clip)
    asked = FeaturiseRequest(data=str(dataset), out=str(tmp_path / "out"), clip=str(other_clip))
    assert featurise_dataset(replace(asked, device="cpu", dtype="float32"))["skipped"] == 40
    for other in ({"device": "cuda"}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match=r"was begun on cpu in float32, .*give --device cpu --dtype float32"):
            featurise_dataset(replace(asked, **other))


def test_a_damaged_source_is_named(tiny_clip: Path, other_clip: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", tiny_clip, rows=14, shard_size=7)
    broken = tmp_path / "data" / shard_key(1)
    broken.write_bytes(broken.read_bytes()[:-7] + b"another")
    with pytest.raises(InputError, match=r"part-000001.parquet: .*run jobs.verify"):
        featurise_in_process(tmp_path / "data", tmp_path / "out", other_clip)


def test_the_report_shows_how_far_the_two_clips_agree(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    made = featurise_in_process(dataset, tmp_path / "out", other_clip)
    assert made is not None and made.lineage is not None
    told = made.lineage.facts["agreement"]
    before, after = (
        np.array([row.clip_score for row in read_dataset(place)], np.float64) for place in (dataset, tmp_path / "out")
    )
    assert told["pearson"] == pytest.approx(np.corrcoef(before, after)[0, 1], abs=1e-6)
    make_report(ReportRequest(data=str(tmp_path / "out"), out=str(tmp_path / "report.html")))
    text = (tmp_path / "report.html").read_text()
    assert f"Pearson {told['pearson']:.3f}, Spearman {told['spearman']:.3f}, of 40 pairs" in text
    for example in told["examples"]:
        assert example["why"] in text
    (tmp_path / "out").rename(tmp_path / "moved")
    make_report(ReportRequest(data=str(tmp_path / "moved"), out=str(tmp_path / "moved.html")))
    assert told["examples"] and (tmp_path / "moved.html").read_text().count("<img") == text.count("<img")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shard-size", "3"), "--shard-size: without effect beside --data"),
        (("--captions", "c.txt"), "--captions: without effect beside --data"),
        (("--clip", "null"), "--clip null: has no features"),
        (("--clip", "/no/such/clip"), "CLIP model '/no/such/clip'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    dataset: Path, tmp_path: Path, call_job: CALL, monkeypatch: pytest.MonkeyPatch, arguments: tuple, said: str
) -> None:
    monkeypatch.setattr("cluster.ingest.another_clip.start_ray", lambda: pytest.fail("Ray was started"))
    ended = call_job("featurise", "--data", dataset, "--out", tmp_path / "out", *arguments)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()
    ended = call_job("featurise", "--out", tmp_path / "out")
    assert ended.returncode == 2 and "--images: missing" in ended.stderr


def test_on_ray_the_dataset_is_the_same_and_a_rerun_finds_it(
    dataset: Path, other_clip: Path, tmp_path: Path, call_job: CALL, ray_session: None
) -> None:
    alone = featurise_in_process(dataset, tmp_path / "alone", other_clip)
    arguments = ("--data", dataset, "--clip", other_clip, "--out", tmp_path / "out")
    ended = call_job("featurise", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.summary is not None and alone is not None
    assert ended.summary["fingerprint"] == alone.fingerprint
    assert (ended.summary["rows"], ended.summary["quarantined"], ended.summary["skipped"]) == (40, 0, 0)
    whole_job = 40 / ended.summary["seconds"]
    assert ended.summary["rows_per_second"] > 1.2 * whole_job, "without the start of actors and the loading of CLIP"
    for number in range(len(alone.shards)):
        assert (tmp_path / "out" / shard_key(number)).read_bytes() == (
            tmp_path / "alone" / shard_key(number)
        ).read_bytes()
    assert not open_store(tmp_path / "out").list(f"{WORK}/"), "nothing is left of the work"
    again = call_job("featurise", *arguments)
    assert again.summary is not None and again.summary["skipped"] == 40
    assert again.summary["fingerprint"] == ended.summary["fingerprint"]


def test_a_run_killed_after_its_last_shard_goes_on_with_counts_of_what_is_stored(
    dataset: Path, other_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurise_in_process(dataset, tmp_path / "out", other_clip, shards=6, featurise=FailsOnOne)
    place = "cluster.ingest.another_clip"
    monkeypatch.setattr(f"{place}.claimed_alone", lambda out, lineage, **options: nullcontext(claim(out, lineage)))
    monkeypatch.setattr(f"{place}.device_of_cluster", lambda *given, **options: "cpu")
    monkeypatch.setattr(f"{place}.run_with_clip", lambda run, *given, clip: run(*given))
    request = FeaturiseRequest(data=str(dataset), out=str(tmp_path / "out"), clip=str(other_clip))
    summary = featurise_dataset(request)
    found = [summary[name] for name in ("rows", "quarantined", "skipped", "rows_per_second")]
    assert found == [39, 1, 39, 0.0], "the row that CLIP refused was never stored"


def begun(dataset: Path, out: Path, clip: Path) -> tuple[OpenDataset, Store, ClipSpec]:
    """What a job has when it begins to make shards."""
    source, store = open_dataset(open_store(dataset)), open_store(out)
    claim(store, lineage_of(source, FeaturiseRequest(data=str(dataset), out=str(out), clip=str(clip)), None))
    return source, store, clip_spec(str(clip), device="cpu", dtype="float32")


def test_on_ray_a_derived_dataset_with_its_own_pictures_keeps_the_corpus_ids(
    other_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    """Exports, and given features, name the photos by them."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"id": "photo{at}.jpg#0", "caption": "a {at} bus"}}\n' for at in range(3)))
    make_dataset_in_process(tmp_path / "data", str(corpus), null_spec(), shard_size=3)
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "own"), materialise=True))
    assert not load_manifest(open_store(tmp_path / "own")).is_view
    one = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    _featurise_on_ray(*begun(tmp_path / "own", tmp_path / "out", other_clip), [0], one)
    before, after = (
        pq.read_table(tmp_path / name / shard_key(0), columns=["corpus_id"])["corpus_id"].to_pylist()
        for name in ("own", "out")
    )
    assert before == after and len(before) == 3 and "000000000-00" not in after


def same_shards(out: Path, alone: Path, count: int) -> bool:
    return all((out / shard_key(at)).read_bytes() == (alone / shard_key(at)).read_bytes() for at in range(count))


def test_a_load_that_fails_is_tried_again_and_a_process_that_is_killed_ends_nothing(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    failed, killed = tmp_path / "failed", tmp_path / "killed"

    class FailsOnceAndDiesOnce(FeaturiseShard):
        @staticmethod
        def load(spec: ClipSpec) -> ClipEncoder:
            if not failed.exists():
                failed.touch()
                raise OSError("a disk of this machine is bad")
            return FeaturiseShard.load(spec)

        def encode_rows(self, drawn: pa.Table, rows: list[int]):  # type: ignore[no-untyped-def]
            if self._shard == 1 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode_rows(drawn, rows)

    featurise_in_process(dataset, tmp_path / "alone", other_clip, shards=3)
    one = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    _featurise_on_ray(*begun(dataset, tmp_path / "out", other_clip), [0, 1, 2], one, featurise=FailsOnceAndDiesOnce)
    assert failed.exists() and killed.exists(), "else this says nothing"
    assert same_shards(tmp_path / "out", tmp_path / "alone", 3)


def test_an_actor_that_cannot_load_the_clip_is_left_out_and_named_and_the_other_makes_all(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    loads, refused = tmp_path / "loads", tmp_path / "refused"

    class LoadedByTheFirstAlone(FeaturiseShard):
        @staticmethod
        def load(spec: ClipSpec) -> ClipEncoder:
            try:
                loads.touch(exist_ok=False)
            except FileExistsError:
                refused.touch()
                raise InputError("no such folder on this machine") from None
            return FeaturiseShard.load(spec)

        def encode_rows(self, drawn: pa.Table, rows: list[int]):  # type: ignore[no-untyped-def]
            wait_until(refused.exists)
            time.sleep(0.5)  # the driver asks once a second who is left out
            return super().encode_rows(drawn, rows)

    featurise_in_process(dataset, tmp_path / "alone", other_clip, shards=6)
    two = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=2)
    _featurise_on_ray(
        *begun(dataset, tmp_path / "out", other_clip), list(range(6)), two, featurise=LoadedByTheFirstAlone
    )
    assert same_shards(tmp_path / "out", tmp_path / "alone", 6)
    named = [line for line in caplog.messages if line.startswith("an actor is left out, and others do its share: ")]
    assert len(named) == 1 and named[0].endswith(": no such folder on this machine")


def test_a_clip_that_no_actor_can_load_is_one_line(
    dataset: Path, other_clip: Path, tmp_path: Path, call_job: CALL, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeverLoads(FeaturiseShard):
        @staticmethod
        def load(spec: ClipSpec) -> ClipEncoder:
            raise InputError("no such folder on this machine")

    on_ray = partial(_featurise_on_ray, featurise=NeverLoads)
    monkeypatch.setattr("cluster.ingest.another_clip._featurise_on_ray", on_ray)
    ended = call_job("featurise", "--data", dataset, "--clip", other_clip, "--out", tmp_path / "out")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: no such folder on this machine (on ")
    assert not (tmp_path / "out" / MANIFEST_KEY).exists()


def test_the_next_shard_is_read_while_one_is_featurised(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_both, read = threading.Event(), ReadPictures.__call__
    found: list[bool] = []

    def reads(self: ReadPictures, block: pa.Table) -> pa.Table:
        if block["shard"][0].as_py() == 1:
            read_both.set()
        return read(self, block)

    class Waits(FeaturiseShard):
        def encode_rows(self, drawn: pa.Table, rows: list[int]):  # type: ignore[no-untyped-def]
            found.append(read_both.wait(30))
            return super().encode_rows(drawn, rows)

    monkeypatch.setattr(ReadPictures, "__call__", reads)
    monitor = start_monitor(_FAULTS)
    ray.get(monitor.begin_pass.remote([0, 1], 1, 1))
    actor = FeaturiseAgain(*begun(dataset, tmp_path / "out", other_clip), (monitor, _FAULTS), Waits)
    with ThreadPoolExecutor(2) as calls:  # as Ray Data calls it
        stored = list(calls.map(actor, [pa.table({"turn": [0]}), pa.table({"turn": [1]})]))
    assert [len(table) for table in stored] == [1, 1] and all(found)


def test_a_clip_is_held_once_and_its_actor_has_another_try(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU may be full for a moment, of the process before it; a store may fail once CLIP is loaded."""
    failures: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]
    loads: list[ClipSpec] = []

    class Counted(FeaturiseShard):
        @staticmethod
        def load(spec: ClipSpec) -> ClipEncoder:
            if failures:
                raise failures.pop()
            loads.append(spec)
            return FeaturiseShard.load(spec)

    def is_busy(*_: object) -> None:
        raise StoreFailure("the store is busy", passes=True)

    monitor = start_monitor(_FAULTS)
    actor = FeaturiseAgain(*begun(dataset, tmp_path / "out", other_clip), (monitor, _FAULTS), Counted)
    with pytest.raises(torch.OutOfMemoryError):  # no InputError, which would leave this actor out
        actor._load()
    with monkeypatch.context() as patch:
        patch.setattr("cluster.ingest.featurise_again.tell_encoder", is_busy)
        with pytest.raises(StoreFailure):
            actor._load()
    actor._load()
    assert len(loads) == 1


def test_of_two_that_made_a_shard_one_stores_it(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    source, out, spec = begun(dataset, tmp_path / "out", other_clip)
    monitor = start_monitor(_FAULTS)
    ray.get(monitor.begin_pass.remote([0], 2, 2))
    score, write = FeaturiseShard(spec), WriteFeaturised(out, monitor)
    first, second = (score(ReadPictures(source)(pa.table({"shard": [0], "turn": [turn]}))) for turn in (0, 1))
    assert len(write(first)) == 1 and out.exists(shard_key(0))
    out.delete(shard_key(0))
    assert len(write(second)) == 0 and not out.exists(shard_key(0))


@pytest.mark.slow
def test_a_wait_for_what_another_job_has_is_said(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    source, out, spec = begun(dataset, tmp_path / "out", other_clip)
    one = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    with all_cpus_held_until("waiting for") as said:
        _featurise_on_ray(source, out, spec, [0], one)
    assert "CPUs and 0 GPUs; the cluster has 2 and 0 now, of which 0 and 0 are free" in said[0]
    assert out.list("shards/") == [shard_key(0)]


@pytest.mark.slow
def test_a_clip_that_hangs_is_ended_and_its_shard_made_by_the_next_process(
    dataset: Path, other_clip: Path, tmp_path: Path, ray_session: None
) -> None:
    hung, woke = tmp_path / "hung", tmp_path / "woke"

    class HangsOnce(FeaturiseShard):
        def encode_rows(self, drawn: pa.Table, rows: list[int]):  # type: ignore[no-untyped-def]
            if not hung.exists():
                hung.touch()
                time.sleep(120)
                woke.touch()
            return super().encode_rows(drawn, rows)

    source, out, spec = begun(dataset, tmp_path / "out", other_clip)
    one = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    faults = FaultPolicy(batch_timeout=10, max_error_share=1.0)
    _featurise_on_ray(source, out, spec, [0, 1], one, faults=faults, featurise=HangsOnce)
    assert hung.exists() and not woke.exists() and len(out.list("shards/")) == 2


def test_pictures_on_which_the_clip_raises_stop_no_run_however_many() -> None:
    monitor = RunMonitor(_FAULTS)
    monitor.failed(1000, "this picture")
    assert monitor.begin_scoring(0) == ("", False)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_dataset(dataset: Path, other_clip: Path, tmp_path: Path) -> None:
    """kill -9 once the first shard, and once the fourth, is there; what lay there is not made again."""
    whole = featurise_in_process(dataset, tmp_path / "whole", other_clip)
    assert whole is not None
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.featurise", "--data", str(dataset), "--clip", str(other_clip)]
    command += ["--out", str(out)]
    store = open_store(out)
    for shards in (1, 4):
        kill_once(lambda enough=shards: len(store.list("shards/")) >= enough, command)
    if store.exists(MANIFEST_KEY):
        pytest.fail("the run was done before it could be killed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fingerprint"] == whole.fingerprint
    for number in range(len(whole.shards)):
        assert pq.read_table(out / shard_key(number)).equals(pq.read_table(tmp_path / "whole" / shard_key(number)))
