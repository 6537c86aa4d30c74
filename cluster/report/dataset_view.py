"""The sections about a dataset: what it is, its pictures, scores, speed and cost, and what could not be made."""

import json
from collections.abc import Sequence

import numpy as np

from cluster.display import duration, size
from cluster.report.charts import Bar, Line, Mark, bars, histogram, line_chart, ticks
from cluster.report.dataset import DatasetFacts
from cluster.report.gallery import Concept, Gallery, Picture
from cluster.report.html import Html, Node, tag
from cluster.report.numbers import count, moment, percent, score, short
from cluster.report.parts import absent, caption_text, code, details, facts, picture_card, section, table
from cluster.report.throughput import Throughput
from pcm.caption_text import REASONS
from pcm.spec import DatasetSpec
from pcm.text_to_image import IMPORTED, PHOTOS

_MODEL_REASONS = {
    "black_image": "black with every seed that was tried",
    "constant_image": "one colour with every seed that was tried",
    "nan_image": "not a number with every seed that was tried",
    "nsfw_flagged": "blanked by the model's safety checker with every seed that was tried",
    "generator_error": "the model raised on this caption alone",
    "generator_crashed": "three processes died with it in hand",
    "generator_hung": "three processes overran the time limit with it in hand",
    "out_of_memory": "it did not fit into memory, not even alone",
    "clip_error": "CLIP raised on the picture",
}
_QUANTILES = (5, 25, 50, 75, 95)


def overview(data: DatasetFacts, speed: Throughput | None, *, hourly: float | None) -> Html:
    """What the dataset is: counts, spec, fingerprints."""
    manifest, spec = data.manifest, data.manifest.spec
    pairs: list[tuple[str, Node]] = [
        ("Where", code(data.root)),
        ("Corpus", code(manifest.corpus)),
        ("Samples", f"{count(manifest.expected)} expected = {count(manifest.stored)} stored + "
                    f"{count(manifest.quarantined)} quarantined"),
        ("Size", f"{size(sum(shard['bytes'] for shard in manifest.shards))} in {count(len(manifest.shards))} shards"),
        ("Text to image", _generator(spec)),
        ("CLIP", f"{spec.clip.model}, {spec.clip.dtype}; features {manifest.features.num_patches} patches x "
                 f"{manifest.features.patch_dim}, joint space {manifest.features.embed_dim}"),
        ("Seed", f"{spec.seed}; {spec.images_per_caption} picture(s) a caption"),
    ]  # fmt: skip
    if speed is not None:
        pairs.insert(2, ("Made", f"{moment(speed.began)} to {moment(speed.ended)}"))
        pairs.append(("Cost", _cost_text(speed, data, hourly)))
    pairs += [
        ("Corpus fingerprint", code(manifest.corpus_fingerprint or "none")),
        ("Spec digest", code(spec.digest())),
        ("Verified", _verification(data)),
    ]
    return section(
        "dataset",
        "Dataset",
        "What was drawn, and with what",
        "Every picture is a function of its caption, this specification and its seed, and can be drawn again alone.",
        facts(pairs),
        details(
            "The whole specification",
            tag("pre", json.dumps(spec.to_dict(), indent=1, sort_keys=True, ensure_ascii=False)),
        ),
    )


def gallery(data: DatasetFacts, found: Gallery) -> Html:
    drawn_here = data.manifest.spec.generator.model not in (IMPORTED, PHOTOS)
    redraw = f"python -m jobs.generate --out {data.root} --only {{sample_id}}" if drawn_here else ""

    def cards(pictures: Sequence[Picture]) -> Html:
        return tag(
            "div", (picture_card(each, scored=data.scored, redraw=redraw) for each in pictures), class_="gallery"
        )

    ranked: list[Node] = (
        [
            tag("h3", "Best by CLIP score"), cards(found.best),
            tag("h3", "Worst by CLIP score"), cards(found.worst),
        ]
        if data.scored
        else [absent("Best and worst are not shown: the pictures were made with --clip null, which gives no scores.")]
    )  # fmt: skip
    if data.scored and not found.worst:
        ranked[3] = absent(f"The dataset has no more than the {len(found.best)} pictures above.")
    return section(
        "pictures",
        "Dataset",
        "The pictures",
        [_sampled(data), " The number is the CLIP score, the raw cosine of picture and caption."],
        *ranked,
        tag("h3", "At random"),
        cards(found.random),
        tag("h3", "By concept"),
        tag("p", "The most frequent nouns of the captions; of each, pictures evenly spread from its best score to its "
                 "worst.", class_="note"),
        [_concept(each, cards(each.pictures), scored=data.scored) for each in found.concepts]
        or absent("No noun of the lexicon occurs in these captions."),
    )  # fmt: skip


def scores(data: DatasetFacts, found: Gallery) -> Html:
    if not data.scored:
        return section("scores", "Dataset", "CLIP scores", None, absent("None: the dataset was made with --clip null."))
    values = np.array([row.clip_score for row in data.rows])
    edges = ticks(float(values.min()), float(values.max()), count=28)
    counts = np.histogram(values, edges)[0].tolist()
    mean = float(values.mean())
    quantiles = [float(np.percentile(values, each)) for each in _QUANTILES]
    chart = histogram(
        edges, counts, title="CLIP scores", x_label="raw cosine of picture and caption", y_label="pictures",
        description=f"{count(len(values))} pictures; mean {mean:.3f}, standard deviation {values.std():.3f}.",
        marks=[Mark(mean, f"mean {mean:.3f}")],
    )  # fmt: skip
    concepts: Node = absent("No concept occurs in three captions or more.")
    if found.concept_scores:
        low = ticks(min(each[1] for each in found.concept_scores), max(each[1] for each in found.concept_scores))[0]
        concepts = bars(
            [Bar(name, mean, f"{mean:.3f} ({captions})") for name, mean, captions in found.concept_scores],
            title="Mean score by concept", start=low, dots=True,
            description=f"The {len(found.concept_scores)} most frequent, how many captions hold them in brackets; the "
                        f"axis begins at {low:g}.",
        )  # fmt: skip
    return section(
        "scores",
        "Dataset",
        "How well pictures show their captions",
        f"Half of the pictures score above {quantiles[2]:.3f}; the worst twentieth lies below {quantiles[0]:.3f}. "
        + (f"Best drawn is {found.concept_scores[0][0]}, worst {found.concept_scores[-1][0]}. "
           if len(found.concept_scores) > 1 else "")
        + _sampled(data),
        tag("div", chart, concepts, class_="charts"),
        table(
            ["", *(f"{each} %" for each in _QUANTILES)],
            [["score below which so many pictures lie", *map(score, quantiles)]],
            label="Quantiles of the CLIP score", numbers=range(1, 6),
        ),
    )  # fmt: skip


def speed(data: DatasetFacts, found: Throughput | None, *, hourly: float | None) -> Html:
    title = "How fast, and what it cost"
    if found is None:
        return section(
            "speed", "Dataset", title, None, absent("The dataset has no shard statistics (stats/part-*.json).")
        )
    rate = line_chart(
        [Line(name="images a second", points=_over_time(found, found.rate), area=True)],
        title="Throughput", x_label=_time_unit(found), y_label="images a second", from_zero=True,
        description=f"{found.images_per_second:.2f} images a second over {duration(found.working_seconds)} of work.",
    )  # fmt: skip
    on_gpu = data.manifest.spec.generator.device == "cuda"
    hours = found.generator_hours if on_gpu else found.machine_hours
    unit = "GPU-hours of drawing" if on_gpu else "machine-hours"
    so_far = hours if hourly is None else hours * hourly
    spent = line_chart(
        [Line(name="so far", points=_over_time(found, so_far), area=True, series=2)],
        title="Cost so far" if hourly is not None else f"{unit} so far".capitalize().replace("Gpu", "GPU"),
        x_label=_time_unit(found), y_label="" if hourly is not None else unit, from_zero=True,
        description=_cost_text(found, data, hourly) + ".",
    )  # fmt: skip
    busy = sum(found.stage_seconds.values()) or 1.0
    stages = bars(
        [Bar(stage, seconds, f"{duration(seconds)}, {percent(seconds / busy)}", series=1 + place)
         for place, (stage, seconds) in enumerate(found.stage_seconds.items())],
        title="Where the time went", description="Busy time of each stage, all its actors together.", label_width=80,
    )  # fmt: skip
    runs = "one run" if found.runs == 1 else f"{found.runs} runs; the pauses between them are left out"
    return section(
        "speed",
        "Dataset",
        title,
        f"{found.images_per_second:.2f} images a second over {duration(found.working_seconds)} ({runs}), from the "
        "times that each shard recorded: start-up before the first shard is not in them. Drawn on "
        f"{', '.join(f'{name} ({shards} shards)' for name, shards in sorted(found.devices.items()))}.",
        tag("div", rate, spent, stages, class_="charts"),
        hourly is None and absent("No price given (--price-per-hour), so hours stand for cost."),
        table(
            ["working time", "pictures", "images a second", unit, *([] if hourly is None else ["cost"])],
            [
                [duration(found.seconds[at]), count(round(found.stored[at])), f"{found.rate[at]:.2f}", short(hours[at]),
                 *([] if hourly is None else [short(so_far[at])])]
                for at in np.linspace(0, len(found.seconds) - 1, 5).round().astype(int).tolist()[1:]
            ],
            label="Throughput and cost over time", numbers=range(5),
        ),
    )  # fmt: skip


def quarantine(data: DatasetFacts) -> Html:
    manifest = data.manifest
    if not manifest.quarantined:
        return section(
            "quarantine", "Dataset", "What could not be made",
            f"Nothing: all {count(manifest.expected)} samples are stored.",
        )  # fmt: skip
    reasons = sorted(manifest.quarantined_by_reason.items(), key=lambda item: (-item[1], item[0]))
    chart = bars(
        [Bar(reason, number, count(number), series=2) for reason, number in reasons],
        title="Quarantined samples by reason", label_width=160,
        description=f"{count(manifest.quarantined)} of {count(manifest.expected)} samples.",
    )  # fmt: skip
    errors = sorted({str(error) for stats in data.stats for error in stats.get("errors", [])})[:5]
    return section(
        "quarantine",
        "Dataset",
        "What could not be made",
        f"{count(manifest.quarantined)} of {count(manifest.expected)} samples "
        f"({percent(manifest.quarantined / manifest.expected)}) were kept aside with a reason; none was dropped.",
        tag("div", chart, class_="charts"),
        table(
            ["reason", "what it means", "samples", "examples"],
            [
                [code(reason), REASONS.get(reason) or _MODEL_REASONS.get(reason, ""), count(number),
                 tag("ul", (tag("li", caption_text(_cut(each.caption)), tag("small", f" {each.sample_id}"))
                            for each in data.refused.get(reason, ())))]
                for reason, number in reasons
            ],
            label="Quarantined samples by reason, with examples", numbers=[2],
        ),
        errors and details("What the model said", tag("ul", (tag("li", code(error)) for error in errors))),
    )  # fmt: skip


def cost(found: Throughput, data: DatasetFacts, hourly: float | None) -> float | None:
    """GPU-hours of drawing, or on CPUs hours of one machine, times the price."""
    if hourly is None:
        return None
    hours = found.generator_hours if data.manifest.spec.generator.device == "cuda" else found.machine_hours
    return float(hours[-1]) * hourly


def _cost_text(found: Throughput, data: DatasetFacts, hourly: float | None) -> str:
    if data.manifest.spec.generator.device == "cuda":
        basis = (
            f"{short(found.generator_hours[-1])} GPU-hours of drawing (start-up, idling and CLIP's share are not in)"
        )
    else:
        basis = f"{short(found.machine_hours[-1])} hours of one machine (start-up is not in)"
    spent = cost(found, data, hourly)
    if spent is None:
        return basis
    thousand = 1000 * spent / max(1, data.manifest.stored)
    return f"{short(spent)} in all, {short(thousand)} a thousand pictures: {basis} at {hourly:g} an hour"


def _generator(spec: DatasetSpec) -> str:
    generator = spec.generator
    parts = [
        generator.model,
        f"{generator.num_inference_steps} steps",
        f"guidance {generator.guidance_scale:g}",
        generator.scheduler or "the model's own scheduler",
        f"{generator.dtype} on {generator.device}",
    ]
    return ", ".join(parts)


def _verification(data: DatasetFacts) -> Node:
    if data.verified is None:
        return [code(f"python -m jobs.verify {data.root}"), " proves it and prints its fingerprint; not run here"]
    found = data.verified
    if found["ok"]:
        return ["nothing missing, doubled or corrupt; fingerprint ", code(found["fingerprint"])]
    said = "; ".join(found["problems"][:3]) or "incomplete"
    wrong = f"{found['missing']} missing, {found['duplicated']} doubled, {found['corrupt']} corrupt: {said}"
    return tag("strong", wrong, class_="bad")


def _sampled(data: DatasetFacts) -> str:
    if data.complete_sample:
        return f"Of all {count(len(data.rows))} pictures."
    return (
        f"Of {count(len(data.rows))} pictures in {data.sampled_shards} shards drawn by a seed, out of "
        f"{count(data.manifest.stored)} in {count(len(data.manifest.shards))}."
    )


def _concept(found: Concept, cards: Html, *, scored: bool) -> Html:
    said = f"{count(found.captions)} captions" + (f", mean score {found.mean_score:.3f}" if scored else "")
    return tag(
        "div", tag("h4", found.name, tag("small", f" {said}")), cards, class_="concept", data_concept=found.name
    )  # fmt: skip


def _over_time(found: Throughput, values: np.ndarray) -> list[tuple[float, float]]:
    divisor = {"seconds": 1, "minutes": 60, "hours": 3600}[_time_unit(found).split()[0]]
    return list(zip((found.seconds / divisor).tolist(), values.tolist(), strict=True))


def _time_unit(found: Throughput) -> str:
    unit = "seconds" if found.working_seconds < 180 else "minutes" if found.working_seconds < 3 * 3600 else "hours"
    return f"{unit} of work"


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
