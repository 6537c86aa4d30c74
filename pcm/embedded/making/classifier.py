"""An independent judge of generated pictures: a small convolutional network that names the things in a picture.

It is trained on rendered scenes alone, never on a generated picture, and shares nothing with CLIP or the painter. So it
can say whether a generated picture shows what was asked for. It is trained to be tolerant: scenes in varied poses,
moved, scaled, blurred, noisy and tinted.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcm.embedded.making.clip_views import GRID, as_input, augment, moved, patch_labels
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.training_state import rate_factor, save_state
from pcm.embedded.making.world import NOUNS, PLACES
from pcm.errors import InputError

log = logging.getLogger(__name__)

SHARES = {1: "single", 2: "both", 3: "three"}  # what recognised() calls its shares, by how many kinds were asked for


@dataclass(frozen=True)
class ClassifierTraining:
    """Settings of one training run."""

    steps: int = 750
    batch_size: int = 32
    rate: float = 2e-3
    seed: int = 0
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees in `n` pictures."""

    nouns: np.ndarray  # (n, nouns) float32, how surely each noun is somewhere in the picture, 0..1
    places: np.ndarray  # (n,) int64, index into PLACES


class Classifier(nn.Module):
    """Names the thing in each of 8 x 8 cells (the last class is none), and the place of the whole picture."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            _layer(3, 24, stride=2),  # 32 x 32
            _layer(24, 48, stride=2),  # 16 x 16
            _layer(48, 80),
            _layer(80, 80),
            _layer(80, 144, stride=2),  # 8 x 8
            _layer(144, 144),
        )
        self.cell = nn.Conv2d(144, len(NOUNS) + 1, 1)
        self.place = nn.Linear(144, len(PLACES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in -1..1 -> logits of cells (B, nouns + 1, 8, 8) and of places (B, places)."""
        seen = self.body(pictures)  # (B, 144, 8, 8)
        return self.cell(seen), self.place(seen.mean((2, 3)))


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def noun_scores(cells: Tensor) -> Tensor:
    """Cell logits (B, nouns + 1, 8, 8) -> (B, nouns): the highest probability, averaged over 2 x 2 cells."""
    shares = cells.softmax(1)[:, :-1]
    return F.avg_pool2d(shares, 2, 1).amax((2, 3))


def train_classifier(data: SceneSet, check: SceneSet, folder: Path, settings: ClassifierTraining | None = None) -> dict:
    """Trains (or resumes from folder/judge.pt) and returns the shares recognised() of the held-out scenes `check`."""
    settings = settings or ClassifierTraining()
    torch.manual_seed(settings.seed)
    model: Any = Classifier()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.02, fused=True)
    checkpoint = folder / "judge.pt"
    first, seconds, figures = 0, 0.0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, figures = state["step"], state["seconds"], state["figures"]
    places = torch.from_numpy(data.places)
    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, 3, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rows = np.sort(rng.choice(len(data), settings.batch_size, replace=False))
        pictures, boxes = moved(as_input(data.images[rows]), torch.from_numpy(data.boxes[rows]))
        pictures = degraded(augment(pictures)).to(memory_format=torch.channels_last)
        labels = patch_labels(torch.from_numpy(data.nouns[rows]), boxes).unflatten(1, (GRID, GRID))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(step, settings.steps, warmup=50, cooldown=0.7)
        model.train()
        cells, place = model(pictures)
        loss = F.cross_entropy(cells, labels) + 0.3 * F.cross_entropy(place, places[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.info("judge step %d loss %.3f %.0f s", step, loss.item(), time.monotonic() - started)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            figures = _shares(_look(model, check.images), _asked(check), check.places)
            log.info("judge step %d %s", step + 1, json.dumps(figures))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(checkpoint, state | {"seconds": time.monotonic() - started, "figures": figures})
    return figures


def judge(folder: Path, images: np.ndarray) -> Verdict:
    """What the classifier in folder/judge.pt sees in pictures (n, 64, 64, 3) uint8. Raises InputError without one."""
    checkpoint = folder / "judge.pt"
    if not checkpoint.exists():
        raise InputError(f"{checkpoint} not found: train the classifier first (--stage judge, with the same --out)")
    model = Classifier()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return _look(model, images)


def recognised(folder: Path, images: np.ndarray, asked: Sequence[Sequence[str]], places: np.ndarray) -> dict:
    """Share of pictures in which the classifier finds what was asked for.

    single, both, three: of the pictures of one, two, three kinds of things, those whose one, two, three surest nouns
    are the ones `asked` for; any: of those with several, how many show at least one; place: index into PLACES is right.
    """
    return _shares(judge(folder, images), asked, places)


def _asked(scenes: SceneSet) -> list[list[str]]:
    return [sorted({NOUNS[noun].name for noun in row if noun >= 0}) for row in scenes.nouns.tolist()]


def _shares(seen: Verdict, asked: Sequence[Sequence[str]], places: np.ndarray) -> dict:
    found: dict[str, list[bool]] = {}
    for ranks, names in zip((-seen.nouns).argsort(1, kind="stable").tolist(), asked, strict=True):
        wanted = set(names)
        top = {NOUNS[rank].name for rank in ranks[: len(wanted)]}
        found.setdefault(SHARES[len(wanted)], []).append(top == wanted)
        if len(wanted) > 1:
            found.setdefault("any", []).append(bool(top & wanted))
    found["place"] = (seen.places == places).tolist()
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


@torch.no_grad()
def _look(model: Classifier, images: np.ndarray) -> Verdict:
    model.eval()
    nouns, places = [], []
    for start in range(0, len(images), 128):
        cells, place = model(as_input(images[start : start + 128]))
        nouns.append(noun_scores(cells))
        places.append(place.argmax(1))
    return Verdict(torch.cat(nouns).numpy(), torch.cat(places).numpy())


def degraded(pictures: Tensor) -> Tensor:
    """Some pictures lose detail or gain noise, as pictures do in which only the detail is badly drawn."""
    batch = len(pictures)
    coarse = F.interpolate(pictures, scale_factor=0.5, mode="area")
    coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    share = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.5)
    noise = 0.15 * torch.rand(batch, 1, 1, 1) * torch.randn_like(pictures)
    return (pictures + share * (coarse - pictures) + noise).clamp(-1, 1)
