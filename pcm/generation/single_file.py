"""A single file of weights, as model sites have them: which pipeline is in it."""

from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import SafetensorError, safe_open

from pcm.errors import InputError, first_line


def inferred_config(file: Path) -> str:
    """The repo whose configuration fits the names and shapes of a checkpoint's weights. Raises InputError."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())  # it is no mapping
            shapes = {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"text-to-image file {str(file)!r}: cannot be read ({first_line(error)})") from None
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
