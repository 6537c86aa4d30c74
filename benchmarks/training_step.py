"""Seconds of one training step at the published size: forward, loss, backward, value clipping, Adam.

python -m benchmarks.training_step [--repeats 7] [--batch 32]
python -m benchmarks.training_step --compare [--repeats 9] [--threads 1]

The counted FLOPs (matrix products of forward and backward) over the seconds give the rate, and that over the machine's
matmul rate, measured in the same run, the share of what the machine can do. bfloat16 is left out (null) on a CPU that
has no instructions for it. On a GPU: benchmarks.gpu.

--compare takes steps in turn as the engine makes them and as plain torch does (dropout by torch's own generator), and
gives the medians of the ratios of neighbours, in wall time and in processor time: what holds on a machine that others
use too.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.matmul_rate import has_fast_bfloat16, machine, matmul_rate, seconds
from benchmarks.published_size import BATCH, published_model, random_batch
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.kernels.quantised import dequantised
from pcm.kernels.row_randomness import RowRandomness


class Step:
    """One step of a network in training on random data, which lies on the device unless it is given.

    Random numbers belong to the rows on a CPU, as in training, unless `plain`.
    """

    def __init__(
        self,
        config: PCMNetConfig,
        *,
        device: str,
        batch_size: int,
        bfloat16: bool,
        compile_mode: str = "none",
        plain: bool = False,
    ) -> None:
        self.model = published_model(config, device=device).train()
        self.batch = random_batch(config, device=device, batch=batch_size)
        self._device, self._bfloat16 = device, bfloat16
        self._by_row = device == "cpu" and compile_mode == "none" and not plain
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
        rows = range(len(batch["token_ids"]))
        with (
            RowRandomness(rows) if self._by_row else nullcontext(),
            torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bfloat16),
        ):
            logits = self.model(batch["global_feature"].float(), patches, batch["token_ids"])
        loss = self._criterion(logits, batch["target_ids"], batch["clip_score"])
        loss.backward()
        torch.nn.utils.clip_grad_value_(self._parameters, 0.1)
        self._optimizer.step()
        return loss.detach()

    def gflop(self) -> float:
        """Of the products of one step, which is taken."""
        with FlopCounterMode(display=False) as counter:
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


def compare(*, repeats: int, batch_size: int) -> dict[str, Any]:
    """Steps of float32 in turn, as the engine makes them and plain ones."""
    settings = {"device": "cpu", "batch_size": batch_size, "bfloat16": False}
    steps = {"kernels": Step(PCMNetConfig(), **settings), "plain": Step(PCMNetConfig(), plain=True, **settings)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    result: dict[str, Any] = {}
    for index, clock in enumerate(("seconds", "processor_seconds")):
        times = {name: [pair[index] for pair in pairs] for name, pairs in taken.items()}
        ratios = [plain / ours for plain, ours in zip(times["plain"], times["kernels"], strict=True)]
        result[clock] = {name: round(statistics.median(values), 4) for name, values in times.items()}
        result[clock]["plain_over_kernels"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    from benchmarks.as_worker import as_worker  # here, because Step is used where there is no Ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--compare", action="store_true", help="against the same step in plain torch")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments = parser.parse_args()
    as_worker("benchmarks.training_step")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = {"repeats": arguments.repeats, "batch_size": arguments.batch}
    if arguments.compare:
        print(json.dumps({**compare(**options), **options, **machine("cpu")}))
        return
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
