"""Markdown as a tree that a page can build without reading HTML.

A node is a string, or `[tag, attributes, child, ...]`. The page makes an element of each node, so that nothing a model
writes is ever parsed as HTML. Raw HTML stays text, an image is its description, and a link is its words with the
address beside them: nothing is fetched, and nothing can be clicked.
"""

from __future__ import annotations

import functools
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

TAGS = {
    "paragraph": "p",
    "heading": "h3",
    "strong": "strong",
    "em": "em",
    "s": "s",
    "blockquote": "blockquote",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
    "table": "table",
    "thead": "thead",
    "tbody": "tbody",
    "tr": "tr",
    "th": "th",
    "td": "td",
    "hr": "hr",
    "hardbreak": "br",
}
"""What markdown-it calls an element -> the page's tag. Headings are all alike: a page has its own order of them."""
CODE = ("code_inline", "code_block", "fence")

Node = str | list[Any]


@functools.cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def tree(text: str) -> list[Node]:
    """The nodes of a text, in order; one paragraph where its marks stand hundreds deep in each other."""
    try:
        return _children(SyntaxTreeNode(_parser().parse(text)))
    except RecursionError:
        return [["p", {}, text]]


def _children(node: SyntaxTreeNode) -> list[Node]:
    return [made for child in node.children for made in _made(child)]


def _made(node: SyntaxTreeNode) -> list[Node]:
    """A node, or, where it has no element of its own, its children."""
    if node.type == "softbreak":
        return ["\n"]
    if node.type in CODE:
        code: Node = ["code", {}, node.content]
        return [code] if node.type == "code_inline" else [["pre", {}, code]]
    if node.type == "link":
        return [["span", {"class": "link"}, *_children(node), ["small", {}, f" ({node.attrs.get('href', '')})"]]]
    if node.type == "image":
        return [["span", {"class": "link"}, f"[image: {node.content}]"]]
    if node.type in TAGS:
        start = {"start": int(node.attrs["start"])} if "start" in node.attrs else {}
        if node.type == "paragraph" and node.hidden:  # of a tight list
            return _children(node)
        return [[TAGS[node.type], start, *_children(node)]]
    return _children(node) or ([node.content] if node.content else [])
