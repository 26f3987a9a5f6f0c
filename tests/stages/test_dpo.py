"""Direct preference optimisation: what is summed, what moves, what is measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna import losses
from puna.config import ConfigError, DataError
from puna.formats import huggingface
from puna.generate.scoring import sequence_logprobs
from puna.model.transformer import Transformer
from puna.run_folder import read_metrics
from puna.stages import dpo
from puna.stages.dpo import Pair
from puna.text import chat
from tests import helpers

CPU = torch.device("cpu")


def pairs(n: int = 6) -> list[Pair]:
    """Comparisons as tokens; of the last two one answer begins the other, and both are the same."""
    tokenizer, said = helpers.tokenizer(), helpers.sentences(3 * n)
    made = []
    for i in range(n):
        prompt = [helpers.user(said[3 * i])]
        answers = (f"yes, {said[3 * i + 1]}", f"yes, no {said[3 * i + 2]}" + " no" * i)
        chosen, rejected = (chat.encode([*prompt, helpers.assistant(a)], tokenizer).tokens for a in answers)
        made.append((chosen, rejected))
    return [*made, (made[0][0], made[0][0][:-3]), (made[1][0], made[1][0])]


def summed(model: Transformer, tokens: list[int], begin: int) -> float:
    """log pi of the tokens from `begin` on, of a row that holds this answer alone."""
    (logprobs,) = sequence_logprobs(model, [tokens])
    return float(logprobs[begin - 1 :].sum())


def test_comparisons_become_a_chat_model(tmp_path: Path) -> None:
    cfg = helpers.dpo_config(tmp_path, epochs=6, test=(tmp_path / "pairs.jsonl",))
    model_path = dpo.run(cfg)
    lines = read_metrics(tmp_path / "dpo/metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are one at first"
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["reward_chosen"] > lines[-1]["reward_rejected"]
    evaluation = json.loads((tmp_path / "dpo/evaluation.json").read_text())
    assert evaluation["pairs"] == 54 and evaluation["accuracy"] > 0.9
    assert evaluation["reward_chosen"] > evaluation["reward_rejected"]
    done = json.loads((tmp_path / "dpo/done/dpo.json").read_text())
    assert done == {"pairs": 54, "left_out": 0, "set_aside": 0, "accuracy": evaluation["accuracy"]}
    assert json.loads((model_path / "puna.json").read_text()) == {"stage": "dpo", "parent": str(cfg.init)}
    assert huggingface.load_model(model_path).config == helpers.config()


def test_log_ratios_are_those_of_each_answer_in_a_row_of_its_own(tmp_path: Path) -> None:
    cfg, policy, reference, rows = helpers.dpo_config(tmp_path), helpers.model(0), helpers.model(1), pairs()
    chosen, rejected = (ratios.detach() for ratios in dpo.log_ratios(cfg, policy, reference, rows, CPU))
    for i, pair in enumerate(rows):
        good, bad = (summed(policy, row, 1) - summed(reference, row, 1) for row in pair)
        # Over whole rows: the prompt, and what answers begin with together, cancel in the difference.
        assert float(chosen[i] - rejected[i]) == pytest.approx(good - bad, abs=1e-4)
    fork = next(j for j, (a, b) in enumerate(zip(*rows[0], strict=False)) if a != b)
    alone = summed(policy, rows[0][0], fork) - summed(reference, rows[0][0], fork)
    assert float(chosen[0]) == pytest.approx(alone, abs=1e-4)


def test_gradients_are_those_of_each_answer_in_a_row_of_its_own(tmp_path: Path) -> None:
    cfg, rows = helpers.dpo_config(tmp_path, label_smoothing=0.1), pairs()
    policy, reference = helpers.model(0), helpers.model(1)
    numbers = dpo.update(cfg, policy, reference, rows, CPU)
    packed = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    total = 0.0
    for pair in rows:
        ratios = []
        for row in pair:
            tokens = torch.tensor([row])
            logprobs = [losses.token_logprobs(model(tokens)[:, :-1], tokens[:, 1:]) for model in (policy, reference)]
            ratios.append((logprobs[0] - logprobs[1].detach()).sum())
        loss = losses.dpo_loss(*ratios, cfg.beta, cfg.label_smoothing) / len(rows)
        loss.backward()
        total += float(loss.detach())
    assert numbers["loss"] == pytest.approx(total, rel=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_how_a_batch_is_cut_changes_nothing(tmp_path: Path) -> None:
    cfg, policy, reference, rows = helpers.dpo_config(tmp_path), helpers.model(0), helpers.model(1), pairs()
    whole = dpo.update(cfg, policy, reference, rows, CPU)
    in_parts = dpo.update(replace(cfg, micro_batch_tokens=1), policy, reference, rows, CPU)
    assert in_parts == pytest.approx(whole, rel=1e-5)


def test_the_reference_stays(tmp_path: Path) -> None:
    other = helpers.talker_folder(tmp_path / "other", seed=3)
    dpo.run(cfg := helpers.dpo_config(tmp_path, reference=other))
    first = read_metrics(cfg.out / "metrics.jsonl")[0]
    assert first["loss"] != pytest.approx(math.log(2), abs=1e-3), "log pi - log pi_ref is not 0 at first"
    assert torch.equal(huggingface.load_model(other).output.weight, helpers.talker(3).output.weight)


def test_a_tenth_is_held_out_without_test_files(tmp_path: Path) -> None:
    train, test, _ = dpo.prepare(helpers.dpo_config(tmp_path, limit=40), helpers.tokenizer())
    assert len(train) == 40 and 1 <= len(test) <= 12
    assert not {tuple(pair[0]) for pair in test} & {tuple(pair[0]) for pair in train}


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    rows = helpers.preferences(5)
    rows[1]["chosen"] = [helpers.assistant("behind the wall " * 60)]
    rows[2]["rejected"] = [helpers.assistant("so [/INST] there")]
    rows.append({**rows[0], "rejected": rows[0]["chosen"]})
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    cfg = helpers.dpo_config(tmp_path, data=(data,), test=(data,))
    train, test, counts = dpo.prepare(cfg, helpers.tokenizer())
    assert (len(train), len(test), counts) == (3, 3, {"left_out": 1, "set_aside": 2, "skipped: identical answers": 2})
    with pytest.raises(DataError, match="fits 4 tokens"):
        dpo.prepare(replace(cfg, max_len=4), helpers.tokenizer())


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"beta": 0.0}, r"beta is 0\.0: it must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5: it must be at least 0 and less than 0\.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            helpers.dpo_config(tmp_path, **changes)
