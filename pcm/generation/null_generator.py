"""The generator named "null": the whole pipeline without a model."""

import functools
from collections.abc import Sequence

import numpy as np

from pcm.generation.drawing import UNGUARDED, Drawing, Guard, Request
from pcm.images import encode_image
from pcm.spec import GeneratorSpec


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
