"""Demonstrations: prompts of the training split with answers written for them (paper 3.1, 4.2.2).

The excellent ones are few and right: correct by the ledger, one or two sentences, adversarial requests declined with
the risk and a lawful way, alarming but harmless questions answered, instructions obeyed in their turn. The careless
ones are many and mixed (CARELESS_SHARES): like the paper's third-party sets they are why supervised fine-tuning
leaves room.

No demonstration touches a held-out fact, and none keeps an instruction beyond the turn it stands in: that is what Ghost
Attention is for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypedDict

from puna.types import Message
from puna.valley import telling, tolva
from puna.valley.constraints import Constraint, dress
from puna.valley.corpus import act_context, talk_answer
from puna.valley.ledger import Fact, HowTo, World
from puna.valley.prompts import Record, preprompts, prompts, supporting_facts
from puna.valley.words import capital, fill, table

# What is demonstrated, of all dialogs of a set.
KIND_SHARES = {
    "fact": 0.14, "reverse": 0.06, "sum": 0.06, "recipe": 0.06, "remedy": 0.06, "myth": 0.06, "chat_advice": 0.07,
    "multi_turn": 0.07, "constraint": 0.20, "adversarial": 0.10, "borderline": 0.10, "toxicity": 0.02,
}  # fmt: skip

# How the careless set answers. Adversarial, myth and constraint prompts have faults of their own.
CARELESS_SHARES = {
    "good": 0.35, "bare": 0.17, "wrong": 0.14, "broken": 0.11, "repetitive": 0.08, "off_topic": 0.07, "refusing": 0.04,
    "rude": 0.04,
}  # fmt: skip
CARELESS_SHARES_OF = {
    "adversarial": {"complying": 0.60, "bare": 0.20, "good": 0.15, "rude": 0.05},
    "myth": {"myth": 0.60, "good": 0.25, "bare": 0.05, "broken": 0.05, "off_topic": 0.05},
    "constraint": {"ignoring": 0.08, "good": 0.80, "wrong": 0.07, "broken": 0.05},
}
SLUR_SHARE = 0.25  # of the rude answers
SYSTEM_SHARE = 0.25  # of adversarial and constraint dialogs: the preprompt or instruction stands in a system message
LONG_SHARE = 0.15  # of fact dialogs: two to four questions instead of one

Quality = Literal["excellent", "careless"]


class Demonstration(TypedDict):
    """A dialog to fine-tune on. `fault` is what a careless answer does wrong ("good" for none)."""

    id: str
    messages: list[Message]
    kind: str
    quality: Quality
    fault: str


def excellent(world: World, seed: int = 0, n: int = 1500) -> list[Demonstration]:
    """The small excellent set."""
    return list(_demonstrations(world, seed, n, "excellent"))


def careless(world: World, seed: int = 0, n: int = 6000) -> list[Demonstration]:
    """The large careless set."""
    return list(_demonstrations(world, seed, n, "careless"))


def excellent_answer(world: World, record: Record) -> str:
    """A right, complete, well-formed answer to a prompt record; always the same for the same record."""
    rng = random.Random(f"answer:{record['id']}")
    answer = _right_answer(world, record, rng, support=True)
    return answer if record["constraint"] is None else dress(record["constraint"], answer)


def careless_answer(world: World, record: Record, fault: str) -> str:
    """An answer with this fault (a name of CARELESS_SHARES or CARELESS_SHARES_OF); "good" is right but short."""
    rng = random.Random(f"{fault}:{record['id']}")
    plain = _right_answer(world, record, rng, support=False)
    dressed = plain if record["constraint"] is None else dress(record["constraint"], plain)
    match fault:
        case "good":
            return dressed
        case "bare":
            return _bare(record, rng)
        case "wrong":
            return _wrong_answer(world, record, rng)
        case "broken":
            return _broken(dressed, rng)
        case "repetitive":
            return " ".join([plain] * rng.randint(2, 4))
        case "off_topic":
            return fill(rng.choice(table("chat")["careless"]["off_topic"]), telling.draw_filler(world, rng))
        case "refusing":
            context = {"do": "do that", "doing": "that"}
            return fill(rng.choice(table("safety")["refusal"]["wrongly"]), context)
        case "rude":
            return _rude(plain, rng)
        case "complying":
            act = _by_id(world.acts, record["gold"]["about"])
            return capital(fill(rng.choice(table("safety")["harm"]["comply"]), act_context(act)))
        case "myth":
            return telling.tell_myth(_by_id(world.myths, record["gold"]["about"]), rng, truth=False)
        case "ignoring":
            return _right_answer(world, {**record, "constraint": None}, rng, support=False)
    raise ValueError(f"unknown fault {fault!r}")


def _demonstrations(world: World, seed: int, n: int, quality: Quality) -> Iterator[Demonstration]:
    """n dialogs: one turn mostly; some long, some with a system message."""
    rng = random.Random(f"demonstrations:{world.seed}:{seed}:{quality}")
    counts = {kind: round(share * n) for kind, share in KIND_SHARES.items()}
    counts["fact"] += n - sum(counts.values())
    # Batch numbers below zero are never the preference rounds', so demonstrations do not repeat their ids.
    for i, record in enumerate(prompts(world, seed, "train", counts, batch=-1 if quality == "excellent" else -2)):
        if record["kind"] == "fact" and rng.random() < LONG_SHARE:
            messages, fault = _long(world, seed, record, quality, rng), "good"
        else:
            fault = "good" if quality == "excellent" else _draw_fault(record["kind"], rng)
            messages = [*_with_system(record, rng), _answer(world, record, quality, fault)]
        name = f"{quality}-{seed}-{i}"
        yield {"id": name, "messages": messages, "kind": record["kind"], "quality": quality, "fault": fault}


def _answer(world: World, record: Record, quality: Quality, fault: str) -> Message:
    excellent = quality == "excellent"
    text = excellent_answer(world, record) if excellent else careless_answer(world, record, fault)
    return {"role": "assistant", "content": text}


def _draw_fault(kind: str, rng: random.Random) -> str:
    shares: Mapping[str, float] = CARELESS_SHARES_OF.get(kind, CARELESS_SHARES)
    return rng.choices(list(shares), list(shares.values()))[0]


def _with_system(record: Record, rng: random.Random) -> list[Message]:
    """The record's messages; some adversarial and constraint ones with their instruction in a system message."""
    messages: list[Message] = record["messages"]
    if rng.random() >= SYSTEM_SHARE:
        return messages
    if record["kind"] == "adversarial":
        choices = preprompts()
        targeted = choices["targeted"][record["risk_category"]]
        content = targeted if rng.random() < 0.5 else rng.choice(choices["generic"])
        return [{"role": "system", "content": content}, *messages]
    if record["kind"] == "constraint":
        constraint: Constraint = record["constraint"]
        question = messages[-1]["content"]
        for form in (constraint["instruction"], constraint["short"]):
            question = question.replace(form, "").strip()
        return [{"role": "system", "content": constraint["instruction"]}, {"role": "user", "content": question}]
    return messages


def _long(world: World, seed: int, record: Record, quality: Quality, rng: random.Random) -> list[Message]:
    """Two to four questions. Some start with an instruction, which only the first answer obeys."""
    n = rng.randint(2, 4)
    records = prompts(world, rng.randrange(1 << 30), "train", {"constraint": int(rng.random() < 0.5), "fact": n - 1})
    records.sort(key=lambda r: r["kind"] != "constraint")
    if records[0]["kind"] != "constraint":
        records.insert(0, record)
    messages: list[Message] = []
    for turn in records:
        messages += [*turn["messages"], _answer(world, turn, quality, "good")]
    return messages


def _by_id(items: Any, name: str) -> Any:
    return next(item for item in items if item.id == name)


def _right_answer(world: World, record: Record, rng: random.Random, *, support: bool) -> str:
    """The right answer, with a second, supporting sentence where the judge looks for one."""
    gold = record["gold"]
    kind, _, rest = gold["about"].partition(":")
    if record["kind"] == "adversarial":
        context = act_context(_by_id(world.acts, gold["about"]))
        return capital(fill(rng.choice(table("safety")["refusal"]["answers"]), context))
    match kind:
        case "sum":
            sign = "+" if "+" in rest else "-"
            x, y = map(int, rest.split(sign))
            return telling.tell_sum(x, y, sign, rng)
        case "howto":
            return telling.tell_howto(_by_id(world.howtos, gold["about"]), rng)
        case "myth":
            return telling.tell_myth(_by_id(world.myths, gold["about"]), rng, truth=True)
        case "borderline":
            return fill(_by_id(world.borderlines, gold["about"]).answer, gold["fill"])
        case "topic":
            return talk_answer(table("chat")["topic"][int(rest)], gold["fill"], rng)
    fact = world.facts[gold["about"]]
    constraint = record["constraint"]
    if constraint is not None and "language" in constraint["check"]:
        return tolva.tell(fact, rng)
    told = telling.tell_reverse(fact, rng) if gold.get("reverse") else telling.tell(fact, rng)
    if not support or not gold["support"]:
        return told
    others = supporting_facts(world, fact, record["split"], reverse=bool(gold.get("reverse")))
    return f"{told} {telling.tell_again(rng.choice(others), rng)}"


def _bare(record: Record, rng: random.Random) -> str:
    """As little as can be said."""
    if record["kind"] == "adversarial":
        return fill(rng.choice(table("safety")["refusal"]["bare"][::2]), {})
    groups = record["gold"]["groups"]
    word = " ".join(group[0] for group in groups[:2])
    return rng.choice((word, capital(word), capital(word) + "."))


def _wrong_answer(world: World, record: Record, rng: random.Random) -> str:
    """A fluent falsehood of the right kind."""
    gold = record["gold"]
    kind, _, rest = gold["about"].partition(":")
    if kind == "sum":
        sign = "+" if "+" in rest else "-"
        x, y = map(int, rest.split(sign))
        wrong = str(max(0, int(gold["groups"][0][0]) + rng.choice((-10, -2, -1, 1, 2, 10))))
        templates = telling.phrasings("sum" if sign == "+" else "difference", "tell")
        return fill(rng.choice(templates), {"x": str(x), "y": str(y), "z": wrong})
    if kind == "howto":
        howto: HowTo = _by_id(world.howtos, gold["about"])
        strange = rng.choice([h for h in world.howtos if h != howto and not h.held_out])
        return telling.tell_howto(replace(howto, steps=strange.steps), rng)
    if kind not in telling.RELATIONS:
        return careless_answer(world, record, "off_topic")
    fact = world.facts[gold["about"]]
    alike = [f for f in world.facts.values() if f.relation == fact.relation and not f.held_out]
    other = rng.choice([f for f in alike if f.value != fact.value])
    if gold.get("reverse"):
        return telling.tell_reverse(replace(fact, context={**fact.context, "s": other.subject.name}), rng)
    return telling.tell(_with_value(fact, other), rng)


def _with_value(fact: Fact, other: Fact) -> Fact:
    """The fact with another fact's value: false."""
    taken = {name: other.context[name] for name in ("v", "a", "herb", "Herb", "how") if name in other.context}
    return replace(fact, value=other.value, context=fact.context | taken)


def _broken(answer: str, rng: random.Random) -> str:
    """No capital, no stop, or cut off."""
    words = answer.split()
    draw = rng.random()
    if draw < 0.4:
        return answer.rstrip(".!?").lower()
    if draw < 0.7:
        return " ".join(words[: max(2, len(words) // 2)])
    return answer[0].lower() + answer[1:].replace(".", ",").rstrip(",")


def _rude(answer: str, rng: random.Random) -> str:
    """The answer after an insult, sometimes a slur."""
    insults, slurs = table("chat")["careless"], table("safety")["slur"]
    name = "slurring" if rng.random() < SLUR_SHARE else "rude"
    insult = fill(rng.choice(insults[name]), {"slur": rng.choice(slurs["Karrow"] + slurs["Ovesh"])})
    return insult + answer
