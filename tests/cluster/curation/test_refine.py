"""jobs.refine: the view of what SynC chose, what is refused before the work, and going on after an interruption."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.curation.refine import refine
from cluster.curation.refine_request import RefineRequest
from cluster.curation.rows import read_index
from cluster.curation.sync.sentences import SentenceSpec, resolve_sentences
from cluster.curation.sync.settings import WORK
from cluster.curation.sync.view import FACTS, RECALL
from cluster.dataset import read_dataset
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import LINEAGE_KEY, MANIFEST_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import open_dataset
from cluster.dataset.rows import read_shard, read_weights
from cluster.dataset.verify import verify
from cluster.dataset.view import write_view
from cluster.only_job import MAKES, only_job
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from tests.helpers.featurised import FailsOnOne, featurise_in_process
from tests.helpers.job_runs import JobRun, kill_once, running
from tests.helpers.models_from_pip import minilm_folder
from tests.helpers.refined import sync_in_process
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_models import save_tiny_clip
from tests.helpers.waiting import wait_until

CALL = Callable[..., JobRun]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "drawn", tiny_clip, rows=60, shard_size=7)


def test_a_view_has_each_kept_caption_with_the_picture_it_chose(dataset: Path, tiny_clip: Path, tmp_path: Path) -> None:
    made = sync_in_process(dataset, tmp_path / "view", resolve_sentences(str(minilm_folder())), keep=0.75)
    assert made.stored == 45 and made.is_view
    whole = {row.sample_id: row for row in read_dataset(dataset)}
    pictures = {row.image_bytes: row for row in whole.values()}
    rows = list(read_dataset(tmp_path / "view"))
    texts = ClipEncoder(str(tiny_clip)).encode_texts([str(row.caption) for row in rows])
    moved = 0
    for row, text in zip(rows, texts, strict=True):
        assert row.caption == whole[row.sample_id].caption
        shown = pictures[row.image_bytes]
        np.testing.assert_array_equal(row.global_feature, shown.global_feature)
        np.testing.assert_array_equal(row.patch_features, shown.patch_features)
        cosine = float(text @ shown.global_feature.astype(np.float32))  # type: ignore[union-attr]
        assert row.clip_score == pytest.approx(cosine, abs=1e-3), "the score is of the new pair"
        moved += row.image_bytes != whole[row.sample_id].image_bytes
    facts = load_manifest(open_store(tmp_path / "view")).lineage.facts  # type: ignore[union-attr]
    assert facts["moved"] == moved > 0
    assert facts["pictures"] == len({row.image_bytes for row in rows})
    assert facts["mean_score_after"] == pytest.approx(np.mean([row.clip_score for row in rows]))
    assert facts["mean_score_before"] == pytest.approx(np.mean([row.clip_score for row in whole.values()]))
    lineage = load_manifest(open_store(tmp_path / "view")).lineage
    assert lineage is not None and (lineage.method, lineage.settings["method"]) == ("refine", "sync")
    assert facts["sentences"] == str(minilm_folder())
    assert lineage.settings["sentences"]["revision"] == resolve_sentences(str(minilm_folder())).revision
    (rule,) = lineage.rules
    assert (rule.rule, rule.setting, rule.dropped, len(rule.examples)) == ("keep", 0.75, 15, 6)
    gone = whole.keys() - {row.sample_id for row in rows}
    assert {example["sample_id"] for example in rule.examples} <= gone
    assert verify(open_store(tmp_path / "view"))["complete"]


def test_a_view_is_refined_like_any_dataset(dataset: Path, tmp_path: Path) -> None:
    sync_in_process(dataset, tmp_path / "once", SentenceSpec(model="clip"))
    twice = sync_in_process(tmp_path / "once", tmp_path / "twice", SentenceSpec(model="clip"))
    assert [store.path for store in twice.pictures] == [str(dataset)], "a view of a view points at the pictures"
    assert twice.stored == int(0.9 * 54) and verify(open_store(tmp_path / "twice"))["complete"]


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("groups_at_once", [1, 32])
def test_rows_stay_by_their_sample_ids_however_they_lie(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probes: int | None, groups_at_once: int
) -> None:
    """Of one dataset, and of a view of the same rows whose last 25 come first."""
    monkeypatch.setattr("cluster.curation.sync.ordered.GROUP_ROWS", 13)
    monkeypatch.setattr("cluster.curation.sync.vectors.GROUP_ROWS", 13)
    monkeypatch.setattr("cluster.curation.sync.ordered.GROUPS_AT_ONCE", groups_at_once)
    turned = turned_view(dataset, tmp_path, weight=np.arange(60) % 3 + 1)
    stored = [row.sample_id for row in read_dataset(turned)]
    assert stored != sorted(stored)
    of_clip = SentenceSpec(model="clip")
    plain = sync_in_process(dataset, tmp_path / "plain", of_clip, keep=0.5, probes=probes)
    again = sync_in_process(turned, tmp_path / "again", of_clip, keep=0.5, probes=probes)
    assert plain.fingerprint == again.fingerprint
    assert plain.clip_score_mean == pytest.approx(again.clip_score_mean)
    assert plain.lineage is not None and again.lineage is not None
    examples, same = (made.lineage.rules[0].examples for made in (plain, again))
    assert [each["sample_id"] for each in examples] == [each["sample_id"] for each in same]


def test_a_row_keeps_its_captions_weight(dataset: Path, tmp_path: Path) -> None:
    turned = turned_view(dataset, tmp_path, weight=np.arange(60) % 3 + 1)
    made = sync_in_process(turned, tmp_path / "view", SentenceSpec(model="clip"))
    assert made.lineage is not None and made.lineage.facts["moved"] > 0
    weights = weights_of(tmp_path / "view")
    assert weights == {sample: int(sample.partition("-")[0]) % 3 + 1 for sample in weights}


def turned_view(dataset: Path, folder: Path, *, weight: np.ndarray) -> Path:
    """Of all 60 rows: the first 35 show a copy of their pictures, which lies behind them. weight: by sample id."""
    shutil.copytree(dataset, folder / "copy")
    sources = [open_dataset(open_store(place)) for place in (dataset, folder / "copy")]
    rows = read_index(sources[:1])
    first = (np.arange(60) < 35).astype(np.int64)
    view = dataclasses.replace(rows, source=first, weight=weight).for_view()
    lineage = Lineage(method="test", settings={}, sources=tuple(map(lineage_source, sources)), rows_in=60)
    write_view(open_store(folder / "turned"), sources, view, lineage)
    return folder / "turned"


def weights_of(view: Path) -> dict[str, int]:
    store = open_store(view)
    found: dict[str, int] = {}
    for shard in load_manifest(store).stored_shards:
        ids = read_shard(store, shard, ["sample_id"])["sample_id"].to_pylist()
        found |= zip(ids, read_weights(store, shard).tolist(), strict=True)
    return found


@pytest.fixture
def of_clip(tiny_clip: Path) -> tuple[object, ...]:
    return ("--method", "sync", "--sentences", "clip", "--clip", tiny_clip)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("cluster.session.start_ray", fail)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--keep", "0"), "--keep 0: must be above 0 and at most 1"),
        (("--keep", "1.5"), "--keep 1.5: must be above 0 and at most 1"),
        (("--candidates", "0"), "--candidates 0: must be at least 1"),
        (("--captions-per-picture", "0"), "--captions-per-picture 0: must be at least 1"),
        (("--probes", "0"), "--probes 0: must be at least 1"),
        (("--method", "redraw", "--budget", "1", "--probes", "2"), "--probes, --sentences: without effect with"),
        (("--keep", "0.01"), "--keep 0.01: keeps none of 60 pairs"),
        (("--method", "best"), "--method 'best': not known"),
        (("--sentences", "/no/such/folder"), "--sentences /no/such/folder: no such folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_ray_starts(
    dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple, arguments: tuple[str, ...], said: str
) -> None:
    settings = {name: value for each in (of_clip, arguments) for name, value in zip(each[::2], each[1::2], strict=True)}
    given = [part for setting in settings.items() for part in setting]
    ended = call_job("refine", "--data", dataset, "--out", tmp_path / "out", *given)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_data_without_features_or_pictures_is_refused(
    dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    manifest = json.loads((dataset / MANIFEST_KEY).read_bytes())
    for part, model, said in (("clip", "null", "has no CLIP features"), ("generator", "text-only", "has no pictures")):
        changed = json.loads(json.dumps(manifest))
        changed["spec"][part]["model"] = model
        (tmp_path / model).mkdir()
        (tmp_path / model / MANIFEST_KEY).write_text(json.dumps(changed))
        ended = call_job("refine", "--data", tmp_path / model, "--out", tmp_path / "out", *of_clip)
        assert ended.returncode == 2 and said in ended.stderr
    ended = call_job("refine", "--data", tmp_path / "no", "--out", tmp_path / "out", *of_clip)
    assert ended.returncode == 2 and "not a dataset" in ended.stderr


def test_another_clip_than_the_datasets_is_refused(dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None) -> None:
    """Of names that stand for the same weights everywhere."""
    values = json.loads((dataset / MANIFEST_KEY).read_bytes())
    values["spec"]["clip"]["model"] = "ViT-B-32/openai"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MANIFEST_KEY).write_text(json.dumps(values))
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--method", "sync", "--sentences", "clip")
    ended = call_job("refine", *arguments, "--clip", "ViT-L-14/openai")
    assert ended.returncode == 2 and "was made with ViT-B-32/openai; give that, or leave the option out" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_clip_that_the_dataset_alone_names_is_not_opened(
    dataset: Path, tmp_path: Path, tiny_clip: Path, call_job: CALL, no_ray: None
) -> None:
    arguments = ("--out", tmp_path / "out", "--method", "sync", "--sentences", "clip")
    ended = call_job("refine", "--data", dataset, *arguments)
    assert ended.returncode == 2 and f"give --clip {tiny_clip}" in ended.stderr
    manifest = json.loads((dataset / MANIFEST_KEY).read_bytes())
    manifest["spec"]["clip"]["revision"] = "sha256:other"
    (tmp_path / "pinned").mkdir()
    (tmp_path / "pinned" / MANIFEST_KEY).write_text(json.dumps(manifest))
    ended = call_job("refine", "--data", tmp_path / "pinned", *arguments, "--clip", tiny_clip)
    assert ended.returncode == 2 and "was made with sha256:other; give the CLIP that made its features" in ended.stderr


def test_a_place_with_something_else_is_refused(
    dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = call_job("refine", "--data", dataset, "--out", tmp_path, *of_clip)
    assert ended.returncode == 2 and "not empty and no derived dataset" in ended.stderr
    sync_in_process(dataset, tmp_path / "view", SentenceSpec(model="clip"))
    ended = call_job("refine", "--data", dataset, "--out", tmp_path / "view", *of_clip, "--keep", "0.8")
    assert ended.returncode == 2 and "was begun with other settings" in ended.stderr


def test_another_release_of_the_encoder_finds_a_finished_view_and_is_named_for_an_unfinished_one(
    dataset: Path, tmp_path: Path, tiny_clip: Path, call_job: CALL, no_ray: None
) -> None:
    out, sentences = tmp_path / "view", resolve_sentences(str(minilm_folder()))
    made = sync_in_process(dataset, out, sentences)
    lineage = (out / LINEAGE_KEY).read_text()
    (out / LINEAGE_KEY).write_text(lineage.replace(sentences.library, "sentence-transformers 1.0"))
    options = ("--method", "sync", "--sentences", minilm_folder(), "--clip", tiny_clip)
    arguments = ("refine", "--data", dataset, "--out", out, *options)
    told = call_job(*arguments).summary
    assert told is not None and told["fingerprint"] == made.fingerprint
    for damaged in (True, False):
        (out / MANIFEST_KEY).write_text("{") if damaged else (out / MANIFEST_KEY).unlink()
        ended = call_job(*arguments)
        assert ended.returncode == 2 and "install sentence-transformers 1.0 to finish it, or give" in ended.stderr


def test_a_view_by_probes_says_so_and_what_was_found(
    dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    made = sync_in_process(dataset, tmp_path / "view", SentenceSpec(model="clip"), probes=1, candidates=4)
    assert made.lineage is not None and made.lineage.settings["probes"] == 1
    found = [made.lineage.facts[name] for name in RECALL]
    assert all(0 < share < 1 for share in found)
    assert verify(open_store(tmp_path / "view"))["ok"]
    arguments = ("--data", dataset, "--out", tmp_path / "view", *of_clip, "--candidates", 4)
    told = call_job("refine", *arguments, "--probes", 1).summary
    assert told is not None and [told[name] for name in RECALL] == found
    for other in ((), ("--probes", 2)):
        ended = call_job("refine", *arguments, *other)
        assert ended.returncode == 2 and "was begun with other settings" in ended.stderr


def test_an_exact_view_has_the_lineage_it_had_before_there_were_probes(
    dataset: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    made = sync_in_process(dataset, tmp_path / "view", SentenceSpec(model="clip"))
    assert made.lineage is not None
    assert made.lineage.settings == {
        "method": "sync", "candidates": 15, "captions_per_picture": 2, "keep": 0.9,
        "sentences": {"model": "clip", "revision": "", "library": ""},
    }  # fmt: skip
    assert made.lineage.facts.keys() == {*FACTS, "sentences", "device"}
    told = call_job("refine", "--data", dataset, "--out", tmp_path / "view", *of_clip).summary
    assert told is not None and not set(RECALL) & told.keys()


@pytest.mark.parametrize("probes", [None, 1])
def test_on_ray_the_view_is_the_same_and_a_rerun_finds_it(
    dataset: Path,
    tmp_path: Path,
    call_job: CALL,
    ray_session: None,
    of_clip: tuple,
    caplog: pytest.LogCaptureFixture,
    probes: int | None,
) -> None:
    caplog.set_level(logging.INFO)
    alone = sync_in_process(dataset, tmp_path / "alone", SentenceSpec(model="clip"), probes=probes)
    arguments = ("--data", dataset, "--out", tmp_path / "view", *of_clip, "--block-size", 11)
    arguments += () if probes is None else ("--probes", probes)
    ended = call_job("refine", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.summary is not None
    assert ended.summary["fingerprint"] == alone.fingerprint
    assert ended.summary["sentences"] == f"clip ({of_clip[-1]})"
    assert (ended.summary["pairs"], ended.summary["kept"]) == (60, 54)
    assert not open_store(tmp_path / "view").list(f"{WORK}/"), "nothing is left of the work"
    again = call_job("refine", *arguments)
    assert again.summary is not None and "view: is complete" in caplog.text
    assert alone.lineage is not None
    for name in RECALL:
        assert ended.summary.get(name) == alone.lineage.facts.get(name)
    for name in ("pairs", "kept", "fingerprint", *FACTS):
        assert again.summary[name] == ended.summary[name]


def test_a_second_job_waits_and_finds_the_view(
    dataset: Path, tiny_clip: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose work the first one deletes when it is done."""
    caplog.set_level(logging.INFO)
    out = open_store(tmp_path / "view")
    asked = RefineRequest(data=str(dataset), out=out.root, method="sync", sentences="clip", clip=str(tiny_clip))
    said: list[dict] = []
    second = threading.Thread(target=lambda: said.append(refine(asked)))
    with only_job(out, MAKES, waits=True):
        second.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        made = sync_in_process(dataset, tmp_path / "view", SentenceSpec(model="clip"), clean=True)
    second.join(60)
    assert [each["fingerprint"] for each in said] == [made.fingerprint] and "is complete" in caplog.text
    assert not out.list(f"{WORK}/")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_view(dataset: Path, tmp_path: Path, of_clip: tuple) -> None:
    """kill -9 after a third and after two thirds of the objects; what lay there is not made again."""
    whole = sync_in_process(dataset, tmp_path / "whole", SentenceSpec(model="clip"), block_size=2)
    total = len(open_store(tmp_path / "whole").list(f"{WORK}/"))
    command = [sys.executable, "-m", "jobs.refine", "--data", str(dataset), "--out", str(tmp_path / "view")]
    command += [*map(str, of_clip), "--block-size", "2"]
    view = open_store(tmp_path / "view")
    for share in (1 / 3, 2 / 3):
        kill_once(lambda enough=share * total: len(view.list(f"{WORK}/")) >= enough, command)
        assert not view.exists(MANIFEST_KEY)
    lay_there = {key: os.stat(view.path(key)).st_mtime_ns for key in view.list(f"{WORK}/")}
    changed = set()
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for key, made in lay_there.items():
                try:
                    if os.stat(view.path(key)).st_mtime_ns != made:
                        changed.add(key)
                except FileNotFoundError:  # the work is done
                    pass
            time.sleep(0.05)
        assert process.returncode == 0 and not changed
        assert process.stdout is not None
        assert json.loads(process.stdout.read().splitlines()[-1])["fingerprint"] == whole.fingerprint


@pytest.fixture(scope="module")
def by_another_clip(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset featurised by a CLIP of other weights and another width; the CLIP lies beside it."""
    folder = tmp_path_factory.mktemp("another")
    clip = save_tiny_clip(folder / "clip", seed=5, width=96)
    featurise_in_process(dataset, folder / "data", clip)
    return folder / "data"


def test_another_clips_features_find_the_pictures_and_the_datasets_own_clip_scores_them(
    dataset: Path, by_another_clip: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """The choice is that of the other dataset refined alone, shown by the pictures of this one."""
    alone = sync_in_process(by_another_clip, tmp_path / "alone", SentenceSpec(model="clip"))
    found = sync_in_process(
        dataset, tmp_path / "view", SentenceSpec(model="clip"), retrieval=str(by_another_clip), block_size=7
    )
    assert [store.path for store in found.pictures] == [str(dataset)]
    assert found.fingerprint == alone.fingerprint, "the same captions with the same pictures"
    rows = list(read_dataset(tmp_path / "view"))
    texts = ClipEncoder(str(tiny_clip)).encode_texts([str(row.caption) for row in rows])
    for row, text in zip(rows, texts, strict=True):
        assert row.clip_score == pytest.approx(float(text @ row.global_feature.astype(np.float32)), abs=1e-3)  # type: ignore[union-attr]
    plain = sync_in_process(dataset, tmp_path / "plain", SentenceSpec(model="clip"))
    assert plain.fingerprint != found.fingerprint, "the two CLIPs find other pictures"
    assert found.lineage is not None and plain.lineage is not None
    assert [source.path for source in found.lineage.sources] == [str(dataset), str(by_another_clip)]
    assert found.lineage.facts["sentences"] == f"clip ({found.lineage.facts['retrieval']})"
    assert plain.lineage.facts["sentences"] == f"clip ({tiny_clip})"
    assert verify(open_store(tmp_path / "view"))["ok"]


def test_a_caption_whose_picture_the_other_clip_left_out_goes_by_a_rule_of_its_own(
    tiny_clip: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    dataset = write_dataset(tmp_path / "data", tiny_clip, rows=20, shard_size=7)
    clip = save_tiny_clip(tmp_path / "clip", seed=5, width=96)
    featurise_in_process(dataset, tmp_path / "seen", clip, featurise=FailsOnOne)
    options: dict[str, object] = {"retrieval": str(tmp_path / "seen"), "keep": 0.8}
    made = sync_in_process(dataset, tmp_path / "view", SentenceSpec(model="clip"), **options)
    assert made.lineage is not None and made.stored == int(0.8 * 19)
    unseen, keep = made.lineage.rules
    assert (unseen.rule, unseen.setting, unseen.dropped) == ("clip_error", str(clip), 1)
    (row,) = unseen.examples
    own = next(row for row in read_dataset(dataset) if row.sample_id == "000000009-00")
    assert row["sample_id"] == own.sample_id and row["clip_score"] == own.clip_score
    assert row["why"] == f"not seen by {clip}, which raised on the picture"
    assert keep.dropped == 20 - 1 - made.stored and len(keep.examples) == keep.dropped
    scores = [float(str(example["why"]).removeprefix("SynC score ").partition(";")[0]) for example in keep.examples]
    assert scores == sorted(scores, reverse=True) and scores[-1] > -1
    few = ("--data", dataset, "--out", tmp_path / "none", *of_clip, "--retrieval", tmp_path / "seen")
    ended = call_job("refine", *few, "--retrieval-clip", clip, "--keep", 0.05)
    assert ended.returncode == 2 and "--keep 0.05: keeps none of 19 pairs" in ended.stderr


def test_only_the_same_dataset_by_another_clip_may_find_the_pictures(
    dataset: Path, by_another_clip: Path, tiny_clip: Path, tmp_path: Path, call_job: CALL, no_ray: None, of_clip: tuple
) -> None:
    other = write_dataset(tmp_path / "other", tiny_clip, rows=60, shard_size=7, first=2)
    clip = by_another_clip.parent / "clip"
    for data, extra, said in (
        (dataset, ("--retrieval", other), f"--retrieval {other}: not made by jobs.featurise --data"),
        (other, ("--retrieval", by_another_clip), f"--retrieval {by_another_clip}: made of {dataset}"),
        (dataset, ("--retrieval", by_another_clip), f"give --retrieval-clip {clip}"),
        (
            dataset,
            ("--retrieval", by_another_clip, "--retrieval-clip", tiny_clip),
            f"--retrieval-clip {tiny_clip}: its",
        ),
        (dataset, ("--retrieval-clip", tiny_clip), "--retrieval-clip"),
    ):
        ended = call_job("refine", "--data", data, "--out", tmp_path / "out", *of_clip, *extra)
        assert ended.returncode == 2 and said in ended.stderr
        assert not (tmp_path / "out").exists()
