"""Captions per second of beam search at the published size, from features to ids.

python -m benchmarks.beam_search [--device cuda] [--beam 3] [--repeats 5] [--batch 64] [--max-length 20]

Random weights hardly ever end a caption, so every search takes all --max-length steps: 20, the published limit, is the
worst case; 12 is about what captions of trained models take (COCO's have 10 words), as their searches stop early.
"""

import argparse
import json
import statistics

import torch

from benchmarks.matmul_rate import machine, matmul_rate, seconds
from benchmarks.published_size import published_model, random_batch
from pcm.captioner import BATCH_SIZE
from pcm.decoding import Decoded, beam_search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--beam", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    parser.add_argument("--max-length", type=int, default=20)
    arguments = parser.parse_args()
    device = arguments.device
    model = published_model(device=device).eval()
    batch = random_batch(model.config, device=device, batch=arguments.batch)
    features = (batch["global_feature"], batch["patch_features"])
    rate = matmul_rate(torch.float32, device=device, repeats=arguments.repeats)

    def search() -> Decoded:
        return beam_search(model, *features, beam_size=arguments.beam, max_length=arguments.max_length)

    times = seconds(search, repeats=arguments.repeats, device=device)
    words = (search().token_ids != 0).sum(dim=1).float().mean()
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
