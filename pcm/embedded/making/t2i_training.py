"""Trains the embedded text-to-image model: a Stable Diffusion pipeline in miniature, on drawn scenes of one style.

An autoencoder, a text encoder that learned from captions alone what stands where, and a denoising UNet trained on
latents and text states computed once. The result is an ordinary diffusers folder.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any  # diffusers' and transformers' classes: their types tell mypy little

import numpy as np

import pcm.torchvision_shim  # noqa: F401  - before diffusers
from pcm.embedded.making.autoencoder_training import AutoencoderTraining, encode_set, train_autoencoder
from pcm.embedded.making.denoiser_training import DenoiserTraining, finished_denoiser, new_scheduler, train_denoiser
from pcm.embedded.making.earlier_denoiser import begun_denoiser
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.text_training import TextTraining, text_states, train_text_encoder
from pcm.embedded.making.tokens import build_tokenizer

SPREAD_OF = 1024  # scenes on which the spread of latents is measured


@dataclass(frozen=True)
class PainterTraining:
    """Settings of one text-to-image training run."""

    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    text: TextTraining = field(default_factory=TextTraining)
    denoiser: DenoiserTraining = field(default_factory=DenoiserTraining)
    scenes: int = 16_000  # that the denoiser learns from: encoding more takes longer than it would gain
    captions: int = 2  # of each of these scenes


def train_painter(data: SceneSet, folder: Path, settings: PainterTraining, begin_with: Path | None = None) -> dict:
    """Trains what is not trained yet and writes the diffusers folder folder/t2i.

    `begin_with`: the pipeline folder of an earlier model, whose autoencoder and denoiser learn on.
    """
    from transformers import CLIPTokenizer

    tokenizer_folder = folder / "tokenizer"
    build_tokenizer(tokenizer_folder)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    vae = train_autoencoder(data, folder, settings.autoencoder, begin_with)
    text_encoder = train_text_encoder(data, tokenizer, folder, settings.text)
    spread = float(encode_set(vae, _first(data, SPREAD_OF)).std())
    vae.register_to_config(scaling_factor=round(1 / spread, 5) if begin_with is None else earlier_scale(begin_with))
    finished = finished_denoiser(folder, settings.denoiser)
    if finished is None:
        data = _first(data, settings.scenes)
        captions = [*sorted({caption for row in data.captions for caption in row[: settings.captions]}), ""]
        index = {caption: row for row, caption in enumerate(captions)}
        captions_of = np.array([[index[caption] for caption in row[: settings.captions]] for row in data.captions])
        finished = train_denoiser(
            encode_set(vae, data) * vae.config.scaling_factor,
            text_states(text_encoder, tokenizer, captions),
            captions_of,
            index[""],
            folder,
            settings.denoiser,
            None if begin_with is None else begun_denoiser(begin_with, text_encoder, tokenizer, captions),
        )
    denoiser, took = finished
    save_pipeline(vae, text_encoder, tokenizer, denoiser, folder / "t2i")
    return took


def _first(data: SceneSet, count: int) -> SceneSet:
    return SceneSet(**{each.name: getattr(data, each.name)[:count] for each in fields(data)})


def earlier_scale(folder: Path) -> float:
    """What the latents of the pipeline in `folder` are multiplied by."""
    return json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]


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
