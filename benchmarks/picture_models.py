"""Rows of the models page for text to image: what the tiny pipeline of each family does here."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pcm.errors import InputError
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.few_step_models import few_steps
from pcm.generation.pipeline_loading import refuse_varying_shapes
from pcm.generation.pipeline_signature import PipelineSignature, read_signature
from pcm.generation.pixels import as_floats
from pcm.spec import GeneratorSpec

HEADER = (
    "| family | pipeline | drawn | same alone, beside others, twice | steps, guidance | negative prompt | LoRA "
    "| compile |",
    "|---|---|---|---|---|---|---|---|",
)
PROMPTS = ("a cat", "a very long caption " * 15, "rain", "two red buses on a street")
BATCH_SIZE = 4


def picture_rows(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(name, line of the table) of each pipeline folder. A pipeline that is refused has the reason in its line."""
    for folder in folders:
        try:
            signature = read_signature(str(folder), None)
            yield folder.name, _row(folder, signature)
        except InputError as error:
            said = str(error).replace(str(folder), folder.name).replace("|", "/")
            yield folder.name, f"| {folder.name} | refused: {said} | - | - | - | - | - | - |"


def _row(folder: Path, signature: PipelineSignature) -> str:
    spec = _spec(folder, signature)
    generator = DiffusersTextToImage(spec)
    size = 1 if generator.one_at_a_time else BATCH_SIZE
    defaults = dict(signature.defaults)
    if found := few_steps(str(folder)):
        defaults |= {"num_inference_steps": found.steps, "guidance_scale": found.guidance_scale}
    guidance = defaults.get("guidance_scale")
    scale = "-" if guidance is None else f"{guidance:g}"
    return (
        f"| {folder.name} | {signature.name} | {'one at a time' if size == 1 else 'in batches'} | "
        f"{_yes(_is_pure(generator, size))} | {defaults['num_inference_steps']}, {scale} | "
        f"{_negative(signature)} | {_yes(_takes_loras(signature))} | {_compile(generator, spec)} |"
    )


def _spec(folder: Path, signature: PipelineSignature) -> GeneratorSpec:
    options: dict = {"use_resolution_binning": False} if signature.takes("use_resolution_binning") else {}
    # Not as --width and --height, which are checked: a tiny decoder may enlarge less than its pipeline assumes.
    options |= {name: 32 for name in ("width", "height") if signature.takes(name)}
    known: dict = {
        "model": str(folder), "revision": "", "num_inference_steps": 2, "batch_size": BATCH_SIZE,
        "guidance_scale": signature.defaults.get("guidance_scale"), "pipeline_options": options,
    }  # fmt: skip
    return GeneratorSpec(**known)


def _is_pure(generator: DiffusersTextToImage, size: int) -> bool:
    """Whether each picture is the same float for float alone, beside the others and drawn again."""
    seeds = range(size)
    together = [as_floats(generator._call(PROMPTS[:size], seeds)[0]) for _ in range(2)]
    same = np.array_equal(*together)
    for slot in range(size):
        prompts = [PROMPTS[slot] if each == slot else "" for each in range(size)]
        same = same and np.array_equal(as_floats(generator._call(prompts, seeds)[0])[slot], together[0][slot])
    return bool(same)


def _negative(signature: PipelineSignature) -> str:
    if not signature.takes("negative_prompt"):
        return "-"
    return "with true_cfg_scale" if signature.takes("true_cfg_scale") else "yes"


def _takes_loras(signature: PipelineSignature) -> bool:
    try:
        signature.check_loras()
    except InputError:
        return False
    return True


def _compile(generator: DiffusersTextToImage, spec: GeneratorSpec) -> str:
    """Whether the denoiser's arguments have one shape whatever the prompt; nothing is compiled."""
    try:
        refuse_varying_shapes(generator._pipeline, spec)
    except InputError:
        return "refused: prompts of any length"
    return "fixed shapes"


def _yes(value: bool) -> str:
    return "yes" if value else "-"
