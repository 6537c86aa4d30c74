"""Seconds of one training step at the published size: forward, loss, backward, value clipping, Adam.

python -m benchmarks.training_step [--device cuda] [--repeats 7] [--batch 32]

The counted FLOPs (matrix products of forward and backward) over the seconds give the rate, and that over the machine's
matmul rate, measured in the same run, the share of what the machine can do. bfloat16 is left out (null) on a CPU that
has no instructions for it.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.matmul_rate import has_fast_bfloat16, machine, matmul_rate, seconds
from benchmarks.published_size import BATCH, published_model, random_batch
from cluster.step import clip_values
from cluster.trainer import MEMORY_KEPT
from pcm.loss import CLIPWeightedCrossEntropy


def linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of a product by oneDNN, from shapes (..., in) and (out, in); torch counts its own only."""
    return 2 * math.prod(x) * weight[0]


def measure(dtype: torch.dtype, *, device: str, repeats: int, batch_size: int) -> dict[str, Any]:
    """Seconds a step (median and fastest), its GFLOP, and the share of the matmul rate at `dtype`."""
    model = published_model(device=device).train()
    batch = random_batch(model.config, device=device, batch=batch_size)
    loss_function = CLIPWeightedCrossEntropy()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(batch["global_feature"], batch["patch_features"], batch["token_ids"])
        loss_function(logits, batch["target_ids"], batch["clip_score"]).backward()
        clip_values(parameters, 0.1)
        optimizer.step()

    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear_flops}) as counter:
        step()
    before = matmul_rate(dtype, device=device, repeats=repeats)
    times = seconds(step, repeats=repeats, device=device)
    rate = (before + matmul_rate(dtype, device=device, repeats=repeats)) / 2
    gflop = counter.get_total_flops() / 1e9
    median = statistics.median(times)
    return {
        "seconds": round(median, 4),
        "fastest": round(min(times), 4),
        "gflop": round(gflop, 1),
        "matmul_gflops": round(rate, 1),
        "share_of_matmul_rate": round(gflop / median / rate, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not MEMORY_KEPT.items() <= os.environ.items():
        # As jobs.train starts its workers; a process reads it when it begins.
        command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MEMORY_KEPT})
    options = {"device": arguments.device, "repeats": arguments.repeats, "batch_size": arguments.batch}
    bfloat16 = arguments.device == "cuda" or has_fast_bfloat16()
    result = {
        "float32": measure(torch.float32, **options),
        "bfloat16_autocast": measure(torch.bfloat16, **options) if bfloat16 else None,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        **machine(arguments.device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
