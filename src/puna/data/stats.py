"""`puna data stats`: what files of comparisons hold, by source and by batch (paper, Tables 6 and 26, Figure 25).

A turn is a user's message and an example a dialog with one of the two answers. Lengths are means: over examples, over
the users' messages ("in prompt"), over the compared answers ("in response"). The paper defines none of these; so read,
its lengths of Anthropic's sets come out again (docs/log.md), its turns do not. The unit is tokens of the text alone,
without the chat format's own, or words where no tokenizer is given.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from puna.data import comparisons
from puna.data.readers import ReadResult
from puna.run_folder import write_atomically
from puna.text import tokenizer as tokenizers
from puna.text.columns import columns
from puna.types import GRADES, Preference, SafetyLabel

Count = Callable[[str], int]
LENGTHS = ("turns", "per_example", "in_prompt", "in_response")


@dataclass(frozen=True)
class StatsConfig:
    """`puna data stats FILES`: a table on the screen, all numbers as JSON in `out`."""

    files: tuple[Path, ...]
    """files of comparisons; each is a source."""
    format: tuple[str, ...] = ("preferences",)
    """how to read them: one for all, or one for each file (docs/guides/real-data.md lists the formats)."""
    tokenizer: Path | None = None
    """a model's folder or a tokenizer file, whose tokens are counted; words without."""
    out: Path | None = None
    """a JSON file to write."""


def run(cfg: StatsConfig) -> str:
    """Read, count, write `out`, and return the table."""
    found = stats(
        dict(zip(comparisons.names(cfg.files), comparisons.read_each(cfg.files, cfg.format), strict=True)),
        _words if cfg.tokenizer is None else _tokens(cfg.tokenizer),
    )
    found = {"unit": "words" if cfg.tokenizer is None else "tokens", **found}
    if cfg.out is not None:
        write_atomically(cfg.out, json.dumps(found, indent=1) + "\n")
    return table(found)


def _words(text: str) -> int:
    return len(text.split())


def _tokens(path: Path) -> Count:
    tokenizer = tokenizers.load(path)
    return lambda text: len(tokenizer.encode(text))


def stats(read: dict[str, ReadResult], count: Count) -> dict[str, Any]:
    """The numbers of each source, of each batch, of all together, and what two sources have in common."""
    every = [preference for result in read.values() for preference in result.records]
    batches = sorted({preference.batch for preference in every})
    return {
        "sources": {name: measure(result.records, count) | _left_out(result) for name, result in read.items()},
        "batches": {str(batch): measure([p for p in every if p.batch == batch], count) for batch in batches},
        "total": measure(every, count),
        "shared": shared({name: result.records for name, result in read.items()}),
    }


def measure(preferences: Sequence[Preference], count: Count) -> dict[str, Any]:
    """Comparisons, lengths, and shares of grades and safety labels; null for the mean of nothing."""
    prompts, examples, answers, turns = [], [], [], []
    for preference in preferences:
        said = [count(message["content"]) for message in preference.prompt]
        asked = [n for n, message in zip(said, preference.prompt, strict=True) if message["role"] == "user"]
        compared = [count(preference.chosen), count(preference.rejected)]
        prompts += asked
        answers += compared
        examples += [sum(said) + n for n in compared]
        turns.append(len(asked))
    means = map(_mean, (turns, examples, prompts, answers))
    return {
        "comparisons": len(preferences),
        **dict(zip(LENGTHS, means, strict=True)),
        "grades": _shares([preference.grade for preference in preferences]),
        "safety_labels": _shares([preference.safety_label for preference in preferences]),
        "doubles": len(preferences) - len(set(map(_pair, preferences))),
    }


def _mean(numbers: Sequence[int]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _shares(labels: Sequence[str | None]) -> dict[str, float]:
    """Each label's share; those without one are "none"."""
    return {label or "none": n / len(labels) for label, n in Counter(labels).most_common()}


def _left_out(result: ReadResult) -> dict[str, Any]:
    return {"left_out": dict(result.skipped), "bad_lines": len(result.bad)}


def shared(sources: dict[str, Sequence[Preference]]) -> list[dict[str, Any]]:
    """For two sources each: how many comparisons and how many prompts stand in both, however often."""
    pairs = {name: set(map(_pair, preferences)) for name, preferences in sources.items()}
    prompts = {name: {prompt for prompt, _ in keys} for name, keys in pairs.items()}
    return [
        {"sources": [a, b], "comparisons": len(pairs[a] & pairs[b]), "prompts": len(prompts[a] & prompts[b])}
        for a, b in itertools.combinations(sources, 2)
        if prompts[a] & prompts[b]
    ]


def _pair(preference: Preference) -> tuple[str, frozenset[str]]:
    """What two judgements of the same answers have in common, whichever is preferred."""
    return json.dumps(preference.prompt), frozenset((preference.chosen, preference.rejected))


# On the screen


def table(found: dict[str, Any]) -> str:
    """The numbers as Table 6 and Table 26 have them, and a line for whatever else there is to say."""
    parts = [_lengths("source", found["unit"], found["sources"] | {"total": found["total"]})]
    if len(found["batches"]) > 1:
        parts.append(_lengths("batch", found["unit"], found["batches"]))
    for key, labels in (("grades", GRADES), ("safety_labels", get_args(SafetyLabel))):
        parts.append(_percentages(key, found["sources"] | {"total": found["total"]}, labels))
    lines = []
    for name, source in found["sources"].items():
        told = {**source["left_out"], "bad lines": source["bad_lines"], "doubles": source["doubles"]}
        lines += (
            [f"{name}: {', '.join(f'{what} {n:,}' for what, n in told.items() if n)}"] if any(told.values()) else []
        )
    for both in found["shared"]:
        names, n, prompts = " and ".join(both["sources"]), both["comparisons"], both["prompts"]
        lines.append(f"in both {names}: comparisons {n:,}, prompts {prompts:,}")
    return "\n\n".join(filter(None, [*parts, "\n".join(lines)]))


def _lengths(kind: str, unit: str, measured: dict[str, Any]) -> str:
    head = (kind, "comparisons", "turns", f"{unit} per example", "in prompt", "in response")
    rows = [
        (name, f"{m['comparisons']:,}", *("-" if m[key] is None else f"{m[key]:.1f}" for key in LENGTHS))
        for name, m in measured.items()
    ]
    return columns([head, *rows])


def _percentages(key: str, measured: dict[str, Any], labels: Sequence[str]) -> str:
    """The shares of those that have any labels, "" where none has."""
    labelled = {name: m[key] for name, m in measured.items() if set(m[key]) - {"none"}}
    if not labelled:
        return ""
    head = (key.replace("_", " "), *labels, "none")
    return columns([head, *((n, *(f"{shares.get(h, 0):.1%}" for h in head[1:])) for n, shares in labelled.items())])
