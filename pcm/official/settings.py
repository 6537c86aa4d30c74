"""What cannot be read off a published checkpoint and may be chosen."""

import dataclasses
from collections.abc import Iterable

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.errors import not_known

#: Scores in published annotations are the cosine times this, as the published loss sees it; in SynC's refined ones,
#: times 5.
CLIP_SCORE_SCALE = 2.5

#: What a published checkpoint shows itself, and what the concept file does.
_SHOWN = frozenset(
    (
        *("vocab_size", "hidden_size", "patch_dim", "embed_dim", "num_patches", "intermediate_size"),
        *("num_encoder_layers", "num_decoder_layers", "num_concepts"),
    )
)
#: Fields of PCMNetConfig.
SETTINGS = tuple(field.name for field in dataclasses.fields(PCMNetConfig) if field.name not in _SHOWN)


def check_settings(names: Iterable[str]) -> None:
    """Raises InputError for a name that is not in SETTINGS."""
    for name in names:
        if name not in SETTINGS:
            raise not_known("setting", name, SETTINGS, why="cannot be chosen for a published checkpoint")
