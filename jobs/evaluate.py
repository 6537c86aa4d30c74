"""Caption real pictures and score them: `python -m jobs.evaluate --checkpoint RUN --images P --references P`."""

import argparse
import logging

from cluster.evaluation.evaluate import EvaluateRequest, evaluate, evaluate_results
from cluster.evaluation.experiments import EXPERIMENTS, SPLIT, comparison_table, experiment, experiments_table
from cluster.sources.pictures import PictureSource
from jobs.cli import make_parser, run_job
from pcm.errors import InputError

log = logging.getLogger("jobs.evaluate")


def parser() -> argparse.ArgumentParser:
    parser = make_parser("evaluate", "Caption pictures with references by beam search and compute the COCO metrics.")
    parser.add_argument("--checkpoint", help="checkpoint or run of jobs.train: local path or URI")
    parser.add_argument("--results", help="score this COCO results file instead; needs --references alone")
    parser.add_argument(
        "--images",
        help="folder of pictures, Parquet with image_id and image, embedded:val, embedded:test",
    )
    parser.add_argument(
        "--references",
        help="Karpathy or COCO JSON, Flickr token, CSV, JSONL, Parquet; by default the references column of --images",
    )
    parser.add_argument("--split", help="the split of the references to use, such as test")
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help=f"put the paper's figures beside ours: {', '.join(EXPERIMENTS)}; chooses --split {SPLIT}",
    )
    parser.add_argument("--list-experiments", action="store_true", help="show the paper's experiments and end")
    parser.add_argument("--num-workers", type=int, help="caption on so many Ray actors (in this process, without Ray)")
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
    if args.list_experiments:
        log.info("experiments of arXiv 2501.00437:\n%s", experiments_table())
        return {"experiments": {name: {"train": found.training, **found.paper} for name, found in EXPERIMENTS.items()}}
    split = args.split
    if args.experiment and split is None and experiment(args.experiment).pictures != "NoCaps":
        split = SPLIT
    if args.results and (args.checkpoint or args.num_workers):
        raise InputError(f"--results {args.results}: holds captions already; leave out --checkpoint and --num-workers")
    images = args.references if args.results else args.images
    if images is None:
        raise InputError("--references is missing" if args.results else "--images is missing: the pictures to caption")
    request = EvaluateRequest(
        checkpoint=args.checkpoint,
        pictures=PictureSource(images=images, references=args.references, split=split),
        out=args.out,
        beam_size=args.beam_size,
        limit=args.limit,
        shuffled_baseline=args.shuffled_baseline,
        seed=args.seed,
        clip=args.clip,
        device=args.device,
        num_workers=args.num_workers,
        experiment=args.experiment,
    )
    summary = evaluate_results(request, args.results) if args.results else evaluate(request)
    if args.experiment:
        log.info("%s", comparison_table(args.experiment, summary["paper"]))
    return summary


if __name__ == "__main__":
    run_job(parser(), run)
