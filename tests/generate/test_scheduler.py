"""Sharing, preemption and parts change when a token is computed, never which."""

from __future__ import annotations

import random

import pytest
import torch

from puna import kernels
from puna.config import ConfigError
from puna.generate import scheduler as schedulers
from puna.generate import weights
from puna.generate.kv_cache import BLOCK
from puna.generate.sampling import Sampling, uniforms
from puna.generate.scheduler import Scheduler
from puna.generate.sequence import Answer, Request
from puna.model.transformer import Transformer
from tests import helpers

HEAD = [1] + [300 + i % 40 for i in range(2 * BLOCK)]
PROMPTS = [[*HEAD, 310 + i, 320 + i] for i in range(5)] + [[1, *range(330, 330 + n)] for n in (1, 9, 50)]


@pytest.fixture(autouse=True, params=["plain", "packed"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs a model as it is, and packed, which decodes by the compiled step."""
    if request.param == "packed":
        if kernels.library() is None:
            pytest.skip("no compiler here, or no AVX2")
        monkeypatch.setattr("tests.generate.test_scheduler.hold", lambda model: weights.pack(model, "fp32"))


def hold(model: Transformer) -> Transformer:
    return model


def made(model: Transformer, size: int = 16, cache_tokens: int | None = None, **more: bool) -> Scheduler:
    tokenizer, model = helpers.tokenizer(), hold(model)
    return Scheduler(model, tokenizer.decode, tokenizer.eos_id, max_batch_size=size, cache_tokens=cache_tokens, **more)  # type: ignore[arg-type]


@torch.inference_mode()
def run(scheduler: Scheduler, n: int = 2, new: int = 40, prompts: list[list[int]] = PROMPTS) -> list[list[Answer]]:
    sampling = Sampling(max_new_tokens=new, seed=3)
    answers = [scheduler.submit(Request(i, prompt, sampling, n, place=i)) for i, prompt in enumerate(prompts)]
    while scheduler.busy:
        scheduler.step()
    assert scheduler.cache.in_use == 0
    return answers


def tokens(answers: list[list[Answer]]) -> list[list[list[int]]]:
    return [[answer.tokens for answer in row] for row in answers]


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that prompt passes run, pads left out."""
    seen: list[int] = []
    true = schedulers.PromptPass

    def counted(cache: object, blocks: object, starts: list[int], lengths: list[int]) -> object:
        seen.append(sum(lengths))
        return true(cache, blocks, starts, lengths)  # type: ignore[arg-type]

    monkeypatch.setattr(schedulers, "PromptPass", counted)
    return seen


def test_a_full_cache_preempts_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.talker(end=0.01)
    expected = tokens(run(made(model), n=4, new=150))
    preempted: list[int] = []
    true = Scheduler._preempt

    def counted(scheduler: Scheduler, row: object) -> None:
        preempted.append(scheduler.running)
        true(scheduler, row)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    assert tokens(run(made(model, cache_tokens=model.config.max_seq_len + 2 * BLOCK), n=4, new=150)) == expected
    assert len(preempted) > 5


def test_prompts_that_begin_alike_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.model()
    alone = [tokens(run(made(model), prompts=[prompt])) for prompt in PROMPTS[:1]]
    seen = count_passes(monkeypatch)
    together = tokens(run(made(model), n=16))
    assert together[0][:2] == alone[0][0]
    shared = len(PROMPTS[0]) - len(HEAD) + 1  # the last token of the head fills no block
    assert sum(seen) == sum(map(len, PROMPTS)) - 4 * (len(PROMPTS[0]) - shared)


def test_a_long_prompt_is_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.model()
    expected = tokens(run(made(model)))
    monkeypatch.setattr(schedulers, "PREFILL_TOKENS", BLOCK)
    seen = count_passes(monkeypatch)
    assert tokens(run(made(model))) == expected
    assert max(seen) == BLOCK


@torch.inference_mode()
def test_interleaved_a_running_sequence_waits_for_one_pass_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulers, "PREFILL_TOKENS", BLOCK)
    scheduler, sampling = made(helpers.model(), serving=True), Sampling(max_new_tokens=60)
    [first] = scheduler.submit(Request(0, [1, 2, 3], sampling))
    scheduler.step()
    scheduler.submit(Request(1, HEAD, sampling))
    seen = count_passes(monkeypatch)
    for i in range(6):
        scheduler.step()
        assert len(first.tokens) == i + 2
        assert len(seen) <= i + 1


@torch.inference_mode()
def test_cancelled_at_any_time_a_request_leaves_nothing() -> None:
    scheduler, sampling = made(helpers.model(), size=4), Sampling(max_new_tokens=50)
    requests = [Request(i, prompt, sampling, 3) for i, prompt in enumerate(PROMPTS)]
    answers = [scheduler.submit(request) for request in requests]
    for request, row in zip(requests[:-1], answers, strict=False):
        scheduler.step()
        left = [answer for answer in row if answer.finish is None]
        assert {id(answer) for answer, _ in scheduler.cancel(request)} == set(map(id, left))
        assert all(answer.finish for answer in row)
    while scheduler.busy:
        scheduler.step()
    assert scheduler.cache.in_use == 0
    assert [len(answer.tokens) for answer in answers[-1]] == [50, 50, 50]


@torch.inference_mode()
@pytest.mark.parametrize("serving", [False, True])
def test_the_last_one_running_never_preempts_itself(serving: bool) -> None:
    """What a waiting prompt holds is taken back, though it be the only one that waits."""
    model = helpers.talker(end=1e-4)
    least = model.config.max_seq_len + 2 * BLOCK
    scheduler, sampling = made(model, cache_tokens=least, serving=serving), Sampling(max_new_tokens=500)
    long = [1] + [300 + i % 40 for i in range(4 * BLOCK - 3)]
    [first] = scheduler.submit(Request(0, long[: BLOCK + 1], sampling))
    [second] = scheduler.submit(Request(1, long, sampling))
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
        assert steps < 1500
    assert first.finish and second.finish


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(6))
def test_random_work_in_a_small_cache_draws_as_the_plain_model(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    model = helpers.talker(end=0.01)
    monkeypatch.setattr(schedulers, "PREFILL_TOKENS", rng.choice([1, 40, 2048]))
    cache_tokens = model.config.max_seq_len + BLOCK * rng.randint(2, 6)
    scheduler = made(model, rng.randint(1, 6), cache_tokens, serving=bool(seed % 2))
    kept: list[list[Answer]] = []
    requests: list[Request] = []
    for i in range(14):
        prompt = [1, *HEAD[: rng.choice([0, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])], 300 + i % 3]
        requests.append(Request(i, prompt, Sampling(max_new_tokens=rng.randint(1, 120), seed=i), rng.randint(1, 5)))
        kept.append(scheduler.submit(requests[-1]))
        for _ in range(rng.randint(0, 20)):
            scheduler.step()
        if rng.random() < 0.2:
            scheduler.cancel(rng.choice(requests))
    while scheduler.busy:
        scheduler.step()
    assert scheduler.cache.in_use == 0
    for answer in (answer for answers in kept for answer in answers if answer.tokens):
        prompt, tokens = answer.request.prompt, torch.tensor(answer.tokens)
        probs = model(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1].softmax(-1)
        above = probs.cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
        below = above - probs.gather(1, tokens[:, None]).squeeze(1)
        number = uniforms(answer.request.sampling.seed, 0, answer.sample, len(tokens))
        assert ((number > below - 1e-5) & (number < above + 1e-5)).all()


@torch.inference_mode()
def test_a_served_answer_is_kept_for_the_dialogs_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sampling = made(helpers.model(), serving=True), Sampling(max_new_tokens=BLOCK + 8)
    [answer] = scheduler.submit(Request(0, HEAD, sampling))
    while scheduler.busy:
        scheduler.step()
    seen = count_passes(monkeypatch)
    scheduler.submit(Request(1, [*HEAD, *answer.tokens, 301, 302], Sampling(max_new_tokens=1)))
    scheduler.step()
    assert sum(seen) <= BLOCK + 3


@torch.inference_mode()
def test_new_weights_go_on_from_what_the_old_ones_drew() -> None:
    old, new = helpers.model(), helpers.model(seed=1)
    scheduler, greedy = made(old, size=4), Sampling(temperature=0, max_new_tokens=40)
    answers = [scheduler.submit(Request(i, prompt, greedy))[0] for i, prompt in enumerate(PROMPTS)]
    for _ in range(9):
        scheduler.step()
    scheduler.update_weights(new)
    before = [list(answer.tokens) for answer in answers]
    assert sorted(map(len, before)) == [0] * 4 + [9] * 4
    assert scheduler.cache.in_use == 0
    while scheduler.busy:
        scheduler.step()
    for prompt, drawn, answer in zip(PROMPTS, before, answers, strict=True):
        rest = Sampling(temperature=0, max_new_tokens=40 - len(drawn))
        alone = made(new)
        [expected] = alone.submit(Request(0, prompt + drawn, rest))
        while alone.busy:
            alone.step()
        assert answer.tokens == drawn + expected.tokens


def test_without_sharing_every_prompt_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.model()
    expected = tokens(run(made(model)))
    seen = count_passes(monkeypatch)
    assert tokens(run(made(model, share_prompts=False))) == expected
    assert sum(seen) == sum(map(len, PROMPTS))


@torch.inference_mode()
def test_a_row_that_is_not_finite_ends_alone() -> None:
    model = helpers.model()
    model.tok_embeddings.weight[77] = torch.nan
    scheduler, well = made(model), Sampling(max_new_tokens=9, logit_bias={77: -1000.0})
    prompt = [1, *range(100, 100 + BLOCK + 20)]
    [sick] = scheduler.submit(Request(0, prompt, Sampling(max_new_tokens=9, logit_bias={77: 1000.0})))
    [beside] = scheduler.submit(Request(1, [1, 5], well))
    while scheduler.busy:
        scheduler.step()
    assert (sick.finish, sick.tokens) == ("error", [77])
    [again] = scheduler.submit(Request(2, prompt, well))  # in the same blocks
    while scheduler.busy:
        scheduler.step()
    assert [(answer.finish, len(answer.tokens)) for answer in (beside, again)] == [("length", 9)] * 2
    other = made(model)
    [expected] = other.submit(Request(2, prompt, well))
    while other.busy:
        other.step()
    assert again.tokens == expected.tokens


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(0, [], Sampling()), "prompt 0 has 0 tokens"),
        (Request(0, [1, 384], Sampling()), "prompt 0 has a token that is not among the model's 384"),
        (Request(0, [1], Sampling(logit_bias={400: 1.0})), "logit_bias has a token"),
        (Request(0, [1], Sampling(), n=0), "n is 0"),
    ],
)
def test_what_cannot_be_served_is_refused(request_: Request, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        made(helpers.model()).submit(request_)


def test_a_cache_too_small_for_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small for the model's context of 256"):
        made(helpers.model(), cache_tokens=256)


@torch.inference_mode()
def test_a_penalised_token_does_not_come_again_and_a_biased_one_does() -> None:
    scheduler = made(helpers.model())
    greedy = Sampling(temperature=0, max_new_tokens=30)
    [plain] = scheduler.submit(Request(0, [1, 5], greedy))
    penalised = Sampling(temperature=0, max_new_tokens=30, repetition_penalty=100.0)
    [varied] = scheduler.submit(Request(1, [1, 5], penalised))
    [biased] = scheduler.submit(Request(2, [1, 5], Sampling(max_new_tokens=30, logit_bias={77: 100.0})))
    while scheduler.busy:
        scheduler.step()
    assert len(set(plain.tokens)) < len(plain.tokens)
    assert len(set(varied.tokens)) == len(varied.tokens)
    assert set(biased.tokens) == {77}
