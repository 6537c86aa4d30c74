"""Trains the painter's text encoder: from captions alone it learns to tell what stands where.

A CLIP text tower learns which caption fits a picture as a whole; which thing stands left and which one is red, it need
not know. Here the encoder is read by cross-attention, as the denoiser will read it, and asked just that: noun and
colour at each site, and the place. So the denoiser gets states in which things are already bound to sites.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any  # transformers' classes: their types tell mypy little

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcm.torchvision_shim  # noqa: F401  - before transformers
from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.tokens import CONTEXT_LENGTH
from pcm.embedded.making.training_state import rate_factor, save_state
from pcm.embedded.making.world import COLOURS, NOUNS, PLACES

log = logging.getLogger(__name__)

WIDTH, HEADS, LAYERS = 128, 4, 3


@dataclass(frozen=True)
class TextTraining:
    """Settings of one training run."""

    steps: int = 1200
    batch_size: int = 64
    rate: float = 1.5e-3
    seed: int = 0
    checkpoint_every: int = 200


def new_text_encoder(vocabulary: int) -> Any:
    """A CLIPTextModel for the pack's tokenizer, whose last two tokens are start and end."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


class SceneReader(nn.Module):
    """Asks an encoded caption for the noun and colour at each of `sites` (left to right; none = last class), and the
    place: one learned question each, answered by attention over the tokens."""

    def __init__(self, sites: int):
        super().__init__()
        self.questions = nn.Parameter(0.02 * torch.randn(sites + 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.noun = nn.Linear(WIDTH, len(NOUNS) + 1)
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.place = nn.Linear(WIDTH, len(PLACES))

    def forward(self, states: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """states (B, T, width), padding (B, T) bool -> logits of nouns, colours (B, sites, classes) and places."""
        questions = self.questions.expand(len(states), -1, -1)
        read, _ = self.attention(questions, states, states, key_padding_mask=padding, need_weights=False)
        read = self.norm(read)
        return self.noun(read[:, :-1]), self.colour(read[:, :-1]), self.place(read[:, -1])


def train_text_encoder(data: SceneSet, tokenizer: Any, folder: Path, settings: TextTraining) -> Any:
    """Trains (or resumes from folder/text.pt) the text encoder on the captions of a set; returns it frozen."""
    torch.manual_seed(settings.seed)
    encoder = new_text_encoder(len(tokenizer))
    reader = SceneReader(data.nouns.shape[1])
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    checkpoint = folder / "text.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["model"])
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    nouns, colours, places = (torch.from_numpy(labels) for labels in (data.nouns, data.colours, data.places))
    nouns = torch.where(nouns < 0, len(NOUNS), nouns)  # (n, sites)
    colours = torch.where(colours < 0, len(COLOURS), colours)
    started = time.monotonic() - seconds
    for step in range(first, settings.steps):
        rng = np.random.default_rng((settings.seed, 2, step))
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rows = rng.choice(len(data), settings.batch_size, replace=False)
        texts = [data.captions[row][rng.integers(len(data.captions[row]))] for row in rows]
        ids, padding = _tokens(tokenizer, texts)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_factor(step, settings.steps, warmup=100, cooldown=0.5)
        noun, colour, place = reader(encoder(ids).last_hidden_state, padding)
        loss = (
            F.cross_entropy(noun.flatten(0, 1), nouns[rows].flatten())
            + 0.5 * F.cross_entropy(colour.flatten(0, 1), colours[rows].flatten())
            + 0.5 * F.cross_entropy(place, places[rows])
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            right = (noun.argmax(-1) == nouns[rows]).float().mean().item()
            log.info("text step %d loss %.3f nouns %.3f %.0f s", step, loss.item(), right, time.monotonic() - started)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            state = {"model": encoder.state_dict(), "reader": reader.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.monotonic() - started}
            save_state(checkpoint, state)
    return encoder.eval().requires_grad_(False)


def _tokens(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are padding, (B, T) each, as long as the longest text: attention is causal, so what
    would follow changes nothing."""
    found = tokenizer(texts, max_length=CONTEXT_LENGTH, padding="longest", truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask == 0


@torch.no_grad()
def text_states(text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
    """What the denoiser reads of each caption, padded to the whole context: (n, 24, width) float16."""
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
