"""The bench of heads and experts: its variants, its rows, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from puna.config import ConfigError
from puna.model.transformer import ModelConfig
from puna.report import memory
from puna.report.memory import MemoryBenchConfig
from tests import helpers

SMALL = {"kv_heads": 2, "experts": 4, "seq_len": 16, "batch_size": 2, "steps": 1, "decode_batch": 2, "context": 12}


def config(out: Path, **changes: object) -> MemoryBenchConfig:
    shape = helpers.config(n_kv_heads=4, n_layers=1, ffn_hidden=96)
    return MemoryBenchConfig(out, **({"model": shape, **SMALL} | changes))  # type: ignore[arg-type]


def test_variants_are_alike_in_what_a_token_reads(tmp_path: Path) -> None:
    shapes = memory.variants(MemoryBenchConfig(tmp_path))
    assert list(shapes) == ["MHA", "GQA 2", "MQA", "GQA 2, 2 of 8 experts"]
    assert [shape.n_kv_heads for shape in shapes.values()] == [8, 2, 1, 2]
    sizes = [shape.n_active_params() for shape in shapes.values()]
    assert max(sizes) / min(sizes) < 1.01
    mixture = shapes["GQA 2, 2 of 8 experts"]
    assert mixture.n_params() > 2 * mixture.n_active_params()


def test_a_row(tmp_path: Path) -> None:
    cfg = config(tmp_path, precision="fp32")
    threads = torch.get_num_threads()
    row = memory.measure(cfg, "MHA", cfg.model)
    assert torch.get_num_threads() == threads
    assert row["parameters"] == row["active_parameters"] == cfg.model.n_params()
    assert row["cache_bytes_per_token"] == 2 * 2 * 1 * 4 * 8  # keys and values, bfloat16, a layer, 4 heads of 8
    assert row["cache_bytes"] == 128 * 2 * 12
    assert row["training_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
    assert row["training_peak_bytes"] >= 0


def test_every_variant_has_a_process_a_line_and_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path / "bench")
    two = dict(list(memory.variants(cfg).items())[::3])
    monkeypatch.setattr(memory, "variants", lambda cfg: two)
    text = memory.run(cfg)
    rows = json.loads((tmp_path / "bench/memory.json").read_text())
    assert [row["name"] for row in rows] == list(two)
    assert [line.split("  ")[0] for line in text.splitlines()[1:3]] == [row["name"] for row in rows]
    # What a model, its gradients and moments take is there at the peak, and no more than a whole process.
    assert all(16 * row["parameters"] < row["training_peak_bytes"] < 2e9 for row in rows)
    drawing = (tmp_path / "bench/memory.svg").read_text()
    assert drawing.count("<path") > 8 and all(row["name"] in drawing for row in rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": helpers.config()}, "as many n_kv_heads as n_heads"),
        ({"kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"context": 1000}, "1000 tokens do not fit the model's context of 256"),
        ({"context": 3}, "context is 3: a prompt and its answer need at least 4"),
        ({"steps": 0}, "steps is 0"),
        ({"experts": 1}, "top_k is 2 of 1 experts"),
    ],
)
def test_mistakes(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **changes)


def test_the_default_is_a_llama() -> None:
    assert MemoryBenchConfig(Path()).model == ModelConfig(256, 6, 8, 8, 2048, 688)
