"""Tiny text-to-image pipelines of real families, randomly initialised: `save_pipeline(family, folder)`.

Pictures mean nothing; how prompts are padded, what the call takes and what it returns is each family's own.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

#: Letters, and the special tokens that the families' templates use.
SPECIALS = ("<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")


def save_pipeline(family: str, folder: Path) -> Path:
    """Save a family's tiny pipeline, once: a folder that is there is left alone."""
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        pipeline = FAMILIES[family]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                _randomise(part)
        pipeline.save_pretrained(folder)
    return folder


def cogview4() -> diffusers.DiffusionPipeline:
    """Prompts are padded to the longest of the batch, on the left and without a mask."""
    encoder = transformers.GlmModel(
        transformers.GlmConfig(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, pad_token_id=0,
        )
    )  # fmt: skip
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return diffusers.CogView4Pipeline(
        tokenizer=_letters(), text_encoder=encoder, vae=_vae(4), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def z_image() -> diffusers.DiffusionPipeline:
    """Embeddings of their own length, which the transformer pads to the longest of the batch."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(4), text_encoder=_qwen3(),
        tokenizer=_letters(chat=True), transformer=transformer,
    )  # fmt: skip


def aura_flow() -> diffusers.DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=_letters(), text_encoder=_t5(), vae=_vae(4), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def kandinsky_decoder() -> diffusers.DiffusionPipeline:
    """Kandinsky 2.2's decoder alone, which is given image embeddings and no prompt."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj",
        encoder_hid_dim=32, cross_attention_dim=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, class_embed_type=None,
    )  # fmt: skip
    movq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
    return diffusers.KandinskyV22Pipeline(unet=unet, scheduler=diffusers.DDIMScheduler(), movq=movq)


def lumina2() -> diffusers.DiffusionPipeline:
    """The transformer cuts what all prompts of a batch do not need, and drops the mask where they are as long.

    The decoder has one block and so does not enlarge; the pipeline takes it for one that enlarges by 8.
    """
    encoder = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4, sliding_window=2, pad_token_id=0,
        )
    )  # fmt: skip
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, norm_eps=1e-5, axes_dim_rope=(4, 2, 2), axes_lens=(300, 512, 512), cap_feat_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=0.1, scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=encoder,
        tokenizer=_letters(),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "cogview4": cogview4, "z_image": z_image, "aura_flow": aura_flow, "kandinsky_decoder": kandinsky_decoder,
    "lumina2": lumina2,
}  # fmt: skip


@torch.no_grad()
def _randomise(part: torch.nn.Module) -> None:
    """Transformers begin with layers of zeros, which would leave the prompt without effect."""
    for name, weight in part.named_parameters():
        if not weight.any() and not name.endswith("bias"):
            weight.normal_(std=0.1)


def _vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4, sample_size=64,
        scaling_factor=0.36, shift_factor=0.1,
    )  # fmt: skip


def _t5() -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )


def _qwen3() -> transformers.Qwen3Model:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
        )
    )  # fmt: skip


def _letters(*, chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512,
    )  # fmt: skip
    if chat:
        made.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return made
