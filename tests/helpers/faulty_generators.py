"""Generators in which some captions do, for real, what generators do to a run.

The faults are in a mix-in: faulty_pipeline.py has it in a real diffusers pipeline. `Pixels` draws one pixel a seed, for
tests in which processes die again and again and would spend their time on importing diffusers.
"""

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.generation.drawing import UNGUARDED, Drawing, Guard, Request, TextToImage
from pcm.generation.isolation import IsolatedDrawing
from pcm.generation.null_generator import NullTextToImage
from pcm.spec import GeneratorSpec

RAISES = "A caption that raises."
CRASHES = "A caption that kills."
HANGS = "A caption that hangs."
BREAKS = "A caption that breaks the device."
NEEDS_MEMORY = "A caption that needs memory."  # too much for more than two pictures at once
NEEDS_TOO_MUCH = "A caption that needs too much memory."
FILLS_MEMORY = "A caption that fills the machine's memory."


_MEBIBYTE = 1 << 20


class Pixels:
    """Pictures of one pixel, whose colour is the seed, in isolated batches."""

    device_name = "none"

    def __init__(self, spec: GeneratorSpec) -> None:
        self._null = NullTextToImage(spec)
        self._isolated = IsolatedDrawing(self.draw_batch, batch_size=spec.batch_size, max_attempts=spec.max_attempts)

    def draw(self, requests: Sequence[Request], guard: Guard = UNGUARDED) -> list[Drawing]:
        return self._isolated.draw(requests, guard)

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
        return self._null.draw(list(slots.values()))


class Faults:
    """The captions above do what they say, in any batch that they are in."""

    _broken = False

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
        captions = {request.caption for request in slots.values()}
        if BREAKS in captions:
            type(self)._broken = True
        if self._broken:
            raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")
        if RAISES in captions:
            raise ValueError("no such colour\nin a long text")
        if NEEDS_TOO_MUCH in captions or (NEEDS_MEMORY in captions and batch_size > 2):
            torch.empty(1 << 50)
        if CRASHES in captions:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in captions:
            ctypes.PyDLL(None).sleep(100_000)  # PyDLL: the interpreter lock is held all the while
        return super().draw_batch(slots, batch_size)  # type: ignore[misc]


class FaultyPixels(Faults, Pixels):
    pass


class TiringPixels(Pixels):
    """After its sixth batch a process of this generator raises for ever."""

    _batches = 0

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
        type(self)._batches += 1
        if self._batches > 6:
            raise RuntimeError("tired")
        return super().draw_batch(slots, batch_size)


class UselessPixels(Pixels):
    """Raises whatever it is to draw, unless it is nothing."""

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
        if slots:
            raise RuntimeError("useless")
        return []


class DrawPixels(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return Pixels(spec)


class DrawFaulty(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return FaultyPixels(spec)


class DrawTiring(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return TiringPixels(spec)


class DrawUseless(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return UselessPixels(spec)


class DrawBroken(DrawShard):
    """Its device has failed before anything is drawn."""

    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        FaultyPixels._broken = True
        return FaultyPixels(spec)


class DrawNotLoaded(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        raise InputError("mend the model")


def not_loaded_by_the_first(claim: Path) -> type[DrawShard]:
    """The first process that loads the model cannot. `claim`: a file that is not there yet."""

    class DrawUnlessFirst(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            if _is_first(claim):
                raise OSError("a disk of this machine is bad")
            return Pixels(spec)

    return DrawUnlessFirst


def loaded_by_the_first_alone(claim: Path) -> type[DrawShard]:
    """All but the first process that tries find no model. `claim`: a file that is not there yet."""

    class DrawIfFirst(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            if _is_first(claim):
                return Pixels(spec)
            raise InputError("no such folder on this machine")

    return DrawIfFirst


def slow_at_first(claim: Path) -> type[DrawShard]:
    """The first process that draws anything takes for ever over its first batch."""

    class PixelsSlowAtFirst(Pixels):
        def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
            if slots and _is_first(claim):
                time.sleep(100_000)
            return super().draw_batch(slots, batch_size)

    class DrawSlowAtFirst(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            return PixelsSlowAtFirst(spec)

    return DrawSlowAtFirst


class SlowStore(Store):
    """Takes four seconds for a shard: longer than it takes to begin the next one."""

    def write_bytes(self, key: str, data: bytes) -> None:
        if key.startswith("shards/"):
            time.sleep(4)
        super().write_bytes(key, data)

    def __reduce__(self) -> tuple:
        return SlowStore, (self.root, self.fs, self.prefix, self._single)


def hungry(claim: Path | None) -> type[DrawShard]:
    """FILLS_MEMORY takes ever more memory: always, or in the first process that draws it (`claim`: no file yet)."""

    class HungryPixels(Pixels):
        def draw_batch(self, slots: dict[int, Request], batch_size: int) -> Sequence[Drawing | Future[Drawing]]:
            captions = {request.caption for request in slots.values()}
            held = []
            while FILLS_MEMORY in captions and (claim is None or _is_first(claim)):
                held.append(bytearray(os.urandom(_MEBIBYTE)) * 64)
                time.sleep(0.05)  # Ray's memory monitor looks four times a second
            return super().draw_batch(slots, batch_size)

    class DrawHungry(DrawShard):
        @staticmethod
        def load(spec: GeneratorSpec) -> TextToImage:
            return HungryPixels(spec)

    return DrawHungry


def _is_first(claim: Path) -> bool:
    """Whether this process was the first one to ask."""
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return claim.read_text() == str(os.getpid())
    return True
