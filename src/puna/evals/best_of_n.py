"""Best of n (Stiennon et al. 2020): nothing is trained; of n answers the one with the highest reward is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.generate.scoring import Judges
from puna.text import chat
from puna.types import Completion


def rate(
    judges: Judges | None,
    prompt_ids: Sequence[list[int]],
    groups: Sequence[list[Completion]],
    is_safety: Sequence[bool],
) -> Tensor:
    """Combined rewards of n answers to each of P prompts, (P, n); 0 for what is no answer, and without judges."""
    rewards = torch.zeros(len(groups), len(groups[0]) if groups else 0)
    usable = [(i, j) for i, group in enumerate(groups) for j, answer in enumerate(group) if chat.usable(answer)]
    if judges and usable:
        rows, columns = [i for i, _ in usable], [j for _, j in usable]
        told = [prompt_ids[i] + groups[i][j].tokens for i, j in usable]
        rewards[rows, columns] = judges.scores(told, [is_safety[i] for i in rows])["reward"]
    return rewards


def pick(groups: Sequence[list[Completion]], rewards: Tensor, n: int | None = None) -> list[Completion]:
    """Of the first n answers to each prompt (None: of all) the one with the highest reward, the first of equals."""
    best = rewards[:, :n].max(dim=1).indices.tolist() if groups else []
    return [group[i] for group, i in zip(groups, best, strict=True)]


def sizes(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def kl(n: int) -> float:
    """An upper bound in nats on KL(best of n || one answer): log n - (n - 1) / n (Stiennon et al. 2020)."""
    return math.log(n) - (n - 1) / n
