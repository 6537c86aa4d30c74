"""Pictures become bytes on the device, and the same bytes as on the host."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pcm.generation.pipeline_call import call_pipeline
from pcm.generation.pipeline_loading import load_pipeline
from pcm.generation.pixels import as_floats, to_host
from pcm.images import to_uint8
from tests.helpers.tiny_pipelines import save_pipeline
from tests.pcm.generation.test_diffusers_pipeline import spec_of


def test_bytes_are_rounded_as_on_the_host() -> None:
    halves = (torch.arange(256).float() + 0.5) / 255
    images = torch.cat([halves, torch.rand(3 * 20 * 30 - 256)]).reshape(1, 3, 20, 30) * 1.2 - 0.1
    assert np.array_equal(to_host(images), to_uint8(as_floats(images)))
    assert to_host(images).shape == (1, 20, 30, 3)
    assert np.array_equal(to_host(images.bfloat16()), to_uint8(as_floats(images.bfloat16())))
    assert to_host(torch.full((1, 3, 2, 2), float("nan"))).max() == 0


@pytest.mark.parametrize("family", ["sd15", pytest.param("kandinsky3", marks=pytest.mark.slow)])
def test_a_pipelines_tensors_are_the_arrays_that_it_gives_otherwise(family: str, tmp_path: Path) -> None:
    spec = spec_of(save_pipeline(family, tmp_path / family), width=32, height=32)
    pipeline = load_pipeline(spec)
    tensors, _ = call_pipeline(pipeline, spec, ["a cat", "rain"], [1, 2])
    arrays = pipeline(
        prompt=["a cat", "rain"], generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], width=32,
        height=32, num_inference_steps=2, guidance_scale=2.0, output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(as_floats(tensors), arrays)
