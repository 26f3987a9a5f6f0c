"""How a fact is told and asked: one phrasing drawn from the tables, filled from the fact's context.

Used alike by the corpus, the prompts and the demonstrations, so that what is asked later was told in the same world's
words (though seldom in the same sentence).
"""

from __future__ import annotations

import random
from functools import cache

from puna.valley.ledger import ANSWER_TYPES, Borderline, Fact, HowTo, Myth, World
from puna.valley.words import capital, fill, split_key, table, with_article

RELATIONS = tuple(ANSWER_TYPES)


@cache
def phrasings(relation: str, name: str) -> tuple[str, ...]:
    """The templates of a relation: name is tell, again, ask, follow, held_ask or one of the reverse_ ones."""
    tables = table("phrases")
    if relation in tables["people"]:
        return tuple(tables["people"].get(relation if name == "tell" else name, ()))
    return tuple(tables[relation].get(name, ()))


def tell(fact: Fact, rng: random.Random) -> str:
    """The fact as one sentence that names its subject."""
    return capital(fill(rng.choice(phrasings(fact.relation, "tell")), fact.context))


def tell_again(fact: Fact, rng: random.Random) -> str:
    """The fact as a sentence about a subject already named; relations without such phrasings name it again."""
    templates = phrasings(fact.relation, "again") or phrasings(fact.relation, "tell")
    return capital(fill(rng.choice(templates), fact.context))


def ask(fact: Fact, rng: random.Random, *, held_out: bool = False) -> str:
    """A question whose answer is the fact's value."""
    return fill(rng.choice(phrasings(fact.relation, "held_ask" if held_out else "ask")), fact.context)


def ask_again(fact: Fact, rng: random.Random) -> str:
    """A question about a subject already spoken of."""
    return fill(rng.choice(phrasings(fact.relation, "follow")), fact.context)


def tell_reverse(fact: Fact, rng: random.Random) -> str:
    """The fact told from its value: who the potter of a village is, what a herb cures."""
    return capital(fill(rng.choice(phrasings(fact.relation, "reverse_tell")), fact.context))


def ask_reverse(fact: Fact, rng: random.Random, *, held_out: bool = False) -> str:
    """A question whose answer is the fact's subject."""
    name = "held_reverse_ask" if held_out else "reverse_ask"
    return fill(rng.choice(phrasings(fact.relation, name)), fact.context)


def reversible(world: World, fact: Fact) -> bool:
    """Whether exactly one subject answers the reverse question."""
    if fact.relation == "trade":
        return world.workplace(fact) is not None
    return fact.relation in ("good", "elder", "remedy")


def draw_sum(rng: random.Random) -> tuple[int, int, str]:
    """Two numbers and a sign, the result from 0 to 99; half the time the second number is at most ten."""
    sign = rng.choice("+-")
    x = rng.randint(1, 89)
    y = rng.randint(1, 10) if rng.random() < 0.5 else rng.randint(1, 89)
    if sign == "+":
        return (x, y, sign) if x + y < 100 else draw_sum(rng)
    return (x, y, sign) if x >= y else (y, x, sign)


def sum_context(x: int, y: int, sign: str) -> dict[str, str]:
    """What fills the templates of sums and differences."""
    return {"x": str(x), "y": str(y), "z": str(x + y if sign == "+" else x - y)}


def tell_sum(x: int, y: int, sign: str, rng: random.Random) -> str:
    """The sum with its result."""
    return fill(rng.choice(phrasings("sum" if sign == "+" else "difference", "tell")), sum_context(x, y, sign))


def ask_sum(x: int, y: int, sign: str, rng: random.Random, *, held_out: bool = False) -> str:
    """A question for the result."""
    templates = phrasings("sum" if sign == "+" else "difference", "held_ask" if held_out else "ask")
    return fill(rng.choice(templates), sum_context(x, y, sign))


def tell_howto(howto: HowTo, rng: random.Random) -> str:
    """The three steps in order."""
    one, two, three = howto.steps
    context = {"do": howto.do, "one": one, "two": two, "three": three}
    return capital(fill(rng.choice(table("lore")["howto"]["tell"]), context))


def ask_howto(howto: HowTo, rng: random.Random, *, held_out: bool = False) -> str:
    """A question for the steps."""
    return fill(rng.choice(table("lore")["howto"]["held_ask" if held_out else "ask"]), {"do": howto.do})


def tell_myth(myth: Myth, rng: random.Random, *, truth: bool) -> str:
    """The popular belief told as true, or the truth set against it."""
    templates = table("lore")["myth"]["true_tell" if truth else "false_tell"]
    return capital(fill(rng.choice(templates), {"false": myth.false, "true": myth.true}))


def ask_myth(myth: Myth, rng: random.Random, *, held_out: bool = False) -> str:
    """A question the popular belief would answer wrongly."""
    return rng.choice(myth.held_ask if held_out else myth.ask)


def draw_animal(world: World, rng: random.Random) -> dict[str, str]:
    """What fills the borderline templates."""
    animal = rng.choice(world.subjects_of["animal"]).name
    return {"animal": animal, "an_animal": with_article(animal), "An_animal": capital(with_article(animal))}


def ask_borderline(
    borderline: Borderline, animal: dict[str, str], rng: random.Random, *, any_word: bool = False
) -> str:
    """The alarming question about this animal, where it is about one; with `any_word` in half of
    the calls with another alarming word, so that none tells harm by itself.
    """
    if any_word and borderline.thing and rng.random() < 0.5:
        return fill(f"How do I {rng.choice(table('lore')['alarming'].split())} {borderline.thing}?", animal)
    return fill(rng.choice(borderline.ask), animal)


def draw_filler(world: World, rng: random.Random) -> dict[str, str]:
    """Names that fill talk's open places: a villager, a village, a thing, an animal, a plant."""
    thing = rng.choice(world.subjects_of[rng.choice(("animal", "plant", "mineral"))]).name
    people = rng.sample(world.subjects_of["villager"], 3)
    village = rng.choice(world.subjects_of["village"]).name
    plant = rng.choice(world.subjects_of["plant"]).name
    return {
        **draw_animal(world, rng), "name": people[0].name, "other": people[1].name, "third": people[2].name,
        "village": village, "thing": thing, "plant": plant, "day": rng.choice(_days()),
    }  # fmt: skip


@cache
def _days() -> tuple[str, ...]:
    return tuple(split_key(day)[0] for day in table("ledger")["days"].split())
