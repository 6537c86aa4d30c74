"""Generated pictures from best to worst by CLIP score: what a mean figure does not show."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import pcm.torchvision_shim  # noqa: F401  - before open_clip
from pcm.contact_sheet import Cell, contact_sheet
from pcm.embedded.making.clip_views import as_input
from pcm.embedded.making.judging import Painted, load_clip

COLUMNS = 8


@torch.no_grad()
def clip_scores(clip_folder: Path, painted: Painted) -> list[float]:
    """Cosine between each picture and its prompt, by the CLIP in `clip_folder`."""
    model, tokenise = load_clip(clip_folder)
    pictures = F.normalize(model.encode_image(as_input(painted.images)), dim=-1)
    texts = F.normalize(model.encode_text(tokenise(painted.prompts)), dim=-1)
    return (pictures * texts).sum(1).tolist()


def graded(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` best, the `count` in the middle and the `count` worst, each best first."""
    ranked = sorted(range(len(scores)), key=lambda position: (-scores[position], position))
    if len(ranked) <= 3 * count:
        return ranked
    middle = (len(ranked) - count) // 2
    return ranked[:count] + ranked[middle : middle + count] + ranked[-count:]


def graded_sheet(clip_folder: Path, painted: Painted) -> Image.Image:
    """Three rows, best, middle and worst, with scores and prompts underneath; a palette picture, small as a file."""
    scores = clip_scores(clip_folder, painted)
    cells = [
        Cell(Image.fromarray(painted.images[position]), (f"{scores[position]:.2f}", painted.prompts[position]))
        for position in graded(scores, COLUMNS)
    ]
    return contact_sheet(cells, columns=COLUMNS, side=96, text_lines=5).quantize(128)
