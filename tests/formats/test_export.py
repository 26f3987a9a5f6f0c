"""`puna export` and `puna inspect`: every format from every kind of model, the card, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import signal
import struct
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import puna
from puna import checkpoint, cli, config
from puna.api import Chat, RewardScorer
from puna.config import ConfigError, DataError
from puna.formats import convert, export, find, gguf, huggingface, inspect, meta
from puna.formats.card import card
from puna.formats.convert import ImportConfig
from puna.formats.export import ExportConfig
from puna.formats.inspect import InspectConfig
from puna.formats.lineage import Step
from puna.model.moe import MoEConfig
from puna.run_folder import RunFolder
from puna.stages.dpo import DPOConfig
from puna.stages.grpo import GRPOConfig
from puna.stages.ppo import PPOConfig
from puna.stages.pretrain import PretrainConfig
from puna.stages.reward import RewardConfig
from puna.stages.sft import SFTConfig
from puna.text import tokenizer as tokenizers
from tests import helpers

pytestmark = pytest.mark.formats


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return helpers.talker_folder(tmp_path / "source")


def looked_at(path: Path) -> dict[str, str]:
    rows = [line.split("  ", 1) for line in inspect.run(InspectConfig(path)).splitlines()]
    return {name: value.strip() for name, value in rows}


def a_run(folder: Path) -> Path:
    """SFT, a version with PPO, and a reward model, as the stages leave them, without the training."""
    for stage, parent, seed in (("sft", "pretrain/model", 1), ("v1", "pretrain/model", 2), ("v1/ppo", "v1/model", 3)):
        with RunFolder(folder / stage):
            settings = {"out": str(folder / stage), "epochs": 2, "batch_size": 16, "optim": {"lr": 2e-5, "clip": 1.0}}
            (folder / stage / "config.json").write_text(json.dumps(settings))
            provenance = {"stage": stage[-3:], "parent": str(folder / parent)}
            made = helpers.talker(seed)
            huggingface.save_model(made, helpers.tokenizer(), folder / stage / "model", provenance=provenance)
    (folder / "v1/ppo/evaluation").mkdir()
    measured: dict[str, Any] = {"name": "v1", "gold_helpfulness": {"mean": 0.5025, "low": 0.45, "high": 0.56, "n": 9}}
    measured |= {"accuracy": 0.75, "by_kind": {"fact": {"mean": 1.0}}}
    (folder / "v1/ppo/evaluation/evaluation.json").write_text(json.dumps(measured))
    provenance = {"stage": "reward", "parent": str(folder / "sft/model")}
    scorer = helpers.reward_model()
    huggingface.save_reward_model(scorer, helpers.tokenizer(), folder / "v1/reward/model", provenance=provenance)
    return folder


@pytest.mark.parametrize(("form", "name"), [("hf", "out"), ("gguf", "out.gguf"), ("meta", "out")])
@torch.inference_mode()
def test_every_format_opens_again_with_the_same_numbers(form: Any, name: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    tokens = torch.arange(3, 33).view(2, 15)
    before, after = puna.load(source), puna.load(export.run(ExportConfig(source, tmp_path / name, form)))
    assert isinstance(before, Chat) and isinstance(after, Chat)
    assert torch.equal(after.model(tokens), before.model(tokens))
    assert after.model.config == before.model.config
    assert after.tokenizer.encode("the llama, 7 tents") == before.tokenizer.encode("the llama, 7 tents")
    assert after.generate("who?", seed=3, max_new_tokens=8) == before.generate("who?", seed=3, max_new_tokens=8)
    export.run(ExportConfig(source, tmp_path / name, form))  # an export replaces an export


def test_types(source: Path, tmp_path: Path) -> None:
    export.run(ExportConfig(source, tmp_path / "half", "hf", dtype="bf16"))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    export.run(ExportConfig(source, tmp_path / "shards", "meta", dtype="fp16", shards=2))
    shard = torch.load(tmp_path / "shards/consolidated.01.pth", weights_only=True)
    assert shard["output.weight"].dtype == torch.float16 and len(shard["output.weight"]) == helpers.VOCAB // 2


def test_a_run_gives_its_newest_model_and_a_card_of_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    helpers.write_lines(run / "done/v1.json", [{"seconds": 3600}])
    helpers.write_lines(run / "done/v1/ppo.json", [{"seconds": 1800}])
    export.run(ExportConfig(run, tmp_path / "llama-one", license="apache-2.0"))
    made = (tmp_path / "llama-one/README.md").read_text()
    assert made.startswith('---\nlicense: "apache-2.0"\nlibrary_name: "transformers"\n')
    assert "\n# llama-one\n" in made
    count = helpers.config().n_params()
    assert f"of {count:,} parameters: 2 layers of width 32, 4 heads (2 of keys and values), vocabulary 384" in made
    [v1, ppo] = [line for line in made.splitlines() if line[:2] in ("1.", "2.")]
    said = "\n   - settings: epochs `2`, batch_size `16`\n   - optim: lr `2e-05`, clip `1.0`\n"
    assert v1.startswith("1. v1: ") and f"{v1}{said}{ppo}{said}" in made
    assert ppo.startswith(f"2. ppo: parent `{run}/v1/model`")
    assert "| gold helpfulness | 0.502 (0.45 to 0.56) |\n| accuracy | 0.75 |\n\n" in made
    assert "by kind" not in made
    assert "These stages took 1.5 hours." in made and "0.064 kg of CO2eq" in made  # 1.5 h x 0.1 kW x 1.1 x 0.385
    assert puna.load(tmp_path / "llama-one").model.state_dict().keys()


HIDDEN = {"out", "init", "threads", "checkpoint_every", "checkpoints_kept", "micro_batch_size", "micro_batch_tokens"}
HIDDEN |= {f"parallel.{name}" for name in ("tensor", "checkpointing", "compile", "heartbeat")}
HIDDEN |= {f"model.{name}" for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")}
HIDDEN |= {"dump", "dump_iteration", "vllm", "model.moe.experts", "model.moe.top_k"}


def filled(kind: Any) -> dict[str, Any]:
    """A config's table with x for every value."""
    hints = get_type_hints(kind).items()
    return {name: filled(hint) if dataclasses.is_dataclass(hint) else "x" for name, hint in hints}


def dotted(table: dict[str, Any], prefix: str = "") -> set[str]:
    inner = [dotted(value, f"{prefix}{key}.") if value != "x" else {prefix + key} for key, value in table.items()]
    return set().union(*inner)


def test_a_card_shows_every_setting_that_it_does_not_hide() -> None:
    every = set()
    for kind in (PretrainConfig, SFTConfig, RewardConfig, PPOConfig, DPOConfig, GRPOConfig):
        settings = filled(kind)
        made = card(helpers.model(), "x", [Step(Path(), {"stage": "x"}, settings, {})], "")
        rows = re.findall(r"^   - ([\w.]+): (.*)$", made, re.MULTILINE)
        shown = {f"{table}.{name}" for table, row in rows for name in re.findall(r"(\w+) `x`", row)}
        assert {name.removeprefix("settings.") for name in shown} == dotted(settings) - HIDDEN
        every |= dotted(settings)
    assert every >= HIDDEN


def test_a_card_leaves_out_experts_that_there_are_none_of() -> None:
    step = Step(Path(), {"stage": "x"}, {"model": {"ffn_hidden": 48, "moe": config.to_dict(MoEConfig())}}, {})
    made = card(helpers.model(), "x", [step], "mit")
    assert "   - model: ffn_hidden `48`" in made and "moe" not in made


def test_the_stages_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.talker_folder(tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: llama2\n---\n")
    monkeypatch.chdir(tmp_path)
    convert.run(ImportConfig(Path("base"), Path("runs/imported")))
    with RunFolder(Path("runs/sft")) as folder:
        config.save(helpers.sft_config(Path("runs"), init=Path("runs/imported/model")), folder.path / "config.json")
        provenance = {"stage": "sft", "parent": "runs/imported/model"}
        huggingface.save_model(helpers.talker(), helpers.tokenizer(), folder.path / "model", provenance=provenance)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export.run(ExportConfig(Path("../runs/sft"), Path("out")))
    said = Path("out/README.md").read_text()
    assert 'license: "llama2"' in said and "1. of unknown origin\n2. import" in said and "3. sft" in said


@pytest.mark.parametrize(("form", "name"), [("hf", "model.safetensors"), ("meta", "consolidated.00.pth")])
def test_a_type_is_loaded_that_loses_nothing(
    form: Any, name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, asked = find.load, list[torch.dtype]()

    def spy(path: Path, dtype: torch.dtype = torch.float32) -> find.Opened:
        asked.append(dtype)
        return load(path, dtype)

    def whole(path: Path, dtype: torch.dtype = torch.float32) -> find.Opened:
        return load(path)

    for reader, out in ((spy, "one"), (whole, "two")):
        monkeypatch.setattr(find, "load", reader)
        export.run(ExportConfig(source, tmp_path / out / "model", form, "bf16"))
    assert asked == [torch.bfloat16]
    assert (tmp_path / "one/model" / name).read_bytes() == (tmp_path / "two/model" / name).read_bytes()


def test_a_gguf_file_keeps_its_norms(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = helpers.talker()
    torch.nn.init.uniform_(model.norm.weight)
    huggingface.save_model(model, helpers.tokenizer(), source)
    export.run(ExportConfig(source, tmp_path / "out.gguf", "gguf", "bf16"))
    assert torch.equal(find.load(tmp_path / "out.gguf").model.state_dict()["norm.weight"], model.norm.weight)


def test_a_reward_model_and_its_card(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    folder = export.run(ExportConfig(run / "v1/reward", tmp_path / "reward"))
    before, after = puna.load(run / "v1/reward/model"), puna.load(folder)
    assert isinstance(before, RewardScorer) and isinstance(after, RewardScorer)
    dialog = [helpers.user("who?"), helpers.assistant("the llama")]
    assert torch.equal(before.score(dialog), after.score(dialog))
    made = (folder / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in made and "1. sft" in made and "2. reward" in made
    assert "license:" not in made and "name no licence" in made
    with pytest.raises(ConfigError, match="a reward model, which gguf has no place for"):
        export.run(ExportConfig(run / "v1/reward", tmp_path / "reward.gguf", "gguf"))
    with pytest.raises(ConfigError, match="a reward model: every stage takes it as it is"):
        convert.run(ImportConfig(folder, tmp_path / "imported"))


def test_experts_are_a_hugging_face_folder_alone(tmp_path: Path) -> None:
    model = helpers.model(moe=MoEConfig(experts=3, top_k=2))
    huggingface.save_model(model, helpers.tokenizer(), tmp_path / "experts")
    export.run(ExportConfig(tmp_path / "experts", tmp_path / "out", "hf", "bf16"))
    assert "3 experts, 2 a token, vocabulary 384" in (tmp_path / "out/README.md").read_text()
    rows = looked_at(tmp_path / "out")
    assert rows["holds"] == "a Hugging Face folder, MixtralForCausalLM" and rows["experts"] == "3, 2 a token"
    assert rows["parameters"] == f"{model.config.n_params():,}"
    assert find.load(tmp_path / "out").model.config == model.config
    for form, name in (("gguf", "out.gguf"), ("meta", "meta")):
        with pytest.raises(ConfigError, match="a Hugging Face folder alone: use --format hf"):
            export.run(ExportConfig(tmp_path / "experts", tmp_path / name, form))  # type: ignore[arg-type]
    file = tmp_path / "out/config.json"
    for changes, said in (
        ({"num_experts_per_tok": 4}, "4 of 3 experts a token"),
        ({"num_local_experts": "3"}, "2 of '3' experts a token"),
        ({"sliding_window": 64}, "sliding_window 64 is not supported"),
    ):
        file.write_text(json.dumps(json.loads((tmp_path / "experts/config.json").read_text()) | changes))
        with pytest.raises(ConfigError, match=said):
            find.load(tmp_path / "out")


def test_the_licence_of_the_base_is_found(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\ntags: [x]\nlicense: llama2\n---\n# A model\nlicense: mit\n")
    imported = convert.run(ImportConfig(source, tmp_path / "base"))
    assert json.loads((imported / "puna.json").read_text())["license"] == "llama2"
    export.run(ExportConfig(imported, tmp_path / "model.gguf", "gguf"))
    assert gguf.read_header(tmp_path / "model.gguf").license == "llama2"
    again = convert.run(ImportConfig(tmp_path / "model.gguf", tmp_path / "again"))
    export.run(ExportConfig(again, tmp_path / "published"))
    assert 'license: "llama2"' in (tmp_path / "published/README.md").read_text()


def test_metas_folder_is_imported(source: Path, tmp_path: Path) -> None:
    export.run(ExportConfig(source, tmp_path / "meta", "meta", shards=2))
    folder = convert.run(ImportConfig(tmp_path / "meta", tmp_path / "base"))
    before, after = (huggingface.load_model(path).state_dict() for path in (source, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tokenizers.load(folder).sha256 == helpers.tokenizer().sha256


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": "q8_0"}, "dtype q8_0 is GGUF's alone"),
        ({"shards": 2}, "Meta's layout alone is cut into shards"),
        ({"format": "gguf"}, r"give --out a name that ends with \.gguf"),
        ({"format": "meta", "shards": 3}, "dim 32 cannot be cut into 3 shards"),
        ({"out": "mine"}, "is no export that could be replaced"),
        ({"out": "source"}, "is no export that could be replaced"),
    ],
)
def test_what_cannot_be_exported_is_refused(changes: dict[str, Any], why: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    out = tmp_path / str(changes.pop("out", "new"))
    with pytest.raises(ConfigError, match=why):
        export.run(ExportConfig(source, out, **changes))
    assert (tmp_path / "mine/precious").exists() and not (tmp_path / "new").exists()
    assert isinstance(puna.load(source), Chat)


@pytest.mark.parametrize("name", ["model.gguf", "model.md"])
def test_a_gguf_file_replaces_no_other_file(name: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    out = tmp_path / "model.gguf"
    gguf.save(helpers.talker(), helpers.tokenizer(), tmp_path / name)
    precious = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match=rf"{name} stands there already and is no export"):
        export.run(ExportConfig(source, out, "gguf"))
    assert (tmp_path / name).read_bytes() == precious
    (tmp_path / name).unlink()
    export.run(ExportConfig(source, out, "gguf"))
    assert gguf.read_stage(out) == "export"


def test_every_format_has_a_card(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    run = a_run(tmp_path / "run")
    export.run(ExportConfig(run, tmp_path / "one.gguf", "gguf", license="mit"))
    export.run(ExportConfig(run, tmp_path / "one", "meta", license="mit"))
    for made in ((tmp_path / "one.md").read_text(), (tmp_path / "one/README.md").read_text()):
        assert made.startswith('---\nlicense: "mit"\npipeline_tag: "text-generation"\n')
        assert "\n# one\n" in made and f"2. ppo: parent `{run}/v1/model`" in made


def test_an_export_does_not_replace_itself(source: Path, tmp_path: Path) -> None:
    folder = export.run(ExportConfig(source, tmp_path / "out"))
    with pytest.raises(ConfigError, match="--out is the model itself"):
        export.run(ExportConfig(folder, folder))
    assert isinstance(puna.load(folder), Chat)


# Inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_every_format(source: Path, tmp_path: Path) -> None:
    count, sha256 = f"{helpers.config().n_params():,}", helpers.tokenizer().sha256
    for form, name, holds, kind in (
        ("hf", "hf", "a Hugging Face folder, LlamaForCausalLM", "F32 (21 tensors)"),
        ("meta", "meta", "Meta's layout in 2 shards", "float32 (21 tensors)"),
        ("gguf", "model.gguf", "a GGUF file", "BF16 (16 tensors), F32 (5 tensors)"),
    ):
        options: dict[str, Any] = {"meta": {"shards": 2}, "gguf": {"dtype": "bf16"}}.get(form, {})
        rows = looked_at(export.run(ExportConfig(source, tmp_path / name, form, **options)))  # type: ignore[arg-type]
        assert (rows["holds"], rows["parameters"], rows["dtype"]) == (holds, count, kind)
        assert rows["shape"] == "2 layers, width 32, 4 heads (2 of keys and values), feed-forward 48"
        assert rows["vocabulary"] == "384, embeddings not tied"
        assert form == "gguf" or rows["tokenizer"] == f"384 ids, llama2, sha256 {sha256}"
        assert form == "gguf" or (rows["stage"], rows["parent"]) == ("export", str(source))
    assert " bytes  md5 " in looked_at(tmp_path / "meta")["consolidated.01.pth"]
    stored = hashlib.sha256((tmp_path / "hf/model.safetensors").read_bytes()).hexdigest()
    assert looked_at(tmp_path / "hf")["model.safetensors"].endswith(f" bytes  sha256 {stored}")
    for path, name in ((tmp_path / "hf", "model.safetensors"), (tmp_path / "model.gguf", "model.gguf")):
        file = path / name if path.is_dir() else path
        said = inspect.run(InspectConfig(path, sha256=True))
        assert f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}" in said


def test_inspect_a_run_and_a_reward_model(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    rows = looked_at(run)
    assert rows["holds"] == "a run of 4 models"
    assert (
        rows["v1/ppo/model"] == f"model of {helpers.config().n_params():,} parameters: stage ppo, parent {run}/v1/model"
    )
    counted = sum(parameter.numel() for parameter in helpers.reward_model().parameters())
    assert rows["v1/reward/model"].startswith(f"reward model of {counted:,} parameters: stage reward")
    assert looked_at(run / "v1/reward/model")["holds"] == "a Hugging Face folder, LlamaForSequenceClassification"
    with pytest.raises(ConfigError, match="holds no model"):
        inspect.run(InspectConfig(run / "v1/ppo/evaluation"))
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        inspect.run(InspectConfig(tmp_path / "nowhere"))


def test_inspect_and_export_a_checkpoint(tmp_path: Path) -> None:
    made = helpers.talker()
    settings = {"model": config.to_dict(made.config), "tokenizer": str(tmp_path / "source")}
    helpers.talker_folder(tmp_path / "source")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/config.json").write_text(json.dumps(settings))
    path = checkpoint.save(tmp_path / "pretrain/checkpoints", 7, made)
    rows = looked_at(path)
    assert rows["holds"] == "a checkpoint of step 7" and rows["parameters"] == f"{made.config.n_params():,}"
    assert rows["dtype"] == "float32 (21 tensors)"
    assert " bytes  sha256 " in rows[".metadata"]
    export.run(ExportConfig(path, tmp_path / "out"))
    after = huggingface.load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in made.state_dict().items())
    [data] = path.glob("__0_*")
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{data.name} is damaged: its sha256"):
        export.run(ExportConfig(path, tmp_path / "out"))
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(DataError, match=r"\.metadata is damaged: its sha256"):
        inspect.run(InspectConfig(path))


@pytest.mark.parametrize("tie", [False, True])
def test_inspect_counts_a_checkpoints_policy(tie: bool, tmp_path: Path) -> None:
    policy, reward = helpers.model(tie_embeddings=tie).bfloat16(), helpers.reward_model()
    huggingface.save_model(policy, helpers.tokenizer(), tmp_path / "base")
    count = f"{policy.config.n_params():,}"
    scored = f"{sum(parameter.numel() for parameter in reward.parameters()):,}"
    ppo = torch.nn.ModuleDict({"policy": policy, "value": reward})
    for stage, made, said in (
        ("sft", policy, (count, "bfloat16 (21 tensors)")),
        ("ppo", ppo, (count, "bfloat16 (21 tensors)")),
        ("reward", reward, (scored, "float32 (21 tensors)")),
    ):
        helpers.write_lines(tmp_path / stage / "config.json", [{"init": str(tmp_path / "base")}])
        rows = looked_at(checkpoint.save(tmp_path / stage / "checkpoints", 1, made))
        assert (rows["parent"], rows["parameters"], rows["dtype"]) == (str(tmp_path / "base"), *said)
    (tmp_path / "base").rename(tmp_path / "away")
    rows = looked_at(tmp_path / "sft/checkpoints/step_000001")
    assert rows["parameters"].endswith(", a tied output counted twice: the parent is not in its place")


def test_the_commands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    flags = ["--format", "meta", "--shards", "2", "--out", str(tmp_path / "meta")]
    assert cli.main(["export", str(source), *flags]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'meta'}\n"
    assert cli.main(["inspect", str(tmp_path / "meta")]) == 0
    assert capsys.readouterr().out.startswith("holds ")
    (tmp_path / "meta/consolidated.00.pth").unlink()
    assert cli.main(["inspect", str(tmp_path / "meta")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "consolidated.00.pth is missing" in error


# Hostile files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 99_000_000])
def test_a_header_bomb_is_refused(length: int, source: Path) -> None:
    (source / "model.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":')
    for read in (lambda: huggingface.load_model(source), lambda: inspect.run(InspectConfig(source))):
        with pytest.raises(DataError, match=r"model\.safetensors: truncated or damaged") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_header_that_promises_more_than_the_file_is_refused(source: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DataError, match=r"model\.safetensors: truncated or damaged"):
        huggingface.load_model(source)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "../model.safetensors", "deeper/model.safetensors", "..", ""]
)
def test_an_index_that_leaves_its_folder_is_refused(name: str, source: Path) -> None:
    (source.parent / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ConfigError, match=r"index\.json: refused, it names .*, which does not lie in its folder"):
        huggingface.load_model(source)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_a_damaged_index_is_named(content: str, source: Path) -> None:
    (source / "model.safetensors.index.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"index\.json: not an index"):
        huggingface.load_model(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": 10**12},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 0},
        {"hidden_size": "32"},
        {"num_hidden_layers": 1.5},
        {"num_key_value_heads": 3},
        {"rope_theta": [1]},
        {"rms_norm_eps": None},
        {"intermediate_size": True},
    ],
)
def test_absurd_sizes_in_a_config_are_refused(changes: dict[str, Any], source: Path) -> None:
    read = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**read, "head_dim": None, **changes}))
    with pytest.raises((ConfigError, DataError), match=r"source.*(a Llama has|shape|multiple)"):
        find.load(source)


@pytest.mark.parametrize("name", ["other", "run/model"])
def test_the_tokenizer_of_another_model_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    huggingface.save_model(helpers.model(vocab_size=400), helpers.tokenizer(), folder)
    small = tmp_path / "small"
    tokenizers.train(helpers.sentences(300), 300, small)
    huggingface.save_model(helpers.model(vocab_size=300), tokenizers.load(small), folder)
    helpers.tokenizer().save(folder)
    for read in (lambda: puna.load(folder), lambda: convert.run(ImportConfig(folder, tmp_path / "base"))):
        with pytest.raises(ConfigError, match=f"{name}: its tokenizer has 384 ids, the model only 300: it is another"):
            read()


def test_a_folder_of_two_layouts_is_read_as_hugging_faces(source: Path) -> None:
    (source / "consolidated.00.pth").write_bytes(b"never read")
    assert meta.is_meta(source)
    assert find.load(source).source == source
    assert looked_at(source)["holds"] == "a Hugging Face folder, LlamaForCausalLM"
