"""Real models of a size that a test can afford, saved in the formats that users have."""

import json
from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import open_clip
import transformers
from safetensors.torch import save_file

from tests.helpers.tiny_parts import clip_letters


def save_tiny_clip(folder: Path, *, seed: int = 0, width: int = 64) -> Path:
    """A randomly initialised open_clip ViT folder: 32 px, patch 8 (16 patches of 64), D = 32, open_clip's tokenizer."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    }
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_tiny_t2i(folder: Path, *, seed: int = 0) -> Path:
    """A randomly initialised Stable Diffusion folder: 32 px pictures from 16x16 latents, byte-level prompts."""
    torch.manual_seed(seed)
    tokenizer = clip_letters()
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=100), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_resnet_clip(folder: Path) -> Path:
    """A randomly initialised open_clip ResNet folder: 32 px, no tokens, D = 32."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.model.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder
