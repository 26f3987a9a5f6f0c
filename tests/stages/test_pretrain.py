"""Pretraining from text to a model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna import config, parallel
from puna.config import ConfigError, DataError
from puna.data.shards import Shard, read_shard
from puna.formats import huggingface
from puna.run_folder import read_metrics
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig
from puna.text import tokenizer as tokenizers
from tests import helpers


def test_text_becomes_a_model(tmp_path: Path) -> None:
    cfg = helpers.pretrain_config(tmp_path, steps=40, optim=helpers.quick(1e-2))
    model_path = pretrain.run(cfg)
    assert model_path == tmp_path / "pretrain/model"
    tokenizer, model = tokenizers.load(model_path), huggingface.load_model(model_path)
    assert model.config == cfg.model and tokenizer.vocab_size == helpers.VOCAB
    lines = read_metrics(tmp_path / "pretrain/metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(40), 40]
    assert lines[0]["loss"] == pytest.approx(6.45, abs=0.4)  # log 384, and half the variance 1 of the first logits
    assert lines[-1]["validation_loss"] < 0.75 * lines[0]["loss"]
    done = json.loads((tmp_path / "pretrain/done/pretrain.json").read_text())
    assert done == {"validation_loss": lines[-1]["validation_loss"], "tokens": 40 * 8 * 24}
    assert json.loads((model_path / "puna.json").read_text()) == {"stage": "pretrain", "steps": 40}
    assert config.load(PretrainConfig, [str(tmp_path / "pretrain/config.json")]) == cfg


def test_a_finished_run_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.pretrain_config(tmp_path, steps=1)
    pretrain.run(cfg)
    monkeypatch.setattr(pretrain, "prepare", None)
    assert pretrain.run(cfg) == tmp_path / "pretrain/model"


def test_no_checkpoints_where_none_are_asked_for(tmp_path: Path) -> None:
    pretrain.run(helpers.pretrain_config(tmp_path, checkpoint_every=0, steps=2))
    assert not (tmp_path / "pretrain/checkpoints").exists()
    with pytest.raises(ConfigError, match="batch_size is 0: it must be positive"):
        helpers.pretrain_config(tmp_path, batch_size=0)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    cfg = helpers.pretrain_config(tmp_path)
    tokenizer, train, validation = pretrain.prepare(cfg, tmp_path / "data")

    def documents(shard: Shard) -> list[str]:
        bounds = zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
        return [tokenizer.decode(shard.tokens[begin:end].tolist()) for begin, end in bounds]

    texts = helpers.sentences(300)
    assert documents(validation) == texts[::10]
    assert documents(train) == [text for i, text in enumerate(texts) if i % 10]


def test_prepared_data_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.pretrain_config(tmp_path)
    tokenizer, train, _ = pretrain.prepare(cfg, tmp_path / "data")
    monkeypatch.setattr(tokenizers, "train", None)
    monkeypatch.setattr(pretrain.shards, "write_shard", None)
    again, same, _ = pretrain.prepare(cfg, tmp_path / "data")
    assert again.sha256 == tokenizer.sha256 and (same.tokens == train.tokens).all()


def test_a_flipped_bit_of_the_data_is_refused(tmp_path: Path) -> None:
    cfg = helpers.pretrain_config(tmp_path)
    pretrain.prepare(cfg, tmp_path / "data")
    file = tmp_path / "data/validation.tokens"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"validation\.tokens: damaged"):
        pretrain.prepare(cfg, tmp_path / "data")


def test_more_than_half_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_share is 0\.7: it must be from 0 to 0\.5"):
        helpers.pretrain_config(tmp_path, validation_share=0.7)


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    helpers.tokenizer().save(tmp_path)
    cfg = helpers.pretrain_config(tmp_path, tokenizer=tmp_path / "tokenizer.model", steps=1)
    pretrain.run(cfg)
    assert tokenizers.load(tmp_path / "pretrain/model").sha256 == helpers.tokenizer().sha256
    read_shard(tmp_path / "pretrain/data/train", helpers.tokenizer())


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    helpers.tokenizer().save(tmp_path)
    cfg = helpers.pretrain_config(tmp_path, tokenizer=tmp_path, model=helpers.config(vocab_size=300))
    with pytest.raises(ConfigError, match=r"384 tokens, model\.vocab_size is 300"):
        pretrain.run(cfg)


def test_windows_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seq_len is 300, beyond the model's context"):
        pretrain.run(helpers.pretrain_config(tmp_path, seq_len=300))


@pytest.mark.parametrize(("seq_len", "part"), [(5000, "training"), (400, "validation")])
def test_too_little_text_is_refused_before_training(seq_len: int, part: str, tmp_path: Path) -> None:
    wide = helpers.config(max_seq_len=8192)
    cfg = helpers.pretrain_config(tmp_path, seq_len=seq_len, model=wide, validation_share=0.05)
    with pytest.raises(DataError, match=f"the {part} part has"):
        pretrain.run(cfg)
    assert not (tmp_path / "pretrain/metrics.jsonl").exists()


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    cfg = helpers.pretrain_config(tmp_path)
    _, train, _ = pretrain.prepare(cfg, tmp_path / "data")
    loss = [
        pretrain.update(replace(cfg, precision=precision), helpers.model(), train, 0, torch.device("cpu"))
        for precision in ("fp32", "bf16")
    ]
    assert loss[0] == pytest.approx(loss[1], abs=0.01)
    rounded = parallel.dtype("bf16", torch.device("cpu")) == torch.bfloat16  # not on every processor
    assert (loss[0] != loss[1]) == rounded


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path) -> None:
    cfg = helpers.pretrain_config(tmp_path, checkpoint_every=1, checkpoints_kept=3, steps=6)
    pretrain.run(cfg)
    kept = sorted(path.name for path in (cfg.out / "checkpoints").glob("step_*"))
    assert [int(name.removeprefix("step_")) for name in kept] == [4, 5, 6]
