"""Beam search and greedy decoding with the published semantics, without the published cost.

What is computed once instead of every step: the memory's keys and values, and those of past words. The hypotheses of an
image share both: past words lie in one pool for an image, and a mask tells which of them each hypothesis descends from.
Images whose result stands leave the batch: hypotheses only lose score as they grow, so an ended one that leads can not
be overtaken. None of this changes a result.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pcm.captioners.interface import Decoded
from pcm.captioners.pcmnet.config import BEAM_SIZE
from pcm.captioners.pcmnet.model import Encoded, PCMNet
from pcm.captioners.pcmnet.transformer import DecoderBlock
from pcm.errors import InputError

#: Id of BOS, EOS and padding alike.
BOS = EOS = 0

#: Score of extending an ended hypothesis by anything but padding, as published.
_ENDED = -999.0
#: A word's log-probability is at most 0 but for rounding, which in T words comes to far less than this.
_ROUNDING = 1e-3
#: Asking whether images have ended makes a GPU wait for its queue, so it is asked every so many steps there.
_STEPS_BETWEEN_CHECKS = 4
#: Ended images are taken out of the batch once they are this share of it: shrinking copies the caches.
_SHRINK_SHARE = 0.25


class _Decoder:
    """The decoder's state for W hypotheses of each image: caches of keys and values, moved on word by word."""

    def __init__(self, model: PCMNet, encoded: Encoded, *, beam_size: int, max_length: int):
        self.word_embedding = model.word_embedding
        self.blocks = [cast(DecoderBlock, block) for block in model.decoder]
        self.output = model.output
        self.beam_size = beam_size
        self.memory_mask = None if encoded.mask is None else encoded.mask[:, None, None, :]  # (B, 1, 1, S)
        self.cross_caches = [
            (keys.contiguous(), values.contiguous())
            for keys, values in (block.cross_attention.keys_values(encoded.memory) for block in self.blocks)
        ]
        keys = self.cross_caches[0][0]  # (B, heads, S, d)
        pool = (keys.shape[0], keys.shape[1], max_length * beam_size, keys.shape[3])
        self.self_caches = [(keys.new_zeros(pool), keys.new_zeros(pool)) for _ in self.blocks]
        # (B, W, T*W): word slot t*W + w belongs to hypothesis w as it stood at step t.
        self.ancestors = torch.zeros(
            keys.shape[0], beam_size, max_length * beam_size, dtype=torch.bool, device=keys.device
        )

    def best_words(self, words: Tensor, step: int, *, count: int) -> tuple[Tensor, Tensor]:
        """Feed the words of this step, (B, w) with w = 1 or W; returns the `count` most probable next words of each
        hypothesis, best first, (B, w, count), and their log-probabilities.
        """
        logits = self.logits(words, step)
        best, ids = logits.topk(count, dim=-1)
        return ids, best - logits.logsumexp(dim=-1, keepdim=True)

    def logits(self, words: Tensor, step: int) -> Tensor:
        """Feed the words of this step, (B, w); float32 logits of the next ones, (B, w, V)."""
        width = words.shape[1]
        slot = step * self.beam_size
        own = torch.eye(width, dtype=torch.bool, device=words.device)
        self.ancestors[:, :width, slot : slot + width] = own
        mask = self.ancestors[:, None, :width, : slot + self.beam_size]  # (B, 1, w, (step + 1) * W)
        x = self.word_embedding(words, step=step)  # (B, w, H)
        for block, self_cache, cross_cache in zip(self.blocks, self.self_caches, self.cross_caches, strict=True):
            x = block.step(
                x,
                self_cache=self_cache,
                slot=slot,
                self_mask=mask,
                cross_cache=cross_cache,
                memory_mask=self.memory_mask,
            )
        return self.output(x).float()  # (B, w, V)

    def follow(self, parents: Tensor) -> None:
        """Hypothesis w now continues hypothesis parents[:, w], (B, W)."""
        self.ancestors = self.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.ancestors.shape[-1]))

    def keep(self, rows: Tensor) -> None:
        """Go on with these images only."""
        self.cross_caches = [(keys[rows], values[rows]) for keys, values in self.cross_caches]
        self.self_caches = [(keys[rows], values[rows]) for keys, values in self.self_caches]
        self.ancestors = self.ancestors[rows]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[rows]


class _Ensemble:
    """Several networks' decoders as one: a word's probability is the mean of theirs."""

    def __init__(self, decoders: Sequence[_Decoder]):
        self._decoders = decoders

    def best_words(self, words: Tensor, step: int, *, count: int) -> tuple[Tensor, Tensor]:
        log_probs = torch.stack([decoder.logits(words, step).log_softmax(dim=-1) for decoder in self._decoders])
        mean = log_probs.logsumexp(dim=0) - math.log(len(self._decoders))  # (B, w, V)
        best, ids = mean.topk(count, dim=-1)
        return ids, best

    def follow(self, parents: Tensor) -> None:
        for decoder in self._decoders:
            decoder.follow(parents)

    def keep(self, rows: Tensor) -> None:
        for decoder in self._decoders:
            decoder.keep(rows)


def _decoder(
    models: Sequence[PCMNet], global_feature: Tensor, patch_features: Tensor, *, beam_size: int, max_length: int
) -> _Decoder | _Ensemble:
    decoders = [
        _Decoder(model, model.encode(global_feature, patch_features), beam_size=beam_size, max_length=max_length)
        for model in models
    ]
    return decoders[0] if len(decoders) == 1 else _Ensemble(decoders)


@torch.no_grad()
def beam_search(
    model: PCMNet,
    global_feature: Tensor,
    patch_features: Tensor,
    *,
    beam_size: int = BEAM_SIZE,
    max_length: int | None = None,
    out_size: int = 1,
    others: Sequence[PCMNet] = (),
) -> Decoded:
    """The `out_size` best captions of each picture, `global_feature` (B, D) and `patch_features` (B, N, D_v).

    A hypothesis' score is the sum of its words' log-probabilities: no length penalty, no word is forbidden. An ended
    one keeps its score in column 0 and gets -999 elsewhere. `beam_size` 1 is greedy_search. `max_length`: T, by default
    the model's. `others`: more networks of the same vocabulary and features; a word's probability is then the mean of
    all theirs.

    Raises InputError for a beam that does not fit, or a model in training mode.
    """
    max_length = _checked_length((model, *others), max_length)
    if not 1 <= out_size <= beam_size <= model.config.vocab_size:
        raise InputError(
            f"beam_size {beam_size}, out_size {out_size}: need 1 <= out_size <= beam_size <= {model.config.vocab_size}"
        )
    if beam_size == 1:
        return greedy_search(model, global_feature, patch_features, max_length=max_length, others=others)
    models = (model, *others)
    decoder = _decoder(models, global_feature, patch_features, beam_size=beam_size, max_length=max_length)
    batch, device = len(global_feature), global_feature.device

    result = Decoded(
        token_ids=torch.zeros(batch, beam_size, max_length, dtype=torch.long, device=device),
        log_probs=torch.zeros(batch, beam_size, max_length, device=device),
    )
    rows = torch.arange(batch, device=device)  # the pictures still searched; the tensors below are theirs
    token_ids, log_probs = result.token_ids, result.log_probs
    words = torch.full((batch, 1), BOS, device=device)  # (B, 1), then (B, W)
    scores = torch.zeros(batch, 1, device=device)
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    padding = torch.arange(beam_size, device=device)  # extensions of an ended hypothesis: 0, then the first other words

    for step in range(max_length):
        # No hypothesis can give more than W of the W best extensions: (B, w, W) candidates hold them all.
        next_words, next_log_probs = decoder.best_words(words, step, count=beam_size)
        after_end = ended.unsqueeze(-1)
        next_words = torch.where(after_end, padding, next_words)
        candidates = scores.unsqueeze(-1) + torch.where(after_end, 0.0, next_log_probs)
        candidates[:, :, 1:].masked_fill_(after_end, _ENDED)
        scores, chosen = candidates.flatten(1).topk(beam_size, dim=-1)  # (B, W), best first
        parents = chosen // beam_size
        words = next_words.flatten(1).gather(1, chosen)

        ended = ended.gather(1, parents)
        added = next_log_probs.flatten(1).gather(1, chosen).masked_fill(ended, 0.0)
        history = parents.unsqueeze(-1).expand(-1, -1, max_length)
        token_ids, log_probs = token_ids.gather(1, history), log_probs.gather(1, history)
        token_ids[:, :, step], log_probs[:, :, step] = words, added
        ended = ended | (words == EOS)
        decoder.follow(parents)

        if device.type == "cpu" or (step + 1) % _STEPS_BETWEEN_CHECKS == 0:
            going = ~_settled(scores, ended, out_size)  # (B,)
            remaining = int(going.sum())
            if remaining == 0:
                break
            if len(going) - remaining >= _SHRINK_SHARE * len(going):
                result.token_ids[rows], result.log_probs[rows] = token_ids, log_probs
                kept = going.nonzero().squeeze(1)
                decoder.keep(kept)
                rows, token_ids, log_probs = rows[kept], token_ids[kept], log_probs[kept]
                words, scores, ended = words[kept], scores[kept], ended[kept]

    result.token_ids[rows], result.log_probs[rows] = token_ids, log_probs
    if out_size == 1:
        return Decoded(result.token_ids[:, 0], result.log_probs[:, 0])
    return Decoded(result.token_ids[:, :out_size], result.log_probs[:, :out_size])


def _settled(scores: Tensor, ended: Tensor, out_size: int) -> Tensor:
    """Whether the first `out_size` hypotheses of each image, (B, W) best first, are the result, (B,) boolean.

    They are once they have ended, unless one scores below the -999 of a fresh word, and the others have ended too or
    are behind.
    """
    over = ended & (scores > _ENDED)  # (B, W)
    if out_size == scores.shape[1]:
        return over.all(dim=1)
    ahead = scores[:, out_size - 1] > scores[:, out_size] + _ROUNDING
    return over.all(dim=1) | (over[:, :out_size].all(dim=1) & ahead)


@torch.no_grad()
def greedy_search(
    model: PCMNet,
    global_feature: Tensor,
    patch_features: Tensor,
    *,
    max_length: int | None = None,
    others: Sequence[PCMNet] = (),
) -> Decoded:
    """The most probable word at every step; arguments as in beam_search, results (B, T).

    As published, log_probs holds the arg-max's log-probability even after a caption has ended, until all have.
    """
    models = (model, *others)
    max_length = _checked_length(models, max_length)
    decoder = _decoder(models, global_feature, patch_features, beam_size=1, max_length=max_length)
    batch, device = len(global_feature), global_feature.device
    token_ids = torch.zeros(batch, max_length, dtype=torch.long, device=device)
    log_probs = torch.zeros(batch, max_length, device=device)
    words = torch.full((batch, 1), BOS, device=device)
    going = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for step in range(max_length):
        best_words, best_log_probs = decoder.best_words(words, step, count=1)  # (B, 1, 1)
        going = going & (best_words[:, :, 0] != EOS)
        words = best_words[:, :, 0] * going
        token_ids[:, step], log_probs[:, step] = words[:, 0], best_log_probs[:, 0, 0]
        if not going.any():
            break
    return Decoded(token_ids, log_probs)


def _checked_length(models: Sequence[PCMNet], max_length: int | None) -> int:
    """T, after checks that concern every search."""
    if any(model.training for model in models):
        raise InputError("decoding with a model in training mode: call model.eval() first")
    longest = min(model.config.max_length for model in models)
    length = longest if max_length is None else max_length
    if not 1 <= length <= longest:
        raise InputError(f"max_length {length}: from 1 to the model's {longest}")
    return length
