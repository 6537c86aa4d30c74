"""Captions in, a dataset of synthetic images with CLIP scores and features out. Rerun the same command to resume."""

import argparse

from cluster.corpus import FORMATS, read_corpus, source_digest
from cluster.dataset import CorpusSource
from cluster.generate import generate
from cluster.models import check_scheduler, pin_clip, pin_t2i, resolve_device, resolve_dtype
from cluster.pilot import PilotSize, run_pilot
from cluster.pilot import summary as pilot_summary
from cluster.plan import make_plan
from cluster.pools import Pools
from cluster.progress import Watch
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
    watch = result.add_argument_group(
        "watching and cost",
        "Cost = price x GPUs that the run reserves (one a generator, from the moment it is there) x hours, start-up "
        "included; drawing on CPUs, price x machines of the cluster x hours. Storage and traffic are not in it.",
    )
    watch.add_argument("--price-per-hour", type=float, metavar="X", help="of one GPU, or of one machine on CPUs")
    watch.add_argument("--spot", action="store_true", help="the price is of spot capacity: a label in the summary")
    watch.add_argument(
        "--pilot", metavar="1%|N",
        help="make only so many samples, in evenly spaced shards that the full run skips, at least one a generator; "
        "predict images/s, hours, bytes and cost of the whole",
    )  # fmt: skip
    watch.add_argument(
        "--stop-below-clip-score", type=float, metavar="X",
        help="stop once at least 64 pictures have a mean clip score (raw cosine) two standard errors below X",
    )  # fmt: skip
    return result


def run(args: argparse.Namespace) -> dict:
    store = open_store(args.out)
    if args.only:
        return regenerate(store, args.only, image_out=args.image_out)
    if not args.corpus:
        raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")
    watch = Watch(price_per_hour=args.price_per_hour, spot=args.spot, stop_below_clip_score=args.stop_below_clip_score)
    pilot = PilotSize.parse(args.pilot) if args.pilot is not None else None
    start_ray()
    spec = dataset_spec(args, gpus=cluster_gpus())
    if spec.clip.model == "null" and watch.stop_below_clip_score is not None:
        raise InputError("--stop-below-clip-score: --clip null gives no scores; name a CLIP")
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
    if pilot:
        return {**pilot_summary(*run_pilot(store, plan, pools, pilot, watch=watch)), "dataset": args.out}
    return {**generate(store, plan, pools, watch=watch).summary(), "dataset": args.out}


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
