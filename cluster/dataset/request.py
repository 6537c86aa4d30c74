"""Options about datasets that several jobs share, and the request of jobs.verify."""

from dataclasses import dataclass

from cluster.options import Request, check_at_least, option, refuse_without
from cluster.shard_work import AUTO, MANY_SAMPLES, RUN_ON
from pcm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ShardOptions(Request):
    """Shards."""

    shard_size: int = option(256, help="samples a shard: the unit of work and of commit")


@dataclass(frozen=True, kw_only=True)
class RunOnOption(Request):
    """Where."""

    run_on: str = option(
        AUTO,
        choices=RUN_ON,
        help=f"who reads the shards: this process or tasks on Ray; auto: Ray from {MANY_SAMPLES:,} samples on",
    )


_MOVED = "with --repair or --redraw: where the dataset's {} is now, should it have moved"


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(RunOnOption):
    """A dataset to prove, or with `repair` to make whole; paths or URIs."""

    dataset: str = option(positional=True, help="path or URI")
    repair: bool = option(False, help="make missing and corrupt shards again, and no others")
    corpus: str | None = option(
        None,
        help="with --repair: where the captions are now, should the plan be damaged",
        unset="where they were",
    )
    t2i: str | None = option(None, metavar="NAME", help=_MOVED.format("generator"), unset="where it was")
    t2i_config: str | None = option(
        None, metavar="NAME", help=_MOVED.format("--t2i-config of jobs.generate"), unset="where it was"
    )
    vae: str | None = option(None, metavar="NAME", help=_MOVED.format("--vae"), unset="where it was")
    lora: tuple[str, ...] = option(
        (), metavar="REPO_OR_FILE",
        help="with --repair or --redraw: where each LoRA is now, all of them in their order",
        unset="where they were",
    )  # fmt: skip
    clip: str | None = option(
        None, metavar="NAME", help="with --repair: where the dataset's CLIP is now, should it have moved",
        unset="where it was",
    )  # fmt: skip
    other_bytes: bool = option(
        False,
        help="with --repair: make shards again also where this release of pyarrow writes the same rows in other bytes; "
        "views, runs and exports of the dataset then have to be made anew",
    )
    upgrade: bool = option(False, help="rewrite a dataset of an older schema version in place")
    redraw: int | None = option(
        None, metavar="N",
        help="draw N stored pictures again, of a view those of its sources, chosen at random by --seed, and compare",
        unset="none",
    )  # fmt: skip
    seed: int = option(0, help="seed of --redraw")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_without(self, "repair", "corpus", "clip", "other_bytes")
        if self.redraw is None:
            refuse_without(self, "repair", "t2i", "t2i_config", "vae", "lora")
        refuse_without(self, "redraw", "seed")
        check_at_least(self, 1, "redraw")
        if self.redraw is not None and (self.repair or self.upgrade):
            raise InputError("--redraw: give it without --repair and --upgrade; do that first")
        if self.upgrade and self.repair:
            raise InputError("--upgrade, --repair: give one of the two; repair first what is damaged")
