"""Experts: routing by hand, dropless output against every token on its own, capacity, counts, training."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from puna.config import ConfigError
from puna.generate import weights
from puna.generate.engine import LocalEngine
from puna.model.moe import MixtureOfExperts, MoEConfig, by_expert
from puna.stages import pretrain
from tests import helpers

pytestmark = pytest.mark.usefixtures("path")

EIGHT = MoEConfig(experts=8, top_k=2)


class Times(nn.Module):
    """An expert that multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def layer(config: MoEConfig, *rows: list[float]) -> MixtureOfExperts:
    """Expert i multiplies by 10^i; the router's rows are given."""
    made = MixtureOfExperts(config, len(rows[0]), (Times(10.0**i) for i in range(config.experts)))
    made.gate.weight.data = torch.tensor(rows)
    return made


def test_the_best_two_share_a_token_by_their_odds() -> None:
    three = layer(MoEConfig(experts=3), [0.0, 2.0], [0.0, 1.0], [1.0, 0.0])
    # Router logits of (0, 1) are 2, 1, 0: experts 0 and 1 by e : 1 are 0.7311 and 0.2689; unscaled, 0.665 and 0.245.
    expected = torch.tensor([[[0.0, 0.731059 + 10 * 0.268941]]])
    torch.testing.assert_close(three(torch.tensor([[[0.0, 1.0]]])), expected)


def test_assignments_are_sorted_by_expert_first_choices_first() -> None:
    chosen = torch.tensor([[1, 0], [0, 1], [1, 2]])
    order, counts = by_expert(chosen, 4)
    # Assignments 0 to 2 are the first choices 1, 0, 1 of tokens 0 to 2, assignments 3 to 5 the second ones 0, 1, 2.
    assert order.tolist() == [1, 3, 0, 2, 4, 5] and counts == [2, 3, 1, 0]
    order, counts = by_expert(chosen, 4, capacity=1)
    assert order.tolist() == [1, 0, 5] and counts == [1, 1, 1, 0]


def test_what_an_expert_cannot_take_adds_nothing() -> None:
    two = layer(MoEConfig(experts=2, capacity_factor=0.5), [1.0, 0.0], [-1.0, 0.0])
    x = torch.tensor([[2.0, 1.0], [2.0, 2.0], [2.0, 3.0], [-2.0, 4.0]])
    a, b = 0.982014, 0.017986  # e^2 : e^-2
    # Half of 2 x 4 / 2 assignments: expert 0 takes the first two of the three tokens that like it best, expert 1 the
    # last one and then the first of those that like it second.
    torch.testing.assert_close(two(x), x * torch.tensor([[a + 10 * b], [a], [0.0], [10 * a]]))
    with torch.inference_mode():
        torch.testing.assert_close(two(x), x * torch.tensor([[a + 10 * b]] * 3 + [[b + 10 * a]]))


def one_by_one(experts: MixtureOfExperts, x: Tensor) -> Tensor:
    """Every token on its own, through all experts."""
    rows = []
    for token in x.flatten(0, -2):
        probabilities = (experts.gate.weight @ token).softmax(0)
        best = probabilities.argsort(descending=True)[: experts.config.top_k]
        total = probabilities[best].sum()
        rows.append(torch.stack([probabilities[i] / total * experts.experts[i](token) for i in best]).sum(0))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_dropless_is_every_token_on_its_own(top_k: int) -> None:
    model = helpers.model(moe=replace(EIGHT, top_k=top_k))
    experts = model.layers[0].feed_forward
    assert isinstance(experts, MixtureOfExperts)
    x = torch.randn(3, 7, 32, requires_grad=True)
    parameters = [x, *experts.parameters()]
    actual, expected = experts(x), one_by_one(experts, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    wish = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad((out * wish).sum(), parameters) for out in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_idle_expert_has_a_gradient_of_zero() -> None:
    """Or ranks that sum gradients would wait for one another."""
    experts = helpers.model(moe=EIGHT).layers[0].feed_forward
    experts(torch.randn(1, 32)).sum().backward()
    gradients = [expert.w1.weight.grad for expert in experts.experts]  # type: ignore[union-attr]
    assert sum(bool(gradient.any()) for gradient in gradients) == 2


def test_the_router_is_computed_in_float32() -> None:
    experts = helpers.model(moe=EIGHT).layers[0].feed_forward
    assert isinstance(experts, MixtureOfExperts)
    x = torch.randn(50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts.gate(x), experts.gate(x.clone()).float())
        assert experts.gate(x).dtype == torch.float32
        inside = experts.gate(x)
    assert torch.equal(inside, experts.gate(x))


def test_parameters_in_all_and_of_a_token() -> None:
    dense, sparse = helpers.model(), helpers.model(moe=EIGHT)
    assert sum(p.numel() for p in sparse.parameters()) == sparse.config.n_params()
    expert, router = 3 * 32 * 48, 8 * 32
    assert sparse.config.n_params() == dense.config.n_params() + 2 * (7 * expert + router)
    assert sparse.config.n_active_params() == dense.config.n_params() + 2 * (expert + router)
    assert dense.config.n_active_params() == dense.config.n_params()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"experts": 2, "top_k": 3}, "top_k is 3 of 2 experts"),
        ({"experts": 2, "top_k": 1}, "top_k is 1 of 2 experts"),
        ({"experts": -1}, "are not negative"),
        ({"experts": 2, "capacity_factor": -1.0}, "are not negative"),
    ],
)
def test_impossible_experts_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MoEConfig(**fields)  # type: ignore[arg-type]


def test_the_balancing_loss_joins_pretraining() -> None:
    model = helpers.model(moe=EIGHT)
    cfg = pretrain.PretrainConfig(out=None, data=(), model=model.config)  # type: ignore[arg-type]
    assert pretrain.balance(cfg, model) == 0.0  # no forward pass yet
    model(torch.randint(helpers.VOCAB, (2, 30)))
    term = pretrain.balance(cfg, model)
    assert isinstance(term, Tensor)
    assert 0.01 * 2 - 1e-3 < float(term.detach()) < 0.01 * 8
    term.backward()
    assert all(block.feed_forward.gate.weight.grad.any() for block in model.layers)  # type: ignore[union-attr, operator]
    with torch.inference_mode():
        model(torch.randint(helpers.VOCAB, (2, 30)))
    assert pretrain.balance(cfg, model) == 0.0
    copy.deepcopy(model)


def test_generation_and_packed_weights_go_through_torch() -> None:
    """The compiled step knows no experts; greedy tokens are those of the model without a cache."""
    model = helpers.model(moe=EIGHT)
    prompt = [1, 300, 301, 302]
    expected = list(prompt)
    with torch.inference_mode():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    for held in (model, weights.pack(model, "fp32")):
        [[answer]] = LocalEngine(held, helpers.tokenizer()).generate_ids([prompt], max_new_tokens=8, temperature=0)
        assert answer.tokens == expected[len(prompt) :][: len(answer.tokens)] and answer.tokens
    packed = weights.pack(model, "int8")
    assert packed._pointers is None
    assert isinstance(packed.get_submodule("layers.0.feed_forward.experts.0.w1"), weights.Int8Linear)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        assert (packed(ids) - model(ids)).abs().max() < 0.2
