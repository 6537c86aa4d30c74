"""The CLIP-weighted cross-entropy against the golden set and a word-by-word implementation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.errors import InputError
from tests.helpers.paths import DATA
from tests.helpers.slow_pcmnet import slow_loss

GOLDEN = load_file(DATA / "pcmnet_small.safetensors")
LOSSES = json.loads((DATA / "pcmnet_small.json").read_text())["spec"]["losses"]
MODES = {"batch": "batch", "sent": "sentence", "word": "word"}


def example(*, batch: int = 3, length: int = 5, vocab: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets of lengths 5, 4, 3, ... padded with -1, cosines from negative to large."""
    torch.manual_seed(3)
    targets = torch.randint(0, vocab, (batch, length))
    for b in range(batch):
        targets[b, length - b :] = -1
    return torch.randn(batch, length, vocab) * 2, targets, torch.linspace(-0.1, 0.5, batch)


@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: settings["name"])
def test_value_and_gradient_match_the_published_loss(settings: dict) -> None:
    on = settings["gamma"] > 0
    loss = CLIPWeightedCrossEntropy(
        settings["alpha"],
        settings["label_smoothing"],
        settings["gamma"] if on else 1.0,
        MODES[settings["gamma_type"]] if on else "off",
    )
    logits = GOLDEN["out.train.logits"].clone().requires_grad_()
    value = loss(logits, GOLDEN["in.target_ids"], GOLDEN["in.clip_score"] / 2.5)
    value.backward()
    torch.testing.assert_close(value.detach(), GOLDEN[f"loss.{settings['name']}.value"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits.grad, GOLDEN[f"loss.{settings['name']}.grad_logits"], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("mode", ["batch", "sentence", "word", "off"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_mode_matches_the_word_by_word_loss(mode: str, smoothing: float) -> None:
    logits, targets, cosine = example()
    slow_logits = logits.double().requires_grad_()
    slow = slow_loss(slow_logits, targets, cosine, w=2.5, smoothing=smoothing, gamma=3.0, mode=mode)
    slow.backward()
    logits.requires_grad_()
    ours = CLIPWeightedCrossEntropy(2.5, smoothing, 3.0, mode)(logits, targets, cosine)
    ours.backward()
    torch.testing.assert_close(ours.double(), slow, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits.grad.double(), slow_logits.grad, atol=1e-7, rtol=1e-4)


def test_targets_are_not_changed_and_a_second_call_gives_the_same() -> None:
    logits, targets, cosine = example()
    before = targets.clone()
    loss = CLIPWeightedCrossEntropy()
    first = loss(logits, targets, cosine)
    assert torch.equal(targets, before)
    assert torch.equal(loss(logits, targets, cosine), first)


def test_padding_has_no_influence_and_gets_no_gradient() -> None:
    logits, targets, cosine = example()
    padded = targets < 0
    changed = logits.masked_fill(padded.unsqueeze(-1), 50.0).requires_grad_()
    loss = CLIPWeightedCrossEntropy()
    value = loss(changed, targets, cosine)
    value.backward()
    torch.testing.assert_close(value, loss(logits, targets, cosine))
    assert changed.grad[padded].abs().max() == 0
    assert changed.grad[~padded].abs().max() > 0


def test_clip_weight_is_clamped_to_zero_and_one() -> None:
    logits, targets, _ = example(batch=1)
    loss = CLIPWeightedCrossEntropy(clip_weight=4.0, focal_mode="off")
    values = [loss(logits, targets, torch.tensor([cosine])).item() for cosine in (-0.3, 0.0, 0.1, 0.25, 0.9)]
    assert values[0] == values[1] == 0
    assert values[2] == pytest.approx(0.4 * values[4], rel=1e-5)
    assert values[3] == values[4] > 0


def test_a_model_that_predicts_the_smoothed_target_reaches_zero() -> None:
    targets = torch.tensor([[2, 0, -1]])
    probabilities = torch.full((1, 3, 5), 0.1 / 4)
    probabilities[0, 0, 2] = probabilities[0, 1, 0] = 0.9
    loss = CLIPWeightedCrossEntropy(label_smoothing=0.1, focal_mode="off")
    assert loss(probabilities.log(), targets, torch.ones(1)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("mode", ["batch", "sentence", "word", "off"])
def test_a_batch_without_words_gives_zero(mode: str) -> None:
    logits, targets, cosine = example()
    logits.requires_grad_()
    value = CLIPWeightedCrossEntropy(focal_mode=mode)(logits, torch.full_like(targets, -1), cosine)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() == 0


def test_low_precision_logits_give_a_float32_loss_and_their_own_gradient_type() -> None:
    logits, targets, cosine = example()
    low = logits.bfloat16().requires_grad_()
    value = CLIPWeightedCrossEntropy()(low, targets, cosine)
    value.backward()
    assert value.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    exact = CLIPWeightedCrossEntropy()(low.detach().float(), targets, cosine)
    torch.testing.assert_close(value.detach(), exact)


@pytest.mark.parametrize(
    "settings",
    [{"clip_weight": 0.0}, {"label_smoothing": 1.0}, {"focal_gamma": 0.0}, {"focal_mode": "sent"}],
    ids=lambda settings: next(iter(settings)),
)
def test_impossible_settings_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        CLIPWeightedCrossEntropy(**settings)
