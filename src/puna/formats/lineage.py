"""Where a model comes from: the stages behind it, by the puna.json of each model folder and the parent it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from puna.formats.find import architectures, read_object, started_in


class Step(NamedTuple):
    """A model on the way: its folder, its puna.json, its stage's config.json and evaluation.json, {} without, and the
    seconds that a recipe's run took for the stage."""

    folder: Path
    provenance: dict[str, Any]
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    seconds: float | None = None


def trace(folder: Path) -> list[Step]:
    """The steps from the first ancestor that is still in its place to this model."""
    steps: list[Step] = []
    while len(steps) < 100 and folder.resolve() not in [step.folder.resolve() for step in steps]:
        provenance, stage = read_object(folder / "puna.json"), folder.absolute().parent
        has_stage = (stage / "run.lock").is_file() and not architectures(stage)
        settings = read_object(stage / "config.json") if has_stage else {}
        measured = [read_object(stage / name) for name in ("evaluation/evaluation.json", "evaluation.json")]
        evaluation = next(filter(None, measured), {}) if has_stage else {}
        steps.append(Step(folder, provenance, settings, evaluation, _seconds(stage)))
        parent = str(provenance.get("parent") or "")
        found = [place for place in (started_in(stage, settings) / parent, Path(parent)) if parent and place.is_dir()]
        if not found:
            break
        folder = found[0]
    return steps[::-1]


def _seconds(stage: Path) -> float | None:
    """What the done-marker of the run that a stage's folder lies in says, one or two folders above."""
    for run in stage.parents[:2]:
        if seconds := read_object(run / f"done/{stage.relative_to(run)}.json").get("seconds"):
            return float(seconds)
    return None


def license_of(folder: Path) -> str:
    """The licence that the newest of a model's ancestors names, in its puna.json or its card; "" where none does."""
    for step in trace(folder)[::-1]:
        if found := str(step.provenance.get("license", "")) or _license_in_card(step.folder / "README.md"):
            return found
    return ""


def _license_in_card(card: Path) -> str:
    """`license:` of the YAML between the card's first two rulers."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text.split("---\n")[1] if text.startswith("---\n") else ""
    found = re.search(r"^license: *[\"']?([\w.+-]+)", front, re.MULTILINE)
    return found[1] if found else ""
