"""Post-LN transformer blocks with attention whose keys and values can be kept between decoding steps.

Every sublayer is `LayerNorm(x + Dropout(sublayer(x)))`, as in the original Transformer and in the published PCM-Net.
Masks are boolean, True = may be attended. The published code adds -10000 to the scores it hides; in float32 the softmax
of such a score is exactly 0 as long as a row keeps one visible key, so both give the same numbers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

#: LayerNorm epsilon inside the blocks; the embeddings and the global fusion use PyTorch's default, 1e-5.
BLOCK_NORM_EPS = 1e-12


class Attention(nn.Module):
    """Multi-head attention sublayer: LayerNorm(x + Dropout(W_o Dropout(softmax(q k^T / sqrt(d))) v))."""

    def __init__(self, hidden_size: int, num_heads: int, *, attention_dropout: float, hidden_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(hidden_dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=BLOCK_NORM_EPS)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, heads, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, S, d) of what is attended, `source` (B, S, H)."""
        keys, values = self.key_value(source).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from `x` (B, T, H) to `keys` and `values` (B, heads, S, d).

        `mask`: boolean, broadcastable to (B, heads, T, S), True = visible. `causal`: position t sees positions 0..t.
        """
        query = self._heads(self.query(x))  # (B, heads, T, d)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, keys, values, mask, dropout_p=dropout, is_causal=causal)
        context = context.transpose(1, 2).flatten(2)  # (B, T, H)
        return self.norm(x + self.dropout(self.output(context)))


class FeedForward(nn.Module):
    """Position-wise sublayer: LayerNorm(x + Dropout(W_2 Dropout(ReLU(W_1 x))))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dropout: float):
        super().__init__()
        self.expand = nn.Linear(hidden_size, intermediate_size)
        self.contract = nn.Linear(intermediate_size, hidden_size)
        self.inner_dropout = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=BLOCK_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        inner = self.inner_dropout(F.relu(self.expand(x)))  # (B, T, intermediate_size)
        return self.norm(x + self.dropout(self.contract(inner)))


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        hidden_dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.attention = Attention(
            hidden_size, num_heads, attention_dropout=attention_dropout, hidden_dropout=hidden_dropout
        )
        self.feed_forward = FeedForward(hidden_size, intermediate_size, dropout=hidden_dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`x` (B, S, H); `mask` (B, S) boolean, True = may be attended, None = everything."""
        visible = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)
        return self.feed_forward(self.attention(x, *self.attention.keys_values(x), mask=visible))


class DecoderBlock(nn.Module):
    """Masked self-attention over words, cross-attention to the memory, then feed-forward."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        hidden_dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.self_attention = Attention(
            hidden_size, num_heads, attention_dropout=attention_dropout, hidden_dropout=hidden_dropout
        )
        self.cross_attention = Attention(
            hidden_size, num_heads, attention_dropout=attention_dropout, hidden_dropout=hidden_dropout
        )
        self.feed_forward = FeedForward(hidden_size, intermediate_size, dropout=hidden_dropout)

    def forward(self, x: Tensor, memory: Tensor, *, memory_mask: Tensor | None = None) -> Tensor:
        """All positions at once: `x` (B, T, H), `memory` (B, S, H), `memory_mask` (B, S) boolean or None."""
        visible = None if memory_mask is None else memory_mask[:, None, None, :]  # (B, 1, 1, S)
        x = self.self_attention(x, *self.self_attention.keys_values(x), causal=True)
        x = self.cross_attention(x, *self.cross_attention.keys_values(memory), mask=visible)
        return self.feed_forward(x)

    def step(
        self,
        x: Tensor,
        *,
        self_cache: tuple[Tensor, Tensor],
        slot: int,
        self_mask: Tensor,
        cross_cache: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
    ) -> Tensor:
        """One decoding step for W hypotheses of each image, `x` (B, W, H).

        The hypotheses of an image are rows of one query: they share the memory's keys and values (`cross_cache`,
        (B, heads, S, d) each) and one pool of past words (`self_cache`, (B, heads, capacity, d) each). The words of
        this step are written into the pool, in place, from `slot` on; `self_mask` (B, 1, W, length) says which of the
        pool's first `length` words each hypothesis descends from, so that nothing is copied when hypotheses are
        reordered.
        """
        pool_keys, pool_values = self_cache
        keys, values = self.self_attention.keys_values(x)
        end = slot + x.shape[1]
        pool_keys[:, :, slot:end] = keys
        pool_values[:, :, slot:end] = values
        length = self_mask.shape[-1]
        x = self.self_attention(x, pool_keys[:, :, :length], pool_values[:, :, :length], mask=self_mask)
        x = self.cross_attention(x, *cross_cache, mask=memory_mask)
        return self.feed_forward(x)
