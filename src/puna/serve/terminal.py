"""`puna chat`: talk to a model in the terminal, or through a pipe, a question a line.

The answer streams. Ctrl-C stops it, and what was said so far stays; Ctrl-D leaves. When the dialog outgrows the model's
context, its oldest turns are dropped, with a notice.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puna import api
from puna.api import Chat
from puna.config import ConfigError, DataError
from puna.data import readers
from puna.generate.sampling import Sampling
from puna.text import chat as chat_format
from puna.text.printable import printable
from puna.types import Dialog

HELP = """\
/system TEXT   set the system message; without TEXT, remove it
/undo          take back the last question and its answer
/reset         forget the dialog, keep the system message
/save FILE     append the dialog to a JSONL file, ready for puna sft
/help          show this
/quit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class ChatConfig:
    """`puna chat`: a run or a model, and how it answers."""

    path: Path
    """a run folder, a model folder or a .gguf file."""
    system: str = ""
    """the system message."""
    temperature: float = 0.6
    """as Meta's reference code; 0 is greedy."""
    top_p: float = 0.9
    """as Meta's reference code."""
    max_new_tokens: int = 256
    """tokens an answer at most."""
    seed: int = 0
    """the same questions get the same answers again."""
    weights: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """how the model is held: the smaller, the faster and the less exact."""


@dataclass
class Session:
    """The dialog so far: its turns alternate and end with an answer."""

    cfg: ChatConfig
    chat: Chat
    system: str
    turns: Dialog = field(default_factory=list)

    def dialog(self) -> Dialog:
        return [{"role": "system", "content": self.system}, *self.turns] if self.system.strip() else list(self.turns)


def run(cfg: ChatConfig) -> None:
    """Answer until the input ends or /quit."""
    Sampling(cfg.temperature, cfg.top_p, max_new_tokens=cfg.max_new_tokens)  # refuses what none can be drawn with
    loaded = api.load(cfg.path, weights=cfg.weights)
    if not isinstance(loaded, Chat):
        raise ConfigError(f"{cfg.path} is a reward model, which gives scores: name a chat model")
    if tag := chat_format.marker_in(cfg.system):
        raise ConfigError(f"--system holds the chat tag {tag!r}: remove it from the text")
    session = Session(cfg, loaded, cfg.system)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its history and editing keys
        print(f"{cfg.path}: ask away; /help lists the commands.")
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if line == "/quit":
            break
        if line.startswith("/"):
            print(command(session, line))
        elif line:
            answer(session, line)


def command(session: Session, line: str) -> str:
    """Carry out a command; what to tell the user."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/help":
            return HELP
        case "/system":
            session.system = argument
            return "(the system message is set)" if argument else "(no system message)"
        case "/undo":
            del session.turns[-2:]
            return f"({len(session.turns) // 2} questions left)"
        case "/reset":
            session.turns.clear()
            return "(the dialog is empty)"
        case "/save":
            return save(session, argument)
    return f"error: no command {name}; /help lists them"


def save(session: Session, file: str) -> str:
    """Append the dialog to a JSONL file."""
    if not file or not session.turns:
        return "error: /save needs a file name" if session.turns else "error: there is nothing to save yet"
    try:
        with Path(file).expanduser().open("a", encoding="utf-8") as out:
            out.write(json.dumps(readers.to_record(session.dialog()), ensure_ascii=False) + "\n")
    except OSError as error:
        return f"error: {file}: {error.strerror}"
    except (RuntimeError, ValueError) as error:  # a home that nobody has; a name that no file can have
        return f"error: {file}: {error}"
    return f"(saved to {file})"


def answer(session: Session, question: str) -> None:
    """Stream the answer to a question. The turn is kept once it has some text; a refused question leaves no trace."""
    cfg, before = session.cfg, list(session.turns)
    session.turns.append({"role": "user", "content": question})
    said = ""
    try:
        drop_oldest_turns(session)
        pieces = session.chat.stream(
            session.dialog(), cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed + len(before) // 2, goes_on=True
        )
        for piece in pieces:
            print(printable(piece), end="", flush=True)
            said += piece
        print("" if said else "(no answer)")
    except KeyboardInterrupt:
        print(" (stopped)")
    except (ConfigError, DataError) as error:
        print(f"error: {error}")
    if said.strip():
        session.turns.append({"role": "assistant", "content": said.strip()})
    else:
        session.turns[:] = before


def drop_oldest_turns(session: Session) -> None:
    """Forget the oldest questions until the rest leaves room for an answer (a quarter of the context is enough)."""
    context = session.chat.model.config.max_seq_len
    room = min(session.cfg.max_new_tokens, context // 4)
    dropped = 0
    while len(session.turns) > 1 and len(_prompt(session)) + room > context:
        del session.turns[:2]
        dropped += 1
    if dropped and len(_prompt(session)) < context:
        print(f"(the dialog is longer than the model's context of {context} tokens: {dropped} old turns are forgotten)")


def _prompt(session: Session) -> list[int]:
    return chat_format.encode_prompt(session.dialog(), session.chat.tokenizer)
