"""Prove a dataset from the store alone: nothing missing, doubled or corrupt. Exit status 1 where it fails."""

import argparse
from collections.abc import Callable, Iterator

from cluster.dataset.layout import Plan
from cluster.dataset.verify import verify
from cluster.generation.repair import repair
from cluster.sources.corpus import CorpusRecord, read_corpus
from cluster.store.store import Store, open_store
from jobs.cli import make_parser, run_job
from pcm.errors import InputError


def parser() -> argparse.ArgumentParser:
    result = make_parser("verify", __doc__)
    result.add_argument("dataset", help="dataset: path or URI")
    result.add_argument("--repair", action="store_true", help="make missing and corrupt shards again, and no others")
    result.add_argument("--upgrade", action="store_true", help="rewrite a dataset of an older schema version in place")
    result.add_argument("--corpus", help="with --repair: where the captions are now, should the plan be damaged")
    return result


def run(args: argparse.Namespace) -> dict:
    store = open_store(args.dataset)
    if args.upgrade:
        from cluster.dataset.upgrade import upgrade

        if args.repair:
            raise InputError("--upgrade, --repair: give one of the two; repair first what is damaged")
        return {**upgrade(store), **verify(store)}
    if not args.repair:
        return verify(store)

    def read_records(plan: Plan) -> Iterator[CorpusRecord]:
        from jobs.generate import corpus_uri

        uri = corpus_uri(args.corpus or plan.corpus)
        if plan.source is None:
            return read_corpus(uri, limit=plan.records)
        return read_corpus(uri, format=plan.source.format, split=plan.source.split, limit=plan.records)

    return repair(
        store,
        draw=lambda plan, shards: _draw(store, plan, shards),
        read_records=read_records,
        truncation_check=_truncation_check,
    )


def _draw(store: Store, plan: Plan, shards: list[int]) -> None:
    from cluster.dataset.vocabularies import vocabularies_stored
    from cluster.generation.generate import generate  # Ray takes seconds to import
    from cluster.generation.pools import Pools
    from cluster.session import cluster_cpus, cluster_gpus, start_ray

    cpus, gpus = 1.0, 0.0
    if shards or not vocabularies_stored(store, plan):
        start_ray()
        cpus, gpus = cluster_cpus(), cluster_gpus()
    generate(store, plan, Pools.for_cluster(device=plan.spec.generator.device, cpus=cpus, gpus=gpus), redo=shards)


def _truncation_check(model: str) -> Callable[[str], bool]:
    from pcm.clip.names import truncation_check

    return truncation_check(model)


if __name__ == "__main__":
    run_job(parser(), run)
