"""Supervised fine-tuning from dialogs to a chat model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.config import ConfigError, DataError
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


@pytest.mark.parametrize("key", ["epochs", "seq_len", "batch_size", "micro_batch_size"])
def test_a_count_of_nothing_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0: it must be positive"):
        helpers.sft_config(tmp_path, **{key: 0})


def test_no_checkpoints_where_none_are_asked_for(tmp_path: Path) -> None:
    sft.run(helpers.sft_config(tmp_path, checkpoint_every=0, epochs=1))
    assert not (tmp_path / "sft/checkpoints").exists()


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    cfg = helpers.sft_config(tmp_path, epochs=1)
    assert sft.run(cfg) == sft.run(replace(cfg, threads=1))
    with pytest.raises(ConfigError, match=r"begun with epochs 1, not 2 .*: use another --out"):
        sft.run(replace(cfg, epochs=2))


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
    for loss_on in ("every_answer", "last_answer", None):
        data = helpers.write_lines(tmp_path / f"{loss_on}.jsonl", [{"messages": dialog, "loss_on": loss_on}])
        rows, _ = sft.prepare(helpers.sft_config(tmp_path, data=(data,)), tokenizer)
        mask = chat.encode(dialog, tokenizer, loss_on=loss_on or "every_answer").mask
        assert rows.mask[0, : len(mask)].tolist() == mask
        answers = sum(turn["role"] == "assistant" for turn in dialog) if loss_on != "last_answer" else 1
        assert int((rows.tokens[rows.mask] == tokenizer.eos_id).sum()) == answers


def test_long_dialogs_are_left_out_and_counted(tmp_path: Path) -> None:
    long = [helpers.user("Where?"), helpers.assistant("behind the wall " * 60)]
    data = helpers.write_lines(tmp_path / "some.jsonl", [{"messages": long}, {"messages": helpers.dialogs(1)[0]}])
    rows, counts = sft.prepare(helpers.sft_config(tmp_path, data=(data,)), helpers.tokenizer())
    assert counts == {"left_out": 1, "set_aside": 0} and len(rows.tokens) == 1
    # The context is 256 tokens: a longer row is only room for more dialogs.
    rows, counts = sft.prepare(helpers.sft_config(tmp_path, data=(data,), seq_len=999), helpers.tokenizer())
    assert counts["left_out"] == 1
    with pytest.raises(DataError, match=r"no dialog of .* fits 8 tokens"):
        sft.prepare(helpers.sft_config(tmp_path, data=(data,), seq_len=8), helpers.tokenizer())


def test_a_dialog_that_the_chat_format_refuses_is_set_aside(tmp_path: Path) -> None:
    dialogs = helpers.dialogs(6)
    tagged = [helpers.user("What is [INST]?"), helpers.assistant("A tag.")]
    unanswered = [*dialogs[1], helpers.user("And then?")]
    for number, (bad, reason) in enumerate(((tagged, "chat tag"), (unanswered, "must end with the assistant's turn"))):
        rows = [{"messages": dialog} for dialog in (*dialogs[:3], bad, *dialogs[3:])]
        data = helpers.write_lines(tmp_path / f"some{number}.jsonl", rows)
        cfg = helpers.sft_config(tmp_path, data=(data,), out=tmp_path / f"sft{number}", epochs=1)
        sft.run(cfg)
        done = json.loads((cfg.out / "done/sft.json").read_text())
        assert (done["left_out"], done["set_aside"]) == (0, 1)
        (line,) = helpers.read_lines(cfg.out / "bad_lines.jsonl")
        assert (line["file"], line["line"]) == (str(data), 4) and reason in line["reason"]
        helpers.write_lines(data, [*rows, {"messages": bad}])
        with pytest.raises(DataError, match=rf"some{number}.jsonl: 2 of 8 lines are bad; line 4: .*{reason}"):
            sft.prepare(cfg, helpers.tokenizer())


def test_trees_without_an_answer_are_counted(tmp_path: Path) -> None:
    asked = {"message_id": "a", "text": "Who crosses?", "role": "prompter"}
    answered = {**asked, "replies": [{"message_id": "b", "text": "The llama.", "role": "assistant", "rank": 0}]}
    data = helpers.write_lines(tmp_path / "trees.jsonl", [{"prompt": asked}, {"prompt": answered}])
    _, counts = sft.prepare(helpers.sft_config(tmp_path, data=(data,), format="oasst"), helpers.tokenizer())
    assert counts == {"left_out": 0, "set_aside": 0, "skipped: no answer in the tree": 1}


def test_comparisons_are_no_dialogs(tmp_path: Path) -> None:
    data = helpers.write_lines(tmp_path / "pairs.jsonl", helpers.preferences(3))
    with pytest.raises(ConfigError, match="'preferences' does not give dialogs, which are needed here; dial"):
        sft.prepare(helpers.sft_config(tmp_path, data=(data,), format="preferences"), helpers.tokenizer())
