"""Caption picture files: `python -m jobs.caption --checkpoint RUN IMAGE...`."""

import argparse
import logging

from cluster.evaluation.captioning import local_checkpoint
from cluster.store.store import local_copy
from jobs.cli import make_parser, run_job
from pcm.captioners.captioner import Captioner
from pcm.errors import InputError

log = logging.getLogger("jobs.caption")


def parser() -> argparse.ArgumentParser:
    parser = make_parser("caption", "Captions and salient concepts of picture files.")
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run of jobs.train: local path or URI")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files")
    parser.add_argument("--beam-size", type=int, default=3, help="1 = greedy")
    parser.add_argument("--clip", help="CLIP to use, if the checkpoint's has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    return parser


def run(args: argparse.Namespace) -> dict:
    """A caption and its concepts for every picture; null, and one line in `errors`, for those that cannot be read."""
    captioner = Captioner.load(
        local_checkpoint(args.checkpoint), clip=args.clip, device=args.device, beam_size=args.beam_size
    )
    found = captioner.caption([_local(image) for image in args.images])
    results = dict(zip(args.images, found, strict=True))
    for image, result in results.items():
        log.info("%s", result.error or f"{image}: {result.caption}")
    errors = {image: result.error for image, result in results.items() if result.error}
    if len(errors) == len(results):
        raise InputError(f"none of {len(results)} pictures can be read; the first: {next(iter(errors.values()))}")
    return {
        "captions": {image: None if result.error else result.caption for image, result in results.items()},
        "concepts": {
            image: [[name, round(probability, 4)] for name, probability in result.concepts]
            for image, result in results.items()
        },
        "errors": errors,
    }


def _local(image: str) -> str:
    """A local path of a picture at a URI; a URI with nothing there stays, to be reported as the file it is not."""
    if "://" not in image:
        return image
    try:
        return str(local_copy(image))
    except InputError:
        return image


if __name__ == "__main__":
    run_job(parser(), run)
