"""Any diffusers text-to-image pipeline, run so that a picture does not depend on its neighbours."""

import inspect
import logging
import platform
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcm.errors import InputError, typed_first_line
from pcm.generation.blank_pictures import why_blank
from pcm.generation.drawing import UNGUARDED, Drawing, Guard, Request
from pcm.generation.isolation import IsolatedDrawing
from pcm.generation.neighbour_test import STEPS, Found, find_dependence
from pcm.generation.pipeline_call import call_pipeline
from pcm.generation.pipeline_loading import load_pipeline
from pcm.generation.pixels import as_floats, to_host
from pcm.generation.seeds import attempt_seed
from pcm.images import encode_image
from pcm.model_faults import free_memory, is_out_of_memory, is_sticky
from pcm.reasons import NSFW_FLAGGED
from pcm.spec import GeneratorSpec

log = logging.getLogger(__name__)

#: Threads that encode pictures while the next batch is drawn, and how many batches may wait for them: a batch of eight
#: 512x512 pictures is 6 MB.
ENCODING_THREADS = 4
BATCHES_ENCODED_AT_ONCE = 2


class DiffusersTextToImage:
    """A diffusers pipeline run in batches of one fixed shape.

    Every picture has its own CPU torch.Generator and its own slot (position modulo batch_size) in a batch that is
    always full: absent neighbours are replaced by an empty prompt. So kernels see the same shapes and the picture the
    same rows, and any sample can be drawn alone, byte for byte. A pipeline whose pictures depend on their neighbours
    even so draws one at a time: `one_at_a_time` says so, and so does every drawing's batch size.

    Raises InputError for a pipeline that cannot draw a test picture, or not in the size that is asked for.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        if spec.device == "cpu":
            torch.set_num_threads(spec.cpu_threads)
        self._pipeline = load_pipeline(spec)
        self.device_name = _device_name(spec.device)
        self._encoding = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="encode")
        self._encoded: deque[list[Future[Drawing]]] = deque()
        self._dtypes = _dtypes(self._pipeline)
        self.one_at_a_time = False
        batch_size = self._tested_batch_size()
        # Not the method itself, which holds this object: in such a cycle the weights would outlive it.
        draw_batch: Any = weakref.WeakMethod(self.draw_batch)
        self._isolated = IsolatedDrawing(
            lambda slots, size: draw_batch()(slots, size), batch_size=batch_size, max_attempts=spec.max_attempts
        )

    @property
    def batch_size(self) -> int:
        """Pictures drawn at once now: less than the spec's after memory ran out."""
        return self._isolated.batch_size

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]:
        return self._isolated.draw(requests, guard)

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> list[Future[Drawing]]:
        """One attempt at each request, in its slot of a batch of `batch_size`; the drawings in the slots' order.

        They are being encoded when this returns, so that the device need not wait.
        """
        spec = self._spec
        prompts, seeds = [], []
        for slot in range(batch_size):
            request = slots.get(slot)
            prompts.append(spec.prompt(request.caption) if request else "")
            seeds.append(attempt_seed(request.seed, request.attempts) if request else 0)
        images, flagged = self._call(prompts, seeds)
        reasons = [NSFW_FLAGGED if bad else reason for bad, reason in zip(flagged, why_blank(images), strict=True)]
        pixels = to_host(images)  # (B, H, W, 3)
        drawings = [
            self._encoding.submit(self._drawing, pixels[slot], reasons[slot], request, batch_size)
            for slot, request in slots.items()
        ]
        self._encoded.append(drawings)
        if len(self._encoded) > BATCHES_ENCODED_AT_ONCE:
            wait(self._encoded.popleft())
        return drawings

    def _call(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> tuple[Tensor, Sequence[bool]]:
        try:
            return call_pipeline(self._pipeline, self._spec, prompts, seeds, **changes)
        except Exception:
            # Stable Diffusion XL decodes float16 in float32, and an error on the way leaves its decoder so.
            for part, dtype in self._dtypes:
                if part.dtype != dtype:
                    part.to(dtype=dtype)
            raise

    def _tested_batch_size(self) -> int:
        """The spec's batch size, halved until a test batch fits into memory; 1 where neighbours would change a picture.

        Raises InputError.
        """
        spec, size = self._spec, self._spec.batch_size
        while (found := self._try_neighbours(size)) is None:
            if size == 1:
                raise InputError(
                    f"text-to-image model {spec.model!r}: not one picture fits into the memory of {self.device_name}; "
                    "give a smaller --width and --height, --dtype bfloat16, --vae-slicing or --offload model"
                )
            size //= 2
            log.warning("out of memory in a test picture: drawing %d pictures at once from now on", size)
        for name, asked, drawn in zip(("width", "height"), (spec.width, spec.height), found.size, strict=True):
            if asked not in (None, drawn):
                raise InputError(
                    f"--{name} {asked}: {spec.model} draws pictures of {found.size[0]}x{found.size[1]} then; ask for a "
                    "size that it has, or give --pipeline-option use_resolution_binning=false where it takes that"
                )
        if not found.same_twice:
            raise InputError(
                f"text-to-image model {spec.model!r}: {type(self._pipeline).__name__} with this "
                f"{type(self._pipeline.scheduler).__name__} draws noise that no seed decides, so no picture can be "
                "drawn again; choose another --scheduler or --scheduler-option"
            )
        if found.independent:
            return size
        if spec.compile != "none":
            raise InputError(
                f"--compile: a picture of {spec.model} depends on what is drawn beside it, so each is drawn alone, in "
                "its own prompt's length; leave it out"
            )
        alone = self._try_neighbours(1)
        log.warning(
            "%s: a picture depends on what is drawn beside it, so each is drawn alone: %.2g s a picture of %d steps "
            "(%.2g s in batches of %d)",
            spec.model, alone.seconds if alone else float("nan"), STEPS, found.seconds, size,
        )  # fmt: skip
        self.one_at_a_time = True
        return 1

    def _try_neighbours(self, batch_size: int) -> Found | None:
        """What the test found of a batch size; None: it does not fit into memory."""
        takes = inspect.signature(type(self._pipeline).__call__).parameters
        few = {name: STEPS for name in ("num_inference_steps", "prior_num_inference_steps") if name in takes}
        if few["num_inference_steps"] > self._spec.num_inference_steps:
            few["num_inference_steps"] = self._spec.num_inference_steps
        try:
            return find_dependence(lambda prompts, seeds: as_floats(self._call(prompts, seeds, **few)[0]), batch_size)
        except InputError:
            raise
        except Exception as error:
            if is_sticky(error):
                raise
            if not is_out_of_memory(error):
                raise InputError(
                    f"text-to-image model {self._spec.model!r}: cannot draw a test picture "
                    f"({typed_first_line(error)}); check its scheduler, size and --pipeline-option"
                ) from error
        free_memory()
        return None

    def _drawing(self, pixels: np.ndarray, reason: str, request: Request, batch_size: int) -> Drawing:
        spec = self._spec
        height, width = pixels.shape[:2]
        seed, attempts = attempt_seed(request.seed, request.attempts), request.attempts + 1
        if reason:
            return Drawing(b"", width, height, seed, attempts, batch_size, reason)
        encoded = encode_image(pixels, image_format=spec.image_format, quality=spec.image_quality)
        return Drawing(encoded, width, height, seed, attempts, batch_size)


def _dtypes(pipeline: Any) -> list[tuple[Any, torch.dtype]]:
    """The parts of a pipeline that have a dtype, and which."""
    modules: list[Any] = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return [(module, module.dtype) for module in modules if hasattr(module, "dtype")]


def _device_name(device: str) -> str:
    """The accelerator's own name, or the processor architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()
