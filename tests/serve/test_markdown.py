"""Markdown as elements: what each construct becomes, and that nothing else can come out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.serve import markdown

ALLOWED = {*markdown.TAGS.values(), "pre", "code", "span", "small"}


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("plain", [["p", {}, "plain"]]),
        ("a *b* **c** ~~d~~", [["p", {}, "a ", ["em", {}, "b"], " ", ["strong", {}, "c"], " ", ["s", {}, "d"]]]),
        ("# One\n\ntwo", [["h3", {}, "One"], ["p", {}, "two"]]),
        ("a\nb  \nc", [["p", {}, "a", "\n", "b", ["br", {}], "c"]]),
        ("- a\n- b", [["ul", {}, ["li", {}, "a"], ["li", {}, "b"]]]),
        ("7. a", [["ol", {"start": 7}, ["li", {}, "a"]]]),
        ("`<b>`", [["p", {}, ["code", {}, "<b>"]]]),
        ("```js\n<b>\n```", [["pre", {}, ["code", {}, "<b>\n"]]]),
        ("> a\n\n---", [["blockquote", {}, ["p", {}, "a"]], ["hr", {}]]),
        ("<script>x</script>", [["p", {}, "<script>x</script>"]]),
        ("[a](http://b.c)", [["p", {}, ["span", {"class": "link"}, "a", ["small", {}, " (http://b.c)"]]]]),
        ("![a](http://b.c/d.png)", [["p", {}, ["span", {"class": "link"}, "[image: a]"]]]),
        ("[a](javascript:alert(1))", [["p", {}, "[a](javascript:alert(1))"]]),
        ("", []),
    ],
)
def test_constructs(text: str, nodes: list[Any]) -> None:
    assert markdown.tree(text) == nodes


def test_a_table() -> None:
    [[tag, _, head, body]] = markdown.tree("|a|b|\n|-|-|\n|1|*2*|")
    assert (tag, head) == ("table", ["thead", {}, ["tr", {}, ["th", {}, "a"], ["th", {}, "b"]]])
    assert body == ["tbody", {}, ["tr", {}, ["td", {}, "1"], ["td", {}, ["em", {}, "2"]]]]


def test_marks_that_stand_too_deep_in_each_other_are_text() -> None:
    text = "*a " * 300 + "a* " * 300
    assert markdown.tree(text) == [["p", {}, text]]


def check(nodes: list[Any]) -> None:
    for node in nodes:
        if not isinstance(node, str):
            tag, attributes, *children = node
            assert tag in ALLOWED
            assert set(attributes) <= {"start", "class"}
            check(children)


@given(st.text(st.sampled_from("ab<>[]()!*_`~|#-\n\\&;:/\"'0. \t\x00")))
def test_nothing_else_comes_out(text: str) -> None:
    check(markdown.tree(text))
