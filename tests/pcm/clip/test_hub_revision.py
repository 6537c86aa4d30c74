"""The commit that is pinned is what is loaded, whatever the hub's main branch is now, and its digest is checked."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
import transformers

from cluster.generation.like import with_spec
from cluster.generation.pinning import clip_spec, dataset_spec, joint_dimensions, require_joint_patches
from cluster.generation.request import GenerateRequest
from cluster.ingest.another_clip import featurise_dataset
from cluster.ingest.photos import featurise_photos
from cluster.ingest.request import FeaturiseRequest
from cluster.training.request import StreamRequest
from cluster.training.stream import stream
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from tests.helpers.featurised import featurise_in_process
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_generation import plan_dataset, write_corpus
from tests.helpers.tiny_models import save_tiny_clip

REPO = "hf-hub:somebody/tiny-clip"
COMMITS = ("a" * 40, "b" * 40)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8))


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache with a repo of two commits, of which the later one is main; the hub cannot be reached."""
    cache = tmp_path / "hub"
    place = cache / "models--somebody--tiny-clip"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMITS[1])
    (place / "blobs").mkdir()
    for seed, commit in enumerate(COMMITS):
        folder = save_tiny_clip(tmp_path / commit, seed=seed)
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return tmp_path


def global_feature(encoder: ClipEncoder) -> np.ndarray:
    return encoder.encode_images([IMAGE]).global_feature


def test_the_commit_that_is_pinned_is_loaded(repo: Path) -> None:
    main = clip_spec(REPO, device="cpu", dtype="float32")
    older = clip_spec(REPO, device="cpu", dtype="float32", revision=COMMITS[0])
    assert (older.revision, main.revision) == COMMITS
    for spec, commit in ((older, COMMITS[0]), (main, COMMITS[1])):
        (repo / "hub/models--somebody--tiny-clip/refs/main").write_text(COMMITS[commit == COMMITS[0]])
        encoder = ClipEncoder.from_spec(spec)
        np.testing.assert_array_equal(global_feature(encoder), global_feature(ClipEncoder(str(repo / commit))))
        assert spec.weights == encoder.weights


def test_what_is_said_of_a_clip_beforehand_is_of_the_commit_that_is_pinned(
    repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = repo / "hub/models--somebody--tiny-clip/snapshots" / COMMITS[1]
    config = json.loads((place / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"embed_dim": 48}
    (place / "open_clip_config.json").unlink()
    (place / "open_clip_config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        clip_spec(REPO, device="cpu", dtype="float32", revision=COMMITS[0])
    assert "a global feature of 32 and" in caplog.text
    assert [joint_dimensions(REPO, commit) for commit in (*COMMITS, None)] == [32, 48, 48]
    config["model_cfg"]["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    require_joint_patches(REPO, COMMITS[0])
    with pytest.raises(InputError, match="PCM-Net needs patches"):
        require_joint_patches(REPO, COMMITS[1])


def move_main(repo: Path, commit: str) -> None:
    (repo / "hub/models--somebody--tiny-clip/refs/main").write_text(commit)


def test_a_dataset_goes_on_with_the_commit_of_its_clip(repo: Path) -> None:
    asked = GenerateRequest(corpus="embedded", out="out", t2i="null", clip=REPO)
    move_main(repo, COMMITS[0])
    begun = dataset_spec(asked, gpus=0)
    move_main(repo, COMMITS[1])
    assert begun.clip.revision == COMMITS[0] and dataset_spec(asked, gpus=0).clip.revision == COMMITS[1]
    assert dataset_spec(asked, gpus=0, begun=begun) == begun
    other = replace(asked, clip_revision=COMMITS[1])
    assert dataset_spec(other, gpus=0, begun=begun).clip.revision == COMMITS[1], "which is then refused"


def test_a_tag_stays_at_the_commit_with_which_a_dataset_was_begun(caplog: pytest.LogCaptureFixture) -> None:
    """No hub is in reach and nothing in the cache: without the record nothing would be pinned."""
    asked = GenerateRequest(corpus="embedded", out="out", t2i="null", clip="ViT-B-32/openai")
    loose = dataset_spec(asked, gpus=0)
    assert loose.clip.revision == "open_clip:openai" and "not pinned" in caplog.text
    pinned = replace(loose.clip, revision=COMMITS[0], weights=f"sha256:{'0' * 64}")
    begun = replace(loose, clip=pinned)
    assert dataset_spec(asked, gpus=0, begun=begun) == begun
    again = dataset_spec(with_spec(GenerateRequest(corpus="embedded", out="out"), begun), gpus=0)
    assert again.clip.revision == COMMITS[0] and begun.differences(again) == []


def test_a_tag_without_a_repo_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "RN50", {"own": {"url": "https://example.org/own.pt"}})
    assert clip_spec("RN50/own", device="cpu", dtype="float32").revision == "open_clip:own"
    with pytest.raises(InputError, match="the weights of RN50/own are in no repo of the hub; leave it out"):
        clip_spec("RN50/own", device="cpu", dtype="float32", revision=COMMITS[0])


def test_another_clips_dataset_goes_on_with_its_commit(repo: Path, tmp_path: Path, tiny_clip: Path) -> None:
    data = write_dataset(tmp_path / "drawn", tiny_clip, rows=8, shard_size=4)
    move_main(repo, COMMITS[0])
    assert featurise_in_process(data, tmp_path / "again", REPO, shards=1) is None
    move_main(repo, COMMITS[1])
    manifest = featurise_in_process(data, tmp_path / "again", REPO)
    assert manifest is not None and manifest.spec.clip.revision == COMMITS[0]
    assert featurise_in_process(data, tmp_path / "again", REPO) == manifest


class Reached(Exception):
    """What is checked of a CLIP beforehand has passed."""


def reached(*_: object) -> None:
    raise Reached


def change_newest(repo: Path, **changes: object) -> None:
    """Another configuration in the later commit."""
    path = repo / "hub/models--somebody--tiny-clip/snapshots" / COMMITS[1] / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"] |= changes
    path.unlink()
    path.write_text(json.dumps(config))


def test_concepts_are_compared_with_the_clip_that_a_dataset_was_begun_with(
    repo: Path, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    change_newest(repo, embed_dim=48)
    data = write_dataset(tmp_path / "drawn", tiny_clip, rows=8, shard_size=4)
    request = FeaturiseRequest(
        data=str(data), out=str(tmp_path / "out"), clip=REPO, concepts=str(data / "concepts.safetensors")
    )
    monkeypatch.setattr("cluster.ingest.another_clip._make", reached)
    for main in COMMITS:
        move_main(repo, main)
        with pytest.raises(Reached):
            featurise_dataset(request)


def test_a_stream_goes_on_with_the_commit_of_its_clip(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = json.loads((repo / COMMITS[1] / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    change_newest(repo, vision_cfg=vision | {"attentional_pool": True, "attn_pooler_heads": 2})
    request = StreamRequest(
        corpus=str(write_corpus(tmp_path)), t2i="null", clip=REPO, data=str(tmp_path / "data"),
        out=str(tmp_path / "run"), shard_size=5,
    )  # fmt: skip
    monkeypatch.setattr("cluster.generation.make.start_ray", reached)
    with pytest.raises(InputError, match="PCM-Net needs patches"):
        stream(request)
    move_main(repo, COMMITS[0])
    spec = dataset_spec(request, gpus=0)
    plan_dataset(tmp_path / "data", Path(request.corpus), spec, shard_size=5)
    move_main(repo, COMMITS[1])
    with pytest.raises(Reached):
        stream(request)


def test_photos_go_on_with_their_commit(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    IMAGE.save(tmp_path / "photos/one.png")
    (tmp_path / "captions.csv").write_text("image,caption\none.png,a dog\n")
    request = FeaturiseRequest(
        images=str(tmp_path / "photos"), captions=str(tmp_path / "captions.csv"), out=str(tmp_path / "out"), clip=REPO
    )
    move_main(repo, COMMITS[0])
    first = featurise_photos(request)
    move_main(repo, COMMITS[1])
    again = featurise_photos(request)
    assert first.manifest.spec.clip.revision == COMMITS[0]
    assert again.manifest.fingerprint == first.manifest.fingerprint and again.skipped == 1


def test_the_tokenizer_of_a_tag_is_of_the_commit_of_its_weights(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration is open_clip's own, and names the repo of the weights for the tokenizer."""
    name = REPO.removeprefix("hf-hub:")
    for commit, words in zip(COMMITS, (["a", "dog"], ["dog", "a"]), strict=True):
        tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(["<pad>", "<unk>", *words])}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
        place = repo / "hub/models--somebody--tiny-clip/snapshots" / commit
        found.save_pretrained(place)
        (place / "config.json").write_text('{"model_type": "bert"}')
    config = json.loads((repo / COMMITS[0] / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = name
    (tmp_path / "Tiny-Tag.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path / "Tiny-Tag.json")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-Tag", {"own": {"hf_hub": f"{name}/"}})
    for commit, ids in zip(COMMITS, ([2, 3], [3, 2]), strict=True):
        spec = clip_spec("Tiny-Tag/own", device="cpu", dtype="float32", revision=commit)
        assert ClipEncoder.from_spec(spec)._tokenizer(["a dog"])[0, :2].tolist() == ids


def test_weights_of_another_digest_than_pinned_are_refused(repo: Path) -> None:
    spec = clip_spec(REPO, device="cpu", dtype="float32")
    snapshot = repo / "hub/models--somebody--tiny-clip/snapshots" / COMMITS[1]
    weights = snapshot / "open_clip_model.safetensors"
    weights.unlink()
    weights.write_bytes((repo / COMMITS[0] / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"its weights is sha256:.*made with sha256:"):
        ClipEncoder.from_spec(spec)


def test_a_folder_that_changed_since_it_was_pinned_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    spec = clip_spec(str(folder), device="cpu", dtype="float32")
    ClipEncoder.from_spec(spec)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="put the same files there"):
        ClipEncoder.from_spec(spec)


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_clip(tmp_path / "clip")
    with pytest.raises(InputError, match="is not on the hub"):
        clip_spec(str(folder), device="cpu", dtype="float32", revision=COMMITS[0])
