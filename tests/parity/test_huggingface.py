"""Our Llama and transformers' give the same numbers on random weights: logits, cached decoding, reward scores."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna import losses
from puna.formats import huggingface
from puna.model.moe import MoEConfig
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from tests.parity import llama2c

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.formats]

CachedLogits = Callable[[Transformer, Tensor, int], Tensor]

SHAPES = {
    "multi-head": ModelConfig(48, 2, 4, 4, 300, 64, 64, 1e-5, 5000.0),
    "grouped": ModelConfig(48, 3, 6, 2, 300, 80, 64, 1e-6, 10000.0),
    "multi-query": ModelConfig(32, 2, 4, 1, 300, 64, 64, 1e-5, 10000.0),
    "tied": ModelConfig(48, 2, 6, 3, 300, 64, 64, 1e-5, 100000.0, tie_embeddings=True),
}


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # Norm weights of one would hide a norm that is swapped or left out.
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "the puna is high, the llama is calm, the herder is patient and the grass is short. " * 3
    return tokenizers.train([text, "qwertzuiopasdfghjklyxcvbnm"], 290, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits(name: str, tokenizer: Tokenizer, cached_logits: CachedLogits, tmp_path: Path) -> None:
    model = random_model(SHAPES[name])
    huggingface.save_model(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached_logits(model, tokens, 7), expected, rtol=1e-4, atol=1e-5)
    ids = theirs.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 0)

    # And back: what transformers writes, in its newest spelling, is what we read.
    theirs.save_pretrained(tmp_path / "theirs")
    again = huggingface.load_model(tmp_path / "theirs")
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_reward_scores_with_padding(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = RewardModel(random_model(SHAPES[name]))
    huggingface.save_reward_model(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    lengths = torch.tensor([24, 9, 1, 17])
    tokens = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(24) >= lengths[:, None]] = tokenizer.pad_id
    expected = theirs(tokens, attention_mask=(tokens != tokenizer.pad_id).long()).logits
    assert expected.shape == (4, 1)
    torch.testing.assert_close(model(tokens, lengths), expected[:, 0], rtol=1e-4, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    again = huggingface.load_reward_model(tmp_path / "theirs")
    assert torch.equal(again(tokens, lengths), model(tokens, lengths))


@torch.inference_mode()
def test_a_mixture_of_experts_is_mixtral(tokenizer: Tokenizer, cached_logits: CachedLogits, tmp_path: Path) -> None:
    model = random_model(replace(SHAPES["grouped"], moe=MoEConfig(experts=5, top_k=2)))
    huggingface.save_model(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert sum(p.numel() for p in theirs.parameters()) == model.config.n_params()
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, output_router_logits=True)
    torch.testing.assert_close(model(tokens), expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached_logits(model, tokens, 7), expected.logits, rtol=1e-4, atol=1e-5)
    again = huggingface.load_model(tmp_path / "model")
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))

    # One layer's load-balancing loss; theirs counts all layers' tokens together.
    modeling = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    probabilities = expected.router_logits[0].softmax(-1)
    ours = losses.load_balancing_loss(probabilities, probabilities.topk(2).indices)
    torch.testing.assert_close(ours, modeling.load_balancing_loss_func(expected.router_logits[:1], 5, 2))


@torch.inference_mode()
def test_a_reward_model_of_experts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = RewardModel(random_model(replace(SHAPES["tied"], moe=MoEConfig(experts=3, top_k=2))))
    huggingface.save_reward_model(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == "MixtralForSequenceClassification"
    tokens = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits[:, 0]
    torch.testing.assert_close(model(tokens, torch.tensor([12, 12])), expected, rtol=1e-4, atol=1e-5)
    assert huggingface.load_reward_model(tmp_path / "model").config == model.config


@torch.inference_mode()
def test_bfloat16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(SHAPES["grouped"])
    huggingface.save_model(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    half = huggingface.load_model(tmp_path / "model", torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.bfloat16()), name
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    rounded = huggingface.load_model(tmp_path / "model")
    torch.testing.assert_close(rounded(tokens), theirs.float()(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.shared_data
def test_a_trained_model_tells_its_story(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/tiny_model"
    tokenizer = llama2c.load_tokenizer(folder / "stories260K_tok512.bin", 512)
    huggingface.save_model(llama2c.load_model(folder / "stories260K.bin"), tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    told = theirs.generate(torch.tensor([[tokenizer.bos_id]]), do_sample=False, max_new_tokens=200)
    expected = (folder / "stories260K_expected_greedy_200.txt").read_text()
    assert tokenizer.decode(told[0, 1:].tolist()).strip() == expected.strip()
