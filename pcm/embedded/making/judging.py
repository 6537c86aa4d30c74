"""Figures of the embedded models: what the model card states, measured on the files of the pack."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import pcm.torchvision_shim  # noqa: F401  - before open_clip and diffusers
from pcm.embedded import GUIDANCE_SCALE, STEPS
from pcm.embedded.making.captions import describe
from pcm.embedded.making.clip_training import measure
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.world import DOMAINS, PAINTER_STYLE, Domain, Noun, Scene, sample_scene


@dataclass(frozen=True)
class Painted:
    """Generated pictures with what was asked for."""

    scenes: list[Scene]
    prompts: list[str]
    images: np.ndarray  # (n, 64, 64, 3) uint8
    cpu_seconds_a_picture: float  # of all threads together, so another process on the machine changes it little


def load_clip(folder: Path) -> tuple[Any, Any]:
    """(model, tokenise) through open_clip's own API."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


def judge_clip(folder: Path, check: dict[str, SceneSet]) -> dict[str, dict[str, float]]:
    """measure() of the packed CLIP on check sets by name."""
    model, tokenise = load_clip(folder)
    return {name: measure(model, tokenise, scenes) for name, scenes in check.items()}


def judge_scenes(seed: int = 11) -> list[tuple[Scene, str]]:
    """Scenes to ask of the text-to-image model, with their prompts: of every noun of every domain two with that thing
    alone, then one where it stands with a thing of another kind."""
    rng = random.Random(seed)
    found: list[tuple[Scene, str]] = []
    for things, times in ((1, 2), (2, 1)):
        for domain in DOMAINS.values():
            for noun in domain.nouns:
                found += [_asking(rng, domain, noun, things) for _ in range(times)]
    return found


def _asking(rng: random.Random, domain: Domain, noun: Noun, things: int) -> tuple[Scene, str]:
    while True:
        scene = sample_scene(rng, style=PAINTER_STYLE, variety="plain", things=things, domain=domain)
        if noun.name in scene.nouns and len(scene.nouns) == things:
            return scene, describe(scene, rng)


def paint(folder: Path, asked: list[tuple[Scene, str]], *, batch: int = 8) -> Painted:
    """Generates one picture a prompt, seed = position, with the pipeline's own scheduler."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for _, prompt in asked]
    images, seconds = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        began = time.process_time()
        pictures = pipeline(part, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE).images
        seconds.append((time.process_time() - began) / len(part))
        images += [np.asarray(picture) for picture in pictures]
    return Painted([scene for scene, _ in asked], prompts, np.stack(images), float(np.median(seconds)))


def contact_sheet(painted: Painted, path: Path, *, columns: int = 8, limit: int = 96) -> None:
    """Generated pictures with their prompts underneath, as one small PNG."""
    from PIL import ImageDraw

    width, height = 112, 96
    count = min(limit, len(painted.images))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number in range(count):
        x, y = number % columns * width, number // columns * height
        sheet.paste(Image.fromarray(painted.images[number]), (x + 24, y))
        words = painted.prompts[number].split()
        half = -(-len(words) // 2)
        for line, part in enumerate((words[:half], words[half:])):
            draw.text((x + 2, y + 66 + 12 * line), " ".join(part), fill="black", font_size=9)
    sheet.quantize(160).save(path, optimize=True)  # a palette: a third of the bytes
