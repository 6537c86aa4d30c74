"""The files that a CLIP's NAME stands for: which commit, which digest, and what open_clip is told of them.

open_clip itself takes neither a commit nor a digest, and builds a tag's weights into whatever activation the
architecture's name says.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
import torch

from pcm.clip.configuration import CONFIG_FILE, model_config, open_tokenizer
from pcm.clip.names import HUB_PREFIX, LOCAL_PREFIX, activation_of, is_commit, resolve_clip_name
from pcm.clip.towers import feature_shape, token_grid
from pcm.errors import InputError
from pcm.model_faults import why_unusable
from pcm.records import FeatureShape
from pcm.safe_pickle.torch_files import check_archive


@dataclass(frozen=True)
class ClipFiles:
    """What is loaded. architecture: open_clip's name, or local-dir:FOLDER, which holds the weights and settles all.

    checkpoint: a file of weights, for a name. repo and commit: where a folder or a tag's weights came from. preprocess:
    of a tag, over open_clip's defaults.
    """

    architecture: str
    activation: str | None = None
    checkpoint: str | None = None
    repo: str | None = None
    commit: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """open_clip's model configuration. Raises InputError for one that says what is not allowed."""
        return model_config(self.architecture)

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        if self.checkpoint is not None:
            return Path(self.checkpoint)
        found = open_clip.factory._find_checkpoint_in_dir(Path(self.architecture.removeprefix(LOCAL_PREFIX)))
        return Path(found or "")

    def load(self, device: torch.device) -> torch.nn.Module:
        assert self.config  # raises before open_clip reads it
        if self.weights.is_file():
            check_archive(self.weights)
        settings: dict[str, Any] = {}
        if self.checkpoint is not None:
            settings = {
                "pretrained": self.checkpoint,
                "force_quick_gelu": self.activation == "quick_gelu",
                "force_preprocess_cfg": self.preprocess,
            }
        return open_clip.create_model(self.architecture, device=device, require_pretrained=True, **settings)

    def tokenizer(self) -> Any:
        """The model's own; of the repo that the weights came from, at the same commit."""
        return open_tokenizer(self.architecture, repo=self.repo, commit=self.commit)


def clip_files(name: str, revision: str | None = None) -> ClipFiles:
    """Download what is not here. `revision`: the commit of a hub repo, also of a tag's; None takes its main branch.

    Raises InputError for an unknown name, and what the hub's client raises when files cannot be had.
    """
    architecture, pretrained = resolve_clip_name(name)
    commit = revision if revision and is_commit(revision) else None
    if architecture.startswith(HUB_PREFIX):
        repo = architecture.removeprefix(HUB_PREFIX)
        model_config(architecture, commit=commit)  # before anything else of it is here
        weights = open_clip.pretrained.download_pretrained_from_hf(repo, revision=commit)
        config = open_clip.pretrained.download_pretrained_from_hf(repo, CONFIG_FILE, revision=commit)
        if Path(config).parent != Path(weights).parent:
            raise InputError(f"CLIP {name!r}: changed on the hub while it was downloaded; run again")
        return ClipFiles(f"{LOCAL_PREFIX}{Path(weights).parent}", repo=repo, commit=commit)
    if pretrained is None:
        return ClipFiles(architecture)
    activation = activation_of(architecture, pretrained)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag:
        return ClipFiles(architecture, activation, checkpoint=pretrained)
    repo, filename = hub_place(architecture, pretrained)
    if repo:
        checkpoint = open_clip.pretrained.download_pretrained_from_hf(repo, filename, revision=commit)
    else:
        checkpoint = open_clip.pretrained.download_pretrained(tag)
    # The size is the architecture's own, as in open_clip.
    preprocess = {key: value for key, value in tag.items() if key in _PREPROCESS_FIELDS}
    return ClipFiles(architecture, activation, str(checkpoint), repo=repo or None, commit=commit, preprocess=preprocess)


def hub_place(architecture: str, tag: str) -> tuple[str, str | None]:
    """(repo, file) of a tag on the hub: ("", None) where it is only at a URL, None for open_clip's usual file."""
    place = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    repo, _, filename = place.rpartition("/")
    return repo, filename or None


def loaded_names(filename: str | None) -> list[str]:
    """The files of a repo that open_clip's download tries, in its order."""
    name = filename or open_clip.constants.HF_WEIGHTS_NAME
    return [*open_clip.pretrained._get_safe_alternatives(name), name]


@dataclass(frozen=True)
class TowerFacts:
    """What a CLIP gives, known before its weights are there."""

    features: FeatureShape
    has_head: bool

    def __str__(self) -> str:
        shape = self.features
        patches = "no patches"
        if shape.has_patches:
            place = "with a head to the joint space" if self.has_head else "without a head to the joint space"
            patches = f"{shape.num_patches} patches of {shape.patch_dim} {place}"
        return f"a global feature of {shape.embed_dim} and {patches}, {shape.bytes_per_row:,} bytes a row"


def tower_facts(name: str, revision: str | None = None) -> TowerFacts:
    """Of a NAME (a hub repo's at a revision), whose configuration file is all that is downloaded. The tower
    is built without memory for weights.

    Raises InputError when there is no such model, or its configuration is none.
    """
    architecture, _ = resolve_clip_name(name)
    try:
        config = model_config(architecture, commit=revision)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        with torch.device("meta"):
            # The image tower alone: the text tower may need a configuration of another repo.
            visual = open_clip.model._build_vision_tower(config["embed_dim"], vision)
    except InputError:
        raise
    except Exception as error:  # whatever open_clip and timm say of a configuration that is none
        raise InputError(f"CLIP model {name!r}: its configuration cannot be used ({why_unusable(error)})") from None
    grid = token_grid(visual)
    return TowerFacts(feature_shape(config["embed_dim"], grid), grid is not None and grid.has_head)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


_PREPROCESS_FIELDS = ("mean", "std", "interpolation", "resize_mode", "mode", "fill_color")
