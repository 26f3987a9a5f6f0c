"""`puna report RUN`: the run's report, one page that holds everything it shows, and its numbers beside it.

1. Read the run's folder into a summary (puna.report.summary), whatever part of the run is there.
2. Draw the charts and lay out the tables; every section names what it still waits for.
3. Write report/index.html, which asks for nothing outside itself, and report/summary.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from puna import monitors
from puna.report import figures, ledger, tables
from puna.report.figures import Losses, Panel
from puna.report.summary import PARTS, build, label, losses
from puna.report.tables import Summary, Table, duration, number, percent
from puna.run_folder import write_atomically

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class ReportConfig:
    """`puna report RUN`: a run's folder in, a page out."""

    run: Path
    """the run's folder; its report/ is written anew."""


class Section(NamedTuple):
    """A part of the page: a sentence on what it shows, charts, tables, and what it waits for."""

    id: str
    title: str
    text: str
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    missing: str = ""


class Step(NamedTuple):
    """A box of the recipe's picture."""

    title: str
    kind: str
    column: int
    time: str
    share: float


NAMES = {
    "valley": ("World", "data"),
    "base": ("Import", "data"),
    "pretrain": ("Pretraining", "training"),
    "sft": ("SFT", "training"),
    "preferences": ("Preferences", "data"),
    "reward_helpfulness": ("Helpfulness reward model", "training"),
    "reward_safety": ("Safety reward model", "training"),
    "rejection_sampling": ("Rejection sampling", "data"),
    "context_distillation": ("Context distillation", "data"),
    "ghost_attention": ("Ghost Attention", "data"),
    "": ("Fine-tuning", "training"),
    "evaluation": ("Evaluation", "measuring"),
    "ppo": ("PPO", "training"),
    "reward": ("Reward model", "training"),
    "dpo": ("DPO", "training"),
    "grpo": ("GRPO", "training"),
    "critique": ("Critique and revision", "data"),
    "ai_preferences": ("Model's preferences", "data"),
}
"""A step's last word -> what the page calls it, and what kind of work it is."""
IN_THE_WORLD = (
    "Each version collects preferences with the newest models, trains both reward models, selects the best of many "
    "answers, and tunes the pretrained model on them anew."
)
ON_FILES = (
    "Both reward models learn from the comparisons; the best of many answers tune the imported model; PPO goes on from "
    "there."
)
BASELINE = (
    "The Llama 2 recipe's SFT model, trained another way in one round, on as many comparisons and prompts as that "
    "recipe has in all."
)
NEED_A_JUDGE = ("versions", "distillation", "ghost", "changes", "samples")
"""Sections that a run on an imported model and existing comparisons cannot have."""


def run(cfg: ReportConfig) -> Path:
    """Write the report of whatever is there of the run, and return the page's path."""
    summary = build(cfg.run)
    page = render(cfg.run, summary, losses(cfg.run), ledger.write(cfg.run))
    write_atomically(cfg.run / "report/summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(cfg.run / "report/index.html", page)
    return cfg.run / "report/index.html"


def render(run: Path, summary: Summary, curves: Losses, traced: dict[str, Any] | None = None) -> str:
    """The page; `traced` is the run's ledger."""
    return (
        environment()
        .get_template("report.html")
        .render(
            summary=summary,
            command=f"puna chat {run}",
            headline=headline(summary),
            tiles=tiles(summary),
            lanes=lanes(summary),
            way=ON_FILES if summary["base"] else IN_THE_WORLD if summary["method"] == "llama2" else BASELINE,
            sections=sections(summary, curves, traced),
            facts=facts(summary),
        )
    )


def environment() -> jinja2.Environment:
    """Where pages' templates are, and the filters they use."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("puna.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"label": label, "number": number, "percent": percent}
    return made


def headline(summary: Summary) -> list[str]:
    """The run in a few sentences, from its numbers."""
    done, steps = summary["seconds"], summary["steps"]
    left = [step for step in steps if step not in done]
    spent, memory = duration(sum(done.values())), summary["peak_memory_bytes"]
    peak = f", with at most {memory / 2**30:.1f} GiB of memory" if memory else ""
    if not steps:
        said = ["The stages of this run were started one by one, so nothing is known of their times."]
    elif left:
        said = [f"{len(steps) - len(left)} of {len(steps)} steps are done, in {spent}{peak}; next is {left[0]}."]
    else:
        said = [f"All {len(steps)} steps are done, in {spent}{peak}."]
    if summary["base"]:
        said.append("It starts from an imported model and existing comparisons, where no judge knows the truth.")
    return said + _said_of_versions(summary) + _said_of_models(summary)


def _said_of_versions(summary: Summary) -> list[str]:
    """How the last version compares with SFT, by the judge."""
    measured = {version["name"]: version for version in summary["versions"]}
    if "sft" not in measured or list(measured)[-1] == "sft":
        return []
    sft, final = measured["sft"], summary["versions"][-1]
    words = [
        f"{what} {_moved(sft['intervals'][key], final['intervals'][key], show)}"
        for key, what, show in (
            ("gold_helpfulness", "helpfulness", number),
            ("violation_rate", "violations", percent),
            ("false_refusal_rate", "false refusals", percent),
        )
    ]
    said = [f"From SFT to {label(final['name'])} the judge sees {words[0]}, {words[1]}, and {words[2]}."]
    if final["win_rate_vs_sft"]:
        wins = final["win_rate_vs_sft"]
        rate = f"{percent(wins['mean'])} ({tables.span(wins, percent)})"
        said.append(f"Of its answers {rate} win against SFT's to the same prompts.")
    return said


def _moved(before: dict[str, Any], after: dict[str, Any], show: Callable[[float], str]) -> str:
    """A change in words; intervals that overlap say nothing sure."""
    if show(before["mean"]) == show(after["mean"]):
        return f"stay at {show(after['mean'])}"
    numbers = f"from {show(before['mean'])} to {show(after['mean'])}"
    if after["low"] > before["high"]:
        return f"go up {numbers}"
    if after["high"] < before["low"]:
        return f"go down {numbers}"
    return f"go {numbers} (the intervals overlap)"


def _said_of_models(summary: Summary) -> list[str]:
    """The last reward models, and Ghost Attention at the last turn."""
    models = [(domain, model) for domain, model in summary["reward_models"].items() if model]
    words = " and ".join(f"the {domain} model in {percent(model['accuracy'])}" for domain, model in models)
    said = [f"The last reward models prefer what the annotators prefer: {words} of held-out pairs."] if words else []
    both = [p for p in summary["ghost_attention"] if p["before"] is not None and p["after"] is not None]
    if both:
        turn, before, after = both[-1]["turn"], percent(both[-1]["before"]), percent(both[-1]["after"])
        shares = f"{after} of dialogs, before Ghost Attention in {before}"
        said.append(f"At turn {turn} the first turn's instruction holds in {shares}.")
    return said


def tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The numbers that stand out on top: what, the last version's, and SFT's."""
    measured = {version["name"]: version for version in summary["versions"]}
    if not measured:
        models = [(domain, model) for domain, model in summary["reward_models"].items() if model]
        return [(f"{d} reward model", percent(m["accuracy"]), f"of {m['pairs']:,} held-out pairs") for d, m in models]
    final = summary["versions"][-1]
    sft = measured.get("sft", final)
    rows = []
    for key, heading, _ in tables.COLUMNS[:3]:
        show = number if key == "gold_helpfulness" else percent
        beside = label(final["name"]) if sft is final else f"SFT {show(sft[key])}"
        rows.append((heading, show(final[key]), beside))
    if wins := final["win_rate_vs_sft"]:
        rows.append(("Wins vs SFT", percent(wins["mean"]), tables.span(wins, percent)))
    return rows


def lanes(summary: Summary) -> list[tuple[str, list[Step]]]:
    """The recipe as a picture: a lane for the start and for each version, a box a step; alike steps share a column."""
    seconds = summary["seconds"]
    longest = max(seconds.values(), default=1.0)
    found: dict[str, list[Step]] = {}
    for step in summary["steps"]:
        first, _, rest = step.partition("/")
        of_version = bool(re.fullmatch(r"v\d+", first))
        lane = found.setdefault(first.upper() if of_version else "Start", [])
        title, kind = NAMES.get(_work(step), (step, "data"))
        column = PARTS.index(rest) + 1 if of_version and rest in PARTS and not summary["base"] else len(lane) + 1
        time = duration(seconds[step]) if step in seconds else ""
        lane.append(Step(title, kind, column, time, seconds.get(step, 0.0) / longest))
    return list(found.items())


def sections(summary: Summary, curves: Losses, traced: dict[str, Any] | None = None) -> list[Section]:
    """The page's parts below the headline and the picture."""
    judged = [f"{version['name']}/evaluation" for version in summary["versions"]]
    unjudged = _missing(summary, judged, "evaluation")
    text = "The first held-out prompt of each kind, answered by every version, with the judge's score and findings."
    parts = [
        _versions(summary, unjudged),
        _losses(summary, curves),
        _reward_models(summary),
        _rejection_sampling(summary),
        _context_distillation(summary),
        _ppo(summary),
        _ghost_attention(summary, unjudged),
        _changes(summary, unjudged),
        Section("samples", "Samples", text, missing=unjudged),
        _time(summary),
        *([_ledger(traced)] if traced else []),
    ]
    return [part for part in parts if not summary["base"] or part.id not in NEED_A_JUDGE]


def _work(step: str) -> str:
    """What a step does, its last word; "" for a version's fine-tuning ("v3")."""
    return "" if re.fullmatch(r"v\d+", step) else step.split("/")[-1]


def _missing(summary: Summary, have: Collection[str], *works: str) -> str:
    """Which of the recipe's steps of such work a section waits for."""
    left = [step for step in summary["steps"] if _work(step) in works and step not in have]
    if left:
        return f"Not there yet: {', '.join(left)}."
    return "" if have else "Nothing of this is there yet."


def _versions(summary: Summary, missing: str) -> Section:
    text = (
        "The judge knows the embedded world's truth and stands for people. Training never asks it, only annotators "
        "with noise and biases of their own. Helpfulness is over benign held-out prompts, violations over adversarial "
        "ones, false refusals over borderline ones, slurs over prompts about a people, myths over questions about one. "
        "Small: 95 % intervals. Bold: the best chat model of a column."
    )
    if evidence := tables.evidence(summary):
        text += (
            " Answers about one thing are alike, so the intervals are over the things that prompts are about: "
            f"{evidence}."
        )
    shown = [tables.versions(summary)] if summary["versions"] else []
    return Section("versions", "Versions", text, figures.versions(summary), shown, missing)


def _losses(summary: Summary, curves: Losses) -> Section:
    text = (
        f"Long curves are thinned to at most {figures.POINTS} points, each the mean of its steps. The fainter a line, "
        "the older the version."
    )
    missing = _missing(summary, curves.keys(), "pretrain", "sft", "reward_helpfulness", "reward_safety", "")
    return Section("losses", "Losses", text, figures.loss_curves(curves), missing=missing)


def _reward_models(summary: Summary) -> Section:
    text = (
        "Share of held-out pairs in which the chosen answer scores higher, by how much better the annotator found it. "
        "The paper's numbers are on its own data, with larger models: a shape to compare with, not a mark to reach. "
        "Below, how the last models' scores of chosen and rejected answers lie (Figure 27)."
    )
    models = summary["reward_models"]
    have = [f"{m['version']}/reward_{domain}" for domain, model in models.items() if model for m in model["by_version"]]
    by_grade = [tables.reward_grades(summary, domain) for domain in models]
    found = [table for table in (*by_grade, tables.reward_safety(summary)) if table]
    missing = _missing(summary, have, "reward_helpfulness", "reward_safety")
    return Section(
        "reward", "Reward models", text, [*figures.reward_models(summary), *figures.scores(summary)], found, missing
    )


def _rejection_sampling(summary: Summary) -> Section:
    text = (
        "The reward of the best of K answers (solid), their mean (dotted) and their median (dashed), by temperature. "
        "The gap between best and median is what selection can gain; each round chooses its temperature anew (the "
        "paper's Figures 7 and 8)."
    )
    have = [f"{curve['version']}/rejection_sampling" for curve in summary["rejection_sampling"]]
    missing = _missing(summary, have, "rejection_sampling")
    return Section("sampling", "Rejection sampling", text, figures.rejection_sampling(summary), missing=missing)


def _context_distillation(summary: Summary) -> Section:
    text = (
        "Adversarial prompts answered as they are, and under a safety preprompt: mean scores by the safety model, and "
        "the share of answers under the preprompt that are learned without it, those that score higher. Where the "
        "plain answer is good already, little is kept (the paper's Figure 16)."
    )
    table = tables.context_distillation(summary)
    have = [f"{told['version']}/context_distillation" for told in summary["context_distillation"]]
    missing = _missing(summary, have, "context_distillation")
    panels = figures.context_distillation(summary)
    return Section("distillation", "Context distillation", text, panels, [table] if table else [], missing)


def _ppo(summary: Summary) -> Section:
    text = (
        "The combined reward that PPO sees, the judge's helpfulness that it does not see (in a run that has a judge), "
        "how far the policy moves, and how long its answers are."
    )
    versions = list(dict.fromkeys(point["version"] for point in summary["ppo"]))
    for version in versions:
        mine = [p | {"reward": p["held_out_reward"]} for p in summary["ppo"] if p["version"] == version]
        text += "".join(f" {version.upper()}: {sentence}." for sentence in monitors.signs(mine).values())
    have = [f"{version}/ppo" for version in versions]
    return Section("ppo", "PPO", text, figures.ppo(summary), missing=_missing(summary, have, "ppo"))


def _ghost_attention(summary: Summary, unjudged: str) -> Section:
    text = (
        "Dialogs in which an instruction stands in the first turn only, and the share of answers that obey it at each "
        "turn: the last version without Ghost Attention's dialogs, and the last one with them. The paper's Table 30 is "
        "beside it: other instructions, judged by people. Beside that, of an answer's tokens, the largest weight over "
        "layers, heads and the instruction's tokens that their attention gives the instruction (the paper's Figure 10)."
    )
    points = summary["ghost_attention"]
    table = tables.ghost_attention(summary)
    sides = [side for side in ("before", "after") if points and points[0]["versions"][side]]
    missing = "" if len(sides) == 2 else unjudged
    if sides == ["before"] and not missing:
        missing = "No version of this run trains on Ghost Attention's dialogs."
    panels = figures.ghost_attention(summary)
    return Section("ghost", "Ghost Attention", text, panels, [table] if table else [], missing)


def _changes(summary: Summary, missing: str) -> Section:
    text = (
        "SFT beside the last version, with 95 % intervals: helpfulness by kind of prompt, and the share of adversarial "
        "prompts whose answer does what it should decline, by risk category and by attack."
    )
    table = [tables.helpfulness_by_kind(summary)] if summary["versions"] else []
    return Section("changes", "Where it changed", text, figures.changes(summary), table, missing)


def _time(summary: Summary) -> Section:
    totals: dict[str, float] = {}
    for step, seconds in summary["seconds"].items():
        title = "Versions' fine-tuning" if _work(step) == "" else NAMES.get(_work(step), (step, ""))[0]
        totals[title] = totals.get(title, 0.0) + seconds
    text = (
        "Seconds by kind of step, versions together, and all starts of a step that was resumed. Rates are "
        "medians over a stage's steps."
    )
    table = tables.speed(summary)
    missing = _missing(summary, summary["seconds"], *map(_work, summary["steps"]))
    return Section("time", "Time", text, figures.time(totals), [table] if table else [], missing)


def _ledger(traced: dict[str, Any]) -> Section:
    text = (
        "Which models answered the comparisons that were new in a version, which reward models scored its samples, "
        "which round the samples that it was tuned on came from, and the sha256 of its models' weights. ledger.json "
        "has what every step read and wrote."
    )
    table = tables.ledger(traced)
    missing = "" if table.rows else "No version is there yet."
    return Section(
        "ledger", "Where each version comes from", text, tables=[table] if table.rows else [], missing=missing
    )


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What the run and the report were made with."""
    machine, made_with = summary["machine"], summary["versions_of"]
    return [
        ("Processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("Memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB"),
        ("Platform", machine["platform"]),
        *((name.capitalize(), version) for name, version in made_with.items() if version),
        ("Seed", "–" if summary["seed"] is None else str(summary["seed"])),
    ]
