"""Random numbers that belong to a row, not to its batch: the same as if each row drew them by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.model import PCMNet
from pcm.kernels.row_randomness import RowRandomness


class SlowRow:
    """One row's random numbers, drawn one element at a time in plain Python."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.SFC64(seed))

    def kept(self, shape: torch.Size, p: float) -> Tensor:
        """True with probability 1 - p: four 16-bit numbers in each 64-bit one, lowest bits first."""
        elements: list[bool] = []
        while len(elements) < shape.numel():
            word = int(self.generator.integers(2**64, dtype=np.uint64))
            for quarter in range(4):
                bits = (word >> (16 * quarter)) & 0xFFFF
                signed = bits - 0x10000 if bits >= 0x8000 else bits
                elements.append(signed + 0x8000 >= round(p * 0x10000))
        return torch.tensor(elements[: shape.numel()]).view(shape)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return x * self.kept(x.shape, p) / (1 - p)

    def attention(self, query: Tensor, keys: Tensor, values: Tensor, p: float) -> Tensor:
        """(heads, T, d) each."""
        scores = query @ keys.transpose(-2, -1) / query.shape[-1] ** 0.5
        return self.dropout(scores.softmax(dim=-1), p) @ values

    def normal_like(self, x: Tensor) -> Tensor:
        return torch.tensor([self.generator.standard_normal(dtype=np.float32) for _ in range(x.numel())]).view(x.shape)


class Everything(nn.Module):
    """Each kind of random number that a captioner may draw."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, T, d) -> the same shape."""
        x = x + torch.randn_like(x)
        x = self.dropout(x)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)
        return F.dropout(x.transpose(1, 2), 0.1).transpose(1, 2)  # what is dropped out need not lie in order

    def slow(self, x: Tensor, row: SlowRow) -> Tensor:
        """One row, (heads, T, d)."""
        x = x + row.normal_like(x)
        x = row.dropout(x, 0.3)
        x = row.attention(x, x, x, 0.4)
        return row.dropout(x.transpose(0, 1), 0.1).transpose(0, 1)


def test_every_row_is_what_it_draws_by_itself_and_so_are_the_gradients() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, 2, 5, 7).unbind()  # 70 elements a row: no multiple of four
    seeds, module = (11, 2**63 - 1, 12), Everything().train()
    whole, rows = x.clone().requires_grad_(), x.clone().requires_grad_()
    with RowRandomness(seeds):
        found = module(whole)
    expected = torch.stack([module.slow(row, SlowRow(seed)) for row, seed in zip(rows, seeds, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, expected == 0)
    for output in (found, expected):
        (output * weights).sum().backward()
    torch.testing.assert_close(whole.grad, rows.grad, rtol=1e-5, atol=1e-5)


def test_a_row_draws_the_same_numbers_in_any_batch() -> None:
    x, module = torch.randn(6, 2, 3, 7), Everything().train()
    with RowRandomness(range(6)):
        whole = [module(x), module(x)]
    for rows in (slice(0, 2), slice(2, 6)):
        with RowRandomness(range(6)[rows]):
            part = [module(x[rows]), module(x[rows])]
        for one, other in zip(whole, part, strict=True):
            torch.testing.assert_close(one[rows], other, rtol=0, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1])


def test_torchs_own_layers_draw_by_row_too() -> None:
    """Captioners made of other people's modules keep the promise: nothing is swapped."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.2, batch_first=True).train()
    x = torch.randn(4, 5, 8)
    with RowRandomness(range(4)):
        whole = layer(x)
    with RowRandomness([2, 3]):
        torch.testing.assert_close(layer(x[2:]), whole[2:], rtol=1e-5, atol=1e-5)
    with RowRandomness([0, 1]):
        assert not torch.allclose(layer(x[2:]), whole[2:], atol=1e-2)


def test_the_given_share_is_dropped_and_the_mean_kept() -> None:
    with RowRandomness(range(8)):
        y = nn.Dropout(0.3).train()(torch.ones(8, 20_000))
    torch.testing.assert_close((y == 0).float().mean(dim=1), torch.full((8,), 0.3), rtol=0, atol=0.02)
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), rtol=0, atol=0.01)
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1 / 0.7))
    assert (y == 0).float().mean(dim=0).std() < 0.2  # no columns that go together: 0.16 by chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_network_draws_by_row_in_training(dtype: torch.dtype) -> None:
    """Every random number of PCM-Net: a row's logits do not change with the rows beside it."""
    torch.manual_seed(0)
    config = PCMNetConfig(
        vocab_size=50, patch_dim=24, embed_dim=16, num_patches=9, num_concepts=10, max_length=6,
        hidden_size=16, num_heads=2, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    model = PCMNet(config).train()
    model.set_concepts(torch.randn(10, 16))
    inputs = torch.randn(4, 16), torch.randn(4, 9, 24), torch.randint(0, 50, (4, 6))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        with RowRandomness(range(4)):
            whole = model(*inputs)
        with RowRandomness([2, 3]):
            part = model(*(tensor[2:] for tensor in inputs))
        torch.testing.assert_close(whole[2:], part, rtol=tolerance, atol=tolerance)
        with RowRandomness([0, 1]):
            assert not torch.allclose(model(*(tensor[2:] for tensor in inputs)), part, atol=4 * tolerance)


def test_nothing_of_it_is_left_afterwards_and_nothing_is_drawn_in_evaluation() -> None:
    x, dropout = torch.ones(4, 7), nn.Dropout(0.5).train()
    torch.manual_seed(5)
    expected = dropout(x)
    torch.manual_seed(5)
    with RowRandomness(range(4)):
        dropout(x)
        assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(dropout.train()(x), expected)


def test_attention_without_dropout_draws_nothing() -> None:
    x = torch.randn(4, 2, 5, 8, requires_grad=True)
    with RowRandomness(range(4)):
        found = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        after = torch.randn_like(x)
    with RowRandomness(range(4)):
        assert torch.equal(torch.randn_like(x), after)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(x, x, x, is_causal=True))


def test_what_would_break_the_promise_is_refused() -> None:
    with RowRandomness(range(4)):
        with pytest.raises(ValueError, match=r"4 row seeds for a draw of shape \(6, 3\)"):
            F.dropout(torch.ones(6, 3))
        with pytest.raises(NotImplementedError, match="rand_like"):
            torch.rand_like(torch.ones(4, 3))
