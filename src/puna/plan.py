"""`puna plan`: what pretraining takes on a cluster: memory a GPU, the layout that fits, time, energy, carbon.

1. Memory: the tensors that `stages.pretrain` holds at its peak, the loss of the second or a later micro-batch, counted
   from the shapes. On one process a test measures it.
2. Layouts: tensor parallel degrees within a node times data parallel, whose ranks hold all states (replicated) or an
   equal share (FSDP2). The smallest that fits is the first without tensor parallelism, then with as little as possible.
3. Time: 6 N + 12 L D T floating-point operations a token (PaLM, arXiv 2204.02311, appendix B: attention counted in
   full), at a stated share of the GPUs' dense bfloat16 rate (MFU).
4. Carbon: GPU-hours x TDP x PUE x carbon intensity, as Table 2. The paper prints neither of the last two; its rows
   imply 0.4235 kg a kWh, which is Llama 1's PUE 1.1 times 0.385 kg a kWh (arXiv 2302.13971, section 6).

`stages.pretrain` shards over all ranks along data (FSDP2); replicas are planned for only. Tensor parallelism with
sequence-parallel norms is taken to divide every part by its degree but the loss, which each rank computes whole.
Experts are taken to have equal shares of the tokens.

Shapes: N parameters, L layers, D model width, T tokens a window.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from puna import config, parallel
from puna.config import ConfigError, one_of, positive
from puna.formats.card import KG_A_KWH, PUE
from puna.model.head import CHUNK, LARGE
from puna.model.sizes import LLAMA_2, SIZES, cache_bytes
from puna.model.transformer import ModelConfig
from puna.stages.pretrain import PretrainConfig

Checkpointing = Literal["off", "selective", "full"]

GB = 1e9
NODE = 8
"""GPUs that share a node, the largest tensor parallel degree (A.2.1's serving test: 8 A100)."""
MFU = 0.43
"""Operations of four models on 2T tokens each over Table 2's 3,311,616 GPU-hours at an A100's rate (derived)."""


class GPU(NamedTuple):
    """A card: memory in bytes, dense bfloat16 operations a second, TDP in watts, and where these stand."""

    memory: float
    rate: float
    watts: int
    source: str


GPUS = {
    "a100-80g": GPU(80 * GB, 312e12, 400, "NVIDIA A100 data sheet, SXM; 400 W: Table 2"),
    "a100-40g": GPU(40 * GB, 312e12, 400, "NVIDIA A100 data sheet, SXM"),
    "h100": GPU(80 * GB, 989.4e12, 700, "NVIDIA H100 data sheet, SXM, half of the rate with sparsity"),
    "h200": GPU(141 * GB, 989.4e12, 700, "NVIDIA H200 data sheet, SXM, half of the rate with sparsity"),
}


class Published(NamedTuple):
    """A row of Table 2."""

    gpu_hours: int
    watts: int
    tonnes: float


TABLE_2 = {
    "7b": Published(184_320, 400, 31.22),
    "13b": Published(368_640, 400, 62.44),
    "34b": Published(1_038_336, 350, 153.90),
    "70b": Published(1_720_320, 400, 291.42),
}


@dataclass(frozen=True)
class PlanConfig:
    """`puna plan RECIPE.toml` or `puna plan --model 7b`: what pretraining takes, printed."""

    recipe: Path | None = None
    """a recipe with a table [pretrain], or a run's config.json."""
    model: str | None = None
    """in place of a recipe a size by name, with the paper's windows, batch and tokens."""
    gpus: int = 8
    gpu: str = "a100-80g"
    """a100-80g, a100-40g, h100 or h200."""
    micro_batch_size: int = 0
    """windows a forward pass; 0 takes the recipe's."""
    checkpointing: Checkpointing = "off"
    """what the backward pass computes again (docs/guides/cluster.md)."""
    margin: float = 0.1
    """share of the memory left to CUDA, NCCL and fragmentation (ours, not measured)."""
    mfu: float = MFU
    """share of the dense bfloat16 rate, attention counted in full (Table 2 implies 0.43)."""
    watts: int = 0
    """power of a GPU; 0 takes its TDP (Table 2's 34B ran under a cap of 350 W)."""
    pue: float = PUE
    """power of the data centre over that of its computers (Llama 1's; Table 2 agrees)."""
    kg_per_kwh: float = KG_A_KWH
    """carbon intensity (Llama 1's; Table 2 agrees)."""
    json: bool = False
    """print JSON."""

    def __post_init__(self) -> None:
        one_of(self, "gpu", GPUS)
        if self.model is not None:
            one_of(self, "model", SIZES)
        if (self.recipe is None) == (self.model is None):
            raise ConfigError(f"give a recipe or --model ({', '.join(SIZES)}), one of the two")
        positive(self, "gpus", "mfu", "pue")
        if not 0 <= self.margin < 1 or self.mfu > 1 or min(self.micro_batch_size, self.watts, self.kg_per_kwh) < 0:
            raise ConfigError("margin and mfu are shares; micro_batch_size, watts and kg_per_kwh are not negative")


@dataclass(frozen=True)
class Pretraining(PretrainConfig):
    """The table [pretrain] of a recipe, which may leave the paths to the run."""

    out: Path = Path()
    data: tuple[Path, ...] = ()


class Layout(NamedTuple):
    """How GPUs share the work: data parallel ranks x tensor parallel ranks; `sharded`: the former share all states."""

    data: int = 1
    tensor: int = 1
    sharded: bool = False

    def __str__(self) -> str:
        data = [f"FSDP over {self.data}" if self.sharded else f"{self.data} replicas"] if self.data > 1 else []
        tensor = [f"tensor parallel {self.tensor}"] if self.tensor > 1 else []
        return " x ".join(data + tensor) or "one GPU"


ONE_GPU = Layout()


class Memory(NamedTuple):
    """Bytes of one GPU at the peak, by part."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments."""
    gathered: float
    """FSDP2: of the root and of two blocks whole weights and gradients, bfloat16, and what is summed, float32."""
    copies: float
    """autocast's bfloat16 copies of the weight matrices, which the backward pass needs where nothing is sharded."""
    activations: float
    logits: float
    """log-probabilities and two gradients of them, float32; of a large vocabulary what the loss by chunks holds."""

    @property
    def total(self) -> float:
        return sum(self)


class Option(NamedTuple):
    """A layout, what it needs, and whether a GPU has that."""

    layout: Layout
    memory: Memory
    fits: bool


class Cost(NamedTuple):
    """What a run takes: operations a token, tokens a second, days, GPU-hours, MWh (without PUE), tonnes of CO2eq."""

    flops_per_token: int
    tokens_per_second: float
    days: float
    gpu_hours: float
    megawatt_hours: float
    tonnes: float


def run(cfg: PlanConfig) -> str:
    """The plan as text, or JSON; ConfigError where the recipe cannot be planned."""
    training = read(cfg)
    plans = {way: options(cfg, training, way) for way in get_args(Checkpointing)}
    spent = cost(cfg, training)
    if cfg.json:
        return json.dumps(_as_json(cfg, training, plans, spent), indent=2)
    return "\n\n".join(
        [
            _heading(cfg, training),
            _memory_table(cfg, training, plans[cfg.checkpointing]),
            _verdicts(cfg, training, plans),
            _generation(cfg, training),
            _cost_table(cfg, training, spent),
        ]
    )


def read(cfg: PlanConfig) -> Pretraining:
    """What is to be trained: the recipe's [pretrain], or a size by the paper's windows, batch and tokens (2.2)."""
    if cfg.recipe is not None:
        training = config.load(Pretraining, [str(cfg.recipe)], "pretrain")
    else:
        assert cfg.model is not None
        model = SIZES[cfg.model]
        seq_len = min(4096, model.max_seq_len)
        batch_size = 4 * 1024**2 // seq_len
        training = Pretraining(
            model=model,
            seq_len=seq_len,
            batch_size=batch_size,
            micro_batch_size=1,
            steps=int(2e12) // (batch_size * seq_len),
        )
    if training.precision != "bf16":
        raise ConfigError(f"precision is {training.precision!r}: only bf16 is planned, the rates of the GPUs are its")
    size = cfg.micro_batch_size or training.micro_batch_size
    return dataclasses.replace(training, micro_batch_size=size)


# Memory --------------------------------------------------------------------------------------------------------------


def block_matrices(model: ModelConfig) -> int:
    """Numbers in the matrices of one block, all experts' included."""
    attention = 2 * model.dim**2 + 2 * model.dim * model.n_kv_heads * model.head_dim
    feed_forward = 3 * model.dim * model.ffn_hidden
    experts = model.moe.experts
    return attention + (experts * (feed_forward + model.dim) if experts else feed_forward)


class Activations(NamedTuple):
    """Bytes a token that the backward pass needs, in torch's operations."""

    kept: int
    """of each block from the forward pass on."""
    recomputed: int
    """of the block that is computed again, beside what is kept of it."""
    last: int
    """of the last norm."""


def activations(model: ModelConfig, checkpointing: Checkpointing, precision: str = "bf16") -> Activations:
    """What is counted of a block: both norms' inputs in float32, the normalised states and what the matrices read of
    them, q, k, v and the attention's output, one float32 a head, and four F wide states.

    A mixture's normalised states stay in float32 for the router, and each expert of a token has F wide states of its
    own, what it reads and gives, and the latter once more in float32. Selective checkpointing keeps the input and
    what the products and attention give.
    """
    size = 2 if precision == "bf16" else 4
    dim, heads, keys_values = model.dim, 4 * model.n_heads, 2 * size * model.n_kv_heads * model.head_dim
    attention, experts = (8 + 6 * size) * dim + keys_values + heads, model.moe.experts
    k, hidden = (model.moe.top_k if experts else 1), size * model.ffn_hidden
    block = attention + 4 * k * hidden
    products = 4 * dim + 3 * size * dim + keys_values + heads + k * (2 * hidden + size * dim)
    if experts:
        block += (8 - 2 * size) * dim + 8 * experts + k * ((4 + 2 * size) * dim + 42)
        products += 12 * experts + 8 * k
    last = (8 + size) * dim
    if checkpointing == "full":
        return Activations(4 * dim, block, last)
    if checkpointing == "selective":
        return Activations(products, block - size * dim - 2 * k * hidden - heads, last)
    return Activations(block, 0, last)


def chunked_loss_bytes(model: ModelConfig, tokens: int, layout: Layout, precision: str) -> int:
    """Bytes that the loss by chunks (`model.head`) holds at most; tensor parallelism divides none of them.

    In a chunk: the head's matrix where that is a copy or gathered from tensor ranks, its gradient in float32, of each
    token the states and their gradient, and the chunk's logits, the same in float32 and log-probabilities, or then the
    logits' gradient and its product. In the backward pass: both gradients, and once more as they are scaled.
    """
    size = 2 if precision == "bf16" else 4
    head, chunk = model.vocab_size * model.dim, min(tokens, CHUNK) * model.vocab_size
    copied = size * head if layout.tensor > 1 or (size == 2 and not layout.sharded) else 0
    in_chunk = max((10 if size == 2 else 8) * chunk, size * (chunk + head))
    forward = copied + 4 * head + in_chunk + 8 * tokens * model.dim
    return max(forward, 8 * head + (4 + size) * tokens * model.dim)


def memory(
    model: ModelConfig,
    seq_len: int,
    windows: int,
    layout: Layout = ONE_GPU,
    checkpointing: Checkpointing = "off",
    precision: str = "bf16",
) -> Memory:
    """Peak bytes of one GPU with `windows` of `seq_len` tokens a forward pass.

    That is when the loss is differentiated, or after it the feed-forward part of a block, whichever holds more.
    """
    tokens, size = windows * seq_len, 2 if precision == "bf16" else 4
    block, head = block_matrices(model), model.vocab_size * model.dim
    root = model.n_params() - model.n_layers * (block + 2 * model.dim)
    states = model.n_params() / layout.tensor / (layout.data if layout.sharded else 1)

    def held(copied: int, activations: int, logits: int) -> Memory:
        """All parts at one of the two moments, given numbers copied, bytes a token and the loss's."""
        return Memory(
            weights=4 * states,
            gradients=4 * states,
            optimizer=8 * states,
            gathered=8 * (root + 2 * block) / layout.tensor if layout.sharded else 0,
            copies=2 * copied / layout.tensor if precision == "bf16" and not layout.sharded else 0,
            activations=tokens * activations / layout.tensor,
            logits=logits,
        )

    kept, recomputed, last = activations(model, checkpointing, precision)
    kept *= model.n_layers
    copied = block if recomputed else model.n_layers * block
    logits = 12 * tokens * model.vocab_size
    gradients = 8 * model.moe.top_k * model.dim if model.moe.experts else 2 * size * model.ffn_hidden
    if tokens * model.vocab_size > LARGE:  # the copy of the head and the states that it reads are the loss's
        logits, last, head = chunked_loss_bytes(model, tokens, layout, precision), last - size * model.dim, 0
    moments = (
        held(head if recomputed else copied + head, kept + last, logits),
        held(copied, kept + recomputed + gradients, 0),
    )
    return max(moments, key=lambda moment: moment.total)


def layouts(model: ModelConfig, gpus: int, batch_size: int) -> list[Layout]:
    """All layouts, the simplest first; ConfigError where the batch divides over none."""
    divided = (gpus, *(getattr(model, name) for name in parallel.DIVIDED))
    degrees = [t for t in (1, 2, 4, NODE) if all(number % t == 0 for number in divided)]
    found = [
        Layout(gpus // t, t, sharded)
        for t in degrees
        for sharded in ((False, True) if gpus > t else (False,))
        if batch_size % (gpus // t) == 0
    ]
    if not found:
        raise ConfigError(f"a batch of {batch_size} windows does not divide over {gpus} GPUs: change --gpus")
    return found


def options(cfg: PlanConfig, training: Pretraining, checkpointing: Checkpointing) -> list[Option]:
    """Every layout, the simplest first, with what it needs."""
    found = []
    for layout in layouts(training.model, cfg.gpus, training.batch_size):
        windows = min(training.micro_batch_size, training.batch_size // layout.data)
        needed = memory(training.model, training.seq_len, windows, layout, checkpointing)
        found.append(Option(layout, needed, needed.total <= _room(cfg)))
    return found


def _room(cfg: PlanConfig) -> float:
    return (1 - cfg.margin) * GPUS[cfg.gpu].memory


# Time and carbon -----------------------------------------------------------------------------------------------------


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Operations of a forward and a backward pass, a token."""
    return 6 * model.n_active_params() + 12 * model.n_layers * model.dim * seq_len


def cost(cfg: PlanConfig, training: Pretraining) -> Cost:
    """What all steps take on the config's GPUs at its MFU."""
    gpu = GPUS[cfg.gpu]
    flops = flops_per_token(training.model, training.seq_len)
    tokens_per_second = cfg.gpus * gpu.rate * cfg.mfu / flops
    hours = _tokens(training) / tokens_per_second / 3600
    megawatt_hours = cfg.gpus * hours * (cfg.watts or gpu.watts) / 1e6
    tonnes = megawatt_hours * cfg.pue * cfg.kg_per_kwh
    return Cost(flops, tokens_per_second, hours / 24, cfg.gpus * hours, megawatt_hours, tonnes)


def implied_mfu(size: str) -> float:
    """The MFU that a row of Table 2 implies for 2T tokens in windows of 4,096 on A100."""
    done = 2e12 * flops_per_token(LLAMA_2[size], 4096)
    return done / (3600 * TABLE_2[size].gpu_hours * GPUS["a100-80g"].rate)


# What is printed -----------------------------------------------------------------------------------------------------


def _tokens(training: Pretraining) -> int:
    return training.steps * training.batch_size * training.seq_len


def _verdicts(cfg: PlanConfig, training: Pretraining, plans: dict[Checkpointing, list[Option]]) -> str:
    """The smallest layout that fits, without and with checkpointing, and whether the recipe's own [parallel] does."""
    lines = []
    for way, rows in plans.items():
        smallest = next((row.layout for row in rows if row.fits), "none")
        lines.append(f"smallest that fits, checkpointing {way}: {smallest}")
    return "\n".join([*lines, _own_verdict(cfg, training, plans)])


def _own_verdict(cfg: PlanConfig, training: Pretraining, plans: dict[Checkpointing, list[Option]]) -> str:
    """What becomes of `puna pretrain` with the recipe's own table [parallel] on so many GPUs."""
    tensor, checkpointing = training.parallel.tensor, training.parallel.checkpointing
    layout = Layout(cfg.gpus // tensor, tensor, sharded=cfg.gpus > tensor)
    fits = {row.layout: "fits" if row.fits else "does not fit" for row in plans[checkpointing]}
    said = fits.get(layout, "divides no batch or no model")
    whose = "as the recipe has it" if cfg.recipe else "by default"
    return f"puna pretrain {whose}, {layout}, checkpointing {checkpointing}: {said}"


def _heading(cfg: PlanConfig, training: Pretraining) -> str:
    gpu = GPUS[cfg.gpu]
    return f"""\
{cfg.recipe or cfg.model}: {training.model.n_params():,} parameters, {_tokens(training):.3g} tokens
{training.steps:,} steps of {training.batch_size:,} windows of {training.seq_len:,} tokens
{cfg.gpus:,} x {cfg.gpu}: {gpu.memory / GB:.0f} GB, {gpu.rate / 1e12:g} TFLOP/s, {gpu.watts} W ({gpu.source})"""


def _memory_table(cfg: PlanConfig, training: Pretraining, rows: list[Option]) -> str:
    """A line a layout, gigabytes of one GPU by part."""
    windows = training.micro_batch_size
    width = max(len(str(row.layout)) for row in rows)
    lines = [
        f"GB a GPU, of which {_room(cfg) / GB:g} are free; micro-batch {windows}, checkpointing {cfg.checkpointing}",
        f"{'':{width}}" + "".join(f"{part:>12}" for part in (*Memory._fields, "total")),
    ]
    for layout, needed, fits in rows:
        numbers = "".join(f"{part / GB:12,.2f}" for part in (*needed, needed.total))
        lines.append(f"{layout!s:{width}}{numbers}{'  fits' if fits else ''}")
    return "\n".join(lines)


def _generation(cfg: PlanConfig, training: Pretraining) -> str:
    """Weights and keys and values in bfloat16, and the fewest GPUs that hold them."""
    model, sequence = training.model, cache_bytes(training.model) * training.seq_len
    weights = 2 * model.n_params()
    fewest = next((t for t in (1, 2, 4, NODE) if t * _room(cfg) >= weights + sequence), None)
    held = f"{(fewest * _room(cfg) - weights) // sequence:,.0f} on {fewest} x {cfg.gpu}" if fewest else "none on a node"
    return f"""\
generation in bfloat16: weights {weights / GB:,.2f} GB, keys and values {cache_bytes(model):,} bytes a token
sequences of {training.seq_len:,} tokens, {sequence / GB:,.2f} GB each: {held}"""


def _cost_table(cfg: PlanConfig, training: Pretraining, spent: Cost) -> str:
    lines = [
        f"floating-point operations a token  {spent.flops_per_token:,}",
        f"tokens a second at MFU {cfg.mfu:<4g}        {spent.tokens_per_second:,.0f}",
        f"days                               {spent.days:,.2f}",
        f"GPU-hours                          {spent.gpu_hours:,.0f}",
        f"energy of the GPUs                 {spent.megawatt_hours:,.1f} MWh at {cfg.watts or GPUS[cfg.gpu].watts} W",
        f"carbon                             {spent.tonnes:,.2f} tCO2eq at PUE {cfg.pue:g}, {cfg.kg_per_kwh:g} kg/kWh",
    ]
    size = next((name for name, model in LLAMA_2.items() if model == training.model), None)
    if size:
        hours, watts, tonnes = TABLE_2[size]
        paper = f"{hours:,} GPU-hours at {watts} W, {tonnes:.2f} tCO2eq: MFU {implied_mfu(size):.3f} on a100-80g"
        lines.append(f"Table 2                            {paper}")
    return "\n".join(lines)


def _as_json(
    cfg: PlanConfig, training: Pretraining, plans: dict[Checkpointing, list[Option]], spent: Cost
) -> dict[str, Any]:
    return {
        "parameters": training.model.n_params(),
        "tokens": _tokens(training),
        "gpus": cfg.gpus,
        "gpu": cfg.gpu,
        "room_bytes": _room(cfg),
        "micro_batch_size": training.micro_batch_size,
        "layouts": {
            way: [
                row.layout._asdict() | {"bytes": row.memory._asdict(), "total": row.memory.total, "fits": row.fits}
                for row in rows
            ]
            for way, rows in plans.items()
        },
        "cache_bytes_per_token": cache_bytes(training.model),
        "mfu": cfg.mfu,
        **spent._asdict(),
    }
