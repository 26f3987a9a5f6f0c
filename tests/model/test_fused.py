"""The compiled passes give torch's numbers and gradients, whatever the type, the threads and the rows' widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna import kernels
from puna.model import fused
from puna.model.head import chunked_loss
from puna.model.transformer import RMSNorm, attend, rotary_table
from tests import helpers

TYPES = [torch.float32, torch.bfloat16]
WIDTHS = [8, 37, 192]
"""Fewer numbers than fill a register, some over, and whole ones."""


@pytest.fixture(autouse=True, scope="module", params=helpers.BUILDS)
def _compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with helpers.compiled_in(tmp_path_factory.mktemp("cache"), request.param):
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def agree(op: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The op's result and gradients are those of plain operations in float64, to a rounding of the inputs' type."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual, expected = op(*inputs), plain(*exact)
    weight = torch.randn(expected.shape).to(actual.dtype)
    mine = torch.autograd.grad((actual * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight.double()).sum(), exact)
    for ours, true in zip((actual, *mine), (expected, *theirs), strict=True):
        allowed = 2e-6 if ours.dtype == actual.dtype == torch.float32 else 1e-2
        largest = max(1.0, float(true.detach().abs().max()))
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=allowed * largest)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("out", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(dtype: torch.dtype, out: torch.dtype, width: int) -> None:
    x, weight = numbers(3, 67, width, dtype=dtype), numbers(width)
    agree(
        lambda x, weight: fused.rms_norm(x, weight, 1e-5, out),
        lambda x, weight: F.rms_norm(x, (width,), weight, 1e-5),
        x,
        weight,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    gate, up = numbers(101, width, dtype=dtype, scale=4), numbers(101, width, dtype=dtype)
    agree(fused.swiglu, lambda gate, up: F.silu(gate) * up, gate, up)


def test_swiglu_of_the_extremes() -> None:
    gate = torch.tensor([-torch.inf, -200.0, -1e-30, 0.0, 1e-30, 200.0, torch.inf, torch.nan])
    torch.testing.assert_close(fused.swiglu(gate, torch.ones(8)), F.silu(gate), equal_nan=True)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [2, 20, 64])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotate(dtype: torch.dtype, width: int, heads: int) -> None:
    x, table = numbers(2, 19, heads, width, dtype=dtype), rotary_table(width, 50, 10000.0)
    rows = table[torch.randint(50, (2, 19))].unsqueeze(1)
    for angles in (table[:19], rows):
        doubled = torch.view_as_complex(angles.double())

        def plain(x: Tensor, doubled: Tensor = doubled) -> Tensor:
            pairs = torch.view_as_complex(x.transpose(1, 2).unflatten(-1, (-1, 2)).contiguous())  # type: ignore[no-untyped-call]
            return torch.view_as_real(pairs * doubled).flatten(-2)

        agree(lambda x, angles=angles: fused.rotate(x.transpose(1, 2), angles), plain, x)


@pytest.mark.parametrize("n", [1, 7, 64, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 3, 48), (2, 1, 6), (6, 2, 130)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_attend(dtype: torch.dtype, masked: bool, heads: int, kv_heads: int, width: int, n: int) -> None:
    if not fused.attends(*(torch.zeros(1, 1, 1, 2, dtype=dtype),) * 3):
        pytest.skip("no products of bfloat16")
    q, k, v = (numbers(2, n, count, width, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for rows in (2, 1):
        mask = causal & (torch.rand(rows, 1, n, n) > 0.5) | torch.eye(n, dtype=torch.bool)

        def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = mask if masked else causal) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

        def op(*inputs: Tensor, mask: Tensor | None = mask if masked else None) -> Tensor:
            return fused.attend(*(x.transpose(1, 2) for x in inputs), mask)

        agree(op, plain, q, k, v)


def test_attend_of_few_queries_over_many_keys() -> None:
    q, k, v = numbers(3, 4, 2, 8), numbers(3, 2, 90, 8), numbers(3, 2, 90, 8)
    mask = torch.arange(90) <= torch.tensor([0, 40, 89])[:, None, None, None]
    agree(
        lambda q, k, v: fused.attend(q, k, v, mask),
        lambda q, k, v: F.scaled_dot_product_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), attn_mask=mask),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("vocab", [5, 301, 2048])
@pytest.mark.parametrize("dtype", TYPES)
def test_loss_and_slope(dtype: torch.dtype, vocab: int) -> None:
    logits, targets = torch.randn(33, vocab).mul(5).to(dtype), torch.randint(vocab, (33,))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    [slope] = torch.autograd.grad(expected, exact)
    logprob = fused.loss_and_slope(logits, targets)
    torch.testing.assert_close(-logprob.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), slope, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_what_is_no_number_stays_none() -> None:
    """A broken update is dropped by its norm: it must be seen."""
    broken = torch.full((2, 40), torch.nan)
    assert fused.rms_norm(broken, torch.ones(40), 1e-5, torch.float32).isnan().all()
    assert fused.loss_and_slope(broken.clone(), torch.zeros(2, dtype=torch.int64)).isnan()
    q = torch.full((1, 1, 40, 8), torch.nan)
    assert fused.attend(q, q, torch.ones_like(q), None).isnan().all()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotate", "attend", "loss"])
def test_threads_change_nothing(name: str) -> None:
    x, weight, found, kept = numbers(4, 100, 3, 32), numbers(32), [], torch.get_num_threads()
    heads = x.transpose(1, 2)
    ops: dict[str, Callable[[], Tensor]] = {
        "rms_norm": lambda: fused.rms_norm(x, weight, 1e-5, torch.float32),
        "swiglu": lambda: fused.swiglu(x, x * weight),
        "rotate": lambda: fused.rotate(heads, rotary_table(32, 100, 10000.0)) * weight,
        "attend": lambda: fused.attend(heads, heads * weight, heads, None),
        "loss": lambda: chunked_loss(x.flatten(0, 2), weight.expand(50, 32), torch.arange(1200) % 50),
    }
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops[name]()
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_runs_on_plain_tensors_of_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    assert kernels.runs(x, torch.nn.Parameter(x), x.bfloat16())
    assert not kernels.runs(x.double()) and not kernels.runs(x.to("meta")) and not kernels.runs(x.as_subclass(Other))
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert not kernels.runs(x)


class Other(Tensor):
    """Not torch's own, as a sharded one is."""


@pytest.mark.parametrize("n", [fused.SHORT, fused.SHORT + 1])
def test_long_rows_are_attended_by_torch(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, heads, n, 16) for heads in (4, 2, 2))
    assert fused.attends(q, k, v) == (n == fused.SHORT)
    actual = attend(q, k, v)
    monkeypatch.setattr(kernels, "library", lambda: None)
    torch.testing.assert_close(actual, attend(q, k, v), rtol=0, atol=1e-5)


def test_a_query_that_sees_nothing_has_nothing() -> None:
    q, k, v = (numbers(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    out = fused.attend(q, k, v, mask)
    assert not out[:, :, 2].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_what_a_pass_would_misread_is_refused() -> None:
    q, k = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 5, 8)
    refused: list[Callable[[], Tensor]] = [
        lambda: fused.rotate(q, rotary_table(8, 4, 10000.0)),
        lambda: fused.rotate(q, torch.ones(1, 1, 5, 4, 2)),
        lambda: fused.rms_norm(q, torch.ones(7), 1e-5, torch.float32),
        lambda: fused.swiglu(q, q.bfloat16()),
        lambda: fused.attend(q, k, k[:, :, :4], None),
        lambda: fused.attend(q, k[:, :, :4], k[:, :, :4], None),
        lambda: fused.attend(q, k, k, torch.zeros(2, 1, 5, 5)),
        lambda: fused.attend(*(x[..., :7].bfloat16() for x in (q, k, k)), None),
        lambda: fused.loss_and_slope(torch.ones(3, 9), torch.ones(3, dtype=torch.int32)),
    ]
    for op in refused:
        with pytest.raises(ValueError, match=r"for|not|bool|key|ids|pairs"):
            op()


def test_another_default_type_changes_nothing() -> None:
    x, weight = torch.randn(6, 40), torch.ones(40)
    expected = fused.rms_norm(x, weight, 1e-5, torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fused.rms_norm(x, weight, 1e-5, torch.float32), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_of_gradients_are_refused() -> None:
    x = numbers(3, 8)
    [slope] = torch.autograd.grad(fused.swiglu(x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()  # type: ignore[no-untyped-call]


def test_a_norm_gives_what_products_take() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(32, 1e-5, for_products=True)(torch.randn(2, 32)).dtype == torch.bfloat16
        assert RMSNorm(32, 1e-5)(torch.randn(2, 32)).dtype == torch.float32
