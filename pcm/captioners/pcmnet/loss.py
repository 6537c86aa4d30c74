"""CXE, the CLIP-weighted cross-entropy (arXiv 2501.00437, eq. 11), with the focal factor of the published runs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcm.captioners.pcmnet.loss_settings import LossSettings


class CLIPWeightedCrossEntropy(nn.Module):
    """Eq. 11: c_I = min(1, w * cos(g_I, g_S)) times the label-smoothed cross-entropy of each word, averaged over words.

    clip_weight: w; 4.0 for ViT-L/14 and 2.5 for ViT-B/32 in the paper. Pictures that match their caption badly count
        less; the average still divides by the number of words, not by the sum of the weights.
    label_smoothing: epsilon; every other word gets epsilon / (V - 1). The value is the KL divergence (the entropy of
        the smoothed target is subtracted), so a perfect model reaches 0.
    focal_mode: not in the paper but on in its published runs ("batch", gamma 2): easier words count less, by
        f = (1 - p_target)^gamma, through which gradients flow. "batch": mean(loss) * mean(f) over the batch's words;
        "sentence": sum_s (sum loss)(sum f) / sum_s n_s^2 over sentences s; "word": mean(loss * f); "off": mean(loss).
    focal_gamma: gamma, at least 1.
    """

    def __init__(
        self,
        clip_weight: float = LossSettings.clip_weight,
        label_smoothing: float = LossSettings.label_smoothing,
        focal_gamma: float = LossSettings.focal_gamma,
        focal_mode: str = LossSettings.focal_mode,
    ):
        super().__init__()
        LossSettings(
            clip_weight=clip_weight,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
            focal_mode=focal_mode,
        )  # checks them
        self.clip_weight = clip_weight
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.focal_mode = focal_mode

    def forward(self, logits: Tensor, target_ids: Tensor, clip_score: Tensor) -> Tensor:
        """`logits` (B, T, V), `target_ids` (B, T) padded with -1, `clip_score` (B,) the raw cosine -> scalar, float32.

        A batch without any word gives 0. The inputs are not changed.
        """
        return self.reduce(*self.word_terms(logits, target_ids, clip_score))

    def reduce(self, loss: Tensor, focal: Tensor, valid: Tensor) -> Tensor:
        """The loss of a batch from its `word_terms`, (B, T) each."""
        words = valid.sum().clamp_min(1)
        if self.focal_mode == "off":
            return loss.sum() / words
        if self.focal_mode == "word":
            return (loss * focal).sum() / words
        if self.focal_mode == "batch":
            return (loss.sum() / words) * (focal.sum() / words)
        pairs = valid.sum(dim=1).square().sum().clamp_min(1)
        return (loss.sum(dim=1) * focal.sum(dim=1)).sum() / pairs

    def word_terms(self, logits: Tensor, target_ids: Tensor, clip_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss is made of, word by word, (B, T) each: weighted loss, focal factor f, which words count.

        The first two are 0 where there is no word.
        """
        vocab_size = logits.shape[-1]
        valid = target_ids >= 0  # (B, T)
        log_probs = F.log_softmax(logits.float(), dim=-1)  # (B, T, V)
        log_p = log_probs.gather(-1, target_ids.clamp_min(0).unsqueeze(-1)).squeeze(-1)  # (B, T): of the target
        mean_log_p = log_probs.mean(dim=-1)  # (B, T): all that label smoothing needs of the other words

        confidence = 1.0 - self.label_smoothing
        other = self.label_smoothing / (vocab_size - 1)
        entropy_term = confidence * math.log(confidence)
        if other > 0:
            entropy_term += self.label_smoothing * math.log(other)
        divergence = entropy_term - (confidence - other) * log_p - other * vocab_size * mean_log_p
        weight = (self.clip_weight * clip_score.float()).clamp(0.0, 1.0).unsqueeze(1)  # (B, 1): c_I

        focal = (-torch.expm1(log_p)).pow(self.focal_gamma) if self.focal_mode != "off" else torch.ones_like(log_p)
        return (divergence * weight).masked_fill(~valid, 0.0), focal.masked_fill(~valid, 0.0), valid
