"""Round trips through transformers: Hugging Face and back bit for bit, Meta's shards with the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from puna.formats import export, find, huggingface, meta
from puna.formats.export import ExportConfig
from puna.model.reward import RewardModel
from puna.text import chat
from tests import helpers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.formats]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_hugging_face_to_puna_and_back_is_bit_equal(
    tie: bool, sharded: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=helpers.VOCAB, tie_word_embeddings=tie)
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB" if sharded else "1GB")
    helpers.tokenizer().save(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == sharded
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    export.run(ExportConfig(tmp_path / "theirs", tmp_path / "ours", dtype=kind))  # type: ignore[arg-type]
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tie
    for name, tensor in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("shards", [1, 2, 8])
@torch.inference_mode()
def test_metas_shards_give_transformers_the_same_logits(shards: int, tmp_path: Path) -> None:
    model = helpers.model(n_heads=8, n_kv_heads=8, ffn_hidden=256)
    meta.save(model, helpers.tokenizer(), tmp_path / "meta", shards=shards)
    export.run(ExportConfig(tmp_path / "meta", tmp_path / "hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokens = torch.randint(helpers.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(find.load(tmp_path / "meta").model(tokens), model(tokens), rtol=0, atol=0)


@torch.inference_mode()
def test_an_exported_reward_model_scores_alike(tmp_path: Path) -> None:
    helpers.reward_folder(tmp_path / "reward")
    export.run(ExportConfig(tmp_path / "reward", tmp_path / "exported"))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    ours = find.load(tmp_path / "exported").model
    assert isinstance(ours, RewardModel)
    for dialog in helpers.dialogs(5):
        tokens = torch.tensor([chat.encode(dialog, helpers.tokenizer()).tokens])
        score = ours(tokens, torch.tensor([tokens.shape[1]]))
        torch.testing.assert_close(score, theirs(tokens).logits[:, 0], rtol=1e-4, atol=1e-5)


def test_transformers_reads_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    helpers.talker_folder(tmp_path / "model")
    export.run(ExportConfig(tmp_path / "model", tmp_path / "out", license="apache-2.0"))
    data = hub.ModelCard.load(tmp_path / "out/README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.tags == ["llama", "puna"]
    huggingface.load_model(tmp_path / "out")
