"""The published COCO ViT-L/14 size: the model and one batch of random features for it."""

import torch
from torch import Tensor

from pcm.model import PCMNet, PCMNetConfig

BATCH = 32


def published_model(*, device: str, seed: int = 0) -> PCMNet:
    """PCM-Net with every default of PCMNetConfig: 512 wide, 8 heads, 3 + 3 layers, 10,200 words, 64 patches of 1024."""
    torch.manual_seed(seed)
    config = PCMNetConfig()
    model = PCMNet(config)
    model.set_concepts(torch.randn(config.num_concepts, config.embed_dim))
    return model.to(device)


def random_batch(config: PCMNetConfig, *, device: str, batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """Random features, and captions that fill all T positions (the worst case)."""
    torch.manual_seed(seed)
    tensors = {
        "global_feature": torch.randn(batch, config.embed_dim),
        "patch_features": torch.randn(batch, config.num_patches, config.patch_dim),
        "token_ids": torch.randint(1, config.vocab_size, (batch, config.max_length)),
        "target_ids": torch.randint(0, config.vocab_size, (batch, config.max_length)),
        "clip_score": torch.rand(batch) * 0.4,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}
