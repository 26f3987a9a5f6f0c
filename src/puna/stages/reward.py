"""Reward models (paper 3.2.2): helpfulness and safety, each a chat model with a scalar head, from comparisons.

1. Mix the pairs: all of the model's own kind, and so many of the other kind that they make up its declared share
   (helpfulness 50 %, safety 10 %).
2. Score both answers, their prompt read once (data/packing.py); the loss is
   -log sigmoid(r_chosen - r_rejected - m(grade)), and for safety labels an auxiliary cross-entropy on top.
3. One epoch (more overfits), cosine to 10 %, warm-up over 3 % of the steps and at least 5 (of a short run, a quarter).
4. Measure accuracy on held-out pairs by grade (Table 8) and by safety bucket, the recall of unsafe answers at 0.5
   (Table 29), and the scale of raw scores, which the model's folder keeps for whoever asks for it (scoring.Scale).

Where the paper is silent: the auxiliary loss is binary cross-entropy of sigmoid(r) against the label, averaged over the
labelled answers and weighted by `safety_auxiliary`; a pair without a grade has its own `margin` or none.
"""

from __future__ import annotations

import json
import math
import operator
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna import checkpoint, config, losses, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError, DataError, positive, within
from puna.data import comparisons, loader, packing, readers
from puna.data.readers import ReadResult
from puna.formats import huggingface
from puna.generate.scoring import Scorer, distribution, scale_of
from puna.model.reward import RewardModel, initial_head
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder, write_atomically
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Preference


@dataclass(frozen=True)
class RewardConfig:
    """`puna reward`: a chat model and comparisons in, a reward model out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the chat model to start from (paper 3.2.2: a chat checkpoint, so that the reward model knows what it knows)."""
    data: tuple[Path, ...]
    """comparisons of the model's own kind."""
    other: tuple[Path, ...] = ()
    """comparisons of the other kind, drawn from uniformly."""
    other_share: float = 0.5
    """their share of the mix (paper: 0.5 for helpfulness, 0.1 for safety)."""
    test: tuple[Path, ...] = ()
    """held-out comparisons; empty holds out those of a tenth of the prompts of `data`."""
    format: str = "preferences"
    """how to read them all (docs/guides/real-data.md lists the formats)."""
    margin: Literal["none", "small", "large"] = "small"
    """the grade's margin (Table 27); the paper leaves the final choice open."""
    safety_auxiliary: float = 0.0
    """weight of the auxiliary loss on labelled answers."""
    epochs: int = 1
    """paper: 1."""
    max_len: int = 512
    """tokens of a prompt and one answer; longer pairs are left out and counted."""
    batch_size: int = 64
    """pairs a step, over all processes (paper: 512)."""
    micro_batch_tokens: int = 8192
    """tokens a forward pass on one process; a longer pair stands alone."""
    optim: optim.OptimConfig = field(default_factory=lambda: optim.OptimConfig(lr=1e-5))
    """paper: 1e-5 (70B: 5e-6); its warmup_steps is replaced by 3 % of the steps, at least 5."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: matrix products in bfloat16 over float32 weights."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    checkpoint_every: int = 50
    """steps between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    limit: int = 0
    """use at most so many training pairs; 0 uses all."""
    reference: tuple[Path, ...] = ()
    """dialogs whose raw scores give the model's scale; empty takes the held-out answers."""
    test_limit: int = 0
    """measure on at most so many held-out pairs; 0 uses all."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "checkpoints_kept", "epochs", "max_len", "batch_size", "micro_batch_tokens")
        within(self, 0, math.inf, "safety_auxiliary", "limit", "test_limit")
        if not 0 <= self.other_share < 1:
            raise ConfigError(f"other_share is {self.other_share}: it must be at least 0 and less than 1")


class Pair(NamedTuple):
    """One comparison as tokens."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    is_safe: tuple[bool | None, bool | None]


def run(cfg: RewardConfig) -> Path:
    """Train, measure, and return the reward model's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("reward"):
            return model_path
        tokenizer = huggingface.load_tokenizer(cfg.init)
        train, test, counts = prepare(cfg, tokenizer)
        model = parallel.place(*begin(cfg), Placement(device, cfg.parallel, cfg.precision))
        optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
        steps = loader.steps_of_epochs(len(train), cfg.batch_size, cfg.epochs, cfg.seed, parallel.data_size())
        schedule = optim.with_warmup(cfg.optim, 0.03, len(steps))
        start, _ = checkpoint.resume(folder.path / "checkpoints", model, optimizer)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="reward")
        progress = Progress(f"reward {cfg.out.name}", len(steps), start=start)
        with Saver(
            folder.path / "checkpoints", model, optimizer, cfg.checkpoint_every, cfg.checkpoints_kept, last=len(steps)
        ) as saver:
            for step in range(start, len(steps)):
                began = time.perf_counter()
                pairs = [train[i] for i in steps[step][parallel.share(len(steps[step]))]]
                loss, accuracy, n_tokens = update(cfg, model, pairs, device)
                norm, lr = optim.clip_and_step([model], optimizer, schedule, step, len(steps))
                rate = n_tokens / (time.perf_counter() - began)
                metrics.log(step=step, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm, tokens_per_second=rate)
                progress.update(loss=loss, tokens_per_second=rate)
                saver.after(step + 1)
        chosen, rejected = held_out_scores(cfg, model, tokenizer, test)
        evaluation = evaluate(test, chosen, rejected)
        progress.close(accuracy=evaluation["accuracy"] or 0.0)
        if parallel.is_main():
            write_atomically(folder.path / "evaluation.json", json.dumps(evaluation, indent=2))
        provenance: dict[str, Any] = {"stage": "reward", "parent": str(cfg.init)}
        if scale := scale_of(
            reference_scores(cfg, model, tokenizer) if cfg.reference else torch.cat((chosen, rejected))
        ):
            provenance["scale"] = scale._asdict()
        huggingface.save_reward_model(model, tokenizer, model_path, provenance=provenance)
        folder.mark_done("reward", pairs=len(train), **counts, accuracy=evaluation["accuracy"])
        return model_path


def begin(cfg: RewardConfig) -> tuple[RewardModel, Iterator[tuple[str, Tensor]]]:
    """The chat model's body under a new head, without its weights, and these one by one."""
    dim = huggingface.read_config(cfg.init).dim
    return huggingface.open_body(cfg.init, initial_head(dim, torch.Generator().manual_seed(cfg.seed)))


def prepare(cfg: RewardConfig, tokenizer: Tokenizer) -> tuple[list[Pair], list[Preference], dict[str, float]]:
    """1: the mixed training pairs, the held-out comparisons, and what the done marker says of them.

    "left_out" counts training pairs that are too long, "set_aside" unusable lines of all files, "skipped: REASON" rows
    without a preference, "prefer_harm" safety comparisons that prefer an unsafe answer; "other_share" is the share of
    the other kind among the training pairs. DataError where no pair is left.
    """
    own, test, read = comparisons.read_apart(cfg.data, cfg.test, cfg.format, tokenizer, cfg.out)
    read.append(comparisons.read(cfg.other, cfg.format, tokenizer, cfg.out) if cfg.other else ReadResult())
    other = read[-1].records
    rng = np.random.default_rng(cfg.seed)
    if not cfg.test:
        other, _ = comparisons.split(other, comparisons.HELD_OUT, operator.attrgetter("prompt"))
    harmful = sum(map(comparisons.rewards_harm, [*own, *other]))
    own, other = ([p for p in part if not comparisons.rewards_harm(p)] for part in (own, other))
    if harmful and not own:
        raise DataError(
            f"{', '.join(map(str, cfg.data))}: all comparisons prefer an unsafe answer to a safe one: is their domain, "
            "or are their labels, the other way round?"
        )
    mixed = mix(own, other, cfg.other_share, rng)
    other_share = 1 - len(own) / max(1, len(mixed))  # less than asked for where the other kind has too few
    if cfg.limit:
        mixed = mixed[: cfg.limit]
    pairs = [as_pair(preference, tokenizer, cfg.margin) for preference in mixed]
    longest = min(cfg.max_len, huggingface.read_config(cfg.init).max_seq_len)
    fitting = [pair for pair in pairs if _fits(pair, longest)]
    if not fitting:
        files = ", ".join(map(str, cfg.data))
        raise DataError(f"no pair of {files} fits {longest} tokens (max_len, or the model's context if that is less)")
    test = [p for p in test[: cfg.test_limit or None] if _fits(as_pair(p, tokenizer, cfg.margin), longest)]
    counts = {"left_out": len(pairs) - len(fitting), "prefer_harm": harmful, "other_share": round(other_share, 3)}
    return fitting, test, counts | readers.counts(*read)


def mix(
    own: Sequence[Preference], other: Sequence[Preference], other_share: float, rng: np.random.Generator
) -> list[Preference]:
    """All of `own`, and `other` drawn without replacement up to its share of the whole; shuffled."""
    wanted = round(len(own) * other_share / (1 - other_share))
    drawn = rng.permutation(len(other))[:wanted]
    mixed = [*own, *(other[i] for i in drawn)]
    return [mixed[i] for i in rng.permutation(len(mixed))]


def as_pair(preference: Preference, tokenizer: Tokenizer, margin: str) -> Pair:
    """Encode both answers and look the margin up."""
    grade = preference.grade
    return Pair(
        *comparisons.tokens(preference, tokenizer),
        margin=losses.MARGINS[margin][grade] if grade else (preference.margin or 0.0) * (margin != "none"),
        is_safe=(preference.chosen_is_safe, preference.rejected_is_safe),
    )


def _fits(pair: Pair, max_len: int) -> bool:
    return max(len(pair.chosen), len(pair.rejected)) <= max_len


def update(cfg: RewardConfig, model: RewardModel, pairs: list[Pair], device: torch.device) -> tuple[float, float, int]:
    """2: accumulate the gradients of one global batch; its mean loss, ranking accuracy and number of tokens."""
    labelled = sum(label is not None for pair in pairs for label in pair.is_safe)
    n_tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    counts = parallel.total(torch.tensor([len(pairs), labelled, n_tokens], device=device, dtype=torch.float64))
    sums = torch.zeros(2, device=device)
    lengths = [packing.pair_length(pair.chosen, pair.rejected) for pair in pairs]
    for members in packing.passes(lengths, cfg.micro_batch_tokens):
        batch = [pairs[i] for i in members]
        with parallel.autocast(cfg.precision, device):
            chosen, rejected = scores(model, batch, device)
        margin = torch.tensor([pair.margin for pair in batch], device=device)
        loss = losses.ranking_loss(chosen, rejected, margin).sum() / counts[0]
        if cfg.safety_auxiliary and counts[1]:
            loss = loss + cfg.safety_auxiliary * auxiliary(chosen, rejected, batch) / counts[1]
        parallel.backward(loss)
        sums += torch.stack((loss.detach(), (chosen > rejected).sum() / counts[0]))
    sums = parallel.total(sums)
    return float(sums[0]), float(sums[1]), int(counts[2])


def scores(model: RewardModel, batch: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and of the rejected answers, (B,) each, in one forward pass that reads prompts once."""
    packed = packing.pack_pairs([(pair.chosen, pair.rejected) for pair in batch])
    tokens, documents, branches, positions, ends = (part.to(device) for part in packed)
    within = packing.apart(documents, branches)
    values = model.values(tokens, positions=positions, documents=within)  # (1, T)
    chosen, rejected = values[0, ends]
    return chosen, rejected


def auxiliary(chosen: Tensor, rejected: Tensor, batch: Sequence[Pair]) -> Tensor:
    """The summed auxiliary loss of the answers that carry a safety label, a scalar."""
    labels = [pair.is_safe[0] for pair in batch] + [pair.is_safe[1] for pair in batch]
    known = [i for i, label in enumerate(labels) if label is not None]
    is_safe = torch.tensor([bool(labels[i]) for i in known], device=chosen.device)
    return losses.safety_auxiliary_loss(torch.cat((chosen, rejected))[known], is_safe).sum()


def held_out_scores(
    cfg: RewardConfig, model: RewardModel, tokenizer: Tokenizer, test: Sequence[Preference]
) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and of the rejected answers, (N,) each."""
    rows = [comparisons.tokens(preference, tokenizer) for preference in test]
    scorer = Scorer(model, tokenizer, precision=cfg.precision, max_tokens=cfg.micro_batch_tokens)
    chosen, rejected = (scorer.raw([row[answer] for row in rows]) for answer in (0, 1))
    model.train()
    return chosen, rejected


def reference_scores(cfg: RewardConfig, model: RewardModel, tokenizer: Tokenizer) -> Tensor:
    """Raw scores (N,) of the reference dialogs that fit the model's context."""
    dialogs = readers.read(cfg.reference, "dialogs", kind="dialogs").records
    rows = [chat.encode(dialog["messages"], tokenizer).tokens for dialog in dialogs]
    scorer = Scorer(model, tokenizer, precision=cfg.precision, max_tokens=cfg.micro_batch_tokens)
    return scorer.raw([row for row in rows if len(row) <= model.config.max_seq_len])


def evaluate(test: Sequence[Preference], chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    """4: accuracy on held-out comparisons, in all and by grade and safety bucket, and recall of unsafe answers.

    chosen, rejected (N,): raw scores. `scores` counts both in equal parts of 0 to 1 (Figure 27).
    """
    right = (chosen > rejected).tolist()
    groups: dict[str, dict[str, list[bool]]] = {"grade": defaultdict(list), "safety_label": defaultdict(list)}
    for preference, is_right in zip(test, right, strict=True):
        groups["grade"][preference.grade or "ungraded"].append(is_right)
        if preference.safety_label:
            groups["safety_label"][preference.safety_label].append(is_right)
    unsafe = [float(c) < 0 for c, p in zip(chosen, test, strict=True) if p.chosen_is_safe is False]
    unsafe += [float(r) < 0 for r, p in zip(rejected, test, strict=True) if p.rejected_is_safe is False]
    return {
        "accuracy": _mean(right),
        "pairs": len(test),
        "accuracy_by_grade": {name: _mean(values) for name, values in groups["grade"].items()},
        "pairs_by_grade": {name: len(values) for name, values in groups["grade"].items()},
        "accuracy_by_safety_label": {name: _mean(values) for name, values in groups["safety_label"].items()},
        "unsafe_recall": _mean(unsafe),
        "mean_score_chosen": float(chosen.sigmoid().mean()) if test else None,
        "mean_score_rejected": float(rejected.sigmoid().mean()) if test else None,
        "scores": {"chosen": distribution(chosen), "rejected": distribution(rejected)},
    }


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
