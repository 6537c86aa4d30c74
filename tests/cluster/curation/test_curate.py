"""jobs.curate: what each rule drops, beside plain references, and the view that is left."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest, Subset
from cluster.curation.duplicates import near_captions, near_vectors
from cluster.curation.rows import read_index
from cluster.dataset import DatasetRow, read_dataset
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import CONCEPTS_KEY, MANIFEST_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import open_dataset
from cluster.dataset.verify import verify
from cluster.dataset.view import write_view
from cluster.store.store import open_store
from jobs.curate import JOB
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary, lexicon_nouns
from tests.helpers.paths import ROOT
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_generation import (
    CAPTIONS,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    tiny_spec,
    write_corpus,
)

ROWS = 60
#: Some of them equal.
SCORES = np.random.default_rng(5).integers(10, 45, ROWS) / 100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("curate") / "data", tiny_clip, rows=ROWS, shard_size=17, scores=SCORES)


@pytest.fixture(scope="module")
def rows(data: Path) -> list[DatasetRow]:
    return list(read_dataset(data))


def kept(place: Path) -> set[str]:
    return {row.sample_id for row in read_dataset(place, columns=("sample_id",))}  # type: ignore[misc]


def run(data: Path, out: Path, **rules: object) -> dict:
    return curate(CurateRequest(data=(str(data),), out=str(out), **rules))  # type: ignore[arg-type]


def test_rows_go_by_how_their_picture_was_drawn(tmp_path: Path, tiny_clip: Path) -> None:
    """Of a view that shows another caption's picture: by that picture."""
    attempts = [1, 2, 3, 1, 4, 2, 1, 3]
    reasons = ["", "prompt_truncated", "", "", "prompt_truncated", "", "", ""]
    data = write_dataset(tmp_path / "data", tiny_clip, rows=8, shard_size=3, attempts=attempts, reasons=reasons)
    ids = [f"{row:09d}-00" for row in range(8)]
    assert run(data, tmp_path / "attempts", max_attempts=2)["dropped"] == {"max_attempts": 3}
    assert kept(tmp_path / "attempts") == {ids[row] for row in (0, 1, 3, 5, 6)}
    assert run(data, tmp_path / "reason", drop_reason=("prompt_truncated",))["dropped"] == {"drop_reason": 2}
    assert kept(tmp_path / "reason") == {ids[row] for row in (0, 2, 3, 5, 6, 7)}
    source = open_dataset(open_store(data))
    rows = read_index([source])
    turned = dataclasses.replace(rows.for_view(), shard=rows.shard[::-1], row=rows.row[::-1])  # 0 shows 7's picture
    lineage = Lineage(method="test", settings={}, sources=(lineage_source(source),), rows_in=8)
    write_view(open_store(tmp_path / "turned"), [source], turned, lineage)
    run(tmp_path / "turned", tmp_path / "turned-attempts", max_attempts=2)
    assert kept(tmp_path / "turned-attempts") == {ids[7 - row] for row in (0, 1, 3, 5, 6)}
    run(tmp_path / "turned", tmp_path / "turned-reason", drop_reason=("prompt_truncated",))
    assert kept(tmp_path / "turned-reason") == {ids[7 - row] for row in (0, 2, 3, 5, 6, 7)}


#: Of spaCy what is asked here, for a machine without it. It finds colours and nothing else.
SPACY = """
from types import SimpleNamespace

class Model:
    def pipe(self, captions, batch_size):
        for caption in captions:
            words = caption.lower().strip(".").split()
            yield [SimpleNamespace(pos_="NOUN" if word in ("red", "blue") else "X", lemma_=word) for word in words]

def load(name, exclude):
    if name != "xx_colours":
        raise OSError(name)
    return Model()
"""


def test_captions_without_a_concept_stay_and_are_counted_by_what_found_the_concepts(
    tmp_path: Path, data: Path, rows: list[DatasetRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in.py").write_text(SPACY)
    stand_in = importlib.util.spec_from_file_location("spacy", tmp_path / "stand_in.py")
    assert stand_in is not None and stand_in.loader is not None
    monkeypatch.setitem(sys.modules, "spacy", importlib.util.module_from_spec(stand_in))
    stand_in.loader.exec_module(sys.modules["spacy"])
    concepts = ConceptVocabulary.load(data / CONCEPTS_KEY)
    every = len(concepts)
    assert run(data, tmp_path / "lexicon", covered_by=every - 1)["covered_by_no_concept"] == 0
    with pytest.raises(InputError, match=f"--covered-by {every}: no row would go, as the data has {every} concepts"):
        run(data, tmp_path / "all", covered_by=every)
    coloured = shutil.copytree(data, tmp_path / "coloured")
    (coloured / CONCEPTS_KEY).write_bytes(dataclasses.replace(concepts, source="spacy:xx_colours").to_bytes())
    found = run(coloured, tmp_path / "spacy", covered_by=every - 1)
    without = [row for row in rows if not {"red", "blue"} & set(str(row.caption).lower().strip(".").split())]
    assert found["covered_by_no_concept"] == len(without) > 0
    assert {row.sample_id for row in without} <= kept(tmp_path / "spacy")
    run(coloured, tmp_path / "lowest", drop_lowest_per_concept=0.4)  # for this rule they are a group of their own
    ranked = [row.sample_id for row in sorted(without, key=lambda row: (row.clip_score, row.sample_id))]
    low = int(0.4 * len(ranked))
    assert set(ranked) & kept(tmp_path / "lowest") == set(ranked[low:]) and low > 0
    (coloured / CONCEPTS_KEY).write_bytes(dataclasses.replace(concepts, source="spacy:xx_absent").to_bytes())
    with pytest.raises(InputError, match="spaCy model 'xx_absent', which is not installed here; install it, or leave"):
        run(coloured, tmp_path / "absent", covered_by=every - 1)
    assert run(coloured, tmp_path / "other", drop_lowest=0.1)["rows_out"] == ROWS * 0.9, "no rule by concept"


def best_first(rows: list[DatasetRow]) -> list[DatasetRow]:
    return sorted(rows, key=lambda row: (-row.clip_score, row.sample_id))  # type: ignore[operator]


def test_rows_below_the_score_go(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    least = float(np.median([row.clip_score for row in rows]))
    found = run(data, tmp_path / "out", min_clip_score=least)
    wanted = {row.sample_id for row in rows if row.clip_score >= np.float32(least)}  # type: ignore[operator]
    assert kept(tmp_path / "out") == wanted and 0 < len(wanted) < ROWS
    assert found["dropped"] == {"min_clip_score": ROWS - len(wanted)}
    assert (found["rows_in"], found["rows_out"]) == (ROWS, len(wanted))
    assert found["fingerprint"] == verify(open_store(tmp_path / "out"))["fingerprint"]


def test_the_lowest_share_goes(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    run(data, tmp_path / "out", drop_lowest=0.25)
    ranked = sorted(rows, key=lambda row: (row.clip_score, row.sample_id))
    assert kept(tmp_path / "out") == {row.sample_id for row in ranked[ROWS // 4 :]}


def nouns_of(row: DatasetRow, data: Path) -> set[str]:
    names = ConceptVocabulary.load(data / "concepts.safetensors").names
    return {noun for noun in lexicon_nouns([row.caption]) if noun in names}  # type: ignore[list-item]


def test_the_lowest_of_each_of_its_concepts_go(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    run(data, tmp_path / "out", drop_lowest_per_concept=0.4)
    low: dict[str, set[str]] = {}
    for name in {noun for row in rows for noun in nouns_of(row, data)}:
        having = sorted(
            (row for row in rows if name in nouns_of(row, data)), key=lambda row: (row.clip_score, row.sample_id)
        )
        low[name] = {row.sample_id for row in having[: int(0.4 * len(having))]}  # type: ignore[misc]
    wanted = {row.sample_id for row in rows if not all(row.sample_id in low[name] for name in nouns_of(row, data))}
    assert kept(tmp_path / "out") == wanted and len(wanted) < ROWS


def test_a_quota_keeps_the_best_of_each_concept(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    run(data, tmp_path / "out", max_per_concept=9)
    counted: Counter[str] = Counter()
    wanted = set()
    for row in best_first(rows):
        nouns = nouns_of(row, data)
        if all(counted[name] < 9 for name in nouns):
            counted.update(nouns)
            wanted.add(row.sample_id)
    assert kept(tmp_path / "out") == wanted and max(counted.values()) == 9


def test_a_row_stays_where_clip_finds_the_concepts_of_its_caption(
    tmp_path: Path, data: Path, rows: list[DatasetRow]
) -> None:
    concepts = ConceptVocabulary.load(data / "concepts.safetensors")

    def covered(row: DatasetRow, share: float) -> bool:
        cosines = concepts.embeddings.astype(float) @ row.global_feature.astype(float)  # type: ignore[union-attr]
        top = {concepts.names[place] for place in np.argsort(-cosines)[:3]}
        nouns = nouns_of(row, data)
        return len(nouns & top) >= share * len(nouns)

    for share in (1.0, 0.5):
        run(data, tmp_path / f"{share}", covered_by=3, min_coverage=share)
        wanted = {row.sample_id for row in rows if covered(row, share)}
        assert kept(tmp_path / f"{share}") == wanted and len(wanted) < ROWS


def greedy(rows: list[DatasetRow], alike: object) -> set[str]:
    """Every row, best first, that is not like one that stays."""
    stays: list[DatasetRow] = []
    for row in best_first(rows):
        if not any(alike(row, other) for other in stays):  # type: ignore[operator]
            stays.append(row)
    return {row.sample_id for row in stays}  # type: ignore[misc]


def test_of_captions_of_the_same_words_the_best_scored_stays(
    tmp_path: Path, data: Path, rows: list[DatasetRow]
) -> None:
    def words(row: DatasetRow) -> set[str]:
        return set(row.caption.lower().replace(".", "").split())  # type: ignore[union-attr]

    def jaccard(one: DatasetRow, two: DatasetRow) -> float:
        return len(words(one) & words(two)) / len(words(one) | words(two))

    for threshold in (1.0, 0.7, 0.5):
        run(data, tmp_path / f"{threshold}", duplicate_captions=threshold)
        wanted = greedy(rows, lambda one, two, least=threshold: jaccard(one, two) >= least)
        assert kept(tmp_path / f"{threshold}") == wanted and len(wanted) < ROWS


def test_of_pictures_that_are_near_the_best_scored_stays(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    def cosine(one: DatasetRow, two: DatasetRow) -> float:
        a, b = one.global_feature.astype(float), two.global_feature.astype(float)  # type: ignore[union-attr]
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    every = sorted(cosine(one, two) for place, one in enumerate(rows) for two in rows[:place])
    threshold = round(every[int(0.97 * len(every))], 3)
    found = run(data, tmp_path / "out", duplicate_pictures=threshold)
    wanted = greedy(rows, lambda one, two: round(cosine(one, two), 6) >= threshold)
    assert kept(tmp_path / "out") == wanted and len(wanted) < ROWS
    examples = load_manifest(open_store(tmp_path / "out")).lineage.rules[0].examples  # type: ignore[union-attr]
    assert len(examples) == min(6, found["dropped"]["duplicate_pictures"])
    assert all(each["beside"]["sample_id"] in wanted for each in examples), "shown beside what stays"


@pytest.mark.parametrize("rule", [{"duplicate_pictures": 0.99}, {"covered_by": 3}])
def test_features_that_are_not_finite_are_named(tmp_path: Path, tiny_clip: Path, rule: dict) -> None:
    """Nothing can be compared with them: one of them would leave all near duplicates where they are."""
    data = write_dataset(tmp_path / "data", tiny_clip, rows=30, shard_size=9, nan_global_row=12)
    with pytest.raises(InputError, match="the features of 000000012-00 are not finite, and 0 others; run"):
        run(data, tmp_path / "out", **rule)
    marks = tmp_path / "marks.jsonl"
    marks.write_text('{"sample_id": "000000012-00"}')
    run(data, tmp_path / "without", drop_list=str(marks))
    assert run(tmp_path / "without", tmp_path / "out", **rule)["rows_in"] == 29, "as the message says"


def test_near_vectors_are_the_same_for_any_block() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, 16))
    vectors = (centres[random.integers(40, size=500)] + 0.25 * random.normal(size=(500, 16))).astype(np.float16)
    first, *others = [near_vectors(vectors, 0.93, block=block) for block in (7, 64, 1000)]
    assert 20 < (first[0] == -1).sum() < 400
    for other in others:
        assert np.array_equal(first[0], other[0]) and np.array_equal(first[1], other[1])


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate 1.55 GiB.", "CUDA error: no kernel image is available"]
)
def test_near_vectors_are_found_on_the_cpu_where_the_gpu_fails(
    said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    expected = near_vectors(vectors, 0.9)
    to = torch.Tensor.to

    def fails_on_a_gpu(self: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        if where == ("cuda",):
            raise torch.OutOfMemoryError(said) if "memory" in said else RuntimeError(said)
        return to(self, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", fails_on_a_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = near_vectors(vectors, 0.9)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert caplog.messages == [f"near duplicates: the GPU fails ({said}); pictures are compared on the CPU"]


@pytest.mark.parametrize("threshold", [0.2, 0.9, 0.97, 1.0])
def test_near_vectors_are_those_of_all_pairs(threshold: float) -> None:
    """Vectors in a narrow cone whose directions differ in weight, as CLIP's; some are near, and some the same."""
    random = np.random.default_rng(2)
    weights = 1 / np.sqrt(np.arange(1, 129))
    wide = 0.15 + weights * random.normal(size=(600, 128))
    wide[300:450] = wide[random.integers(300, size=150)] + 0.02 * random.normal(size=(150, 128))
    vectors = wide.astype(np.float16)
    vectors[450:470] = vectors[random.integers(300, size=20)]
    vectors[599] = 0
    partner, similarity = near_vectors(vectors, threshold, block=128)
    exact = vectors.astype(np.float64)
    unit = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-30)
    cosine = np.round(unit @ unit.T, 6)
    stays: list[int] = []
    for row in range(len(vectors)):
        near = [other for other in stays if cosine[row, other] >= threshold]
        assert partner[row] == (near[0] if near else -1)
        if near:
            assert similarity[row] == pytest.approx(cosine[row, near[0]], abs=2e-6)
        else:
            stays.append(row)
    assert len(stays) > 1 and (partner >= 0).sum() >= 20


def test_near_captions_are_those_of_all_pairs() -> None:
    random = np.random.default_rng(1)
    words = [f"word{number}" for number in range(30)]
    captions = [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(400)]
    sets = [set(caption.split()) for caption in captions]
    for threshold in (0.34, 0.5, 0.75, 1.0):
        partner, similarity = near_captions(captions, threshold)
        stays: list[int] = []
        for row, own in enumerate(sets):
            index = [round(len(own & sets[other]) / len(own | sets[other]), 6) for other in stays]
            near = [place for place, each in enumerate(index) if each >= round(threshold, 6)]
            assert partner[row] == (stays[near[0]] if near else -1)
            if near:
                assert similarity[row] == index[near[0]]
            else:
                stays.append(row)


def test_captions_go_by_length_and_words(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    found = run(data, tmp_path / "out", min_words=7, drop_word=("red",), keep_word=("Circle", "bar"))
    assert found["dropped"]["min_words"] == 0, "all have seven"
    wanted = {
        row.sample_id for row in rows
        if "red" not in row.caption.split() and {"circle", "bar"} & set(row.caption.split())  # type: ignore[union-attr]
    }  # fmt: skip
    assert kept(tmp_path / "out") == wanted and wanted
    with pytest.raises(InputError, match=r"no row of 60 is left \(max_words 60\)"):
        run(data, tmp_path / "none", max_words=6)
    assert not (tmp_path / "none").exists()


def test_a_list_of_marks_keeps_and_drops(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    ids = [row.sample_id for row in rows]
    lines = [
        {"sample_id": ids[0], "mark": "keep", "tags": ["good"]},
        {"sample_id": ids[1], "mark": "drop"},
        {"sample_id": ids[2]},
        {"sample_id": "999999999-00"},
    ]
    marks = tmp_path / "marks.jsonl"
    marks.write_text("\n".join([*map(json.dumps, lines), "no json", "[1]"]))
    found = run(data, tmp_path / "keep", keep_list=str(marks))
    assert kept(tmp_path / "keep") == {ids[0], ids[2]}
    assert (found["keep_list_unknown"], found["keep_list_unreadable"]) == (1, 2)
    run(data, tmp_path / "drop", drop_list=str(marks))
    assert kept(tmp_path / "drop") == set(ids) - {ids[1], ids[2]}
    run(data, tmp_path / "tagged", keep_list=str(marks), tag=("good", "fine"))
    assert kept(tmp_path / "tagged") == {ids[0]}
    for text in ("nothing\n", '{"sample_id": "000000001-00", "mark": "remove"}\n'):
        marks.write_text(text)
        with pytest.raises(InputError, match="none of its 1 lines is a mark"):
            run(data, tmp_path / "bad", keep_list=str(marks))
    marks.write_text('{"sample_id": "999999999-00"}\n')
    for option in ("keep_list", "drop_list"):
        with pytest.raises(InputError, match=r"none of the 1 rows that it names \(such as 999999999-00\)"):
            run(data, tmp_path / "bad", **{option: str(marks)})


def test_one_list_of_both_marks_serves_as_both_lists_at_once(
    tmp_path: Path, data: Path, rows: list[DatasetRow]
) -> None:
    """What the drop list names has gone by the keep list already, and is in the data all the same."""
    ids = [row.sample_id for row in rows]
    marks = tmp_path / "marks.jsonl"
    lines = [{"sample_id": name, "mark": mark} for name, mark in zip(ids[:3], ("keep", "keep", "drop"), strict=True)]
    marks.write_text("\n".join(map(json.dumps, [*lines, {"sample_id": "999999999-00", "mark": "drop"}])))
    found = run(data, tmp_path / "both", keep_list=str(marks), drop_list=str(marks))
    assert found["dropped"] == {"keep_list": ROWS - 2, "drop_list": 0}
    assert (found["keep_list_unknown"], found["drop_list_unknown"]) == (0, 1)
    assert kept(tmp_path / "both") == set(ids[:2])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"sample_id": ids[1]}))
    run(data, tmp_path / "two", keep_list=str(marks), drop_list=str(other))
    assert kept(tmp_path / "two") == {ids[0]}


def test_rules_after_one_that_leaves_no_row_judge_nothing(tmp_path: Path, data: Path, rows: list[DatasetRow]) -> None:
    marks = tmp_path / "marks.jsonl"
    marks.write_text(json.dumps({"sample_id": rows[0].sample_id, "mark": "drop"}))
    rules = {**RULES, "keep_list": str(marks), "drop_list": str(marks), "max_attempts": 1, "min_words": 1}
    rules |= {"keep_word": ("red",), "drop_word": ("blue",), "drop_reason": ("prompt_truncated",)}
    found = curate(CurateRequest(data=(str(data),), dry_run=True, **rules))  # type: ignore[arg-type]
    assert found["rows_out"] == 0 and found["dropped"] == {**dict.fromkeys(rules, 0), "keep_list": ROWS}
    with pytest.raises(InputError, match=r"no row of 60 is left \(keep_list 60, drop_list 0\)"):
        run(data, tmp_path / "out", keep_list=str(marks), drop_list=str(marks))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep-word", ""), "--keep-word '': must be one word"),
        (("--drop-word", "red circle"), "--drop-word 'red circle': must be one word"),
        (("--drop-reason", "nonsense"), "--drop-reason nonsense: a stored row has no such remark; allowed: "),
        (("--covered-by", "3", "--min-coverage", "0"), "--min-coverage 0: no row would go"),
        (("--min-clip-score", "-1"), "--min-clip-score -1: no row would go; give a number above -1"),
        (("--drop-lowest", "0"), "--drop-lowest 0: no row would go"),
        (("--drop-lowest-per-concept", "0"), "--drop-lowest-per-concept 0: no row would go"),
    ],
)
def test_a_rule_without_effect_is_refused(data: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        JOB.read(["--data", str(data), "--dry-run", *options])


def test_a_place_in_the_dataset_itself_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"lies in the dataset .*; give a place beside it"):
        run(data, data / "view", drop_lowest=0.1)
    run(data, tmp_path / "view", drop_lowest=0.1)
    with pytest.raises(InputError, match=rf"lies in the dataset {data}; give a place beside it"):
        run(tmp_path / "view", data / "second", drop_lowest=0.1)  # the view's pictures are there
    assert not (data / "view").exists() and not (data / "second").exists()


def test_a_view_whose_pictures_are_gone_is_refused_by_rules_that_look_at_none(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "mine")
    run(tmp_path / "mine", tmp_path / "view", drop_lowest=0.1)
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(InputError, match=r"view: a view, whose pictures are gone: no dataset at .*mine"):
        run(tmp_path / "view", tmp_path / "another", drop_lowest=0.1)


def test_a_smaller_subset_is_contained_in_a_larger_one(tmp_path: Path, data: Path) -> None:
    found = {}
    for text in ("10", "20", "0.5", "0.8"):
        run(data, tmp_path / text, subset=Subset.parse(text))
        found[text] = kept(tmp_path / text)
    assert (len(found["10"]), len(found["20"])) == (10, 20)
    assert found["10"] < found["20"] and found["0.5"] < found["0.8"]
    run(data, tmp_path / "seed", subset=Subset(count=10), seed=1)
    assert kept(tmp_path / "seed") != found["10"]


RULES = {
    "min_clip_score": 0.15, "covered_by": 6, "duplicate_captions": 1.0, "duplicate_pictures": 0.999,
    "drop_lowest": 0.1, "drop_lowest_per_concept": 0.2, "max_per_concept": 12, "subset": Subset(share=0.8),
}  # fmt: skip


def test_the_fingerprint_does_not_depend_on_shards(tmp_path: Path, data: Path, tiny_clip: Path) -> None:
    other = write_dataset(tmp_path / "other", tiny_clip, rows=ROWS, shard_size=7, scores=SCORES)
    first, second = run(data, tmp_path / "a", **RULES), run(other, tmp_path / "b", **RULES)
    assert first["fingerprint"] == second["fingerprint"] and first["dropped"] == second["dropped"]
    assert 0 < first["rows_out"] < ROWS


def test_datasets_are_merged_with_sample_ids_of_their_own(tmp_path: Path, data: Path, tiny_clip: Path) -> None:
    other = write_dataset(tmp_path / "other", tiny_clip, rows=10, shard_size=4)
    request = CurateRequest(data=(str(data), str(other)), out=str(tmp_path / "out"))
    found = curate(request)
    assert (found["rows_in"], found["rows_out"]) == (70, 70)
    assert kept(tmp_path / "out") == {f"{number:09d}-00" for number in range(70)}
    assert verify(open_store(tmp_path / "out"))["ok"]
    captions = {row.sample_id: row.caption for row in read_dataset(tmp_path / "out")}
    assert captions["000000060-00"] == captions["000000000-00"], "the other one's first caption"
    marks = tmp_path / "marks.jsonl"
    marks.write_text('{"sample_id": "000000003-00"}\n')
    with pytest.raises(InputError, match="are in more than one --data"):
        curate(CurateRequest(data=(str(data), str(other)), out=str(tmp_path / "two"), drop_list=str(marks)))


def test_datasets_of_different_clips_are_not_merged(tmp_path: Path, data: Path) -> None:
    corpus = write_corpus(tmp_path)
    make_dataset_in_process(tmp_path / "null", corpus, null_spec())
    with pytest.raises(InputError, match="featurise both with one CLIP"):
        curate(CurateRequest(data=(str(data), str(tmp_path / "null")), out=str(tmp_path / "out")))
    with pytest.raises(InputError, match=r"--min-clip-score: .* was made with --clip null"):
        run(tmp_path / "null", tmp_path / "out", min_clip_score=0.1)
    with pytest.raises(InputError, match="a dataset twice"):
        curate(CurateRequest(data=(str(data), str(data)), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_go_and_writes_nothing(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = curate(CurateRequest(data=(str(data),), dry_run=True, duplicate_captions=1.0, drop_lowest=0.1))
    assert found["fingerprint"] is None and found["rows_out"] < ROWS
    assert run(data, tmp_path / "out", duplicate_captions=1.0, drop_lowest=0.1)["dropped"] == found["dropped"]
    said = [record.getMessage() for record in caplog.records]
    assert f"duplicate_captions 1.0: {found['dropped']['duplicate_captions']} of {ROWS} rows would go" in said
    assert sum("words 1.0000 with" in line for line in said) == 6


def test_the_committed_shards_of_an_unfinished_dataset_are_curated_when_told_so(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    make_dataset_in_process(tmp_path / "data", corpus, null_spec(), shard_size=5, finish=False)
    (tmp_path / "data" / "shards" / "part-000002.parquet").unlink()
    with pytest.raises(InputError, match=r"an unfinished dataset .* or add --unfinished"):
        run(tmp_path / "data", tmp_path / "out")
    found = run(tmp_path / "data", tmp_path / "out", unfinished=True)
    assert found["unfinished"] == {str(tmp_path / "data"): "4 of 5 shards"}
    assert found["rows_out"] == 19 and verify(open_store(tmp_path / "out"))["ok"]
    plan_dataset(tmp_path / "planned", corpus, null_spec())
    with pytest.raises(InputError, match="none of its 5 planned shards is there yet"):
        run(tmp_path / "planned", tmp_path / "other", unfinished=True)


def test_a_view_of_an_unfinished_dataset_is_finished_with_the_shards_it_was_begun_with(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=5)
    shard, manifest = tmp_path / "data" / "shards" / "part-000002.parquet", tmp_path / "data" / MANIFEST_KEY
    late = {place: place.read_bytes() for place in (shard, manifest)}
    for place in late:
        place.unlink()
    before = run(tmp_path / "data", tmp_path / "out", unfinished=True)
    (tmp_path / "out" / MANIFEST_KEY).unlink()  # as if it had been killed
    for place in (shard, manifest):  # the dataset grows, and is finished
        place.write_bytes(late[place])
        again = run(tmp_path / "data", tmp_path / "out", unfinished=True)
        assert again["fingerprint"] == before["fingerprint"] and again["rows_in"] == 19
        assert again["unfinished"] == {str(tmp_path / "data"): "4 of 5 shards"}
        with pytest.raises(InputError, match="of the data in another state"):
            run(
                tmp_path / "data", tmp_path / "out", unfinished=True
            )  # it is done: what has come asks for another --out
        (tmp_path / "out" / MANIFEST_KEY).unlink()
    assert run(tmp_path / "data", tmp_path / "new", unfinished=True)["rows_in"] == 24


@pytest.mark.parametrize("by", ["another place", "a link"])
@pytest.mark.parametrize("has_grown", [False, True])
@pytest.mark.parametrize("is_old", [False, True], ids=["", "a record of 0.1.0"])
def test_a_view_of_an_unfinished_dataset_is_finished_wherever_that_lies_now(
    by: str, has_grown: bool, is_old: bool, tmp_path: Path
) -> None:
    data, out, lineage = tmp_path / "data", tmp_path / "out", tmp_path / "out" / "lineage.json"
    make_dataset_in_process(data, write_corpus(tmp_path), null_spec(), shard_size=5, finish=False)
    shard = data / "shards" / "part-000002.parquet"
    late = shard.read_bytes()
    shard.unlink()
    before = run(data, out, unfinished=True)
    (out / MANIFEST_KEY).unlink()  # as if it had been killed
    record = json.loads(lineage.read_bytes())
    assert record["unfinished"] == [[0, 1, 3, 4]]
    if is_old:
        lineage.write_text(json.dumps({**record, "unfinished": {str(data): [0, 1, 3, 4]}}))
    if has_grown:
        shard.write_bytes(late)
    data.rename(tmp_path / "moved")
    if by == "a link":
        data.symlink_to("moved")
    again = run(data if by == "a link" else tmp_path / "moved", out, unfinished=True)
    assert (again["fingerprint"], again["rows_in"]) == (before["fingerprint"], 19)


def test_each_of_two_unfinished_datasets_is_known_by_its_place_in_the_list(tmp_path: Path) -> None:
    late = {}
    for name, captions, lost in (("b", CAPTIONS, 2), ("a", CAPTIONS[::-1], 3)):
        corpus = write_corpus(tmp_path, captions)
        make_dataset_in_process(tmp_path / name, corpus, null_spec(), shard_size=5, finish=False)
        shard = tmp_path / name / "shards" / f"part-{lost:06d}.parquet"
        late[shard] = shard.read_bytes()
        shard.unlink()

    def curated(*names: str) -> str:
        data = tuple(str(tmp_path / name) for name in names)
        return curate(CurateRequest(data=data, out=str(tmp_path / "out"), unfinished=True))["fingerprint"]

    before = curated("b", "a")
    (tmp_path / "out" / MANIFEST_KEY).unlink()
    for shard, data in late.items():
        shard.write_bytes(data)
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    assert curated("moved-b", "moved-a") == before


def test_an_unfinished_dataset_without_its_clip_head_is_refused_in_one_line(
    tmp_path: Path, tiny_t2i: Path, tiny_clip: Path
) -> None:
    """As a run leaves it that was killed before the first scorer had stored what it loads."""
    data = tmp_path / "data"
    make_dataset_in_process(data, write_corpus(tmp_path), tiny_spec(tiny_t2i, tiny_clip), finish=False)
    for use in (
        lambda: run(data, tmp_path / "out", unfinished=True),
        lambda: list(read_dataset(data, unfinished=True)),
    ):
        with pytest.raises(InputError, match=rf"{data}: has no clip_head.safetensors yet, .* run the command"):
            use()
    (data / "clip_head.safetensors").write_bytes(b"no head")
    with pytest.raises(InputError, match=r"clip_head.safetensors: damaged"):
        run(data, tmp_path / "out", unfinished=True)


def test_a_view_is_curated_and_written_out(tmp_path: Path, data: Path) -> None:
    run(data, tmp_path / "a", drop_lowest=0.3)
    view = run(tmp_path / "a", tmp_path / "b", subset=Subset(count=15))
    written = run(tmp_path / "a", tmp_path / "c", subset=Subset(count=15), materialise=True)
    assert view["fingerprint"] == written["fingerprint"] and kept(tmp_path / "b") == kept(tmp_path / "c")
    assert load_manifest(open_store(tmp_path / "b")).pictures[0].path == str(data)
    again = run(tmp_path / "a", tmp_path / "b", subset=Subset(count=15))
    assert again["fingerprint"] == view["fingerprint"], "done already"
    with pytest.raises(InputError, match="was begun with other settings"):
        run(tmp_path / "a", tmp_path / "b", subset=Subset(count=16))


KILLED_AT = """
import os, signal, sys
from cluster.store.store import Store
from jobs.curate import JOB

limit, write, done = int(sys.argv[1]), Store.write_bytes, []

def dying(self, key, data):
    done.append(key)
    if len(done) == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, key, data)

Store.write_bytes = dying
JOB.main(sys.argv[2:])
"""


@pytest.mark.parametrize("materialise", [False, True])
def test_kill_9_at_any_object_leaves_nothing_that_the_same_command_does_not_finish(
    tmp_path: Path, data: Path, materialise: bool
) -> None:
    rules = ["--data", str(data), "--drop-lowest", "0.3", *(["--materialise"] if materialise else [])]
    undisturbed = curate(JOB.read([*rules, "--out", str(tmp_path / "whole")]))
    place = tmp_path / "out"
    for limit in (2, 3, 5):  # lineage.json is there; a part is; all but dataset.json
        command = [sys.executable, "-c", KILLED_AT, str(limit), *rules, "--out", str(place)]
        killed = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert not (place / "dataset.json").exists() and (place / "lineage.json").exists()
        with pytest.raises(InputError, match="a derived dataset that was interrupted"):
            verify(open_store(place))
    assert curate(JOB.read([*rules, "--out", str(place)]))["fingerprint"] == undisturbed["fingerprint"]
    assert verify(open_store(place))["ok"]
    whole, there = open_store(tmp_path / "whole"), open_store(place)
    assert {key: there.read_bytes(key) for key in there.list()} == {key: whole.read_bytes(key) for key in whole.list()}
