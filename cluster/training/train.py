"""Starting, resuming and summarising a training run: the driver's side of cluster.training.loop.

A run's folder: config.json (the exact config, first), metrics.jsonl (a line an epoch), losses/ (a line a step), best/
(the captioner of the best epoch) and checkpoints/epoch-NNN[-step-N]/, which Ray Train writes and finds again after a
crash of a worker or of the driver.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray.train
import safetensors.torch
import torch

from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, GIVEN_CONCEPTS_KEY, PLAN_KEY
from cluster.dataset.together import Vocabularies, common_vocabularies
from cluster.generation.pinning import device_of_cluster
from cluster.generation.reach import check_reach
from cluster.only_job import TRAINS, only_job
from cluster.ray_state import has_group
from cluster.session import (
    cluster_cpus,
    cluster_gpus,
    cpus_for_each,
    is_joined,
    room_for,
    start_ray,
    waiting_for,
    who_has,
)
from cluster.sources.concept_file import fitting_concepts
from cluster.sources.pictures import check_source, references_sha256, source_anywhere
from cluster.store.outputs import refuse_other_things
from cluster.store.store import Store, is_uri, join, open_store
from cluster.training.checkpoints import BEST, SCORE, check_checkpoints, delete_unrecorded, kept_words
from cluster.training.config import TrainConfig, default_preset, preset
from cluster.training.data.mixture import TrainingSet, is_known_by, open_training_sets
from cluster.training.data.shuffled import ROW_ORDER
from cluster.training.init_from import InitialCaptioner, read_initial
from cluster.training.loop import train_loop
from cluster.training.ray_trainer import check_labels, make_trainer, worker_input_error
from cluster.training.reporting import METRICS_KEY
from cluster.training.request import TrainRequest
from cluster.training.run_record import (
    INIT_FROM,
    REFERENCES_SHA256,
    VOCABULARIES,
    beginning,
    joined_versions,
    recorded_validation,
    same_clip,
    same_validation,
    warn_of_moved_pictures,
)
from cluster.training.run_spec import RunSpec
from cluster.training.step import check_compile
from cluster.training.worker import build_network
from cluster.weights.manifest import read_manifest
from cluster.weights.node_copy import local_name
from pcm.captioners.interface import CLIP_OPTION
from pcm.clip.names import clip_anywhere, refuse_place, resolve_clip_name, revision_here
from pcm.documents import document_bytes
from pcm.errors import InputError, NotKnown, one_line
from pcm.spec import DIGEST, ClipSpec
from pcm.text.concepts import ConceptVocabulary
from pcm.text.metrics import require_metrics
from pcm.text.vocabulary import Vocabulary

__all__ = ["TrainRequest", "TrainingFailed", "planned_run", "train"]

log = logging.getLogger(__name__)

CONFIG_KEY = "config.json"
#: In config.json: where the run is trained, cpu or cuda. Runs of releases that did not record it have none.
_DEVICE = "device"


class TrainingFailed(InputError):
    """Training stopped for a reason that starting again would meet again."""


def train(request: TrainRequest, *, arriving: Sequence[TrainingSet] = ()) -> dict[str, Any]:
    """Train, or go on training, and summarise: epochs, steps, best (its metrics), checkpoint, group_sizes (how many
    workers made the steps from which one on), and what there was of an unfinished dataset.

    `arriving`: the one set of `data` while it is being made, by a caller that is the only job at OUT. Raises InputError
    when the dataset is unfinished or unfit, when OUT already holds a run and `resume` is not set, when what is resumed
    was begun otherwise, or when another job trains into OUT; TrainingFailed when the loss is no longer a number.
    """
    started = time.monotonic()
    require_metrics()
    sets = arriving or open_training_sets(request.sources, unfinished=request.unfinished)
    out = open_store(request.out)
    previous = _previous_run(out, resume=request.resume)
    initial = _initial(request, out, previous)
    vocabularies = _vocabularies(request, sets, initial)
    config = _config_for(request, sets, vocabularies, previous, initial)
    check_first_epoch(config, sets)
    _check_request(request, config)
    done = 0 if previous is None else len(_history(out))
    finished = previous is not None and done >= config.epochs
    document = _document(request, sets, config, vocabularies, previous, initial, finished=finished)
    run = _run(request, sets, vocabularies, config, document, cpus=1, device=request.device)
    if initial is not None:
        run = replace(run, init_from=initial.folder)
        if initial.is_read:
            build_network(run)  # weights that do not fit are told of before Ray is started
    if previous is not None:
        _refuse_other_run(out, previous, document)
        if finished:
            log.info("%s: all %d epochs are done", out.root, done)
            return _summary(out, sets, started)
        warn_of_moved_pictures(previous, document)
        check_checkpoints(out, done=done)

    joined = is_joined()
    check_gpu_here(request.device)
    check_labels(request.worker_labels, joined=joined)
    if not joined:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes a node of this machine away
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # detects the end of training within it
    start_ray()
    before = previous.get(_DEVICE) if previous is not None else None
    place = _place(request, config, joined=joined, before=before)
    if place.device == "cpu":
        check_compile(config, device_type="cpu")
    with nullcontext() if arriving else only_job(out, TRAINS, waits=False):
        _refuse_what_changed(out, previous, resume=request.resume)
        check_reach(out)
        delete_unrecorded(out)
        document[_DEVICE] = place.device
        out.write_bytes(CONFIG_KEY, document_bytes(document))
        run = replace(run, document=document, cpu_threads=place.cpus, device=place.device)
        _train_on_ray(request, out, run, place, joined=joined)
    return _summary(out, sets, started)


def _refuse_what_changed(out: Store, previous: dict[str, Any] | None, *, resume: bool) -> None:
    """Look again, as the only job at OUT: another one may have ended since, which went on with the run or began one."""
    if _previous_run(out, resume=resume) != previous:
        raise InputError(f"{out.root}: another job has changed this run meanwhile; run the same command again")
    if previous is not None:
        check_checkpoints(out, done=len(_history(out)))


def _train_on_ray(request: TrainRequest, out: Store, run: RunSpec, place: "_Place", *, joined: bool) -> None:
    """Raises InputError of a worker, and TrainingFailed."""
    trainer = make_trainer(
        train_loop,
        {"run": run},
        out=out,
        score=SCORE,
        sizes=place.sizes,
        cpus=place.cpus,
        gpus=place.gpus_per_worker,
        labels=request.worker_labels,
        keep_checkpoints=request.keep_checkpoints,
        max_failures=request.max_failures,
        joined=joined,
    )
    waiting = waiting_for(
        cpus=place.cpus,
        gpus=place.gpus_per_worker,
        workers=place.num_workers,
        labels=request.worker_labels,
        placed=has_group,
    )
    try:
        with waiting:
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise worker_input_error(error) or error from None
    if result.return_value:  # type: ignore[attr-defined]
        raise TrainingFailed(result.return_value)  # type: ignore[attr-defined]


def planned_run(request: TrainRequest, *, cpus: int) -> RunSpec:
    """What a worker of `request` would be given, starting nothing: a sweep's trials are runs of this kind.

    Raises InputError when a dataset is unfinished or unfit, also for the first epoch that is asked for.
    """
    require_metrics()
    sets = open_training_sets(request.sources)
    vocabularies = _vocabularies(request, sets)
    config = _config_for(request, sets, vocabularies, None)
    check_first_epoch(config, sets)
    return _run(
        request, sets, vocabularies, config, _document(request, sets, config, vocabularies, None), cpus=cpus,
        device=request.device,
    )  # fmt: skip


def _vocabularies(
    request: TrainRequest, sets: Sequence[TrainingSet], initial: InitialCaptioner | None = None
) -> Vocabularies:
    """Those of the datasets, with the concepts of `request.concepts` where it names a file, and with the words of the
    captioner that the run begins with."""
    found = common_vocabularies(sets)
    if initial is not None:
        found = replace(found, words=initial.words)
    if request.concepts is not None:
        embed_dim = sets[0].manifest.features.embed_dim
        return replace(found, concepts=fitting_concepts(request.concepts, embed_dim=embed_dim).to_bytes())
    if request.preset not in (None, "embedded") and not any(each.store.exists(GIVEN_CONCEPTS_KEY) for each in sets):
        count = len(ConceptVocabulary.from_bytes(found.concepts))
        log.info(
            "preset %s: concepts are the dataset's own %d nouns; the published run read a file of 446 COCO nouns, for "
            "which there is --concepts",
            request.preset, count,
        )  # fmt: skip
    return found


def _run(
    request: TrainRequest,
    sets: Sequence[TrainingSet],
    vocabularies: Vocabularies,
    config: TrainConfig,
    document: dict[str, Any],
    *,
    cpus: int,
    device: str,
) -> RunSpec:
    return RunSpec(
        data=tuple(
            replace(source, uri=each.store.address, manifest=each.pinned)
            for source, each in zip(request.sources, sets, strict=True)
        ),
        out=open_store(request.out).address,
        vocabularies=vocabularies,
        config=config,
        document=document,
        validation=source_anywhere(request.validation) if request.validation else None,
        clip=document["clip"]["model"],
        cpu_threads=cpus,
        device=device,
        checks=f"pcm-checked-{uuid.uuid4().hex}",
        checkpoint_every_steps=request.checkpoint_every_steps,
        cache_bytes=request.cache_bytes,
        window_bytes=request.window_bytes,
        cache_dir=os.path.abspath(os.path.expanduser(request.cache_dir)) if request.cache_dir else None,
    )


def _previous_run(out: Store, *, resume: bool) -> dict[str, Any] | None:
    """config.json of the run in OUT, or None for an empty OUT."""
    try:
        data = out.read_bytes(CONFIG_KEY)
    except FileNotFoundError:
        refuse_other_things(out, "not a training run")
        return None
    with _intact_config(out):
        previous = json.loads(data)
        dict(previous["train"])
        order = previous.get("row_order", 1)  # of releases that recorded none
    if resume and order != ROW_ORDER:  # before all else that another release may say otherwise
        raise InputError(
            f"{out.root}: takes its rows in order {order}, this release in order {ROW_ORDER}; finish it with the "
            "release that began it, or give another --out"
        )
    with _intact_config(out):
        TrainConfig.from_dict(previous["train"])
        recorded_validation(previous), _rows(previous), joined_versions(previous), dict(previous.get(VOCABULARIES, {}))
        _begun_from(previous)
        dict(previous.get("clip", {}))
    if not resume:
        done, wanted = len(_history(out)), previous["train"]["epochs"]
        state = "a finished run" if done >= wanted else f"a run with {done} of {wanted} epochs done"
        raise InputError(f"{out.root}: holds {state}; add --resume to continue it, or give another --out")
    return previous


@contextmanager
def _intact_config(out: Store) -> Iterator[None]:
    """What goes wrong in reading config.json is that it is damaged, or of a later release. Raises InputError."""
    try:
        yield
    except NotKnown as error:
        field = str(error).partition(": ")[0]
        raise InputError(
            f"{out.root}/{CONFIG_KEY}: {field}: not known to this release; finish the run with the release that began "
            "it, or give another --out"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = one_line(error, longest=200)
        raise InputError(f"{out.root}/{CONFIG_KEY}: damaged ({said}); restore it, or give another --out") from None


def _initial(request: TrainRequest, out: Store, previous: dict[str, Any] | None) -> InitialCaptioner | None:
    """The captioner that the run begins with. Of a run that has a captioner of its own, what it recorded: the one that
    it began with may have been trained on, or be gone. One at another place is read, to be compared.

    Raises InputError as `read_initial` does.
    """
    before, sha256 = _begun_from(previous or {})
    named = request.init_from or before
    if named is None:
        return None
    if sha256 is not None and before is not None and open_store(named).address == open_store(before).address:
        words = kept_words(out, sha256=(previous or {}).get(VOCABULARIES, {}).get("words"))
        if words is not None:
            return InitialCaptioner(before, open_store(before).address, sha256, words, None, is_read=False)
    return read_initial(named)


def _config_for(
    request: TrainRequest,
    sets: Sequence[TrainingSet],
    vocabularies: Vocabularies,
    previous: dict[str, Any] | None,
    initial: InitialCaptioner | None = None,
) -> TrainConfig:
    """The run's config: the preset named, the resumed run's, the initial captioner's or the default preset, then what
    replaces its fields."""
    if request.preset:
        config = preset(request.preset)
    elif previous is not None:
        config = TrainConfig.from_dict(previous["train"])
    elif initial is not None and initial.config is not None:
        log.info(
            "settings of the run that made %s, %d epochs; others with --preset", initial.folder, initial.config.epochs
        )
        config = replace(initial.config, first_epoch="shuffled")  # a stream's is of the plan
    else:
        features = sets[0].manifest.features
        name = default_preset(features)
        log.info(
            "preset %s, chosen by the dataset's features (D %d, D_v %d, N %d); another with --preset",
            name, features.embed_dim, features.patch_dim, features.num_patches,
        )  # fmt: skip
        config = preset(name)
    concepts = request.concepts or f"the captions of {', '.join(each.store.root for each in sets)}"
    return _fitted(config, request.settings, sets, vocabularies, concepts_of=concepts)


def _fitted(
    config: TrainConfig,
    overrides: Mapping[str, Any],
    sets: Sequence[TrainingSet],
    vocabularies: Vocabularies,
    *,
    concepts_of: str,
) -> TrainConfig:
    """`config` with the overrides and the sizes of the data. Raises InputError when its parts do not fit together.

    concepts_of: where the concepts come from.
    """
    features = sets[0].manifest.features
    concepts = ConceptVocabulary.from_bytes(vocabularies.concepts)
    head = safetensors.torch.load(vocabularies.clip_head)
    if "proj" not in head:
        raise InputError(
            f"{sets[0].store.root}: its CLIP ({sets[0].manifest.spec.clip.model}) gives no patches in the joint space, "
            "which PCM-Net needs; featurise with a CLIP that does, such as ViT-L-14/openai"
        )
    sizes = {
        "dataset.json": (features.patch_dim, features.embed_dim),
        CLIP_HEAD_KEY: tuple(head["proj"].shape),
        CONCEPTS_KEY: (features.patch_dim, concepts.embeddings.shape[1]),
    }
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"{sets[0].store.root}: feature sizes (D_v, D) differ: {found}; generate the dataset again")
    wanted, there = overrides.get("top_concepts", config.model.top_concepts), len(concepts)
    if isinstance(wanted, int) and there < wanted:
        fewer = f"--set top_concepts={there}, " if there else ""
        raise InputError(
            f"top_concepts {wanted}: {concepts_of} gave {there or 'no'} concepts ({concepts.source}); give {fewer}"
            "--concepts FILE with more of them, or data that jobs.generate has made with --nouns MODEL"
        )
    vocabulary = Vocabulary.from_text(vocabularies.words.decode())
    return config.for_dataset(
        vocab_size=len(vocabulary), features=features, num_concepts=len(concepts.names), overrides=overrides
    )


def _document(
    request: TrainRequest,
    sets: Sequence[TrainingSet],
    config: TrainConfig,
    vocabularies: Vocabularies,
    previous: dict[str, Any] | None,
    initial: InitialCaptioner | None = None,
    *,
    finished: bool = False,
) -> dict[str, Any]:
    """config.json: everything that the run's numbers depend on.

    What a resumed run recorded of its CLIP is kept where it reads no more pictures with it, for it may be gone.

    Raises InputError where pictures must be read by a CLIP that the dataset alone names, and not as one known here.
    """
    clip = sets[0].manifest.spec.clip
    given = request.clip or (previous or {}).get(CLIP_OPTION)
    if given is not None:
        given = clip_anywhere(given)  # Ray starts its workers elsewhere
    elif request.validation is not None:
        refuse_place(clip.model, source=sets[0].store.root)
    identity = clip.identity()
    if given not in (None, clip.model):
        kept = not request.clip and (finished or request.validation is None)
        revision = (previous or {})["clip"]["revision"] if kept else _revision_of_given(clip, given)
        identity |= {"model": given, "revision": revision}
    concepts = {"path": request.concepts, "sha256": hashlib.sha256(vocabularies.concepts).hexdigest()}
    return {
        **({} if request.concepts is None else {"concepts": concepts}),
        **({} if initial is None else {INIT_FROM: {"path": initial.named, "sha256": initial.sha256}}),
        "train": config.to_dict(),
        "row_order": ROW_ORDER,
        "clip": identity,
        CLIP_OPTION: given,
        "datasets": _described(sets, config, previous),
        "validation": asdict(source_anywhere(request.validation)) if request.validation else None,
        REFERENCES_SHA256: references_sha256(request.validation) if request.validation else None,
        VOCABULARIES: {
            "words": hashlib.sha256(vocabularies.words).hexdigest(),
            "concepts": hashlib.sha256(vocabularies.concepts).hexdigest(),
        },
        "versions": joined_versions(previous or {}),
        **beginning(previous),
    }


def _described(
    sets: Sequence[TrainingSet], config: TrainConfig, previous: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The datasets for config.json. One whose plan orders the first epoch stays known as it was when the run began:
    with jobs.stream by the plan, with jobs.train by the manifest. Workers compare the rows."""
    found = [each.description() for each in sets]
    before = [sha256 for sha256, _ in _rows(previous or {})]
    if config.first_epoch == "plan" and len(before) == 1 and is_known_by(sets[0].store, before[0], planned=True):
        found[0]["sha256"] = before[0]
    return found


def _revision_of_given(clip: ClipSpec, given: str) -> str:
    """The digest of `given`, the place of a CLIP other than the dataset's `clip`, or that one's revision for a hub repo
    or a tag: no hub is asked. Says where the digests differ."""
    found = read_manifest(open_store(given)).revision if is_uri(given) else revision_here(given, clip.revision)
    if found is None:
        return clip.revision
    if clip.revision.startswith(DIGEST) and found != clip.revision:
        log.warning(
            "--clip %s: its files are %s, but the CLIP of the dataset (%s) had %s; give the same one, unless you mean "
            "another",
            given, found, clip.model, clip.revision,
        )  # fmt: skip
    return found


def _refuse_other_run(out: Store, previous: dict[str, Any], document: dict[str, Any]) -> None:
    """Raises InputError unless the resumed run is the same science; only the number of epochs may grow."""
    before, now = TrainConfig.from_dict(previous["train"]), TrainConfig.from_dict(document["train"])
    differences = before.differences(now)
    if now.epochs >= before.epochs:
        differences.pop("epochs", None)
    if _rows(previous) != _rows(document):
        differences["data"] = f"{_named(previous)} -> {_named(document)} (by weight and manifest)"
        if any("unfinished_shards" in dataset for dataset in previous.get("datasets", [])):
            differences["data"] += ", for shards were added; jobs.curate --unfinished makes a view that stays"
    concepts = [each.get("concepts", {}).get("sha256", "the dataset's own") for each in (previous, document)]
    if concepts[0] != concepts[1]:
        differences["concepts"] = f"{concepts[0][:17]} -> {concepts[1][:17]}"
    for name, sha256 in document[VOCABULARIES].items():
        if (was := previous.get(VOCABULARIES, {}).get(name, sha256)) != sha256:
            differences.setdefault(name, f"{was[:17]} -> {sha256[:17]}")
    begun = [_begun_from(each)[1] or "random weights" for each in (previous, document)]
    if begun[0] != begun[1]:
        differences[INIT_FROM] = f"{begun[0][:17]} -> {begun[1][:17]}"
    if not same_clip(previous, document):
        clips = (f"{each['clip']['model']} ({each['clip']['revision'][:17]})" for each in (previous, document))
        differences["clip"] = " -> ".join(clips)
    if not same_validation(previous, document):
        was, here = (
            f"{each['validation']}, references {(each.get(REFERENCES_SHA256) or 'not recorded')[:12]}"
            for each in (previous, document)
        )
        differences["validation"] = f"{was} -> {here}"
    if differences:
        listed = "; ".join(f"{name}: {change}" for name, change in differences.items())
        raise InputError(f"{out.root}: was begun otherwise ({listed}); resume with the same settings, or another --out")


def _begun_from(document: dict[str, Any]) -> tuple[str | None, str | None]:
    """The captioner with whose weights a run began: where it was, and the sha256 of its weights. (None, None) of
    random weights."""
    recorded = document.get(INIT_FROM)
    return (str(recorded["path"]), str(recorded["sha256"])) if recorded else (None, None)


def _rows(document: dict[str, Any]) -> list[tuple[str, float]]:
    """What decides the rows of a run: a dataset may move."""
    return [(dataset["sha256"], dataset["weight"]) for dataset in document.get("datasets", [])]


def _named(document: dict[str, Any]) -> str:
    datasets = document.get("datasets", [])
    return " + ".join(f"{each['path']}={each['weight']:g} ({each['sha256'][:8]})" for each in datasets)


def check_first_epoch(config: TrainConfig, sets: Sequence[TrainingSet]) -> None:
    """Raises InputError where the first epoch is in the order of a plan and the datasets have no such order."""
    if config.first_epoch != "plan":
        return
    if len(sets) > 1 or sets[0].weight != 1:
        raise InputError(
            f"first_epoch plan: takes one dataset without a weight, not {' '.join(each.store.root for each in sets)} "
            f"({', '.join(f'{each.weight:g}' for each in sets)}); use first_epoch shuffled"
        )
    if sets[0].manifest.lineage is not None or sets[0].pinned is not None:
        what = "derived" if sets[0].manifest.lineage is not None else "unfinished"
        raise InputError(f"first_epoch plan: takes no {what} dataset ({sets[0].store.root}); use first_epoch shuffled")
    if not sets[0].store.exists(PLAN_KEY):
        raise InputError(f"first_epoch plan: {sets[0].store.root} has no {PLAN_KEY}; use first_epoch shuffled")


def check_gpu_here(device: str) -> None:
    """Raises InputError where a GPU is asked for and this machine, which is to start Ray alone, has none."""
    if device == "cuda" and not (is_joined() or ray.is_initialized() or torch.cuda.is_available()):
        raise InputError(
            "--device cuda: torch finds no GPU on this machine; leave --device out, or join a cluster that has one "
            "(RAY_ADDRESS)"
        )


def check_settings(request: TrainRequest) -> None:
    """Raises InputError for what cannot be, as far as that can be told before there is a dataset."""
    _check_request(request, preset(request.preset).with_overrides(request.settings) if request.preset else None)


def _check_request(request: TrainRequest, config: TrainConfig | None) -> None:
    """Raises InputError for what cannot be, whatever the cluster is."""
    if config is not None and request.num_workers is not None:
        group_sizes(config, request.num_workers)
    if request.clip is not None:
        resolve_clip_name(local_name(request.clip))
    if request.validation is None:
        log.info("no --val-images: the best epoch is chosen on a held-out part of the synthetic pairs")
    else:
        check_source(request.validation)


def group_sizes(config: TrainConfig, asked: int | tuple[int, int]) -> tuple[int, ...]:
    """How many workers a group may have, ascending: of a number itself, of (least, most) those that can share a batch.

    Raises InputError where none can.
    """
    least, most = asked if isinstance(asked, tuple) else (asked, asked)
    found = [size for size in range(least, most + 1) if _shares_batch(config, size)]
    if not found:
        named = f"{least}:{most}" if isinstance(asked, tuple) else f"{asked}"
        possible = [str(size) for size in range(1, config.batch_size + 1) if _shares_batch(config, size)]
        raise InputError(
            f"--num-workers {named}: batch size {config.batch_size} with grad_accumulation {config.grad_accumulation} "
            f"cannot be divided evenly among so many; possible are {', '.join(possible)}, or change batch_size"
        )
    return tuple(found)


def _most_workers(config: TrainConfig, *, gpus: int) -> int:
    """One for each GPU, or as many fewer as can share a batch, which is said; one where there are no GPUs."""
    workers = max((size for size in range(1, gpus + 1) if _shares_batch(config, size)), default=1)
    if workers < gpus:
        log.info(
            "training on %d of %d GPUs: batch size %d with grad_accumulation %d cannot be divided evenly among more; "
            "--set batch_size=N changes that",
            workers, gpus, config.batch_size, config.grad_accumulation,
        )  # fmt: skip
    return workers


def _shares_batch(config: TrainConfig, workers: int) -> bool:
    return config.batch_size % workers == 0 and config.batch_size // workers % config.grad_accumulation == 0


@dataclass(frozen=True)
class _Place:
    """Where a run is trained: so many workers with so many CPUs each, and where the device is cuda with so much GPU."""

    device: str
    sizes: tuple[int, ...]  # that the group of workers may have, ascending
    cpus: int
    gpus_per_worker: float  # 0 on CPUs

    @property
    def num_workers(self) -> int:
        """The least that training begins with."""
        return self.sizes[0]


def _place(request: TrainRequest, config: TrainConfig, *, joined: bool, before: str | None = None) -> _Place:
    """What is asked of the cluster: where the device is named, also what it has not yet, for a cluster may grow; with
    nothing there at all, the device that the run was begun on `before` names it.

    Raises InputError where nobody says what to wait for, for what the cluster cannot give, and for another device than
    the run was begun on: its numbers would be others.
    """
    labels = request.worker_labels
    cpus, gpus = int(cluster_cpus(labels)), int(cluster_gpus(labels))
    named = joined and (request.device != "auto" or not (cpus or gpus))
    device = device_of_cluster(request.device, before=before, labels=labels)
    if before not in (None, device):
        raise InputError(
            f"{request.out}: was begun on {before}, and this is {device}; give --device {before}, or another --out"
        )
    sizes = group_sizes(config, request.num_workers or _most_workers(config, gpus=gpus if device == "cuda" else 0))
    workers = sizes[-1]
    if device == "cpu" and request.gpus_per_worker < 1:
        raise InputError(
            f"--gpus-per-worker {request.gpus_per_worker:g}: {who_has(labels)} no GPU; leave it out, or give --device "
            "cuda on a cluster that grows"
        )
    share = request.gpus_per_worker if device == "cuda" else 0
    each = request.cpus_per_worker or cpus_for_each(workers, gpus=share, labels=labels)
    place = _Place(device, sizes, each, share)
    if len(sizes) > 1 and not joined:
        raise InputError(
            f"--num-workers {sizes[0]}:{workers}: no nodes come to this machine; give a number, or join a cluster "
            "(RAY_ADDRESS)"
        )
    if named or len(sizes) > 1:
        return place
    if place.gpus_per_worker * workers > gpus:
        raise InputError(f"--num-workers {workers}: {who_has(labels)} {gpus} GPUs, and each worker takes one")
    if room_for(cpus=place.cpus, gpus=place.gpus_per_worker, labels=labels) < workers:
        split = ", too few on one node" if workers * place.cpus <= cpus else ""
        raise InputError(
            f"--num-workers {workers} with {place.cpus} CPUs each: {who_has(labels)} {cpus} CPUs{split}; take fewer"
        )
    return place


def _history(out: Store) -> list[dict[str, Any]]:
    try:
        history = [json.loads(line) for line in out.read_bytes(METRICS_KEY).splitlines()]
        for row in history:
            row["CIDEr"], row["step"]
        return history
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        said = one_line(error, longest=200)
        raise InputError(
            f"{out.root}/{METRICS_KEY}: damaged ({said}); delete it: --resume writes it again, from the last checkpoint"
        ) from None


def _summary(out: Store, sets: Sequence[TrainingSet], started: float) -> dict[str, Any]:
    history = _history(out)
    best = max(history, key=lambda row: row["CIDEr"])
    unfinished = {each.store.root: each.extent for each in sets if each.extent}
    return {
        "epochs": len(history),
        "steps": history[-1]["step"],
        "best": best,
        "checkpoint": join(out.root, BEST),
        "group_sizes": history[-1].get("group_sizes", []),
        **({"unfinished": unfinished} if unfinished else {}),
        "seconds": round(time.monotonic() - started, 2),
    }
