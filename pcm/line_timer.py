"""A line on the log now and then, in loops that last."""

import threading
import time

SECONDS_BETWEEN_LINES = 10.0


class LineTimer:
    """Says when a loop may log its next line: `if timer.due(): log.info(...)`. For any number of threads.

    The first line is due after `seconds`, or at once.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES, *, at_once: bool = False) -> None:
        self._seconds = seconds
        self._started = time.monotonic()
        self._last = float("-inf") if at_once else self._started
        self._worked = False
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Whether the time for a line has come; then the next one is due after the same time again."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < self._seconds:
                return False
            self._last = now
            return True

    @property
    def elapsed(self) -> float:
        """Seconds since the loop began, when this timer was made, or since its work began."""
        return time.monotonic() - self._started

    def began(self, seconds_ago: float) -> None:
        """A piece of work began so long ago. `elapsed` then counts from the first one's beginning: the time before, in
        which workers are waited for and load their models, says nothing of what is left."""
        with self._lock:
            began = time.monotonic() - seconds_ago
            self._started = min(self._started, began) if self._worked else began
            self._worked = True
