"""Any diffusers text-to-image pipeline, run so that a picture does not depend on its neighbours."""

from collections.abc import Sequence

import numpy as np
import torch

from pcm.images import defect, encode_image, to_uint8
from pcm.pipeline_loading import load_pipeline
from pcm.spec import GeneratorSpec
from pcm.text_to_image import Drawing, Request

#: reason of a picture that the pipeline's own safety checker blanked.
NSFW_FLAGGED = "nsfw_flagged"


class DiffusersTextToImage:
    """A diffusers pipeline run in batches of one fixed shape.

    Every picture has its own CPU torch.Generator and its own slot (position modulo batch_size) in a batch that is
    always full: absent neighbours are replaced by an empty prompt. So kernels see the same shapes and the picture the
    same rows, and any sample can be drawn alone, byte for byte.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        if spec.device == "cpu":
            torch.set_num_threads(spec.cpu_threads)
        self._pipeline = load_pipeline(spec)

    def draw(self, requests: Sequence[Request]) -> list[Drawing]:
        drawings: dict[int, Drawing] = {}
        pending = list(enumerate(requests))
        for attempt in range(self._spec.max_attempts):
            refused = []
            for batch in _slotted_batches(pending, self._spec.batch_size):
                for (index, request), drawing in zip(batch.values(), self._draw_batch(batch, attempt), strict=True):
                    drawings[index] = drawing
                    if drawing.reason:
                        refused.append((index, request))
            pending = refused
        return [drawings[index] for index in range(len(requests))]

    def _draw_batch(self, batch: dict[int, tuple[int, Request]], attempt: int) -> list[Drawing]:
        spec = self._spec
        prompts, generators = [], []
        for slot in range(spec.batch_size):
            request = batch[slot][1] if slot in batch else None
            prompts.append(spec.prompt(request.caption) if request else "")
            generators.append(torch.Generator("cpu").manual_seed(request.seed + attempt if request else 0))
        output = self._pipeline(  # type: ignore[operator]  # every text-to-image pipeline is callable
            **_call_arguments(spec), prompt=prompts, generator=generators, output_type="np"
        )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * spec.batch_size
        return [
            self._drawing(output.images[slot], bool(flagged[slot]), request.seed + attempt, attempt + 1)
            for slot, (_, request) in batch.items()
        ]

    def _drawing(self, pixels: np.ndarray, flagged: bool, seed: int, attempts: int) -> Drawing:
        height, width = pixels.shape[:2]
        reason = NSFW_FLAGGED if flagged else defect(pixels)
        if reason:
            return Drawing(b"", width, height, seed, attempts, self._spec.batch_size, reason)
        encoded = encode_image(to_uint8(pixels), image_format=self._spec.image_format, quality=self._spec.image_quality)
        return Drawing(encoded, width, height, seed, attempts, self._spec.batch_size)


def _slotted_batches(pending: Sequence[tuple[int, Request]], batch_size: int) -> list[dict[int, tuple[int, Request]]]:
    """Group requests into batches in which each sits in slot position % batch_size, as few batches as that allows."""
    batches: list[dict[int, tuple[int, Request]]] = []
    depth = [0] * batch_size  # batches that already use a slot
    for index, request in pending:
        slot = request.position % batch_size
        if depth[slot] == len(batches):
            batches.append({})
        batches[depth[slot]][slot] = (index, request)
        depth[slot] += 1
    return batches


def _call_arguments(spec: GeneratorSpec) -> dict:
    arguments: dict = {"num_inference_steps": spec.num_inference_steps, "guidance_scale": spec.guidance_scale}
    if spec.width is not None:
        arguments["width"] = spec.width
    if spec.height is not None:
        arguments["height"] = spec.height
    if spec.negative_prompt is not None:
        arguments["negative_prompt"] = [spec.negative_prompt] * spec.batch_size
    return arguments
