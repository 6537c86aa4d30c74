"""Tiny text-to-image pipelines of real families, randomly initialised: `save_pipeline(family, folder)`.

Pictures mean nothing; how prompts are padded, what the call takes and what it returns is each family's own.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers

from tests.helpers.tiny_parts import (
    clip_letters,
    clip_text,
    letters,
    movq,
    qwen3,
    qwen_image_vae,
    randomise,
    t5,
    vae,
)


def save_pipeline(family: str, folder: Path) -> Path:
    """Save a family's tiny pipeline, once: a folder that is there is left alone."""
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        pipeline = FAMILIES[family]()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                randomise(part)
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
        tokenizer=letters(), text_encoder=encoder, vae=vae(4), transformer=transformer,
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
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=qwen3(),
        tokenizer=letters(chat=True), transformer=transformer,
    )  # fmt: skip


def aura_flow() -> diffusers.DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=letters(), text_encoder=t5(), vae=vae(4), transformer=transformer,
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
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, norm_eps=1e-5, axes_dim_rope=(4, 2, 2), axes_lens=(300, 512, 512), cap_feat_dim=8,
    )  # fmt: skip
    small = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=0.1, scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=small,
        text_encoder=_gemma2(), tokenizer=letters(),
    )  # fmt: skip


def _diffusion_unet(**changes: object) -> diffusers.UNet2DConditionModel:
    values: dict = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**values | changes)


def _diffusion_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip


def _stable_diffusion(
    scheduler: object, kind: type = diffusers.StableDiffusionPipeline, **unet: object
) -> diffusers.DiffusionPipeline:
    return kind(
        vae=_diffusion_vae(), text_encoder=clip_text(), tokenizer=clip_letters(), unet=_diffusion_unet(**unet),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd15() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear")
    return _stable_diffusion(scheduler)


def sd2() -> diffusers.DiffusionPipeline:
    """Stable Diffusion 2.x, which predicts v."""
    return _stable_diffusion(diffusers.DDIMScheduler(prediction_type="v_prediction", steps_offset=1))


def sd_turbo() -> diffusers.DiffusionPipeline:
    """Known by its name: one step without guidance."""
    return _stable_diffusion(diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"))


def lcm() -> diffusers.DiffusionPipeline:
    return _stable_diffusion(diffusers.LCMScheduler(), diffusers.LatentConsistencyModelPipeline, time_cond_proj_dim=32)


def sdxl() -> diffusers.DiffusionPipeline:
    unet = _diffusion_unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_diffusion_vae(), text_encoder=clip_text(), text_encoder_2=clip_text(WITH_PROJECTION),
        tokenizer=clip_letters(), tokenizer_2=clip_letters(), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def sd3() -> diffusers.DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=300, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4),
        text_encoder=clip_text(WITH_PROJECTION), tokenizer=clip_letters(), text_encoder_2=clip_text(WITH_PROJECTION),
        tokenizer_2=clip_letters(), text_encoder_3=encoder, tokenizer_3=letters(),
    )  # fmt: skip


def flux() -> diffusers.DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=clip_text(),
        tokenizer=clip_letters(), text_encoder_2=t5(), tokenizer_2=letters(), transformer=transformer,
    )  # fmt: skip


def flux2_klein() -> diffusers.DiffusionPipeline:
    """FLUX.2 with a Qwen 3, whose layers 9, 18 and 27 the transformer reads."""
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
        layers_per_block=1,
    )  # fmt: skip
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=decoder, text_encoder=encoder,
        tokenizer=letters(chat=True), transformer=transformer,
    )  # fmt: skip


def pixart_sigma() -> diffusers.DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=letters(), text_encoder=t5(), vae=vae(4), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sana() -> diffusers.DiffusionPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=16,
    )  # fmt: skip
    decoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
        downsample_block_type="conv", scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=letters(), text_encoder=_gemma2(), vae=decoder, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def _gemma2() -> transformers.Gemma2Model:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4, sliding_window=2, pad_token_id=0,
        )
    )  # fmt: skip


def chroma() -> diffusers.DiffusionPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=64, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4), text_encoder=t5(), tokenizer=letters(),
        transformer=transformer,
    )  # fmt: skip


def kandinsky22() -> diffusers.DiffusionPipeline:
    """Prior and decoder together."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim_type="image_proj", cross_attention_dim=32,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift", class_embed_type=None,
    )  # fmt: skip
    sees = transformers.CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=1, patch_size=8,
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        movq=movq(), prior_tokenizer=clip_letters(), prior_text_encoder=clip_text(WITH_PROJECTION),
        prior_prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1
        ),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(sees),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
        prior_image_processor=transformers.CLIPImageProcessor(size=side, crop_size=side),
    )  # fmt: skip


def kandinsky3() -> diffusers.DiffusionPipeline:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    return diffusers.Kandinsky3Pipeline(
        tokenizer=letters(), text_encoder=t5(), unet=unet, scheduler=diffusers.DDPMScheduler(), movq=movq()
    )


def qwen_image() -> diffusers.DiffusionPipeline:
    """Embeddings are padded to the longest prompt of the batch."""
    text: dict = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e6, "max_position_embeddings": 2048,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=seen)
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=qwen_image_vae(), text_encoder=encoder,
        tokenizer=letters(chat=True), transformer=transformer,
    )  # fmt: skip


def nucleus_moe() -> diffusers.DiffusionPipeline:
    """A mixture of experts, each of which takes its share of a batch's tokens."""
    text: dict = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 9,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True},
    }  # fmt: skip
    seen: dict = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    encoder = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=seen)
    )
    tokenizer = letters(chat=True)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}
    )
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(), tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(), chat_template=tokenizer.chat_template,
    )  # fmt: skip
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), num_experts=4, moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    return diffusers.NucleusMoEImagePipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=qwen_image_vae(),
        text_encoder=encoder, processor=processor,
    )  # fmt: skip


def hunyuan_dit() -> diffusers.DiffusionPipeline:
    """A BERT and a T5. Sizes that it was not trained in become the nearest one that it was."""
    reads = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=vae(4), text_encoder=transformers.BertModel(reads), tokenizer=letters(), transformer=transformer,
        scheduler=diffusers.DDPMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=t5(), tokenizer_2=letters(),
    )  # fmt: skip


def omnigen() -> diffusers.DiffusionPipeline:
    """Prompt and picture in one sequence, padded to the longest of the batch."""
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1,
        in_channels=4, time_step_dim=4, rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]}, pad_token_id=0,
        vocab_size=300,
    )  # fmt: skip
    return diffusers.OmniGenPipeline(
        transformer=transformer, vae=vae(4), tokenizer=letters(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    )  # fmt: skip


WITH_PROJECTION = transformers.CLIPTextModelWithProjection
FAMILIES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "aura_flow": aura_flow, "chroma": chroma, "cogview4": cogview4, "flux": flux, "flux2_klein": flux2_klein,
    "hunyuan_dit": hunyuan_dit, "kandinsky22": kandinsky22, "kandinsky3": kandinsky3,
    "kandinsky_decoder": kandinsky_decoder, "lcm": lcm, "lumina2": lumina2, "nucleus_moe": nucleus_moe,
    "omnigen": omnigen, "pixart_sigma": pixart_sigma, "qwen_image": qwen_image, "sana": sana, "sd-turbo": sd_turbo,
    "sd15": sd15, "sd2": sd2, "sd3": sd3, "sdxl": sdxl, "z_image": z_image,
}  # fmt: skip
