"""Trains the painter's denoiser: a UNet with the v-prediction loss (arXiv:2202.00512) on latents computed once."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # diffusers' classes: their types tell mypy little

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcm.torchvision_shim  # noqa: F401  - before diffusers
from pcm.embedded.making.autoencoder_training import LATENT_CHANNELS, LATENT_SIZE
from pcm.embedded.making.text_training import WIDTH as TEXT_WIDTH
from pcm.embedded.making.training_state import rate_factor, save_state

log = logging.getLogger(__name__)

TIMES = 1000


@dataclass(frozen=True)
class DenoiserTraining:
    """Settings of one training run."""

    steps: int = 3400
    batch_size: int = 16
    rate: float = 6e-4
    warmup: int = 200
    cooldown: float = 0.4  # the last part of the steps, over which the rate falls to zero
    blank: float = 0.1  # captions dropped for classifier-free guidance
    ema: float = 0.998
    seed: int = 0
    checkpoint_every: int = 250


def new_denoiser() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 80, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def new_scheduler() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMES,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def train_denoiser(
    latents: Tensor,
    states: Tensor,
    captions_of: np.ndarray,
    blank: int,
    folder: Path,
    settings: DenoiserTraining,
    begun: dict[str, Tensor] | None = None,
) -> tuple[Any, dict]:
    """Trains (or resumes from folder/denoiser.pt); returns the averaged denoiser and what the run took.

    latents (n, 8, 16, 16) scaled to unit spread; states (captions, 24, width); captions_of (n, k): which rows of
    `states` describe each latent; `blank`: the row of the empty caption; `begun`: weights to begin with.
    """
    torch.manual_seed(settings.seed)
    denoiser = new_denoiser()
    if begun is not None:
        denoiser.load_state_dict(begun)
    averaged = new_denoiser()
    averaged.load_state_dict(denoiser.state_dict())
    averaged.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    checkpoint = folder / "denoiser.pt"
    first, seconds, running = 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        denoiser.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, running = state["step"], state["seconds"], state["loss"]
    scheduler = new_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()  # (1000,)
    noise_level = (1 - scheduler.alphas_cumprod).sqrt()
    log.info("%d latents, %d captions, %.2f M parameters", len(latents), len(states), _millions(denoiser))

    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, 1, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rows = rng.choice(len(latents), settings.batch_size, replace=False)
        chosen = captions_of[rows, rng.integers(captions_of.shape[1], size=len(rows))]
        chosen[rng.random(len(rows)) < settings.blank] = blank
        x = latents[rows]  # (B, 8, 16, 16)
        noise = torch.randn_like(x)
        when = spread_times(len(rows), TIMES)
        a, s = signal[when, None, None, None], noise_level[when, None, None, None]
        noisy, velocity = a * x + s * noise, a * noise - s * x
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(
                step, settings.steps, warmup=settings.warmup, cooldown=settings.cooldown
            )
        predicted = denoiser(noisy, when, encoder_hidden_states=states[chosen].float()).sample
        loss = F.mse_loss(predicted, velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(denoiser.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            log.info("t2i step %d loss %.4f %.0f s", step, running, time.monotonic() - started)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            state = {"model": denoiser.state_dict(), "averaged": averaged.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "loss": running}
            save_state(checkpoint, state | {"seconds": time.monotonic() - started})
    return averaged, {"steps": settings.steps, "seconds": round(time.monotonic() - started), "loss": running}


def finished_denoiser(folder: Path, settings: DenoiserTraining) -> tuple[Any, dict] | None:
    """What train_denoiser would return where all of its steps are done; None where some are not."""
    checkpoint = folder / "denoiser.pt"
    if not checkpoint.exists():
        return None
    state = torch.load(checkpoint, weights_only=True)
    if state["step"] < settings.steps:
        return None
    averaged = new_denoiser()
    averaged.load_state_dict(state["averaged"])
    return averaged, {"steps": state["step"], "seconds": round(state["seconds"]), "loss": state["loss"]}


def spread_times(count: int, times: int) -> Tensor:
    """`count` random time steps in 0..times-1, one from each of `count` equal parts: the loss varies less by chance."""
    return ((torch.randperm(count) + torch.rand(count)) * (times / count)).long().clamp_(max=times - 1)


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
