"""Starting, resuming and summarising a training run: the driver's side of cluster.training.loop.

A run's folder: config.json (the exact config, first), metrics.jsonl (a line an epoch), losses/ (a line a step), best/
(the captioner of the best epoch) and checkpoints/epoch-NNN[-step-N]/, which Ray Train writes and finds again after a
crash of a worker or of the driver.
"""

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ray.train
import safetensors.torch

from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, GIVEN_CONCEPTS_KEY, PLAN_KEY
from cluster.dataset.together import Vocabularies, common_vocabularies
from cluster.only_job import TRAINS, only_job
from cluster.ray_state import has_group
from cluster.session import (
    is_joined,
    start_ray,
    waiting_for,
)
from cluster.sources.concept_file import fitting_concepts
from cluster.sources.pictures import check_source, source_anywhere
from cluster.store.reach import check_reach
from cluster.store.store import Store, join, open_store
from cluster.store.temporary import PREFIX
from cluster.training.checkpoints import (
    BEST,
    SCORE,
    best_epoch,
    check_checkpoints,
    delete_unrecorded,
    kept_words,
    renew_record,
)
from cluster.training.config import TrainConfig, default_preset, preset
from cluster.training.data.mixture import TrainingSet, open_training_sets
from cluster.training.init_from import InitialCaptioner, read_initial
from cluster.training.loop import train_loop
from cluster.training.placement import Placement, check_gpu_here, group_sizes, placement_of
from cluster.training.ray_trainer import check_labels, make_trainer, worker_input_error
from cluster.training.request import TrainRequest
from cluster.training.run_document import (
    CONFIG_KEY,
    DEVICE,
    begun_from,
    previous_run,
    read_history,
    refuse_other_run,
    run_document,
)
from cluster.training.run_record import (
    VOCABULARIES_FIELD,
    warn_of_moved_pictures,
    warn_of_other_releases,
)
from cluster.training.run_spec import RunSpec
from cluster.training.step import check_compile
from cluster.training.worker import build_network
from cluster.weights.node_copy import local_name
from pcm.clip.names import resolve_clip_name
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary
from pcm.text.metrics import require_metrics
from pcm.text.vocabulary import Vocabulary

__all__ = ["TrainRequest", "TrainingFailed", "planned_run", "train"]

log = logging.getLogger(__name__)


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
    previous = previous_run(out, resume=request.resume)
    initial = _initial(request, out, previous)
    vocabularies = _vocabularies(request, sets, initial)
    config = _config_for(request, sets, vocabularies, previous, initial)
    check_first_epoch(config, sets)
    _check_request(request, config)
    done = 0 if previous is None else len(read_history(out))
    finished = previous is not None and done >= config.epochs
    document = run_document(request, sets, config, vocabularies, previous, initial, finished=finished)
    run = _run(request, sets, vocabularies, config, document, cpus=1, device=request.device)
    if initial is not None:
        run = replace(run, init_from=initial.folder)
        if initial.is_read:
            build_network(run)  # weights that do not fit are told of before Ray is started
    if previous is not None:
        refuse_other_run(out, previous, document)
        if finished:
            log.info("%s: all %d epochs are done", out.root, done)
            return _summary(out, sets, started)
        warn_of_moved_pictures(previous, document)
        warn_of_other_releases(previous)
        check_checkpoints(out, done=done)

    joined = is_joined()
    check_gpu_here(request.device)
    check_labels(request.worker_labels, joined=joined)
    if not joined:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes a node of this machine away
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # detects the end of training within it
    start_ray()
    before = previous.get(DEVICE) if previous is not None else None
    place = placement_of(request, config, joined=joined, before=before)
    if place.device == "cpu":
        check_compile(config, device_type="cpu")
    with nullcontext() if arriving else only_job(out, TRAINS, waits=False):
        _refuse_what_changed(out, previous, resume=request.resume)
        check_reach(out)
        renew_record(out)
        delete_unrecorded(out)
        document[DEVICE] = place.device
        out.write_bytes(CONFIG_KEY, document_bytes(document))
        run = replace(run, document=document, cpu_threads=place.cpus, device=place.device)
        _train_on_ray(request, out, run, place, joined=joined)
    return _summary(out, sets, started)


def _refuse_what_changed(out: Store, previous: dict[str, Any] | None, *, resume: bool) -> None:
    """Look again, as the only job at OUT: another one may have ended since, which went on with the run or began one."""
    if previous_run(out, resume=resume) != previous:
        raise InputError(f"{out.root}: another job has changed this run meanwhile; run the same command again")
    if previous is not None:
        check_checkpoints(out, done=len(read_history(out)))


def _train_on_ray(request: TrainRequest, out: Store, run: RunSpec, place: "Placement", *, joined: bool) -> None:
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
        request, sets, vocabularies, config, run_document(request, sets, config, vocabularies, None), cpus=cpus,
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
        checks=f"{PREFIX}checked-{uuid.uuid4().hex}",
        checkpoint_every_steps=request.checkpoint_every_steps,
        cache_bytes=request.cache_bytes,
        window_bytes=request.window_bytes,
        cache_dir=os.path.abspath(os.path.expanduser(request.cache_dir)) if request.cache_dir else None,
    )


def _initial(request: TrainRequest, out: Store, previous: dict[str, Any] | None) -> InitialCaptioner | None:
    """The captioner that the run begins with. Of a run that has a captioner of its own, what it recorded: the one that
    it began with may have been trained on, or be gone. One at another place is read, to be compared.

    Raises InputError as `read_initial` does.
    """
    before, sha256 = begun_from(previous or {})
    named = request.init_from or before
    if named is None:
        return None
    if sha256 is not None and before is not None and open_store(named).address == open_store(before).address:
        words = kept_words(out, sha256=(previous or {}).get(VOCABULARIES_FIELD, {}).get("words"))
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


def _summary(out: Store, sets: Sequence[TrainingSet], started: float) -> dict[str, Any]:
    history = read_history(out)
    unfinished = {each.store.root: each.extent for each in sets if each.extent}
    return {
        "epochs": len(history),
        "steps": history[-1]["step"],
        "best": best_epoch(history),
        "checkpoint": join(out.root, BEST),
        "group_sizes": history[-1].get("group_sizes", []),
        **({"unfinished": unfinished} if unfinished else {}),
        "seconds": round(time.monotonic() - started, 2),
    }
