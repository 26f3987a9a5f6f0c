"""Bulk sampling: n answers to each prompt of a file, written as dialogs, a resumable shard at a time.

An answer that did not end by itself, says nothing or holds a chat tag is no dialog, and is counted instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from puna import config, parallel
from puna.config import ConfigError, positive, within
from puna.data import readers
from puna.data.map_shards import Records, Workers, map_shards, n_cores
from puna.data.prompts import Prompt, fitting, read_prompts
from puna.formats import huggingface
from puna.generate.engine import open_engine
from puna.generate.sampling import Sampling
from puna.run_folder import Progress, RunFolder
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.types import Engine, SamplingSettings


@dataclass(frozen=True)
class SampleConfig:
    """`puna sample`: a chat model and prompts in, dialogs out."""

    out: Path
    """the folder; run again to resume."""
    init: Path
    """the chat model."""
    prompts: tuple[Path, ...]
    """prompt files, or files of dialogs or comparisons, whose prompts are taken."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    n: int = 1
    """answers a prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0 draws from all."""
    min_p: float = 0.0
    """leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """divides the positive logits of tokens that the prompt or the answer has, multiplies the negative ones."""
    stop: tuple[str, ...] = ()
    """texts that end an answer; they are no part of it."""
    max_new_tokens: int = 256
    """tokens of the longest answer."""
    shard_size: int = 256
    """prompts a resumable piece of work."""
    vllm: str = ""
    """the address of a vLLM server to sample on (puna.generate.vllm); empty samples in Puna's own processes."""
    workers: int = 0
    """processes with an engine each that share the prompts; 0 samples in this one (on Ray: one for each CPU or GPU)."""
    cluster: Literal["local", "ray"] = "local"
    """ray: on the cluster that RAY_ADDRESS names, or a local one; all its machines must see the same files."""
    gpus: float = 0
    """GPUs that a worker asks Ray for; with 0 it samples on its CPU."""
    threads: int = 0
    """torch threads of a process; 0 leaves torch's choice, and local workers share the cores out."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "n", "max_new_tokens", "shard_size")
        within(self, 0, math.inf, "workers", "threads", "gpus")
        Sampling(self.temperature, **self.settings())  # refuses what is out of range
        if self.vllm and (self.workers or self.cluster != "local"):
            raise ConfigError("a vLLM server shares the prompts out by itself: leave workers and cluster away")

    def settings(self, shard: int = 0) -> SamplingSettings:
        """How a shard's answers are drawn, each shard's with a seed of its own."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "seed": self.seed + shard,
        }


def run(cfg: SampleConfig) -> Path:
    """Sample, and return the folder with dialogs.jsonl."""
    parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("sample"):
            return folder.path
        read = read_prompts(cfg.prompts, cfg.format)
        tokenizer = tokenizers.load(cfg.init) if cfg.vllm else huggingface.load_tokenizer(cfg.init)
        workers = Workers(cfg.workers, cfg.cluster, cfg.gpus)
        shared = replace(cfg, init=cfg.init.absolute(), threads=cfg.threads or _threads(workers))
        work = partial(answer_shard, shared)
        try:
            prompts = fitting(read, tokenizer, _context(shared))
            progress = Progress("sample", len(prompts), unit="prompt")
            dialogs = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update, workers)
        finally:
            _engine.cache_clear()  # the next run may find another model under this name
        unusable = cfg.n * len(prompts) - len(dialogs)
        progress.close(dialogs=len(dialogs), unusable=unusable, left_out=len(read) - len(prompts))
        if parallel.is_main():
            readers.write_jsonl(folder.path / "dialogs.jsonl", dialogs)
        folder.mark_done("sample", dialogs=len(dialogs), unusable=unusable, left_out=len(read) - len(prompts))
        parallel.barrier()
        return folder.path


def _threads(workers: Workers) -> int:
    """Of a worker that shares this machine's cores with others; 0 leaves torch's choice (Ray gives each its own)."""
    return max(1, n_cores() // workers.n) if workers.n > 1 and workers.cluster == "local" else 0


def _context(cfg: SampleConfig) -> int:
    """Tokens that a prompt and its answer may have together: a server's may be fewer than the model's."""
    if cfg.vllm:
        return _engine(cfg.init, cfg.threads, cfg.vllm).context
    return huggingface.read_config(cfg.init).max_seq_len


def answer_shard(cfg: SampleConfig, number: int, shard: Sequence[Prompt]) -> Records:
    """The usable answers to a shard's prompts, as dialogs; a worker's part of the work."""
    answers = _engine(cfg.init, cfg.threads, cfg.vllm).generate(
        [prompt["messages"] for prompt in shard],
        n=cfg.n,
        temperature=cfg.temperature,
        **cfg.settings(number),
    )
    return [
        {
            "messages": chat.with_answer(prompt["messages"], answer.text),
            "id": f"{prompt['id']}-{i}",
            "prompt_id": prompt["id"],
            "logprob": sum(answer.logprobs),
        }
        for prompt, row in zip(shard, answers, strict=True)
        for i, answer in enumerate(row)
        if chat.usable(answer)
    ]


@functools.lru_cache(maxsize=1)
def _engine(folder: Path, threads: int, vllm: str) -> Engine:
    """A process's engine, made for its first shard."""
    return open_engine(folder, parallel.start(threads), vllm)
