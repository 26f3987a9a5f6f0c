"""Hugging Face folders: written whole, read back exactly, and refused with a name and a reason."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from puna.config import ConfigError, DataError
from puna.formats import find, folders, huggingface, tokenizer_json
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer as tokenizers
from puna.text.pieces import USER_DEFINED, read_pieces, sentencepiece_model
from puna.text.tokenizer import SentencePieceTokenizer, Tokenizer
from tests import helpers

pytestmark = pytest.mark.formats

TINY = ModelConfig(16, 2, 4, 2, 300, 24, max_seq_len=16, rope_theta=5000.0)
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "the puna is high, the llama is calm, the herder is patient and the grass is short. " * 3
    return tokenizers.train([text, "qwertzuiopasdfghjklyxcvbnm"], 290, tmp_path_factory.mktemp("tokenizer"))


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(tie: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(16, 2, 4, 2, 300, 24, max_seq_len=16, tie_embeddings=tie))
    provenance = {"stage": "sft", "step": 3, "parents": ["pretrain/model"]}
    huggingface.save_model(model, tokenizer, tmp_path / "deep/model", provenance=provenance)
    again = huggingface.load_model(tmp_path / "deep/model")
    assert again.config == model.config
    assert equal(again, model)
    assert (again.output.weight is again.tok_embeddings.weight) == tie
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert json.loads((tmp_path / "deep/model/puna.json").read_text()) == provenance
    assert tokenizers.load(tmp_path / "deep/model").sha256 == tokenizer.sha256
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_reward_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = RewardModel(Transformer(TINY))
    huggingface.save_reward_model(model, tokenizer, tmp_path / "model")
    again = huggingface.load_reward_model(tmp_path / "model")
    assert equal(again, model)
    assert torch.equal(again(TOKENS, torch.tensor([10, 4])), model(TOKENS, torch.tensor([10, 4])))


def test_an_older_folder_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Transformer(TINY)
        huggingface.save_model(model, tokenizer, tmp_path / "model")
        (tmp_path / "model" / "stray").touch()
    assert equal(huggingface.load_model(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_older_one(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(TINY)
    huggingface.save_model(model, tokenizer, tmp_path / "model")

    monkeypatch.setattr(safetensors.torch, "save_file", _full)
    with pytest.raises(OSError, match="No space"):
        huggingface.save_model(Transformer(TINY), tokenizer, tmp_path / "model")
    assert equal(huggingface.load_model(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_killed_saves_left_is_cleared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    older, newer = Transformer(TINY), Transformer(TINY)
    for model in (older, newer):
        huggingface.save_model(model, tokenizer, tmp_path / "model")
        (tmp_path / f".model.tmp-{os.getpid()}").mkdir()  # a save of this very process id was killed
        (tmp_path / ".model.tmp-1").mkdir()
        (tmp_path / ".model.old-1").mkdir()
    huggingface.save_model(newer, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert equal(huggingface.load_model(tmp_path / "model"), newer)


def test_a_save_killed_between_its_renames_loses_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(TINY)
    huggingface.save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old-1")
    assert equal(huggingface.load_model(tmp_path / "model"), model)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(safetensors.torch, "save_file", _full)
        huggingface.save_model(Transformer(TINY), tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert equal(huggingface.load_model(tmp_path / "model"), model)


def test_a_save_is_on_the_disk(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(folders, "sync_folder", lambda folder: synced.append((folder.name, (tmp_path / "m").exists())))
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path / "m")
    assert synced == [(f".m.tmp-{os.getpid()}", False), (tmp_path.name, True)]


@pytest.mark.parametrize("is_reward", [False, True])
def test_a_tokenizer_is_loaded_with_its_model_alone(is_reward: bool, tmp_path: Path) -> None:
    folder = (helpers.reward_folder if is_reward else helpers.talker_folder)(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert huggingface.load_tokenizer(folder).sha256 == helpers.tokenizer().sha256
    edit_config(folder, vocab_size=300)
    with pytest.raises(ConfigError, match="model: its tokenizer has 384 ids, the model only 300: it is another"):
        huggingface.load_tokenizer(folder)


def _full(*_: Any, **__: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL = """
import resource, sys
from pathlib import Path
from puna.formats import huggingface
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the next best thing to a full disk
try:
    model = Transformer(ModelConfig(64, 1, 1, 1, 300, 64, max_seq_len=8))
    huggingface.save_model(model, tokenizer.load(sys.argv[1]), Path(sys.argv[2]))
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_disk_that_takes_no_more_is_an_oserror(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", _full)
    with pytest.raises(OSError, match="No space") as caught:
        huggingface.save_model(Transformer(TINY), tokenizer, tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith("model.safetensors")
    assert not list(tmp_path.iterdir())
    tokenizer.save(tmp_path)
    program = [sys.executable, "-c", FULL, str(tmp_path), str(tmp_path / "model")]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} ")


def test_several_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer(TINY)
    huggingface.save_model(model, tokenizer, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in files.items():
        safetensors.torch.save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert equal(huggingface.load_model(tmp_path), model)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors: no such file"):
        huggingface.load_model(tmp_path)
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="refused, it names"):
        huggingface.load_model(tmp_path)


def test_a_folder_lists_its_weights_digests(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD", 8000)
    for seed in (0, 1):  # a second save is listed anew
        torch.manual_seed(seed)
        huggingface.save_model(Transformer(TINY), tokenizer, tmp_path / "model")
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "model", check=True)
        huggingface.verify(tmp_path / "model")
    listed = (tmp_path / "model/SHA256SUMS").read_text().splitlines()
    assert len(listed) == len(huggingface.weight_files(tmp_path / "model")) > 2
    (tmp_path / "model").rename(tmp_path / ".model.old-1")  # a save was killed between its renames
    huggingface.verify(tmp_path / "model")
    huggingface.save_reward_model(RewardModel(Transformer(TINY)), tokenizer, tmp_path / "model")
    huggingface.verify(tmp_path / "model")


def test_a_changed_weight_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    huggingface.load_model(tmp_path)  # a stage's own reading trusts its run
    with pytest.raises(DataError, match=r"model\.safetensors is damaged or was changed.*remove SHA256SUMS"):
        huggingface.verify(tmp_path)
    with pytest.raises(DataError, match="get or write the folder again"):
        find.load(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *./README.md\n")  # another program's list of other files
    huggingface.verify(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    huggingface.verify(tmp_path)


@pytest.mark.parametrize("line", ["x  model.safetensors", "0" * 64, "0" * 64 + "  ../a", "0" * 64 + "  /etc/passwd"])
def test_a_list_of_digests_that_is_none_is_refused(line: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    with (tmp_path / "SHA256SUMS").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"SHA256SUMS, line 2: (not a sha256|refused)"):
        huggingface.verify(tmp_path)


def test_a_large_model_is_written_as_several_files(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    model = Transformer(TINY)
    monkeypatch.setattr(huggingface, "SHARD", 8000)
    huggingface.save_model(model, tokenizer, tmp_path / "model")
    files = huggingface.weight_files(tmp_path / "model")
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert all(file.stat().st_size < max(8000, largest) + 2000 for file in files), "and a header"
    assert equal(huggingface.load_model(tmp_path / "model"), model)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=0)


def test_a_tensor_in_two_files_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    safetensors.torch.save_file({"model.norm.weight": torch.zeros(16)}, tmp_path / "more.safetensors")
    index = {"weight_map": {"model.norm.weight": "more.safetensors", "lm_head.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"more\.safetensors: model\.norm\.weight is in another file of this folder too"
    ):
        huggingface.load_model(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(size: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(DataError, match=r"model\.safetensors: truncated or damaged"):
        huggingface.load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"factor": 4}},
        {"rope_scaling": [4]},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
        {"rope_parameters": {"type": "linear", "factor": 4}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 8},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_what_llama_2_has_not_is_refused(changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    edit_config(tmp_path, **changes)
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"config\.json: {key} .*not supported"):
        huggingface.load_model(tmp_path)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_positions_that_are_not_scaled_are_read(key: str, kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer(TINY)
    huggingface.save_model(model, tokenizer, tmp_path)
    edit_config(tmp_path, **{key: {kind: "default"}})
    assert huggingface.load_model(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 18, "head_dim": 4}, "head_dim 4 is not supported"),
        ({"hidden_size": 18, "head_dim": None}, "dim 18 is not an even multiple of n_heads 4"),
        ({"head_dim": "4"}, "head_dim 4 is not supported"),
        ({"num_attention_heads": "4", "head_dim": 4}, "n_heads is '4'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': it must be true or false"),
        ({"architectures": 5}, "architectures is 5, expected LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is LlamaForCausalLM, expected"),
    ],
)
def test_an_odd_value_is_named(changes: dict[str, Any], why: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    edit_config(tmp_path, **changes)
    for read in (huggingface.load_model, huggingface.load_tokenizer):
        with pytest.raises(ConfigError, match=rf"config\.json: {why}"):
            read(tmp_path)


def test_deeply_nested_json_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    deep = '{"a":' + "[" * 100_000
    (tmp_path / "model.safetensors.index.json").write_text(deep)
    with pytest.raises(DataError, match=r"index\.json: not an index"):
        huggingface.load_model(tmp_path)
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        huggingface.load_model(tmp_path)


def test_another_architecture_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*expected LlamaForSequenceClassification"):
        huggingface.load_reward_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 16}')
    with pytest.raises(ConfigError, match=r"intermediate_size, .*vocab_size is missing"):
        huggingface.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        huggingface.load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        huggingface.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"output\.weight is missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight has shape \(3,\)"),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            "no tensor of a 2-layer",
        ),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(1)}), "q_proj.bias is no"),
    ],
)
def test_wrong_tensors_are_named(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    huggingface.save_model(Transformer(TINY), tokenizer, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=message):
        huggingface.load_model(tmp_path)


def test_a_reward_has_one_label(tokenizer: Tokenizer, tmp_path: Path) -> None:
    huggingface.save_reward_model(RewardModel(Transformer(TINY)), tokenizer, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(tensors | {"score.weight": torch.zeros(2, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="one label"):
        huggingface.load_reward_model(tmp_path)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="290 ids, the model only 32"):
        huggingface.save_model(Transformer(ModelConfig(16, 2, 4, 2, 32, 24)), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_permutations_undo_each_other() -> None:
    rows = torch.arange(8.0)[:, None]  # Two heads of four numbers.
    assert huggingface.to_half_split(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert huggingface.to_interleaved(huggingface.to_half_split(rows, 2), 2).equal(rows)


def _save_sharded(folder: Path) -> None:
    torch.manual_seed(0)
    model = helpers.placed(Transformer(TINY))
    huggingface.save_model(model, tokenizers.load(folder), folder / "model")


@pytest.mark.distributed
def test_a_sharded_model_is_gathered(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    helpers.in_processes(_save_sharded, tmp_path)
    torch.manual_seed(0)
    assert equal(huggingface.load_model(tmp_path / "model"), Transformer(TINY))


def test_a_tokenizer_with_user_defined_symbols_has_no_tokenizer_json(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    pieces = read_pieces(tokenizer.serialized).pieces
    assert tokenizer_json.files(tokenizer)
    own = sentencepiece_model([*pieces, ("<tool>", 0.0, USER_DEFINED)])
    assert tokenizer_json.files(SentencePieceTokenizer(own)) == {}
