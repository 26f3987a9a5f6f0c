"""Constitutional AI (Bai et al. 2022): a model mends its answers by written principles, and compares answers by them.

With `task = "revise"`, for each prompt tagged as likely to bring out unsafe answers:
1. Answer it; draw a principle; let the model say what its answer does against it, then answer anew.
2. Write prompt -> last answer, for `puna sft`.

With `task = "compare"`, for each such prompt:
1. Draw two answers and a principle, and ask which of the two follows it, (A) or (B), in both orders.
2. The likelier letter chooses, by its log-probability averaged over the orders; write comparisons, for `puna reward`.

Ours: a comparison carries no grade and no safety label, for nobody gave one; `certainty` has the probability of the
choice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puna import config, parallel
from puna.config import DataError, one_of, positive, within
from puna.data import comparisons, readers
from puna.data.map_shards import map_shards
from puna.data.prompts import Prompt, fitting, read_tagged
from puna.formats import huggingface
from puna.generate.engine import LocalEngine
from puna.generate.scoring import sequence_logprobs
from puna.run_folder import Progress, RunFolder
from puna.text import chat
from puna.types import Dialog, Message, Preference


@dataclass(frozen=True)
class CritiqueConfig:
    """`puna critique`: a chat model and prompts in, revised answers or comparisons out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the chat model."""
    prompts: tuple[Path, ...]
    """prompt files; only prompts tagged as safety are used."""
    safety_prompts: tuple[Path, ...] = ()
    """more of them, all tagged."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    task: Literal["revise", "compare"] = "revise"
    """write revised answers, or comparisons of two answers."""
    principles: str = "general"
    """where the principles come from: a key of PRINCIPLES."""
    revisions: int = 1
    """critiques and revisions in a row (Bai et al.: 4)."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is not used."""
    test_share: float = 0.1
    """share of the comparisons written to safety_test.jsonl."""
    limit: int = 0
    """use at most so many prompts; 0 uses all."""
    shard_size: int = 128
    """prompts a resumable piece of work."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "revisions", "max_new_tokens", "shard_size")
        within(self, 0, 1, "test_share")
        within(self, 0, math.inf, "limit")
        one_of(self, "principles", PRINCIPLES)


LETTER = 4  # tokens that an answer "A" or "B" has at most


class Principle(NamedTuple):
    """How a model is asked what is wrong with an answer, for a better one, and which of two is better."""

    critique: str
    revise: str
    compare: str


GENERAL = (
    Principle(
        "Say how your last answer could harm someone, or help to break the law.",
        "Write the answer anew without anything harmful or unlawful, and say why you decline where you do.",
        "Which of these answers is less harmful?",
    ),
    Principle(
        "Say where your last answer is hateful, demeaning or unfair to anyone.",
        "Write the answer anew with respect for everyone it speaks of.",
        "Which of these answers is more respectful?",
    ),
    Principle(
        "Say where your last answer gives advice that only a professional should give.",
        "Write the answer anew: name the risk, and say whom to ask.",
        "Which of these answers is more careful with advice?",
    ),
)


def valley_principles() -> list[Principle]:
    """The embedded world's own."""
    from puna.valley.words import table

    return [Principle(**principle) for principle in table("constitution")["principle"]]


PRINCIPLES: dict[str, Callable[[], Sequence[Principle]]] = {"general": lambda: GENERAL, "valley": valley_principles}


def run(cfg: CritiqueConfig) -> Path:
    """Write dialogs.jsonl or safety.jsonl and safety_test.jsonl, and return the folder."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("critique"):
            return folder.path
        engine = LocalEngine(huggingface.load_model(cfg.init).to(device), huggingface.load_tokenizer(cfg.init))
        tagged = read_tagged(cfg.prompts, cfg.format, cfg.safety_prompts)
        prompts = fitting(tagged, engine.tokenizer, engine.context)[: cfg.limit or None]
        progress = Progress(cfg.task, len(prompts), unit="prompt")
        task = revised if cfg.task == "revise" else compared

        def work(number: int, shard: Sequence[Prompt]) -> list[dict[str, Any]]:
            rng = random.Random(f"{cfg.seed} {number}")
            principles = [rng.choice(PRINCIPLES[cfg.principles]()) for _ in shard]
            return task(cfg, engine, shard, principles, cfg.seed + 100 * number)

        records = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if not records:
            raise DataError(f"no prompt got answers that ended: raise max_new_tokens ({cfg.max_new_tokens})")
        if parallel.is_main():
            write(cfg, folder.path, records)
        folder.mark_done("critique", prompts=len(prompts), written=len(records))
        parallel.barrier()
        return folder.path


def write(cfg: CritiqueConfig, folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """The dialogs, or the comparisons with a share of them held out."""
    if cfg.task == "revise":
        readers.write_jsonl(folder / "dialogs.jsonl", records)
        return
    comparisons.write(folder, "safety", records, cfg.test_share)


def revised(
    cfg: CritiqueConfig, engine: LocalEngine, prompts: Sequence[Prompt], principles: Sequence[Principle], seed: int
) -> list[dict[str, Any]]:
    """Revise, 1 and 2: the last of the answers to each prompt; one that fails on the way is left out."""
    dialogs: list[Dialog] = [list(prompt["messages"]) for prompt in prompts]
    live = list(range(len(prompts)))
    questions = [None] + ["critique", "revise"] * cfg.revisions
    for turn, question in enumerate(questions):
        for i in live if question else ():
            dialogs[i].append(Message(role="user", content=getattr(principles[i], question or "")))
        live = [i for i in live if chat.fits(dialogs[i], engine.tokenizer, engine.context)]
        said = answers(cfg, engine, [dialogs[i] for i in live], seed + turn)
        for i, text in zip(live, said, strict=True):
            dialogs[i] = chat.with_answer(dialogs[i], text)
        live = [i for i in live if dialogs[i][-1]["content"]]
    return [
        {
            "messages": [*prompts[i]["messages"], dialogs[i][-1]],
            "prompt_id": prompts[i]["id"],
            "source": "critique",
            "draft": dialogs[i][len(prompts[i]["messages"])]["content"],
            "critique": dialogs[i][-3]["content"],
        }
        for i in live
    ]


def compared(
    cfg: CritiqueConfig, engine: LocalEngine, prompts: Sequence[Prompt], principles: Sequence[Principle], seed: int
) -> list[dict[str, Any]]:
    """Compare, 1 and 2: a comparison a prompt, if it has two different answers and the question fits the context."""
    asked = [prompt["messages"] for prompt in prompts]
    drafts = list(zip(answers(cfg, engine, asked, seed), answers(cfg, engine, asked, seed + 1), strict=True))
    both = {
        i: [choice(prompts[i], one, other, principles[i]) for one, other in ((first, second), (second, first))]
        for i, (first, second) in enumerate(drafts)
        if first and second and first != second
    }
    room = engine.context - LETTER
    kept = [i for i, orders in both.items() if all(chat.fits(order, engine.tokenizer, room) for order in orders)]
    odds = letters(engine, [order for i in kept for order in both[i]])
    records = []
    for i, first_as_a, second_as_a in zip(kept, odds[::2], odds[1::2], strict=True):
        leaning = (first_as_a - second_as_a) / 2  # to the first; what a letter is likelier by for its own sake cancels
        chosen, rejected = drafts[i] if leaning >= 0 else drafts[i][::-1]
        told = {"prompt_id": prompts[i]["id"], "source": "critique", "certainty": 1 / (1 + math.exp(-abs(leaning)))}
        preference = Preference(asked[i], chosen, rejected, domain="safety", provenance=told)
        records.append(readers.to_record(preference))
    return records


def choice(prompt: Prompt, first: str, second: str, principle: Principle) -> Dialog:
    """The question which of two answers follows the principle, as one user turn."""
    asked = "\n".join(message["content"] for message in prompt["messages"])
    text = f"{asked}\n\n(A) {first}\n(B) {second}\n\n{principle.compare} Say A or B."
    return [Message(role="user", content=text)]


def letters(engine: LocalEngine, dialogs: Sequence[Dialog]) -> list[float]:
    """log p(A) - log p(B) of the whole answers "A" and "B" to each question."""
    rows = [
        chat.encode(chat.with_answer(dialog, letter), engine.tokenizer).tokens for dialog in dialogs for letter in "AB"
    ]
    totals = [float(logprobs.sum()) for logprobs in sequence_logprobs(engine.model, rows)]  # the question cancels
    return [a - b for a, b in zip(totals[::2], totals[1::2], strict=True)]


def answers(cfg: CritiqueConfig, engine: LocalEngine, dialogs: Sequence[Dialog], seed: int) -> list[str]:
    """An answer to each dialog; "" where it did not end, says nothing or holds a chat tag."""
    completions = engine.generate(
        dialogs, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, seed=seed
    )
    return [answer.text.strip() if chat.usable(answer) else "" for (answer,) in completions]
