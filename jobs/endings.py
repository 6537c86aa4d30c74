"""How a job ends before its time, or with nobody to read what it prints.

SIGINT and SIGTERM: one line, the process unwinds, and within GRACE_SECONDS it and all it started are gone, with 130 or
143. Whatever is committed is whole (a shard is one put, and the manifest comes last), so nothing is waited for that
takes longer. A second signal ends it at once. A closed or full stdout or stderr changes no exit status.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

#: For unwinding.
GRACE_SECONDS = 6.0
#: For the thread to notice the signal whose handler the main thread is leaving.
_NOTICE_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised in the main thread by the first signal, for `finally` and `with` to tidy up."""


class StopSignals:
    """Watches for SIGINT and SIGTERM while a job runs; `end_if_received` gives the job their status. `again`: how the
    job goes on, for its one line.

    A thread does it, to which Python hands each signal as it comes: Ray and Ray Train put handlers of their own in
    place of ours, and the main thread may be deep in a computation.
    """

    def __init__(self, again: str) -> None:
        self._again = again
        self._first: int | None = None
        self._said = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In the main thread; in any other one nothing is watched, as Python allows it nowhere else."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would only save the state of Ray Tune
        previous = {number: signal.signal(number, self._raise) for number in SIGNALS}
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(writer)  # which ends the thread

    def end_if_received(self) -> None:
        """Of a job that an exception ends. Does not return when a signal has come: what was started is ended, and so is
        this process.

        Ray is not asked to leave: where another thread is in a call of it, that ends the process by a signal of its
        own. A cluster that was joined sees that this process is gone, and takes its actors away.
        """
        if self._said.wait(_NOTICE_SECONDS):
            self._end()

    def _raise(self, number: int, frame: object) -> None:
        # At a second one the thread has ended the process by now.
        raise Stopped

    def _watch(self, reader: int) -> None:
        try:
            while data := os.read(reader, 64):
                for number in data:
                    if number in SIGNALS:
                        self._received(number)
        finally:
            os.close(reader)

    def _received(self, number: int) -> None:
        if self._first is not None:
            self._end()
        self._first = number
        name = signal.Signals(number).name
        logging.disable()
        say(f"stopped by {name}: what is written is whole; {self._again}")
        # Whatever still writes there has nothing to tell: Ray's processes, threads that are cut off.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
        self._said.set()
        deadline = threading.Timer(GRACE_SECONDS, self._end)
        deadline.daemon = True
        deadline.start()

    def _end(self) -> NoReturn:
        assert self._first is not None
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(128 + self._first)


def descendants(pid: int) -> list[int]:
    """Every process that this one started, and those that they did, nearest first (of Linux: /proc)."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "PID (NAME) STATE PARENT ...", where the name may hold anything.
            parent = status.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(status.parent.name))
    found = list(children.get(pid, []))
    for each in found:
        found.extend(children.get(each, []))
    return found


def say(message: str) -> None:
    """One line on stderr, if it can be written to."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)


class Stdout:
    """The stream of this process that `print_summary` and `print_text` write to: sys.stdout, also while it is kept."""

    def __init__(self) -> None:
        self._kept: TextIO | None = None

    @property
    def stream(self) -> TextIO:
        return sys.stdout if self._kept is None else self._kept

    @contextlib.contextmanager
    def kept(self, to_the_end: bool) -> Iterator[None]:
        """Let sys.stdout be stderr for all others: Ray prints there what its other processes log, also after the
        summary and while the interpreter exits. `to_the_end`: of the process.
        """
        if self._kept is not None:  # a job that runs in another one
            yield
            return
        self._kept = sys.stdout
        sys.stdout = sys.stderr
        try:
            yield
        finally:
            if not to_the_end:
                sys.stdout, self._kept = self._kept, None


STDOUT = Stdout()


def print_summary(line: str) -> None:
    """The last line of stdout. Where nobody can read it, stderr says so: what the job did is done."""
    try:
        print(line, file=STDOUT.stream, flush=True)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        discard(STDOUT.stream)
        say(f"done, but stdout cannot be written ({said}): {line}")


def print_text(text: str) -> None:
    """Text on stdout, for as long as somebody reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=STDOUT.stream)
    flush_streams()


def open_streams() -> None:
    """Give a job that was started without stdin, stdout or stderr /dev/null: else the first file that it opens would
    take the number, and get what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as of stderr: what it has no letter for is no failure


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where its locale names files otherwise: captions and names of
    pictures are UTF-8, whatever the locale. What this process starts inherits it.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def flush_streams() -> None:
    """Before the interpreter does: it would make status 120 of a pipe that nobody reads."""
    for stream in (STDOUT.stream, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)


def discard(stream: TextIO) -> None:
    """Let what is left in a stream's buffer, and all that comes, go to /dev/null."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
