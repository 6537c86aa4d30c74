"""Stable Diffusion 1.x as model sites have it: one file of weights under the names of the original code."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: (diffusers' part of a name, the original's), in turn.
_UNET = (
    ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)  # fmt: skip
_RESNET = (
    (".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".time_emb_proj.", ".emb_layers.1."),
    (".norm2.", ".out_layers.0."), (".conv2.", ".out_layers.3."), (".conv_shortcut.", ".skip_connection."),
)  # fmt: skip
_VAE = (
    (".conv_shortcut.", ".nin_shortcut."), ("conv_norm_out.", "norm_out."), ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."), ("mid_block.attentions.0.", "mid.attn_1."), (".group_norm.", ".norm."),
    (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out."),
)  # fmt: skip


def save_original(folder: Path, file: Path, *, layers_per_block: int = 1) -> Path:
    """The weights of a diffusers folder of Stable Diffusion 1.x in one file, as the original code names them."""
    unet = load_file(folder / "unet" / WEIGHTS)
    attended = {name.split(".")[1] for name in unet if name.startswith("up_blocks.") and ".attentions." in name}
    named = {f"model.diffusion_model.{_of_unet(name, layers_per_block, attended)}": unet[name] for name in unet}
    vae = load_file(folder / "vae" / WEIGHTS)
    levels = 1 + max(int(name.split(".")[2]) for name in vae if ".up_blocks." in name)
    named |= {f"first_stage_model.{_of_vae(name, levels)}": _as_convolution(name, vae[name]) for name in vae}
    text = load_file(folder / "text_encoder" / "model.safetensors")
    for name in text:
        named["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = text[name]
    save_file({name: weight.contiguous() for name, weight in named.items()}, file)
    return file


def _of_unet(name: str, layers: int, attended: set[str]) -> str:
    for ours, original in _UNET:
        if name.startswith(ours):
            name = name.replace(ours, original, 1)
    if ".resnets." in name or name.startswith(("middle_block.0.", "middle_block.2.")):
        for ours, original in _RESNET:
            name = name.replace(ours, original)

    def place(found: re.Match[str]) -> str:
        side, block, part, layer = found.groups()
        first = int(block) * (layers + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op."
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if block in attended else 1}.conv."
        number = first + int(layer) + (1 if side == "down" else 0)
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(part == 'attentions')}."

    name = re.sub(r"^(down|up)_blocks\.(\d+)\.(downsamplers|upsamplers)\.(\d+)\.conv\.", place, name)
    return re.sub(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", place, name)


def _of_vae(name: str, levels: int) -> str:
    for ours, original in _VAE:
        name = name.replace(ours, original)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{levels - 1 - int(found[1])}.block.", name)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f"up.{levels - 1 - int(found[1])}.upsample.", name
    )


def _as_convolution(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The original's attention is of convolutions of one pixel."""
    return weight[:, :, None, None] if ".attentions." in name and weight.ndim == 2 else weight
