"""Pictures that show nothing, of which a diffusion model makes some: black, of one colour, or not numbers."""

import numpy as np

from pcm.reasons import BLACK_IMAGE, CONSTANT_IMAGE, NAN_IMAGE

#: A picture whose pixel values (0..1) spread less than this (standard deviation over all channels) shows nothing.
CONSTANT_STD = 2.0 / 255.0
#: A picture whose brightest pixel is below this is black: what safety checkers and fp16 overflows return.
BLACK_MAX = 8.0 / 255.0


def why_blank(pixels: np.ndarray) -> str:
    """Why float pixels (H, W, 3) in 0..1 show nothing, as a reason of pcm.reasons, or ""."""
    if not np.isfinite(pixels).all():
        return NAN_IMAGE
    if pixels.max() < BLACK_MAX:
        return BLACK_IMAGE
    if pixels.std() < CONSTANT_STD:
        return CONSTANT_IMAGE
    return ""
