"""Reference captions by image id, from every format, or one clear line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pcm.errors import InputError
from pcm.text.references import CocoPicture, load_coco_pictures, load_references

WANTED = {"a.jpg": ["a dog", "the dog"], "b.jpg": ["a cat"]}


def write_all(folder):
    """The same references in every format. Returns the paths."""
    pairs = [(image, text) for image, texts in WANTED.items() for text in texts]
    files = {
        "token.token": "".join(f"{image}#{k}\t{text} \n" for k, (image, text) in enumerate(pairs)),
        "pairs.csv": "image,caption\n" + "".join(f"{image},{text}\n" for image, text in pairs),
        "pairs.tsv": "image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in pairs),
        "pairs.jsonl": "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in pairs),
        "lists.jsonl": "".join(json.dumps({"image_id": i, "references": t}) + "\n" for i, t in WANTED.items()),
        "karpathy.json": json.dumps({"images": [
            {"filename": i, "split": "test", "sentences": [{"raw": text} for text in t]} for i, t in WANTED.items()
        ]}),
        "coco.json": json.dumps({
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
            "annotations": [{"image_id": 7 if image == "a.jpg" else 8, "caption": text} for image, text in pairs],
        }),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "pairs.csv.gz").write_bytes(gzip.compress(files["pairs.csv"].encode()))
    image = [{"bytes": b"\xff\xd8", "path": None}] * 2
    table = pa.table({"image_id": list(WANTED), "image": image, "references": list(WANTED.values())})
    pq.write_table(table, folder / "photos.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_references(tmp_path):
    paths = write_all(tmp_path)
    assert len(paths) == 9
    for path in paths:
        assert load_references(path).by_image == WANTED, path


def test_coco_pictures_are_known_by_the_number_in_their_name(tmp_path):
    karpathy = {"images": [
        {"filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895, "split": "test",
         "sentences": [{"raw": "a man"}]},
        {"filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "split": "val", "sentences": [{"raw": "shoes"}]},
    ]}  # fmt: skip
    coco = {
        "images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}],
        "annotations": [{"id": 1, "image_id": 391895, "caption": "a man\n"}],
    }
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    (tmp_path / "c.json").write_text(json.dumps(coco))
    assert load_references(tmp_path / "k.json", split="test").by_image == {"391895": ["a man"]}
    assert load_references(tmp_path / "k.json", split="val").by_image == {"42": ["shoes"]}
    assert load_references(tmp_path / "k.json").by_image == {"391895": ["a man"], "42": ["shoes"]}
    assert load_references(tmp_path / "c.json").by_image == {"391895": ["a man"]}


def test_references_that_cannot_be_used_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "r.csv").write_text("image,caption\na.jpg,a dog\na.jpg,  \nb.jpg,\nc.jpg,a\x00cat\n,a cow\njust text\n")
    found = load_references(tmp_path / "r.csv")
    assert found.by_image == {"a.jpg": ["a dog"]}
    assert found.left_out == {"empty": 2, "control_characters": 1, "no_image": 1, "bad_record": 1}
    assert "5 references left out (2 empty, 1 control_characters" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "a dog\n", "left out: 1 no_image"),
        ("r.csv", "image,caption\na.jpg,a\x00dog\n", "left out: 1 control_characters"),
        ("r.csv", "image,caption\njust text\n", "left out: 1 bad_record"),
        ("r.csv", "image,caption\na.jpg,\n", "no references in split 'all'"),
        ("r.json", "[]", "neither Karpathy's JSON"),
        ("r.csv.gz", "not gzip", "cannot be read"),
        ("r.pkl", "x", "cannot tell its caption format, one of .*; give the file the ending of its format"),
    ],
)
def test_unusable_references_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_references(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name", ["r.csv.gz", "r.json.gz"])
def test_damaged_gzip_is_one_clear_line(tmp_path, name):
    whole = gzip.compress(
        json.dumps([{"image": f"{n}.jpg", "caption": f"a dog {n * n}"} for n in range(3000)]).encode()
    )
    for damaged in (whole[:-500], whole[:200] + bytes(64) + whole[264:], b"not gzip"):
        (tmp_path / name).write_bytes(damaged)
        for read in (load_references, load_coco_pictures)[: 2 if "json" in name else 1]:
            with pytest.raises(InputError, match="cannot be read"):
                read(tmp_path / name)


def test_missing_split_names_the_splits_there_are(tmp_path):
    write_all(tmp_path)
    with pytest.raises(InputError, match="no references in split 'val'; its splits are test"):
        load_references(tmp_path / "karpathy.json", split="val")
    with pytest.raises(InputError, match="cannot be read"):
        load_references(tmp_path / "absent.json")


def test_nocaps_domains_go_by_the_same_ids_as_its_references(tmp_path):
    document = {
        "images": [
            {"id": 0, "file_name": "0013ea2087020901.jpg", "domain": "near-domain"},
            {"id": 1, "file_name": "0015a66e2a9be1b7.jpg", "domain": "out-domain"},
        ],
        "annotations": [{"image_id": k % 2, "id": k, "caption": f"caption {k}"} for k in range(4)],
    }
    path = tmp_path / "nocaps_val.json"
    path.write_text(json.dumps(document))
    known = load_coco_pictures(path)
    assert known == {
        "0013ea2087020901.jpg": CocoPicture(0, "near-domain"),
        "0015a66e2a9be1b7.jpg": CocoPicture(1, "out-domain"),
    }
    assert load_references(path).by_image.keys() == known.keys()


@pytest.mark.parametrize(
    ("number", "file_name", "image_id"),
    [
        (42, "000000000042.jpg", "42"),
        (42, "val2014/COCO_val2014_000000000042.jpg", "42"),
        (42, "val2014\\42.jpg", "42"),
        (42, "val2014\\COCO_val2014_000000000042.jpg", "42"),
        (42, "img42.jpg", "42"),
        (42, "image-42.jpg", "42"),
        (42, "cafe42.jpg", "42"),
        (0, "a/COCO_0000.jpg", "0"),
        (2, "img42.jpg", "img42.jpg"),
        (42, "COCO_val2014_000000000042", "COCO_val2014_000000000042"),
        (42, "val.2014/42", "val.2014/42"),
        (7, "0a1b2c3d4e5f0007.jpg", "0a1b2c3d4e5f0007.jpg"),
        (7, "val\\0A1B2C3D4E5F0007.jpg", "val\\0A1B2C3D4E5F0007.jpg"),
        (7, "d41d8cd98f00b204e9800998ecf80007.jpg", "d41d8cd98f00b204e9800998ecf80007.jpg"),
    ],
)
def test_a_picture_is_known_by_its_number_where_its_file_name_ends_in_it_and_is_no_hash(
    tmp_path, number, file_name, image_id
):
    document = {
        "images": [{"id": number, "file_name": file_name}],
        "annotations": [{"image_id": number, "id": 1, "caption": "a dog"}],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    assert list(load_references(path).by_image) == list(load_coco_pictures(path)) == [image_id]


def test_files_without_domains_have_none(tmp_path):
    for path in write_all(tmp_path):
        assert not any(picture.domain for picture in load_coco_pictures(path).values())
