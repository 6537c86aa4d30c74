"""Nothing of a CLIP's folder or repo is executed, and a file alone cannot have a folder or repo opened."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pcm.clip.configuration import model_config, read_config
from pcm.clip.encoder import ClipEncoder
from pcm.clip.names import refuse_place
from pcm.clip.truncation import truncation_check
from pcm.errors import InputError
from tests.helpers.paths import ROOT

CASE = ROOT / "tests/data/cases/security/clip_with_code"


@pytest.fixture
def with_code(tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CLIP that loads but for the Python that its configuration asks for."""
    monkeypatch.setenv("CANARY_FILE", str(tmp_path / "canary"))
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "tiny", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "evil_tok.py"):
        shutil.copyfile(CASE / name, folder / name)
    return folder


def test_a_folder_that_asks_for_its_own_code_is_refused_by_name_and_nothing_runs(
    with_code: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tokenizer_kwargs\.trust_remote_code is not allowed"):
        ClipEncoder(str(with_code))
    with pytest.raises(InputError, match=r"tokenizer_kwargs\.trust_remote_code is not allowed"):
        truncation_check(str(with_code))("a long prompt " * 100)
    config = with_code / "open_clip_config.json"
    config.write_text(config.read_text().replace('"trust_remote_code": true', ""))
    with pytest.raises(InputError, match=r"tokenizer_config.json: 'auto_map'"):
        ClipEncoder(str(with_code))
    assert not (tmp_path / "canary").exists()


def test_the_case_of_the_collection_is_refused() -> None:
    with pytest.raises(InputError, match="trust_remote_code is not allowed"):
        ClipEncoder(str(CASE))


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [
        ("", {"code": "x.py"}, "code is not allowed"),
        ("model_cfg", {"hf_model": "x"}, "model_cfg.hf_model is not allowed"),
        ("preprocess_cfg", {"script": 1}, "preprocess_cfg.script is not allowed"),
        ("vision_cfg", {"timm_model_name": "hf-hub:org/repo"}, "timm_model_name 'hf-hub:org/repo' must be the name"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/x"}, "must be the name of a model of timm's own"),
        ("text_cfg", {"hf_model_name": "/tmp/model"}, "hf_model_name '/tmp/model' must be the name of a repo"),
        ("text_cfg", {"hf_model_name": "../model/x"}, "must be the name of a repo"),
        ("text_cfg", {"tokenizer_kwargs": {"code_revision": "x"}}, "tokenizer_kwargs.code_revision is not allowed"),
        ("text_cfg", {"tokenizer_kwargs": [1]}, "tokenizer_kwargs must be an object"),
        ("text_cfg", "text", "text_cfg must be an object"),
        ("vision_cfg", {"pool_type": "none"}, "pool_type 'none' leaves .*; give a CLIP with 'tok' or 'avg'"),
    ],
)
def test_what_is_not_on_the_list_is_refused_by_name(where: str, what: Any, said: str, tmp_path: Path) -> None:
    document: dict[str, Any] = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {}}
    part = document if where in ("", *document) else document["model_cfg"]
    if isinstance(what, dict):
        (part[where] if where else part).update(what)
    else:
        part[where] = what
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=said):
        read_config(tmp_path / "open_clip_config.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "[]", "{", '{"model_cfg": 1}', " " * (2**20 + 1)])
def test_a_configuration_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(InputError, match=r"open_clip_config.json: ") as said:
        read_config(tmp_path / "open_clip_config.json")
    assert "\n" not in str(said.value)


def test_open_clips_own_configurations_are_all_allowed(tmp_path: Path) -> None:
    import open_clip

    for name in open_clip.list_models():
        config = model_config(name)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        assert read_config(tmp_path / "open_clip_config.json") == config


@pytest.mark.parametrize("name", ["/models/clip", "hf-hub:org/repo", "ViT-B-32/own.pt", "ViT-B-32//own.pt", "clip"])
def test_a_file_may_not_name_a_place(name: str) -> None:
    with pytest.raises(InputError, match="names the CLIP"):
        refuse_place(name, source="config.json")


@pytest.mark.parametrize("name", ["embedded", "null", "ViT-B-32/openai", "ViT-L-14-quickgelu/openai"])
def test_a_file_may_name_what_is_known_here(name: str) -> None:
    refuse_place(name, source="config.json")
