"""The top of the report: what it is about, in a sentence and a few large numbers."""

import os
from dataclasses import dataclass
from typing import Any

from cluster.numbers import count, percent, score, short, times_100
from cluster.report.captions import CaptionSamples
from cluster.report.dataset_facts import DatasetFacts
from cluster.report.gallery import Gallery
from cluster.report.left_out import LeftOut
from cluster.report.measures_view import cost
from cluster.report.page import Headline
from cluster.report.run_facts import RunFacts, place_of
from cluster.report.sweep_facts import SweepFacts
from cluster.report.throughput import Throughput
from cluster.store.store import is_uri

Number = tuple[str, str, str]  # what is read, what it is, a word more or ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was gathered; None for what was not given."""

    data: DatasetFacts | None
    gallery: Gallery | None
    left_out: dict[str, list[LeftOut]]  # by rule, of a derived dataset
    speed: Throughput | None
    run: RunFacts | None
    other_data: tuple[str, ...] = ()  # what the run was trained on, where that is not `data`
    evaluation: dict[str, Any] | None
    captions: CaptionSamples | None
    sweep: SweepFacts | None


def headline(facts: Facts, *, title: str | None, hourly: float | None) -> Headline:
    """`title` None: what the report is about; `hourly`: the price of one GPU, or of one machine on CPUs."""
    said: list[str] = []
    numbers: list[Number] = []
    for sentence, found in (_dataset(facts, hourly), _run(facts), _evaluation(facts), _sweep(facts)):
        said += [sentence] if sentence else []
        numbers += found
    return Headline(
        title=title or _title(facts),
        lead=" ".join(said),
        numbers=tuple(numbers),
        wall=facts.gallery.wall if facts.gallery is not None else (),
    )


def _dataset(facts: Facts, hourly: float | None) -> tuple[str, list[Number]]:
    if facts.data is None:
        return "", []
    manifest, speed = facts.data.manifest, facts.speed
    generator = manifest.spec.generator
    share = f" ({percent(manifest.quarantined / manifest.expected)})" if manifest.quarantined else ""
    numbers = [(count(manifest.stored), "pictures", f"{count(manifest.quarantined)} quarantined{share}")]
    if facts.data.scored and manifest.clip_score_mean is not None:
        numbers.append((score(manifest.clip_score_mean), "mean CLIP score", "raw cosine"))
    if speed is not None:
        while_made = "while drawing" if facts.data.drawn_here else "while it was made"
        numbers.append((short(speed.images_per_second), "images a second", while_made))
        spent = cost(speed, facts.data, hourly)
        if spent is not None:
            thousand = short(1000 * spent / max(1, manifest.stored))
            numbers.append((short(spent), "cost", f"{thousand} a thousand pictures"))
    if manifest.lineage is not None:
        said = (
            f"{count(manifest.stored)} of {count(manifest.lineage.rows_in)} pairs stayed, by {manifest.lineage.method}."
        )
        return said, numbers
    if facts.data.drawn_here:
        each = manifest.spec.images_per_caption
        asked = f"{count(manifest.expected // each)} captions"
        if each > 1 and facts.data.extent:  # its shards may end between the pictures of a caption
            asked = f"{count(manifest.expected)} samples, {each} a caption,"
        sentence = (
            f"{asked} became {count(manifest.stored)} pictures, drawn by "
            f"{'the embedded model' if generator.model == 'embedded' else generator.model} in "
            f"{generator.num_inference_steps} step{'s' if generator.num_inference_steps != 1 else ''}."
        )
    else:
        sentence = (
            f"{count(manifest.stored)} of {count(manifest.expected)} pairs of a picture and a caption are stored; the "
            "pictures were not drawn here."
        )
    if facts.data.extent:
        sentence += f" The dataset is unfinished: {facts.data.extent}."
    return sentence, numbers


def _run(facts: Facts) -> tuple[str, list[Number]]:
    if facts.run is None or facts.run.best is None:
        return "", []
    best, epochs = facts.run.best, len(facts.run.history)
    number = (times_100(best["CIDEr"]), "validation CIDEr", f"epoch {best['epoch']} of {epochs}")
    other = f" on other data: {', '.join(facts.other_data)}" if facts.other_data else ""
    return f"A PCM-Net was trained for {epochs} epochs{other}.", [number]


def _evaluation(facts: Facts) -> tuple[str, list[Number]]:
    if facts.evaluation is None:
        return "", []
    metrics = facts.evaluation["metrics"]
    shuffled = metrics.get("CIDEr_shuffled")
    pictures = count(metrics["n"])
    more = f"{times_100(shuffled)} when shuffled" if shuffled is not None else f"{pictures} pictures"
    tested = _other_checkpoints(facts) or "It"
    return f"{tested} was tested on {pictures} pictures.", [(times_100(metrics["CIDEr"]), "test CIDEr", more)]


def _other_checkpoints(facts: Facts) -> str:
    """What was evaluated, where its record names another place than the run's."""
    asked = facts.evaluation["request"].get("checkpoint") if facts.evaluation is not None else None
    if facts.run is None or asked is None:
        return ""
    run, checkpoints = place_of(facts.run.root), asked if isinstance(asked, list) else [asked]
    if all(_is_of(run, str(each)) for each in checkpoints):
        return ""
    return f"The captioner of {', '.join(map(str, checkpoints))}"


def _is_of(run: str, recorded: str) -> bool:
    """Whether a recorded checkpoint is of the run at a place. A relative path may have been recorded in another folder:
    where nothing lies there from here, its names are compared alone."""
    if f"{place_of(recorded)}/".startswith(f"{run}/"):
        return True
    if is_uri(recorded) or os.path.isabs(recorded) or os.path.exists(recorded):
        return False
    return any(place.endswith(f"/{os.path.normpath(recorded)}") for place in (run, f"{run}/best"))


def _sweep(facts: Facts) -> tuple[str, list[Number]]:
    if facts.sweep is None or not facts.sweep.scored:
        return "", []
    settings = len(facts.sweep.ranked)
    return f"A sweep compared {settings} settings.", [
        (times_100(facts.sweep.scored[0].mean), "best CIDEr of the sweep", f"of {settings} settings")
    ]


def _title(facts: Facts) -> str:
    if facts.data is not None and facts.run is not None and facts.data.drawn_here and not facts.other_data:
        return "From captions to pictures to a captioner"
    if facts.data is not None:
        return "From captions to pictures" if facts.data.drawn_here else "Pictures and their captions"
    if facts.run is not None or facts.evaluation is not None:
        return "A captioner and how good it is"
    return "A sweep of settings"
