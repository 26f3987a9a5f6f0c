"""Scores of finished dialogs by one or several reward models, written with the dialogs, a resumable shard at a time.

1. Leave out, and count, the dialogs that a model's context cannot hold.
2. `scores` of each dialog: "score" is the sigmoid of the mean raw score of the models of `model`, as `puna reward
   evaluate --ensemble` measures it, with the deviation of their scores beside it where they are
   several; "helpfulness" and "safety" are those models', and with both "reward" is the paper's R_c (3.2.3).

All are in (0, 1), after the sigmoid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from puna import config, parallel
from puna.config import ConfigError, DataError, positive
from puna.data import readers
from puna.data.map_shards import map_shards
from puna.generate.scoring import Scorer, combined_reward, open_scorer
from puna.run_folder import Progress, RunFolder
from puna.text import chat
from puna.text.tokenizer import Tokenizer

Record = dict[str, Any]


@dataclass(frozen=True)
class ScoreConfig:
    """`puna score DIALOGS`: reward models and dialogs in, the dialogs with their scores out."""

    data: tuple[Path, ...]
    """dialogs that end with an answer."""
    out: Path
    """the folder; run again to resume."""
    model: tuple[Path, ...] = ()
    """reward models of one kind, such as seeds of one training: the sigmoid of their mean raw score is the score."""
    helpfulness: Path | None = None
    """the helpfulness reward model."""
    safety: Path | None = None
    """the safety reward model; with the other the combined reward is written too."""
    format: str = "dialogs"
    """how to read the data (docs/guides/real-data.md lists the formats)."""
    threshold: float = 0.15
    """below this safety score the safety score is the reward (paper: 0.15); so it is where "is_safety" is true."""
    normalise: bool = False
    """use the scale that is stored with each model: mean 0, deviation 1 on its reference answers, then the sigmoid."""
    precision: Literal["fp32", "bf16"] = "bf16"
    shard_size: int = 1024
    """dialogs a resumable piece of work."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        positive(self, "shard_size")
        if not self.model and self.helpfulness is None and self.safety is None:
            raise ConfigError("no reward model is given: name one as --model, --helpfulness or --safety")


def run(cfg: ScoreConfig) -> Path:
    """Score, and return the folder with dialogs.jsonl."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("score"):
            return folder.path
        scorers = open_all(cfg, device)
        read = readers.read(cfg.data, cfg.format, kind="dialogs", check=functools.partial(check, scorers=scorers))
        dialogs = [record for record in read.records if fits(record, scorers)]
        if not dialogs:
            raise DataError(f"of {len(read.records)} dialogs none fits the context of every model")
        progress = Progress("score", len(dialogs), unit="dialog")

        def work(number: int, shard: Sequence[Record]) -> list[Record]:
            return scored(cfg, scorers, shard)

        records = map_shards(work, dialogs, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if parallel.is_main():
            readers.write_jsonl(folder.path / "dialogs.jsonl", records)
        left_out = len(read.records) - len(dialogs)
        folder.mark_done("score", dialogs=len(records), left_out=left_out, set_aside=len(read.bad))
        parallel.barrier()
        return folder.path


def open_all(cfg: ScoreConfig, device: torch.device) -> dict[str, list[Scorer]]:
    """The models by what their scores are called."""
    paths = {
        "score": cfg.model,
        "helpfulness": [cfg.helpfulness] if cfg.helpfulness else [],
        "safety": [cfg.safety] if cfg.safety else [],
    }
    return {
        name: [open_scorer(path, device, precision=cfg.precision, normalise=cfg.normalise) for path in models]
        for name, models in paths.items()
        if models
    }


def _tokenizers(scorers: dict[str, list[Scorer]]) -> dict[str, Tokenizer]:
    """The tokenizers that differ."""
    return {scorer.tokenizer.sha256: scorer.tokenizer for models in scorers.values() for scorer in models}


def check(record: Record, scorers: dict[str, list[Scorer]]) -> None:
    """Raise DataError where a chat format refuses the dialog, or where it does not end with an answer."""
    for tokenizer in _tokenizers(scorers).values():
        chat.check(record["messages"], tokenizer, ends_with="assistant")


def fits(record: Record, scorers: dict[str, list[Scorer]]) -> bool:
    """1: whether every model's context holds the dialog."""
    lengths = {sha: len(chat.encode(record["messages"], t).tokens) for sha, t in _tokenizers(scorers).items()}
    every = [scorer for models in scorers.values() for scorer in models]
    return all(lengths[scorer.tokenizer.sha256] <= scorer.model.config.max_seq_len for scorer in every)


def scored(cfg: ScoreConfig, scorers: dict[str, list[Scorer]], shard: Sequence[Record]) -> list[Record]:
    """2: the dialogs with their scores."""
    dialogs = [record["messages"] for record in shard]
    raw = {
        name: torch.stack([s.raw([chat.encode(dialog, s.tokenizer).tokens for dialog in dialogs]) for s in models])
        for name, models in scorers.items()
    }  # (M, N) each
    means = {name: scores.mean(dim=0).sigmoid() for name, scores in raw.items()}
    if len(cfg.model) > 1:
        means["deviation"] = raw["score"].sigmoid().std(dim=0, correction=0)
    if "helpfulness" in means and "safety" in means:
        is_safety = [bool(record.get("is_safety", False)) for record in shard]
        means["reward"] = combined_reward(means["safety"], means["helpfulness"], is_safety, cfg.threshold)
    return [
        {**record, "scores": {name: float(scores[i]) for name, scores in means.items()}}
        for i, record in enumerate(shard)
    ]
