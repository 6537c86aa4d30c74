"""Hyper-parameter sweeps with Ray Tune: many trainings on one dataset, which is read once.

Under OUT: sweep.json (what was asked), trials/ID/ (each the folder of a run of jobs.train, with overrides.json, and
result.json once it is done), tune/ (Ray Tune's own), and the results of cluster.sweep.tables.

A trial is known by its settings and seed. Started again, a sweep reports its finished trials to the search and the
scheduler as they went, and trains only the others, from their last checkpoint; nothing of Ray Tune's own state, which
is pickled, is read back.
"""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler

from cluster.device import device_of_cluster
from cluster.only_job import TRAINS, only_job
from cluster.ray_state import has_group
from cluster.session import cluster_cpus, cluster_gpus, is_joined, is_no_user_error, start_ray, waiting_for
from cluster.store.outputs import refuse_other_things
from cluster.store.reach import check_reach
from cluster.store.store import Store, join, open_store
from cluster.sweep.request import SweepRequest
from cluster.sweep.results import TrialResult
from cluster.sweep.search_space import grid, optuna_distributions, random_settings, search_space
from cluster.sweep.tables import write_report
from cluster.sweep.trial import (
    CHECKPOINT,
    OVERRIDES,
    OVERRIDES_FILE,
    RESULT_FILE,
    ROW,
    TRIALS,
    SweepRun,
    read_result,
    run_trial,
    shared_tables,
    trial_folder,
    trial_id,
)
from cluster.training.config import TrainConfig
from cluster.training.data.mixture import TrainingSet, open_training_sets
from cluster.training.data.selection import holdout_share
from cluster.training.feed import DataChanged, PicturesUnfit, check_hold_out
from cluster.training.placement import check_gpu_here
from cluster.training.ray_storage import ray_storage
from cluster.training.ray_trainer import MEMORY_KEPT
from cluster.training.reporting import write_metrics
from cluster.training.request import TrainRequest
from cluster.training.run_document import intact_document, refuse_other_row_order
from cluster.training.run_record import (
    BEGINNING,
    REFERENCES_SHA256,
    VOCABULARIES_FIELD,
    beginning,
    run_versions,
    same_clip,
    same_validation,
    warn_of_moved_pictures,
    warn_of_other_releases,
)
from cluster.training.run_spec import RunSpec
from cluster.training.trackers import flattened
from cluster.training.train import check_first_epoch, check_settings, planned_run
from pcm.documents import document_bytes, read_document
from pcm.errors import InputError, OneLineError

log = logging.getLogger(__name__)

SWEEP_KEY = "sweep.json"
#: The folder of Ray Tune's own.
TUNE = "tune"
#: Shards are shared through Ray's object store if they take at most this part of it.
SHARED_PART = 0.6


class _UntilDataFails(ray.tune.Stopper):
    """Ends a sweep whose data is no longer what it began on, for other trials would be compared over other data, or
    cannot be validated on."""

    def __init__(self, recorder: "_Recorder") -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._recorder.data_error is not None


class SweepFailed(OneLineError):
    """No trial came to a result."""


def sweep(request: SweepRequest) -> dict[str, Any]:
    """Run the sweep, or what is left of it, and summarise: best (settings, CIDEr), config, trials, results.

    Raises InputError for a space, a search or an OUT that cannot be used, and where another job sweeps into OUT;
    SweepFailed where every trial failed.
    """
    started = time.monotonic()
    out = open_store(request.out)
    train = request.train
    check_settings(train)
    run = planned_run(train, cpus=request.cpus_per_trial)
    sets = open_training_sets(train.sources)
    space = search_space(request.space, base=run.config)
    for first_epoch in space["first_epoch"].examples if "first_epoch" in space else ():
        check_first_epoch(replace(run.config, first_epoch=first_epoch), sets)
    settings = _settings(request, space, run.config)
    document = _document(request, run.document)
    _check_out(out, document, resume=request.resume)
    if run.validation is None and not request.resume:
        configs = [run.config.with_overrides(each) for each in settings] or [run.config]
        check_hold_out(min(configs, key=partial(_held_out, sets)), sets)
    check_gpu_here(request.device)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's folder has its numbers already
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other prints boxes however quiet it is told to be
    # Ray Tune puts the state of all trials, some 16 kB each, and nothing reads it: once a day and at the end, not
    # every ten seconds.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
    logging.getLogger("ray.tune.execution.tune_controller").addFilter(is_no_user_error)
    # It warns of every trial that it has no file of Ray Tune's own.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    start_ray(worker_env=MEMORY_KEPT)
    run = replace(run, device=device_of_cluster(request.device))
    document["device"] = run.device
    _check_place(request, device=run.device)
    with only_job(out, TRAINS, waits=False):
        previous = _check_out(out, document, resume=request.resume)  # another job may just have ended
        if previous is not None:
            warn_of_moved_pictures(previous["run"], document["run"])
            warn_of_other_releases(previous["run"])
            kept = {name: value for name, value in run.document.items() if name != BEGINNING}
            run = replace(run, document={**kept, **beginning(previous["run"])})
            document["run"] = {**run.document, "versions": run_versions(previous["run"])}
        _check_device(out, run.device)
        check_reach(out)
        out.write_bytes(SWEEP_KEY, document_bytes(document))
        results = _sweep_on_ray(request, out, run, sets, space, settings)
        report = write_report(out, results, params=tuple(space), base=run.config)
    if report is None:
        reasons = sorted({result.reason for result in results}) or ["no trial was run"]
        raise SweepFailed(f"none of {len(results)} trials came to a result: {reasons[0]}")
    return {**report, "seconds": round(time.monotonic() - started, 2)}


def _held_out(sets: Sequence[TrainingSet], config: TrainConfig) -> float:
    """The share of the rows that settings hold out: where it is enough for the least, it is for all."""
    rows = sum(each.manifest.stored for each in sets)
    return holdout_share(fraction=config.holdout_fraction, limit=config.holdout_limit, rows=rows)


def _sweep_on_ray(
    request: SweepRequest,
    out: Store,
    run: RunSpec,
    sets: Sequence[TrainingSet],
    space: Mapping[str, Any],
    settings: list[dict[str, Any]],
) -> list[TrialResult]:
    """The results of all trials. Raises DataChanged and PicturesUnfit."""
    gpus = request.gpus_per_trial if run.device == "cuda" else 0.0
    shared = SweepRun(out=run.out, run=run, tables=_tables(sets))
    recorder = _Recorder(out, epochs=run.config.epochs, total=len(settings) or (request.trials or 0))
    for key in out.list(f"{TUNE}/"):
        if key.count("/") == 1:  # the state of Ray Tune in an earlier job; errors of trials are a folder below
            out.delete(key)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, sweep=shared),
        {"CPU": request.cpus_per_trial, "GPU": gpus},
    )
    tuner = ray.tune.Tuner(
        trainable,
        param_space=_in_turn(settings) if settings else None,
        tune_config=ray.tune.TuneConfig(
            metric="CIDEr",
            mode="max",
            num_samples=len(settings) or request.trials or 1,
            max_concurrent_trials=request.concurrent,
            scheduler=_asha(run.config.epochs) if request.chosen_scheduler == "asha" else None,
            search_alg=None if settings else _optuna(out, space, seed=run.config.seed),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=TUNE,
            **ray_storage(out),
            failure_config=ray.tune.FailureConfig(max_failures=TrainRequest.max_failures),
            callbacks=[recorder],
            stop=_UntilDataFails(recorder),
            verbose=0,
        ),
    )
    with waiting_for(cpus=request.cpus_per_trial, gpus=gpus, placed=has_group):
        tuner.fit()
    if recorder.data_error is not None:
        raise recorder.data_error
    return recorder.results()


def _in_turn(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What makes Ray Tune give each trial the next of the settings. Of a grid it copies all points for each of them
    before the first trial: of 2,000 for a minute, of 10,000 for half an hour."""
    left = iter(settings)
    return {OVERRIDES: ray.tune.sample_from(lambda _: next(left))}


def _settings(request: SweepRequest, space: Mapping[str, Any], base: TrainConfig) -> list[dict[str, Any]]:
    """Overrides of every trial, seeds included; empty where Optuna suggests them one by one."""
    if request.chosen_search == "grid":
        points = grid(space)
        if request.trials is not None and request.trials != len(points):
            raise InputError(f"--trials {request.trials}: the grid has {len(points)} settings; leave --trials out")
    elif request.chosen_search == "random":
        assert request.trials is not None
        points = random_settings(space, count=request.trials, seed=base.seed)
    else:
        try:
            import optuna
        except ImportError:
            raise InputError(
                "--search optuna: optuna is not installed; install it with "
                "pip install -c constraints.txt -e '.[optuna]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return []
    for point in points:
        base.with_overrides(point)  # settings that exclude each other are refused before the first trial
    unique = {trial_id(point): point for point in points}.values()
    return [{**point, "seed": base.seed + seed} for point in unique for seed in range(request.seeds)]


def _asha(epochs: int) -> ASHAScheduler:
    """Successive halving on epochs: after a quarter of them, and so on, the better third goes on."""
    return ASHAScheduler(time_attr="epoch", max_t=epochs, grace_period=max(1, epochs // 4), reduction_factor=3)


def _optuna(out: Store, space: Mapping[str, Any], *, seed: int) -> Any:
    """Optuna's search, which first suggests what it did to an interrupted sweep: finished trials, then those begun."""
    from cluster.sweep.optuna_search import OneTrialASetting

    tried = [_parameters(overrides) for overrides in (*(each["overrides"] for each in _recorded(out)), *_begun(out))]
    # Another seed than before: the same would suggest again what was suggested first.
    return OneTrialASetting(
        _parameters(optuna_distributions(space)),
        metric="CIDEr",
        mode="max",
        seed=seed + len(tried),
        points_to_evaluate=tried or None,
    )


def _parameters(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As Optuna's search knows them: it gives a trial {"overrides": {"tau": 0.1}} for "overrides/tau"."""
    return {f"{OVERRIDES}/{name}": value for name, value in overrides.items()}


def _recorded(out: Store) -> list[dict[str, Any]]:
    """result.json of every finished trial, in the order of their ends."""
    keys = [key for key in out.list(TRIALS) if key.endswith(f"/{RESULT_FILE}") and key.count("/") == 2]
    found = [read_result(open_store(join(out.root, key.removesuffix(f"/{RESULT_FILE}")))) for key in keys]
    return sorted((result for result in found if result is not None), key=lambda result: result["ended"])


def _begun(out: Store) -> list[dict[str, Any]]:
    """Overrides of every trial that was begun and has no result. One whose record is damaged is not known."""
    keys = set(out.list(TRIALS))
    folders = sorted(key.removesuffix(OVERRIDES_FILE) for key in keys if key.endswith(f"/{OVERRIDES_FILE}"))
    begun = []
    for folder in folders:
        if folder + RESULT_FILE not in keys:
            with contextlib.suppress(ValueError, TypeError):
                begun.append(dict(read_document(out.read_bytes(folder + OVERRIDES_FILE))))
    return begun


def _document(request: SweepRequest, run: Mapping[str, Any]) -> dict[str, Any]:
    """sweep.json: what was asked, and all that the numbers of the trials depend on."""
    return {
        "params": dict(request.space),
        "search": request.chosen_search,
        "scheduler": request.chosen_scheduler,
        "seeds": request.seeds,
        "trials": request.trials,
        "run": dict(run),
    }


def _check_out(out: Store, document: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """sweep.json of the sweep in OUT, None for an empty OUT. Raises InputError where OUT holds something else, or a
    sweep and `resume` is not set."""
    try:
        data = out.read_bytes(SWEEP_KEY)
    except FileNotFoundError:
        refuse_other_things(out, "not a sweep")
        return None
    with intact_document(out, SWEEP_KEY):
        previous = dict(read_document(data))
        before = dict(previous["run"])
    if not resume:
        raise InputError(f"{out.root}: holds a sweep; add --resume to continue it, or give another --out")
    refuse_other_row_order(out, before)
    with intact_document(out, SWEEP_KEY):
        runs = before, document["run"]
        others = {"run.validation": not same_validation(*runs), "run.clip": not same_clip(*runs)}
        was, now = _comparable(previous), _comparable(document)
        run_versions(before)
    if VOCABULARIES_FIELD not in before:  # of a release that did not record them
        now = {name: value for name, value in now.items() if not name.startswith(f"run.{VOCABULARIES_FIELD}.")}
    changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    changed += [name for name, is_other in others.items() if is_other]
    if changed:
        raise InputError(
            f"{out.root}: its sweep was begun with another {', '.join(changed)} (see its {SWEEP_KEY}); resume with "
            "the same settings, or give another --out"
        )
    return previous


def _check_device(out: Store, device: str) -> None:
    """Raises InputError where the sweep that OUT holds was begun on another device: its numbers would be others."""
    before = json.loads(out.read_bytes(SWEEP_KEY)).get("device", device) if out.exists(SWEEP_KEY) else device
    if before != device:
        raise InputError(f"{out.root}: its sweep was begun on {before}, and this is {device}; give --device {before}")


def _comparable(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed sweep must share; it may be longer, lie elsewhere and be stopped otherwise."""
    train = TrainConfig.from_dict(document["run"]["train"]).to_dict()  # with what earlier releases did not record
    flat = flattened(json.loads(json.dumps({**document, "run": {**document["run"], "train": train}})))
    free: tuple[str, ...] = ("trials", "scheduler", "device", "run.versions.", "run.concepts.path", f"run.{BEGINNING}")
    # Pictures of validation and their CLIP are compared by themselves.
    free += ("run.clip.model", "run.clip.revision", "run.clip_option")
    free += ("run.validation", f"run.{REFERENCES_SHA256}")
    return {name: without_paths(value) for name, value in flat.items() if not name.startswith(free)}


def without_paths(value: Any) -> Any:
    """Datasets without where they lie: their digests tell them apart."""
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return {key: item for key, item in value.items() if key != "path"} if isinstance(value, dict) else value


def _check_place(request: SweepRequest, *, device: str) -> None:
    """Raises InputError for what this machine cannot give. On a cluster that is joined it is waited for."""
    if device == "cpu" and request.gpus_per_trial < 1:
        raise InputError(
            f"--gpus-per-trial {request.gpus_per_trial:g}: the cluster has no GPU; leave it out, or give --device cuda "
            "on a cluster that grows"
        )
    if is_joined():
        return
    if device == "cuda" and not cluster_gpus():
        raise InputError("--device cuda: the cluster has no GPU; leave it out, or join one that has (RAY_ADDRESS)")
    if request.cpus_per_trial > cluster_cpus():
        raise InputError(f"--cpus-per-trial {request.cpus_per_trial}: the cluster has {cluster_cpus():g}; take fewer")


def _tables(sets: Sequence[TrainingSet]) -> dict[str, ray.ObjectRef]:
    """The shards of the datasets in Ray's object store; none where they do not fit, and each trial reads by itself."""
    wanted = sum(found.manifest.stored * found.manifest.features.bytes_per_row for found in sets)
    room = min(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"])
    if wanted > SHARED_PART * room:
        log.info("features of %.1f GB do not fit into Ray's object store: every trial reads its own", wanted / 1e9)
        return {}
    return {path: table for found in sets for path, table in shared_tables(found.store, found.shards).items()}


class _Recorder(ray.tune.Callback):
    """Writes the result of each trial as it ends, and says so."""

    def __init__(self, out: Store, *, epochs: int, total: int) -> None:
        self._out, self._epochs, self._total = out, epochs, total
        self._history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._results: dict[str, TrialResult] = {}
        self.data_error: InputError | None = None  # of a trial, after which no other one helps

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        history = self._history[trial.trial_id]
        history[:] = [row for row in history if row["epoch"] < result["epoch"]] + [result[ROW]]

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        overrides = trial.config[OVERRIDES]
        store = open_store(trial_folder(self._out.root, overrides))
        result = read_result(store)
        if result is None:
            history = self._history[trial.trial_id]
            reason = history[-1].get("reason", "") if history else "it reported nothing"
            last = history[-1]["epoch"] if history else 0
            status = "failed" if reason else "finished" if last >= self._epochs else "stopped"
            result = {
                **{"overrides": overrides, "status": status, "reason": reason, "history": history},
                **{"seconds": round(trial.last_result.get("time_total_s", math.nan), 2), "ended": time.time()},
            }
            # A trial that the scheduler stops, ASHA also after the last epoch, ends before it writes that epoch's row.
            write_metrics(store, [row for row in history if not row.get("reason")])
            store.write_bytes(RESULT_FILE, document_bytes(result))
        for key in store.list(CHECKPOINT):  # also what a driver that was killed here has left
            store.delete(key)
        self._add(TrialResult.of(result))

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Said here, for of a user's error Ray's own traceback is left out."""
        self._look_for_data_error(trial)
        log.warning("a trial is tried again: %s (%s)", _why(trial), _settings_text(trial.config[OVERRIDES]))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Nothing is recorded: --resume tries it again."""
        self._look_for_data_error(trial)
        history = self._history[trial.trial_id]
        self._add(
            TrialResult(
                overrides=trial.config[OVERRIDES],
                status="crashed",
                reason=_why(trial),
                history=tuple(history),
                seconds=math.nan,
            )
        )

    def _look_for_data_error(self, trial: Any) -> None:
        for kind in (DataChanged, PicturesUnfit):
            if _last_line(trial).startswith(f"{kind.__module__}.{kind.__name__}: "):
                self.data_error = kind(_why(trial))

    def results(self) -> list[TrialResult]:
        return list(self._results.values())

    def _add(self, result: TrialResult) -> None:
        self._results[trial_id(result.overrides)] = result
        settings = _settings_text(result.overrides)
        found = f"CIDEr {result.best['CIDEr']:.4f}" if result.best else result.reason
        log.info("trial %d of %d %s: %s (%s)", len(self._results), self._total, result.status, found, settings)


def _why(trial: Any) -> str:
    """What ended a trial, without the name of an error of ours."""
    return re.sub(r"^(pcm|cluster)\.[\w.]+: ", "", _last_line(trial))


def _last_line(trial: Any) -> str:
    """Of what Ray Tune says of a trial's end: of its local file, for the one below OUT is a failure behind."""
    said = Path(trial.error_file).read_text() if trial.error_file else "its process was lost"
    return said.strip().splitlines()[-1]


def _settings_text(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in overrides.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
