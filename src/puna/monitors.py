"""Signs that PPO exploits its reward models, in words, from the numbers of its iterations so far.

Reward alone does not tell: it rises either way. What tells: KL leaps or is far, answers grow or repeat themselves, the
policy says one thing only, or a reward model that nothing is trained on stops agreeing (Gao et al. 2023).

A history is the lines of metrics.jsonl, one an iteration; a line may lack any number. Late means the last WINDOW lines,
early the first. All thresholds are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]

WINDOW = 5
"""Lines whose mean is early or late: a single iteration's numbers are noise."""
NGRAM = 4
"""Tokens of a stretch that counts as said again."""
KL_LEAP, KL_FLOOR = 4.0, 5.0
"""KL leaps where it is so many times the median of the window before it, and at least so many nats an answer."""
KL_FAR = 1.0
"""The policy is far from its start at so many nats a token: what it says has e^-1 of the probability there."""
LENGTH_GROWTH = 1.5
"""Answers creep where they are so many times as long as at first, and still growing."""
REPETITION_RISE = 0.1
"""More of the stretches in an answer are repeated than at first, by this share."""
ENTROPY_LEFT = 0.3
"""The policy has collapsed where it has less than this share of its first entropy."""
GOLD_GAP, MIN_LINES = 0.02, 5
"""The rise of the reward and fall of the gold score that together are a sign, and the fewest lines to judge by. With
fewer lines than two windows the gap is wider, as their means are noisier."""


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """The share of an answer's stretches of n tokens that stood in it before; 0 where it has none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def signs(history: History) -> dict[str, str]:
    """The signs that the end of a history shows, each a name and a sentence with its numbers; none is a good sign."""
    checks = {
        "kl": kl_leaps,
        "far": kl_is_far,
        "length": length_creeps,
        "repetition": repetition_rises,
        "entropy": entropy_collapses,
        "gold": gold_diverges,
    }
    said = {name: check(history) for name, check in checks.items()}
    return {name: sentence for name, sentence in said.items() if sentence}


def new_signs(history: History) -> list[str]:
    """The sentences of the signs that the last line of a history is the first to show."""
    before = signs(history[:-1])
    return [sentence for name, sentence in signs(history).items() if name not in before]


def kl_leaps(history: History) -> str:
    """The last KL against the window before it."""
    values = series(history, "kl")
    if len(values) <= WINDOW:
        return ""
    before, now = statistics.median(values[-WINDOW - 1 : -1]), values[-1]
    if now < max(KL_FLOOR, KL_LEAP * before):
        return ""
    return f"KL leaps from {before:.1f} to {now:.1f} nats an answer: lower the rate or raise beta"


def kl_is_far(history: History) -> str:
    """Late KL a token; the lines that have both numbers."""
    both = lines_with(history, "kl", "length")
    if len(both) < WINDOW:
        return ""
    kl, length = (early_and_late(series(both, name))[1] for name in ("kl", "length"))
    if kl < KL_FAR * length:
        return ""
    return f"the policy is {kl:.0f} nats an answer of {length:.0f} tokens from its start: raise beta, or stop earlier"


def length_creeps(history: History) -> str:
    """Late answers against early ones, and against those between."""
    values = series(history, "length")
    if len(values) < 2 * WINDOW:
        return ""
    early, late = early_and_late(values)
    if late < LENGTH_GROWTH * early or late <= statistics.fmean(values[-2 * WINDOW : -WINDOW]):
        return ""
    return f"answers grow from {early:.0f} to {late:.0f} tokens: the reward may like length, not what is said"


def repetition_rises(history: History) -> str:
    """Late answers against early ones."""
    values = series(history, "repetition")
    if len(values) < 2 * WINDOW:
        return ""
    early, late = early_and_late(values)
    if late < early + REPETITION_RISE:
        return ""
    return f"answers repeat themselves: {early:.0%} of their stretches of {NGRAM} tokens at first, {late:.0%} now"


def entropy_collapses(history: History) -> str:
    """Late entropy against early."""
    values = series(history, "entropy")
    if len(values) < 2 * WINDOW:
        return ""
    early, late = early_and_late(values)
    if late >= ENTROPY_LEFT * early:
        return ""
    return f"entropy falls from {early:.2f} to {late:.2f} nats a token: the policy comes to say one thing only"


def gold_diverges(history: History) -> str:
    """The training reward against that of the model that nothing is trained on, over the lines that have both."""
    both = lines_with(history, "reward", "gold")
    if len(both) < MIN_LINES:
        return ""
    window = min(WINDOW, len(both) // 2)
    (early, late), (gold_early, gold_late) = (early_and_late(series(both, name), window) for name in ("reward", "gold"))
    gap = GOLD_GAP * WINDOW / window
    if late < early + gap or gold_late > gold_early - gap:
        return ""
    return (
        f"the reward rises from {early:.2f} to {late:.2f}, the held-out reward model falls from {gold_early:.2f} to "
        f"{gold_late:.2f}: the gain is not real"
    )


def lines_with(history: History, *names: str) -> History:
    """The lines that have a finite value of each."""
    return [line for line in history if all(series([line], name) for name in names)]


def series(history: History, name: str) -> list[float]:
    """A number's finite values in order, lines without one left out."""
    return [line[name] for line in history if line.get(name) is not None and math.isfinite(line[name])]


def early_and_late(values: Sequence[float], window: int = WINDOW) -> tuple[float, float]:
    """The means of the first and of the last window."""
    return statistics.fmean(values[:window]), statistics.fmean(values[-window:])
