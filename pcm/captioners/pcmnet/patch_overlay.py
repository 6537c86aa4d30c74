"""Which patches of a picture the mix-up makes textual, and with which concept: what is drawn over a picture."""

from dataclasses import dataclass

from pcm.captioners.pcmnet.mixup import MixUpFindings


@dataclass(frozen=True)
class TextualPatch:
    """One selected patch of a picture's grid, rows from the top and columns from the left."""

    row: int
    column: int
    rank: int | None  # of the concept among the picture's K, 0 = most probable; None: one that the threshold dropped
    similarity: float  # cosine of patch and concept, eq. 2


def textual_patches(mixup: MixUpFindings, index: int, *, columns: int) -> list[TextualPatch]:
    """The selected patches of picture `index` of a batch, each once, under the concept it fits best, best first."""
    num_concepts = mixup.top_concepts.shape[1]
    found: dict[int, TextualPatch] = {}
    for pair in mixup.selected_pairs[index].tolist():
        patch, rank = divmod(pair, num_concepts)
        if patch not in found:
            found[patch] = TextualPatch(
                row=patch // columns,
                column=patch % columns,
                rank=rank if mixup.kept[index, rank] else None,
                similarity=float(mixup.patch_concept_similarity[index, patch, rank]),
            )
    return list(found.values())
