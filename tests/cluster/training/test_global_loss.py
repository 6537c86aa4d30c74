"""The loss of a global batch does not depend on the number of workers."""

from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from cluster.training.global_loss import GlobalBatchLoss
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy


def _rank_loss(rank: int, folder: str) -> None:
    """One of two workers: loss of the global batch, and the gradient of the logits of its own half."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    inputs = torch.load(f"{folder}/inputs.pt")
    for mode in ("batch", "sentence", "word", "off"):
        logits = inputs["logits"].chunk(2)[rank].clone().requires_grad_()
        loss = GlobalBatchLoss(focal_mode=mode)(
            logits, inputs["target_ids"].chunk(2)[rank], inputs["clip_score"].chunk(2)[rank]
        )
        loss.backward()
        torch.save({"loss": loss.detach(), "grad": logits.grad}, f"{folder}/{mode}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_workers_gradients_add_up_to_that_of_the_published_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, target_ids = torch.randn(6, 5, 11), torch.randint(0, 11, (6, 5))
    for row, length in enumerate((5, 2, 3, 4, 0, 1)):  # uneven, and a padding row on the second worker
        target_ids[row, length:] = -1
    inputs = {"logits": logits, "target_ids": target_ids, "clip_score": torch.rand(6) * 0.4}
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(_rank_loss, args=(str(tmp_path),), nprocs=2)
    for mode in ("batch", "sentence", "word", "off"):
        whole = logits.clone().requires_grad_()
        loss = CLIPWeightedCrossEntropy(focal_mode=mode)(whole, target_ids, inputs["clip_score"])
        loss.backward()
        parts = [torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in range(2)]
        for part in parts:
            torch.testing.assert_close(part["loss"], loss.detach())
        torch.testing.assert_close(torch.cat([part["grad"] for part in parts]), whole.grad)
