"""The arguments of `jobs.generate` that determine a dataset, and the spec that they mean."""

import argparse
import json

from cluster.generation.pinning import check_scheduler, clip_spec, pin_t2i, resolve_device, resolve_dtype
from pcm.errors import InputError
from pcm.images import IMAGE_FORMATS
from pcm.spec import ATTENTIONS, COMPILE_MODES, DEVICES, DTYPES, DatasetSpec, GeneratorSpec

AUTO = "auto"


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures (all recorded in the manifest)")
    pictures.add_argument("--t2i", help="diffusers repo id, folder, 'embedded' (the default) or 'null'")
    pictures.add_argument("--t2i-revision", help="commit of the repo; a branch is resolved to its commit")
    pictures.add_argument("--steps", type=int, help="denoising steps; default 50, embedded 8")
    pictures.add_argument("--guidance-scale", type=float, help="classifier-free guidance; default 7.5, embedded 3.0")
    pictures.add_argument("--width", type=int, help="pixels; default: the model's own")
    pictures.add_argument("--height", type=int, help="pixels; default: the model's own")
    pictures.add_argument("--scheduler", help="diffusers scheduler class; default: the model's own")
    pictures.add_argument(
        "--scheduler-option", action="append", default=[], metavar="NAME=VALUE",
        help="of the scheduler's configuration: timestep_spacing=trailing, use_karras_sigmas=true, ...; repeatable",
    )  # fmt: skip
    pictures.add_argument("--negative-prompt")
    pictures.add_argument("--prompt-template", default="{caption}")
    pictures.add_argument("--images-per-caption", type=int, default=1)
    pictures.add_argument("--seed", type=int, default=0)
    pictures.add_argument("--max-attempts", type=int, default=3, help="seeds tried before a bad picture is quarantined")
    pictures.add_argument("--image-format", default="jpeg", choices=IMAGE_FORMATS)
    pictures.add_argument("--image-quality", type=int, default=95)
    clip = parser.add_argument_group("scores and features")
    clip.add_argument("--clip", help="open_clip NAME; default: embedded, or null with --t2i null")
    clip.add_argument("--clip-revision", help="commit, for hf-hub: names")
    clip.add_argument("--clip-batch-size", type=int, default=32)
    speed = parser.add_argument_group(
        "device and speed (recorded too: another batch shape or kernel rounds differently)",
        "Few-step models need their scheduler, steps and guidance: LCM --scheduler LCMScheduler --steps 4 "
        "--guidance-scale 1; Turbo --steps 1 to 4 --guidance-scale 0; Lightning and Hyper-SD also --scheduler-option "
        "timestep_spacing=trailing.",
    )
    speed.add_argument("--device", default="auto", choices=DEVICES)
    speed.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    speed.add_argument(
        "--batch-size", default="8", metavar="N|auto", help="pictures drawn at once; auto measures first"
    )
    speed.add_argument("--attention", default="default", choices=ATTENTIONS, help="default is torch's fused one")
    speed.add_argument("--channels-last", action="store_true", help="convolutions in NHWC")
    speed.add_argument(
        "--compile", nargs="?", const="default", default="none", choices=COMPILE_MODES, help="the denoiser"
    )
    speed.add_argument("--vae-slicing", action="store_true", help="decode picture by picture: less memory")
    speed.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    speed.add_argument("--prompt-cache", action="store_true", help="encode each distinct prompt once, alone")


def dataset_spec(args: argparse.Namespace, *, gpus: float) -> DatasetSpec:
    """The spec that the arguments mean, with every default resolved and every revision pinned.

    With --batch-size auto its batch size is a placeholder. Raises InputError.
    """
    options = dict(_option(text) for text in args.scheduler_option)
    check_scheduler(args.scheduler, options)
    device = resolve_device(args.device, cluster_gpus=gpus)
    dtype = resolve_dtype(args.dtype, device=device)
    t2i = args.t2i or "embedded"
    embedded = t2i == "embedded"
    steps = args.steps if args.steps is not None else (8 if embedded else 50)
    guidance = args.guidance_scale if args.guidance_scale is not None else (3.0 if embedded else 7.5)
    clip = args.clip or ("null" if t2i == "null" else "embedded")
    return DatasetSpec(
        generator=GeneratorSpec(
            model=t2i,
            revision=pin_t2i(t2i, args.t2i_revision),
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=args.width,
            height=args.height,
            scheduler=args.scheduler,
            negative_prompt=args.negative_prompt,
            prompt_template=args.prompt_template,
            dtype=dtype,
            device=device,
            batch_size=GeneratorSpec.batch_size if args.batch_size == AUTO else _batch_size(args.batch_size),
            max_attempts=args.max_attempts,
            image_format=args.image_format,
            image_quality=args.image_quality,
            scheduler_options=tuple(options.items()),
            attention=args.attention,
            channels_last=args.channels_last,
            compile=args.compile,
            vae_slicing=args.vae_slicing,
            vae_tiling=args.vae_tiling,
            prompt_cache=args.prompt_cache,
        ),
        clip=clip_spec(
            clip,
            revision=args.clip_revision,
            dtype=dtype,
            device=device,
            batch_size=args.clip_batch_size,
        ),
        seed=args.seed,
        images_per_caption=args.images_per_caption,
    )


def _batch_size(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--batch-size {text}: write a number of pictures, or auto")
    return int(text)


def _option(text: str) -> tuple[str, str | int | float | bool]:
    """("use_karras_sigmas", True) of "use_karras_sigmas=true"."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--scheduler-option {text!r}: write NAME=VALUE, such as timestep_spacing=trailing")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, (int, float, bool)) else value
