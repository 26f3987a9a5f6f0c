"""A trained Llama from elsewhere (stories260K of llama2.c): its reference losses, logits and greedy text."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from puna.config import ConfigError, DataError
from puna.model.transformer import Transformer
from puna.text.tokenizer import SentencePieceTokenizer
from tests.parity import llama2c

pytestmark = [pytest.mark.parity, pytest.mark.shared_data]


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data/tiny_model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return llama2c.load_model(folder / "stories260K.bin")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SentencePieceTokenizer:
    return llama2c.load_tokenizer(folder / "stories260K_tok512.bin", 512)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "stories260K_reference_nll.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@torch.inference_mode()
def test_losses_and_logits(model: Transformer, rows: list[dict[str, Any]]) -> None:
    judged = [row for row in rows if "nll_per_token" in row]  # The greedy row has its text alone.
    assert len(judged) == 6
    for row in judged:
        tokens = torch.tensor(row["tokens"])
        logits = model(tokens[None])[0]
        losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        torch.testing.assert_close(losses, torch.tensor(row["nll_per_token"]), rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[-1], torch.tensor(row["last_logits"]), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_greedy_text(folder: Path, model: Transformer, tokenizer: SentencePieceTokenizer) -> None:
    tokens = [tokenizer.bos_id]
    while len(tokens) < 201:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    text = (folder / "stories260K_expected_greedy_200.txt").read_text()
    assert tokenizer.decode(tokens).strip() == text.strip()


def test_tokenizer(tokenizer: SentencePieceTokenizer, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert [tokenizer.bos_id, *tokenizer.encode(row["text"])] == row["tokens"]
        assert tokenizer.decode(row["tokens"]) == row["text"]


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    model = (folder / "stories260K.bin").read_bytes()
    for name, data in {"short.bin": model[:20], "cut.bin": model[:-4], "other.bin": b"GGUF" * 100}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            llama2c.load_model(tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        llama2c.load_model(tmp_path / "none.bin")
    with pytest.raises(DataError, match=r"not a llama2\.c tokenizer of 500 pieces"):
        llama2c.load_tokenizer(folder / "stories260K_tok512.bin", 500)


def test_an_untied_output_comes_last(folder: Path, model: Transformer, tmp_path: Path) -> None:
    data = (folder / "stories260K.bin").read_bytes()
    untied = data[:20] + struct.pack("<i", -512) + data[24:] + torch.arange(512.0 * 64).numpy().tobytes()
    (tmp_path / "untied.bin").write_bytes(untied)
    again = llama2c.load_model(tmp_path / "untied.bin")
    assert torch.equal(again.output.weight.flatten(), torch.arange(512.0 * 64))
    assert torch.equal(again.tok_embeddings.weight, model.tok_embeddings.weight)
