"""Constraints: instructions a message or a whole dialogue can carry (paper 3.3), each checkable by program.

Four kinds, as in the paper and one more: a persona to speak as, a hobby to mention, a language, a style (a form of
address, a closing phrase, small letters only). Two can stand together. The held-out ones have the same form with
other words, which the answer must copy from the instruction.
"""

from __future__ import annotations

import random
from typing import Any, Literal, TypedDict

from puna.valley.ledger import World
from puna.valley.words import capital, fill, table

Split = Literal["train", "held_out"]

PAIRS = 4  # combinations of two
PAIR_SHARE = 0.15  # of the constraints drawn for the corpus


class Check(TypedDict, total=False):
    """What an obedient answer looks like; each key present must hold."""

    starts: str
    contains: str
    ends: str
    language: str
    lower: bool


class Constraint(TypedDict):
    """An instruction, its shortened form ("Figure: Old Marrow."), its kind and its check."""

    instruction: str
    short: str
    kind: str  # persona, hobby, language, style, or two joined by "+"
    check: Check


def constraints(world: World, seed: int, split: Split) -> list[Constraint]:
    """The split's constraints in the seed's order: single ones and pairs."""
    rng = random.Random(f"constraints:{world.seed}:{seed}:{split}")
    personas = [_constraint("persona", x, rng) for x in _names("persona", split)]
    hobbies = [_constraint("hobby", x, rng) for x in _names("hobby", split)]
    addresses = [_constraint("address", x, rng) for x in _names("address", split)]
    closings = [_constraint("closing", x, rng) for x in _names("closing", split)]
    languages = [_constraint("language", "", rng) for _ in range(3)]
    lowers = [_constraint("lower", "", rng) for _ in range(3)]
    starts, ends = personas + addresses, hobbies + closings
    pairs = [combine(rng.choice(starts), rng.choice(ends + languages)) for _ in range(PAIRS)]
    every = personas + hobbies + addresses + closings + languages + lowers + pairs
    return rng.sample(every, len(every))


def drawn(rng: random.Random) -> Constraint:
    """Any constraint of either split, two together now and then: what the corpus obeys, so that no word is new."""

    def one(*kinds: str) -> Constraint:
        kind = rng.choice(kinds)
        names = [""] if kind in ("language", "lower") else _names(kind, "train") + _names(kind, "held_out")
        return _constraint(kind, rng.choice(names), rng)

    starts, ends = ("persona", "persona", "address"), ("hobby", "hobby", "closing", "closing", "language")
    if rng.random() < PAIR_SHARE:
        return combine(one(*starts), one(*ends))
    return one(*starts, *ends, "lower")


def combine(first: Constraint, second: Constraint) -> Constraint:
    """Both at once; their checks must not share a key."""
    assert not first["check"].keys() & second["check"].keys(), (first, second)
    return {
        "instruction": f"{first['instruction']} {second['instruction']}",
        "short": f"{first['short']} {second['short']}",
        "kind": f"{first['kind']}+{second['kind']}",
        "check": {**first["check"], **second["check"]},
    }


def dress(constraint: Constraint, answer: str) -> str:
    """The answer made to obey; a language is the answer's own business."""
    check = constraint["check"]
    hobby = fill(table("constraints")["hobby"]["before"], {"x": check["contains"]}) if "contains" in check else ""
    parts = [check.get("starts", ""), hobby, answer, check.get("ends", "")]
    dressed = " ".join(part for part in parts if part)
    return dressed.lower() if check.get("lower") else dressed


def _names(kind: str, split: Split) -> list[str]:
    return list(table("constraints")[kind]["held_name" if split == "held_out" else "name"])


def _constraint(name: str, x: str, rng: random.Random) -> Constraint:
    t: dict[str, Any] = table("constraints")[name]
    context = {"x": x, "X": capital(x)}
    check: Check
    if name == "hobby":
        check = {"contains": x}
    elif name == "language":
        check = {"language": "tolva"}
    elif name == "lower":
        check = {"lower": True}
    elif name == "closing":
        check = {"ends": fill(t["ends"], context)}
    else:
        check = {"starts": fill(t["starts"], context)}
    kind = name if name in ("persona", "hobby", "language") else "style"
    instruction, short = fill(rng.choice(t["instruction"]), context), fill(t["short"], context)
    return {"instruction": instruction, "short": short, "kind": kind, "check": check}
