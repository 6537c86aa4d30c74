"""Text-to-image as a pure function of (caption, spec, seed): request, drawing and the null generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pcm.images import encode_image
from pcm.spec import GeneratorSpec


@dataclass(frozen=True)
class Request:
    """One picture to draw. `position` is the sample's place in the plan: it decides the slot in the batch."""

    position: int
    caption: str
    seed: int


@dataclass(frozen=True)
class Drawing:
    """What became of a request: encoded image and its size, or the reason why there is none."""

    image: bytes
    width: int
    height: int
    seed: int  # of the attempt that is kept, or of the last one refused
    attempts: int
    batch_size: int  # pictures drawn at once
    reason: str = ""


class TextToImage(Protocol):
    """Draws requests; the same request gives the same bytes whatever the others are."""

    def draw(self, requests: Sequence[Request]) -> list[Drawing]: ...


def load_generator(spec: GeneratorSpec) -> TextToImage:
    """The generator a spec names: diffusers, or the null generator that measures the pipeline itself."""
    if spec.model == "null":
        return NullTextToImage(spec)
    from pcm.diffusers_generator import DiffusersTextToImage  # seconds to import, and null needs none of it

    return DiffusersTextToImage(spec)


class NullTextToImage:
    """1x1 pictures whose colour is the seed: the whole pipeline without a model."""

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec

    def draw(self, requests: Sequence[Request]) -> list[Drawing]:
        drawings = []
        for request in requests:
            pixels = np.array([[[request.seed >> shift & 255 for shift in (0, 8, 16)]]], np.uint8)
            encoded = encode_image(pixels, image_format=self._spec.image_format, quality=self._spec.image_quality)
            drawings.append(Drawing(encoded, 1, 1, request.seed, 1, self._spec.batch_size))
        return drawings


def model_source(model: str) -> str:
    """What diffusers loads for a NAME: the embedded pack's folder, a folder, or a repo id."""
    if model == "embedded":
        from pcm import embedded

        return str(embedded.t2i_path())
    return model
