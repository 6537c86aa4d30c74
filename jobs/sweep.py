"""Search hyper-parameters with Ray Tune: `python -m jobs.sweep --data DATASET --out SWEEP --trials 20`."""

import argparse

from cluster.sources.pictures import PictureSource
from cluster.sweep.search_space import ABLATIONS, DEFAULT_SPACE, SPEC_HELP, parse_param
from cluster.sweep.sweep import SCHEDULERS, SEARCHES, SweepRequest, sweep
from cluster.training.config import TRAINING_PRESETS, parse_override
from cluster.training.train import TrainRequest
from jobs.cli import make_parser, run_job
from pcm.errors import InputError


def parser() -> argparse.ArgumentParser:
    parser = make_parser("sweep", "Train PCM-Net many times on one dataset, with other settings each time.")
    parser.add_argument("--data", required=True, help="dataset: local path or URI")
    parser.add_argument("--out", required=True, help="where the sweep goes: local path or URI")
    parser.add_argument("--trials", type=int, help="settings to try; of a grid, all")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="FIELD=SPEC",
        help=f"vary this field of the config; repeatable; SPEC: {SPEC_HELP}; by default "
        + " ".join(f"{name}={spec}" for name, spec in DEFAULT_SPACE.items()),
    )
    parser.add_argument("--ablation", choices=tuple(ABLATIONS), help="the paper's: K or M from 1 to 7, w from 1 to 6")
    parser.add_argument("--search", default="random", choices=SEARCHES, help="how settings are chosen")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="asha stops poor trials early (of an ablation: none)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every setting; the best is chosen by their mean")
    parser.add_argument("--epochs", type=int, help="passes over the data of a trial (the preset's)")
    parser.add_argument("--seed", type=int, help="the first seed, of trials and of the search (the preset's)")
    parser.add_argument(
        "--preset", help=f"{', '.join(TRAINING_PRESETS)}; by default chosen by the dataset's feature sizes"
    )
    parser.add_argument("--config", help="JSON file of a TrainConfig instead of a preset")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="fix a field; repeatable")
    parser.add_argument("--val-images", help="CIDEr on these pictures: a folder, Parquet, embedded:val")
    parser.add_argument("--val-references", help="their references, in any format that jobs.evaluate reads")
    parser.add_argument("--val-split", help="the split of the references to use")
    parser.add_argument("--clip", help="CLIP for --val-images, if the dataset's has moved")
    parser.add_argument("--concurrent", type=int, help="trials at a time (as many as fit)")
    parser.add_argument("--cpus-per-trial", type=int, default=1, help="CPUs a trial reserves and uses")
    parser.add_argument("--gpus-per-trial", type=float, default=0.0, help="GPU share a trial takes, such as 0.25")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in --out; finished trials are kept")
    return parser


def run(args: argparse.Namespace) -> dict:
    if args.val_images is None and args.val_references:
        raise InputError(f"--val-references {args.val_references}: needs --val-images")
    if args.ablation and (args.param or args.trials or args.search != "random"):
        raise InputError(f"--ablation {args.ablation}: is a grid of its own; leave out --param, --trials and --search")
    params = dict(map(parse_param, args.param))
    if len(params) < len(args.param):
        raise InputError(f"--param {' --param '.join(args.param)}: a field is given twice")
    overrides = dict(parse_override(text) for text in args.set)
    overrides |= {name: value for name in ("epochs", "seed") if (value := getattr(args, name)) is not None}
    validation = None
    if args.val_images:
        validation = PictureSource(images=args.val_images, references=args.val_references, split=args.val_split)
    return sweep(
        SweepRequest(
            train=TrainRequest(
                data=args.data,
                out=args.out,
                preset=args.preset,
                config=args.config,
                overrides=overrides,
                resume=args.resume,
                validation=validation,
                clip=args.clip,
            ),
            params=ABLATIONS[args.ablation] if args.ablation else params,
            trials=args.trials,
            search="grid" if args.ablation else args.search,
            scheduler=args.scheduler or ("none" if args.ablation else "asha"),
            seeds=args.seeds,
            concurrent=args.concurrent,
            cpus_per_trial=args.cpus_per_trial,
            gpus_per_trial=args.gpus_per_trial,
        )
    )


if __name__ == "__main__":
    run_job(parser(), run)
