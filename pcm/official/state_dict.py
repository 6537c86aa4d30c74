"""The state dict of published checkpoints: its parameter names and ours."""

import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.model import SINUSOID_BASE, PCMNet, sinusoid
from pcm.errors import InputError
from pcm.safe_pickle import reader as safe_pickle
from pcm.safe_pickle.torch_files import load_torch

#: Rows of the word-position table that published checkpoints hold; ours is computed.
OFFICIAL_POSITIONS = 5000
#: Its name there.
POSITION_KEY = "token_embed.embeddings_pos.pe"

# Our name -> published name. A trailing dot stands for ".weight" and ".bias".
_NAMES = {
    "word_embedding.embedding.weight": "token_embed.embeddings.weight",
    "word_embedding.norm.": "token_embed.embeddings_norm.",
    "visual_embedding.clip_head.ln_post_weight": "visual_embed.ln_post.weight",
    "visual_embedding.clip_head.ln_post_bias": "visual_embed.ln_post.bias",
    "visual_embedding.clip_head.proj": "visual_embed.proj",
    "visual_embedding.patch_projection.": "visual_embed.embeddings.",
    "visual_embedding.textual_projection.": "visual_embed.t_embeddings.",
    "visual_embedding.global_projection.": "visual_embed.g_embeddings.",
    "visual_embedding.position": "visual_embed.embeddings_pos",
    "visual_embedding.token_type.weight": "visual_embed.embeddings_token_type.weight",
    "visual_embedding.norm.": "visual_embed.embeddings_norm.",
    "encoder.global_fusion.": "encoder.gvfeat_embed.0.",
    "encoder.global_norm.": "encoder.gvfeat_embed.1.",
    "output.": "predictor.logits.",
}
# Inside a block: our sublayer -> the published one.
_ATTENTIONS = {
    "encoder.blocks.{}.attention.": "encoder.layers.{}.attention.",
    "decoder.{}.self_attention.": "decoder.g_layers.{}.self_attn.",
    "decoder.{}.cross_attention.": "decoder.g_layers.{}.x_att.",
}
_FEED_FORWARDS = {
    "encoder.blocks.{}.feed_forward.": "encoder.layers.{}.",
    "decoder.{}.feed_forward.": "decoder.g_layers.{}.",
}


def official_names(our_name: str) -> tuple[str, ...]:
    """The published names of one of our tensors; two for a fused key/value projection (keys first, then values).

    Raises KeyError for a name that is no parameter of a PCMNet.
    """
    for ours, official in _NAMES.items():
        if our_name == ours:
            return (official,)
        if ours.endswith(".") and our_name in (f"{ours}weight", f"{ours}bias"):
            return (official + our_name.removeprefix(ours),)
    number = re.search(r"\.(\d+)\.", our_name)
    kind = our_name.rsplit(".", 1)[-1]
    if number and kind in ("weight", "bias"):
        for ours, official in _ATTENTIONS.items():
            prefix, target = ours.format(number[1]), official.format(number[1])
            names = {
                "query": ("self.query",),
                "key_value": ("self.key", "self.value"),
                "output": ("output.dense",),
                "norm": ("output.LayerNorm",),
            }
            for part, parts in names.items():
                if our_name == f"{prefix}{part}.{kind}":
                    return tuple(f"{target}{name}.{kind}" for name in parts)
        for ours, official in _FEED_FORWARDS.items():
            prefix, target = ours.format(number[1]), official.format(number[1])
            parts_of_it = {"expand": "intermediate.dense", "contract": "output.dense", "norm": "output.LayerNorm"}
            for part, name in parts_of_it.items():
                if our_name == f"{prefix}{part}.{kind}":
                    return (f"{target}{name}.{kind}",)
    raise KeyError(our_name)


def to_official(state: dict[str, Tensor], *, positions: bool = True) -> dict[str, Tensor]:
    """Our state dict (or anything with its names and shapes, such as gradients) under the published names.

    `positions`: also make the published table of word positions, which our state dict does not hold.
    Raises KeyError for a name that is no parameter of a PCMNet.
    """
    result: dict[str, Tensor] = {}
    for our_name, tensor in state.items():
        names = official_names(our_name)
        result.update(zip(names, tensor.chunk(len(names), dim=0), strict=True))
    if positions:
        hidden_size = state["word_embedding.embedding.weight"].shape[1]
        result[POSITION_KEY] = sinusoid(OFFICIAL_POSITIONS, hidden_size).unsqueeze(0)  # (1, 5000, H)
    return result


def _is_sinusoid(table: Tensor) -> bool:
    """Whether a published table (1, length, H) is the network's own, computed on any machine."""
    if table.dim() != 3:
        return False
    _, length, hidden_size = table.shape
    return bool(((table[0] - sinusoid(length, hidden_size)).abs() <= position_rounding(length)).all())


def position_rounding(length: int) -> Tensor:
    """By how much two tables of word positions may differ, by position: (length, 1).

    A position times a frequency is rounded, and processors differ in the last bits of a frequency: the angle is off by
    up to 2^-22 of itself in each table, so positions far behind differ by more. The network reads the first few dozen.
    """
    return 1e-6 + torch.arange(length, dtype=torch.float32).unsqueeze(1) * 2.0**-21


def from_official(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names, ready for `PCMNet.load_state_dict`.

    Raises InputError, naming them, for missing or unknown tensors.
    """
    remaining = dict(official)
    table = remaining.pop(POSITION_KEY, None)
    if table is not None and not _is_sinusoid(table):
        raise InputError(f"{POSITION_KEY}: not the sinusoid table with base {SINUSOID_BASE:g} that PCM-Net uses")
    config = config_from_state(official)
    with torch.device("meta"):
        own_names = PCMNet(config).state_dict().keys()
    wanted = {name: official_names(name) for name in own_names}
    missing = [name for names in wanted.values() for name in names if name not in remaining]
    unknown = sorted(remaining.keys() - {name for names in wanted.values() for name in names})
    if missing or unknown:
        raise InputError(
            f"not a PCM-Net state dict: missing {missing[:4] or 'nothing'}, unknown {unknown[:4] or 'nothing'}"
        )
    return {name: torch.cat([remaining[part] for part in parts], dim=0) for name, parts in wanted.items()}


def config_from_state(official: dict[str, Tensor], **settings: Any) -> PCMNetConfig:
    """The sizes that a published state dict shows; `settings` adds what it cannot show (num_heads, num_concepts, ...).

    Without `num_heads`, heads are taken to be 64 wide, as in every published run.
    Raises InputError when it is no PCM-Net state dict.
    """

    def layers(pattern: str) -> int:
        return len({match[1] for name in official if (match := re.match(pattern, name))})

    try:
        vocab_size, hidden_size = official["token_embed.embeddings.weight"].shape
        patch_dim, embed_dim = official["visual_embed.proj"].shape
        num_patches = official["visual_embed.embeddings_pos"].shape[1] - 1
        intermediate_size = official["encoder.layers.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"not a PCM-Net state dict: {error} is missing or has another shape") from None
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "patch_dim": patch_dim,
        "embed_dim": embed_dim,
        "num_patches": num_patches,
        "intermediate_size": intermediate_size,
        "num_encoder_layers": layers(r"encoder\.layers\.(\d+)\."),
        "num_decoder_layers": layers(r"decoder\.g_layers\.(\d+)\."),
    }
    settings.setdefault("num_heads", hidden_size // 64 or 1)
    return PCMNetConfig(**{**sizes, **settings})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of a torch file (.pth), which is read without executing anything.

    A torch file may hold the state dict itself or {"model": state dict, ...}.
    Raises InputError, in one line, for a missing or unreadable file, or one that asks to execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        content = load_torch(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # torch raises many kinds; whichever, the file is refused and nothing was executed
        raise InputError(
            f"{path}: not a plain torch checkpoint, refused unexecuted ({_refused(path, error)})"
        ) from None
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no state dict; expected tensors by name, or {{'model': tensors by name}}")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _refused(path: Path, error: Exception) -> str:
    """What a torch file tried, as far as it can be known without reading it otherwise."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it names {named[1]}"
    try:  # PyTorch's restricted reader knows only the pickle protocol of torch.save; a plain pickle may have another
        safe_pickle.load(path)
    except InputError as refusal:
        named = re.search(r"the pickle names ([\w.]+)", str(refusal))
        return f"it names {named[1]}" if named else type(error).__name__
    return "a pickle that torch.save did not write"


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A published checkpoint (.pth or .safetensors) under our names. Raises InputError for any other file."""
    return from_official(read_tensors(path))
