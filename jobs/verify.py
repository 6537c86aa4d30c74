"""Prove a dataset from the store alone: nothing missing, doubled or corrupt. Exit status 1 where it fails."""

import argparse

from cluster.storage import open_store
from cluster.verify import verify
from jobs.cli import make_parser, run_job


def parser() -> argparse.ArgumentParser:
    result = make_parser("verify", __doc__)
    result.add_argument("dataset", help="dataset: path or URI")
    return result


def run(args: argparse.Namespace) -> dict:
    return verify(open_store(args.dataset))


if __name__ == "__main__":
    run_job(parser(), run)
