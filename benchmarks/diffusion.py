"""Images/s of a text-to-image pipeline with each speed option, as a ratio to the plain one.

    python -m benchmarks.diffusion --device cuda --dtype bfloat16      # a UNet of Stable Diffusion 1.5's size
    python -m benchmarks.diffusion --t2i NAME --device cuda            # any pipeline that jobs.generate takes
    python -m benchmarks.diffusion --t2i embedded --steps 8            # on a CPU
    python -m benchmarks.diffusion --size tiny --steps 1               # only that it runs

Without --t2i the pipeline has random weights and the architecture of Stable Diffusion 1.5 (UNet of 860 million
parameters, CLIP ViT-L/14 text encoder, VAE), so nothing is downloaded: speed does not depend on what the weights are.
A batch is drawn once to warm up (and compile), then --repeats times with plain batches between, so that a drifting
machine slows both; the median ratio counts. Pictures are drawn whole: text encoder, denoising, decoding, transfer;
encoding to JPEG runs beside. The last line of stdout is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers

from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import Request
from pcm.model_faults import free_memory, is_out_of_memory
from pcm.spec import DTYPES, GeneratorSpec

#: What is compared with the plain pipeline.
OPTIONS: dict[str, dict] = {
    "attention eager": {"attention": "eager"},
    "attention sdpa": {"attention": "sdpa"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": "default"},
    "compile reduce-overhead": {"compile": "reduce-overhead"},
    "compile + channels_last": {"compile": "default", "channels_last": True},
    "vae_slicing": {"vae_slicing": True},
    "vae_tiling": {"vae_tiling": True},
    "prompt_cache": {"prompt_cache": True},
    "LCM, 4 steps": {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0},
}


def save_stable_diffusion(folder: Path, *, size: str) -> Path:
    """A StableDiffusionPipeline of random weights; "sd15": the published sizes, "tiny": the same blocks, narrow."""
    tiny = size == "tiny"
    widths = (32, 64, 64, 64) if tiny else (320, 640, 1280, 1280)
    text_width = 32 if tiny else 768
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8 if tiny else 64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width, attention_head_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32) if tiny else (128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64 if tiny else 512,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder / "bpe")
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width, max_position_embeddings=77,
            num_hidden_layers=2 if tiny else 12, num_attention_heads=text_width // 16 if tiny else 12,
            bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
        )
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """CLIP's own tokenizer, written to a folder from the vocabulary that open_clip brings."""
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder.mkdir(parents=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({names.get(word, word): number for word, number in own.encoder.items()}))
    ranked = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    merges.write_text("\n".join(("#version: 0.2", *(" ".join(pair) for pair in ranked), "")))
    return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


class Drawer:
    """A pipeline with a spec's options, and how long a batch of it takes."""

    def __init__(self, spec: GeneratorSpec) -> None:
        self._generator = DiffusersTextToImage(spec)
        self._batch_size = spec.batch_size
        self._drawn = 0

    def images_per_second(self) -> float:
        captions = [f"A photo of {self._drawn + slot} cats." for slot in range(self._batch_size)]
        requests = {slot: Request(position=slot, caption=text, seed=slot) for slot, text in enumerate(captions)}
        self._drawn += self._batch_size
        started = time.perf_counter()
        self._generator.draw_batch(requests, self._batch_size)
        return self._batch_size / (time.perf_counter() - started)


def host_waits(model: Path, *, batch_size: int, steps: int) -> int:
    """How often the host waits for the GPU while a batch is drawn; needs one."""
    spec = GeneratorSpec(
        model=str(model), revision="main", num_inference_steps=steps, device="cuda", dtype="bfloat16",
        batch_size=batch_size,
    )  # fmt: skip
    drawer = Drawer(spec)
    drawer.images_per_second()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawer.images_per_second()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def compare(spec: GeneratorSpec, names: list[str], repeats: int) -> dict[str, dict]:
    plain = Drawer(spec)
    plain.images_per_second()
    report: dict[str, dict] = {}
    for name in names:
        started = time.perf_counter()
        try:
            fast = Drawer(replace(spec, **OPTIONS[name]))
            fast.images_per_second()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            report[name] = {"ratio": None, "reason": "out of memory"}
        else:
            ready = time.perf_counter() - started
            pairs = [(plain.images_per_second(), fast.images_per_second()) for _ in range(repeats)]
            report[name] = {
                "images_per_second": round(median(pair[1] for pair in pairs), 4),
                "plain_images_per_second": round(median(pair[0] for pair in pairs), 4),
                "ratio": round(median(pair[1] / pair[0] for pair in pairs), 3),
                "load_and_warm_up_seconds": round(ready, 1),
            }
            del fast
        free_memory()
        print(f"{name}: {report[name]}", file=sys.stderr, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t2i", help="a pipeline; default: random weights")
    parser.add_argument("--size", default="sd15", choices=("sd15", "tiny"), help="of the random weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=OPTIONS, metavar="NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.t2i or str(save_stable_diffusion(Path(folder), size=args.size))
        spec = GeneratorSpec(
            model=model, revision="main", num_inference_steps=args.steps, device=args.device, dtype=args.dtype,
            batch_size=args.batch_size,
        )  # fmt: skip
        report = compare(spec, args.options, args.repeats)
        waits = None
        if args.device == "cuda":
            waits = host_waits(Path(model), batch_size=args.batch_size, steps=args.steps)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {"device": device, "dtype": args.dtype, "steps": args.steps, "batch_size": args.batch_size}
    print(json.dumps({"pipeline": args.t2i or args.size, **settings, "host_waits": waits, "options": report}))


if __name__ == "__main__":
    main()
