"""The planner: its memory against the allocator's measured peaks, its hours and carbon against Table 2; the recipes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from puna import cli, config, kernels, optim, parallel, plan, recipe
from puna.config import ConfigError
from puna.data.shards import Shard
from puna.model.moe import MoEConfig
from puna.model.sizes import LLAMA_2
from puna.model.transformer import ModelConfig, Transformer
from puna.parallel import ParallelConfig
from puna.plan import Layout, PlanConfig
from puna.recipe import RecipeConfig
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig

PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "34b": 33_743_970_304, "70b": 68_976_648_192}
SHAPES = [
    ModelConfig(192, 4, 6, 3, 2048, 512, 1024),
    ModelConfig(192, 6, 8, 1, 512, 512, 1024),
    ModelConfig(128, 8, 4, 4, 512, 352, 1024),
]
LARGE = ModelConfig(32, 2, 2, 2, 16384, 96, 1024)


def table_2(size: str, mfu: float) -> plan.Cost:
    """The run of Table 2 at an MFU."""
    cfg = PlanConfig(model=size, gpus=1024, mfu=mfu, watts=plan.TABLE_2[size].watts)
    return plan.cost(cfg, plan.read(cfg))


def printed(cfg: PlanConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(plan.run(cfg))
    return fields


# Memory --------------------------------------------------------------------------------------------------------------


def measured_peak(cfg: PretrainConfig) -> int:
    """What the allocator held at most over two steps of two micro-batches, in bytes."""
    gc.collect()  # what goes meanwhile would count against it
    parallel.start(cfg=cfg.parallel)
    data = Shard(np.arange(20_000, dtype=np.uint16) % cfg.model.vocab_size, np.array([0, 20_000]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = Transformer(cfg.model)
        model.init_weights()
        for layer in model.layers:
            parallel._recompute(layer, cfg.parallel)
        optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
        for step in range(2):
            pretrain.update(cfg, model, data, step, torch.device("cpu"))
            optim.clip_and_step([model], optimizer, cfg.optim, step, 2)
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    parallel.start()  # as others expect it
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max())


@pytest.mark.parametrize("model", [*SHAPES, LARGE], ids=["grouped", "one key head", "deep", "large"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_the_measured_peak(model: ModelConfig, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert close(model, precision, "off", monkeypatch)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_memory_with_checkpointing_is_the_measured_peak(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert close(SHAPES[1], "bf16", checkpointing, monkeypatch)
    assert close(LARGE, "bf16", checkpointing, monkeypatch)
    assert close(LARGE, "fp32", checkpointing, monkeypatch)


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_memory_with_experts_is_the_measured_peak(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = dataclasses.replace(SHAPES[0], ffn_hidden=176, moe=MoEConfig(experts=4, top_k=3))
    assert close(experts, "bf16", checkpointing, monkeypatch, within=0.04)


def close(
    model: ModelConfig, precision: Any, checkpointing: Any, monkeypatch: pytest.MonkeyPatch, within: float = 0.02
) -> bool:
    """Whether the counted peak is that close to the measured; bfloat16 also on a CPU without its arithmetic."""
    monkeypatch.setattr(parallel, "dtype", lambda name, _: {"bf16": torch.bfloat16, "fp32": torch.float32}[name])
    monkeypatch.setattr(kernels, "library", lambda: None)  # no GPU has these passes
    shape: dict[str, Any] = {"model": model, "seq_len": 600, "batch_size": 6, "micro_batch_size": 3, "steps": 2}
    how = ParallelConfig(checkpointing=checkpointing)
    measured = measured_peak(PretrainConfig(Path(), (), **shape, precision=precision, parallel=how))
    counted = plan.memory(model, 600, 3, checkpointing=checkpointing, precision=precision).total
    return abs(counted - measured) < within * measured


def test_sharding_divides_the_states_and_nothing_else() -> None:
    model = LLAMA_2["7b"]
    replicated = plan.memory(model, 4096, 1, Layout(8))
    sharded = plan.memory(model, 4096, 1, Layout(8, sharded=True))
    assert sharded[:3] == tuple(part / 8 for part in replicated[:3])
    assert sharded.activations == replicated.activations and sharded.gathered > replicated.gathered == 0
    assert replicated.copies > sharded.copies == 0, "sharded weights are gathered in bfloat16"
    assert sum(replicated[:3]) == 16 * PARAMETERS["7b"]
    tensor = plan.memory(model, 4096, 1, Layout(1, tensor=8))
    assert tensor[:-1] == tuple(part / 8 for part in replicated[:-1]) and tensor.logits == replicated.logits


def test_the_loss_of_a_large_vocabulary_is_a_chunks_and_the_heads() -> None:
    # 7B, 4,096 tokens: V D = 131,072,000, V C = 16,384,000, T D = 16,777,216; by hand.
    model, head, chunk, states = LLAMA_2["7b"], 131_072_000, 16_384_000, 16_777_216
    replicated = plan.memory(model, 4096, 1, Layout(8))
    # The head's copy, its gradient and a product of its size; the chunk's slopes; three states a token.
    assert replicated.logits == (2 + 4 + 2) * head + 2 * chunk + 8 * states < 12 * 4096 * 32000
    assert plan.memory(model, 4096, 1, Layout(8, sharded=True)).logits == 8 * head + 6 * states
    assert plan.memory(model, 4096, 1, Layout(1, 8, sharded=True)).logits == replicated.logits
    assert plan.memory(model, 32, 1).logits == 12 * 32 * 32000, "few tokens have whole logits"


def test_keys_and_values_of_a_token() -> None:
    sizes = {name: plan.cache_bytes(model) for name, model in LLAMA_2.items()}
    assert sizes == {"7b": 524_288, "13b": 819_200, "34b": 196_608, "70b": 327_680}


# Layouts -------------------------------------------------------------------------------------------------------------


def smallest(cfg: PlanConfig, checkpointing: Any) -> str:
    return next((str(layout) for layout, _, fits in plan.options(cfg, plan.read(cfg), checkpointing) if fits), "none")


@pytest.mark.parametrize(
    ("model", "gpus", "gpu", "none", "full"),
    [
        ("smollm2-135m", 1, "a100-80g", "one GPU", "one GPU"),
        ("7b", 8, "a100-80g", "FSDP over 8", "FSDP over 8"),
        ("7b", 1, "h200", "none", "one GPU"),
        ("70b", 512, "h100", "FSDP over 128 x tensor parallel 4", "FSDP over 512"),
        ("70b", 8, "a100-40g", "none", "none"),
    ],
)
def test_the_smallest_layout_that_fits(model: str, gpus: int, gpu: str, none: str, full: str) -> None:
    cfg = PlanConfig(model=model, gpus=gpus, gpu=gpu)
    assert (smallest(cfg, "off"), smallest(cfg, "full")) == (none, full)


def test_layouts_divide_batch_and_model() -> None:
    assert {layout.tensor for layout in plan.layouts(SHAPES[0], 8, 16)} == {1}  # three key heads
    one_token_more = dataclasses.replace(LLAMA_2["7b"], vocab_size=32001)
    assert {layout.tensor for layout in plan.layouts(one_token_more, 8, 16)} == {1}
    assert [layout.data for layout in plan.layouts(LLAMA_2["70b"], 16, 4)] == [4, 4, 2, 2]
    with pytest.raises(ConfigError, match="batch of 1024 windows does not divide over 3 GPUs"):
        plan.layouts(LLAMA_2["70b"], 3, 1024)


# Time and carbon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "mfu"), [("7b", 0.39), ("13b", 0.38), ("34b", 0.35), ("70b", 0.43)])
def test_table_2(size: str, mfu: float) -> None:
    """From the MFU that its rows imply, in whole per cent and without attention: hours and carbon within 2 %."""
    flops = plan.flops_per_token(LLAMA_2[size], 4096)
    spent = table_2(size, mfu * flops / (6 * PARAMETERS[size]))
    assert spent.gpu_hours == pytest.approx(plan.TABLE_2[size].gpu_hours, rel=0.02)
    assert spent.tonnes == pytest.approx(plan.TABLE_2[size].tonnes, rel=0.02)
    assert spent.days == pytest.approx(spent.gpu_hours / 24 / 1024)
    assert spent.tokens_per_second * spent.days * 86400 == pytest.approx(2e12, rel=1e-5)


def test_carbon_of_table_2() -> None:
    """At each row's own MFU: every row within 0.05 t, and 539 t in all."""
    tonnes = {size: table_2(size, plan.implied_mfu(size)).tonnes for size in LLAMA_2}
    assert tonnes == pytest.approx({size: row.tonnes for size, row in plan.TABLE_2.items()}, abs=0.05)
    assert sum(tonnes.values()) == pytest.approx(539.0, abs=0.1)
    assert sum(row.gpu_hours for row in plan.TABLE_2.values()) == 3_311_616


def test_the_default_mfu_is_that_of_all_four_rows() -> None:
    hours = {size: row.gpu_hours for size, row in plan.TABLE_2.items()}
    mean = sum(plan.implied_mfu(size) * hours[size] for size in hours) / sum(hours.values())
    assert round(mean, 2) == plan.MFU


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda signum, handler: None)
    monkeypatch.setattr("sys.excepthook", print)
    assert cli.main(["plan", str(root / "recipes/llama2-70b.toml"), "--gpus", "512", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    for part in (
        "llama2-70b.toml: 68,976,648,192 parameters, 2e+12 tokens",
        "smallest that fits, checkpointing full: FSDP over 512",
        "puna pretrain as the recipe has it, FSDP over 64 x tensor parallel 8, checkpointing off: fits",
        "keys and values 327,680 bytes a token",
        "1,720,320 GPU-hours at 400 W, 291.42 tCO2eq",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[2:])) <= 140


@pytest.mark.parametrize("size", LLAMA_2)
def test_a_recipe_and_its_size_are_one_plan(size: str, root: Path) -> None:
    by_name = printed(PlanConfig(model=size, gpus=64, json=True))
    by_recipe = printed(PlanConfig(recipe=root / f"recipes/llama2-{size}.toml", gpus=64, json=True))
    assert by_name == by_recipe
    assert by_name["parameters"] == PARAMETERS[size]
    assert by_name["gpu_hours"] == pytest.approx(64 * 24 * by_name["days"])
    for rows in by_name["layouts"].values():
        assert all(row["total"] == pytest.approx(sum(row["bytes"].values())) for row in rows)
        assert all(row["fits"] == (row["total"] <= by_name["room_bytes"]) for row in rows)


def test_any_recipe_that_pretrains(root: Path) -> None:
    assert "puna pretrain as the recipe has it, FSDP over 8, checkpointing off: fits" in plan.run(
        PlanConfig(root / "recipes/laptop.toml")
    )
    with pytest.raises(ConfigError, match=r"no table \[pretrain\]"):
        plan.run(PlanConfig(root / "recipes/hh-smollm2.toml"))


def test_the_recipes_own_layout_is_judged(tmp_path: Path) -> None:
    def verdict(table: str, gpus: int) -> str:
        (tmp_path / "x.toml").write_text(
            "[pretrain]\nbatch_size = 1024\nmicro_batch_size = 1\nseq_len = 4096\n"
            "[pretrain.model]\ndim = 8192\nn_layers = 80\nn_heads = 64\nn_kv_heads = 8\nffn_hidden = 28672\n"
            f"vocab_size = 32000\n[pretrain.parallel]\n{table}"
        )
        plan_of_it = plan.run(PlanConfig(tmp_path / "x.toml", gpus=gpus, gpu="h100"))
        [line] = [line for line in plan_of_it.splitlines() if line.startswith("puna pretrain as the recipe has it")]
        return line.removeprefix("puna pretrain as the recipe has it, ")

    assert verdict("", 512) == "FSDP over 512, checkpointing off: does not fit"
    assert verdict('checkpointing = "full"', 512) == "FSDP over 512, checkpointing full: fits"
    assert verdict("tensor = 8", 512) == "FSDP over 64 x tensor parallel 8, checkpointing off: fits"
    assert verdict("tensor = 3", 512).endswith("divides no batch or no model")
    assert verdict('checkpointing = "selective"', 512) == "FSDP over 512, checkpointing selective: does not fit"


def test_a_micro_batch_of_ones_own() -> None:
    one, four = (printed(PlanConfig(model="7b", json=True, micro_batch_size=n))["layouts"]["off"] for n in (1, 4))
    assert four[0]["bytes"]["activations"] == 4 * one[0]["bytes"]["activations"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "7b", "gpu": "h10"}, "unknown gpu 'h10'; did you mean 'h100'?"),
        ({"model": "7B"}, "unknown model '7B'; did you mean '7b'?"),
        ({}, "give a recipe or --model"),
        ({"model": "7b", "recipe": Path("x.toml")}, "one of the two"),
        ({"model": "7b", "gpus": 0}, "gpus is 0: it must be positive"),
        ({"model": "7b", "mfu": 1.5}, "margin and mfu are shares"),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        PlanConfig(**fields)


def test_experts_are_all_held_and_some_of_them_computed() -> None:
    dense = ModelConfig()
    sparse = dataclasses.replace(dense, moe=MoEConfig(experts=8, top_k=2))
    states = 16 * (sparse.n_params() - dense.n_params())
    assert sum(plan.memory(sparse, 512, 1)[:3]) - sum(plan.memory(dense, 512, 1)[:3]) == states
    read = sparse.n_active_params() - dense.n_params()
    assert plan.flops_per_token(sparse, 512) - plan.flops_per_token(dense, 512) == 6 * read


def test_fp32_has_no_rate(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[pretrain]\nprecision = "fp32"\n')
    with pytest.raises(ConfigError, match="only bf16 is planned"):
        plan.run(PlanConfig(tmp_path / "x.toml"))


# The recipes ---------------------------------------------------------------------------------------------------------

PAPER = {
    "pretrain.seq_len": 4096,
    "pretrain.model.vocab_size": 32000,
    "pretrain.model.max_seq_len": 4096,
    "sft.epochs": 2,
    "sft.seq_len": 4096,
    "sft.batch_size": 64,
    "sft.optim.lr": 2e-5,
    "sft.optim.schedule": "cosine",
    "version.optim.lr": 2e-5,
    "reward_helpfulness.epochs": 1,
    "reward_helpfulness.batch_size": 512,
    "reward_helpfulness.other_share": 0.5,
    "reward_safety.epochs": 1,
    "reward_safety.batch_size": 512,
    "reward_safety.other_share": 0.1,
    "ppo.iterations": 400,
    "ppo.batch_size": 512,
    "ppo.mini_batch_size": 64,
    "ppo.inner_epochs": 1,
    "ppo.clip": 0.2,
    "ppo.threshold": 0.15,
    "ppo.optim.lr": 1e-6,
    "ppo.optim.schedule": "constant",
    "ppo.optim.warmup_steps": 0,
    "versions": 5,
    "ghost_attention_from": 4,
    "pool_all_from": 4,
    "ppo_versions": 1,
}
OPTIMIZED = ("pretrain", "sft", "version", "reward_helpfulness", "reward_safety", "ppo")
SIZES = {
    "7b": (3e-4, 1e-5, 0.01),
    "13b": (3e-4, 1e-5, 0.01),
    "34b": (1.5e-4, 1e-5, 0.005),
    "70b": (1.5e-4, 5e-6, 0.005),
}


@pytest.mark.parametrize("size", LLAMA_2)
def test_recipes_are_the_papers(size: str, root: Path) -> None:
    file = str(root / f"recipes/llama2-{size}.toml")
    cfg = config.load(RecipeConfig, [file, "--dry-run", "--out", "x"])
    assert recipe.plan(cfg)[-1].name == "report"
    for key, value in PAPER.items():
        assert functools.reduce(getattr, key.split("."), cfg) == value, key
    for stage in OPTIMIZED:
        settings = getattr(cfg, stage).optim
        assert (settings.betas, settings.eps) == ((0.9, 0.95), 1e-5)
        assert (settings.weight_decay, settings.clip, settings.final_lr_ratio) == (0.1, 1.0, 0.1)
    pretraining = cfg.pretrain
    assert pretraining.model == LLAMA_2[size]
    assert pretraining.batch_size * pretraining.seq_len == 4 * 2**20
    assert pretraining.steps * pretraining.batch_size * pretraining.seq_len == pytest.approx(2e12, rel=1e-6)
    assert (pretraining.optim.schedule, pretraining.optim.warmup_steps) == ("cosine", 2000)
    assert optim.learning_rate(pretraining.optim, 1999, pretraining.steps) < pretraining.optim.lr
    rates = {cfg.reward_helpfulness.optim.lr, cfg.reward_safety.optim.lr}
    assert (pretraining.optim.lr, *rates, cfg.ppo.beta) == SIZES[size]
    assert cfg.ppo.sample_precision == "bf16", "a whole policy on a GPU"
    given = ["--out", "x", "--data", "text.jsonl"]
    assert config.load(PretrainConfig, [file, *given], "pretrain").model == LLAMA_2[size]


def test_every_number_of_the_recipes_has_its_source(root: Path) -> None:
    for size in LLAMA_2:
        section = ""
        for line in (root / f"recipes/llama2-{size}.toml").read_text(encoding="utf-8").splitlines():
            section = line if line.startswith("[") else section
            if " = " in line and not line.startswith("#") and not line.startswith("out"):
                assert " # " in line or " # " in section, line
