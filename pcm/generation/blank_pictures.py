"""Pictures that show nothing, of which a diffusion model makes some: black, of one colour, or not numbers."""

import torch
from torch import Tensor

from pcm.reasons import BLACK_IMAGE, CONSTANT_IMAGE, NAN_IMAGE

#: A picture whose pixel values (0..1) spread less than this (standard deviation over all channels) shows nothing.
CONSTANT_STD = 2.0 / 255.0
#: A picture whose brightest pixel is below this is black: what safety checkers and fp16 overflows return.
BLACK_MAX = 8.0 / 255.0


def why_blank(images: Tensor) -> list[str]:
    """Why each of (B, 3, H, W) in 0..1 shows nothing, as a reason of pcm.reasons, or "".

    Found on the device, in float64 so that the order of adding does not matter; three numbers a picture are copied.
    """
    flat = images.flatten(1).double()
    finite = flat.isfinite().all(dim=1).double()
    found = torch.stack([finite, flat.amax(dim=1), flat.std(dim=1, correction=0)]).T.tolist()
    return [_reason(*numbers) for numbers in found]


def _reason(finite: float, brightest: float, spread: float) -> str:
    if not finite:
        return NAN_IMAGE
    if brightest < BLACK_MAX:
        return BLACK_IMAGE
    return CONSTANT_IMAGE if spread < CONSTANT_STD else ""
