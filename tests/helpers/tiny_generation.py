"""Real generation runs of a size that a test can afford."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cluster.dataset.committed import committed
from cluster.dataset.documents import CorpusSource, Manifest, Plan
from cluster.dataset.plan import make_plan
from cluster.generation.picture_spec import pin_t2i
from cluster.generation.pinning import clip_spec
from cluster.generation.pipeline import GenerationResult, run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.retrying import Retry
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.write import WriteShard
from cluster.sources.corpus import read_corpus, source_digest
from cluster.store.store import Store, open_store
from pcm.records import FeatureShape
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec

ANIMALS = ("cat", "dog", "horse", "sheep", "cow", "bird")
PLACES = ("beach", "street", "table", "snow")
CAPTIONS = tuple(f"A {animal} near the {place}." for place in PLACES for animal in ANIMALS)  # 24


@dataclass(frozen=True)
class Dataset:
    """A dataset made for a test: where it is, what was planned, and what the run that made it said."""

    store: Store
    plan: Plan
    result: GenerationResult
    corpus: Path


def null_spec(**generator: object) -> DatasetSpec:
    """The null generator and null CLIP: the pipeline without a model, seconds a run."""
    return DatasetSpec(
        generator=GeneratorSpec(model="null", revision="", **generator), clip=ClipSpec(model="null", revision="")
    )


def tiny_spec(t2i: Path, clip: Path | None = None, *, images_per_caption: int = 1, **generator: object) -> DatasetSpec:
    """The tiny models of tests/helpers/tiny_models.py, two steps, batches of four."""
    defaults = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4}
    clip_name = str(clip) if clip else "null"
    return DatasetSpec(
        generator=GeneratorSpec(model=str(t2i), revision=pin_t2i(str(t2i), None), **(defaults | generator)),
        clip=clip_spec(clip_name, device="cpu", dtype="float32", batch_size=4),
        images_per_caption=images_per_caption,
    )


def write_corpus(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    path = folder / "captions.txt"
    path.write_text("".join(f"{caption}\n" for caption in captions))
    return path


def plan_dataset(out: str | Path, corpus: Path, spec: DatasetSpec, *, shard_size: int = 5) -> tuple[Store, Plan]:
    store = open_store(str(out))
    source = CorpusSource(source_digest(str(corpus)), "auto", None, None)
    plan = make_plan(
        store, read_corpus(str(corpus)), spec, corpus=str(corpus), shard_size=shard_size,
        is_truncated=lambda prompt: len(prompt) > 500, source=source,
    )  # fmt: skip
    return store, plan


def make_dataset(
    out: str | Path, corpus: Path, spec: DatasetSpec, *, shard_size: int = 5, generators: int = 2
) -> Dataset:
    """Plan and generate; Ray must be running. Run it again on the same place to resume."""
    store, plan = plan_dataset(out, corpus, spec, shard_size=shard_size)
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=generators)
    return Dataset(store, plan, run_pipeline(store, plan, pools), corpus)


def make_dataset_in_process(
    out: str | Path, corpus: Path, spec: DatasetSpec, *, shard_size: int = 5, finish: bool = True
) -> tuple[Store, Plan, Manifest | None]:
    """The same stages one after another in this process, without Ray; `finish=False` leaves the manifest out.

    Run it again on the same place to resume.
    """
    store, plan = plan_dataset(out, corpus, spec, shard_size=shard_size)
    made = committed(store, plan)
    features = draw_in_process(store, plan, [shard for shard in range(plan.num_shards) if shard not in made])
    return store, plan, write_manifest(store, plan, features) if finish else None


def draw_in_process(
    store: Store,
    plan: Plan,
    shards: Sequence[int],
    *,
    draw: type[DrawShard] = DrawShard,
    retry: Retry | frozenset[str] | None = None,
) -> FeatureShape:
    """Put these shards on the store, whatever is there; with `retry`, or the reasons of one, as it does."""
    here = plan.spec_to_load
    if isinstance(retry, frozenset):
        retry = Retry(retry, "a retry")
    drawing, featurise = draw(store, here, None, retry), FeaturiseShard(here.clip)
    write = WriteShard(store, plan.schema_version, again=shards)
    for shard in shards:
        write(featurise(drawing(pa.table({"shard": [shard], "part": [plan.part_key(shard)]}))))
    return featurise.features
