"""CLIP's two towers stay on their device."""

import pytest
import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip

from pcm.clip.towers import image_features, token_grid
from tests.helpers.device_watch import DeviceWatch


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-B-16-SigLIP", "RN50", "EVA02-B-16"])
def test_neither_tower_waits_or_takes_tensors_of_the_host(architecture: str) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(architecture, device="meta").eval()
    side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    with torch.inference_mode(), DeviceWatch() as watch:
        features, _ = image_features(
            model.visual, token_grid(model.visual), torch.zeros(2, 3, side, side, device="meta")
        )
        words = model.encode_text(torch.zeros(2, model.context_length, dtype=torch.long, device="meta"))
    assert features.is_meta and words.is_meta
    assert watch.stray == []
