"""benchmarks.experiments.worth: the statistics hold what they promise, runs resume, and figures are what they say."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  - before diffusers
from benchmarks.experiments import results
from benchmarks.experiments.__main__ import ExperimentsRequest, run
from benchmarks.experiments.worth import archive, calibration, command, pictures, report, retrievers, runs
from benchmarks.experiments.worth.dissection import by_kinds
from benchmarks.experiments.worth.pictures import Pictures, said
from benchmarks.experiments.worth.settings import DRAWN, PAINTERS, PARTS, STEPS_OF_DATA, Part, Setting
from benchmarks.experiments.worth.statistics import estimate, seeds_needed, standard_error, t_quantile
from cluster.curation.sync.vectors import unit
from cluster.dataset.opened import open_dataset
from cluster.dataset.read import read_dataset
from cluster.dataset.rows import read_shard
from cluster.dataset.verify import verify
from cluster.store.store import open_store
from pcm import embedded
from pcm.clip.encoder import ClipEncoder
from pcm.embedded.making.captions import corpus_scenes
from pcm.embedded.making.classifier import Classifier, Verdict, judge
from pcm.embedded.making.world import FIRST, NOUNS, PLACES
from pcm.errors import InputError
from pcm.text.metrics import cider_each, cider_only
from tests.helpers.tiny_dataset import TINY, scene, write_dataset


def scores(rng: np.random.Generator, *, mean: float, seeds: int = 8, of_seed: float = 2.0) -> np.ndarray:
    """(seeds, 300) with the noise of seeds, of pictures, and of the two together."""
    pictures = 300
    return (
        mean
        + of_seed * rng.standard_normal((seeds, 1))
        + 10 * rng.standard_normal((1, pictures))
        + 10 * rng.standard_normal((seeds, pictures))
    )


def test_95_percent_intervals_hold_the_truth_about_so_often() -> None:
    rng = np.random.default_rng(1)
    held = [abs(found.mean - 3.0) <= found.half for found in (estimate(scores(rng, mean=3.0)) for _ in range(40))]
    assert 0.88 <= np.mean(held) <= 1.0
    some = [estimate(scores(rng, mean=0.0)).half for _ in range(10)]
    truth = 2.365 * np.sqrt(2.0**2 / 8 + 10**2 / 300 + 10**2 / (8 * 300))
    assert truth * 0.85 < np.mean(some) < truth * 1.25  # neither too narrow nor useless


def test_the_standard_error_counts_seeds_and_pictures_both() -> None:
    rng = np.random.default_rng(2)
    of_seeds = np.repeat(rng.standard_normal((8, 1)), 400, axis=1)
    assert standard_error(of_seeds) == pytest.approx(of_seeds[:, 0].std(ddof=1) / np.sqrt(8), rel=0.05)
    of_pictures = np.repeat(rng.standard_normal((1, 400)), 8, axis=0)
    assert standard_error(of_pictures) == pytest.approx(of_pictures[0].std(ddof=1) / np.sqrt(400), rel=0.05)


def test_one_seed_alone_tells_no_interval() -> None:
    found = estimate(np.ones((1, 50)))
    assert found.half == np.inf and not found.is_clear
    assert report.interval(found) == "+1.0 (one seed)"


def test_runs_of_which_only_means_were_kept_have_an_interval_over_seeds_alone() -> None:
    found = estimate(np.array([[1.0], [2.0], [3.0]]))
    assert found.mean == 2.0 and found.half == pytest.approx(t_quantile(2) / np.sqrt(3))
    assert report.interval(found) == "+2.0 ± 2.5 °"
    base, other = Setting("coarse"), Setting("coarse", network="base + CXE")
    whole = some_scores({}).with_means(a_result([1.0, 2.0], [1, 1]))
    assert whole["CIDEr"] == 150.0
    alone = {"CIDEr": 160.0, "noun recall": 1.0, "of recognised nouns": 1.0, "recognised_by": "first"}
    mixed = some_scores({base: {1: whole}, other: {1: alone}})
    assert mixed.difference(other, base, "CIDEr").tolist() == [[10.0]]
    assert mixed.difference(other, base, "of recognised nouns") is None, "another classifier found these nouns"
    assert report._change(mixed, other, base)[-1] == "-"


def test_a_clear_difference_is_bold() -> None:
    assert report.interval(replace(estimate(np.ones((2, 50))), half=0.5)) == "**+1.0 ± 0.5**"
    assert report.interval(replace(estimate(np.ones((2, 50))), half=1.5)) == "+1.0 ± 1.5"


def test_seeds_needed_are_the_fewest_that_tell() -> None:
    seeds = seeds_needed(3.0, difference=2.0)
    assert t_quantile(seeds - 1) * 3.0 / np.sqrt(seeds) <= 2.0 < t_quantile(seeds - 2) * 3.0 / np.sqrt(seeds - 1)
    assert t_quantile(15) > t_quantile(16) > 1.96


def a_result(cider: list[float], said: list[int]) -> dict:
    return {"cider": cider, "said": said, "seen_said": said}


TEST = Pictures(np.zeros((2, 1)), np.zeros((2, 1, 1)), [["a"], ["b"]], [["dog", "cat"], ["car"]], [["dog"], []])


def some_scores(results: dict[Setting, dict[int, dict]]) -> report.Scores:
    found = object.__new__(report.Scores)
    found.test, found.results, found.wanted = TEST, results, dict.fromkeys(results, 3)
    return found


def test_differences_are_of_the_same_seeds_and_pictures() -> None:
    base, other = Setting("coarse"), Setting("coarse", network="base + CXE")
    found = some_scores(
        {
            base: {1: a_result([1.0, 2.0], [1, 1]), 2: a_result([0.0, 0.0], [0, 0])},
            other: {2: a_result([0.5, 0.25], [2, 1]), 3: a_result([9.0, 9.0], [0, 0])},
        }
    )
    assert found.difference(other, base, "CIDEr").tolist() == [[50.0, 25.0]]
    assert found.difference(other, base, "noun recall").tolist() == [[100.0, 100.0]]
    assert found.difference(other, base, "of recognised nouns").shape == (1, 1)  # nothing is recognised in the second
    assert found.difference(other, Setting("fine"), "CIDEr") is None


def test_the_same_setting_again_is_paired_by_place() -> None:
    base, again = Setting("coarse"), Setting("coarse", again=True)
    found = some_scores({base: {2: a_result([1.0, 1.0], [0, 0])}, again: {102: a_result([2.0, 3.0], [0, 0])}})
    assert found.difference(again, base, "CIDEr").tolist() == [[100.0, 200.0]]


def test_gain_is_given_for_each_thousand_pictures_drawn_for_it() -> None:
    base = Setting("coarse")
    best = Setting("coarse", "best of 4")
    drawn = report.CAPTIONS * STEPS_OF_DATA["best of 4"].drawn
    gain = {seed: a_result([drawn / 1000, drawn / 1000], [0, 0]) for seed in (1, 2)}
    zero = {seed: a_result([0.0, 0.0], [0, 0]) for seed in (1, 2)}
    found = some_scores({base: zero, best: gain})
    assert report._per_picture(found, best, base) == "**+100.0 ± 0.0**"
    free = Setting("coarse", "SynC")
    assert report._per_picture(some_scores({base: zero, free: gain}), free, base) == "none drawn"


def test_captions_name_nouns_as_one_or_several() -> None:
    assert said("two dogs and a car on the grass", ["car", "dog", "sheep"]) == 2
    assert said("a pair of scissors", ["scissors"]) == 1
    assert said("a carrot", ["car"]) == 0


def test_all_settings_have_their_first_seed_before_any_has_its_second() -> None:
    found = list(command.by_seed([Setting("coarse"), Setting("coarse", again=True)], 2))
    assert [seed for _, seed in found] == [1, 101, 2, 102]


def test_every_row_of_data_names_what_it_is_made_of() -> None:
    assert all(step.of == DRAWN or step.of in STEPS_OF_DATA for step in STEPS_OF_DATA.values())
    folders = {pictures.data_folder(Path("/x"), "coarse", data) for data in (DRAWN, *STEPS_OF_DATA)}
    assert len(folders) == 1 + len(STEPS_OF_DATA)


def test_cider_of_each_picture_has_cider_as_its_mean() -> None:
    captions = {"1": "a red dog on the grass", "2": "a blue car", "3": "two cats"}
    references = {"1": ["a red dog"], "2": ["a green car on the street"], "3": ["two cats in a room"]}
    each = cider_each(captions, references)
    assert list(each) == ["1", "2", "3"]
    assert np.mean(list(each.values())) == pytest.approx(cider_only(captions, references))


def test_the_section_is_put_first_and_replaced_in_place() -> None:
    text = "# Title\n\nWords.\n\n## Old\n\nTable\n"
    once = results.with_section(text, "## New\n\nA")
    assert once.index("## New") < once.index("## Old")
    twice = results.with_section(once, "## New\n\nB")
    assert "B" in twice and "\nA" not in twice and twice.count(results.BEGIN) == 1
    assert twice.replace(results.section_of(twice), "").split() == text.split()


@pytest.fixture
def out(tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny dataset in the place of the coarse painter's, and its pictures as test pictures."""
    write_dataset(pictures.data_folder(tmp_path, "coarse"), tiny_clip, rows=40)
    monkeypatch.setattr(runs, "BASE", {**TINY, "ema_decay": 0.9})
    monkeypatch.setattr(runs, "clip_weight", lambda out, setting, *, weighted: 1.0 if weighted else 1e6)
    monkeypatch.setattr(command, "prepare_worth", lambda out, *, art: Path())
    monkeypatch.setattr(command, "data_figures", lambda out, painter, data: {})
    part = Part("A part", (Setting("coarse"), Setting("coarse", network="base + mix-up")))
    monkeypatch.setattr(command, "PARTS", {"part": part})
    folder = pictures.worth_folder(tmp_path) / "pictures"
    folder.mkdir(parents=True)
    rows = _rows_of(tmp_path)
    known = {
        "references": [[scene(2000 + n)[0].lower()] for n in range(6)],
        "nouns": [["dog"]] * 6,
        "recognised": [[]] * 6,
    }
    for name in ("test", "validation"):
        features = {"global_feature": rows.global_feature[:6], "patch_features": rows.patch_features[:6]}
        np.savez(folder / f"{name}.npz", **features, known=np.array(json.dumps(known)))
    monkeypatch.setattr(archive, "ARCHIVE", tmp_path / "worth.json")
    monkeypatch.setattr(calibration, "LOOKS", (2, 3))
    monkeypatch.setattr(calibration, "SEEDS", range(1, 2))
    return tmp_path


def _rows_of(out: Path):
    from cluster.dataset.documents import load_manifest
    from cluster.dataset.rows import Rows, read_rows
    from cluster.store.store import open_store

    store = open_store(pictures.data_folder(out, "coarse"))
    manifest = load_manifest(store)
    return Rows.concatenate([read_rows(store, shard, None, manifest.features) for shard in manifest.stored_shards])


def numbers(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "cpu_seconds"}


def test_a_run_comes_out_alike_and_is_known_by_what_decides_it(out: Path) -> None:
    how = {"steps": 3, "lr_factor": 0.5}
    first = runs.planned(Setting("coarse"), 1, out, **how)
    assert {first.key} & {
        runs.planned(Setting("coarse"), 2, out, **how).key,
        runs.planned(Setting("coarse"), 1, out, steps=4, lr_factor=0.5).key,
        runs.planned(Setting("coarse", network="base + mix-up"), 1, out, **how).key,
    } == set()
    made = runs.do_run(first, out, pictures.load_pictures(out, "test"))
    assert len(made["cider"]) == len(made["captions"]) == 6 and made["loss"]
    kept = results.read_result(pictures.worth_folder(out), first.key)
    again = runs.do_run(first, out, pictures.load_pictures(out, "test"))
    assert numbers(again) == numbers(json.loads(json.dumps(made))) == numbers(kept)


class Killed(BaseException):
    pass


def test_killed_in_the_middle_the_same_command_goes_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.worth(out, art=None, seeds=2, minutes=1e-9) == {"done_now": 0, "calibrated": False}
    assert calibration.calibrate(out, pictures.load_pictures(out, "validation"))
    real, begun = runs.Training.to_step, []

    def to_step(self: runs.Training, steps: int) -> None:
        begun.append(steps)
        real(self, 2)
        if len(begun) == 2:
            raise Killed
        real(self, steps)

    monkeypatch.setattr(runs.Training, "to_step", to_step)
    with pytest.raises(Killed):
        command.worth(out, art=None, seeds=2)
    assert command.progress(out, 2) == {"part": "1 of 4"}
    assert command.worth(out, art=None, seeds=2) == {"done_now": 3, "part": "4 of 4"}
    assert len(begun) == 5  # the first was not done again
    assert command.worth(out, art=None, seeds=2)["done_now"] == 0
    assert not list((pictures.worth_folder(out) / "results").glob("*.part"))


def test_with_an_empty_folder_it_goes_on_where_the_archive_ends(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PARTS", command.PARTS)
    judged = pictures.judge_folder(out)
    judged.mkdir()
    (judged / "figures.json").write_text(json.dumps({"single": 0.9, "both": 0.8, "three": 0.7}))
    monkeypatch.setattr(report, "_section", lambda out, scores: [str(scores.count(Setting("coarse")))])
    first = {"results": out / "RESULTS.md", "runs": archive.ARCHIVE}
    assert command.worth(out, art=None, seeds=1)["done_now"] == 2
    assert report.write_worth(out, seeds=1, **first) == {"worth_runs": 2, "worth_missing": 0}
    own = report.Scores(out, 1).matrix(Setting("coarse"), "CIDEr")
    folder = pictures.worth_folder(out)
    shutil.rmtree(folder / "results")
    (folder / "calibration.json").unlink()
    assert archive.read_archive().calibration is not None
    kept = report.Scores(out, 1)
    assert kept.matrix(Setting("coarse"), "CIDEr") == pytest.approx(own, abs=0.05)
    assert command.worth(out, art=None, seeds=2) == {"done_now": 2, "part": "4 of 4"}
    assert not (folder / "calibration.json").exists()
    shutil.rmtree(pictures.data_folder(out, "coarse"))
    assert report.write_worth(out, seeds=2, **first)["worth_runs"] == 2, "without the data, what the archive has"
    monkeypatch.setattr(command, "make_data", lambda *asked: pytest.fail("all runs are in the archive"))
    assert command.worth(out, art=None, seeds=1) == {"done_now": 0, "part": "2 of 2"}


def test_what_is_known_of_the_data_stays_in_the_archive(out: Path) -> None:
    archive.keep_figures(out, "coarse/drawn.json", {"rows": 40})
    archive.write_archive(archive.ARCHIVE, calibration=None, figures=archive.all_figures(out), records=[])
    shutil.rmtree(pictures.worth_folder(out) / "figures")
    assert archive.known_figures(out, "coarse/drawn.json") == {"rows": 40}
    assert archive.known_figures(out, "fine/drawn.json") is None
    archive.keep_figures(out, "coarse/drawn.json", {"rows": 41})
    assert (
        archive.known_figures(out, "coarse/drawn.json") == {"rows": 41} == archive.all_figures(out)["coarse/drawn.json"]
    )


def test_an_archive_of_another_version_is_not_gone_on_with(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"setting": {"painter": "coarse"}, "seed": 1, "steps": 3, "train": {"lr_factor": 0.8}, "version": 1}
    archive.write_archive(archive.ARCHIVE, calibration=None, figures={}, records=[run])
    assert len(archive.read_archive().records) == 1
    monkeypatch.setattr(archive, "VERSION", 0)
    assert not archive.read_archive().records


def test_one_seed_of_a_learning_rate_is_no_calibration(out: Path) -> None:
    path = pictures.worth_folder(out) / "calibration.json"
    rates = (*calibration.LR_FACTORS, 0.1, 0.2)
    path.write_text(json.dumps({str(rate): {**curve(rate, 1.0, 2.0), "seed": 1} for rate in rates[1:]}))
    assert not calibration.is_calibrated(out)
    with pytest.raises(InputError, match="calibration is not done"):
        calibration.chosen(out)
    path.write_text(json.dumps({str(rate): {**curve(rate, 1.0, 2.0), "seed": 1} for rate in rates}))
    assert calibration.is_calibrated(out)


def curve(factor: float, *cider: float) -> dict:
    return {"lr_factor": factor, "cider": dict(zip(map(str, calibration.LOOKS), cider, strict=True))}


def test_the_calibration_takes_the_best_rate_and_the_fewest_steps_near_its_best() -> None:
    slow = [curve(0.8, 50.0, 70.0, 80.0, 90.0), curve(0.8, 54.0, 74.0, 84.0, 94.0)]
    fast = [curve(1.6, 80.0, 91.0, 93.5, 93.0), curve(1.6, 80.0, 92.0, 94.5, 94.0)]
    assert calibration.choice([*slow, *fast]) == calibration.Chosen(1.6, 1200)  # 91.5 at 800 is more than 2 below 94
    assert calibration.choice([*slow, *(curve(1.6, 9.0, 9.0, 9.0, 9.0) for _ in fast)]).lr_factor == 0.8


def test_parts_that_are_not_made_are_said(out: Path, tmp_path: Path) -> None:
    shutil.rmtree(pictures.data_folder(out, "coarse"))
    folder = pictures.judge_folder(out)
    folder.mkdir()
    (folder / "figures.json").write_text(json.dumps({"single": 0.9, "both": 0.8, "three": 0.7}))
    results, kept = tmp_path / "RESULTS.md", tmp_path / "worth.json"
    made = report.write_worth(out, seeds=1, results=results, runs=kept)
    wanted = {(setting, seed) for part in PARTS.values() for setting in part.settings for seed in setting.seeds(1)}
    assert made == {"worth_runs": 0, "worth_missing": len(wanted)}
    text = results.read_text()
    assert text.count("not run") > 10 and "| fine | drawn | not made |" in text
    assert json.loads(kept.read_text())["runs"] == []


def test_a_noun_is_recognised_if_it_is_among_as_many_surest_as_the_picture_has(tmp_path: Path) -> None:
    folder = pictures.judge_folder(tmp_path)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({"model": Classifier().state_dict()}, folder / "judge.pt")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    order = np.argsort(-judge(folder, images).nouns, axis=1)
    names = [[NOUNS[index].name for index in row] for row in order]
    asked = [[names[0][0], names[0][1]], [names[1][0], names[1][30]]]
    assert pictures.recognised(tmp_path, images, asked) == [asked[0], [names[1][0]]]
    assert pictures.recognised(tmp_path, images, [[names[0][1]], [names[1][1]]]) == [[], []]


def test_the_coarse_painter_draws_what_fits_its_captions_worse() -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded.t2i_path())
    pipeline.set_progress_bar_config(disable=True)
    prompts = [caption for _, caption in corpus_scenes(random.Random(3), 16, FIRST)]
    encoder = ClipEncoder("embedded", device="cpu", batch_size=16)
    texts = encoder.encode_texts(prompts)
    score = {}
    for name, how in PAINTERS.items():
        drawn = pipeline(
            prompts, num_inference_steps=how.steps, guidance_scale=how.guidance_scale, height=how.side, width=how.side,
            generator=[torch.Generator().manual_seed(number) for number in range(len(prompts))],
        ).images  # fmt: skip
        assert {picture.size for picture in drawn} == {(how.side, how.side)}
        score[name] = float((encoder.encode_images(drawn).global_feature * texts).sum(axis=1).mean())
    assert score["coarse"] < score["fine"] - 0.01


def test_pictures_are_grouped_by_their_kinds_of_things() -> None:
    found = by_kinds(np.array([[1.0, 2.0, 3.0]]), [["dog"], ["cat", "car"], ["bus"]])
    assert {kinds: each.tolist() for kinds, each in found.items()} == {1: [[1.0, 3.0]], 2: [[2.0]]}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"what": "worth", "parts": ("coarse", "sepia")}, "sepia"),
        ({"what": "worth", "minutes": 0.0}, "--minutes"),
        ({"what": "worth", "captions": 5}, "--captions"),
        ({"what": "all", "minutes": 5.0}, "--minutes"),
        ({"what": "ablation", "captions": 7}, "--captions"),
        ({"what": "try", "judge": Path("/judge")}, "--judge"),
        ({"what": "report", "processes": 99}, "--processes"),
    ],
)
def test_what_has_no_effect_is_refused(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ExperimentsRequest(out=Path("/x"), **options)


def test_there_is_nothing_to_report_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to report"):
        run(ExperimentsRequest(what="report", out=tmp_path))


def test_pairs_that_a_classifier_found_are_a_view_that_holds(out: Path, tmp_path: Path) -> None:
    source = open_dataset(open_store(pictures.data_folder(out, "coarse")))
    columns = ["sample_id", "caption", "clip_score"]
    table = pa.concat_tables([read_shard(source.store, shard, columns) for shard in source.shards])
    table = table.append_column("weight", pa.array([1] * len(table))).append_column(
        "place", pa.array(range(len(table)))
    )
    features = unit(_rows_of(out).global_feature.astype(np.float32))
    rng = np.random.default_rng(0)
    captions = unit(rng.standard_normal((40, features.shape[1])))
    scenes = [retrievers.Named([noun.name], PLACES[number % len(PLACES)]) for number, noun in enumerate(NOUNS[:40])]
    pairs = retrievers.Pairs(source, table, np.zeros((40, 1)), scenes, captions, features)
    by_sight = unit(rng.standard_normal(pairs.by_words().shape))
    retrievers.write_pairs(pairs, by_sight, tmp_path / "view")
    view = open_dataset(open_store(tmp_path / "view"))
    rows = list(read_dataset(tmp_path / "view"))
    assert view.manifest.stored == len(rows) == 36 and verify(view.store)["ok"]
    assert view.manifest.lineage is not None and view.manifest.lineage.facts["moved"] > 18
    numbers = {name: number for number, name in enumerate(table["sample_id"].to_pylist())}
    for row in rows:
        shown = unit(np.asarray(row.global_feature, np.float32)[np.newaxis])[0]
        assert row.clip_score == pytest.approx(float(captions[numbers[row.sample_id]] @ shown), abs=1e-3)


def test_what_sync_makes_of_pairs_follows_what_finds_the_pictures() -> None:
    """Eight captions of one noun and one place each; the painter drew the next one's noun instead."""
    names = [noun.name for noun in NOUNS][:8]
    right, drawn = np.eye(8, dtype=np.float32), np.roll(np.eye(8, dtype=np.float32), 1, axis=1)
    shown = Verdict(np.pad(drawn, ((0, 0), (0, len(NOUNS) - 8))), np.arange(8))
    scenes = [retrievers.Named([name], place) for name, place in zip(names, PLACES[:8], strict=True)]
    seeing = retrievers.figures(right, drawn, right, scenes, shown)
    assert seeing["wrong_before"] == 1 and seeing["wrong_after"] == 0 and seeing["moved"] == 1
    assert seeing["wrong_places_before"] == 0 and seeing["wrong_places_after"] == 1, "it looks at nouns alone"
    believing = retrievers.figures(right, right, right, scenes, shown)  # takes each picture for what was asked for
    assert believing["wrong_after"] == 1 and believing["moved"] == 0 and believing["pictures"] == int(0.9 * 8)
    assert believing["wrong_places_after"] == 0
