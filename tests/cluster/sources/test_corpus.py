"""Corpora are read record by record, and no record is lost: kept, or quarantined with a reason."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.sources.corpus import FORMATS, CorpusRecord, detect_format, read_corpus
from pcm.errors import InputError
from pcm.reasons import of_stage
from pcm.text.formats import ReadOptions
from pcm.text.rules import CUT_MARK, MAX_CHARACTERS, check_caption

KARPATHY = {
    "images": [
        {"filename": "COCO_train2014_000000000009.jpg", "split": "train", "cocoid": 9, "imgid": 0, "sentences": [
            {"raw": "A tray of food .", "tokens": ["a", "tray", "of", "food"], "sentid": 101},
            {"raw": "Two boxes of fruit", "tokens": [], "sentid": 102}]},
        {"filename": "COCO_val2014_000000000042.jpg", "split": "restval", "cocoid": 42, "imgid": 1, "sentences": [
            {"raw": "A pair of shoes", "tokens": [], "sentid": 103}]},
        {"filename": "COCO_val2014_000000000073.jpg", "split": "val", "cocoid": 73, "imgid": 2, "sentences": [
            {"raw": "An old motorcycle", "tokens": [], "sentid": 104}]},
        {"filename": "COCO_val2014_000000000074.jpg", "split": "test", "cocoid": 74, "imgid": 3, "sentences": [
            {"raw": "A sleeping dog", "tokens": [], "sentid": 105}]},
    ]
}  # fmt: skip


def captions(path, **options):
    return [record.caption for record in read_corpus(str(path), **options)]


def reasons(path, **options):
    return [record.reason for record in read_corpus(str(path), **options)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_json(path, document):
    return write(path, json.dumps(document))


# --- formats ---


def test_karpathy_train_split_includes_restval(tmp_path):
    path = write_json(tmp_path / "dataset_coco.json", KARPATHY)
    records = list(read_corpus(str(path), split="train"))
    assert records == [
        CorpusRecord(0, "101", "A tray of food .", "9", ""),
        CorpusRecord(1, "102", "Two boxes of fruit", "9", ""),
        CorpusRecord(2, "103", "A pair of shoes", "42", ""),
    ]
    assert captions(path, split="val") == ["An old motorcycle"]
    assert captions(path, split="restval") == ["A pair of shoes"]
    assert len(captions(path)) == len(captions(path, split="all")) == 5


def test_reading_every_split_says_that_the_test_is_among_them(tmp_path, caplog):
    path = write_json(tmp_path / "dataset_coco.json", KARPATHY)
    captions(path, split="train")
    captions(path, split="all")
    assert not caplog.text
    captions(path)
    assert "captions of all its splits are read" in caplog.text and "'test': 1" in caplog.text


def test_flickr30k_images_are_known_by_file_name(tmp_path):
    image = {"filename": "1000092795.jpg", "split": "train", "imgid": 0, "sentences": [{"raw": "Two men", "sentid": 0}]}
    path = write_json(tmp_path / "dataset_flickr30k.json", {"images": [image]})
    assert next(iter(read_corpus(str(path)))).image_id == "1000092795.jpg"


def test_unknown_split_names_the_splits_there_are(tmp_path):
    path = write_json(tmp_path / "dataset_coco.json", KARPATHY)
    with pytest.raises(InputError, match=r"no caption in split 'trian'; its splits are train \(2\), restval"):
        captions(path, split="trian")


def test_records_that_name_no_split_are_the_train_split(tmp_path):
    path = write(tmp_path / "captions.txt", "a dog\n")
    assert captions(path, split="train") == ["a dog"]
    with pytest.raises(InputError, match="no caption in split 'val'; its splits are train"):
        captions(path, split="val")


def test_coco_annotations_keep_their_ids(tmp_path):
    document = {
        "info": {},
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}],
        "annotations": [
            {"id": 55, "image_id": 7, "caption": "a cat\n"},
            {"id": 56, "image_id": 7, "caption": "a red cat"},
        ],
    }
    path = write_json(tmp_path / "captions_train2014.json", document)
    assert list(read_corpus(str(path))) == [
        CorpusRecord(0, "55", "a cat", "7", ""),
        CorpusRecord(1, "56", "a red cat", "7", ""),
    ]


def test_flickr_token_lines_keep_their_key(tmp_path):
    path = write(tmp_path / "results.token", "12#3.jpg#0\tTwo dogs .\n12#3.jpg#1\tA dog\tand a cat\n")
    assert list(read_corpus(str(path))) == [
        CorpusRecord(0, "12#3.jpg#0", "Two dogs .", "12#3.jpg", ""),
        CorpusRecord(1, "12#3.jpg#1", "A dog and a cat", "12#3.jpg", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'image,caption\nx.jpg,a dog\ny.jpg,"a cat, asleep"\n'),
        ("b.csv", "image,caption\r\nx.jpg,a dog\r\ny.jpg,a cat, asleep\r\n"),
        ("c.csv", 'caption,image\na dog,x.jpg\n"a cat, asleep",y.jpg\n'),
        ("d.tsv", "image\tcaption\nx.jpg\ta dog\ny.jpg\ta cat, asleep\n"),
        ("e.csv", "image;caption\nx.jpg;a dog\ny.jpg;a cat, asleep\n"),
        ("f.csv", "\ufeffimage,caption\nx.jpg,a dog\ny.jpg,\"a cat,\n asleep\"\n"),
        ("captions.txt", "image,caption\nx.jpg,a dog\ny.jpg,\"a cat, asleep\"\n"),
    ],
)  # fmt: skip
def test_csv_in_its_usual_spellings(tmp_path, name, content):
    records = list(read_corpus(str(write(tmp_path / name, content))))
    assert [(r.image_id, r.caption, r.reason) for r in records] == [
        ("x.jpg", "a dog", ""),
        ("y.jpg", "a cat, asleep", ""),
    ]


def test_csv_of_one_column_keeps_unquoted_commas(tmp_path):
    assert captions(write(tmp_path / "c.csv", "caption\na dog, running\na cat\n")) == ["a dog, running", "a cat"]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("column", ["caption", "text"])
def test_parquet_captions_whatever_the_string_type(tmp_path, type_, column):
    image = [{"bytes": b"\x00", "path": None}] * 3
    table = pa.table({column: pa.array(["a dog", None, "a cat"], type_), "image": image, "image_id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "c.parquet")
    records = list(read_corpus(str(tmp_path / "c.parquet")))
    assert [(r.caption, r.image_id, r.reason) for r in records] == [
        ("a dog", "1", ""), ("", "2", "missing_caption"), ("a cat", "3", ""),
    ]  # fmt: skip


def test_parquet_lists_of_captions_give_a_record_each(tmp_path):
    table = pa.table(
        {"filename": ["x.jpg", "y.jpg"], "caption": [["a dog", "the dog"], ["a cat"]], "split": ["train", "test"]}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    records = list(read_corpus(str(tmp_path / "c.parquet"), split="train"))
    assert [(r.corpus_id, r.caption, r.image_id) for r in records] == [
        ("0#0", "a dog", "x.jpg"),
        ("0#1", "the dog", "x.jpg"),
    ]


@pytest.mark.parametrize(
    ("first", "second", "used"),
    [("caption", "caption", "caption"), ("Caption", "caption", "caption"), ("image_id", "Image_ID", "image_id")],
)
def test_a_column_that_is_there_twice_is_refused(tmp_path, first, second, used):
    names = ["caption", "x"] if used == "image_id" else ["text"]  # text is not looked at beside a caption
    table = pa.table([["a"], ["b"], *([name] for name in names)], names=[first, second, *names])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=f"c.parquet: two columns '{first}', '{second}'; rename or leave out one"):
        captions(str(tmp_path / "c.parquet"))


def test_a_csv_with_two_caption_columns_is_refused_until_one_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "c.csv", "Caption,image,caption\na dog,1.jpg,a cat\n")
    with pytest.raises(InputError, match="two columns 'Caption', 'caption'; rename or leave out one"):
        captions(path)
    assert captions(path, options=ReadOptions(caption_columns=("3",))) == ["a cat"]


def test_an_empty_list_of_captions_is_one_bad_record_in_every_format(tmp_path):
    pq.write_table(pa.table({"caption": [["a dog"], []]}), tmp_path / "c.parquet")
    files = [
        tmp_path / "c.parquet",
        write(tmp_path / "c.jsonl", '{"captions": ["a dog"]}\n{"captions": []}\n'),
        write_json(
            tmp_path / "list.json", [{"image": "1.jpg", "caption": ["a dog"]}, {"image": "2.jpg", "caption": []}]
        ),
        write_json(tmp_path / "k.json", {"images": [{"sentences": [{"raw": "a dog"}]}, {"sentences": []}]}),
    ]
    for file in files:
        found = [(record.caption, record.reason) for record in read_corpus(str(file))]
        assert found == [("a dog", ""), ("[]", "bad_record")], file.name


def test_jsonl_takes_caption_or_text(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        '{"caption": "a dog", "image": "x.jpg"}\n\n{"text": "a cat"}\n{"captions": ["one", "two"]}\n',
    )
    assert captions(path) == ["a dog", "a cat", "one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.json", '{"images": []}', "json"),
        ("a.json", '{"caption": "a dog"}\n{"caption": "a cat"}\n', "jsonl"),
        ("a.jsonl", "not json\n", "jsonl"),
        ("a.tsv", "caption\n", "csv"),
        ("Flickr8k.token.txt", "1.jpg#0\ta dog\n", "flickr_token"),
        ("captions", "1.jpg#0\ta dog\n", "flickr_token"),
        ("captions", "a dog\na cat\n", "text"),
        ("a.txt", "a dog with \x00 in it\n", "text"),
        ("a.txt.gz", gzip.compress(b"a dog\n", mtime=0), "text"),
        ("a.odd", '{"caption": "a dog"}\n', "jsonl"),
    ],
)
def test_formats_are_told_by_name_and_content(tmp_path, name, content, format):
    assert detect_format(str(write(tmp_path / name, content))) == format


@pytest.mark.parametrize(
    ("name", "content"), [("a.jpg", b"\xff\xd8\xff\xe0"), ("a.bin", b"\x00\x01"), ("a.pkl", b"\x80\x04]")]
)
def test_undetectable_file_lists_the_formats(tmp_path, name, content):
    with pytest.raises(InputError, match=f"one of {', '.join(FORMATS)}"):
        captions(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("gzip", gzip.compress(b"a dog\n", mtime=0)),
        ("bzip2", bz2.compress(b"a dog\n")),
        ("xz", lzma.compress(b"a dog\n")),
        ("zstd", b"\x28\xb5\x2f\xfd\x04\x00"),
        ("zip", b"PK\x03\x04\x14\x00"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("format", ["auto", "text"])
def test_packed_data_under_another_name_is_no_corpus(tmp_path, kind, data, name, format):
    wanted = f"{name}: {kind} data; decompress it first"
    with pytest.raises(InputError, match=wanted + (", or name it .gz" if kind == "gzip" else "$")):
        captions(write(tmp_path / name, data), format=format)


def test_named_format_wins_over_the_extension(tmp_path):
    path = write(tmp_path / "captions.csv", "a dog, a cat\nimage,caption\n")
    assert captions(path, format="text") == ["a dog, a cat", "image,caption"]


def test_wrong_format_name_lists_the_formats(tmp_path):
    with pytest.raises(InputError, match="'yaml' is not known; allowed: auto, karpathy, coco"):
        captions(write(tmp_path / "a.txt", "a dog\n"), format="yaml")


# --- bad captions ---


@pytest.mark.parametrize(
    ("text", "caption", "reason"),
    [
        ("", "", "empty"),
        (" \t\r\n\xa0\u3000", "", "empty"),
        ("\u200b\ufeff", "\u200b\ufeff", "empty"),
        ("a\x00dog", "a\x00dog", "control_characters"),
        ("a\x1b[31m dog", "a\x1b[31m dog", "control_characters"),
        ("a\x1cdog", "a\x1cdog", "control_characters"),
        ("a\x9bdog", "a\x9bdog", "control_characters"),
        ("caf\udce9 table", "caf\ufffd table", "invalid_utf8"),
        ("x" * (MAX_CHARACTERS + 1), "x" * MAX_CHARACTERS + CUT_MARK, "too_long"),
        ("x" * 10_000, "x" * MAX_CHARACTERS + CUT_MARK, "too_long"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS, ""),
        ("x" + " " * MAX_CHARACTERS + "y", "x y", ""),
        ("  a \t dog\n\nruns\u2028home ", "a dog runs home", ""),
        ("a dog 🐶👨‍👩‍👧", "a dog 🐶👨‍👩‍👧", ""),
        ("\u202bכלב רץ\u202c", "\u202bכלב רץ\u202c", ""),
        ("كلب يجري على الشاطئ", "كلب يجري على الشاطئ", ""),
        ("cafe\u0301", "cafe\u0301", ""),
        ("café", "café", ""),
        ("word " * 100, ("word " * 100).strip(), ""),
        ("\ufffd is a character", "\ufffd is a character", ""),
        ("...", "...", ""),
    ],
)
def test_the_rule_for_bad_captions(text, caption, reason):
    assert check_caption(text) == (caption, reason)
    assert reason == "" or reason in of_stage("caption")
    caption.encode("utf-8")


def test_every_format_quarantines_the_same_captions(tmp_path):
    bad = ["a dog", "  ", "a\x00dog", "x" * 3000, "a dog", "caf\udce9"]
    wanted = ["", "empty", "control_characters", "too_long", "", "invalid_utf8"]
    rows = [{"caption": text, "image": f"{i}.jpg"} for i, text in enumerate(bad)]
    # Bytes that are not UTF-8, as a file holds them: \udce9 is Python's stand-in for the byte E9.
    dump = lambda document: json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogateescape")  # noqa: E731
    encoded = [text.encode("utf-8", "surrogateescape") for text in bad]
    table = pa.table({"caption": pa.array(encoded, pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "c.parquet")
    files = [
        tmp_path / "c.parquet",
        write(tmp_path / "c.jsonl", b"\n".join(map(dump, rows))),
        write(tmp_path / "k.json", dump({"images": [{"sentences": [{"raw": text} for text in bad]}]})),
        write(tmp_path / "o.json", dump({"annotations": rows})),
        write(tmp_path / "c.csv", b"image,caption\n" + b"\n".join(b"1.jpg," + text for text in encoded)),
        write(tmp_path / "c.token", b"\n".join(b"1.jpg#%d\t%s" % (i, text) for i, text in enumerate(encoded))),
    ]
    for path in files:
        assert reasons(path) == wanted, path


def test_blank_lines_of_a_text_file_are_no_records(tmp_path):
    path = write(tmp_path / "c.txt", "\n\na dog\r\n   \n\t\n\xa0\na cat\n\n\x1c\n")
    assert captions(path) == ["a dog", "a cat", "\x1c"]
    assert [record.corpus_id for record in read_corpus(str(path))] == ["0", "1", "2"]


def test_only_a_line_feed_ends_a_caption(tmp_path):
    assert captions(write(tmp_path / "c.txt", "a\u2028dog\x85in\x0bthe\rpark\n")) == ["a dog in the park"]


def test_json_of_the_wrong_shape_in_one_record_is_quarantined(tmp_path):
    lines = ['{"caption": "a dog"}', "{broken", "[1, 2]", '"a dog"', "null", '{"caption": 5}', '{"caption": ["a"]}',
             '{"caption": {"raw": "a"}}', '{"caption": null}', '{"image": "x.jpg"}', '{"captions": []}']  # fmt: skip
    path = write(tmp_path / "c.jsonl", "\n".join(lines))
    assert reasons(path) == [""] + ["bad_record"] * 7 + ["missing_caption"] * 2 + ["bad_record"]


def test_broken_images_and_sentences_of_karpathy_are_records(tmp_path):
    images = [
        {
            "split": "train",
            "sentences": [{"raw": "a dog"}, {"tokens": ["a", "cat"]}, {"sentid": 3}, "text", {"raw": 7}],
        },
        "not an image",
        {"split": "train"},
        {"split": "train", "sentences": "a dog"},
        {"split": "val", "sentences": None},
    ]
    path = write_json(tmp_path / "k.json", {"images": images})
    records = list(read_corpus(str(path), split="train"))
    assert [r.reason for r in records] == [
        "", "", "missing_caption", "bad_record", "bad_record", "bad_record", "missing_caption", "bad_record",
    ]  # fmt: skip
    assert records[1].caption == "a cat"
    assert len({r.corpus_id for r in records}) == len(records)


def test_csv_rows_with_too_few_fields_are_quarantined(tmp_path):
    path = write(tmp_path / "c.csv", "image,caption\nx.jpg,a dog\njust text\n\ny.jpg,\nz.jpg,a cat\n")
    assert reasons(path) == ["", "bad_record", "empty", ""]


def test_a_line_without_its_key_is_quarantined(tmp_path):
    assert reasons(write(tmp_path / "c.token", "1.jpg#0\ta dog\nno tab here\n1.jpg\ta dog\n")) == [
        "",
        "bad_record",
        "bad_record",
    ]


def test_duplicates_are_records_of_their_own(tmp_path):
    records = list(read_corpus(str(write(tmp_path / "c.txt", "a dog\na dog\n"))))
    assert [(r.index, r.corpus_id, r.caption) for r in records] == [(0, "0", "a dog"), (1, "1", "a dog")]


# --- files that cannot be used ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1, 2]", "it is a list"),
        ("a.json", '{"images": 3}', "an object with the keys 'images'"),
        ("a.json", '{"images": [{"id": 1}]}', "none of its 1 images has 'sentences'"),
        ("a.json", '{"annotations": [{"bbox": [1, 2]}]}', "none of its 1 annotations has a 'caption'"),
        ("a.json", '{"images": [', "not valid JSON"),
        ("a.json", "", "not valid JSON"),
        (
            "a.csv",
            "image,title\nx.jpg,a dog\n",
            r"no column 'caption' .* are 1 'image', 2 'title'; .*--caption-column",
        ),
        ("a.csv", "", "empty; a CSV needs a header"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.txt", "\n \n", "no usable caption .*no record at all"),
        ("a.jsonl", '{"caption": ""}\n{"x": 1}\n', "no usable caption .*1 empty, 1 missing_caption"),
        ("a.txt", "a dog\n".encode("utf-16"), "UTF-16"),
        ("a.txt.gz", b"not gzip", "gz"),
        ("a.txt.gz", gzip.compress(b"a dog\n" * 9999)[:-20], "ended before"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        captions(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_parquet_without_captions_names_its_columns(tmp_path):
    pq.write_table(pa.table({"url": ["x"], "title": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column 'caption' .*columns are 1 'url', 2 'title'; .*--caption-column"):
        captions(tmp_path / "a.parquet")
    pq.write_table(pa.table({"caption": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="column 'caption' is int64; wanted strings"):
        captions(tmp_path / "b.parquet")


def test_parquet_damaged_in_the_middle_is_one_clear_line(tmp_path):
    pq.write_table(pa.table({"caption": [f"a dog {i}" for i in range(999)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:60] = bytes(56)
    with pytest.raises(InputError, match="not a readable Parquet file") as error:
        captions(write(tmp_path / "a.parquet", bytes(content)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [("/no/such/file.txt", "no such file"), ("nowhere://x/y.txt", "cannot be opened"), (".", "folder|no such file")],
)
def test_a_corpus_that_cannot_be_opened_is_one_clear_line(uri, message):
    with pytest.raises(InputError, match=message):
        captions(uri)


def test_json_documents_named_as_the_other_format_are_refused(tmp_path):
    path = write_json(tmp_path / "dataset_coco.json", KARPATHY)
    with pytest.raises(InputError, match="not COCO's JSON"):
        captions(path, format="coco")


# --- limits, URIs, memory ---


def test_limit_counts_records_good_and_bad(tmp_path):
    path = write(tmp_path / "c.csv", "image,caption\nx.jpg,\nx.jpg,a dog\nx.jpg,a cat\n")
    assert reasons(path, limit=2) == ["empty", ""]
    with pytest.raises(InputError, match="limit 0"):
        captions(path, limit=0)


def test_file_uris_and_gzip_read_as_the_plain_path(tmp_path):
    path = write(tmp_path / "c.txt", "a dog\na cat\n")
    write(tmp_path / "c.txt.gz", gzip.compress(path.read_bytes()))
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"caption": "a dog"}\n{"caption": "a cat"}\n'))
    for uri in (path, f"file://{path}", tmp_path / "c.txt.gz", f"file://{tmp_path}/c.jsonl.gz"):
        assert captions(uri) == ["a dog", "a cat"]


def test_corpora_on_an_object_store_read_as_the_local_file(tmp_path, s3):
    write(tmp_path / "c.txt.gz", gzip.compress(b"a dog\na cat\n"))
    write_json(tmp_path / "dataset_coco.json", KARPATHY)
    pq.write_table(pa.table({"caption": ["a dog", "a cat"]}), tmp_path / "c.parquet")
    store = fsspec.filesystem("s3")
    for path in tmp_path.iterdir():
        store.put_file(str(path), f"{s3.uri}/corpora/{path.name}")
        assert list(read_corpus(f"{s3.uri}/corpora/{path.name}")) == list(read_corpus(str(path)))
    with pytest.raises(InputError, match="no such file"):
        captions(f"{s3.uri}/corpora/absent.txt")


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.csv"])
def test_memory_stays_flat_whatever_the_length(tmp_path, name):
    line = {"c.txt": "a dog runs\n", "c.jsonl": '{"caption": "a dog runs"}\n', "c.csv": "a dog runs\n"}[name]
    path = write(tmp_path / name, ("caption\n" if name == "c.csv" else "") + line * 20_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_corpus(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 3 << 20  # the read buffer is 1 MB; the records together are 5 MB
