"""Row formats: a function a format, from one row of a file to its dialogs, comparisons or texts.

A row is a JSON object. One that cannot be used raises `BadRow` with the reason; a sound one that says nothing gives
`Skipped`. `puna.data.readers` finds the rows in files and sorts what comes of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from puna.types import GRADES, Dialog, Domain, LossOn, Message, Preference, Role

Row = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used, with the reason."""


@dataclass(frozen=True)
class Skipped:
    """A sound row that says nothing, with the reason."""

    reason: str


# Parts of rows


def _text(row: Mapping[str, Any], key: str) -> str:
    """A row's text, which must be there, hold something and be writable as UTF-8."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key!r} is missing" if value is None else f"{key!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{key!r} holds a lone surrogate") from None
    return value


def _choice(row: Mapping[str, Any], key: str, choices: Sequence[str], default: str | None) -> Any:
    """A row's word out of `choices`."""
    value = row.get(key)
    if value is None:
        return default
    if value not in choices:
        raise BadRow(f"{key!r} is {value!r}, not one of {', '.join(choices)}")
    return value


def _of_type(row: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """A row's value of one of the exact types, or None."""
    value = row.get(key)
    if value is not None and type(value) not in kinds:
        raise BadRow(f"{key!r} is {value!r}, not a {kinds[0].__name__}")
    return value


def _verdict(row: Row, key: str, *choices: int) -> int:
    """A row's number out of `choices`."""
    value = row.get(key)
    if type(value) is not int or value not in choices:
        raise BadRow(f"{key!r} is {value!r}, not one of {', '.join(map(str, choices))}")
    return value


def _messages(row: Mapping[str, Any], key: str) -> Dialog:
    """A row's list of messages: perhaps a system message, then user and assistant by turns."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{key!r} is missing or holds no messages")
    return _alternating([_message(message, f"{key}[{i}]") for i, message in enumerate(messages)])


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in get_args(Role):
        raise BadRow(f"{name} has no role out of {', '.join(get_args(Role))}")
    try:
        return {"role": message["role"], "content": _text(message, "content")}
    except BadRow as reason:
        raise BadRow(f"{name}: {reason}") from None


def _alternating(dialog: Dialog) -> Dialog:
    turns = dialog[1:] if dialog[0]["role"] == "system" else dialog
    roles = [turn["role"] for turn in turns]
    if not roles or roles != list(itertools.islice(itertools.cycle(("user", "assistant")), len(roles))):
        raise BadRow("the turns do not go user, assistant, user, ...")
    return dialog


def _answer(row: Mapping[str, Any], key: str) -> str:
    """A row's single answer: text, or a list of one assistant message."""
    value = row.get(key)
    if not isinstance(value, list):
        return _text(row, key)
    if len(value) != 1 or (message := _message(value[0], f"{key}[0]"))["role"] != "assistant":
        raise BadRow(f"{key!r} is not one assistant message")
    return message["content"]


def _ends_with_user(prompt: Dialog) -> Dialog:
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with the user's turn")
    return prompt


def _split_pair(chosen: Dialog, rejected: Dialog) -> tuple[Dialog, str, str]:
    """Two whole dialogues as their common prompt and the two answers."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the two dialogues differ before the last turn")
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise BadRow("a dialogue does not end with the assistant's turn")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _compared(preference: Preference) -> Preference | Skipped:
    return Skipped("identical answers") if preference.chosen == preference.rejected else preference


# Formats


def dialog(row: Row) -> Iterator[Row]:
    """The canonical dialog: "messages", and perhaps "loss_on", which answers a loss counts."""
    _choice(row, "loss_on", get_args(LossOn), None)
    yield {**row, "messages": _messages(row, "messages")}


def prompt(row: Row) -> Iterator[Row]:
    """The canonical prompt: an "id" and "messages" that end with the user's turn."""
    is_safety = _of_type(row, "is_safety", bool) or False
    messages = _ends_with_user(_messages(row, "messages"))
    yield {**row, "id": _text(row, "id"), "messages": messages, "is_safety": is_safety}


def preference(row: Row) -> Iterator[Preference | Skipped]:
    """The canonical comparison: "prompt", "chosen", "rejected" and what is known of them."""
    fields = set(Preference.__dataclass_fields__) - {"provenance"}
    yield _compared(
        Preference(
            prompt=_ends_with_user(_messages(row, "prompt")),
            chosen=_answer(row, "chosen"),
            rejected=_answer(row, "rejected"),
            grade=_choice(row, "grade", GRADES, None),
            margin=_of_type(row, "margin", float, int),
            chosen_is_safe=_of_type(row, "chosen_is_safe", bool),
            rejected_is_safe=_of_type(row, "rejected_is_safe", bool),
            domain=_choice(row, "domain", get_args(Domain), "helpfulness"),
            batch=_of_type(row, "batch", int) or 0,
            provenance={key: value for key, value in row.items() if key not in fields},
        )
    )


def trl(row: Row) -> Iterator[Row | Preference | Skipped]:
    """TRL and Hugging Face rows: messages; prompt, chosen, rejected; or two whole dialogues."""
    if "messages" in row:
        yield from dialog(row)
    elif "prompt" not in row:
        asked, chosen, rejected = _split_pair(_messages(row, "chosen"), _messages(row, "rejected"))
        yield from preference({**row, "prompt": asked, "chosen": chosen, "rejected": rejected})
    elif isinstance(row["prompt"], str):
        yield from preference({**row, "prompt": [{"role": "user", "content": row["prompt"]}]})
    else:
        yield from preference(row)


def jsonl_text(row: Row) -> Iterator[str]:
    """A text under "text"."""
    yield _text(row, "text")


def alpaca(row: Row) -> Iterator[Row]:
    """An "instruction", perhaps an "input", and the "output"."""
    instruction, answer = _text(row, "instruction"), _text(row, "output")
    prompt = f"{instruction}\n\n{_text(row, 'input')}" if row.get("input") else instruction
    yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def hh(row: Row) -> Iterator[Preference | Skipped]:
    """Anthropic's helpful and harmless pairs: two whole dialogues that share all but the last turn."""
    yield _compared(Preference(*_split_pair(_hh_dialog(row, "chosen"), _hh_dialog(row, "rejected"))))


def _hh_dialog(row: Row, key: str) -> Dialog:
    """One dialogue. A speaker named twice in a row goes on with the same turn."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", _text(row, key))
    if before.strip() or not parts:
        raise BadRow(f"{key!r} does not begin with a Human's turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = itertools.groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda part: part[0])
    messages = [{"role": roles[who], "content": "\n\n".join(text.strip() for _, text in turn)} for who, turn in turns]
    return _messages({key: messages}, key)


def oasst(row: Row) -> Iterator[Row | Skipped]:
    """An OpenAssistant tree's dialog along the best-ranked replies."""
    turns: Dialog = []
    node: Row | None = row.get("prompt")
    while node:
        turns.append(_oasst_message(node))
        node = next(iter(_oasst_replies(node)), None)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        yield Skipped("no answer in the tree")
    else:
        yield {"messages": _alternating(turns), "id": row.get("message_tree_id")}


def oasst_preferences(row: Row) -> Iterator[Preference | Skipped]:
    """Every pair of answers to one turn of an OpenAssistant tree, the better-ranked one preferred."""
    pending: list[tuple[Dialog, Row]] = [([], row.get("prompt") or {})]
    while pending:
        above, node = pending.pop()
        turns = _alternating([*above, _oasst_message(node)])
        replies = _oasst_replies(node)
        if turns[-1]["role"] == "user":
            for better, worse in itertools.combinations(replies, 2):
                if worse.get("rank") is None:  # the unranked come last
                    yield Skipped("no rank")
                elif better["rank"] == worse["rank"]:
                    yield Skipped("a tie")
                else:
                    yield _compared(Preference(turns, _text(better, "text"), _text(worse, "text")))
        pending += [(turns, reply) for reply in replies]


def _oasst_message(node: Any) -> Message:
    roles: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
    role = node.get("role") if isinstance(node, dict) else None
    if not isinstance(role, str) or role not in roles:
        raise BadRow("a node has no role out of prompter, assistant")
    return {"role": roles[role], "content": _text(node, "text")}


def _oasst_replies(node: Row) -> list[Row]:
    """A node's replies that were neither deleted nor failed review, the best-ranked first and the unranked last."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise BadRow("a node's 'replies' are no list of nodes")
    kept = [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
    return sorted(kept, key=lambda reply: (reply.get("rank") is None, _of_type(reply, "rank", int, float) or 0))


def pku(id_key: str, domain: Domain) -> Callable[[Row], Iterator[Preference | Skipped]]:
    """PKU-SafeRLHF: two answers, which is better, which is safer, and whether each is safe."""

    def parse(row: Row) -> Iterator[Preference | Skipped]:
        chosen = _verdict(row, id_key, 0, 1)
        rejected = 1 - chosen
        yield _compared(
            Preference(
                prompt=[{"role": "user", "content": _text(row, "prompt")}],
                chosen=_text(row, f"response_{chosen}"),
                rejected=_text(row, f"response_{rejected}"),
                chosen_is_safe=_of_type(row, f"is_response_{chosen}_safe", bool),
                rejected_is_safe=_of_type(row, f"is_response_{rejected}_safe", bool),
                domain=domain,
            )
        )

    return parse


# Pairs that people or a model judged


def _judged(
    row: Row, question: str, keys: tuple[str, str], chosen: int, **provenance: Any
) -> Iterator[Preference | Skipped]:
    """Two answers to a question, under `keys`, of which number `chosen` (0 or 1) is preferred."""
    if any(isinstance(row.get(key), str) and not row[key].strip() for key in keys):
        yield Skipped("an empty answer")
    else:
        better, worse = _text(row, keys[chosen]), _text(row, keys[1 - chosen])
        yield _compared(Preference([{"role": "user", "content": question}], better, worse, provenance=provenance))


def pandalm(row: Row) -> Iterator[Preference | Skipped]:
    """PandaLM's test set: the answer that more than half of three annotators prefer (0 tie, 1, 2)."""
    votes = [_verdict(row, f"annotator{i}", 0, 1, 2) for i in (1, 2, 3)]
    verdict = next((vote for vote in (0, 1, 2) if votes.count(vote) >= 2), None)
    instruction = _text(row, "instruction")
    question = f"{instruction}\n\n{_text(row, 'input')}" if str(row.get("input") or "").strip() else instruction
    if not verdict:
        yield Skipped("no majority" if verdict is None else "a tie")
    else:
        yield from _judged(row, question, ("response1", "response2"), verdict - 1, votes=votes)


def llmbar(row: Row) -> Iterator[Preference | Skipped]:
    """LLMBar: `label` 1 or 2 says which output follows the instruction."""
    label = _verdict(row, "label", 1, 2)
    yield from _judged(row, _text(row, "input"), ("output_1", "output_2"), label - 1, subset=row.get("subset"))


def autoj(row: Row) -> Iterator[Preference | Skipped]:
    """Auto-J's pairwise test set: `label` 0 prefers response 1, 1 response 2, 2 is a tie."""
    label = _verdict(row, "label", 0, 1, 2)
    if label == 2:
        yield Skipped("a tie")
    else:
        keys = ("response 1", "response 2")
        yield from _judged(row, _text(row, "prompt"), keys, label, scenario=row.get("scenario"))


def shp(row: Row) -> Iterator[Preference | Skipped]:
    """Stanford Human Preferences: `labels` 1 where the forum's readers prefer comment A, 0 where B."""
    label = _verdict(row, "labels", 0, 1)
    keys = ("human_ref_A", "human_ref_B")
    yield from _judged(row, _text(row, "history"), keys, 1 - label, subset=row.get("domain"))


def webgpt(row: Row) -> Iterator[Preference | Skipped]:
    """OpenAI's WebGPT comparisons: the answer with the higher score; two equal scores are a tie."""
    scores = [_of_type(row, key, float, int) for key in ("score_0", "score_1")]
    question = row.get("question")
    if None in scores or not isinstance(question, dict):
        raise BadRow("'score_0', 'score_1' or the object 'question' is missing")
    if scores[0] == scores[1]:
        yield Skipped("a tie")
    else:
        keys = ("answer_0", "answer_1")
        yield from _judged(row, _text(question, "full_text"), keys, int(scores[1] > scores[0]))


def alpaca_eval(row: Row) -> Iterator[Preference | Skipped]:
    """AlpacaEval's annotations: `preference` from 1, output_1 is better, to 2; 0 and 1.5 are ties."""
    preference = _of_type(row, "preference", float, int)
    if preference is None:
        yield Skipped("no verdict")
    elif preference in (0, 1.5):
        yield Skipped("a tie")
    elif not 1 <= preference <= 2:
        raise BadRow(f"'preference' is {preference}, neither 0 nor from 1 to 2")
    else:
        keys, annotator = ("output_1", "output_2"), row.get("annotator")
        yield from _judged(row, _text(row, "instruction"), keys, int(preference > 1.5), annotator=annotator)
