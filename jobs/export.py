"""A dataset or captioner in published PCM-Net files, WebDataset or Hugging Face Parquet. Rerun to resume."""

import argparse
import logging
import os

from cluster.evaluation.evaluate import local_checkpoint
from cluster.export.export import FORMATS, ExportOptions, export_dataset
from cluster.store.store import open_store
from jobs.cli import make_parser, run_job
from pcm.errors import InputError
from pcm.official.checkpoint import export_checkpoint

log = logging.getLogger("jobs.export")


def parser() -> argparse.ArgumentParser:
    result = make_parser("export", __doc__)
    result.add_argument("--data", help="finished dataset: path or URI")
    result.add_argument("--checkpoint", help="captioner or training run: path or URI")
    result.add_argument("--out", required=True, help="an empty place: path or URI")
    result.add_argument("--to", required=True, choices=FORMATS, help="a captioner: official only")
    result.add_argument("--name", default="synth", help="official: folders are NAME_sp0, NAME_sp1, ...")
    result.add_argument("--max-length", type=int, default=20, help="official: tokens of a sentence with its end")
    result.add_argument("--workers", type=int, default=min(16, 2 * (os.cpu_count() or 4)), help="threads")
    return result


def run(args: argparse.Namespace) -> dict:
    if bool(args.data) == bool(args.checkpoint):
        raise InputError("--data, --checkpoint: give one of the two")
    out = open_store(args.out)
    if args.checkpoint:
        if args.to != "official":
            raise InputError(f"--to {args.to}: a captioner can be exported --to official only")
        files = export_checkpoint(local_checkpoint(args.checkpoint))
        if foreign := sorted(set(out.list()) - set(files)):
            raise InputError(f"--out {args.out}: holds other things ({foreign[0]}); give an empty place")
        for name, data in files.items():
            out.write_bytes(name, data)
        return {"files": sorted(files), "bytes": sum(map(len, files.values())), "out": args.out}
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: must be at least 1")
    options = ExportOptions(name=args.name, max_length=args.max_length, workers=args.workers)
    return {**export_dataset(open_store(args.data), out, to=args.to, options=options), "out": args.out}


if __name__ == "__main__":
    run_job(parser(), run)
