"""The sections about a dataset's numbers: CLIP scores, throughput and cost."""

from collections.abc import Sequence

import numpy as np

from cluster.charts.markup import Html, tag
from cluster.charts.svg import Bar, Line, Mark, bars, histogram, line_chart, ticks
from cluster.numbers import count, duration, percent, score, short, spent
from cluster.report.dataset_facts import DatasetFacts
from cluster.report.gallery import Gallery
from cluster.report.parts import absent, section, table
from cluster.report.throughput import Throughput

_QUANTILES = (5, 25, 50, 75, 95)


def scores(data: DatasetFacts, found: Gallery) -> Html:
    title = "How well pictures show their captions"
    if not data.scored or not data.rows:
        why = "The dataset was made with --clip null, which gives no scores." if data.rows else "There are no pictures."
        return section("scores", "Dataset", title, None, absent(why))
    values = np.array([row.clip_score for row in data.rows])
    edges = ticks(float(values.min()), float(values.max()), count=28)
    mean = float(values.mean())
    quantiles = [float(np.percentile(values, each)) for each in _QUANTILES]
    chart = histogram(
        edges, np.histogram(values, edges)[0].tolist(), title="CLIP scores", y_label="pictures",
        x_label="raw cosine of picture and caption", marks=[Mark(mean, f"mean {mean:.3f}")],
        description=f"{count(len(values))} pictures; mean {mean:.3f}, standard deviation {values.std():.3f}.",
    ).figure()  # fmt: skip
    shares = table(
        ["share of pictures below", *(f"{each} %" for each in _QUANTILES)],
        [["CLIP score", *map(score, quantiles)]],
        label="Quantiles of the CLIP score",
        numbers=range(1, 6),
    )
    ranked = found.concept_scores
    ends = f" By concept, {ranked[0][0]} comes off best, {ranked[-1][0]} worst." if len(ranked) > 1 else ""
    lead = f"Half of the pictures score above {quantiles[2]:.3f}, a twentieth below {quantiles[0]:.3f}.{ends}"
    return section(
        "scores",
        "Dataset",
        title,
        [lead, " ", sampled_from(data)],
        tag("div", tag("div", chart, shares), _concept_scores(ranked), class_="charts"),
    )


def _concept_scores(ranked: Sequence[tuple[str, float, int]]) -> Html:
    if not ranked:
        return absent("No concept occurs in three captions or more.")
    means = [mean for _, mean, _ in ranked]
    low = ticks(min(means), max(means))[0]
    return bars(
        [Bar(name, mean, f"{mean:.3f} ({captions})") for name, mean, captions in ranked],
        title="Mean score by concept", start=low, dots=True,
        description=f"The {len(ranked)} most frequent, with the number of captions; the axis begins at {low:g}.",
    ).figure()  # fmt: skip


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
    ).figure()  # fmt: skip
    on_gpu = data.manifest.spec.generator.device == "cuda"
    hours = found.generator_hours if on_gpu else found.machine_hours
    unit = "GPU-hours of drawing" if on_gpu else "machine-hours"
    so_far = hours if hourly is None else hours * hourly
    costs = line_chart(
        [Line(name="so far", points=_over_time(found, so_far), area=True, series=2)],
        title="Cost so far" if hourly is not None else f"{unit} so far".capitalize().replace("Gpu", "GPU"),
        x_label=_time_unit(found), y_label="" if hourly is not None else unit, from_zero=True,
        description=cost_text(found, data, hourly) + ".",
    ).figure()  # fmt: skip
    busy = sum(found.stage_seconds.values()) or 1.0
    stages = bars(
        [Bar(stage, seconds, f"{spent(seconds)}, {percent(seconds / busy)}", series=1 + place)
         for place, (stage, seconds) in enumerate(found.stage_seconds.items())],
        title="Where the time went", description="Busy time of each stage, all its actors together.", label_width=80,
    ).figure()  # fmt: skip
    over_time = table(
        ["time", "pictures", "images/s", "hours", *([] if hourly is None else ["cost"])],
        [
            [duration(found.seconds[at]), count(round(found.stored[at])), f"{found.rate[at]:.2f}", short(hours[at]),
             *([] if hourly is None else [short(so_far[at])])]
            for at in np.linspace(0, len(found.seconds) - 1, 5).round().astype(int).tolist()[1:]
        ],
        label="Throughput and cost over time", numbers=range(5),
    )  # fmt: skip
    every = len(data.stats) == len(data.manifest.shards)
    shards = "the shards" if every else f"{count(len(data.stats))} of {count(len(data.manifest.shards))} shards"
    runs = "one run" if found.runs == 1 else f"{found.runs} runs; the pauses between them are left out"
    return section(
        "speed",
        "Dataset",
        title,
        f"{found.images_per_second:.2f} images a second over {duration(found.working_seconds)} ({runs}) on "
        f"{', '.join(found.devices)}. The times are those that {shards} recorded; start-up before the first is not in "
        "them.",
        tag("div", rate, costs, stages, over_time, class_="charts"),
        hourly is None and absent("No price given (--price-per-hour), so hours stand for cost."),
    )  # fmt: skip


def cost(found: Throughput, data: DatasetFacts, hourly: float | None) -> float | None:
    """GPU-hours of drawing, or on CPUs hours of one machine, times the price."""
    if hourly is None:
        return None
    hours = found.generator_hours if data.manifest.spec.generator.device == "cuda" else found.machine_hours
    return float(hours[-1]) * hourly


def cost_text(found: Throughput, data: DatasetFacts, hourly: float | None) -> str:
    if data.manifest.spec.generator.device == "cuda":
        basis = (
            f"{short(found.generator_hours[-1])} GPU-hours of drawing (start-up, idling and CLIP's share are not in)"
        )
    else:
        basis = f"{short(found.machine_hours[-1])} hours of one machine (start-up is not in)"
    total = cost(found, data, hourly)
    if total is None:
        return basis
    thousand = 1000 * total / max(1, data.manifest.stored)
    return f"{short(total)} in all, {short(thousand)} a thousand pictures: {basis} at {hourly:g} an hour"


def sampled_from(data: DatasetFacts) -> str:
    """Which pictures were looked at."""
    if data.complete_sample:
        return f"All {count(len(data.rows))} pictures were looked at."
    return (
        f"Looked at were {count(len(data.rows))} of {count(data.manifest.stored)} pictures: those of "
        f"{data.sampled_shards} shards of {count(len(data.manifest.shards))}, drawn by a seed."
    )


def _over_time(found: Throughput, values: np.ndarray) -> list[tuple[float, float]]:
    divisor = {"seconds": 1, "minutes": 60, "hours": 3600}[_time_unit(found).split()[0]]
    return list(zip((found.seconds / divisor).tolist(), values.tolist(), strict=True))


def _time_unit(found: Throughput) -> str:
    unit = "seconds" if found.working_seconds < 180 else "minutes" if found.working_seconds < 3 * 3600 else "hours"
    return f"{unit} of work"
