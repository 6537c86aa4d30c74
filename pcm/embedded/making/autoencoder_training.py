"""Trains the painter's autoencoder: TAESD's architecture, 64 x 64 pixels to 16 x 16 latents of 8 channels and back."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # diffusers' classes: their types tell mypy little

import numpy as np
import torch
from torch import Tensor, nn

import pcm.torchvision_shim  # noqa: F401  - before diffusers
from pcm.embedded.making.clip_training import as_input
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.training_state import earlier_weights, rate_factor, save_state
from pcm.embedded.making.world import SIZE

log = logging.getLogger(__name__)

LATENT_SIZE, LATENT_CHANNELS = 16, 8
WIDTH = 32


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of one training run. After `steps` latents stay as they are and only the decoder learns on."""

    steps: int = 2000
    decoder_steps: int = 1000
    batch_size: int = 4  # whole pictures, or four times as many crops: most of a picture is background
    crops: int = 3  # of 4 steps while both learn: those that see crops around things
    rate: float = 2e-3
    latent_noise: float = 0.05  # added to latents, so that the decoder forgives the denoiser's errors
    edges: float = 0.5  # weight of the loss between differences of neighbouring pixels: outlines stay sharp
    seed: int = 0
    checkpoint_every: int = 250


def new_autoencoder(scaling_factor: float = 1.0) -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=scaling_factor,
    )


def train_autoencoder(
    data: SceneSet, folder: Path, settings: AutoencoderTraining, begin_with: Path | None = None
) -> Any:
    """Trains (or resumes from folder/vae.pt) the autoencoder on pictures and where things are in them.

    `begin_with`: the pipeline folder of an earlier model. Its latents are kept, for its denoiser knows them; only the
    decoder learns on.
    """
    torch.manual_seed(settings.seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate, betas=(0.9, 0.98))
    checkpoint = folder / "vae.pt"
    first, seconds = 0, 0.0
    if begin_with is not None:
        model.load_state_dict(earlier_weights(begin_with / "vae"))
        first = settings.steps
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started = time.monotonic() - seconds
    last = settings.steps + settings.decoder_steps
    for step in range(first, last):
        rng = np.random.default_rng((settings.seed, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        joint = step < settings.steps
        if joint and step % 4 < settings.crops:
            seen = around_things(data, rng.choice(len(data), 4 * settings.batch_size, replace=False), rng)
        else:
            seen = data.images[np.sort(rng.choice(len(data), settings.batch_size, replace=False))]
        pictures = as_input(seen).to(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(step, last, warmup=50, cooldown=0.6)
        with torch.set_grad_enabled(joint):
            latents = model.encoder(pictures)  # (B, 8, 16, 16)
        decoded = model.decoder(latents + settings.latent_noise * torch.randn_like(latents))
        spread = (latents.std() - 1).square() + latents.mean().square()  # keeps latents away from the decoder's clamp
        loss = reconstruction_loss(decoded, pictures, edges=settings.edges) + 0.01 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            mse = (decoded - pictures).square().mean().item() / 4  # of 0..1 pixels
            spent, spread_now = time.monotonic() - started, latents.std().item()
            log.info(
                "vae step %d PSNR %.1f dB, latent std %.2f, %.0f s", step, -10 * math.log10(mse), spread_now, spent
            )
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(checkpoint, state | {"seconds": time.monotonic() - started})
    return model.eval().requires_grad_(False)


def around_things(data: SceneSet, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half as high and wide a part of each picture, around one of its things: (rows, 32, 32, 3) uint8.

    Cut at multiples of 4 pixels, so that things lie on the grid of latents as they do in whole pictures.
    """
    side, cell = SIZE // 2, SIZE // LATENT_SIZE
    parts = np.empty((len(rows), side, side, 3), np.uint8)
    for part, row in zip(parts, rows, strict=True):
        left, top, right, bottom = data.boxes[row, rng.integers((data.nouns[row] >= 0).sum())]
        corner = np.array([(left + right) / 2, (top + bottom) / 2]) - side / 2 + rng.uniform(-cell, cell, 2)
        x, y = np.clip(cell * np.round(corner / cell), 0, SIZE - side).astype(int)
        part[:] = data.images[row, y : y + side, x : x + side]
    return parts


def reconstruction_loss(decoded: Tensor, pictures: Tensor, *, edges: float) -> Tensor:
    """Squared and absolute error of pixels, and absolute error of the steps from pixel to pixel; (B, 3, H, W) each."""
    error = decoded - pictures
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    return error.square().mean() + 0.3 * error.abs().mean() + edges * (across.abs().mean() + down.abs().mean())


@torch.no_grad()
def encode_set(model: Any, data: SceneSet) -> Tensor:
    """Latents of a whole set, (n, 8, 16, 16) float32, not yet scaled."""
    parts = [
        model.encoder(as_input(data.images[start : start + 64]).to(memory_format=torch.channels_last)).contiguous()
        for start in range(0, len(data), 64)
    ]
    return torch.cat(parts)
