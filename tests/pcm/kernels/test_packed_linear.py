"""Packed linear layers compute what those of torch do, and leave the model that they are made of as it was."""

import pytest
import torch
from torch import nn

from pcm.captioners.pcmnet.decoding import beam_search
from pcm.captioners.pcmnet.transformer import DecoderBlock
from pcm.kernels.packed_linear import PackedLinear, can_pack, for_decoding
from tests.pcm.captioners.pcmnet.test_model import golden_inputs, golden_model


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_layer_does(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 200, bias=bias)
    layer = for_decoding(linear, rows=12)
    assert isinstance(layer, PackedLinear)
    for shape in ((12, 48), (4, 3, 48), (1, 48), (2, 3, 2, 48)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)


def test_the_packed_weight_is_what_is_multiplied_by() -> None:
    layer = for_decoding(nn.Linear(8, 4), rows=2)
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = layer(x)
        layer.weight.zero_()
        assert torch.equal(layer(x), expected)


def test_the_network_gives_the_same_logits_and_captions_with_packed_layers() -> None:
    model = golden_model().eval()
    packed = for_decoding(model, rows=12)
    assert sum(isinstance(layer, PackedLinear) for layer in packed.modules()) == sum(
        isinstance(layer, nn.Linear) for layer in model.modules()
    )
    with torch.no_grad():
        torch.testing.assert_close(packed(*golden_inputs()), model(*golden_inputs()), rtol=0, atol=2e-5)
    ours, plain = (beam_search(network, *golden_inputs()[:2]) for network in (packed, model))
    assert torch.equal(ours.token_ids, plain.token_ids)
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=0, atol=2e-5)


def test_a_packed_network_is_a_copy_that_shares_its_parameters_under_their_names() -> None:
    block = DecoderBlock(64, 4, 128, hidden_dropout=0.1, attention_dropout=0.1).eval()
    packed = for_decoding(block, rows=6)
    assert packed.feed_forward.norm is block.feed_forward.norm
    assert not any(isinstance(layer, PackedLinear) for layer in block.modules())
    assert not any(module.training for module in packed.modules())
    state, own = packed.state_dict(), block.state_dict()
    assert list(state) == list(own)
    assert all(state[name].data_ptr() == own[name].data_ptr() for name in own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_another_type_stay_as_they_are(dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 8, dtype=dtype)
    assert not can_pack(linear) and for_decoding(linear, rows=2) is linear


def test_under_autocast_and_with_gradients_the_product_is_torchs() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(2, 8)
    layer = for_decoding(linear, rows=2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), linear(x))
    layer(x).sum().backward()
    assert linear.weight.grad is not None
