"""benchmarks.experiments: runs are known by what they depend on, done once, and reported as they are."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.experiments import dissect, report, results, runs
from benchmarks.experiments.scenes import thing_masks
from benchmarks.experiments.settings import EXPERIMENTS, PASSES, Domain, Variant
from benchmarks.experiments.worth import report as worth_report
from cluster.dataset.keys import MANIFEST_KEY
from pcm.embedded.making.world import Scene, Thing
from pcm.errors import InputError
from tests.helpers.tiny_dataset import TINY, png, scene, write_dataset

BASE_VARIANT = Variant(name="base", domain="tiny", clip_factor=None, overrides={"top_patches": 0})
FULL_VARIANT = Variant(name="both", domain="tiny")


def write_pictures(path: Path, *, first: int, count: int) -> str:
    scenes = [scene(index) for index in range(first, first + count)]
    rows = {
        "image_id": [f"{index}" for index in range(count)],
        "image": [{"bytes": png(image), "path": None} for _, image in scenes],
        "references": [[caption, f"there is {caption.lower()}"] for caption, _ in scenes],
    }
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    write_dataset(folder / "data" / "tiny" / "drawn", tiny_clip, rows=60)
    manifest = folder / "data" / "tiny" / "drawn" / MANIFEST_KEY
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "clip_score_mean": 0.5}))
    return folder


@pytest.fixture(autouse=True)
def tiny_world(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validation, test = (
        write_pictures(out / f"{name}.parquet", first=first, count=6) for name, first in (("val", 2000), ("test", 3000))
    )
    monkeypatch.setattr(runs, "DOMAINS", {"tiny": Domain("tiny", corpus="", validation=validation, test=test)})
    monkeypatch.setattr(runs, "BASE", {**TINY, "epochs": 1})


@pytest.mark.slow
def test_a_run_is_trained_tested_and_kept_once(out: Path) -> None:
    jobs = runs.planned([BASE_VARIANT, BASE_VARIANT], out, seeds=1)
    assert len(jobs) == 1
    assert runs.run_all(jobs, out, processes=1) == 1
    result = results.read_result(out, jobs[0].key)
    assert result is not None
    assert result["tests"]["tiny"]["CIDEr"] is not None
    assert result["tests"]["tiny"]["n"] == 6
    assert result["steps"] == -(-PASSES * 60 // TINY["batch_size"])
    assert result["document"]["train"]["model"]["top_patches"] == 0
    assert not list((out / "scratch").iterdir())
    assert runs.run_all(runs.planned([BASE_VARIANT], out, seeds=1), out, processes=1) == 0


def test_a_run_is_known_by_settings_seed_data_and_pictures(out: Path, tmp_path: Path, tiny_clip: Path) -> None:
    keys = [job.key for job in runs.planned([BASE_VARIANT, FULL_VARIANT], out, seeds=2)]
    assert len(set(keys)) == 4
    same = Variant(name="another name", domain="tiny", overrides={"top_concepts": 5})
    assert [job.key for job in runs.planned([same], out, seeds=2)] == keys[2:]
    untested = runs.planned([FULL_VARIANT], out, seeds=1, test=False)[0]
    assert untested.tests == {} and untested.key not in keys
    write_pictures(out / "test.parquet", first=4000, count=6)
    assert not set(keys) & {job.key for job in runs.planned([BASE_VARIANT, FULL_VARIANT], out, seeds=2)}


def test_w_is_relative_to_the_mean_cosine_and_a_fraction_keeps_the_steps(out: Path) -> None:
    weighted = runs.planned([Variant(name="w", domain="tiny", clip_factor=1.5)], out, seeds=1)[0].run
    assert weighted.config.clip_weight == 3.0
    part = runs.planned([Variant(name="part", domain="tiny", overrides={"fraction": 0.25})], out, seeds=1)[0].run
    assert part.data[0].weight == 4 * weighted.data[0].weight
    assert runs.planned([BASE_VARIANT], out, seeds=1)[0].run.config.clip_weight == runs.NO_CXE


def test_data_that_is_not_prepared_is_named(out: Path) -> None:
    with pytest.raises(InputError, match="rendered"):
        runs.planned([Variant(name="x", domain="tiny", data="rendered")], out, seeds=1)


def result(cider: float, seed: int) -> dict:
    metrics = {"CIDEr": cider, "Bleu_4": 0.3, "METEOR": 0.2, "ROUGE_L": 0.5}
    return {"seed": seed, "tests": {"first": metrics}, "validation": {"best": {"CIDEr": cider}}}


@pytest.mark.parametrize("module", [report, worth_report])
def test_the_results_have_what_is_read_off_them_now(module) -> None:  # type: ignore[no-untyped-def]
    assert module.READING.read_text().strip() in module.RESULTS.read_text()


def test_tables_hold_mean_spread_and_paired_difference() -> None:
    experiment = EXPERIMENTS["ablation"]
    by_name = {"base": (1.0, 1.2), "base + mix-up": (1.1, 1.2), "base + CXE": (1.3, 1.5), "both (PCM-Net)": ()}
    found = [(v, [result(c, s) for s, c in enumerate(by_name[v.name])]) for v in experiment.variants]
    text = report._section("ablation", experiment, found, seeds=2)
    rows = {
        row[1].strip(): [cell.strip() for cell in row]
        for row in csv.reader(text.splitlines(), delimiter="|")
        if len(row) > 5
    }
    assert rows["base"][3] == "110.0 ± 14.1" and rows["base"][7] == ""
    assert rows["base + mix-up"][7] == "+5.0 ± 7.1"
    assert rows["both (PCM-Net)"][2:4] == ["0 of 2", "-"]
    assert "3 of 3 pairs stand as in the paper" in text
    spread = np.sqrt(np.mean([50.0, 0.0]))  # variances of the differences of the two rows that have some
    assert f"below {2 * spread / np.sqrt(2):.1f} are" in text


def test_auc_counts_pairs_and_half_of_ties() -> None:
    random_numbers = np.random.default_rng(0)
    a, b = random_numbers.integers(0, 6, 30), random_numbers.integers(0, 5, 20)
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert dissect.auc(a, b) == pytest.approx(np.mean(pairs), abs=1e-4)


def test_patches_are_counted_on_the_things_they_lie_on() -> None:
    things = (Thing("dog", "", 16, 48, 32), Thing("cat", "", 48, 48, 32))
    pair = Scene("grass", things, "twemoji", "plain", 0, "first")
    masks = thing_masks(pair, side=64, grid=4)
    assert masks.sum(axis=1).tolist() == [4, 4]  # a quarter of 16 patches each
    dog, cat, ground = 8, 10, 0  # a patch of the left half's lower part, the right half's, and the sky
    names = ("dog", "cat", "car", "grass")
    textual = np.zeros((1, 16), bool)
    textual[0, [dog, cat, ground]] = True
    findings = dissect.Findings(
        concepts=np.array([[0, 3]]), probabilities=np.array([[0.5, 0.3]]), pair_patches=np.array([[dog, cat, ground]]),
        pair_concepts=np.array([[0, 2, 3]]), textual=textual,
    )  # fmt: skip
    found = dissect.patch_figures(findings, [pair], [[True, False]], names)
    assert found["selected_pairs_on_things"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["share_of_patches_on_things"] == 0.5
    assert found["pairs_that_name"] == pytest.approx(
        {"thing of the scene": 1 / 3, "other thing": 1 / 3, "other word": 1 / 3}, abs=1e-4
    )
    assert found["things"]["recognised"] == {
        "things": 1, "share_of_its_patches_made_textual": 0.25, "a_patch_says_its_name": 1.0,
        "a_patch_says_another_things_name": 0.0,
    }  # fmt: skip
    assert found["things"]["not recognised"]["a_patch_says_another_things_name"] == 1.0
    concepts = dissect.concept_figures(findings, ["a dog and a cat on the grass"], [pair], names)
    assert concepts["K=1"]["precision"] == 1.0 and concepts["K=1"]["recall"] == pytest.approx(1 / 3, abs=1e-4)
    assert concepts["K=2"]["things_recalled"] == 0.5


def test_scores_of_good_pictures_are_compared_with_those_of_bad_ones() -> None:
    random.seed(0)
    assert dissect.auc(np.array([0.9, 0.8]), np.array([0.1])) == 1.0
    assert dissect.auc(np.array([]), np.array([0.1])) is None
