"""Packing changes nothing but the speed: same losses, no attention across dialogs, nothing lost."""

from __future__ import annotations

import time
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna import losses
from puna.data.packing import (
    acted_lengths,
    answer_steps,
    apart,
    by_length,
    common,
    cut,
    pack,
    pack_pairs,
    pack_plan,
    pad_answers,
    pad_right,
    pair_length,
)
from puna.model.transformer import Documents
from puna.text import chat
from puna.text.chat import Encoded
from tests import helpers

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


def encoded(n: int) -> list[Encoded]:
    return [chat.encode(dialog, helpers.tokenizer()) for dialog in helpers.dialogs(n)]


def test_packed_losses_are_unpacked_losses() -> None:
    model, dialogs = helpers.model(), encoded(9)
    rows = pack(dialogs, 200)
    assert len(rows.tokens) < len(dialogs)
    logits = model(rows.tokens, positions=rows.positions, documents=apart(rows.documents))[:, :-1]
    packed = losses.token_logprobs(logits, rows.tokens[:, 1:])[rows.mask[:, 1:]]
    alone = []
    for dialog in dialogs:
        tokens, mask = torch.tensor([dialog.tokens]), torch.tensor([dialog.mask])
        alone.append(losses.token_logprobs(model(tokens)[:, :-1], tokens[:, 1:])[mask[:, 1:]])
    assert len(packed) == sum(map(len, alone))
    torch.testing.assert_close(packed.sort().values, torch.cat(alone).sort().values, rtol=0, atol=1e-5)


def test_no_attention_across_dialogs() -> None:
    model, rows = helpers.model(), pack(encoded(9), 200)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, positions=rows.positions, documents=apart(rows.documents))[0]

    first, second = rows.documents[0] == 0, rows.documents[0] == 1
    assert first.any() and second.any()
    changed = rows.tokens.clone()
    changed[0, first] = 300
    before, after = logits(rows.tokens), logits(changed)
    assert torch.equal(before[second], after[second])
    assert not torch.equal(before[first], after[first])


def seen(documents: Documents) -> torch.Tensor:
    """(B, T, T): True where a token's attention may look."""
    slots, shape = documents.slots.flatten(), documents.slots.shape
    all_slots = sum(n * longest for n, longest in documents.sizes)
    looks = torch.zeros(all_slots, all_slots, dtype=torch.bool)
    begin = 0
    for (n, longest), mask in zip(documents.sizes, documents.masks, strict=True):
        for i in range(n):
            end = begin + longest
            looks[begin:end, begin:end] = torch.ones(longest, longest).tril() if mask is None else mask[i, 0]
            begin = end
    assert len(slots.unique()) == len(slots), "two tokens have one slot"
    of_all = looks[slots][:, slots].view(*shape, *shape)
    rows = torch.arange(len(documents.slots))
    assert of_all.sum() == of_all[rows, :, rows].sum(), "a token looks into another row"
    return of_all[rows, :, rows]


def test_documents_by_hand() -> None:
    # Two tokens of one dialog, one of the next, a pad.
    assert seen(apart(torch.tensor([[0, 0, 1, -1]])))[0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_every_token_is_kept_in_order() -> None:
    dialogs = encoded(12)
    rows = pack(dialogs, 200)
    found = Counter()
    for row in range(len(rows.tokens)):
        for document in range(int(rows.documents[row].max()) + 1):
            where = rows.documents[row] == document
            assert rows.positions[row][where].tolist() == list(range(int(where.sum())))
            found[(tuple(rows.tokens[row][where].tolist()), tuple(rows.mask[row][where].tolist()))] += 1
    assert found == Counter((tuple(d.tokens), tuple(d.mask)) for d in dialogs)
    pads = rows.documents == -1
    assert not rows.mask[pads].any() and not rows.tokens[pads].any()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(5, 40))
def test_pack_plan_loses_nothing_that_fits(lengths: list[int], seq_len: int) -> None:
    plan = pack_plan(lengths, seq_len)
    assert sorted(i for row in plan for i in row) == [i for i, length in enumerate(lengths) if length <= seq_len]
    assert all(0 < sum(lengths[i] for i in row) <= seq_len for row in plan)


def test_pack_plan_is_tight() -> None:
    assert pack_plan([10, 30, 20, 40, 60, 50], 70) == [[4, 0], [5, 2], [3, 1]]  # 210 tokens in 3 rows of 70


def test_pack_plan_takes_the_tightest_room() -> None:
    assert pack_plan([60, 55, 41, 3], 100) == [[0], [1, 2, 3]]  # 3 goes where 4 are left, not where 40 are


def test_pack_plan_of_many_rows_is_quick() -> None:
    began = time.perf_counter()
    assert len(pack_plan([300] * 50_000, 512)) == 50_000
    assert time.perf_counter() - began < 5, "it looks at every open row for every dialog"


def test_pack_pairs_by_hand() -> None:
    packed = pack_pairs([([1, 2, 3], [1, 2, 4, 5]), ([1, 6], [1, 7]), ([8, 9], [8, 9, 9])])
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 1, 6, 7, 8, 9, 9, 9]]
    assert packed.branches.tolist() == [[0, 0, 1, 2, 2, 0, 1, 2, 0, 1, 2, 2]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1, 0, 1, 1, 2]]
    assert packed.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert packed.ends.tolist() == [[2, 6, 9], [4, 7, 11]]


def test_answer_steps_by_hand() -> None:
    pairs = [([1, 2, 3], [1, 2, 4, 5]), ([1, 6], [1, 7])]
    packed = pack_pairs(pairs)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 1, 6, 7]]
    steps = answer_steps(pairs, packed)
    # 3 follows 2, and so does 4, which stands behind 3; 5 follows 4. 6 and 7 both follow 1.
    assert steps.before.tolist() == [1, 1, 3, 5, 5]
    assert steps.columns.tolist() == [2, 3, 4, 6, 7]
    assert steps.answers.tolist() == [0, 2, 2, 1, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=5), min_size=1, max_size=4))
def test_like_lengths_stand_together_and_no_document_sees_another(lengths: list[list[int]]) -> None:
    rows = [[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    width = max(map(len, rows))
    documents = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    layout = apart(documents)
    expected = (documents[:, :, None] == documents[:, None, :]).tril()
    assert torch.equal(seen(layout), expected)
    assert layout.masks == (None,) * len(layout.sizes)
    held = [n for row in lengths for n in row] + [width - len(row) for row in rows if len(row) < width]
    for _, longest in layout.sizes:
        assert longest in held
    assert sum(n for n, _ in layout.sizes) == len(held)
    assert sum(n * longest for n, longest in layout.sizes) <= sum(max(2 * n, 64) for n in held)


def test_tree_mask_by_hand() -> None:
    documents, branches = torch.tensor([[0, 0, 0, 1, -1]]), torch.tensor([[0, 1, 2, 0, 0]])
    assert seen(apart(documents, branches))[0].tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, False, True, False, False],  # the rejected answer sees the prompt and itself
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=9))
def test_pack_pairs_keeps_both_answers_whole(pairs: list[tuple[list[int], list[int]]]) -> None:
    packed = pack_pairs(pairs)
    mask = seen(apart(packed.documents, packed.branches))
    assert packed.tokens.shape == (1, sum(pair_length(*pair) for pair in pairs))
    for i, pair in enumerate(pairs):
        assert common(*pair) < min(map(len, pair))
        for answer in (0, 1):
            read = mask[0, packed.ends[answer, i]]
            assert packed.tokens[0][read].tolist() == pair[answer]
            assert packed.positions[0][read].tolist() == list(range(len(pair[answer])))


def test_pad_right() -> None:
    tokens, lengths = pad_right([[5, 6, 7], [8]], pad=9)
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert lengths.tolist() == [3, 1]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 200))
def test_by_length_keeps_its_budget(lengths: list[int], max_tokens: int) -> None:
    batches = by_length(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(ordered)


def test_by_length_fills_its_budget() -> None:
    assert by_length([1, 9, 2, 2, 10], 6) == [[0, 2, 3], [1], [4]]


def test_cut_halves_the_largest() -> None:
    assert cut([[4, 5, 6, 7], [1]], 2) == [[4, 5, 6, 7], [1]]
    assert sorted(map(sorted, cut([[4, 5, 6, 7], [1, 2, 3]], 4))) == [[1], [2, 3], [4, 5], [6, 7]]
    assert sorted(cut([[0, 1, 2]], 3)) == [[0], [1], [2]]


def test_answers_are_actions() -> None:
    tokens, lengths, mask = pad_answers([[1, 5], [1, 6, 7]], [[8, 9, 2], [2]], pad=0)
    assert tokens.tolist() == [[1, 5, 8, 9, 2], [1, 6, 7, 2, 0]] and lengths.tolist() == [5, 4]
    # Action t emits token t + 1: the answer's first token is emitted at the prompt's last.
    assert mask.tolist() == [[False, True, True, True], [False, False, True, False]]
    assert acted_lengths(mask) == [5, 4]
    assert acted_lengths(torch.nn.functional.pad(mask, (0, 3))) == [5, 4]
