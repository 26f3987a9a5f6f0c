"""Meta's layout: shards cut and merged, written and read, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import ConfigError, DataError
from puna.formats import huggingface, meta
from puna.model.sizes import LLAMA_2, ffn_hidden
from puna.model.transformer import Transformer
from tests import helpers

pytestmark = pytest.mark.formats

SHAPE = {"dim": 32, "n_heads": 8, "n_kv_heads": 8, "ffn_hidden": 256}
TOKENS = torch.arange(3, 33).view(2, 15)
COLUMNS, ROWS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2", "tok_embeddings")


def model(**changes: Any) -> Transformer:
    made = helpers.model(**(SHAPE | changes))
    for number, (name, parameter) in enumerate(made.named_parameters()):
        if "norm" in name:
            parameter.data += 0.01 * number
    return made


def metas_folder(folder: Path, made: Transformer, shards: int, **params: Any) -> Path:
    """A download as Meta cut it, written without our own code."""
    folder.mkdir(parents=True)
    for rank in range(shards):
        part = {"rope.freqs": torch.zeros(4)}
        for name, tensor in made.state_dict().items():
            matrix = name.split(".")[-2]
            dimension = 0 if matrix in COLUMNS else 1 if matrix in ROWS else None
            size = 0 if dimension is None else tensor.shape[dimension] // shards
            mine = tensor if dimension is None else tensor.narrow(dimension, rank * size, size)
            part[name] = mine.clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    config = made.config
    said = {"dim": config.dim, "n_heads": config.n_heads, "n_layers": config.n_layers, "norm_eps": config.norm_eps}
    said |= {"multiple_of": 256, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(said | params))
    helpers.tokenizer().save(folder.parent)
    return folder


def edit(folder: Path, rank: int, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


@pytest.mark.parametrize("shards", [1, 2, 8])
@torch.inference_mode()
def test_metas_shards_are_the_unsharded_model(shards: int, tmp_path: Path) -> None:
    made = model()
    again, tokenizer = meta.load(metas_folder(tmp_path / "llama", made, shards))
    assert again.config.max_seq_len == 4096
    assert torch.equal(again(TOKENS), made(TOKENS))
    assert tokenizer.sha256 == helpers.tokenizer().sha256
    half, _ = meta.load(tmp_path / "llama", torch.bfloat16)
    assert half.output.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 8, "ffn_hidden": 88}, {"ffn_hidden": 40, "rope_theta": 5e3}])
@torch.inference_mode()
def test_round_trip(shards: int, changes: dict[str, Any], tmp_path: Path) -> None:
    made = model(**changes)
    meta.save(made, helpers.tokenizer(), tmp_path / "llama", shards=shards, provenance={"stage": "sft"})
    again, _ = meta.load(tmp_path / "llama")
    assert again.config == made.config
    before, after = made.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "llama").glob("*.pth"))]
    whole = sum(tensor.nbytes for tensor in before.values())
    assert len(sizes) == shards and max(sizes) < 1.5 * whole / shards + 20_000
    assert json.loads((tmp_path / "llama/puna.json").read_text()) == {"stage": "sft", "max_seq_len": 256}


def test_tied_embeddings_are_written_twice(tmp_path: Path) -> None:
    made = model(tie_embeddings=True)
    meta.save(made, helpers.tokenizer(), tmp_path / "llama", dtype=torch.bfloat16)
    again, _ = meta.load(tmp_path / "llama")
    assert not again.config.tie_embeddings
    assert torch.equal(again.output.weight, made.tok_embeddings.weight.bfloat16().float())


@torch.inference_mode()
def test_meta_to_hugging_face_to_meta(tmp_path: Path) -> None:
    made = model(n_kv_heads=2)
    meta.save(made, helpers.tokenizer(), tmp_path / "meta", shards=2)
    huggingface.save_model(*meta.load(tmp_path / "meta"), tmp_path / "hf")
    meta.save(huggingface.load_model(tmp_path / "hf"), helpers.tokenizer(), tmp_path / "again", shards=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        one, other = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("meta", "again"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_params_of_the_four_sizes() -> None:
    """What is written is what Meta's files say (34B: CodeLlama's)."""
    for name, config in LLAMA_2.items():
        params = meta._params(config)
        assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == (
            (4096, 1.3) if name == "70b" else (256, None)
        )
        assert params.get("n_kv_heads") == (8 if name in ("34b", "70b") else None)
        hidden = ffn_hidden(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier", 1.0))
        assert hidden == config.ffn_hidden


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_kv_heads 2 cannot be cut into 8 shards"):
        meta.save(model(n_kv_heads=2), helpers.tokenizer(), tmp_path / "llama", shards=8)
    with pytest.raises(ConfigError, match="which has 384 ids, the model 400"):
        meta.save(model(vocab_size=400), helpers.tokenizer(), tmp_path / "llama")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a folder of Meta's layout: it needs params\.json"):
        meta.load(tmp_path)
    metas_folder(tmp_path / "llama", model(), 1)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"llama/tokenizer\.model: no such file, and none one folder up"):
        meta.load(tmp_path / "llama")


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_shard_is_named(missing: int, tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 4)
    (folder / f"consolidated.{missing:02d}.pth").unlink()
    with pytest.raises(ConfigError, match=rf"consolidated\.{missing:02d}\.pth is missing"):
        meta.load(folder)


def _other_norm(shard: dict[str, Any]) -> None:
    shard["norm.weight"][0] += 1


def _other_type(shard: dict[str, Any]) -> None:
    shard["output.weight"] = shard["output.weight"].half()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_other_norm, r"norm\.weight is another"),
        (_other_type, r"output\.weight is another"),
        (lambda shard: shard.pop("norm.weight"), r"norm\.weight is in one of them only"),
        (lambda shard: shard.update({"output.weight": torch.zeros(1)}), r"output\.weight is another"),
    ],
)
def test_shards_that_disagree_are_refused(change: Callable[[dict[str, Any]], Any], what: str, tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 2)
    edit(folder, 1, change)
    with pytest.raises(DataError, match=rf"consolidated\.01\.pth: does not fit consolidated\.00\.pth: {what}"):
        meta.load(folder)


def test_one_shard_too_many(tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1)
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    with pytest.raises(DataError, match=r"consolidated\.01\.pth: one file too many"):
        meta.load(folder)


class Payload:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1)
    torch.save({"tok_embeddings.weight": Payload(tmp_path / "ran")}, folder / "consolidated.00.pth")
    with pytest.raises(DataError, match=r"consolidated\.00\.pth: refused.*nothing of it was run"):
        meta.load(folder)
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"consolidated\.00\.pth: "):
        meta.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 10, 5000, -1])
def test_a_truncated_shard_is_named(size: int, tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 2)
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"consolidated\.01\.pth: truncated or damaged"):
        meta.load(folder)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    meta.save(model(), helpers.tokenizer(), tmp_path / "llama", shards=2)
    path = tmp_path / "llama/consolidated.01.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"consolidated\.01\.pth is damaged: its MD5 is not that of checklist\.chk"):
        meta.load(tmp_path / "llama")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([torch.zeros(2)], "a dict of plain tensors"),
        ({"tok_embeddings.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, "a dict of plain tensors"),
        ({"tok_embeddings.weight": torch.zeros(2, 2, dtype=torch.int64)}, "a dict of plain tensors"),
        ({"norm.weight": torch.zeros(2)}, r"tok_embeddings\.weight is missing"),
        ({"tok_embeddings.weight": torch.zeros(384, 5)}, "5 wide, no part of the 32"),
        ({"tok_embeddings.weight": torch.zeros(384, 0)}, "0 wide, no part of the 32"),
    ],
)
def test_strange_shards_are_refused(value: Any, why: str, tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1)
    torch.save(value, folder / "consolidated.00.pth")
    with pytest.raises(DataError, match=why):
        meta.load(folder)


def test_a_shard_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1)
    packed = tmp_path / "packed.pth"
    source = zipfile.ZipFile(folder / "consolidated.00.pth")
    with source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    packed.rename(folder / "consolidated.00.pth")
    with pytest.raises(DataError, match=r"consolidated\.00\.pth"):
        meta.load(folder)


@pytest.mark.parametrize(
    "params",
    [
        {"n_layers": 10**9},
        {"n_layers": 2000},
        {"dim": 10**12},
        {"dim": 1 << 30},
        {"dim": -32},
        {"dim": "32"},
        {"n_heads": 0},
        {"n_heads": 7},
        {"n_kv_heads": 3},
        {"vocab_size": 10**9},
        {"vocab_size": 10},
        {"multiple_of": 0},
        {"multiple_of": 1 << 30},
        {"ffn_dim_multiplier": 1e300},
        {"ffn_dim_multiplier": float("nan")},
        {"norm_eps": True},
        {"use_scaled_rope": True},
    ],
)
def test_absurd_params_are_refused_before_anything_is_made(params: dict[str, Any], tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1, **params)
    with pytest.raises((ConfigError, DataError), match=r"llama.*(params\.json|tokenizer|shape|consolidated)") as caught:
        meta.load(folder)
    assert "\n" not in str(caught.value)


def test_damaged_params_are_named(tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(), 1)
    deep = "[" * 100_000
    for content, why in (
        ("{", "not JSON"),
        (deep, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"dim": 32}', "must say"),
    ):
        (folder / "params.json").write_text(content)
        with pytest.raises((ConfigError, DataError), match=rf"params\.json: .*{why}"):
            meta.load(folder)
    metas_folder(tmp_path / "other/llama", model(), 1)
    for content, why in ((deep, "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "other/llama/puna.json").write_text(content)
        with pytest.raises(DataError, match=rf"puna\.json: {why}"):
            meta.load(tmp_path / "other/llama")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = metas_folder(tmp_path / "llama", model(vocab_size=400), 1)
    with pytest.raises(ConfigError, match=r"llama: its tokenizer has 384 ids, the model 400: it is another model's"):
        meta.load(folder)
    (folder / "params.json").unlink()
    metas_folder(tmp_path / "deeper/llama", model(vocab_size=300), 1, vocab_size=300)
    with pytest.raises(ConfigError, match="its tokenizer has 384 ids, the model only 300"):
        meta.load(tmp_path / "deeper/llama")
