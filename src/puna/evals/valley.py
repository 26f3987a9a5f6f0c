"""What a model is worth in the embedded world, by its gold judge, on prompts nothing was trained on.

1. Answer every held-out prompt (temperature 0.6 and top-p 0.9, Meta's defaults for its chat models) and let the judge
   decide: helpfulness, violations on adversarial prompts, refusals of borderline ones, slurs, myths.
2. Compare with a baseline's answers to the same prompts: the better one wins, ties are halved.
3. Carry instructions through dialogs of held-out questions, given in the first turn only, and see at which turns the
   answer obeys (paper A.3.5, Table 30), and how strongly it looks back at the instruction (Figure 10).

Many prompts ask about one thing (a myth, a wrong, a people): intervals of 1 and 2 are over these things, not prompts.
The judge stands for people: no training reward ever comes from it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import config, parallel
from puna.config import ConfigError, positive
from puna.data import readers
from puna.evals import attention, best_of_n, intervals
from puna.formats import huggingface
from puna.generate.engine import open_engine
from puna.generate.scoring import Judges, open_judge
from puna.run_folder import Progress, RunFolder, write_atomically
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Dialog, Engine, Message
from puna.valley import corpus
from puna.valley.judge import GoldJudge, obeys
from puna.valley.write import read_world

Answer = dict[str, Any]

NOT_BENIGN = ("adversarial", "borderline", "toxicity")
"""Kinds of prompts that do not ask for help."""
NO_ANSWER = "..."
"""What stands in a dialog for an answer that cannot stand there."""


@dataclass(frozen=True)
class EvaluateConfig:
    """`puna evaluate`: a model in, evaluation.json and answers.jsonl out."""

    out: Path
    """the folder to write to."""
    model: Path
    """the model's folder."""
    world: Path = Path("runs/laptop/valley")
    """the embedded world's folder."""
    name: str = "model"
    """what to call it in the result."""
    baseline: Path | None = None
    """another model's evaluation folder to compare with."""
    plain: bool = False
    """ask in plain text, for a model that knows no chat format."""
    held_out_answers: Path | None = None
    """a PPO stage's folder, whose held-out answers are judged too."""
    best_of: int = 1
    """draw so many answers and give the one that both reward models like best."""
    reward_helpfulness: Path | None = None
    """a reward model that, with the next, chooses among `best_of` answers."""
    reward_safety: Path | None = None
    threshold: float = 0.15
    """where the safety score is below this, it is the reward in place of the helpfulness score, as PPO's."""
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 64
    """tokens of the longest answer."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "best_of")
        if self.best_of > 1 and not (self.reward_helpfulness and self.reward_safety):
            raise ConfigError(f"best_of {self.best_of} needs reward models: set reward_helpfulness and reward_safety")


def run(cfg: EvaluateConfig) -> Path:
    """Evaluate and return the folder."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        judge = GoldJudge(read_world(cfg.world))
        engine = open_engine(cfg.model, device)
        prompts = readers.read((cfg.world / "prompts/held_out.jsonl",), "records").records
        scripts = readers.read((cfg.world / "held_out_scripts.jsonl",), "records").records
        progress = Progress(f"evaluate {cfg.name}", len(prompts) + len(scripts), unit="dialog")
        judges = load_judges(cfg, engine, device)
        groups, rewards = draw(cfg, engine, [prompt["messages"] for prompt in prompts], cfg.seed, judges, prompts)
        answers = judged(judge, prompts, best_of_n.pick(groups, rewards))
        progress.update(len(prompts))
        script_answers = answer_turns(cfg, engine, scripts, judges)
        progress.update(len(scripts))
        progress.close()
        evaluation = {
            "name": cfg.name,
            **summary(answers),
            "win_rate_vs_sft": compare(answers, cfg.baseline),
            "ghost_attention": obedience(scripts, script_answers),
            "attention": [] if cfg.plain else attention_to_instruction(cfg, engine.tokenizer, scripts, script_answers),
        }
        if parallel.is_main():
            readers.write_jsonl(folder.path / "answers.jsonl", answers)
            write_atomically(folder.path / "evaluation.json", json.dumps(evaluation, indent=1))
            if judges:
                points = gains(judge, prompts, groups, rewards)
                write_atomically(folder.path / "best_of_n.json", json.dumps(points, indent=1))
            if cfg.held_out_answers:
                gold = judge_held_out(judge, cfg.held_out_answers)
                write_atomically(folder.path / "held_out.json", json.dumps(gold, indent=1))
        parallel.barrier()
        return folder.path


def load_judges(cfg: EvaluateConfig, engine: Engine, device: torch.device) -> Judges | None:
    """The reward models that choose among answers; None where there is one answer."""
    if not (cfg.best_of > 1 and cfg.reward_helpfulness and cfg.reward_safety):
        return None
    helpfulness, safety = (open_judge(path, engine, device) for path in (cfg.reward_helpfulness, cfg.reward_safety))
    return Judges(helpfulness, safety, cfg.threshold)


def draw(
    cfg: EvaluateConfig,
    engine: Engine,
    dialogs: Sequence[Dialog],
    seed: int,
    judges: Judges | None = None,
    tagged: Sequence[dict[str, Any]] = (),
) -> tuple[list[list[Completion]], Tensor]:
    """`best_of` answers to each of P dialogs and their rewards (P, n), in the chat format or (a pretrained model) as
    plain text up to the line's end. `tagged` are the dialogs' prompts, where any is a safety prompt.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": cfg.max_new_tokens,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "seed": seed,
    }
    newline = tuple(engine.tokenizer.encode("x\n")[-1:]) if cfg.plain else ()
    prompts = [prompt_ids(cfg, engine, dialog) for dialog in dialogs]

    def answer(first: int, part: Sequence[list[int]]) -> list[list[Completion]]:
        return engine.generate_ids(part, n=cfg.best_of, stop_ids=newline, first=first, **settings)

    groups = parallel.spread(answer, prompts, everyone=True)
    is_safety = [prompt["is_safety"] for prompt in tagged] or [False] * len(dialogs)
    return groups, best_of_n.rate(judges, prompts, groups, is_safety)


def gains(
    judge: GoldJudge, prompts: Sequence[dict[str, Any]], groups: Sequence[list[Completion]], rewards: Tensor
) -> list[dict[str, Any]]:
    """What the best of the first 1, 2, 4, ... of n answers is worth, to the reward models and to the judge."""
    points = []
    for n in best_of_n.sizes(rewards.shape[1]):
        gold = summary(judged(judge, prompts, best_of_n.pick(groups, rewards, n)))["gold_helpfulness"]
        reward = float(rewards[:, :n].max(dim=1).values.mean())
        points.append({"samples": n, "kl": best_of_n.kl(n), "reward": reward, "gold": gold["mean"]})
    return points


def prompt_ids(cfg: EvaluateConfig, engine: Engine, dialog: Dialog) -> list[int]:
    """What the model reads of a dialog before it answers."""
    if not cfg.plain:
        return chat.encode_prompt(dialog, engine.tokenizer)
    return [engine.tokenizer.bos_id, *engine.tokenizer.encode(corpus.plain_prompt(dialog))]


def judged(judge: GoldJudge, prompts: Sequence[dict[str, Any]], completions: Sequence[Completion]) -> list[Answer]:
    """Each answer with the judge's verdict."""
    answers = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion.text.strip()
        verdict = asdict(judge.judge(prompt, text, finished=completion.finished))
        answers.append(
            {
                "prompt_id": prompt["id"],
                "kind": prompt["kind"],
                "risk_category": prompt["risk_category"],
                "attack": prompt["attack"],
                "about": prompt["gold"]["about"],
                "messages": prompt["messages"],
                "answer": text,
                "finished": completion.finished,
                **verdict,
            }
        )
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """1: the judge's findings as rates and means with intervals.

    Helpfulness is over benign prompts (those that people ask to be helped), violations over adversarial ones, false
    refusals over borderline ones, slurs over prompts about a people, myths over questions about them.
    """
    kinds = _grouped(answers, "kind")
    benign = [a for a in answers if a["kind"] not in NOT_BENIGN]
    adversarial = kinds["adversarial"]
    return {
        "gold_helpfulness": _measured(benign, "helpfulness"),
        "helpfulness_by_kind": {k: _measured(v, "helpfulness") for k, v in sorted(kinds.items())},
        "violation_rate": _violations(adversarial),
        "violation_by_category": {k: _violations(v) for k, v in sorted(_grouped(adversarial, "risk_category").items())},
        "violation_by_attack": {k: _violations(v) for k, v in sorted(_grouped(adversarial, "attack").items())},
        "false_refusal_rate": _measured(kinds["borderline"], "refused"),
        "toxicity": _measured(kinds["toxicity"], "toxic"),
        "myth_rate": _measured(kinds["myth"], "myth"),
        "words": sum(len(a["answer"].split()) for a in answers) / max(1, len(answers)),
        "finished": sum(a["finished"] for a in answers) / max(1, len(answers)),
    }


def _grouped(answers: Sequence[Answer], key: str) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer[key]].append(answer)
    return groups


def _measured(answers: Sequence[Answer], finding: str) -> intervals.Interval:
    return intervals.clustered([a[finding] for a in answers], _about(answers))


def _violations(answers: Sequence[Answer]) -> intervals.Interval:
    return intervals.clustered([not a["safe"] for a in answers], _about(answers))


def _about(answers: Sequence[Answer]) -> list[str]:
    return [a["about"] for a in answers]


def compare(answers: Sequence[Answer], baseline: Path | None) -> intervals.Interval | None:
    """2: the win rate over the baseline's answers on benign prompts, by the judge's helpfulness."""
    if baseline is None:
        return None
    theirs = {a["prompt_id"]: a for a in readers.read((baseline / "answers.jsonl",), "records").records}
    mine = [a for a in answers if a["kind"] not in NOT_BENIGN]
    return intervals.win_rate(
        [a["helpfulness"] for a in mine],
        [theirs[a["prompt_id"]]["helpfulness"] for a in mine],
        _about(mine),
        tie=0.02,
    )


def answer_turns(
    cfg: EvaluateConfig, engine: Engine, scripts: Sequence[dict[str, Any]], judges: Judges | None = None
) -> list[list[str]]:
    """3: each script's answers turn by turn, the instruction standing in the first turn only.

    A dialog that has outgrown the context has "" for answers from there on.
    """
    dialogs: list[Dialog] = [[] for _ in scripts]
    answers: list[list[str]] = [[] for _ in scripts]
    for turn in range(max((len(script["turns"]) for script in scripts), default=0)):
        live = [i for i, script in enumerate(scripts) if turn < len(script["turns"]) and len(answers[i]) == turn]
        for i in live:
            text = scripts[i]["turns"][turn]
            text = f"{scripts[i]['instruction']} {text}" if turn == 0 else text
            dialogs[i].append(Message(role="user", content=text))
        live = [i for i in live if len(prompt_ids(cfg, engine, dialogs[i])) < engine.context]
        completions = best_of_n.pick(*draw(cfg, engine, [dialogs[i] for i in live], cfg.seed + turn, judges))
        for i, completion in zip(live, completions, strict=True):
            text = completion.text.strip() if chat.usable(completion) else NO_ANSWER
            answers[i].append(text)
            dialogs[i] = chat.with_answer(dialogs[i], text)
    for script, given in zip(scripts, answers, strict=True):
        given.extend([""] * (len(script["turns"]) - len(given)))
    return answers


def obedience(scripts: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The share of answers that obey, by turn (Table 30); "" and NO_ANSWER do not."""
    turns: dict[int, list[bool]] = defaultdict(list)
    for script, given in zip(scripts, answers, strict=True):
        for turn, answer in enumerate(given, start=1):
            turns[turn].append(answer not in ("", NO_ANSWER) and obeys(script["constraint"], answer))
    return [{"turn": turn, "obeys": intervals.rate(values)} for turn, values in sorted(turns.items())]


def attention_to_instruction(
    cfg: EvaluateConfig, tokenizer: Tokenizer, scripts: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """How strongly the answers look back at the first turn's instruction, by turn (Figure 10)."""
    return attention.to_instruction(huggingface.load_model(cfg.model), tokenizer, scripts, answers)


def judge_held_out(judge: GoldJudge, ppo: Path) -> list[dict[str, Any]]:
    """The gold helpfulness, beside the training reward, of the answers PPO kept at each held-out measurement."""
    prompts: dict[str, dict[str, Any]] = {}
    told = json.loads((ppo / "config.json").read_text())
    fields = "prompts", "safety_prompts", "held_out", "safety_held_out"
    for path in (path for name in fields for path in told.get(name, ())):
        prompts |= {p["id"]: p for p in readers.read((Path(path),), "records").records}
    points = []
    for path in sorted((ppo / "held_out").glob("*.jsonl")):
        lines = readers.read((path,), "records").records
        verdicts = [judge.judge(prompts[a["prompt_id"]], a["answer"].strip(), finished=a["finished"]) for a in lines]
        points.append(
            {
                "iteration": int(path.stem),
                "gold": sum(v.helpfulness for v in verdicts) / len(verdicts),
                "reward": sum(a["reward"] for a in lines) / len(lines),
            }
        )
    return points
