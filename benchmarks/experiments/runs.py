"""Training and testing variants, several processes at a time, one core each; what is done is not done again.

A run is jobs.train's own loop with one worker, called in this process as Ray Train's local mode calls it, then
jobs.evaluate's own evaluation. Its result is a small JSON file under OUT/results, named by the digest of all that its
numbers depend on (settings, seed, data, pictures), so that experiments share runs and nothing stale is reported.
"""

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.results import file_digest, key_of, read_result, write_result
from benchmarks.experiments.settings import BASE, DOMAINS, FIRST_SEED, NO_CXE, PRESET, Variant
from cluster.dataset.documents import load_manifest
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.request import EvaluateRequest
from cluster.numbers import duration
from cluster.sources.pictures import PictureSource, resolved
from cluster.store.store import open_store
from cluster.sweep.sweep import without_paths
from cluster.training.checkpoints import best_epoch
from cluster.training.reporting import METRICS_KEY
from cluster.training.request import TrainRequest
from cluster.training.run_spec import RunSpec
from cluster.training.train import planned_run
from pcm.errors import InputError

log = logging.getLogger(__name__)

#: Of jobs.evaluate: what a result keeps.
METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "CLIPScore", "RefCLIPScore", "CIDEr_shuffled", "n")
SAMPLE_CAPTIONS = 8


@dataclass(frozen=True)
class Job:
    """One training: a variant with a seed, known by the digest of what its numbers depend on."""

    variant: Variant
    seed: int
    key: str
    run: RunSpec
    tests: Mapping[str, PictureSource]  # pictures to caption, by domain


def data_path(out: Path, domain: str, data: str) -> Path:
    return out / "data" / domain / data


def planned(variants: Iterable[Variant], out: Path, *, seeds: int, test: bool = True) -> list[Job]:
    """The runs of some variants, each once; without `test` no test picture is looked at.

    Raises InputError where their data has not been prepared.
    """
    jobs = {}
    for variant in variants:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            job = _planned(variant, seed, out, test=test)
            jobs[job.key] = job
    return list(jobs.values())


def _planned(variant: Variant, seed: int, out: Path, *, test: bool) -> Job:
    data = data_path(out, variant.domain, variant.data)
    validation = pictures(DOMAINS[variant.domain].validation)
    manifest = load_manifest(open_store(data))
    clip_weight = NO_CXE
    if variant.clip_factor is not None:
        mean = manifest.clip_score_mean
        if not mean:
            raise InputError(f"{data}: has no mean clip score; prepare it again")
        clip_weight = round(variant.clip_factor / mean, 4)
    request = TrainRequest(
        data=f"{data}={variant.passes}",
        out=str(out),
        preset=PRESET,
        clip=manifest.spec.clip.model,
        overrides={**BASE, "clip_weight": clip_weight, **variant.overrides, "seed": seed},
        val_images=validation.images,
        val_references=validation.references,
    )
    run = planned_run(request, cpus=1)
    tested = (variant.domain, *variant.also_on) if test else ()
    tests = {name: pictures(DOMAINS[name].test) for name in tested}
    identity = {
        "train": run.document["train"],
        "datasets": without_paths(run.document["datasets"]),
        "validation": _digest(validation),
        "tests": {name: _digest(source) for name, source in tests.items()},
    }
    return Job(variant, seed, key_of(identity, digits=12), run, tests)


def pictures(images: str) -> PictureSource:
    """Pictures of a Parquet file that holds their references."""
    return PictureSource(images=images, references=images)


def _digest(source: PictureSource) -> str:
    return file_digest(Path(resolved(source.images)))


def run_all(jobs: Sequence[Job], out: Path, *, processes: int) -> int:
    """Do the jobs that have no result; how many that were. Interrupted, it goes on with those that are left."""
    missing = [job for job in jobs if read_result(out, job.key) is None]
    log.info("%d runs: %d done, %d to do, %d at a time", len(jobs), len(jobs) - len(missing), len(missing), processes)
    if not missing:
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes: before they import torch
    started = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job, out): job for job in missing}
        for done, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            best = result["validation"]["best"]["CIDEr"]
            left = (time.monotonic() - started) / done * (len(missing) - done)
            log.info(
                "%d of %d: %s, seed %d: validation CIDEr %.3f%s, %s; %s left",
                done, len(missing), futures[future].variant.name, result["seed"], best,
                "".join(f", {name} {found['CIDEr']:.3f}" for name, found in result["tests"].items()),
                duration(result["seconds"]), duration(left),
            )  # fmt: skip
    return len(missing)


def run_job(job: Job, out: Path) -> dict[str, Any]:
    """Train, test and write the result. Training starts anew where it was interrupted: it is a minute long."""
    started, busy = time.monotonic(), _cpu_seconds()
    folder = out / "scratch" / job.key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _log_to(folder / "log.txt")
    reason = _train(job.run, folder)
    if reason:
        raise InputError(f"{job.variant.name}, seed {job.seed}: {reason}")
    trained = _cpu_seconds()
    history = [json.loads(line) for line in (folder / METRICS_KEY).read_text().splitlines()]
    tests, samples = {}, {}
    for name, source in job.tests.items():
        request = EvaluateRequest(
            images=source.images,
            references=source.references,
            checkpoint=str(folder),
            out=str(folder / name),
            shuffled_baseline=True,
            device="cpu",
        )
        found = evaluate(request)
        tests[name] = {metric: found.get(metric) for metric in METRICS}
        samples[name] = json.loads((folder / name / "captions.json").read_text())[:SAMPLE_CAPTIONS]
    variant = job.variant
    result = {
        "variant": variant.name,
        "domain": variant.domain,
        "data": variant.data,
        "seed": job.seed,
        "steps": history[-1]["step"],
        "validation": {"best": best_epoch(history), "history": history},
        "tests": tests,
        "captions": samples,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": {
            "training": round(trained - busy, 1), "testing": round(_cpu_seconds() - trained, 1),
        },
        "document": {**job.run.document, "datasets": without_paths(job.run.document["datasets"])},
    }  # fmt: skip
    write_result(out, job.key, result, indent=1)
    shutil.rmtree(folder)
    return result


def _train(run: RunSpec, folder: Path) -> str:
    """cluster.training.loop in this process; "" or why it stopped."""
    from cluster.ray_internals import LocalReports, train_in_this_process
    from cluster.training.loop import train_loop

    train_in_this_process(LocalReports(name=folder.name))
    return train_loop({"run": replace(run, out=str(folder))})


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended, such as the metrics' Java machines."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _log_to(path: Path) -> None:
    """Lines of training go to the run's folder; the experiments say one line a run."""
    for package in ("cluster", "pcm"):
        logger = logging.getLogger(package)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.addHandler(logging.FileHandler(path))
        logger.propagate = False
    logging.getLogger("ray.train").setLevel(logging.WARNING)
