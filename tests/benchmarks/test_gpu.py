"""The benchmark for GPUs: that a bare machine with torch can run it, and that it reports all its parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT


def test_it_needs_torch_alone() -> None:
    code = (
        "import sys, benchmarks.gpu; names = ('ray', 'pyarrow', 'fsspec', 'PIL', 'transformers', 'diffusers', "
        "'open_clip', 'safetensors', 'pycocoevalcap'); print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_it_measures_all_its_parts_and_leaves_out_by_name_what_is_over_its_budget() -> None:
    def run(budget: int) -> dict:
        command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--size=tiny", f"--budget={budget}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    whole = run(300)
    parts = [name for name, value in whole.items() if isinstance(value, dict)]
    assert len(parts) == 11 and whole["left_out"] == []
    assert not any("failed" in whole[name] for name in parts)
    assert whole["same_numbers"]["captions_equal"] == 1.0
    nothing = run(-1)
    assert set(nothing["left_out"]) == {"matmul_gflops", *parts}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_the_gpu_only_where_a_beam_search_looks_whether_it_has_ended() -> None:
    from benchmarks.gpu import TINY, Report

    waits = Report(device="cuda", config=TINY, batches=(4, 8), budget=600).host_waits()
    assert waits["training_step"] == 0
    assert 0 < waits["beam_search"] <= TINY.max_length + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_drawing_waits_for_the_gpu_as_often_for_eight_pictures_as_for_one(tmp_path: Path) -> None:
    """Once for a batch's pixels and once for their statistics; the rest is the scheduler's, a few a step."""
    from benchmarks.diffusion import host_waits, save_stable_diffusion

    folder = save_stable_diffusion(tmp_path / "t2i", size="tiny")
    few, many, longer = (host_waits(folder, batch_size=size, steps=steps) for size, steps in ((1, 4), (8, 4), (1, 8)))
    assert few == many
    assert longer - few <= 3 * 4
