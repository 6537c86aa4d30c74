"""jobs.train --init-from: the captioner with whose weights and words a run begins."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from cluster.store.store import Store, open_store
from cluster.training.config import TrainConfig
from pcm.captioners.interface import CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE
from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError, NotKnown

_HEAD = "visual_embedding.clip_head."
#: What to do where a run replaces its best captioner, or deletes a checkpoint.
_A_COPY = "give another --out, and a copy of the captioner's folder, which stays as it is"


@dataclass(frozen=True)
class InitialCaptioner:
    """named: as --init-from names it. folder: where its files are, from any worker. sha256: of the weights. config: of
    the run that made it. is_read: not of one that a resumed run has recorded."""

    named: str
    folder: str
    sha256: str
    words: bytes  # vocabulary.txt
    config: TrainConfig | None
    is_read: bool = True


def read_initial(uri: str) -> InitialCaptioner:
    """The captioner in a checkpoint's folder, or the best one of a run's. Raises InputError."""
    store = _captioner_at(uri)
    try:
        weights, words, document = (store.read_bytes(name) for name in (MODEL_FILE, VOCABULARY_FILE, CONFIG_FILE))
        words.decode()
        train = json.loads(document).get("train")
        config = None if train is None else TrainConfig.from_dict(train)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"--init-from {uri}: no captioner ({error.filename or MODEL_FILE} is missing)") from None
    except NotKnown as error:
        raise InputError(
            f"--init-from {uri}: {error}; give a captioner of this release, or use the release that trained it"
        ) from None
    except (ValueError, AttributeError):
        raise InputError(
            f"--init-from {uri}: its {CONFIG_FILE} or {VOCABULARY_FILE} is damaged; give another checkpoint"
        ) from None
    return InitialCaptioner(uri, store.address, hashlib.sha256(weights).hexdigest(), words, config)


def _captioner_at(uri: str) -> Store:
    """Of a run its best one."""
    store = open_store(uri)
    return store if store.exists(MODEL_FILE) else open_store(f"{store.address}/best")


def load_weights(module: PCMNet, folder: str, *, sha256: str) -> None:
    """Begin with the weights there; CLIP's head stays the dataset's. Raises InputError where they do not fit, or are
    not those with that digest."""
    try:
        data = _captioner_at(folder).read_bytes(MODEL_FILE)
        state = safetensors.torch.load(data)
    except (FileNotFoundError, NotADirectoryError, safetensors.SafetensorError):
        raise InputError(f"--init-from {folder}: its {MODEL_FILE} is missing or damaged; {_A_COPY}") from None
    if (now := hashlib.sha256(data).hexdigest()) != sha256:
        raise InputError(
            f"--init-from {folder}: its weights are others now ({now[:17]}) than those that this run began with "
            f"({sha256[:17]}); {_A_COPY}"
        )
    own: dict[str, Any] = module.state_dict()
    if found := _misfits(own, state):
        raise InputError(
            f"--init-from {folder}: another network than this run's ({found[0]}); leave out --preset and the --set of "
            "its sizes, which are then the captioner's, or train from the beginning"
        )
    for name, value in own.items():
        if name.startswith(_HEAD) and not torch.allclose(value.float(), state[name].float(), atol=1e-3):
            raise InputError(
                f"--init-from {folder}: was trained on another CLIP's features; give a dataset of its CLIP"
            )
    module.load_state_dict({**state, **{name: value for name, value in own.items() if name.startswith(_HEAD)}})


def _misfits(own: dict[str, Any], state: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {_shape(state, name)} -> {_shape(own, name)}"
        for name in dict.fromkeys([*own, *state])
        if _shape(own, name) != _shape(state, name)
    ]


def _shape(state: dict[str, Any], name: str) -> str:
    return " x ".join(map(str, state[name].shape)) if name in state else "none"
