"""Golden files, read: tensors that the published implementation gave for known weights and inputs.

A golden file is NAME.safetensors with NAME.json beside it (or the same JSON in the safetensors metadata). The JSON
holds the published settings ("official_config_overrides"), the generator's own ("spec") and the meaning of each tensor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from pcm.documents import read_document
from pcm.errors import InputError
from pcm.official.state_dict import read_tensors

INPUTS = ("att_feats", "global_feats", "concept_embed", "tokens_ids", "target_ids", "clip_score")
# Published settings for which there is only one implementation here; a file made with another is refused.
_ONLY = {
    "MODEL.META_ARCHITECTURE": "TransformerEncoderDecoder",
    "MODEL.ENCODER": "GTransformerEncoder",
    "MODEL.DECODER": "TransformerDecoder",
    "MODEL.PREDICTOR": "BasePredictor",
    "MODEL.TOKEN_EMBED.NAME": "TokenBaseEmbedding",
    "MODEL.TOKEN_EMBED.ACTIVATION": "none",
    "MODEL.TOKEN_EMBED.USE_NORM": True,
    "MODEL.TOKEN_EMBED.POSITION": "SinusoidEncoding",
    "MODEL.VISUAL_EMBED.NAME": "VisualGridClipTagLREmbedding",
    "MODEL.VISUAL_EMBED.ACTIVATION": "relu",
    "MODEL.VISUAL_EMBED.USE_NORM": True,
    "MODEL.VISUAL_EMBED.CLIPTAG.REPLACE_TYPE": "top",
    "MODEL.VISUAL_EMBED.CLIPTAG.TYPE_VOCAB_SIZE": 2,
    "MODEL.BERT.HIDDEN_ACT": "relu",
    "SOLVER.NAME": "Adam",
    "SOLVER.GRAD_CLIP_TYPE": "value",
    "LR_SCHEDULER.NAME": "NoamLR",
}


@dataclass(frozen=True)
class Golden:
    """A golden file, read."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """A section of the JSON, empty where it is absent."""
        return self.description.get(name) or {}

    def setting(self, official: str, own: str, default: Any = None) -> Any:
        """A setting under its published name, or else under the generator's, or else the default; else InputError."""
        value = self.part("official_config_overrides").get(official, self.part("spec").get(own, default))
        if value is None:
            raise InputError(f"golden file without {official} or {own} in its description; it cannot be rebuilt")
        return value


def read_golden(path: str | Path) -> Golden:
    """Read NAME.safetensors with the NAME.json beside it, or with its description in the metadata.

    Raises InputError for anything unreadable, incomplete, or made with settings that are not implemented here.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: not a golden file; give a .safetensors file")
    tensors = read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    golden = Golden(tensors=tensors, description=_description(path, metadata))
    missing = [f"in.{name}" for name in INPUTS if f"in.{name}" not in tensors]
    if missing or not any(name.startswith("state.") for name in tensors):
        raise InputError(f"{path}: not a golden file; it lacks {', '.join([*missing, 'state.*'])}")
    settings = golden.part("official_config_overrides")
    for name, only in _ONLY.items():
        if settings.get(name, only) != only:
            raise InputError(f"{path}: made with {name} {settings[name]!r}; only {only!r} is implemented")
    conventions = golden.part("conventions")
    for name in ("bos_id", "eos_id", "input_pad_id"):
        if conventions.get(name, 0) != 0:
            raise InputError(f"{path}: made with {name} {conventions[name]}; only 0 is implemented")
    return golden


def _description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    try:
        if beside.is_file():
            description = read_document(beside.read_text(encoding="utf-8"))
        else:
            # One entry may hold the whole description, or each of its sections one.
            parsed = {
                key: read_document(value) for key, value in metadata.items() if value.lstrip().startswith(("{", "["))
            }
            whole = [value for value in parsed.values() if isinstance(value, dict) and "spec" in value]
            description = whole[0] if whole else parsed
    except (OSError, ValueError) as error:
        raise InputError(f"{beside}: not readable as JSON ({error})") from None
    if not isinstance(description, dict) or not (
        description.get("spec") or description.get("official_config_overrides")
    ):
        raise InputError(f"{path}: no description; expected {beside.name} beside it, with 'official_config_overrides'")
    return description
