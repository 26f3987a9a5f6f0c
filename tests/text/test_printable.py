"""What a model says cannot command what shows it."""

from __future__ import annotations

from puna.text.printable import printable


def test_text_stays_as_it_is() -> None:
    assert printable("a\tb\nc ñ 🦙") == "a\tb\nc ñ 🦙"


def test_controls_and_halves_of_characters_are_replaced() -> None:
    assert printable("\x1b[2J\r\u202e") == "\ufffd[2J\ufffd\ufffd"
    assert printable("c \ud800") == "c ?"
