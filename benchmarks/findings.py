"""What the paper reports, held against finished laptop runs of several seeds.

    python benchmarks/findings.py runs/laptop-seeds/0 runs/laptop-seeds/1 runs/laptop-seeds/2
    python benchmarks/findings.py --measures margins,auxiliary runs/laptop-seeds/0    # some of them

A finding is a claim with two figures of a run, the first of which should be the larger. Beside what the run measured
itself, about a dozen models are trained with one setting changed, in DIR/findings; what stands there is not trained
again. A claim holds where the 95 % interval (Student's, over seeds) of the difference lies above 0, does not hold where
it lies below, and is not shown where 0 is inside. Writes docs/results/findings.json and findings.md. Call it from where
the runs were started, for their paths are relative.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from laptop import over_seeds

from puna import config
from puna.data import readers
from puna.evals import valley as evaluation
from puna.evals.valley import EvaluateConfig
from puna.formats import huggingface
from puna.stages import context_distillation, ppo, reward, sft
from puna.stages.context_distillation import ContextDistillationConfig
from puna.stages.ppo import PPOConfig
from puna.stages.reward import RewardConfig
from puna.stages.sft import SFTConfig
from puna.text import tokenizer as tokenizers
from puna.valley.judge import GoldJudge
from puna.valley.write import read_world

RESULTS = Path(__file__).parents[1] / "docs/results"
BIG_STEPS = {"iterations": 40, "patience": 0, "optim": {"lr": 1e-4}}
"""PPO driven far enough to see what holds it back."""


class Finding(NamedTuple):
    """A claim of the paper's, what its two figures are, and the figures of one seed."""

    claim: str
    source: str
    first_is: str
    second_is: str
    first: float
    second: float


@dataclass(frozen=True)
class Lab:
    """A finished run, and the models trained beside it."""

    run: Path

    def json(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())

    def settings(self, kind: type[Any], name: str, changes: dict[str, Any]) -> Any:
        """A stage's config of this run with some values changed."""
        table = self.json(f"{name}/config.json")
        for key, value in changes.items():
            table[key] = table[key] | value if isinstance(value, dict) else value
        return config.from_dict(kind, table)

    def reward_model(self, name: str, like: str, **changes: Any) -> Path:
        """A reward model of V5 trained otherwise; its folder."""
        out = self.run / "findings" / name
        reward.run(self.settings(RewardConfig, f"v5/{like}", {**changes, "out": str(out)}))
        return out

    def version(self, name: str, data: list[Path]) -> dict[str, Any]:
        """V5 tuned on other dialogs, evaluated."""
        out = self.run / "findings" / name
        changes = {"out": str(out), "data": [str(path) for path in data]}
        sft.run(self.settings(SFTConfig, "v5", changes))
        return self.evaluate(out)

    def policy(self, name: str, **changes: Any) -> Path:
        """PPO of V5 run otherwise; its folder."""
        out = self.run / "findings" / name
        ppo.run(self.settings(PPOConfig, "v5/ppo", {**changes, "out": str(out)}))
        return out

    def evaluate(self, folder: Path) -> dict[str, Any]:
        """The gold judge's findings on the model in a folder."""
        out = folder / "evaluation"
        if not (out / "evaluation.json").exists():
            cfg: EvaluateConfig = self.settings(EvaluateConfig, "v5/evaluation", {"name": folder.name})
            evaluation.run(replace(cfg, out=out, model=folder / "model"))
        found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
        return found

    def held_out(self, policy: Path) -> list[dict[str, Any]]:
        """The training reward and the gold judge's helpfulness of a policy's held-out answers, by iteration."""
        return evaluation.judge_held_out(GoldJudge(read_world(self.run / "valley")), policy)

    @property
    def selected(self) -> dict[str, Path]:
        """What V5 was tuned on."""
        return {path.parent.name: path for path in map(Path, self.json("v5/config.json")["data"])}


# Reward models -------------------------------------------------------------------------------------------------------


def margins(lab: Lab) -> Iterator[Finding]:
    """Table 28: the margin helps where answers differ much; a large one costs where they hardly differ."""
    small = lab.json("v5/reward_helpfulness/evaluation.json")["accuracy_by_grade"]
    none, large = (
        json.loads((lab.reward_model(f"margin_{m}", "reward_helpfulness", margin=m) / "evaluation.json").read_text())
        for m in ("none", "large")
    )
    none, large = none["accuracy_by_grade"], large["accuracy_by_grade"]
    far, near = "significantly_better", "negligibly_better"
    yield Finding(
        "a margin raises accuracy on significantly better answers", "Table 28", "small margin", "none",
        small[far], none[far],
    )  # fmt: skip
    yield Finding(
        "a large margin lowers accuracy on negligibly better ones", "Table 28", "none", "large margin",
        none[near], large[near],
    )  # fmt: skip
    yield Finding(
        "accuracy rises with the grade", "Table 8", "significantly better", "negligibly better", small[far], small[near]
    )


def auxiliary(lab: Lab) -> Iterator[Finding]:
    """Table 29."""
    with_it = lab.json("v5/reward_safety/evaluation.json")["unsafe_recall"]
    out = lab.reward_model("no_auxiliary", "reward_safety", safety_auxiliary=0.0)
    without = json.loads((out / "evaluation.json").read_text())["unsafe_recall"]
    yield Finding(
        "the auxiliary loss raises the recall of unsafe answers", "Table 29", "with", "without", with_it, without
    )


def two_models(lab: Lab) -> Iterator[Finding]:
    """3.2.2: helpfulness and safety pull apart, so each has a model."""
    files = {name: lab.json(f"v5/reward_{name}/config.json") for name in ("helpfulness", "safety")}
    both = [path for name in files for path in files[name]["data"]]
    limits = [table["limit"] for table in files.values()]
    limit = sum(limits) if all(limits) else 0  # 0 is no limit
    mixed = lab.reward_model("one_model", "reward_helpfulness", data=both, other=[], other_share=0.0, limit=limit)
    tokenizer, model = tokenizers.load(mixed / "model"), huggingface.load_reward_model(mixed / "model")
    for name, table in files.items():
        test = readers.read(tuple(map(Path, table["test"])), "preferences").records
        own = lab.json(f"v5/reward_{name}/evaluation.json")["accuracy"]
        cfg = lab.settings(RewardConfig, f"v5/reward_{name}", {})
        accuracy = reward.evaluate(test, *reward.held_out_scores(cfg, model, tokenizer, test))["accuracy"]
        yield Finding(f"two models beat one mixed: {name}", "3.2.2", "two", "one", own, accuracy)


# Rejection sampling --------------------------------------------------------------------------------------------------


def best_of_k(lab: Lab) -> Iterator[Finding]:
    """Figures 7 and 8, from the curves that each round has stored."""
    curves = [lab.json(f"v{version}/rejection_sampling/curve.json") for version in range(1, 6)]
    chosen = [[p for p in curve["points"] if p["temperature"] == curve["temperature"]] for curve in curves]
    gains = {
        key: sum(max(points, key=_samples)[key] - min(points, key=_samples)[key] for points in chosen) / len(chosen)
        for key in ("max", "median")
    }
    yield Finding(
        "the best of K rises with K, the median does not", "Figure 7", "gain of the best", "of the median",
        gains["max"], gains["median"],
    )  # fmt: skip
    yield Finding(
        "the best temperature rises after RLHF", "Figure 8", "V5's round", "V1's",
        curves[-1]["temperature"], curves[0]["temperature"],
    )  # fmt: skip


def _samples(point: dict[str, Any]) -> int:
    return int(point["samples"])


def pooling(lab: Lab) -> Iterator[Finding]:
    """3.2.3: V3, tuned on its own round's samples alone, forgot; all rounds' samples mend it."""
    pooled = lab.json("v5/evaluation/evaluation.json")
    own_round = lab.selected | {"rejection_sampling": lab.run / "v5/rejection_sampling/best.jsonl"}
    alone = lab.version("not_pooled", list(own_round.values()))
    sft_kinds = lab.json("sft/evaluation/evaluation.json")["helpfulness_by_kind"]

    def worst(found: dict[str, Any]) -> float:
        kinds = found["helpfulness_by_kind"]
        return min(kinds[kind]["mean"] - sft_kinds[kind]["mean"] for kind in kinds)

    yield Finding(
        "pooling all rounds keeps what a kind of prompt had gained", "3.2.3", "pooled, worst kind less SFT's",
        "own round", worst(pooled), worst(alone),
    )  # fmt: skip
    key = "gold_helpfulness"
    yield Finding(
        "pooling all rounds helps", "3.2.3", "pooled, helpfulness", "own round", pooled[key]["mean"], alone[key]["mean"]
    )


# PPO -----------------------------------------------------------------------------------------------------------------


def both_kinds(lab: Lab) -> Iterator[Finding]:
    """Figure 11 and 3.2.3: PPO on top of rejection sampling, against either alone."""
    both, sampling = (lab.json(f"{name}/evaluation/evaluation.json") for name in ("v5/ppo", "v5"))
    alone = lab.evaluate(lab.policy("ppo_alone", init=str(lab.run / "sft/model")))
    claim, wins = "PPO after rejection sampling beats ", "win_rate_vs_sft"
    first = "both, wins against SFT"
    yield Finding(
        f"{claim}rejection sampling alone", "3.2.3", first, "alone", both[wins]["mean"], sampling[wins]["mean"]
    )
    yield Finding(f"{claim}PPO alone", "3.2.3", first, "alone", both[wins]["mean"], alone[wins]["mean"])


def whitening(lab: Lab) -> Iterator[Finding]:
    """3.2.3: the score is whitened after a logit, for stability."""
    usual = lab.held_out(lab.run / "v5/ppo")
    raw = lab.held_out(lab.policy("raw_scores", logit_scores=False, whiten="none"))
    gains = [max(p["reward"] for p in points) - points[0]["reward"] for points in (usual, raw)]
    yield Finding(
        "whitened logits raise the held-out reward more than raw scores", "3.2.3", "gain, whitened", "raw", *gains
    )


def divergence(lab: Lab) -> Iterator[Finding]:
    """3.2.3 and Gao et al. 2023: without the KL term the reward model's score rises and what it stands for falls."""
    free = lab.held_out(lab.policy("no_kl", beta=0.0, **BIG_STEPS))
    held = lab.held_out(lab.policy("much_kl", beta=0.2, **BIG_STEPS))
    claim = "without KL and with large steps "
    yield Finding(
        f"{claim}the training reward rises", "3.2.3", "after", "before", free[-1]["reward"], free[0]["reward"]
    )
    yield Finding(f"{claim}gold helpfulness falls", "3.2.3", "before", "after", free[0]["gold"], free[-1]["gold"])
    yield Finding("beta 0.2 keeps it", "3.2.3", "beta 0.2", "beta 0", held[-1]["gold"], free[-1]["gold"])


# Ghost Attention and safety ------------------------------------------------------------------------------------------


def ghost_attention(lab: Lab) -> Iterator[Finding]:
    """Table 30: the instruction of the first turn, at turn 4."""
    before, after = (lab.json(f"{name}/evaluation/evaluation.json")["ghost_attention"][3] for name in ("v3", "v5"))
    yield Finding(
        "Ghost Attention keeps the instruction at turn 4", "Table 30", "V5", "V3",
        after["obeys"]["mean"], before["obeys"]["mean"],
    )  # fmt: skip


def gate(lab: Lab) -> Iterator[Finding]:
    """4.2.4: distilling on answers that were good already makes vague ones, so the reward model decides."""
    out = lab.run / "findings/distilled_without_gate"
    changes = {"out": str(out), "gate": False}
    context_distillation.run(lab.settings(ContextDistillationConfig, "v5/context_distillation", changes))
    gated = lab.json("v5/evaluation/evaluation.json")
    ungated = lab.version("no_gate", list((lab.selected | {"context_distillation": out / "dialogs.jsonl"}).values()))
    for what, key in (("helpfulness", "gold_helpfulness"), ("false refusals, negated", "false_refusal_rate")):
        sign = -1 if key == "false_refusal_rate" else 1
        yield Finding(
            f"the gate spares answers that were good: {what}", "4.2.4", "gate", "no gate",
            sign * gated[key]["mean"], sign * ungated[key]["mean"],
        )  # fmt: skip


def safety_data(lab: Lab) -> Iterator[Finding]:
    """Figures 14 and 15: the more safety data, the safer, with helpfulness as it was and more false refusals."""
    full = lab.json("v5/evaluation/evaluation.json")
    none = lab.version("no_safety_data", [_without_safety(lab, path) for path in lab.selected.values()])
    yield Finding(
        "safety data lowers violations", "Figure 14", "none", "all",
        none["violation_rate"]["mean"], full["violation_rate"]["mean"],
    )  # fmt: skip
    yield Finding(
        "safety data costs no helpfulness (within 0.02)", "Figure 14", "all, and 0.02", "none",
        full["gold_helpfulness"]["mean"] + 0.02, none["gold_helpfulness"]["mean"],
    )  # fmt: skip
    yield Finding(
        "safety data raises false refusals", "Figure 15", "all", "none",
        full["false_refusal_rate"]["mean"], none["false_refusal_rate"]["mean"],
    )  # fmt: skip


def _without_safety(lab: Lab, path: Path) -> Path:
    """A copy of a file of dialogs that holds none about safety."""
    out = lab.run / "findings/no_safety_data_dialogs" / path.parent.name / path.name
    records = readers.read((path,), "dialogs").records
    tagged = ("adversarial", "context_distillation")
    kept = [r for r in records if not r.get("is_safety") and r.get("kind", r.get("source")) not in tagged]
    out.parent.mkdir(parents=True, exist_ok=True)
    readers.write_jsonl(out, kept)
    return out


MEASURES: tuple[Callable[[Lab], Iterator[Finding]], ...] = (
    margins, auxiliary, two_models, best_of_k, pooling, both_kinds, whitening, divergence, ghost_attention, gate,
    safety_data,
)  # fmt: skip


# The table -----------------------------------------------------------------------------------------------------------


def verdict(difference: dict[str, Any]) -> str:
    """What the interval over seeds says; one seed shows nothing."""
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return "not shown"
    return "holds" if low > 0 else "does not hold here"


def gather(seeds: list[list[Finding]]) -> list[dict[str, Any]]:
    """Each claim over the seeds."""
    rows = []
    for findings in zip(*seeds, strict=True):
        difference = over_seeds([f.first - f.second for f in findings])
        told = {key: getattr(findings[0], key) for key in ("claim", "source", "first_is", "second_is")}
        figures = {key: [getattr(f, key) for f in findings] for key in ("first", "second")}
        rows.append({**told, **figures, "difference": difference, "verdict": verdict(difference)})
    return rows


def markdown(rows: list[dict[str, Any]], n_seeds: int) -> str:
    """The table as a page."""
    lines = [
        "# What the paper reports, and what holds here",
        "",
        f"Laptop runs of {n_seeds} seeds in the embedded world; `benchmarks/findings.py` makes this page. The first",
        "figure should be the larger; the difference has Student's 95 % interval over seeds. The model is far smaller",
        "than the paper's and its data are others: what does not hold here may well hold there.",
        "",
        "| Claim | Paper | First | Second | Difference | Here |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, second = (sum(row[key]) / len(row[key]) for key in ("first", "second"))
        d = row["difference"]
        bounds = "" if d["low"] is None else f" ({d['low']:+.3f} to {d['high']:+.3f})"
        lines.append(
            f"| {row['claim']} | {row['source']} | {row['first_is']}: {first:.3f} | {row['second_is']}: {second:.3f} "
            f"| {d['mean']:+.3f}{bounds} | {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def main(runs: list[str]) -> None:
    """Measure the findings in every run and write the table."""
    measures = MEASURES
    if runs[0] == "--measures":
        named = runs[1].split(",")
        measures, runs = tuple(measure for measure in MEASURES if measure.__name__ in named), runs[2:]
    seeds = [[finding for measure in measures for finding in measure(Lab(Path(run)))] for run in runs]
    rows = gather(seeds)
    (RESULTS / "findings.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "findings.md").write_text(markdown(rows, len(seeds)))
    print(markdown(rows, len(seeds)))


if __name__ == "__main__":
    main(sys.argv[1:])
