"""One HTML file about a dataset, a training run and a sweep: `python -m jobs.report --data P --out report.html`."""

import argparse

from cluster.report.make import ReportRequest, make_report
from cluster.sources.pictures import PictureSource
from jobs.cli import make_parser, run_job
from pcm.errors import InputError


def parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "report",
        "Show a dataset, a training run, its metrics and captions, and a sweep in one HTML file that needs no network. "
        "Give any of --data, --run, --evaluation and --sweep; paths or URIs.",
    )
    parser.add_argument("--data", help="dataset of jobs.generate")
    parser.add_argument("--run", help="run of jobs.train")
    parser.add_argument("--evaluation", help="folder that jobs.evaluate wrote (its --out)")
    parser.add_argument("--sweep", help="sweep of jobs.sweep")
    parser.add_argument("--images", help="real pictures for the run's captioner: as for jobs.evaluate")
    parser.add_argument("--references", help="their captions by people: as for jobs.evaluate")
    parser.add_argument("--split", help="the split of the references to use, such as test")
    parser.add_argument("--out", required=True, help="the HTML file")
    parser.add_argument("--title", help="headline; by default it says what is in the report")
    parser.add_argument("--price-per-hour", type=float, metavar="X", help="of one GPU, or of one machine on CPUs")
    parser.add_argument("--seed", type=int, default=0, help="of the shards and pictures that are drawn at random")
    parser.add_argument("--clip", help="CLIP to use, if the run's has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to caption")
    return parser


def run(args: argparse.Namespace) -> dict:
    if args.images is None and (args.references or args.split):
        raise InputError("--images is missing: the pictures that --references and --split are about")
    pictures = None
    if args.images is not None:
        pictures = PictureSource(images=args.images, references=args.references, split=args.split)
    return make_report(
        ReportRequest(
            out=args.out,
            data=args.data,
            run=args.run,
            evaluation=args.evaluation,
            sweep=args.sweep,
            pictures=pictures,
            title=args.title,
            price_per_hour=args.price_per_hour,
            seed=args.seed,
            clip=args.clip,
            device=args.device,
        )
    )


if __name__ == "__main__":
    run_job(parser(), run)
