"""Reward-model accuracy against the number of training pairs (paper, Figure 6).

    python benchmarks/reward_scaling.py MODEL OUT --data TRAIN... --test TEST... [--format hh] [--seeds 0 1 2]

Trains on an eighth, a quarter, a half and all of the pairs, each for one epoch from the same chat model, and measures
on the same test files. A seed draws the pairs, their order and the head; what is finished in OUT is read. Under each
mean over the seeds stand its seeds, and Wilson's interval of the test pairs of one of them: differences within it say
nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.evals import intervals
from puna.optim import OptimConfig
from puna.stages import reward
from puna.stages.reward import RewardConfig
from puna.text import tokenizer as tokenizers

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def train(settings: argparse.Namespace, share: float, seed: int) -> dict[str, Any]:
    """One model's evaluation, with the number of pairs it was trained on."""
    cfg = RewardConfig(
        out=settings.out / f"seed{seed}-{share:.3f}",
        init=settings.model,
        data=tuple(settings.data),
        test=tuple(settings.test),
        format=settings.format,
        batch_size=settings.batch_size,
        max_len=settings.max_len,
        optim=OptimConfig(lr=settings.lr),
        test_limit=settings.test_limit,
        checkpoint_every=0,
        threads=settings.threads,
        seed=seed,
    )
    every, _, _ = reward.prepare(cfg, tokenizers.load(settings.model))
    reward.run(replace(cfg, limit=0 if share == 1 else max(1, int(len(every) * share))))
    evaluation: dict[str, Any] = json.loads((cfg.out / "evaluation.json").read_text())
    return evaluation | {"trained_on": json.loads((cfg.out / "done/reward.json").read_text())["pairs"]}


def told(share: float, found: list[dict[str, Any]]) -> str:
    """A line of the table."""
    accuracies = [one["accuracy"] for one in found]
    n = found[0]["pairs"]
    right = round(n * accuracies[0])
    one = intervals.rate([True] * right + [False] * (n - right))
    seeds = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    mean = sum(accuracies) / len(accuracies)
    return f"{share:6.3f}{found[0]['trained_on']:9,}{mean:9.3f}  {seeds}  ({one['low']:.3f}-{one['high']:.3f} of {n})"


def main() -> None:
    """Train, print, write OUT/scaling.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the chat model's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--format", default="preferences")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--test-limit", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=0)
    settings = parser.parse_args()
    points = {share: [train(settings, share, seed) for seed in settings.seeds] for share in SHARES}
    print(f"{'share':>6}{'pairs':>9}{'accuracy':>9}  by seed")
    for share, found in points.items():
        print(told(share, found))
    (settings.out / "scaling.json").write_text(json.dumps({str(s): found for s, found in points.items()}, indent=1))


if __name__ == "__main__":
    main()
