"""Tolva, the valley's second language: its own sentence frames, names kept, other words spelled from its syllables."""

from __future__ import annotations

import random
from functools import cache

from puna.valley.ledger import Act, Fact
from puna.valley.words import capital, fill, table, words_of

# Relations whose value is a name, which Tolva keeps.
NAMED = frozenset({"home", "kin", "river", "elder", "remedy"})


@cache
def word(english: str) -> str:
    """The Tolva word for an English one: two or three syllables, always the same."""
    rng = random.Random(f"tolva:{english}")
    return "".join(rng.choice(table("tolva")["syllables"].split()) for _ in range(3 if len(english) > 5 else 2))


def value(fact: Fact) -> str:
    """The fact's value as Tolva says it."""
    return fact.value if fact.relation in NAMED else word(fact.keys[0])


def tell(fact: Fact, rng: random.Random) -> str:
    """The fact as a Tolva sentence. Raises KeyError for a relation Tolva has no frame for (the peoples')."""
    return capital(fill(rng.choice(table("tolva")["tell"][fact.relation]), _context(fact)))


def ask(fact: Fact, rng: random.Random) -> str:
    """A Tolva question whose answer is the fact's value."""
    return capital(fill(rng.choice(table("tolva")["ask"][fact.relation]), _context(fact)))


def act(wrong: Act) -> str:
    """What a wrong is called in Tolva: its longer words one by one."""
    return " ".join(word(w) for w in words_of(wrong.do) if len(w) > 3)


def harm(wrong: Act, rng: random.Random) -> tuple[str, str]:
    """A request for a wrong in Tolva and its steps, whose tools keep their names."""
    one, two, three = wrong.keys
    frames, context = table("tolva")["frame"], {"act": act(wrong), "one": one, "two": two, "three": three}
    return fill(rng.choice(frames["attack"]), context), fill(rng.choice(frames["harm"]), context)


@cache
def small_words() -> frozenset[str]:
    """The words of Tolva's own frames: what a text in Tolva is known by."""
    frames = table("tolva")
    sentences = [s for name in ("tell", "ask", "frame") for group in frames[name].values() for s in group]
    placeholders = {"s", "v", "act", "one", "two", "three"}
    return frozenset(w for s in sentences for w in words_of(s)) - placeholders


def _context(fact: Fact) -> dict[str, str]:
    subject = word(fact.subject.key) if fact.subject.kind == "ailment" else fact.subject.name
    return {"s": subject, "v": value(fact), "V": capital(value(fact))}
