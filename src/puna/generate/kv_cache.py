"""Keys and values in blocks: stored once however many sequences read them, and given back a block at a time.

A sequence's cache is a list of blocks: those of its prompt, which samples and other prompts may share, then its own,
which it fills token by token. A decode step does not copy blocks together for each sequence. It brings the queries to
the blocks: each block is attended by the queries of whoever reads it, and a row's parts are joined by their softmax
sums (as flash decoding splits keys). On CPU that costs a tenth of gathering the keys, and no row is padded.

Shapes: L layers, N blocks, B rows, K key/value heads, G query heads a key head, T new tokens, S keys, E head width,
W blocks a row, M rows a shared block.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.generate.weights import Pages
from puna.model.transformer import ModelConfig, attend

BLOCK = 64
"""Tokens a block (docs/decisions/0008-queries-go-to-the-blocks.md)."""

KEPT = 256
"""Blocks that may be kept without a holder, however few are in use."""

LOWEST = torch.finfo(torch.float32).min
"""Hides a score; finite, so that a block without a reader makes no NaN."""

Ids = NDArray[np.int64]


class Full(Exception):
    """No block is free, and none can be forgotten."""


class BlockCache:
    """Blocks for all sequences of an engine: at most `capacity`, allocated as they are needed.

    A block has as many holders as sequences that read it. A full block of a known text is kept when its last holder
    lets go, for a prompt that begins alike: of these KEPT or as many as are in use, the longest unused going first.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        shape = (0, config.n_kv_heads, BLOCK, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]  # (N, K, BLOCK, E)
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self._holders: list[int] = []
        self._serials: list[int] = []  # of what a block holds; 0 where it is no full block of a known text
        self._free: list[int] = []  # a heap: low blocks first, so that those in use stand together
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}  # (serial of the block before, tokens) -> block
        self._text_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known blocks without a holder, longest unused first
        self._serial = 0

    @property
    def in_use(self) -> int:
        """Blocks that a sequence holds."""
        return len(self._holders) - len(self._free) - len(self._unused)

    @property
    def room(self) -> int:
        """Blocks that can be taken before `Full`."""
        return self.capacity - self.in_use

    def take(self) -> int:
        """A block for one holder. Raises Full."""
        if not self._free and len(self._holders) < self.capacity and len(self._unused) <= max(KEPT, self.in_use):
            self._grow()
        if self._free:
            block = heapq.heappop(self._free)
        elif self._unused:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        else:
            raise Full
        self._holders[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more for each block."""
        for block in blocks:
            self._unused.pop(block, None)
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence, the last block first: the beginning is wanted longest."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._serials[block]:
                    self._unused[block] = None
                else:
                    heapq.heappush(self._free, block)

    def blank(self, blocks: Sequence[int]) -> None:
        """Zeros in the blocks that nobody else holds: what is no number there must not meet the next one's tokens."""
        alone = [block for block in blocks if self._holders[block] == 1]
        for block in alone:
            if self._serials[block]:
                self._forget(block)
        places = self.tensor(np.array(alone, np.int64))
        for part in (*self.keys, *self.values):
            part.index_fill_(0, places, 0.0)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The known blocks that a prompt begins with, held for it; never all of it: its last token must be run."""
        blocks: list[int] = []
        serial = 0
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            block = self._known.get((serial, tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            blocks.append(block)
            serial = self._serials[block]
        self.hold(blocks)
        return blocks

    def remember(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Make the full blocks of a text that was run known to later prompts."""
        serial = 0
        for start, block in zip(range(0, len(tokens) - BLOCK + 1, BLOCK), blocks, strict=False):
            key = (serial, tuple(tokens[start : start + BLOCK]))
            if not self._serials[block]:
                if key in self._known:
                    return  # computed twice at once; the other one stays known
                self._serial += 1
                self._serials[block], self._known[key], self._text_of[block] = self._serial, block, key
            serial = self._serials[block]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to) each."""
        source, target = (torch.tensor(ids, device=self.device) for ids in zip(*pairs, strict=True))
        for parts in (self.keys, self.values):
            for part in parts:
                part[target] = part.index_select(0, source)

    def tensor(self, ids: Ids) -> Tensor:
        """Indices, int64, where the blocks are."""
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.device)

    def _forget(self, block: int) -> None:
        del self._known[self._text_of.pop(block)]
        self._serials[block] = 0

    def _grow(self) -> None:
        """Twice the blocks, as far as the capacity goes."""
        old = len(self._holders)
        new = min(self.capacity, max(16, 2 * old)) - old
        for parts in (self.keys, self.values):
            for layer, part in enumerate(parts):
                # Zeros: what is masked has weight 0, which must not meet a NaN.
                parts[layer] = torch.cat((part, part.new_zeros(new, *part.shape[1:])))
        self._holders += [0] * new
        self._serials += [0] * new
        for block in range(old, old + new):
            heapq.heappush(self._free, block)


def blocks_of(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


class PromptPass:
    """A pass over R prompts' next tokens, padded on the right to T, each behind what is cached of it.

    blocks: each prompt's, the new tokens' included; starts: tokens cached before; lengths: new tokens.
    """

    def __init__(
        self, cache: BlockCache, blocks: Sequence[Sequence[int]], starts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self._cache = cache
        longest, past = max(lengths), blocks_of(max(starts))
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = np.concatenate([np.arange(n) for n in lengths])
        places = columns + np.repeat(np.asarray(starts), lengths)
        into = np.concatenate(
            [np.repeat(held, BLOCK)[start : start + n] for held, start, n in zip(blocks, starts, lengths, strict=True)]
        )
        self._from = self._cache.tensor(rows), self._cache.tensor(columns)
        self._to = self._cache.tensor(into), self._cache.tensor(places % BLOCK)
        self._past: Tensor | None = None
        if past:
            table = np.zeros((len(lengths), past), np.int64)
            for row, (held, start) in enumerate(zip(blocks, starts, strict=True)):
                table[row, : blocks_of(start)] = held[: blocks_of(start)]
            self._past = self._cache.tensor(table)
            begun = self._cache.tensor(np.asarray(starts))
            seen = torch.arange(past * BLOCK, device=cache.device) < begun[:, None]
            causal = torch.ones(longest, longest, dtype=torch.bool, device=cache.device).tril()
            self._mask = torch.cat(
                (seen[:, None].expand(-1, longest, -1), causal.expand(len(lengths), -1, -1)), dim=-1
            )[:, None]  # (R, 1, T, S + T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See model.transformer.Cache."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._to[0], :, self._to[1]] = k.transpose(1, 2)[self._from]
        values[self._to[0], :, self._to[1]] = v.transpose(1, 2)[self._from]
        if self._past is None:
            return attend(q, k, v)
        before = (_joined(part, self._past) for part in (keys, values))
        k, v = (torch.cat((old, new), dim=2) for old, new in zip(before, (k, v), strict=True))
        return attend(q, k, v, self._mask)


def _joined(part: Tensor, table: Tensor) -> Tensor:
    """Blocks (N, K, BLOCK, E) of a table (R, W), one after the other: (R, K, W * BLOCK, E)."""
    rows, width = table.shape
    return part.index_select(0, table.flatten()).view(rows, width, *part.shape[1:]).transpose(1, 2).flatten(2, 3)


class DecodePass:
    """A step of B rows, one token each, whose places are given.

    blocks: each row's, the new token's included; lengths: tokens of each row, the new one included.
    A packed model reads the blocks as `pages`; others ask for `attend`, whose plan is made at the first layer.
    """

    def __init__(self, cache: BlockCache, blocks: Sequence[Sequence[int]], lengths: Ids) -> None:
        self._cache, self._blocks, self._lengths = cache, blocks, lengths
        self._planned = False

    def pages(self) -> Pages:
        """See weights.PagedCache."""
        table = np.zeros((len(self._blocks), max(map(len, self._blocks))), np.int64)
        for row, held in enumerate(self._blocks):
            table[row, : len(held)] = held
        return Pages(self._cache.keys, self._cache.values, self._cache.tensor(table))

    def _plan(self) -> None:
        """Which rows read which block, alone or together, and where a row's parts will be."""
        self._planned = True
        counts = np.array([len(held) for held in self._blocks])
        ids = np.concatenate([np.asarray(held, np.int64) for held in self._blocks])  # (sum of W,)
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)  # a block's place in its row
        filled = np.minimum(self._lengths[rows] - places * BLOCK, BLOCK)
        last = np.cumsum(counts) - 1
        self._to = self._cache.tensor(ids[last]), self._cache.tensor((self._lengths - 1) % BLOCK)

        readers = np.bincount(ids, minlength=1)
        alone = readers[ids] == 1
        parts = np.empty(len(ids), np.int64)  # where each (row, block) will stand among the parts
        self._lone = self._lone_blocks(ids[alone], rows[alone], filled[alone], parts, alone)
        self._shared = self._shared_blocks(ids[~alone], rows[~alone], filled[~alone], parts, ~alone)
        table = np.full((len(counts), int(counts.max())), self._parts, np.int64)
        table[rows, places] = parts
        self._table = self._cache.tensor(table)  # (B, W); what a shorter row lacks is the part after the last: none

    def _lone_blocks(
        self, ids: Ids, rows: Ids, filled: Ids, parts: Ids, which: NDArray[np.bool_]
    ) -> tuple[Tensor | int, Tensor, Tensor]:
        """The blocks that one row alone reads: their ids, the row that reads each, and its mask.

        Where they make up at least half of the cache's first n blocks, the ids are the number n instead: all of those
        are read in place, for a selection would copy them.
        """
        high = int(ids.max()) + 1 if len(ids) else 0
        if len(ids) * 2 >= high:
            place, reader, tokens = ids, np.zeros(high, np.int64), np.zeros(high, np.int64)
            reader[ids], tokens[ids] = rows, filled
            chosen: Tensor | int = high
        else:
            place, reader, tokens = np.arange(len(ids)), rows, filled
            chosen = self._cache.tensor(ids)
        parts[which] = place
        self._parts = len(reader)
        return chosen, self._cache.tensor(reader), self._mask(tokens)

    def _shared_blocks(
        self, ids: Ids, rows: Ids, filled: Ids, parts: Ids, which: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Blocks that several rows read: which (N,), their rows (N, M), and their masks."""
        if not len(ids):
            return None
        order = np.argsort(ids, kind="stable")
        blocks, begins, counts = np.unique(ids[order], return_index=True, return_counts=True)
        most = int(counts.max())
        block_of = np.repeat(np.arange(len(blocks)), counts)
        rank = np.arange(len(ids)) - np.repeat(begins, counts)
        members = np.zeros((len(blocks), most), np.int64)
        members[block_of, rank] = rows[order]
        places = np.empty(len(ids), np.int64)
        places[order] = self._parts + block_of * most + rank
        parts[which] = places
        self._parts += members.size
        return self._cache.tensor(blocks), self._cache.tensor(members), self._mask(filled[order][begins])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See model.transformer.Cache."""
        if not self._planned:
            self._plan()
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._to[0], :, self._to[1]] = k[:, :, 0]
        values[self._to[0], :, self._to[1]] = v[:, :, 0]
        q_of = (q * q.shape[-1] ** -0.5).view(q.shape[0], k.shape[1], -1, q.shape[-1])  # (B, K, G, E)
        chosen, reader, mask = self._lone
        if isinstance(chosen, int):
            lone = keys[:chosen], values[:chosen]
        else:
            lone = keys.index_select(0, chosen), values.index_select(0, chosen)
        found = [_part(q_of.index_select(0, reader), *lone, mask)]
        if self._shared is not None:
            blocks, members, mask = self._shared
            many = q_of.index_select(0, members.flatten()).view(*members.shape, *q_of.shape[1:])  # (N, M, K, G, E)
            many = many.transpose(1, 2).flatten(2, 3)  # (N, K, M G, E)
            shared = keys.index_select(0, blocks), values.index_select(0, blocks)
            sums, outs = _part(many, *shared, mask)
            found.append((_by_member(sums, members.shape[1]), _by_member(outs, members.shape[1])))
        return self._merged(found).to(q.dtype).view_as(q)

    def _merged(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The parts, joined for each row by what each holds of the whole sum: (B, K, G, E) float32."""
        sums, outs = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
        flat = self._table.flatten()
        if self._table.shape[1] == 1:
            return outs.index_select(0, flat)
        sums = torch.cat((sums, sums.new_full((1, *sums.shape[1:]), LOWEST)))
        outs = torch.cat((outs, outs.new_zeros(1, *outs.shape[1:])))
        shares = sums.index_select(0, flat).view(*self._table.shape, *sums.shape[1:]).softmax(1)  # (B, W, K, G)
        return (outs.index_select(0, flat).view(*self._table.shape, *outs.shape[1:]) * shares[..., None]).sum(1)

    def _mask(self, filled: Ids) -> Tensor:
        """(N, 1, 1, BLOCK) float32: 0 where a block holds a token, LOWEST elsewhere."""
        held = torch.arange(BLOCK, device=self._cache.device) < self._cache.tensor(filled)[:, None]
        return torch.where(held, 0.0, LOWEST)[:, None, None]


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention within blocks: q (N, K, Q, E), k and v (N, K, BLOCK, E), mask (N, 1, 1, BLOCK).

    The logarithm of the sum of exponentials (N, K, Q), and what the block alone would give (N, K, Q, E), float32.
    """
    scores = (q @ k.transpose(-2, -1)).float().add_(mask)
    logs = scores.log_softmax(-1)
    sums = scores[..., 0] - logs[..., 0]  # a block's first place is never hidden from its readers
    return sums, (logs.exp_().to(v.dtype) @ v).float()


def _by_member(x: Tensor, members: int) -> Tensor:
    """(N, K, M G, ...) -> (N M, K, G, ...)."""
    return x.view(*x.shape[:2], members, -1, *x.shape[3:]).transpose(1, 2).flatten(0, 1)
