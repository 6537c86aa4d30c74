"""Captioners by path or URI: a checkpoint, a run or an ensemble of them."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.dataset.given_features import FeatureSet
from cluster.device import require_gpu_here
from cluster.evaluation.request import CaptionerOptions
from cluster.gpu_share import worker_has_gpu
from cluster.sources.concept_file import read_concepts
from cluster.sources.pictures import PictureSet
from cluster.store.store import is_uri, join, local_copy, open_store
from cluster.training.checkpoints import AGAIN, STATE_FILE
from cluster.training.ray_trainer import CHECKPOINTS
from cluster.training.reporting import METRICS_KEY
from cluster.weights.manifest import read_manifest
from cluster.weights.node_copy import local_name
from pcm.captioners.captioner import MODEL_FILE, Captioner, no_captioner
from pcm.captioners.interface import CONFIG_FILE
from pcm.captioners.pcmnet.method import PCMNET
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from pcm.text.concepts import ConceptVocabulary


def load_captioner(
    checkpoints: Sequence[str], asked: CaptionerOptions, *, clip: ClipEncoder | None = None
) -> Captioner:
    """The captioner in one checkpoint, or an ensemble of several. `clip`: one that is loaded already.

    Raises InputError for a GPU that this machine does not have, a URI where no CLIP is staged, and as `Captioner.load`
    does.
    """
    require_gpu_here(
        asked.device,
        "leave --device out, or caption on a cluster's GPUs (jobs.evaluate --num-workers, jobs.caption "
        "--gpus-per-worker)",
    )
    if clip is None and asked.clip is not None and is_uri(asked.clip):
        read_manifest(open_store(asked.clip))  # the CLIP itself is fetched when the first picture comes
    concepts = None if asked.concepts is None else read_concepts(asked.concepts)
    return load_from(
        checkpoints,
        clip=clip or asked.clip,
        device=asked.device,
        beam_size=asked.beam_size,
        concepts=concepts,
    )


def load_from(
    checkpoints: Sequence[str],
    *,
    clip: ClipEncoder | str | None,
    device: str,
    beam_size: int,
    concepts: ConceptVocabulary | None,
    weights: Sequence[str] | None = None,
) -> Captioner:
    """`Captioner.load` of paths or URIs. Raises InputError as it does, and where they have other weights (sha256)."""
    with contextlib.ExitStack() as copies:
        folders = [copies.enter_context(local_checkpoint(checkpoint)) for checkpoint in checkpoints]
        captioner = Captioner.load(
            folders, clip=clip, device=device, beam_size=beam_size, concepts=concepts, find_clip=local_name
        )
        if weights is not None:  # compared when all is loaded: what was replaced meanwhile does not come back
            for checkpoint, folder, sha256 in zip(checkpoints, folders, weights, strict=True):
                if hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest() != sha256:
                    raise InputError(
                        f"checkpoint {checkpoint}: was replaced while it was evaluated, as by its run, which still "
                        "trains; evaluate a copy of the folder, or run the same command again"
                    )
        return captioner


def check_clip(captioner: Captioner, pictures: PictureSet | FeatureSet) -> None:
    """Raises InputError for features that are recorded to be of another CLIP than the captioner's."""
    if not isinstance(pictures, FeatureSet) or pictures.given.clip is None:
        return
    theirs = pictures.given.clip
    for name in ("activation", "weights"):
        wanted, given = captioner.recorded.get(name), getattr(theirs, name)
        if wanted and given and wanted != given:
            raise InputError(
                f"--features {pictures.given.place}: the {name} of its CLIP {theirs.model} is {given}, the captioner "
                f"was trained with {wanted}; give features of the same CLIP"
            )


def check_checkpoint(uri: str) -> None:
    """Raises InputError where no captioner lies at `uri`."""
    store = open_store(uri)
    if not (store.exists(MODEL_FILE) or store.exists(f"best/{MODEL_FILE}")):
        raise no_captioner(uri)


def weights_sha256(checkpoint: str) -> str:
    """Of the captioner in a checkpoint, or of a run's best one. Raises InputError where there is none."""
    store = open_store(checkpoint)
    for key in (MODEL_FILE, f"best/{MODEL_FILE}"):
        with contextlib.suppress(FileNotFoundError):
            return hashlib.sha256(store.read_bytes(key)).hexdigest()
    raise no_captioner(checkpoint)


@contextlib.contextmanager
def local_checkpoint(uri: str) -> Iterator[Path]:
    """A local folder with the captioner at `uri`, for as long as it is read: a checkpoint, or a run, whose best one it
    is.

    The record of a remote run comes with it (`Captioner.load` looks there which CLIP the run was given).
    """
    store = open_store(uri)
    in_run = not store.exists(MODEL_FILE) and store.exists(f"best/{MODEL_FILE}")
    with local_copy(join(uri, "best") if in_run else uri) as folder:
        if in_run and not store.is_local and store.exists(CONFIG_FILE):
            (folder.parent / CONFIG_FILE).write_bytes(store.read_bytes(CONFIG_FILE))
        yield folder


_EPOCH = re.compile(rf"epoch-([0-9]{{3,}})(?:{AGAIN})*")


def epoch_checkpoints(run: str) -> tuple[dict[int, str], int]:
    """(epoch -> the checkpoint at its end, how many epochs were trained) of a run. Raises InputError without any.

    Of an epoch that was made once more it is the last one. Those are left out that lack a file: a run that is killed
    while it writes one leaves it so.
    """
    store = open_store(run)
    files: dict[str, set[str]] = {}
    for key in store.list(f"{CHECKPOINTS}/"):
        name, _, file = key.removeprefix(f"{CHECKPOINTS}/").partition("/")
        files.setdefault(name, set()).add(file)
    whole = {name for name, found in files.items() if found >= {*PCMNET.files, STATE_FILE}}
    ended = {int(match[1]): name for name in sorted(whole) if (match := _EPOCH.fullmatch(name))}  # "-again" comes last
    if not ended:
        raise InputError(f"--every-epoch: {run} has no checkpoints of epochs; give the --out of a jobs.train run")
    try:
        trained = len(store.read_bytes(METRICS_KEY).splitlines())
    except FileNotFoundError:
        trained = max(ended)
    places = {epoch: join(run, CHECKPOINTS, ended[epoch]) for epoch in sorted(ended)}
    return places, max(trained, *ended)


def device_here(asked: str) -> str:
    """A worker's; one that Ray gave a GPU of which torch knows nothing captions on its CPU, and says so."""
    return asked if asked == "cpu" or worker_has_gpu("captioning") else "cpu"
