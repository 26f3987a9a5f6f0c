"""Llama 2's decoder in one file (paper 2.2): pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Parameter names and the rotary layout (interleaved pairs) are Meta's, so that original checkpoints load unchanged.
Parallelism never enters here: it is applied to a finished module from outside.

Shapes: B batch, T tokens, S keys (cache included), D model width, H query heads, K key/value heads, E head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna import kernels
from puna.config import ConfigError, positive
from puna.model import fused
from puna.model.head import LARGE, chunked_loss, product_type
from puna.model.moe import MixtureOfExperts, MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama. `n_kv_heads` equal to `n_heads` is multi-head, 1 is multi-query attention."""

    dim: int = 192
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 2
    vocab_size: int = 2048
    ffn_hidden: int = 512
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    """1e-5 for Llama 2, 1e-6 for Llama 1."""
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    """Llama 2 unties them; small published Llamas tie."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """experts in place of the feed-forward; Llama 2 has none."""

    def __post_init__(self) -> None:
        positive(self, "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_hidden", "max_seq_len")
        if self.dim % (2 * self.n_heads):  # rotary positions turn pairs of a head's numbers
            raise ConfigError(f"dim {self.dim} is not an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def n_params(self) -> int:
        """Number of parameters; a tied output is counted once."""
        return self._count(self.moe.experts)

    def n_active_params(self) -> int:
        """Number of parameters that one token's pass reads: of the experts, the chosen ones alone."""
        return self._count(self.moe.top_k)

    def _count(self, experts: int) -> int:
        """Number of parameters with so many experts, where there are any."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        feed_forward = 3 * self.dim * self.ffn_hidden
        if self.moe.experts:
            feed_forward = experts * feed_forward + self.moe.experts * self.dim
        layer = attention + feed_forward + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.dim


class Documents(NamedTuple):
    """The documents of packed rows: none sees another, so those of like length are attended over together, apart.

    A group holds N documents, padded on the right to the L tokens of its longest.
    """

    slots: Tensor  # (B, T) int64: each token's place among the tokens of all groups, one after the other
    sizes: tuple[tuple[int, int], ...]  # (N, L) of each group
    masks: tuple[Tensor | None, ...]  # of each group (N, 1, L, L), True where a query may look; None: causal


class Cache(Protocol):
    """Keeps the keys and values of earlier positions, and attends over them as it likes to store them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k, v (B, K, T, E) of new tokens; return q's attention (B, H, T, E) over them and all before them."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 whatever the input's type.

    Gives the input's type, or with `for_products` the one that matrix products take: autocast would cast for each.
    """

    def __init__(self, dim: int, eps: float, for_products: bool = False) -> None:
        super().__init__()
        self.eps, self.for_products = eps, for_products
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_type(x) if self.for_products else x.dtype
        if kernels.runs(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps, dtype)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(dtype) * self.weight.to(dtype)


def rotary_table(head_dim: int, max_seq_len: int, theta: float) -> Tensor:
    """cos and sin of every position and pair, float32 (max_seq_len, E / 2, 2)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its position's angle, in float32.

    x (B, heads, T, E); table (T, E/2, 2) or (B, 1, T, E/2, 2).
    Without the compiled pass it is Meta's complex product: the same numbers as cos and sin by hand at a sixth of the
    time, gradient included.
    """
    if kernels.runs(x, table):
        return fused.rotate(x, table)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # (B, heads, T, E/2)
    return torch.view_as_real(pairs * torch.view_as_complex(table.float())).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, H, T, E) over k, v (B, K, S, E), causal without a mask (B, 1, T, S): (B, H, T, E)."""
    if fused.attends(q, k, v):
        return fused.attend(q, k, v, mask)
    shares = q.shape[1] > k.shape[1]
    if shares and q.is_cuda and not (mask is None and q.dtype in (torch.float16, torch.bfloat16)):
        # Of CUDA's kernels that hold no scores flash alone shares heads, and takes no mask and no float32.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # (B, H, S, E)
        shares = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shares)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention of q (B, H, T, E) over k, v (B, K, T, E) within each document: (B, H, T, E).

    What it holds grows with the documents' lengths squared, not with the rows', and a causal group has no mask at all.
    """
    slots, groups = documents.slots.flatten(), [n * length for n, length in documents.sizes]

    def grouped(x: Tensor) -> tuple[Tensor, ...]:  # of each group (N, heads, L, E)
        tokens = x.transpose(1, 2).flatten(0, 1)
        held = tokens.new_zeros(sum(groups), *tokens.shape[1:]).index_copy(0, slots, tokens)
        parts = zip(torch.split(held, groups), documents.sizes, strict=True)
        return tuple(part.view(*size, *part.shape[1:]).transpose(1, 2) for part, size in parts)

    parts = zip(grouped(q), grouped(k), grouped(v), documents.masks, strict=True)
    outs = torch.cat([attend(*part).transpose(1, 2).flatten(0, 1) for part in parts])  # a row a slot (heads, E)
    return outs.index_select(0, slots).view(*documents.slots.shape, *outs.shape[1:]).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (paper A.2.1) without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, documents: Documents | None, cache: Cache | None, layer: int) -> Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, E)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, E)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            out = cache.attend(layer, q, k, v)
        else:
            out = attend(q, k, v) if documents is None else attend_apart(q, k, v, documents)
        return self.wo(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        return self.w2(fused.swiglu(gate, up) if kernels.runs(gate, up) else F.silu(gate) * up)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward: nn.Module
        if config.moe.experts:
            experts = (FeedForward(config) for _ in range(config.moe.experts))
            self.feed_forward = MixtureOfExperts(config.moe, config.dim, experts)
        else:
            self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, for_products=True)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, for_products=not config.moe.experts)

    def forward(self, x: Tensor, table: Tensor, documents: Documents | None, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, documents, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A decoder-only language model.

    `forward(tokens (B, T)) -> logits (B, T, V)`. Attention is causal, within each of the `documents` where rows are
    packed. `positions` (B, T) defaults to 0..T-1; a cache needs them and no documents.
    With `only` (B, T) bool the head runs at those N tokens alone, and the logits are (N, V). With `targets`, (B, T) or
    (N,), the sum of -log p(target) comes in place of logits, a float32 scalar; large logits never exist as a whole.
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        table = rotary_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rotary", table, persistent=False)

    @classmethod
    def without_weights(cls, config: ModelConfig) -> Transformer:
        """A model whose weights are on the meta device, to be put there; its rotary table is as it should be."""
        with torch.device("meta"):
            model = cls(config)
        model.rotary = rotary_table(config.head_dim, config.max_seq_len, config.rope_theta)
        return model

    def initial_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and first value, on the generator's device, drawn one after the other.

        Normal with deviation 1/sqrt(D); what adds to the residual stream is scaled by 1/sqrt(2 n_layers) more. The
        paper does not say; ours, not yet compared with others.
        """
        std = self.config.dim**-0.5
        for name, parameter in self.named_parameters():
            value = torch.ones(parameter.shape, device=generator.device)
            if parameter.ndim > 1:
                residual = name.endswith(("wo.weight", "w2.weight"))
                value.normal_(std=std * (2 * self.config.n_layers) ** -0.5 if residual else std, generator=generator)
            yield name, value

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set `initial_weights` on one process."""
        for name, value in self.initial_weights(generator or torch.default_generator):
            self.get_parameter(name).copy_(value)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last layer's normalised states (B, T, D); arguments as `forward`."""
        if positions is None:
            assert cache is None, "a cache needs positions"
            table = self.rotary[: tokens.shape[1]]  # (T, E/2, 2)
        else:
            table = self.rotary[positions].unsqueeze(1)  # (B, 1, T, E/2, 2)
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, table, documents, cache, i)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self) -> Tensor:
        """The output's weight (V, D), for a product that is not the output's own."""
        return self.output.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        only: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        hidden = self.hidden(tokens, positions=positions, documents=documents, cache=cache)
        hidden = hidden if only is None else hidden[only]
        if targets is not None and targets.numel() * self.config.vocab_size > LARGE:
            return chunked_loss(hidden.flatten(0, -2), self.head(), targets.flatten())
        logits: Tensor = self.output(hidden)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").sum()
