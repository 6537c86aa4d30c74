"""The sections about a dataset: what it is, its pictures, scores, speed and cost, and what could not be made."""

import json
import shlex
from collections.abc import Sequence

from cluster.charts.markup import Html, Node, tag
from cluster.numbers import count, moment, percent, size
from cluster.report.dataset_facts import DatasetFacts
from cluster.report.gallery import Concept, Gallery, Picture
from cluster.report.measures_view import cost_text, sampled_from
from cluster.report.parts import absent, caption_text, code, details, facts, picture_card, section
from cluster.report.throughput import Throughput
from pcm.generation.names import UNDRAWN
from pcm.reasons import text_of
from pcm.spec import DatasetSpec


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
        ("Seed", f"{spec.seed}; pictures a caption: {spec.images_per_caption}"),
    ]  # fmt: skip
    if speed is not None:
        pairs.insert(2, ("Made", f"{moment(speed.began)} to {moment(speed.ended)}"))
        pairs.append(("Cost", cost_text(speed, data, hourly)))
    if data.extent:
        pairs.insert(1, ("Unfinished", f"{data.extent} are there, and counted here"))
    pairs += [
        ("Corpus fingerprint", code(manifest.corpus_fingerprint or "none")),
        ("Spec digest", code(spec.digest())),
        ("Verified", _verification(data)),
    ]
    title, lead = "What it holds, and with what it was made", ""
    if data.drawn_here:
        title = "What was drawn, and with what"
        lead = (
            "Every picture is a function of its caption, this specification and its seed, and can be drawn again alone."
        )
    return section(
        "dataset",
        "Dataset",
        title,
        lead,
        facts(pairs),
        details(
            "The whole specification",
            tag("pre", json.dumps(spec.to_dict(), indent=1, sort_keys=True, ensure_ascii=False)),
        ),
    )


def gallery(data: DatasetFacts, found: Gallery) -> Html:
    redraw = f"python -m jobs.generate --out {shlex.quote(data.root)} --only" if data.drawn_here else ""

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
        [data.scored and "The number is the CLIP score, the raw cosine of picture and caption. ", sampled_from(data)],
        *ranked,
        tag("h3", "At random"),
        cards(found.random),
        tag("h3", "By concept"),
        tag("p", ["The most frequent nouns of the captions",
                  data.scored and "; of each, pictures evenly spread from its best score to its worst", "."],
            class_="note"),
        [_concept(each, cards(each.pictures), scored=data.scored) for each in found.concepts]
        or absent("No noun of the lexicon occurs in these captions."),
    )  # fmt: skip


def quarantine(data: DatasetFacts) -> Html:
    manifest = data.manifest
    if not manifest.quarantined:
        return section(
            "quarantine", "Dataset", "What could not be made",
            f"Nothing: all {count(manifest.expected)} samples are stored.",
        )  # fmt: skip
    reasons = sorted(manifest.quarantined_by_reason.items(), key=lambda item: (-item[1], item[0]))
    most = reasons[0][1]
    errors = sorted({str(error) for stats in data.stats for error in stats.get("errors", [])})[:5]
    return section(
        "quarantine",
        "Dataset",
        "What could not be made",
        f"{count(manifest.quarantined)} of {count(manifest.expected)} samples "
        f"({percent(manifest.quarantined / manifest.expected)}) were kept aside with a reason; none was dropped.",
        tag("div", (_reason(reason, number, most, data) for reason, number in reasons), class_="reasons"),
        errors and details("What the model said", tag("ul", (tag("li", code(error)) for error in errors))),
    )


def _reason(reason: str, number: int, most: int, data: DatasetFacts) -> Html:
    """One reason: how often, what it means, and some of the captions."""
    examples = [
        tag("li", caption_text(_cut(each.caption)) if each.caption.strip() else tag("i", "(blank)"),
            tag("small", f" {each.sample_id}"))
        for each in data.refused.get(reason, ())
    ]  # fmt: skip
    return tag(
        "article",
        tag("h3", code(reason), tag("b", count(number))),
        tag("span", tag("span", style=f"width:{100 * number / most:.1f}%"), class_="bar"),
        tag("p", text_of(reason), class_="note"),
        examples and tag("ul", examples),
    )


def _generator(spec: DatasetSpec) -> str:
    generator = spec.generator
    if (job := UNDRAWN.get(generator.model)) is not None:
        return f"{generator.model}: nothing was drawn by {job}"
    scale = generator.guidance_scale
    parts = [
        generator.model,
        f"{generator.num_inference_steps} steps",
        "the pipeline's own guidance" if scale is None else f"guidance {scale:g}",
        generator.scheduler or "the model's own scheduler",
        f"{generator.dtype} on {generator.device}",
    ]
    return ", ".join(parts)


def _verification(data: DatasetFacts) -> Node:
    if data.verified is None:
        return data.unverified
    found = data.verified
    if found["ok"]:
        return ["nothing missing, doubled or corrupt; fingerprint ", code(found["fingerprint"])]
    said = "; ".join(found["problems"][:3]) or "incomplete"
    wrong = f"{found['missing']} missing, {found['duplicated']} doubled, {found['corrupt']} corrupt: {said}"
    return tag("strong", wrong, class_="bad")


def _concept(found: Concept, cards: Html, *, scored: bool) -> Html:
    said = f"{count(found.captions)} captions" + (f", mean score {found.mean_score:.3f}" if scored else "")
    return tag(
        "div", tag("h4", found.name, tag("small", f" {said}")), cards, class_="concept", data_concept=found.name
    )  # fmt: skip


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
