"""A scheduler of diffusers, from the model's own configuration and what a user changes of it. No weights."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers

from pcm.errors import InputError, first_line


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


def build_scheduler(own: str, config: Mapping[str, Any], name: str | None, options: Mapping[str, Any]) -> Any:
    """The scheduler `name`, or the model's own one where that is None, configured as the model's own and as `options`
    say. `own`, `config`: class and configuration of the model's own.

    Raises InputError for an option that this scheduler does not know, or for a value that it does not take.
    """
    kind: Any = scheduler_class(name or own)
    check_scheduler_options(kind, options)
    changes, takes = dict(options), inspect.signature(kind.__init__).parameters
    if own.startswith("FlowMatch") and "flow_shift" in takes:
        # A solver of flows and of noise alike, which takes the model for one that predicts noise unless it is told so.
        changes = {"prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)} | changes
    elif not own.startswith("FlowMatch") and "shift" in takes and "flow_shift" in config:
        changes = {"shift": config["flow_shift"]} | changes  # the same, by its other name
    try:
        return kind.from_config(config, **changes)
    except Exception as error:  # whatever its constructor makes of a wrong value
        raise InputError(
            f"{kind.__name__}{_with(options)}: {first_line(error)}; change the --scheduler-option, or leave it out"
        ) from None


def check_steps(scheduler: Any, steps: int, call: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises InputError for a number of steps that a scheduler cannot do, or cannot do with its `options`.

    call: keywords of the pipeline's call, with their defaults. What the scheduler knows of them, the pipeline hands to
    it. The scheduler is set to these steps, as every call of the pipeline sets it.
    """
    takes = inspect.signature(scheduler.set_timesteps).parameters
    handed = {name: call[name] for name in takes if name != "num_inference_steps" and call.get(name) is not None}
    if "mu" in takes and scheduler.config.get("use_dynamic_shifting"):
        handed["mu"] = 1.0  # of the picture's size; any will do here
    try:
        scheduler.set_timesteps(steps, **handed)
    except Exception as error:  # likewise
        raise InputError(
            f"--steps {steps}: {type(scheduler).__name__}{_with(options)} cannot do so ({first_line(error)}); "
            "change --steps, --scheduler or --scheduler-option"
        ) from None


def _with(options: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    return f" with {said}" if said else ""
