"""Random numbers that belong to the rows of a batch, on a CPU, for any module of plain torch.

A promise, not a speed-up: a row is dropped out alike whichever rows are beside it, so one worker and four draw the
same, and a resumed run draws what the killed one would have drawn. It is kept below the model, where torch asks for the
random numbers themselves: nn.Dropout, F.dropout, F.scaled_dot_product_attention and torch.randn_like all follow it, and
the model says nothing of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LEVELS = 1 << 16  # of the 16 random bits that each element gets

#: Tagged as random for their dropout, which they refuse: attention with dropout takes torch's other path.
_NEVER_RANDOM = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


class RowRandomness(TorchDispatchMode):
    """`with RowRandomness(seeds):` row i of every batch has its own random numbers, which seeds[i] decides.

    The first dimension of what is drawn must be the batch, or the batch times heads or words. Dropout's probability is
    rounded to a multiple of 1/65,536: four elements share one 64-bit random number.

    Raises ValueError for a draw that cannot be divided among the rows, and NotImplementedError for another
    distribution than Bernoulli (dropout) and the standard normal: neither would keep the promise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self._generators = [_generator(seed) for seed in seeds]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return self._bernoulli(*args)
        if func is torch.ops.aten.randn_like.default:
            return self._normal(args[0].shape).to(args[0].dtype)
        if torch.Tag.nondeterministic_seeded in func.tags and func not in _NEVER_RANDOM:
            raise NotImplementedError(f"{func} within RowRandomness: it knows dropout and torch.randn_like")
        return func(*args, **(kwargs or {}))

    def _bernoulli(self, x: Tensor, probability: float = 0.5) -> Tensor:
        """Fill `x` (B, ...) in place: each element is 1 with this probability, else 0."""
        dropped = round((1 - probability) * _LEVELS)
        count = self._per_row(x.shape)
        drawn = x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)
        for row, generator in zip(drawn.view(-1, count), self._generators, strict=True):  # one row stays in the cache
            torch.ge(_int16(generator, count), dropped - _LEVELS // 2, out=row)
        return x if drawn is x else x.copy_(drawn)

    def _normal(self, shape: torch.Size) -> Tensor:
        count = self._per_row(shape)
        rows = [generator.standard_normal(count, dtype=np.float32) for generator in self._generators]
        return torch.from_numpy(np.stack(rows)).view(shape)

    def _per_row(self, shape: torch.Size) -> int:
        """Elements of each row."""
        rows = len(self._generators)
        if not shape or shape[0] % rows:
            raise ValueError(f"{rows} row seeds for a draw of shape {tuple(shape)}; give one a row of the batch")
        return shape.numel() // rows


def _int16(generator: np.random.Generator, count: int) -> Tensor:
    """Uniform 16-bit integers, (count,)."""
    words = generator.bit_generator.random_raw((count + 3) // 4)
    return torch.from_numpy(words.view(np.int16)[:count])


def _generator(seed: int) -> np.random.Generator:
    """SFC64: three times faster than torch's Mersenne twister, which is the slowest part of a dropout on a CPU."""
    return np.random.Generator(np.random.SFC64(seed))
