"""Random numbers that belong to a row, not to its batch."""

import torch

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.model import PCMNet
from pcm.kernels.dropout import Dropout, normal_like, random_rows


def test_a_row_draws_the_same_numbers_in_any_batch() -> None:
    dropout = Dropout(0.4).train()
    x = torch.ones(6, 3, 7)  # 21 elements a row: no multiple of four
    with random_rows(range(6)):
        whole = [dropout(x), dropout(x), normal_like(x)]
    for rows in (slice(0, 2), slice(2, 6)):
        with random_rows(range(6)[rows]):
            part = [dropout(x[rows]), dropout(x[rows]), normal_like(x[rows])]
        for one, other in zip(whole, part, strict=True):
            torch.testing.assert_close(one[rows], other, rtol=0, atol=0)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0][0], whole[0][1])


def test_row_dropout_drops_the_given_share_and_keeps_the_mean() -> None:
    with random_rows(range(8)):
        y = Dropout(0.3).train()(torch.ones(8, 20_000))
    torch.testing.assert_close((y == 0).float().mean(dim=1), torch.full((8,), 0.3), rtol=0, atol=0.02)
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), rtol=0, atol=0.01)


def test_the_whole_network_draws_by_row_in_training() -> None:
    """Every random number of PCM-Net: a row's logits do not change with the rows beside it."""
    torch.manual_seed(0)
    config = PCMNetConfig(
        vocab_size=50, patch_dim=24, embed_dim=16, num_patches=9, num_concepts=10, max_length=6,
        hidden_size=16, num_heads=2, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    model = PCMNet(config).train()
    model.set_concepts(torch.randn(10, 16))
    inputs = torch.randn(4, 16), torch.randn(4, 9, 24), torch.randint(0, 50, (4, 6))
    with random_rows(range(4)):
        whole = model(*inputs)
    with random_rows([2, 3]):
        part = model(*(tensor[2:] for tensor in inputs))
    torch.testing.assert_close(whole[2:], part, rtol=1e-5, atol=1e-5)
    with random_rows([0, 1]):
        assert not torch.allclose(model(*(tensor[2:] for tensor in inputs)), part, atol=1e-2)


def test_dropout_after_relu_is_both_and_so_is_its_gradient() -> None:
    dropout = Dropout(0.3).train()
    x = torch.randn(4 * 5, 6)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    with random_rows(range(4)):
        fused = dropout.after_relu(one * 2, batch=4)
    with random_rows(range(4)):
        plain = dropout(torch.relu(two * 2).view(4, 5, 6)).view(20, 6)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)
    weights = torch.randn(20, 6)
    (fused * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-6)
    dropout.eval()
    again = x.clone()
    assert torch.equal(dropout.after_relu(again, batch=4), torch.relu(x)) and torch.equal(again, x)
    with torch.no_grad():
        assert torch.equal(dropout.after_relu(again, batch=4), torch.relu(x))


def test_dropout_added_is_the_sum_and_so_is_its_gradient() -> None:
    dropout = Dropout(0.3).train()
    residual, x, weights = torch.randn(3, 4, 5, 6).unbind()
    one, two = ([tensor.clone().requires_grad_() for tensor in (residual, x)] for _ in range(2))
    with random_rows(range(4)):
        fused = dropout.added(*one)
    with random_rows(range(4)):
        plain = two[0] + dropout(two[1])
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    (fused * weights).sum().backward()
    (plain * weights).sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(dropout.eval().added(residual, x), residual + x)
