"""One call of a diffusers pipeline, as a spec says it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcm.errors import InputError
from pcm.spec import GeneratorSpec


def call_pipeline(
    pipeline: Any, spec: GeneratorSpec, prompts: Sequence[str], seeds: Sequence[int], **changes: Any
) -> tuple[Tensor, Sequence[bool]]:
    """(pictures, flagged by the safety checker): (B, 3, H, W) in [0, 1] on the device that drew them, each from a CPU
    generator of its own.

    `changes` of the call's keywords. Raises InputError for a pipeline that returns no pictures.
    """
    output = pipeline(
        **_arguments(spec, len(prompts)) | changes,
        prompt=list(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    )
    images = getattr(output, "images", None)
    if not isinstance(images, Tensor) or images.shape[1:2] != (3,):
        raise InputError(
            f"text-to-image model {spec.model!r}: {type(pipeline).__name__} returns no pictures of three colours; "
            "give a text-to-image pipeline"
        )
    return images, getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)


def _arguments(spec: GeneratorSpec, batch_size: int) -> dict[str, Any]:
    arguments: dict = {"num_inference_steps": spec.num_inference_steps, **dict(spec.pipeline_options)}
    for name in ("guidance_scale", "width", "height"):
        if (value := getattr(spec, name)) is not None:
            arguments[name] = value
    if spec.negative_prompt is not None:
        arguments["negative_prompt"] = [spec.negative_prompt] * batch_size
    return arguments
