"""The published COCO ViT-L/14 size: the model, random features for it, and pictures that it can learn to caption."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.captioners.pcmnet.model import PCMNet, PCMNetConfig
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

BATCH = 32


def published_model(config: PCMNetConfig | None = None, *, device: str, seed: int = 0) -> PCMNet:
    """PCM-Net of random weights, by default with every default of PCMNetConfig: 512 wide, 8 heads, 3 + 3 layers,
    10,200 words, 64 patches of 1024."""
    torch.manual_seed(seed)
    config = config or PCMNetConfig()
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


class WordPictures:
    """Pictures whose patches each show a word of their caption: what it takes to learn captions of real length.

    Every word of the vocabulary has one random patch feature (D_v,) and one random global feature (D,); patches go
    through the caption's words again and again, the global feature is the mean of theirs.
    """

    def __init__(self, captions: Sequence[str], config: PCMNetConfig, *, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = Vocabulary.build(captions)
        if len(vocabulary) > config.vocab_size:
            raise ValueError(f"{len(vocabulary)} words: the published size has room for {config.vocab_size}")
        encoded = [vocabulary.encode(caption, config.max_length) for caption in captions]
        self.token_ids = torch.stack([torch.from_numpy(tokens) for tokens, _ in encoded])  # (n, T)
        self.target_ids = torch.stack([torch.from_numpy(targets) for _, targets in encoded])  # (n, T)
        self._patches = torch.randn(config.vocab_size, config.patch_dim, generator=generator)
        self._globals = torch.randn(config.vocab_size, config.embed_dim, generator=generator)
        self._num_patches = config.num_patches

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        words = [self.token_ids[row][self.token_ids[row] > 0] for row in rows]
        shown = torch.stack([ids.repeat(self._num_patches)[: self._num_patches] for ids in words])  # (B, N)
        targets = self.target_ids[list(rows)]
        length = int((targets >= 0).sum(dim=1).max())
        return {
            "global_feature": torch.stack([self._globals[ids].mean(dim=0) for ids in words]),
            "patch_features": self._patches[shown],
            "token_ids": self.token_ids[list(rows)][:, :length],
            "target_ids": targets[:, :length],
            "clip_score": torch.full((len(words),), 0.3),
        }


def train(model: PCMNet, pictures: WordPictures, *, rows: int, steps: int, lr: float = 3e-4, seed: int = 0) -> None:
    """Teach the model on the CPU to say what the first `rows` pictures show."""
    criterion = CLIPWeightedCrossEntropy()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50)
        batch = pictures.batch(torch.randint(rows, (BATCH,), generator=generator).tolist())
        logits = model(batch["global_feature"], batch["patch_features"], batch["token_ids"])
        loss = criterion(logits, batch["target_ids"], batch["clip_score"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("step %d of %d: loss %.3f", step + 1, steps, float(loss.detach()))
    model.eval()
