"""What is staged is what its name stands for, once, and without what nobody loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from cluster.store.store import open_store
from cluster.weights.manifest import read_manifest
from cluster.weights.node_copy import CACHE_VARIABLE, local_name
from cluster.weights.request import StageModelsRequest
from cluster.weights.stage import _commit, places_of, stage
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from tests.helpers.seaweedfs import S3Server

COMMIT, NEWER = "a" * 40, "b" * 40


def hub_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo: str, folder: Path) -> None:
    """The hub's local cache with one commit of a repo; the hub itself cannot be reached."""
    place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    (place / "snapshots" / COMMIT).symlink_to(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def names(uri: str) -> set[str]:
    return {file.name for file in read_manifest(open_store(uri)).files}


def test_a_repo_is_staged_at_its_commit_without_what_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_t2i: Path
) -> None:
    folder = Path(shutil.copytree(tiny_t2i, tmp_path / "repo"))
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (folder / "README.md").write_text("of the repo")
    hub_with(monkeypatch, tmp_path, "somebody/tiny", folder)
    out = str(tmp_path / "out")
    summary = stage(StageModelsRequest(t2i="somebody/tiny", revision=COMMIT, out=out))
    assert summary["source"] == f"somebody/tiny@{COMMIT}"
    assert names(out) == {file.relative_to(tiny_t2i).as_posix() for file in tiny_t2i.rglob("*") if file.is_file()}

    stage(StageModelsRequest(t2i="somebody/tiny", revision=COMMIT, t2i_variant="fp16", out=out))
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in names(out)
    assert "unet/diffusion_pytorch_model.safetensors" not in names(out)
    assert "vae/diffusion_pytorch_model.safetensors" in names(out)  # has no such variant


def test_staging_again_puts_nothing(tmp_path: Path, tiny_t2i: Path) -> None:
    request = StageModelsRequest(t2i=str(tiny_t2i), out=str(tmp_path / "out"))
    first = stage(request)
    assert first["put"] == first["files"] > 0
    assert stage(request)["put"] == 0


def test_what_a_later_release_has_staged_is_not_replaced(tmp_path: Path, tiny_t2i: Path) -> None:
    request = StageModelsRequest(t2i=str(tiny_t2i), out=str(tmp_path / "out"))
    stage(request)
    (manifest,) = (tmp_path / "out").rglob("weights.json")
    later = json.dumps(json.loads(manifest.read_bytes()) | {"version": 2, "more": 1}).encode()
    manifest.write_bytes(later)
    with pytest.raises(InputError, match=r"weights.json: of version 2, and this release knows 1; use the release that"):
        stage(request)
    assert manifest.read_bytes() == later


def test_a_repo_is_staged_again_at_the_commit_that_lies_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_t2i: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub_with(monkeypatch, tmp_path, "somebody/tiny", tiny_t2i)
    monkeypatch.setattr("cluster.weights.hub.look_up", lambda *asked, **option: SimpleNamespace(sha=NEWER))
    newer = Path(shutil.copytree(tiny_t2i, tmp_path / "newer"))
    with (newer / "model_index.json").open("a") as index:
        index.write(" ")
    (tmp_path / "hub/models--somebody--tiny/snapshots" / NEWER).symlink_to(newer)
    asked = StageModelsRequest(t2i="somebody/tiny", out=str(tmp_path / "out"))
    first = stage(replace(asked, revision=COMMIT))
    again = stage(asked)
    assert (again["source"], again["revision"], again["put"]) == (f"somebody/tiny@{COMMIT}", first["revision"], 0)
    assert "replaces" not in caplog.text
    (tmp_path / "out/weights.json").write_bytes(b"damaged")
    assert stage(replace(asked, revision=COMMIT))["revision"] == first["revision"]
    assert stage(replace(asked, revision="main"))["source"] == f"somebody/tiny@{NEWER}"
    assert f"replaces somebody/tiny@{COMMIT} ({first['revision']})" in caplog.text
    assert stage(asked)["source"] == f"somebody/tiny@{NEWER}"
    assert stage(StageModelsRequest(t2i="somebody/tiny", out=str(tmp_path / "other")))["source"].endswith(NEWER)


@pytest.mark.parametrize("source", ["org/repo@", "ViT-L-14/openai of org/repo@"])
def test_what_is_staged_of_another_source_says_no_commit(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr("cluster.weights.hub.look_up", lambda *asked, **option: SimpleNamespace(sha=NEWER))
    assert _commit("org/repo", None, f"{source}{COMMIT}", source) == COMMIT
    for there in ("", "tiny", f"org/another@{COMMIT}", f"{source}main", f"x{source}{COMMIT}"):
        assert _commit("org/repo", None, there, source) == NEWER
    assert _commit("org/repo", "d" * 40, f"{source}{COMMIT}", source) == "d" * 40


def test_both_models_are_staged_together_below_their_names(tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> None:
    out = str(tmp_path / "out")
    alone = {
        "t2i": stage(StageModelsRequest(t2i=str(tiny_t2i), out=str(tmp_path / "t2i"))),
        "clip": stage(StageModelsRequest(clip=str(tiny_clip), out=str(tmp_path / "clip"))),
    }
    both = stage(StageModelsRequest(t2i=str(tiny_t2i), clip=str(tiny_clip), out=out))
    assert [both[key] for key in ("bytes", "files", "put")] == [
        alone["t2i"][key] + alone["clip"][key] for key in ("bytes", "files", "put")
    ]
    for kind, folder in (("t2i", tiny_t2i), ("clip", tiny_clip)):
        weights = f"{out}/{kind}/{folder.name}"
        assert both[kind] == {**{key: alone[kind][key] for key in ("source", "revision")}, "weights": weights}
        named = {file.name: file.sha256 for file in read_manifest(open_store(weights)).files}
        assert alone[kind]["digests"] == named
        assert (
            named.items()
            <= {name.removeprefix(f"{kind}/{folder.name}/"): digest for name, digest in both["digests"].items()}.items()
        )
    assert len(both["digests"]) == both["files"]


@pytest.mark.parametrize(
    ("t2i", "clip", "places"),
    [
        ("stabilityai/sd-turbo", "ViT-L-14/openai", ("t2i/sd-turbo", "clip/ViT-L-14-openai")),
        ("/models/sd/", "hf-hub:apple/DFN5B-CLIP", ("t2i/sd", "clip/DFN5B-CLIP")),
    ],
)
def test_a_place_ends_with_the_models_own_name(t2i: str, clip: str, places: tuple[str, str]) -> None:
    found = places_of(StageModelsRequest(t2i=t2i, clip=clip, out="s3://bucket/models"))
    assert tuple(found.values()) == tuple(f"s3://bucket/models/{place}" for place in places)


def test_a_clip_folder_beside_is_staged_under_its_own_name(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").symlink_to(tiny_clip)
    monkeypatch.chdir(tmp_path)
    for clip in ("mine", "./mine", str(tmp_path / "mine")):
        assert places_of(StageModelsRequest(t2i="a/sd", clip=clip, out="o"))["clip"] == "o/clip/mine"


def test_a_clip_of_two_names_becomes_a_folder_that_gives_the_same(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pcm.torchvision_shim  # noqa: F401  isort: skip
    import open_clip

    config = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    name = f"tiny-quickgelu/{tiny_clip / 'open_clip_model.safetensors'}"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    out = f"file://{tmp_path}/out"
    stage(StageModelsRequest(clip=name, out=out))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8))
    named, staged, plain = (
        encoder.encode_images([image]).global_feature
        for encoder in (ClipEncoder(name), ClipEncoder(local_name(out)), ClipEncoder(str(tiny_clip)))
    )
    np.testing.assert_array_equal(named, staged)
    assert np.abs(staged - plain).max() > 1e-4  # the activation is not lost


def test_the_token_of_a_hub_is_in_no_output(
    s3: S3Server, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, call_job, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_A_SECRET_OF_SOMEBODY")
    out = f"{s3.uri}/token"
    run = call_job("stage_models", "--clip", tiny_clip, "--out", out)
    assert run.returncode == 0 and run.summary["revision"].startswith("sha256:")
    store = open_store(out)
    stored = b"".join(store.read_bytes(key) for key in store.list() if key.endswith(".json"))
    assert "hf_A_SECRET" not in run.stderr + json.dumps(run.summary) + stored.decode()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of the two, or both"),
        ({"t2i": "a/b", "clip": "null"}, "needs no staging"),
        ({"t2i": "a/b", "clip": "c", "revision": COMMIT}, "of which of the two"),
        ({"t2i": "embedded"}, "needs no staging"),
        ({"clip": "c", "t2i_variant": "fp16"}, "needs --t2i"),
        ({"t2i": "https://user:secret@host/x"}, "carries a credential"),
    ],
)
def test_what_cannot_be_is_refused(given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        StageModelsRequest(**given, out="s3://b/x")


def test_weights_whose_header_cannot_be_read_are_refused_before_anything_is_put(
    tmp_path: Path, tiny_t2i: Path, tiny_clip: Path
) -> None:
    for kind, source in {"t2i": tiny_t2i, "clip": tiny_clip}.items():
        folder = Path(shutil.copytree(source, tmp_path / kind))
        file = next(folder.rglob("*.safetensors"))
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(InputError, match=rf"{kind}: .*{file.name} cannot be read .*get it again"):
            stage(StageModelsRequest(**{kind: str(folder)}, out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


def test_a_clip_whose_text_tower_needs_the_hub_is_refused(tmp_path: Path, tiny_clip: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    weights = next(tiny_clip.glob("*.safetensors"))
    for name in (str(folder), f"roberta-ViT-B-32/{weights}"):
        with pytest.raises(InputError, match="reads the configuration of roberta-base from the hub"):
            stage(StageModelsRequest(clip=name, out=str(tmp_path / "out")))


def test_weights_are_not_put_into_a_dataset(tmp_path: Path, tiny_t2i: Path, call_job) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    run = call_job("stage_models", "--t2i", tiny_t2i, "--out", tmp_path)
    assert run.returncode == 2 and "holds a dataset (dataset.json); give another place" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_a_folder_has_no_revision(tmp_path: Path, tiny_t2i: Path, tiny_clip: Path) -> None:
    for given in ({"t2i": str(tiny_t2i)}, {"clip": str(tiny_clip)}):
        with pytest.raises(InputError, match="is no repo"):
            stage(StageModelsRequest(**given, revision=COMMIT, out=str(tmp_path / "out")))
