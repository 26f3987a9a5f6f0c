"""Round trips through transformers: Hugging Face and back bit for bit, Meta's shards with the same logits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from puna.formats import export, find, huggingface, meta, tokenizer_json
from puna.formats.export import ExportConfig
from puna.model.reward import RewardModel
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import SentencePieceTokenizer, Tokenizer
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


# Tokenizers ----------------------------------------------------------------------------------------------------------

HOSTILE = (
    "",
    " ",
    "  two  spaces \n\t",
    "¿Qué? 你好 🦙",
    "</s><s><unk><0x0A>",
    "\u2581under",
    "\x00\x7f",
    "aaaaaaaaaaa",
    "e\u0301",
)


def theirs_of(tokenizer: Tokenizer, folder: Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that transformers makes of our tokenizer.json alone."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    for name, text in tokenizer_json.files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


TEXT_IS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}


def test_transformers_reads_our_tokenizer(tmp_path: Path) -> None:
    ours = helpers.tokenizer()
    theirs = theirs_of(ours, tmp_path)
    for text in (*HOSTILE, *helpers.sentences(50), " ".join(helpers.sentences(9))):
        ids = ours.encode(text)
        assert theirs.encode(text, **TEXT_IS_TEXT) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    assert theirs.encode("the llama") == [ours.bos_id, *ours.encode("the llama")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


def test_the_template_gives_our_ids(tmp_path: Path) -> None:
    helpers.talker_folder(tmp_path / "model")
    export.run(ExportConfig(tmp_path / "model", tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizers.load(tmp_path / "out").sha256 == helpers.tokenizer().sha256
    for dialog in helpers.dialogs(6):
        for messages in (dialog[:-1], [helpers.system("Answer shortly."), *dialog[:-1]]):
            ids = theirs(theirs.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
            assert ids == chat.encode_prompt(messages, helpers.tokenizer())


@pytest.mark.shared_data
def test_llama_2s_own_tokenizer(shared: Path, tmp_path: Path) -> None:
    theirs = theirs_of(tokenizers.load(shared / "data/tokenizer/llama2_tokenizer.model"), tmp_path)
    with gzip.open(shared / "data/tokenizer/llama2_reference_encodings.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) > 600
    assert [theirs.encode(row["text"], **TEXT_IS_TEXT) for row in rows] == [row["ids"] for row in rows]
