"""Simulated annotators: people who compare two answers, each with habits of their own (paper 3.2.1).

1. An answer's utility is the gold judge's helpfulness, bent by the annotator's taste for length and for the first
   place; where the prompt is tagged as a safety one, being safe counts first, then how well it was declined.
2. The difference of two utilities, plus noise, makes the forced choice; its size makes the grade.
3. Each answer gets a safety label, which is sometimes wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from puna.types import Grade, Judgement
from puna.valley.judge import GoldJudge, Verdict
from puna.valley.ledger import World

# A safety prompt's unsafe answer loses this much utility, more than any quality can make up for.
UNSAFE_COST = 1.0


@dataclass(frozen=True)
class Annotator:
    """One annotator; call it with a prompt record and two answers. The same call gives the same judgement."""

    name: str
    judge: GoldJudge = field(repr=False, compare=False)
    noise: float
    """Standard deviation of the noise on a utility difference."""
    length_bias: float
    """Utility per word beyond the other answer's, up to thirty words."""
    position_bias: float
    """Utility added to the answer shown first."""
    leniency: float
    """How far faults are forgiven: an answer gets this share of the helpfulness it lacks."""
    thresholds: tuple[float, float, float]
    """Differences from which the choice is slightly better, better, significantly better: such that a first round's
    answers are graded about as often each as in the paper's Figure 25 (18, 28, 29 and 25 %; docs/log.md)."""
    safety_accuracy: float
    """Probability that a safety label is right."""

    def __call__(self, record: dict[str, Any], first: str, second: str) -> Judgement:
        """Compare two answers to a prompt."""
        rng = random.Random(f"{self.name}|{record['id']}|{first}|{second}")
        verdicts = self.judge.judge(record, first), self.judge.judge(record, second)
        difference = self.utility(record, verdicts[0]) - self.utility(record, verdicts[1])
        words = len(first.split()) - len(second.split())
        difference += self.length_bias * max(-30, min(30, words)) + self.position_bias
        difference += rng.gauss(0.0, self.noise)
        safe = tuple(v.safe == (rng.random() < self.safety_accuracy) for v in verdicts)
        return Judgement(0 if difference >= 0 else 1, self.grade(abs(difference)), (safe[0], safe[1]))

    def utility(self, record: dict[str, Any], verdict: Verdict) -> float:
        """What the answer is worth to this annotator, without noise and place."""
        value = verdict.helpfulness + self.leniency * (1 - verdict.helpfulness)
        return value - UNSAFE_COST * (not verdict.safe) if record["is_safety"] else value

    def grade(self, difference: float) -> Grade:
        """The grade of an absolute difference."""
        slightly, better, significantly = self.thresholds
        if difference >= significantly:
            return "significantly_better"
        if difference >= better:
            return "better"
        return "slightly_better" if difference >= slightly else "negligibly_better"


def pool(world: World, seed: int = 0, n: int = 5) -> list[Annotator]:
    """n distinct annotators around a common mean."""
    rng = random.Random(f"annotators:{world.seed}:{seed}")
    judge = GoldJudge(world)
    annotators = []
    for i in range(n):
        scale = rng.uniform(0.8, 1.25)
        annotators.append(
            Annotator(
                name=f"annotator-{seed}-{i}",
                judge=judge,
                noise=rng.uniform(0.06, 0.16),
                length_bias=rng.uniform(-0.001, 0.004),
                position_bias=rng.uniform(-0.02, 0.05),
                leniency=rng.uniform(0.0, 0.3),
                thresholds=(0.07 * scale, 0.24 * scale, 0.65 * scale),
                safety_accuracy=rng.uniform(0.93, 0.98),
            )
        )
    return annotators
