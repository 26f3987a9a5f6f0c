"""The decoder against Llama 2's published sizes and against independent ways to compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.config import ConfigError
from puna.data import packing
from puna.model.sizes import LLAMA_2, SIZES, cache_bytes, ffn_hidden, with_kv_heads
from puna.model.transformer import (
    ModelConfig,
    RMSNorm,
    Transformer,
    attend,
    attend_apart,
    rotary_table,
    rotate,
)
from tests import helpers

pytestmark = pytest.mark.usefixtures("path")

TOKENS = torch.tensor([[1, 300, 301, 302, 303, 304, 305]])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "n_params", "hidden"),
    [
        ("7b", 6_738_415_616, 11008),
        ("13b", 13_015_864_320, 13824),
        ("34b", 33_743_970_304, 22016),
        ("70b", 68_976_648_192, 28672),
    ],
)
def test_sizes_of_llama_2(size: str, n_params: int, hidden: int) -> None:
    config = LLAMA_2[size]
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params() == n_params
    assert config.ffn_hidden == hidden
    assert config.max_seq_len == 4096 and config.norm_eps == 1e-5 and config.rope_theta == 10000.0
    assert config.n_kv_heads == (config.n_heads if size in ("7b", "13b") else 8)


@pytest.mark.parametrize(("n_kv_heads", "factor", "papers", "more"), [(4, 1.229, 1.3, 0.047), (1, 1.243, 1.33, 0.058)])
def test_fewer_key_heads_leave_width_to_the_feed_forward(
    n_kv_heads: int, factor: float, papers: float, more: float
) -> None:
    """A.2.1's 30B, in Llama 1's shape: the same number of parameters, with a little less than the paper's factors."""
    base = ModelConfig(6656, 60, 52, 52, 32000, 17920)
    config = with_kv_heads(base, n_kv_heads)
    assert config.n_kv_heads == n_kv_heads
    assert config.n_params() == base.n_params()
    assert config.ffn_hidden / base.ffn_hidden == pytest.approx(factor, abs=5e-4)
    assert cache_bytes(config) == cache_bytes(base) * n_kv_heads / 52 == 4 * 60 * 128 * n_kv_heads
    wide = replace(base, n_kv_heads=n_kv_heads, ffn_hidden=round(papers * base.ffn_hidden))
    assert wide.n_params() / base.n_params() - 1 == pytest.approx(more, abs=5e-4)
    assert with_kv_heads(config, 52) == base
    with pytest.raises(ConfigError, match="n_heads 52 is not a multiple of n_kv_heads 5"):
        with_kv_heads(base, 5)


def test_a_tied_output_counts_once() -> None:
    config = SIZES["smollm2-135m"]
    with torch.device("meta"):
        model = Transformer(config)
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == config.n_params() == 134_515_008


def test_ffn_hidden_rounds_up() -> None:
    assert ffn_hidden(4096, 256) == 11008  # int(2 * 16384 / 3) = 10922 -> 43 * 256
    assert ffn_hidden(96, 256) == 256  # a whole multiple stays


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 0}, "n_layers is 0: it must be positive"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"dim": 30}, "dim 30 is not an even multiple of n_heads 4"),
        ({"dim": 20}, "dim 20 is not an even multiple of n_heads 4"),  # heads of 5 have a number without a pair
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ],
)
def test_an_impossible_shape_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        helpers.config(**changes)


def test_names_are_metas() -> None:
    layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    layer += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm"]
    names = {f"layers.{i}.{part}.weight" for i in range(2) for part in layer}
    assert set(helpers.model().state_dict()) == names | {"tok_embeddings.weight", "norm.weight", "output.weight"}


def test_rms_norm() -> None:
    norm = RMSNorm(2, eps=0.0)
    torch.nn.init.constant_(norm.weight, 2.0)
    # 3 and 4: root mean square sqrt(12.5)
    close(norm(torch.tensor([3.0, 4.0])), 2 * torch.tensor([3.0, 4.0]) / 12.5**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = 300 * torch.randn(64, 32).to(dtype)  # 300 squared is beyond float16
    x32 = x.float()
    expected = (x32 / (x32.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    actual = RMSNorm(32, 1e-5)(x)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_rotation_is_metas_complex_product() -> None:
    x = torch.randn(2, 3, 5, 8)  # (B, heads, T, E)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 8, 2) / 8))
    angles = torch.outer(torch.arange(5).float(), frequencies)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    close(rotate(x, rotary_table(8, 5, 10000.0)), torch.view_as_real(turned).flatten(-2), 1e-6)


def test_rotation_is_done_in_float32() -> None:
    x, table = torch.randn(1, 1, 200, 8).bfloat16(), rotary_table(8, 200, 10000.0)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_scores_depend_on_the_distance_alone() -> None:
    q, k, table = torch.randn(8), torch.randn(8), rotary_table(8, 50, 10000.0)

    def score(at_q: int, at_k: int) -> Tensor:
        return (
            rotate(q.view(1, 1, 1, 8), table[at_q, None]).flatten()
            @ rotate(k.view(1, 1, 1, 8), table[at_k, None]).flatten()
        )

    close(score(9, 4), score(45, 40))
    assert (score(9, 4) - score(4, 9)).abs() > 1e-3


def test_positions_are_what_the_table_is_read_at() -> None:
    model, stretched = helpers.model(), helpers.model()
    stretched.rotary = stretched.rotary[::2]
    positions = 2 * torch.arange(7)[None]
    close(model(TOKENS, positions=positions), stretched(TOKENS))
    assert (model(TOKENS, positions=positions) - model(TOKENS)).abs().max() > 1e-3
    close(model(TOKENS, positions=positions // 2 + 9), model(TOKENS))  # distances alone matter


def test_grouped_heads_are_repeated_heads() -> None:
    grouped = helpers.model(n_heads=4, n_kv_heads=2)
    full = helpers.model(n_heads=4, n_kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("wk.weight", "wv.weight")):
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    close(grouped(TOKENS), full(TOKENS))


def test_attend_gives_query_heads_their_key_head() -> None:
    q, k, v = torch.randn(3, 4, 2, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    mask = torch.arange(6) <= torch.tensor([0, 3, 5])[:, None, None, None]
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), attn_mask=mask
    )
    close(attend(q, k, v, mask), expected, 1e-6)


def test_attention_apart_is_attention_under_the_whole_mask() -> None:
    documents = torch.cat((torch.zeros(70), torch.ones(9), torch.full((21,), -1))).long().repeat(2, 1)
    documents[1, 30:] = 3
    branches = ((torch.arange(100) >= 60).long() + (torch.arange(100) >= 65)).expand(2, -1)
    q, k, v = (torch.randn(2, heads, 100, 8, requires_grad=True) for heads in (4, 2, 2))
    same = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    tree = (branches[:, None, None, :] == 0) | (branches[:, None, :, None] == branches[:, None, None, :])
    for layout, mask in ((packing.apart(documents), same), (packing.apart(documents, branches), same & tree)):
        assert len(layout.sizes) == 2, "long ones and short ones"
        actual, expected = attend_apart(q, k, v, layout), attend(q, k, v, mask)
        close(actual, expected, 1e-6)
        weight = torch.randn_like(actual)
        for mine, theirs in zip(
            torch.autograd.grad((actual * weight).sum(), (q, k, v)),
            torch.autograd.grad((expected * weight).sum(), (q, k, v)),
            strict=True,
        ):
            close(mine, theirs, 1e-5)


def test_tied_embeddings_share_one_tensor() -> None:
    model = helpers.model(tie_embeddings=True)
    model(TOKENS).sum().backward()
    assert model.output.weight is model.tok_embeddings.weight
    assert len(list(model.parameters())) == len(list(helpers.model().parameters())) - 1


def test_no_token_sees_the_next() -> None:
    model, changed = helpers.model(), TOKENS.clone()
    changed[0, 4] = 340
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after).abs().amax(-1)[0, 4:] > 1e-4).all()


def test_padding_left_right_or_none() -> None:
    model, pad = helpers.model(), 0
    n, pads = TOKENS.shape[1], 3
    alone = model(TOKENS)
    right = model(F.pad(TOKENS, (0, pads), value=pad))
    close(right[:, :n], alone)
    left = F.pad(TOKENS, (pads, 0), value=pad)
    real = F.pad(torch.ones(1, n, dtype=torch.bool), (pads, 0))
    positions = (real.cumsum(1) - 1).clamp(min=0)
    close(model(left, positions=positions, documents=packing.apart(real.long()))[:, pads:], alone)
    assert (model(left)[:, pads:] - alone).abs().max() > 1e-3, "taken for one document, pads are seen"


def test_only_runs_the_head_where_asked() -> None:
    model, only = helpers.model(), torch.tensor([[False, True, False, False, True, False, False]])
    close(model(TOKENS, only=only), model(TOKENS)[only])


def test_bfloat16_is_near_float32() -> None:
    model = helpers.model()
    expected = model(TOKENS)
    actual = model.to(torch.bfloat16)(TOKENS)
    assert actual.dtype == torch.bfloat16
    close(actual.float(), expected, 0.1)  # logits of about 1, 8 bits of them kept through 2 layers
    assert not torch.equal(actual.float(), expected)


def test_init_scales_the_residual_branches() -> None:
    model = helpers.model(dim=256, n_layers=8, ffn_hidden=512)
    deviations = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
    for name, deviation in deviations.items():
        residual = name.endswith(("wo.weight", "w2.weight"))
        assert deviation == pytest.approx(256**-0.5 / (4 if residual else 1), rel=0.03), name
    assert all((p == 1).all() for p in model.parameters() if p.ndim == 1)
