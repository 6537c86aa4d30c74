"""The commit that is pinned is what is loaded, whatever the hub's main branch is now, and its digest is checked."""

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from cluster.generation.pinning import clip_spec
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
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
