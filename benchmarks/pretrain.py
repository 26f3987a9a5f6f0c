"""Pretraining on a CPU beside transformers and plain torch code: tokens/s, share of the products' rate, memory.

    python benchmarks/pretrain.py [--shapes v4k v32k laptop] [--rounds 5] [--steps 6] [--threads 2]

Every contender runs in a process of its own, by turns, so that what else the machine does falls on each; a process
warms up for two steps and tells the median of the others, the table the medians over the rounds. All take random tokens
and AdamW's fused kernel, and clip. The rate is counted as 6 operations a weight and token, embeddings left out, and
6 L D T of causal attention, over what a square product reaches between the turns. Memory is the largest resident size
less what the process had before its model.

puna is `stages.pretrain.update` and `optim.clip_and_step`; transformers runs as it comes (float32), and with autocast,
torch.compile and the allocator told to keep memory, which is its best setting here; plain is a Llama in the style of
nanoGPT: one file, autocast, logits as a whole. Where a CPU has no bfloat16 arithmetic all compute in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna import cli, optim, parallel
from puna.data.shards import Shard
from puna.model.transformer import ModelConfig, Transformer
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig

SHAPES = {
    "v4k": (ModelConfig(288, 6, 6, 6, 4096, 768), 32, 256),
    "v32k": (ModelConfig(288, 6, 6, 6, 32000, 768), 32, 256),
    "laptop": (ModelConfig(192, 4, 6, 3, 2048, 512), 16, 256),
}
"""Model, windows a step, tokens a window."""
KEEPS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.top_pad=268435456"
)
CONTENDERS: dict[str, dict[str, str]] = {
    "puna": cli.WAITING,
    "plain": {},
    "plain, memory kept": {"GLIBC_TUNABLES": KEEPS},
    "transformers": {},
    "transformers, autocast": {},
    "transformers, autocast, memory kept": {"GLIBC_TUNABLES": KEEPS},
    "transformers, autocast, compiled, memory kept": {"GLIBC_TUNABLES": KEEPS},
}
"""By name the environment of its process; what else differs its name says."""
Step = Callable[[int], None]

WARM_UP = 2


def ours(shape: str) -> Step:
    """The stage's own update."""
    config, batch, length = SHAPES[shape]
    device = parallel.start()
    model = Transformer.without_weights(config)
    model = parallel.place(
        model, model.initial_weights(torch.Generator().manual_seed(0)), parallel.Placement(device, precision="bf16")
    )
    cfg = PretrainConfig(
        out=Path(), data=(), model=config, seq_len=length, batch_size=batch, micro_batch_size=batch, precision="bf16"
    )
    optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
    tokens = torch.randint(config.vocab_size, (4 * batch * length,), generator=torch.Generator().manual_seed(0))
    data = Shard(tokens.numpy(), torch.tensor([0, len(tokens)]).numpy())

    def step(i: int) -> None:
        pretrain.update(cfg, model, data, i, device)
        optim.clip_and_step([model], optimizer, cfg.optim, i, 100)

    return step


class PlainBlock(nn.Module):
    """A block as one would write it."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, kv = c.n_heads, c.n_kv_heads * c.head_dim
        self.kv_heads = c.n_kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.qkv = nn.Linear(c.dim, c.dim + 2 * kv, bias=False)
        self.sizes = [c.dim, kv, kv]
        self.proj = nn.Linear(c.dim, c.dim, bias=False)
        self.gate_up = nn.Linear(c.dim, 2 * c.ffn_hidden, bias=False)
        self.down = nn.Linear(c.ffn_hidden, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(self.sizes, -1)
        q, k, v = (y.view(b, t, -1, d // self.heads).transpose(1, 2) for y in (q, k, v))
        q, k = (self.rotated(y, cos, sin) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    @staticmethod
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


class Plain(nn.Module):
    """A Llama in the style of nanoGPT; returns the mean loss."""

    def __init__(self, c: ModelConfig, length: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(c.vocab_size, c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        turns = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(length), turns)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        logits = self.head(self.norm(h))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))


def looped(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], shape: str, autocast: bool) -> Step:
    """The loop that everyone writes: loss, backward, clip, AdamW."""
    config, batch, length = SHAPES[shape]
    autocast = autocast and machine.fast_type() == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(i: int) -> None:
        tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())

    return step


def transformers(name: str, shape: str) -> Step:
    """LlamaForCausalLM and its own loss."""
    import transformers

    c, _, length = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_hidden, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=length,
        use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    forward = torch.compile(model) if "compiled" in name else model
    # Theirs shifts labels itself: tokens stand in for both.
    return looped(model, lambda x, y: forward(input_ids=x, labels=x).loss, shape, "autocast" in name)


def made(name: str, shape: str) -> Step:
    """A contender's step."""
    if name == "puna":
        return ours(shape)
    torch.manual_seed(0)
    if name.startswith("plain"):
        config, _, length = SHAPES[shape]
        model = Plain(config, length)
        return looped(model, model, shape, True)
    return transformers(name, shape)


def resident(key: str) -> int:
    """Bytes of this process: VmHWM at the most, VmRSS now."""
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def alone(name: str, shape: str, steps: int) -> None:
    """A process's part: print its tokens/s and peak as JSON."""
    before = resident("VmRSS")
    step, seconds = made(name, shape), []
    for i in range(WARM_UP + steps):
        began = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - began)
    _, batch, length = SHAPES[shape]
    rate = batch * length / statistics.median(seconds[WARM_UP:])
    print(json.dumps({"tokens_per_second": rate, "peak": resident("VmHWM") - before}))


def operations(shape: str) -> int:
    """Floating-point operations a token."""
    config, _, length = SHAPES[shape]
    weights = config.n_params() - config.vocab_size * config.dim
    return 6 * weights + 6 * config.n_layers * config.dim * length


def race(shape: str, names: list[str], rounds: int, steps: int, threads: int) -> None:
    """Print a shape's table."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    rates = []
    for turn in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--alone", name, "--shapes", shape, "--steps", str(steps)]
            inherited = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", *cli.WAITING)}
            env = inherited | {"OMP_NUM_THREADS": str(threads)} | CONTENDERS[name]
            out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            rates.append(machine.matrix_rate(machine.fast_type()))
            print(f"{shape}: round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
    rate, per_token = statistics.median(rates), operations(shape)
    config, batch, length = SHAPES[shape]
    print(f"\n{shape}: {config.n_params() / 1e6:.1f} M parameters, {batch} x {length} tokens a step")
    print(f"{str(machine.fast_type())[6:]} product {rate / 1e9:.0f} GFLOP/s on {threads} threads\n")
    width = max(map(len, names))
    print(f"{'':{width}}{'tok/s':>9}{'(range)':>16}{'of rate':>9}{'peak MB':>9}")
    for name, rows in found.items():
        speeds, peak = sorted(row["tokens_per_second"] for row in rows), statistics.median(row["peak"] for row in rows)
        speed, spread = statistics.median(speeds), f"({speeds[0]:,.0f}-{speeds[-1]:,.0f})"
        print(f"{name:{width}}{speed:9,.0f}{spread:>16}{speed * per_token / rate:9.0%}{peak / 1e6:9,.0f}")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.alone:
        alone(settings.alone, settings.shapes[0], settings.steps)
        return
    torch.set_num_threads(settings.threads)
    for shape in settings.shapes:
        race(shape, settings.contenders, settings.rounds, settings.steps, settings.threads)


if __name__ == "__main__":
    main()
