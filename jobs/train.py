"""Train PCM-Net on a dataset: `python -m jobs.train --data DATASET --out RUN`."""

import argparse
import logging

from cluster.sources.pictures import PictureSource
from cluster.training.config import TRAINING_PRESETS, parse_override
from cluster.training.train import TrainRequest, train
from jobs.cli import make_parser, run_job
from pcm.errors import InputError

log = logging.getLogger("jobs.train")


def parser() -> argparse.ArgumentParser:
    parser = make_parser("train", "Train PCM-Net on the pairs of a dataset that jobs.generate made.")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="DATASET[=WEIGHT]",
        help="dataset: local path or URI; repeatable. WEIGHT: how often each of its rows comes in an epoch (1)",
    )
    parser.add_argument("--out", required=True, help="where the run goes: local path or URI")
    parser.add_argument(
        "--preset", help=f"{', '.join(TRAINING_PRESETS)}; by default chosen by the dataset's feature sizes"
    )
    parser.add_argument("--seed", type=int, help="of weights, hold-out, order, dropout (the preset's)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    parser.add_argument("--clip", help="CLIP for --val-images, if the dataset's has moved")
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What jobs.train and jobs.stream have in common."""
    parser.add_argument("--fraction", type=float, help="train on this share of the captions; 0.2 contains 0.1 (1)")
    parser.add_argument("--min-clip-score", type=float, metavar="X", help="train on pairs of at least this raw cosine")
    parser.add_argument("--config", help="JSON file of a TrainConfig instead of a preset")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field; repeatable")
    parser.add_argument("--epochs", type=int, help="passes over the data (the preset's)")
    parser.add_argument("--val-images", help="choose the best epoch on these pictures: a folder, Parquet, embedded:val")
    parser.add_argument("--val-references", help="their references, in any format that jobs.evaluate reads")
    parser.add_argument("--val-split", help="the split of the references to use")
    parser.add_argument("--num-workers", type=int, help="DDP workers (one a GPU, or one)")
    parser.add_argument("--cpus-per-worker", type=int, help="CPUs a worker reserves and uses (all, divided)")
    parser.add_argument(
        "--worker-label",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="place workers on nodes with this label only, such as pcmnet.io/role=training; repeatable",
    )
    parser.add_argument("--keep-checkpoints", type=int, default=2, help="those of the best epochs, besides the newest")
    parser.add_argument(
        "--checkpoint-every-steps", type=int, metavar="N", help="a crash costs N steps at most (else an epoch)"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="local folder (disk or /dev/shm) for features as raw arrays, 133 kB a row with ViT-L/14 (69 with --set "
        "feature_dtype=int8): decoded once a machine; yours to delete",
    )
    parser.add_argument("--max-failures", type=int, default=3, help="lost workers before the run is given up")


def run(args: argparse.Namespace) -> dict:
    return train(train_request(args))


def train_request(args: argparse.Namespace) -> TrainRequest:
    overrides = dict(parse_override(text) for text in args.set)
    own = ("epochs", "seed", "fraction", "min_clip_score")
    overrides |= {name: value for name in own if (value := getattr(args, name)) is not None}
    return TrainRequest(
        data=args.data,
        out=args.out,
        preset=args.preset,
        config=args.config,
        overrides=overrides,
        resume=args.resume,
        validation=_validation(args),
        clip=args.clip,
        num_workers=args.num_workers,
        cpus_per_worker=args.cpus_per_worker,
        worker_labels=dict(map(_label, args.worker_label)),
        checkpoint_every_steps=args.checkpoint_every_steps,
        cache_dir=args.cache_dir,
        keep_checkpoints=args.keep_checkpoints,
        max_failures=args.max_failures,
    )


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"--worker-label {text}: write NAME=VALUE, such as pcmnet.io/role=training")
    return name, value


def _validation(args: argparse.Namespace) -> PictureSource | None:
    if args.val_images is None:
        if args.val_references:
            raise InputError(f"--val-references {args.val_references}: needs --val-images")
        log.info("no --val-images: the best epoch is chosen on a held-out part of the synthetic pairs")
        return None
    return PictureSource(images=args.val_images, references=args.val_references, split=args.val_split)


if __name__ == "__main__":
    run_job(parser(), run)
