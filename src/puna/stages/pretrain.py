"""Pretraining (paper 2.2): next-token prediction on raw text.

1. Without a tokenizer, train one on the text: SentencePiece BPE, byte fallback, digits split (2.2).
2. Write the text as token shards, documents between BOS and EOS, a small share held out for validation; or take those
   that `puna data prepare` wrote, a mixture of sources.
3. For each step: cut a global batch of windows from the concatenated documents, average the loss over all of its
   tokens, clip, update (AdamW, warm-up, cosine to 10 %).

Where the paper is silent: documents are concatenated without a mask between them, windows are shuffled anew each epoch.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from puna import checkpoint, config, losses, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError, DataError, positive, within
from puna.data import loader, readers, shards
from puna.formats import huggingface
from puna.model.moe import MixtureOfExperts
from puna.model.transformer import ModelConfig, Transformer
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """`puna pretrain`: text in, a language model out."""

    out: Path
    """the stage's folder; run again to resume."""
    data: tuple[Path, ...]
    """text files: .txt, .md, or .jsonl(.gz) with a "text" field; or one folder that `puna data prepare` wrote."""
    format: str = "jsonl_text"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    tokenizer: Path | None = None
    """tokenizer.model, tokenizer.json or a folder; None takes the prepared folder's, or trains one on the data with the
    model's vocab_size."""
    model: ModelConfig = field(default_factory=ModelConfig)
    seq_len: int = 256
    """tokens a window (paper: 4096)."""
    batch_size: int = 32
    """windows a step, over all processes (paper: 4M tokens)."""
    micro_batch_size: int = 32
    """windows a forward pass on one process."""
    steps: int = 400
    """gradient steps."""
    validation_share: float = 0.01
    """share of documents held out for validation, at most 0.5: every n-th document, with n = 1 / share rounded. A
    prepared folder has its own validation part."""
    optim: optim.OptimConfig = field(default_factory=lambda: optim.OptimConfig(lr=3e-3, warmup_steps=40))
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: matrix products in bfloat16, weights in float32; over several processes all activations are bfloat16."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    checkpoint_every: int = 100
    """steps between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "checkpoints_kept", "seq_len", "batch_size", "micro_batch_size", "steps")
        within(self, 0, 0.5, "validation_share")


def run(cfg: PretrainConfig) -> Path:
    """Train and return the model's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("pretrain"):
            return model_path
        if parallel.is_main():
            prepare(cfg, folder.path / "data")
        parallel.barrier()
        tokenizer, train, validation = prepare(cfg, folder.path / "data")
        model = Transformer.without_weights(cfg.model)
        weights = model.initial_weights(torch.Generator(device).manual_seed(cfg.seed))
        model = parallel.place(model, weights, Placement(device, cfg.parallel, cfg.precision))
        optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
        start, _ = checkpoint.resume(folder.path / "checkpoints", model, optimizer)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="pretrain")
        n_tokens = cfg.batch_size * cfg.seq_len
        progress = Progress("pretrain", cfg.steps, start=start)
        with Saver(
            folder.path / "checkpoints", model, optimizer, cfg.checkpoint_every, cfg.checkpoints_kept, last=cfg.steps
        ) as saver:
            for step in range(start, cfg.steps):
                began = time.perf_counter()
                loss = update(cfg, model, train, step, device)
                norm, lr = optim.clip_and_step([model], optimizer, cfg.optim, step, cfg.steps)
                rate = n_tokens / (time.perf_counter() - began)
                metrics.log(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)
                progress.update(loss=loss, tokens_per_second=rate)
                saver.after(step + 1)
        loss = evaluate(cfg, model, validation, device)
        metrics.log(step=cfg.steps, validation_loss=loss)
        progress.close(validation_loss=loss)
        huggingface.save_model(model, tokenizer, model_path, provenance={"stage": "pretrain", "steps": cfg.steps})
        folder.mark_done("pretrain", validation_loss=loss, tokens=cfg.steps * cfg.batch_size * cfg.seq_len)
        return model_path


def prepare(cfg: PretrainConfig, folder: Path) -> tuple[Tokenizer, loader.Data, loader.Data]:
    """1 and 2: the tokenizer, the training and the validation data; what a killed run finished is kept."""
    if cfg.seq_len > cfg.model.max_seq_len:
        raise ConfigError(
            f"seq_len is {cfg.seq_len}, beyond the model's context model.max_seq_len {cfg.model.max_seq_len}"
        )

    @functools.cache
    def texts() -> list[str]:  # read once, and not at all where a killed run had finished both shards
        return readers.read(cfg.data, cfg.format, kind="texts").records

    prepared = cfg.data[0] if cfg.data and shards.is_prepared(cfg.data[0]) else None
    if prepared and len(cfg.data) > 1:
        raise ConfigError(f"{prepared} is a prepared folder: it must be the only data")
    if cfg.tokenizer is not None:
        tokenizer = tokenizers.load(cfg.tokenizer)
    elif prepared:
        tokenizer = tokenizers.load(prepared / "tokenizer")
    elif (folder / "tokenizer/tokenizer.model").exists():
        tokenizer = tokenizers.load(folder / "tokenizer")
    else:
        # The text knows no chat tags; without their letters each tag would cost a dozen byte tokens.
        tags = [" ".join(chat.MARKERS)] * 1000
        tokenizer = tokenizers.train(itertools.chain(texts(), tags), cfg.model.vocab_size, folder / "tokenizer")
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {cfg.model.vocab_size}: raise it"
        )
    train, validation = (
        loader.open_mixtures(prepared, tokenizer) if prepared else _write_shards(cfg, folder, tokenizer, texts)
    )
    for name, part in (("training", train), ("validation", validation)):
        source, n_tokens = loader.smallest(part)
        if n_tokens <= cfg.seq_len:
            raise DataError(
                f"the {name} part{source} has {n_tokens} tokens, too few for a window of seq_len {cfg.seq_len}: "
                "give more documents, a shorter seq_len or another validation_share"
            )
    return tokenizer, train, validation


def _write_shards(
    cfg: PretrainConfig, folder: Path, tokenizer: Tokenizer, texts: Callable[[], list[str]]
) -> tuple[shards.Shard, shards.Shard]:
    for name, held_out in (("train", False), ("validation", True)):
        if not (folder / f"{name}.json").exists():
            share = cfg.validation_share
            part = (text for i, text in enumerate(texts()) if shards.is_held_out(i, share) == held_out)
            shards.write_shard(folder / name, part, tokenizer)
    return shards.read_sound(folder / "train", tokenizer), shards.read_sound(folder / "validation", tokenizer)


def update(cfg: PretrainConfig, model: Transformer, data: loader.Data, step: int, device: torch.device) -> float:
    """3: accumulate the gradients of one global batch; its mean loss in nats a token."""
    mine = parallel.share(cfg.batch_size)
    inputs, targets = loader.windows(data, cfg.seq_len, cfg.batch_size, step, cfg.seed, mine)
    count = cfg.batch_size * cfg.seq_len
    total = torch.zeros((), device=device)
    for x, y in _micro_batches(cfg, inputs, targets):
        loss = _loss(cfg, model, x.to(device), y.to(device), count)
        parallel.backward(loss + balance(cfg, model) * y.numel() / count)
        total += loss.detach()
    return float(parallel.total(total))


def balance(cfg: PretrainConfig, model: Transformer) -> Tensor | float:
    """The load-balancing loss of the last forward pass, its layers' mean, weighted; 0 without experts.

    It is of a micro-batch on one rank, as the router's shares are: unlike the loss, it depends on how a batch is split.
    """
    layers = [module.routing for module in model.modules() if isinstance(module, MixtureOfExperts)]
    terms = [losses.load_balancing_loss(*routing) for routing in layers if routing]
    return cfg.model.moe.balance * torch.stack(terms).mean() if terms else 0.0


@torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
def evaluate(cfg: PretrainConfig, model: Transformer, data: loader.Data, device: torch.device) -> float:
    """Mean validation loss in nats a token over at most 64 windows."""
    n_windows = min(64, loader.n_windows(data, cfg.seq_len))
    inputs, targets = loader.windows(data, cfg.seq_len, n_windows, 0, cfg.seed)
    losses_ = [
        float(_loss(cfg, model, x.to(device), y.to(device), n_windows * cfg.seq_len))
        for x, y in _micro_batches(cfg, inputs, targets)
    ]
    return sum(losses_)


def _micro_batches(cfg: PretrainConfig, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = cfg.micro_batch_size
    return zip(torch.split(inputs, size), torch.split(targets, size), strict=True)


def _loss(cfg: PretrainConfig, model: Transformer, x: Tensor, y: Tensor, count: int) -> Tensor:
    """A micro-batch's part of the mean: its sum over the step's count, so that how a batch is split changes nothing."""
    with parallel.autocast(cfg.precision, x.device):
        return model(x, targets=y) / count  # type: ignore[no-any-return]
