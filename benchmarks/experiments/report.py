"""RESULTS.md out of what has been run: tables of means and standard deviations over seeds, and the dissection.

Beside it goes results.json, the figures of every single run. What people read off the tables is written by hand in
READING.md and taken in as it is; nothing else in RESULTS.md is.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.results import BEGIN, END, read_result, section_of, with_section
from benchmarks.experiments.runs import data_path, planned
from benchmarks.experiments.settings import BASE, DOMAINS, EXPERIMENTS, PASSES, SEEDS, Experiment, Variant
from cluster.dataset.documents import load_manifest
from cluster.store.store import open_store
from pcm.errors import InputError

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "RESULTS.md"
RUNS = FOLDER.parent / "results.json"
READING = FOLDER / "READING.md"

METRICS = {"CIDEr": "CIDEr", "Bleu_4": "B4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L"}
#: The paper's CIDEr (arXiv 2501.00437) of what a row does in small; ViT-L/14 on COCO, data efficiency ViT-B/32.
PAPER = {
    "ablation": {"base": 108.9, "base + mix-up": 111.6, "base + CXE": 112.0, "both (PCM-Net)": 113.6},
    "data": {"10 %": 88.0, "20 %": 98.8, "40 %": 101.6, "100 %": 103.8},
}

Result = dict[str, Any]
#: The results of each variant, those of its seeds that are done.
Found = Sequence[tuple[Variant, list[Result]]]


def write_report(out: Path, *, seeds: int = SEEDS, results: Path = RESULTS, runs: Path = RUNS) -> dict[str, Any]:
    """Write both files from what lies in OUT; how many runs they are of, and how many are missing."""
    rows: list[Result] = []
    wanted: set[str] = set()
    sections = []
    for name, experiment in EXPERIMENTS.items():
        try:
            keys = [[job.key for job in planned([variant], out, seeds=seeds)] for variant in experiment.variants]
        except InputError as error:
            sections.append(f"## {experiment.title}\n\nNot run: {' '.join(str(error).split())}\n")
            continue
        new = {key for each in keys for key in each} - wanted
        rows += [_record(key, result) for key in sorted(new) if (result := read_result(out, key))]
        wanted |= new
        found = [[result for key in each if (result := read_result(out, key))] for each in keys]
        sections.append(_section(name, experiment, list(zip(experiment.variants, found, strict=True)), seeds))
    dissection = out / "dissect.json"
    if dissection.exists():
        sections.append(_dissection(json.loads(dissection.read_text())))
    text = "\n".join([_head(out, rows, missing=len(wanted) - len(rows)), *sections]).rstrip() + "\n"
    if results.exists() and (section := section_of(results.read_text())):
        text = with_section(text, section.removeprefix(BEGIN).removesuffix(END))
    results.write_text(text)
    runs.write_text("[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in rows) + "\n]\n")
    return {"runs": len(rows), "missing": len(wanted) - len(rows), "results": str(results)}


def _record(key: str, result: Result) -> Result:
    """What results.json keeps of a run."""
    names = ("variant", "domain", "data", "seed", "steps", "tests", "seconds", "cpu_seconds")
    best = result["validation"]["best"]
    return {
        "key": key,
        **{name: result[name] for name in names},
        "validation": {name: best[name] for name in ("epoch", "CIDEr", "loss")},
        "train": result["document"]["train"],
        "datasets": [each["sha256"] for each in result["document"]["datasets"]],
    }


def _head(out: Path, rows: Sequence[Result], *, missing: int) -> str:
    lines = [
        "# The paper's experiments in small",
        "",
        "Made by `python -m benchmarks.experiments report`; every run's figures are in `results.json`. Do not edit.",
        "",
        "Everything here is the embedded world: small drawings, a small CLIP, a small text-to-image model. It can show",
        "whether the parts of the method do what the paper says they do; its figures are not those of COCO.",
        "",
        "```",
        "python -m benchmarks.experiments prepare --out DIR     # datasets; needs the extra `world` and npm",
        "python -m benchmarks.experiments all --out DIR         # or one by one: " + " ".join(EXPERIMENTS),
        "python -m benchmarks.experiments dissect --out DIR",
        "python -m benchmarks.experiments report --out DIR",
        "```",
        "",
    ]
    if missing:
        lines += [f"**{missing} runs are missing; the tables are of those that are done.**", ""]
    lines += ["| dataset | pairs | mean cosine |", "|---|---|---|"]
    for name in DOMAINS:
        for data in ("drawn", "rendered", "text"):
            store = open_store(data_path(out, name, data))
            if store.exists("dataset.json"):
                manifest = load_manifest(store)
                mean = "-" if data == "text" else f"{manifest.clip_score_mean:.3f}"
                lines.append(f"| {name}, {data} | {manifest.stored} | {mean} |")
    settings = ", ".join(f"{name} {value}" for name, value in BASE.items())
    epochs = BASE["epochs"]
    lines += [
        "",
        f"Every run: the preset `embedded` with {settings}; each caption {PASSES * epochs:g} times in all (validated "
        f"after every {PASSES:g}), float32, one core, beam 3. The weights of the best epoch by CIDEr on the "
        "domain's validation pictures are tested; settings were chosen on the validation pictures too. Pictures of "
        "validation and test are in a drawing style that no model has been trained on.",
        "",
    ]
    if rows:
        seconds = statistics.median(row["cpu_seconds"]["training"] for row in rows)
        testing = statistics.median(row["cpu_seconds"]["testing"] for row in rows)
        steps = statistics.median(row["steps"] for row in rows)
        lines += [
            f"{len(rows)} runs; median of a run: {steps:g} steps, {seconds:.0f} CPU seconds of training with "
            f"validation, {testing:.0f} of testing. CIDEr and all other metrics are times 100; mean ± standard "
            "deviation over seeds; the difference is to the first row, paired by seed.",
            "",
        ]
    if READING.exists():
        lines += ["## What we read off it", "", READING.read_text().strip(), ""]
    return "\n".join(lines)


def _section(name: str, experiment: Experiment, found: Found, seeds: int) -> str:
    lines = [f"## {experiment.title}", "", f"`python -m benchmarks.experiments {name} --out DIR`", ""]
    if experiment.note:
        lines += [experiment.note, ""]
    paper = PAPER.get(name, {})
    across = name == "cross"
    columns = [
        "",
        *(["trained on", "tested on"] if across else []),
        "runs",
        *METRICS.values(),
        "CIDEr difference",
        "validation CIDEr",
        *(["paper's CIDEr"] if paper else []),
    ]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    firsts: dict[tuple[str, str], list[Result]] = {}
    for variant, results in found:
        for domain in (variant.domain, *variant.also_on) if across else (variant.domain,):
            first = firsts.setdefault((variant.domain, domain), results)
            cells = [
                variant.name,
                *([variant.domain, domain] if across else []),
                f"{len(results)} of {seeds}",
                *(mean_std([result["tests"][domain][metric] for result in results]) for metric in METRICS),
                "" if first is results else difference(results, first, domain),
                mean_std([result["validation"]["best"]["CIDEr"] for result in results]),
                *([f"{paper.get(variant.name, '')}"] if paper else []),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if name == "ablation":
        lines += ["", order(paper, {variant.name: results for variant, results in found})]
    if chance := within_chance([results for _, results in found]):
        lines += ["", chance]
    return "\n".join([*lines, ""])


def mean_std(values: Sequence[float | None], scale: float = 100.0) -> str:
    """ "113.6 ± 0.8", in hundredths; "-" of nothing."""
    numbers = [scale * value for value in values if value is not None]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def difference(results: Sequence[Result], first: Sequence[Result], domain: str) -> str:
    """Mean and spread of CIDEr less that of the same seed in `first`."""
    base = {result["seed"]: result["tests"][domain]["CIDEr"] for result in first}
    found = mean_std([r["tests"][domain]["CIDEr"] - base[r["seed"]] for r in results if r["seed"] in base])
    return found if found.startswith("-") else f"+{found}"


def within_chance(found: Sequence[Sequence[Result]]) -> str:
    """How large a difference to the first row chance alone makes: 2 standard errors of the mean over seeds, where the
    spread of the differences, paired by seed, is pooled over the rows of the same test pictures."""
    first: dict[tuple[str, int], float] = {}
    groups = []
    for results in found:
        own = [(next(iter(result["tests"].items())), result["seed"]) for result in results]
        values = {(domain, seed): 100 * figures["CIDEr"] for (domain, figures), seed in own}
        differences = [value - first[key] for key, value in values.items() if key in first]
        if len(differences) > 1:
            groups.append(differences)
        first = {**values, **first}
    if not groups:
        return ""
    pooled = math.sqrt(statistics.mean(statistics.variance(group) for group in groups))
    least = 2 * pooled / math.sqrt(min(map(len, groups)))
    return f"Differences to the first row below {least:.1f} are within chance (two standard errors of pairs by seed)."


def order(paper: dict[str, float], found: dict[str, list[Result]]) -> str:
    """Whether the variants come in the paper's order, by mean CIDEr."""
    means = {
        name: statistics.mean(next(iter(result["tests"].values()))["CIDEr"] for result in results)
        for name, results in found.items()
        if results and name in paper
    }
    pairs = [(a, b) for a in means for b in means if paper[a] < paper[b]]
    agree = sum(means[a] < means[b] for a, b in pairs)
    ranked = " < ".join(sorted(means, key=means.__getitem__))
    return f"Order of the means here: {ranked}. {agree} of {len(pairs)} pairs stand as in the paper."


def _dissection(found: dict[str, Any]) -> str:
    lines = [
        "## Dissection: what the mix-up and the scores do",
        "",
        "`python -m benchmarks.experiments dissect --out DIR [--judge FOLDER]`",
        "",
        f"No training takes part. {found['concepts']} concepts, K = {found['K']}, M = {found['M']:g}. A thing of the "
        f"scene counts as recognised if it is among the nouns that the judge finds likeliest; judge: {found['judge']}.",
    ]
    if found["objects_that_are_not"]:
        lines.append(f"Things that are no concepts: {', '.join(found['objects_that_are_not'])}.")
    columns = [data for data in ("drawn", "rendered") if data in found]
    flat = {data: dict(_flat(found[data])) for data in columns}
    lines += ["", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for data in columns for name in flat[data]):
        lines.append(f"| {name} | " + " | ".join(_cell(flat[data].get(name)) for data in columns) + " |")
    return "\n".join([*lines, ""])


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        rows += _flat(value, f"{label}: ") if isinstance(value, dict) else [(label, value)]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(_cell(each) for each in value)
    return "-" if value is None else f"{value:g}"
