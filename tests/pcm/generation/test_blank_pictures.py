"""What shows nothing is told by its pixels, and a dark picture is none of that."""

import numpy as np
import pytest
import torch

from pcm.generation.blank_pictures import why_blank


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((8, 8, 3)), "black_image"),
        (np.full((8, 8, 3), 0.5), "constant_image"),
        (np.ones((8, 8, 3)), "constant_image"),
        (np.full((8, 8, 3), np.nan), "nan_image"),
        (np.where(np.arange(192).reshape(8, 8, 3) == 7, np.nan, 0.5), "nan_image"),
        (np.where(np.arange(192).reshape(8, 8, 3) == 7, np.inf, 0.5), "nan_image"),
        (np.random.default_rng(0).uniform(0, 1, (8, 8, 3)), ""),
        (np.where(np.arange(32 * 32 * 3).reshape(32, 32, 3) < 300, 0.6, 0.0), ""),  # night, with a light in it
    ],
)
def test_what_shows_nothing_has_its_reason(pixels: np.ndarray, reason: str) -> None:
    images = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)  # (3, H, W)
    shown = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert why_blank(torch.stack([shown, images])) == ["", reason]
