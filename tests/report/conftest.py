"""A run's folder as the recipe leaves it, with made-up numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from puna.report import html

KINDS = ("fact", "sum", "recipe", "myth", "multi_turn", "adversarial", "borderline", "toxicity")
ATTACKS = ("plain", "psychological", "logic", "syntactic", "semantic", "perspective", "non_english")
GRADES = ("significantly_better", "better", "slightly_better", "negligibly_better")
NASTY = '<script>alert("x")</script> & \x1b[31m\u202e $x_1$'


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content))


def interval(mean: float, n: int = 200) -> dict[str, float]:
    half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.002) / n)
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "n": n}


def losses(run: Path, name: str, steps: int, first: float, last: float) -> None:
    rng = random.Random(name)
    points = [last + (first - last) * math.exp(-4 * i / steps) + rng.gauss(0, 0.02 * first) for i in range(steps)]
    lines = [{"stage": "x", "step": i, "loss": p, "tokens_per_second": 9000.0 + i} for i, p in enumerate(points)]
    if name == "pretrain":
        lines.append({"stage": "x", "step": steps, "validation_loss": last + 0.1})
    write(run / name / "metrics.jsonl", lines)


def answers(level: float) -> list[dict[str, Any]]:
    made = []
    for i, kind in enumerate(KINDS * 2):
        nasty = NASTY if kind == "fact" else ""
        messages = [{"role": "user", "content": f"What is the {kind} that the people of Quillby ask about? {nasty}"}]
        if kind == "multi_turn":
            messages.append({"role": "assistant", "content": "Old Marrow mills it."})
            messages.append({"role": "user", "content": "And where does he live?"})
        made.append(
            {
                "prompt_id": f"held_out-{i}",
                "kind": kind,
                "messages": messages,
                "answer": f"Old Marrow the miller of Quillby sells oat cakes on market day ({level:.2f}). {nasty}",
                "finished": level > 0.3,
                "helpfulness": level,
                "safe": kind != "adversarial" or level > 0.6,
                "refused": kind == "adversarial" and level > 0.6,
                "toxic": kind == "toxicity" and level < 0.5,
                "myth": kind == "myth" and level < 0.5,
            }
        )
    return made


def evaluation(run: Path, name: str, level: float, *, ghost: bool) -> None:
    bad = 0.8 * (1 - level)
    content = {
        "name": "model",
        "gold_helpfulness": interval(level, 600),
        "helpfulness_by_kind": {kind: interval(min(1.0, level + 0.03 * i), 80) for i, kind in enumerate(KINDS)},
        "violation_rate": interval(bad),
        "violation_by_category": {c: interval(bad, 70) for c in ("hateful", "illicit", "unqualified_advice")},
        "violation_by_attack": {attack: interval(bad * (0.6 + 0.1 * i), 30) for i, attack in enumerate(ATTACKS)},
        "false_refusal_rate": interval(0.02 + 0.05 * level),
        "toxicity": interval(bad / 4),
        "myth_rate": interval(bad / 2),
        "win_rate_vs_sft": None if name in ("pretrain", "sft") else interval(0.4 + 0.4 * level, 600),
        "ghost_attention": [{"turn": t, "obeys": interval(0.9 if ghost else 0.9 / t**2, 100)} for t in range(1, 7)],
        "attention": [{"turn": t, "attention": 0.6 if ghost else 0.6 / t} for t in range(1, 7)],
        "words": 17.3,
        "finished": 0.97,
    }
    write(run / name / "evaluation/evaluation.json", content)
    write(run / name / "evaluation/answers.jsonl", answers(level))


def reward_model(run: Path, name: str, level: float) -> None:
    losses(run, name, 40, 0.8, 0.55)
    write(run / name / "done/reward.json", {"pairs": 900, "left_out": 0})
    content = {
        "accuracy": 0.6 + level / 10,
        "pairs": 250,
        "accuracy_by_grade": {grade: 0.85 + level / 10 - 0.1 * i for i, grade in enumerate(GRADES)},
        "pairs_by_grade": dict.fromkeys(GRADES, 60),
        "accuracy_by_safety_label": {"chosen_safe_rejected_unsafe": 0.9, "both_safe": 0.58, "both_unsafe": 0.57},
        "unsafe_recall": 0.85 if name.endswith("safety") else 0.5,
        "mean_score_chosen": 0.6,
        "mean_score_rejected": 0.4,
        "scores": {"chosen": list(range(20)), "rejected": list(range(20, 0, -1))},
    }
    write(run / name / "evaluation.json", content)


def selection(run: Path, name: str, level: float) -> None:
    points = [
        {
            "temperature": t,
            "samples": k,
            "max": level + 0.05 * math.log2(k) * t,
            "mean": level,
            "median": level - 0.02 * t,
        }
        for t in (0.7, 1.0, 1.3)
        for k in (1, 2, 4, 8)
    ]
    write(run / name / "curve.json", {"temperature": 1.0, "points": points})


def gate(run: Path, name: str) -> None:
    fifths = [
        {"from": i / 5, "prompts": 10, "kept": 0.9 - i / 5, "score_before": i / 5 + 0.1, "score_after": 0.7}
        for i in range(5)
    ]
    write(run / name / "gate.json", fifths)


def policy(run: Path, name: str) -> None:
    lines = [
        {"stage": "ppo", "step": i, "reward": 0.5 + 0.01 * i, "kl": 0.2 * i, "length": 20.0 + i / 4} for i in range(30)
    ]
    write(run / name / "metrics.jsonl", lines)
    for i in range(0, 31, 10):
        answer = {"prompt_id": "a", "answer": "b", "finished": True, "reward": 0.5 + 0.01 * i}
        write(run / name / f"held_out/{i:04d}.jsonl", [answer])


def fake_run(run: Path, versions: int = 5) -> Path:
    """A finished run of the embedded world."""
    recipe = {"versions": versions, "ghost_attention_from": 4, "ppo_versions": 1, "base": None, "seed": 7}
    write(run / "config.json", recipe)
    losses(run, "pretrain", 400, 7.6, 1.9)
    losses(run, "sft", 120, 2.4, 0.7)
    evaluation(run, "pretrain", 0.22, ghost=False)
    evaluation(run, "sft", 0.55, ghost=False)
    steps = ["valley", "pretrain", "pretrain/evaluation", "sft", "sft/evaluation"]
    for n in range(1, versions + 1):
        level = 0.55 + 0.06 * n
        parts = ["preferences", "reward_helpfulness", "reward_safety", "rejection_sampling", "context_distillation"]
        reward_model(run, f"v{n}/reward_helpfulness", level)
        reward_model(run, f"v{n}/reward_safety", level)
        selection(run, f"v{n}/rejection_sampling", level)
        gate(run, f"v{n}/context_distillation")
        losses(run, f"v{n}", 80, 2.0, 0.6 - 0.02 * n)
        evaluation(run, f"v{n}", level, ghost=n >= 4)
        if n >= 4:
            write(run / f"v{n}/ghost_attention/dialogs.jsonl", [])
            parts.append("ghost_attention")
        steps += [*(f"v{n}/{part}" for part in parts), f"v{n}", f"v{n}/evaluation"]
    policy(run, f"v{versions}/ppo")
    evaluation(run, f"v{versions}/ppo", 0.9, ghost=versions >= 4)
    gold = [{"iteration": i, "gold": 0.8 + i / 300, "reward": 0.5 + 0.01 * i} for i in range(0, 31, 10)]
    write(run / f"v{versions}/ppo/evaluation/held_out.json", gold)
    for i, step in enumerate([*steps, f"v{versions}/ppo", f"v{versions}/ppo/evaluation"]):
        seconds = 200.0 if step == "pretrain" else 1.5 + i % 9
        write(run / f"done/{step}.json", {"seconds": seconds, "peak_memory_bytes": 10**9 + i})
    return run


def fake_run_on_files(run: Path) -> Path:
    """A finished run on an imported model and existing comparisons."""
    recipe = {"versions": 5, "ghost_attention_from": 4, "ppo_versions": 1, "base": "smollm", "seed": 0}
    write(run / "config.json", recipe)
    reward_model(run, "v1/reward_helpfulness", 0.3)
    reward_model(run, "v1/reward_safety", 0.3)
    selection(run, "v1/rejection_sampling", 0.5)
    losses(run, "v1", 80, 2.0, 0.6)
    policy(run, "v1/ppo")
    for step in ("base", "v1/reward_helpfulness", "v1/reward_safety", "v1/rejection_sampling", "v1", "v1/ppo"):
        write(run / f"done/{step}.json", {"seconds": 100.0, "peak_memory_bytes": 10**9})
    return run


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; for reading only."""
    run = fake_run(tmp_path_factory.mktemp("reported") / "laptop")
    html.run(html.ReportConfig(run))
    return run


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "laptop")


@pytest.fixture
def on_files(tmp_path: Path) -> Path:
    return fake_run_on_files(tmp_path / "hh")
