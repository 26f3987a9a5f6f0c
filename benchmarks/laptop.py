"""The laptop recipe over several seeds, gathered in docs/results/laptop.json.

    python benchmarks/laptop.py 0 1 2        # a run a seed in runs/laptop-seeds/, finished ones are read

Every seed is its own world, corpus, model and annotators. An interval over seeds is Student's, of the seeds' means;
beside it stands the pooled one, of all prompts of all seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from puna.evals import intervals

RUNS, RESULT = Path("runs/laptop-seeds"), Path("docs/results/laptop.json")
NUMBERS = ("gold_helpfulness", "violation_rate", "false_refusal_rate", "toxicity", "myth_rate")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""The 97.5 % point of Student's t for n seeds."""


def over_seeds(values: list[float]) -> dict[str, Any]:
    """The mean of the seeds' means with Student's interval; one seed has none."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "seeds": values}
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    half = STUDENT[n] * deviation / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


def pooled(found: list[intervals.Interval]) -> dict[str, float]:
    """All prompts of all seeds together, the distances to both ends joined as independent."""
    n = sum(i["n"] for i in found)
    mean = sum(i["mean"] * i["n"] for i in found) / n
    below, above = (
        sum((abs(i[end] - i["mean"]) * i["n"] / n) ** 2 for i in found) ** 0.5  # type: ignore[literal-required]
        for end in ("low", "high")
    )
    return {"mean": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above), "n": n}


def gather(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Every number of every version over the seeds."""
    versions = []
    for rows in zip(*(s["versions"] for s in summaries), strict=True):
        version: dict[str, Any] = {"name": rows[0]["name"]}
        for key in NUMBERS:
            found = [row["intervals"][key] for row in rows]
            version[key] = over_seeds([row[key] for row in rows])
            version[key]["pooled"] = pooled(found)
        wins = [row["win_rate_vs_sft"] for row in rows]
        if all(wins):
            version["win_rate_vs_sft"] = over_seeds([win["mean"] for win in wins])
            version["win_rate_vs_sft"]["pooled"] = pooled(wins)
        versions.append(version)
    return {
        "seeds": [s["seed"] for s in summaries],
        "versions": versions,
        "reward_models": {
            domain: {
                "accuracy": over_seeds([s["reward_models"][domain]["accuracy"] for s in summaries]),
                "accuracy_by_grade": {
                    grade: over_seeds([s["reward_models"][domain]["accuracy_by_grade"][grade] for s in summaries])
                    for grade in summaries[0]["reward_models"][domain]["accuracy_by_grade"]
                },
            }
            for domain in ("helpfulness", "safety")
        },
        "ghost_attention": [
            {
                "turn": points[0]["turn"],
                "before": over_seeds([p["before"] for p in points]),
                "after": over_seeds([p["after"] for p in points]),
            }
            for points in zip(*(s["ghost_attention"] for s in summaries), strict=True)
        ],
        "minutes": over_seeds([sum(s["seconds"].values()) / 60 for s in summaries]),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
        "machine": summaries[0]["machine"],
        "versions_of": [s["versions_of"] for s in summaries],
    }


def main(seeds: list[str]) -> None:
    """Run what is not finished, gather, write."""
    summaries = []
    for seed in seeds:
        out = RUNS / seed
        command = ["puna", "run", "recipes/laptop.toml", "--out", str(out), "--seed", seed]
        subprocess.run([sys.executable, "-m", *command], check=True)
        summaries.append(json.loads((out / "report/summary.json").read_text()))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(gather(summaries), indent=1) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0", "1", "2"])
