"""A diffusers pipeline from a spec: weights of a pinned revision, scheduler, dtype, device, and what makes it fast."""

import copy
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.models.attention_processor import ADDED_KV_ATTENTION_PROCESSORS, AttnProcessor, AttnProcessor2_0
from torch.utils._pytree import tree_map_only

from pcm.errors import InputError, first_line
from pcm.generation.model_memory import available_here, refuse_too_large
from pcm.generation.names import model_source, split_repo_file
from pcm.generation.neighbour_test import LONG, SHORT
from pcm.generation.own_code import refuse_own_code
from pcm.generation.pipeline_call import call_pipeline
from pcm.generation.pipeline_signature import absent_parts, pipeline_class
from pcm.generation.prompt_cache import cache_prompts
from pcm.generation.scheduler import build_scheduler, check_steps
from pcm.model_faults import is_out_of_memory
from pcm.precision import whole_float32
from pcm.spec import GeneratorSpec

#: Decoders whose `decoder` is a plain function of the latents.
PLAIN_DECODERS = (diffusers.AutoencoderKL, diffusers.AutoencoderTiny, diffusers.AutoencoderDC, diffusers.VQModel)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(spec: GeneratorSpec) -> diffusers.DiffusionPipeline:
    """The spec's pipeline with everything that is fused into it or put on it. Raises InputError."""
    if Path(model_source(spec.model)).is_dir():
        refuse_own_code(Path(model_source(spec.model)))
    refuse_too_large(spec, *available_here(spec.device))
    whole_float32()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = _load_parts(spec)
        _check_dtype(pipeline, spec)
        _fuse_loras(pipeline, spec)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SingleFileComponentError) as error:
        if is_out_of_memory(error):
            raise _too_large(spec, error) from error
        hint = "give a diffusers repo id, a folder saved by save_pretrained(), 'embedded' or 'null'"
        if "variant" in str(error) or "no file named" in str(error):
            hint = "where its files are named *.fp16.safetensors, give --t2i-variant fp16; pickles (.bin) are not read"
            if spec.variant is not None:
                hint = f"if it has no files *.{spec.variant}.safetensors, leave --t2i-variant out"
        if Path(spec.model).is_file():
            hint = f"its weights must be those of {spec.config}: give the --t2i-config that fits them"
        raise InputError(f"text-to-image model {spec.model!r} cannot be loaded: {first_line(error)}; {hint}") from error
    return prepare_pipeline(pipeline, spec)


def _load_parts(spec: GeneratorSpec) -> Any:
    source, dtype = model_source(spec.model), _DTYPES[spec.dtype]
    parts: dict[str, Any] = dict.fromkeys(spec.without)
    if spec.vae is not None:
        parts["vae"] = diffusers.AutoModel.from_pretrained(
            spec.vae, dtype=dtype, use_safetensors=True, trust_remote_code=False, **_where(spec.vae, spec.vae_revision)
        )
    if Path(source).is_file():
        assert spec.config is not None  # the pinning asks for it
        kind = pipeline_class(spec.config, spec.config_revision)
        where = _where(spec.config, spec.config_revision)
        return kind.from_single_file(source, config=spec.config, torch_dtype=dtype, **where, **parts)
    parts |= dict.fromkeys(absent_parts(spec.model, spec.revision))
    return diffusers.DiffusionPipeline.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        variant=spec.variant,
        trust_remote_code=False,
        **_where(source, spec.revision),
        **parts,
    )


def _where(source: str, revision: str | None) -> dict[str, Any]:
    """What a loader is told of a folder, or of a repo at a commit."""
    return {"local_files_only": True} if Path(source).is_dir() else {"revision": revision}


def _check_dtype(pipeline: Any, spec: GeneratorSpec) -> None:
    """Raises InputError where the denoiser is of another dtype: a release of diffusers to which the loader's argument
    is not known passes over it. Some layers stay in float32 whatever is asked for."""
    found = {weight.dtype for weight in _denoiser(pipeline, spec).parameters() if weight.is_floating_point()}
    if found and _DTYPES[spec.dtype] not in found:
        there = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise InputError(
            f"dtype {spec.dtype}: diffusers {diffusers.__version__} has loaded {spec.model} as {there}; install the "
            f"release in constraints.txt, or give --dtype {there}"
        )


def _fuse_loras(pipeline: Any, spec: GeneratorSpec) -> None:
    if not spec.loras:
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"--lora: a {type(pipeline).__name__} takes none; leave it out")
    names = []
    for number, (name, revision, _) in enumerate(spec.loras):
        path, file = (name, None) if Path(name).is_file() else split_repo_file(name)
        where = {} if Path(name).is_file() else {"weight_name": file, "revision": revision}
        names.append(f"lora_{number}")
        pipeline.load_lora_weights(path, adapter_name=names[-1], use_safetensors=True, **where)
    if missing := set(names) - {name for found in pipeline.get_list_adapters().values() for name in found}:
        wanted = ", ".join(spec.loras[int(name.rpartition("_")[2])][0] for name in sorted(missing))
        raise InputError(f"--lora {wanted}: has no weights for a {type(pipeline).__name__}; give one made for it")
    pipeline.set_adapters(names, [weight for *_, weight in spec.loras])
    # Its default leaves out parts that were loaded into: FLUX's text encoder.
    parts = [part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None]
    pipeline.fuse_lora(components=parts, adapter_names=names)
    pipeline.unload_lora_weights()


def _too_large(spec: GeneratorSpec, error: BaseException) -> InputError:
    return InputError(
        f"text-to-image model {spec.model!r} does not fit into the memory of {spec.device} as {spec.dtype} "
        f"({first_line(error)}); give --dtype bfloat16, --offload model, or a GPU with more memory"
    )


def prepare_pipeline(pipeline: Any, spec: GeneratorSpec) -> diffusers.DiffusionPipeline:
    """Put the spec's scheduler, device and speed options on a pipeline that is loaded. Raises InputError."""
    _set_scheduler(pipeline, spec)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = _denoiser(pipeline, spec)
    _set_attention(denoiser, spec.attention)
    decoder: Any = getattr(pipeline, "vae", None)
    if spec.channels_last:
        for module in (denoiser, decoder):
            if module is not None:
                if any(weight.dim() == 5 for weight in module.parameters()):
                    raise InputError(
                        f"--channels-last: the {type(module).__name__} of {spec.model} has weights of 5 dimensions, "
                        "which have no such order; leave it out"
                    )
                module.to(memory_format=torch.channels_last)
    # A part that is offloaded comes back to the forward that it has now, and a layer to the weights that it has now.
    cache_prompts(pipeline, each_alone=spec.prompt_cache)
    _place(pipeline, spec)
    for name, wanted in (("slicing", spec.vae_slicing), ("tiling", spec.vae_tiling)):
        if wanted:
            if not hasattr(decoder, f"enable_{name}"):
                raise InputError(f"vae_{name}: the decoder of {spec.model} has none; leave the option out")
            getattr(decoder, f"enable_{name}")()
    if spec.compile != "none":
        refuse_varying_shapes(pipeline, spec)
        from torch._inductor import config as inductor  # seconds to import, and few need it

        # Inductor times some kernels to choose among them; which one wins must not depend on the worker.
        inductor.deterministic = True
        # Every batch has one shape, so each compiles once. A decoder's tiles have several.
        parts = [denoiser] if spec.vae_tiling else [denoiser, *decoding_part(decoder)]
        for part in parts:
            part.compile(mode=spec.compile, dynamic=False)
            if spec.compile == "reduce-overhead":
                keep_outputs(part)
    return pipeline


def _set_scheduler(pipeline: Any, spec: GeneratorSpec) -> None:
    """Put the spec's scheduler on a pipeline and on the pipelines that it is made of. Raises InputError."""
    own, options = pipeline.scheduler, dict(spec.scheduler_options)
    if spec.scheduler is not None or options:
        chosen = build_scheduler(type(own).__name__, own.config, spec.scheduler, options)
        for part in (pipeline, *vars(pipeline).values()):
            if isinstance(part, diffusers.DiffusionPipeline) and getattr(part, "scheduler", None) is own:
                part.scheduler = chosen  # type: ignore[attr-defined]  # of the classes below it
    defaults = {each.name: each.default for each in inspect.signature(type(pipeline).__call__).parameters.values()}
    call = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    check_steps(
        copy.deepcopy(pipeline.scheduler), spec.num_inference_steps, call | dict(spec.pipeline_options), options
    )


def decoding_part(decoder: Any) -> list[torch.nn.Module]:
    """What can be compiled of a decoder, whose own method is not its forward: nothing of one that keeps a state."""
    part = getattr(decoder, "decoder", None)
    return [part] if isinstance(decoder, PLAIN_DECODERS) and isinstance(part, torch.nn.Module) else []


def keep_outputs(part: Any) -> None:
    """Copy what a compiled module returns: a CUDA graph writes every output to one place, and some schedulers (PNDM,
    DPM-Solver++) look at the outputs of earlier steps.
    """
    compiled = part._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))

    part._compiled_call_impl = call


def _place(pipeline: Any, spec: GeneratorSpec) -> None:
    """Put it on the device, or where it is to wait for its turn. Raises InputError where it does not fit."""
    if spec.offload != "none" and spec.device == "cpu":
        raise InputError(f"offload {spec.offload!r}: is for GPUs, and this draws on the CPU; leave it out")
    try:
        if spec.offload == "model":
            pipeline.enable_model_cpu_offload()
        elif spec.offload == "sequential":
            pipeline.enable_sequential_cpu_offload()
        else:
            pipeline.to(spec.device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _too_large(spec, error) from error
        raise


def refuse_varying_shapes(pipeline: Any, spec: GeneratorSpec) -> None:
    """Raises InputError where the denoiser's arguments change shape with the prompt's length.

    Such a model would be compiled anew for every length, and after eight of them not at all.
    """
    seen: list[set] = []
    watch = _denoiser(pipeline, spec).register_forward_pre_hook(
        lambda _, args, kwargs: seen[-1].update(_shapes([*args, *kwargs.values()])), with_kwargs=True
    )
    try:
        for prompt in (SHORT, LONG):
            seen.append(set())
            call_pipeline(pipeline, spec, [prompt], [0], num_inference_steps=min(2, spec.num_inference_steps))
    finally:
        watch.remove()
    if seen[0] != seen[1]:
        raise InputError(
            f"--compile: the prompts of {spec.model} have no fixed length, so it would be compiled anew for each; "
            "leave it out"
        )


def _shapes(values: Iterable[Any]) -> Iterator[tuple[int, ...]]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield tuple(value.shape)
        elif isinstance(value, (list, tuple)):
            yield from _shapes(value)


def _denoiser(pipeline: Any, spec: GeneratorSpec) -> Any:
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipeline, name, None), torch.nn.Module):
            return module
    raise InputError(f"text-to-image model {spec.model!r}: has neither a unet nor a transformer; give another pipeline")


def _set_attention(denoiser: Any, attention: str) -> None:
    if attention == "default":
        return
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        processors: Any = denoiser.attn_processors
        if any(isinstance(each, ADDED_KV_ATTENTION_PROCESSORS) for each in processors.values()):
            raise InputError(f"attention {attention!r}: this {type(denoiser).__name__} has default alone; leave it out")
        processor = AttnProcessor2_0() if attention == "sdpa" else AttnProcessor()
        denoiser.set_attn_processor(processor)  # type: ignore[attr-defined]  # of a mixin that mypy cannot see
    elif attention == "sdpa":
        denoiser.set_attention_backend("native")
    else:
        raise InputError(f"attention {attention!r}: a {type(denoiser).__name__} has default and sdpa; choose one")
