"""Begins a denoiser with the weights of an earlier one that read the states of another text encoder.

Each layer reads text through two matrices, keys and values. The earlier text states are predicted from the new ones by
least squares, on captions whose words both tokenizers know, and the prediction is multiplied into these matrices: the
denoiser draws what it drew before, as far as the new states tell it, and learns the new words from there.
"""

from pathlib import Path
from typing import Any  # transformers' classes: their types tell mypy little

import torch
from torch import Tensor

import pcm.torchvision_shim  # noqa: F401  - before transformers
from pcm.embedded.making.text_training import text_states
from pcm.embedded.making.training_state import earlier_weights

CAPTIONS = 3000  # that the prediction is fitted on
_READS_TEXT = ("attn2.to_k.weight", "attn2.to_v.weight")


def begun_denoiser(folder: Path, text_encoder: Any, tokenizer: Any, captions: list[str]) -> dict[str, Tensor]:
    """Weights for a denoiser that reads `text_encoder`, from the pipeline in `folder`.

    Raises ValueError when none of `captions` has the same number of tokens in both tokenizers.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    earlier_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    lengths = [[len(ids) for ids in each(captions).input_ids] for each in (tokenizer, earlier_tokenizer)]
    shared = [caption for caption, new, old in zip(captions, *lengths, strict=True) if new == old]
    if not shared:
        raise ValueError(f"{folder}: its tokenizer knows the words of none of {len(captions)} captions")
    shared = shared[:: -(-len(shared) // CAPTIONS)]
    earlier = text_states(CLIPTextModel.from_pretrained(folder / "text_encoder").eval(), earlier_tokenizer, shared)
    states = text_states(text_encoder, tokenizer, shared)
    predict = predicting(states.flatten(0, 1).float(), earlier.flatten(0, 1).float())  # (width, earlier width)
    weights = earlier_weights(folder / "unet")
    return {name: weight @ predict.T if name.endswith(_READS_TEXT) else weight for name, weight in weights.items()}


def predicting(states: Tensor, targets: Tensor) -> Tensor:
    """The matrix (n, m) for which states (k, n) @ matrix is nearest to targets (k, m), a little drawn to zero."""
    square = states.T @ states
    square += 1e-4 * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square, states.T @ targets)
