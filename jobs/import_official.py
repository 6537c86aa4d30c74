"""Published PCM-Net data or checkpoints in, one of our datasets or captioners out. Rerun the same command to resume."""

import argparse
import logging
import os

from cluster.generation.pinning import clip_of_given_features
from cluster.ingest.published import ImportRequest, import_dataset, read_concepts, read_vocabulary
from cluster.sources.corpus import FORMATS
from cluster.store.store import join, local_copy, open_store
from cluster.training.config import parse_override
from jobs.cli import make_parser, run_job
from pcm.captioners.captioner import MODEL_FILE
from pcm.errors import InputError
from pcm.official.checkpoint import SETTINGS, import_checkpoint
from pcm.spec import DEVICES, DTYPES

log = logging.getLogger("jobs.import_official")


def parser() -> argparse.ArgumentParser:
    result = make_parser("import_official", __doc__)
    result.add_argument("--out", required=True, help="dataset or captioner: path or URI")
    result.add_argument("--vocabulary", required=True, help="vocabulary.txt")
    result.add_argument("--concepts", help="concept pickle (or ours); default for a dataset: built with --clip")
    result.add_argument("--clip", required=True, help="the open_clip NAME of the features, such as ViT-L-14/openai")
    data = result.add_argument_group("a dataset")
    data.add_argument("--annotations", help="pickled list of annotations")
    data.add_argument(
        "--images", help="folder of IMAGE_ID.jpg; {split_id} in it is replaced, as in images/coco_sp{split_id}"
    )
    data.add_argument("--features", help="folder of IMAGE_ID.npz, likewise; default: computed with --clip")
    data.add_argument("--clip-head", metavar="PTH", help="take the CLIP head of this checkpoint; default: load --clip")
    data.add_argument("--captions", help="the sentences as written, any caption file; default: from the word ids")
    data.add_argument("--captions-format", default="auto", choices=("auto", *FORMATS))
    data.add_argument("--captions-split", default="train", help="split of a Karpathy file")
    data.add_argument("--shard-size", type=int, default=256)
    data.add_argument("--workers", type=int, default=min(16, 2 * (os.cpu_count() or 4)), help="threads")
    data.add_argument("--device", default="auto", choices=DEVICES)
    data.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    model = result.add_argument_group("a captioner")
    model.add_argument("--checkpoint", help="published .pth")
    model.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help=f"repeatable; of {', '.join(SETTINGS)}"
    )
    return result


def run(args: argparse.Namespace) -> dict:
    if bool(args.annotations) == bool(args.checkpoint):
        raise InputError("--annotations, --checkpoint: give one of the two, for a dataset or a captioner")
    return _captioner(args) if args.checkpoint else _dataset(args)


def _dataset(args: argparse.Namespace) -> dict:
    if not args.images:
        raise InputError("--images: missing; a dataset is its pictures, give their folder")
    if args.shard_size < 1 or args.workers < 1:
        raise InputError("--shard-size, --workers: must be at least 1")
    names = (
        "annotations images vocabulary out clip features concepts clip_head captions captions_format captions_split "
        "shard_size workers device dtype"
    )
    result = import_dataset(ImportRequest(**{name: getattr(args, name) for name in names.split()}))
    manifest = result.manifest
    return {
        "expected": manifest.expected,
        "stored": manifest.stored,
        "quarantined": manifest.quarantined,
        "quarantined_by_reason": manifest.quarantined_by_reason,
        "skipped": result.skipped,
        "captions_from_file": result.captions_from_file,
        "captions_recovered": result.captions_recovered,
        "clip_score_mean": manifest.clip_score_mean,
        "images_per_second": round(result.images_per_second, 1),
        "seconds": round(result.seconds, 2),
        "dataset": args.out,
    }


def _captioner(args: argparse.Namespace) -> dict:
    if not args.concepts:
        raise InputError("--concepts: missing; a captioner needs the concept file it was trained with")
    store = open_store(args.out)
    others = sorted(set(store.list()))
    files = import_checkpoint(
        local_copy(args.checkpoint),
        vocabulary=read_vocabulary(args.vocabulary),
        concepts=read_concepts(args.concepts),
        clip=clip_of_given_features(args.clip).identity(),
        settings=dict(parse_override(text) for text in args.set),
    )
    if foreign := sorted(set(others) - set(files)):
        raise InputError(f"--out {args.out}: holds other things ({foreign[0]}); give an empty place")
    for name, data in files.items():
        store.write_bytes(name, data)
    log.info("imported %s", args.checkpoint)
    return {"checkpoint": args.out, "model": join(args.out, MODEL_FILE), "bytes": sum(map(len, files.values()))}


if __name__ == "__main__":
    run_job(parser(), run)
