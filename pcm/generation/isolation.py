"""Batches of one shape in which a caption that fails harms no other, and which shrink where memory is short."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from pcm.errors import InputError, typed_first_line
from pcm.generation.drawing import (
    UNGUARDED,
    Drawing,
    Guard,
    Request,
    refused,
)
from pcm.model_faults import free_memory, is_out_of_memory, is_sticky
from pcm.reasons import GENERATOR_ERROR, OUT_OF_MEMORY

log = logging.getLogger(__name__)

#: Draws one batch: requests by slot, and how many slots there are. One drawing a request, in the slots' order; it may
#: be one that is still being encoded while the next batch is drawn.
Drawn = Drawing | Future[Drawing]
DrawBatch = Callable[[dict[int, Request], int], Sequence[Drawn]]


class IsolatedDrawing:
    """Calls a model batch by batch, keeps drawing what can be drawn, and gives a reason for what cannot.

    A request sits in slot `position % batch_size` of a batch that always has `batch_size` slots, whoever else is in it.
    After running out of memory the batch size halves for good: this object's later pictures are drawn so too, and each
    drawing says in how large a batch. A batch that raises is drawn again request by request; when even a batch of
    empty prompts raises then, it is the process that is broken and not a caption, and the guard is told so.
    """

    def __init__(self, draw_batch: DrawBatch, *, batch_size: int, max_attempts: int) -> None:
        self._draw_batch = draw_batch
        self._max_attempts = max_attempts
        self.batch_size = batch_size

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]:
        """One drawing a request, in order. A defective picture is drawn again with its next seeds."""
        drawings: dict[int, Drawing] = {}
        waiting: dict[int, Request] = {}
        for index, request in enumerate(requests):
            if reason := guard.refusal(request):
                drawings[index] = refused(request, self.batch_size, reason)
            else:
                waiting[index] = request
        for _ in range(self._max_attempts):
            again = {}
            for index, drawn in list(self._draw_each(waiting, guard)):
                drawing = self._encoded(drawn, waiting[index], guard)
                drawings[index] = drawing
                if drawing.attempts > waiting[index].attempts and drawing.reason:
                    again[index] = replace(waiting[index], attempts=drawing.attempts)
            waiting = again
        return [drawings[index] for index in range(len(requests))]

    def _draw_each(self, waiting: dict[int, Request], guard: Guard) -> Iterator[tuple[int, Drawn]]:
        """One attempt at every request: those that must be alone first, the least suspect before the others."""
        suspects = sorted((guard.suspicion(request), index) for index, request in waiting.items())
        alone = [index for suspicion, index in suspects if suspicion]
        queue = [[index] for index in alone]
        queue += _slotted({index: waiting[index] for index in waiting if index not in alone}, self.batch_size)
        while queue:
            indices = queue.pop(0)
            slots = {waiting[index].position % self.batch_size: waiting[index] for index in indices}
            outcome = self._attempt(slots, guard)
            if not isinstance(outcome, Exception):
                yield from zip(indices, outcome, strict=True)
            elif is_out_of_memory(outcome):
                if self.batch_size == 1:
                    guard.failed(slots.values(), OUT_OF_MEMORY, typed_first_line(outcome))
                    yield from ((index, refused(waiting[index], 1, OUT_OF_MEMORY)) for index in indices)
                    continue
                self._halve(typed_first_line(outcome))
                left = [index for batch in [indices, *queue] for index in batch]
                together = {index: waiting[index] for index in left if index not in alone}
                queue = [[index] for index in left if index in alone] + _slotted(together, self.batch_size)
            elif len(indices) > 1:
                queue[:0] = [[index] for index in indices]
            else:
                self._blame(outcome, slots.values(), guard)
                guard.failed(slots.values(), GENERATOR_ERROR, typed_first_line(outcome))
                yield indices[0], refused(waiting[indices[0]], self.batch_size, GENERATOR_ERROR)

    def _encoded(self, drawn: Drawn, request: Request, guard: Guard) -> Drawing:
        """The drawing, once it is encoded; a picture that cannot be is one that the generator got wrong."""
        if isinstance(drawn, Drawing):
            return drawn
        try:
            return drawn.result()
        except Exception as error:
            guard.failed((request,), GENERATOR_ERROR, typed_first_line(error))
            return refused(request, self.batch_size, GENERATOR_ERROR)

    def _attempt(self, slots: dict[int, Request], guard: Guard) -> Sequence[Drawn] | Exception:
        """The batch's drawings, or what it raised, bare of the frames that hold its tensors."""
        try:
            with guard.drawing(tuple(slots.values()), self.batch_size):
                return self._draw_batch(slots, self.batch_size)
        except InputError:
            raise
        except Exception as error:
            if is_sticky(error):
                guard.broken(slots.values(), error)
            failure = error.with_traceback(None)
            failure.__context__ = failure.__cause__ = None
        free_memory()
        return failure

    def _blame(self, error: Exception, requests: Iterable[Request], guard: Guard) -> None:
        """Tell the guard that the process is broken unless an empty batch can still be drawn."""
        empty = self._attempt({}, guard)
        if isinstance(empty, Exception) and not is_out_of_memory(empty):
            guard.broken(requests, error)

    def _halve(self, said: str) -> None:
        self.batch_size //= 2
        log.warning("out of memory (%s): drawing %d pictures at once from now on", said, self.batch_size)


def _slotted(waiting: dict[int, Request], batch_size: int) -> list[list[int]]:
    """Group requests into batches in which each has its own slot, as few as that allows, in order."""
    batches: list[list[int]] = []
    depth = [0] * batch_size  # batches that already use a slot
    for index, request in waiting.items():
        slot = request.position % batch_size
        if depth[slot] == len(batches):
            batches.append([])
        batches[depth[slot]].append(index)
        depth[slot] += 1
    return batches
