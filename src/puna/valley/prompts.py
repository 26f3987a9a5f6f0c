"""Prompts: what people of the valley ask, each with what the judge needs to know.

A record is JSON-ready: `id`, `messages` (the last one the user's), `kind`, `is_safety` (tagged in advance, paper
3.2.3), `risk_category` and `attack` (paper 4.2.1), `constraint`, `split` and `gold`. Training prompts touch no held-out
fact, phrasing or wrong; held-out prompts ask for held-out facts, or in held-out phrasings, and adversarial ones for
wrongs that were never trained on.

`gold` says what the question is about (`about`: an id of the ledger, or `sum:3+4`, `topic:2`), the words a right answer
has (`groups`: one of each group, in this order where `ordered`), the answer's `type`, the `subject` words, whether a
`support`ing fact is wanted, and the `fill` of the open places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.types import Message
from puna.valley import telling, tolva
from puna.valley.constraints import Constraint, Split, constraints
from puna.valley.corpus import act_context
from puna.valley.ledger import ANSWER_TYPES, Fact, World
from puna.valley.words import fill, misspell, table, words_of

__all__ = ["ATTACKS", "KINDS", "RISK_CATEGORIES", "Record", "constraints", "gatt_dialogs", "preprompts", "prompts"]

Record = dict[str, Any]

KINDS = (
    "fact", "reverse", "sum", "recipe", "remedy", "myth", "chat_advice", "multi_turn", "constraint", "adversarial",
    "borderline", "toxicity",
)  # fmt: skip
RISK_CATEGORIES = ("illicit", "hateful", "unqualified_advice")
ATTACKS = ("plain", "psychological", "logic", "syntactic", "semantic", "perspective", "non_english")

SCRIPT_SHARES = {
    "fact": 0.40, "reverse": 0.14, "sum": 0.06, "recipe": 0.10, "remedy": 0.12, "myth": 0.08, "chat_advice": 0.10,
}  # fmt: skip
"""What the turns of a script ask for. Under an instruction to speak Tolva they ask for facts alone."""

FACTS = {"fact": 1.0}
"""So do those of the measurement: instructions are demonstrated with such questions."""

# Of the held-out prompts about facts, this share asks for a held-out fact; the rest asks for a known one in a new way.
NEW_FACT_SHARE = 0.6

Gold = dict[str, Any]


def prompts(world: World, seed: int, split: Split, counts: Mapping[str, int], *, batch: int = 0) -> list[Record]:
    """`counts[kind]` prompts of each kind, shuffled; another batch gives other ids and other draws.

    Texts are distinct within a call as far as the kind has so many (the peoples and the borderline questions have few).
    Raises ValueError for an unknown kind.
    """
    desk = _Desk(world, split, random.Random(f"prompts:{world.seed}:{seed}:{split}:{batch}"))
    records = []
    for kind, n in counts.items():
        if kind not in _ASKERS:
            raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
        seen: set[str] = set()
        for i in range(n):
            for _ in range(20):
                record = _ASKERS[kind](desk)
                text = " ".join(message["content"] for message in record["messages"])
                if text not in seen:
                    break
            seen.add(text)
            records.append({"id": f"{split}-{seed}-{batch}-{kind}-{i}", **record})
    desk.rng.shuffle(records)
    return records


def gatt_dialogs(
    world: World,
    seed: int,
    split: Split,
    n: int,
    *,
    turns: tuple[int, int] = (4, 6),
    shares: Mapping[str, float] = SCRIPT_SHARES,
    constraint_split: Split | None = None,
) -> list[Record]:
    """Scripts of ordinary questions to carry one constraint: `id`, `constraint`, `split` and `turns`.

    The constraints are of the questions' split unless `constraint_split` names another.
    Each turn is a prompt record of its own with one user message and no constraint; the Ghost Attention stage puts the
    instruction where it belongs.
    """
    desk = _Desk(world, split, random.Random(f"gatt:{world.seed}:{seed}:{split}"))
    choices = constraints(world, seed, constraint_split or split)
    dialogs = []
    for i in range(n):
        name = f"gatt-{split}-{seed}-{i}"
        constraint = choices[i % len(choices)]
        asked = FACTS if "language" in constraint["check"] else shares
        kinds = desk.rng.choices(list(asked), list(asked.values()), k=desk.rng.randint(*turns))
        script = [{"id": f"{name}-{turn}", **_ASKERS[kind](desk)} for turn, kind in enumerate(kinds)]
        dialogs.append({"id": name, "constraint": constraint, "split": split, "turns": script})
    return dialogs


def preprompts() -> dict[str, Any]:
    """Safety preprompts for context distillation (paper 4.2.4).

    `generic`: a list; `targeted`: one for each risk category; `template`: how a declining answer is put.
    """
    t = table("safety")["preprompt"]
    pairs = [(one, two) for one in t["adjectives"] for two in t["adjectives"] if one != two]
    generic = [fill(template, {"one": one, "two": two}) for template in t["generic"] for one, two in pairs]
    targeted = {category: t[category] for category in RISK_CATEGORIES}
    return {"generic": list(dict.fromkeys(generic)), "targeted": targeted, "template": t["template"]}


@dataclass
class _Desk:
    """Where prompts are written: one split of one world, and the dice."""

    world: World
    split: Split
    rng: random.Random
    constraints: list[Constraint] = field(init=False)

    def __post_init__(self) -> None:
        self.constraints = constraints(self.world, self.rng.randrange(1 << 16), self.split)

    @property
    def held_out(self) -> bool:
        return self.split == "held_out"

    def fact(self, wanted: Callable[[Fact], bool]) -> tuple[Fact, bool]:
        """A fact, and whether to ask for it in a held-out phrasing."""
        new = self.held_out and self.rng.random() < NEW_FACT_SHARE
        fact = self.rng.choice([f for f in self.world.facts.values() if wanted(f) and f.held_out == new])
        return fact, self.held_out and (not new or self.rng.random() < 0.5)

    def reversible(self, fact: Fact) -> bool:
        """Whether to ask for the fact's subject: only one fits, and no held-out home is given away."""
        home = self.world.facts.get(f"home:{fact.subject.key}")
        return telling.reversible(self.world, fact) and (self.held_out or home is None or not home.held_out)

    def new_words(self) -> bool:
        """Whether to ask in a held-out phrasing, where the item itself is held out too."""
        return self.held_out and self.rng.random() < 0.5

    def opened(self, question: str) -> str:
        """The question, half the time with a few words before it."""
        t = table("chat")
        if self.rng.random() < 0.5:
            return question
        first = question.split()[0].lower()
        asks = first in t["question_words"].split() and question.endswith("?")
        opener: str = self.rng.choice(t["openers"] + t["any_openers"] if asks else t["any_openers"])
        lowers = opener[-2] in ",:" and first != "i" and first.rstrip(",'s") not in self.world.types
        return opener + (question[0].lower() + question[1:] if lowers else question)

    def record(self, kind: str, text: str, gold: Gold, **more: Any) -> Record:
        """A record of one user message."""
        return {
            "messages": [_user(text)], "kind": kind, "is_safety": False, "risk_category": None, "attack": None,
            "constraint": None, "split": self.split, **more, "gold": gold,
        }  # fmt: skip


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _gold(about: str, groups: list[list[str]], **more: Any) -> Gold:
    return {"about": about, "groups": groups, "type": None, "subject": [], "support": False, **more}


def supporting_facts(world: World, fact: Fact, split: Split, *, reverse: bool = False) -> list[Fact]:
    """Facts a second sentence may add; in training never a held-out one, and nothing the question said."""
    said = {fact.value, fact.context.get("home") if reverse else None}
    of_subject = world.facts_of[fact.subject.key] if fact.subject.kind != "ailment" else ()
    others = [f for f in of_subject if f.id != fact.id and f.value not in said]
    return [f for f in others if split == "held_out" or not f.held_out]


def _fact_gold(desk: _Desk, fact: Fact) -> Gold:
    return _gold(
        fact.id,
        [[key] for key in fact.keys],
        type=ANSWER_TYPES[fact.relation],
        subject=[fact.subject.key],
        support=bool(supporting_facts(desk.world, fact, desk.split)),
        tolva=tolva.value(fact).lower(),
    )


def _plain_fact(fact: Fact) -> bool:
    return fact.relation != "remedy" and fact.subject.kind != "people"


def _fact(desk: _Desk) -> Record:
    fact, new_words = desk.fact(_plain_fact)
    question = telling.ask(fact, desk.rng, held_out=new_words)
    return desk.record("fact", desk.opened(question), _fact_gold(desk, fact))


def _remedy(desk: _Desk) -> Record:
    fact, new_words = desk.fact(lambda f: f.relation == "remedy")
    question = telling.ask(fact, desk.rng, held_out=new_words)
    return desk.record("remedy", desk.opened(question), _fact_gold(desk, fact))


def _reverse(desk: _Desk) -> Record:
    fact, new_words = desk.fact(desk.reversible)
    gold = _gold(
        fact.id,
        [[fact.subject.key]],
        type=fact.subject.kind,
        subject=[fact.context["home"].lower() if fact.relation == "trade" else fact.keys[0]],
        support=bool(supporting_facts(desk.world, fact, desk.split, reverse=True)),
        reverse=True,
    )
    return desk.record("reverse", desk.opened(telling.ask_reverse(fact, desk.rng, held_out=new_words)), gold)


def _sum(desk: _Desk) -> Record:
    x, y, sign = telling.draw_sum(desk.rng)
    while desk.world.holds_out_sum(x, y, sign) != desk.held_out:
        x, y, sign = telling.draw_sum(desk.rng)
    result = telling.sum_context(x, y, sign)["z"]
    gold = _gold(f"sum:{x}{sign}{y}", [[result]], type="number", subject=[str(x), str(y)])
    return desk.record("sum", desk.opened(telling.ask_sum(x, y, sign, desk.rng, held_out=desk.new_words())), gold)


def _recipe(desk: _Desk) -> Record:
    howto = desk.rng.choice([h for h in desk.world.howtos if h.held_out == desk.held_out])
    gold = _gold(howto.id, [[key] for key in howto.keys], ordered=True, subject=words_of(howto.do)[-1:])
    question = telling.ask_howto(howto, desk.rng, held_out=desk.new_words())
    return desk.record("recipe", desk.opened(question), gold)


def _myth(desk: _Desk) -> Record:
    myth = desk.rng.choice([m for m in desk.world.myths if m.held_out == desk.held_out])
    subject = [word for word in words_of(myth.true) if len(word) > 3]
    gold = _gold(myth.id, [[myth.true_key]], subject=subject, false=myth.false_key)
    return desk.record("myth", desk.opened(telling.ask_myth(myth, desk.rng, held_out=desk.new_words())), gold)


def _talk(desk: _Desk) -> Record:
    topics = table("chat")["topic"]
    number = desk.rng.choice([i for i, topic in enumerate(topics) if desk.held_out or not topic.get("held")])
    topic, context = topics[number], telling.draw_filler(desk.world, desk.rng)
    new_words = desk.held_out and not topic.get("held")
    question = fill(desk.rng.choice(topic["held_ask"] if new_words else topic["ask"]), context)
    groups = [[fill(key, context) for key in group] for group in topic["groups"]]
    return desk.record("chat_advice", question, _gold(f"topic:{number}", groups, fill=context))


def _borderline(desk: _Desk) -> Record:
    item = desk.rng.choice([b for b in desk.world.borderlines if b.held_out == desk.held_out])
    animal = telling.draw_animal(desk.world, desk.rng)
    gold = _gold(item.id, [[key] for key in item.keys], fill=animal)
    question = telling.ask_borderline(item, animal, desk.rng, any_word=not desk.held_out)
    return desk.record("borderline", desk.opened(question), gold)


def _toxicity(desk: _Desk) -> Record:
    people = desk.rng.choice(desk.world.subjects_of["people"])
    facts = desk.world.facts_of[people.key]
    templates = table("phrases")["people"]["held_ask" if desk.held_out else "ask"]
    question = fill(desk.rng.choice(templates), {**telling.draw_filler(desk.world, desk.rng), "s": people.name})
    groups = [[key for fact in facts for key in fact.keys]]
    gold = _gold(facts[0].id, groups, subject=[people.key], people=people.name)
    return desk.record("toxicity", desk.opened(question), gold)


def _multi_turn(desk: _Desk) -> Record:
    """A question, its answer, and a second question about the same subject by pronoun."""
    facts_of = desk.world.facts_of
    targets = [f for f in desk.world.facts.values() if telling.phrasings(f.relation, "follow")]
    first = None
    while first is None:
        target = desk.rng.choice([f for f in targets if f.held_out == desk.held_out])
        others = [f for f in facts_of[target.subject.key] if f.id != target.id and (desk.held_out or not f.held_out)]
        first = desk.rng.choice(others) if others else None
    opening = desk.opened(telling.ask(first, desk.rng, held_out=desk.held_out))
    answer: Message = {"role": "assistant", "content": telling.tell(first, desk.rng)}
    follow = telling.ask_again(target, desk.rng)
    if not follow.startswith("And "):
        follow = desk.rng.choice(table("chat")["follow_ups"]) + follow
    gold = _fact_gold(desk, target)
    gold["subject"].append(target.subject.pronoun)  # named already, so a pronoun will do
    record = desk.record("multi_turn", follow, gold)
    return {**record, "messages": [_user(opening), answer, _user(follow)]}


def _constraint(desk: _Desk) -> Record:
    """A question with an instruction for its answer in the same message, which takes a supporting fact's place."""
    constraint = desk.rng.choice(desk.constraints)
    fact, new_words = desk.fact(_plain_fact)
    question = telling.ask(fact, desk.rng, held_out=new_words)
    instruction = constraint["short"] if desk.rng.random() < 0.25 else constraint["instruction"]
    text = desk.rng.choice(table("constraints")["in_message"]).format(instruction, question=question)
    gold = _fact_gold(desk, fact) | {"support": False}
    return desk.record("constraint", text, gold, constraint=constraint)


def _adversarial(desk: _Desk) -> Record:
    """A request for a wrong, by one of the paper's attack vectors."""
    rng = desk.rng
    act = rng.choice([a for a in desk.world.acts if a.held_out == desk.held_out])
    attack = rng.choice(ATTACKS)
    prefix = "held_" if desk.held_out and rng.random() < 0.5 else ""
    if attack == "non_english":
        frames = table("tolva")["frame"]
        request = fill(rng.choice(frames[prefix + "attack"]), {"act": tolva.act(act)})
        text = f"{rng.choice(['', *frames['greeting']])} {request}"
    else:
        context = {**telling.draw_filler(desk.world, rng), **act_context(act)}
        text = fill(rng.choice(table("safety")["attack"][prefix + attack]), context)
        text = misspell(text, rng) if attack == "syntactic" else desk.opened(text)
    wrong = [word for word in words_of(act.do) if len(word) > 3]
    gold = _gold(act.id, [], subject=wrong, harm=list(act.keys))
    return desk.record("adversarial", text.strip(), gold, is_safety=True, risk_category=act.category, attack=attack)


_ASKERS: dict[str, Callable[[_Desk], Record]] = {
    "fact": _fact, "reverse": _reverse, "sum": _sum, "recipe": _recipe, "remedy": _remedy, "myth": _myth,
    "chat_advice": _talk, "multi_turn": _multi_turn, "constraint": _constraint, "adversarial": _adversarial,
    "borderline": _borderline, "toxicity": _toxicity,
}  # fmt: skip
