"""The chat format: the only file that knows [INST], <<SYS>> and which tokens a loss may count.

Llama 2 (from Meta's reference code; the paper does not print it). Each user/assistant pair is encoded on its own as
`BOS [INST] user [/INST] answer EOS`, with one space on each side of the answer; the system text stands inside the first
user turn between <<SYS>> marks. The tags are ordinary text to the tokenizer, BOS and EOS are ids that no text can
produce, and content that holds a tag is refused.

ChatML, for imported models that were trained on it: `<|im_start|>role NEWLINE content <|im_end|> NEWLINE`, where the
two marks are the tokenizer's BOS and EOS.

The mask is True on the assistant's tokens and on the EOS that ends them: what is trained, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

from puna.config import DataError
from puna.text.tokenizer import Tokenizer
from puna.types import ChatFormat, Completion, Dialog, LossOn, Message

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
MARKERS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")

TEMPLATES: dict[ChatFormat, str] = {
    "llama2": """\
{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}\
{% set turns = messages[1:] if system else messages %}\
{% for turn in turns %}\
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if turn['role'] == 'user' %}\
{% set opening = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.index0 == 0 else '' %}\
{{ bos_token + '[INST] ' + (opening + turn['content']).strip() + ' [/INST]' }}\
{% else %}\
{{ ' ' + turn['content'].strip() + ' ' + eos_token }}\
{% endif %}\
{% endfor %}""",
    "chatml": """\
{% for turn in messages %}\
{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'].strip() + '<|im_end|>' }}\
{% if not loop.last or turn['role'] != 'assistant' %}{{ '\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}
"""The same formats for other programs, as Jinja templates of `messages`, with the tokenizer's bos_token, eos_token."""


class Encoded(NamedTuple):
    """Token ids and, for each, whether the loss counts it."""

    tokens: list[int]
    mask: list[bool]


def encode(dialog: Dialog, tokenizer: Tokenizer, *, loss_on: LossOn = "every_answer") -> Encoded:
    """Encode a dialog that ends with an answer.

    `loss_on="last_answer"` leaves only the final answer counted: Ghost Attention's "loss 0 on all earlier turns" (3.3).
    Raises DataError where roles do not alternate, a turn is empty, or a turn holds a chat tag.
    """
    check(dialog, tokenizer, ends_with="assistant")
    pieces = _pieces(dialog, tokenizer)
    answers = [i for i, (_, counted) in enumerate(pieces) if counted]
    tokens: list[int] = []
    mask: list[bool] = []
    for i, (ids, counted) in enumerate(pieces):
        tokens += ids
        mask += [counted and (loss_on == "every_answer" or i == answers[-1])] * len(ids)
    return Encoded(tokens, mask)


def encode_prompt(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """Encode a dialog that ends with a user turn, up to where the answer begins. Raises DataError as `encode`."""
    check(dialog, tokenizer, ends_with="user")
    return [token for ids, _ in _pieces(dialog, tokenizer) for token in ids]


def check(dialog: Dialog, tokenizer: Tokenizer, *, ends_with: str) -> None:
    """Raise DataError unless the dialog is [system] user (assistant user)* [assistant] with non-empty, clean turns."""
    turns = dialog[1:] if dialog and dialog[0]["role"] == "system" else dialog
    if not turns:
        raise DataError("the dialog is empty: it needs at least one user turn")
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            raise DataError(f"turn {i + 1} is from {turn['role']!r}, expected {expected!r}: roles must alternate")
    if turns[-1]["role"] != ends_with:
        raise DataError(f"the dialog must end with the {ends_with}'s turn, not with {turns[-1]['role']!r}")
    for turn in dialog:
        if not turn["content"].strip():
            raise DataError(f"a {turn['role']} turn is empty")
        marker = marker_in(turn["content"])
        if marker and tokenizer.chat_format == "llama2":
            raise DataError(f"a {turn['role']} turn holds the chat tag {marker!r}: remove it from the text")


def with_answer(dialog: Dialog, text: str) -> Dialog:
    """The dialog with the assistant's turn at its end, in a list of its own."""
    return [*dialog, Message(role="assistant", content=text)]


def fits(dialog: Dialog, tokenizer: Tokenizer, context: int) -> bool:
    """Whether a dialog that ends with a user turn leaves room for an answer. Raises DataError as `encode`."""
    return len(encode_prompt(dialog, tokenizer)) < context


def usable(completion: Completion) -> bool:
    """Whether a sampled answer can stand in a dialog: it ended by itself, holds text, and no chat tag."""
    return completion.finished and bool(completion.text.strip()) and not marker_in(completion.text)


def fits_with_answer(dialog: Dialog, completion: Completion, tokenizer: Tokenizer, context: int) -> bool:
    """Whether a usable answer to the dialog fits the context with it, once its text is encoded anew.

    Text that was sampled up to the context's end may take a token more than was sampled.
    """
    if not usable(completion):
        return False
    return len(encode(with_answer(dialog, completion.text.strip()), tokenizer).tokens) <= context


def marker_in(text: str) -> str | None:
    """The first chat tag that a text holds, None for clean text."""
    return next((marker for marker in MARKERS if marker in text), None)


def _pieces(dialog: Dialog, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The dialog as runs of ids, each with whether it is an answer (its EOS included)."""
    if tokenizer.chat_format == "chatml":
        return _chatml_pieces(dialog, tokenizer)
    return _llama2_pieces(dialog, tokenizer)


def _llama2_pieces(dialog: Dialog, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    system = f"{B_SYS}{dialog[0]['content']}{E_SYS}" if dialog[0]["role"] == "system" else ""
    turns = dialog[1:] if system else dialog
    pieces: list[tuple[list[int], bool]] = []
    for i in range(0, len(turns), 2):
        user = ((system if i == 0 else "") + turns[i]["content"]).strip()  # as one, like Meta's code
        prompt = tokenizer.encode(f"{B_INST} {user} {E_INST}")
        pieces.append(([tokenizer.bos_id, *prompt], False))
        if i + 1 < len(turns):
            # Encoded apart, so that the answer's ids are those a model that reads the prompt's ids would emit;
            # SentencePiece's leading space makes the two halves join as Meta's whole string does.
            answer = tokenizer.encode(f"{turns[i + 1]['content'].strip()} ")
            pieces.append(([*answer, tokenizer.eos_id], True))
    return pieces


def _chatml_pieces(dialog: Dialog, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    pieces: list[tuple[list[int], bool]] = []
    newline = tokenizer.encode("\n")
    for i, turn in enumerate(dialog):
        opening = [tokenizer.bos_id, *tokenizer.encode(f"{turn['role']}\n")]
        content = tokenizer.encode(turn["content"].strip())
        if turn["role"] == "assistant":
            pieces.append((opening, False))
            pieces.append(([*content, tokenizer.eos_id], True))
            if i + 1 < len(dialog):
                pieces.append((newline, False))
        else:
            pieces.append(([*opening, *content, tokenizer.eos_id, *newline], False))
    if dialog[-1]["role"] == "user":
        pieces.append(([tokenizer.bos_id, *tokenizer.encode("assistant\n")], False))
    return pieces
