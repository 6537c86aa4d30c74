"""The published loss over a batch that is spread over several workers."""

import torch
import torch.distributed
from torch import Tensor

from pcm.loss import CLIPWeightedCrossEntropy


class GlobalBatchLoss(CLIPWeightedCrossEntropy):
    """The loss of the whole global batch, on every worker; its gradient is that of this worker's rows.

    The published loss is no mean over rows (it is normalised by the words of the batch and multiplied by the batch's
    focal factor), so the mean of the workers' losses would be another loss. Here each worker takes the words' terms of
    all workers, three small tensors, as given, so that the gradients' sum over the workers is that of a single worker.
    """

    def word_terms(self, logits: Tensor, target_ids: Tensor, clip_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, focal, valid = super().word_terms(logits, target_ids, clip_score)
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return loss, focal, valid
        own = torch.stack([loss, focal, valid.to(loss.dtype)], dim=1)  # (b, 3, T)
        shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shares, own.detach())
        shares[torch.distributed.get_rank()] = own  # the only one with gradients
        loss, focal, valid = torch.cat(shares).unbind(dim=1)  # (B, T) each
        return loss, focal, valid > 0
