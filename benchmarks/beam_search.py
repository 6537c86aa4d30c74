"""Captions per second of beam search at the published size, from features to ids.

python -m benchmarks.beam_search [--device cuda] [--beam 3] [--repeats 5] [--batch 32]

Random weights hardly ever end a caption, so every search takes all 20 steps: the worst case.
"""

import argparse
import json
import statistics

import torch

from benchmarks.matmul_rate import machine, matmul_rate, seconds
from benchmarks.published_size import BATCH, published_model, random_batch
from pcm.decoding import beam_search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--beam", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    device = arguments.device
    model = published_model(device=device).eval()
    batch = random_batch(model.config, device=device, batch=arguments.batch)
    features = (batch["global_feature"], batch["patch_features"])
    rate = matmul_rate(torch.float32, device=device, repeats=arguments.repeats)
    times = seconds(
        lambda: beam_search(model, *features, beam_size=arguments.beam), repeats=arguments.repeats, device=device
    )
    words = (beam_search(model, *features, beam_size=arguments.beam).token_ids != 0).sum(dim=1).float().mean()
    print(
        json.dumps(
            {
                "captions_per_second": round(arguments.batch / statistics.median(times), 1),
                "seconds": round(statistics.median(times), 4),
                "beam": arguments.beam,
                "batch": arguments.batch,
                "words": round(float(words), 1),
                "repeats": arguments.repeats,
                "matmul_gflops": round(rate, 1),
                **machine(device),
            }
        )
    )


if __name__ == "__main__":
    main()
