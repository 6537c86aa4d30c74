"""Parts of tiny pipelines: decoders, text encoders and tokenizers, randomly initialised."""

import json
import tempfile
from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers
from open_clip.tokenizer import bytes_to_unicode
from tokenizers import Tokenizer, models, pre_tokenizers, processors

#: Letters, and the special tokens that the families' templates use.
SPECIALS = ("<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


@torch.no_grad()
def randomise(part: torch.nn.Module) -> None:
    """Transformers begin with layers of zeros, which would leave the prompt without effect."""
    for name, weight in part.named_parameters():
        if not weight.any() and not name.endswith("bias"):
            weight.normal_(std=0.1)


def vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4, sample_size=64,
        scaling_factor=0.36, shift_factor=0.1,
    )  # fmt: skip


def t5() -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )


def qwen3() -> transformers.Qwen3Model:
    return transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
        )
    )  # fmt: skip


def letters(*, chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A token a byte; `chat`: with a template for messages, whose texts may lie in lists."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512,
    )  # fmt: skip
    if chat:
        made.chat_template = CHAT
    return made


def clip_letters() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with the byte alphabet alone (512 entries, two specials): no merge, so a letter is a token."""
    alphabet = list(bytes_to_unicode().values())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def clip_text(kind: type = transformers.CLIPTextModel, *, width: int = 32) -> transformers.PreTrainedModel:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip


def movq() -> diffusers.VQModel:
    """Kandinsky's decoder."""
    return diffusers.VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, layers_per_block=1,
        norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def qwen_image_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
