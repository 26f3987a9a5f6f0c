"""Collecting preferences (paper 3.2.1): two model variants answer, an annotator chooses.

1. For each prompt, two of the models (the newest and the ones before it) answer at two temperatures.
2. The annotator makes a forced choice with one of four grades, and labels each answer's safety.
3. Helpfulness and safety prompts make separate batches; in the safety batch, pairs whose chosen answer is unsafe while
   the rejected one is safe are left out.

Where the paper is silent: pairs of identical answers, or with one that did not end, are skipped and counted; each
prompt goes to one annotator of the pool in turn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna import config, parallel
from puna.config import ConfigError, one_of, positive, within
from puna.data import comparisons, readers
from puna.data.map_shards import map_shards
from puna.data.prompts import Prompt, fitting, read_prompts
from puna.generate.engine import open_engine
from puna.run_folder import Progress, RunFolder, fingerprint
from puna.text import chat
from puna.types import Annotator, Domain, Engine, Judgement, Preference


@dataclass(frozen=True)
class CollectConfig:
    """`puna collect`: models and prompts in, comparisons out."""

    out: Path
    """the stage's folder; run again to resume."""
    models: tuple[Path, ...]
    """model folders, the newest first; one alone answers twice."""
    prompts: tuple[Path, ...]
    """prompt files."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    annotators: str = "valley"
    """who chooses: a key of ANNOTATORS."""
    world: Path | None = None
    """the embedded world's folder, whose people they are."""
    temperatures: tuple[float, ...] = (0.7, 0.9, 1.1)
    """each answer is drawn at one of these."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is not used."""
    batch: int = 1
    """the batch number that the comparisons carry."""
    test_share: float = 0.1
    """share of the prompts, the same in any round, whose comparisons (..._test.jsonl) measure reward models."""
    shard_size: int = 256
    """prompts a resumable piece of work."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "annotators", ANNOTATORS)
        positive(self, "max_new_tokens", "shard_size")
        within(self, 0, math.inf, "temperatures")
        within(self, 0, 1, "test_share")


def valley_annotators(cfg: CollectConfig) -> list[Annotator]:
    """The embedded world's simulated people."""
    from puna.valley import annotators
    from puna.valley.write import read_world

    if cfg.world is None:
        raise ConfigError("annotators 'valley' need the embedded world's folder: set `world`")
    return list(annotators.pool(read_world(cfg.world), cfg.seed))


ANNOTATORS: dict[str, Callable[[CollectConfig], list[Annotator]]] = {"valley": valley_annotators}


def run(cfg: CollectConfig) -> Path:
    """Collect, and return the folder with helpfulness.jsonl, safety.jsonl and their held-out parts."""
    device = parallel.start(cfg.threads)
    annotators = ANNOTATORS[cfg.annotators](cfg)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("collect"):
            return folder.path
        every = prompts = read_prompts(cfg.prompts, cfg.format)
        engines = [open_engine(path, device) for path in cfg.models]
        names = [fingerprint(path) for path in cfg.models]
        for engine in engines:
            prompts = fitting(prompts, engine.tokenizer, engine.context)
        progress = Progress("collect", len(prompts), unit="prompt")

        def work(number: int, shard: Sequence[Prompt]) -> list[dict[str, Any]]:
            pairs = answer(cfg, engines, names, shard, cfg.seed + number)
            return [
                record(prompt, pair, annotators[(cfg.shard_size * number + i) % len(annotators)], cfg)
                for i, (prompt, pair) in enumerate(zip(shard, pairs, strict=True))
            ]

        records = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if parallel.is_main():
            counts = write(folder.path, records, cfg)
            folder.mark_done("collect", **counts, left_out=len(every) - len(prompts))
        parallel.barrier()
        return folder.path


def answer(
    cfg: CollectConfig, engines: Sequence[Engine], names: Sequence[str], prompts: Sequence[Prompt], seed: int
) -> list[list[dict[str, Any]]]:
    """1: two answers a prompt, from two models where there are two, each at its own temperature; `names` are theirs."""
    pairs: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for side in (0, 1):
        rng = random.Random(f"{seed} {side}")
        assigned = [(i + side) % len(engines) for i in range(len(prompts))]
        temperatures = [rng.choice(cfg.temperatures) for _ in prompts]
        for index, engine in enumerate(engines):
            mine = [i for i in range(len(prompts)) if assigned[i] == index]
            completions = engine.generate(
                [prompts[i]["messages"] for i in mine],
                max_new_tokens=cfg.max_new_tokens,
                top_p=cfg.top_p,
                temperature=[temperatures[i] for i in mine],
                seed=2 * seed + side,
            )
            for i, (completion,) in zip(mine, completions, strict=True):
                told = {"text": completion.text, "finished": completion.finished}
                pairs[i].append(told | {"model": names[index], "temperature": temperatures[i]})
    return pairs


def record(prompt: Prompt, pair: Sequence[dict[str, Any]], annotator: Annotator, cfg: CollectConfig) -> dict[str, Any]:
    """2: one comparison as a line; `skip` says why it is not used, if it is not."""
    domain: Domain = "safety" if prompt["is_safety"] else "helpfulness"
    first, second = (answer["text"].strip() for answer in pair)
    if not first or not second or first == second:
        return {"skip": "identical answers" if first == second else "an empty answer", "domain": domain}
    if not all(answer["finished"] for answer in pair):
        return {"skip": "an answer that did not end", "domain": domain}
    if chat.marker_in(first) or chat.marker_in(second):
        return {"skip": "an answer with a chat tag", "domain": domain}
    judgement: Judgement = annotator(prompt, first, second)
    chosen, rejected = pair[judgement.chosen], pair[1 - judgement.chosen]
    chosen_is_safe, rejected_is_safe = (judgement.is_safe[i] for i in (judgement.chosen, 1 - judgement.chosen))
    if domain == "safety" and rejected_is_safe and not chosen_is_safe:
        return {"skip": "the chosen answer is unsafe, the rejected one safe", "domain": domain}
    preference = Preference(
        prompt=prompt["messages"],
        chosen=chosen["text"].strip(),
        rejected=rejected["text"].strip(),
        grade=judgement.grade,
        chosen_is_safe=chosen_is_safe,
        rejected_is_safe=rejected_is_safe,
        domain=domain,
        batch=cfg.batch,
        provenance={
            "prompt_id": prompt["id"],
            "models": [chosen["model"], rejected["model"]],
            "temperatures": [chosen["temperature"], rejected["temperature"]],
        },
    )
    return readers.to_record(preference)


def write(folder: Path, records: Sequence[dict[str, Any]], cfg: CollectConfig) -> dict[str, int]:
    """3: the separate batches and their held-out parts; how many of each."""
    counts: Counter[str] = Counter()
    for domain in ("helpfulness", "safety"):
        used = [r for r in records if r["domain"] == domain and "skip" not in r]
        comparisons.write(folder, domain, used, cfg.test_share)
        counts[domain] = len(used)
    counts.update("skipped: " + r["skip"] for r in records if "skip" in r)
    return dict(counts)
