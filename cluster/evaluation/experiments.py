"""The experiments of the paper (arXiv 2501.00437): how each is trained and evaluated, and what the paper found.

Cross-domain experiments evaluate a captioner on the other dataset's test pictures; nothing is trained for them. The
paper's COCO test set is Karpathy's split `test` (5,000 pictures), Flickr30k's too (1,000). Beam search 3 throughout.

Figures are the paper's, in its unit (CIDEr 113.6 is 1.136 here).
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.training.config import TRAINING_PRESETS
from pcm.errors import not_known

SPLIT = "test"
#: The w with which eq. 11 weighs every pair 1, as without CXE.
_NO_CXE = 1e6


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One row of the paper's tables."""

    preset: str  # of jobs.train
    pictures: str  # COCO, Flickr30k, NoCaps: real pictures to caption
    paper: Mapping[str, float]  # metric -> figure; "CIDEr/in-domain" is that of a domain
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the preset
    note: str = ""

    @property
    def training(self) -> str:
        """What to type after `python -m jobs.train --data DATASET --out RUN`."""
        settings = (f"--set {name}={value:g}" for name, value in self.overrides.items())
        return " ".join([f"--preset {self.preset}", *settings])


def _data_share(percent: int) -> dict[str, Any]:
    """Of the captions; as many iterations as with all of them, as published, so the epochs are more: 12 / fraction."""
    if percent == 100:
        return {}
    return {"fraction": percent / 100, "epochs": 100 * TRAINING_PRESETS["coco_b32"].epochs // percent}


def _experiments() -> dict[str, Experiment]:
    def row(preset: str, pictures: str, cider: float, bleu: float) -> Experiment:
        return Experiment(preset=preset, pictures=pictures, paper={"CIDEr": cider, "Bleu_4": bleu})

    found = {
        "coco_b32": row("coco_b32", "COCO", 103.8, 31.5),
        "coco_l14": row("coco_l14", "COCO", 113.6, 33.6),
        "flickr30k_b32": row("flickr30k_b32", "Flickr30k", 61.3, 26.9),
        "flickr30k_l14": row("flickr30k_l14", "Flickr30k", 69.5, 28.5),
        "coco_to_flickr30k_b32": row("coco_b32", "Flickr30k", 45.5, 20.8),
        "coco_to_flickr30k_l14": row("coco_l14", "Flickr30k", 55.9, 23.9),
        "flickr30k_to_coco_b32": row("flickr30k_b32", "COCO", 54.9, 17.1),
        "flickr30k_to_coco_l14": row("flickr30k_l14", "COCO", 61.3, 17.9),
        "nocaps": Experiment(
            preset="coco_b32",
            pictures="NoCaps",
            paper={
                "CIDEr": 74.7,
                "CIDEr/in-domain": 66.0,
                "CIDEr/near-domain": 72.7,
                "CIDEr/out-domain": 75.7,
            },
            note="figures of PCM-ViECap, with GPT-2 as decoder, not of PCM-Net; the whole validation set",
        ),
    }
    efficiency = {10: 88.0, 20: 98.8, 40: 101.6, 60: 102.2, 80: 102.8, 100: 103.8}
    for percent, cider in efficiency.items():
        found[f"coco_b32_data{percent}"] = Experiment(
            preset="coco_b32",
            pictures="COCO",
            overrides=_data_share(percent),
            paper={"CIDEr": cider},
        )
    ablation: dict[str, tuple[dict[str, Any], float]] = {
        "base": ({"top_patches": 0, "clip_weight": _NO_CXE}, 108.9),
        "mixup": ({"clip_weight": _NO_CXE}, 111.6),
        "cxe": ({"top_patches": 0}, 112.0),
        "both": ({}, 113.6),
    }
    for name, (overrides, cider) in ablation.items():
        found[f"coco_l14_{name}"] = Experiment(
            preset="coco_l14", pictures="COCO", overrides=overrides, paper={"CIDEr": cider}
        )
    return found


EXPERIMENTS: Mapping[str, Experiment] = types.MappingProxyType(_experiments())


def experiment(name: str) -> Experiment:
    """Raises InputError for a name that is not in EXPERIMENTS."""
    if name not in EXPERIMENTS:
        raise not_known("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def comparison(name: str, metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The paper's figures and ours, in the paper's unit: {"CIDEr": {"paper": 113.6, "ours": 112.9}}."""

    def ours(metric: str) -> float | None:
        kind, _, domain = metric.partition("/")
        found = metrics.get("domains", {}).get(domain, {}) if domain else metrics
        value = found.get(kind)
        return None if value is None else round(100 * value, 1)

    return {metric: {"paper": figure, "ours": ours(metric)} for metric, figure in experiment(name).paper.items()}


def comparison_table(name: str, compared: Mapping[str, Mapping[str, float | None]]) -> str:
    """The comparison as lines to read."""
    lines = [f"{name:<24} {'paper':>7} {'ours':>7}"]
    for metric, pair in compared.items():
        mine = "-" if pair["ours"] is None else f"{pair['ours']:.1f}"
        lines.append(f"{metric:<24} {pair['paper']:>7.1f} {mine:>7}")
    if note := experiment(name).note:
        lines.append(note)
    return "\n".join(lines)


def experiments_table() -> str:
    """Every experiment: its name, what to train, what to caption, the paper's CIDEr."""
    lines = [f"{'experiment':<24} {'jobs.train':<53} {'pictures':<10} {'CIDEr':>6}"]
    for name, found in EXPERIMENTS.items():
        lines.append(f"{name:<24} {found.training:<53} {found.pictures:<10} {found.paper['CIDEr']:>6.1f}")
    lines += [f"{name}: {found.note}" for name, found in EXPERIMENTS.items() if found.note]
    return "\n".join(lines)


assert all(found.preset in TRAINING_PRESETS for found in EXPERIMENTS.values())
