"""CXE, the CLIP-weighted cross-entropy (arXiv 2501.00437, eq. 11), with the focal factor of the published runs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pcm.captioners.pcmnet.loss_settings import LossSettings


class LogLikelihoods(torch.autograd.Function):
    """For each row of logits: the log-probability of the target, and the mean log-probability of all V words.

    These two numbers are all that label smoothing needs, so neither the log-softmax nor the smoothed target (both as
    large as the logits) is ever built: with d and e their incoming gradients, the gradient of the logits is
    d * onehot + e / V - (d + e) * softmax.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` (n, V) of any float type, `targets` (n,) in 0..V-1 -> two float32 tensors (n,)."""
        scores = logits.float()
        log_normaliser = scores.logsumexp(dim=-1)  # (n,)
        target_score = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, targets, log_normaliser)
        return target_score - log_normaliser, scores.mean(dim=-1) - log_normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_target: Tensor, grad_mean: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_normaliser = ctx.saved_tensors
        grad = (logits.float() - log_normaliser.unsqueeze(1)).exp_()  # softmax
        grad.mul_(-(grad_target + grad_mean).unsqueeze(1)).add_((grad_mean / grad.shape[1]).unsqueeze(1))
        grad.scatter_add_(1, targets.unsqueeze(1), grad_target.unsqueeze(1))
        return grad.to(logits.dtype), None


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
        batch, length, vocab_size = logits.shape
        valid = target_ids >= 0  # (B, T)
        log_p, mean_log_p = LogLikelihoods.apply(logits.reshape(-1, vocab_size), target_ids.clamp_min(0).reshape(-1))
        log_p, mean_log_p = log_p.view(batch, length), mean_log_p.view(batch, length)

        confidence = 1.0 - self.label_smoothing
        other = self.label_smoothing / (vocab_size - 1)
        entropy_term = confidence * math.log(confidence)
        if other > 0:
            entropy_term += self.label_smoothing * math.log(other)
        divergence = entropy_term - (confidence - other) * log_p - other * vocab_size * mean_log_p
        weight = (self.clip_weight * clip_score.float()).clamp(0.0, 1.0).unsqueeze(1)  # (B, 1): c_I

        focal = (-torch.expm1(log_p)).pow(self.focal_gamma) if self.focal_mode != "off" else torch.ones_like(log_p)
        return (divergence * weight).masked_fill(~valid, 0.0), focal.masked_fill(~valid, 0.0), valid
