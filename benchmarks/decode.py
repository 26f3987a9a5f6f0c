"""Decoding one sequence on a CPU, beside transformers and llama.cpp, and what packed weights cost in perplexity.

    python benchmarks/decode.py MODEL.gguf|.whl [--text BOOKS.jsonl.gz] [--rounds 5] [--threads 2]

Prompts of 128 tokens and 128 new ones, greedy. All contenders take turns in one process, so that what else the machine
does falls on each; numbers are medians over the rounds. transformers runs in the type that this machine is fastest in.
A step must read every weight once: beside tokens/s stands that traffic as a share of the rate at which torch sums a
large tensor, measured between the turns.

How OpenMP's threads wait is the caller's choice: as torch does by default, or as `puna.cli.WAITING`, which `puna` sets.
`OMP_WAIT_POLICY=PASSIVE` alone makes llama.cpp three times slower on two threads.

llama.cpp runs where llama-cpp-python is installed, from the same weights written as BF16 and Q8_0; its Q8_0 has a
float16 scale for 32 numbers where our int8 has one for an output channel.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.formats import gguf as gguf_format
from puna.formats import huggingface
from puna.generate import weights
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.generate.weights import Kind, PackedTransformer
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer

PROMPT, NEW = 128, 128
WINDOW, WINDOWS = 512, 24  # tokens of a text, texts

Decode = Callable[[int], list[int]]
"""Reads the prompt and returns so many greedy tokens."""


def ours(model: PackedTransformer, tokenizer: Tokenizer, prompt: list[int]) -> Decode:
    """The engine."""
    endless: Any = SimpleNamespace(decode=tokenizer.decode, eos_id=-1)  # no token ends an answer
    engine = LocalEngine(model, endless, max_batch_size=1)

    def decode(new: int) -> list[int]:
        [[answer]] = engine.complete([prompt], [Sampling(temperature=0, max_new_tokens=new)])
        return answer.tokens

    return decode


def transformers(folder: Path, prompt: list[int], dtype: torch.dtype) -> Decode:
    """transformers' generate."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.tensor([prompt])

    @torch.inference_mode()
    def decode(new: int) -> list[int]:
        made = model.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return decode


def llama_cpp(file: Path, prompt: list[int], threads: int) -> Decode:
    """llama.cpp through its C calls."""
    import llama_cpp as cpp

    model = cpp.Llama(str(file), n_ctx=PROMPT + NEW, n_threads=threads, n_threads_batch=threads, verbose=False)
    context = model._ctx.ctx

    def read(tokens: list[int]) -> int:
        array = (cpp.llama_token * len(tokens))(*tokens)
        assert cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(tokens))) == 0
        return int(np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (model.n_vocab(),)).argmax())

    def decode(new: int) -> list[int]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        made = [read(prompt)]
        while len(made) < new:
            made.append(read(made[-1:]))
        return made

    return decode


def rewrite(source: Path, target: Path, kind: str) -> Path:
    """The GGUF file with its matrices as `kind` (BF16, Q8_0), everything else as it was."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch="llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        held = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, gguf.quantize(values, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def bytes_a_token(model: PackedTransformer) -> int:
    """Bytes of weights that a step reads: all but the embeddings, of which it takes a row."""
    tensors = {x.data_ptr(): x for name, x in model.state_dict().items() if not name.startswith("tok_embeddings")}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def race(contenders: dict[str, tuple[Decode, float]], rounds: int) -> None:
    """Print tokens/s of each, decoding alone and with the prompt, and its share of the memory's rate."""
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}
    rates = []
    for turn in range(rounds + 1):  # the first warms up
        for name, (decode, _) in contenders.items():
            first[name].append(machine.seconds(lambda decode=decode: decode(1)))  # type: ignore[misc]
            whole[name].append(machine.seconds(lambda decode=decode: decode(NEW)))  # type: ignore[misc]
            rates.append(machine.memory_rate())
        print(f"round {turn} of {rounds}", flush=True)
    rate = statistics.median(rates)
    print(f"\ntorch sums {rate / 1e9:.1f} GB/s with {torch.get_num_threads()} threads\n")
    print(f"{'':24}{'decode tok/s':>14}{'(range)':>16}{'of memory':>11}{'with prompt':>13}")
    for name, (_, size) in contenders.items():
        speeds = sorted((NEW - 1) / (w - f) for w, f in zip(whole[name][1:], first[name][1:], strict=True))
        speed, total = statistics.median(speeds), NEW / statistics.median(whole[name][1:])
        spread = f"({speeds[0]:.0f}-{speeds[-1]:.0f})"
        print(f"{name:24}{speed:14.1f}{spread:>16}{speed * size / rate:11.0%}{total:13.1f}")


def windows(text: Path, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """A window (1, T) from the middle of each of some texts of a .jsonl.gz."""
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(WINDOWS), lines, strict=False)]
    for whole in texts:
        middle = len(whole) // 2
        yield torch.tensor([tokenizer.encode(whole[middle : middle + 8 * WINDOW])[:WINDOW]])


@torch.inference_mode()
def perplexity(model: Transformer, ids: list[Tensor]) -> float:
    """Of every token after a window's first, all windows together."""
    losses = [F.cross_entropy(model(row)[0, :-1].float(), row[0, 1:], reduction="none") for row in ids]
    return math.exp(float(torch.cat(losses).mean()))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="a .jsonl.gz with a text a line: also measure perplexity")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    file = gguf_format.find(settings.model)
    model, tokenizer = gguf_format.load(file)
    packed: dict[Kind, PackedTransformer] = {kind: weights.pack(model, kind) for kind in get_args(Kind)}
    if settings.text:
        ids = list(windows(settings.text, tokenizer))
        print(f"perplexity over {sum(row.shape[1] - 1 for row in ids)} tokens", flush=True)
        for name, form in packed.items():
            print(f"{name:8}{perplexity(form, ids):10.4f}{bytes_a_token(form) / 1e6:10.1f} MB", flush=True)
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = {kind: float(bytes_a_token(held)) for kind, held in packed.items()}
    with tempfile.TemporaryDirectory() as work:
        contenders: dict[str, tuple[Decode, float]] = {
            f"puna {kind}": (ours(held, tokenizer, prompt), sizes[kind]) for kind, held in packed.items()
        }
        huggingface.save_model(model, tokenizer, Path(work) / "hf", dtype=torch.bfloat16)
        kind = "bf16" if machine.fast_type() == torch.bfloat16 else "fp32"
        contenders[f"transformers {kind}"] = (transformers(Path(work) / "hf", prompt, machine.fast_type()), sizes[kind])
        try:
            for held, share in (("BF16", 1.0), ("Q8_0", 34 / 64)):
                path = rewrite(file, Path(work) / f"{held}.gguf", held)
                contenders[f"llama.cpp {held}"] = (llama_cpp(path, prompt, settings.threads), sizes["bf16"] * share)
        except ImportError:
            print("llama-cpp-python is not installed: llama.cpp does not take part")
        race(contenders, settings.rounds)


if __name__ == "__main__":
    main()
