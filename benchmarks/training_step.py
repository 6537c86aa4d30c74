"""Seconds of one training step at the published size: forward, loss, backward, value clipping, Adam.

python -m benchmarks.training_step [--repeats 7] [--batch 32]

The counted FLOPs (matrix products of forward and backward) over the seconds give the rate, and that over the machine's
matmul rate, measured in the same run, the share of what the machine can do. bfloat16 is left out (null) on a CPU that
has no instructions for it. On a GPU: benchmarks.gpu.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.matmul_rate import has_fast_bfloat16, machine, matmul_rate, seconds
from benchmarks.published_size import BATCH, published_model, random_batch
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.kernels.gradient_clipping import clip_values
from pcm.kernels.quantised import dequantised


def linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of a product by oneDNN, from shapes (..., in) and (out, in); torch counts its own only."""
    return 2 * math.prod(x) * weight[0]


class Step:
    """One step of a network in training on random data, which lies on the device unless it is given."""

    def __init__(
        self,
        config: PCMNetConfig,
        *,
        device: str,
        batch_size: int,
        bfloat16: bool,
        compile_mode: str = "none",
    ) -> None:
        self.model = published_model(config, device=device).train()
        self.batch = random_batch(config, device=device, batch=batch_size)
        self._device, self._bfloat16 = device, bfloat16
        self._criterion = CLIPWeightedCrossEntropy()
        self._parameters = list(self.model.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=1e-4, fused=True)
        if compile_mode != "none":
            self.model.compile(mode=compile_mode, dynamic=False, fullgraph=True)

    def __call__(self, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The loss. A `batch` may have patch features in int8, with patch_scale."""
        batch = batch or self.batch
        self._optimizer.zero_grad(set_to_none=True)
        patches = batch["patch_features"]
        if patches.dtype != torch.float32:
            patches = dequantised(patches, batch["patch_scale"])
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self.model(batch["global_feature"].float(), patches, batch["token_ids"])
        loss = self._criterion(logits, batch["target_ids"], batch["clip_score"])
        loss.backward()
        clip_values(self._parameters, 0.1)
        self._optimizer.step()
        return loss.detach()

    def gflop(self) -> float:
        """Of the products of one step, which is taken."""
        custom = {torch.ops.mkldnn._linear_pointwise: linear_flops}
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            self()
        return counter.get_total_flops() / 1e9


def measure(dtype: torch.dtype, *, repeats: int, batch_size: int) -> dict[str, Any]:
    """Seconds a step on this CPU (median and fastest), its GFLOP, and the share of the matmul rate at `dtype`."""
    step = Step(PCMNetConfig(), device="cpu", batch_size=batch_size, bfloat16=dtype == torch.bfloat16)
    gflop = step.gflop()
    before = matmul_rate(dtype, device="cpu", repeats=repeats)
    times = seconds(step, repeats=repeats, device="cpu")
    rate = (before + matmul_rate(dtype, device="cpu", repeats=repeats)) / 2
    median = statistics.median(times)
    return {
        "seconds": round(median, 4),
        "fastest": round(min(times), 4),
        "gflop": round(gflop, 1),
        "matmul_gflops": round(rate, 1),
        "share_of_matmul_rate": round(gflop / median / rate, 3),
    }


def main() -> None:
    from benchmarks.as_worker import as_worker  # here, because Step is used where there is no Ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    as_worker("benchmarks.training_step")
    options = {"repeats": arguments.repeats, "batch_size": arguments.batch}
    result = {
        "float32": measure(torch.float32, **options),
        "bfloat16_autocast": measure(torch.bfloat16, **options) if has_fast_bfloat16() else None,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        **machine("cpu"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
