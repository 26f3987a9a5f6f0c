"""Cells stand under each other."""

from __future__ import annotations

from puna.text.columns import columns


def test_the_first_column_to_the_left_the_others_to_the_right() -> None:
    assert columns([("name", "n", ""), ("a", "12345", ""), ("longer", "1", "x")]) == (
        "name        n\na       12345\nlonger      1  x"
    )
