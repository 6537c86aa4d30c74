"""Caption real pictures and score them: `python -m jobs.evaluate --checkpoint RUN --images P --references P`."""

import argparse

from cluster.evaluate import EvaluateRequest, evaluate
from cluster.pictures import PictureSource
from jobs.cli import make_parser, run_job


def parser() -> argparse.ArgumentParser:
    parser = make_parser("evaluate", "Caption pictures with references by beam search and compute the COCO metrics.")
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run of jobs.train: local path or URI")
    parser.add_argument(
        "--images",
        required=True,
        help="folder of pictures, Parquet with image_id and image, embedded:val, embedded:test",
    )
    parser.add_argument(
        "--references",
        help="Karpathy or COCO JSON, Flickr token, CSV, JSONL, Parquet; by default the references column of --images",
    )
    parser.add_argument("--split", help="the split of the references to use, such as test")
    parser.add_argument("--out", help="folder for captions.json (COCO results format) and metrics.json")
    parser.add_argument("--beam-size", type=int, default=3, help="1 = greedy")
    parser.add_argument("--limit", type=int, help="the first pictures by image id only")
    parser.add_argument(
        "--shuffled-baseline", action="store_true", help="also CIDEr of the same captions given to other pictures"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling")
    parser.add_argument("--clip", help="CLIP to use, if the checkpoint's has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    return parser


def run(args: argparse.Namespace) -> dict:
    return evaluate(
        EvaluateRequest(
            checkpoint=args.checkpoint,
            pictures=PictureSource(images=args.images, references=args.references, split=args.split),
            out=args.out,
            beam_size=args.beam_size,
            limit=args.limit,
            shuffled_baseline=args.shuffled_baseline,
            seed=args.seed,
            clip=args.clip,
            device=args.device,
        )
    )


if __name__ == "__main__":
    run_job(parser(), run)
