"""One GPU beside transformers: pretraining a 1.3-billion-parameter Llama, decoding a 7-billion-parameter one.

    python benchmarks/gpu.py [train] [decode] [--rounds 5] [--steps 5] [--tiny]

Training: windows of 4,096 tokens, bfloat16 products over float32 weights, AdamW's fused kernel, clipping. Every
contender runs in a process of its own, by turns; a process warms up for two steps and tells the median of the others
and the most memory that torch held. Its rate is counted as 6 operations a weight and token, embeddings left out, and
6 L D T of causal attention, over what a square product of bfloat16 reaches. Decoding: bfloat16 weights, prompts of 128
tokens, one row and 256; a step must read every weight once, and beside one row's rate stands that of a copy of so many
bytes.

`--tiny` takes a small model, also on a CPU: it shows that everything runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from puna import optim, parallel
from puna.data.shards import Shard
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.generate.weights import pack
from puna.model.sizes import SIZES
from puna.model.transformer import ModelConfig, Transformer
from puna.stages import pretrain
from puna.stages.pretrain import PretrainConfig

TINY = ModelConfig(64, 2, 4, 2, 256, 128)
TRAINED = ModelConfig(2048, 24, 16, 16, 32000, 5504, max_seq_len=4096)
DECODED = SIZES["7b"]
WINDOWS, MICRO, LENGTH = 8, 2, 4096  # windows a step and a pass, tokens a window
PROMPT, NEW, ROWS = 128, 128, (1, 256)
CONTENDERS = ("puna", "puna, compiled", "transformers", "transformers, compiled")
WARM_UP, SQUARE = 2, 8192

Step = Callable[[int], None]


def device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """How long the work takes, the GPU's part included."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def ours(c: ModelConfig, length: int, compiled: bool) -> Step:
    """The stage's own update."""
    how = parallel.ParallelConfig(compile=compiled)
    where = parallel.start(0, how)
    model = Transformer.without_weights(c)
    model = parallel.place(
        model, model.initial_weights(torch.Generator().manual_seed(0)), parallel.Placement(where, how, "bf16")
    )
    cfg = PretrainConfig(
        out=Path(), data=(), model=c, seq_len=length, batch_size=WINDOWS, micro_batch_size=MICRO, parallel=how
    )
    optimizer = optim.adamw(cfg.optim, optim.groups(model, cfg.optim))
    tokens = torch.randint(c.vocab_size, (4 * WINDOWS * length,), generator=torch.Generator().manual_seed(0))
    data = Shard(tokens.numpy(), torch.tensor([0, len(tokens)]).numpy())

    def step(i: int) -> None:
        pretrain.update(cfg, model, data, i, where)
        optim.clip_and_step([model], optimizer, cfg.optim, i, 100)

    return step


def llama(c: ModelConfig, **settings: Any) -> nn.Module:
    """Theirs, with random weights, on the device."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_hidden, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
        attn_implementation="sdpa", **settings,
    )  # fmt: skip
    with device():
        made: nn.Module = transformers.LlamaForCausalLM(config)
    return made


def theirs(c: ModelConfig, length: int, compiled: bool) -> Step:
    """Their model and loss under autocast, with the loop that everyone writes."""
    model = llama(c, use_cache=False)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(i: int) -> None:
        tokens = torch.randint(c.vocab_size, (WINDOWS, length), generator=generator).to(device())
        for x in tokens.split(MICRO):
            with torch.autocast(device().type, torch.bfloat16):
                loss: Tensor = forward(input_ids=x, labels=x).loss * len(x) / WINDOWS
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def alone(name: str, c: ModelConfig, length: int, steps: int) -> None:
    """A process's part: print its tokens/s and peak as JSON."""
    kind = ours if name.startswith("puna") else theirs
    step = kind(c, length, "compiled" in name)
    taken = [seconds(lambda i=i: step(i)) for i in range(WARM_UP + steps)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    rate = WINDOWS * length / statistics.median(taken[WARM_UP:])
    print(json.dumps({"tokens_per_second": rate, "peak": peak}))


def train(c: ModelConfig, length: int, rounds: int, arguments: Sequence[str]) -> None:
    """Print the table of training."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--alone", name, *arguments]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
    side = SQUARE if torch.cuda.is_available() else 256
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device()) for _ in range(2))
    rate = 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(20))
    per_token = 6 * (c.n_params() - c.vocab_size * c.dim) + 6 * c.n_layers * c.dim * length
    print(f"\ntraining {c.n_params() / 1e9:.2f} billion parameters, {WINDOWS} x {length} tokens a step")
    print(f"bfloat16 product {rate / 1e12:.1f} TFLOP/s\n\n{'':24}{'tok/s':>10}{'of rate':>9}{'peak GB':>9}")
    for name, rows in found.items():
        speed, peak = (statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "peak"))
        print(f"{name:24}{speed:10,.0f}{speed * per_token / rate:9.0%}{peak / 1e9:9.1f}")


def decode(c: ModelConfig, rounds: int) -> None:
    """Print the table of decoding."""
    rng = random.Random(0)
    with device():
        model = pack(Transformer(c), "bf16")  # as bulk sampling and the server hold it
    other = llama(c).bfloat16().eval()
    endless: Any = SimpleNamespace(decode=lambda ids: "", eos_id=-1)  # no token ends an answer
    size = 2 * (c.n_params() - c.vocab_size * c.dim)
    source = torch.empty(size, dtype=torch.uint8, device=device())
    copied = 2 * size / min(seconds(source.clone) for _ in range(10))  # read and written
    print(f"\ndecoding {c.n_params() / 1e9:.2f} billion parameters, {PROMPT} + {NEW} tokens")
    print(f"a copy moves {copied / 1e9:,.0f} GB/s\n\n{'':24}{'rows':>6}{'tok/s':>10}{'of limit':>10}")
    for rows in ROWS:
        prompts = [[rng.randrange(c.vocab_size) for _ in range(PROMPT)] for _ in range(rows)]
        engine = LocalEngine(model, endless, max_batch_size=rows)
        samplings = [Sampling(temperature=0, max_new_tokens=NEW)] * rows
        ids = torch.tensor(prompts, device=device())

        def generate(ids: Tensor = ids) -> object:
            with torch.inference_mode():
                return other.generate(ids, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0)

        works: dict[str, Callable[[], object]] = {
            "puna": lambda e=engine, p=prompts, s=samplings: e.complete(p, s),
            "transformers": generate,
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds + 1):  # the first warms up
            for name, work in works.items():
                taken[name].append(seconds(work))
        for name, each in taken.items():
            speed = rows * NEW / statistics.median(each[1:])
            of_limit = f"{speed * size / copied:10.0%}" if rows == 1 else ""
            print(f"{name:24}{rows:6}{speed:10,.0f}{of_limit}", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["train", "decode"], help="train, decode; both where none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if unknown := set(settings.what) - {"train", "decode"}:
        parser.error(f"there is train and decode, and no {unknown.pop()}")
    if not torch.cuda.is_available() and not settings.tiny:
        parser.error("there is no GPU: --tiny runs on the CPU")
    trained, length = (TINY, 64) if settings.tiny else (TRAINED, LENGTH)
    if settings.alone:
        alone(settings.alone, trained, length, settings.steps)
        return
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if "train" in settings.what:
        tiny = ["--tiny"] if settings.tiny else []
        train(trained, length, settings.rounds, [*tiny, "--steps", str(settings.steps)])
    if "decode" in settings.what:
        decode(TINY if settings.tiny else DECODED, settings.rounds)


if __name__ == "__main__":
    main()
