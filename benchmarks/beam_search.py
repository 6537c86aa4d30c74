"""Captions per second of beam search at the published size, from features to ids.

python -m benchmarks.beam_search [--device cuda] [--beam 3] [--repeats 5] [--batch 64]
python -m benchmarks.beam_search --captions CORPUS [--train-steps 400] [--weights FILE]

Random weights never end a caption, so every search takes all 20 steps: the worst case. With --captions (any corpus that
jobs.generate reads; "embedded") the model is first taught, on the CPU, to caption pictures whose patches show the words
of such a caption, one each: then captions have the length, and searches the early end, of a trained captioner. Held-out
captions are decoded. --weights keeps that model for the next time. --plain decodes without packed weights.
"""

import argparse
import itertools
import json
import logging
import statistics
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.matmul_rate import machine, matmul_rate, seconds
from benchmarks.published_size import WordPictures, published_model, random_batch, train
from cluster.sources.corpus import read_corpus
from pcm import embedded
from pcm.captioners.captioner import BATCH_SIZE
from pcm.captioners.pcmnet.decoding import Decoded, beam_search
from pcm.captioners.pcmnet.model import PCMNet
from pcm.kernels.packed_linear import for_decoding

#: Captions of the corpus that are learned from, and those after them that are decoded.
LEARNED = 20_000


def taught(model: PCMNet, corpus: str, *, batch_size: int, steps: int, weights: Path | None) -> dict[str, Tensor]:
    """Teach the model, or read what was taught; one batch of held-out pictures."""
    usable = (record.caption for record in read_corpus(embedded.caption_file(corpus)) if not record.reason)
    captions = list(itertools.islice(usable, LEARNED + batch_size))
    pictures = WordPictures(captions, model.config)
    held_out = range(len(captions) - batch_size, len(captions))
    if weights and weights.exists():
        safetensors.torch.load_model(model, weights)
    else:
        train(model, pictures, rows=held_out.start, steps=steps)
        if weights:
            safetensors.torch.save_model(model, str(weights))
    return pictures.batch(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--beam", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH_SIZE)
    parser.add_argument("--captions", metavar="CORPUS", help="teach the model on these first; 'embedded', or a file")
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="read or keep what was taught, safetensors")
    parser.add_argument("--plain", action="store_true", help="plain torch: weights are not packed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = arguments.device
    model = published_model(device="cpu").eval()
    if arguments.captions:
        batch = taught(
            model, arguments.captions,
            batch_size=arguments.batch, steps=arguments.train_steps, weights=arguments.weights,
        )  # fmt: skip
    else:
        batch = random_batch(model.config, device="cpu", batch=arguments.batch)
    model.to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    features = (batch["global_feature"], batch["patch_features"])
    rate = matmul_rate(torch.float32, device=device, repeats=arguments.repeats)

    def search() -> Decoded:
        network = model if arguments.plain else for_decoding(model, rows=arguments.batch * arguments.beam)
        return beam_search(network, *features, beam_size=arguments.beam)

    times = seconds(search, repeats=arguments.repeats, device=device)
    token_ids = search().token_ids
    correct = (token_ids[:, : batch["target_ids"].shape[1]] == batch["target_ids"]).sum() / (
        batch["target_ids"] >= 0
    ).sum()
    print(
        json.dumps(
            {
                "captions_per_second": round(arguments.batch / statistics.median(times), 1),
                "seconds": round(statistics.median(times), 4),
                "plain": arguments.plain,
                "beam": arguments.beam,
                "batch": arguments.batch,
                "words": round(float((token_ids != 0).sum(dim=1).float().mean()), 1),
                "words_of_the_references": round(float((batch["target_ids"] > 0).sum(dim=1).float().mean()), 1),
                "words_right_in_place": round(float(correct), 3) if arguments.captions else None,
                "repeats": arguments.repeats,
                "matmul_gflops": round(rate, 1),
                **machine(device),
            }
        )
    )


if __name__ == "__main__":
    main()
