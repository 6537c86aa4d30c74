"""Golden files in settings that the published one does not have, made by the slow implementation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.slow_pcmnet import Settings, SlowPCMNet, slow_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int = 2
    hidden: int = 12
    intermediate: int = 10
    vocab_size: int = 9
    patch_dim: int = 8
    embed_dim: int = 6
    num_patches: int = 5
    num_concepts: int = 7


def random_state(sizes: Sizes, settings: Settings, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights under their published names, spread enough for decoding to be decided."""
    h, shapes = sizes.hidden, {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            linear(f"{name}.self.{part}", h, h)
        linear(f"{name}.output.dense", h, h)
        norm(f"{name}.output.LayerNorm", h)

    def feed_forward(name: str) -> None:
        linear(f"{name}.intermediate.dense", h, sizes.intermediate)
        linear(f"{name}.output.dense", sizes.intermediate, h)
        norm(f"{name}.output.LayerNorm", h)

    shapes["token_embed.embeddings.weight"] = (sizes.vocab_size, h)
    norm("token_embed.embeddings_norm", h)
    shapes["visual_embed.embeddings_pos"] = (1, sizes.num_patches + 1, h)
    shapes["visual_embed.embeddings_token_type.weight"] = (2, h)
    shapes["visual_embed.proj"] = (sizes.patch_dim, sizes.embed_dim)
    norm("visual_embed.ln_post", sizes.patch_dim)
    norm("visual_embed.embeddings_norm", h)
    linear("visual_embed.embeddings", sizes.patch_dim, h)
    linear("visual_embed.g_embeddings", sizes.embed_dim, h)
    linear("visual_embed.t_embeddings", sizes.embed_dim, h)
    for layer in range(settings.enc_layers):
        attention(f"encoder.layers.{layer}.attention")
        feed_forward(f"encoder.layers.{layer}")
    linear("encoder.gvfeat_embed.0", h * (settings.enc_layers + 1), h)
    norm("encoder.gvfeat_embed.1", h)
    for layer in range(settings.dec_layers):
        attention(f"decoder.g_layers.{layer}.self_attn")
        attention(f"decoder.g_layers.{layer}.x_att")
        feed_forward(f"decoder.g_layers.{layer}")
    linear("predictor.logits", h, sizes.vocab_size)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def write_golden(
    path: Path,
    *,
    sizes: Sizes,
    settings: Settings,
    losses: list[dict[str, Any]],
    beams: list[tuple[int, int]],
    seed: int,
) -> dict[str, Tensor]:
    """Write `path` (.safetensors) and the .json beside it; returns the tensors."""
    generator = torch.Generator().manual_seed(seed)
    state = random_state(sizes, settings, generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    concepts = normal(sizes.num_concepts, sizes.embed_dim)
    # Between two concepts, so that the threshold has something to drop and something to keep.
    global_feats = (concepts[: sizes.batch] + concepts[1 : 1 + sizes.batch]) / 8 + normal(
        sizes.batch, sizes.embed_dim
    ) / 50
    att_feats = normal(sizes.batch, sizes.num_patches, sizes.patch_dim)
    length = settings.max_seq_len
    tokens = torch.randint(1, sizes.vocab_size, (sizes.batch, length), generator=generator)
    tokens[:, 0] = 0
    targets = torch.full_like(tokens, -1)
    for b in range(sizes.batch):
        words = length - 1 - b
        tokens[b, words + 1 :] = 0
        targets[b, :words] = tokens[b, 1 : words + 1]
        targets[b, words] = 0
    clip_score = torch.linspace(0.2, 0.9, sizes.batch)
    tensors = {f"state.{name}": tensor for name, tensor in state.items()} | {
        "in.att_feats": att_feats,
        "in.global_feats": global_feats,
        "in.concept_embed": concepts,
        "in.tokens_ids": tokens,
        "in.target_ids": targets,
        "in.clip_score": clip_score,
    }

    trained = {name for name in state if "ln_post" not in name and name != "visual_embed.proj"}
    slow = SlowPCMNet(state, concepts, settings)
    slow.state = {name: tensor.requires_grad_(name in trained) for name, tensor in slow.state.items()}
    pictures = [(global_feats[b].double(), att_feats[b].double()) for b in range(sizes.batch)]
    for mode in ("train", "eval"):
        encoded = [slow.encode(*picture, training=mode == "train") for picture in pictures]
        logits = torch.stack([torch.stack(slow.decode(*pair, tokens[b].tolist())) for b, pair in enumerate(encoded)])
        tensors[f"out.{mode}.logits"] = logits.detach()
        tensors[f"out.{mode}.encoder"] = torch.stack([torch.stack(memory) for memory, _ in encoded]).detach()
        tensors[f"out.{mode}.visual_embed"] = torch.stack(
            [torch.stack(slow.visual(*picture, training=mode == "train")[0]) for picture in pictures]
        ).detach()
        tensors[f"out.{mode}.ext_att_mask"] = torch.tensor(
            [[[[0.0 if seen else -10000.0 for seen in visible]]] for _, visible in encoded]
        )
        if mode == "train":
            for number, loss in enumerate(losses):
                focal = {"batch": "batch", "sent": "sentence", "word": "word"}[loss["gamma_type"]]
                leaf = logits.detach().requires_grad_() if number else logits
                value = slow_loss(
                    leaf,
                    targets,
                    clip_score / 2.5,
                    w=loss["alpha"],
                    smoothing=loss["label_smoothing"],
                    gamma=loss["gamma"],
                    mode=focal if loss["gamma"] > 0 else "off",
                )
                names = sorted(trained)
                wanted = [leaf] if number else [leaf, *(slow.state[name] for name in names)]
                gradient, *others = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
                tensors[f"loss.{loss['name']}.value"] = value.detach()
                tensors[f"loss.{loss['name']}.grad_logits"] = gradient
                if not number:
                    tensors["grad_loss.value"] = value.detach().clone()
                    tensors |= {f"grad.{name}": g for name, g in zip(names, others, strict=True)}

    with torch.no_grad():
        found = [slow.mixup(*picture) for picture in pictures]
        tensors["mid.topk_idx"] = torch.tensor([f["top"] for f in found])
        tensors["mid.concept_keep"] = torch.tensor([f["kept"] for f in found]).float()
        tensors["mid.concept_prob"] = torch.stack([f["probabilities"] for f in found])
        tensors["mid.patch_sim"] = torch.stack([f["affinities"] for f in found])
        tensors["mid.v_aware_concept"] = torch.stack([torch.stack(f["mixed"]) for f in found])
        mask = torch.tensor([[j in f["chosen"] for j in range(sizes.num_patches)] for f in found])
        tensors["mid.replace_mask"] = mask.float()
        for beam_size, out_size in beams:
            hypotheses = [slow.beam_search(*picture, beam_size)[:out_size] for picture in pictures]
            ids = torch.tensor([[words for words, _ in picture] for picture in hypotheses])
            log_probs = torch.tensor([[values for _, values in picture] for picture in hypotheses])
            name = f"beam{beam_size}.out{out_size}"
            tensors[f"{name}.ids"] = ids[:, 0] if out_size == 1 else ids
            tensors[f"{name}.logp"] = log_probs[:, 0] if out_size == 1 else log_probs
        greedy = slow.greedy(pictures)
        tensors["greedy.ids"] = torch.tensor([words for words, _ in greedy])
        tensors["greedy.logp"] = torch.tensor([values for _, values in greedy])

    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().clone().contiguous()
        for name, tensor in tensors.items()
    }
    spec = dataclasses.asdict(settings) | {"losses": losses}
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps({"spec": spec, "tensors": {name: {} for name in tensors}}))
    return tensors
