"""Commits of repos on the Hugging Face hub."""

from typing import TYPE_CHECKING

from pcm.clip.names import is_commit
from pcm.errors import InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def pin_repo(repo: str, revision: str | None, *, option: str | None = None) -> str:
    """The commit of a repo's revision. Raises InputError where it must be looked up and cannot be.

    option: how a user says the commit, as the error shows it; None: in no way.
    """
    if revision and is_commit(revision):
        return revision
    return look_up(repo, revision, option=option).sha or ""


def look_up(repo: str, revision: str | None, *, option: str | None = None) -> "ModelInfo":
    """What the hub says of a repo; `option` as in `pin_repo`. Raises InputError."""
    from httpx2 import HTTPError  # of the hub's client: no connection
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HFValidationError:
        raise InputError(f"model {repo!r}: neither a folder nor a repo id ORG/NAME; give one of the two") from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        commit = "" if option is None else f"a 40-digit commit ({option}), or "
        raise InputError(
            f"model {repo!r}: its revision cannot be looked up ({first_line(error)}); give {commit}a local copy"
        ) from None
