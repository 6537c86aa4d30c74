"""Starting, resuming and summarising a training run: the driver's side of cluster.trainloop.

A run's folder: config.json (the exact config, first), metrics.jsonl (a line an epoch), best/ (the captioner of the best
epoch) and checkpoints/epoch-NNN/, which Ray Train writes and finds again after a crash of a worker or of the driver.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow.fs
import ray.train
import safetensors.torch
from fsspec.implementations.local import LocalFileSystem
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from cluster.dataset import CLIP_HEAD_KEY, CONCEPTS_KEY, MANIFEST_KEY, VOCABULARY_KEY, Manifest, load_manifest
from cluster.loader import CACHE_BYTES
from cluster.pictures import EMBEDDED_PREFIX, PictureSource
from cluster.session import cluster_cpus, cluster_gpus, start_ray, user_error
from cluster.storage import Store, join, open_store, read_uri
from cluster.trainconfig import TrainConfig, default_preset, preset
from cluster.trainloop import BEST, METRICS_KEY, Run, train_loop
from pcm.concepts import ConceptVocabulary
from pcm.errors import InputError
from pcm.vocabulary import Vocabulary

log = logging.getLogger(__name__)

CONFIG_KEY = "config.json"
CHECKPOINTS = "checkpoints"
PACKAGE = "pcmnet-ray"


class TrainingFailed(Exception):
    """Training stopped for a reason that starting again would meet again; one line."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What a user asks for. `overrides` are fields of TrainConfig that replace those of the preset or config file."""

    data: str
    out: str
    preset: str | None = None  # None: chosen by the dataset's feature sizes, or what is resumed
    config: str | None = None  # path or URI of a TrainConfig as JSON
    overrides: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    validation: PictureSource | None = None  # None: held-out synthetic pairs
    clip: str | None = None  # CLIP for validation pictures, where the dataset's has moved
    num_workers: int | None = None  # None: one a GPU, or one
    cpus_per_worker: int | None = None  # None: the cluster's CPUs divided by the workers
    max_failures: int = 3  # crashed workers before the run is given up
    keep_checkpoints: int = 2  # the newest and the best so far
    cache_bytes: int = CACHE_BYTES


def train(request: TrainRequest) -> dict[str, Any]:
    """Train, or go on training, and summarise: epochs, steps, best (its metrics), checkpoint.

    Raises InputError when the dataset is unfinished or unfit, when OUT already holds a run and `resume` is not set, or
    when what is resumed was begun otherwise; TrainingFailed when the loss is no longer a number.
    """
    started = time.monotonic()
    data, out = open_store(request.data), open_store(request.out)
    manifest = load_manifest(data)
    previous = _previous_run(out, resume=request.resume)
    config = _config_for(request, data, manifest, previous)
    document = _document(request, data, manifest, config)
    if previous is not None:
        _refuse_other_run(out, previous, document)
        done = len(_history(out))
        if done >= config.epochs:
            log.info("%s: all %d epochs are done", out.root, done)
            return _summary(out, started)
    out.write_bytes(CONFIG_KEY, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    joined = bool(os.environ.get("RAY_ADDRESS"))
    if not joined:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes a node of this machine away
    start_ray()
    gpus = int(cluster_gpus())
    num_workers = request.num_workers or max(gpus, 1)
    cpus = request.cpus_per_worker or max(1, int(cluster_cpus()) // num_workers)
    _check_place(config, num_workers=num_workers, cpus=cpus, gpus=gpus)
    run = _run(request, manifest, config, document, cpus=cpus)
    trainer = (TorchTrainer if joined else _LocalTrainer)(
        train_loop,  # type: ignore[arg-type]  # V2 takes a return value; Ray's annotations here are still V1's
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=CHECKPOINTS,
            **ray_storage(out),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=request.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=request.keep_checkpoints, checkpoint_score_attribute="CIDEr"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _user_error(error) or error from None
    if result.return_value:  # type: ignore[attr-defined]
        raise TrainingFailed(result.return_value)  # type: ignore[attr-defined]
    return _summary(out, started)


def planned_run(request: TrainRequest, *, cpus: int) -> Run:
    """What a worker of `request` would be given, starting nothing: a sweep's trials are runs of this kind.

    Raises InputError when the dataset is unfinished or unfit.
    """
    data = open_store(request.data)
    manifest = load_manifest(data)
    config = _config_for(request, data, manifest, None)
    return _run(request, manifest, config, _document(request, data, manifest, config), cpus=cpus)


def _run(request: TrainRequest, manifest: Manifest, config: TrainConfig, document: dict[str, Any], *, cpus: int) -> Run:
    return Run(
        data=_anywhere(open_store(request.data)),
        out=_anywhere(open_store(request.out)),
        config=config,
        document=document,
        validation=_picture_source_anywhere(request.validation),
        clip=request.clip or manifest.spec.clip.model,
        cpu_threads=cpus,
        cache_bytes=request.cache_bytes,
    )


class _LocalTrainer(TorchTrainer):
    """Ray Train without its clean-up after a lost controller, on a Ray that ends with this process.

    The clean-up asks Ray's dashboard, which a local Ray does not start, and prints a traceback for want of it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _previous_run(out: Store, *, resume: bool) -> dict[str, Any] | None:
    """config.json of the run in OUT, or None for an empty OUT."""
    try:
        previous = json.loads(out.read_bytes(CONFIG_KEY))
    except FileNotFoundError:
        if out.list():
            raise InputError(f"{out.root}: not empty and not a training run; give another --out") from None
        return None
    if not resume:
        done, wanted = len(_history(out)), previous["train"]["epochs"]
        state = "a finished run" if done >= wanted else f"a run with {done} of {wanted} epochs done"
        raise InputError(f"{out.root}: holds {state}; add --resume to continue it, or give another --out")
    return previous


def _config_for(request: TrainRequest, data: Store, manifest: Manifest, previous: dict[str, Any] | None) -> TrainConfig:
    """The run's config: config file, preset, the resumed run's or the default preset, then the overrides."""
    if request.preset and request.config:
        raise InputError(f"--preset {request.preset} and --config {request.config}: give one of the two")
    if request.config:
        config = TrainConfig.from_json(read_uri(request.config), source=request.config)
    elif request.preset:
        config = preset(request.preset)
    elif previous is not None:
        config = TrainConfig.from_dict(previous["train"])
    else:
        name = default_preset(manifest.features)
        log.info("preset %s, chosen by the dataset's features %s; another with --preset", name, manifest.features)
        config = preset(name)
    return _fitted(config.with_overrides(request.overrides), data, manifest)


def _fitted(config: TrainConfig, data: Store, manifest: Manifest) -> TrainConfig:
    """`config` with the network's sizes of the dataset. Raises InputError when its parts do not fit together."""
    features = manifest.features
    if not manifest.stored:
        raise InputError(f"{data.root}: holds no stored pair; generate a dataset with some first")
    for key in (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY):
        if not data.exists(key):
            raise InputError(
                f"{data.root}: has no {key}; it cannot be trained on"
                + (" (a dataset of the null generator has no features)" if manifest.spec.clip.model == "null" else "")
            )
    vocabulary = Vocabulary.from_text(data.read_bytes(VOCABULARY_KEY).decode())
    concepts = ConceptVocabulary.from_bytes(data.read_bytes(CONCEPTS_KEY))
    head = safetensors.torch.load(data.read_bytes(CLIP_HEAD_KEY))
    sizes = {
        "dataset.json": (features.patch_dim, features.embed_dim),
        CLIP_HEAD_KEY: tuple(head["proj"].shape),
        CONCEPTS_KEY: (features.patch_dim, concepts.embeddings.shape[1]),
    }
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"{data.root}: feature sizes (D_v, D) differ: {found}; generate the dataset again")
    return config.for_dataset(vocab_size=len(vocabulary), features=features, num_concepts=len(concepts.names))


def _document(request: TrainRequest, data: Store, manifest: Manifest, config: TrainConfig) -> dict[str, Any]:
    """config.json: everything that the run's numbers depend on."""
    return {
        "train": config.to_dict(),
        "clip": {"model": request.clip or manifest.spec.clip.model, "dtype": manifest.spec.clip.dtype},
        "dataset": {"path": data.root, "sha256": hashlib.sha256(data.read_bytes(MANIFEST_KEY)).hexdigest()},
        "validation": asdict(request.validation) if request.validation else None,
        "versions": {package: version(package) for package in (PACKAGE, "torch", "ray")},
    }


def _refuse_other_run(out: Store, previous: dict[str, Any], document: dict[str, Any]) -> None:
    """Raises InputError unless the resumed run is the same science; only the number of epochs may grow."""
    before, now = TrainConfig.from_dict(previous["train"]), TrainConfig.from_dict(document["train"])
    differences = before.differences(now)
    if now.epochs >= before.epochs:
        differences.pop("epochs", None)
    if previous["dataset"]["sha256"] != document["dataset"]["sha256"]:
        differences["dataset"] = f"{previous['dataset']['path']} -> {document['dataset']['path']} (another manifest)"
    if previous["validation"] != document["validation"]:
        differences["validation"] = f"{previous['validation']} -> {document['validation']}"
    if differences:
        listed = "; ".join(f"{name}: {change}" for name, change in differences.items())
        raise InputError(f"{out.root}: was begun otherwise ({listed}); resume with the same settings, or another --out")


def _check_place(config: TrainConfig, *, num_workers: int, cpus: int, gpus: int) -> None:
    """Raises InputError for what the cluster cannot give, which Ray would wait for."""
    if config.batch_size % num_workers:
        raise InputError(
            f"batch size {config.batch_size}: cannot be divided evenly among {num_workers} workers; "
            "change batch_size or --num-workers"
        )
    if gpus and num_workers > gpus:
        raise InputError(f"--num-workers {num_workers}: the cluster has {gpus} GPUs, and each worker takes one")
    if num_workers * cpus > cluster_cpus():
        raise InputError(
            f"--num-workers {num_workers} with {cpus} CPUs each: the cluster has {cluster_cpus():g} CPUs; take fewer"
        )


def _anywhere(store: Store) -> str:
    """A URI that means the same in a worker, whose working folder is another."""
    return store.prefix if isinstance(store.fs, LocalFileSystem) else store.root


def _picture_source_anywhere(source: PictureSource | None) -> PictureSource | None:
    if source is None:
        return None

    def absolute(uri: str) -> str:
        return uri if uri.startswith(EMBEDDED_PREFIX) else _anywhere(open_store(uri))

    references = absolute(source.references) if source.references is not None else None
    return PictureSource(images=absolute(source.images), references=references, split=source.split)


def ray_storage(out: Store) -> dict[str, Any]:
    """RunConfig's storage arguments for OUT, on the file system (endpoint, credentials) of our own objects."""
    if isinstance(out.fs, LocalFileSystem):
        return {"storage_path": out.prefix}
    return {
        "storage_path": out.prefix,
        "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(out.fs)),
    }


def _user_error(error: ray.train.TrainingFailedError) -> InputError | None:
    """The InputError that a worker raised, if that is why training failed."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((found for failure in failures if (found := user_error(failure))), None)


def _history(out: Store) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in out.read_bytes(METRICS_KEY).splitlines()]
    except FileNotFoundError:
        return []


def _summary(out: Store, started: float) -> dict[str, Any]:
    history = _history(out)
    best = max(history, key=lambda row: row["CIDEr"])
    return {
        "epochs": len(history),
        "steps": history[-1]["step"],
        "best": best,
        "checkpoint": join(out.root, BEST),
        "seconds": round(time.monotonic() - started, 2),
    }
