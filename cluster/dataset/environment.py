"""What computes: the packages and the processor or GPU of a process that draws, as dataset.json says it.

Each kind of machine that draws puts one small object beside the shards, environments/DIGEST.json; the manifest gathers
them. So a dataset of two kinds of machine says both.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pcm
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.spec import ClipSpec

log = logging.getLogger(__name__)

FOLDER = "environments/"

#: Names of packages whose release decides bytes of pictures, token ids, features, scores or files, as installed.
PACKAGES = (
    "torch", "diffusers", "transformers", "open_clip_torch", "pillow", "pyarrow", "numpy", "peft", "sentencepiece",
    "timm", "tokenizers", "torchvision",
)  # fmt: skip
#: How an environment names the version of this package.
OWN_VERSION = "pcmnet-ray"
#: In the stats of a shard: the digest of where it was drawn, and of where the rest of it was, if quarantined samples
#: were drawn later on another machine.
DRAWN_IN, DRAWN_BEFORE_IN = "environment", "environments_before"


def environment(*, device: str, loads_models: bool) -> dict[str, Any]:
    """Of this process. `loads_models`: not for the null generator, which needs no torch."""
    found: dict[str, Any] = {"versions": versions(), "processor": processor(), "instructions": None, "gpu": None}
    if loads_models:
        import torch

        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        if device == "cuda":
            found["gpu"] = torch.cuda.get_device_name()
            found["versions"]["cuda"] = str(torch.version.cuda)
    return found


def versions() -> dict[str, str]:
    """This package's version, and that of each of PACKAGES that is installed."""
    found = {OWN_VERSION: pcm.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Such as "x86_64, Intel(R) Xeon(R) Platinum 8488C"."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:  # not on Linux
        named = platform.processor()
    return ", ".join(filter(None, (platform.machine(), named)))


def store_environment(store: Store, found: dict[str, Any]) -> str:
    """Put it beside the shards, where it is not there yet; its digest."""
    data = document_bytes(found)
    digest = hashlib.sha256(data).hexdigest()[:16]
    key = _key(digest)
    if not store.exists(key):
        store.write_bytes(key, data)
    return digest


def stored_environments(store: Store) -> tuple[dict[str, Any], ...]:
    """All kinds of machine that drew a dataset, sorted; none of one that an earlier release drew.

    Raises InputError for a damaged object.
    """
    return tuple(_read(store, key) for key in sorted(store.list(FOLDER)))


def load_environment(store: Store, digest: str) -> dict[str, Any] | None:
    """What `store_environment` put there; None where it is gone. Raises InputError for a damaged object."""
    try:
        return _read(store, _key(digest))
    except FileNotFoundError:
        return None


def drawn_in(stats: Mapping[str, Any]) -> list[str]:
    """Digests of the environments that drew a shard, from its stats: one, or several where quarantined samples were
    drawn later; none of one that an earlier release drew."""
    digest = stats.get(DRAWN_IN)
    return [*stats.get(DRAWN_BEFORE_IN, ()), *([digest] if digest else [])]


def _key(digest: str) -> str:
    return f"{FOLDER}{digest}.json"


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        document = json.loads(store.read_bytes(key))
        dict(document["versions"])
        return dict(document)
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{store.root}/{key}: damaged; delete it and run the same command again") from None


def joined_versions(environments: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Package -> its version, or the versions of several environments: "2.9.1 and 2.10.0"."""
    names = dict.fromkeys(name for each in environments for name in each["versions"])
    return {
        name: " and ".join(dict.fromkeys(each["versions"][name] for each in environments if name in each["versions"]))
        for name in names
    }


def differences(before: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """In what `now` differs from the nearest of the environments before, as "torch: 2.9.1 -> 2.10.0"; none where it is
    one of them. Of a package that an earlier release did not record, nothing is known."""
    found = [_differences(each, now) for each in before]
    return min(found, key=len) if found else []


def other_releases(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """In which packages two processes of a run differ, as "diffusers 0.42.0 and 0.42.1". Builds of one release for a
    CPU and for a GPU count as the same, and a package that one of them lacks does too."""
    here, there = _without_builds(one), _without_builds(other)
    return [f"{name} {one[name]} and {other[name]}" for name in one if name in other and here[name] != there[name]]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    was, here = before["versions"], now["versions"]
    # An earlier release recorded fewer packages.
    found = [(name, was[name], here[name]) for name in here if name in was]
    found += [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now]) if name != "versions"]
    return [f"{name}: {one} -> {other}" for name, one, other in found if one != other]


def warn_of_other_releases(store: Store) -> None:
    """Say where a dataset goes on with other releases of PACKAGES than those that have made what is there."""
    made = [{"versions": _without_builds(each["versions"])} for each in stored_environments(store)]
    here = _without_builds(versions())
    for name in (OWN_VERSION, "pyarrow"):  # neither decides what a picture, a score or a feature is
        here.pop(name, None)
    if changed := differences(made, {"versions": here}):
        log.warning(
            "%s: goes on with other releases than it was begun with (%s), and its pictures, scores and features may "
            "differ by them; go on, or install those",
            store.root, "; ".join(changed),
        )  # fmt: skip


def _without_builds(releases: Mapping[str, str]) -> dict[str, str]:
    """Builds of one release for a CPU and for a GPU count as the same: 2.13.0+cu128 is 2.13.0."""
    return {name: release.partition("+")[0] for name, release in releases.items()}


def tell_encoder(out: Store, clip: ClipSpec) -> None:
    """Put beside the rows where this process computes their features or scores. clip: with the device that it uses."""
    warn_of_other_releases(out)
    store_environment(out, environment(device=clip.device, loads_models=True))


def made_by(out: Store) -> dict[str, Any]:
    """A manifest's `versions` and `environments`: of the processes that encoded; else of this one, without a model.

    Where pictures were drawn stands in the dataset that they were taken from. Raises InputError for a damaged object.
    """
    found = stored_environments(out) or (environment(device="cpu", loads_models=False),)
    return {"versions": joined_versions(found), "environments": found}
