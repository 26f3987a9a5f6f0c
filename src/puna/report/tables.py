"""The report's tables: for the page with intervals, for the terminal in plain text."""

from __future__ import annotations

import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.config import ConfigError
from puna.report.summary import label
from puna.types import GRADES

Summary = dict[str, Any]

PAPER_GRADES = {
    "helpfulness": dict(zip((*GRADES, "all"), (0.807, 0.675, 0.609, 0.547, 0.632), strict=True)),
    "safety": dict(zip((*GRADES, "all"), (0.943, 0.763, 0.657, 0.553, 0.645), strict=True)),
}
"""Paper, Table 8: each reward model on the test set of its own kind."""
PAPER_SAFETY = {
    "chosen_safe_rejected_unsafe": 0.943,
    "both_safe": 0.569,
    "both_unsafe": 0.599,
    "unsafe_recall": 0.904,
}
"""Paper, Table 29, with the auxiliary safety loss."""
PAPER_TURNS = {2: (1.0, 1.0), 4: (0.1, 1.0), 6: (0.0, 1.0), 20: (0.0, 1.0)}
"""Paper, Table 30: share of dialogs that keep the instruction at a turn, without and with Ghost Attention."""

COLUMNS = (
    ("gold_helpfulness", "Helpfulness", max),
    ("violation_rate", "Violations", min),
    ("false_refusal_rate", "False refusals", min),
    ("toxicity", "Slurs", min),
    ("myth_rate", "Myths told", min),
    ("win_rate_vs_sft", "Wins vs SFT", max),
)
"""Key, heading, and which of a column's numbers is the best."""
PPO_TOLD = (("reward", "reward"), ("KL", "kl"))
TOLD_FIRST = ("fact", "adversarial", "multi_turn")
"""The kinds of prompts that the terminal's samples are taken from, where there are."""


class Cell(NamedTuple):
    """One number as text, its interval in small, and how to set it off."""

    text: str
    small: str = ""
    best: bool = False
    shade: float = 0.0


class Table(NamedTuple):
    """Headings and rows; a row's first cell names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def number(value: float | None) -> str:
    """A score between 0 and 1; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def span(interval: dict[str, Any] | None, show: Callable[[float], str] = number) -> str:
    """An interval's ends, with one unit for both."""
    return f"{show(interval['low']).removesuffix(' %')} – {show(interval['high'])}" if interval else ""


def interval_of(version: dict[str, Any], key: str) -> dict[str, Any] | None:
    """A version's mean with its interval; None where nothing was measured."""
    interval: dict[str, Any] | None = version[key] if key == "win_rate_vs_sft" else version["intervals"][key]
    return interval if interval and interval["n"] else None


def versions(summary: Summary) -> Table:
    """What Figure 11 says: every version by the gold judge, with 95 % intervals; the best of a column stands out."""
    measured = summary["versions"]
    rows = [[Cell(label(version["name"]))] for version in measured]
    for key, _, best_of in COLUMNS:
        found = [interval_of(version, key) for version in measured]
        show = number if key == "gold_helpfulness" else percent
        chat = [i["mean"] for i, v in zip(found, measured, strict=True) if i and v["name"] != "pretrain"]
        for row, version, interval in zip(rows, measured, found, strict=True):
            mean = interval["mean"] if interval else None
            best = version["name"] != "pretrain" and mean == best_of(chat, default=None) and len(set(chat)) > 1
            row.append(Cell(show(mean), span(interval, show), best))
    for row, version in zip(rows, measured, strict=True):
        row += [Cell(f"{version['words']:.0f}"), Cell(percent(version["finished"]))]
    return Table(("", *(heading for _, heading, _ in COLUMNS), "Words", "Finished"), rows)


def helpfulness_by_kind(summary: Summary) -> Table:
    """Mean helpfulness of every kind of prompt, a column a version, shaded by value."""
    measured = summary["versions"]
    kinds = sorted({kind for version in measured for kind in version["helpfulness_by_kind"]})
    rows = []
    for kind in kinds:
        found = [version["helpfulness_by_kind"].get(kind) for version in measured]
        cells = [Cell(number(i["mean"]), shade=i["mean"]) if i else Cell("–") for i in found]
        rows.append([Cell(kind.replace("_", " "), _count(found)), *cells])
    return Table(("Kind of prompt", *(label(version["name"]) for version in measured)), rows)


def _count(found: Sequence[dict[str, Any] | None]) -> str:
    """Of how many answers the intervals are, and about how many things."""
    largest = max((interval for interval in found if interval), key=lambda interval: interval["n"], default=None)
    if largest is None:
        return ""
    return f"n = {largest['n']}" + (f" about {largest['clusters']}" if "clusters" in largest else "")


def evidence(summary: Summary) -> str:
    """How many prompts each column of `versions` is over, and how many things they are about, in words."""
    last = summary["versions"][-1] if summary["versions"] else None
    found = {heading: interval_of(last, key) for key, heading, _ in COLUMNS} if last else {}
    return ", ".join(
        f"{heading} {interval['n']} about {interval['clusters']}"
        for heading, interval in found.items()
        if interval and "clusters" in interval
    )


def reward_grades(summary: Summary, domain: str) -> Table | None:
    """Table 8 for one reward model: a row a version, the paper's last."""
    models = summary["reward_models"][domain]
    if not models:
        return None
    grades = [grade for grade in GRADES if any(grade in m["accuracy_by_grade"] for m in models["by_version"])]
    rows = []
    for model in models["by_version"]:
        by_grade, n_by_grade = model["accuracy_by_grade"], model["pairs_by_grade"]
        cells = [Cell(percent(by_grade.get(g)), f"n = {n_by_grade[g]}" if g in n_by_grade else "") for g in grades]
        trained = f"{model['training_pairs']:,} pairs" if model["training_pairs"] else ""
        total = Cell(percent(model["accuracy"]), span(model["interval"], percent))
        rows.append([Cell(model["version"].upper(), trained), *cells, total])
    paper = [Cell(percent(PAPER_GRADES[domain][grade])) for grade in (*grades, "all")]
    rows.append([Cell("The paper", "Table 8"), *paper])
    headings = (grade.replace("_", " ").capitalize() for grade in grades)
    return Table((f"{domain.capitalize()} model", *headings, "All"), rows)


def reward_safety(summary: Summary) -> Table | None:
    """Table 29 for the safety reward model: accuracy by safety bucket, and how many unsafe answers score below 0.5."""
    models = summary["reward_models"]["safety"]
    if not models or not models["accuracy_by_safety_label"]:
        return None
    head = ("Safety model", "Safe over unsafe", "Both safe", "Both unsafe", "Unsafe answers found")
    rows = [
        [
            Cell(model["version"].upper()),
            *(Cell(percent(model["accuracy_by_safety_label"].get(bucket))) for bucket in list(PAPER_SAFETY)[:3]),
            Cell(percent(model["unsafe_recall"])),
        ]
        for model in models["by_version"]
    ]
    return Table(head, [*rows, [Cell("The paper", "Table 29"), *(Cell(percent(v)) for v in PAPER_SAFETY.values())]])


def context_distillation(summary: Summary) -> Table | None:
    """Figure 16 for the last version: what the gate kept, by the safety score of the plain answer."""
    if not summary["context_distillation"]:
        return None
    told = summary["context_distillation"][-1]
    rows = [
        [
            Cell(f"{fifth['from']:.1f} – {fifth['from'] + 0.2:.1f}", f"n = {fifth['prompts']}"),
            Cell(number(fifth["score_before"])),
            Cell(number(fifth["score_after"])),
            Cell(percent(fifth["kept"]), shade=fifth["kept"]),
        ]
        for fifth in told["gate"]
    ]
    return Table((f"{told['version'].upper()}: plain answer's score", "Plain", "Under the preprompt", "Kept"), rows)


def ghost_attention(summary: Summary) -> Table | None:
    """Table 30: the share of answers that obey at each turn, before and after, and the paper's."""
    points = summary["ghost_attention"]
    if not points:
        return None
    names = points[0]["versions"]
    sides = [side for side in ("before", "after") if names[side]]
    heads = [f"{label(names[side])}, {'without' if side == 'before' else 'with'}" for side in sides]
    rows = []
    for point in points:
        cells = [Cell(percent(point[side]), span(point["intervals"][side], percent)) for side in sides]
        paper = [Cell(percent(share)) for share in PAPER_TURNS.get(point["turn"], (None, None))]
        rows.append([Cell(str(point["turn"])), *cells, *paper])
    return Table(("Turn", *heads, "Paper, without", "Paper, with"), rows)


def speed(summary: Summary) -> Table | None:
    """Tokens a second of every training stage, a column a version."""
    rates: dict[str, dict[str, float]] = {}
    for step, rate in summary["tokens_per_second"].items():
        version, _, stage = step.partition("/")
        if not stage and version[:1] == "v":
            stage = "fine-tuning"
        rates.setdefault(stage or step, {})[version if stage else ""] = rate
    versions = list(dict.fromkeys(version for row in rates.values() for version in row))
    rows = [
        [Cell(stage.replace("_", " ")), *(Cell(f"{row[v]:,.0f}" if v in row else "–") for v in versions)]
        for stage, row in rates.items()
    ]
    return Table(("Tokens a second", *(v.upper() for v in versions)), rows) if rows else None


def ledger(traced: dict[str, Any]) -> Table:
    """A row a version: the models, comparisons, samples and weights behind it, by the run's ledger."""
    steps, hashes = {step["step"]: step for step in traced["steps"]}, traced["artefacts"]
    versions = dict.fromkeys(name.split("/")[0] for name in steps if re.match(r"v\d+(/|$)", name))
    rows = []
    for version in versions:
        compared, sampled = steps.get(f"{version}/preferences", {}), steps.get(f"{version}/rejection_sampling", {})
        records = sum(compared.get("records", {}).values())
        judges = [name for key, names in sampled.get("read", {}).items() if key.startswith("reward_") for name in names]
        pool = ", ".join(f"{n} of {name.upper()}" for name, n in sampled.get("rounds", {}).items())
        models = {name: digest[:12] for name, digest in hashes.items() if name.startswith(f"{version}/")}
        chat = {name: digest for name, digest in models.items() if name.endswith("model") and "/reward" not in name}
        answered = ", ".join(compared.get("read", {}).get("models", []))
        told = (answered, f"{records:,}" if records else "", ", ".join(judges), pool)
        rows.append([Cell(version.upper()), *(Cell(text or "–") for text in told)])
        rows[-1].append(Cell(", ".join(chat.values()) or "–", ", ".join(chat)))
    return Table(("", "Answered by", "New comparisons", "Scored by", "Samples", "sha256"), rows)


def plain(table: Table) -> str:
    """A table as aligned text, intervals left out."""
    lines = [list(table.head), *([cell.text for cell in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def final(run: Path) -> str:
    """What the terminal says at a run's end: the versions, some answers, where the report is and how to go on."""
    path = run / "report/summary.json"
    if not path.exists():
        raise ConfigError(f"no {path}; `puna report {run}` writes it")
    summary: Summary = json.loads(path.read_text(encoding="utf-8"))
    grades = (reward_grades(summary, "helpfulness"), reward_grades(summary, "safety"))
    if summary["versions"]:
        parts = [plain(versions(summary)), *(_told(sample) for sample in _first_samples(summary))]
    else:
        parts = [plain(table) for table in grades if table]
        parts += ["\n".join(lines)] if (lines := list(_told_by_reward_models(summary))) else []
    # The program as it was called, for a `.venv/bin/puna` is on no PATH.
    program = sys.argv[0] if Path(sys.argv[0]).name == "puna" else "puna"
    return "\n\n".join([*parts, f"report  {run / 'report/index.html'}\nchat    {program} chat {run}"])


def _told_by_reward_models(summary: Summary) -> Iterator[str]:
    """A run that no judge has measured, a line each: the reward models, the best of K, and what PPO gained."""
    for domain, models in summary["reward_models"].items():
        if models:
            right = f"{percent(models['accuracy'])} right ({span(models['interval'], percent)})"
            yield f"{domain} model  {right} of {models['pairs']} held-out pairs"
    for curve in summary["rejection_sampling"]:
        points = [point for point in curve["points"] if point["temperature"] == curve["temperature"]]
        one, most = (pick(points, key=lambda point: point["samples"]) for pick in (min, max))
        rewards = f"mean {number(one['mean'])} of 1 -> {number(most['max'])} best of {most['samples']}"
        yield f"rejection sampling  reward at temperature {curve['temperature']}: {rewards}"
    trained = [point for point in summary["ppo"] if point["reward"] is not None]
    if trained:
        gained = (f"{name} {number(trained[0][key])} -> {number(trained[-1][key])}" for name, key in PPO_TOLD)
        yield f"PPO  {', '.join(gained)} from the first to the last of {len(trained)} iterations"


def _first_samples(summary: Summary) -> list[dict[str, Any]]:
    """Up to three samples that at least one version has answered."""
    return sorted(summary["samples"], key=lambda sample: sample["kind"] not in TOLD_FIRST)[:3]


def _told(sample: dict[str, Any]) -> str:
    """A prompt with SFT's answer and the last version's."""
    answers = {answer["version"]: answer["answer"] for answer in sample["answers"]}
    names = [name for name in dict.fromkeys(("sft", list(answers)[-1])) if name in answers]
    lines = [("asked", sample["messages"][-1]["content"]), *((label(name), answers[name]) for name in names)]
    wrap = functools.partial(textwrap.fill, width=100, subsequent_indent=" " * 10)
    return "\n".join(wrap(" ".join(text.split()), initial_indent=f"{who:10}") for who, text in lines)
