"""What the embedded CLIP's training does to its pictures: other views, dropped patches, and where things are."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcm.embedded.making.world import NOUNS, SIZE

PATCH = 8
GRID = SIZE // PATCH
SHRUNK = 0.85  # a drawing seldom fills its box: only patches within this share of it are taken to show the thing


class KeepSomePatches(nn.Module):
    """Stands in for open_clip's patch dropout in training, prefers some patches and remembers which ones it kept."""

    def __init__(self, kept: int):
        super().__init__()
        self.kept_count = kept
        self.kept: Tensor | None = None
        self.preferred: Tensor | None = None  # (B, patches) bool
        self.favour = 0.0  # added to the lots (0..1) drawn for preferred patches

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return tokens
        batch, length, width = tokens.shape
        lots = torch.rand(batch, length - 1)
        if self.preferred is not None:
            lots = lots + self.favour * self.preferred
        self.kept = lots.argsort(1, descending=True)[:, : self.kept_count].sort(1).values  # (B, kept)
        patches = tokens[:, 1:].gather(1, self.kept[..., None].expand(-1, -1, width))
        return torch.cat([tokens[:, :1], patches], 1)  # (B, 1 + kept, width)


def present_nouns(nouns: Tensor) -> Tensor:
    """Which nouns are in a picture, (B, k) with -1 = nothing -> (B, nouns) bool."""
    found = torch.zeros(len(nouns), len(NOUNS) + 1, dtype=torch.bool)
    found.scatter_(1, nouns.where(nouns >= 0, torch.tensor(len(NOUNS))), True)
    return found[:, :-1]


def patch_labels(nouns: Tensor, boxes: Tensor) -> Tensor:
    """The noun each patch shows, (B, 64) int64 row by row; len(NOUNS) = none. A later thing covers an earlier one.

    nouns (B, k) with -1 = nothing, boxes (B, k, 4) left, top, right, bottom in pixels.
    """
    centres = (torch.arange(GRID) + 0.5) * PATCH
    labels = torch.full((len(nouns), GRID, GRID), len(NOUNS))
    for column in range(nouns.shape[1]):
        left, top, right, bottom = boxes[:, column].unbind(1)  # (B,) each
        across = ((centres - (left + right)[:, None] / 2).abs() < SHRUNK * (right - left)[:, None] / 2)[:, None]
        down = ((centres - (top + bottom)[:, None] / 2).abs() < SHRUNK * (bottom - top)[:, None] / 2)[:, :, None]
        covered = across & down & (nouns[:, column] >= 0)[:, None, None]
        labels = torch.where(covered, nouns[:, column, None, None], labels)
    return labels.flatten(1)


def moved(pictures: Tensor, boxes: Tensor, *, shift: float = 5.0, zoom: float = 0.15) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 64, 64) and boxes (B, k, 4) in pixels, scaled along each side and shifted at random."""
    batch = len(pictures)
    scale = 1 + zoom * (2 * torch.rand(batch, 2) - 1)  # x, y; above 1: things look larger
    step = shift * (2 * torch.rand(batch, 2) - 1)  # pixels
    half = SIZE / 2
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / scale[:, 0], 1 / scale[:, 1]
    theta[:, :, 2] = -step / half / scale
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    corners = (boxes.unflatten(-1, (2, 2)) - half) * scale[:, None, None] + half + step[:, None, None]
    return pictures, corners.flatten(-2)


def augment(pictures: Tensor) -> Tensor:
    """Mild changes of tint, contrast, saturation and sharpness, (B, 3, 64, 64) in -1..1; colour names stay true."""
    batch = len(pictures)
    tint = 1 + 0.12 * torch.randn(batch, 3, 1, 1)
    pictures = pictures * tint + 0.1 * torch.randn(batch, 1, 1, 1)
    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * (0.65 + 0.5 * torch.rand(batch, 1, 1, 1))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # from blurred (1) over as it is (0) to sharpened (-1)
    soft = (2 * torch.rand(batch, 1, 1, 1) - 1) * (torch.rand(batch, 1, 1, 1) < 0.6)
    pictures = pictures + soft * (blurred - pictures)
    return (pictures + 0.04 * torch.randn_like(pictures)).clamp(-1, 1)


def as_input(images: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in -1..1, what clip_training.PREPROCESS describes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
