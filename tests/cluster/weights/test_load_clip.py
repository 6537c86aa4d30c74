"""CLIP as whoever computes with it loads it."""

from pathlib import Path

import pytest
import torch

from cluster.generation.pinning import clip_spec
from cluster.weights import load_clip as module
from cluster.weights.load_clip import load_clip
from pcm.errors import InputError
from pcm.spec import ClipSpec


@pytest.fixture
def spec(tiny_clip: Path) -> ClipSpec:
    return clip_spec(str(tiny_clip), device="cpu", dtype="float32")


def test_what_a_busy_hub_did_not_give_is_asked_for_again(spec: ClipSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [TimeoutError("the hub is busy")]
    local_clip = module.local_clip

    def busy(spec: ClipSpec) -> ClipSpec:
        if answers:
            raise answers.pop()
        return local_clip(spec)

    monkeypatch.setattr(module, "local_clip", busy)
    assert load_clip(spec).resolution == 32 and not answers


def test_a_device_without_room_is_one_line(spec: ClipSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(spec: ClipSpec) -> ClipSpec:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "local_clip", full)
    with pytest.raises(InputError, match=r"^CLIP .*: cannot be loaded on cpu \(CUDA out of memory\)"):
        load_clip(spec)
