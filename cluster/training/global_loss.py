"""The published loss over a batch that is spread over several workers, or taken in several parts."""

import torch
import torch.distributed
from torch import Tensor

from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy


class GlobalBatchLoss(CLIPWeightedCrossEntropy):
    """The loss of the whole global batch, on every worker; its gradient is that of this worker's rows.

    The published loss is no mean over rows (it is normalised by the words of the batch and multiplied by the batch's
    focal factor), so the mean of the workers' losses would be another loss. Here each worker takes the words' terms of
    all workers, three small tensors, as given, so that the gradients' sum over the workers is that of a single worker.
    A worker that takes its rows in parts does the same with its other parts: see `stacked_terms` and `part_loss`.
    """

    @property
    def couples_rows(self) -> bool:
        """Whether a row's gradient depends on the loss of other rows, not only on how many words they have."""
        return self.focal_mode == "batch"

    def word_terms(self, logits: Tensor, target_ids: Tensor, clip_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.stacked_terms(logits, target_ids, clip_score)
        shares = gathered(own)
        shares[_rank()] = own  # the only one with gradients
        return _unstacked(torch.cat(shares))

    def stacked_terms(self, logits: Tensor, target_ids: Tensor, clip_score: Tensor) -> Tensor:
        """The word terms of these rows alone, (b, 3, T)."""
        loss, focal, valid = super().word_terms(logits, target_ids, clip_score)
        return torch.stack([loss, focal, valid.to(loss.dtype)], dim=1)

    def part_loss(self, part: Tensor, everything: Tensor, first_row: int) -> Tensor:
        """The loss of `everything` (B, 3, T), terms without gradients, where the rows from `first_row` on are `part`.

        Its gradient is that of the part's rows. Unless the loss couples rows, the others' terms but for the words that
        count may be zero: then the sum of all parts' losses is the loss of the batch.
        """
        rows = [everything[:first_row], part, everything[first_row + len(part) :]]
        return self.reduce(*_unstacked(torch.cat(rows)))


def gathered(own: Tensor) -> list[Tensor]:
    """The tensors of all workers in order of rank, without gradients; all of one shape."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [own.detach()]
    shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, own.detach())
    return shares


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _unstacked(terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, focal, valid = terms.unbind(dim=1)  # (B, T) each
    return loss, focal, valid > 0
