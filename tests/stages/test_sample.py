"""Bulk sampling: every usable answer once, the same whether killed on the way or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import parallel
from puna.config import ConfigError
from puna.data import readers
from puna.data.map_shards import Workers
from puna.formats import huggingface
from puna.stages import sample
from puna.stages.sample import SampleConfig
from tests import helpers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    huggingface.save_model(helpers.talker(end=0.3), helpers.tokenizer(), folder)
    return folder


def config(tmp_path: Path, model: Path, out: str) -> SampleConfig:
    prompts = tmp_path / "prompts.jsonl"
    records = [{"id": f"p{i}", "messages": [helpers.user(text)]} for i, text in enumerate(helpers.sentences(20))]
    helpers.write_lines(prompts, records)
    return SampleConfig(tmp_path / out, model, (prompts,), n=3, max_new_tokens=12, shard_size=8, seed=1)


def test_dialogs_are_written_and_read_again(tmp_path: Path, model: Path) -> None:
    folder = sample.run(config(tmp_path, model, "out"))
    dialogs = readers.read((folder / "dialogs.jsonl",), "dialogs").records
    done = json.loads((folder / "done" / "sample.json").read_text())
    assert done["dialogs"] == len(dialogs) > 20
    assert done["dialogs"] + done["unusable"] == 60
    assert len({dialog["id"] for dialog in dialogs}) == len(dialogs)


def test_a_lost_shard_alone_is_sampled_again(tmp_path: Path, model: Path) -> None:
    first = sample.run(config(tmp_path, model, "out"))
    whole = (first / "dialogs.jsonl").read_text()
    (first / "parts" / "00001.jsonl").unlink()
    (first / "done" / "sample.json").unlink()
    kept = (first / "parts" / "00000.jsonl").stat().st_mtime_ns
    sample.run(config(tmp_path, model, "out"))
    assert (first / "dialogs.jsonl").read_text() == whole
    assert (first / "parts" / "00000.jsonl").stat().st_mtime_ns == kept


def answers(cfg: SampleConfig, **changes: Any) -> dict[str, str]:
    """What a run with these changes writes, in a folder of its own, by the answers' ids."""
    out = cfg.out.with_name("-".join(f"{key}={value}" for key, value in changes.items()) or "unchanged")
    dialogs = helpers.read_lines(sample.run(replace(cfg, out=out, **changes)) / "dialogs.jsonl")
    return {dialog["id"]: dialog["messages"][-1]["content"] for dialog in dialogs}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32: an answer that ends early leaves the others' draws as they are."""
    monkeypatch.setattr(parallel, "dtype", lambda precision, device: torch.float32)


@pytest.mark.usefixtures("exact")
def test_a_stop_text_ends_an_answer_and_is_cut(tmp_path: Path, model: Path) -> None:
    cfg = config(tmp_path, model, "out")
    whole, cut = answers(cfg), answers(cfg, stop=("er", "th"))
    shortened = {id: text for id, text in whole.items() if "er" in text or "th" in text}
    assert len(shortened) > 5
    for id, text in whole.items():
        assert cut.get(id, "") == min(text.partition(stop)[0] for stop in ("er", "th")).rstrip()


@pytest.mark.usefixtures("exact")
def test_min_p_and_the_repetition_penalty_reach_the_draws(tmp_path: Path) -> None:
    cfg = replace(config(tmp_path, helpers.talker_folder(tmp_path / "model", end=0.001), "out"), stop=(" ",))
    greedy = answers(cfg, temperature=0.0)
    assert greedy and answers(cfg, min_p=1.0) == greedy != answers(cfg)
    assert answers(cfg, temperature=0.0, repetition_penalty=100.0) != greedy


@pytest.mark.parametrize(
    "changes", [{"min_p": 0.5}, {"repetition_penalty": 1.5}, {"top_k": 3}, {"stop": ("er",)}], ids=str
)
def test_a_run_is_not_resumed_with_other_settings(changes: dict[str, Any], tmp_path: Path, model: Path) -> None:
    cfg = replace(config(tmp_path, model, "out"), n=1)
    sample.run(cfg)
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"begun with {key} .*: use another --out"):
        sample.run(replace(cfg, **changes))


def test_local_workers_share_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "n_cores", lambda: 8)
    of = [Workers(0), Workers(1), Workers(3), Workers(16), Workers(4, "ray")]
    assert [sample._threads(workers) for workers in of] == [0, 0, 2, 1, 0]


@pytest.mark.distributed
@pytest.mark.parametrize("cluster", ["local", "ray"])
def test_two_workers_write_what_one_process_writes(cluster: str, tmp_path: Path, model: Path) -> None:
    alone = sample.run(replace(config(tmp_path, model, "alone"), threads=1))
    shared = sample.run(replace(config(tmp_path, model, "shared"), threads=1, **helpers.two_workers(cluster)))
    assert (shared / "dialogs.jsonl").read_text() == (alone / "dialogs.jsonl").read_text()
