"""How fast this machine multiplies matrices: the ceiling for everything else here.

python -m benchmarks.matmul_rate [--device cuda] [--repeats 7]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: On a CPU, about the sizes of PCM-Net's own products: batch * positions rows, feed-forward wide. A GPU reaches its
#: rate with large ones only.
CPU_SIZES = (2048, 512, 2048)
GPU_SIZES = (8192, 8192, 8192)


def machine(device: str) -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def seconds(work: Callable[[], Any], *, repeats: int, device: str) -> list[float]:
    """Wall-clock seconds of each of `repeats` calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def matmul_rate(dtype: torch.dtype, *, device: str, repeats: int) -> float:
    """Multiply-adds counted as 2, in GFLOP/s: median of `repeats`."""
    # A CPU without bfloat16 instructions takes hundreds of times longer: measure that on a small product.
    scale = 1 if dtype == torch.float32 or device == "cuda" or has_fast_bfloat16() else 16
    rows, inner, columns = CPU_SIZES if device == "cpu" else GPU_SIZES
    a = torch.randn(rows // scale, inner, device=device).to(dtype)
    b = torch.randn(inner, columns // scale, device=device).to(dtype)
    products = 1 if device == "cpu" else 10
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1] * products
    times = seconds(lambda: [a @ b for _ in range(products)], repeats=repeats, device=device)
    return flops / statistics.median(times) / 1e9


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, PyTorch emulates it, hundreds of times slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rates = {
        name: round(matmul_rate(dtype, device=arguments.device, repeats=arguments.repeats), 1)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    print(json.dumps({"gflops": rates, "repeats": arguments.repeats, **machine(arguments.device)}))


if __name__ == "__main__":
    main()
