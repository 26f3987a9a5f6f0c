"""Rows of tokens for training: dialogs packed into full rows (paper 3.1), pairs and rollouts padded on the right."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.text.chat import Encoded


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


def document_mask(documents: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): True where a token may look at an earlier token of its own dialog, and at itself."""
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(same.shape[-2:], dtype=torch.bool, device=documents.device).tril()
    return (same & causal)[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) int64 padded on the right, and lengths (B,) int64.

    Causal attention never looks right, so what the pads hold cannot matter.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.full((len(rows), int(lengths.max())), pad, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


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


def cut(batches: list[list[int]], n: int) -> list[list[int]]:
    """The batches, the largest halved until there are n."""
    batches = list(batches)
    while len(batches) < n:
        most = batches.pop(max(range(len(batches)), key=lambda i: len(batches[i])))
        batches += [most[: len(most) // 2], most[len(most) // 2 :]]
    return batches
