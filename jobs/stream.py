"""Generate and train at once: the first epoch takes the pictures as they are made. Rerun the same command to resume."""

import argparse
from dataclasses import replace

from cluster.generation.pinning import require_joint_patches
from cluster.generation.pools import Pools
from cluster.generation.presets import GENERATION_PRESETS, with_preset
from cluster.session import cluster_cpus, cluster_gpus
from cluster.store.store import join, open_store
from cluster.training.config import TRAINING_PRESETS
from cluster.training.stream import stream
from jobs.cli import make_parser, run_job
from jobs.generate import Prepared, prepare
from jobs.generate import add_arguments as add_generation_arguments
from jobs.train import add_arguments as add_training_arguments
from jobs.train import train_request
from pcm.errors import InputError


def parser() -> argparse.ArgumentParser:
    result = make_parser("stream", __doc__)
    result.add_argument("--data", help="dataset: path or URI; default OUT/dataset, and the run is then OUT/run")
    result.add_argument("--out", required=True, help="where the run goes, or with no --data both: path or URI")
    result.add_argument(
        "--preset", action="append", default=[], metavar="NAME",
        help=f"of generation ({', '.join(GENERATION_PRESETS)}), of training ({', '.join(TRAINING_PRESETS)}), or both",
    )  # fmt: skip
    add_generation_arguments(result)
    training = result.add_argument_group(
        "training", "Its workers take their share of the cluster first: --num-workers GPUs, or --cpus-per-worker CPUs."
    )
    add_training_arguments(training)
    return result


def run(args: argparse.Namespace) -> dict:
    data = args.data or join(args.out, "dataset")
    run_uri = args.out if args.data else join(args.out, "run")
    generation_preset, train_preset = _presets(args.preset)
    args = with_preset(argparse.Namespace(**{**vars(args), "preset": generation_preset}))
    # One seed for both sides; the clip of the dataset is that of the validation pictures.
    request = train_request(
        argparse.Namespace(**{**vars(args), "data": [data], "out": run_uri, "preset": train_preset, "resume": False})
    )
    require_joint_patches(args.clip or "embedded")
    prepared = prepare(open_store(data), args)
    workers, cpus, gpus = _training_share(args, device=prepared.plan.spec.generator.device)
    prepared = replace(prepared, pools=_pools(args, prepared, cpus=workers * cpus, gpus=workers * gpus))
    summary = stream(
        prepared.store,
        prepared.plan,
        replace(request, num_workers=workers, cpus_per_worker=cpus),
        prepared.generate,
        cpus=workers * cpus,
        gpus=workers * gpus,
    )
    return {**summary, "dataset": data}


def _presets(names: list[str]) -> tuple[str | None, str | None]:
    """(generation's, training's) of the names given."""
    generation = [name for name in names if name in GENERATION_PRESETS]
    training = [name for name in names if name in TRAINING_PRESETS]
    unknown = [name for name in names if name not in GENERATION_PRESETS and name not in TRAINING_PRESETS]
    if unknown or len(generation) > 1 or len(training) > 1:
        raise InputError(
            f"--preset {' '.join(names)}: give at most one of {', '.join(GENERATION_PRESETS)} and one of "
            f"{', '.join(TRAINING_PRESETS)}"
        )
    return next(iter(generation), None), next(iter(training), None)


def _training_share(args: argparse.Namespace, *, device: str) -> tuple[int, int, int]:
    """(workers, CPUs of each, GPUs of each): on GPUs one worker with one of them, on CPUs half of them."""
    workers = args.num_workers or 1
    if device == "cuda":
        return workers, args.cpus_per_worker or 1, 1
    return workers, args.cpus_per_worker or max(1, int(cluster_cpus()) // 2 // workers), 0


def _pools(args: argparse.Namespace, prepared: Prepared, *, cpus: float, gpus: float) -> Pools:
    """Generation's actors on what training leaves. Raises InputError when that is nothing."""
    device = prepared.plan.spec.generator.device
    left = {"cpus": cluster_cpus() - cpus, "gpus": cluster_gpus() - gpus}
    if left["cpus"] < 1 or (device == "cuda" and left["gpus"] < 1 and not args.generators):
        raise InputError(
            f"training takes {cpus:g} CPUs and {gpus:g} GPUs of the cluster's {cluster_cpus():g} and "
            f"{cluster_gpus():g}, which leaves none for generation; lower --num-workers or --cpus-per-worker, name "
            "--generators on a cluster that grows, or run jobs.generate first and jobs.train then"
        )
    return Pools.for_cluster(
        device=device,
        **left,
        generators=args.generators,
        scorers=args.scorers,
        clip_gpus=args.clip_gpus,
        node_label=args.node_label,
    )


if __name__ == "__main__":
    run_job(parser(), run)
