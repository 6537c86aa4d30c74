"""Real photos with their captions become a dataset like any other, and what cannot be used is counted."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.dataset.documents import load_manifest, load_plan
from cluster.dataset.keys import quarantine_key, shard_key
from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import store_vocabularies
from cluster.ingest.photos import in_slots
from cluster.store.store import Store, open_store
from cluster.training.data.mixture import DataSource, open_training_sets
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.generation.loading import load_generator
from pcm.images import open_image
from tests.helpers.job_runs import JobRun
from tests.helpers.stored import quarantine_reasons
from tests.helpers.tiny_generation import make_dataset_in_process, tiny_spec, write_corpus
from tests.helpers.tiny_models import save_tiny_clip

CAPTIONS = ("A dog runs.", "A brown dog on grass.", "The dog plays.", "An animal outside.", "Dogs love grass!")
SIZES = {"one.jpg": (40, 30), "two.jpg": (33, 70), "big.png": (1500, 900), "four.jpg": (64, 64), "test.jpg": (32, 32)}

REFUSED = (("gone", "missing_image"), ("lost", "missing_image"), ("broken", "bad_image"))
NAMES = ("one.jpg", "gone.jpg", "two.jpg", "broken.jpg", "big.png", "four.jpg", "test.jpg", "lost.jpg")


def save_photo(path: Path, size: tuple[int, int], *, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(noise, "RGB").resize(size).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, one of them truncated, and karpathy.json with one that is not there, an empty caption, a test photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "photos").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        save_photo(folder / "photos" / name, size, seed=seed)
    whole = (folder / "photos/one.jpg").read_bytes()
    (folder / "photos/broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "photos/lost.jpg").symlink_to("nowhere.jpg")  # listed, but gone when it is read
    images = []
    for number, name in enumerate(NAMES):
        sentences = [{"raw": text, "sentid": 10 * number + k} for k, text in enumerate(CAPTIONS)]
        split = "test" if name == "test.jpg" else "restval" if name == "four.jpg" else "train"
        images.append({"filename": name, "split": split, "sentences": sentences})
    images[0]["sentences"][4]["raw"] = " "
    (folder / "karpathy.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture
def featurise(world: Path, tiny_clip: Path, call_job):
    """featurise(out, name=value, ...): `jobs.featurise` of the world, with some arguments changed."""

    def call(out: Path, **changed: object) -> JobRun:
        given = {"images": world / "photos", "captions": world / "karpathy.json", "clip": tiny_clip, "out": out}
        given |= {"shard_size": 7, "workers": 2} | changed
        pairs = ((name.replace("_", "-"), value) for name, value in given.items())
        return call_job("featurise", *(part for name, value in pairs for part in (f"--{name}", value)))

    return call


def rows(store: Store) -> list[dict]:
    return [row for key in store.list("shards") for row in pq.read_table(store.path(key)).to_pylist()]


def columns(store: Store) -> dict[str, tuple]:
    """Sample id -> all that is stored of it, bit for bit."""
    return {row["sample_id"]: tuple(map(repr, row.values())) for row in rows(store)}


def test_photos_become_a_dataset_with_every_pair_stored_or_counted(featurise, world, tmp_path, caplog):
    done = featurise(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (done.summary["expected"], done.summary["stored"], done.summary["photos"]) == (35, 19, 7)
    assert done.summary["quarantined_by_reason"] == {"bad_image": 5, "empty": 1, "missing_image": 10}
    assert any(record.message.startswith("broken.jpg: ") for record in caplog.records)
    store = open_store(tmp_path / "out")
    assert quarantine_reasons(store) == {"one.jpg#4": "empty"} | {
        f"{name}.jpg#{k}": reason for name, reason in REFUSED for k in range(5)
    }
    proof = verify(store)
    assert proof["ok"] and (proof["stored"], proof["quarantined"]) == (19, 16)
    stored = rows(store)
    names = ["one.jpg"] * 4 + ["two.jpg"] * 5 + ["big.png"] * 5 + ["four.jpg"] * 5
    for row, name in zip(stored, names, strict=True):
        assert row["image"]["bytes"] == (world / "photos" / name).read_bytes()  # as it is, whatever its size
        assert row["image"]["path"].endswith(Path(name).suffix)
        assert (row["width"], row["height"]) == SIZES[name]
    assert [row["caption"] for row in stored[4:9]] == list(CAPTIONS)


def test_it_mixes_with_drawn_pictures_and_its_features_are_the_encoders(
    featurise, world, tmp_path, tiny_clip, tiny_t2i
):
    encoder = ClipEncoder(str(tiny_clip))
    spec = tiny_spec(tiny_t2i, tiny_clip, num_inference_steps=1)
    drawn, plan, _ = make_dataset_in_process(tmp_path / "drawn", write_corpus(tmp_path, list(CAPTIONS)), spec)
    store_vocabularies(drawn, plan, encoder=encoder)
    featurise(tmp_path / "real")
    sets = open_training_sets([DataSource(str(tmp_path / "real"), 0.5), DataSource(drawn.root, 1.0)])
    assert [(found.manifest.stored, found.weight) for found in sets] == [(19, 0.5), (5, 1.0)]
    for row, name in zip(rows(sets[0].store)[::5], ("one.jpg", "two.jpg", "big.png", "four.jpg"), strict=True):
        alone = encoder.encode_images([open_image(world / "photos" / name)])
        patches = np.frombuffer(row["patch_features"], np.float16).reshape(alone.patch_features[0].shape)
        np.testing.assert_allclose(patches, alone.patch_features[0], atol=2e-3)
        np.testing.assert_allclose(row["global_feature"], alone.global_feature[0], atol=1e-3)
        score = alone.global_feature[0] @ encoder.encode_texts([row["caption"]])[0]
        assert row["clip_score"] == pytest.approx(score, abs=1e-5)


def test_neither_shard_size_nor_resume_nor_growth_changes_a_bit(featurise, tmp_path):
    featurise(tmp_path / "whole", shard_size=100, workers=1)
    featurise(tmp_path / "small", shard_size=4)
    featurise(tmp_path / "grown", limit=3)
    grown = featurise(tmp_path / "grown")
    assert (grown.summary["skipped"], grown.summary["expected"]) == (15, 35)
    small = open_store(tmp_path / "small")
    for key in (shard_key(0), shard_key(4), quarantine_key(1)):
        small.delete(key)
    small.delete(shard_key(1))
    resumed = featurise(tmp_path / "small", shard_size=4)
    assert resumed.summary["skipped"] == 35 - 3 * 4
    stores = [open_store(tmp_path / name) for name in ("whole", "small", "grown")]
    proofs = [verify(store) for store in stores]
    assert all(proof["ok"] for proof in proofs) and len({proof["fingerprint"] for proof in proofs}) == 1
    assert columns(stores[0]) == columns(stores[1]) == columns(stores[2])
    vocabularies = [[store.read_bytes(key) for key in ("vocabulary.txt", "concepts.safetensors")] for store in stores]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_photos_are_finished_and_grow_where_their_clip_is_now(featurise, tiny_clip, tmp_path):
    whole, out = open_store(tmp_path / "whole"), open_store(tmp_path / "out")
    clip = Path(shutil.copytree(tiny_clip, tmp_path / "old"))
    featurise(tmp_path / "whole")
    featurise(tmp_path / "out", clip=clip, limit=3)
    out.delete(shard_key(0))
    clip.rename(tmp_path / "new")
    grown = featurise(tmp_path / "out", clip=tmp_path / "new")
    assert grown.returncode == 0, grown.stderr
    assert load_plan(out).spec.clip.model == load_manifest(out).spec.clip.model == str(clip)
    assert verify(out)["ok"] and verify(out)["fingerprint"] == verify(whole)["fingerprint"]
    assert columns(out) == columns(whole)


def test_clip_sees_a_photo_once_for_all_its_captions(featurise, world, tmp_path, monkeypatch):
    """Captions in any order, as COCO's are: they are grouped by photo before they are dealt into shards."""
    names = ("two.jpg", "one.jpg", "big.png")
    lines = ["image,caption", *(f"{name},{caption}" for caption in CAPTIONS for name in names)]
    (tmp_path / "shuffled.csv").write_text("\n".join(lines))
    opened = []

    def counted(source, *, name=None):
        opened.append(name)
        return open_image(source, name=name)

    monkeypatch.setattr("cluster.ingest.photos.open_image", counted)  # what the encoder opens; it runs all the same
    done = featurise(tmp_path / "out", captions=tmp_path / "shuffled.csv", shard_size=5)
    assert (done.summary["stored"], done.summary["photos"]) == (15, 3)
    assert sorted(name.partition("#")[0] for name in opened) == sorted(names)


def test_photos_come_in_parquet_too_and_captions_without_a_photo_are_counted(featurise, world, tmp_path):
    def cell(data: bytes | None) -> dict | None:
        return None if data is None else {"bytes": data, "path": None}

    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    pictures = [cell((world / "photos/one.jpg").read_bytes()), None, cell(b""), cell(gif.getvalue())]
    references = [["A cat.", "A small cat."], ["No photo."], ["No bytes."], ["Another format."]]
    table = pa.table({"image_id": list("abcd"), "image": pictures, "references": references})
    pq.write_table(table, tmp_path / "photos.parquet")
    done = featurise(tmp_path / "out", images=tmp_path / "photos.parquet", captions=tmp_path / "photos.parquet")
    assert done.returncode == 0, done.stderr
    assert (done.summary["stored"], done.summary["quarantined_by_reason"]) == (2, {"bad_image": 3})
    captions = [{"image": "one.jpg", "caption": "A dog."}, {"caption": "Which photo?"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    done = featurise(tmp_path / "out2", captions=tmp_path / "captions.jsonl")
    assert (done.summary["stored"], done.summary["quarantined_by_reason"]) == (1, {"missing_image": 1})
    assert verify(open_store(tmp_path / "out"))["ok"] and verify(open_store(tmp_path / "out2"))["ok"]


def test_what_cannot_be_used_is_refused_in_one_line(featurise, world, tmp_path, monkeypatch):
    (tmp_path / "plain.txt").write_text("A dog.\n")
    (tmp_path / "others.csv").write_text("image,caption\nelsewhere.jpg,A dog.\n")
    (tmp_path / "empty").mkdir()
    refused = {
        "none of its 1 captions names a photo": {"captions": tmp_path / "plain.txt"},
        "is among the 1 photos of the captions (such as 'elsewhere.jpg')": {"captions": tmp_path / "others.csv"},
        "no such file": {"captions": tmp_path / "absent.json"},
        "no caption in split 'val'": {"split": "val"},
        "no pictures": {"images": tmp_path / "empty"},
        "--clip null": {"clip": "null"},
        "CLIP model 'no-such-model'": {"clip": "no-such-model"},
        "--limit 0": {"limit": 0},
        "--shard-size 0": {"shard_size": 0},
    }
    for said, changed in refused.items():
        done = featurise(tmp_path / "out", **changed)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and said in errors[0], (said, done.stderr)
        assert not (tmp_path / "out").exists(), "nothing is begun"
    assert featurise(tmp_path / "out", limit=2).returncode == 0
    other = save_tiny_clip(tmp_path / "other_clip", seed=1)
    for said, changed in {"clip.revision": {"clip": other}, "shard_size: 7 -> 8": {"shard_size": 8}}.items():
        done = featurise(tmp_path / "out", limit=2, **changed)
        assert done.returncode == 2 and said in done.stderr
    monkeypatch.setattr("cluster.generation.stages.shard_row.MAX_SHARD_BYTES", 1000)
    done = featurise(tmp_path / "huge")
    assert done.returncode == 2 and "its photos (each once a caption) have" in done.stderr
    assert "give a smaller --shard-size" in done.stderr


def test_a_photo_is_not_drawn_again(featurise, tmp_path, call_job):
    featurise(tmp_path / "out", limit=1)
    plan = load_plan(open_store(tmp_path / "out"))
    assert plan is not None and plan.spec.generator.model == "photos"
    with pytest.raises(InputError, match=r"none can be drawn again.*jobs\.featurise"):
        load_generator(plan.spec.generator)
    done = call_job("generate", "--out", tmp_path / "out", "--only", "000000000-00")
    assert done.returncode == 2 and "rerun jobs.featurise" in done.stderr


def test_a_number_has_its_slot_whatever_the_others_are():
    layout, places = in_slots({5: "five", 2: "two", 9: "nine"}, "-", 4)
    assert layout == ["-", "-", "two", "-", "-", "five", "-", "-", "-", "nine", "-", "-"]
    assert places == {2: 2, 5: 5, 9: 9}
    layout, places = in_slots({9: "nine"}, "-", 4)
    assert (layout, places) == (["-", "nine", "-", "-"], {9: 1})
    assert in_slots({}, "-", 4) == ([], {})
