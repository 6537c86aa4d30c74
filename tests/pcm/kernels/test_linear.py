"""Linear layers compute what those of torch do; packed ones leave the model they are made of as it was."""

import pytest
import torch
from torch import nn

from pcm.captioners.pcmnet.transformer import DecoderBlock
from pcm.kernels.linear import Linear, PackedLinear, can_pack, packed


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


@pytest.mark.parametrize("shape", [(12, 48), (3, 4, 48), (2, 3, 2, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    own = Linear(48, 20, bias=bias)
    plain = nn.Linear(48, 20, bias=bias)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(given) for layer, given in zip((own, plain), inputs, strict=True)]
    assert type(outputs[0].grad_fn).__name__ == "_LinearBackward", "torch's own product was taken"
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_gradients_are_asked_for_one_by_one() -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None
    layer.weight.grad = None
    layer.weight.requires_grad_(False)
    layer(given := x.clone().requires_grad_()).sum().backward()
    assert layer.weight.grad is None and given.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_another_type_and_under_autocast_are_torchs(dtype: torch.dtype) -> None:
    layer = Linear(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    layer, x = layer.to(dtype), torch.randn(3, 8, dtype=dtype)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
