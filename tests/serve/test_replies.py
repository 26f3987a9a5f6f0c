"""Tokens' texts and logprobs in replies."""

from __future__ import annotations

import pytest

from puna.generate.live import Token
from puna.serve import replies
from tests import helpers
from tests.serve.stand_in import StandIn, state_of


def test_a_part_of_a_character_has_no_bytes_and_equal_texts_the_likeliest_logprob() -> None:
    byte = helpers.tokenizer().encode("\U0001f999")[-1]
    model = state_of(StandIn()).models["llama"]
    tokens = [Token(byte, -0.5, ((byte, -0.5), (byte - 1, -1.5)))]
    chat = replies.chat_choice(model, True)(0, "", tokens, "stop")["logprobs"]["content"][0]
    assert (chat["token"], chat["bytes"], chat["top_logprobs"][0]["bytes"]) == ("\ufffd", None, None)
    text = replies.text_choice(model, True)(0, "", tokens, "stop")["logprobs"]
    assert text["top_logprobs"] == [{"\ufffd": -0.5}]


def test_a_tokens_text_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StandIn()
    model, decode, asked = state_of(engine).models["llama"], engine.tokenizer.decode, list[object]()
    monkeypatch.setattr(engine.tokenizer, "decode", lambda ids: (asked.append(ids), decode(ids))[1])
    assert model.token_text(300) == model.token_text(300)
    assert len(asked) == 1
