"""Supervised fine-tuning (paper 3.1), and with it every version's fine-tuning on selected samples (3.2.3).

1. Encode the dialogs in the chat format; the loss counts answers and their EOS, nothing else.
2. Pack them into full rows; attention does not cross from one dialog to another.
3. For each epoch: shuffle the rows, and for each batch average the loss over its counted tokens, clip, update
   (cosine schedule, two epochs).

A dialog may carry `"loss_on": "last_answer"` (Ghost Attention, 3.3): then all its earlier turns count nothing.
Where the paper is silent: AdamW with the pretraining betas, warm-up over at most a tenth of the steps; the special
token that parts prompt and answer is the chat format's own [/INST].
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from puna import checkpoint, config, optim, parallel
from puna.checkpoint import Saver
from puna.config import DataError, positive
from puna.data import loader, packing, readers
from puna.data.packing import Packed
from puna.formats import huggingface
from puna.model.transformer import Transformer
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder
from puna.text import chat
from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SFTConfig:
    """`puna sft`: a model and dialogs in, a chat model out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the model to start from (for a new version: the pretrained base, as the paper restarts)."""
    data: tuple[Path, ...]
    """dialog files."""
    format: str = "dialogs"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    epochs: int = 2
    """paper 3.1."""
    seq_len: int = 512
    """tokens a packed row (paper: 4096); longer dialogs are left out and counted."""
    batch_size: int = 16
    """rows a step, over all processes (paper: 64)."""
    micro_batch_size: int = 8
    """rows a forward pass on one process."""
    optim: optim.OptimConfig = field(default_factory=lambda: optim.OptimConfig(lr=2e-5, warmup_steps=20))
    """paper 3.1: 2e-5, cosine, weight decay 0.1."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: matrix products in bfloat16 over float32 weights."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    checkpoint_every: int = 200
    """steps between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "checkpoints_kept", "epochs", "seq_len", "batch_size", "micro_batch_size")


def run(cfg: SFTConfig) -> Path:
    """Fine-tune and return the model's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("sft"):
            return model_path
        tokenizer = huggingface.load_tokenizer(cfg.init)
        rows, counts = prepare(cfg, tokenizer)
        model = parallel.place(*huggingface.open_model(cfg.init), Placement(device, cfg.parallel, cfg.precision))
        optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
        steps = loader.steps_of_epochs(len(rows.tokens), cfg.batch_size, cfg.epochs, cfg.seed, parallel.data_size())
        start, _ = checkpoint.resume(folder.path / "checkpoints", model, optimizer)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="sft")
        progress = Progress("sft", len(steps), start=start)
        with Saver(
            folder.path / "checkpoints", model, optimizer, cfg.checkpoint_every, cfg.checkpoints_kept, last=len(steps)
        ) as saver:
            for step in range(start, len(steps)):
                began = time.perf_counter()
                batch = Packed(*(tensor[steps[step]] for tensor in rows))
                loss = update(cfg, model, batch, device)
                norm, lr = optim.clip_and_step([model], optimizer, cfg.optim, step, len(steps))
                n_tokens = int((batch.documents >= 0).sum())
                rate = n_tokens / (time.perf_counter() - began)
                metrics.log(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)
                progress.update(loss=loss, tokens_per_second=rate)
                saver.after(step + 1)
        progress.close()
        huggingface.save_model(model, tokenizer, model_path, provenance={"stage": "sft", "parent": str(cfg.init)})
        folder.mark_done("sft", steps=len(steps), **counts)
        return model_path


def prepare(cfg: SFTConfig, tokenizer: Tokenizer) -> tuple[Packed, dict[str, int]]:
    """1 and 2: the packed rows, and what the done marker says of them.

    "left_out" counts dialogs that are too long, "set_aside" unusable lines, "skipped: REASON" rows without a dialog.
    DataError where no dialog is left.
    """
    result = readers.read(
        cfg.data,
        cfg.format,
        kind="dialogs",
        check=lambda record: chat.check(record["messages"], tokenizer, ends_with="assistant"),
        quarantine=cfg.out / "bad_lines.jsonl",
    )
    encoded = [
        chat.encode(record["messages"], tokenizer, loss_on=record.get("loss_on") or "every_answer")
        for record in result.records
    ]
    longest = min(cfg.seq_len, huggingface.read_config(cfg.init).max_seq_len)
    fitting = [dialog for dialog in encoded if len(dialog.tokens) <= longest]
    if not fitting:
        files = ", ".join(map(str, cfg.data))
        raise DataError(f"no dialog of {files} fits {longest} tokens (seq_len, or the model's context if that is less)")
    return packing.pack(fitting, cfg.seq_len), {"left_out": len(encoded) - len(fitting)} | readers.counts(result)


def update(cfg: SFTConfig, model: Transformer, batch: Packed, device: torch.device) -> float:
    """3: accumulate the gradients of one global batch; its mean loss in nats a counted token."""
    count = int(batch.mask[:, 1:].sum())
    mine = Packed(*(tensor[parallel.share(len(batch.tokens))] for tensor in batch))
    total = torch.zeros((), device=device)
    for begin in range(0, len(mine.tokens), cfg.micro_batch_size):
        rows = Packed(*(tensor[begin : begin + cfg.micro_batch_size].to(device) for tensor in mine))
        next_counts = F.pad(rows.mask[:, 1:], (0, 1))  # (B, T): True where the following token is counted
        with parallel.autocast(cfg.precision, device):
            targets = rows.tokens[:, 1:][rows.mask[:, 1:]]  # (N,)
            inputs = {"positions": rows.positions, "documents": packing.apart(rows.documents)}
            loss = model(rows.tokens, **inputs, only=next_counts, targets=targets) / count
        parallel.backward(loss)
        total += loss.detach()
    return float(parallel.total(total))
