"""How far pictures that were drawn again are from those that are stored, and whether that may be.

- Drawn now on the kind of machine on which its shard was drawn (packages, processor, GPU), a picture must be the same
  byte for byte.
- Drawn on another kind it may differ by rounding: `ROUNDING` levels on average over its pixels, and no more. This
  package's own version is told of too, and excuses nothing: what it draws from a spec must stay.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.dataset.environment import OWN_VERSION, differences
from pcm.images import open_image

log = logging.getLogger(__name__)

#: How far off a picture may be that was drawn on another kind of machine: mean absolute difference of its values, 0 to
#: 255. Measured with the embedded model: another instruction set at most 0.02, bfloat16 in place of float32 at most
#: 2.3, the picture of another caption at least 21.
ROUNDING = 8.0

#: Pictures that differ, named in the summary.
_EXAMPLES = 10
_NOT_KNOWN = "not known: the dataset does not say where it was drawn"
_UNEXPLAINED, _FAR_OFF = "unexplained", "far_off"


@dataclass(frozen=True)
class Again:
    """A stored picture, and the one that was drawn now; b"" where none could be made. elsewhere: in what the machine
    that drew it now differs from the one before."""

    sample_id: str
    stored: bytes
    drawn: bytes
    elsewhere: tuple[str, ...] = ()

    @property
    def is_identical(self) -> bool:
        return self.stored == self.drawn

    @property
    def has_other_machine(self) -> bool:
        """Whether the machine may round differently."""
        return any(not line.startswith(f"{OWN_VERSION}: ") for line in self.elsewhere)


def paired(
    rows: pa.Table, pictures: Sequence[bytes], known: Mapping[str, dict[str, Any]], now: dict[str, Any]
) -> Iterator[Again]:
    """Stored pictures and those drawn now, by a machine `now`; `known`: as `Chosen.known`."""
    columns = (rows[name].to_pylist() for name in ("sample_id", "image", "environments"))
    for sample_id, stored, digests, drawn in zip(*columns, pictures, strict=True):
        before = [known[digest] for digest in digests if digest in known]
        yield Again(sample_id, stored, drawn, tuple(differences(before, now)) if before else (_NOT_KNOWN,))


def compare(pairs: Sequence[Again]) -> dict[str, Any]:
    """redrawn, identical (byte for byte), failed (nothing could be drawn), other_size, and of those that differ
    largest_difference and mean_difference of their pixels (0 to 255). unexplained: those that differ although they were
    drawn on the same kind of machine; far_off: those further off than `ROUNDING` on another one, and all that failed or
    are of another size. environment_differs: in what the machines differ; examples: some pictures that differ, those
    that are not `ok` first. `ok`: none is unexplained or far off."""
    different = [each for each in pairs if not each.is_identical]
    off = [pixel_difference(each) if each.drawn else None for each in different]
    measured = [each for each in off if each is not None]
    faults = [_fault(*each) for each in zip(different, off, strict=True)]
    elsewhere = list(dict.fromkeys(line for each in pairs for line in each.elsewhere))
    for line in elsewhere if different else ():
        log.info("environment: %s", line)
    failed = sum(not each.drawn for each in different)
    shown = sorted(zip(faults, different, off, strict=True), key=lambda each: not each[0])[:_EXAMPLES]
    return {
        "redrawn": len(pairs),
        "identical": len(pairs) - len(different),
        "failed": failed,
        "other_size": off.count(None) - failed,
        "unexplained": faults.count(_UNEXPLAINED),
        "far_off": faults.count(_FAR_OFF),
        "largest_difference": max((each[0] for each in measured), default=None),
        "mean_difference": float(np.mean([each[1] for each in measured])) if measured else None,
        "environment_differs": elsewhere,
        "examples": [
            {
                "sample_id": each.sample_id,
                "largest_difference": None if difference is None else difference[0],
                "mean_difference": None if difference is None else difference[1],
                "fault": fault or None,
                "environment_differs": list(each.elsewhere),
            }
            for fault, each, difference in shown
        ],
        "ok": not any(faults),
    }


def _fault(pair: Again, difference: tuple[int, float] | None) -> str:
    """Why a picture that differs is not as it must be; "" where rounding may be the reason."""
    if difference is None:  # nothing was drawn, or a picture of another size
        return _FAR_OFF
    if not pair.has_other_machine:
        return _UNEXPLAINED
    return _FAR_OFF if difference[1] > ROUNDING else ""


def pixel_difference(pair: Again) -> tuple[int, float] | None:
    """(largest, mean) absolute difference of the pixels' values, 0 to 255; None for pictures of two sizes."""
    stored, drawn = (
        np.asarray(open_image(data, name=pair.sample_id).convert("RGB"), np.int16) for data in (pair.stored, pair.drawn)
    )
    if stored.shape != drawn.shape:
        return None
    difference = np.abs(stored - drawn)
    return int(difference.max()), float(difference.mean())
