"""What a pipeline can be asked for: the signature of its class's `__call__`, read before any weight is.

A keyword that a pipeline does not take would be an error after the first node is paid for; one that it takes and does
not use would be ignored. Both are refused here.
"""

import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcm.errors import InputError, not_known
from pcm.generation.names import model_source
from pcm.generation.own_code import refuse_own_code
from pcm.generation.pipeline_index import PipelineIndex, read_index
from pcm.generation.prompt_cache import PURE_ENCODERS
from pcm.generation.scheduler import build_scheduler, check_scheduler_options, check_steps, scheduler_class

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers

#: What every text-to-image pipeline must take: the prompt, a generator for each picture, and how to return pixels.
NEEDED = ("prompt", "generator", "output_type", "num_inference_steps")
#: What options of their own say, or the drawing itself; --pipeline-option takes the rest.
OURS = {
    "prompt": "the corpus",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "width": "--width",
    "height": "--height",
    "negative_prompt": "--negative-prompt",
    "num_images_per_prompt": "--images-per-caption",
    "generator": "--seed",
    "output_type": "nothing",
    "return_dict": "nothing",
}
#: Pipelines that guide from 0 upwards; the others from 1.
GUIDED_ABOVE_ZERO = ("ZImagePipeline",)


@dataclass(frozen=True)
class PipelineSignature:
    """A text-to-image pipeline's class, and what its call takes."""

    index: PipelineIndex
    defaults: Mapping[str, Any]  # of each parameter of __call__
    plain: tuple[str, ...]  # parameters that take a number, a truth value or a text

    @property
    def name(self) -> str:
        return self.index.class_name

    def takes(self, option: str) -> bool:
        return option in self.defaults

    def heeds_guidance(self) -> bool:
        """Whether a guidance scale has an effect."""
        if self.defaults.get("guidance_scale") is None:
            return False
        return not self.takes("true_cfg_scale") or self.index.config("transformer").get("guidance_embeds", True)

    def check_guidance(self, guidance_scale: float | None) -> None:
        """Raises InputError for a guidance scale that was given and has no effect."""
        if guidance_scale is None or self.heeds_guidance():
            return
        other = "; --pipeline-option true_cfg_scale=X guides it" if self.takes("true_cfg_scale") else "; leave it out"
        has_none = not self.takes("guidance_scale")
        why = f"{self.name} has no guidance scale" if has_none else f"without effect on this {self.name}"
        raise InputError(f"--guidance-scale {guidance_scale:g}: {why}{other}")

    def check_negative_prompt(
        self, negative_prompt: str | None, guidance_scale: float | None, options: Mapping[str, Any]
    ) -> None:
        """Raises InputError for a negative prompt without effect; `guidance_scale`: the one that is drawn with."""
        true_scale = options.get("true_cfg_scale", self.defaults.get("true_cfg_scale"))
        if negative_prompt is None:
            if "true_cfg_scale" in options and self.takes("negative_prompt"):
                raise InputError(
                    f"--pipeline-option true_cfg_scale={true_scale}: without effect on {self.name} that has no "
                    "--negative-prompt; give one (--negative-prompt ' ' is an empty one)"
                )
            return
        if not self.takes("negative_prompt"):
            raise InputError(f"--negative-prompt: {self.name} takes none; leave it out")
        least = 0 if self.name in GUIDED_ABOVE_ZERO else 1
        if self.takes("true_cfg_scale"):
            if not true_scale or true_scale <= 1:
                raise InputError(
                    f"--negative-prompt: without effect on {self.name} at true_cfg_scale {true_scale}; "
                    "give --pipeline-option true_cfg_scale=X above 1, or leave it out"
                )
        elif guidance_scale is not None and guidance_scale <= least:
            raise InputError(
                f"--negative-prompt: without effect at guidance {guidance_scale:g}; give a --guidance-scale above "
                f"{least}, or leave it out"
            )

    def check_further_negative_prompts(self, negative_prompt: str | None, options: Mapping[str, Any]) -> None:
        """Raises InputError for a negative_prompt_2 that is ignored without the first."""
        further = [name for name in options if name.startswith("negative_prompt")]
        zeros = self.name.startswith("StableDiffusionXL") and self.index.zeros_for_empty_prompt
        if further and negative_prompt is None and (zeros or self.takes("true_cfg_scale")):
            raise InputError(
                f"--pipeline-option {further[0]}: goes with --negative-prompt, which {self.name} needs to heed it; "
                "give both (--negative-prompt ' ' is an empty one)"
            )

    def check_size(self, width: int | None, height: int | None) -> None:
        for name, value in (("width", width), ("height", height)):
            if value is not None and not self.takes(name):
                raise InputError(f"--{name} {value}: {self.name} has one size; leave it out")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InputError for a --pipeline-option that the call does not take, or of another type."""
        allowed = [name for name in self.plain if name not in OURS]
        for name, value in options.items():
            if name in OURS and self.takes(name):
                raise InputError(f"--pipeline-option {name}: is set by {OURS[name]}; leave it out")
            if name not in allowed:
                raise not_known(f"--pipeline-option of {self.name}", name, allowed)
            default = self.defaults[name]
            if default is not None and not _same_kind(value, default):
                raise InputError(
                    f"--pipeline-option {name}={value}: {self.name} takes {type(default).__name__} (its own: {default})"
                )

    def check_loras(self) -> None:
        """Raises InputError where none can be fused."""
        if not hasattr(_class_of(self.index), "load_lora_weights"):
            raise InputError(f"--lora: {self.name} takes none; leave it out")

    def check_prompt_cache(self) -> None:
        """Raises InputError where no text encoder could remember a prompt."""
        known = {encoder.__name__ for encoder in PURE_ENCODERS}
        found = {kind for part, (_, kind) in self.index.components.items() if part.startswith("text_encoder")}
        if not found & known:
            raise InputError(
                f"--prompt-cache: without effect on {self.name} ({', '.join(sorted(found)) or 'no text encoder'}); "
                f"it is for {', '.join(sorted(known))}; leave it out"
            )

    def check_scheduler(self, name: str | None, options: Mapping[str, Any]) -> None:
        """Raises InputError for a scheduler, or an option of it, that this pipeline cannot use."""
        own = self.index.components.get("scheduler", ("", ""))[1]
        check_scheduler_options(scheduler_class(name or own), options)
        if name is None:
            return
        flow = _is_flow(own, self._scheduler_config())
        kind = scheduler_class(name)
        sigmas = "sigmas" in inspect.signature(kind.set_timesteps).parameters  # type: ignore[attr-defined]
        if flow and not ((name.startswith("FlowMatch") and sigmas) or options.get("use_flow_sigmas") is True):
            solvers = "UniPCMultistepScheduler" + ("" if self.takes("sigmas") else " and DPMSolverMultistepScheduler")
            raise InputError(
                f"--scheduler {name}: {self.name} is a flow-matching model; allowed are FlowMatchEulerDiscrete"
                f"Scheduler, or {solvers} with --scheduler-option use_flow_sigmas=true"
            )
        if flow and not sigmas and self.takes("sigmas"):
            raise InputError(f"--scheduler {name}: {self.name} sets sigmas, which it cannot take; choose another")
        if not flow and name.startswith("FlowMatch"):
            raise InputError(f"--scheduler {name}: {self.name} is no flow-matching model; choose another")
        asks = "original_inference_steps"
        if self.takes(asks) and asks not in inspect.signature(kind.set_timesteps).parameters:  # type: ignore[attr-defined]
            raise InputError(f"--scheduler {name}: {self.name} needs LCMScheduler; leave it out")

    def check_steps(
        self, steps: int, name: str | None, options: Mapping[str, Any], pipeline_options: Mapping[str, Any]
    ) -> None:
        """Raises InputError for steps that the scheduler cannot do, and for a value that it does not take."""
        own, config = self.index.components.get("scheduler", ("", ""))[1], self._scheduler_config()
        if config:  # else it is built, and checked so, where the model is loaded
            scheduler = build_scheduler(own, config, name, options)
            check_steps(scheduler, steps, {**self.defaults, **pipeline_options}, options)

    def _scheduler_config(self) -> dict[str, Any]:
        return self.index.config("scheduler", "scheduler_config.json")


def read_signature(model: str, revision: str | None) -> PipelineSignature:
    """The signature of a NAME's pipeline, at a pinned revision. Raises InputError for what draws no prompts."""
    index = read_index(model, revision)
    if (source := Path(model_source(model))).is_dir():
        refuse_own_code(source)
    kind = _class_of(index)
    parameters = [each for each in inspect.signature(kind.__call__).parameters.values() if each.name != "self"]
    defaults = {each.name: None if each.default is each.empty else each.default for each in parameters}
    demanded = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    refuse_other_tasks(model, kind, defaults, demanded)
    return PipelineSignature(index, defaults, tuple(each.name for each in parameters if _is_plain(each)))


def pipeline_class(model: str, revision: str | None) -> Any:
    """The diffusers class that model_index.json names. Raises InputError."""
    return _class_of(read_index(model, revision))


def absent_parts(model: str, revision: str | None) -> tuple[str, ...]:
    """Parts that a pipeline was saved without and that its class does not call optional: Stable Diffusion 3's T5.

    Its loader wants to be told so. Raises InputError.
    """
    index = read_index(model, revision)
    return tuple(part for part in index.absent if part not in _class_of(index)._optional_components)


def _class_of(index: PipelineIndex) -> Any:
    kind = getattr(diffusers, index.class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise InputError(
            f"text-to-image model {index.model!r}: its pipeline {index.class_name} is not in diffusers "
            f"{diffusers.__version__}; give one that is, or install the release that has it"
        )
    return kind


def refuse_other_tasks(model: str, kind: type, defaults: Mapping[str, Any], demanded: Iterable[str]) -> None:
    """Raises InputError unless the call makes pictures of prompts and of nothing else."""
    other = None
    if missing := [name for name in NEEDED if name not in defaults]:
        other = f"its call takes no {missing[0]}"
    elif extra := [name for name in demanded if name != "prompt"]:
        other = f"its call needs {', '.join(extra)}; give the combined pipeline"
    elif "num_frames" in defaults:
        other = "it makes videos"
    elif fields := _output_fields(kind):
        other = None if "images" in fields else f"it returns {', '.join(fields)}, not images"
    if other:
        raise InputError(f"text-to-image model {model!r}: {kind.__name__} draws no pictures of prompts ({other})")


def _output_fields(kind: type) -> list[str]:
    """Fields of what the call says it returns; empty where it does not say."""
    try:
        said = typing.get_type_hints(kind.__call__).get("return")
    except (NameError, TypeError, AttributeError):
        said = None
    for part in typing.get_args(said) or (said,):
        if hasattr(part, "__dataclass_fields__"):
            return list(part.__dataclass_fields__)
    return []


def _is_flow(scheduler: str, config: Mapping[str, Any]) -> bool:
    prediction = config.get("prediction_type")
    return scheduler.startswith("FlowMatch") or bool(config.get("use_flow_sigmas")) or prediction == "flow_prediction"


def _is_plain(parameter: inspect.Parameter) -> bool:
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    return any(kind in (bool, int, float, str) for kind in kinds)


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))
