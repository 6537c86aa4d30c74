"""Captions in, a dataset of synthetic images with CLIP scores and features out. Rerun the same command to resume."""

import argparse
from dataclasses import dataclass

from cluster.dataset.layout import CorpusSource, Plan, load_plan
from cluster.dataset.plan import make_plan
from cluster.generation.batch_size import with_batch_size
from cluster.generation.generate import GenerationResult, generate
from cluster.generation.pilot import PilotSize, Prediction, run_pilot
from cluster.generation.pilot import summary as pilot_summary
from cluster.generation.pools import Pools, check_clip_gpus, parse_generators, parse_node_label
from cluster.generation.presets import GENERATION_PRESETS, with_preset
from cluster.generation.progress import RunLimits
from cluster.generation.regenerate import regenerate
from cluster.generation.retry_quarantined import ALL_GENERATOR, parse_reason, retry_quarantined
from cluster.generation.stages.monitor import FaultPolicy
from cluster.session import cluster_cpus, cluster_gpus, start_ray
from cluster.sources.corpus import FORMATS, read_corpus, source_digest
from cluster.store.store import Store, open_store
from jobs.arguments import AUTO, add_spec_arguments, dataset_spec
from jobs.cli import checked, make_parser, run_job
from pcm.clip.names import truncation_check
from pcm.errors import InputError


@dataclass(frozen=True)
class Prepared:
    """A plan that is on the store, and with what it is to be carried out."""

    store: Store
    plan: Plan
    pools: Pools
    faults: FaultPolicy
    watch: RunLimits

    def generate(self) -> GenerationResult:
        return generate(self.store, self.plan, self.pools, faults=self.faults, watch=self.watch)

    def pilot(self, size: PilotSize) -> tuple[Prediction, GenerationResult]:
        return run_pilot(self.store, self.plan, self.pools, size, faults=self.faults, watch=self.watch)


def parser() -> argparse.ArgumentParser:
    result = make_parser("generate", __doc__)
    result.add_argument(
        "--preset",
        help=f"{', '.join(GENERATION_PRESETS)}: its values for what is not given (cluster/generation/presets.py)",
    )
    result.add_argument("--out", required=True, help="dataset: path or URI")
    result.add_argument("--only", metavar="SAMPLE_ID", help="regenerate one sample of --out alone and compare")
    result.add_argument("--image-out", metavar="FILE", help="with --only: write the regenerated picture here")
    result.add_argument(
        "--pilot", metavar="1%|N",
        help="make only so many samples, in evenly spaced shards that the full run skips, at least one a generator; "
        "predict images/s, hours, bytes and cost of the whole",
    )  # fmt: skip
    result.add_argument(
        "--retry-quarantined", metavar="REASON",
        help=f"of the dataset --out, try the samples quarantined for REASON again; {ALL_GENERATOR}: whatever failed "
        "through the generator",
    )  # fmt: skip
    add_arguments(result)
    return result


def add_arguments(result: argparse.ArgumentParser) -> None:
    """What says how a whole dataset is made, for jobs.generate and jobs.stream."""
    result.add_argument("--corpus", help="captions: path or URI, 'embedded' or 'embedded-second' (the pack's)")
    corpus = result.add_argument_group("corpus")
    corpus.add_argument("--corpus-format", default="auto", choices=("auto", *FORMATS))
    corpus.add_argument("--split", default="train", help="split of a Karpathy file (train takes restval too), or all")
    corpus.add_argument("--limit", type=int, help="only the first N records")
    add_spec_arguments(result)
    machine = result.add_argument_group("machine")
    machine.add_argument(
        "--generators", type=checked(parse_generators), metavar="N|MIN:MAX",
        help="generator actors, or the least and most of a pool that grows; default: one a GPU, or one a core",
    )  # fmt: skip
    machine.add_argument("--scorers", type=int, help="CLIP actors; default: as many as share or need a GPU, or one")
    machine.add_argument(
        "--clip-gpus", type=checked(lambda text: check_clip_gpus(float(text))), metavar="X",
        help="GPUs of a CLIP actor: a fraction is taken from a generator's GPU (default 0.2), 1 or more are its own",
    )  # fmt: skip
    machine.add_argument(
        "--node-label",
        type=checked(parse_node_label),
        metavar="KEY=VALUE",
        help="run only on nodes with this Ray label",
    )
    machine.add_argument("--shard-size", type=int, default=256, help="samples a shard: the unit of work and of commit")
    watch = result.add_argument_group(
        "watching and cost",
        "Cost = price x GPUs that the run reserves (one a generator, from the moment it is there) x hours, start-up "
        "included; drawing on CPUs, price x machines of the cluster x hours. Storage and traffic are not in it.",
    )
    watch.add_argument("--price-per-hour", type=float, metavar="X", help="of one GPU, or of one machine on CPUs")
    watch.add_argument("--spot", action="store_true", help="the price is of spot capacity: a label in the summary")
    watch.add_argument(
        "--stop-below-clip-score", type=float, metavar="X",
        help="stop once at least 64 pictures have a mean clip score (raw cosine) two standard errors below X",
    )  # fmt: skip
    faults = result.add_argument_group("faults")
    faults.add_argument("--batch-timeout", type=float, default=900.0, metavar="S", help="seconds a batch may take")
    faults.add_argument(
        "--max-error-share", type=float, default=0.5, metavar="X",
        help="stop once more than this share of at least 64 samples has failed in the generator",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict:
    store = open_store(args.out)
    if args.only:
        return regenerate(store, args.only, image_out=args.image_out)
    if args.retry_quarantined is not None:
        return _retry(store, args)
    pilot = PilotSize.parse(args.pilot) if args.pilot is not None else None
    prepared = prepare(store, with_preset(args))
    if pilot:
        made = prepared.pilot(pilot)
        return {**pilot_summary(*made), "dataset": args.out}
    return {**prepared.generate().summary(), "dataset": args.out}


def prepare(store: Store, args: argparse.Namespace) -> Prepared:
    """Start Ray, resolve the arguments and write the plan. Raises InputError."""
    if not args.corpus:
        raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")
    faults = _faults(args)
    watch = RunLimits(
        price_per_hour=args.price_per_hour, spot=args.spot, stop_below_clip_score=args.stop_below_clip_score
    )
    start_ray()
    spec = dataset_spec(args, gpus=cluster_gpus())
    if spec.clip.model == "null" and watch.stop_below_clip_score is not None:
        raise InputError("--stop-below-clip-score: --clip null gives no scores; name a CLIP")
    uri = corpus_uri(args.corpus)
    source = CorpusSource(source_digest(uri), args.corpus_format, args.split, args.limit)
    pools = _pools(args, device=spec.generator.device)
    if args.batch_size == AUTO:
        spec = with_batch_size(store, spec, pools)
    records = read_corpus(uri, format=args.corpus_format, split=args.split, limit=args.limit)
    plan = make_plan(
        store,
        records,
        spec,
        corpus=args.corpus,
        shard_size=args.shard_size,
        is_truncated=truncation_check(spec.clip.model),
        source=source,
    )
    return Prepared(store, plan, pools, faults, watch)


def _faults(args: argparse.Namespace) -> FaultPolicy:
    return FaultPolicy(batch_timeout=args.batch_timeout, max_error_share=args.max_error_share)


def _retry(store: Store, args: argparse.Namespace) -> dict:
    faults = _faults(args)
    parse_reason(args.retry_quarantined)
    plan = load_plan(store)
    if plan is None:
        raise InputError(f"{store.root}: not a dataset (no plan.json); give the --out of a jobs.generate run")
    start_ray()
    pools = _pools(args, device=plan.spec.generator.device)
    return {**retry_quarantined(store, plan, args.retry_quarantined, pools, faults=faults), "dataset": args.out}


def _pools(args: argparse.Namespace, *, device: str) -> Pools:
    return Pools.for_cluster(
        device=device,
        cpus=cluster_cpus(),
        gpus=cluster_gpus(),
        generators=args.generators,
        scorers=args.scorers,
        clip_gpus=args.clip_gpus,
        node_label=args.node_label,
    )


def corpus_uri(name: str) -> str:
    from pcm import embedded

    return str(embedded.corpus_path(name)) if name in embedded.CORPORA else name


if __name__ == "__main__":
    run_job(parser(), run)
