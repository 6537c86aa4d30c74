"""Real photos and their captions in, one of our datasets out: jobs.train takes it alone or mixed with drawn ones.

A row for each (photo, caption) pair; a photo's bytes are stored as they are. Rerun the same command to resume.
"""

import argparse
import os

from cluster.ingest.photos import PhotoRequest, featurise_photos
from jobs.cli import make_parser, run_job
from pcm.errors import InputError
from pcm.spec import DEVICES, DTYPES


def parser() -> argparse.ArgumentParser:
    result = make_parser("featurise", __doc__)
    result.add_argument(
        "--images",
        required=True,
        help="folder of JPEG, PNG or WebP files, Parquet with image_id and image, embedded:val, embedded:test",
    )
    result.add_argument(
        "--captions",
        required=True,
        help="Karpathy or COCO JSON, Flickr token, CSV, JSONL or Parquet that names the photo of each caption",
    )
    result.add_argument("--out", required=True, help="dataset: path or URI")
    result.add_argument("--clip", default="embedded", help="open_clip NAME, such as ViT-L-14/openai; that of the mix")
    result.add_argument("--split", default="train", help="split of a Karpathy file (train takes restval too), or all")
    result.add_argument("--limit", type=int, help="the captions of the first N photos of the file only")
    result.add_argument("--shard-size", type=int, default=256, help="pairs in a shard")
    result.add_argument("--workers", type=int, default=min(16, 2 * (os.cpu_count() or 4)), help="threads that read")
    result.add_argument("--device", default="auto", choices=DEVICES, help="where CLIP runs")
    result.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of CLIP")
    return result


def run(args: argparse.Namespace) -> dict:
    for name in ("limit", "shard_size", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    result = featurise_photos(PhotoRequest(**vars(args)))
    manifest = result.manifest
    return {
        "expected": manifest.expected,
        "stored": manifest.stored,
        "quarantined": manifest.quarantined,
        "quarantined_by_reason": manifest.quarantined_by_reason,
        "photos": result.photos,
        "skipped": result.skipped,
        "clip_score_mean": manifest.clip_score_mean,
        "pairs_per_second": round(result.pairs_per_second, 1),
        "seconds": round(result.seconds, 2),
        "dataset": args.out,
    }


if __name__ == "__main__":
    run_job(parser(), run)
