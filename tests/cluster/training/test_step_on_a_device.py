"""A training step stays on its device: nothing of the host takes part, and nothing is waited for."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.training.config import TrainConfig
from cluster.training.data.batches import Batch
from cluster.training.step import TrainStep
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.model import PCMNet
from tests.helpers.device_watch import DeviceWatch

SIZES = PCMNetConfig(
    vocab_size=200, patch_dim=32, embed_dim=16, num_patches=9, num_concepts=10, max_length=6, hidden_size=32,
    num_heads=2, intermediate_size=64, num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
ROWS = 4


@pytest.fixture(autouse=True)
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has none there; everything is computed in float32 here anyway."""
    autocast = torch.autocast

    def on_real_devices(device_type: str, **settings: Any) -> AbstractContextManager:
        return nullcontext() if device_type == "meta" else autocast(device_type, **settings)

    monkeypatch.setattr(torch, "autocast", on_real_devices)


@pytest.mark.parametrize("settings", [{}, {"grad_accumulation": 2}, {"feature_dtype": "int8"}, {"clip_value": 0.0}])
def test_a_step_neither_waits_nor_takes_tensors_of_the_host(settings: dict) -> None:
    config = replace(TrainConfig(model=SIZES, batch_size=ROWS), **settings)
    model = PCMNet(SIZES)
    model.set_concepts(torch.randn(SIZES.num_concepts, SIZES.embed_dim))
    model.to("meta")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    step = TrainStep(
        model, model, optimizer, config, rank=0, num_workers=1, device=torch.device("meta"), bfloat16=False
    )
    int8 = config.feature_dtype == "int8"
    batch = Batch(
        epoch=0,
        step=0,
        last=False,
        sample_ids=("",) * ROWS,
        shards=("",) * ROWS,
        global_feature=np.zeros((ROWS, SIZES.embed_dim), np.float16),
        patch_features=np.zeros((ROWS, SIZES.num_patches, SIZES.patch_dim), np.int8 if int8 else np.float16),
        patch_scale=np.ones((ROWS, SIZES.patch_dim if int8 else 0), np.float16),
        clip_score=np.ones(ROWS, np.float32),
        token_ids=np.ones((ROWS, SIZES.max_length), np.int64),
        target_ids=np.ones((ROWS, SIZES.max_length), np.int64),
    )
    with DeviceWatch() as watch:
        loss, _ = step(batch, 0)
    assert loss.is_meta
    assert watch.stray == []


def test_the_watch_sees_a_tensor_of_the_host_and_a_copy_to_it() -> None:
    device, host = torch.zeros(3, device="meta"), torch.zeros(3)
    with DeviceWatch() as watch:
        table = torch.zeros(3, 2, device="meta")
        torch.nn.functional.embedding(host.long(), table)
    assert watch.stray
    with pytest.raises((RuntimeError, NotImplementedError)), DeviceWatch():
        device.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)), DeviceWatch():
        device.cpu()
