"""jobs.refine --method best-of-n and redraw: real pictures drawn again, the best kept, the old ones untouched."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.curation.redraw.view import ATTEMPTS_KEY, REDRAW_PLAN_KEY, check_attempts, dry_run
from cluster.curation.refine import refine
from cluster.curation.refine_request import RefineRequest
from cluster.dataset import read_dataset
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, stats_key
from cluster.dataset.opened import open_dataset
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import store_vocabularies
from cluster.generation.stages.draw import DrawShard
from cluster.only_job import MAKES, only_job
from cluster.report.make import make_report
from cluster.report.request import ReportRequest
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.generation.drawing import UNGUARDED, Drawing, Guard, Request, TextToImage
from pcm.generation.loading import load_generator
from pcm.generation.seeds import redraw_id, redraw_seed
from pcm.spec import GeneratorSpec
from tests.helpers.job_runs import JobRun, kill_once
from tests.helpers.paths import ROOT
from tests.helpers.refined import Killed, redraw_in_process
from tests.helpers.stored import file_contents
from tests.helpers.tiny_generation import make_dataset_in_process, plan_dataset, tiny_spec, write_corpus
from tests.helpers.waiting import wait_until

CALL = Callable[..., JobRun]


@pytest.fixture(scope="module")
def models(tiny_t2i: Path, tiny_clip: Path) -> tuple[str, ...]:
    return ("--t2i", str(tiny_t2i), "--clip", str(tiny_clip))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_t2i: Path, tiny_clip: Path) -> Path:
    """24 captions, drawn."""
    folder = tmp_path_factory.mktemp("data")
    spec = tiny_spec(tiny_t2i, tiny_clip)
    store, plan, _ = make_dataset_in_process(folder / "drawn", write_corpus(folder), spec, shard_size=5)
    store_vocabularies(store, plan, encoder=ClipEncoder.from_spec(spec.clip))
    return folder / "drawn"


REDRAW = {"method": "redraw", "budget": 14.0, "rounds": 2}


def attempts(out: Path) -> list[dict]:
    return pq.read_table(out / ATTEMPTS_KEY).to_pylist()


def test_best_of_n_keeps_the_best_and_says_what_the_others_scored(dataset: Path, tmp_path: Path) -> None:
    before = file_contents(dataset)
    made = redraw_in_process(dataset, tmp_path / "out", method="best-of-n", best_of=3)
    assert file_contents(dataset) == before, "the old ones stay"
    table = attempts(tmp_path / "out")
    assert len(table) == 24 * 3
    stored = {row.sample_id: row for row in read_dataset(dataset)}
    shown = {row.sample_id: row for row in read_dataset(tmp_path / "out")}
    assert shown.keys() == stored.keys()
    moved = 0
    for sample_id, row in shown.items():
        mine = [each for each in table if each["sample_id"] == sample_id]
        assert [each["attempt"] for each in mine] == [0, 1, 2]
        assert mine[0]["clip_score"] == stored[sample_id].clip_score
        (kept,) = (each for each in mine if each["kept"])
        assert row.clip_score == kept["clip_score"] == max(each["clip_score"] for each in mine)
        assert row.caption == stored[sample_id].caption
        assert (row.image_bytes == stored[sample_id].image_bytes) == (kept["attempt"] == 0)
        moved += kept["attempt"] > 0
    assert made.lineage is not None and made.lineage.facts["moved"] == moved > 0
    assert made.is_view and verify(open_store(tmp_path / "out"))["ok"]
    for name in ("vocabulary.txt", "concepts.safetensors", "clip_head.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (dataset / name).read_bytes(), "the captions are the same"


def test_a_redraws_picture_is_that_of_its_seed(dataset: Path, tmp_path: Path) -> None:
    """Drawn alone by the generator itself, from the stated seed."""
    redraw_in_process(dataset, tmp_path / "out", **REDRAW)
    spec = load_manifest(open_store(dataset)).spec
    seeds = {each["sample_id"]: each["seed"] for each in attempts(tmp_path / "out") if each["attempt"] == 0}
    new = [each for each in attempts(tmp_path / "out") if each["attempt"] == 1 and each["kept"]]
    assert new
    shown = {row.sample_id: row for row in read_dataset(tmp_path / "out")}
    generator = load_generator(spec.generator)
    for each in new[:3]:
        row = shown[each["sample_id"]]
        seed = redraw_seed(redraw_id(each["sample_id"], seeds[each["sample_id"]], 1), str(row.caption))
        (drawing,) = generator.draw([Request(0, str(row.caption), seed)])
        assert each["seed"] == drawing.seed and drawing.image == row.image_bytes


@pytest.mark.parametrize(
    "options",
    [{"method": "redraw", "budget": 8.0}, {"method": "best-of-n", "best_of": 2}],
    ids=["pictures", "best-of-n"],
)
def test_pictures_are_drawn_where_nothing_tells_how_long_they_take(
    dataset: Path, tmp_path: Path, options: dict, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    (data / stats_key(1)).write_text("{")
    source = open_dataset(open_store(data))
    request = RefineRequest(data=str(data), out=str(tmp_path / "out"), **options)
    found = dry_run(source, request)
    assert found["pictures"] == (8 if request.method == "redraw" else 24) and found["expected_seconds"] is None
    assert "part-000001.json: damaged" in caplog.text
    with pytest.raises(InputError, match=r"part-000001\.json: damaged"):
        dry_run(source, RefineRequest(data=str(data), out="unused", method="redraw", budget=8, budget_in="gpu-seconds"))


def test_what_is_written_out_is_drawn_again_where_its_source_was_replaced(dataset: Path, tmp_path: Path) -> None:
    data, written = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "written"
    curate(CurateRequest(data=(str(data),), out=str(written), min_words=1, materialise=True))
    shutil.rmtree(data)
    plan_dataset(data, write_corpus(tmp_path), load_manifest(open_store(dataset)).spec)  # just begun
    made = redraw_in_process(written, tmp_path / "out", method="redraw", budget=2, rounds=1)
    assert made.lineage is not None and made.lineage.facts["drawn"] == 2
    assert made.lineage.facts["expected_seconds"] is None


def test_a_redraw_spends_its_budget_in_rounds_and_says_what_they_gained(dataset: Path, tmp_path: Path) -> None:
    made = redraw_in_process(dataset, tmp_path / "out", **REDRAW)
    assert made.lineage is not None
    facts = made.lineage.facts
    assert [point["drawn"] for point in facts["curve"]] == [0, 7, 14]
    means = [point["mean_score"] for point in facts["curve"]]
    assert means == sorted(means) and means[-1] > means[0]
    assert facts["mean_score_before"] == pytest.approx(means[0]) and facts["mean_score_after"] == means[-1]
    rows = [row.clip_score for row in read_dataset(tmp_path / "out")]
    assert sum(map(float, rows)) / len(rows) == pytest.approx(means[-1], abs=1e-6)
    planned = json.loads((tmp_path / "out" / REDRAW_PLAN_KEY).read_bytes())
    assert planned["pictures"] == 14 and planned["expected_gain"] > 0 and planned["expected_seconds"] > 0
    for number in range(2):
        proof = verify(open_store(tmp_path / "out" / "redraws" / f"round-{number:03d}"))
        assert proof["ok"] and proof["expected"] == 7
    assert made.lineage.settings["budget"] == 14.0
    make_report(ReportRequest(data=str(tmp_path / "out"), out=str(tmp_path / "report.html")))
    report = (tmp_path / "report.html").read_text()
    assert f"{means[-1]:.4f}" in report, "the curve"
    own = "Some of them lie in its own folder"
    assert own in report and str(tmp_path / "out" / "redraws" / "round-001") in report
    curate(CurateRequest(data=(str(tmp_path / "out"),), out=str(tmp_path / "view"), min_words=1))
    make_report(ReportRequest(data=str(tmp_path / "view"), out=str(tmp_path / "view.html")))
    report = (tmp_path / "view.html").read_text()
    assert own not in report and str(tmp_path / "out" / "redraws" / "round-001") in report, "what has to stay"


def test_the_lowest_are_drawn_again_and_again_until_the_budget_is_spent(dataset: Path, tmp_path: Path) -> None:
    """Two rows are the lowest tenth; a round of each, as often as it takes."""
    lowest = sorted(read_dataset(dataset), key=lambda row: row.clip_score)[:2]
    made = redraw_in_process(
        dataset, tmp_path / "out", method="redraw", budget=5.0, rounds=2, choose="lowest", lowest=0.1
    )
    assert made.lineage is not None
    assert [point["drawn"] for point in made.lineage.facts["curve"]] == [0, 2, 4, 5]
    first = {each["sample_id"] for each in attempts(tmp_path / "out") if each["attempt"] == 1}
    assert {row.sample_id for row in lowest} <= first


@pytest.mark.parametrize("killed_in", [0, 1])
def test_a_run_that_was_killed_goes_on_to_the_same_view(dataset: Path, tmp_path: Path, killed_in: int) -> None:
    whole = redraw_in_process(dataset, tmp_path / "whole", **REDRAW)
    with pytest.raises(Killed):
        redraw_in_process(dataset, tmp_path / "out", rounds_until_killed=killed_in, **REDRAW)
    assert not (tmp_path / "out" / MANIFEST_KEY).exists()
    lay_there = {
        key: os.stat(tmp_path / "out" / key).st_mtime_ns for key in file_contents(tmp_path / "out") if "/shards/" in key
    }
    assert lay_there
    resumed = redraw_in_process(dataset, tmp_path / "out", **REDRAW)
    assert resumed.fingerprint == whole.fingerprint
    assert {key: os.stat(tmp_path / "out" / key).st_mtime_ns for key in lay_there} == lay_there
    assert (tmp_path / "out" / ATTEMPTS_KEY).read_bytes() == (tmp_path / "whole" / ATTEMPTS_KEY).read_bytes()


def test_what_a_budget_buys_is_found_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "redraw", "budget": 1e4, "budget_in": "gpu-seconds", "rounds": 2}
    seconds = iter([1e3, 2e3])
    monkeypatch.setattr("cluster.curation.redraw.view.seconds_per_picture", lambda source: next(seconds))
    with pytest.raises(Killed):
        redraw_in_process(dataset, tmp_path / "out", rounds_until_killed=1, **options)
    made = redraw_in_process(dataset, tmp_path / "out", **options)
    assert made.lineage is not None and made.lineage.facts["drawn"] == 10


def test_a_round_that_was_changed_from_outside_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        redraw_in_process(dataset, tmp_path / "out", rounds_until_killed=1, **REDRAW)
    plan = tmp_path / "out" / "redraws" / "round-000" / PLAN_KEY
    document = json.loads(plan.read_bytes())
    document["corpus_fingerprint"] = document["segments"][0]["corpus_fingerprint"] = "another"
    plan.write_text(json.dumps(document))
    with pytest.raises(InputError, match="round-000: holds a round of other redraws"):
        redraw_in_process(dataset, tmp_path / "out", **REDRAW)


def test_a_round_is_finished_where_the_models_are_now(
    dataset: Path, tmp_path: Path, tiny_t2i: Path, tiny_clip: Path
) -> None:
    loaded = set()

    class Watched(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            loaded.add(spec.model)
            return load_generator(spec)

    alone = redraw_in_process(dataset, tmp_path / "alone", **REDRAW)
    with pytest.raises(Killed):
        redraw_in_process(dataset, tmp_path / "out", rounds_until_killed=1, **REDRAW)
    moved = tiny_spec(
        Path(shutil.copytree(tiny_t2i, tmp_path / "t2i")), Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    )
    made = redraw_in_process(dataset, tmp_path / "out", draw=Watched, spec=moved, **REDRAW)
    assert made.fingerprint == alone.fingerprint and loaded == {str(tmp_path / "t2i")}
    with pytest.raises(Killed):
        redraw_in_process(dataset, tmp_path / "other", rounds_until_killed=0, **REDRAW)
    other = dataclasses.replace(moved, generator=dataclasses.replace(moved.generator, num_inference_steps=3))
    with pytest.raises(InputError, match="round-000: holds a round of other redraws"):
        redraw_in_process(dataset, tmp_path / "other", spec=other, **REDRAW)


def test_verify_finds_another_seed_in_a_rounds_plan(dataset: Path, tmp_path: Path) -> None:
    redraw_in_process(dataset, tmp_path / "out", **REDRAW)
    folder = tmp_path / "out" / "redraws" / "round-000"
    part = next((folder / "plan").glob("*.parquet"))
    table = pq.read_table(part)
    seeds = pa.array([seed + 1 for seed in table["seed"].to_pylist()], pa.int64())
    at = table.schema.get_field_index("seed")
    part.write_bytes(parquet_bytes(table.set_column(at, table.schema.field("seed"), seeds)))
    proof = verify(open_store(folder))
    assert not proof["ok"] and "other seeds than its redraws have" in " ".join(proof["problems"])


class FailsOn(TextToImage):
    """The real generator, which makes no picture of one caption."""

    def __init__(self, spec: GeneratorSpec) -> None:
        self._inner = load_generator(spec)
        self.device_name = self._inner.device_name

    def draw(self, requests, guard: Guard = UNGUARDED) -> list[Drawing]:  # type: ignore[no-untyped-def]
        return [
            Drawing(b"", 0, 0, each.seed, 1, 4, "black_image") if "cow" in each.caption else drawing
            for each, drawing in zip(requests, self._inner.draw(requests, guard), strict=True)
        ]


class DrawsNoCow(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return FailsOn(spec)


def test_a_redraw_that_cannot_be_made_is_counted_and_the_old_picture_stays(dataset: Path, tmp_path: Path) -> None:
    made = redraw_in_process(dataset, tmp_path / "out", draw=DrawsNoCow, method="best-of-n", best_of=2)
    assert made.lineage is not None and made.lineage.facts["failed"] == 4
    old = {row.sample_id: row.image_bytes for row in read_dataset(dataset)}
    cows = [row for row in read_dataset(tmp_path / "out") if "cow" in str(row.caption)]
    assert len(cows) == 4 and all(row.image_bytes == old[row.sample_id] for row in cows)
    failed = [each for each in attempts(tmp_path / "out") if each["clip_score"] is None]
    assert len(failed) == 4 and not any(each["kept"] for each in failed)
    assert verify(open_store(tmp_path / "out"))["ok"]


def test_a_redraw_of_a_redraw_draws_other_pictures(dataset: Path, tmp_path: Path) -> None:
    """Also where the stored picture won before, whose seed is the same as then; straight or through another view, and
    whatever has become of the attempts of the steps before."""
    redraw_in_process(dataset, tmp_path / "once", method="best-of-n", best_of=2)
    first = attempts(tmp_path / "once")
    assert {each["attempt"] for each in first if each["kept"]} == {0, 1}, "some moved, some did not"
    (tmp_path / "once" / ATTEMPTS_KEY).unlink()
    redraw_in_process(tmp_path / "once", tmp_path / "twice", method="redraw", budget=24, rounds=1)
    second = attempts(tmp_path / "twice")
    assert {each["attempt"] for each in second} == {0, 2}
    curate(CurateRequest(data=(str(tmp_path / "twice"),), out=str(tmp_path / "curated"), drop_lowest=0.2))
    made = redraw_in_process(tmp_path / "curated", tmp_path / "third", method="best-of-n", best_of=3)
    third = attempts(tmp_path / "third")
    assert {each["attempt"] for each in third} == {0, 3, 4}
    seeds = [each["seed"] for table in (first, second, third) for each in table if each["attempt"]]
    assert len(set(seeds)) == len(seeds) == 24 + 24 + 2 * made.stored
    for name in ("twice", "third", "third/redraws/round-000"):
        assert verify(open_store(tmp_path / name))["ok"]


def test_a_killed_redraw_of_a_redraw_goes_on_to_the_same_view(dataset: Path, tmp_path: Path) -> None:
    redraw_in_process(dataset, tmp_path / "once", method="best-of-n", best_of=2)
    whole = redraw_in_process(tmp_path / "once", tmp_path / "whole", **REDRAW)
    with pytest.raises(Killed):
        redraw_in_process(tmp_path / "once", tmp_path / "out", rounds_until_killed=1, **REDRAW)
    assert redraw_in_process(tmp_path / "once", tmp_path / "out", **REDRAW).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "redraw"), "--budget: missing"),
        (("--method", "redraw", "--budget", "0"), "--budget 0: must be above 0"),
        (("--method", "redraw", "--budget", "1.5"), "--budget 1.5: must be a whole number of pictures"),
        (("--method", "redraw", "--budget", "5", "--budget-in", "money"), "--price-per-hour: give it with"),
        (("--method", "redraw", "--budget", "5", "--price-per-hour", "2"), "--price-per-hour: give it with"),
        (("--method", "redraw", "--budget", "5", "--lowest", "0.2"), "--lowest 0.2: needs --choose lowest"),
        (("--method", "redraw", "--budget", "5", "--keep", "0.5"), "--keep: without effect with --method redraw"),
        (("--method", "best-of-n", "--budget", "5"), "--budget: without effect with --method best-of-n"),
        (("--method", "best-of-n", "--best-of", "1"), "--best-of 1: must be at least 2"),
        (("--method", "sync", "--best-of", "3"), "--best-of: without effect with --method sync"),
        (("--method", "redraw", "--budget", "1e-9", "--budget-in", "gpu-seconds"), "--budget 1e-09: buys no picture"),
        (("--method", "redraw", "--budget", "1e12"), "--budget 1e+12: is 1,000,000,000,000 pictures for"),
        (("--method", "best-of-n", "--best-of", "2000"), "--best-of 2000: is"),
        (("--method", "best-of-n", "--dry-run"), "--dry-run: writes nothing; leave --out and --materialise out"),
        (("--method", "sync", "--dry-run"), "--dry-run: without effect with --method sync"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_ray_starts(
    dataset: Path, tmp_path: Path, call_job: CALL, models: tuple, monkeypatch: pytest.MonkeyPatch, arguments: tuple,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("cluster.session.start_ray", lambda **_: pytest.fail("Ray was started"))
    named = models[2:] if "sync" in arguments else models
    ended = call_job("refine", "--data", dataset, "--out", tmp_path / "out", *named, *arguments)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked", [{"method": "best-of-n", "best_of": 3}, {"method": "redraw", "budget": 6, "rounds": 2}]
)
def test_a_dry_run_says_what_the_job_would_say_and_draws_nothing(
    dataset: Path, tmp_path: Path, call_job: CALL, models: tuple, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, asked: dict,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    made = redraw_in_process(dataset, tmp_path / "out", **asked)
    monkeypatch.setattr("cluster.session.start_ray", lambda **_: pytest.fail("Ray was started"))
    before = file_contents(dataset)
    options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    ended = call_job("refine", "--data", dataset, *options, "--dry-run", *models)
    assert ended.returncode == 0 and ended.summary is not None, ended.stderr
    facts = made.lineage.facts  # type: ignore[union-attr]
    assert ended.summary["pictures"] == facts["drawn"] and ended.summary["fingerprint"] is None
    for name in ("mean_score_before", "expected_mean_score", "expected_seconds"):
        assert ended.summary[name] == pytest.approx(facts[name])
    assert facts["expected_seconds"] > 0 and file_contents(dataset) == before
    assert "pictures for 24 rows: expected mean clip score" in caplog.text
    ended = call_job("refine", "--data", dataset, *options, *models)
    assert ended.returncode == 2 and ended.stderr.startswith("error: --out: missing; or add --dry-run")


def test_a_generator_that_the_dataset_alone_names_is_not_opened(
    dataset: Path, tmp_path: Path, tiny_t2i: Path, call_job: CALL, models: tuple
) -> None:
    arguments = ("--data", dataset, "--out", tmp_path / "out", "--method", "best-of-n", *models[2:])
    ended = call_job("refine", *arguments)
    assert ended.returncode == 2 and f"give --t2i {tiny_t2i}" in ended.stderr
    ended = call_job("refine", *arguments, "--t2i", "embedded")
    assert ended.returncode == 2 and "give that one" in ended.stderr


def test_more_attempts_than_lie_between_two_redraws_are_refused() -> None:
    check_attempts(GeneratorSpec(model="null", revision="", max_attempts=4098), data="data")
    with pytest.raises(InputError, match="--max-attempts 4099; only with fewer than 4099"):
        check_attempts(GeneratorSpec(model="null", revision="", max_attempts=4099), data="data")


def test_a_second_job_waits_and_finds_the_view(
    dataset: Path, models: tuple, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = open_store(tmp_path / "out")
    asked = RefineRequest(data=str(dataset), out=out.root, t2i=models[1], clip=models[3], **REDRAW)  # type: ignore[arg-type]
    said: list[dict] = []
    second = threading.Thread(target=lambda: said.append(refine(asked)))
    with only_job(out, MAKES, waits=True):
        second.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        made = redraw_in_process(dataset, tmp_path / "out", **REDRAW)
        before = file_contents(tmp_path / "out")
    second.join(60)
    assert [each["fingerprint"] for each in said] == [made.fingerprint] and "is complete" in caplog.text
    assert file_contents(tmp_path / "out") == before


@pytest.mark.slow
def test_on_ray_the_view_is_the_same_and_a_rerun_finds_it(
    dataset: Path, tmp_path: Path, call_job: CALL, ray_session: None, models: tuple
) -> None:
    alone = redraw_in_process(dataset, tmp_path / "alone", **REDRAW)
    arguments = (
        "--data",
        dataset,
        "--out",
        tmp_path / "out",
        *models,
        "--method",
        "redraw",
        "--budget",
        14,
        "--rounds",
        2,
    )
    ended = call_job("refine", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.summary is not None and ended.summary["fingerprint"] == alone.fingerprint
    assert (ended.summary["pairs"], ended.summary["kept"], ended.summary["drawn"]) == (24, 24, 14)
    again = call_job("refine", *arguments)
    assert again.summary is not None and again.summary["curve"] == ended.summary["curve"]


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_to_the_same_view(dataset: Path, tmp_path: Path, models: tuple) -> None:
    """kill -9 in the middle of the first and of the second round."""
    whole = redraw_in_process(dataset, tmp_path / "whole", **REDRAW)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.refine", "--data", str(dataset), "--out", str(out), *models]
    command += ["--method", "redraw", "--budget", "14", "--rounds", "2"]
    for number in range(2):
        begun = open_store(out / "redraws" / f"round-{number:03d}")
        kill_once(partial(begun.list, "stats/"), command, seconds=300)
        assert not (out / MANIFEST_KEY).exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fingerprint"] == whole.fingerprint
    assert (out / ATTEMPTS_KEY).read_bytes() == (tmp_path / "whole" / ATTEMPTS_KEY).read_bytes()
