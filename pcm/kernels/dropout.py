"""Dropout and noise whose random numbers are cheap on a CPU, and can belong to the rows of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16  # of the 16 random bits that each element gets

_row_generators: ContextVar[tuple[np.random.Generator, ...] | None] = ContextVar("row_generators", default=None)


@contextmanager
def random_rows(seeds: Sequence[int]) -> Iterator[None]:
    """Within it, row i of every batch on a CPU has its own random numbers, which seeds[i] decides.

    So a row is dropped out alike whichever rows are beside it: a batch that is spread over several workers, or taken in
    parts, draws what it would draw as a whole. Without it all rows follow torch.manual_seed. On other devices a
    generator a row would cost more than the network: there nothing changes.
    """
    token = _row_generators.set(tuple(_generator(seed) for seed in seeds))
    try:
        yield
    finally:
        _row_generators.reset(token)


class Dropout(nn.Module):
    """nn.Dropout. On a CPU four elements share one 64-bit random number, which makes a training step a sixth shorter.

    There the probability is rounded to a multiple of 1/65,536; like nn.Dropout it follows torch.manual_seed, or the
    seeds of `random_rows`; the first dimension of its input is then the batch.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * self._factors(x)

    def added(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`, of which a CPU in training makes one step."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or x.dtype != residual.dtype:
            return residual + self(x)
        return torch.addcmul(residual, x, self._factors(x))

    def after_relu(self, x: Tensor, *, batch: int) -> Tensor:
        """`self(relu(x))` of `x` (n, width), whose rows belong in equal parts to `batch` samples; overwrites `x`.

        What comes out says by itself where the gradient flows, so no mask as large as the activations is kept. `x` must
        not be a view: autograd would copy the gradient of what it is a view of.
        """
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return self(F.relu(x, inplace=not torch.is_grad_enabled()))
        return _ReluDropout.apply(x, self.p, batch)

    def _factors(self, x: Tensor) -> Tensor:
        """0 where an element is dropped, 1 / (1 - p) elsewhere."""
        return _kept(x.shape, self.p).to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, batch: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.scale = 1 / (1 - p)
        kept = _kept(torch.Size((batch, x.numel() // batch)), p).view_as(x)
        x.relu_().mul_(kept).mul_(ctx.scale)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0).mul_(ctx.scale), None, None


def normal_like(x: Tensor) -> Tensor:
    """A standard normal draw (B, ...), by `random_rows` where it is in force."""
    if x.device.type != "cpu":  # asked first: torch.compile does not follow the rest
        return torch.randn_like(x)
    generators = _row_generators.get()
    if generators is None:
        return torch.randn_like(x)
    _check_rows(generators, x.shape)
    rows = [generator.standard_normal(x.shape[1:], dtype=np.float32) for generator in generators]
    return torch.from_numpy(np.stack(rows)).to(x.dtype)


def _kept(shape: torch.Size, p: float) -> Tensor:
    """Boolean: each element is True with probability 1 - p."""
    return _random_int16(shape) >= round(p * _LEVELS) - _LEVELS // 2


def _random_int16(shape: torch.Size) -> Tensor:
    """Uniform 16-bit integers."""
    generators = _row_generators.get()
    if generators is None:
        seed = int(torch.randint(2**62, ()))
        return _int16(_generator(seed), shape.numel()).view(shape)
    _check_rows(generators, shape)
    count = shape[1:].numel()
    return torch.stack([_int16(generator, count) for generator in generators]).view(shape)


def _int16(generator: np.random.Generator, count: int) -> Tensor:
    words = generator.integers(2**64, size=(count + 3) // 4, dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16)[:count])


def _generator(seed: int) -> np.random.Generator:
    """SFC64: three times faster than torch's Mersenne twister, which is the slowest part of a dropout on a CPU."""
    return np.random.Generator(np.random.SFC64(seed))


def _check_rows(generators: tuple[np.random.Generator, ...], shape: torch.Size) -> None:
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} row seeds for a batch of {shape[0]} rows; give one a row")
