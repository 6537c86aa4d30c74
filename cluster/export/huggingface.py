"""Export to a folder that `datasets.load_dataset` and the Hugging Face hub open, pictures shown as pictures.

`data/train-00000-of-000NN.parquet`, and a README.md with the dataset's card. Both columns of features are lists of
float16, as in version 2 of our schema: `datasets` gives them as lists, or as arrays by `with_format("numpy")`, where
the bytes of version 3 would have to be taken apart by hand. All else is as in the shards, the metadata by which
pictures are shown among it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.curation.refine_request import SYNC
from cluster.dataset.documents import DATASET, Manifest, store_manifest
from cluster.dataset.parquet import parquet_bytes
from cluster.export.source import Source
from cluster.store.store import Store
from pcm.generation.names import PHOTOS, SEVERAL, UNDRAWN
from pcm.reasons import MARKS, PROMPT_TRUNCATED
from pcm.records import in_version

#: In which patch features are lists.
_SCHEMA_VERSION = 2
#: The hub's size categories lie between these counts.
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


class HuggingFace:
    """cluster.export.source.Format."""

    def __init__(self, source: Source, out: Store) -> None:
        self._source = source
        self._out = out

    def prepare(self) -> dict[str, bytes]:
        return {}

    def marker(self, shard: int) -> str:
        shards = f"{self._source.num_shards:05d}"
        return f"data/train-{shard:0{len(shards)}d}-of-{shards}.parquet"  # by name they are in the order of the shards

    def write(self, shard: int) -> tuple[str, int]:
        """sha256 and bytes of its file."""
        table = in_version(self._source.read(shard), self._source.manifest.features, _SCHEMA_VERSION)
        data = parquet_bytes(table)
        self._out.write_bytes(self.marker(shard), data)
        return hashlib.sha256(data).hexdigest(), len(data)

    def written(self, shard: int) -> tuple[str, int]:
        data = self._out.read_bytes(self.marker(shard))
        return hashlib.sha256(data).hexdigest(), len(data)

    def finish(self, shards: Sequence[tuple[str, int]]) -> None:
        store_manifest(self._out, self._manifest(shards))
        self._out.write_bytes("README.md", card(self._source).encode())

    def tidy(self) -> None:
        pass

    def _manifest(self, shards: Sequence[tuple[str, int]]) -> Manifest:
        """The dataset's, of the files that the export has."""
        files = [
            {**entry, "key": self.marker(shard), "sha256": sha256, "bytes": size}
            for shard, (entry, (sha256, size)) in enumerate(zip(self._source.manifest.shards, shards, strict=True))
        ]
        return replace(
            self._source.manifest,
            shards=tuple(files),
            shard_bytes=sum(entry["bytes"] for entry in files),
            schema_version=_SCHEMA_VERSION,
            kind=DATASET,
            pictures=(),
        )


def card(source: Source) -> str:
    """The dataset card: YAML that the hub reads, then prose."""
    manifest, spec = source.manifest, source.manifest.spec
    features = manifest.features
    score = "not scored" if manifest.clip_score_mean is None else f"{manifest.clip_score_mean:.4f} on average"
    drawn = _is_drawn(manifest)
    others = "Real photos with captions" if spec.generator.model == PHOTOS else "Image-caption pairs"
    title = "Synthetic image-caption pairs" if drawn else others
    reason = f", or `{PROMPT_TRUNCATED}` ({MARKS[PROMPT_TRUNCATED].text})" if drawn else ""
    rows = [
        ("sample_id", "place in the plan: nine digits of caption, two of picture"),
        ("caption", _caption_is(manifest, drawn)),
        ("image", "the picture"),
        ("width, height", "pixels"),
        ("seed", "of the random numbers that the picture was drawn with" + ("" if drawn else ", if it was drawn")),
        ("attempts, batch_size", "seeds tried; pictures drawn at once"),
        ("clip_score", f"cosine of picture and caption by CLIP `{spec.clip.model}`: {score}"),
        ("global_feature", f"({features.embed_dim},) float16, CLIP's L2-normalised embedding of the picture"),
        (
            "patch_features",
            f"({features.num_patches} * {features.patch_dim},) float16, CLIP's last tokens before ln_post, row-major",
        ),
        ("status", "`stored`"),
        ("reason", f"an empty text{reason}"),
    ]
    yaml = [
        "---",
        "task_categories:",
        "- image-to-text",
        "- text-to-image",
        *(("tags:", "- synthetic") if drawn else ()),
        "size_categories:",
        f"- {size_category(manifest.stored)}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: data/train-*.parquet",
        "---",
    ]
    lines = [
        f"# {title}",
        "",
        _made_of(source),
        "",
        "| column | what |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, what in rows),
        "",
        "Everything that decides the pictures:" if drawn else "How the dataset was made:",
        "",
        "```json",
        json.dumps(spec.to_dict(), indent=1, sort_keys=True, ensure_ascii=False),
        "```",
    ]
    return "\n".join((*yaml, *lines)) + "\n"


def size_category(rows: int) -> str:
    """The hub's name for so many rows: 1K<n<10K."""
    place = sum(rows >= 1_000 * 10**power for power in range(len(_SIZES)))
    if place == 0:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[place - 1]}<n<{_SIZES[place]}" if place < len(_SIZES) else f"n>{_SIZES[-1]}"


def _is_drawn(manifest: Manifest) -> bool:
    """Whether all pictures are known to have been drawn from their captions: a card must not call photos synthetic."""
    model = manifest.spec.generator.model
    if model == SEVERAL and manifest.lineage is not None:
        return all(source.generator not in UNDRAWN for source in manifest.lineage.sources)
    return model not in UNDRAWN


def _caption_is(manifest: Manifest, drawn: bool) -> str:
    if not drawn:
        return "a text about the picture"
    if manifest.lineage is not None and _is_by_sync(manifest.lineage.to_dict()):
        return "a text that fits the picture, which may have been drawn from another one"
    return "the text that the picture was drawn from"


def _is_by_sync(lineage: Mapping[str, Any]) -> bool:
    """Whether SynC gave the captions other pictures, here or in a dataset that this one was derived from."""
    if lineage["method"] == "refine" and lineage["settings"].get("method") == SYNC:
        return True
    return any(_is_by_sync(source["lineage"]) for source in lineage["sources"] if source.get("lineage"))


def _made_of(source: Source) -> str:
    manifest = source.manifest
    if manifest.lineage is not None:
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in manifest.lineage.dropped.items())
        return (
            f"{manifest.stored:,} of {manifest.lineage.rows_in:,} pairs, by jobs.{manifest.lineage.method}; "
            f"left out: {rules or 'none'}."
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.quarantined_by_reason.items()))
    extent = f" So far: {source.opened.extent}." if source.opened.is_unfinished else ""
    assert source.plan is not None, "a dataset that is not derived has one"
    return (
        f"{manifest.stored:,} pictures of {source.plan.records:,} captions; "
        f"{manifest.quarantined:,} samples could not be made ({reasons or 'none'}).{extent}"
    )
