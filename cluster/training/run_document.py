"""config.json of a training run: made when it begins, read and compared when it goes on."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cluster.dataset.together import Vocabularies
from cluster.sources.pictures import references_sha256, source_anywhere
from cluster.store.outputs import refuse_other_things
from cluster.store.store import Store, is_uri, open_store
from cluster.training.config import TrainConfig
from cluster.training.data.mixture import TrainingSet, is_known_by
from cluster.training.data.shuffled import ROW_ORDER
from cluster.training.init_from import InitialCaptioner
from cluster.training.reporting import METRICS_KEY
from cluster.training.request import TrainRequest
from cluster.training.run_record import (
    INIT_FROM,
    REFERENCES_SHA256,
    VOCABULARIES_FIELD,
    beginning,
    recorded_validation,
    run_versions,
    same_clip,
    same_validation,
)
from cluster.weights.manifest import read_manifest
from pcm.captioners.interface import CLIP_OPTION
from pcm.clip.names import clip_anywhere, refuse_place, revision_here
from pcm.errors import InputError, NotKnown, one_line
from pcm.spec import DIGEST, ClipSpec

log = logging.getLogger(__name__)

CONFIG_KEY = "config.json"
#: In config.json: where the run is trained, cpu or cuda. Runs of releases that did not record it have none.
DEVICE = "device"


def previous_run(out: Store, *, resume: bool) -> dict[str, Any] | None:
    """config.json of the run in OUT, or None for an empty OUT."""
    try:
        data = out.read_bytes(CONFIG_KEY)
    except FileNotFoundError:
        refuse_other_things(out, "not a training run")
        return None
    with intact_document(out, CONFIG_KEY):
        previous = json.loads(data)
        dict(previous["train"])
    if resume:
        refuse_other_row_order(out, previous)  # before all else that another release may say otherwise
    with intact_document(out, CONFIG_KEY):
        TrainConfig.from_dict(previous["train"])
        (
            recorded_validation(previous),
            _rows(previous),
            run_versions(previous),
            dict(previous.get(VOCABULARIES_FIELD, {})),
        )
        begun_from(previous)
        dict(previous.get("clip", {}))
    if not resume:
        done, wanted = len(read_history(out)), previous["train"]["epochs"]
        state = "a finished run" if done >= wanted else f"a run with {done} of {wanted} epochs done"
        raise InputError(f"{out.root}: holds {state}; add --resume to continue it, or give another --out")
    return previous


@contextmanager
def intact_document(out: Store, key: str) -> Iterator[None]:
    """What goes wrong in reading config.json or sweep.json is that it is damaged, or of a later release. Raises
    InputError."""
    try:
        yield
    except NotKnown as error:
        field = str(error).partition(": ")[0]
        raise InputError(
            f"{out.root}/{key}: {field}: not known to this release; finish it with the release that began it, or give "
            "another --out"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = one_line(error, longest=200)
        raise InputError(f"{out.root}/{key}: damaged ({said}); restore it, or give another --out") from None


def refuse_other_row_order(out: Store, previous: dict[str, Any]) -> None:
    """Raises InputError for the document of a run that takes its rows in the order of another release."""
    if (order := previous.get("row_order", 1)) != ROW_ORDER:  # releases before the second recorded none
        raise InputError(
            f"{out.root}: takes its rows in order {order}, this release in order {ROW_ORDER}; finish it with the "
            "release that began it, or give another --out"
        )


def run_document(
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
        VOCABULARIES_FIELD: {
            "words": hashlib.sha256(vocabularies.words).hexdigest(),
            "concepts": hashlib.sha256(vocabularies.concepts).hexdigest(),
        },
        "versions": run_versions(previous or {}),
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


def refuse_other_run(out: Store, previous: dict[str, Any], document: dict[str, Any]) -> None:
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
    for name, sha256 in document[VOCABULARIES_FIELD].items():
        if (was := previous.get(VOCABULARIES_FIELD, {}).get(name, sha256)) != sha256:
            differences.setdefault(name, f"{was[:17]} -> {sha256[:17]}")
    begun = [begun_from(each)[1] or "random weights" for each in (previous, document)]
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


def begun_from(document: dict[str, Any]) -> tuple[str | None, str | None]:
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


def read_history(out: Store) -> list[dict[str, Any]]:
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
