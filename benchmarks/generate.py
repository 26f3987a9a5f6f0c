"""Bulk sampling on a CPU beside transformers: many prompts, and many samples of long prompts.

    python benchmarks/generate.py MODEL.gguf|.whl [--rounds 3] [--threads 2] [--new 64]

64 prompts of 32 to 96 tokens, with top-p 0.9 and without; 8 prompts of 512 tokens with 16 samples each, also on our own
engine with every sample a request whose prompt nothing is known of. bfloat16; an answer is as long as asked for. All
contenders take turns in one process; numbers are medians over the rounds, in new tokens a second, prompts included.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from puna.formats import gguf, huggingface
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.parallel import start

Prompts = list[list[int]]
Work = Callable[[], int]
"""Does the work and returns how many new tokens it made."""


def ours(engine: LocalEngine, prompts: Prompts, n: int, new: int, top_p: float) -> Work:
    """The engine."""
    setting = Sampling(top_p=top_p, max_new_tokens=new)

    def work() -> int:
        answers = engine.complete(prompts, [setting] * len(prompts), n=n)
        return sum(len(answer.tokens) for row in answers for answer in row)

    return work


def unshared(engine: LocalEngine, prompts: Prompts, n: int, new: int, top_p: float) -> Work:
    """The engine with a request a sample, each of which runs its own prompt."""
    alone = LocalEngine(engine.model, engine.tokenizer, max_batch_size=engine.max_batch_size, share_prompts=False)
    return ours(alone, [prompt for prompt in prompts for _ in range(n)], 1, new, top_p)


def transformers(folder: Path, prompts: Prompts, n: int, new: int, top_p: float) -> Work:
    """generate, padded on the left."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    @torch.inference_mode()
    def work() -> int:
        made = model.generate(
            ids, attention_mask=mask, do_sample=True, top_p=top_p, top_k=0, temperature=1.0, num_return_sequences=n,
            min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        return int(made.shape[0]) * new

    return work


def race(title: str, contenders: dict[str, Work], rounds: int) -> None:
    """Print each one's tokens/s, and ours as a multiple of it."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            began = time.perf_counter()
            made = work()
            rates[name].append(made / (time.perf_counter() - began))
    print(title)
    mine = statistics.median(rates["puna"])
    for name, seen in rates.items():
        median = statistics.median(seen)
        print(
            f"  {name:24}{median:8.1f} tokens/s ({min(seen):.1f} - {max(seen):.1f})   puna {mine / median:.2f} x",
            flush=True,
        )


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new", type=int, default=64)
    settings = parser.parse_args()
    start(settings.threads)
    model, tokenizer = gguf.load(gguf.find(settings.model))
    rng, vocab = random.Random(0), model.config.vocab_size
    short, long = (
        [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]
        for lengths in ([rng.randint(32, 96) for _ in range(64)], [512] * 8)
    )
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_model(model, tokenizer, Path(folder), dtype=torch.bfloat16)
        endless: Any = SimpleNamespace(decode=tokenizer.decode, eos_id=-1)  # no token ends an answer
        engine = LocalEngine(model.bfloat16(), endless, max_batch_size=128)
        for top_p in (0.9, 1.0):
            case = (short, 1, settings.new, top_p)
            race(
                f"64 prompts, {settings.new} new tokens, top-p {top_p}",
                {"puna": ours(engine, *case), "transformers": transformers(Path(folder), *case)},
                settings.rounds,
            )
        shared = (long, 16, settings.new, 1.0)
        race(
            f"8 prompts of 512 tokens, 16 samples each, {settings.new} new tokens",
            {
                "puna": ours(engine, *shared),
                "puna without sharing": unshared(engine, *shared),
                "transformers": transformers(Path(folder), *shared),
            },
            settings.rounds,
        )


if __name__ == "__main__":
    main()
