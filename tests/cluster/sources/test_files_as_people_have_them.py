"""Caption files as people have them: no row is lost in silence, and what is refused says which flag helps."""

import gzip
import json
from pathlib import Path

import pytest

from cluster.sources.corpus import CorpusRecord, read_corpus
from pcm.errors import InputError
from pcm.text.caption_rows import MAX_LINE_BYTES, ReadOptions
from pcm.text.csv_records import MAX_LINES, CsvRecords
from tests.helpers.paths import DATA

CORPUS = DATA / "cases" / "corpus"
SECURITY = DATA / "cases" / "security"


def read(path: Path, **options) -> list[CorpusRecord]:
    columns = options.pop("columns", ())
    quoting = options.pop("quoting", "auto")
    return list(read_corpus(str(path), options=ReadOptions(caption_columns=columns, csv_quoting=quoting), **options))


def captions(path: Path, **options) -> list[str]:
    return [record.caption for record in read(path, **options)]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# --- quotes ---


def test_a_lone_quote_in_a_tsv_swallows_nothing():
    records = read(CORPUS / "quotes_header.tsv")
    assert [record.caption for record in records] == [
        "a red bus parks at the kerb",
        '"the boat leaves the harbour',
        "two cats sleep on a sofa",
        "a man rides a bicycle",
        'a sign that says "stop',
        "a woman reads a book",
        '" open " sign in a window',
        "the train arrives",
    ]
    assert not any(record.reason for record in records)


@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_one_stray_quote_of_5000_costs_no_record(tmp_path, delimiter):
    rows = [f"{number}.jpg{delimiter}a plain caption number {number} about a park" for number in range(5000)]
    rows[10] = f'10.jpg{delimiter}"a stray quote opens here'
    path = write(tmp_path / "captions.csv", "\n".join([f"image{delimiter}caption", *rows]) + "\n")
    found = captions(path)
    assert len(found) == 5000
    assert found[10] == '"a stray quote opens here' and found[4999].endswith("number 4999 about a park")


def test_a_stray_quote_in_references_loses_no_picture():
    found = read(DATA / "cases" / "evaluation" / "refs_stray_quote.csv")
    assert len({record.image_id for record in found}) == 8 and len(found) == 16


def test_a_quoted_field_over_several_lines_is_one_record(tmp_path):
    path = write(tmp_path / "c.csv", 'image,caption\n1.jpg,"a dog\nthat runs,\nfast"\n2.jpg,a cat\n')
    assert captions(path) == ["a dog that runs, fast", "a cat"]


def test_two_stray_quotes_do_not_join_lines_that_are_records_by_themselves(tmp_path):
    path = write(tmp_path / "c.csv", 'image,caption\n1.jpg,"a dog\n2.jpg,a cat"\n3.jpg,a cow\n')
    assert captions(path) == ['"a dog', 'a cat"', "a cow"]


def test_such_lines_are_joined_where_the_file_quotes_its_fields(tmp_path):
    path = write(tmp_path / "c.csv", 'image,caption\n0.jpg,"a ""big"" dog"\n1.jpg,"a dog\nruns, fast"\n3.jpg,a cow\n')
    assert captions(path) == ['a "big" dog', "a dog runs, fast", "a cow"]


def test_a_tsv_that_a_writer_quoted_is_read_as_quoted(tmp_path):
    path = write(tmp_path / "c.tsv", 'image\tcaption\n1.jpg\t"a ""big"" dog"\n2.jpg\t"a tab\there"\n')
    assert captions(path) == ['a "big" dog', "a tab here"]


def test_a_tsv_whose_captions_are_in_quotes_keeps_them_without_proof(tmp_path):
    path = write(tmp_path / "c.tsv", 'image\tcaption\n1.jpg\t"stop"\n2.jpg\ta cat\n')
    assert captions(path) == ['"stop"', "a cat"]


def test_the_user_can_say_how_fields_are_quoted(tmp_path):
    path = write(tmp_path / "c.tsv", 'image\tcaption\n1.jpg\t"stop"\n')
    assert captions(path, quoting="quoted") == ["stop"]
    path = write(tmp_path / "c.csv", 'image,caption\n1.jpg,"stop"\n')
    assert (captions(path), captions(path, quoting="none")) == (["stop"], ['"stop"'])
    with pytest.raises(InputError, match="CSV quoting 'maybe': allowed are auto, quoted, none"):
        read(path, quoting="maybe")
    with pytest.raises(InputError, match="--csv-quoting none is for CSV files; this is read as text"):
        read(write(tmp_path / "c.txt", "a dog\n"), quoting="none")


def test_a_quote_that_is_never_closed_looks_ahead_so_far_and_no_farther():
    lines = iter(['1,"open', *["x"] * (MAX_LINES + 5), '2,closed"'])
    assert len(list(CsvRecords(lines, ",", 2))) == MAX_LINES + 7


def test_what_was_decided_about_quotes_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    read(write(tmp_path / "c.csv", 'image,caption\n1.jpg,"a dog\nruns"\n2.jpg,"a cat\n3.jpg,a cow\n'))
    assert "1 records run over several lines; in 1 a quote at the beginning of a field is a character" in caplog.text


# --- columns ---


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("open_clip.csv", "title", ["a red cube on a blue sphere", "a fox in the snow"]),
        ("diffusiondb_metadata.parquet", "prompt", ["a castle on a hill, oil painting"]),
    ],
)
def test_a_caption_column_is_named_and_without_it_the_error_lists_the_columns(name, column, expected):
    assert captions(CORPUS / name, columns=(column,))[: len(expected)] == expected
    with pytest.raises(InputError, match=rf"its columns are 1 '.*'{column}'.*--caption-column"):
        read(CORPUS / name)


def test_several_caption_columns_are_records_of_one_picture():
    records = read(CORPUS / "hf_flickr8k_wide.parquet", columns=("caption_0", "caption_1"))
    assert [(record.corpus_id, record.caption) for record in records] == [
        ("0#0", "A dog, view 0."),
        ("0#1", "A dog, view 1."),
        ("1#0", "A cat, view 0."),
        ("1#1", "A cat, view 1."),
    ]
    with pytest.raises(InputError, match=r"no column 'caption_0' or 'caption_9'; its columns are 1 'image'"):
        read(CORPUS / "hf_flickr8k_wide.parquet", columns=("caption_0", "caption_9"))


def test_a_file_without_a_header_is_read_by_the_number_of_its_column():
    found = captions(CORPUS / "Train_GCC-training.tsv", columns=("1",))
    assert len(found) == 6 and found[0] == "a quiet street number 0 in the old town"
    with pytest.raises(InputError, match=r"by its number .* where a CSV file has no header"):
        read(CORPUS / "Train_GCC-training.tsv")
    with pytest.raises(InputError, match="no column 3; its first line has 2"):
        read(CORPUS / "Train_GCC-training.tsv", columns=("3",))


def test_a_header_is_no_record_when_its_column_is_numbered(tmp_path):
    path = write(tmp_path / "c.csv", "image,caption\n1.jpg,a dog\n")
    assert captions(path, columns=("2",)) == ["a dog"]


def test_options_that_have_no_effect_are_refused():
    with pytest.raises(InputError, match="--caption-column is for files with columns"):
        read(CORPUS / "coco_karpathy_train.json", columns=("caption",))


def test_jsonl_fields_are_named_and_their_case_does_not_matter(tmp_path):
    assert captions(CORPUS / "laion.jsonl")[0] == "A mountain lake at dawn"
    path = write(tmp_path / "c.jsonl", '{"id": 1, "Prompt": "a dog"}\n{"id": 2, "Prompt": "a cat"}\n')
    assert captions(path, columns=("prompt",)) == ["a dog", "a cat"]
    with pytest.raises(InputError, match="no record has a field 'title'; the fields of the first are 'id', 'Prompt'"):
        read(path, columns=("title",))
    with pytest.raises(InputError, match=r"a field 'caption' .*are 'id', 'Prompt'; name .* with --caption-column NAME"):
        read(path)
    with pytest.raises(InputError, match=r"1 missing_caption\); name the captions' field with --caption-column NAME"):
        list(read_corpus(str(path), limit=1))


# --- formats ---


def test_kaggles_flickr30k():
    records = read(CORPUS / "flickr30k_results.csv")
    assert [record.reason for record in records].count("") == 14
    assert [record.corpus_id for record in records if record.reason == "bad_record"] == ["7"]
    assert records[0].image_id == "100000.jpg" and records[0].caption == "A dog number 0 runs across field 0 ."


def test_blips_list_and_textcaps():
    records = read(CORPUS / "coco_karpathy_train.json")
    assert [record.caption for record in records] == [f"A dog sits on chair {number}." for number in range(4)]
    assert records[3].image_id == "COCO_val2014_000000000003.jpg"
    (record,) = read(CORPUS / "TextCaps_0.1_val.json")
    assert (record.image_id, record.caption) == ("004a21eb686e7b6b", "A jersey with the number 15.")


def test_blips_test_lists_have_several_captions_a_picture(tmp_path):
    path = tmp_path / "coco_karpathy_test.json"
    path.write_text(json.dumps([{"image": "val2014/a.jpg", "caption": ["a dog", "a brown dog"]}]))
    assert [(r.corpus_id, r.image_id, r.caption) for r in read(path)] == [
        ("row0#0", "a.jpg", "a dog"),
        ("row0#1", "a.jpg", "a brown dog"),
    ]


def test_captions_that_vizwiz_rejects_are_quarantined():
    assert [record.reason for record in read(CORPUS / "vizwiz_val.json")] == ["", "rejected", ""]


def test_ids_that_pandas_made_floats_are_whole_numbers():
    assert [record.image_id for record in read(CORPUS / "pandas_float_ids.csv")] == ["391895", None, "522418"]


@pytest.mark.parametrize("name", ["classic_mac.csv", "classic_mac.txt"])
def test_a_lone_carriage_return_ends_a_line_where_no_line_feed_does(name):
    found = captions(CORPUS / name)
    assert found[:2] == ["a man at a table", "the big playground"]


@pytest.mark.parametrize("size", [7, 64, 1000])
@pytest.mark.parametrize("name, head", [("c.txt", ""), ("c.csv", "id,caption\r")])
def test_lone_carriage_returns_end_the_lines_of_a_file_of_any_size(name, head, size, tmp_path, monkeypatch):
    """It was one line where it is longer than the longest line that is read."""
    told = [f"a dog number {number}" for number in range(100)]
    rows = [f"{number},{caption}" if head else caption for number, caption in enumerate(told)]
    path = write(tmp_path / name, head + "\r".join(rows) + "\r")
    monkeypatch.setattr("pcm.text.caption_rows.MAX_LINE_BYTES", max(size, 30))
    assert captions(path) == told
    monkeypatch.setattr("pcm.text.caption_rows.MAX_LINE_BYTES", 12 + size)
    assert len(captions(path)) == 100


def test_a_carriage_return_inside_a_line_ends_nothing(tmp_path):
    assert captions(write(tmp_path / "c.txt", "a dog\rruns\na cat\n")) == ["a dog runs", "a cat"]


# --- bounds ---


def test_numbers_too_long_to_read_spoil_one_record_alone():
    assert [record.reason for record in read(SECURITY / "bigint.jsonl")] == ["", "bad_record", ""]
    with pytest.raises(InputError, match=r"no usable caption .*1 bad_record"):
        read(SECURITY / "bigint.json")
    assert [record.caption for record in read(SECURITY / "cocofile.json")] == ["a dog"]


def test_an_endless_line_is_cut_and_the_next_record_is_read(tmp_path):
    path = tmp_path / "c.txt.gz"
    path.write_bytes(gzip.compress(b"x" * (3 * MAX_LINE_BYTES + 5) + b"\na dog\n"))
    assert [(record.reason, record.caption[:5]) for record in read(path)] == [("too_long", "xxxxx"), ("", "a dog")]
