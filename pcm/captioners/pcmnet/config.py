"""Every number that changes what a PCM-Net computes, in one record."""

from dataclasses import dataclass

from pcm.errors import InputError

#: Hypotheses that beam search keeps (arXiv 2501.00437, section 4.1); 1 = greedy.
BEAM_SIZE = 3

_DROPOUTS = ("hidden_dropout", "attention_dropout", "visual_dropout", "word_dropout", "output_dropout")


@dataclass(frozen=True, kw_only=True)
class PCMNetConfig:
    """Sizes and settings of a PCM-Net. The defaults are the published COCO ViT-L/14 run.

    The published ViT-B/32 and Flickr30k runs differ in `patch_dim` 768, `embed_dim` 512 and `num_patches` 49 (B/32),
    `vocab_size` 7,553 (Flickr30k) and `hidden_dropout` 0.2 (all but COCO ViT-L/14).

    Raises InputError naming the first field whose value cannot be used.
    """

    #: V, words of the vocabulary including id 0 (begin, end and padding).
    vocab_size: int = 10_200
    #: D_v, width of the patch features: CLIP's last visual block, before its final LayerNorm and projection.
    patch_dim: int = 1024
    #: D, width of CLIP's joint space: the global feature, the concepts, the projected patches.
    embed_dim: int = 768
    #: N, patches of a picture (16x16 pooled 2x2 for ViT-L/14).
    num_patches: int = 64
    #: C, nouns of the concept vocabulary.
    num_concepts: int = 400
    #: T, words of a caption including the end, at most.
    max_length: int = 20

    #: H, width of the transformer.
    hidden_size: int = 512
    num_heads: int = 8
    #: Width of the feed-forward layers.
    intermediate_size: int = 2048
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3

    #: K, concepts retrieved for a picture (eq. 1).
    top_concepts: int = 5
    #: M, the largest (patch, concept) affinities whose patches are mixed up; below 1 it is the fraction int(M * N * K);
    #: 0 turns the mix-up off (the paper's base model).
    top_patches: float = 5
    #: The mix-up threshold: a retrieved concept is kept if its PROBABILITY (not its cosine) is strictly greater.
    #: Dropped concepts become zero vectors that keep their place, with affinity 0, in the softmax of eq. 3.
    concept_threshold: float = 0.0
    #: Temperature of the concept softmax (eq. 1); fixed in the published code.
    temperature: float = 0.01
    #: tau, temperature of the softmax over a patch's K affinities (eq. 3); fixed in the published code.
    tau: float = 0.01

    #: False hides the patches: their slots hold position embeddings alone, as the learned constants of CapDec's mapper,
    #: and the caption comes from the global feature. What text-only training needs, which has no patches; mix-up off.
    use_patches: bool = True

    #: Variance, per dimension, of the Gaussian noise added to the global feature in training (CapDec); 0 = none.
    noise_variance: float = 0.016
    #: Dropout after attention and feed-forward outputs, and inside the feed-forward layers.
    hidden_dropout: float = 0.25
    #: Dropout on attention probabilities.
    attention_dropout: float = 0.3
    #: Dropout on the visual embedding.
    visual_dropout: float = 0.5
    #: Dropout on the word embedding.
    word_dropout: float = 0.1
    #: Dropout before the vocabulary classifier.
    output_dropout: float = 0.5

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size patch_dim embed_dim num_patches num_concepts max_length hidden_size num_heads "
            "intermediate_size num_encoder_layers num_decoder_layers top_concepts"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise InputError(
                f"hidden_size {self.hidden_size}: must be even and a multiple of num_heads {self.num_heads}"
            )
        if self.top_concepts > self.num_concepts:
            raise InputError(
                f"top_concepts {self.top_concepts}: at most num_concepts, {self.num_concepts}, which comes from the "
                "data"
            )
        if not 0 <= self.num_pairs <= self.num_patches * self.top_concepts:
            raise InputError(
                f"top_patches {self.top_patches}: from 0 to {self.num_patches * self.top_concepts} "
                "(num_patches * top_concepts) pairs, or a fraction below 1 of them"
            )
        if not self.use_patches and self.num_pairs:
            raise InputError(f"use_patches False with top_patches {self.top_patches}: set it to 0, nothing is mixed")
        for name in ("temperature", "tau"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)}: must be greater than 0")
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.noise_variance < 0:
            raise InputError(f"noise_variance {self.noise_variance}: must not be negative; 0 turns the noise off")

    @property
    def is_random(self) -> bool:
        """Whether the network draws random numbers in training."""
        return self.noise_variance > 0 or any(getattr(self, name) > 0 for name in _DROPOUTS)

    @property
    def num_pairs(self) -> int:
        """(patch, concept) pairs selected for a picture: M itself, or int(M * N * K) where M is a fraction."""
        if 0 < self.top_patches < 1:
            return int(self.top_patches * self.num_patches * self.top_concepts)
        return int(self.top_patches)
