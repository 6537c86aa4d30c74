"""Folders and tables of pictures as people have them: every picture is found, and what is none is one line."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from cluster.sources.corpus import read_corpus
from cluster.sources.pictures import (
    PictureSource,
    candidate_ids,
    check_source,
    find_pictures,
    load_picture_set,
    picture_references,
)
from pcm.errors import InputError
from tests.helpers.paths import DATA

IMAGES = DATA / "cases" / "images"
TABLES = DATA / "cases" / "parquet"


def copy(source: str, *target: str | Path) -> Path:
    path = Path(*target)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(IMAGES / source, path)
    return path


def test_what_macos_keeps_beside_pictures_is_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.jpg", "._a.jpg", "__MACOSX/a.jpg"):
        copy("upright.jpe", tmp_path, name)
    assert list(find_pictures(str(tmp_path)).names) == ["a.jpg"]
    assert "2 files left out that macOS keeps beside pictures" in caplog.text


def test_every_ending_that_a_picture_has_is_found(tmp_path):
    names = ["a.jfif", "b.jpe", "c.JPG", "d.tif", "e.avif", "f.heic"]
    for name in names:
        copy("upright.jpe", tmp_path, name)
    assert sorted(find_pictures(str(tmp_path)).names) == sorted(names)


def test_a_link_that_leads_nowhere_is_one_line_and_a_loop_ends(tmp_path):
    copy("upright.jpe", tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "outer").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    assert sorted(find_pictures(str(tmp_path)).names) == ["a.jpg", "b.jpg", "c.jpg"]
    references = tmp_path / "references.csv"
    references.write_text("image,caption\na.jpg,a house\nb.jpg,a house\nc.jpg,a house\n")
    found = load_picture_set(PictureSource(images=str(tmp_path), references=str(references)))
    assert found.open(0).size == (320, 240)
    for position, name in ((1, "b"), (2, "c")):
        with pytest.raises(InputError, match=rf"{name}\.jpg: cannot be read \(FileNotFoundError\)"):
            found.open(position)


@pytest.mark.parametrize("name", [unicodedata.normalize("NFD", "café.jpg"), " café.jpg"])
def test_names_match_however_accents_and_blanks_are_written(tmp_path, name):
    copy("upright.jpe", tmp_path, "pictures", name)
    references = tmp_path / "references.csv"
    references.write_text("image,caption\n" + unicodedata.normalize("NFC", "café.jpg") + ",a house\n")
    found = load_picture_set(PictureSource(images=str(tmp_path / "pictures"), references=str(references)))
    assert len(found) == 1 and found.open(0).size == (320, 240)


@pytest.mark.parametrize("name", ["COCO_000042.jpg", "0a1b2c3d4e5f0042.jpg"])
def test_the_picture_of_a_coco_entry_is_found_by_its_own_name(tmp_path, name):
    copy("upright.jpe", tmp_path, "pictures", name)
    document = {
        "images": [{"id": 42, "file_name": name}],
        "annotations": [{"image_id": 42, "id": 1, "caption": "a house"}],
    }
    references = tmp_path / "captions.json"
    references.write_text(json.dumps(document))
    assert len(load_picture_set(PictureSource(images=str(tmp_path / "pictures"), references=str(references)))) == 1


def test_a_number_of_any_length_is_an_id():
    assert candidate_ids("val/COCO_val2014_000000391895.jpg")[:5] == [
        "val/COCO_val2014_000000391895.jpg",
        "COCO_val2014_000000391895.jpg",
        "val/COCO_val2014_000000391895",
        "COCO_val2014_000000391895",
        "391895",
    ]
    assert candidate_ids("")[0] == "" and candidate_ids(".")[0] == "."
    assert "9" * 5000 in candidate_ids("9" * 5000 + ".jpg")


def test_plain_binary_images_and_parts_of_different_id_types_are_read(tmp_path):
    found = find_pictures(str(TABLES / "binary_image.parquet"))
    assert len(found.names) == 3 and found.read(0)[:2] == b"\xff\xd8"
    assert list(find_pictures(str(TABLES / "mixed")).names) == ["42", "x43"]
    assert find_pictures(str(TABLES / "int_ids.parquet")).names[0] == "42"


@pytest.mark.parametrize("name", ["path_strings.parquet", "path_only.parquet", "hf_image_text.parquet"])
def test_a_table_without_picture_bytes_or_ids_is_one_line(name):
    with pytest.raises(InputError, match=r"needs columns image_id and image .*of these it has"):
        find_pictures(str(TABLES / name))


def test_captions_beside_pictures_in_lists_are_a_corpus():
    records = list(read_corpus(str(TABLES / "hf_flickr30k.parquet")))
    assert [record.image_id for record in records] == ["42.jpg", "42.jpg", "43.jpg", "43.jpg", "44.jpg", "44.jpg"]
    assert records[1].caption == "House on a hill." and not any(record.reason for record in records)


def test_forgotten_references_are_one_line_before_any_picture_is_copied(tmp_path, monkeypatch):
    copy("upright.jpe", tmp_path, "pictures", "a.jpe")
    monkeypatch.setattr("cluster.sources.pictures.local_copy", lambda uri: pytest.fail("copied"))
    for images in (tmp_path / "pictures", TABLES / "mixed"):  # a folder of Parquet, too
        source = PictureSource(images=str(images))
        for read in (load_picture_set, check_source, picture_references):
            with pytest.raises(InputError, match=r"references are missing: .* give a file of captions as --references"):
                read(source)


def test_a_picture_that_is_null_is_one_unreadable_picture():
    pictures = load_picture_set(PictureSource(images=str(TABLES / "null_image.parquet")))
    unreadable = 0
    for position in range(len(pictures)):
        try:
            pictures.open(position)
        except InputError:
            unreadable += 1
    assert unreadable == 2 and len(pictures) == 3
