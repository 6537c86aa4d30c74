"""The section of RESULTS.md on what each step is worth, and worth.json (archive.py).

The section stands between two marks, before all others; the tables of the other experiments are not touched. What
people read off it is written by hand in READING.md beside this file and taken in as it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.results import with_section
from benchmarks.experiments.worth import calibration
from benchmarks.experiments.worth.archive import (
    ARCHIVE,
    all_figures,
    digest_of,
    known_figures,
    read_archive,
    record,
    write_archive,
)
from benchmarks.experiments.worth.calibration import LOOKS, LR_FACTORS, NEAR, chosen, is_calibrated
from benchmarks.experiments.worth.command import by_seed, found_result
from benchmarks.experiments.worth.datasets import data_figures, figures_name, is_made
from benchmarks.experiments.worth.dissection import by_kinds, training_figures
from benchmarks.experiments.worth.pictures import Pictures, judge_folder, load_pictures, worth_folder
from benchmarks.experiments.worth.retrievers import kept_figures
from benchmarks.experiments.worth.settings import (
    BASE,
    CAPTIONS,
    CLIP_FACTOR,
    DRAWN,
    LONGER,
    NETWORKS,
    PAINTERS,
    PARTS,
    PCM_NET,
    RENDERED,
    SEEDS,
    STEPS_OF_DATA,
    TEST_PICTURES,
    VALIDATION_PICTURES,
    Setting,
)
from benchmarks.experiments.worth.statistics import Estimate, estimate, seed_spread, seeds_needed
from pcm.errors import InputError

_BENCHMARKS = Path(__file__).parents[2]
RESULTS = _BENCHMARKS / "RESULTS.md"
READING = Path(__file__).parent / "READING.md"


#: CIDEr over the base in the paper's ablation (arXiv 2501.00437; ViT-L/14, COCO), and over PCM-Net without refining
#: (SynC, arXiv 2507.18616; ViT-B/32, COCO).
PAPER_NETWORKS = {"base + mix-up": 2.7, "base + CXE": 3.1, PCM_NET: 4.7}
PAPER_DATA = {"SynC": 8.2, "score filter": 0.6}
#: The gain that the number of seeds is reckoned for.
WANTED_DIFFERENCE = 2.0

#: Marks an interval that counts no noise of the pictures.
SEEDS_ALONE = " °"

RECOGNISED = "of recognised nouns"
METRICS = ("CIDEr", "noun recall", RECOGNISED)


class Scores:
    """The results of all settings that have some: one matrix (S, n) a metric, in hundredths, rows in order of seeds."""

    def __init__(self, out: Path, seeds: int) -> None:
        self.test = load_pictures(out, "test")
        self.how = asdict(chosen(out)) if is_calibrated(out) else None  # without it there is no run yet
        archive = read_archive()
        self.results: dict[Setting, dict[int, dict[str, Any]]] = {}
        self.wanted: dict[Setting, int] = {}
        for part in PARTS.values():
            for setting, seed in by_seed(part.settings, seeds):
                self.wanted[setting] = seeds
                if self.how and (result := found_result(setting, seed, out, self.how, archive)):
                    self.results.setdefault(setting, {})[seed] = result

    def count(self, setting: Setting) -> str:
        return f"{len(self.results.get(setting, {}))} of {self.wanted.get(setting, 0)}"

    def matrix(self, setting: Setting, metric: str) -> np.ndarray | None:
        found = self.results.get(setting)
        return None if not found else self._rows([found[seed] for seed in sorted(found)], metric)

    def difference(self, setting: Setting, base: Setting, metric: str) -> np.ndarray | None:
        """Of `setting` less `base`, of the seeds that both have; the n-th seed of one with the n-th of the other."""
        first, second = self.results.get(setting, {}), self.results.get(base, {})
        pairs = [
            (first[a], second[b])
            for a, b in zip(setting.seeds(SEEDS * 10), base.seeds(SEEDS * 10), strict=True)
            if a in first and b in second
        ]
        if not pairs:
            return None
        runs = [run for pair in pairs for run in pair]
        if metric == RECOGNISED and len({self.with_means(run)["recognised_by"] for run in runs}) > 1:
            return None  # each classifier recognises other nouns
        rows = self._rows([run for runs in zip(*pairs, strict=True) for run in runs], metric)
        return rows[: len(pairs)] - rows[len(pairs) :]

    def _rows(self, results: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
        """(S, n), or (S, 1), the means, where one of them has no scores by picture, or none of this test's nouns."""
        own = metric != RECOGNISED or all("recognised_by" not in result for result in results)
        if not own or not all("cider" in result for result in results):
            return np.array([[result[metric]] for result in map(self.with_means, results)])
        return 100 * np.stack([per_picture(result, self.test, metric) for result in results])

    def with_means(self, result: dict[str, Any]) -> dict[str, Any]:
        """And the mean of each metric, in hundredths, and by what classifier the nouns were recognised; of a run of the
        archive what it has."""
        if METRICS[0] in result:
            return result
        means = {name: round(100 * float(per_picture(result, self.test, name).mean()), 3) for name in METRICS}
        return result | means | {"recognised_by": digest_of(self.test.recognised)}


def per_picture(result: Mapping[str, Any], test: Pictures, metric: str) -> np.ndarray:
    """(n,) of a run; noun recalls only of pictures that have such a noun."""
    if metric == "CIDEr":
        return np.array(result["cider"])
    of_all = metric == "noun recall"
    wanted = np.array([len(each) for each in (test.nouns if of_all else test.recognised)])
    named = np.array(result["said" if of_all else "seen_said"])
    return named[wanted > 0] / wanted[wanted > 0]


def write_worth(out: Path, *, seeds: int = SEEDS, results: Path = RESULTS, runs: Path = ARCHIVE) -> dict[str, Any]:
    """Write the section and worth.json from what lies in OUT: how many runs they are of, and how many are missing."""
    if not (worth_folder(out) / "pictures" / "test.npz").exists():
        raise InputError(f"--out {out}: has no test pictures; run worth first")
    scores = Scores(out, seeds)
    known = results.read_text() if results.exists() else "# The paper's experiments in small\n"
    results.write_text(with_section(known, "\n".join(_section(out, scores))))
    rows = [
        record(scores.with_means(result), METRICS)
        for found in scores.results.values()
        for _, result in sorted(found.items())
    ]
    write_archive(runs, calibration=calibration.kept(out), figures=all_figures(out), records=rows)
    return {"worth_runs": len(rows), "worth_missing": sum(scores.wanted.values()) - len(rows)}


def _section(out: Path, scores: Scores) -> list[str]:
    lines = ["## What each step is worth", "", "`python -m benchmarks.experiments worth --out DIR`", ""]
    if READING.exists():
        lines += [READING.read_text().strip(), ""]
    lines += _method(out, scores)
    lines += _data_table(out, scores)
    lines += _calibration(out)
    lines += _resolution(scores)
    for painter in PAINTERS:
        lines += _networks(scores, painter)
    for painter in ("coarse", "fine"):
        lines += _refined(scores, painter)
    for painter in PAINTERS:
        lines += _dissection(out, scores, painter)
    return lines


def _method(out: Path, scores: Scores) -> list[str]:
    figures = json.loads((judge_folder(out) / "figures.json").read_text())
    settings = ", ".join(f"{name} {value}" for name, value in BASE.items())
    runs = [result for found in scores.results.values() for result in found.values()]
    seconds = np.median([sum(run["cpu_seconds"].values()) for run in runs]) if runs else math.nan
    steps = f"{scores.how['steps']} steps" if scores.how else "a number of steps that is not yet chosen"
    took = f"; {seconds:.0f} CPU seconds (median)" if runs else ""
    recognised = sum(map(len, scores.test.recognised)) / sum(map(len, scores.test.nouns))
    return [
        f"**How it is measured.** {len(runs)} of {sum(scores.wanted.values())} runs are done. Each: {steps} on "
        f"{CAPTIONS} captions of the first domain, then beam search 3 on {TEST_PICTURES} rendered pictures in a style "
        f"that no model was trained on{took}. The preset `embedded` with {settings}; the "
        f"weights at the end, averaged, no epoch picked. w is {CLIP_FACTOR:g} / (mean cosine of what the painter "
        f"drew). Learning rate and steps were chosen on {VALIDATION_PICTURES} validation pictures of other scenes. "
        "CIDEr is times 100. Noun recall: which share of the kinds of things in the scene the caption names; the "
        "second column counts only those that the independent classifier finds in the test picture "
        f"({100 * recognised:.0f} %), and is compared only where one and the same classifier found them.",
        "",
        "Differences are paired: the same seeds (initial weights, order of rows, dropout) and the same pictures. The "
        "interval is 95 %: t(0.975, S - 1) standard errors, which a bootstrap over seeds and pictures gives: S - 1 of "
        "the S seeds and n - 1 of the n pictures drawn with replacement, 4,000 times, the mean of the drawn rows and "
        "columns of the matrix of differences each time; their standard deviation is the standard error. **Bold**: "
        f"the interval leaves out 0. The mark{SEEDS_ALONE}: of one of the two settings only the means were kept (the "
        "first 95 runs). Its interval is over seeds alone, a quarter to a third narrower than one over pictures too.",
        "",
        "The independent classifier is trained on rendered scenes alone. Of held-out ones it names all things in "
        + ", ".join(f"{100 * figures[name]:.0f} % ({text})" for name, text in _JUDGED.items())
        + ".",
        "",
    ]


_JUDGED = {"single": "one kind of thing", "both": "two", "three": "three"}


def _data_table(out: Path, scores: Scores) -> list[str]:
    lines = [
        "### The data",
        "",
        "Wrong pictures: the share of pairs whose picture does not show all things of its caption, by the independent "
        "classifier; wrong places: whose picture does not show its place. AUC: the probability that a right pair has a "
        "higher score than a wrong one.",
        "",
        "| painter | data | pairs | drawn | mean cosine | wrong pictures | missing things | wrong places "
        "| AUC of the score |",
        "|---" * 9 + "|",
    ]
    for painter in (*PAINTERS, RENDERED):
        for data in (DRAWN, *_steps_of(scores, painter)):
            if not is_made(out, painter, data) and known_figures(out, figures_name(painter, data)) is None:
                lines.append(f"| {painter} | {data} | not made |" + " |" * 6)
                continue
            found = data_figures(out, painter, data)
            drawn = 0 if painter == RENDERED else CAPTIONS * (1 + _drawn(data))
            lines.append(
                f"| {painter} | {'rendered' if painter == RENDERED else data} | {found['rows']} | {drawn:.0f} "
                f"| {found['mean_clip_score']:.3f} | {100 * found['wrong_pictures']:.1f} % "
                f"| {100 * found['missing_things']:.1f} % | {100 * found['wrong_places']:.1f} % "
                f"| {found['score_auc']:.2f} |"
            )
    painters = "; ".join(
        f"{name}: {how.steps} steps, guidance {how.guidance_scale:g}, {how.side} x {how.side}"
        for name, how in PAINTERS.items()
    )
    return [*lines, "", f"Painters: {painters}.", ""]


def _steps_of(scores: Scores, painter: str) -> list[str]:
    """The ways to better data that some part asks for with this painter, in their order."""
    asked = {setting.data for setting in scores.wanted if setting.painter == painter}
    return [data for data in STEPS_OF_DATA if data in asked]


def _drawn(data: str) -> float:
    return STEPS_OF_DATA[data].drawn if data in STEPS_OF_DATA else 0.0


def _calibration(out: Path) -> list[str]:
    rows = calibration.table(out)
    wanted = len(calibration.SEEDS) * len(LR_FACTORS)
    done = sum(row["seeds"] for row in rows if row["lr_factor"] in LR_FACTORS)
    lines = [
        "### Learning rate and steps, fixed on validation pictures",
        "",
        f"{done} of {wanted} trainings are done. CIDEr of the base network, coarse painter, by steps: mean and "
        f"standard deviation over seeds. Rule: the learning rate with the highest mean at {LOOKS[-1]} steps, then the "
        f"fewest steps within {NEAR:g} of its highest mean. Chosen: {_chosen(out)}.{_edge(out)}",
        "",
        "| lr_factor | seeds | " + " | ".join(f"{steps} steps" for steps in LOOKS) + " |",
        "|---" * (2 + len(LOOKS)) + "|",
    ]
    for row in rows:
        cells = [row["cider"].get(str(steps), "not run") for steps in LOOKS]
        lines.append(f"| {row['lr_factor']:g} | {row['seeds']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _chosen(out: Path) -> str:
    if not is_calibrated(out):
        return "not yet"
    how = chosen(out)
    return f"lr_factor {how.lr_factor:g}, {how.steps} steps"


def _edge(out: Path) -> str:
    """A warning where the choice lies at the end of what was tried."""
    if not is_calibrated(out):
        return ""
    how = chosen(out)
    ends = [
        text
        for text, at_end in (
            ("the largest learning rate", how.lr_factor == max(LR_FACTORS)),
            ("the most steps", how.steps == LOOKS[-1]),
        )
        if at_end
    ]
    return f" These are {' and '.join(ends)} that were tried: the best may lie beyond." if ends else ""


def _resolution(scores: Scores) -> list[str]:
    coarse = Setting("coarse")
    lines = [
        "### Resolution",
        "",
        "The base network. Spread: standard deviation over seeds.",
        "",
        "| trained on | seeds | CIDEr | spread | noun recall | of recognised nouns |",
        "|---|---|---|---|---|---|",
    ]
    named = {
        "coarse painter": coarse,
        "coarse painter, other seeds": Setting("coarse", again=True),
        f"coarse painter, {LONGER} times the steps": Setting("coarse", longer=LONGER),
        "fine painter": Setting("fine"),
        "rendered pictures": Setting(RENDERED),
    }
    for name, setting in named.items():
        lines.append(f"| {name} | {scores.count(setting)} | " + " | ".join(_level(scores, setting)) + " |")
    lines += [
        "",
        "| difference | seeds | CIDEr | noun recall | of recognised nouns | seeds for 2 points |",
        "|---" * 6 + "|",
    ]
    for name, (setting, base) in {
        "the same setting twice": (named["coarse painter, other seeds"], coarse),
        f"{LONGER} times the steps": (Setting("coarse", longer=LONGER), coarse),
        "rendered less coarse": (named["rendered pictures"], coarse),
        "rendered less fine": (named["rendered pictures"], named["fine painter"]),
        "fine less coarse": (named["fine painter"], coarse),
    }.items():
        lines.append(
            f"| {name} | " + " | ".join(_change(scores, setting, base)) + f" | {_seeds(scores, setting, base)} |"
        )
    return [*lines, ""]


def _level(scores: Scores, setting: Setting) -> list[str]:
    matrix = scores.matrix(setting, "CIDEr")
    if matrix is None:
        return ["not run", "", "", ""]
    others = [_plain(scores.matrix(setting, metric)) for metric in METRICS[1:]]
    spread = seed_spread(matrix)
    return [_plain(matrix), "-" if math.isnan(spread) else f"{spread:.1f}", *others]


def _plain(matrix: np.ndarray | None) -> str:
    return "" if matrix is None else f"{matrix.mean():.1f}"


def _change(scores: Scores, setting: Setting, base: Setting) -> list[str]:
    """Seeds, then each metric's difference."""
    found = [scores.difference(setting, base, metric) for metric in METRICS]
    if found[0] is None:
        return ["0", "not run", "", ""]
    return [f"{len(found[0])}", *("-" if each is None else interval(estimate(each)) for each in found)]


def interval(found: Estimate) -> str:
    """ "+1.9 ± 0.8", bold where it leaves out 0, marked where it is over seeds alone; of one seed the mean alone."""
    if math.isinf(found.half):
        return f"{found.mean:+.1f} (one seed)"
    text = f"{found.mean:+.1f} ± {found.half:.1f}"
    return (f"**{text}**" if found.is_clear else text) + ("" if found.by_picture else SEEDS_ALONE)


def _seeds(scores: Scores, setting: Setting, base: Setting) -> str:
    matrix = scores.difference(setting, base, "CIDEr")
    if matrix is None or len(matrix) < 3:
        return "-"
    return f"{seeds_needed(seed_spread(matrix), difference=WANTED_DIFFERENCE)}"


def _networks(scores: Scores, painter: str) -> list[str]:
    base = Setting(painter)
    title = f"### Base, mix-up, CXE and both: {painter} painter"
    if not any(scores.results.get(Setting(painter, network=network)) for network in NETWORKS):
        return [title, "", "Not run.", ""]
    lines = [
        title,
        "",
        "| network | seeds | CIDEr | CIDEr over the base | noun recall over the base | of recognised nouns | paper |",
        "|---" * 7 + "|",
    ]
    for network in NETWORKS:
        setting = Setting(painter, network=network)
        changes = ["", "", ""] if setting == base else _change(scores, setting, base)[1:]
        paper = f"{PAPER_NETWORKS[network]:+.1f}" if network in PAPER_NETWORKS else ""
        lines.append(
            f"| {network} | {scores.count(setting)} | {_plain(scores.matrix(setting, 'CIDEr'))} | "
            + " | ".join(changes)
            + f" | {paper} |"
        )
    return [*lines, ""]


def _refined(scores: Scores, painter: str) -> list[str]:
    title = f"### Better data: {painter} painter"
    if not any(setting.painter == painter and setting.data != DRAWN for setting in scores.results):
        return [title, "", f"Not run: {'; '.join(_steps_of(scores, painter))}.", ""]
    lines = [
        title,
        "",
        "Over the same network on the pictures as drawn. Per 1,000: CIDEr gained for each 1,000 pictures that are "
        "drawn for it beyond the first of each caption. The paper's figures are those of SynC, COCO, ViT-B/32.",
        "",
        "| data | network | seeds | CIDEr | CIDEr gained | noun recall gained | of recognised | per 1,000 | paper |",
        "|---" * 9 + "|",
    ]
    for data in _steps_of(scores, painter):
        for network in ("base", PCM_NET):
            setting, base = Setting(painter, data, network), Setting(painter, DRAWN, network)
            if setting not in scores.wanted:
                continue
            seeds, *changes = _change(scores, setting, base)
            paper = f"{PAPER_DATA[data]:+.1f}" if data in PAPER_DATA and network == PCM_NET else ""
            lines.append(
                f"| {data} | {network} | {seeds} | {_plain(scores.matrix(setting, 'CIDEr'))} | "
                + " | ".join(changes)
                + f" | {_per_picture(scores, setting, base)} | {paper} |"
            )
    return [*lines, ""]


def _per_picture(scores: Scores, setting: Setting, base: Setting) -> str:
    drawn = CAPTIONS * _drawn(setting.data)
    matrix = scores.difference(setting, base, "CIDEr")
    if matrix is None:
        return ""
    return "none drawn" if not drawn else interval(estimate(matrix * 1000 / drawn))


def _dissection(out: Path, scores: Scores, painter: str) -> list[str]:
    if not is_made(out, painter, DRAWN) and known_figures(out, f"{painter}/dissection.json") is None:
        return []
    found = training_figures(out, painter)
    things = found["patches"]["things"]
    lines = [
        f"### Dissection: {painter} painter",
        "",
        f"The weight of eq. 11 is {found['weight_right']:.3f} on average for right pairs and "
        f"{found['weight_wrong']:.3f} for wrong ones (standard deviation of all "
        f"{found['weight_std']:.3f}). Of the things that the independent classifier recognises, "
        f"{_percent(things, 'recognised', 'a_patch_says_its_name')} get a mixed-up patch with "
        f"their own name and {_percent(things, 'recognised', 'a_patch_says_another_things_name')} one with another's; "
        f"of those that it does not, {_percent(things, 'not recognised', 'a_patch_says_its_name')} and "
        f"{_percent(things, 'not recognised', 'a_patch_says_another_things_name')}.",
        "",
        "CIDEr gained by the number of kinds of things in the test picture:",
        "",
        "| against the base | seeds | one | two | three |",
        "|---" * 5 + "|",
    ]
    for network in list(NETWORKS)[1:]:
        difference = scores.difference(Setting(painter, network=network), Setting(painter), "CIDEr")
        if difference is None:
            lines.append(f"| {network} | 0 | not run | | |")
            continue
        if difference.shape[1] == 1:
            lines.append(f"| {network} | {len(difference)} | not kept | | |")
            continue
        parts = by_kinds(difference, scores.test.nouns)
        cells = [interval(estimate(parts[count])) for count in sorted(parts)]
        lines.append(f"| {network} | {len(difference)} | " + " | ".join(cells) + " |")
    return [*lines, "", *_retrievers(out, painter)]


def _retrievers(out: Path, painter: str) -> list[str]:
    found = kept_figures(out, painter)
    if found is None:
        return []
    lines = [
        "SynC by what finds the pictures. The second classifier sees the nouns and the place of a picture; it has "
        "learned from other scenes than the one that judges. Wrong pairs: by their things, and by their place.",
        "",
        "| pictures found by | right of the 15 candidates | wrong pairs before | after | wrong places before | after "
        "| captions moved | pictures |",
        "|---" * 8 + "|",
    ]
    wrong = ("wrong_before", "wrong_after", "wrong_places_before", "wrong_places_after")
    for name, each in found.items():
        shares = (each[key] for key in ("right_among_candidates", *wrong, "moved"))
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + f" | {each['pictures']} |"
        )
    return [*lines, ""]


def _percent(things: Mapping[str, Any], fate: str, what: str) -> str:
    share = things[fate][what]
    return "-" if share is None else f"{100 * share:.0f} %"
