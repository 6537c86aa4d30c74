"""The sentence encoder: named, pinned, and nothing of its folder is run."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.curation.sync import sentences as module
from cluster.curation.sync.sentences import CLIP, PUBLISHED, SentenceSpec, load_sentences, resolve_sentences
from pcm.errors import InputError
from tests.helpers.models_from_pip import minilm_folder


def test_sentences_of_one_meaning_are_nearer_than_others() -> None:
    spec = resolve_sentences(str(minilm_folder()))
    assert spec.revision.startswith("sha256:") and spec.library.startswith("sentence-transformers ")
    vectors = load_sentences(spec, "cpu").encode(["A dog runs on grass.", "A puppy on a lawn.", "Two boats at sea."])
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    assert load_sentences(spec, "cpu").encode([]).shape == (0, 384)


def test_where_a_folder_lies_does_not_decide_the_vectors() -> None:
    one, other = (SentenceSpec(model=f"/{name}", revision="sha256:1", library="x") for name in "ab")
    assert one.decides() == other.decides() != SentenceSpec(model="/a", revision="sha256:2", library="x").decides()


def test_clip_needs_no_package(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caplog.set_level(logging.INFO)
    assert resolve_sentences(CLIP) == resolve_sentences(None) == SentenceSpec(model=CLIP)
    assert "CLIP's text tower, for sentence-transformers is not installed" in caplog.text
    with pytest.raises(InputError, match=r"needs sentence-transformers, which is not installed; .*--sentences clip"):
        resolve_sentences("some/model")


def test_the_published_one_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pin_repo", lambda repo, revision: "a" * 40)
    spec = resolve_sentences(None)
    assert (spec.model, spec.revision) == (PUBLISHED, "a" * 40)
    begun = SentenceSpec(model=PUBLISHED, revision="b" * 40).decides()
    assert resolve_sentences(None, begun).revision == "b" * 40, "a view that was begun goes on with its commit"
    assert resolve_sentences("some/other", begun).revision == "a" * 40
    by_clip = SentenceSpec(model=CLIP)  # begun before the package was installed
    assert resolve_sentences(None, by_clip.decides()) == by_clip


def test_a_repo_that_cannot_be_looked_up_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"--sentences no/such: is not in the local cache, and .*--sentences clip"):
        resolve_sentences("no/such")


def test_a_model_that_does_not_fit_into_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*values: object, **options: object) -> None:
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_SentenceTransformer", fails)
    with pytest.raises(InputError, match=r"--sentences some/model: cannot be loaded on cpu \(CUDA out of memory\)"):
        load_sentences(SentenceSpec(model="some/model"), "cpu")


def test_a_missing_folder_is_said() -> None:
    with pytest.raises(InputError, match=r"--sentences /no/such: no such folder"):
        resolve_sentences("/no/such")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no sentence-transformers model \(no modules.json\)"):
        resolve_sentences(str(tmp_path))
    (tmp_path / "modules.json").write_text("[3]")
    with pytest.raises(InputError, match="not a list of parts"):
        resolve_sentences(str(tmp_path))


@pytest.mark.parametrize("kind", ["own.Model", "os.system", "sentence_transformers_own.Transformer", "Transformer"])
def test_python_of_a_models_own_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    with pytest.raises(InputError, match=f"'{kind}' is not on the list"):
        resolve_sentences(str(tmp_path))


def test_another_model_in_the_folder_is_noticed(tmp_path: Path) -> None:
    folder = shutil.copytree(minilm_folder(), tmp_path / "model")
    spec = resolve_sentences(str(folder))
    (folder / "README.md").write_text("changed")
    with pytest.raises(InputError, match=r"its files are sha256:.* on this machine"):
        load_sentences(spec, "cpu")


def test_damaged_weights_are_said_in_one_line(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm_folder(), tmp_path / "model"))
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"cannot be loaded .*SafetensorError.*; get its files again"):
        load_sentences(resolve_sentences(str(folder)), "cpu")
