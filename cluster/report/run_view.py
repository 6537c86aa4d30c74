"""The sections about a training run: how it learned, what its metrics are, what it says of pictures."""

from collections.abc import Mapping
from typing import Any

from cluster.charts.markup import Html, Node, tag
from cluster.charts.svg import Bar, Line, bars, line_chart
from cluster.evaluation.experiments import experiment
from cluster.numbers import count, duration, percent, short, times_100
from cluster.report.captions import CaptionedPicture, CaptionSamples
from cluster.report.parts import absent, caption_text, code, details, facts, section, table
from cluster.report.run_facts import BEST_EPOCH, RunFacts, nearest_preset, settings

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE", "CLIPScore", "RefCLIPScore")
#: Colours that tell concepts apart on a picture.
CONCEPT_COLOURS = 6
REFERENCES_SHOWN = 2


def training(run: RunFacts) -> Html:
    preset, changes = nearest_preset(run.config)
    changed = ", ".join(f"{name} {value}" for name, value in changes.items()) or "nothing"
    about: list[tuple[str, Node]] = [
        ("Where", code(run.root)),
        ("Data", [_source(each) for each in run.document.get("datasets", [])]),
        ("Settings", [f"nearest preset {preset}; changed: {changed}"]),
        ("CLIP", str(run.document["clip"]["model"])),
        ("Validated on", _validation(run.document)),
        ("Versions", ", ".join(f"{name} {number}" for name, number in run.document.get("versions", {}).items())),
    ]
    every = details(
        "Every setting", table(["field", "value"], [[code(name), str(value)] for name, value in settings(run.config)],
                               label="Settings of the training run"),
    )  # fmt: skip
    title = "How the captioner learned"
    if not run.history:
        return section("training", "Training", title, None, absent("No epoch is finished yet."), facts(about), every)
    best, last = run.best or {}, run.history[-1]
    pictures = "the validation pictures" if run.document.get("validation") else "held-out synthetic pairs"
    lead = (
        f"{len(run.history)} of {run.config.epochs} epochs, {count(last['step'])} steps; the best is epoch "
        f"{best['epoch']}, with CIDEr {times_100(best['CIDEr'])} on {pictures}."
    )
    columns = [name for name in last if isinstance(last[name], int | float)]
    return section(
        "training",
        "Training",
        title,
        lead,
        tag("div", _loss_chart(run), _cider_chart(run, best), _rate_chart(run), _speed_chart(run), class_="charts"),
        facts(about),
        details(
            "Every epoch",
            table(
                columns,
                [[_cell(row.get(name)) for name in columns] for row in run.history],
                label="Metrics of every epoch",
                numbers=range(len(columns)),
            ),
        ),
        every,
    )


def metrics(document: Mapping[str, Any]) -> Html:
    found, request = document["metrics"], document["request"]
    source = request["pictures"]
    compared = found.get("paper") or {}
    reasons = found.get("reasons", {})
    rows = []
    for name in METRICS:
        mine: Node = times_100(found.get(name))
        if found.get(name) is None:
            mine = tag("span", "not available", title=reasons.get(name, ""), class_="note")
        row: list[Node] = [name, mine]
        if compared:
            row.append(_paper(compared.get(name)))
        rows.append(row)
    shuffled = found.get("CIDEr_shuffled")
    charts: list[Node] = []
    if shuffled is not None:
        charts.append(
            bars(
                [Bar("its own picture", 100 * found["CIDEr"], times_100(found["CIDEr"])),
                 Bar("another picture", 100 * shuffled, times_100(shuffled), series=2)],
                title="Does it look at the picture?",
                description="CIDEr of the captions, and of the same captions given to other pictures.",
            ).figure()
        )  # fmt: skip
    if compared:
        name = str(request["experiment"])
        charts.append(
            bars(
                [bar for metric, pair in compared.items() for bar in _pair(metric, pair)],
                title="Beside the paper's", description=f"Experiment {name}. {experiment(name).note}".strip(),
            ).figure()
        )  # fmt: skip
    domains = [
        Bar(domain, 100 * each["CIDEr"], f"{times_100(each['CIDEr'])} ({each['n']})")
        for domain, each in found.get("domains", {}).items()
        if each["CIDEr"] is not None  # of a single picture
    ]
    if domains:
        charts.append(bars(domains, title="CIDEr by domain", description="Pictures in brackets.").figure())
    what = f"pictures of {source['images']}, beam search {request['beam_size']}"
    if request.get("results"):
        what = f"captions of {request['results']}"
    epoch = f"The best epoch by CIDEr is {document[BEST_EPOCH]}. " if BEST_EPOCH in document else ""
    said = f"{epoch}CIDEr {times_100(found['CIDEr'])} on {count(found['n'])} {what}."
    none = (
        "No experiment of the paper (arXiv 2501.00437) was named, so none of its figures stands beside these: they are "
        "for COCO, Flickr30k and NoCaps (jobs.evaluate --experiment)."
    )
    return section(
        "metrics",
        "Evaluation",
        "How good the captions are",
        [said, " Metrics are times 100, as in the papers."],
        tag(
            "div",
            table(
                ["metric", "here", *(["paper"] if compared else [])],
                rows,
                label="Metrics of the evaluation",
                numbers=range(1, 3),
            ),
            tag("div", charts, not compared and absent(none)),
            class_="charts",
        ),
    )


def captions(samples: CaptionSamples) -> Html:
    grid = f"{samples.rows} x {samples.columns}"
    return section(
        "captions",
        "Evaluation",
        "What it says of pictures",
        f"{len(samples.pictures)} of the {count(samples.total)} pictures of {samples.source}, drawn at random. Below "
        f"each caption stand the concepts that were retrieved, with their probability; framed on the picture, in the "
        f"colour of their concept, are the patches (of {grid}) that the mix-up selected.",
        tag(
            "label",
            tag("input", type="checkbox", id="show-patches", checked=True),
            " show the selected patches",
            class_="switch",
        ),
        tag("div", (_captioned(each, samples) for each in samples.pictures), class_="captioned"),
        samples.unreadable
        and details(
            f"{len(samples.unreadable)} pictures could not be read",
            tag("ul", (tag("li", each) for each in samples.unreadable)),
        ),
    )


def _loss_chart(run: RunFacts) -> Html:
    means = [(row["step"], row["loss"]) for row in run.history]
    lines = [Line(name="a step", points=run.loss.tolist(), faint=True)] if len(run.loss) > 1 else []
    return line_chart(
        [*lines, Line(name="mean of an epoch", points=means, dots=True)],
        title="Loss", description="The thin line is of steps, the dots are of whole epochs.", x_label="step",
    ).figure()  # fmt: skip


def _cider_chart(run: RunFacts, best: Mapping[str, Any]) -> Html:
    points = [(row["epoch"], 100 * row["CIDEr"]) for row in run.history]
    return line_chart(
        [Line(name="CIDEr", points=points, dots=True, series=2)],
        title="CIDEr", description="On the validation pictures, times 100.", x_label="epoch", from_zero=True,
        best=(best["epoch"], 100 * best["CIDEr"]), whole_x=True,
    ).figure()  # fmt: skip


def _rate_chart(run: RunFacts) -> Html:
    points = run.learning_rate.tolist() or [(row["step"], row["lr"]) for row in run.history]
    return line_chart(
        [Line(name="learning rate", points=points, series=3)],
        title="Learning rate", description=f"Noam schedule, {count(run.config.warmup_steps)} steps of warm-up.",
        x_label="step", from_zero=True,
    ).figure()  # fmt: skip


def _speed_chart(run: RunFacts) -> Html:
    training, validation = (
        duration(sum(row.get(name, 0.0) for row in run.history)) for name in ("seconds", "validation_seconds")
    )
    return line_chart(
        [Line(name="samples a second", series=4, dots=True,
              points=[(row["epoch"], row.get("samples_per_second", 0.0)) for row in run.history])],
        title="Speed", x_label="epoch", from_zero=True, whole_x=True,
        description=f"Samples a second; {training} of training and {validation} of validation in all.",
    ).figure()  # fmt: skip


def _captioned(picture: CaptionedPicture, samples: CaptionSamples) -> Html:
    squares = [
        tag(
            "rect",
            tag("title", f"{_concept_name(picture, each.rank)}, cosine {each.similarity:.2f}"),
            x=each.column + 0.04, y=each.row + 0.04, width=0.92, height=0.92, rx=0.12,
            class_=_colour(each.rank),
        )
        for each in picture.patches
    ]  # fmt: skip
    overlay = tag(
        "svg", *squares, viewBox=f"0 0 {samples.columns} {samples.rows}", preserveAspectRatio="none", role="img",
        aria_label=_patches_text(picture), class_="patches",
    )  # fmt: skip
    owners = {each.rank for each in picture.patches}
    concepts = [
        tag(
            "li",
            tag("i", class_=f"{_colour(rank) if rank in owners else 'hollow'}"),
            tag("span", name),
            tag("span", tag("span", style=f"width:{100 * probability:.1f}%"), class_="bar"),
            tag("small", percent(probability) if kept else "dropped"),
        )
        for rank, (name, probability, kept) in enumerate(picture.concepts)
    ]
    return tag(
        "article",
        tag("div", tag("img", src=picture.uri, alt=f"picture {picture.image_id}", class_="pixels"),
            overlay, class_="overlaid"),
        tag(
            "div",
            tag("h3", caption_text(picture.caption.removesuffix(" ."))),
            tag("ul", concepts, class_="concepts"),
            tag("p", "References: ", "; ".join(picture.references[:REFERENCES_SHOWN]), class_="note"),
            tag("small", picture.image_id),
        ),
    )  # fmt: skip


def _colour(rank: int | None) -> str:
    return "dropped" if rank is None else f"c{rank % CONCEPT_COLOURS}"


def _concept_name(picture: CaptionedPicture, rank: int | None) -> str:
    return "no concept" if rank is None else picture.concepts[rank][0]


def _patches_text(picture: CaptionedPicture) -> str:
    if not picture.patches:
        return "no patch is selected"
    said = (
        f"row {each.row + 1}, column {each.column + 1}: {_concept_name(picture, each.rank)}" for each in picture.patches
    )
    return f"selected patches: {'; '.join(said)}"


def _paper(pair: Mapping[str, float | None] | None) -> Node:
    return "" if pair is None or pair["paper"] is None else f"{pair['paper']:.1f}"


def _pair(metric: str, pair: Mapping[str, float | None]) -> list[Bar]:
    found = [(f"{metric}, {who}", pair[who], series) for series, who in ((1, "ours"), (3, "paper"))]
    return [Bar(label, value, f"{value:.1f}", series=series) for label, value, series in found if value is not None]


def _source(dataset: Mapping[str, Any]) -> Node:
    return [code(str(dataset["path"])), f" (weight {dataset['weight']:g}) " if dataset["weight"] != 1 else " "]


def _validation(document: Mapping[str, Any]) -> str:
    source = document.get("validation")
    return f"pictures of {source['images']}" if source else "held-out pairs of the dataset"


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, float) else "" if value is None else str(value)
