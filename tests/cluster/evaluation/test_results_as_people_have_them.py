"""Results files and references as people have them: matched as picture names are, bad references counted."""

import json

import pytest

from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.request import EvaluateRequest
from pcm.errors import InputError
from tests.helpers.paths import DATA

CASES = DATA / "cases"


def scored(results: str, references: str, **options) -> dict:
    return evaluate(
        EvaluateRequest(results=str(CASES / "evaluation" / results), references=str(CASES / references), **options)
    )


@pytest.mark.parametrize("results", ["results_zero_padded_ids.json", "results_file_names.json"])
def test_results_are_matched_as_picture_names_are(results):
    summary = scored(results, "evaluation/refs_coco.json")
    assert (summary["n"], summary["without_references"], summary["without_picture"]) == (3, 0, 0)
    assert summary["CIDEr"] > 0


def test_nocaps_results_by_number_are_scored_and_written_by_number(tmp_path):
    summary = scored("results_nocaps_numbers.json", "corpus/nocaps_val.json", out=str(tmp_path))
    assert summary["n"] == 3 and set(summary["domains"]) == {"in-domain", "near-domain", "out-domain"}
    written = json.loads((tmp_path / "captions.json").read_text())
    assert sorted(row["image_id"] for row in written) == [0, 1, 2]


def test_a_stray_quote_in_the_references_costs_no_picture():
    assert scored("results_stray_quote.json", "evaluation/refs_stray_quote.csv")["n"] == 8


def test_cider_of_one_picture_is_null_with_its_reason():
    summary = scored("results_one.json", "evaluation/refs_coco.json")
    assert summary["n"] == 1 and summary["CIDEr"] is None
    assert "no document frequencies" in summary["reasons"]["CIDEr"]


def test_a_limit_takes_the_first_by_image_id_and_counts_no_more_as_missing(tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": f"p{i}", "caption": f"a thing number {i}"} for i in (4, 0, 3, 1)]))
    references = tmp_path / "references.csv"
    references.write_text("image,caption\n" + "".join(f"p{i}.jpg,a thing number {i}\n" for i in range(6)))
    asked = {"results": str(results), "references": str(references), "shuffled_baseline": True}
    summary = evaluate(EvaluateRequest(**asked, limit=1, out=str(tmp_path)))
    assert (summary["n"], summary["without_picture"], summary["without_references"]) == (1, 2, 0)
    assert [row["image_id"] for row in json.loads((tmp_path / "captions.json").read_text())] == ["p0.jpg"]
    assert summary["CIDEr_shuffled"] is None
    assert summary["reasons"]["CIDEr_shuffled"] == "one picture cannot take another's caption"


@pytest.mark.parametrize("references", ["refs_c1_control.json", "refs_too_long.json"])
def test_one_bad_reference_is_left_out_and_counted(references):
    summary = scored("results_zero_padded_ids.json", f"evaluation/{references}")
    assert (summary["n"], summary["bad_references"]) == (3, 1)


def test_two_results_of_one_picture_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 42, "caption": "a"}, {"image_id": "000042", "caption": "b"}]))
    with pytest.raises(InputError, match="two captions for image id 42"):
        evaluate(EvaluateRequest(results=str(path), references=str(CASES / "evaluation" / "refs_coco.json")))
