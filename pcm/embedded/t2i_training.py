"""Trains the embedded text-to-image model: a Stable Diffusion pipeline in miniature, on drawn scenes of one style.

An autoencoder (64 x 64 pixels to 16 x 16 latents), a frozen copy of the embedded CLIP's text tower, and a denoising
UNet trained with the v-prediction loss on latents computed once. The result is an ordinary diffusers folder.
"""

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # diffusers' and transformers' classes: their types tell mypy little

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcm.torchvision_shim  # noqa: F401  - before diffusers
from pcm.embedded.clip_training import as_input
from pcm.embedded.scenes import SceneSet
from pcm.embedded.tokens import CONTEXT_LENGTH, build_tokenizer

log = logging.getLogger(__name__)

LATENT_SIZE, LATENT_CHANNELS = 16, 8
STEPS = 16  # of the sampler, when the model is judged; jobs.generate takes 8, which scored the same at half the time


@dataclass(frozen=True)
class PainterTraining:
    """Settings of one text-to-image training run."""

    vae_steps: int = 1500
    decoder_steps: int = 1500  # after vae_steps: latents stay as they are and only the decoder learns on
    vae_batch: int = 8
    vae_rate: float = 2e-3
    latent_noise: float = 0.05  # added to latents while the decoder learns, so that it forgives the denoiser's errors
    steps: int = 4500
    batch_size: int = 16
    rate: float = 8e-4
    warmup: int = 100
    cooldown: float = 0.25  # the last part of the steps, over which the rate falls to zero
    blank: float = 0.1  # captions dropped for classifier-free guidance
    ema: float = 0.998
    seed: int = 0
    checkpoint_every: int = 200


def new_autoencoder(scaling_factor: float = 1.0) -> Any:
    """TAESD's architecture: 64 x 64 x 3 to 16 x 16 x 8 and back."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=scaling_factor,
    )


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
        cross_attention_dim=192,
        norm_num_groups=16,
    )


def new_scheduler():
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def text_encoder_from_clip(state: dict[str, Tensor]) -> Any:
    """open_clip's text tower as a Hugging Face CLIPTextModel: same numbers, other names."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = state["token_embedding.weight"].shape
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=width,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    model = CLIPTextModel(config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    renamed = {
        f"{prefix}embeddings.token_embedding.weight": state["token_embedding.weight"],
        f"{prefix}embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        renamed[f"{prefix}final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}.", f"{prefix}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            query, key, value = state[f"{ours}attn.in_proj_{kind}"].chunk(3)
            renamed |= {
                f"{theirs}self_attn.q_proj.{kind}": query,
                f"{theirs}self_attn.k_proj.{kind}": key,
                f"{theirs}self_attn.v_proj.{kind}": value,
                f"{theirs}self_attn.out_proj.{kind}": state[f"{ours}attn.out_proj.{kind}"],
                f"{theirs}layer_norm1.{kind}": state[f"{ours}ln_1.{kind}"],
                f"{theirs}layer_norm2.{kind}": state[f"{ours}ln_2.{kind}"],
                f"{theirs}mlp.fc1.{kind}": state[f"{ours}mlp.c_fc.{kind}"],
                f"{theirs}mlp.fc2.{kind}": state[f"{ours}mlp.c_proj.{kind}"],
            }
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    if unexpected or [name for name in missing if "position_ids" not in name]:
        raise RuntimeError(f"text tower does not fit CLIPTextModel: missing {missing}, unexpected {unexpected}")
    return model.eval().requires_grad_(False)


def train_autoencoder(data: SceneSet, folder: Path, settings: PainterTraining) -> Any:
    """Trains (or resumes from folder/vae.pt) the autoencoder on pictures alone."""
    torch.manual_seed(settings.seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.vae_rate, betas=(0.9, 0.98))
    checkpoint = folder / "vae.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started = time.monotonic() - seconds
    last = settings.vae_steps + settings.decoder_steps
    for step in range(first, last):
        rng = np.random.default_rng((settings.seed, step))
        pictures = as_input(data.images[np.sort(rng.choice(len(data), settings.vae_batch, replace=False))])
        pictures = pictures.to(memory_format=torch.channels_last)
        joint = step < settings.vae_steps
        done = step / settings.vae_steps if joint else (step - settings.vae_steps) / settings.decoder_steps
        rate = settings.vae_rate * (0.5 if joint else 0.25) * (1.02 + math.cos(math.pi * done))
        rate *= min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.set_grad_enabled(joint):
            latents = model.encoder(pictures)  # (B, 8, 16, 16)
        decoded = model.decoder(latents + settings.latent_noise * torch.randn_like(latents))
        spread = (latents.std() - 1).square() + latents.mean().square()  # keeps latents away from the decoder's clamp
        error = decoded - pictures
        loss = error.square().mean() + 0.3 * error.abs().mean() + 0.01 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            mse = error.square().mean().item() / 4  # of 0..1 pixels
            spent = time.monotonic() - started
            log.info(
                "vae step %d PSNR %.1f dB, latent std %.2f, %.0f s", step, -10 * math.log10(mse), latents.std(), spent
            )
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            _save(checkpoint, state | {"seconds": time.monotonic() - started})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_set(model: Any, data: SceneSet) -> Tensor:
    """Latents of a whole set, (n, 8, 16, 16) float32, not yet scaled."""
    parts = [
        model.encoder(as_input(data.images[start : start + 64]).to(memory_format=torch.channels_last)).contiguous()
        for start in range(0, len(data), 64)
    ]
    return torch.cat(parts)


def train_painter(data: SceneSet, folder: Path, settings: PainterTraining) -> dict:
    """Trains what is not trained yet and writes the diffusers folder folder/t2i."""
    from transformers import CLIPTokenizer

    vae = train_autoencoder(data, folder, settings)
    tokenizer_folder = folder / "tokenizer"
    build_tokenizer(tokenizer_folder)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    encoder_file = folder / "text_tower.pt"  # kept: a resumed run must not switch to a newer text tower
    if not encoder_file.exists():
        clip_state = torch.load(folder / "clip.pt", weights_only=True)
        tower = {k: v for k, v in clip_state["model"].items() if not k.startswith("visual.")}
        _save(encoder_file, {"state": tower, "clip_step": clip_state["step"]})
    text_encoder = text_encoder_from_clip(torch.load(encoder_file, weights_only=True)["state"])

    torch.manual_seed(settings.seed)
    denoiser = new_denoiser().to(memory_format=torch.channels_last)
    averaged = new_denoiser()
    averaged.load_state_dict(denoiser.state_dict())
    averaged.requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = folder / "denoiser.pt"
    first, seconds, running = 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        denoiser.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, running = state["step"], state["seconds"], state["loss"]

    latents = encode_set(vae, data)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    latents *= vae.config.scaling_factor
    captions = [*sorted({caption for row in data.captions for caption in row[:2]}), ""]
    index = {caption: row for row, caption in enumerate(captions)}
    caption_rows = np.array([[index[caption] for caption in row[:2]] for row in data.captions])
    states = _text_states(text_encoder, tokenizer, captions)  # (captions, 24, 192)
    scheduler = new_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()  # (1000,)
    noise_level = (1 - scheduler.alphas_cumprod).sqrt()
    log.info("%d latents, %d captions, %.2f M parameters", len(latents), len(captions), _millions(denoiser))

    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, 1, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rows = rng.choice(len(latents), settings.batch_size, replace=False)
        chosen = caption_rows[rows, rng.integers(2, size=len(rows))]
        chosen[rng.random(len(rows)) < settings.blank] = index[""]
        x = latents[rows]  # (B, 8, 16, 16)
        noise = torch.randn_like(x)
        when = torch.randint(0, 1000, (len(rows),))
        a, s = signal[when, None, None, None], noise_level[when, None, None, None]
        noisy, velocity = a * x + s * noise, a * noise - s * x
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * _rate_factor(step, settings)
        noisy = noisy.to(memory_format=torch.channels_last)
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
            _save(checkpoint, state | {"seconds": time.monotonic() - started})
            save_pipeline(vae, text_encoder, tokenizer, averaged, folder / "t2i")  # to look at
    save_pipeline(vae, text_encoder, tokenizer, averaged, folder / "t2i")
    return {"steps": settings.steps, "seconds": round(time.monotonic() - started), "loss": running}


def save_pipeline(vae: Any, text_encoder: Any, tokenizer: Any, denoiser: Any, folder: Path) -> None:
    """Writes the StableDiffusionPipeline folder with float16 weights (loads as float32 when asked to, the default)."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    small_vae = AutoencoderTiny.from_config(vae.config)
    small_vae.load_state_dict(vae.state_dict())
    small_denoiser = UNet2DConditionModel.from_config(denoiser.config)
    small_denoiser.load_state_dict(denoiser.state_dict())
    small_text = CLIPTextModel(text_encoder.config)
    small_text.load_state_dict(text_encoder.state_dict())
    pipeline: Any = StableDiffusionPipeline(
        vae=small_vae.half(),
        text_encoder=small_text.half(),
        tokenizer=tokenizer,
        unet=small_denoiser.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers loads weights in the dtype its config names, diffusers in float32: make both say float32.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps(json.loads(text_config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


@torch.no_grad()
def _text_states(text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    parts = []
    for start in range(0, len(captions), 256):
        ids = tokenizer(
            captions[start : start + 256],
            max_length=CONTEXT_LENGTH,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        parts.append(text_encoder(ids).last_hidden_state.half())
    return torch.cat(parts)


def _rate_factor(step: int, settings: PainterTraining) -> float:
    """Warm up, hold, then fall to zero along a cosine over the last `cooldown` of the steps."""
    fall = max(1, round(settings.cooldown * settings.steps))
    left = (settings.steps - step) / fall
    return min(1.0, (step + 1) / settings.warmup) * (1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * left)))


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _save(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
