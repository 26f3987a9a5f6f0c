"""Checkpoints: what is loaded is what was saved, and nothing damaged or hostile gets in."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem

from puna import checkpoint, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError, DataError
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from tests import helpers

TINY = ModelConfig(16, 2, 4, 2, 32, 24, max_seq_len=16, tie_embeddings=True)


def model_and_optimizer(seed: int = 0, *, tie: bool = True) -> tuple[Transformer, torch.optim.AdamW]:
    """Two groups, as training makes them; sharded where there are several ranks."""
    whole = Transformer(ModelConfig(16, 2, 4, 2, 32, 24, max_seq_len=16, tie_embeddings=tie))
    whole.init_weights(torch.Generator().manual_seed(seed))
    model = helpers.placed(whole)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        tokens = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("tie", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, steps: int, tie: bool) -> None:
    model, optimizer = model_and_optimizer(tie=tie)
    plain, plain_optimizer = model_and_optimizer(tie=tie)
    train(model, optimizer, steps)
    extra = {"rng": [1, 2], "position": {"shard": 3}, "loss": 0.1}
    path = checkpoint.save(tmp_path, steps, model, optimizer, extra)
    expected = train(model, optimizer, 3)

    again, again_optimizer = model_and_optimizer(seed=1, tie=tie)
    again_optimizer.param_groups[0]["lr"] = 1.0
    assert checkpoint.load(path, again, again_optimizer) == extra
    assert again_optimizer.param_groups[0]["lr"] == 1e-2
    assert train(again, again_optimizer, 3) == expected
    # Saving itself changes nothing: the run that never saved goes the same way.
    train(plain, plain_optimizer, steps)
    assert train(plain, plain_optimizer, 3) == expected


def test_one_process_saves_and_loads_without_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer()  # its group of one process stands
    for name in ("gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **kwargs: pytest.fail("a collective of one"))
    assert torch.distributed.is_initialized()
    checkpoint.load(checkpoint.save(tmp_path, 1, model, optimizer), model, optimizer)


def test_model_alone(tmp_path: Path) -> None:
    model = RewardModel(Transformer(TINY))
    path = checkpoint.save(tmp_path, 7, model)
    again = RewardModel(Transformer(TINY))
    assert checkpoint.load(path, again) == {}
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    manifests = [
        json.loads((checkpoint.save(tmp_path / name, 1, model, optimizer) / "manifest.json").read_text())
        for name in ("a", "b")
    ]
    assert manifests[0] == manifests[1]
    assert set(manifests[0]) == {"step", "puna", "torch", "extra", "files"}
    assert set(manifests[0]["files"]) == {".metadata", "__0_0.distcp"}


def test_keeps_the_newest(tmp_path: Path) -> None:
    model = Transformer(TINY)
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, model, keep=2)
        assert checkpoint.latest(tmp_path) == tmp_path / f"step_{step:06d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1000000", "step_999999"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, Transformer(TINY), extra={"try": 1})
    path = checkpoint.save(tmp_path, 1, Transformer(TINY), extra={"try": 2})
    assert checkpoint.load(path, Transformer(TINY)) == {"try": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_killed_while_saving(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    first = checkpoint.save(tmp_path, 1, model, optimizer)
    script = f"""
import os, signal
from pathlib import Path
from puna import checkpoint
from puna.model.transformer import ModelConfig, Transformer
from tests import helpers
checkpoint.write_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path({str(tmp_path)!r}), 2, Transformer(ModelConfig(16, 2, 4, 2, 32, 24, 16)))
"""
    source = str(Path(checkpoint.__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": source}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("step_000002.tmp-*"))) == 1
    assert checkpoint.latest(tmp_path) == first
    checkpoint.load(first, model, optimizer)
    checkpoint.save(tmp_path, 2, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_a_full_disk_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer()
    first = checkpoint.save(tmp_path, 1, model, optimizer, keep=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((filesystem.os, "fsync"), (checkpoint, "write_atomically")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left") as caught:
                checkpoint.save(tmp_path, 2, model, optimizer, keep=1)
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
        checkpoint.load(first, model, optimizer)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_is_named_with_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = model_and_optimizer()
    first = checkpoint.save(tmp_path, 1, model, optimizer)
    second = checkpoint.save(tmp_path, 2, model, optimizer)
    for path, way_out in ((second, "remove .*step_000002 to go on from step_000001"), (first, "no earlier checkpoint")):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "delete":
            (path / name).unlink()
        else:
            (path / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
        with pytest.raises(DataError, match=rf"{name} is (damaged|missing).*{way_out}"):
            checkpoint.load(path, model, optimizer)


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"files": 1, "extra": {}}'])
def test_a_damaged_manifest(tmp_path: Path, manifest: str | None) -> None:
    path = checkpoint.save(tmp_path, 1, Transformer(TINY))
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
    else:
        assert checkpoint.latest(tmp_path) is None
    with pytest.raises(DataError, match=r"manifest\.json is missing or damaged"):
        checkpoint.load(path, Transformer(TINY))


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "step_000001", Transformer(TINY))


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, Transformer(TINY))
    with pytest.raises(ConfigError, match="step_000001 does not fit"):
        checkpoint.load(path, Transformer(ModelConfig(32, 2, 4, 2, 32, 24, max_seq_len=16)))
    with pytest.raises(ConfigError, match="step_000001 does not fit"):
        checkpoint.load(path, *model_and_optimizer())


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint with a manifest that agrees."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] |= checkpoint._hashes(path, [name])
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_evil_metadata_does_not_run(tmp_path: Path) -> None:
    model = Transformer(TINY)
    path = checkpoint.save(tmp_path / "run", 1, model)
    rewrite(path, ".metadata", pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(DataError, match=r"\.metadata: refused.*mkdir"):
        checkpoint.load(path, model)
    rewrite(path, ".metadata", pickle.dumps({"a": 1})[:-3])
    with pytest.raises(DataError, match=r"\.metadata: refused"):
        checkpoint.load(path, model)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("left_out", [".metadata", "__0_0.distcp"])
def test_a_file_without_a_hash_is_refused(tmp_path: Path, left_out: str) -> None:
    path = checkpoint.save(tmp_path, 1, Transformer(TINY))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][left_out]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"refused, {left_out} is no file of this folder in its manifest"):
        checkpoint.load(path, Transformer(TINY))
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(DataError, match="is no file of this folder in its manifest"):
        checkpoint.load(path, Transformer(TINY))


@pytest.mark.parametrize("folder", ["../", "/"])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, folder: str) -> None:
    path = checkpoint.save(tmp_path, 1, Transformer(TINY))
    outside = "../outside" if folder == "../" else str(tmp_path / "outside")
    (path / outside).write_bytes((path / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for part in metadata.storage_data.values():
        part.relative_path = outside
    rewrite(path, outside, (path / outside).read_bytes())
    rewrite(path, ".metadata", pickle.dumps(metadata))
    with pytest.raises(DataError, match=r"refused, .*outside is no file of this folder"):
        checkpoint.load(path, Transformer(TINY))


def test_an_evil_setting_does_not_run(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    optimizer.param_groups[0]["note"] = Evil(tmp_path / "owned")
    path = checkpoint.save(tmp_path / "run", 1, model, optimizer)
    optimizer.param_groups[0]["note"] = ""
    with pytest.raises(DataError, match="step_000001: refused"):
        checkpoint.load(path, model, optimizer)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["Metadata.__init__.__globals__", "os.system"])
def test_dotted_names_do_not_escape(name: str) -> None:
    module = "torch.distributed.checkpoint.metadata"
    payload = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93.".encode("latin-1")
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        checkpoint._MetadataUnpickler(io.BytesIO(payload)).load()


def test_saving_is_quick(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(tie_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model, optimizer)
    began = time.perf_counter()
    checkpoint.save(tmp_path, 2, model, optimizer)
    assert time.perf_counter() - began < 3  # 0.2 s on an idle core; a busy one may take longer.


def changed(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is of the step that was saved, whatever becomes of the weights; one save waits for the other."""
    model, optimizer = model_and_optimizer()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    may_go_on, running = threading.Event(), []
    write = checkpoint._write

    def slow(*arguments: Any) -> Path:
        running.append(arguments[1]["step"])
        assert may_go_on.wait(10)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write", slow)
    with Saver(tmp_path, model, optimizer, every=2) as saver:
        for step in (1, 2, 3):
            saver.after(step, {"step": step})
            changed(model, 1.0)
        assert checkpoint.latest(tmp_path) is None and running == [2]
        threading.Timer(0.2, may_go_on.set).start()
        saver.after(4)
        assert checkpoint.latest(tmp_path) == tmp_path / "step_000002", "the second waited for the first"
    assert running == [2, 4]
    again, _ = model_and_optimizer(seed=1)
    assert checkpoint.load(tmp_path / "step_000002", again) == {"step": 2}
    for name, value in kept.items():
        torch.testing.assert_close(again.state_dict()[name], value + 1.0)


def test_an_error_of_a_save_is_raised_at_the_next_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = model_and_optimizer()
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"), Saver(tmp_path, model, optimizer, every=1) as saver:
        saver.after(1)
    with Saver(tmp_path, model, optimizer, every=1) as saver:
        saver.after(1)
        with pytest.raises(OSError, match="No space left"):
            saver.after(2)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("every", [0, 100])
def test_on_sigterm_the_step_is_saved_and_the_signal_does_what_it_did(tmp_path: Path, every: int) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        model, optimizer = model_and_optimizer()
        with Saver(tmp_path, model, optimizer, every) as saver:
            saver.after(6)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not heard, "not in the middle of a step"
            saver.after(7)
            assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 2, "after training it is as before"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007"]


@pytest.mark.parametrize(("every", "saved"), [(2, ["step_000002", "step_000003"]), (0, [])])
def test_the_last_step_is_saved_as_well(every: int, saved: list[str], tmp_path: Path) -> None:
    with Saver(tmp_path, *model_and_optimizer(), every, last=3) as saver:
        for step in (1, 2, 3):
            saver.after(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == saved, "none where SIGTERM alone saves"


def test_a_sigterm_in_the_last_step_is_raised_at_the_end(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with Saver(tmp_path, *model_and_optimizer(), every=1) as saver:
            saver.after(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not heard, "not in the middle of a step"
        assert heard == [signal.SIGTERM]
        with pytest.raises(ValueError, match="of the step"), Saver(tmp_path, *model_and_optimizer(), every=1):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("of the step")
        assert len(heard) == 1, "an error is not hidden"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def _two_ranks(folder: Path) -> None:
    model, optimizer = model_and_optimizer(tie=False)
    train(model, optimizer, 2)
    path = checkpoint.save(folder / "sharded", 2, model, optimizer, {"ranks": 2})
    expected = train(model, optimizer, 2)
    again, again_optimizer = model_and_optimizer(seed=1, tie=False)
    assert checkpoint.load(path, again, again_optimizer) == {"ranks": 2}
    assert train(again, again_optimizer, 2) == expected
    if parallel.is_main():
        data = bytearray((path / "__1_0.distcp").read_bytes())
        data[100] ^= 1
        (path / "__1_0.distcp").write_bytes(data)
    parallel.barrier()
    with pytest.raises(DataError, match=r"__1_0\.distcp is damaged"):  # on both ranks, though one hashed it
        checkpoint.load(path, again, again_optimizer)
    checkpoint.save(folder / "sharded", 4, model, optimizer, {"losses": expected})


@pytest.mark.distributed
def test_two_ranks_save_one_loads(tmp_path: Path) -> None:
    helpers.in_processes(_two_ranks, tmp_path)
    single, single_optimizer = model_and_optimizer(tie=False)
    train(single, single_optimizer, 2)
    train(single, single_optimizer, 2)
    again, again_optimizer = model_and_optimizer(seed=1, tie=False)
    checkpoint.load(tmp_path / "sharded/step_000004", again, again_optimizer)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        train(again, again_optimizer, 2), train(single, single_optimizer, 2), rtol=1e-4, atol=1e-5
    )
