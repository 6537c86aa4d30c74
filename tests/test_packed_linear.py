"""Packed layers compute what plain ones do, and leave the model they are made of as it was."""

import pytest
import torch
from torch import nn

from pcm.packed_linear import PackedLinear, can_pack, packed
from pcm.transformer import DecoderBlock


def test_a_packed_layer_computes_what_the_layer_does() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(48, 200, bias=bias)
        layer = packed(linear, rows=12)
        assert isinstance(layer, PackedLinear)
        for shape in ((12, 48), (4, 3, 48), (1, 48)):
            x = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)


def test_a_packed_block_is_a_copy_that_shares_what_is_no_linear_layer() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(64, 4, 128, hidden_dropout=0.1, attention_dropout=0.1).eval()
    copy = packed(block, rows=6)
    x, memory = torch.randn(2, 3, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = block(x, memory)
        torch.testing.assert_close(copy(x, memory), expected, rtol=1e-5, atol=1e-6)
        assert copy.feed_forward.norm is block.feed_forward.norm
        assert not any(isinstance(layer, PackedLinear) for layer in block.modules())
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
        torch.testing.assert_close(copy(x, memory), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_another_type_stay_as_they_are(dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 8, dtype=dtype)
    assert not can_pack(linear) and packed(linear, rows=2) is linear


def test_under_autocast_layers_stay_as_they_are() -> None:
    linear = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(linear, rows=2) is linear
    assert packed(linear, rows=2) is not linear
