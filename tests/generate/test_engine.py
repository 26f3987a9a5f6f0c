"""What a sequence becomes must not depend on where, when and beside whom it is generated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna import parallel
from puna.config import ConfigError, DataError
from puna.generate import scheduler
from puna.generate.engine import LocalEngine
from puna.generate.kv_cache import BLOCK, BlockCache
from puna.model.sizes import cache_bytes
from puna.model.transformer import Cache, Documents, Transformer
from puna.types import Completion, Dialog
from tests import helpers

PROMPTS = [[1, *range(300, 300 + n)] for n in (3, 20, 1, 7, 12, 5, 31, 2)]


def engine(max_batch_size: int = 64, model: Transformer | None = None) -> LocalEngine:
    return LocalEngine(model or helpers.model(), helpers.tokenizer(), max_batch_size=max_batch_size)


def tokens(answers: list[list[Completion]]) -> list[list[list[int]]]:
    return [[answer.tokens for answer in row] for row in answers]


@dataclasses.dataclass
class ByteTokenizer:
    """Ids 3 to 258 are the bytes."""

    vocab_size: int = helpers.VOCAB
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    chat_format: str = "llama2"
    sha256: str = ""

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


class Parrot(Transformer):
    """Says the same ids after a prompt of a known length, whatever it reads."""

    def __init__(self, prompt: list[int], script: list[int]) -> None:
        super().__init__(helpers.config())
        self.output = nn.Identity()  # type: ignore[assignment]
        said = torch.tensor([0] * (len(prompt) - 1) + script + [2] * 256)
        self.register_buffer("said", 100.0 * nn.functional.one_hot(said, helpers.VOCAB), persistent=False)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        super().hidden(tokens, positions=positions, documents=documents, cache=cache)  # fills the cache
        return self.said[positions]  # type: ignore[no-any-return]


def test_greedy_in_a_batch_is_greedy_alone() -> None:
    together = engine().generate_ids(PROMPTS, max_new_tokens=40, temperature=0)
    for prompt, [answer] in zip(PROMPTS, together, strict=True):
        [[alone]] = engine().generate_ids([prompt], max_new_tokens=40, temperature=0)
        assert alone.tokens == answer.tokens


def test_greedy_with_the_cache_is_greedy_without() -> None:
    model = helpers.model()
    [[answer]] = engine(model=model).generate_ids(PROMPTS[:1], max_new_tokens=100, temperature=0)
    ids = list(PROMPTS[0])
    with torch.inference_mode():
        while len(ids) < len(PROMPTS[0]) + len(answer.tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[len(PROMPTS[0]) :] == answer.tokens


def test_more_requests_than_slots_are_served_as_if_all_had_one() -> None:
    prompts, model = PROMPTS * 5, helpers.talker(end=0.1)
    expected = tokens(engine(256, model).generate_ids(prompts, n=3, max_new_tokens=30))
    assert len({len(answer) for row in expected for answer in row}) > 10  # slots come free at all times
    for slots in (1, 4, 7):
        assert tokens(engine(slots, model).generate_ids(prompts, n=3, max_new_tokens=30)) == expected


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 20}])
def test_draws_do_not_depend_on_batch_mates(cut: dict[str, float]) -> None:
    settings = {"max_new_tokens": 20, "seed": 5} | cut
    a, b, c, d = PROMPTS[:4]
    first = engine().generate_ids([a, b, c], n=2, **settings)[0]  # type: ignore[arg-type]
    assert tokens([first]) == tokens([engine().generate_ids([a, d], n=2, **settings)[0]])  # type: ignore[arg-type]
    [[alone]] = engine().generate_ids([a], **settings)  # type: ignore[arg-type]
    assert alone.tokens == first[0].tokens
    assert tokens([engine().generate_ids([a], n=2, **settings | {"seed": 6})[0]]) != tokens([first])  # type: ignore[arg-type]


def test_a_small_prefill_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(engine().generate_ids(PROMPTS, n=2, max_new_tokens=10))
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 1)
    assert tokens(engine().generate_ids(PROMPTS, n=2, max_new_tokens=10)) == expected


def test_samples_of_one_prompt_differ() -> None:
    [answers] = engine().generate_ids(PROMPTS[:1], n=16, max_new_tokens=8)
    assert len({tuple(answer.tokens) for answer in answers}) == 16


def test_first_tokens_are_drawn_as_the_model_says() -> None:
    model, n = helpers.model(), 4000
    with torch.inference_mode():
        probs, ids = model(torch.tensor([PROMPTS[1]]))[0, -1].softmax(-1).topk(20)
    [answers] = engine(256, model).generate_ids([PROMPTS[1]], n=n, max_new_tokens=1)
    drawn = torch.tensor([answer.tokens[0] for answer in answers])
    expected = torch.cat([probs, 1 - probs.sum(0, keepdim=True)]) * n
    seen = (drawn[:, None] == ids).sum(0)
    seen = torch.cat([seen, n - seen.sum(0, keepdim=True)])
    assert float(((seen - expected) ** 2 / expected).sum()) < 45.3  # 20 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_a_full_forward_pass(temperature: float) -> None:
    model = helpers.talker()
    answers = engine(3, model).generate_ids(PROMPTS, n=2, max_new_tokens=20, temperature=temperature, top_p=0.95)
    for prompt, row in zip(PROMPTS, answers, strict=True):
        for answer in row:
            ids = torch.tensor([prompt + answer.tokens])
            with torch.inference_mode():
                full = (model(ids)[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            expected = full.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=0)


def test_an_answer_ends_with_eos_exactly_when_finished() -> None:
    [answers] = engine(model=helpers.talker(end=0.2)).generate_ids(PROMPTS[:1], n=64, max_new_tokens=6)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert (answer.tokens[-1] == 2) == answer.finished
        assert 2 not in answer.tokens[:-1]
        assert len(answer.tokens) == len(answer.logprobs) == 6 or answer.finished
        assert answer.text == helpers.tokenizer().decode(answer.tokens)


def test_a_stop_id_ends_an_answer_and_is_no_text() -> None:
    prompt = [1, 5]
    made = LocalEngine(Parrot(prompt, [3 + b for b in b"one.two."]), ByteTokenizer())  # type: ignore[arg-type]
    [[answer]] = made.generate_ids([prompt], stop_ids=(3 + ord("."),))
    assert (answer.text, answer.tokens[-1], answer.finished) == ("one", 3 + ord("."), True)
    [[answer]] = made.generate_ids([prompt])
    assert (answer.text, answer.tokens[-1], answer.finished) == ("one.two.", 2, True)
    [[answer]] = made.generate_ids([prompt], max_new_tokens=8)
    assert (answer.text, len(answer.tokens), answer.finished) == ("one.two.", 8, False)


def test_a_stop_text_is_no_part_of_an_answer() -> None:
    prompt = [1, 5]
    made = LocalEngine(Parrot(prompt, [3 + b for b in b"one.two."]), ByteTokenizer())  # type: ignore[arg-type]
    [[answer]] = made.generate_ids([prompt], stop=("e.t",))
    assert (answer.text, len(answer.tokens), answer.finished) == ("on", 5, True)


def test_a_min_p_of_1_is_greedy() -> None:
    greedy = tokens(engine().generate_ids(PROMPTS, max_new_tokens=20, temperature=0))
    assert tokens(engine().generate_ids(PROMPTS, max_new_tokens=20, min_p=1.0)) == greedy
    assert tokens(engine().generate_ids(PROMPTS, max_new_tokens=20, min_p=0.1)) != greedy


def test_a_repetition_penalty_changes_an_answer_where_it_would_repeat_a_token() -> None:
    [[plain]] = engine().generate_ids([[1, 5]], max_new_tokens=30, temperature=0)
    [[varied]] = engine().generate_ids([[1, 5]], max_new_tokens=30, temperature=0, repetition_penalty=100.0)
    first = next(i for i, token in enumerate(plain.tokens) if token in (1, 5, *plain.tokens[:i]))
    assert varied.tokens[:first] == plain.tokens[:first] and varied.tokens[first] != plain.tokens[first]
    assert len(set(varied.tokens)) == len(varied.tokens) == 30


def test_the_context_is_the_limit() -> None:
    full = helpers.config().max_seq_len
    prompts = [[1] * (full - 3), [1, 2], [1] * (full - 1)]
    answers = engine().generate_ids(prompts, max_new_tokens=20, temperature=0)
    assert [len(row[0].tokens) for row in answers] == [3, 20, 1]
    assert not any(row[0].finished for row in answers)
    with pytest.raises(ConfigError, match=f"prompt 1 has {full} tokens and the model's context {full}"):
        engine().generate_ids([[1], [1] * full])


def test_each_dialog_may_have_its_temperature() -> None:
    answers = engine().generate_ids(PROMPTS[:3], max_new_tokens=10, temperature=[0, 1.0, 0])
    greedy = engine().generate_ids(PROMPTS[:3], max_new_tokens=10, temperature=0)
    warm = engine().generate_ids(PROMPTS[:3], max_new_tokens=10, temperature=1.0)
    assert tokens(answers) == tokens([greedy[0], warm[1], greedy[2]])


def test_generate_reads_dialogs() -> None:
    dialogs: list[Dialog] = [[helpers.user("hello")], [helpers.system("be kind"), helpers.user("and who are you?")]]
    answers = engine(model=helpers.talker()).generate(dialogs, n=2, max_new_tokens=12, seed=1)
    assert [len(row) for row in answers] == [2, 2]
    assert all(answer.text == answer.text.strip() for row in answers for answer in row)
    assert engine().generate([]) == []
    with pytest.raises(DataError):
        engine().generate([[helpers.user("a [/INST] b")]])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": [1.0, 1.0]}, "2 temperatures for 1 prompts"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"stop": ("",)}, "stop holds an empty text"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        engine().generate_ids(PROMPTS[:1], **settings)
    with pytest.raises(ConfigError, match="prompt 1 has 0 tokens"):
        engine().generate_ids([[1], []])


def test_new_weights_are_used_at_once() -> None:
    made, other = engine(), helpers.model(seed=1)
    before = made.generate_ids(PROMPTS, max_new_tokens=5, temperature=0)
    made.update_weights(other)
    after = made.generate_ids(PROMPTS, max_new_tokens=5, temperature=0)
    assert (
        tokens(before)
        != tokens(after)
        == tokens(engine(model=other).generate_ids(PROMPTS, max_new_tokens=5, temperature=0))
    )


def _sharded(expected: list[list[list[int]]]) -> None:
    made = engine(model=helpers.model(seed=1))
    made.update_weights(helpers.placed(helpers.model()))
    assert tokens(made.generate_ids(PROMPTS, max_new_tokens=20, temperature=0)) == expected


@pytest.mark.distributed
def test_a_sharded_model_generates_as_the_whole_one() -> None:
    helpers.in_processes(_sharded, tokens(engine().generate_ids(PROMPTS, max_new_tokens=20, temperature=0)))


def test_a_bfloat16_model_generates_in_bfloat16() -> None:
    answers = engine(model=helpers.talker().bfloat16()).generate_ids(PROMPTS, n=2, max_new_tokens=20)
    assert all(answer.tokens and all(map(math.isfinite, answer.logprobs)) for row in answers for answer in row)


def test_a_broken_model_is_not_sampled_from() -> None:
    broken = helpers.model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(AssertionError, match="not finite"):
        engine(model=broken).generate_ids(PROMPTS, max_new_tokens=3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_stream_is_what_generate_gives(temperature: float) -> None:
    made, dialog = engine(model=helpers.talker(end=0.05)), [helpers.user("hello")]
    for seed in range(5):
        [[answer]] = made.generate([dialog], max_new_tokens=40, temperature=temperature, top_p=0.9, seed=seed)
        pieces = made.stream(dialog, max_new_tokens=40, temperature=temperature, top_p=0.9, seed=seed)
        assert "".join(pieces) == answer.text


def test_the_stream_holds_back_broken_characters_and_outer_spaces() -> None:
    dialog, tokenizer = [helpers.user("hi")], ByteTokenizer()
    prompt = [1, *tokenizer.encode("[INST] hi [/INST]")]
    for text, pieces in {
        " é🦙  ok ": ["é", "🦙", "  o", "k"],
        "\n": [],
        "🦙": ["🦙"],
    }.items():
        made = LocalEngine(Parrot(prompt, tokenizer.encode(text)), tokenizer)  # type: ignore[arg-type]
        assert list(made.stream(dialog, temperature=0)) == pieces
        [[answer]] = made.generate([dialog], temperature=0)
        assert answer.text == "".join(pieces)
    cut = LocalEngine(Parrot(prompt, tokenizer.encode("a🦙")), tokenizer)  # type: ignore[arg-type]
    assert "".join(cut.stream(dialog, max_new_tokens=3)) == "a\ufffd"  # the answer ends inside the character


def test_a_stream_can_be_left() -> None:
    pieces = engine(model=helpers.talker(end=0.01)).stream([helpers.user("hello")], temperature=1.0)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]


def test_a_dialog_that_goes_on_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    true = BlockCache.match

    def match(cache: BlockCache, ids: Sequence[int]) -> list[int]:
        found.append(len(held := true(cache, ids)))
        return held

    monkeypatch.setattr(BlockCache, "match", match)
    made, alone = engine(model=helpers.talker(end=0.02)), engine(model=helpers.talker(end=0.02))
    dialog: Dialog = []
    for turn in range(4):
        dialog.append(helpers.user(f"{turn}: who walks to Puno?"))
        said = "".join(made.stream(dialog, max_new_tokens=12, seed=turn, goes_on=True))
        assert (found[-1] > 0) == (turn > 1), "whole blocks of 64 tokens are held"
        assert said == "".join(alone.stream(dialog, max_new_tokens=12, seed=turn)), "with the same words"
        assert found[-1] == 0, "an engine alone begins anew"
        dialog.append(helpers.assistant("a herder"))
    left = made.stream(dialog[:-1], max_new_tokens=12, goes_on=True)
    next(left, None)
    left.close()  # type: ignore[attr-defined]
    said = "".join(made.stream(dialog[:-1], max_new_tokens=12, seed=3, goes_on=True))
    assert found[-1] > 0 and said == "".join(alone.stream(dialog[:-1], max_new_tokens=12, seed=3))
    left = made.stream(dialog[:-1], max_new_tokens=12, goes_on=True)
    next(left, None)
    made.update_weights(helpers.talker(5))
    left.close()  # type: ignore[attr-defined]
    list(made.stream(dialog[:-1], max_new_tokens=2, goes_on=True))
    assert found[-1] == 0, "other weights know nothing of it"


@pytest.mark.parametrize(("sequences", "fitting"), [(0, 1), (4, 2)])  # in all the memory; in the cache, one at least
def test_a_cache_stays_within_its_share_of_the_memory(
    sequences: int, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.model()
    expected = tokens(engine(model=model).generate_ids(PROMPTS, n=4, max_new_tokens=200))
    memory = sequences * scheduler.tokens_of(model.config, 1) * cache_bytes(model.config, torch.float32)
    monkeypatch.setattr(parallel, "memory_of", lambda device: memory)
    sizes: set[int] = set()
    true = BlockCache.take

    def watched(cache: BlockCache) -> int:
        sizes.add(cache.capacity * BLOCK)
        return true(cache)

    monkeypatch.setattr(BlockCache, "take", watched)
    assert tokens(engine(model=model).generate_ids(PROMPTS, n=4, max_new_tokens=200)) == expected
    assert sizes == {scheduler.tokens_of(model.config, fitting)}
