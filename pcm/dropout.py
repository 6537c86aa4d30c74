"""Dropout and noise whose random numbers are cheap on a CPU, and can belong to the rows of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # of the 16 random bits that each element gets

_row_generators: ContextVar[tuple[torch.Generator, ...] | None] = ContextVar("row_generators", default=None)


@contextmanager
def random_rows(seeds: Sequence[int]) -> Iterator[None]:
    """Within it, row i of every batch on a CPU has its own random numbers, which seeds[i] decides.

    So a row is dropped out alike whichever rows are beside it: a batch that is spread over several workers, or taken in
    parts, draws what it would draw as a whole. Without it all rows follow torch.manual_seed. On other devices a
    generator a row would cost more than the network: there nothing changes.
    """
    token = _row_generators.set(tuple(torch.Generator().manual_seed(seed) for seed in seeds))
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
        kept = _random_int16(x.shape) >= round(self.p * _LEVELS) - _LEVELS // 2
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def normal_like(x: Tensor) -> Tensor:
    """A standard normal draw (B, ...), by `random_rows` where it is in force."""
    generators = _row_generators.get()
    if generators is None or x.device.type != "cpu":
        return torch.randn_like(x)
    _check_rows(generators, x.shape)
    return torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=generator) for generator in generators])


def _random_int16(shape: torch.Size) -> Tensor:
    """Uniform 16-bit integers."""
    generators = _row_generators.get()
    if generators is None:
        words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        return words.view(torch.int16)[: shape.numel()].view(shape)
    _check_rows(generators, shape)
    count = shape[1:].numel()
    rows = torch.empty(shape[0], (count + 3) // 4, dtype=torch.int64)
    for row, generator in zip(rows, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    return rows.view(torch.int16)[:, :count].reshape(shape)


def _check_rows(generators: tuple[torch.Generator, ...], shape: torch.Size) -> None:
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} row seeds for a batch of {shape[0]} rows; give one a row")
