"""Text that comes token by token is the text of all tokens, and a stop text never shows."""

from __future__ import annotations

import pytest

from puna.generate.sequence import TextStream
from tests import helpers


def decode(ids: object) -> str:
    return bytes(ids).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


def pieces(text: str, *stop: str) -> list[str]:
    stream = TextStream(decode, stop)
    said = []
    for byte in text.encode():
        said.append(stream.push([byte]))
        if stream.stopped:
            return said
    return [*said, stream.push([], last=True)]


def test_half_a_character_is_held_back() -> None:
    assert pieces("aé🦙") == ["a", "", "é", "", "", "", "🦙", ""]
    broken = TextStream(decode)
    assert [broken.push([0xF0]), broken.push([], last=True)] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("one. two", ["."], "one"),
        ("one END two", ["END"], "one "),
        ("one EN two EEND", ["END"], "one EN two E"),
        ("abcabd", ["abd", "zz"], "abc"),
        ("xyz", ["yz", "xy"], ""),
        ("nothing", ["stop"], "nothing"),
        ("almost st", ["stop"], "almost st"),
    ],
)
def test_a_stop_text_ends_the_text_before_it(text: str, stop: list[str], said: str) -> None:
    assert "".join(pieces(text, *stop)) == said


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    assert pieces("a<b<<", "<<") == ["a", "", "<b", "", ""]


def test_a_tokenizers_spaces_survive() -> None:
    tokenizer = helpers.tokenizer()
    text = "the llama crosses the cold river. 7 tents é"
    stream = TextStream(tokenizer.decode)
    ids = tokenizer.encode(text)
    assert "".join(stream.push([i]) for i in ids) + stream.push([], last=True) == text
