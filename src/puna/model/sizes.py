"""Published shapes as data: Llama 2's four sizes, and small Llamas.

7B, 13B, 70B from their params.json, 34B from CodeLlama's; Table 1 gives context and GQA only.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from puna.model.transformer import ModelConfig


def ffn_hidden(dim: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """Meta's rule for SwiGLU's width: two thirds of 4 dim, times a multiplier, rounded up to a multiple."""
    hidden = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * -(-hidden // multiple_of)


def with_kv_heads(config: ModelConfig, n_kv_heads: int) -> ModelConfig:
    """The same with another number of key and value heads, its feed-forward as much wider as keeps the parameters.

    A.2.1 widens it by 1.3 (GQA) or 1.33 (MQA) for about as many parameters; counted out, a 30B keeps its number with
    1.23 and 1.24, and the paper's factors add 5 and 6 %. ConfigError where the queries' heads are no multiple of these.
    """
    freed = 2 * config.dim * (config.n_kv_heads - n_kv_heads) * config.head_dim  # of wk and wv
    wider = round(freed / (3 * config.dim * max(1, config.moe.experts)))
    return replace(config, n_kv_heads=n_kv_heads, ffn_hidden=config.ffn_hidden + wider)


def cache_bytes(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a token's keys and values."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


LLAMA_2 = {
    "7b": ModelConfig(4096, 32, 32, 32, 32000, ffn_hidden(4096, 256)),
    "13b": ModelConfig(5120, 40, 40, 40, 32000, ffn_hidden(5120, 256)),
    "34b": ModelConfig(8192, 48, 64, 8, 32000, ffn_hidden(8192, 256)),
    "70b": ModelConfig(8192, 80, 64, 8, 32000, ffn_hidden(8192, 4096, 1.3)),
}

SIZES = LLAMA_2 | {
    "smollm2-135m": ModelConfig(576, 30, 9, 3, 49152, 1536, 8192, 1e-5, 100000.0, tie_embeddings=True),
    "stories260k": ModelConfig(64, 5, 8, 4, 512, 172, 512, tie_embeddings=True),
}
