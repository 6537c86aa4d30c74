"""What the trainings of the embedded models share: checkpoints written whole, and the learning rate's course."""

import math
from pathlib import Path

import torch
from torch import Tensor


def save_state(path: Path, state: dict) -> None:
    """Writes a checkpoint so that it is there whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def earlier_weights(part: Path) -> dict[str, Tensor]:
    """The weights of one part of a diffusers folder (its unet, vae, ...) as float32."""
    from safetensors.torch import load_file

    (file,) = part.glob("*.safetensors")
    return {name: weight.float() for name, weight in load_file(file).items()}


def rate_factor(step: int, steps: int, *, warmup: int, cooldown: float) -> float:
    """The share of the peak rate: rises over `warmup` steps, falls along a cosine over the last `cooldown` of all."""
    fall = max(1, round(cooldown * steps))
    left = (steps - step) / fall
    return min(1.0, (step + 1) / warmup) * (1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * left)))
