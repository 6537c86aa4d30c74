"""Trains the embedded CLIP: open_clip's own model, from scratch, on drawn scenes in the seen styles.

Loss = the contrastive loss of CLIP + a loss that ties single nouns to pictures and to patches. PCM-Net reads nouns off
patches with the head that CLIP trains on its [CLS] token only; without the second loss those patches locate nouns
worse than chance.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pcm.torchvision_shim  # noqa: F401  - before open_clip
from pcm.embedded.scenes import SceneSet
from pcm.embedded.tokens import CONTEXT_LENGTH, PROMPTS, build_tokenizer
from pcm.embedded.world import NOUNS, SIZE

log = logging.getLogger(__name__)

PATCH = 8
GRID = SIZE // PATCH
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@dataclass(frozen=True)
class ClipTraining:
    """Settings of one CLIP training run."""

    steps: int = 1450
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    kept_patches: int = 20  # of 64: dropping patches in training cuts its cost in proportion
    noun_weight: float = 1.0
    bf16: bool = False  # only where the CPU has bf16 matrix units: elsewhere it is 50 times slower, not faster
    seed: int = 0
    checkpoint_every: int = 100


def model_config(vocab_size: int) -> dict:
    """open_clip's model_cfg of the embedded model."""
    return {
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "layers": 6, "width": 192, "head_width": 64, "patch_size": PATCH},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "embedded",  # any name makes open_clip read the tokenizer in the same folder
            "width": 192,
            "heads": 3,
            "layers": 3,
        },
    }


def save_clip(model: Any, folder: Path, *, half: bool) -> None:
    """Writes the open_clip folder: config, weights and tokenizer."""
    from safetensors.torch import save_file

    build_tokenizer(folder)
    config = {"model_cfg": model_config(model.token_embedding.num_embeddings), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.half() if half else value.float() for name, value in model.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


class KeepSomePatches(nn.Module):
    """Stands in for open_clip's patch dropout in training and remembers which patches it kept."""

    def __init__(self, kept: int):
        super().__init__()
        self.kept_count = kept
        self.kept: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return tokens
        batch, length, width = tokens.shape
        self.kept = torch.rand(batch, length - 1).argsort(1)[:, : self.kept_count].sort(1).values  # (B, kept)
        patches = tokens[:, 1:].gather(1, self.kept[..., None].expand(-1, -1, width))
        return torch.cat([tokens[:, :1], patches], 1)  # (B, 1 + kept, width)


class NounLoss(nn.Module):
    """Sigmoid loss between single nouns and (a) the picture, (b) its patches.

    Patches, max over patches: a noun in the picture must be found by some patch inside its box and by none outside
    of its boxes; a noun not in the picture must be found by no patch.
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(self, image: Tensor, patches: Tensor, nouns: Tensor, present: Tensor, inside: Tensor) -> Tensor:
        """image (B, D), patches (B, N, D), nouns (C, D), L2-normalised; present (B, C) and inside (B, C, N) bool."""
        scale = self.log_scale.exp()
        whole = scale * image @ nouns.T + self.bias  # (B, C)
        local = scale * torch.einsum("bnd,cd->bcn", patches, nouns) + self.bias  # (B, C, N)
        found = local.masked_fill(~inside, -1e4).amax(-1)  # (B, C); only read where the noun is present
        stray = local.masked_fill(inside, -1e4).amax(-1)  # (B, C)
        absent = ~present
        seen = present & inside.any(-1)  # patch dropout may have dropped every patch of a box
        hit = F.softplus(-found)[seen].mean() + F.softplus(-whole)[present].mean()
        miss = F.softplus(stray).mean() * 4 + F.softplus(whole)[absent].mean() * 4
        return hit + miss


def noun_maps(nouns: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Which nouns are in a picture and which patch centres lie in their boxes: (B, C) bool, (B, C, 64) bool."""
    centres = (np.arange(GRID) + 0.5) * PATCH
    x, y = np.tile(centres, GRID), np.repeat(centres, GRID)  # (64,) row by row
    present = np.zeros((len(nouns), len(NOUNS)), bool)
    inside = np.zeros((len(nouns), len(NOUNS), GRID * GRID), bool)
    rows = np.arange(len(nouns))
    for column in range(nouns.shape[1]):
        left, top, right, bottom = (boxes[:, column, side, None] for side in range(4))
        covered = (x > left) & (x < right) & (y > top) & (y < bottom)  # (B, 64)
        here = nouns[:, column] >= 0
        present[rows[here], nouns[here, column]] = True
        inside[rows[here], nouns[here, column]] |= covered[here]
    return torch.from_numpy(present), torch.from_numpy(inside)


def augment(pictures: Tensor) -> Tensor:
    """Mild changes of tint, contrast, saturation and sharpness, (B, 3, 64, 64) in -1..1; colour names stay true."""
    batch = len(pictures)
    tint = 1 + 0.12 * torch.randn(batch, 3, 1, 1)
    pictures = pictures * tint + 0.1 * torch.randn(batch, 1, 1, 1)
    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * (0.65 + 0.5 * torch.rand(batch, 1, 1, 1))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.4)
    pictures = pictures + soft * (blurred - pictures)
    return (pictures + 0.04 * torch.randn_like(pictures)).clamp(-1, 1)


def as_input(images: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in -1..1, what PREPROCESS describes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_clip(data: SceneSet, check: dict[str, SceneSet], folder: Path, settings: ClipTraining) -> dict:
    """Trains (or resumes from folder/clip.pt) and writes the open_clip folder folder/clip; returns the last figures."""
    import open_clip

    torch.manual_seed(settings.seed)
    work = folder / "clip"
    build_tokenizer(work)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work)
    config = model_config(len(tokenizer))
    config["text_cfg"].pop("hf_tokenizer_name")
    model: Any = open_clip.CLIP(**config)
    model.visual.patch_dropout = KeepSomePatches(settings.kept_patches)
    model.visual.output_tokens = True
    nouns_loss = NounLoss()
    parameters = [*model.named_parameters(), *nouns_loss.named_parameters()]
    decayed = [p for name, p in parameters if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in parameters if not (p.ndim >= 2 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    checkpoint = folder / "clip.pt"
    first, figures, seconds = 0, {}, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        nouns_loss.load_state_dict(state["nouns_loss"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, figures = state["step"], state["seconds"], state["figures"]

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, max_length=CONTEXT_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, step))
        rows = np.sort(rng.choice(len(data), settings.batch_size, replace=False))
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps)) * 0.97 + 0.03
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        pictures = augment(as_input(data.images[rows]))
        texts = [data.captions[row][rng.integers(len(data.captions[row]))] for row in rows]
        prompts = [PROMPTS[rng.integers(len(PROMPTS))].format(noun.name) for noun in NOUNS]
        present, inside = noun_maps(data.nouns[rows], data.boxes[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16), sdpa_kernel(SDPBackend.MATH):
            pooled, patches = model.visual(pictures)  # (B, D), (B, kept, width) after ln_post
            patches = patches @ model.visual.proj
            captions = encode_short(model, tokens(texts))  # (B, D)
            nouns = encode_short(model, tokens(prompts))  # (C, D)
        image, captions, nouns = (F.normalize(x.float(), dim=-1) for x in (pooled, captions, nouns))
        logits = model.logit_scale.exp() * image @ captions.T  # (B, B)
        target = torch.arange(len(rows))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        kept = model.visual.patch_dropout.kept  # (B, kept)
        inside = inside.gather(2, kept[:, None].expand(-1, len(NOUNS), -1))  # (B, C, kept)
        located = nouns_loss(image, F.normalize(patches.float(), dim=-1), nouns, present, inside)
        loss = contrast + settings.noun_weight * located
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
        if step % 20 == 0:
            spent = time.monotonic() - started
            log.info("step %d contrast %.3f nouns %.3f %.0f s", step, contrast.item(), located.item(), spent)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            figures = {name: measure(model, tokens, scenes) for name, scenes in check.items()}
            seconds = time.monotonic() - started
            log.info("step %d %s", step + 1, json.dumps(figures))
            state = {"model": model.state_dict(), "nouns_loss": nouns_loss.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds, "figures": figures}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            save_clip(model, work, half=False)
    return {"steps": settings.steps, "seconds": round(seconds), "figures": figures}


def encode_short(model: Any, tokens: Tensor) -> Tensor:
    """open_clip's encode_text without the padding: causal attention makes what follows the end token irrelevant."""
    length = int(tokens.argmax(1).max()) + 1  # the end token has the highest id
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]  # (B, T, width)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection  # (B, D)


@torch.no_grad()
def measure(model: Any, tokens: Callable[[list[str]], Tensor], scenes: SceneSet) -> dict[str, float]:
    """Figures on held-out scenes, all fractions.

    r1: image-to-text R@1 among 256, a caption of the same nouns counts; r1_exact: only the picture's own caption;
    noun: single-object pictures whose nearest "a photo of a {noun}" is right (chance 1/32);
    patch: in pairs of different nouns, how often the best patch for a noun lies in its half (chance 0.5).
    """
    model.eval()
    keep_tokens, model.visual.output_tokens = model.visual.output_tokens, True
    with sdpa_kernel(SDPBackend.MATH):
        outputs = [model.visual(as_input(scenes.images[start : start + 128])) for start in range(0, len(scenes), 128)]
        image = F.normalize(torch.cat([pooled for pooled, _ in outputs]), dim=-1)
        patches = F.normalize(torch.cat([patch @ model.visual.proj for _, patch in outputs]), dim=-1)
        words = model.encode_text(tokens([captions[0] for captions in scenes.captions]))
        names = model.encode_text(tokens([f"a photo of a {noun.name}" for noun in NOUNS]))
    model.visual.output_tokens = keep_tokens
    words, names = F.normalize(words, dim=-1), F.normalize(names, dim=-1)
    first = min(256, len(scenes))
    best = (image[:first] @ words[:first].T).argmax(1).numpy()
    kinds = [tuple(sorted(row)) for row in scenes.nouns.tolist()]
    r1 = float(np.mean([kinds[row] == kinds[best[row]] for row in range(first)]))
    exact = float(np.mean(best == np.arange(first)))
    single = np.flatnonzero(scenes.nouns[:, 1] < 0)
    noun = float(((image[single] @ names.T).argmax(1).numpy() == scenes.nouns[single, 0]).mean())
    pairs = np.flatnonzero((scenes.nouns[:, 1] >= 0) & (scenes.nouns[:, 0] != scenes.nouns[:, 1]))
    columns = [
        torch.einsum("bnd,bd->bn", patches[pairs], names[scenes.nouns[pairs, side]]).argmax(1).numpy() % GRID
        for side in (0, 1)
    ]
    patch = float(np.mean(np.concatenate([columns[0] < GRID // 2, columns[1] >= GRID // 2])))
    return {"r1": round(r1, 4), "r1_exact": round(exact, 4), "noun": round(noun, 4), "patch": round(patch, 4)}
