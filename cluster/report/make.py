"""jobs.report's work: gather what there is, show it, write one file."""

import shlex
from typing import Any

from cluster.options import flag, given
from cluster.report import dataset_view, lineage_view, measures_view, run_view, sweep_view
from cluster.report.captions import caption_samples, has_checkpoint
from cluster.report.dataset_facts import gather_dataset
from cluster.report.gallery import make_gallery
from cluster.report.headline import Facts, headline
from cluster.report.left_out import LeftOut, left_out_pictures
from cluster.report.page import Entry, page
from cluster.report.request import ReportRequest
from cluster.report.run_facts import RunFacts, gather_evaluation, gather_run, place_of
from cluster.report.sweep_facts import gather_sweep
from cluster.report.throughput import throughput
from cluster.store.outputs import check_output
from cluster.store.store import open_store
from cluster.training.data.mixture import is_known_by
from pcm.errors import InputError


def make_report(request: ReportRequest) -> dict[str, Any]:
    """Write the report; {"ok", "path", "bytes", "sections"}.

    The same stores and the same request give the same bytes. Raises InputError for what cannot be read, and for an OUT
    that cannot be written.
    """
    check_output(request.out, "file", shown="--out")
    facts = gather(request)
    entries = _entries(facts, request)
    top = headline(facts, title=request.title, hourly=request.price_per_hour)
    document = page(top, entries, missing=_missing(facts, request), made_by=command(request))
    data = document.encode()
    out = open_store(request.out)
    try:
        out.write_bytes("", data)
    except OSError as error:
        raise InputError(f"--out {request.out}: cannot be written ({error.strerror or error}); give a file") from None
    return {"ok": True, "path": request.out, "bytes": len(data), "sections": [entry.anchor for entry in entries]}


def gather(request: ReportRequest) -> Facts:
    """Read what the request names. Raises InputError for what is not what it should be."""
    data = gallery = None
    left_out: dict[str, list[LeftOut]] = {}
    if request.data is not None:
        store = open_store(request.data)
        data = gather_dataset(store, seed=request.seed, unfinished=request.unfinished)
        gallery = make_gallery(store, data, seed=request.seed)
        if data.manifest.lineage is not None:
            left_out = left_out_pictures(data.manifest.lineage, of=store.address)
    run = gather_run(open_store(request.run)) if request.run is not None else None
    evaluation = gather_evaluation(open_store(request.evaluation)) if request.evaluation is not None else None
    sweep = gather_sweep(open_store(request.sweep)) if request.sweep is not None else None
    captions = None
    if request.pictures is not None and request.run is not None and has_checkpoint(request.run):
        captions = caption_samples(
            request.run, request.pictures, seed=request.seed, clip=request.clip, device=request.device
        )
    speed = throughput(data.stats, stored=data.manifest.stored) if data is not None else None
    return Facts(
        data=data,
        gallery=gallery,
        left_out=left_out,
        speed=speed,
        run=run,
        other_data=_other_data(request, run),
        evaluation=evaluation,
        captions=captions,
        sweep=sweep,
    )


def _other_data(request: ReportRequest, run: RunFacts | None) -> tuple[str, ...]:
    """The datasets of a run that was not trained on --data, neither as it is now nor, by name, as it was."""
    if request.data is None or run is None:
        return ()
    store, trained_on = open_store(request.data), run.document.get("datasets", [])
    for each in trained_on:
        if place_of(each["path"]) == place_of(store.root) or is_known_by(store, each.get("sha256", ""), planned=True):
            return ()
    return tuple(each["path"] for each in trained_on)


def _entries(facts: Facts, request: ReportRequest) -> list[Entry]:
    found: list[Entry] = []
    data, price = facts.data, request.price_per_hour
    if data is not None and facts.gallery is not None:
        found += [
            Entry(anchor="pictures", name="Pictures", section=dataset_view.gallery(data, facts.gallery)),
            Entry(anchor="scores", name="Scores", section=measures_view.scores(data, facts.gallery)),
            Entry(anchor="speed", name="Speed and cost", section=measures_view.speed(data, facts.speed, hourly=price)),
            Entry(anchor="quarantine", name="Quarantine", section=dataset_view.quarantine(data)),
            Entry(anchor="dataset", name="Dataset", section=dataset_view.overview(data, facts.speed, hourly=price)),
        ]
        if data.manifest.lineage is not None:
            made = lineage_view.lineage(data.manifest.lineage, data, facts.left_out)
            found.insert(0, Entry(anchor="lineage", name="What was left out", section=made))
    if facts.run is not None:
        found.append(Entry(anchor="training", name="Training", section=run_view.training(facts.run)))
    if facts.evaluation is not None:
        found.append(Entry(anchor="metrics", name="Metrics", section=run_view.metrics(facts.evaluation)))
    if facts.captions is not None:
        found.append(Entry(anchor="captions", name="Captions", section=run_view.captions(facts.captions)))
    if facts.sweep is not None:
        found.append(Entry(anchor="sweep", name="Sweep", section=sweep_view.sweep(facts.sweep)))
    return found


def _missing(facts: Facts, request: ReportRequest) -> list[tuple[str, str]]:
    captions = "no real pictures given (--images and --references, with --run)."
    if request.pictures is not None:
        captions = "the training run has no checkpoint yet."
    every = [
        ("Dataset", facts.data, "no dataset given (--data)."),
        ("Training", facts.run, "no training run given (--run)."),
        ("Metrics", facts.evaluation, "no evaluation given (--evaluation, the --out of jobs.evaluate)."),
        ("Captions of pictures", facts.captions, captions),
        ("Sweep", facts.sweep, "no sweep given (--sweep)."),
    ]
    return [(name, why) for name, found, why in every if found is None]


def command(request: ReportRequest) -> str:
    """What writes this report again, quoted for a shell: places are other people's words."""
    words = ["python", "-m", "jobs.report"]
    for name in given(request):
        value, option = getattr(request, name), flag(ReportRequest, name)
        if value is True:
            words.append(option)
        else:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(words)
