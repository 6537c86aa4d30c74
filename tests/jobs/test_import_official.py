"""Published files become our datasets and captioners; nothing is lost on the way there and back."""

import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from cluster.dataset.documents import Manifest, Plan, load_manifest
from cluster.dataset.keys import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    MANIFEST_KEY,
    PLAN_KEY,
    VOCABULARY_KEY,
    shard_key,
    stats_key,
)
from cluster.dataset.opened import open_dataset
from cluster.dataset.together import check_same_clip
from cluster.dataset.verify import verify
from cluster.export.export import export_dataset
from cluster.export.request import ExportRequest
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.store.store import Store, open_store
from pcm.captioners.captioner import CONCEPTS_FILE, MODEL_FILE, VOCABULARY_FILE, Captioner
from pcm.clip.encoder import ImageFeatures
from pcm.errors import InputError
from pcm.official.files import (
    concepts_from_pickle,
    features_from_npz,
    features_to_npz,
    read_annotation,
    sentence_of,
)
from pcm.official.state_dict import POSITION_KEY, position_rounding
from pcm.text.vocabulary import Vocabulary
from tests.helpers.faulty_proxy import faulty_proxy
from tests.helpers.job_runs import kill_once
from tests.helpers.malicious import Touch
from tests.helpers.paths import DATA
from tests.helpers.published import make_complete_dataset
from tests.helpers.seaweedfs import BUCKET
from tests.helpers.stored import quarantine_reasons
from tests.helpers.tiny_models import save_tiny_clip

GOLDEN = DATA / "pcmnet_small.safetensors"
LENGTH = 12
ANNOTATIONS = "mscoco_caption_anno_train.pkl"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tiny_t2i, tiny_clip) -> tuple[Store, Plan, Manifest]:
    return make_complete_dataset(tmp_path_factory.mktemp("import") / "dataset", t2i=tiny_t2i, clip=tiny_clip)


@pytest.fixture(scope="module")
def exported(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("official")
    asked = ExportRequest(data="it", out="there", to="official", name="sd", max_length=LENGTH, workers=2)
    export_dataset(dataset[0], open_store(out), asked)
    return out


@pytest.fixture
def published(exported: Path, tmp_path: Path) -> Path:
    """An official export, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "published"))


def arguments(published: Path | str, out: Path | str, clip: Path, **changed: object) -> list[object]:
    """`jobs.import_official` of everything that an export holds; an argument changed to None is left out."""
    given: dict[str, object] = {
        "annotations": f"{published}/mscoco_caption_anno_train.pkl", "images": f"{published}/images/sd_sp{{split_id}}",
        "features": f"{published}/features/sd_sp{{split_id}}", "vocabulary": f"{published}/vocabulary.txt",
        "concepts": f"{published}/concepts.pickle", "clip_head": f"{published}/clip_head.pth", "clip": clip,
        "out": out, "shard_size": 3, "workers": 2,
    }  # fmt: skip
    pairs = ((name.replace("_", "-"), value) for name, value in (given | changed).items() if value is not None)
    return [part for name, value in pairs for part in (f"--{name}", value)]


def rows(store: Store) -> list[dict]:
    keys = [key for key in store.list("shards") if key.endswith(".parquet")]
    return [row for key in keys for row in pq.read_table(store.path(key)).to_pylist()]


def rewrite(published: Path, change) -> None:
    """Change the annotations as a user would, with the usual pickle."""
    path = published / "mscoco_caption_anno_train.pkl"
    annotations = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(annotations) or annotations))


def test_a_dataset_comes_back_from_published_files_as_it_was(dataset, exported, tmp_path, tiny_clip, call_job):
    store = dataset[0]
    result = call_job("import_official", *arguments(exported, tmp_path / "back", tiny_clip))
    assert result.returncode == 0, result.stderr
    assert (result.summary["stored"], result.summary["quarantined"]) == (7, 0)
    back = open_store(tmp_path / "back")
    proof = verify(back)
    assert proof["ok"] and proof["stored"] == proof["expected"] == 7
    before, after = rows(store), rows(back)
    vocabulary = Vocabulary.from_text(back.read_bytes(VOCABULARY_KEY).decode())
    for old, new in zip(before, after, strict=True):
        assert new["image"]["bytes"] == old["image"]["bytes"]
        assert (new["width"], new["height"]) == (old["width"], old["height"])
        for name in ("global_feature", "patch_features", "clip_score"):  # float16, float16 and float32, bit for bit
            assert new[name] == old[name]
        for ours, theirs in zip(*(vocabulary.encode(row["caption"], LENGTH) for row in (old, new)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert back.read_bytes(VOCABULARY_KEY) == store.read_bytes(VOCABULARY_KEY)
    heads = [safetensors.torch.load(place.read_bytes(CLIP_HEAD_KEY)) for place in (store, back)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert load_manifest(back).features == load_manifest(store).features

    # And to published files again: the same pictures and features, under the same ids.
    again = tmp_path / "again"
    call_job("export", "--data", back.root, "--out", again, "--to", "official", "--name", "sd", "--max-length", LENGTH)
    for old_path, new_path in zip(sorted(exported.rglob("60*")), sorted(again.rglob("60*")), strict=True):
        assert new_path.relative_to(again) == old_path.relative_to(exported)
        assert new_path.read_bytes() == old_path.read_bytes()
    first, second = (
        pickle.loads((place / "mscoco_caption_anno_train.pkl").read_bytes()) for place in (exported, again)
    )
    for old, new in zip(first, second, strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert (again / "concepts.pickle").read_bytes() == (exported / "concepts.pickle").read_bytes()

    # As photos of another split they lie where the published code looks, and nothing of the train split is overwritten.
    beside = tmp_path / "beside"
    call_job(
        "export", "--data", store.root, "--val", back.root, "--out", beside, "--to", "official", "--name", "sd",
        "--max-length", LENGTH,
    )  # fmt: skip
    for path in exported.rglob("60*"):
        assert (beside / path.relative_to(exported)).read_bytes() == path.read_bytes()
    photos = pickle.loads((beside / "mscoco_caption_anno_val.pkl").read_bytes())
    for old, photo in zip(first, photos, strict=True):
        features = [place / "features" / name for place, name in ((exported, "sd_sp0"), (beside, "sd"))]
        one, other = (folder / f"{item['image_id']}.npz" for folder, item in zip(features, (old, photo), strict=True))
        assert one.read_bytes() == other.read_bytes()


def test_refined_annotations_find_their_pictures_by_id_and_their_scores_are_5_times_the_cosine(
    dataset, published, tmp_path, tiny_clip, call_job
):
    """As SynC writes them: captions have moved to other pictures, whose split_id did not move with them."""
    for kind, ending in (("images", "jpg"), ("features", "npz")):
        for image_id, split in (("6000003", 2), ("6000005", 5)):
            folder = published / kind / f"sd_sp{split}"
            folder.mkdir()
            (published / kind / "sd_sp0" / f"{image_id}.{ending}").rename(folder / f"{image_id}.{ending}")

    def change(annotations):
        for item in annotations:
            item |= {"split_id": 7, "clipscore": 2 * item["clipscore"]}
        del annotations[-1]["split_id"]

    rewrite(published, change)
    settings = {"clip_score_scale": 5}
    result = call_job("import_official", *arguments(published, tmp_path / "out", tiny_clip, **settings))
    assert result.returncode == 0, result.stderr
    assert (result.summary["stored"], result.summary["quarantined"]) == (7, 0)
    found = rows(open_store(tmp_path / "out"))
    scores = [row["clip_score"] for row in rows(dataset[0])]
    assert [row["clip_score"] for row in found] == pytest.approx(scores, abs=1e-6)
    assert [row["image"]["path"] for row in found] == [
        f"sp{ {3: 2, 5: 5}.get(k, 0) }/{6_000_000 + k}.jpg" for k in (0, 1, 3, 4, 5, 6, 7)
    ]
    other = call_job("import_official", *arguments(published, tmp_path / "out", tiny_clip, clip_score_scale=4))
    assert other.returncode == 2 and "was begun with another spec" in other.stderr

    # The folders that the pictures were in are those that they are exported to.
    again = tmp_path / "again"
    call_job("export", "--data", tmp_path / "out", "--out", again, "--to", "official", "--name", "sd")
    annotations = pickle.loads((again / ANNOTATIONS).read_bytes())
    assert [item["split_id"] for item in annotations] == [0, 0, 2, 0, 5, 0, 0]
    assert all((again / f"features/sd_sp{item['split_id']}/{item['image_id']}.npz").is_file() for item in annotations)


def test_captions_come_from_the_caption_file_where_its_words_are_the_ids(
    dataset, exported, tmp_path, tiny_clip, call_job
):
    by_id, by_place = exported / "captions.jsonl", tmp_path / "karpathy.json"
    said = [json.loads(line) for line in by_id.read_text().splitlines()]
    # Synthetic pictures of a corpus that knows nothing of their ids: 6000000 + its place.
    texts = {int(line["image_id"]) - 6_000_000: line["caption"] for line in said}
    sentences = [{"raw": texts.get(place, "other"), "sentid": place} for place in range(8)]
    sentences[1]["raw"] = "Something else was said."
    by_place.write_text(json.dumps({"images": [{"split": "train", "cocoid": 9, "sentences": sentences}]}))
    for number, (path, from_file) in enumerate(((by_id, 7), (by_place, 6))):
        out = tmp_path / f"out{number}"
        result = call_job("import_official", *arguments(exported, out, tiny_clip, captions=path))
        assert result.returncode == 0, result.stderr
        counts = result.summary["captions_from_file"], result.summary["captions_recovered"]
        assert counts == (from_file, 7 - from_file)  # what is not the same sentence is recovered from its ids
        stored = [row["caption"] for row in rows(open_store(out))]
        assert stored[0] == "A dog near the beach."
        assert stored[1] == ("A man's cat on a table!" if path == by_id else "a mans cat on a table")


def test_bad_rows_are_quarantined_with_their_reason_and_the_rest_is_imported(published, tmp_path, tiny_clip, call_job):
    images, features = published / "images" / "sd_sp0", published / "features" / "sd_sp0"
    (images / "6000000.jpg").unlink()
    (images / "6000001.jpg").write_bytes((images / "6000001.jpg").read_bytes()[:200])
    (features / "6000003.npz").unlink()
    patches, image = features_from_npz((features / "6000004.npz").read_bytes())
    (features / "6000004.npz").write_bytes(features_to_npz(patches[:-1], image))
    (features / "6000005.npz").write_bytes(features_to_npz(patches * np.float32(1e6), image))
    (features / "6000006.npz").write_bytes(b"no npz")
    Image.new("RGB", (8, 8)).save(images / "gif.jpg", "GIF")

    def change(annotations):
        good = annotations[-1]
        annotations += [
            {"image_id": "../../etc/passwd", "tokens_ids": good["tokens_ids"], "target_ids": good["target_ids"]},
            {**good, "clipscore": None},
            {**good, "image_id": "gif"},
            {**good, "clipscore": 7.5},
            {**good, "tokens_ids": good["tokens_ids"] + 1},
            {**good, "target_ids": np.full_like(good["target_ids"], -1), "tokens_ids": good["tokens_ids"] * 0},
            "no dict",
        ]

    rewrite(published, change)
    result = call_job("import_official", *arguments(published, tmp_path / "out", tiny_clip))
    assert result.returncode == 0, result.stderr
    store = open_store(tmp_path / "out")
    assert quarantine_reasons(store) == {
        "6000000#0": "missing_image", "6000001#0": "bad_image", "6000003#0": "missing_features",
        "6000004#0": "features_of_another_shape", "6000005#0": "features_beyond_float16", "6000006#0": "bad_features",
        "[7]": "bad_record", "6000007#0": "empty", "gif#0": "bad_image", "[10]": "bad_record", "[13]": "bad_record",
    } | quarantined_twice(store)  # fmt: skip
    assert result.summary["expected"] == 14 == result.summary["stored"] + result.summary["quarantined"]
    assert result.summary["stored"] == 1
    assert result.summary["quarantined_by_reason"]["missing_clip_score"] == 1
    assert result.summary["quarantined_by_reason"]["bad_record"] == 4
    assert verify(store)["ok"]


def quarantined_twice(store: Store) -> dict[str, str]:
    """6000007#0 is in the annotations four times: whichever of its reasons came last."""
    return {"6000007#0": quarantine_reasons(store)["6000007#0"]}


def test_features_are_computed_where_none_are_given(dataset, exported, tmp_path, tiny_clip, call_job):
    store = dataset[0]
    changed = {"features": None, "clip_head": None, "concepts": None}
    result = call_job("import_official", *arguments(exported, tmp_path / "out", tiny_clip, **changed))
    assert result.returncode == 0, result.stderr
    for old, new in zip(rows(store), rows(open_store(tmp_path / "out")), strict=True):
        patches = [np.frombuffer(row["patch_features"], np.float16) for row in (new, old)]
        np.testing.assert_allclose(*patches, atol=2e-3)
        np.testing.assert_allclose(new["global_feature"], old["global_feature"], atol=1e-3)
        assert new["clip_score"] == old["clip_score"]  # the annotation's, though the caption is spelled otherwise
    assert verify(open_store(tmp_path / "out"))["ok"]


def test_seconds_of_featurising_do_not_count_the_wait_for_the_model(
    exported, tmp_path, tiny_clip, call_job, monkeypatch
):
    real, busy = FeaturiseShard.featurise, []

    def slow(self, samples):
        began = time.monotonic()
        time.sleep(1)
        found = real(self, samples)
        busy.append(time.monotonic() - began)
        return found

    monkeypatch.setattr(FeaturiseShard, "featurise", slow)
    given = arguments(exported, tmp_path / "back", tiny_clip, features=None, clip_head=None, shard_size=2, workers=4)
    assert call_job("import_official", *given).returncode == 0
    store = open_store(tmp_path / "back")
    said = [json.loads(store.read_bytes(stats_key(shard)))["featurise_seconds"] for shard in range(4)]
    assert len(busy) == 4 and sum(said) == pytest.approx(sum(busy), rel=0.2)


def test_an_import_is_finished_where_its_clip_is_now(exported, tmp_path, tiny_clip, call_job):
    out, clip = tmp_path / "out", Path(shutil.copytree(tiny_clip, tmp_path / "old"))
    computed = {"features": None, "clip_head": None, "concepts": None, "shard_size": 1}
    whole = call_job("import_official", *arguments(exported, out, clip, **computed))
    assert whole.returncode == 0, whole.stderr
    plan, made = (out / PLAN_KEY).read_bytes(), load_manifest(open_store(out))
    for key in (shard_key(0), stats_key(0), MANIFEST_KEY):
        (out / key).unlink()
    clip.rename(tmp_path / "new")
    done = call_job("import_official", *arguments(exported, out, tmp_path / "new", **computed))
    assert done.returncode == 0, done.stderr
    found = load_manifest(open_store(out))
    assert (found.fingerprint, found.spec) == (made.fingerprint, made.spec) and (out / PLAN_KEY).read_bytes() == plan


def test_imported_features_are_mixed_with_those_of_the_same_clip_alone(
    dataset, exported, tmp_path, tiny_clip, call_job
):
    imported, other = tmp_path / "imported", tmp_path / "other"
    assert call_job("import_official", *arguments(exported, imported, tiny_clip)).returncode == 0
    another_clip = save_tiny_clip(tmp_path / "another", seed=1)
    computed = {"features": None, "clip_head": None, "concepts": None, "clip_score_scale": None}
    assert call_job("import_official", *arguments(exported, other, another_clip, **computed)).returncode == 0
    check_same_clip(
        [open_dataset(dataset[0]), open_dataset(open_store(imported))]
    )  # one CLIP made the features of both

    # The features say nothing of their CLIP, and the name is the user's: the published head tells.
    for pair in ((imported, other), (other, imported)):
        mixed = [part for place in pair for part in ("--data", place)]
        refused = call_job("train", *mixed, "--out", tmp_path / "run")
        assert refused.returncode == 2
        assert f"{pair[1]}: features of another CLIP" in refused.stderr and len(refused.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_killed_import_goes_on_where_it_stopped(exported, tmp_path, tiny_clip, call_job):
    whole = call_job("import_official", *arguments(exported, tmp_path / "whole", tiny_clip, shard_size=1, workers=1))
    assert whole.returncode == 0, whole.stderr
    slow = tmp_path / "slow"  # a copy whose fourth picture never comes: a pipe that nobody writes into
    shutil.copytree(exported, slow)
    picture = slow / "images" / "sd_sp0" / "6000004.jpg"
    data = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)
    out = tmp_path / "out"
    asked = arguments(slow, out, tiny_clip, shard_size=1, workers=1)
    kill_once((out / shard_key(2)).exists, [sys.executable, "-m", "jobs.import_official", *asked])
    assert not (out / "dataset.json").exists()
    picture.unlink()
    picture.write_bytes(data)
    result = call_job("import_official", *arguments(slow, out, tiny_clip, shard_size=1, workers=1))
    assert result.returncode == 0 and result.summary["skipped"] == 3, result
    assert verify(open_store(out))["fingerprint"] == verify(open_store(tmp_path / "whole"))["fingerprint"]


def test_imported_pictures_can_not_be_drawn_again(exported, tmp_path, tiny_clip, call_job):
    out = tmp_path / "out"
    call_job("import_official", *arguments(exported, out, tiny_clip))
    result = call_job("generate", "--out", out, "--only", "000000000-00")
    assert result.returncode == 2 and "were imported" in result.stderr
    changed = arguments(exported, out, tiny_clip, shard_size=2)
    assert "shard_size: 3 -> 2" in call_job("import_official", *changed).stderr


def test_repair_leaves_imported_words_concepts_and_head_as_they_are(
    published, tmp_path, tiny_clip, call_job, ray_session
):
    words = (published / "vocabulary.txt").read_text().rstrip("\n")
    (published / "vocabulary.txt").write_text(f"{words}\nzyzzyva\n")  # a word of the published list, of no caption
    out = tmp_path / "out"
    given = arguments(published, out, tiny_clip)
    assert call_job("import_official", *given).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "dataset.json").write_bytes(b"{")
    mended = call_job("verify", out, "--repair")
    assert mended.returncode == 0 and mended.summary["ok"], mended.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    for key, damage in ((VOCABULARY_KEY, Path.unlink), (CONCEPTS_KEY, lambda path: path.write_bytes(b"no tensors"))):
        damage(out / key)
        assert f"{key}: " in call_job("verify", out).summary["problems"][0]
        refused = call_job("verify", out, "--repair")
        assert refused.returncode == 2 and "rerun the same jobs.import_official" in refused.stderr.splitlines()[-1]
        assert call_job("import_official", *given).returncode == 0
        assert verify(open_store(out))["ok"] and (out / VOCABULARY_KEY).read_bytes() == before[VOCABULARY_KEY]


def test_an_import_from_and_to_an_object_store(exported, tmp_path, tiny_clip, call_job, s3):
    bucket = f"s3://{BUCKET}/published"
    store = open_store(bucket)
    for path in (path for path in exported.rglob("*") if path.is_file()):
        store.write_bytes(path.relative_to(exported).as_posix(), path.read_bytes())
    result = call_job("import_official", *arguments(bucket, f"s3://{BUCKET}/dataset", tiny_clip))
    assert result.returncode == 0, result.stderr
    assert verify(open_store(f"s3://{BUCKET}/dataset"))["ok"]
    again = f"s3://{BUCKET}/again"
    result = call_job(
        "export", "--data", f"s3://{BUCKET}/dataset", "--out", again, "--to", "official", "--name", "sd",
        "--max-length", LENGTH,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert open_store(again).read_bytes("features/sd_sp0/6000000.npz") == store.read_bytes(
        "features/sd_sp0/6000000.npz"
    )


def test_an_import_goes_on_with_words_concepts_and_head_that_it_began_with(exported, tmp_path, tiny_clip, call_job):
    out = tmp_path / "out"
    assert call_job("import_official", *arguments(exported, out, tiny_clip)).returncode == 0
    before = {key: (out / key).read_bytes() for key in (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY)}
    names, embeddings = pickle.loads((exported / "concepts.pickle").read_bytes())
    (tmp_path / "concepts.pickle").write_bytes(pickle.dumps((names, embeddings.flip(0))))
    head = torch.load(exported / "clip_head.pth", weights_only=True)
    head["model"]["visual_embed.proj"] += 1
    torch.save(head, tmp_path / "head.pth")
    (tmp_path / "words.txt").write_bytes((exported / "vocabulary.txt").read_bytes() + b"zebra\n")  # the same captions
    for changed, said in (
        ({"vocabulary": tmp_path / "words.txt"}, f"begun with another {VOCABULARY_KEY}; give the same --vocabulary"),
        ({"concepts": tmp_path / "concepts.pickle"}, rf"begun with another {CONCEPTS_KEY}; give the same --concepts"),
        ({"clip_head": tmp_path / "head.pth"}, rf"begun with another {CLIP_HEAD_KEY}; give the same --clip-head"),
    ):
        result = call_job("import_official", *arguments(exported, out, tiny_clip, **changed))
        assert result.returncode == 2 and said in result.stderr, result.stderr
        assert {key: (out / key).read_bytes() for key in before} == before
    for changed in ({}, {"concepts": None}):
        result = call_job("import_official", *arguments(exported, out, tiny_clip, **changed))
        assert result.returncode == 0 and result.summary["skipped"] == 7, result.stderr
        assert {key: (out / key).read_bytes() for key in before} == before
    (out / VOCABULARY_KEY).write_bytes(b"a\na\n")
    (out / CONCEPTS_KEY).write_bytes(before[CONCEPTS_KEY][:100])
    (out / CLIP_HEAD_KEY).write_bytes(b"\x02" + bytes(7) + b"[]")
    result = call_job("import_official", *arguments(exported, out, tiny_clip))
    assert result.returncode == 0, result.stderr
    assert (out / VOCABULARY_KEY).read_bytes() == before.pop(VOCABULARY_KEY)
    for key in before:  # the damaged ones are made again
        made, once = safetensors.torch.load((out / key).read_bytes()), safetensors.torch.load(before[key])
        assert made.keys() == once.keys() and all(torch.equal(made[name], once[name]) for name in once)


@pytest.mark.parametrize("refused", ["images/sd_sp0/6000001.jpg", "features/sd_sp0/6000001.npz"])
def test_a_store_that_refuses_ends_the_import_and_is_no_bad_file(
    refused, exported, tmp_path, tiny_clip, call_job, s3, monkeypatch
):
    bucket, out = f"s3://{BUCKET}/refused", tmp_path / "out"
    with faulty_proxy(s3.ports["s3.port"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(bucket)
        for path in (path for path in exported.rglob("*") if path.is_file()):
            store.write_bytes(path.relative_to(exported).as_posix(), path.read_bytes())
        proxy.fail("status", path=refused, status=403, code="ExpiredToken")
        result = call_job("import_official", *arguments(bucket, out, tiny_clip))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"{refused.rpartition('/')[2]}: access refused (ExpiredToken 403)" in result.stderr
        assert not quarantine_reasons(open_store(out))
        proxy.heal()
        result = call_job("import_official", *arguments(bucket, out, tiny_clip))
    assert result.returncode == 0, result.stderr
    assert (result.summary["stored"], result.summary["quarantined"]) == (7, 0)


def test_what_cannot_be_imported_is_one_clear_line_and_nothing_is_executed(
    published, tmp_path, tiny_clip, call_job, monkeypatch
):
    victim = tmp_path / "executed"
    evil, words = tmp_path / "evil.pickle", tmp_path / "words.txt"
    evil.write_bytes(pickle.dumps([{"image_id": Touch(victim)}]))
    torch.save({"model": {"x": Touch(victim)}}, tmp_path / "evil.pth")
    torch.save({"model": {"x": Touch(victim)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    words.write_text("a\na\n")
    missing = tmp_path / "nowhere"
    for changed, message in (
        ({"annotations": evil}, "posix.system"),
        ({"concepts": evil}, "posix.system"),
        ({"clip_head": tmp_path / "evil.pth"}, "posix.system"),
        ({"clip_head": tmp_path / "old.pth"}, "posix.system"),
        ({"annotations": published / "concepts.pickle"}, "not a list of annotations"),
        ({"annotations": missing}, "no such file"),
        ({"images": missing}, "nothing for any of the first"),
        ({"features": f"{published}/images/sd_sp{{split_id}}"}, "nothing for any of the first"),
        ({"vocabulary": words}, "occurs twice"),
        ({"images": None}, "--images: missing"),
        ({"annotations": None}, "give one of the two"),
        ({"clip_head": published / "model.txt"}, "no such file"),
    ):
        result = call_job("import_official", *arguments(published, tmp_path / "out", tiny_clip, **changed))
        assert result.returncode == 2 and message in result.stderr, (changed, result)
        assert len(result.stderr.strip().splitlines()[-1:]) == 1
    monkeypatch.setattr("cluster.generation.stages.shard_row.MAX_SHARD_BYTES", 1000)
    result = call_job("import_official", *arguments(published, tmp_path / "huge", tiny_clip))
    assert result.returncode == 2 and "at most 1,000 fit; give a smaller --shard-size" in result.stderr
    assert not victim.exists()


def test_unknown_words_come_back_as_unknown_words():
    published = Vocabulary(("a", "dog", "<unk>", "unk"))
    token_ids, target_ids = published.encode_all(["a zebra dog"], 6)
    sentence = sentence_of(token_ids[0], target_ids[0], published)
    np.testing.assert_array_equal(published.encode(sentence, 6)[0], token_ids[0])
    assert sentence == "a unkunk dog"
    full = published.encode_all(["a a a a dog"], 6)
    assert sentence_of(full[0][0], full[1][0], published) == "a a a a dog"
    endless = np.array([0, 1, 1, 2]), np.array([1, 1, 2, 2])  # cut by the published code, without an end
    assert sentence_of(*endless, published) == "a a dog dog"
    for tokens, targets in (([0, 1, 2], [1, 1, 0]), ([1, 1, 2], [1, 2, 0]), ([0, 9, 0], [9, 0, -1])):
        with pytest.raises(InputError):
            sentence_of(np.array(tokens), np.array(targets), published)
    with pytest.raises(InputError, match="other words"):
        sentence_of(np.array([0, 1]), np.array([1, 0]), Vocabulary(("t-shirt",)))


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "a/b"}, {"image_id": ".."}, {"image_id": None}, {"image_id": ["6000000"]}, {"split_id": "x"},
        {"split_id": -1}, {"split_id": 1.5}, {"tokens_ids": np.ones((1, 2))}, {"tokens_ids": np.ones((1, 3), int)},
        {"tokens_ids": np.zeros((0, 2), int)}, {"target_ids": [[1, 2]]}, {"target_ids": "words"},
        {"clipscore": [1.0, 2.0]}, {"clipscore": np.nan}, {"clipscore": 3.0}, {"clipscore": "high"},
        {"image_id": 10**5000}, {"tokens_ids": torch.ones(1, 2, dtype=torch.bfloat16)},
        {"target_ids": torch.ones(1, 2, dtype=torch.int64).to_sparse()}, {"clipscore": torch.ones(1).bfloat16()},
    ],
)  # fmt: skip
def test_annotations_of_another_shape_are_refused(change):
    good = {"image_id": "1", "tokens_ids": np.ones((1, 2), int), "target_ids": np.ones((1, 2), int)}
    assert read_annotation(good).clip_scores is None
    assert read_annotation({**good, "image_id": 6000000, "split_id": np.int64(3)}).image_id == "6000000"
    for value in ({**good, **change}, list(good), {"image_id": "1"}):
        with pytest.raises(InputError):
            read_annotation(value)


def test_npz_headers_are_not_believed():
    good = features_to_npz(np.ones((2, 3)), np.ones(4))
    patches, image = features_from_npz(good)
    assert patches.shape == (2, 3) and np.linalg.norm(image) == pytest.approx(1)
    objects = good.replace(b"'descr': '<f4'", b"'descr': '|O' ")
    huge = good.replace(b"(2, 3), }", b"(2, 9), }")
    for data in (b"", good[:100], objects, huge, good[:200] + b"\xff" + good[201:]):
        with pytest.raises(InputError):
            features_from_npz(data)


def golden_files(folder: Path) -> dict[str, torch.Tensor]:
    """A published run made of the golden state: model.pth as the published code saves it, vocabulary, concepts."""
    tensors = load_file(GOLDEN)
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    parameter = torch.nn.Parameter(torch.ones(2))
    optimiser = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimiser.step()
    folder.mkdir()
    torch.save(
        {"model": state, "optimizer": optimiser.state_dict(), "scheduler": {"last_epoch": 3}, "iteration": 17},
        folder / "model.pth",
    )
    Vocabulary(tuple(f"w{number}x" for number in range(1, 50))).save(folder / "vocabulary.txt")
    names = [f"noun{number}" for number in range(20)]
    (folder / "concepts.pickle").write_bytes(pickle.dumps((names, tensors["in.concept_embed"])))
    return tensors


def test_a_published_checkpoint_gives_the_published_captions_and_goes_back_unchanged(tmp_path, call_job):
    tensors = golden_files(tmp_path / "published")
    clip = save_tiny_clip(tmp_path / "clip", width=48)
    published = tmp_path / "published"
    command = [
        "import_official", "--checkpoint", published / "model.pth", "--vocabulary", published / "vocabulary.txt",
        "--concepts", published / "concepts.pickle", "--clip", clip, "--out", tmp_path / "ours",
        "--set", "num_heads=4", "--set", "max_length=12", "--set", "noise_variance=0.0",
    ]  # fmt: skip
    result = call_job(*command)
    assert result.returncode == 0, result.stderr
    captioner = Captioner.load(tmp_path / "ours", clip=str(clip))

    images, patches = tensors["in.global_feats"], tensors["in.att_feats"]
    with torch.inference_mode():
        logits = captioner.model(images, patches, tensors["in.tokens_ids"], layout="append")
    assert (logits - tensors["out.eval.logits"]).abs().max() <= 2e-5
    described = captioner.describe(ImageFeatures(images.numpy(), patches.numpy()))
    words = captioner.vocabulary
    assert [found.caption for found in described] == [words.decode(ids) for ids in tensors["beam3.out1.ids"].tolist()]
    log_probs = tensors["beam3.out1.logp"].sum(dim=-1)
    np.testing.assert_allclose([found.log_prob for found in described], log_probs, atol=2e-4)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert call_job("caption", "--checkpoint", tmp_path / "ours", "--clip", clip, picture).returncode == 0

    for _ in range(2):
        result = call_job("export", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "back", "--to", "official")
        assert result.returncode == 0, result.stderr
    before = torch.load(published / "model.pth", weights_only=True)["model"]
    after = torch.load(tmp_path / "back" / "model.pth", weights_only=True)["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != POSITION_KEY)
    difference = (before[POSITION_KEY] - after[POSITION_KEY])[0].abs()  # computed, here as there
    assert (difference <= position_rounding(len(difference))).all()
    assert (tmp_path / "back" / "vocabulary.txt").read_bytes() == (published / "vocabulary.txt").read_bytes()
    _, embeddings = pickle.loads((tmp_path / "back" / "concepts.pickle").read_bytes())
    raw = tensors["in.concept_embed"]
    torch.testing.assert_close(embeddings, raw / raw.norm(dim=-1, keepdim=True))

    command[2], command[6] = tmp_path / "back" / "model.pth", tmp_path / "back" / "concepts.pickle"
    command[10] = tmp_path / "ours2"
    assert call_job(*command).returncode == 0
    for name in (MODEL_FILE, CONCEPTS_FILE, VOCABULARY_FILE):
        assert (tmp_path / "ours2" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()

    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    command[10] = tmp_path / "ours"  # where another captioner is
    result = call_job(*command)
    assert result.returncode == 2 and "holds another captioner (config.json is another)" in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == ours
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    (tmp_path / "back" / "vocabulary.txt").write_text("of another captioner\n")
    result = call_job("export", "--checkpoint", tmp_path / "ours", "--out", tmp_path / "back", "--to", "official")
    assert result.returncode == 2 and "holds another captioner (vocabulary.txt is another)" in result.stderr
    assert (tmp_path / "back" / "model.pth").read_bytes() == back["model.pth"]


def test_parts_of_different_runs_are_refused(tmp_path, call_job):
    golden_files(tmp_path / "published")
    published = tmp_path / "published"
    short = tmp_path / "short.txt"
    short.write_text("only\nthree\nwords\n")
    flat = tmp_path / "flat.pickle"
    flat.write_bytes(pickle.dumps((list("abcdef"), torch.ones(6, 7))))
    victim = tmp_path / "executed"
    torch.save({"model": Touch(victim)}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Touch(victim)}))
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "other.pth")
    for changed, message in (
        ({"--vocabulary": short}, "for 50 words, given are 4"),
        ({"--concepts": flat}, "32 dimensions of the concepts, given are 7"),
        ({"--checkpoint": tmp_path / "evil.pth"}, "posix.system"),
        ({"--checkpoint": tmp_path / "plain.pth"}, "refused unexecuted (it names posix.system)"),
        ({"--checkpoint": tmp_path / "text.pth"}, "not a plain torch checkpoint"),
        ({"--checkpoint": tmp_path / "other.pth"}, "not a PCM-Net state dict"),
        ({"--set": "vocab_size=3"}, "cannot be chosen"),
        ({"--set": "num_heads=5"}, "num_heads"),
        ({"--set": "top_concepts=many"}, "top_concepts"),
    ):
        given = {
            "--checkpoint": published / "model.pth", "--vocabulary": published / "vocabulary.txt",
            "--concepts": published / "concepts.pickle", "--clip": "any", "--out": tmp_path / "ours",
            "--set": "num_heads=4",
        } | changed  # fmt: skip
        result = call_job("import_official", *(part for pair in given.items() for part in pair))
        assert result.returncode == 2 and message in result.stderr, (changed, result)
    assert not victim.exists() and not (tmp_path / "ours").exists()


def test_concepts_of_unit_length_stay_bit_for_bit():
    rows_ = torch.nn.functional.normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    names = [str(number) for number in range(50)]
    assert np.array_equal(concepts_from_pickle(pickle.dumps((names, rows_))).embeddings, rows_.numpy())
    assert np.allclose(concepts_from_pickle(pickle.dumps((names, 3 * rows_))).embeddings, rows_.numpy(), atol=1e-6)
