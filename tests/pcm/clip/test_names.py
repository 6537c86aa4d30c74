"""What a CLIP's NAME stands for in another working folder."""

from pathlib import Path

import pytest

from pcm.clip.names import clip_anywhere


def test_a_place_is_named_by_its_absolute_path_and_what_is_known_everywhere_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("my_clip", "models", "embedded", "repo"):
        Path(folder).mkdir()
    for file in ("models/own.pt", "openai"):
        Path(file).touch()
    here = str(tmp_path)
    assert clip_anywhere("my_clip") == f"{here}/my_clip"
    assert clip_anywhere("../" + tmp_path.name + "/my_clip") == f"{here}/my_clip"
    assert clip_anywhere("ViT-L-14/models/own.pt") == f"ViT-L-14/{here}/models/own.pt"
    absolute = (f"{here}/my_clip", f"ViT-L-14-quickgelu/{here}/models/own.pt")
    for name in (*absolute, "ViT-L-14/openai", "embedded", "hf-hub:org/repo", "s3://bucket/my_clip", "not_there"):
        assert clip_anywhere(name) == name
