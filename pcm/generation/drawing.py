"""Text-to-image as a pure function of (caption, spec, seed): request, drawing and the null generator."""

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pcm.errors import InputError
from pcm.generation.seeds import attempt_seed
from pcm.images import encode_image
from pcm.spec import GeneratorSpec

#: Names the generator of a dataset whose pictures were drawn elsewhere.
IMPORTED = "imported"
#: Names the generator of a dataset of real photos.
PHOTOS = "photos"
#: Generators that draw nothing, and the jobs that make their datasets.
_UNDRAWN = {IMPORTED: "jobs.import_official", PHOTOS: "jobs.featurise"}


@dataclass(frozen=True)
class Request:
    """One picture to draw. `position` is the sample's place in the plan: it decides the slot in the batch.

    `attempts` pictures of it were drawn and refused before, so the next one is attempt number `attempts`.
    """

    position: int
    caption: str
    seed: int
    attempts: int = 0


@dataclass(frozen=True)
class Drawing:
    """What became of a request: encoded image and its size, or the reason why there is none."""

    image: bytes
    width: int
    height: int
    seed: int  # of the attempt that is kept, or of the last one refused
    attempts: int  # pictures drawn of it in all
    batch_size: int  # pictures drawn at once
    reason: str = ""


def refused(request: Request, batch_size: int, reason: str) -> Drawing:
    """What becomes of a request that gives no picture: the next one to try is the one that was to be drawn now."""
    last = attempt_seed(request.seed, max(0, request.attempts - 1))
    return Drawing(b"", 0, 0, last, request.attempts, batch_size, reason)


class Guard:
    """Who watches over a generator: it learns of every batch, and says what must not share one. This one is nobody."""

    def drawing(self, requests: Sequence[Request], batch_size: int) -> AbstractContextManager[None]:
        """Surrounds each call of the model; the batch is padded to `batch_size`."""
        return nullcontext()

    def suspicion(self, request: Request) -> int:
        """0, or how often a process died with this request in a batch: it is then drawn alone."""
        return 0

    def refusal(self, request: Request) -> str:
        """The reason for which a request is not to be drawn at all, or ""."""
        return ""

    def failed(self, requests: Iterable[Request], reason: str, error: str) -> None:
        """These requests are given up."""

    def broken(self, requests: Iterable[Request], error: Exception) -> None:
        """The process can draw nothing any more; it was drawing these. Does not return."""
        raise error


UNGUARDED = Guard()


class TextToImage(Protocol):
    """Draws requests; the same request gives the same bytes whatever the others are."""

    device_name: str

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]: ...


def load_generator(spec: GeneratorSpec) -> TextToImage:
    """The generator a spec names: diffusers, or the null generator that measures the pipeline itself.

    Raises InputError for pictures that came from elsewhere.
    """
    if job := _UNDRAWN.get(spec.model):
        raise InputError(
            f"generator {spec.model!r}: the pictures of this dataset were imported, so none can be drawn again or "
            f"added; rerun {job}, or generate into another --out"
        )
    if spec.model == "null":
        return NullTextToImage(spec)
    from pcm.generation.diffusers_pipeline import DiffusersTextToImage  # seconds to import, and null needs none of it

    return DiffusersTextToImage(spec)


class NullTextToImage:
    """1x1 pictures whose colour is twelve bits of the seed: the whole pipeline without a model."""

    device_name = "null"

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._encoded = functools.cache(self._encode)  # 4,096 colours

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]:
        return [
            Drawing(self._encoded(request.seed & 0xFFF), 1, 1, request.seed, 1, self._spec.batch_size)
            for request in requests
        ]

    def _encode(self, colour: int) -> bytes:
        pixels = np.array([[[17 * (colour >> shift & 15) for shift in (0, 4, 8)]]], np.uint8)
        return encode_image(pixels, image_format=self._spec.image_format, quality=self._spec.image_quality)


def model_source(model: str) -> str:
    """What diffusers loads for a NAME: the embedded pack's folder, a folder, or a repo id."""
    if model == "embedded":
        from pcm import embedded

        return str(embedded.t2i_path())
    return model
