"""A diffusers pipeline from a spec: weights of a pinned revision, scheduler, dtype, device."""

from pathlib import Path

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers

from pcm.errors import InputError
from pcm.spec import GeneratorSpec
from pcm.text_to_image import model_source

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(spec: GeneratorSpec) -> diffusers.DiffusionPipeline:
    source = model_source(spec.model)
    is_folder = Path(source).is_dir()
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
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"text-to-image model {spec.model!r} cannot be loaded: {first_line}; "
            "give a diffusers repo id, a folder saved by save_pretrained(), 'embedded' or 'null'"
        ) from error
    if spec.scheduler is not None:
        pipeline.scheduler = scheduler_class(spec.scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(spec.device)


def scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    """The diffusers scheduler of that class name. Raises InputError."""
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise InputError(
            f"scheduler {name!r}: not a diffusers scheduler; allowed are class names such as "
            "DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler, LCMScheduler"
        )
    return scheduler
