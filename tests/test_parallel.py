"""Processes, devices and models where there is one of each; tests/invariants/test_processes.py has more."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puna import parallel
from puna.config import ConfigError
from puna.generate.weights import whole
from puna.model import fused
from puna.model.transformer import Transformer
from puna.parallel import ParallelConfig, Placement
from tests import helpers

CPU = torch.device("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_glibc_takes_the_options() -> None:
    libc = ctypes.CDLL(None)
    assert all(libc.mallopt(option, value) == 1 for option, value in parallel.MALLOPT)


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert parallel.start().type in ("cpu", "cuda")


def test_an_error_of_one_process_is_told_without_a_rank() -> None:
    program = "from puna import parallel; parallel.start(); raise ValueError('so')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError: so" in done.stderr and "[rank" not in done.stderr


def test_a_tensor_group_needs_its_processes() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 2, which does not divide the 1 processes"):
        parallel.start(cfg=ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, "tensor is 0: it must be positive"),
        ({"heartbeat": 0.5}, "heartbeat is 0.5: it must be 0, or at least 3 seconds"),
        ({"heartbeat": -1.0}, "heartbeat is -1.0: it must be 0, or at least 3 seconds"),
        ({"heartbeat": math.nan}, "heartbeat is nan"),
        ({"tensor": 2, "compile": True}, "compile does not go with tensor > 1"),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**fields)
    assert ParallelConfig(heartbeat=0).heartbeat == 0


def test_one_process_does_all_itself() -> None:
    assert parallel.spread(lambda first, part: [first + x for x in part], [1, 2, 3]) == [1, 2, 3]
    assert parallel.spread(lambda first, part: part, []) == []
    assert parallel.share(7) == slice(0, 7)


def test_placed_weights_are_those_of_one_process() -> None:
    config = helpers.config(tie_embeddings=True)
    whole = Transformer(config)
    whole.init_weights(torch.Generator().manual_seed(3))
    bare = Transformer.without_weights(config)
    assert bare.norm.weight.is_meta and torch.equal(bare.rotary, whole.rotary)
    placed = parallel.place(bare, bare.initial_weights(torch.Generator().manual_seed(3)), Placement(CPU))
    assert placed.output.weight is placed.tok_embeddings.weight
    for name, weight in whole.state_dict().items():
        assert torch.equal(placed.state_dict()[name], weight), name


def test_no_weight_may_be_left_out() -> None:
    bare = Transformer.without_weights(helpers.config())
    weights = [pair for pair in bare.initial_weights(torch.Generator()) if pair[0] != "layers.1.attention.wq.weight"]
    with pytest.raises(AssertionError, match=r"no weights for layers\.1\.attention\.wq\.weight"):
        parallel.place(bare, weights, Placement(CPU))


def step(cfg: ParallelConfig) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients and floating-point operations of one pass there and back."""
    model = helpers.placed(helpers.model(), cfg)
    tokens = torch.randint(helpers.VOCAB, (2, 33), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), grads, counter.get_total_flops()


def test_checkpointing_changes_what_is_computed_twice_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "attends", lambda *_: False)  # as on a GPU: the compiled one is no operation of torch's
    loss, grads, operations = step(ParallelConfig())
    counts = []
    for kind in ("selective", "full"):
        again, found, n = step(ParallelConfig(checkpointing=kind))  # type: ignore[arg-type]
        assert again == loss and all(map(torch.equal, found, grads))
        counts.append(n)
    assert counts[0] == operations, "selective: no matrix product twice"
    # Of three parts of a training step's operations, the blocks' forward pass is computed once more; the head's is not.
    assert 1.1 < counts[1] / operations < 4 / 3


@pytest.mark.parametrize("kind", ["off", "full"])
def test_compiled_blocks_compute_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's front half: the rest takes a minute and gives the same to a few units in the last place.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loss, grads, _ = step(ParallelConfig())
    again, found, _ = step(ParallelConfig(compile=True, checkpointing=kind))
    assert again == pytest.approx(loss, rel=1e-6)
    for mine, expected in zip(found, grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_samples_as_a_plain_copy() -> None:
    plain = helpers.placed(helpers.model())
    assert whole(plain) is plain
    model = helpers.placed(helpers.model(), ParallelConfig(checkpointing="full"))
    copy = whole(model)
    assert copy is not model and not parallel.is_compiled(copy)
    tokens = torch.arange(8)[None]
    assert torch.equal(copy(tokens), model(tokens))
