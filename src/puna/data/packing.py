"""Rows of tokens for training: dialogs packed into full rows (paper 3.1), comparisons as well, rollouts padded.

A comparison's two answers follow one prompt. Packed, the prompt stands in the row once and both answers after it, each
blind to the other: the scores and gradients are those of two rows, for the tokens of little more than one. Attention
goes by documents, not by rows, so that all comparisons of a pass are one row, without a pad.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna import parallel
from puna.model.transformer import Documents
from puna.text.chat import Encoded

LEAST = 64  # tokens: shorter documents are attended over together, for groups cost time as well


class Packed(NamedTuple):
    """B rows of T tokens holding several dialogs each. Pads have document -1."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool: True where the loss counts the token
    documents: Tensor  # (B, T) int64: which dialog of the row a token belongs to
    positions: Tensor  # (B, T) int64: restarts at 0 with each dialog


def pack_plan(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Which dialogs share a row: best-fit, longest first. Dialogs longer than seq_len are left out.

    Rows are kept by the room they have left, so that a search looks at no more than seq_len rooms, however many rows.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # the keys of with_room, in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > seq_len:
            continue
        place = bisect_left(rooms, lengths[i])
        if place == len(rooms):
            room = seq_len
            row: list[int] = []
            rows.append(row)
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        row.append(i)
        left = room - lengths[i]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return rows


def pack(dialogs: Sequence[Encoded], seq_len: int) -> Packed:
    """Pack encoded dialogs into rows of seq_len tokens."""
    plan = pack_plan([len(d.tokens) for d in dialogs], seq_len)
    tokens = np.zeros((len(plan), seq_len), np.int64)
    mask = np.zeros((len(plan), seq_len), bool)
    documents = np.full((len(plan), seq_len), -1, np.int64)
    positions = np.zeros((len(plan), seq_len), np.int64)
    for row, members in enumerate(plan):
        begin = 0
        for document, i in enumerate(members):
            end = begin + len(dialogs[i].tokens)
            tokens[row, begin:end] = dialogs[i].tokens
            mask[row, begin:end] = dialogs[i].mask
            documents[row, begin:end] = document
            positions[row, begin:end] = np.arange(end - begin)
            begin = end
    return Packed(*(torch.from_numpy(field) for field in (tokens, mask, documents, positions)))


def apart(documents: Tensor, branches: Tensor | None = None) -> Documents:
    """How to attend within each of the documents (B, T) alone; with `branches` (B, T), as `PackedPairs` has them, no
    token of one answer looks at the other's. Equal numbers side by side are one document, and pads are as well.

    A group's documents have more than half of its longest one's tokens, or LEAST at most.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = starts.flatten().nonzero()[:, 0]
    lengths = torch.diff(begins, append=begins.new_tensor([documents.numel()]))
    kinds = torch.clamp(lengths, min=LEAST).sub(1).log2().floor()  # by powers of two
    place = torch.empty_like(begins)  # of each document's first token among the groups'
    sizes: list[tuple[int, int]] = []
    n_slots = 0
    for kind in torch.unique(kinds):
        members = (kinds == kind).nonzero()[:, 0]
        n, longest = len(members), int(lengths[members].max())
        place[members] = n_slots + longest * torch.arange(n, device=place.device)
        sizes.append((n, longest))
        n_slots += n * longest
    slots = torch.arange(documents.numel(), device=place.device) + (place - begins).repeat_interleave(lengths)
    masks: list[Tensor | None] = [None] * len(sizes)
    if branches is not None:
        held = branches.new_zeros(n_slots).index_copy(0, slots, branches.flatten())
        groups = torch.split(held, [n * longest for n, longest in sizes])
        masks = [_tree(group.view(size)) for group, size in zip(groups, sizes, strict=True)]
    return Documents(slots.view_as(documents), tuple(sizes), tuple(masks))


def _tree(branches: Tensor) -> Tensor:
    """(N, L) -> (N, 1, L, L): True where a token may look at an earlier one of its branch or of what comes before."""
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return seen.tril()[:, None]


class PackedPairs(NamedTuple):
    """One row of T tokens: P comparisons side by side, what the two answers of each have in common once."""

    tokens: Tensor  # (1, T) int64
    documents: Tensor  # (1, T) int64: which comparison a token belongs to
    branches: Tensor  # (1, T) int64: 0 what both answers follow, 1 the chosen one, 2 the rejected one
    positions: Tensor  # (1, T) int64: what they are in a row that holds this answer alone
    ends: Tensor  # (2, P) int64: the column of each chosen answer's last token, and of each rejected one's


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers to one prompt begin with together, the last of either left out: it is scored."""
    n = 0
    while n < min(len(first), len(second)) - 1 and first[n] == second[n]:
        n += 1
    return n


def pair_length(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Tokens of a packed comparison."""
    return len(chosen) + len(rejected) - common(chosen, rejected)


def pack_pairs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> PackedPairs:
    """Pack comparisons, (chosen, rejected) tokens, into one row without a pad."""
    tokens: list[int] = []
    documents: list[int] = []
    branches: list[int] = []
    positions: list[int] = []
    ends: list[tuple[int, int]] = []
    for i, (chosen, rejected) in enumerate(pairs):
        shared = common(chosen, rejected)
        end = len(tokens) + len(chosen) - 1
        tokens += [*chosen, *rejected[shared:]]
        ends.append((end, len(tokens) - 1))
        documents += [i] * (len(tokens) - len(documents))
        branches += [0] * shared + [1] * (len(chosen) - shared) + [2] * (len(rejected) - shared)
        positions += [*range(len(chosen)), *range(shared, len(rejected))]
    fields = [tokens], [documents], [branches], [positions], [*zip(*ends, strict=True)]
    return PackedPairs(*(torch.tensor(field) for field in fields))


class AnswerSteps(NamedTuple):
    """The N tokens in which the answers of P packed comparisons differ, and where each is predicted."""

    before: Tensor  # (N,) int64: the column of the token before it, in a row that holds this answer alone
    columns: Tensor  # (N,) int64: its own column
    answers: Tensor  # (N,) int64: i of the chosen answer of comparison i, P + i of its rejected one


def answer_steps(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], packed: PackedPairs) -> AnswerSteps:
    """What a policy's log-probability of an answer is summed over, for `packed` as `pack_pairs(pairs)` gave it.

    Both answers' first tokens follow the last one they have in common, of which there must be one. What they begin with
    together is as likely in both and left out: it cancels wherever two answers are compared.
    """
    columns: list[tuple[int, int, int]] = []
    for i, (chosen, rejected) in enumerate(pairs):
        shared = common(chosen, rejected)
        assert shared, f"comparison {i}: its answers have no token in common to follow"
        chosen_end, rejected_end = packed.ends[:, i].tolist()
        fork = chosen_end - (len(chosen) - shared)  # the last token in common
        for answer, first, end in ((i, fork + 1, chosen_end), (len(pairs) + i, chosen_end + 1, rejected_end)):
            columns += [(fork if c == first else c - 1, c, answer) for c in range(first, end + 1)]
    return AnswerSteps(*torch.tensor(columns).T)


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) int64 padded on the right, and lengths (B,) int64.

    Causal attention never looks right, so what the pads hold cannot matter.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.full((len(rows), int(lengths.max())), pad, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


def pad_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and their answers -> tokens (B, T) and lengths (B,) as `pad_right`, and action_mask (B, T - 1) bool.

    Action t is the emission of token t + 1: True where that is an answer's, its EOS included.
    """
    tokens, lengths = pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)], pad)
    step = torch.arange(1, tokens.shape[1])
    begins = torch.tensor([len(prompt) for prompt in prompts])
    return tokens, lengths, (step >= begins[:, None]) & (step < lengths[:, None])


def acted_lengths(mask: Tensor) -> list[int]:
    """Tokens of each row up to its last action; mask (B, T - 1), True somewhere in each row."""
    return [int(row.nonzero()[-1]) + 2 for row in mask]


def by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in micro-batches of like lengths, each at most max_tokens once padded (a longer row stands alone)."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        longest = max(longest, lengths[i])
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def passes(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """`by_length` of this rank's rows, in as many batches as on any other: of a sharded model, a pass takes all ranks.

    Each rank has as many rows as the others.
    """
    batches = by_length(lengths, max_tokens)
    return cut(batches, parallel.largest(len(batches)))


def cut(batches: list[list[int]], n: int) -> list[list[int]]:
    """The batches, the largest halved until there are n."""
    batches = list(batches)
    while len(batches) < n:
        most = batches.pop(max(range(len(batches)), key=lambda i: len(batches[i])))
        batches += [most[: len(most) // 2], most[len(most) // 2 :]]
    return batches
