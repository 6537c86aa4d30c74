"""Exports are what other programs read: read here by programs that know nothing of this code."""

import hashlib
import io
import json
import logging
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest, Subset
from cluster.curation.sync.sentences import SentenceSpec
from cluster.dataset import read_dataset
from cluster.dataset.documents import Manifest, Plan, load_manifest
from cluster.dataset.keys import CONCEPTS_KEY, GIVEN_CONCEPTS_KEY, MANIFEST_KEY, PLAN_KEY, shard_key
from cluster.dataset.verify import verify
from cluster.export.export import _said_of_each, export, export_dataset
from cluster.export.huggingface import HuggingFace, card, size_category
from cluster.export.published import Official
from cluster.export.published_ids import _numbers, _Photo
from cluster.export.request import FORMATS, ExportRequest
from cluster.export.source import Source
from cluster.export.webdataset import WebDataset
from cluster.ingest.photos import featurise_photos
from cluster.ingest.request import FeaturiseRequest
from cluster.shard_work import PROCESS, RAY
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.generation.names import IMPORTED
from pcm.official.files import SPLIT_SIZE, split_of
from pcm.reasons import MARKS
from pcm.text.concepts import ConceptVocabulary
from pcm.text.references import load_references
from tests.helpers.published import make_complete_dataset
from tests.helpers.refined import sync_in_process
from tests.helpers.shards import as_it_lies
from tests.helpers.tiny_dataset import scene
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus


def asked(to: str, *, workers: int = 2) -> ExportRequest:
    own = {"name": "sd", "max_length": 12} if to == "official" else {}
    return ExportRequest(data="the store", out="the place", to=to, workers=workers, **own)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_t2i, tiny_clip) -> tuple[Store, Plan, Manifest]:
    return make_complete_dataset(tmp_path_factory.mktemp("export") / "dataset", t2i=tiny_t2i, clip=tiny_clip)


def stored_rows(store: Store, plan: Plan) -> list[dict]:
    return [
        row
        for shard in range(plan.num_shards)
        for row in pq.read_table(io.BytesIO(store.read_bytes(shard_key(shard)))).to_pylist()
    ]


def patches(row: dict) -> np.ndarray:
    """(N * D_v,) of a row as it is stored."""
    return np.frombuffer(row["patch_features"], "<f2")


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_published_training_code_can_read_an_official_export(dataset, tmp_path):
    store, plan, _ = dataset
    assert export_dataset(store, open_store(tmp_path), asked("official"))["exported"] == 7

    # As the published loader does it: usual pickle, NumPy and PyTorch, nothing of ours.
    words = [".", *(tmp_path / "vocabulary.txt").read_text().splitlines()]
    annotations = pickle.loads((tmp_path / "mscoco_caption_anno_train.pkl").read_bytes())
    names, concepts = pickle.loads((tmp_path / "concepts.pickle").read_bytes())
    assert isinstance(names, list) and isinstance(concepts, torch.Tensor) and concepts.shape == (len(names), 32)
    assert [item["image_id"] for item in annotations] == [str(6_000_000 + k) for k in (0, 1, 3, 4, 5, 6, 7)]
    rows = stored_rows(store, plan)
    for item, row in zip(annotations, rows, strict=True):
        assert item.keys() == {"image_id", "split_id", "tokens_ids", "target_ids", "clipscore"}
        folder = f"sd_sp{item['split_id']}"
        assert (tmp_path / "images" / folder / f"{item['image_id']}.jpg").read_bytes() == row["image"]["bytes"]
        with np.load(tmp_path / "features" / folder / f"{item['image_id']}.npz") as features:
            assert features["features"].shape == (16, 64) and features["g_feature"].shape == (1, 32)
            assert features["features"].dtype == features["g_feature"].dtype == np.float32
            np.testing.assert_array_equal(features["features"].reshape(-1), np.float32(patches(row)))
            np.testing.assert_array_equal(features["g_feature"][0], np.float32(row["global_feature"]))
        assert item["tokens_ids"].shape == item["target_ids"].shape == (1, 12)
        assert item["tokens_ids"].dtype.kind == item["target_ids"].dtype.kind == "i"
        assert item["clipscore"] == 2.5 * row["clip_score"]
    first = annotations[0]
    said = [words[i] for i in first["target_ids"][0] if i >= 0]
    assert said == ["a", "dog", "near", "the", "beach", "."]
    assert first["tokens_ids"][0, 0] == 0 and list(first["target_ids"][0, 6:]) == [-1] * 6
    np.testing.assert_array_equal(first["tokens_ids"][0, 1:6], first["target_ids"][0, :5])
    saved = ConceptVocabulary.from_bytes(store.read_bytes(CONCEPTS_KEY))
    np.testing.assert_array_equal(concepts.numpy(), saved.embeddings)
    assert tuple(names) == saved.names


def test_photos_go_beside_as_val_and_test_with_their_ids_and_cocos_captions(dataset, tmp_path, tiny_clip):
    store, _, _ = dataset
    numbers = (391_895, 42, 74)
    (tmp_path / "photos").mkdir()
    lines = ["image,caption"]
    for number in numbers:
        name = f"COCO_val2014_{number:012d}.jpg"
        scene(number)[1].save(tmp_path / "photos" / name, "JPEG")
        lines += [f"{name},A dog near the beach.", f"{name},There is a cat."]
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    request = FeaturiseRequest(
        images=str(tmp_path / "photos"), captions=str(tmp_path / "captions.csv"), clip=str(tiny_clip),
        out=str(tmp_path / "test"), device="cpu", shard_size=2,
    )  # fmt: skip
    featurise_photos(request)
    out = tmp_path / "out"
    exported = ExportRequest(
        data=store.root, out=str(out), to="official", name="img", corpus="flickr30k", test=str(tmp_path / "test")
    )
    export_dataset(store, open_store(out), exported)

    train, test = (
        pickle.loads((out / f"flickr30k_caption_anno_{stage}.pkl").read_bytes()) for stage in ("train", "test")
    )
    assert len(train) == 7 and all("split_id" in item for item in train)
    assert [item["image_id"] for item in test] == [str(number) for number in numbers]
    for item in test:  # without split_id the published code looks into the folder itself
        assert item.keys() == {"image_id", "tokens_ids", "target_ids"} and item["tokens_ids"].shape == (2, 20)
        with np.load(out / "features" / "img" / f"{item['image_id']}.npz") as features:
            assert features["features"].shape == (16, 64) and features["g_feature"].shape == (1, 32)
    coco = json.loads((out / "captions_test.json").read_text())
    assert {image["id"] for image in coco["images"]} == set(numbers)
    assert coco["images"][1]["file_name"] == "COCO_val2014_000000000042.jpg"
    assert [row["caption"] for row in coco["annotations"] if row["image_id"] == 42] == [
        "A dog near the beach.", "There is a cat.",
    ]  # fmt: skip
    assert load_references(out / "captions_test.json").by_image.keys() == {str(number) for number in numbers}
    settings = yaml.safe_load((out / "pcmnet.yaml").read_text())
    assert settings["DATASETS"] == {"TRAIN": "Flickr30kCapDataset", "VAL": "", "TEST": "Flickr30kCapDataset"}
    assert settings["DATALOADER"] == {"FEATS_FOLDER": "features/img", "ANNO_FOLDER": ".", "MAX_FEAT_NUM": 17}
    visual = settings["MODEL"]["VISUAL_EMBED"]
    assert (visual["IN_DIM"], visual["G_IN_DIM"]) == (64, 32)
    words = (out / settings["INFERENCE"]["VOCAB"]).read_text().splitlines()
    assert settings["MODEL"]["VOCAB_SIZE"] == len(words) + 1  # and the end
    names, _ = pickle.loads((out / visual["CLIPTAG"]["VOCAB_EMBED_PATH"]).read_bytes())
    assert names and (out / settings["INFERENCE"]["TEST_ANNFILE"]).is_file()
    drawn = ExportRequest(data=store.root, out=str(tmp_path / "no"), to="official", val=store.root)
    with pytest.raises(InputError, match="holds drawn pictures; give real photos"):
        export_dataset(store, open_store(tmp_path / "no"), drawn)


def photos_dataset(out: Path, clip: Path, names: list[str], *, first_scene: int, unnamed: bool = False) -> Path:
    """Real photos of these names, a caption each; their pictures are other ones for another `first_scene`."""
    folder = out.parent / f"{out.name}-photos"
    folder.mkdir()
    lines = ["image,caption"]
    for number, name in enumerate(names, start=first_scene):
        scene(number)[1].save(folder / name, "JPEG")
        lines.append(f"{name},A dog near the beach.")
    if unnamed:
        lines.append(",There is a cat.")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    request = FeaturiseRequest(
        images=str(folder), captions=str(folder / "captions.csv"), clip=str(clip), out=str(out), device="cpu",
        shard_size=2,
    )  # fmt: skip
    featurise_photos(request)
    return out


def pictures_by_key(root: Path, stage: str) -> dict[str, list[bytes]]:
    """Image id -> what a reader of an export finds for it."""
    annotations = pickle.loads((root / f"mscoco_caption_anno_{stage}.pkl").read_bytes())
    ids = [item["image_id"] for item in annotations]
    return {each: [path.read_bytes() for path in (root / "images" / "img").glob(f"{each}.*")] for each in ids}


def test_photos_of_several_stages_never_share_an_id(dataset, tmp_path, tiny_clip):
    store, _, _ = dataset
    stages = {
        "val": photos_dataset(tmp_path / "val", tiny_clip, ["V_val_0000.jpg", "V_val_0001.jpg"], first_scene=1),
        "test": photos_dataset(
            tmp_path / "test", tiny_clip, ["V_test_0000.jpg", "V_test_0001.jpg"], first_scene=5, unnamed=True
        ),
    }
    # Two datasets of other pictures under the same names, merged.
    again = photos_dataset(tmp_path / "again", tiny_clip, ["V_val_0000.jpg", "V_val_0001.jpg"], first_scene=9)
    curate(CurateRequest(data=(str(stages["val"]), str(again)), out=str(tmp_path / "merged")))
    for data in (store.root, str(tmp_path / "merged")):
        root = tmp_path / f"out-{Path(data).name}"
        request = ExportRequest(
            data=data, out=str(root), to="official", name="img", val=str(stages["val"]), test=str(stages["test"])
        )
        export_dataset(open_store(data), open_store(root), request)
        read = {stage: pictures_by_key(root, stage) for stage in ("val", "test")}
        if data != store.root:
            read["train"] = pictures_by_key(root, "train")
            assert len(read["train"]) == 4
        for stage, source in stages.items():
            photos = [path.read_bytes() for path in sorted((tmp_path / f"{source.name}-photos").glob("*.jpg"))]
            assert list(read[stage].values()) == [[photo] for photo in photos], stage
        every = [each for found in read.values() for each in found]
        assert len(set(every)) == len(every)
        names = {
            image["id"]: image["file_name"] for image in json.loads((root / "captions_test.json").read_text())["images"]
        }
        assert sorted(names.values()) == ["V_test_0000.jpg", "V_test_0001.jpg"]


def test_photos_whose_names_hold_no_number_are_numbered(caplog):
    def numbered(*names: str, **settings: set[str]) -> list[str]:
        return list(_numbers([_Photo(name, "") for name in names], **settings).values())

    assert numbered("a.jpg", "b.jpg") == ["1", "2"]
    assert numbered("x_7.jpg", "y_7.jpg") == ["1", "2"]
    assert numbered("1000092795.jpg", "36979.jpg") == ["1000092795", "36979"]
    assert numbered("7.jpg", "8.jpg", taken={"2", "8"}) == ["1", "3"]
    caplog.set_level(logging.INFO)
    for names, why in (
        (("7.jpg", "1000268201_693b08cb0e.jpg"), "the name 1000268201_693b08cb0e.jpg does not end in a number, as "),
        (("x_7.jpg", "y_7.jpg"), "x_7.jpg and y_7.jpg have the same number"),
        (("2.jpg", "3.jpg"), "one has the number of an imported picture"),
    ):
        numbered(*names, taken={"2"})
        assert f"photos are numbered from 1: {why}" in caplog.messages[-1]


def test_folders_hold_as_many_pictures_as_the_published_ones():
    coco = [split_of(k) for k in (0, SPLIT_SIZE - 1, SPLIT_SIZE, 542_399, 542_400)]
    assert coco == [0, 0, 1, 7, 7]
    assert 542_401 - 7 * SPLIT_SIZE == 67_794  # eight folders, the last of which is short by seven


def test_webdataset_of_very_many_shards_has_longer_numbers(dataset, tmp_path):
    store, plan, _ = dataset
    source = Source.open(store)
    many = replace(plan, segments=(*plan.segments, replace(plan.segments[-1], first_shard=100_000)))
    out = open_store(tmp_path)
    WebDataset(replace(source, opened=replace(source.opened, plan=many)), out).write(0)
    assert sorted(out.list()) == ["000000.tar", "000000_stats.json"]
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert all(len(entry.name.partition(".")[0]) == 6 + 4 for entry in tar)


def test_hugging_face_files_of_very_many_shards_are_in_order_by_name(tmp_path: Path) -> None:
    """Readers take the files of `data/train-*.parquet` by name."""
    for shards, last in ((3, "data/train-00002-of-00003.parquet"), (100_001, "data/train-100000-of-100001.parquet")):
        source: Any = SimpleNamespace(num_shards=shards)
        names = [HuggingFace(source, open_store(tmp_path)).marker(shard) for shard in range(shards)]
        assert names == sorted(names) and names[-1] == last


def test_webdataset_is_read_by_tarfile(dataset, tmp_path):
    store, plan, _ = dataset
    export_dataset(store, open_store(tmp_path), asked("webdataset"))
    rows = stored_rows(store, plan)
    keys = []
    for shard in range(plan.num_shards):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(tmp_path / f"{shard:05d}.tar") as tar:
            for entry in tar:
                assert entry.mtime == 0
                key, _, kind = entry.name.partition(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(entry).read()
        stats = json.loads((tmp_path / f"{shard:05d}_stats.json").read_text())
        assert stats["successes"] == len(samples) and stats["count"] == plan.shard_rows(shard)
        assert stats["status_dict"]["success"] == len(samples)
        for key, sample in samples.items():
            row = rows[len(keys)]
            document = json.loads(sample["json"])
            assert sample["jpg"] == row["image"]["bytes"] and sample["txt"].decode() == row["caption"]
            assert document["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest() and document["key"] == key
            assert Image.open(io.BytesIO(sample["jpg"])).size == (document["width"], document["height"])
            assert (document["seed"], document["clip_score"]) == (row["seed"], row["clip_score"])
            keys.append(key)
    # The third sample, 000000002, was quarantined.
    assert keys == ["000000000", "000000001", "000010000", "000010001", "000010002", "000020000", "000020001"]


def test_datasets_opens_a_hugging_face_export(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    store, plan, _ = dataset
    export_dataset(store, open_store(tmp_path / "hf"), asked("huggingface"))
    loaded = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    train = loaded["train"]
    assert isinstance(train.features["image"], datasets.Image)
    rows = stored_rows(store, plan)
    assert train["caption"][:] == [row["caption"] for row in rows]
    for sample, row in zip(train, rows, strict=True):
        stored = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(stored))
        np.testing.assert_array_equal(np.float16(sample["patch_features"]), patches(row))
    as_arrays = train.with_format("numpy")[0]["patch_features"]
    np.testing.assert_array_equal(as_arrays, patches(rows[0]))
    said = (tmp_path / "hf" / "README.md").read_text()
    assert "| `caption` | the text that the picture was drawn from |" in said
    assert f"| `reason` | an empty text, or `prompt_truncated` ({MARKS['prompt_truncated'].text}) |" in said
    assert "- synthetic\n" in said and "# Synthetic image-caption pairs\n" in said
    exported = load_manifest(open_store(tmp_path / "hf"))
    for shard in exported.stored_shards:  # the manifest speaks of the export's own files
        assert shard == as_it_lies(open_store(tmp_path / "hf"), shard.key) and shard.key.startswith("data/")
    assert [row.caption for row in read_dataset(tmp_path / "hf")] == train["caption"][:]


def test_the_card_of_real_photos_does_not_call_them_synthetic(dataset, tmp_path, tiny_clip):
    photos = photos_dataset(tmp_path / "photos", tiny_clip, ["a.jpg", "b.jpg"], first_scene=1)
    said = card(Source.open(open_store(photos)))
    assert "# Real photos with captions\n" in said
    curate(CurateRequest(data=(dataset[0].root, str(photos)), out=str(tmp_path / "mixed")))
    mixed = card(Source.open(open_store(tmp_path / "mixed")))
    assert "# Image-caption pairs\n" in mixed
    for text in (said, mixed):
        assert "ynthetic" not in text and "was drawn from" not in text and "prompt_truncated" not in text
    assert [size_category(count) for count in (0, 999, 1_000, 10_000_000, 10**9)] == [
        "n<1K", "n<1K", "1K<n<10K", "10M<n<100M", "1B<n<10B",
    ]  # fmt: skip


def test_a_dataset_without_a_clip_has_no_mean_score(tmp_path: Path) -> None:
    store, _, made = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    assert made is not None and made.clip_score_mean is None
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "view"), subset=Subset(count=3)))
    assert load_manifest(open_store(tmp_path / "view")).clip_score_mean is None
    document = json.loads(store.read_bytes(MANIFEST_KEY))
    store.write_bytes(MANIFEST_KEY, json.dumps({**document, "clip_score_mean": 0.0}).encode())  # of an earlier release
    assert load_manifest(store) == made
    assert "by CLIP `null`: not scored |" in card(Source.open(store))


def test_the_card_after_sync_does_not_say_that_pictures_were_drawn_from_their_captions(dataset, tmp_path):
    data, refined, curated = Path(dataset[0].root), tmp_path / "refined", tmp_path / "curated"
    sync_in_process(data, refined, SentenceSpec(model="clip"))
    curate(CurateRequest(data=(str(refined),), out=str(curated), subset=Subset(count=3)))
    for view in (refined, curated):
        said = card(Source.open(open_store(view)))
        assert "| `caption` | a text that fits the picture, which may have been drawn from another one |" in said
        assert "# Synthetic image-caption pairs\n" in said


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_gives_the_same_bytes_twice_and_goes_on_where_it_stopped(dataset, tmp_path, to, monkeypatch):
    store, plan, _ = dataset
    whole, broken = open_store(tmp_path / "whole"), open_store(tmp_path / "broken")
    export_dataset(store, whole, asked(to))
    expected = files(tmp_path / "whole")

    real, calls = Store.write_bytes, []

    def fails_in_the_middle(self: Store, key: str, data: bytes) -> None:
        calls.append(key)
        if len(calls) == len(expected) // 2 + 1:
            raise OSError("no more")
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", fails_in_the_middle)
        with pytest.raises(OSError, match="no more"):
            export_dataset(store, broken, asked(to, workers=1))
    with pytest.raises(InputError, match=r"holds another export \(to: "):
        export_dataset(store, broken, asked("webdataset" if to != "webdataset" else "official"))
    summary = export_dataset(store, broken, asked(to))
    assert summary["skipped_shards"] > 0
    assert files(tmp_path / "broken") == expected
    assert export_dataset(store, broken, asked(to))["skipped_shards"] == plan.num_shards


def test_the_time_left_after_a_resume_is_that_of_the_shards_still_to_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """900 of 1,000 are there, each read in 10 ms; one is written in 5 s, after 10 minutes of waiting for a node."""
    now = [0.0]
    for module in ("pcm.line_timer", "cluster.export.export"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow:
        def write(self, shard: int) -> int:
            now[0] += 5
            return shard

        def written(self, shard: int) -> int:
            now[0] += 600 if shard == 0 else 0.01
            return shard

    caplog.set_level(logging.INFO)
    work: Any = SimpleNamespace(in_order=map)
    exporter: Any = Slow()
    assert _said_of_each(work, exporter, [(shard, shard < 900) for shard in range(1000)]) == list(range(1000))
    assert caplog.messages[:3] == [
        "1 of 1000 shards exported",
        "901 of 1000 shards exported, 8 min 15 s left",
        "903 of 1000 shards exported, 8 min 05 s left",
    ]


def test_an_export_that_another_job_has_finished_meanwhile_is_one_line(dataset, tmp_path, monkeypatch):
    """It deletes the parts that only an unfinished export needs."""
    out, join = open_store(tmp_path / "out"), Official.finish

    def finish(self: Official, shards: list[None]) -> None:
        monkeypatch.setattr(Official, "finish", join)
        export_dataset(dataset[0], out, asked("official"))
        join(self, shards)

    monkeypatch.setattr(Official, "finish", finish)
    with pytest.raises(InputError, match="another job has finished this export meanwhile; run the same command again"):
        export_dataset(dataset[0], out, asked("official"))
    assert export_dataset(dataset[0], out, asked("official"))["skipped_shards"] == len(dataset[2].shards)


def test_a_complete_export_is_tidied_after_a_job_that_was_killed_at_its_end(dataset, tmp_path, monkeypatch):
    out = open_store(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Official, "tidy", lambda self: None)
        export_dataset(dataset[0], out, asked("official"))
    assert any(key.startswith("parts/") for key in out.list())
    assert export_dataset(dataset[0], out, asked("official"))["skipped_shards"] == len(dataset[2].shards)
    assert not any(key.startswith("parts/") for key in out.list())


def test_a_damaged_shard_is_not_exported(dataset, tmp_path):
    store, _, _ = dataset
    copy = open_store(tmp_path / "copy")
    for key in store.list():
        copy.write_bytes(key, store.read_bytes(key))
    damaged = bytearray(copy.read_bytes(shard_key(1)))
    damaged[100] ^= 1
    copy.write_bytes(shard_key(1), bytes(damaged))
    for to in FORMATS:
        with pytest.raises(InputError, match=r"part-000001.parquet: missing or damaged"):
            export_dataset(copy, open_store(tmp_path / to), asked(to))


def test_what_cannot_be_exported_is_one_clear_line(dataset, tmp_path, call_job):
    store, _, _ = dataset
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    null, _, _ = make_dataset_in_process(tmp_path / "null", write_corpus(tmp_path), null_spec())
    shutil.copytree(store.root, tmp_path / "wordless")
    (tmp_path / "wordless" / "vocabulary.txt").unlink()
    curate(CurateRequest(data=store.root, out=tmp_path / "view", subset="3"))
    for name in ("imported", "given"):
        shutil.copytree(tmp_path / "wordless", tmp_path / name)
    (tmp_path / "view" / "vocabulary.txt").unlink()
    for key in (MANIFEST_KEY, PLAN_KEY):
        document = json.loads((tmp_path / "imported" / key).read_bytes())
        document["spec"]["generator"]["model"] = IMPORTED
        (tmp_path / "imported" / key).write_text(json.dumps(document))
    (tmp_path / "given" / "vocabulary.txt").write_bytes(store.read_bytes("vocabulary.txt"))
    (tmp_path / "given" / CONCEPTS_KEY).unlink()
    (tmp_path / "given" / GIVEN_CONCEPTS_KEY).write_text('{"sha256": "0"}')
    for number, document in enumerate(("no json", "[1]")):
        (tmp_path / f"damaged{number}").mkdir()
        (tmp_path / f"damaged{number}" / "export.json").write_text(document)
    for arguments, message in (
        (("--data", store.root, "--out", tmp_path / "damaged0", "--to", "webdataset"), "export.json is damaged"),
        (("--data", store.root, "--out", tmp_path / "damaged1", "--to", "webdataset"), "export.json is damaged"),
        (("--data", store.root, "--out", tmp_path / "full", "--to", "webdataset"), "not empty and no export"),
        (
            ("--data", null.root, "--out", tmp_path / "a", "--to", "official"),
            "no vocabulary.txt, as the null CLIP leaves",
        ),
        (
            ("--data", tmp_path / "wordless", "--out", tmp_path / "a", "--to", "official"),
            "has no vocabulary.txt; jobs.verify --repair makes it again",
        ),
        (
            ("--data", tmp_path / "view", "--out", tmp_path / "a", "--to", "official"),
            "has no vocabulary.txt; make the dataset again with jobs.curate into another --out",
        ),
        (
            ("--data", tmp_path / "imported", "--out", tmp_path / "a", "--to", "official"),
            "has no vocabulary.txt; rerun the same jobs.import_official, which puts it there again",
        ),
        (
            ("--data", tmp_path / "given", "--out", tmp_path / "a", "--to", "official"),
            "has no concepts.safetensors; rerun the command that made the dataset, with the same --concepts",
        ),
        (("--data", tmp_path / "none", "--out", tmp_path / "b", "--to", "official"), "not a dataset"),
        (("--data", store.root, "--out", tmp_path / "c", "--to", "official", "--name", "../x"), "beginning of"),
        (("--data", store.root, "--out", tmp_path / "d", "--to", "official", "--max-length", 1), "at least 2"),
        (("--out", tmp_path / "e", "--to", "official"), "give one of the two"),
        (("--checkpoint", tmp_path, "--out", tmp_path / "f", "--to", "webdataset"), "--to official only"),
        (("--checkpoint", tmp_path, "--out", tmp_path / "g", "--to", "official"), "missing"),
    ):
        result = call_job("export", *arguments)
        assert result.returncode == 2 and message in result.stderr and "\n" not in result.stderr.strip(), result
    result = call_job("export", "--data", null.root, "--out", tmp_path / "web", "--to", "webdataset")
    assert result.returncode == 0 and result.summary["exported"] == 24


def test_an_export_does_not_go_into_its_dataset(dataset, call_job):
    store, _, _ = dataset
    there = store.list()
    for out, said in ((f"{store.root}/export", "is inside the dataset"), (store.root, "give an empty place")):
        run = call_job("export", "--data", store.root, "--out", out, "--to", "webdataset")
        assert run.returncode == 2 and said in run.stderr
    assert store.list() == there


def test_several_pictures_of_a_caption_have_ids_of_their_own(tmp_path, tiny_t2i, tiny_clip):
    store, _, _ = make_complete_dataset(
        tmp_path / "dataset", t2i=tiny_t2i, clip=tiny_clip, images_per_caption=2, num_inference_steps=1
    )
    export_dataset(store, open_store(tmp_path / "out"), asked("official"))
    annotations = pickle.loads((tmp_path / "out" / "mscoco_caption_anno_train.pkl").read_bytes())
    assert [int(item["image_id"]) - 6_000_000 for item in annotations] == [0, 1, 2, 3, *range(6, 16)]
    np.testing.assert_array_equal(annotations[0]["tokens_ids"], annotations[1]["tokens_ids"])


@pytest.mark.parametrize("to", FORMATS)
def test_a_view_is_exported_like_the_dataset_that_it_points_at(tmp_path: Path, dataset, to: str) -> None:
    store, _, manifest = dataset
    curate(CurateRequest(data=(store.root,), out=str(tmp_path / "view"), subset=Subset(count=7)))
    view = open_store(str(tmp_path / "view"))
    counts = export_dataset(view, open_store(str(tmp_path / "out")), asked(to))
    assert (counts["exported"], counts["expected"]) == (7, 7)
    rows = {row.sample_id: row for row in read_dataset(view.root)}
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    if to == "official":
        annotations = pickle.loads((tmp_path / "out" / "mscoco_caption_anno_train.pkl").read_bytes())
        assert [each["image_id"] for each in annotations] == [str(6000000 + number) for number in range(7)]
    elif to == "webdataset":
        texts = []
        for file in sorted((tmp_path / "out").glob("*.tar")):
            with tarfile.open(file) as tar:
                found = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
                texts += [json.load(each) for each in found]  # type: ignore[arg-type]
        assert {text["sample_id"]: text["caption"] for text in texts} == {
            name: row.caption for name, row in rows.items()
        }
    else:
        files = sorted(name for name in names if name.startswith("train-"))
        table = pa.concat_tables([pq.read_table(tmp_path / "out" / "data" / name) for name in files])
        assert table["sample_id"].to_pylist() == list(rows) and "corpus_id" not in table.column_names
        assert f"7 of {manifest.stored} pairs" in (tmp_path / "out" / "README.md").read_text()


def test_the_pictures_of_a_view_are_written_out_as_a_dataset(tmp_path: Path, dataset) -> None:
    store, *_ = dataset
    found = curate(CurateRequest(data=(store.root,), out=str(tmp_path / "view"), subset=Subset(count=7)))
    request = ExportRequest(data=str(tmp_path / "view"), out=str(tmp_path / "out"), to="dataset")
    counts = export(request)
    assert (counts["exported"], counts["fingerprint"]) == (7, found["fingerprint"])
    assert verify(open_store(tmp_path / "out"))["ok"]
    assert export(request)["fingerprint"] == found["fingerprint"], "done already"
    with pytest.raises(InputError, match="holds its pictures already"):
        export(ExportRequest(data=store.root, out=str(tmp_path / "other"), to="dataset"))


def test_what_is_there_of_an_unfinished_dataset_is_exported_when_told_so(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=5, finish=False)
    (tmp_path / "data" / "shards" / "part-000001.parquet").unlink()
    for to in ("webdataset", "dataset"):
        request = ExportRequest(data=str(tmp_path / "data"), out=str(tmp_path / to), to=to)
        with pytest.raises(InputError, match="add --unfinished"):
            export(request)
        counts = export(replace(request, unfinished=True))
        assert (counts["exported"], counts["unfinished"]) == (19, "4 of 5 shards")
    assert verify(open_store(tmp_path / "dataset"))["ok"]


@pytest.mark.parametrize("to", ["webdataset", "huggingface"])
def test_an_export_of_an_unfinished_dataset_goes_on_with_its_shards(tmp_path: Path, to: str) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=5, finish=False)
    shard = tmp_path / "data" / shard_key(1)
    data = shard.read_bytes()
    shard.unlink()
    request = ExportRequest(data=str(tmp_path / "data"), out=str(tmp_path / "out"), to=to, unfinished=True)
    export(request)
    expected, document = files(tmp_path / "out"), json.loads((tmp_path / "out/export.json").read_text())
    assert document["unfinished_shards"] == [0, 2, 3, 4]
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"holds another export \(dataset_sha256"):  # it was complete
        export(request)
    (tmp_path / "out/export.json").write_text(json.dumps(document | {"complete": False}))
    assert (export(request)["exported"], files(tmp_path / "out")) == (19, expected)


def test_an_export_of_an_unfinished_dataset_whose_corpus_grew_is_refused_with_that(tmp_path: Path) -> None:
    data, corpus = tmp_path / "data", write_corpus(tmp_path)
    make_dataset_in_process(data, corpus, null_spec(), shard_size=5, finish=False)
    request = ExportRequest(data=str(data), out=str(tmp_path / "out"), to="webdataset", unfinished=True)
    export(request)
    document = json.loads((tmp_path / "out/export.json").read_text())
    (tmp_path / "out/export.json").write_text(json.dumps(document | {"complete": False}))
    corpus.write_text(f"{corpus.read_text()}a dog more\n")
    make_dataset_in_process(data, corpus, null_spec(), shard_size=5, finish=False)
    with pytest.raises(InputError, match=r"begun with other captions than .* has now .*grown.* give another --out"):
        export(request)
    with pytest.raises(InputError, match=r"holds another export \(to"):
        export(replace(request, to="huggingface"))


def test_an_export_says_whose_it_is_before_its_first_object(dataset, tmp_path, monkeypatch) -> None:
    store, _, _ = dataset
    out, real = open_store(tmp_path / "out"), Store.write_bytes

    def fails_at_the_concepts(self: Store, key: str, data: bytes) -> None:
        if key == "concepts.pickle":
            raise OSError("no more")
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", fails_at_the_concepts)
        with pytest.raises(OSError, match="no more"):
            export_dataset(store, out, asked("official"))
    assert export_dataset(store, out, asked("official"))["skipped_shards"] == 0


@pytest.mark.parametrize("to", FORMATS)
def test_ray_writes_the_export_of_one_process(ray_session: None, dataset, tmp_path: Path, to: str) -> None:
    """Whole, and when it goes on with what an earlier run left."""
    store, _, _ = dataset
    one, many = (export_dataset(store, open_store(tmp_path / run), on(run, to)) for run in (PROCESS, RAY))
    assert one | {"seconds": 0} == many | {"seconds": 0}
    wanted = files(tmp_path / PROCESS)
    assert files(tmp_path / RAY) == wanted
    markers = {"webdataset": "00001_stats.json", "huggingface": f"data/train-00001-of-{one['shards']:05d}.parquet"}
    if to in markers:  # the official export deletes its markers in the end
        (tmp_path / RAY / markers[to]).unlink()
        document = json.loads((tmp_path / RAY / "export.json").read_text())
        (tmp_path / RAY / "export.json").write_text(json.dumps({**document, "complete": False}))
        again = export_dataset(store, open_store(tmp_path / RAY), on(RAY, to))
        assert again["skipped_shards"] == again["shards"] - 1 and files(tmp_path / RAY) == wanted


def on(run_on: str, to: str) -> ExportRequest:
    own = {"name": "sd", "max_length": 12} if to == "official" else {}
    return ExportRequest(data="the store", out="the place", to=to, run_on=run_on, **own)


def test_ray_writes_a_view_out_as_one_process_does(ray_session: None, dataset, tmp_path: Path) -> None:
    store, _, _ = dataset
    curate(CurateRequest(data=(store.root,), out=str(tmp_path / "view"), subset=Subset(count=5)))
    for run in (PROCESS, RAY):
        export(ExportRequest(data=str(tmp_path / "view"), out=str(tmp_path / run), to="dataset", run_on=run))
    assert files(tmp_path / PROCESS) == files(tmp_path / RAY)
    assert verify(open_store(tmp_path / RAY))["ok"]
