"""Commits of repos on the Hugging Face hub."""

from typing import TYPE_CHECKING

from pcm.clip.names import is_commit
from pcm.errors import InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


def pin_repo(repo: str, revision: str | None) -> str:
    """The commit of a repo's revision. Raises InputError where it must be looked up and cannot be."""
    if revision and is_commit(revision):
        return revision
    return look_up(repo, revision).sha or ""


def look_up(repo: str, revision: str | None) -> "ModelInfo":
    """What the hub says of a repo. Raises InputError."""
    from httpx2 import HTTPError  # of the hub's client: no connection
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HFValidationError:
        raise InputError(f"model {repo!r}: neither a folder nor a repo id ORG/NAME; give one of the two") from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise InputError(
            f"model {repo!r}: its revision cannot be looked up ({first_line(error)}); "
            "give a 40-digit commit with the revision argument, or a local folder"
        ) from None
