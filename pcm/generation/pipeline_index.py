"""What a pipeline says of itself in its small files: model_index.json and its parts' configurations. No weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcm.errors import InputError, first_line
from pcm.generation.names import model_source

MODEL_INDEX = "model_index.json"


class UnreachableIndex(InputError):
    """The index of a repo that cannot be had here and now; another machine may have it."""


@dataclass(frozen=True)
class PipelineIndex:
    """model_index.json of a folder, or of a repo at a commit."""

    model: str
    revision: str | None
    class_name: str
    components: Mapping[str, tuple[str, str]]  # part -> (library, class), of the parts that are there
    absent: tuple[str, ...]  # parts that it was saved without
    zeros_for_empty_prompt: bool  # force_zeros_for_empty_prompt, of Stable Diffusion XL

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """A part's configuration; empty where it has none."""
        try:
            return json.loads(_file(self.model, self.revision, f"{part}/{file}").read_text())
        except (OSError, ValueError):
            return {}


def read_index(model: str, revision: str | None) -> PipelineIndex:
    """Raises InputError where there is none, or where it does not name a pipeline class."""
    try:
        values = json.loads(_file(model, revision, MODEL_INDEX).read_text())
    except (OSError, ValueError) as error:
        kind = InputError if Path(model_source(model)).is_dir() else UnreachableIndex
        raise kind(
            f"text-to-image model {model!r}: its {MODEL_INDEX} cannot be read ({first_line(error)}); "
            "give a diffusers repo id, a folder saved by save_pretrained(), 'embedded' or 'null'"
        ) from None
    name = values.get("_class_name") if isinstance(values, dict) else None
    if not isinstance(name, str):
        said = "names no pipeline (_class_name)" if name is None else f"names a pipeline of its own code ({name})"
        raise InputError(f"text-to-image model {model!r}: its {MODEL_INDEX} {said}; give a pipeline that diffusers has")
    parts = {
        part: (value[0], value[1])
        for part, value in values.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(side, str) for side in value)
    }
    absent = tuple(part for part, value in values.items() if value == [None, None])
    zeros = values.get("force_zeros_for_empty_prompt") is not False
    return PipelineIndex(model, revision, name, parts, absent, zeros)


def _file(model: str, revision: str | None, name: str) -> Path:
    """A small file of the model, downloaded where it is a repo. Raises OSError where it is not there."""
    source = Path(model_source(model))
    if source.is_dir():
        return source / name
    from httpx2 import HTTPError  # of the hub's client: no connection
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (HfHubHTTPError, HTTPError, ValueError) as error:
        raise FileNotFoundError(first_line(error)) from None
