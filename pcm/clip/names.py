"""What a CLIP's NAME stands for; open_clip and torch are imported only where they are needed."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from pcm.credentials import refuse_credentials
from pcm.errors import InputError
from pcm.spec import QUICK_GELU_SUFFIX

#: Begins a NAME that is a repo on the Hugging Face hub.
HUB_PREFIX = "hf-hub:"
#: Begins what open_clip calls a folder.
LOCAL_PREFIX = "local-dir:"


def resolve_clip_name(name: str) -> tuple[str, str | None]:
    """open_clip's (model_name, pretrained) of a NAME as users write it. Raises InputError."""
    refuse_credentials(name)
    if name == "embedded":
        from pcm import embedded

        name = str(embedded.clip_path())
    if name.startswith(HUB_PREFIX):
        return name, None
    path = Path(name)
    if path.is_dir():
        if not (path / "open_clip_config.json").is_file():
            raise InputError(f"CLIP folder {name!r}: has no open_clip_config.json; give an open_clip folder")
        return f"{LOCAL_PREFIX}{path}", None
    architecture, _, pretrained = name.partition("/")
    open_clip = _open_clip()
    if architecture not in open_clip.list_models() or not pretrained:
        raise InputError(
            f"CLIP model {name!r}: give ARCHITECTURE/PRETRAINED such as ViT-L-14/openai, ARCHITECTURE/CHECKPOINT_FILE "
            "(ViT-L-14-quickgelu//FILE where its weights need QuickGELU), hf-hub:ORG/REPO, an open_clip folder, or "
            "'embedded'"
        )
    return architecture, pretrained


def refuse_place(name: str, *, source: str, option: str = "clip") -> None:
    """Raises InputError for a NAME that only a file says, `source`, where it stands for a folder, file or hub repo.

    `option` is the one by which it is named. Whoever made the file could name any. "embedded", "null" and
    open_clip's own tags are allowed: they are known here.
    """
    if not is_known(name):
        raise InputError(
            f"{source}: names the CLIP {name!r}, a folder, file or hub repo, which is opened only where you name it "
            f"too; if you trust it, give --{option} {name} ({option.replace('-', '_')}= in Python)"
        )


def clip_anywhere(name: str) -> str:
    """The same NAME in a process whose working folder is another: a folder or file of it by its absolute path."""
    place = name if Path(name).exists() else name.partition("/")[2]
    if not place or not Path(place).exists() or name.startswith(HUB_PREFIX) or is_known(name):
        return name
    return name.removesuffix(place) + os.path.abspath(place)


def is_known(name: str) -> bool:
    """Whether a NAME stands for the same weights everywhere: not for a folder, a file or a hub repo."""
    architecture, _, pretrained = name.partition("/")
    return name in ("embedded", "null") or pretrained in _open_clip().list_pretrained_tags_by_model(architecture)


def activation_of(architecture: str, pretrained: str | None) -> str | None:
    """ "quick_gelu" or "gelu": what the weights of ARCHITECTURE/PRETRAINED were trained with.

    QuickGELU where the tag's own configuration or the architecture's asks for it, so `ViT-L-14/openai` and
    `ViT-L-14-quickgelu/openai` are the same model. A checkpoint file does not say it: there the architecture decides
    (`ViT-L-14-quickgelu//models/own.pt`). None for a folder or a hub repo, whose revision covers their configuration.
    Raises InputError for an architecture named -quickgelu with a tag that was trained without it.
    """
    if pretrained is None:
        return None
    open_clip = _open_clip()
    config, tag = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, pretrained)
    if tag and architecture.endswith(QUICK_GELU_SUFFIX) and not tag.get("quick_gelu"):
        plain = architecture.removesuffix(QUICK_GELU_SUFFIX)
        raise InputError(
            f"CLIP model {architecture}/{pretrained}: these weights were trained with GELU; give {plain}/{pretrained}"
        )
    return "quick_gelu" if tag.get("quick_gelu") or config.get("quick_gelu") else "gelu"


def is_commit(revision: str) -> bool:
    """Whether it is a full commit, which never moves."""
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def folder_revision(path: Path, recorded: str | None = None) -> str:
    """sha256 over a model's files (names and contents): what a folder has instead of a commit.

    Hidden files are no part of it: a download notes its time in one. recorded: given back where it is the digest of the
    same folder with them, as earlier releases made it.
    """
    if path.is_file():
        return whole_folder_revision(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    plain = [file for file in files if not is_hidden(file, path)]
    now = _digest(path, plain)
    if recorded in (None, now) or len(plain) == len(files):
        return now
    return recorded if recorded == _digest(path, files) else now


def whole_folder_revision(path: Path) -> str:
    """The same with hidden files, or of one file."""
    if path.is_file():
        return _digest(path.parent, [path])
    return _digest(path, sorted(file for file in path.rglob("*") if file.is_file()))


def is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _digest(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def revision_here(name: str, recorded: str | None = None) -> str | None:
    """`folder_revision` of a NAME that stands for a folder or a file; None for a tag or a hub repo."""
    architecture, pretrained = resolve_clip_name(name)
    if architecture.startswith(LOCAL_PREFIX):
        return folder_revision(Path(architecture.removeprefix(LOCAL_PREFIX)), recorded)
    return folder_revision(Path(pretrained)) if pretrained and Path(pretrained).is_file() else None


def _open_clip() -> ModuleType:
    import pcm.torchvision_shim  # noqa: F401  isort: skip
    import open_clip

    return open_clip
