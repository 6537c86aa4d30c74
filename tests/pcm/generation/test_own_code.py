"""Python of a text-to-image model's folder is never run, and is refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from pcm.errors import InputError
from pcm.generation.own_code import refuse_own_code
from pcm.generation.pipeline_loading import load_pipeline
from pcm.spec import GeneratorSpec

CODE = """import os
open(os.environ["CANARY_FILE"], "w").write("it ran")
from diffusers import StableDiffusionPipeline as MyPipe, UNet2DConditionModel as MyUNet
"""


@pytest.mark.parametrize(
    ("part", "value", "code"),
    [
        ("_class_name", ["my_pipeline", "MyPipe"], "my_pipeline.py"),
        ("unet", ["my_unet", "MyUNet"], "unet/my_unet.py"),
        ("unet", ["my_unet", "MyUNet"], "my_unet.py"),
    ],
)
def test_code_of_a_pipelines_folder_is_refused_by_name_and_does_not_run(
    part: str, value: list[str], code: str, tiny_t2i: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_t2i, tmp_path / "t2i")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: value}))
    (folder / code).write_text(CODE)
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY_FILE", str(canary))
    with pytest.raises(InputError, match=f"{part} .*{value[0]}.*never run"):
        load_pipeline(GeneratorSpec(model=str(folder), revision=""))
    assert not canary.exists()


def test_parts_that_diffusers_itself_brings_are_no_code_of_the_folder(tmp_path: Path) -> None:
    parts = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": [None, None],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    refuse_own_code(tmp_path)
