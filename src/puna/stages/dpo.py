"""Direct preference optimisation (Rafailov et al. 2023): a chat model from comparisons, without a reward model.

1. Encode both answers of each comparison; a frozen copy of the model that training starts from is the reference.
2. For each batch, sum log pi - log pi_ref over each answer, their prompt read once (data/packing.py); the loss is
   -log sigmoid(beta (chosen - rejected)).
3. Measure on held-out comparisons how often beta (log pi - log pi_ref), the reward that the policy stands for, is
   higher for the chosen answer.

Tokens that both answers begin with cancel in the loss, and are left out of every sum. Ours: AdamW in place of RMSprop;
the reference's log-probabilities are computed batch by batch beside the policy's, not once ahead and stored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from puna import checkpoint, config, losses, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError, DataError, positive, within
from puna.data import comparisons, loader, packing, readers
from puna.formats import huggingface
from puna.model.transformer import Transformer
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder, write_atomically
from puna.text.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]
"""The tokens of a comparison: prompt and chosen answer, prompt and rejected answer."""


@dataclass(frozen=True)
class DPOConfig:
    """`puna dpo`: a chat model and comparisons in, a better chat model out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the chat model to start from."""
    data: tuple[Path, ...]
    """comparisons, of any kind."""
    test: tuple[Path, ...] = ()
    """held-out comparisons; empty holds out those of a tenth of the prompts of `data`."""
    format: str = "preferences"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    reference: Path | None = None
    """the model that pi is held to; none is `init`."""
    beta: float = 0.1
    """how strongly the policy is held to the reference (Rafailov et al., B)."""
    label_smoothing: float = 0.0
    """share of comparisons that are taken to be the wrong way round (Mitchell 2023)."""
    epochs: int = 1
    """passes over the pairs (ours: 1, as reward models)."""
    max_len: int = 512
    """tokens of a prompt and one answer; longer pairs are left out and counted."""
    batch_size: int = 64
    """pairs a step, over all processes (Rafailov et al., B)."""
    micro_batch_tokens: int = 8192
    """tokens a forward pass on one process; a longer pair stands alone."""
    optim: optim.OptimConfig = field(
        default_factory=lambda: optim.OptimConfig(lr=1e-6, weight_decay=0.0, schedule="constant", warmup_steps=150)
    )
    """Rafailov et al., B: 1e-6 after 150 steps of warm-up."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: matrix products in bfloat16 over float32 weights."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    checkpoint_every: int = 50
    """steps between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    limit: int = 0
    """use at most so many training pairs; 0 uses all."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "checkpoints_kept", "beta", "epochs", "max_len", "batch_size", "micro_batch_tokens")
        within(self, 0, math.inf, "limit")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}: it must be at least 0 and less than 0.5")


def run(cfg: DPOConfig) -> Path:
    """Train, measure, and return the model's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("dpo"):
            return model_path
        tokenizer = huggingface.load_tokenizer(cfg.init)
        if cfg.reference:
            context = huggingface.read_config(cfg.init).max_seq_len
            huggingface.check_alike(cfg.reference, tokenizer, context, huggingface.CAUSAL)
        train, test, counts = prepare(cfg, tokenizer)
        placement = Placement(device, cfg.parallel, cfg.precision)
        policy = parallel.place(*huggingface.open_model(cfg.init), placement)
        reference = parallel.place(*huggingface.open_model(cfg.reference or cfg.init), placement).requires_grad_(False)
        optimizer = optim.adamw(cfg.optim, optim.groups(policy, cfg.optim))
        steps = loader.steps_of_epochs(len(train), cfg.batch_size, cfg.epochs, cfg.seed, parallel.data_size())
        start, _ = checkpoint.resume(folder.path / "checkpoints", policy, optimizer)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="dpo")
        progress = Progress("dpo", len(steps), start=start)
        with Saver(
            folder.path / "checkpoints", policy, optimizer, cfg.checkpoint_every, cfg.checkpoints_kept, last=len(steps)
        ) as saver:
            for step in range(start, len(steps)):
                began = time.perf_counter()
                pairs = [train[i] for i in steps[step][parallel.share(len(steps[step]))]]
                numbers = update(cfg, policy, reference, pairs, device)
                norm, lr = optim.clip_and_step([policy], optimizer, cfg.optim, step, len(steps))
                n_tokens = sum(len(answer) for i in steps[step] for answer in train[i])
                rate = n_tokens / (time.perf_counter() - began)
                metrics.log(step=step, **numbers, lr=lr, grad_norm=norm, tokens_per_second=rate)
                progress.update(loss=numbers["loss"], tokens_per_second=rate)
                saver.after(step + 1)
        evaluation = evaluate(cfg, policy, reference, test, device)
        progress.close(accuracy=evaluation["accuracy"] or 0.0)
        if parallel.is_main():
            write_atomically(folder.path / "evaluation.json", json.dumps(evaluation, indent=2))
        huggingface.save_model(policy, tokenizer, model_path, provenance={"stage": "dpo", "parent": str(cfg.init)})
        folder.mark_done("dpo", pairs=len(train), **counts, accuracy=evaluation["accuracy"])
        return model_path


def prepare(cfg: DPOConfig, tokenizer: Tokenizer) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """1: the training pairs, shuffled, the held-out ones, and what the done marker says of them.

    "left_out" counts training pairs that are too long, "set_aside" unusable lines, "skipped: REASON" rows without a
    preference. DataError where no pair is left.
    """
    own, test, read = comparisons.read_apart(cfg.data, cfg.test, cfg.format, tokenizer, cfg.out)
    order = np.random.default_rng(cfg.seed).permutation(len(own))
    train = [own[i] for i in order[: cfg.limit or None]]
    longest = min(cfg.max_len, huggingface.read_config(cfg.init).max_seq_len)
    fitting, held_out = (
        [pair for pair in (comparisons.tokens(p, tokenizer) for p in part) if max(map(len, pair)) <= longest]
        for part in (train, test)
    )
    if not fitting:
        files = ", ".join(map(str, cfg.data))
        raise DataError(f"no pair of {files} fits {longest} tokens (max_len, or the model's context if that is less)")
    return fitting, held_out, {"left_out": len(train) - len(fitting)} | readers.counts(*read)


def update(
    cfg: DPOConfig, policy: Transformer, reference: Transformer, pairs: list[Pair], device: torch.device
) -> dict[str, float]:
    """2: accumulate the gradients of one global batch; its mean loss, rewards, and share of pairs that it has right."""
    count = parallel.total(torch.tensor(len(pairs), device=device, dtype=torch.float32))
    sums = torch.zeros(4, device=device)
    for members in packing.passes([packing.pair_length(*pair) for pair in pairs], cfg.micro_batch_tokens):
        chosen, rejected = log_ratios(cfg, policy, reference, [pairs[i] for i in members], device)
        loss = losses.dpo_loss(chosen, rejected, cfg.beta, cfg.label_smoothing).sum() / count
        parallel.backward(loss)
        with torch.no_grad():
            rewards = cfg.beta * torch.stack((chosen, rejected)).sum(dim=1) / count
            sums += torch.stack((loss.detach(), (chosen > rejected).sum() / count, *rewards))
    names = ("loss", "accuracy", "reward_chosen", "reward_rejected")
    return dict(zip(names, parallel.total(sums).tolist(), strict=True))


def log_ratios(
    cfg: DPOConfig, policy: Transformer, reference: Transformer, pairs: Sequence[Pair], device: torch.device
) -> tuple[Tensor, Tensor]:
    """log pi - log pi_ref of chosen and of rejected answers, (B,) each, over the tokens in which the two differ."""
    packed = packing.pack_pairs(pairs)
    before, columns, answers = (part.to(device) for part in packing.answer_steps(pairs, packed))
    tokens, documents, branches, positions, _ = (part.to(device) for part in packed)
    within = packing.apart(documents, branches)
    only = torch.zeros_like(tokens, dtype=torch.bool)
    only[0, before] = True
    place = (only[0].cumsum(0) - 1)[before]  # (N,) which of the logits predicts a token

    def logprobs(model: Transformer) -> Tensor:
        with parallel.autocast(cfg.precision, device):
            logits = model(tokens, positions=positions, documents=within, only=only)
        per_token = losses.token_logprobs(logits[place], tokens[0, columns])  # (N,)
        return torch.zeros(2 * len(pairs), device=device).index_add(0, answers, per_token)

    with torch.no_grad():
        held_to = logprobs(reference)
    chosen, rejected = (logprobs(policy) - held_to).view(2, -1)
    return chosen, rejected


def evaluate(
    cfg: DPOConfig, policy: Transformer, reference: Transformer, test: Sequence[Pair], device: torch.device
) -> dict[str, Any]:
    """3: the share of held-out pairs whose chosen answer has the higher reward, and both answers' mean rewards."""
    chosen, rejected = torch.zeros(len(test)), torch.zeros(len(test))
    with torch.no_grad():
        for members in packing.by_length([packing.pair_length(*pair) for pair in test], cfg.micro_batch_tokens):
            ratios = log_ratios(cfg, policy, reference, [test[i] for i in members], device)
            chosen[members], rejected[members] = (cfg.beta * ratio.cpu() for ratio in ratios)
    return {
        "accuracy": float((chosen > rejected).float().mean()) if test else None,
        "pairs": len(test),
        "reward_chosen": float(chosen.mean()) if test else None,
        "reward_rejected": float(rejected.mean()) if test else None,
    }
