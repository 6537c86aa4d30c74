"""Text-to-image as a pure function of (caption, spec, seed): what is asked, what is drawn, who watches over it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from pcm.generation.seeds import attempt_seed


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
