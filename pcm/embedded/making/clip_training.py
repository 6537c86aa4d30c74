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
from pcm.embedded.making.clip_views import (
    GRID,
    PATCH,
    KeepSomePatches,
    as_input,
    augment,
    moved,
    patch_labels,
    present_nouns,
)
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.tokens import CONTEXT_LENGTH, PROMPTS, build_tokenizer
from pcm.embedded.making.training_state import rate_factor, save_state
from pcm.embedded.making.world import NOUNS, SIZE
from pcm.errors import InputError

log = logging.getLogger(__name__)

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
PREFERENCE = 0.4  # added to the lots (0..1) of patches that show a thing when some are dropped


@dataclass(frozen=True)
class ClipTraining:
    """Settings of one CLIP training run."""

    steps: int = 4500
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 150
    cooldown: float = 0.3  # the last part of the steps, over which the rate falls to zero
    weight_decay: float = 0.05
    kept_patches: int = 15  # of 64: dropping patches in training cuts its cost in proportion
    late: float = 0.25  # the last part of the steps, with more patches and no preference: nearer to what is measured
    late_patches: int = 36
    noun_weight: float = 1.0
    ema: float = 0.995  # of the weights that are measured and packed
    seed: int = 0
    checkpoint_every: int = 100
    measure_every: int = 400


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


class NounLoss(nn.Module):
    """How well single nouns fit (a) the picture: a sigmoid loss a noun, (b) each patch: which noun it shows, if any."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)] * 2))  # of pictures, of patches
        self.bias = nn.Parameter(torch.tensor(-5.0))
        self.none = nn.Parameter(torch.tensor(3.0))  # logit of "no thing here"

    def forward(self, image: Tensor, patches: Tensor, nouns: Tensor, present: Tensor, labels: Tensor) -> Tensor:
        """image (B, D), patches (B, N, D), nouns (C, D), normalised; present (B, C) bool; labels (B, N), C = none."""
        whole_scale, patch_scale = self.log_scale.exp()
        whole = whole_scale * image @ nouns.T + self.bias  # (B, C)
        picture = F.softplus(-whole)[present].mean() + 4 * F.softplus(whole)[~present].mean()
        local = patch_scale * patches @ nouns.T  # (B, N, C)
        logits = torch.cat([local, self.none.expand(*local.shape[:2], 1)], -1)  # (B, N, C + 1)
        return picture + F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_clip(
    data: SceneSet, check: dict[str, SceneSet], folder: Path, settings: ClipTraining, start: Path | None = None
) -> dict:
    """Trains (or resumes from folder/clip.pt), writes folder/clip after every checkpoint, returns the last figures.

    `start`: an open_clip folder of an earlier version, whose weights a new training begins with.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(settings.seed)
    work = folder / "clip"
    build_tokenizer(work)
    tokenizer = AutoTokenizer.from_pretrained(work)

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, max_length=CONTEXT_LENGTH, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    model, averaged = new_clip(len(tokenizer)), new_clip(len(tokenizer))
    if start is not None:
        copy_weights(start, model, tokenizer)
    model.visual.patch_dropout = KeepSomePatches(settings.kept_patches)
    model.visual.output_tokens = True
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False)
    nouns_loss = NounLoss()
    optimizer = _optimizer(model, nouns_loss, settings)
    checkpoint = folder / "clip.pt"
    first, figures, seconds = 0, {}, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["raw"])
        averaged.load_state_dict(state["model"])
        nouns_loss.load_state_dict(state["nouns_loss"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, figures = state["step"], state["seconds"], state["figures"]

    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rows = np.sort(rng.choice(len(data), settings.batch_size, replace=False))
        factor = rate_factor(step, settings.steps, warmup=settings.warmup, cooldown=settings.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        late = step >= (1 - settings.late) * settings.steps
        model.visual.patch_dropout.kept_count = settings.late_patches if late else settings.kept_patches
        model.visual.patch_dropout.favour = 0.0 if late else PREFERENCE
        model.train()
        texts = [data.captions[row][rng.integers(len(data.captions[row]))] for row in rows]
        prompts = [PROMPTS[rng.integers(len(PROMPTS))].format(noun.name) for noun in NOUNS]
        with sdpa_kernel(SDPBackend.MATH):
            contrast, located = _losses(model, nouns_loss, data, rows, tokens(texts), tokens(prompts))
        loss = contrast + settings.noun_weight * located
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        if step % 25 == 0:
            spent = time.monotonic() - started
            log.info("step %d contrast %.3f nouns %.3f %.0f s", step, contrast.item(), located.item(), spent)
        last = step + 1 == settings.steps
        if (step + 1) % settings.measure_every == 0 or last:
            figures = {name: measure(averaged, tokens, scenes) for name, scenes in check.items()}
            log.info("step %d %s", step + 1, json.dumps(figures))
        if (step + 1) % settings.checkpoint_every == 0 or last:
            seconds = time.monotonic() - started
            state = {"model": averaged.state_dict(), "raw": model.state_dict(), "nouns_loss": nouns_loss.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": seconds, "figures": figures}
            save_state(checkpoint, state)
            save_clip(averaged, work, half=False)
    return {"steps": settings.steps, "seconds": round(seconds), "figures": figures}


def new_clip(vocab_size: int) -> Any:
    """The embedded model with random weights."""
    import open_clip

    config = model_config(vocab_size)
    config["text_cfg"].pop("hf_tokenizer_name")
    return open_clip.CLIP(**config)


def copy_weights(folder: Path, model: Any, tokenizer: Any) -> None:
    """Begins `model` with the weights of an open_clip folder; of the vocabulary, those of the words that both know."""
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(folder / "open_clip_model.safetensors").items()}
    theirs = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    known = state.pop("token_embedding.weight")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing != ["token_embedding.weight"]:
        raise InputError(f"{folder}: is no earlier embedded CLIP; --clip-start takes the clip folder of a pack")
    with torch.no_grad():
        for word, row in tokenizer.get_vocab().items():
            if word in theirs:
                model.token_embedding.weight[row] = known[theirs[word]]


def _optimizer(model: nn.Module, nouns_loss: nn.Module, settings: ClipTraining) -> torch.optim.Optimizer:
    parameters = [*model.named_parameters(), *nouns_loss.named_parameters()]
    decayed = [p for name, p in parameters if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in parameters if not (p.ndim >= 2 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _losses(
    model: Any, nouns_loss: NounLoss, data: SceneSet, rows: np.ndarray, texts: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """The contrastive and the noun loss of a batch: rows (B,), texts (B, 24), prompts (nouns, 24)."""
    nouns = torch.from_numpy(data.nouns[rows])
    pictures, boxes = moved(as_input(data.images[rows]), torch.from_numpy(data.boxes[rows]))
    labels = patch_labels(nouns, boxes)  # (B, 64)
    dropout = model.visual.patch_dropout
    dropout.preferred = labels < len(NOUNS)
    pooled, patches = model.visual(augment(pictures))  # (B, D), (B, kept, width) after ln_post
    image, patches = F.normalize(pooled, dim=-1), F.normalize(patches @ model.visual.proj, dim=-1)
    captions = F.normalize(encode_short(model, texts), dim=-1)  # (B, D)
    names = F.normalize(encode_short(model, prompts), dim=-1)  # (C, D)
    logits = model.logit_scale.exp() * image @ captions.T  # (B, B)
    target = torch.arange(len(rows))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    located = nouns_loss(image, patches, names, present_nouns(nouns), labels.gather(1, dropout.kept))
    return contrast, located


def encode_short(model: Any, tokens: Tensor, buckets: int = 3) -> Tensor:
    """open_clip's encode_text with little padding: causal attention makes what follows the end token irrelevant.

    Texts are encoded in a few buckets of like length.
    """
    ends = tokens.argmax(1)  # the end token has the highest id
    order = ends.argsort()
    encoded = torch.cat([_encode(model, tokens[rows], ends[rows]) for rows in order.chunk(buckets)])
    return encoded[order.argsort()]


def _encode(model: Any, tokens: Tensor, ends: Tensor) -> Tensor:
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]  # (B, T, width)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), ends] @ model.text_projection  # (B, D)


@torch.no_grad()
def measure(model: Any, tokens: Callable[[list[str]], Tensor], scenes: SceneSet) -> dict[str, float]:
    """Figures on held-out scenes, all fractions.

    r1: image-to-text R@1 among 256 (mean of blocks of 256), a caption of the same nouns in the same numbers counts;
    r1_exact: only the picture's own caption;
    noun: single-object pictures whose nearest "a photo of a {noun}" is right (chance 1/50);
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
    kinds = [tuple(sorted(row)) for row in scenes.nouns.tolist()]
    hits = np.concatenate([_nearest(image[rows], words[rows], rows.start) for rows in _blocks(len(scenes))])
    r1 = float(np.mean([kinds[row] == kinds[hit] for row, hit in enumerate(hits)]))
    exact = float(np.mean(hits == np.arange(len(hits))))
    single = np.flatnonzero(scenes.nouns[:, 1] < 0)
    noun = float(((image[single] @ names.T).argmax(1).numpy() == scenes.nouns[single, 0]).mean())
    left, right, *more = scenes.nouns.T  # a third thing would put the second in the middle
    pairs = np.flatnonzero((right >= 0) & (left != right) & (np.max(more, 0, initial=-1) < 0))
    columns = [
        torch.einsum("bnd,bd->bn", patches[pairs], names[scenes.nouns[pairs, side]]).argmax(1).numpy() % GRID
        for side in (0, 1)
    ]
    patch = float(np.mean(np.concatenate([columns[0] < GRID // 2, columns[1] >= GRID // 2])))
    figures = {"r1": r1, "r1_exact": exact, "noun": noun, "patch": patch}
    return {name: round(value, 4) for name, value in figures.items()}


def _blocks(count: int) -> list[slice]:
    """Whole blocks of 256, or one of all where there are fewer."""
    size = min(256, count)
    return [slice(start, start + size) for start in range(0, count - size + 1, size)]


def _nearest(image: Tensor, words: Tensor, start: int) -> np.ndarray:
    return (image @ words.T).argmax(1).numpy() + start
