"""What a report is made of: a sample of the shards, times, and which patches are shown."""

import shlex
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.report.dataset_facts import sample_shards
from cluster.report.headline import Facts, headline
from cluster.report.make import command
from cluster.report.request import ReportRequest
from cluster.report.throughput import throughput
from jobs.report import JOB
from pcm.captioners.pcmnet.mixup import MixUpFindings
from pcm.captioners.pcmnet.patch_overlay import textual_patches
from tests.helpers.tiny_generation import null_spec


def test_a_sample_of_shards_is_drawn_by_the_seed_and_bounded() -> None:
    rows = [0, 100, 100, 0, *[100] * 5_000]
    chosen = sample_shards(rows, seed=3, most=10, most_rows=750)
    assert chosen == sample_shards(rows, seed=3, most=10, most_rows=750) == sorted(chosen)
    assert len(chosen) == 7 and all(rows[place] for place in chosen)
    assert chosen != sample_shards(rows, seed=4, most=10, most_rows=750)
    assert len(sample_shards([10**6] * 3, seed=0)) == 1 and sample_shards([0, 0], seed=0) == []
    assert sample_shards([5, 0, 5], seed=9) == [0, 2]


def test_the_command_of_a_report_asks_for_the_same_again() -> None:
    least = ReportRequest(data="out/my data; touch pwned", out="$(id).html")
    assert command(least) == "python -m jobs.report --data 'out/my data; touch pwned' --out '$(id).html'"
    other = replace(
        least, unfinished=True, run="r", evaluation="e", sweep="s", images="-i", references="it's", split="test",
        title="A & B", price_per_hour=1.5, seed=3, clip="ViT-B-32/openai", device="cpu",
    )  # fmt: skip
    assert all(value != asdict(least)[name] for name, value in asdict(other).items() if name not in ("data", "out"))
    for request in (least, other):
        words = shlex.split(command(request))
        assert words[:3] == ["python", "-m", "jobs.report"] and JOB.read(words[3:]) == request


@pytest.mark.parametrize(
    ("each", "extent", "said"),
    [
        (1, "", "96 captions became 90 pictures, drawn by"),
        (4, "", "24 captions became 90 pictures, drawn by"),
        (4, "3 of 9 shards", "96 samples, 4 a caption, became 90 pictures, drawn by"),
    ],
)
def test_the_headline_counts_captions_and_not_their_pictures(each: int, extent: str, said: str) -> None:
    manifest = SimpleNamespace(
        spec=replace(null_spec(), images_per_caption=each), expected=96, stored=90, quarantined=6, clip_score_mean=None,
        lineage=None,
    )  # fmt: skip
    data: Any = SimpleNamespace(manifest=manifest, scored=False, drawn_here=True, extent=extent)
    facts = Facts(
        data=data, gallery=None, left_out={}, speed=None, run=None, evaluation=None, captions=None, sweep=None
    )
    assert headline(facts, title=None, hourly=None).lead.startswith(said)


def _shard(start: float, end: float, *, successes: int = 10, draw: float | None = None) -> dict:
    return {
        "start_time": start, "end_time": end, "successes": successes, "device_name": "a",
        "draw_seconds": end - start if draw is None else draw, "featurise_seconds": 1.0, "encode_seconds": 0.5,
    }  # fmt: skip


def test_throughput_leaves_out_the_night_between_two_runs() -> None:
    night = 8 * 3600
    stats = [_shard(1000, 1100), _shard(1100, 1200), _shard(1200 + night, 1300 + night)]
    found = throughput(stats, stored=30)
    assert found is not None and found.runs == 2
    assert found.working_seconds == pytest.approx(300) and found.images_per_second == pytest.approx(0.1)
    assert found.stored[-1] == pytest.approx(30) and (np.diff(found.stored) > 0).all()
    assert found.machine_hours[-1] == pytest.approx(300 / 3600) == found.generator_hours[-1]
    assert found.rate == pytest.approx(0.1, rel=0.05)


def test_two_generators_at_once_are_paid_twice_and_one_machine_once() -> None:
    found = throughput([_shard(0.5, 100.5), _shard(0.5, 100.5, draw=50)], stored=20)
    assert found is not None
    assert found.generator_hours[-1] == pytest.approx(150 / 3600) and found.machine_hours[-1] == pytest.approx(
        100 / 3600
    )
    assert found.rate[0] == pytest.approx(0.2, rel=0.05)


def test_a_sample_of_shards_stands_for_all_pictures() -> None:
    found = throughput([_shard(5, 15), _shard(15, 25)], stored=2_000)
    assert found is not None and found.stored[-1] == pytest.approx(2_000)
    assert found.stage_seconds["featurise"] == pytest.approx(200)


def test_statistics_without_a_time_give_no_throughput() -> None:
    assert throughput([], stored=5) is None
    assert throughput([_shard(7, 7)], stored=5) is None


def test_a_selected_patch_is_shown_once_under_the_concept_it_fits_best() -> None:
    similarity = torch.tensor([[[0.1, 0.0], [0.9, 0.8], [0.2, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]])  # (1, 6, 2)
    nothing = torch.zeros(1, 0)
    found = MixUpFindings(
        global_feature=nothing, concept_probabilities=nothing, top_concepts=torch.tensor([[7, 3]]),
        top_probabilities=torch.tensor([[0.7, 0.2]]), kept=torch.tensor([[True, False]]), concept_vectors=nothing,
        patch_embeddings=nothing, patch_concept_similarity=similarity, pair_probabilities=nothing,
        selected_pairs=torch.tensor([[2, 3, 6, 9]]), mix_mask=torch.zeros(1, 6, dtype=torch.bool),
    )  # fmt: skip
    patches = textual_patches(found, 0, columns=3)
    assert [(each.row, each.column, each.rank) for each in patches] == [(0, 1, 0), (1, 0, 0), (1, 1, None)]
    assert [round(each.similarity, 3) for each in patches] == [0.9, 0.5, 0.0]
