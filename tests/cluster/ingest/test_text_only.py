"""Text-only training: datasets of caption embeddings, and a captioner that sees the global feature alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.dataset.documents import load_manifest, store_manifest
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.rows import read_rows
from cluster.ingest.text_only import TEXT_ONLY_SETTINGS, text_only_dataset
from cluster.store.store import open_store
from cluster.training.data.mixture import DataSource, open_training_sets
from cluster.training.request import TrainRequest
from cluster.training.train import planned_run
from pcm.captioners.pcmnet.model import PCMNet, PCMNetConfig
from pcm.clip.encoder import ClipEncoder
from pcm.errors import InputError
from tests.helpers.tiny_dataset import write_dataset

SMALL = PCMNetConfig(
    vocab_size=30, patch_dim=12, embed_dim=8, num_patches=9, num_concepts=6, hidden_size=16, num_heads=2,
    intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1, top_patches=0,
)  # fmt: skip


def test_rows_are_the_captions_and_their_embeddings(tmp_path: Path, tiny_clip: Path) -> None:
    source = open_store(write_dataset(tmp_path / "drawn", tiny_clip, rows=30))
    out, encoder = open_store(tmp_path / "text"), ClipEncoder(str(tiny_clip))
    made = text_only_dataset(source, out, encoder)
    training_set = open_training_sets([DataSource(str(tmp_path / "text"))])[0]
    for drawn_shard, text_shard in zip(load_manifest(source).stored_shards, training_set.shards, strict=True):
        drawn = read_rows(source, drawn_shard, None, made.features)
        text = read_rows(out, text_shard, None, made.features)
        assert drawn.sample_ids.tolist() == text.sample_ids.tolist()
        expected = encoder.encode_texts(drawn.captions.tolist())
        np.testing.assert_allclose(text.global_feature.astype(np.float32), expected, atol=1e-3)
        assert not text.patch_features.any()
        assert (text.clip_score == 1).all()
    run = planned_run(TrainRequest(data=str(tmp_path / "text"), out="unused", overrides=TEXT_ONLY_SETTINGS), cpus=1)
    assert not run.config.model.use_patches


def test_texts_of_a_dataset_of_gpus_are_made_and_said_where_they_were_encoded(tmp_path: Path, tiny_clip: Path) -> None:
    source = open_store(write_dataset(tmp_path / "drawn", tiny_clip, rows=20))
    drawn = load_manifest(source)
    on_gpus = dataclasses.replace(drawn.spec, clip=dataclasses.replace(drawn.spec.clip, device="cuda"))
    store_manifest(source, dataclasses.replace(drawn, spec=on_gpus))
    made = text_only_dataset(source, open_store(tmp_path / "text"), ClipEncoder(str(tiny_clip), device="cpu"))
    (environment,) = made.environments
    assert environment["gpu"] is None and environment["instructions"] and "cuda" not in made.versions


def test_a_finished_text_only_dataset_is_found_unless_its_source_has_changed(tmp_path: Path, tiny_clip: Path) -> None:
    source, out = open_store(write_dataset(tmp_path / "drawn", tiny_clip, rows=20)), open_store(tmp_path / "text")
    encoder = ClipEncoder(str(tiny_clip))
    text_only_dataset(source, out, encoder)
    before = out.read_bytes(MANIFEST_KEY)
    out.delete("shards/part-000000.parquet")
    text_only_dataset(source, out, encoder)
    assert not out.exists("shards/part-000000.parquet")  # nothing was made again
    source = open_store(write_dataset(tmp_path / "drawn", tiny_clip, rows=24))
    assert text_only_dataset(source, out, encoder).stored == 24
    assert out.read_bytes(MANIFEST_KEY) != before


@pytest.mark.parametrize("use_patches", [True, False])
def test_hidden_patches_change_no_caption(use_patches: bool) -> None:
    torch.manual_seed(0)
    model = PCMNet(dataclasses.replace(SMALL, use_patches=use_patches)).eval()
    model.set_concepts(torch.randn(6, 8))
    token_ids = torch.randint(0, 30, (2, 5))
    global_feature = torch.randn(2, 8)
    logits = [model(global_feature, torch.randn(2, 9, 12), token_ids) for _ in range(2)]
    assert torch.equal(*logits) == (not use_patches)
    assert not torch.equal(logits[0], model(torch.randn(2, 8), torch.zeros(2, 9, 12), token_ids))


def test_hidden_patches_cannot_be_mixed_up() -> None:
    with pytest.raises(InputError, match="use_patches"):
        dataclasses.replace(SMALL, use_patches=False, top_patches=5)
