"""What the config.json of a run says beside its settings, and whether a run that is resumed is the same by it."""

import logging
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pcm
from cluster.sources.picture_source import PictureSource
from cluster.sources.pictures import source_anywhere
from pcm.clip.names import HUB_PREFIX, is_known
from pcm.errors import InputError, known_fields
from pcm.spec import DIGEST, QUICK_GELU_SUFFIX

log = logging.getLogger(__name__)

#: In config.json: of the file of references of validation. Runs of releases that did not record it have none.
REFERENCES_SHA256 = "references_sha256"
#: In config.json: the sha256 of words and concepts. Runs of releases that did not record it have none.
VOCABULARIES_FIELD = "vocabularies"
#: In config.json: of a run that began with the weights of a captioner, where that was and the sha256 of its weights.
INIT_FROM = "init_from"
#: In config.json: of the beginning of a run, a random name by which trackers tell it from others that began at a place
#: of the same name. Runs of releases that did not record it have none.
BEGINNING = "beginning"


def beginning(previous: Mapping[str, Any] | None) -> dict[str, str]:
    """What config.json says of it: of a run that goes on what it said before."""
    if previous is None:
        return {BEGINNING: uuid.uuid4().hex}
    return {BEGINNING: str(previous[BEGINNING])} if BEGINNING in previous else {}


def run_versions(previous: Mapping[str, Any]) -> dict[str, str]:
    """The installed ones, after those with which the run was made so far: "2.10.0 and 2.11.0"."""
    # Of this code, not of an installed package's metadata: a submitted job brings its own.
    found = {"pcmnet-ray": pcm.__version__} | {name: version(name) for name in ("torch", "ray", "numpy")}
    before = dict(previous.get("versions", {}))
    return {
        name: " and ".join(dict.fromkeys([*before[name].split(" and "), number] if name in before else [number]))
        for name, number in found.items()
    }


def warn_of_other_releases(before: Mapping[str, Any]) -> None:
    """Say where a run goes on with other releases than the last of those with which it was made so far."""
    was = {name: numbers.split(" and ")[-1] for name, numbers in before.get("versions", {}).items()}
    changed = [
        f"{name}: {was[name]} -> {here}"
        for name, here in run_versions({}).items()
        if name in was and was[name].partition("+")[0] != here.partition("+")[0]  # builds for a CPU and a GPU
    ]
    if changed:
        log.warning(
            "goes on with other releases than before (%s), and its losses may differ by them; go on, or install those",
            "; ".join(changed),
        )


def same_clip(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs read pictures of validation with the same CLIP: by name on the hub, by digest at a place. One of
    each is taken for the same where weights are recorded: they are compared when it is loaded."""
    was, here = dict(before.get("clip", {})), now.get("clip", {})
    if not now["validation"] or not was.get("revision") or was == here:
        return True
    hub = [_hub_name(each["model"]) for each in (was, here)]
    if all(hub):
        return hub[0] == hub[1]
    if not any(hub) and all(each["revision"].startswith(DIGEST) for each in (was, here)):
        return was["revision"] == here["revision"]
    # An earlier release did not look at the place that was named, and recorded the commit of the dataset's.
    return was["model"] == here["model"] or bool(here.get("weights"))


def _hub_name(name: str) -> str | None:
    """A repo or tag of the hub, in one spelling; None for a folder, a file, a URI and "embedded"."""
    if name.startswith(HUB_PREFIX):
        return name
    architecture, _, tag = name.partition("/")
    known = tag and is_known(name)
    return f"{architecture.removesuffix(QUICK_GELU_SUFFIX)}/{tag}" if known else None


def same_validation(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs are validated alike: by the same bytes of references, or by those of one place where a run did
    not record them. Pictures may move. Raises TypeError or LookupError for a document that is no run's."""
    was, here = recorded_validation(before), recorded_validation(now)
    if was is None or here is None or was.split != here.split:
        return was == here
    sha256 = [each.get(REFERENCES_SHA256) for each in (before, now)]
    return sha256[0] == sha256[1] if all(sha256) else was == here


def warn_of_moved_pictures(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Nothing proves that pictures at another place are the same: only their references are compared."""
    was, here = recorded_validation(before), recorded_validation(now)
    if was and here and was.images != here.images:
        log.warning("validation pictures are taken from %s, they were at %s", here.images, was.images)


def recorded_validation(document: Mapping[str, Any]) -> PictureSource | None:
    if not document["validation"]:
        return None
    recorded = PictureSource(**known_fields(PictureSource, document["validation"], "validation"))
    try:
        return source_anywhere(recorded)
    except InputError:  # of a store whose package is not installed here: nothing is read from it
        return recorded
