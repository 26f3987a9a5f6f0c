"""An iteration of PPO on a CPU beside TRL's PPO and GRPO: seconds of generating, scoring and updating.

    python benchmarks/ppo.py MODEL.gguf|.whl [--trl-ppo PYTHON] [--trl-grpo PYTHON] [--rounds 3] [--threads 2]
    python benchmarks/ppo.py wide            # a random Llama 288 wide, 6 layers, 2 key heads, 4096 tokens

64 prompts, 64 new tokens each (no token ends an answer), one mini-batch, `--epochs` passes over it, bfloat16 autocast
over float32 weights where the CPU computes in it; all keep the memory that they free. `--trl-ppo` and `--trl-grpo` are
Pythons of environments that have TRL 0.24, the last with PPO, and 1.x. Each contender is a process of its own a round,
by turns, and its first iteration warms up; numbers are medians over the rounds. Puna scores with two reward models
where TRL has one; GRPO has no critic and draws 4 answers to each of a quarter of the prompts.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch

MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28))  # as puna.parallel has it
WORDS = "llama river stone grass herd snow path fire moon wall salt bread wool wind lake goat".split()
BF16 = machine.fast_type() == torch.bfloat16
PARTS = ("generate", "score", "update", "iteration")

Seconds = dict[str, float]
"""Of the parts of an iteration; a trainer that cannot tell them apart gives the whole alone."""


# What all are given ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, source: str, n_prompts: int) -> None:
    """A policy, a reward model and prompts, as Hugging Face folders and token ids."""
    from puna.formats import gguf, huggingface, tokenizer_json
    from puna.model.reward import RewardModel
    from puna.model.transformer import ModelConfig, Transformer
    from puna.text import chat, tokenizer

    if source == "wide":
        words = [" ".join(random.Random(i).choices(WORDS, k=20)) for i in range(500)]
        spoken = tokenizer.train(words, 320, folder / "tokenizer")
        model = Transformer(ModelConfig(288, 6, 6, 2, 4096, 768, 512))
        model.init_weights(torch.Generator().manual_seed(0))
    else:
        model, spoken = gguf.load(gguf.find(Path(source)))
    texts = tokenizer_json.files(spoken) if isinstance(spoken, tokenizer.SentencePieceTokenizer) else None
    huggingface.save_model(model, spoken, folder / "policy", texts=texts)
    rng = random.Random(0)
    prompts = [
        [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))}] for _ in range(n_prompts)
    ]
    records = [{"id": str(i), "messages": messages, "is_safety": False} for i, messages in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ids = [chat.encode_prompt(messages, spoken) for messages in prompts]
    (folder / "ids.json").write_text(json.dumps(ids))
    huggingface.save_reward_model(RewardModel(model), spoken, folder / "reward")


# The contenders, each in a process of its own -------------------------------------------------------------------------


def puna(folder: Path, new: int, epochs: int, iterations: int) -> list[Seconds]:
    """Puna's collect and update."""
    from dataclasses import replace
    from types import SimpleNamespace

    from puna import optim, parallel
    from puna.data.prompts import read_prompts
    from puna.generate.engine import LocalEngine
    from puna.stages import ppo

    prompts = read_prompts((folder / "prompts.jsonl",), "prompts")
    reward, n = folder / "reward", len(prompts)
    cfg = ppo.PPOConfig(folder / "out", folder / "policy", reward, reward, (folder / "prompts.jsonl",))
    cfg = replace(cfg, batch_size=n, mini_batch_size=n, inner_epochs=epochs, max_new_tokens=new)
    cfg = replace(cfg, precision="bf16", sample_precision="bf16", micro_batch_tokens=4096)
    models = ppo.load(cfg, parallel.start())
    endless: Any = SimpleNamespace(decode=lambda ids: "", eos_id=-1)
    models = replace(models, engine=LocalEngine(models.policy, endless))
    optimizer = optim.adamw(cfg.optim, *(optim.groups(model, cfg.optim) for model in (models.policy, models.value)))
    seen = []
    for iteration in range(iterations):
        began = time.perf_counter()
        rollout, numbers, _ = ppo.collect(cfg, models, prompts, iteration)
        numbers |= ppo.update(cfg, models, optimizer, rollout, cfg.beta, iteration, iterations)
        seconds = {part: numbers[f"seconds_{part}"] for part in PARTS[:3]}
        seen.append(seconds | {"iteration": time.perf_counter() - began})
    return seen


def tokenizer_of(folder: Path) -> Any:
    """transformers' of the policy, with id 0 as its pad."""
    import transformers

    file = str(folder / "policy/tokenizer.json")
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left")
    made.pad_token, made.eos_token = made.convert_ids_to_tokens([0, 2])
    return made


def trl_ppo(folder: Path, new: int, epochs: int, iterations: int) -> list[Seconds]:
    """TRL's PPOTrainer; what it does without gradients beside generating is scoring."""
    import transformers
    import trl
    from datasets import Dataset
    from trl.trainer import ppo_trainer

    spent = {"generate": 0.0, "score": 0.0}

    def timed(name: str, part: str) -> None:
        work = getattr(ppo_trainer, name)

        def timing(*arguments: Any, **named: Any) -> Any:
            began, counts = time.perf_counter(), not torch.is_grad_enabled()
            try:
                return work(*arguments, **named)
            finally:
                spent[part] += (time.perf_counter() - began) * counts

        setattr(ppo_trainer, name, timing)

    for name, part in (("batch_generation", "generate"), ("forward", "score"), ("get_reward", "score")):
        timed(name, part)
    ids = json.loads((folder / "ids.json").read_text())
    tokenizer = tokenizer_of(folder)
    causal, scoring = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    policy, reference = (causal.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (scoring.from_pretrained(folder / "reward", num_labels=1) for _ in range(2))
    for model in (policy, reference, reward, value):
        model.config.pad_token_id = 0
    part = max(n for n in (16, 8, 4, 2, 1) if len(ids) % n == 0)
    settings = trl.PPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=BF16, per_device_train_batch_size=part, report_to=[],
        gradient_accumulation_steps=len(ids) // part, num_mini_batches=1, num_ppo_epochs=epochs, response_length=new,
        total_episodes=len(ids) * iterations, local_rollout_forward_batch_size=part, num_sample_generations=0,
        temperature=1.0, learning_rate=1e-6, kl_coef=0.01, save_strategy="no", stop_token=None,
    )  # fmt: skip
    ends: list[tuple[float, Seconds]] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), dict(spent)))

    trainer = trl.PPOTrainer(
        settings, tokenizer, policy, reference, reward, Dataset.from_dict({"input_ids": ids}), value,
        eval_dataset=Dataset.from_dict({"input_ids": ids}), callbacks=[Clock()],
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    return differences(began, ends)


def differences(began: float, ends: list[tuple[float, Seconds]]) -> list[Seconds]:
    """Each iteration's own seconds, of clocks that run through; what is neither generating nor scoring is updating."""
    seen = []
    before: Seconds = dict.fromkeys(("generate", "score"), 0.0)
    for end, spent in ends:
        mine = {part: spent[part] - before[part] for part in before}
        whole = end - began
        seen.append(mine | {"update": whole - sum(mine.values()), "iteration": whole})
        began, before = end, spent
    return seen


def trl_grpo(folder: Path, new: int, epochs: int, iterations: int) -> list[Seconds]:
    """TRL's GRPOTrainer: its steps of one generation together are an iteration."""
    import transformers
    import trl
    from datasets import Dataset

    ids = json.loads((folder / "ids.json").read_text())
    tokenizer = tokenizer_of(folder)
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", num_labels=1, dtype=torch.float32
    )
    policy.config.pad_token_id = reward.config.pad_token_id = 0
    part = max(n for n in (16, 8, 4) if len(ids) % n == 0)
    settings = trl.GRPOConfig(
        output_dir=str(folder / "grpo"), use_cpu=True, bf16=BF16, per_device_train_batch_size=part, report_to=[],
        gradient_accumulation_steps=len(ids) // part, num_generations=4, num_iterations=epochs, beta=0.01,
        max_completion_length=new, generation_kwargs={"min_new_tokens": new}, temperature=1.0, learning_rate=1e-6,
        max_steps=epochs * iterations, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    texts = [tokenizer.decode(row) for row in ids] * (epochs * iterations)
    trainer = trl.GRPOTrainer(
        policy, reward, settings, train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
        reward_processing_classes=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    ends.append(time.perf_counter())
    trainer.train()
    bounds = ends[::epochs]
    return [{"iteration": end - begin} for begin, end in itertools.pairwise(bounds)]


WORKERS: dict[str, Callable[[Path, int, int, int], list[Seconds]]] = {
    "puna": puna,
    "trl-ppo": trl_ppo,
    "trl-grpo": trl_grpo,
}


# The race -------------------------------------------------------------------------------------------------------------


def work(settings: argparse.Namespace) -> None:
    """One contender's process: prints the seconds of each iteration but the first."""
    torch.set_num_threads(settings.threads)
    for option, value in MALLOPT:
        ctypes.CDLL(None).mallopt(option, value)
    arguments = settings.folder, settings.new, settings.epochs, settings.iterations + 1
    print(json.dumps(WORKERS[settings.worker](*arguments)[1:]))


def race(settings: argparse.Namespace, folder: Path) -> None:
    """Starts the contenders by turns and prints medians, and each iteration as a multiple of Puna's."""
    from puna import cli

    pythons = {"puna": sys.executable, "trl-ppo": settings.trl_ppo, "trl-grpo": settings.trl_grpo}
    seen: dict[str, list[Seconds]] = {name: [] for name, python in pythons.items() if python}
    told = [f"--{name}={getattr(settings, name)}" for name in ("new", "epochs", "iterations", "threads")]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    for turn in range(settings.rounds):
        for name in seen:
            command = [str(pythons[name]), __file__, settings.model, "--worker", name, "--folder", str(folder), *told]
            waiting = cli.WAITING if name == "puna" else {}
            done = subprocess.run(command, env=environment | waiting, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            new = json.loads(done.stdout.splitlines()[-1])
            seen[name] += new
            took = ", ".join(f"{seconds['iteration']:.1f}" for seconds in new)
            print(f"round {turn + 1} of {settings.rounds}, {name}: iterations of {took} s", flush=True)
    medians = {
        name: {part: statistics.median(s[part] for s in every) for part in PARTS if part in every[0]}
        for name, every in seen.items()
    }
    print(f"\n{'seconds':10}" + "".join(f"{part:>12}" for part in PARTS) + f"{'of puna':>12}")
    for name, found in medians.items():
        cells = "".join(f"{found[part]:12.2f}" if part in found else f"{'–':>12}" for part in PARTS)
        print(f"{name:10}{cells}{found['iteration'] / medians['puna']['iteration']:11.2f}x")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, a wheel that holds one, or: wide")
    parser.add_argument("--trl-ppo", help="a Python that has trl 0.24")
    parser.add_argument("--trl-grpo", help="a Python that has trl 1.x")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2, help="measured ones a process")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker:
        work(settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), settings.model, settings.prompts)
        race(settings, Path(folder))


if __name__ == "__main__":
    main()
