"""`puna bench memory`: what heads and experts cost: parameters, keys and values, peak memory, speed.

1. Variants of one model: multi-head, grouped-query and multi-query attention of about as many parameters (A.2.1), and a
   mixture of experts whose token reads as much as the dense model's.
2. Each in a process of its own: training steps of pretraining's update, then decoding by the engine.
3. A table, and beside it in the folder memory.json and memory.svg.

Peak memory is the process's largest resident size less what it had before its model, or what CUDA's allocator gave.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from puna import optim, parallel
from puna.config import ConfigError, positive
from puna.data.shards import Shard
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.model.moe import MoEConfig
from puna.model.sizes import cache_bytes, with_kv_heads
from puna.model.transformer import ModelConfig, Transformer
from puna.report.figures import BLUE, MUTED, STYLE
from puna.run_folder import write_atomically
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class MemoryBenchConfig:
    """`puna bench memory --out DIR`."""

    out: Path
    """the folder for memory.json and memory.svg."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(256, 6, 8, 8, 2048, 688))
    """the multi-head model that the others are variants of."""
    kv_heads: int = 2
    """grouped-query attention's heads of keys and values."""
    experts: int = 8
    """of the mixture; each as wide as a token's share of the dense feed-forward."""
    top_k: int = 2
    seq_len: int = 256
    """tokens a training window."""
    batch_size: int = 16
    """windows a training step."""
    steps: int = 5
    """training steps that are timed, after one that is not; the median counts."""
    decode_batch: int = 16
    """sequences decoded at once."""
    context: int = 512
    """tokens of a sequence, prompt and answer each half; also of the keys and values in the table."""
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        positive(self, "kv_heads", "experts", "seq_len", "batch_size", "steps", "decode_batch")
        longest = max(self.seq_len, self.context)
        if self.context < 4:
            raise ConfigError(f"context is {self.context}: a prompt and its answer need at least 4")
        if longest > self.model.max_seq_len:
            raise ConfigError(f"{longest} tokens do not fit the model's context of {self.model.max_seq_len}")
        variants(self)


def run(cfg: MemoryBenchConfig) -> str:
    """Measure all variants, write both files, and return the table."""
    rows = []
    for name, model in variants(cfg).items():
        # A fresh interpreter each: a peak is never another variant's, nor the parent's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            rows.append(alone.submit(measure, cfg, name, model).result())
    write_atomically(cfg.out / "memory.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(cfg.out / "memory.svg", chart(rows))
    return table(cfg, rows)


# 1: variants ---------------------------------------------------------------------------------------------------------


def variants(cfg: MemoryBenchConfig) -> dict[str, ModelConfig]:
    """Shapes by name; ConfigError where one is impossible."""
    base = cfg.model
    if base.moe.experts or base.n_kv_heads != base.n_heads:
        raise ConfigError("model is what variants are made of: give it as many n_kv_heads as n_heads, and no experts")
    grouped = with_kv_heads(base, cfg.kv_heads)
    moe, width = MoEConfig(cfg.experts, cfg.top_k), round(grouped.ffn_hidden / cfg.top_k)
    return {
        "MHA": base,
        f"GQA {cfg.kv_heads}": grouped,
        "MQA": with_kv_heads(base, 1),
        f"GQA {cfg.kv_heads}, {cfg.top_k} of {cfg.experts} experts": replace(grouped, ffn_hidden=width, moe=moe),
    }


# 2: one variant ------------------------------------------------------------------------------------------------------


def measure(cfg: MemoryBenchConfig, name: str, shape: ModelConfig) -> Row:
    """A variant's row, in a process that does nothing else."""
    device = parallel.start(cfg.threads)
    before = _peak(device)
    model = Transformer(shape).to(device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    training = _training(cfg, model, device)
    trained = _peak(device) - before
    return {
        "name": name,
        "parameters": shape.n_params(),
        "active_parameters": shape.n_active_params(),
        "cache_bytes_per_token": cache_bytes(shape),
        "cache_bytes": cache_bytes(shape) * cfg.decode_batch * cfg.context,
        "training_peak_bytes": trained,
        "training_tokens_per_second": training,
        "decode_tokens_per_second": _decoding(cfg, model.to(parallel.dtype(cfg.precision, device))),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model": asdict(shape),
    }


def _training(cfg: MemoryBenchConfig, model: Transformer, device: torch.device) -> float:
    """Tokens a second of pretraining's update on random tokens, the median step's."""
    n_tokens = cfg.batch_size * cfg.seq_len
    tokens = torch.randint(model.config.vocab_size, (4 * n_tokens,), generator=torch.Generator().manual_seed(0))
    data = Shard(tokens.numpy(), torch.tensor([0, len(tokens)]).numpy())
    stage = PretrainConfig(
        out=cfg.out,
        data=(),
        model=model.config,
        seq_len=cfg.seq_len,
        batch_size=cfg.batch_size,
        micro_batch_size=cfg.batch_size,
        precision=cfg.precision,
    )
    optimizer = optim.adamw(stage.optim, optim.groups(model, stage.optim))

    def step(i: int) -> None:
        pretrain.update(stage, model, data, i, device)
        optim.clip_and_step([model], optimizer, stage.optim, i, cfg.steps + 1)

    step(0)
    return n_tokens / statistics.median(_seconds(lambda i=i: step(i)) for i in range(1, cfg.steps + 1))  # type: ignore[misc]


def _decoding(cfg: MemoryBenchConfig, model: Transformer) -> float:
    """New tokens a second of the engine, all sequences together, without the time of their prompts."""
    half = cfg.context // 2
    prompts = torch.randint(3, model.config.vocab_size, (cfg.decode_batch, half)).tolist()
    endless: Any = SimpleNamespace(decode=lambda ids: "", eos_id=-1)  # no token ends an answer
    engine = LocalEngine(model, endless, max_batch_size=cfg.decode_batch)

    def decode(new: int) -> None:
        engine.complete(prompts, [Sampling(temperature=0, max_new_tokens=new)] * len(prompts))

    decode(2)
    first, whole = _seconds(lambda: decode(1)), _seconds(lambda: decode(half))
    return cfg.decode_batch * (half - 1) / (whole - first)


def _seconds(work: Callable[[], None]) -> float:
    """Wall time; the numbers that `work` reads from the device make it wait."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak(device: torch.device) -> int:
    """Largest memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's size before this program was started
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# 3: what is shown ----------------------------------------------------------------------------------------------------


def table(cfg: MemoryBenchConfig, rows: list[Row]) -> str:
    """A line a variant."""
    columns: dict[str, Callable[[Row], str]] = {
        "M parameters": lambda row: f"{row['parameters'] / 1e6:.2f}",
        "M active": lambda row: f"{row['active_parameters'] / 1e6:.2f}",
        "cache B/token": lambda row: f"{row['cache_bytes_per_token']:,}",
        "cache MB": lambda row: f"{row['cache_bytes'] / 1e6:,.1f}",
        "peak MB": lambda row: f"{row['training_peak_bytes'] / 1e6:,.0f}",
        "train tok/s": lambda row: f"{row['training_tokens_per_second']:,.0f}",
        "decode tok/s": lambda row: f"{row['decode_tokens_per_second']:,.0f}",
    }
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}" + "".join(f"{name:>15}" for name in columns)]
    lines += [f"{row['name']:{width}}" + "".join(f"{show(row):>15}" for show in columns.values()) for row in rows]
    lines.append(
        f"cache MB: {cfg.decode_batch} sequences of {cfg.context} tokens in bfloat16; peak: training "
        f"{cfg.batch_size} x {cfg.seq_len} tokens in {cfg.precision}; {rows[0]['device']}"
    )
    return "\n".join([*lines, str(cfg.out / "memory.svg")])


def chart(rows: list[Row]) -> str:
    """Four panels of bars as an SVG file's text, a bar a variant."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = {
        "Keys and values, kB a token": [row["cache_bytes_per_token"] / 1e3 for row in rows],
        "Peak memory in training, MB": [row["training_peak_bytes"] / 1e6 for row in rows],
        "Training, thousand tokens/s": [row["training_tokens_per_second"] / 1e3 for row in rows],
        "Decoding, thousand tokens/s": [row["decode_tokens_per_second"] / 1e3 for row in rows],
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": "memory"})
        figure = Figure(figsize=(10.5, 0.9 + 0.3 * len(rows)), layout="constrained", facecolor="white")
        for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            bars = axes.barh(range(len(rows)), values, color=BLUE, height=0.62)
            axes.bar_label(
                bars,
                [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in values],
                padding=3,
                color=MUTED,
                fontsize=8,
            )
            axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
            axes.set_title(title, fontsize=9)
            axes.set_xlim(0, 1.3 * max(values))
            axes.grid(axis="y", visible=False)
        figure.axes[0].invert_yaxis()  # shared: the first variant on top
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
