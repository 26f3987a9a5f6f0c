"""Bulk sampling: n answers to each prompt of a file, written as dialogs, a resumable shard at a time.

An answer that did not end by itself, says nothing or holds a chat tag is no dialog, and is counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna import config, parallel
from puna.config import positive
from puna.data import readers
from puna.data.map_shards import map_shards
from puna.data.prompts import Prompt, fitting, read_prompts
from puna.generate.engine import open_engine
from puna.run_folder import Progress, RunFolder
from puna.text import chat
from puna.types import Message


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
    """how to read them (see puna.data.readers)."""
    n: int = 1
    """answers a prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0 draws from all."""
    max_new_tokens: int = 256
    shard_size: int = 256
    """prompts a resumable piece of work."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "n", "max_new_tokens", "shard_size")


def run(cfg: SampleConfig) -> Path:
    """Sample, and return the folder with dialogs.jsonl."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("sample"):
            return folder.path
        engine = open_engine(cfg.init, device)
        read = read_prompts(cfg.prompts, cfg.format)
        prompts = fitting(read, engine.tokenizer, engine.context)
        progress = Progress("sample", len(prompts), unit="prompt")

        def work(number: int, shard: Sequence[Prompt]) -> list[dict[str, Any]]:
            answers = engine.generate(
                [prompt["messages"] for prompt in shard],
                n=cfg.n,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                top_k=cfg.top_k,
                max_new_tokens=cfg.max_new_tokens,
                seed=cfg.seed + number,
            )
            return [
                {
                    "messages": [*prompt["messages"], Message(role="assistant", content=answer.text)],
                    "id": f"{prompt['id']}-{i}",
                    "prompt_id": prompt["id"],
                    "logprob": sum(answer.logprobs),
                }
                for prompt, row in zip(shard, answers, strict=True)
                for i, answer in enumerate(row)
                if chat.usable(answer)
            ]

        dialogs = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if parallel.is_main():
            readers.write_jsonl(folder.path / "dialogs.jsonl", dialogs)
        unusable = cfg.n * len(prompts) - len(dialogs)
        folder.mark_done("sample", dialogs=len(dialogs), unusable=unusable, left_out=len(read) - len(prompts))
        parallel.barrier()
        return folder.path
