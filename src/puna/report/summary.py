"""A run's folder as one dictionary of numbers: what summary.json holds, and what tables and figures are made of.

Everything is read from files, and any of them may be missing: a run that is not finished has a report too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import puna
from puna.config import ConfigError, DataError
from puna.data.map_shards import n_cores
from puna.evals import intervals
from puna.run_folder import read_metrics
from puna.text.printable import printable

WAY_OUT = "; remove it and its step's mark in the run's done/, then run the recipe again"
MEASURES = ("gold_helpfulness", "violation_rate", "false_refusal_rate", "toxicity", "myth_rate")
FINER = (
    "win_rate_vs_sft",
    "helpfulness_by_kind",
    "violation_by_category",
    "violation_by_attack",
    "words",
    "finished",
)
PARTS = (
    "preferences",
    "reward_helpfulness",
    "reward_safety",
    "rejection_sampling",
    "context_distillation",
    "ghost_attention",
    "",
    "evaluation",
    "ppo",
    "ppo/evaluation",
)
"""A version's steps in the recipe's order; the nameless one is the version's fine-tuning."""
BASELINES = {
    "instructgpt": ("preferences", "reward", "ppo", "ppo/evaluation"),
    "best_of_n": (*PARTS[:4], "best_of_n/evaluation"),
    "dpo": ("preferences", "dpo", "dpo/evaluation"),
    "grpo": (*PARTS[:3], "grpo", "grpo/evaluation"),
    "constitutional": (
        *("preferences", "critique", "", "evaluation", "ai_preferences"),
        *("reward_helpfulness", "reward_safety", "ppo", "ppo/evaluation"),
    ),
}
"""The steps of the one round of other methods (puna.baselines)."""
DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""How deep a stage's folder lies in a run's."""


def build(run: Path) -> dict[str, Any]:
    """The summary of what is there of a run; what is not there is None or left out. ConfigError where no run is.

    `versions` (the judge's means, and `intervals`), `reward_models` (the last ones, and `by_version`),
    `ghost_attention` (by turn), `ppo` (by iteration) and `rejection_sampling` (by version) are the results; `steps` are
    the recipe's, in order, and `seconds` tells those that are done.
    """
    recipe = _recipe(run)
    markers = {name: _json(path) for name, path in _found(run / "done", ".json")}
    metrics = {name: _lines(path) for name, path in _found(run, "/metrics.jsonl")}
    plan = planned_steps(recipe)
    steps = plan + sorted(markers.keys() - {*plan, "report"}, key=_place)
    evaluations = _evaluations(run)
    stages = sorted({*steps, *metrics}, key=_place)
    rounds = list(dict.fromkeys(int(found[1]) for name in stages if (found := re.match(r"v(\d+)(/|$)", name))))
    rates = {name: _numbers(metrics.get(name, []), "tokens_per_second") for name in stages}
    peaks = [marker["peak_memory_bytes"] for marker in markers.values() if "peak_memory_bytes" in marker]
    return {
        "name": run.resolve().name,
        "seed": recipe.get("seed"),
        "base": recipe.get("base"),
        "method": recipe.get("method", "llama2"),
        "steps": steps,
        "seconds": {step: markers[step]["seconds"] for step in steps if "seconds" in markers.get(step, {})},
        "peak_memory_bytes": max(peaks, default=None),
        "tokens_per_second": {name: statistics.median(told) for name, told in rates.items() if told},
        "versions": [_version(name, evaluation) for name, evaluation in evaluations.items()],
        "reward_models": {domain: _reward_models(run, domain, rounds) for domain in ("helpfulness", "safety")},
        "rejection_sampling": _rejection_sampling(run, rounds),
        "ppo": [
            point
            for n in rounds
            for stage in (f"v{n}/ppo", f"v{n}/grpo")
            for point in _ppo(run, stage, metrics.get(stage, []))
        ],
        "context_distillation": _context_distillation(run, rounds),
        "ghost_attention": _ghost_attention(run, evaluations),
        "samples": _samples(run, list(evaluations)),
        "machine": _machine(),
        "versions_of": _versions_of(),
    }


def _numbers(lines: Iterable[dict[str, Any]], key: str) -> list[float]:
    """The lines' numbers of a name, without those that were not finite."""
    return [line[key] for line in lines if line.get(key) is not None]


def losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every training stage's (step, loss) by its folder's name; pretraining's last loss is the validation loss."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, path in _found(run, "/metrics.jsonl"):
        for line in _lines(path):
            for key, suffix in (("loss", ""), ("validation_loss", "/validation")):
                if line.get(key) is not None:
                    curves.setdefault(name + suffix, []).append((line["step"], line[key]))
    return curves


def planned_steps(recipe: dict[str, Any]) -> list[str]:
    """The recipe's steps by name, in order, from its config.json; the report itself is left out."""
    if recipe.get("base"):
        return ["base", "v1/reward_helpfulness", "v1/reward_safety", "v1/rejection_sampling", "v1", "v1/ppo"]
    if "versions" not in recipe:
        return []
    steps = ["valley", "pretrain", "pretrain/evaluation", "sft", "sft/evaluation"]
    if recipe.get("method", "llama2") != "llama2":
        return steps + [f"v1/{part}".rstrip("/") for part in BASELINES[recipe["method"]]]
    ghost_from, without_ppo = recipe["ghost_attention_from"], recipe["versions"] - recipe["ppo_versions"]
    last = int(recipe["only"][1:]) if recipe.get("only") else recipe["versions"]
    for n in range(1, last + 1):
        left_out = set() if ghost_from and n >= ghost_from else {"ghost_attention"}
        left_out |= set() if n > without_ppo else {"ppo", "ppo/evaluation"}
        steps += [f"v{n}/{part}".rstrip("/") for part in PARTS if part not in left_out]
    return steps


def label(name: str) -> str:
    """A version's name for people: "v5/ppo" is "V5 + PPO"."""
    return {"pretrain": "Pretrained", "sft": "SFT"}.get(name, name.upper().replace("/", " + ").replace("_", " "))


def _recipe(run: Path) -> dict[str, Any]:
    """The run's config.json; empty where stages were started one by one."""
    if not run.is_dir():
        raise ConfigError(f"no run's folder at {run}; `puna run RECIPE.toml --out {run}` makes one")
    traces = [*_found(run, "/metrics.jsonl"), *_found(run, "/evaluation.json"), *_found(run / "done", ".json")]
    recipe = _json(run / "config.json") or {}
    if not traces and "versions" not in recipe:
        raise ConfigError(f"{run} holds no run: give the folder that `puna run` was given as --out")
    return recipe


def _found(folder: Path, tail: str) -> list[tuple[str, Path]]:
    """(name, path) of the files whose path in `folder` is a name, of up to four parts, and `tail`."""
    paths = sorted({path for depth in DEPTHS for path in folder.glob(f"{depth}*{tail}") if path.is_file()})
    return [(str(path.relative_to(folder))[: -len(tail)], path) for path in paths]


def _json(path: Path) -> Any:
    """A JSON file's content; None without the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON ({error}){WAY_OUT}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none without the file."""
    try:
        return read_metrics(path) if path.exists() else []
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} has a line that is no JSON ({error}){WAY_OUT}") from None


def _place(name: str) -> tuple[int, int, str]:
    """Sorts versions and steps: the start, V1, V2, ..., and whatever else there is."""
    starts = {"valley": 0, "base": 1, "pretrain": 2, "sft": 3}
    first, _, rest = name.partition("/")
    if first in starts:
        return starts[first], 0, rest
    found = re.fullmatch(r"v(\d+)", first)
    if not found:
        return 5, 0, name
    return 4, int(found[1]), f"{PARTS.index(rest) if rest in PARTS else len(PARTS):02d}{rest}"


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Version -> its evaluation.json, in the order of the recipe."""
    found = dict(_found(run, "/evaluation/evaluation.json"))
    return {name: _json(found[name]) for name in sorted(found, key=_place)}


def _version(name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """One entry of `versions`: plain means, their intervals beside them, and the finer rates."""
    return {
        "name": name,
        **{measure: evaluation[measure]["mean"] for measure in MEASURES},
        **{key: evaluation[key] for key in FINER},
        "intervals": {measure: evaluation[measure] for measure in MEASURES},
    }


def _reward_models(run: Path, domain: str, rounds: Iterable[int]) -> dict[str, Any] | None:
    """The last version's measurement on held-out pairs, and those of all versions; None before the first."""
    by_version = []
    for n in rounds:
        folder = run / f"v{n}/reward_{domain}"
        measured = _json(folder / "evaluation.json")
        if measured and measured["pairs"]:
            trained = (_json(folder / "done/reward.json") or {}).get("pairs")
            interval = share(measured["accuracy"], measured["pairs"])
            by_version.append({"version": f"v{n}", "training_pairs": trained, **measured, "interval": interval})
    return {**by_version[-1], "by_version": by_version} if by_version else None


def share(mean: float, n: int) -> intervals.Interval:
    """The interval of a share that was written down as its mean over n."""
    right = round(mean * n)
    return intervals.rate([True] * right + [False] * (n - right))


def _rejection_sampling(run: Path, rounds: Iterable[int]) -> list[dict[str, Any]]:
    """Each version's chosen temperature and its points of reward against K."""
    curves = [(f"v{n}", _json(run / f"v{n}/rejection_sampling/curve.json")) for n in rounds]
    return [{"version": version, **curve} for version, curve in curves if curve]


def _context_distillation(run: Path, rounds: Iterable[int]) -> list[dict[str, Any]]:
    """Each version's decisions of the gate, by the plain answer's score."""
    gates = [(f"v{n}", _json(run / f"v{n}/context_distillation/gate.json")) for n in rounds]
    return [{"version": version, "gate": gate} for version, gate in gates if gate]


def _ppo(run: Path, name: str, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One point an iteration: the batch's means, and what was measured on held-out prompts before it, if anything."""
    judged = _json(run / name / "evaluation/held_out.json")
    if judged is None:
        answered = _found(run / name / "held_out", ".jsonl")
        judged = [{"iteration": int(iteration), "reward": _mean_reward(path)} for iteration, path in answered]
    held_out = {point["iteration"]: point for point in judged}
    trained = {line["step"]: line for line in metrics if "reward" in line}
    return [
        {
            "version": name.split("/")[0],
            "iteration": iteration,
            **{key: trained.get(iteration, {}).get(key) for key in ("reward", "kl", "length", "repetition", "entropy")},
            "held_out_reward": held_out.get(iteration, {}).get("reward"),
            "gold": held_out.get(iteration, {}).get("gold"),
        }
        for iteration in sorted(trained.keys() | held_out.keys())
    ]


def _mean_reward(path: Path) -> float | None:
    rewards = [line["reward"] for line in _lines(path)]
    return statistics.fmean(rewards) if rewards else None


def _ghost_attention(run: Path, evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of answers that obey, by turn: of the last version without Ghost Attention's dialogs, and with them."""
    chat = [name for name in evaluations if name != "pretrain"]
    with_it = [name for name in chat if (run / name.split("/")[0] / "ghost_attention/dialogs.jsonl").exists()]
    without = [name for name in chat if name not in with_it]
    versions = {"before": without[-1] if without else None, "after": with_it[-1] if with_it else None}
    before, after = _obeys(evaluations, without[-1:]), _obeys(evaluations, with_it[-1:])
    return [
        {
            "turn": turn,
            "before": before[turn]["mean"] if turn in before else None,
            "after": after[turn]["mean"] if turn in after else None,
            "intervals": {"before": before.get(turn), "after": after.get(turn)},
            "attention": {
                side: _looks(evaluations.get(name, {})).get(turn) if name else None for side, name in versions.items()
            },
            "versions": versions,
        }
        for turn in sorted(before.keys() | after.keys())
    ]


def _obeys(evaluations: dict[str, dict[str, Any]], names: list[str]) -> dict[int, intervals.Interval]:
    return {point["turn"]: point["obeys"] for name in names for point in evaluations[name]["ghost_attention"]}


def _looks(evaluation: dict[str, Any]) -> dict[int, float]:
    return {point["turn"]: point["attention"] for point in evaluation.get("attention", ())}


def _samples(run: Path, names: list[str]) -> list[dict[str, Any]]:
    """The first held-out prompt of each kind with every version's answer."""
    answers = {name: {a["prompt_id"]: a for a in _lines(run / name / "evaluation/answers.jsonl")} for name in names}
    prompts: dict[str, dict[str, Any]] = {}
    for asked in next((given for given in answers.values() if given), {}).values():
        prompts.setdefault(asked["kind"], asked)
    flags = ("helpfulness", "finished", "safe", "refused", "toxic", "myth")
    return [
        {
            "prompt_id": prompt["prompt_id"],
            "kind": kind,
            "messages": [{**message, "content": printable(message["content"])} for message in prompt["messages"]],
            "answers": [
                {"version": name, "answer": printable(answer["answer"]), **{flag: answer[flag] for flag in flags}}
                for name in names
                if (answer := answers[name].get(prompt["prompt_id"]))
            ],
        }
        for kind, prompt in sorted(prompts.items())
    ]


def _machine() -> dict[str, Any]:
    """What the report was written on, and so the run if its recipe wrote it."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": n_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
    }


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _versions_of() -> dict[str, str | None]:
    """Python's and torch's versions, and Puna's commit or, outside a checkout, its version."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {"python": platform.python_version(), "torch": torch, "puna": _commit() or puna.__version__}


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to; None for an installed package, wherever it lies."""
    package = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
        top, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if Path(top) / "src/puna" == package else None
