"""What reward models are worth, on comparisons that they were not trained on (paper 3.2.2, Tables 7, 8 and 29).

1. Score both answers of every comparison of every file with every model; pairs that one model's context cannot hold
   are left out for all.
2. Measure each (evals/ranking.py): a row of Table 7 over the files, and on all files together accuracy by grade and by
   safety label, thresholds of the safety score, calibration, the part that length plays. With `ensemble` the models
   are seeds of one training: their mean score is one more model, and how far they disagree is told.
3. Set them beside two rules that cost nothing: the longer answer, and a bag of words fitted to the same training pairs
   (evals/bag_of_words.py); the differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from puna import config, parallel
from puna.config import ConfigError, DataError
from puna.data import comparisons, readers
from puna.evals import bag_of_words, intervals, ranking
from puna.evals.intervals import Interval
from puna.formats import find
from puna.generate.scoring import Scorer, open_scorer
from puna.run_folder import Progress, RunFolder, write_atomically
from puna.text import tokenizer as tokenizers
from puna.text.columns import columns
from puna.types import GRADES, Preference, SafetyLabel


@dataclass(frozen=True)
class RewardEvaluateConfig:
    """`puna reward evaluate`: reward models and comparisons in, a table, evaluation.json and scores.jsonl out."""

    out: Path
    """the folder to write to."""
    model: tuple[Path, ...]
    """reward models: folders, or stages'."""
    test: tuple[Path, ...]
    """files of comparisons that no model was trained on; each is a column."""
    train: tuple[Path, ...] = ()
    """the comparisons the models were trained on, for the bag of words; without any there is none."""
    format: tuple[str, ...] = ("preferences",)
    """how to read them (docs/guides/real-data.md): one for all files, or one for each of `test` and then of `train`."""
    ensemble: bool = False
    """the models are seeds of one training: measure their mean score too."""
    normalise: bool = False
    """use the scale that is stored with each model; thresholds then speak of normalised scores."""
    max_len: int = 0
    """leave out pairs with an answer of more tokens than this; 0 leaves out what a model's context cannot hold."""
    limit: int = 0
    """measure on at most so many comparisons a file, its first; 0 uses all."""
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        if not self.model or not self.test:
            raise ConfigError("name at least one --model and one --test file")
        if len(set(map(_name, self.model))) < len(self.model):
            raise ConfigError(f"a model is given twice: {', '.join(map(str, self.model))}")
        if self.ensemble and len(self.model) == 1:
            raise ConfigError("an ensemble needs more than one --model")


class Pairs(NamedTuple):
    """N comparisons, the file that each is of, and how many lines were set aside and rows skipped."""

    test: list[Preference]
    sources: list[str]
    set_aside: int
    skipped: dict[str, int]


def run(cfg: RewardEvaluateConfig) -> str:
    """Score, measure, write, and return the tables."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        pairs, train = load(cfg)
        progress = Progress("reward evaluate", len(cfg.model) * len(pairs.test), unit="pair")
        scores: dict[str, Tensor] = {}
        for path in cfg.model:
            scorer = open_scorer(path, device, precision=cfg.precision, normalise=cfg.normalise)
            scores[_name(path)] = given = score(cfg, scorer, pairs.test)
            if given.isinf().any():
                raise DataError(f"{path}: its scores are no numbers; train it again")
            progress.update(len(pairs.test))
        progress.close()
        held = ~torch.stack(list(scores.values())).isnan().any(dim=2).any(dim=0)  # (N,)
        if not held.any():
            raise DataError(f"of {len(held)} comparisons none fits every model (max_len {cfg.max_len})")
        scores = {name: each[held] for name, each in scores.items()}
        kept = [i for i, fits in enumerate(held.tolist()) if fits]
        pairs = pairs._replace(test=[pairs.test[i] for i in kept], sources=[pairs.sources[i] for i in kept])
        found = evaluate(cfg, pairs, scores, train) | {"left_out": len(held) - len(kept)}
        if parallel.is_main():
            readers.write_jsonl(folder.path / "scores.jsonl", told(pairs, kept, scores))
            write_atomically(folder.path / "evaluation.json", json.dumps(found, indent=1) + "\n")
        parallel.barrier()
        return f"{tables(found)}\n\n{folder.path}"


def load(cfg: RewardEvaluateConfig) -> tuple[Pairs, list[Preference]]:
    """The comparisons to measure on, and those to fit the bag of words to. What a chat format refuses is set aside."""
    folders = [find.model_folder(path) for path in cfg.model]
    known = {tokenizer.sha256: tokenizer for tokenizer in map(tokenizers.load, folders)}

    def sound(preference: Preference) -> None:
        for tokenizer in known.values():
            comparisons.check(preference, tokenizer)

    names = comparisons.names([*cfg.test, *cfg.train])
    read = comparisons.read_each([*cfg.test, *cfg.train], cfg.format, sound, cfg.out / "bad_lines.jsonl")
    test, train = read[: len(cfg.test)], read[len(cfg.test) :]
    chosen = [result.records[: cfg.limit or None] for result in test]
    reasons = {reason: sum(r.skipped[reason] for r in test) for result in test for reason in result.skipped}
    return Pairs(
        test=[preference for records in chosen for preference in records],
        sources=[name for name, records in zip(names[: len(chosen)], chosen, strict=True) for _ in records],
        set_aside=sum(len(result.bad) for result in test),
        skipped=reasons,
    ), [preference for result in train for preference in result.records]


def _name(path: Path) -> str:
    """A model is called by its path, without the `model` that a stage's ends with."""
    return str(path.parent if path.name == "model" else path)


def score(cfg: RewardEvaluateConfig, scorer: Scorer, test: Sequence[Preference]) -> Tensor:
    """1: raw scores (N, 2), NaN for the pairs that do not fit, infinite where the model gives no number."""
    longest = min(cfg.max_len or scorer.model.config.max_seq_len, scorer.model.config.max_seq_len)
    rows = [comparisons.tokens(preference, scorer.tokenizer) for preference in test]
    fitting = [i for i, row in enumerate(rows) if max(map(len, row)) <= longest]
    scores = torch.full((len(test), 2), torch.nan)
    answers = [answer for i in fitting for answer in rows[i]]
    raw = parallel.spread(lambda first, part: scorer.raw(part).tolist(), answers, everyone=True)
    scores[fitting] = torch.tensor(raw).view(-1, 2).nan_to_num(torch.inf, torch.inf, torch.inf)
    return scores


def evaluate(
    cfg: RewardEvaluateConfig, pairs: Pairs, scores: dict[str, Tensor], train: Sequence[Preference]
) -> dict[str, Any]:
    """2 and 3: all measures of all models and of the two rules. scores: (N, 2) of each model."""
    together = torch.stack(list(scores.values()))  # (M, N, 2)
    if cfg.ensemble:
        scores = scores | {"ensemble": together.mean(dim=0)}
    rules = {"length": ranking.lengths(pairs.test)}
    if train:
        words = bag_of_words.fit([(preference.chosen, preference.rejected) for preference in train])
        rules["words"] = torch.stack(
            [words([p.chosen for p in pairs.test]), words([p.rejected for p in pairs.test])], 1
        )
    prompts = ranking.prompt_keys(pairs.test)

    def over_rules(model: Tensor) -> dict[str, Interval]:
        mine = ranking.correct(model)
        return {name: intervals.difference(mine, ranking.correct(rule), prompts) for name, rule in rules.items()}

    def accuracies(rule: Tensor) -> dict[str, Any]:
        right = ranking.correct(rule)
        files = ranking.by_group(right, pairs.sources, prompts)
        return {"accuracy": intervals.clustered(right, prompts), "accuracy_by_file": files}

    return {
        "pairs": len(pairs.test),
        "pairs_by_file": {name: pairs.sources.count(name) for name in dict.fromkeys(pairs.sources)},
        "set_aside": pairs.set_aside,
        "skipped": pairs.skipped,
        "models": {
            name: ranking.measure(pairs.test, pairs.sources, each) | {"over": over_rules(each)}
            for name, each in scores.items()
        },
        "rules": {name: accuracies(rule) for name, rule in rules.items()},
        "disagreement": ranking.disagreement(pairs.test, together) if cfg.ensemble else None,
    }


def told(pairs: Pairs, kept: Sequence[int], scores: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Each comparison's raw scores, by the number that it has among all that were read."""
    return [
        {"pair": number, "file": source, "scores": {name: each[i].tolist() for name, each in scores.items()}}
        for i, (number, source) in enumerate(zip(kept, pairs.sources, strict=True))
    ]


# On the screen


def tables(found: dict[str, Any]) -> str:
    """Table 7 with its intervals, Tables 8 and 29 where there are labels, and a line a model for the rest."""
    models, rules = found["models"], found["rules"]
    parts = [
        _accuracies(
            "accuracy", models | {f"({name})": rule for name, rule in rules.items()}, "accuracy_by_file", "all"
        ),
        _accuracies("by grade", models, "accuracy_by_grade"),
        _accuracies("by safety label", models, "accuracy_by_safety_label"),
    ]
    lines = [f"{name}: {line}" for name, measures in models.items() for line in _lines(measures)]
    if found["disagreement"]:
        lines.append(f"ensemble: {_percent(found['disagreement']['disputed'])} of the pairs are disputed")
    return "\n\n".join(filter(None, [*parts, "\n".join(lines)]))


def _accuracies(head: str, measured: dict[str, Any], key: str, every: str = "") -> str:
    """A row a model, a column a group, grades and safety labels in the paper's order; "" where nothing is labelled."""
    found = list(dict.fromkeys(group for measures in measured.values() for group in measures[key]))
    if found in ([], ["ungraded"]):
        return ""
    known = [group for group in (*GRADES, "ungraded", *get_args(SafetyLabel)) if group in found]
    ordered = known or found
    rows = [
        (name, *(_percent(m[key][group]) if group in m[key] else "-" for group in ordered))
        + ((_percent(m["accuracy"]),) if every else ())
        for name, m in measured.items()
    ]
    return columns([(head, *ordered, *([every] if every else [])), *rows])


def _lines(measures: dict[str, Any]) -> list[str]:
    """What else there is to say of a model."""
    length, calibration = measures["length"], measures["calibration"]
    lines = [f"{_percent(over, sign=True)} over the rule of {name}" for name, over in measures["over"].items()] + [
        f"{_percent(length['accuracy_chosen_longer'])} where the chosen answer is longer, "
        f"{_percent(length['accuracy_chosen_shorter'])} where it is shorter",
        f"expected calibration error {calibration['error']:.3f}",
    ]
    if recall := measures["unsafe_recall"]:
        lines.append(f"{_percent(recall)} of the unsafe answers score below 0.5")
    for at in measures["thresholds"]:
        if at["threshold"] == 0.15 and at["precision"] and at["recall"]:
            caught = f"precision {_percent(at['precision'])}, recall {_percent(at['recall'])}"
            lines.append(f"safety score below 0.15: {caught}")
    return lines


def _percent(interval: Interval, sign: bool = False) -> str:
    mean, low, high = (f"{100 * interval[key]:{'+' if sign else ''}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if sign else f"{mean} ({low}-{high})"
