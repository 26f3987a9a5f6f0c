"""Ghost Attention (paper 3.3, A.3.5): dialogs in which an instruction given once holds to the end.

1. Take the user turns of dialogs of many turns, and an instruction for each dialog: its own, or one made of public
   figures, hobbies and languages that the model itself was asked to list. Some instructions combine two; half are
   shortened ("Figure: Napoleon.").
2. Put the instruction on *every* user turn and let the newest model answer turn by turn.
3. Write the dialog with the instruction on the first turn only, and zero loss on all turns but the last answer.

The result is fine-tuned on together with the round's pool.
Where the paper is silent: dialogs are cut after a random turn, so that the counted answer stands at every depth; how
lists are asked for, an item an answer.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from puna import config, parallel
from puna.config import ConfigError, DataError, positive, within
from puna.data import readers
from puna.data.map_shards import map_shards
from puna.generate.engine import open_engine
from puna.run_folder import Progress, RunFolder, write_atomically
from puna.text import chat
from puna.types import Dialog, Engine, Message


@dataclass(frozen=True)
class GhostAttentionConfig:
    """`puna ghost-attention`: a chat model, user turns and instructions in, dialogs out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the newest chat model."""
    scripts: tuple[Path, ...]
    """JSONL of {"id", "turns": [user texts], "instruction", "short"}."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is not used."""
    short_share: float = 0.5
    """share of dialogs whose first turn holds the instruction's short form (paper: half)."""
    min_turns: int = 2
    """user turns of the shortest cut."""
    invent: tuple[str, ...] = ()
    """kinds of instructions (keys of KINDS) made from lists that the model writes (paper: hobbies, figures); empty
    takes each script's own instruction."""
    invented: int = 32
    """items to keep of a kind's list, and a quarter of the answers asked for it."""
    combined_share: float = 0.25
    """share of dialogs whose invented instruction is of two kinds."""
    shard_size: int = 256
    """dialogs a resumable piece of work."""
    vllm: str = ""
    """the address of a vLLM server to sample on (puna.generate.vllm); empty samples in this process."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "invented", "min_turns", "max_new_tokens", "shard_size")
        within(self, 0, math.inf, "temperature")
        within(self, 0, 1, "short_share", "combined_share")
        unknown = [name for name in self.invent if name not in KINDS]
        if unknown:
            raise ConfigError(f"invent knows no kind {unknown[0]!r}; there are {', '.join(KINDS)}")


class Kind(NamedTuple):
    """A kind of instruction: how the model is asked for an item, and both forms of an instruction with it."""

    question: str
    instruction: str
    short: str


KINDS = {
    "figure": Kind("Name one public figure. Answer with the name alone.", "Always act as {}.", "Figure: {}."),
    "hobby": Kind("Name one hobby. Answer with the hobby alone.", "Answer as one who enjoys {}.", "Hobby: {}."),
    "language": Kind("Name one language. Answer with its name alone.", "Always answer in {}.", "Language: {}."),
}
LONGEST = 5  # words of an item


def run(cfg: GhostAttentionConfig) -> Path:
    """Sample the dialogs and return the folder with dialogs.jsonl."""
    device = parallel.start(cfg.threads)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("ghost_attention"):
            return folder.path
        scripts = read_scripts(cfg.scripts, instructed=not cfg.invent)
        engine = open_engine(cfg.init, device, cfg.vllm)
        if cfg.invent:
            if parallel.is_main() and not (folder.path / "lists.json").exists():
                lists = invent(cfg, engine)
                write_atomically(folder.path / "lists.json", json.dumps(lists, indent=1, ensure_ascii=False))
            parallel.barrier()
            lists = json.loads((folder.path / "lists.json").read_text(encoding="utf-8"))
            scripts = [script | drawn(cfg, lists, random.Random(f"{cfg.seed} {script['id']}")) for script in scripts]
        progress = Progress("ghost attention", len(scripts), unit="dialog")

        def work(number: int, shard: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            rng = random.Random(f"{cfg.seed} {number}")
            cut = [script | {"turns": _cut(script["turns"], cfg.min_turns, rng)} for script in shard]
            answers = sample(cfg, engine, cut, cfg.seed + 100 * number)
            return [
                dialog
                for script, given in zip(cut, answers, strict=True)
                if (dialog := written(script, given, short=rng.random() < cfg.short_share))
            ]

        dialogs = map_shards(work, scripts, cfg.shard_size, folder.path / "parts", progress.update)
        progress.close()
        if parallel.is_main():
            readers.write_jsonl(folder.path / "dialogs.jsonl", dialogs)
        folder.mark_done("ghost_attention", dialogs=len(dialogs), left_out=len(scripts) - len(dialogs))
        parallel.barrier()
        return folder.path


def read_scripts(paths: Sequence[Path], *, instructed: bool = True) -> list[dict[str, Any]]:
    """The scripts of files. Raises DataError where one has no id, no turns or an empty one, or, where they are needed
    (`instructed`), no instruction or no short form of it.
    """
    scripts: list[dict[str, Any]] = []
    for path in paths:
        for number, script in enumerate(readers.read((path,), "records").records, start=1):
            name = f"{path}, script {number} ({script.get('id', 'without an id')})"
            turns = script.get("turns")
            if not isinstance(turns, list) or not turns or not all(map(_holds_text, turns)):
                raise DataError(f"{name}: 'turns' must be a list of one text or more, none of them empty")
            forms = ("instruction", "short") if instructed else ()
            missing = [key for key in forms if not _holds_text(script.get(key))]
            if missing or "id" not in script:
                raise DataError(f"{name}: {(*missing, 'id')[0]!r} is missing")
            scripts.append(script)
    return scripts


def invent(cfg: GhostAttentionConfig, engine: Engine) -> dict[str, list[str]]:
    """1: for each kind that is asked for, what the model lists, each once, in the order in which it said them.

    Raises DataError where it says nothing of use.
    """
    lists = {}
    for number, name in enumerate(cfg.invent):
        (answers,) = engine.generate(
            [[Message(role="user", content=KINDS[name].question)]],
            n=4 * cfg.invented,
            max_new_tokens=cfg.max_new_tokens,
            temperature=1.0,
            seed=cfg.seed + number,
        )
        said = dict.fromkeys(filter(None, (item(answer.text) for answer in answers if chat.usable(answer))))
        if not said:
            raise DataError(f"{cfg.init} lists nothing of the kind {name!r}: leave it out of `invent`")
        lists[name] = list(said)[: cfg.invented]
    return lists


def item(answer: str) -> str:
    """What an answer names: its first line without a bullet or number before it, a stop after, emphasis; "" if long."""
    named = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", answer.strip().split("\n")[0]).strip(" .\"'*_")
    return named if len(named.split()) <= LONGEST else ""


def drawn(cfg: GhostAttentionConfig, lists: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """An instruction of a list's item, in both forms; of two kinds at once in a share of cases."""
    both = len(lists) > 1 and rng.random() < cfg.combined_share
    items = [(KINDS[name], rng.choice(lists[name])) for name in rng.sample(list(lists), 2 if both else 1)]
    return {form: " ".join(getattr(kind, form).format(x) for kind, x in items) for form in ("instruction", "short")}


def _holds_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _cut(turns: Sequence[str], min_turns: int, rng: random.Random) -> Sequence[str]:
    """The first of the turns: a random number of them, at least min_turns where there are so many."""
    return turns[: rng.randint(min(min_turns, len(turns)), len(turns))]


def sample(cfg: GhostAttentionConfig, engine: Engine, scripts: Sequence[dict[str, Any]], seed: int) -> list[list[str]]:
    """2: answer turn by turn, all dialogs side by side, the instruction on every user turn."""
    dialogs: list[Dialog] = [[] for _ in scripts]
    answers: list[list[str]] = [[] for _ in scripts]
    for turn in range(max(len(script["turns"]) for script in scripts)):
        live = [i for i, script in enumerate(scripts) if turn < len(script["turns"]) and len(answers[i]) == turn]
        for i in live:
            dialogs[i].append(
                Message(role="user", content=instructed(scripts[i]["instruction"], scripts[i]["turns"][turn]))
            )
        # A dialog that has outgrown the context ends here, as one whose answer failed.
        live = [i for i in live if chat.fits(dialogs[i], engine.tokenizer, engine.context)]
        completions = engine.generate(
            [dialogs[i] for i in live],
            max_new_tokens=cfg.max_new_tokens,
            top_p=cfg.top_p,
            temperature=cfg.temperature,
            seed=seed + turn,
        )
        for i, (completion,) in zip(live, completions, strict=True):
            if chat.usable(completion):
                answers[i].append(completion.text.strip())
                dialogs[i] = chat.with_answer(dialogs[i], answers[i][-1])
    return answers


def instructed(instruction: str, text: str) -> str:
    """A user turn that carries the instruction."""
    return f"{instruction} {text}"


def written(script: dict[str, Any], answers: Sequence[str], *, short: bool) -> dict[str, Any] | None:
    """3: the training dialog; None where an answer failed on the way."""
    if len(answers) < len(script["turns"]):
        return None
    instruction = script["short"] if short else script["instruction"]
    messages: Dialog = []
    for i, (user, answer) in enumerate(zip(script["turns"], answers, strict=True)):
        messages.append(Message(role="user", content=instructed(instruction, user) if i == 0 else user))
        messages.append(Message(role="assistant", content=answer))
    return {"messages": messages, "loss_on": "last_answer", "id": script["id"], "source": "ghost_attention"}
