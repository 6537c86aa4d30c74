"""Any diffusers text-to-image pipeline, run so that a picture does not depend on its neighbours."""

import platform
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from pcm.generation.blank_pictures import why_blank
from pcm.generation.drawing import UNGUARDED, Drawing, Guard, Request
from pcm.generation.isolation import IsolatedDrawing
from pcm.generation.pipeline_loading import load_pipeline
from pcm.generation.seeds import attempt_seed
from pcm.images import encode_image, to_uint8
from pcm.reasons import NSFW_FLAGGED
from pcm.spec import GeneratorSpec

#: Threads that check and encode pictures while the next batch is drawn, and how many batches may wait for them: a batch
#: of eight 512x512 pictures is 25 MB.
ENCODING_THREADS = 4
BATCHES_ENCODED_AT_ONCE = 2


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
        self.device_name = _device_name(spec.device)
        self._encoding = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encode")
        self._encoded: deque[list[Future[Drawing]]] = deque()
        self._isolated = IsolatedDrawing(self.draw_batch, batch_size=spec.batch_size, max_attempts=spec.max_attempts)

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]:
        return self._isolated.draw(requests, guard)

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> list[Future[Drawing]]:
        """One attempt at each request, in its slot of a batch of `batch_size`; the drawings in the slots' order.

        They are being checked and encoded when this returns, so that the device need not wait.
        """
        spec = self._spec
        prompts, generators = [], []
        for slot in range(batch_size):
            request = slots.get(slot)
            prompts.append(spec.prompt(request.caption) if request else "")
            seed = attempt_seed(request.seed, request.attempts) if request else 0
            generators.append(torch.Generator("cpu").manual_seed(seed))
        output = self._pipeline(  # type: ignore[operator]  # every text-to-image pipeline is callable
            **_call_arguments(spec, batch_size), prompt=prompts, generator=generators, output_type="np"
        )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * batch_size
        drawings = [
            self._encoding.submit(self._drawing, output.images[slot], bool(flagged[slot]), request, batch_size)
            for slot, request in slots.items()
        ]
        self._encoded.append(drawings)
        if len(self._encoded) > BATCHES_ENCODED_AT_ONCE:
            wait(self._encoded.popleft())
        return drawings

    def _drawing(self, pixels: np.ndarray, flagged: bool, request: Request, batch_size: int) -> Drawing:
        spec = self._spec
        height, width = pixels.shape[:2]
        seed, attempts = attempt_seed(request.seed, request.attempts), request.attempts + 1
        reason = NSFW_FLAGGED if flagged else why_blank(pixels)
        if reason:
            return Drawing(b"", width, height, seed, attempts, batch_size, reason)
        encoded = encode_image(to_uint8(pixels), image_format=spec.image_format, quality=spec.image_quality)
        return Drawing(encoded, width, height, seed, attempts, batch_size)


def _call_arguments(spec: GeneratorSpec, batch_size: int) -> dict:
    arguments: dict = {"num_inference_steps": spec.num_inference_steps, "guidance_scale": spec.guidance_scale}
    if spec.width is not None:
        arguments["width"] = spec.width
    if spec.height is not None:
        arguments["height"] = spec.height
    if spec.negative_prompt is not None:
        arguments["negative_prompt"] = [spec.negative_prompt] * batch_size
    return arguments


def _device_name(device: str) -> str:
    """The accelerator's own name, or the processor architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()
