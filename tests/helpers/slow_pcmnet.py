"""PCM-Net once more, written for reading only: float64, one sample, one head, one hypothesis at a time, no cache.

It follows the published behaviour from its description alone, shares no code with pcm, and takes weights under their
published names. Tests compare with it in settings that the golden file does not have.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    heads: int
    enc_layers: int
    dec_layers: int
    max_seq_len: int
    topk: int
    topk2: float
    thres: float


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * weight + bias


def softmax(values: Tensor) -> Tensor:
    exps = torch.exp(values - values.max())
    return exps / exps.sum()


class SlowPCMNet:
    def __init__(self, state: dict[str, Tensor], concepts: Tensor, settings: Settings):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.concepts = [row / row.norm() for row in concepts.double()]
        self.settings = settings

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return layer_norm(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.state[f"{name}.weight"] @ x + self.state[f"{name}.bias"]

    def mixup(self, global_feature: Tensor, patches: Tensor) -> dict:
        """One picture: the K concepts, the affinities, the mixed vectors, the chosen pairs and patches."""
        s = self.settings
        unit_global = global_feature / global_feature.norm()
        probabilities = softmax(torch.stack([unit_global @ concept / 0.01 for concept in self.concepts]))
        top = sorted(range(len(self.concepts)), key=lambda i: -float(probabilities[i]))[: s.topk]
        basis = [self.concepts[i] if probabilities[i] > s.thres else torch.zeros_like(unit_global) for i in top]
        affinities, mixed = [], []
        for patch in patches:
            embedded = self.norm(patch, "visual_embed.ln_post") @ self.state["visual_embed.proj"]
            embedded = embedded / (embedded.norm() + 1e-9)
            row = torch.stack([embedded @ vector for vector in basis])
            affinities.append(row)
            weights = softmax(row / 0.01)
            mixed.append(sum(weight * vector for weight, vector in zip(weights, basis, strict=True)))
        flat = torch.stack(affinities).flatten()
        count = int(s.topk2 * len(patches) * s.topk) if 0 < s.topk2 < 1 else int(s.topk2)
        pairs = sorted(range(len(flat)), key=lambda i: -float(flat[i]))[:count]
        if 0 < count < len(flat):
            ranked = flat.sort(descending=True).values
            assert ranked[count - 1] - ranked[count] > 1e-5, "a tie: choose another seed"
        return {
            "global": unit_global,
            "probabilities": probabilities,
            "top": top,
            "kept": [float(probabilities[i]) > s.thres for i in top],
            "basis": torch.stack(basis),
            "affinities": torch.stack(affinities),
            "mixed": mixed,
            "pairs": pairs,
            "chosen": {pair // s.topk for pair in pairs},
        }

    def visual(self, global_feature: Tensor, patches: Tensor, *, training: bool) -> tuple[list[Tensor], list[bool]]:
        """One picture: the encoder's input and which of its positions may be attended."""
        found = self.mixup(global_feature.double(), patches.double())
        position = self.state["visual_embed.embeddings_pos"][0]
        types = self.state["visual_embed.embeddings_token_type.weight"]
        slots = [self.linear(found["global"], "visual_embed.g_embeddings") + position[0] + types[0]]
        visible = [True]
        for j, patch in enumerate(patches.double()):
            if training and j in found["chosen"]:
                slot = self.linear(found["mixed"][j], "visual_embed.t_embeddings") + types[1]
            else:
                slot = self.linear(patch, "visual_embed.embeddings") + types[0]
            slots.append(slot + position[j + 1])
            visible.append(True)
        if not training:
            for j, mixed in enumerate(found["mixed"]):
                slot = self.linear(mixed, "visual_embed.t_embeddings") + types[int(j in found["chosen"])]
                slots.append(slot + position[j + 1])
                visible.append(j in found["chosen"])
        return [self.norm(torch.relu(slot), "visual_embed.embeddings_norm") for slot in slots], visible

    def attend(self, queries: list[Tensor], source: list[Tensor], visible: list[list[bool]], name: str) -> list[Tensor]:
        width = len(queries[0]) // self.settings.heads
        keys = [self.linear(memory, f"{name}.self.key") for memory in source]
        values = [self.linear(memory, f"{name}.self.value") for memory in source]
        result = []
        for t, x in enumerate(queries):
            query = self.linear(x, f"{name}.self.query")
            parts = []
            for head in range(self.settings.heads):
                cut = slice(head * width, (head + 1) * width)
                scores = [
                    query[cut] @ key[cut] / math.sqrt(width) + (0.0 if seen else -10000.0)
                    for key, seen in zip(keys, visible[t], strict=True)
                ]
                weights = softmax(torch.stack(scores))
                parts.append(sum(weight * value[cut] for weight, value in zip(weights, values, strict=True)))
            out = self.linear(torch.cat(parts), f"{name}.output.dense")
            result.append(self.norm(x + out, f"{name}.output.LayerNorm", 1e-12))
        return result

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        inner = torch.relu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(x + self.linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm", 1e-12)

    def encode(self, global_feature: Tensor, patches: Tensor, *, training: bool) -> tuple[list[Tensor], list[bool]]:
        xs, visible = self.visual(global_feature, patches, training=training)
        global_states = [xs[0]]
        for layer in range(self.settings.enc_layers):
            name = f"encoder.layers.{layer}"
            xs = self.attend(xs, xs, [visible] * len(xs), f"{name}.attention")
            xs = [self.feed_forward(x, name) for x in xs]
            global_states.append(xs[0])
        fused = self.norm(self.linear(torch.cat(global_states), "encoder.gvfeat_embed.0"), "encoder.gvfeat_embed.1")
        return [fused, *xs[1:]], visible

    def decode(self, memory: list[Tensor], visible: list[bool], words: list[int]) -> list[Tensor]:
        """Logits after each word."""
        width = self.state["token_embed.embeddings.weight"].shape[1]
        xs = []
        for t, word in enumerate(words):
            wave = [t * math.exp(-(i - i % 2) * math.log(10000) / width) for i in range(width)]
            position = torch.tensor([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(wave)]).double()
            xs.append(
                self.norm(self.state["token_embed.embeddings.weight"][word] + position, "token_embed.embeddings_norm")
            )
        causal = [[s <= t for s in range(len(xs))] for t in range(len(xs))]
        for layer in range(self.settings.dec_layers):
            name = f"decoder.g_layers.{layer}"
            xs = self.attend(xs, xs, causal, f"{name}.self_attn")
            xs = self.attend(xs, memory, [visible] * len(xs), f"{name}.x_att")
            xs = [self.feed_forward(x, name) for x in xs]
        return [self.linear(x, "predictor.logits") for x in xs]

    def beam_search(
        self, global_feature: Tensor, patches: Tensor, beam_size: int
    ) -> list[tuple[list[int], list[float]]]:
        """One picture's hypotheses after T steps, best first: words and their log-probabilities."""
        memory, visible = self.encode(global_feature, patches, training=False)
        beams: list[tuple[float, list[int], list[float], bool]] = [(0.0, [], [], False)]
        for _ in range(self.settings.max_seq_len):
            candidates = []
            for score, words, log_probs, ended in beams:
                next_log_probs = self.decode(memory, visible, [0, *words])[-1].log_softmax(-1)
                for word, value in enumerate(next_log_probs.tolist()):
                    if ended:
                        total, value = (score if word == 0 else -999.0), 0.0
                    else:
                        total = score + value
                    candidates.append((total, [*words, word], [*log_probs, value], ended or word == 0))
            beams = sorted(candidates, key=lambda candidate: -candidate[0])[:beam_size]
        return [(words, log_probs) for _, words, log_probs, _ in beams]

    def greedy(self, pictures: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], list[float]]]:
        """All pictures: ended ones go on being recorded until the last has ended."""
        memories = [self.encode(*picture, training=False) for picture in pictures]
        length = self.settings.max_seq_len
        words = [[0] * length for _ in pictures]
        log_probs = [[0.0] * length for _ in pictures]
        ended = [False] * len(pictures)
        for t in range(length):
            for b, (memory, visible) in enumerate(memories):
                best = self.decode(memory, visible, [0, *words[b][:t]])[-1].log_softmax(-1).max(dim=-1)
                log_probs[b][t] = float(best.values)
                ended[b] = ended[b] or int(best.indices) == 0
                words[b][t] = 0 if ended[b] else int(best.indices)
            if all(ended):
                break
        return list(zip(words, log_probs, strict=True))


def slow_loss(
    logits: Tensor, targets: Tensor, cosine: Tensor, *, w: float, smoothing: float, gamma: float, mode: str
) -> Tensor:
    """Eq. 11 word by word: KL divergence to the smoothed target, weighted by picture; then the focal pairs."""
    vocab = logits.shape[-1]
    words = []  # (sentence, weighted KL, focal factor)
    for b in range(len(logits)):
        weight = min(max(w * float(cosine[b]), 0.0), 1.0)
        for t in range(logits.shape[1]):
            target = int(targets[b, t])
            if target < 0:
                continue
            log_p = logits[b, t].log_softmax(-1)
            smooth = [1 - smoothing if v == target else smoothing / (vocab - 1) for v in range(vocab)]
            kl = sum(q * (math.log(q) - log_p[v]) for v, q in enumerate(smooth) if q > 0)
            words.append((b, weight * kl, (1 - log_p[target].exp()) ** gamma))
    if mode == "off":
        return sum(kl for _, kl, _ in words) / len(words)
    if mode == "word":
        return sum(kl * focal for _, kl, focal in words) / len(words)
    pairs = [kl * focal for b, kl, _ in words for s, _, focal in words if mode == "batch" or b == s]
    return sum(pairs) / len(pairs)
