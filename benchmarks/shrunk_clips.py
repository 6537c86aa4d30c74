"""Every open_clip architecture at two layers and a small width, with random weights in place of a tag's download.

Its own preprocessing, activation, pooling, heads and tokenizer kind stay: what is compared is how a model is put
together, not how large it is.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
import timm
import transformers
from timm.models.vitamin import VitCfg, VitConvCfg
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WIDTH = 32
_WORDS = ("a", "the", "on", "cat", "dog", "beach", "two", "hats", "photo", "of")
_VOCABULARY = 64
#: What tells one size of a family from another, and nothing else.
_SIZES = {
    "embed_dim", "image_size", "layers", "width", "heads", "head_width", "patch_size", "mlp_ratio", "vocab_size",
    "context_length", "timm_model_name", "timm_drop_path", "vision_cfg", "text_cfg", "multimodal_cfg", "hf_model_name",
    "hf_tokenizer_name", "attn_pooler_heads",
}  # fmt: skip
_PLACES = ("url", "hf_hub")

_VIT = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2}
#: What makes a timm model small, by the module that defines it.
_TIMM_SIZES: dict[str, dict[str, Any]] = {
    "vision_transformer": _VIT,
    "vision_transformer_hybrid": {"depth": 2},  # the width is that of its convolutional stem
    "vision_transformer_relpos": _VIT,
    "eva": _VIT,
    "vitamin": _VIT
    | {
        "embed_cfg": VitCfg(
            embed_dim=(8, 16, WIDTH),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        )
    },
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, WIDTH)},
    "swin_transformer": {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
}


@contextlib.contextmanager
def shrunk(architecture: str, folder: Path, *, config: dict[str, Any] | None = None) -> Iterator[Path]:
    """Within, open_clip makes this architecture small, and each of its tags loads the file that is yielded.

    `config` replaces the architecture's own. Text models and tokenizers of the hub are replaced by tiny ones in
    `folder`, and the file is written there.
    """
    small = _small_config(config or open_clip.get_model_config(architecture), folder)
    make_timm = timm.create_model

    def make_small_timm(name: str, **settings: Any) -> torch.nn.Module:
        return make_timm(name, **(_timm_sizes(name) | settings))

    registry = open_clip.factory._MODEL_CONFIGS
    with (
        mock.patch.dict(registry, {architecture: small}),
        mock.patch.object(open_clip.timm_model.timm, "create_model", make_small_timm),
    ):
        weights = folder / f"{architecture}.safetensors"
        save_file(_random_weights(architecture), weights)

        def download(*args: object, **settings: object) -> str:
            return str(weights)

        with (
            mock.patch.object(open_clip.pretrained, "download_pretrained_from_hf", download),
            mock.patch.object(open_clip.pretrained, "download_pretrained_from_url", download),
        ):
            yield weights


def distinct_tags() -> list[tuple[str, str]]:
    """One (architecture, tag) of every way in which open_clip's pretrained models are put together: what is left of
    the architecture's configuration without its sizes, and the tag's own configuration.
    """
    found: dict[str, tuple[str, str]] = {}
    for architecture, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(architecture)
        timm_name = config["vision_cfg"].get("timm_model_name")
        parts = [
            {key: value for key, value in part.items() if key not in _SIZES}
            for part in (config, config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg", {}))
        ]
        tower = timm.models.model_entrypoint(timm_name).__module__ if timm_name else _layers(config["vision_cfg"])
        own = {
            key: value for key, value in open_clip.get_pretrained_cfg(architecture, tag).items() if key not in _PLACES
        }
        found.setdefault(json.dumps([tower, parts, own], sort_keys=True), (architecture, tag))
    return list(found.values())


def _layers(vision: dict[str, Any]) -> str:
    return type(vision["layers"]).__name__


def _random_weights(architecture: str) -> dict[str, torch.Tensor]:
    """Weights that no layer starts with, so that every layer matters: norms are not the identity, biases not zero."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, load_weights=False, pretrained_text=False)
    generator = torch.Generator().manual_seed(1)
    return {
        name: _changed(tensor, generator).contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }


def _changed(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim == 4:  # convolutions, of which there are many: they must not blur all pictures to the same
        return noise * (2 / tensor[0].numel()) ** 0.5
    return tensor + 0.05 * noise


def _small_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    small = copy.deepcopy(config)
    vision, text = small["vision_cfg"], small["text_cfg"]
    small["embed_dim"] = WIDTH
    if isinstance(vision.get("layers"), list):  # ResNet: its attention pooling has heads of 64
        small["embed_dim"] = 64
        vision |= {"layers": [1, 1, 1, 1], "width": 8}
    elif "timm_model_name" not in vision:
        vision |= {"layers": 2, "width": WIDTH, "head_width": WIDTH // 2}
    for part in (vision, small.get("multimodal_cfg", {})):
        if "attn_pooler_heads" in part:
            part["attn_pooler_heads"] = 2
    for part in filter(None, (text, small.get("multimodal_cfg"))):
        if "hf_model_name" not in part:
            part |= {"layers": 2, "width": WIDTH, "heads": 2}
    if text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(_save_tokenizer(folder / "tokenizer"))
        if "vocab_size" in text:
            text["vocab_size"] = _VOCABULARY
    if text.get("hf_model_name"):
        text["hf_model_name"] = str(_save_text_model(text["hf_model_name"], folder / "text"))
        text.setdefault("hf_proj_type", "linear")
    return small


def _timm_sizes(name: str) -> dict[str, Any]:
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family == "fastvit":
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 16, 32, 32, 32)[:stages]}
    return _TIMM_SIZES[family]


def _save_text_model(name: str, folder: Path) -> Path:
    """The configuration of a text model of the same kind."""
    size: dict[str, Any] = {"vocab_size": _VOCABULARY, "pad_token_id": 1}
    bert = {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 90,
    }  # fmt: skip
    if "nllb" in name:
        made = transformers.M2M100Config(
            d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, **size,
        )  # fmt: skip
    elif "mt5" in name:
        made = transformers.MT5Config(d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, **size)
    elif "xlm" in name:
        made = transformers.XLMRobertaConfig(**bert, **size)
    else:
        made = transformers.RobertaConfig(**bert, **size)
    made.save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path) -> Path:
    """A word tokenizer of a few words, with the special tokens that the hub's have."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        sep_token="</s>", cls_token="<s>",
    ).save_pretrained(folder)  # fmt: skip
    return folder
