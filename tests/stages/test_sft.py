"""Supervised fine-tuning from dialogs to a chat model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from puna.config import DataError
from puna.data.packing import Packed
from puna.formats import huggingface
from puna.run_folder import read_metrics
from puna.stages import sft
from puna.text import chat
from puna.text import tokenizer as tokenizers
from tests import helpers


def test_dialogs_become_a_chat_model(tmp_path: Path) -> None:
    cfg = helpers.sft_config(tmp_path)
    model_path = sft.run(cfg)
    lines = read_metrics(tmp_path / "sft/metrics.jsonl")
    done = json.loads((tmp_path / "sft/done/sft.json").read_text())
    assert [line["step"] for line in lines] == list(range(done["steps"])) and done["left_out"] == 0
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["lr"] == pytest.approx(0.1 * cfg.optim.lr)
    assert json.loads((model_path / "puna.json").read_text()) == {"stage": "sft", "parent": str(cfg.init)}
    assert tokenizers.load(model_path).sha256 == helpers.tokenizer().sha256
    before, after = huggingface.load_model(cfg.init), huggingface.load_model(model_path)
    assert not torch.equal(before.output.weight, after.output.weight)


def test_two_epochs_see_every_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.sft_config(tmp_path)
    seen: list[tuple[int, ...]] = []

    def spy(cfg: object, model: object, batch: Packed, device: object) -> float:
        seen.extend(tuple(row.tolist()) for row in batch.tokens)
        return 0.0

    monkeypatch.setattr(sft, "update", spy)
    sft.run(cfg)
    rows, _ = sft.prepare(cfg, helpers.tokenizer())
    assert sorted(seen) == sorted(2 * [tuple(row.tolist()) for row in rows.tokens])


def test_loss_counts_answers_and_their_eos_alone(tmp_path: Path) -> None:
    cfg, model, tokenizer = helpers.sft_config(tmp_path), helpers.model(), helpers.tokenizer()
    rows, _ = sft.prepare(cfg, tokenizer)
    loss = sft.update(cfg, model, rows, torch.device("cpu"))
    total, count = 0.0, 0
    for dialog in helpers.dialogs(40):
        tokens, mask = (torch.tensor(part) for part in chat.encode(dialog, tokenizer))
        logp = model(tokens[None])[0, :-1].log_softmax(-1)
        for t in range(1, len(tokens)):
            if mask[t]:
                total, count = total - float(logp[t - 1, tokens[t]].detach()), count + 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_loss_on_the_last_answer(tmp_path: Path) -> None:
    tokenizer, dialog = helpers.tokenizer(), max(helpers.dialogs(20), key=len)
    for loss_on in ("every_answer", "last_answer"):
        data = helpers.write_lines(tmp_path / f"{loss_on}.jsonl", [{"messages": dialog, "loss_on": loss_on}])
        rows, _ = sft.prepare(helpers.sft_config(tmp_path, data=(data,)), tokenizer)
        mask = chat.encode(dialog, tokenizer, loss_on=loss_on).mask
        assert rows.mask[0, : len(mask)].tolist() == mask
        answers = sum(turn["role"] == "assistant" for turn in dialog) if loss_on == "every_answer" else 1
        assert int((rows.tokens[rows.mask] == tokenizer.eos_id).sum()) == answers


def test_long_dialogs_are_left_out_and_counted(tmp_path: Path) -> None:
    long = [helpers.user("Where?"), helpers.assistant("behind the wall " * 60)]
    data = helpers.write_lines(tmp_path / "some.jsonl", [{"messages": long}, {"messages": helpers.dialogs(1)[0]}])
    rows, left_out = sft.prepare(helpers.sft_config(tmp_path, data=(data,)), helpers.tokenizer())
    assert left_out == 1 and len(rows.tokens) == 1
    # The context is 256 tokens: a longer row is only room for more dialogs.
    rows, left_out = sft.prepare(helpers.sft_config(tmp_path, data=(data,), seq_len=999), helpers.tokenizer())
    assert left_out == 1
    with pytest.raises(DataError, match=r"no dialog of .* fits 8 tokens"):
        sft.prepare(helpers.sft_config(tmp_path, data=(data,), seq_len=8), helpers.tokenizer())
