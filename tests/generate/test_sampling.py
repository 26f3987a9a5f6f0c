"""Draws worked by hand, draws counted, and draws that batch-mates must not disturb."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from puna import kernels
from puna.config import ConfigError
from puna.generate import sampling as samplings
from puna.generate.sampling import Sampling, Settings, adjust, likeliest, uniforms

WHOLE = Sampling()
pytestmark = pytest.mark.usefixtures("path")


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw with one setting but for the temperature."""
    rows = [dataclasses.replace(sampling, temperature=float(t)) for t in temperature]
    return samplings.sample(logits, uniform, Settings.of(rows, logits.device))


def draw(probs: list[float], uniform: list[float], sampling: Sampling, temperature: float = 1.0) -> list[int]:
    """The tokens that one distribution gives at several uniform numbers."""
    logits = torch.tensor(probs).log().expand(len(uniform), -1)
    tokens, _ = sample(logits, torch.full((len(uniform),), temperature), torch.tensor(uniform), sampling)
    return tokens.tolist()


def chi_square(tokens: Tensor, probs: Tensor) -> float:
    expected = probs * len(tokens)
    return float(((torch.bincount(tokens, minlength=len(probs)) - expected) ** 2 / expected).sum())


def test_uniforms_depend_on_their_key_alone() -> None:
    first = uniforms(7, request=2, sample=1, count=8)
    assert torch.equal(first, uniforms(7, 2, 1, 20)[:8])
    for other in (uniforms(8, 2, 1, 8), uniforms(7, 1, 1, 8), uniforms(7, 2, 0, 8), uniforms(-7, 2, 1, 8)):
        assert not torch.equal(first, other)
    many = uniforms(0, 0, 0, 100_000)
    assert many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 0.005


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    assert draw([0.2, 0.5, 0.3], [0.0, 0.19, 0.21, 0.69, 0.71, 0.999], WHOLE) == [0, 0, 1, 1, 2, 2]


def test_temperature_flattens() -> None:
    # p^(1/2) of 0.8 and 0.2 are as 2 to 1: the first has 2/3.
    assert draw([0.8, 0.2], [0.66, 0.67], WHOLE, temperature=2.0) == [0, 1]
    assert draw([0.8, 0.2], [0.79, 0.81], WHOLE, temperature=1.0) == [0, 1]


def test_temperature_0_is_greedy() -> None:
    assert draw([0.2, 0.5, 0.3], [0.0, 0.5, 0.999], WHOLE, temperature=0.0) == [1, 1, 1]


def test_the_likeliest_is_never_cut() -> None:
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_p=1e-50)) == [1]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(min_p=1.0)) == [1]


def test_top_k_keeps_k() -> None:
    # 0.5 and 0.3 are left: the first has 0.625 of what is left.
    assert draw([0.2, 0.5, 0.3], [0.0, 0.62, 0.63, 0.999], Sampling(top_k=2)) == [1, 1, 2, 2]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_k=1)) == [1]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_k=99)) == [0]


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    assert draw([0.2, 0.5, 0.3], [0.0, 0.62, 0.63, 0.999], Sampling(top_p=0.6)) == [1, 1, 2, 2]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_p=0.49)) == [1]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_p=0.81)) == [0]


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert draw([0.2, 0.5, 0.3], [0.0, 0.62, 0.63, 0.999], Sampling(min_p=0.5)) == [1, 1, 2, 2]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(min_p=0.61)) == [1]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(min_p=0.3)) == [0]


def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0]] * 4, dtype=torch.bfloat16)
    both = Sampling(repetition_penalty=4.0, logit_bias={0: 1.0})
    every = [Sampling(repetition_penalty=2.0), Sampling(), Sampling(logit_bias={3: -100, 1: 5}), both]
    adjusted = adjust(logits, every, [{0, 1}, {0, 1}, {0}, {0}])
    assert adjusted.tolist() == [[1, -4, 1, 4], [2, -2, 1, 4], [2, 3, 1, -96], [1.5, -2, 1, 4]]
    assert adjusted.dtype == torch.float32
    assert logits.tolist() == [[2.0, -2.0, 1.0, 4.0]] * 4
    assert adjust(logits, every[1:2] * 4, [{0}] * 4) is logits


def test_each_row_has_as_many_likely_tokens_as_it_asks_for() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]] * 4).log()
    every = [Sampling(top_logprobs=1), Sampling(), Sampling(top_logprobs=9), Sampling(top_logprobs=2, temperature=0.5)]
    ids, probs = zip(*(zip(*row, strict=True) if row else ((), ()) for row in likeliest(logits, every)), strict=True)
    assert ids == ((1,), (), (1, 2, 0), (1, 2))
    assert [round(math.exp(p), 4) for row in probs for p in row] == [0.5, 0.5, 0.3, 0.2, 0.6579, 0.2368]


def test_each_row_has_its_own_settings() -> None:
    every = [Sampling(temperature=0), WHOLE, Sampling(top_p=0.6), Sampling(top_k=1), Sampling(min_p=0.61),
             Sampling(temperature=2.0), Sampling(top_k=300, top_p=0.5), Sampling(top_k=20, min_p=0.01)]  # fmt: skip
    logits, uniform = torch.randn(8, 1000) * 3, torch.rand(8)
    together = samplings.sample(logits, uniform, Settings.of(every, logits.device))
    for row, sampling in enumerate(every):
        alone = samplings.sample(logits[row, None], uniform[row, None], Settings.of([sampling], logits.device))
        assert [x.item() for x in alone] == [x[row].item() for x in together]


@pytest.mark.parametrize("k", [5, 16, 17, 300, 1999])
def test_top_k_of_any_width_is_that_of_the_whole_sort(k: int) -> None:
    logits, uniform = torch.randn(64, 2000), torch.rand(64)
    tokens, _ = sample(logits, torch.ones(64), uniform, Sampling(top_k=k))
    probs, ids = logits.double().softmax(-1).sort(descending=True)
    cumulative = probs[:, :k].cumsum(-1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    assert (tokens == ids.gather(1, place).squeeze(1)).float().mean() >= 0.98


def test_top_p_after_top_k_is_a_share_of_what_k_left() -> None:
    # Of 0.5 and 0.3 the first has 0.625: enough for 0.6, not for 0.65.
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_k=2, top_p=0.6)) == [1]
    assert draw([0.2, 0.5, 0.3], [0.999], Sampling(top_k=2, top_p=0.65)) == [2]


@pytest.mark.parametrize("spread", [0.1, 2.0, 4.0, 8.0])
def test_a_nucleus_of_any_width_is_that_of_the_whole_sort(spread: float) -> None:
    logits = torch.randn(64, 6000) * spread
    uniform, sampling = torch.rand(64), Sampling(top_p=0.9)
    tokens, _ = sample(logits, torch.ones(64), uniform, sampling)
    probs, ids = logits.double().softmax(-1).sort(descending=True)
    cumulative = probs.cumsum(-1)
    mass = cumulative.gather(1, (cumulative < 0.9).sum(-1, keepdim=True))  # of the smallest set that holds 0.9
    place = (cumulative <= uniform[:, None] * mass).sum(-1, keepdim=True)
    assert (tokens == ids.gather(1, place).squeeze(1)).float().mean() >= 0.98  # rounding may move a draw on an edge
    assert ((tokens[:, None] == ids).float().argmax(-1) <= (cumulative < 0.9).sum(-1)).all()


CUTS = [WHOLE, Sampling(top_p=0.9), Sampling(top_k=40), Sampling(min_p=0.02), Sampling(top_p=0.7, top_k=300),
        Sampling(top_p=0.9, top_k=16, min_p=0.05), Sampling(temperature=0), Sampling(temperature=0.3, top_p=0.99),
        Sampling(temperature=30.0, top_p=0.5), Sampling(top_k=5000)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 3, 301, 5003])
def test_both_paths_draw_the_same(path: str, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has many equal logits, whose order must be the same too."""
    if path == "torch":
        pytest.skip("compared with the compiled one")
    for spread in (0.3, 2.0, 10.0):
        logits, uniform = (torch.randn(40, vocab) * spread).to(dtype), torch.rand(40)
        logits[:, 1::7] = -torch.inf
        settings = Settings.of(CUTS * 4, logits.device)
        tokens, logprobs = samplings.sample(logits, uniform, settings)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "library", lambda: None)
            expected, _ = samplings.sample(logits, uniform, settings)
        assert (tokens == expected).sum() >= 39  # rounding may move a draw on an edge
        heat = torch.where(settings.greedy, 1.0, settings.temperature).double()
        true = (logits.double() / heat[:, None]).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs.double(), true, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 5, 100])
def test_a_row_that_is_not_finite_has_no_logprob(place: int, broken: float) -> None:
    logits = torch.randn(3, 101)
    logits[1, place] = broken
    for sampling in (WHOLE, Sampling(top_p=0.9), Sampling(temperature=0)):
        tokens, logprobs = sample(logits, torch.full((3,), sampling.temperature), torch.rand(3), sampling)
        assert logprobs.isfinite().tolist() == [True, False, True]
        assert ((tokens >= 0) & (tokens < 101)).all()
    _, [logprob] = sample(torch.full((1, 101), -torch.inf), torch.ones(1), torch.rand(1), WHOLE)
    assert not logprob.isfinite()


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(8, 2000) * torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])[:, None]
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.3, 0.0, 1.0, 2.0, 1.0])
    uniform = torch.rand(8)
    for sampling in (WHOLE, Sampling(top_p=0.9), Sampling(top_k=50), Sampling(top_k=50, top_p=0.8)):
        together = sample(logits, temperature, uniform, sampling)
        for row in range(8):
            alone = sample(*(x[row : row + 1] for x in (logits, temperature, uniform)), sampling)
            assert [x.item() for x in alone] == [x[row].item() for x in together]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits, n = torch.randn(8), 20_000
    tokens, _ = sample(logits.expand(n, -1), torch.full((n,), temperature), uniforms(0, 0, 0, n), WHOLE)
    assert chi_square(tokens, (logits / temperature).softmax(-1)) < 24.3  # 7 degrees of freedom, 1 in 1000


def test_logprobs_are_those_of_the_temperature_alone() -> None:
    logits, temperature = torch.randn(32, 100), torch.rand(32) + 0.5
    for sampling in (WHOLE, Sampling(top_p=0.5), Sampling(top_k=3)):
        tokens, logprobs = sample(logits, temperature, torch.rand(32), sampling)
        expected = (logits / temperature[:, None]).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    tokens, logprobs = sample(logits, torch.zeros(32), torch.rand(32), WHOLE)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5, rtol=0)


def test_the_impossible_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf]]).expand(2, -1)
    last = 1 - 2.0**-24  # the largest number uniforms can give
    for sampling in (WHOLE, Sampling(top_p=0.999), Sampling(top_k=4)):
        tokens, logprobs = sample(logits, torch.ones(2), torch.tensor([0.0, last]), sampling)
        assert tokens.tolist() == [1, 2]
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("settings", [
    {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"top_k": -1}, {"top_k": 2**70}, {"temperature": -0.1},
    {"temperature": 1e-40}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-40},
    {"logit_bias": {1: float("nan")}}, {"max_new_tokens": 0}, {"stop": ("a", "")}, {"top_logprobs": -1},
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
