"""What decides SynC's result beside the vectors."""

from dataclasses import asdict, dataclass
from typing import Any

#: Folder of all that a run needs until it is done.
WORK = "refining"
#: Scores are compared in whole units of this.
UNIT = 1e-6


@dataclass(frozen=True)
class SyncSettings:
    """The published settings (arXiv 2507.18616). `probes` is ours: None compares all with all, as published."""

    candidates: int = 15  # K: pictures that are considered for a caption
    captions_per_picture: int = 2  # K_r: captions that stand for a picture
    keep: float = 0.9  # tau: the share of captions that stays
    probes: int | None = None  # cells that a query looks into (cells.py)

    def decides(self) -> dict[str, Any]:
        """What a view's lineage says. Without probes it is that of the views made before there were any."""
        values = asdict(self)
        if self.probes is None:
            del values["probes"]
        return values
