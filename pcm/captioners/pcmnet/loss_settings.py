"""The settings of the loss, apart from it: a config is checked without loading torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from pcm.errors import InputError

FocalMode = Literal["batch", "sentence", "word", "off"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Of CLIPWeightedCrossEntropy, which explains them; the defaults are the published ViT-L/14 run's.

    Raises InputError for a value out of range.
    """

    clip_weight: float = 4.0
    label_smoothing: float = 0.1
    focal_gamma: float = 2.0
    focal_mode: str = "batch"

    def __post_init__(self) -> None:
        if not self.clip_weight > 0:
            raise InputError(f"clip_weight {self.clip_weight}: must be greater than 0")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing {self.label_smoothing}: must be at least 0 and below 1")
        if self.focal_mode not in get_args(FocalMode):
            raise InputError(f"focal_mode {self.focal_mode!r}: allowed are {', '.join(get_args(FocalMode))}")
        if self.focal_mode != "off" and self.focal_gamma < 1:
            raise InputError(
                f"focal_gamma {self.focal_gamma}: must be at least 1; focal_mode 'off' leaves the factor out"
            )
