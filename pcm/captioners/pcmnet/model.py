"""PCM-Net: a Transformer captioner over CLIP features with patch-wise cross-modal mix-up (arXiv 2501.00437)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.mixup import Layout, MixUpFindings, VisualEmbedding, unit
from pcm.captioners.pcmnet.transformer import DecoderBlock, EncoderBlock
from pcm.errors import InputError

__all__ = ["Encoded", "PCMNet", "PCMNetConfig", "sinusoid"]

#: Wavelength base of the word positions.
SINUSOID_BASE = 10_000.0


def sinusoid(length: int, hidden_size: int) -> Tensor:
    """Word positions (length, H): sin on even and cos on odd channels, frequencies base^(-2i/H), float32."""
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, hidden_size, 2).float() * -(math.log(SINUSOID_BASE) / hidden_size))
    table = torch.zeros(length, hidden_size)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


class WordEmbedding(nn.Module):
    """Word vector (not scaled) + sinusoidal position, LayerNorm, dropout."""

    position: Tensor

    def __init__(self, config: PCMNetConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.word_dropout)
        self.register_buffer("position", sinusoid(config.max_length, config.hidden_size), persistent=False)

    def forward(self, token_ids: Tensor, *, step: int | None = None) -> Tensor:
        """`token_ids` (B, T) -> (B, T, H), at positions 0..T-1, or, when decoding, all at position `step`."""
        first, stop = (0, token_ids.shape[1]) if step is None else (step, step + 1)
        if stop > len(self.position):
            raise InputError(f"{stop} words: this model was built for max_length {len(self.position)}")
        return self.dropout(self.norm(self.embedding(token_ids) + self.position[first:stop]))


class Encoder(nn.Module):
    """Transformer encoder with the inter-layer global feature (eqs. 6 and 7)."""

    def __init__(self, config: PCMNetConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.hidden_size,
                config.num_heads,
                config.intermediate_size,
                hidden_dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.num_encoder_layers)
        )
        self.global_fusion = nn.Linear((config.num_encoder_layers + 1) * config.hidden_size, config.hidden_size)
        self.global_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`x` (B, S, H), `mask` (B, S) boolean or None -> memory (B, S, H).

        Eq. 6-7: g~ = LayerNorm(W_g [g^0; g^1; ...; g^Ne]), the global slot's input and every layer's output, takes
        position 0 of the memory.
        """
        global_states = [x[:, 0]]
        for block in self.blocks:
            x = block(x, mask=mask)
            global_states.append(x[:, 0])
        fused = self.global_norm(self.global_fusion(torch.cat(global_states, dim=-1)))  # (B, H)
        return torch.cat([fused.unsqueeze(1).to(x.dtype), x[:, 1:]], dim=1)


@dataclass(frozen=True)
class Encoded:
    """Pictures ready to be captioned."""

    #: (B, S, H) the encoder's output.
    memory: Tensor
    #: (B, S) boolean, True = may be attended; None = everything.
    mask: Tensor | None
    #: What the mix-up found: top_concepts and top_probabilities (B, K), patch_concept_similarity (B, N, K), mix_mask
    #: (B, N), ...
    mixup: MixUpFindings


class PCMNet(nn.Module):
    """Captions from CLIP features.

    `model(global_feature, patch_features, token_ids)` gives teacher-forced logits. Before the first use call
    `set_concepts` and, unless a checkpoint is loaded, `set_clip_head`. Inputs are never changed.
    """

    concept_embeddings: Tensor

    def __init__(self, config: PCMNetConfig):
        super().__init__()
        self.config = config
        self.visual_embedding = VisualEmbedding(config)
        self.word_embedding = WordEmbedding(config)
        self.encoder = Encoder(config)
        self.decoder = nn.ModuleList(
            DecoderBlock(
                config.hidden_size,
                config.num_heads,
                config.intermediate_size,
                hidden_dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.num_decoder_layers)
        )
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.output = nn.Linear(config.hidden_size, config.vocab_size)
        # Not in the state dict: the concepts belong to the dataset and are stored beside it and beside checkpoints.
        self.register_buffer("concept_embeddings", torch.zeros(config.num_concepts, config.embed_dim), persistent=False)
        self._has_concepts = False

    @torch.no_grad()
    def set_concepts(self, concept_embeddings: Tensor) -> None:
        """Take the concept vocabulary, (C, D); an L2-normalised copy is kept.

        Raises InputError when the shape is not (num_concepts, embed_dim) or a row is zero or not finite.
        """
        expected = tuple(self.concept_embeddings.shape)
        embeddings = torch.as_tensor(concept_embeddings).detach()
        if tuple(embeddings.shape) != expected:
            raise InputError(f"concept embeddings of shape {tuple(embeddings.shape)}: this model takes {expected}")
        normalised = unit(embeddings.float())
        if not torch.isfinite(normalised).all() or (normalised.norm(dim=-1) < 0.5).any():
            raise InputError("concept embeddings: every row must be finite and not zero; build the concepts again")
        self.concept_embeddings.copy_(normalised)
        self._has_concepts = True

    @torch.no_grad()
    def set_clip_head(self, head: dict[str, Tensor]) -> None:
        """Take CLIP's frozen head: {"ln_post.weight" (D_v,), "ln_post.bias" (D_v,), "proj" (D_v, D)}, copied.

        Raises InputError for a missing entry or another shape.
        """
        own = self.visual_embedding.clip_head
        for name, buffer in (
            ("ln_post.weight", own.ln_post_weight),
            ("ln_post.bias", own.ln_post_bias),
            ("proj", own.proj),
        ):
            if name not in head:
                raise InputError(f"CLIP head without {name!r}: it needs ln_post.weight, ln_post.bias and proj")
            value = torch.as_tensor(head[name])
            if value.shape != buffer.shape:
                raise InputError(
                    f"CLIP head {name} of shape {tuple(value.shape)}: this model takes {tuple(buffer.shape)}"
                )
            buffer.copy_(value)

    def find_pairs(self, global_feature: Tensor, patch_features: Tensor) -> MixUpFindings:
        """Only the mix-up's findings (eqs. 1 and 2 and the selection), without the transformer."""
        self._check(global_feature, patch_features)
        return self.visual_embedding.find_pairs(global_feature, patch_features, self.concept_embeddings)

    def encode(self, global_feature: Tensor, patch_features: Tensor, *, layout: Layout | None = None) -> Encoded:
        """`global_feature` (B, D) and `patch_features` (B, N, D_v) -> memory, mask and findings.

        `layout` None: "replace" in training mode; otherwise "append_selected", which gives the decoder the same visible
        positions as the published "append" for less work.
        """
        self._check(global_feature, patch_features)
        layout = layout or ("replace" if self.training else "append_selected")
        x, mask, mixup = self.visual_embedding(global_feature, patch_features, self.concept_embeddings, layout=layout)
        return Encoded(memory=self.encoder(x, mask=mask), mask=mask, mixup=mixup)

    def decode(self, encoded: Encoded, token_ids: Tensor) -> Tensor:
        """Teacher forcing: `token_ids` (B, T), beginning with BOS -> logits (B, T, V); position t sees words 0..t."""
        x = self.word_embedding(token_ids)  # (B, T, H)
        for block in self.decoder:
            x = block(x, encoded.memory, memory_mask=encoded.mask)
        return self.output(self.output_dropout(x))

    def forward(
        self,
        global_feature: Tensor,
        patch_features: Tensor,
        token_ids: Tensor,
        *,
        layout: Layout | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, T, V) of `global_feature` (B, D), `patch_features` (B, N, D_v), `token_ids` (B, T).

        `layout` as in `encode`: textual patches replace in training mode and are appended in eval mode.
        Raises InputError for another shape than the config's, or without concepts.
        """
        return self.decode(self.encode(global_feature, patch_features, layout=layout), token_ids)

    def _check(self, global_feature: Tensor, patch_features: Tensor) -> None:
        if not self._has_concepts:
            raise InputError("PCM-Net has no concepts yet: call set_concepts with the dataset's concept embeddings")
        config = self.config
        if global_feature.dim() != 2 or global_feature.shape[1] != config.embed_dim:
            raise InputError(
                f"global_feature of shape {tuple(global_feature.shape)}: this model takes (batch, {config.embed_dim})"
            )
        expected = (len(global_feature), config.num_patches, config.patch_dim)
        if tuple(patch_features.shape) != expected:
            raise InputError(f"patch_features of shape {tuple(patch_features.shape)}: this model takes {expected}")
