"""What a user asks of weights that are to lie beside the data."""

from dataclasses import dataclass

from cluster.options import Request, option
from pcm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StageModelsRequest(Request):
    """Weights to put on a store, for `--t2i` or `--clip`. Raises InputError for values that cannot be."""

    t2i: str | None = option(None, metavar="NAME", help="diffusers repo id or folder", unset="none")
    clip: str | None = option(
        None,
        metavar="NAME",
        help="open_clip folder, hf-hub:ORG/REPO, or ARCHITECTURE/PRETRAINED",
        unset="none",
    )
    revision: str | None = option(
        None, metavar="COMMIT", help="commit, branch or tag of a repo", unset="the newest commit"
    )
    t2i_variant: str | None = option(
        None, metavar="NAME", help="stage the weights named *.NAME.* alone, such as fp16; give it to --t2i-variant too"
    )
    out: str = option(
        metavar="P",
        writes="folder",
        help="what --t2i or --clip is then given: path or URI; with both: P/t2i/NAME and P/clip/NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.t2i or self.clip):
            raise InputError("--t2i, --clip: give one of the two, or both")
        for name in (self.t2i, self.clip):
            if name in ("embedded", "null"):
                raise InputError(f"{name}: is part of every installation, and needs no staging; leave it out")
        if self.revision and self.t2i and self.clip:
            raise InputError(f"--revision {self.revision}: of which of the two? Stage --t2i and --clip one by one")
        if self.t2i_variant and not self.t2i:
            raise InputError(f"--t2i-variant {self.t2i_variant}: needs --t2i")
