"""A diffusers pipeline from a spec: weights of a pinned revision, scheduler, dtype, device, and what makes it fast."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from pcm.errors import InputError, first_line
from pcm.generation.names import model_source
from pcm.generation.own_code import refuse_own_code
from pcm.generation.prompt_cache import cache_prompts
from pcm.spec import GeneratorSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(spec: GeneratorSpec) -> diffusers.DiffusionPipeline:
    source = model_source(spec.model)
    is_folder = Path(source).is_dir()
    if is_folder:
        refuse_own_code(Path(source))
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source,
            revision=None if is_folder else spec.revision,
            dtype=_DTYPES[spec.dtype],
            use_safetensors=True,
            local_files_only=is_folder,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"text-to-image model {spec.model!r} cannot be loaded: {first_line(error)}; "
            "give a diffusers repo id, a folder saved by save_pretrained(), 'embedded' or 'null'"
        ) from error
    return prepare_pipeline(pipeline, spec)


def prepare_pipeline(pipeline: Any, spec: GeneratorSpec) -> diffusers.DiffusionPipeline:
    """Put the spec's scheduler, device and speed options on a pipeline that is loaded. Raises InputError."""
    if spec.scheduler is not None or spec.scheduler_options:
        kind = type(pipeline.scheduler) if spec.scheduler is None else scheduler_class(spec.scheduler)
        check_scheduler_options(kind, (name for name, _ in spec.scheduler_options))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **dict(spec.scheduler_options))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(spec.device)
    denoiser = _denoiser(pipeline, spec)
    _set_attention(denoiser, spec.attention)
    decoder: Any = getattr(pipeline, "vae", None)
    if spec.channels_last:
        for module in (denoiser, decoder):
            if module is not None:
                module.to(memory_format=torch.channels_last)
    for name, wanted in (("slicing", spec.vae_slicing), ("tiling", spec.vae_tiling)):
        if wanted:
            if not hasattr(decoder, f"enable_{name}"):
                raise InputError(f"vae_{name}: the decoder of {spec.model} has none; leave the option out")
            getattr(decoder, f"enable_{name}")()
    cache_prompts(pipeline, each_alone=spec.prompt_cache)
    if spec.compile != "none":
        from torch._inductor import config as inductor  # seconds to import, and few need it

        # Inductor times some kernels to choose among them; which one wins must not depend on the worker.
        inductor.deterministic = True
        denoiser.compile(mode=spec.compile, dynamic=False)  # every batch has one shape, so it compiles once
    return pipeline


def _denoiser(pipeline: Any, spec: GeneratorSpec) -> Any:
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipeline, name, None), torch.nn.Module):
            return module
    raise InputError(f"text-to-image model {spec.model!r}: has neither a unet nor a transformer; give another pipeline")


def _set_attention(denoiser: Any, attention: str) -> None:
    if attention == "default":
        return
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        processor = AttnProcessor2_0() if attention == "sdpa" else AttnProcessor()
        denoiser.set_attn_processor(processor)  # type: ignore[attr-defined]  # of a mixin that mypy cannot see
    elif attention == "sdpa":
        denoiser.set_attention_backend("native")
    else:
        raise InputError(f"attention {attention!r}: a {type(denoiser).__name__} has default and sdpa; choose one")


def scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    """The diffusers scheduler of that class name. Raises InputError."""
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise InputError(
            f"scheduler {name!r}: not a diffusers scheduler; allowed are class names such as "
            "DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler, LCMScheduler"
        )
    return scheduler


def check_scheduler_options(scheduler: type[diffusers.SchedulerMixin], names: Iterable[str]) -> None:
    """Raises InputError for a name that this scheduler does not know: diffusers itself would ignore it."""
    allowed = [name for name in inspect.signature(scheduler.__init__).parameters if name != "self"]
    for name in names:
        if name not in allowed:
            raise InputError(f"{scheduler.__name__} option {name!r}: allowed are {', '.join(allowed)}")
