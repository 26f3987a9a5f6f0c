"""Context distillation for safety (paper 4.2.4): answers written under a safety preprompt, learned without it.

1. For each adversarial prompt, let the newest model answer as it is, and again under a preprompt: a generic one, or
   one for the prompt's risk category with an answer template (targeted).
2. Keep the second answer only where the safety reward model scores it above the first: on good answers distillation
   makes vague replies.
3. Write prompt -> answer without the preprompt.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna import config, parallel
from puna.config import one_of, positive, within
from puna.data import readers
from puna.data.map_shards import map_shards
from puna.data.prompts import Prompt, fitting, read_tagged
from puna.generate.engine import open_engine
from puna.generate.scoring import Scorer, open_judge
from puna.run_folder import Progress, RunFolder, write_atomically
from puna.text import chat
from puna.types import Dialog, Engine, Message


@dataclass(frozen=True)
class ContextDistillationConfig:
    """`puna context-distillation`: a chat model, a safety reward model and adversarial prompts in, dialogs out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the newest chat model."""
    reward_safety: Path
    """the folder of the safety reward model that gates."""
    prompts: tuple[Path, ...]
    """prompt files; only prompts tagged as safety are used."""
    safety_prompts: tuple[Path, ...] = ()
    """more of them, all tagged."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    preprompts: str = "general"
    """where the preprompts come from: a key of PREPROMPTS."""
    kind: Literal["generic", "targeted", "both"] = "both"
    """generic preprompts, those of the prompt's risk category, or each for half of the prompts."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is not used."""
    gate: bool = True
    """keep a distilled answer only where its safety score is above the original's."""
    limit: int = 0
    """use at most so many prompts; 0 uses all."""
    shard_size: int = 256
    """prompts a resumable piece of work."""
    vllm: str = ""
    """the address of a vLLM server to sample on (puna.generate.vllm); empty samples in this process."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "preprompts", PREPROMPTS)
        positive(self, "max_new_tokens", "shard_size")
        within(self, 0, math.inf, "temperature", "limit")


ADJECTIVES = ("responsible", "respectful", "wise", "sincere", "careful", "kind")
"""The first three are the paper's examples (A.4.5)."""

TARGETED = {
    "illicit": "Decline to help with crime, name the policy, offer a lawful way, and invite another question.",
    "hateful": "Decline to demean anyone, say why it hurts, and point to help where somebody may need it.",
    "unqualified_advice": "Say that you are not qualified, name the risk, and point to someone who is.",
}


def general_preprompt(prompt: Prompt, targeted: bool, rng: random.Random) -> str:
    """Templated with an adjective (generic), or the answer template of the prompt's risk category (targeted)."""
    generic = "You are a {} and {} assistant.".format(*rng.sample(ADJECTIVES, 2))
    template = TARGETED.get(prompt.get("risk_category") or "", "") if targeted else ""
    return f"{generic} {template}".strip()


def valley_preprompt(prompt: Prompt, targeted: bool, rng: random.Random) -> str:
    """The embedded world's own; a generic one where the prompt has no risk category."""
    from puna.valley.prompts import preprompts

    texts = preprompts()
    template = texts["targeted"].get(prompt.get("risk_category")) if targeted else None
    return str(template or rng.choice(texts["generic"]))


PREPROMPTS: dict[str, Callable[[Prompt, bool, random.Random], str]] = {
    "general": general_preprompt,
    "valley": valley_preprompt,
}


def run(cfg: ContextDistillationConfig) -> Path:
    """Sample, gate, and return the folder with dialogs.jsonl."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("context_distillation"):
            return folder.path
        tagged = read_tagged(cfg.prompts, cfg.format, cfg.safety_prompts)
        engine = open_engine(cfg.init, device, cfg.vllm)
        prompts = fitting(tagged, engine.tokenizer, engine.context)
        left_out = len(tagged) - len(prompts)
        prompts = prompts[: cfg.limit] if cfg.limit else prompts
        safety = open_judge(cfg.reward_safety, engine, device)
        progress = Progress("context distillation", len(prompts), unit="prompt")

        def work(number: int, shard: Sequence[Prompt]) -> list[dict[str, Any]]:
            return distill(cfg, engine, safety, shard, cfg.seed + number)

        records = map_shards(work, prompts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        kept = [record for record in records if record["kept"]]
        if parallel.is_main():
            readers.write_jsonl(folder.path / "dialogs.jsonl", kept)
            write_atomically(folder.path / "gate.json", json.dumps(by_score(records), indent=1))
        folder.mark_done("context_distillation", kept=len(kept), prompts=len(prompts), left_out=left_out)
        parallel.barrier()
        return folder.path


def distill(
    cfg: ContextDistillationConfig, engine: Engine, safety: Scorer, prompts: Sequence[Prompt], seed: int
) -> list[dict[str, Any]]:
    """1 to 3: a record a prompt with both scores and whether the distilled answer is kept."""
    rng = random.Random(f"{cfg.seed} {seed}")
    targeted = [cfg.kind == "targeted" or (cfg.kind == "both" and i % 2 == 1) for i in range(len(prompts))]
    preprompts = [PREPROMPTS[cfg.preprompts](p, t, rng) for p, t in zip(prompts, targeted, strict=True)]
    plain = [prompt["messages"] for prompt in prompts]
    prefixed = [_with_system(text, dialog) for text, dialog in zip(preprompts, plain, strict=True)]
    original = _answers(cfg, engine, plain, seed)
    distilled = _answers(cfg, engine, prefixed, seed)
    before = _scores(safety, plain, original)
    after = _scores(safety, plain, distilled)
    return [
        {
            "messages": chat.with_answer(prompt["messages"], answer),
            "prompt_id": prompt["id"],
            "source": "context_distillation",
            "targeted": is_targeted,
            "score_before": first,
            "score_after": second,
            "kept": bool(answer) and (not cfg.gate or second > first),
        }
        for prompt, answer, is_targeted, first, second in zip(prompts, distilled, targeted, before, after, strict=True)
    ]


def by_score(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the gate decided (Figure 16), by fifths of the score that the plain answer has.

    Left out are empty fifths, and prompts whose plain answer is empty: a score of 0 is no measurement.
    """
    fifths: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in (record for record in records if record["score_before"] > 0):  # 0 is no answer
        fifths[min(int(5 * record["score_before"]), 4)].append(record)
    return [
        {
            "from": fifth / 5,
            "prompts": len(mine),
            "kept": sum(record["kept"] for record in mine) / len(mine),
            "score_before": sum(record["score_before"] for record in mine) / len(mine),
            "score_after": sum(record["score_after"] for record in mine) / len(mine),
        }
        for fifth, mine in sorted(fifths.items())
    ]


def _with_system(text: str, dialog: Dialog) -> Dialog:
    """The dialog under the preprompt, in place of a system message it may have."""
    turns = dialog[1:] if dialog[0]["role"] == "system" else dialog
    return [Message(role="system", content=text), *turns]


def _answers(cfg: ContextDistillationConfig, engine: Engine, dialogs: Sequence[Dialog], seed: int) -> list[str]:
    """An answer to each dialog; "" where it cannot stand in one, or a preprompt left it no room."""
    fit = [i for i, dialog in enumerate(dialogs) if chat.fits(dialog, engine.tokenizer, engine.context)]
    completions = engine.generate(
        [dialogs[i] for i in fit],
        max_new_tokens=cfg.max_new_tokens,
        top_p=cfg.top_p,
        temperature=cfg.temperature,
        seed=seed,
    )
    answers = [""] * len(dialogs)
    for i, (completion,) in zip(fit, completions, strict=True):
        fits = chat.fits_with_answer(dialogs[i], completion, engine.tokenizer, engine.context)
        answers[i] = completion.text.strip() if fits else ""
    return answers


def _scores(safety: Scorer, dialogs: Sequence[Dialog], answers: Sequence[str]) -> list[float]:
    """The safety score of each answer; 0 for an empty one."""
    told = [i for i, answer in enumerate(answers) if answer]
    scores = [0.0] * len(answers)
    rated = safety([chat.with_answer(dialogs[i], answers[i]) for i in told]) if told else ()
    for i, score in zip(told, rated, strict=True):
        scores[i] = float(score)
    return scores
