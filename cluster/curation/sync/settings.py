"""What decides SynC's result beside the vectors."""

from dataclasses import dataclass

#: Folder of all that a run needs until it is done.
WORK = "refining"
#: Scores are compared in whole units of this.
UNIT = 1e-6


@dataclass(frozen=True)
class SyncSettings:
    """The published settings (arXiv 2507.18616)."""

    candidates: int = 15  # K: pictures that are considered for a caption
    captions_per_picture: int = 2  # K_r: captions that stand for a picture
    keep: float = 0.9  # tau: the share of captions that stays
