"""Packed weights give the plain model's numbers, by torch's kernels and by the compiled step."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna import kernels
from puna.config import ConfigError
from puna.generate import weights
from puna.generate.kv_cache import BlockCache, DecodePass
from puna.generate.weights import Kind, PackedTransformer, Pages
from puna.model.transformer import ModelConfig, Transformer
from tests import helpers

STUB = "".join(f'extern "C" void {name}() {{}}' for name in kernels.CALLS)
ODD: dict[str, int] = {"dim": 84, "n_heads": 3, "n_kv_heads": 1, "vocab_size": 101, "ffn_hidden": 77}
"""No number of it fills the processor's registers."""
WIDE: dict[str, int] = {"dim": 192, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 301, "ffn_hidden": 512}


class Paged:
    """Pages of 4 places in a random order; the torch path may not be taken."""

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, length: int = 24) -> None:
        shape = (config.n_layers, rows * length // 4, config.n_kv_heads, 4, config.head_dim)
        self.keys, self.values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        self.table = torch.randperm(shape[1]).view(rows, -1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("the compiled step was not used")

    def pages(self) -> Pages:
        return Pages(self.keys.unbind(), self.values.unbind(), self.table)


@pytest.fixture(scope="module", params=helpers.BUILDS[:2])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiled step, made anew; skips where this machine cannot. Without AVX512 torch would pack int4 otherwise."""
    with helpers.compiled_in(tmp_path_factory.mktemp("cache"), request.param):
        yield


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that compiles at once, and an empty cache folder, returned."""
    source, cache = tmp_path / "stub.cpp", tmp_path / "cache"
    source.write_text(STUB)
    monkeypatch.setattr(kernels, "SOURCES", (source,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kernels.library.cache_clear()
    yield cache / "puna"
    kernels.library.cache_clear()


def tokens(rows: int, length: int = 20, vocab: int = 101) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def stepped(model: PackedTransformer, ids: Tensor, width: int = 1) -> Tensor:
    """Logits (B, T, V), `width` tokens a row at a time."""
    is_int4 = isinstance(model.get_submodule("layers.0.attention.wq"), weights.Int4Linear)
    if is_int4 and not weights._packs_in_blocks(64):
        pytest.skip("torch lays out 4-bit weights for another processor than the compiler's")
    cache, parts = Paged(model.config, len(ids), model.tok_embeddings.weight.dtype), []
    for start in range(0, ids.shape[1], width):
        part = ids[:, start : start + width]
        positions = torch.arange(start, start + part.shape[1]).expand(part.shape)
        parts.append(model(part, positions=positions, cache=cache))
    return torch.cat(parts, 1)


def decoded(model: PackedTransformer, ids: Tensor) -> Tensor:
    """Hidden states (B, D) after the last of ids (B, T), read one by one through the engine's cache."""
    cache = BlockCache(model.config, 8, torch.float32, torch.device("cpu"))
    blocks = [[cache.take()] for _ in ids]
    for position in range(ids.shape[1]):
        this = DecodePass(cache, blocks, np.full(len(ids), position + 1))
        at = torch.full((len(ids), 1), position)
        hidden = model.hidden(ids[:, position, None], positions=at, cache=this)
    return hidden[:, 0]


@torch.inference_mode()
def test_fp32_is_the_model_and_shares_its_weights() -> None:
    model = helpers.model()
    packed = weights.pack(model, "fp32")
    assert torch.equal(packed(tokens(3)), model(tokens(3)))
    before = packed(tokens(3))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert torch.equal(packed(tokens(3)), model(tokens(3)))
    assert not torch.equal(packed(tokens(3)), before)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "error", "agreement"), [("bf16", 0.02, 0.97), ("int8", 0.04, 0.9), ("int4", 0.35, 0.5)]
)
def test_packed_weights_are_near_the_model(kind: Kind, error: float, agreement: float) -> None:
    model = helpers.model(**WIDE)
    expected, found = model(tokens(40)), weights.pack(model, kind)(tokens(40)).float()
    assert (found - expected).norm() < error * expected.norm()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= agreement


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_cpu_without_bfloat16_makes_its_products_in_float32(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, ids = weights.pack(helpers.model(**WIDE), kind), tokens(40)
    seen, real = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(x.dtype) or real(x, weight))
    found = {}
    for has in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(weights.parallel, "dtype", lambda *_, has=has: has)
        seen.clear()
        found[has] = packed(ids)
        assert set(seen) == {has} and found[has].dtype == torch.bfloat16
    torch.testing.assert_close(found[torch.float32], found[torch.bfloat16], atol=0.05, rtol=0.05)


@torch.inference_mode()
@pytest.mark.parametrize("layer", [weights.Int8Linear, lambda weight: weights.Int4Linear(weight, 32)])
def test_a_quantised_layer_is_off_by_half_a_step_at_most(layer: type[weights.Int8Linear]) -> None:
    weight = torch.randn(48, 64)
    weight[3] = 0.0
    made = layer(weight)
    held = made(torch.eye(64)).T.float()  # (N, D)
    if isinstance(made, weights.Int8Linear):
        step = made.scales[:, None]
    else:
        step = made.scales[..., 0].T.repeat_interleave(32, 1).float()
    assert ((held - weight).abs() <= 0.51 * step + 0.01 * weight.abs().amax(1, keepdim=True)).all()
    assert (held[3] == 0).all()
    for rows in (1, 5, 64):  # both of the int8 layer's ways
        x = torch.randn(rows, 2, 64)
        torch.testing.assert_close(made(x), x @ held.T, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [{}, ODD, WIDE])
@pytest.mark.parametrize("rows", [3, 9, 40])
def test_the_step_is_the_full_forward_pass(shape: dict[str, int], rows: int) -> None:
    model, ids = helpers.model(**shape), tokens(rows)
    packed = weights.pack(model, "fp32")
    expected, found = model(ids), stepped(packed, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("kind", "rows", "shape"),
    [
        *((kind, rows, WIDE) for kind in ("bf16", "int8", "int4") for rows in (3, 9, 40)),
        ("bf16", 40, ODD),
        ("bf16", 40, ODD | {"ffn_hidden": 78}),  # pairs of columns
    ],
)
def test_the_step_rounds_less_than_torch(kind: Kind, rows: int, shape: dict[str, int]) -> None:
    """Against the same weights in float32, the step errs no more than torch's bfloat16 products do."""
    packed = weights.pack(helpers.model(**shape), kind)
    exact = weights.pack(helpers.model(**shape), "fp32")
    for name, module in exact.named_modules():
        held = packed.get_submodule(name)
        if isinstance(module, nn.Linear):
            same = held.weight.float() if isinstance(held, nn.Linear) else held(torch.eye(module.in_features)).T
            module.weight = nn.Parameter(same.contiguous(), requires_grad=False)
    exact.tok_embeddings.weight = nn.Parameter(packed.tok_embeddings.weight.float(), requires_grad=False)
    expected, ids = exact(tokens(rows)), tokens(rows)
    by_torch, by_step = ((x.float() - expected).norm() for x in (packed(ids), stepped(packed, ids)))
    assert by_step < by_torch < 0.02 * expected.norm()


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_a_row_steps_alone_as_beside_others(kind: Kind) -> None:
    packed, ids = weights.pack(helpers.model(**WIDE), kind), tokens(7)
    together = stepped(packed, ids)
    for row in range(7):
        assert torch.equal(stepped(packed, ids[row : row + 1])[0], together[row])
    assert torch.equal(stepped(packed, ids[:1], width=7), together[:1])  # several tokens of a row at once


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_many_rows_step_as_beside_more(kind: Kind) -> None:
    packed, ids = weights.pack(helpers.model(**WIDE), kind), tokens(40)
    together = stepped(packed, ids)
    for begin, end in ((0, 9), (9, 20), (20, 37)):
        assert torch.equal(stepped(packed, ids[begin:end]), together[begin:end])


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_begin_with_the_same_pages_step_as_with_their_own(kind: Kind, threads: int) -> None:
    """The first shares 8 tokens with eight more, of which the next five share 16; all go their own way at last."""
    packed = weights.pack(helpers.model(**WIDE), kind)
    ids = tokens(22)
    ids[1:9, :8] = ids[0, :8]
    ids[2:6, :16] = ids[1, :16]
    apart, shared = (Paged(packed.config, 22, packed.tok_embeddings.weight.dtype) for _ in range(2))
    shared.table[1:9, :2] = shared.table[0, :2]
    shared.table[2:6, :4] = shared.table[1, :4]
    torch.set_num_threads(threads)
    try:
        for i in range(ids.shape[1]):
            at = torch.full((22, 1), i)
            expected = packed(ids[:, i : i + 1], positions=at, cache=apart)
            assert torch.equal(packed(ids[:, i : i + 1], positions=at, cache=shared), expected), f"position {i}"
    finally:
        torch.set_num_threads(1)


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("shape", [WIDE, WIDE | {"n_heads": 8, "n_kv_heads": 1}])  # few tasks: heads are parted
def test_threads_change_nothing(rows: int, shape: dict[str, int]) -> None:
    packed, ids = weights.pack(helpers.model(**shape), "bf16"), tokens(rows)
    alone = stepped(packed, ids)
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            assert torch.equal(stepped(packed, ids), alone)
    finally:
        torch.set_num_threads(1)


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
def test_hidden_states_through_the_engines_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.model()
    packed, ids = weights.pack(model, "fp32"), tokens(2, 5)
    monkeypatch.delattr(DecodePass, "attend")  # the compiled step needs it not
    torch.testing.assert_close(decoded(packed, ids), model.hidden(ids)[:, -1], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="position 32 has no page"):
        packed(ids[:, :1], positions=torch.full((2, 1), 32), cache=Paged(model.config, 2, torch.float32))
    torn = Paged(model.config, 2, torch.float32)
    torn.keys, torn.values = torn.keys[..., :3, :], torn.values[..., :3, :]
    with pytest.raises(AssertionError, match="a page has 3 places"):
        packed(ids[:, :1], positions=torch.zeros(2, 1, dtype=torch.int64), cache=torn)


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
def test_a_copy_and_moved_weights_have_their_own_pointers() -> None:
    packed = weights.pack(helpers.model(), "bf16")
    expected = stepped(packed, tokens(1))
    copied = copy.deepcopy(packed)
    for parameter in packed.parameters():
        parameter.zero_()
    assert torch.equal(stepped(copied, tokens(1)), expected)
    torch.testing.assert_close(stepped(copied.float(), tokens(1)).bfloat16(), expected, atol=0.1, rtol=0.1)
    with pytest.raises(AssertionError, match="the compiled step was not used"):
        stepped(copied.bfloat16(), tokens(1))  # its norms too: the step reads them as float32


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_tied_embeddings(kind: Kind) -> None:
    model = helpers.model(tie_embeddings=True, **WIDE)
    packed = weights.pack(model, kind)
    tied = isinstance(packed.output, nn.Linear) and packed.output.weight is packed.tok_embeddings.weight
    assert tied == (kind in ("fp32", "bf16"))
    assert packed.tok_embeddings.weight.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    expected, found = model(tokens(2)), packed(tokens(2)).float()
    assert (found - expected).norm() < 0.35 * expected.norm()


@torch.inference_mode()
@pytest.mark.usefixtures("compiled")
def test_layers_that_no_kernel_takes_stay_bfloat16() -> None:
    packed = weights.pack(helpers.model(), "int4")
    assert packed.plain == ("layers.0.feed_forward.w2", "layers.1.feed_forward.w2")  # 48 inputs, groups of 32
    mixed = weights.pack(helpers.model(ffn_hidden=52), "int8")
    assert mixed.plain == ("layers.0.feed_forward.w2", "layers.1.feed_forward.w2")
    torch.testing.assert_close(stepped(mixed, tokens(1)), mixed(tokens(1)), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("kind", "group", "shape", "named"),
    [
        ("fp8", 32, {}, "weights are 'fp8'"),
        ("int4", 48, {}, "a group has 48 inputs"),
        ("int8", 32, ODD, "no layer of this model"),
    ],
)
def test_what_cannot_be_held_is_refused(kind: Kind, group: int, shape: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        weights.pack(helpers.model(**shape), kind, group=group)


@torch.inference_mode()
def test_without_a_compiler_torch_decodes(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert kernels.library() is None
    model: Transformer = helpers.model()
    packed, ids = weights.pack(model, "fp32"), tokens(2, 5)
    torch.testing.assert_close(decoded(packed, ids), model.hidden(ids)[:, -1], atol=1e-5, rtol=0)


def test_without_a_folder_there_is_no_step(stub: Path) -> None:
    stub.parent.write_text("a file where the folder should be")
    assert kernels.library() is None


def test_a_source_that_does_not_compile_is_no_step(stub: Path) -> None:
    kernels.SOURCES[0].write_text("no C++")
    assert kernels.library() is None
    assert list(stub.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-100], lambda content: b"?" + content]
)
def test_a_damaged_library_is_compiled_again(stub: Path, damage: type[bytes]) -> None:
    if kernels.library() is None:
        pytest.skip("no g++, or no AVX2")
    [file] = stub.iterdir()
    content = file.read_bytes()
    file.unlink()  # it is loaded: its bytes may not change
    file.write_bytes(damage(content))
    kernels.library.cache_clear()
    assert kernels.library() is not None
    assert file.read_bytes() == content


def test_processes_may_compile_at_once(stub: Path) -> None:
    if kernels.library() is None:
        pytest.skip("no g++, or no AVX2")
    [file] = stub.iterdir()
    file.unlink()
    program = (
        "import pathlib, sys\nfrom puna import kernels\n"
        "kernels.SOURCES, kernels.FLAGS = (pathlib.Path(sys.argv[1]),), tuple(sys.argv[2:])\n"
        "assert kernels.library() is not None"
    )
    command = [sys.executable, "-c", program, str(kernels.SOURCES[0]), *kernels.FLAGS]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    assert list(stub.iterdir()) == [file]


def test_a_machine_with_a_compiler_has_the_library() -> None:
    if shutil.which("g++") is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("no g++, or no AVX2")
    assert kernels.library() is not None


def test_every_source_is_part_of_the_library(root: Path) -> None:
    folder = root / "src/puna/kernels"
    assert {path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h")} == set(kernels.NAMES)
