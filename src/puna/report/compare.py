"""`puna compare RUN RUN ...`: several runs side by side, one table and the frontier of reward against KL.

1. Read each run as its report does; its last measured version stands for it.
2. Lay out what the judge found, how often the reward models are right, and how long it all took.
3. Draw, for what was trained by PPO, GRPO or RLOO, the reward of every iteration against its KL, and for the best of n
   answers against log n - (n - 1) / n; and the judge's helpfulness against KL.

A trained policy's KL is that of answers to its training prompts at the temperature that it was trained at, 1 unless it
was told another. The formula of the best of n holds for answers drawn at temperature 1 from all tokens: rejection
sampling's curve is drawn where its were. What the judge saw was drawn as evaluations draw (0.6, top-p 0.9 unless told
otherwise): there the best of n's KL is from such draws, a policy's from its training's.

Runs compare on equal terms where they have one world, one SFT model and the same prompts (docs/guides/baselines.md). A
reward is that of the run's own reward models: of other models it is another scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from puna.config import ConfigError
from puna.evals import best_of_n
from puna.report import figures, html, tables
from puna.report.summary import build, label
from puna.report.tables import COLUMNS, Cell, Summary, Table, duration, interval_of, number, percent, span
from puna.run_folder import write_atomically


@dataclass(frozen=True)
class CompareConfig:
    """`puna compare RUN RUN ...`: runs' folders in, a table and a page out."""

    runs: tuple[Path, ...]
    """the runs' folders; the first ones are drawn darkest."""
    out: Path = Path("runs/compare")
    """the folder for index.html and compare.json."""


class Point(NamedTuple):
    """A policy: how far it is from where it started, in nats an answer, and what it is worth there."""

    kl: float
    worth: float
    words: str = ""


Curves = dict[str, list[Point]]
"""A line of a chart by its name."""


def run(cfg: CompareConfig) -> Path:
    """Compare, print the table, write the page, and return its path. ConfigError where there is no run to compare."""
    if not cfg.runs:
        raise ConfigError("no run to compare: name at least one run's folder")
    found = {_name(cfg.runs, path): (path, build(path)) for path in cfg.runs}
    shown = table({name: (path, summary) for name, (path, summary) in found.items()})
    rewards = {line: points for name, (path, _) in found.items() for line, points in reward_curves(name, path).items()}
    judged = {line: points for name, (path, told) in found.items() for line, points in gold(name, path, told).items()}
    told = {"table": _plain(shown), "reward_against_kl": _plain(rewards), "gold_against_kl": _plain(judged)}
    write_atomically(cfg.out / "compare.json", json.dumps(told, indent=1) + "\n")
    write_atomically(cfg.out / "index.html", page(shown, rewards, judged))
    print(tables.plain(shown))
    return cfg.out / "index.html"


def _name(runs: Sequence[Path], path: Path) -> str:
    """The folder's name, or its path where another run has that name."""
    same = [other for other in runs if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 else str(path)


def table(found: dict[str, tuple[Path, Summary]]) -> Table:
    """A row a run: its last version by the gold judge with 95 % intervals, its reward models, and its seconds."""
    rows = []
    for name, (path, summary) in found.items():
        measured = summary["versions"]
        last = measured[-1] if measured else None
        row = [Cell(name, label(last["name"]) if last else "not measured")]
        for key, _, _ in COLUMNS:
            interval = interval_of(last, key) if last else None
            show = number if key == "gold_helpfulness" else percent
            row.append(Cell(show(interval["mean"] if interval else None), span(interval, show)))
        row += [accuracy(path), Cell(duration(sum(summary["seconds"].values())) if summary["seconds"] else "–")]
        rows.append(row)
    return Table(("Run", *(heading for _, heading, _ in COLUMNS), "Reward models right", "Time"), rows)


def accuracy(run: Path) -> Cell:
    """How often the last version's reward models, or DPO's policy in their place, are right on held-out pairs."""
    files = _in_versions(run, "*/evaluation.json")
    last = [path for path in files if path.parts[-3] == files[-1].parts[-3] and path.parent.name != "evaluation"]
    told = {path.parent.name.removeprefix("reward_"): json.loads(path.read_text(encoding="utf-8")) for path in last}
    right = {name: found["accuracy"] for name, found in told.items() if found.get("accuracy") is not None}
    return Cell(" / ".join(percent(value) for value in right.values()) or "–", " / ".join(right))


def _in_versions(run: Path, pattern: str) -> list[Path]:
    """The files of a run's versions, V1 first; a folder like v2_old is no version."""
    found = [path for folder in run.glob("v*") if re.fullmatch(r"v\d+", folder.name) for path in folder.glob(pattern)]
    return sorted(found, key=lambda path: (int(path.relative_to(run).parts[0][1:]), path))


def reward_curves(name: str, run: Path) -> Curves:
    """Reward against KL on a run's training prompts: of each trained policy by iteration, of its last best of n."""
    curves: Curves = {}
    trained = [path for path in _in_versions(run, "*/metrics.jsonl") if path.parent.name in ("ppo", "grpo")]
    for path in trained:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        points = [Point(line["kl"], line["reward"]) for line in lines if None not in (line["kl"], line["reward"])]
        line = _line(name, path.parent)
        curves[line if len(trained) == 1 else f"{line} of {path.parts[-3].upper()}"] = points
    for path in _in_versions(run, "rejection_sampling/curve.json")[-1:]:
        curve = json.loads(path.read_text(encoding="utf-8"))
        settings = _settings(path.parent)
        # The formula is that of draws from the policy itself.
        whole = curve["temperature"] == 1 and settings.get("top_p", 1) == 1
        mine = [point for point in curve["points"] if whole and point["temperature"] == 1]
        points = [Point(best_of_n.kl(p["samples"]), p["max"], f"best of {p['samples']}") for p in mine]
        curves[f"{name}, best of n"] = points
    return {line: points for line, points in curves.items() if points}


def _line(name: str, stage: Path) -> str:
    """What a trained policy's line is called: GRPO's stage trains by RLOO too."""
    return f"{name}, {_settings(stage).get('advantage', stage.name).upper()}"


def _settings(stage: Path) -> dict[str, Any]:
    """A stage's config, empty where it left none."""
    path = stage / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings


def gold(name: str, run: Path, summary: Summary) -> Curves:
    """The judge's helpfulness against KL on the held-out prompts: trained policies as published, and the best of n."""
    curves: Curves = {}
    for version in summary["versions"]:
        stage = run / version["name"]
        if (stage / "evaluation/best_of_n.json").exists():
            points = json.loads((stage / "evaluation/best_of_n.json").read_text(encoding="utf-8"))
            words = [f"best of {point['samples']}" for point in points]
            told = [Point(p["kl"], p["gold"], said) for p, said in zip(points, words, strict=True)]
            curves[f"{name}, best of n"] = told
        elif stage.name in ("ppo", "grpo") and (kl := published_kl(stage)) is not None:
            curves.setdefault(_line(name, stage), []).append(Point(kl, version["gold_helpfulness"], "as published"))
    return curves


def published_kl(stage: Path) -> float | None:
    """How far the policy that was kept had moved: the KL of the iteration that began with it, or of the last one."""
    marker = next((stage / "done").glob("*po.json"), None)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    if marker is None or not lines:
        return None
    best = json.loads(marker.read_text(encoding="utf-8"))["best_iteration"]
    kl: float | None = lines[min(best, len(lines) - 1)]["kl"]
    return kl


def page(shown: Table, rewards: Curves, judged: Curves) -> str:
    """The page."""
    panels = figures.frontier("Reward against KL", "combined reward, 0 to 1", rewards) + figures.frontier(
        "Helpfulness against KL", "gold judge, 0 to 1", judged
    )
    return html.environment().get_template("compare.html").render(table=shown, panels=panels)


def _plain(value: Any) -> Any:
    """Named tuples as JSON objects."""
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
