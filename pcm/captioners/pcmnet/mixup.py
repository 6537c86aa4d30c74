"""PCM, the patch-wise cross-modal mix-up (arXiv 2501.00437, section 3.2), and the visual embedding it feeds.

Synthetic pictures often miss details of their caption. CLIP knows which nouns a picture shows and where: the patches
that match a noun best are mixed with that noun's text embedding. In training such patches are replaced; for real
pictures the textual patches are appended instead, so that nothing is lost.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.errors import InputError

#: How textual patches enter the sequence. "replace": selected patches become textual, 1 + N positions (training).
#: "append": N more positions, those of unselected patches masked, 1 + 2N (inference, as published). "append_selected":
#: as "append" but only slots that can be selected, 1 + N + min(M, N); what is left visible is the same.
Layout = Literal["replace", "append", "append_selected"]


@dataclass(frozen=True)
class MixUpFindings:
    """What the mix-up found in a batch of pictures; nothing here carries gradients."""

    #: (B, D) the global feature, L2-normalised.
    global_feature: Tensor
    #: (B, C) probability of every concept, eq. 1.
    concept_probabilities: Tensor
    #: (B, K) the most probable concepts, best first, and their probabilities.
    top_concepts: Tensor
    top_probabilities: Tensor
    #: (B, K) boolean: whether the concept passed the threshold.
    kept: Tensor
    #: (B, K, D) unit vectors of these concepts, zero where not kept.
    concept_vectors: Tensor
    #: (B, N, D) unit vectors of the patches in CLIP's joint space.
    patch_embeddings: Tensor
    #: (B, N, K) affinities a_jk, eq. 2; 0 for concepts not kept.
    patch_concept_similarity: Tensor
    #: (B, N*K) softmax of the affinities over all pairs; pair = patch * K + concept.
    pair_probabilities: Tensor
    #: (B, M) the selected pairs, best first.
    selected_pairs: Tensor
    #: (B, N) boolean, True = textual: a pair of this patch is selected.
    mix_mask: Tensor


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension; a zero vector stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def retrieve_concepts(
    global_feature: Tensor, concepts: Tensor, *, top_concepts: int, threshold: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 1: p = softmax(cos(g_I, c) / temperature) over the vocabulary, and its K most probable concepts.

    `global_feature` (B, D) and `concepts` (C, D) are L2-normalised. Returns the probabilities (B, C), the K largest
    (B, K) with their concepts (B, K), best first, and which of them have a probability above the threshold (B, K).
    """
    probabilities = F.softmax(global_feature @ concepts.T / temperature, dim=-1)  # (B, C)
    top_probabilities, indices = probabilities.topk(top_concepts, dim=-1)  # (B, K)
    return probabilities, top_probabilities, indices, top_probabilities > threshold  # config.concept_threshold


def patch_concept_similarity(patch_embeddings: Tensor, concept_vectors: Tensor) -> Tensor:
    """Eq. 2: a_jk = cos(v'_j, c_k), (B, N, K), of L2-normalised (or zero) vectors (B, N, D) and (B, K, D)."""
    return torch.einsum("bnd,bkd->bnk", patch_embeddings, concept_vectors)


def textual_patches(similarity: Tensor, concept_vectors: Tensor, *, tau: float) -> Tensor:
    """Eq. 3: v^t_j = sum_k softmax_k(a_jk / tau) c_k, (B, N, D).

    A dropped concept (zero vector) keeps its affinity 0 in the softmax and so dilutes the sum, as published.
    """
    return F.softmax(similarity / tau, dim=-1) @ concept_vectors


def select_pairs(similarity: Tensor, *, num_pairs: int, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """The M largest of all N*K (patch, concept) affinities, and the patches that own one of them.

    Returns the softmax over all pairs (B, N*K), the selected pairs (B, M), best first, and the patch mask (B, N). The
    softmax keeps the order, except that very low affinities underflow to equal zeros. We rank after it, to break ties
    as the published code does.
    """
    batch, num_patches, num_concepts = similarity.shape
    probabilities = F.softmax(similarity.flatten(1) / tau, dim=-1)  # (B, N*K)
    pairs = probabilities.topk(num_pairs, dim=-1).indices  # (B, M)
    mask = torch.zeros(batch, num_patches, dtype=torch.bool, device=similarity.device)
    return probabilities, pairs, mask.scatter(1, pairs // num_concepts, True)


def inject_noise(global_feature: Tensor, *, variance: float, noise: Tensor | None = None) -> Tensor:
    """CapDec's noise: normalise, add N(0, variance) to every dimension, normalise. `noise`: a standard normal draw."""
    noise = torch.randn_like(global_feature) if noise is None else noise
    return unit(unit(global_feature) + variance**0.5 * noise)


class ClipHead(nn.Module):
    """CLIP's final LayerNorm and projection, applied to patches (DenseCLIP). Frozen: buffers, not parameters."""

    ln_post_weight: Tensor
    ln_post_bias: Tensor
    proj: Tensor

    def __init__(self, patch_dim: int, embed_dim: int):
        super().__init__()
        self.register_buffer("ln_post_weight", torch.ones(patch_dim))
        self.register_buffer("ln_post_bias", torch.zeros(patch_dim))
        self.register_buffer("proj", torch.randn(patch_dim, embed_dim) * patch_dim**-0.5)  # CLIP's own initialisation

    def forward(self, patch_features: Tensor) -> Tensor:
        """V_I (B, N, D_v) -> V'_I (B, N, D)."""
        normed = F.layer_norm(patch_features, (patch_features.shape[-1],), self.ln_post_weight, self.ln_post_bias)
        return normed @ self.proj


class VisualEmbedding(nn.Module):
    """From CLIP features to the encoder's input, mixed up.

    Linear maps (one each for patches, textual patches and the global feature), + position, + token type, ReLU,
    LayerNorm, dropout.
    """

    def __init__(self, config: PCMNetConfig):
        super().__init__()
        self.config = config
        self.clip_head = ClipHead(config.patch_dim, config.embed_dim)
        self.patch_projection = nn.Linear(config.patch_dim, config.hidden_size)
        self.textual_projection = nn.Linear(config.embed_dim, config.hidden_size)
        self.global_projection = nn.Linear(config.embed_dim, config.hidden_size)
        #: Slot 0 is the global feature; a textual patch has the position of the patch it comes from.
        self.position = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.hidden_size))
        nn.init.trunc_normal_(self.position, std=0.02)
        #: Row 1 marks textual positions, row 0 everything else.
        self.token_type = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.visual_dropout)

    @torch.no_grad()
    def find_pairs(self, global_feature: Tensor, patch_features: Tensor, concepts: Tensor) -> MixUpFindings:
        """Eqs. 1 and 2 and the selection, always in float32: (B, D), (B, N, D_v), unit concepts (C, D)."""
        config = self.config
        with torch.autocast(global_feature.device.type, enabled=False):
            global_unit = unit(global_feature.float())
            probabilities, top_probabilities, top_concepts, kept = retrieve_concepts(
                global_unit,
                concepts,
                top_concepts=config.top_concepts,
                threshold=config.concept_threshold,
                temperature=config.temperature,
            )
            vectors = concepts[top_concepts] * kept.unsqueeze(-1)  # (B, K, D)
            patches = self.clip_head(patch_features.float())  # (B, N, D)
            patches = patches / (patches.norm(dim=-1, keepdim=True) + 1e-9)
            similarity = patch_concept_similarity(patches, vectors)  # (B, N, K)
            pair_probabilities, pairs, mask = select_pairs(similarity, num_pairs=config.num_pairs, tau=config.tau)
        return MixUpFindings(
            global_feature=global_unit,
            concept_probabilities=probabilities,
            top_concepts=top_concepts,
            top_probabilities=top_probabilities,
            kept=kept,
            concept_vectors=vectors,
            patch_embeddings=patches,
            patch_concept_similarity=similarity,
            pair_probabilities=pair_probabilities,
            selected_pairs=pairs,
            mix_mask=mask,
        )

    def forward(
        self, global_feature: Tensor, patch_features: Tensor, concepts: Tensor, *, layout: Layout
    ) -> tuple[Tensor, Tensor | None, MixUpFindings]:
        """(B, D), (B, N, D_v) and unit concepts (C, D) -> embedding (B, S, H), mask (B, S) or None, MixUpFindings.

        S is 1 + N in the "replace" layout, where every position is visible and the mask is None; 1 + 2N in "append";
        1 + N + min(M, N) in "append_selected". In training mode noise is added to the global feature.
        """
        if layout not in get_args(Layout):
            raise InputError(f"layout {layout!r}: allowed are {', '.join(get_args(Layout))}")
        mixup = self.find_pairs(global_feature, patch_features, concepts)
        global_input = mixup.global_feature
        if self.training and self.config.noise_variance > 0:
            global_input = inject_noise(global_input, variance=self.config.noise_variance)
        global_slot = self.global_projection(global_input).unsqueeze(1)  # (B, 1, H)
        if not self.config.use_patches:
            patch_features = torch.zeros_like(patch_features)
        patches = self.patch_projection(patch_features.to(self.patch_projection.weight.dtype))  # (B, N, H)

        slots = self._textual_slots(mixup.mix_mask, everything=layout == "append")  # (B, S_t)
        chosen = mixup.mix_mask.gather(1, slots)  # (B, S_t)
        textual = self._textual(mixup, slots)  # (B, S_t, H)
        plain = torch.zeros_like(mixup.mix_mask[:, :1])  # (B, 1): the global slot is never textual
        if layout == "replace":
            index = slots.unsqueeze(-1).expand_as(textual)  # (B, S_t, H)
            mixed = torch.where(chosen.unsqueeze(-1), textual, patches.gather(1, index))
            x = torch.cat([global_slot, patches.scatter(1, index, mixed)], dim=1)  # (B, 1 + N, H)
            is_textual = torch.cat([plain, mixup.mix_mask], dim=1)
            position: Tensor = self.position
            mask = None
        else:
            x = torch.cat([global_slot, patches, textual], dim=1)  # (B, 1 + N + S_t, H)
            is_textual = torch.cat([plain.expand(-1, 1 + patches.shape[1]), chosen], dim=1)
            textual_position = self.position[0, 1:][slots]  # (B, S_t, H)
            position = torch.cat([self.position.expand(x.shape[0], -1, -1), textual_position], dim=1)
            mask = torch.cat([torch.ones_like(is_textual[:, : 1 + patches.shape[1]]), chosen], dim=1)
        x = x + position + self.token_type(is_textual.long())
        return self.dropout(self.norm(F.relu(x))), mask, mixup

    def _textual_slots(self, mix_mask: Tensor, *, everything: bool) -> Tensor:
        """Patches to make textual: all N, or the first min(M, N) with the selected ones in front, in patch order."""
        batch, num_patches = mix_mask.shape
        if everything:
            return torch.arange(num_patches, device=mix_mask.device).expand(batch, -1)
        order = mix_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return order[:, : min(self.config.num_pairs, num_patches)]

    def _textual(self, mixup: MixUpFindings, slots: Tensor) -> Tensor:
        """Eq. 3 for the patches `slots` (B, S_t), in the hidden space: (B, S_t, H)."""
        similarity = mixup.patch_concept_similarity
        with torch.autocast(similarity.device.type, enabled=False):
            picked = similarity.gather(1, slots.unsqueeze(-1).expand(-1, -1, similarity.shape[-1]))  # (B, S_t, K)
            vectors = textual_patches(picked, mixup.concept_vectors, tau=self.config.tau)  # (B, S_t, D)
        return self.textual_projection(vectors)
