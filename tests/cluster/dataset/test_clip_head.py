"""clip_head.safetensors: the same bytes whichever process writes it."""

import json
from pathlib import Path

import safetensors.torch
import torch

from cluster.dataset.vocabularies import clip_head_bytes, features_of_head
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder


def test_the_metadata_come_in_order_and_nothing_else_changes(tiny_clip: Path, tmp_path: Path) -> None:
    encoder = ClipEncoder(str(tiny_clip))
    data = clip_head_bytes(encoder, "models/größer")
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:start])["__metadata__"]
    assert list(metadata) == sorted(metadata) and metadata["clip"] == "models/größer" and len(metadata) >= 3
    assert start % 8 == 0, "tensors are aligned"
    loaded = safetensors.torch.load(data)
    assert loaded.keys() == encoder.head().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.head().items())
    (tmp_path / "clip_head.safetensors").write_bytes(data)
    assert features_of_head(open_store(tmp_path)) == encoder.features
