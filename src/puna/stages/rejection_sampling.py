"""Rejection sampling (paper 3.2.3): the best of K answers to each prompt becomes training data.

1. Choose the temperature anew: for each candidate, draw K answers to some prompts and measure the mean best reward
   (Figures 7 and 8 plot the same against K).
2. Draw K answers a prompt from the newest model at that temperature; score them by the combined reward of both models.
3. Keep the best answer of each prompt.
4. Pool it with the best of earlier rounds, scored anew by today's reward models. Until V3 the paper pooled only the
   last round and the model forgot skills; later rounds pool all.

The pool is written as dialogs; `puna sft` fine-tunes the base model on them.
Where the paper is silent: K, and the number of prompts of the temperature search. A prompt that stands in several
rounds keeps its best answer, and a dialog that does stands in the pool once.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import config, parallel
from puna.config import DataError, positive, within
from puna.data import readers
from puna.data.map_shards import map_shards
from puna.data.prompts import Prompt, fitting, read_prompts
from puna.generate.engine import open_engine
from puna.generate.scoring import combined_reward, open_judge
from puna.run_folder import Progress, RunFolder, fingerprint, write_atomically
from puna.text import chat
from puna.types import Completion, Dialog, Engine, Reward


@dataclass(frozen=True)
class RejectionSamplingConfig:
    """`puna rejection-sampling`: a chat model, two reward models and prompts in, selected dialogs out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the newest chat model."""
    reward_helpfulness: Path
    """the helpfulness reward model's folder."""
    reward_safety: Path
    """the safety reward model's folder."""
    prompts: tuple[Path, ...]
    """prompt files."""
    safety_prompts: tuple[Path, ...] = ()
    """more of them, all tagged as likely to bring out unsafe answers."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    earlier: tuple[Path, ...] = ()
    """best.jsonl of earlier rounds to pool."""
    samples: int = 8
    """K answers a prompt (the paper explores up to 100)."""
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    """candidates of the search (the paper settled on 1.2 to 1.3 for RLHF models and 10 to 100 samples)."""
    search_prompts: int = 48
    """prompts of the temperature search."""
    threshold: float = 0.15
    """where the safety score is below this, it is the reward in place of the helpfulness score (3.2.3)."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is not used."""
    max_prompt_tokens: int = 0
    """leave longer prompts out; 0 leaves out those alone that fill the model's context."""
    limit: int = 0
    """use at most so many prompts; 0 uses all."""
    shard_size: int = 128
    """prompts a resumable piece of work."""
    vllm: str = ""
    """the address of a vLLM server to sample on (puna.generate.vllm); empty samples in this process."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "samples", "search_prompts", "max_new_tokens", "shard_size")
        within(self, 0, math.inf, "temperatures", "max_prompt_tokens", "limit")
        within(self, 0, 1, "threshold")


@dataclass(frozen=True)
class Models:
    """What a round works with."""

    engine: Engine
    helpfulness: Reward
    safety: Reward
    threshold: float

    def reward(self, dialogs: Sequence[Dialog], is_safety: Sequence[bool]) -> Tensor:
        """The combined reward of dialogs that end with an answer, (N,)."""
        return combined_reward(self.safety(dialogs), self.helpfulness(dialogs), is_safety, self.threshold)


def run(cfg: RejectionSamplingConfig) -> Path:
    """Sample, select, pool, and return the folder with best.jsonl, pool.jsonl and curve.json."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("rejection_sampling"):
            return folder.path
        models = load(cfg, device)
        every = read_prompts(cfg.prompts, cfg.format, cfg.safety_prompts)
        prompts = fitting(every, models.engine.tokenizer, models.engine.context, cfg.max_prompt_tokens)
        left_out = len(every) - len(prompts)
        # Shuffled, so that the search and a limit see both kinds of prompts.
        prompts = random.Random(cfg.seed).sample(prompts, len(prompts))[: cfg.limit or None]
        if not (folder.path / "curve.json").exists():
            curve = search(cfg, models, prompts[: cfg.search_prompts])
            if parallel.is_main():
                write_atomically(folder.path / "curve.json", json.dumps(curve, indent=1))
            parallel.barrier()
        temperature = json.loads((folder.path / "curve.json").read_text())["temperature"]
        progress = Progress(f"sampling {cfg.out.parent.name}", len(prompts), unit="prompt")

        origin = {"round": cfg.out.parent.name, "model": fingerprint(cfg.init)}

        def work(number: int, shard: Sequence[Prompt]) -> list[dict[str, Any]]:
            records = select(cfg, models, shard, temperature, cfg.seed + 1 + number)
            return [record | origin for record in records]

        best = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if not best:
            raise DataError(
                f"no prompt got an answer that ended: raise max_new_tokens ({cfg.max_new_tokens}) in another --out"
            )
        every_round = pooled(cfg, models, best)
        pool = distinct(every_round)
        if parallel.is_main():
            readers.write_jsonl(folder.path / "best.jsonl", best)
            readers.write_jsonl(folder.path / "pool.jsonl", pool)
        counts = {"best": len(best), "pool": len(pool), "doubles": len(every_round) - len(pool), "left_out": left_out}
        folder.mark_done("rejection_sampling", temperature=temperature, **counts, **gained(best))
        parallel.barrier()
        return folder.path


def load(cfg: RejectionSamplingConfig, device: torch.device) -> Models:
    """The newest chat model and both reward models."""
    engine = open_engine(cfg.init, device, cfg.vllm)
    helpfulness, safety = (open_judge(path, engine, device) for path in (cfg.reward_helpfulness, cfg.reward_safety))
    return Models(engine, helpfulness, safety, cfg.threshold)


def search(cfg: RejectionSamplingConfig, models: Models, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """1: rewards against temperature and K; the temperature whose best of K is highest on average."""

    def drawn(first: int, temperatures: Sequence[float]) -> list[Tensor]:
        return [draw(cfg, models, prompts, temperature, cfg.seed)[1] for temperature in temperatures]

    points = []
    rewards_of_all = parallel.spread(drawn, cfg.temperatures, everyone=True)
    for temperature, rewards in zip(cfg.temperatures, rewards_of_all, strict=True):  # (P, K)
        for k in sorted({2**i for i in range(10) if 2**i < cfg.samples} | {cfg.samples}):
            first = rewards[:, :k]
            points.append(
                {
                    "temperature": temperature,
                    "samples": k,
                    "max": float(first.max(dim=1).values.mean()),
                    "mean": float(first.mean()),
                    "median": float(first.quantile(0.5, dim=1).mean()),
                }
            )
    best = max((p for p in points if p["samples"] == cfg.samples), key=lambda p: p["max"])
    return {"temperature": best["temperature"], "points": points}


def draw(
    cfg: RejectionSamplingConfig, models: Models, prompts: Sequence[Prompt], temperature: float, seed: int
) -> tuple[list[list[Completion]], Tensor]:
    """2: K answers to each of P prompts and their combined rewards (P, K); 0 where one cannot stand in a dialog."""
    completions = models.engine.generate(
        [prompt["messages"] for prompt in prompts],
        n=cfg.samples,
        max_new_tokens=cfg.max_new_tokens,
        top_p=cfg.top_p,
        temperature=temperature,
        seed=seed,
    )
    rewards = torch.zeros(len(prompts), cfg.samples)
    whole = {
        (i, j): chat.with_answer(prompts[i]["messages"], answer.text.strip())
        for i, answers in enumerate(completions)
        for j, answer in enumerate(answers)
        if chat.fits_with_answer(prompts[i]["messages"], answer, models.engine.tokenizer, models.engine.context)
    }
    rows, columns = [i for i, _ in whole], [j for _, j in whole]
    if whole:
        rewards[rows, columns] = models.reward([*whole.values()], [prompts[i]["is_safety"] for i in rows])
    return completions, rewards


def select(
    cfg: RejectionSamplingConfig, models: Models, prompts: Sequence[Prompt], temperature: float, seed: int
) -> list[dict[str, Any]]:
    """3: the best answer of each prompt, with where it came from; a prompt without a usable answer is left out."""
    completions, rewards = draw(cfg, models, prompts, temperature, seed)
    records = []
    for prompt, answers, row in zip(prompts, completions, rewards, strict=True):
        best = int(row.argmax())
        if row[best] > 0:  # 0 is no answer
            records.append(
                {
                    "messages": chat.with_answer(prompt["messages"], answers[best].text.strip()),
                    "prompt_id": prompt["id"],
                    "is_safety": prompt["is_safety"],
                    "temperature": temperature,
                    "reward": float(row[best]),
                    "reward_first": float(row[0]),
                    "reward_mean": float(row.mean()),
                    "reward_median": float(row.quantile(0.5)),
                }
            )
    return records


def pooled(cfg: RejectionSamplingConfig, models: Models, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """4: this round's best answers with those of earlier rounds, one a prompt, judged by today's reward models."""
    earlier = [record for path in cfg.earlier for record in readers.read((path,), "dialogs").records]
    pool = {_asked(record): record for record in best}
    if earlier:

        def judged(first: int, part: Sequence[dict[str, Any]]) -> list[float]:
            rewards: list[float] = models.reward([r["messages"] for r in part], [r["is_safety"] for r in part]).tolist()
            return rewards

        for record, reward in zip(earlier, parallel.spread(judged, earlier, everyone=True), strict=True):
            mine = pool.get(_asked(record))
            if mine is None or reward > mine["reward"]:
                pool[_asked(record)] = record | {"reward": reward}
    return list(pool.values())


def _asked(record: dict[str, Any]) -> tuple[str, str]:
    """A record's prompt: its id, which files of two rounds may give to two prompts, and its messages."""
    return record["prompt_id"], json.dumps(record["messages"][:-1])


def distinct(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without those whose dialog an earlier one has: rounds ask some prompts again, under other ids."""
    kept: dict[str, dict[str, Any]] = {}
    for record in records:
        kept.setdefault(json.dumps(record["messages"]), record)
    return list(kept.values())


def gained(best: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What selection changed: the share of prompts whose first answer was not the best, and the mean gain over it."""
    gains = [record["reward"] - record["reward_first"] for record in best]
    return {"improved": sum(gain > 0 for gain in gains) / len(gains), "gain": sum(gains) / len(gains)}
