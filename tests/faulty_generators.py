"""A real diffusers pipeline in which some captions do, for real, what generators do to a run."""

import ctypes
import os
import signal

import torch

from cluster.stages.draw import DrawShard
from pcm.diffusers_generator import DiffusersTextToImage
from pcm.spec import GeneratorSpec
from pcm.text_to_image import Drawing, Request, TextToImage

RAISES = "A caption that raises."
CRASHES = "A caption that kills."
HANGS = "A caption that hangs."
BREAKS = "A caption that breaks the device."
NEEDS_MEMORY = "A caption that needs memory."  # too much for more than two pictures at once
NEEDS_TOO_MUCH = "A caption that needs too much memory."


class FaultyTextToImage(DiffusersTextToImage):
    """The captions above do what they say, in any batch that they are in."""

    _broken = False

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> list[Drawing]:
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
        return super().draw_batch(slots, batch_size)


class TiringTextToImage(DiffusersTextToImage):
    """After its sixth batch a process of this generator raises for ever."""

    _batches = 0

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> list[Drawing]:
        type(self)._batches += 1
        if self._batches > 6:
            raise RuntimeError("tired")
        return super().draw_batch(slots, batch_size)


class UselessTextToImage(DiffusersTextToImage):
    """Raises whatever it is to draw, unless it is nothing."""

    def draw_batch(self, slots: dict[int, Request], batch_size: int) -> list[Drawing]:
        if slots:
            raise RuntimeError("useless")
        return super().draw_batch(slots, batch_size)


class DrawFaulty(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return FaultyTextToImage(spec)


class DrawTiring(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return TiringTextToImage(spec)


class DrawUseless(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return UselessTextToImage(spec)


class DrawBroken(DrawShard):
    """Its model is on a device that has failed before anything is drawn."""

    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        FaultyTextToImage._broken = True
        return FaultyTextToImage(spec)
