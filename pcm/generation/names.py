"""What a text-to-image NAME stands for; diffusers and torch are not imported."""

import re
from pathlib import Path

from pcm import embedded

#: Names the generator of a dataset whose pictures were drawn elsewhere.
IMPORTED = "imported"
#: Names the generator of a dataset of real photos.
PHOTOS = "photos"
#: Names the generator of a dataset merged from datasets of several generators.
SEVERAL = "several"
#: Names the generator of a dataset without pictures: its features are of its captions (cluster.ingest.text_only).
TEXT_ONLY = "text-only"
#: Generators that draw nothing, and the jobs that make their datasets.
UNDRAWN = {IMPORTED: "jobs.import_official", PHOTOS: "jobs.featurise", SEVERAL: "jobs.curate"}


def model_source(model: str) -> str:
    """What diffusers loads for a NAME: the embedded pack's folder, a folder, or a repo id."""
    if model == "embedded":
        return str(embedded.t2i_path())
    return model


def split_repo_file(name: str) -> tuple[str, str | None]:
    """("ORG/REPO", "folder/file.safetensors") of the two joined by a slash; None where no file is named."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def split_revision(name: str) -> tuple[str, str | None]:
    """("ORG/REPO", "COMMIT") of "ORG/REPO@COMMIT", ("ORG/REPO/FILE", "COMMIT") of "ORG/REPO@COMMIT/FILE"; None of a
    name that says no commit of 40 digits, and of a path that is there.
    """
    said = None if Path(name).exists() else re.fullmatch(r"([^/@]+/[^/@]+)@([0-9a-f]{40})(/.+)?", name)
    return (said[1] + (said[3] or ""), said[2]) if said else (name, None)


def at_revision(name: str, revision: str) -> str:
    """What split_revision takes apart."""
    repo, file = split_repo_file(name)
    return f"{repo}@{revision}" if file is None else f"{repo}@{revision}/{file}"
