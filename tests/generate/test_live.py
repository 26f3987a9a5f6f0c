"""Requests from many threads, each with its own answers and nobody else's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from puna.config import ConfigError
from puna.generate.engine import LocalEngine
from puna.generate.live import Event, LiveEngine
from puna.generate.sampling import Sampling
from puna.model.moe import MoEConfig
from puna.model.transformer import Transformer
from tests import helpers

PROMPTS = [[1, *range(300, 300 + n)] for n in (3, 20, 1, 70, 12, 5, 31, 2)]


@pytest.fixture
def engine() -> Iterator[LiveEngine]:
    made = LiveEngine(helpers.talker(end=0.05), helpers.tokenizer(), max_batch_size=4)
    yield made
    made.close()
    assert not made.alive


def ask(engine: LiveEngine, prompt: list[int], sampling: Sampling, n: int = 1) -> list[list[Event]]:
    """The events of each sample, once all have ended."""
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(prompt, sampling, events.put, n=n)
    samples: list[list[Event]] = [[] for _ in range(n)]
    while not all(row and row[-1].finish for row in samples):
        event = events.get(timeout=30)
        samples[event.sample].append(event)
    return samples


def drawn(events: list[Event]) -> list[int]:
    return [token.id for event in events for token in event.tokens]


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_many_threads_get_what_each_would_get_alone(engine: LiveEngine) -> None:
    local = LocalEngine(helpers.talker(end=0.05), helpers.tokenizer())
    got: dict[int, list[list[Event]]] = {}

    def client(i: int) -> None:
        got[i] = ask(engine, PROMPTS[i % 8], Sampling(seed=i, max_new_tokens=30, top_p=0.9), n=2)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, samples in got.items():
        [expected] = local.generate_ids([PROMPTS[i % 8]], n=2, seed=i, max_new_tokens=30, top_p=0.9)
        assert [drawn(events) for events in samples] == [answer.tokens for answer in expected]
        assert [said(events) for events in samples] == [answer.text for answer in expected]
        assert [events[-1].finish == "stop" for events in samples] == [answer.finished for answer in expected]


def test_a_cancelled_request_frees_its_memory(engine: LiveEngine) -> None:
    events: queue.Queue[Event] = queue.Queue()
    number = engine.submit(PROMPTS[0], Sampling(max_new_tokens=200, logit_bias={2: -100.0}), events.put, n=2)
    events.get(timeout=30)
    engine.cancel(number)
    engine.cancel(number)
    finishes = []
    while len(finishes) < 2:
        event = events.get(timeout=30)
        finishes += [event.finish] if event.finish else []
    assert finishes == ["cancelled", "cancelled"]
    deadline = time.monotonic() + 30
    while engine.stats().cached_tokens and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()[:3] == (0, 0, 0)


def test_top_logprobs_are_the_models(engine: LiveEngine) -> None:
    for temperature in (0, 0.7):
        [[event]] = ask(engine, PROMPTS[1], Sampling(temperature=temperature, max_new_tokens=1, top_logprobs=3))
        with torch.inference_mode():
            logits = helpers.talker(end=0.05)(torch.tensor([PROMPTS[1]]))[0, -1] / (temperature or 1.0)
        logprobs, ids = logits.log_softmax(-1).topk(3)
        [token] = event.tokens
        assert [i for i, _ in token.top] == ids.tolist()
        assert [p for _, p in token.top] == pytest.approx(logprobs.tolist(), abs=1e-5)
    [[event]] = ask(engine, PROMPTS[1], Sampling(temperature=0, max_new_tokens=1, top_logprobs=1))
    assert event.tokens[0][:2] == event.tokens[0].top[0]


def test_a_stop_text_ends_an_answer(engine: LiveEngine) -> None:
    whole = Sampling(max_new_tokens=60, seed=4, logit_bias={2: -100.0})
    [events] = ask(engine, PROMPTS[0], whole)
    stop = said(events)[20:24]
    [cut] = ask(engine, PROMPTS[0], Sampling(max_new_tokens=60, seed=4, logit_bias={2: -100.0}, stop=(stop,)))
    assert said(cut) == said(events)[: said(events).index(stop)]
    assert cut[-1].finish == "stop"


def test_a_prompt_without_room_is_refused(engine: LiveEngine) -> None:
    with pytest.raises(ConfigError, match="the prompt has 256 tokens and the model's context 256"):
        engine.submit([1] * 256, Sampling(), print)


def test_new_weights_come_between_two_steps(engine: LiveEngine) -> None:
    new, greedy = helpers.talker(seed=1), Sampling(temperature=0, max_new_tokens=30)
    local = LocalEngine(new, helpers.tokenizer())
    endless, events = Sampling(max_new_tokens=200, logit_bias={2: -100.0}), queue.Queue[Event]()
    engine.submit(PROMPTS[0], endless, events.put, n=6)  # four run, two wait
    events.get(timeout=30)
    engine.update_weights(new)
    [[expected]] = local.generate_ids([PROMPTS[1]], temperature=0, max_new_tokens=30)
    [after] = ask(engine, PROMPTS[1], greedy)
    assert drawn(after) == expected.tokens
    finishes = []
    while len(finishes) < 6:
        event = events.get(timeout=30)
        finishes += [event.finish] if event.finish else []
    assert finishes == ["length"] * 6
    assert engine._scheduler.model is new


def test_weights_of_another_shape_are_refused_in_the_callers_thread(engine: LiveEngine) -> None:
    with pytest.raises(ConfigError, match="new weights must be of the engine's shape"):
        engine.update_weights(Transformer(replace(helpers.config(), n_layers=1)))
    assert engine.alive
    # A folder keeps neither: what pretraining was told of its experts is no other shape.
    engine.update_weights(Transformer(replace(helpers.config(), moe=MoEConfig(balance=0.5, capacity_factor=1.5))))
    ask(engine, PROMPTS[0], Sampling(max_new_tokens=3))
    assert engine.alive


def test_a_callback_that_raises_ends_its_own_request_alone(engine: LiveEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def broken(event: Event) -> None:
        raise ValueError("broken")

    engine.submit(PROMPTS[0], Sampling(max_new_tokens=200, logit_bias={2: -100.0}), broken, n=2)
    [events] = ask(engine, PROMPTS[1], Sampling(max_new_tokens=20))
    assert events[-1].finish in ("stop", "length")
    deadline = time.monotonic() + 30
    while engine.stats()[:3] != (0, 0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()[:3] == (0, 0, 0)
    assert shown and engine.alive


def test_closing_ends_what_runs_and_what_waits() -> None:
    engine = LiveEngine(helpers.model(), helpers.tokenizer(), max_batch_size=1)
    events: queue.Queue[Event] = queue.Queue()
    for _ in range(3):
        engine.submit(PROMPTS[0], Sampling(max_new_tokens=250, logit_bias={2: -100.0}), events.put)
    events.get(timeout=30)
    engine.close()
    finishes = []
    while not events.empty():
        finishes.append(events.get().finish)
    assert [finish for finish in finishes if finish] == ["cancelled"] * 3
    assert engine.stats()[:3] == (0, 0, 0)


def test_cancelled_at_once_a_request_still_ends(engine: LiveEngine) -> None:
    events: queue.Queue[Event] = queue.Queue()
    for _ in range(20):
        engine.cancel(engine.submit(PROMPTS[3], Sampling(max_new_tokens=200), events.put))
    finishes = []
    while len(finishes) < 20:
        event = events.get(timeout=30)
        finishes += [event.finish] if event.finish else []
    assert set(finishes) <= {"cancelled", "stop"}
    assert not engine._clients


def test_an_error_ends_every_request() -> None:
    class Broken(Transformer):
        def hidden(self, *args: object, **kwargs: object) -> torch.Tensor:
            raise RuntimeError("broken")

    engine = LiveEngine(Broken(helpers.config()), helpers.tokenizer())
    threading.excepthook, kept = lambda args: None, threading.excepthook
    try:
        [[event]] = ask(engine, [1, 2], Sampling())
        assert event.finish == "error"
        engine._thread.join(timeout=30)
    finally:
        threading.excepthook = kept
    assert not engine.alive
    with pytest.raises(RuntimeError, match="stopped"):
        engine.submit([1, 2], Sampling(), print)
