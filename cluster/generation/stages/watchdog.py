"""A clock that ends the process when a batch takes too long, and a note of where it stood for the process after it."""

import faulthandler
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.store.temporary import PREFIX, delete_leftovers


class Watchdog:
    """Ends the process from a thread that needs no interpreter lock, so a kernel that holds it cannot escape.

    Before that it writes every thread's stack to a file that bears the actor's id, which the process that Ray restarts
    in its place finds on the same machine. Between batches there is no such file. `within`: a source file that is on
    the stack of the thread that works.
    """

    def __init__(self, actor_id: str, *, within: str) -> None:
        delete_leftovers()
        self._within = within
        self._path = Path(tempfile.gettempdir()) / f"{PREFIX}watchdog-{actor_id}.txt"

    def last_words(self) -> str:
        """Where the process before this one hung, or "" if it ended in another way; asked once."""
        try:
            stacks = self._path.read_text()
        except FileNotFoundError:
            return ""
        self._path.unlink()
        threads = [stack.splitlines() for stack in stacks.split("\n\n")]
        drawing = [lines for lines in threads if any(self._within in line for line in lines)]
        frames = [line.strip() for lines in drawing for line in lines if line.strip().startswith("File")]
        return frames[0] if frames else "an unknown place" if stacks else ""

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """The process ends unless this is left within so many seconds."""
        with self._path.open("w") as file:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._path.unlink(missing_ok=True)
