"""Captions in, a dataset of synthetic images with CLIP scores and features out. Rerun the same command to resume."""

import argparse

from cluster.corpus import FORMATS, read_corpus, source_digest
from cluster.dataset import CorpusSource
from cluster.generate import generate
from cluster.models import check_scheduler, pin_clip, pin_t2i, resolve_device, resolve_dtype
from cluster.plan import make_plan
from cluster.pools import Pools
from cluster.regenerate import regenerate
from cluster.session import cluster_cpus, cluster_gpus, start_ray
from cluster.storage import open_store
from jobs.cli import make_parser, run_job
from pcm.clip import truncation_check
from pcm.errors import InputError
from pcm.images import IMAGE_FORMATS
from pcm.spec import DEVICES, DTYPES, ClipSpec, DatasetSpec, GeneratorSpec


def parser() -> argparse.ArgumentParser:
    result = make_parser("generate", __doc__)
    result.add_argument("--corpus", help="captions: path or URI, or 'embedded' (the pack's corpus)")
    result.add_argument("--out", required=True, help="dataset: path or URI")
    result.add_argument("--only", metavar="SAMPLE_ID", help="regenerate one sample of --out alone and compare")
    result.add_argument("--image-out", metavar="FILE", help="with --only: write the regenerated picture here")
    corpus = result.add_argument_group("corpus")
    corpus.add_argument("--corpus-format", default="auto", choices=("auto", *FORMATS))
    corpus.add_argument("--split", default="train", help="split of a Karpathy file (train takes restval too), or all")
    corpus.add_argument("--limit", type=int, help="only the first N records")
    pictures = result.add_argument_group("pictures (all recorded in the manifest)")
    pictures.add_argument("--t2i", default="embedded", help="diffusers repo id, folder, 'embedded' or 'null'")
    pictures.add_argument("--t2i-revision", help="commit of the repo; a branch is resolved to its commit")
    pictures.add_argument("--steps", type=int, help="denoising steps; default 50, embedded 8")
    pictures.add_argument("--guidance-scale", type=float, help="classifier-free guidance; default 7.5, embedded 3.0")
    pictures.add_argument("--width", type=int, help="pixels; default: the model's own")
    pictures.add_argument("--height", type=int, help="pixels; default: the model's own")
    pictures.add_argument("--scheduler", help="diffusers scheduler class; default: the model's own")
    pictures.add_argument("--negative-prompt")
    pictures.add_argument("--prompt-template", default="{caption}")
    pictures.add_argument("--images-per-caption", type=int, default=1)
    pictures.add_argument("--seed", type=int, default=0)
    pictures.add_argument("--max-attempts", type=int, default=3, help="seeds tried before a bad picture is quarantined")
    pictures.add_argument("--image-format", default="jpeg", choices=IMAGE_FORMATS)
    pictures.add_argument("--image-quality", type=int, default=95)
    clip = result.add_argument_group("scores and features")
    clip.add_argument("--clip", help="open_clip NAME; default: embedded, or null with --t2i null")
    clip.add_argument("--clip-revision", help="commit, for hf-hub: names")
    clip.add_argument("--clip-batch-size", type=int, default=32)
    machine = result.add_argument_group("machine")
    machine.add_argument("--device", default="auto", choices=DEVICES)
    machine.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    machine.add_argument("--batch-size", type=int, default=8, help="pictures drawn at once; part of the spec")
    machine.add_argument("--generators", type=int, help="generator actors; default: one a GPU, or one a core")
    machine.add_argument("--shard-size", type=int, default=256, help="samples a shard: the unit of work and of commit")
    return result


def run(args: argparse.Namespace) -> dict:
    store = open_store(args.out)
    if args.only:
        return regenerate(store, args.only, image_out=args.image_out)
    if not args.corpus:
        raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")
    start_ray()
    spec = dataset_spec(args, gpus=cluster_gpus())
    uri = corpus_uri(args.corpus)
    records = read_corpus(uri, format=args.corpus_format, split=args.split, limit=args.limit)
    plan = make_plan(
        store,
        records,
        spec,
        corpus=args.corpus,
        shard_size=args.shard_size,
        is_truncated=truncation_check(spec.clip.model),
        source=CorpusSource(source_digest(uri), args.corpus_format, args.split, args.limit),
    )
    pools = Pools.for_cluster(
        device=spec.generator.device, cpus=cluster_cpus(), gpus=cluster_gpus(), generators=args.generators
    )
    result = generate(store, plan, pools)
    assert result.manifest is not None
    return {
        "expected": result.manifest.expected,
        "stored": result.manifest.stored,
        "quarantined": result.manifest.quarantined,
        "quarantined_by_reason": result.manifest.quarantined_by_reason,
        "skipped": result.skipped,
        "images_per_second": round(result.status.images_per_second or 0.0, 3),
        "seconds": round(result.status.seconds, 2),
        "clip_score_mean": result.manifest.clip_score_mean,
        "stage_seconds": {stage: round(spent, 3) for stage, spent in result.stage_seconds.items()},
        "dataset": args.out,
    }


def corpus_uri(name: str) -> str:
    if name == "embedded":
        from pcm import embedded

        return str(embedded.corpus_path())
    return name


def dataset_spec(args: argparse.Namespace, *, gpus: float) -> DatasetSpec:
    """The spec that the arguments mean, with every default resolved and every revision pinned."""
    check_scheduler(args.scheduler)
    device = resolve_device(args.device, cluster_gpus=gpus)
    dtype = resolve_dtype(args.dtype, device=device)
    embedded = args.t2i == "embedded"
    steps = args.steps if args.steps is not None else (8 if embedded else 50)
    guidance = args.guidance_scale if args.guidance_scale is not None else (3.0 if embedded else 7.5)
    clip = args.clip or ("null" if args.t2i == "null" else "embedded")
    return DatasetSpec(
        generator=GeneratorSpec(
            model=args.t2i,
            revision=pin_t2i(args.t2i, args.t2i_revision),
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=args.width,
            height=args.height,
            scheduler=args.scheduler,
            negative_prompt=args.negative_prompt,
            prompt_template=args.prompt_template,
            dtype=dtype,
            device=device,
            batch_size=args.batch_size,
            max_attempts=args.max_attempts,
            image_format=args.image_format,
            image_quality=args.image_quality,
        ),
        clip=ClipSpec(
            model=clip,
            revision=pin_clip(clip, args.clip_revision),
            dtype=dtype,
            device=device,
            batch_size=args.clip_batch_size,
        ),
        seed=args.seed,
        images_per_caption=args.images_per_caption,
    )


if __name__ == "__main__":
    run_job(parser(), run)
