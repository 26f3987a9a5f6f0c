"""Preparing text: the same shards however many workers, killed or not; hostile files; duplicates planted and gone."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna import cli, config
from puna.config import ConfigError, DataError
from puna.corpus import prepare
from puna.corpus.prepare import PrepareConfig, Source
from puna.data import loader, shards
from puna.run_folder import read_metrics
from puna.stages import pretrain
from puna.text import tokenizer as tokenizers
from tests import helpers


def recipe(folder: Path, **changes: Any) -> PrepareConfig:
    """Two sources of a hundred and sixty short documents, in several pieces."""
    helpers.tokenizer().save(folder)
    first, second = folder / "a.jsonl", folder / "b.jsonl.gz"
    helpers.write_lines(first, [{"text": text} for text in helpers.sentences(100)])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in helpers.sentences(60, seed=1))
    second.write_bytes(gzip.compress(lines.encode()))
    fixed = {"sources": {"a": Source((first,)), "b": Source((second,), weight=2.5)}, "shard_characters": 700}
    shape = {"out": folder / "out", "tokenizer": folder / "tokenizer.model", "validation_share": 0.1, "workers": 1}
    return PrepareConfig(**(fixed | shape | changes))


def hashes(folder: Path) -> dict[str, str]:
    """Of everything that training reads."""
    files = [folder / "index.json", *sorted(folder.glob("train/*")), *sorted(folder.glob("validation/*"))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents(folder: Path, part: str) -> dict[str, list[str]]:
    """The texts of each source."""
    tokenizer = helpers.tokenizer()
    return {
        name: [tokenizer.decode(ids) for shard in each for ids in helpers.documents(shard)]
        for name, (_, each) in shards.read_prepared(folder, part, tokenizer).items()
    }


def done(folder: Path) -> Any:
    return json.loads((folder / "done/prepare.json").read_text())


def source(folder: Path, texts: Iterable[str]) -> PrepareConfig:
    """Texts as the only source, every second one held out where a validation share of 0.5 is asked for."""
    helpers.tokenizer().save(folder)
    data = helpers.write_lines(folder / "x.jsonl", [{"text": text} for text in texts])
    return PrepareConfig(folder / "out", folder / "tokenizer.model", (data,), validation_share=0, workers=1)


# What is written


def test_every_document_is_in_one_part(tmp_path: Path) -> None:
    folder = prepare.run(recipe(tmp_path))
    texts = {"a": helpers.sentences(100), "b": helpers.sentences(60, seed=1)}
    assert documents(folder, "validation") == {name: each[::10] for name, each in texts.items()}
    assert documents(folder, "train") == {
        name: [text for i, text in enumerate(each) if i % 10] for name, each in texts.items()
    }
    assert {name: weight for name, (weight, _) in read(folder).items()} == {"a": 1.0, "b": 2.5}
    counts = done(folder)["sources"]
    assert {name: each["documents"] for name, each in counts.items()} == {"a": 100, "b": 60}
    assert all(each["tokens"] == each["train"] + each["validation"] for each in counts.values())
    assert len(list(folder.glob("train/*.tokens"))) >= 5, "several pieces"
    assert not (folder / "pieces").exists()


def read(folder: Path) -> dict[str, tuple[float, list[shards.Shard]]]:
    return shards.read_prepared(folder, "train", helpers.tokenizer())


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 3])
def test_the_number_of_workers_changes_nothing(n: int, tmp_path: Path) -> None:
    """Three compare the documents, too."""
    compared = {"repeated_tokens": 12} if n == 3 else {}
    alone, shared = (
        hashes(prepare.run(recipe(tmp_path, out=tmp_path / f"out-{workers}", workers=workers, **compared)))
        for workers in (1, n)
    )
    assert alone == shared and len(alone) > 15


@pytest.mark.distributed
def test_on_ray(tmp_path: Path) -> None:
    ray = recipe(tmp_path, out=tmp_path / "ray", **helpers.two_workers("ray"))
    assert hashes(prepare.run(ray)) == hashes(prepare.run(recipe(tmp_path)))


def test_the_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    folder = prepare.run(recipe(tmp_path, seed=13))
    assert documents(folder, "validation")["a"] == helpers.sentences(100)[3::10]


# Killed and started again


def start(cfg: PrepareConfig, file: Path) -> subprocess.Popen[bytes]:
    config.save(cfg, file)
    return subprocess.Popen([sys.executable, "-m", "puna", "data", "prepare", str(file)], stderr=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again(how: signal.Signals, tmp_path: Path) -> None:
    whole = hashes(prepare.run(recipe(tmp_path, out=tmp_path / "whole")))
    cfg = recipe(tmp_path, workers=2)
    process = start(cfg, tmp_path / "prepare.json")
    marks = cfg.out / "parts/encoded"
    while not (marks.is_dir() and any(marks.glob("*.jsonl"))):
        assert process.poll() is None
        time.sleep(0.001)
    workers = children(process.pid)
    process.send_signal(how)
    assert process.wait(30) in (-how, 128 + how)
    assert not (cfg.out / "done").exists(), "it was not through"
    until = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < until, "workers do not outlive their parent"
        time.sleep(0.01)
    assert hashes(prepare.run(replace(cfg, workers=1))) == whole


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_a_finished_run_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = recipe(tmp_path)
    folder = prepare.run(cfg)
    monkeypatch.setattr(prepare, "map_each", None)
    assert prepare.run(replace(cfg, workers=3)) == folder
    heavier = {**cfg.sources, "b": replace(cfg.sources["b"], weight=3.0)}
    with pytest.raises(ConfigError, match=r"was begun with sources .*2\.5.*, not .*3\.0.*: use another --out"):
        prepare.run(replace(cfg, sources=heavier))


def test_a_source_that_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = source(tmp_path, helpers.sentences(30))
    (data,) = cfg.data
    with monkeypatch.context() as patch:
        patch.delattr(prepare.shards, "write_index")
        with pytest.raises(AttributeError, match="write_index"):
            prepare.run(cfg)
    whole, times = data.read_bytes(), (data.stat().st_atime_ns, data.stat().st_mtime_ns)
    data.write_bytes(whole.split(b"\n", 1)[1])
    with pytest.raises(ConfigError, match=r"x\.jsonl is not as it was when .*out was begun: use another --out"):
        prepare.run(cfg)
    data.write_bytes(whole)
    os.utime(data, ns=times)
    assert documents(prepare.run(cfg), "train") == {"data": helpers.sentences(30)}


def test_a_damaged_piece_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = recipe(tmp_path, repeated_tokens=12)
    with monkeypatch.context() as patch:
        patch.delattr(prepare, "compare")
        with pytest.raises(NameError, match="compare"):
            prepare.run(cfg)
    file = cfg.out / "pieces/00001.tokens"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"pieces/00001\.tokens: damaged"):
        prepare.run(cfg)


def test_killed_before_its_pieces_were_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = recipe(tmp_path, repeated_tokens=12)
    with monkeypatch.context() as patch:
        patch.delattr(prepare.shutil, "rmtree")
        with pytest.raises(AttributeError, match="rmtree"):
            prepare.run(cfg)
    assert (cfg.out / "pieces").exists()
    prepare.run(cfg)
    assert not (cfg.out / "pieces").exists() and read(cfg.out)


def test_not_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="data prepare runs on one process"):
        prepare.run(recipe(tmp_path))


# Hostile files


def test_no_text_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the sources hold no text"):
        prepare.run(replace(source(tmp_path, []), near_duplicates=0.9))


def test_a_source_of_one_document_is_trained_on(tmp_path: Path) -> None:
    cfg = recipe(tmp_path)
    book = helpers.write_lines(tmp_path / "book.jsonl", [{"text": "the llama"}])
    folder = prepare.run(replace(cfg, sources={**cfg.sources, "book": Source((book,))}))
    assert documents(folder, "train")["book"] == ["the llama"]
    assert "book" not in documents(folder, "validation")
    counts = done(folder)["sources"]["book"]
    assert (counts["train"], counts["validation"]) == (counts["tokens"], 0)


def test_bad_lines_are_set_aside_with_their_place(tmp_path: Path) -> None:
    cfg = source(tmp_path, helpers.sentences(300))
    (data,) = cfg.data
    lines = data.read_bytes().split(b"\n")
    lines[4], lines[7] = b'{"text": "\xff"}', b'{"text": " "}'
    data.write_bytes(b"\n".join(lines))
    folder = prepare.run(replace(cfg, shard_characters=500))
    assert done(folder)["bad_lines"] == 2 and done(folder)["sources"]["data"]["documents"] == 298
    kept = [json.loads(line) for line in (folder / "bad_lines.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in kept] == [(str(data), 5), (str(data), 8)]


def test_too_many_bad_lines_stop_the_run(tmp_path: Path) -> None:
    cfg = source(tmp_path, ["a", "", "b", "", "c"])
    with pytest.raises(DataError, match=r"x\.jsonl: 2 of 5 lines are bad; line 2: 'text' is empty"):
        prepare.run(cfg)
    assert not shards.is_prepared(cfg.out)


def test_a_long_document_has_a_shard_of_its_own(tmp_path: Path) -> None:
    texts = ["a", "the llama " * 2000, "b", "c"]
    folder = prepare.run(replace(source(tmp_path, texts), shard_characters=100))
    ((_, each),) = read(folder).values()
    assert [len(shard.offsets) - 1 for shard in each] == [1, 1, 2]
    assert documents(folder, "train") == {"data": texts}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    cfg = recipe(tmp_path)
    cfg.sources["b"].paths[0].unlink()
    with pytest.raises(ConfigError, match=r"no such data file: .*b\.jsonl\.gz"):
        prepare.run(cfg)
    assert not (cfg.out / "parts").exists(), "before anything is encoded"


def test_mistakes_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to prepare"):
        PrepareConfig(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"validation_share is 0\.7: it must be from 0 to 0\.5"):
        PrepareConfig(tmp_path, tmp_path, (tmp_path,), validation_share=0.7)
    with pytest.raises(ConfigError, match=r"weight is 0\.0: it must be positive"):
        Source((tmp_path,), weight=0.0)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cfg = recipe(tmp_path)
    file = tmp_path / "recipe.toml"
    (data,) = cfg.sources["a"].paths
    head = f'[prepare]\ntokenizer = "{cfg.tokenizer}"\nworkers = 1\n[prepare.sources.a]\npaths = ["{data}"]\n'
    file.write_text(head)
    assert cli.main(["data", "prepare", str(file), "--out", str(tmp_path / "out"), "--sources.a.weight", "3"]) == 0
    assert read(tmp_path / "out")["a"][0] == 3.0
    file.write_text(head + "wieght = 2\n")
    assert cli.main(["data", "prepare", str(file), "--out", str(tmp_path / "other")]) == 2
    assert "unknown key 'wieght' in [prepare.sources.a]; did you mean 'weight'?" in capsys.readouterr().err


# Duplicates


def test_planted_near_duplicates_are_dropped(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    texts = [" ".join(helpers.sentences(12, seed)) for seed in range(12)]
    planted = texts.copy()
    planted[7] = texts[2].replace(".", "!")
    planted[9] = texts[4]
    cfg = replace(source(tmp_path, planted), near_duplicates=0.9, shard_characters=1000)
    folder = prepare.run(cfg)
    assert documents(folder, "train")["data"] == [text for i, text in enumerate(texts) if i not in (7, 9)]
    assert done(folder)["sources"]["data"]["duplicates"] == 2


def test_planted_repeats_are_cut(tmp_path: Path) -> None:
    notice = "The neighbour asks that everyone who crosses the cold river leaves 7 coins at the stone wall"
    one, two, three = ("the llama counts 3 hills.", "her dog watches Puno.", "a herder likes the salt lake.")
    texts = [f"{one} {notice}", f"{notice} {two}", notice, three]
    cfg = replace(source(tmp_path, texts), repeated_tokens=20, shard_characters=130)
    folder = prepare.run(cfg)
    assert documents(folder, "train")["data"] == [texts[0], two, three]
    assert done(folder)["sources"]["data"]["repeated_tokens"] > 40
    assert len(read(folder)["data"][1]) == 3, "copies lie in other pieces"


def test_ids_of_more_than_16_bits(tmp_path: Path) -> None:
    """What a 16-bit id would be taken for is no repeat: word i and word i + 2^16 are two."""
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 66_000))]
    backend = package.Tokenizer(package.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = package.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    one, other, copied = range(65_480, 65_539), range(65_900, 65_930), range(65_700, 65_740)
    low, high = range(3, 53), range(2**16 + 3, 2**16 + 53)
    read = [[*one, *copied], [*low], [*high], [*one, *copied], [*other, *copied]]
    texts = [" ".join(words[i] for i in ids) for ids in read]
    cfg = replace(source(tmp_path, texts), tokenizer=tmp_path / "tokenizer.json", shard_characters=400)
    folder = prepare.run(replace(cfg, near_duplicates=0.9, repeated_tokens=30))
    ((_, each),) = shards.read_prepared(folder, "train", tokenizers.load(cfg.tokenizer)).values()
    written = [ids for shard in each for ids in helpers.documents(shard)]
    assert written == [[1, *ids, 2] for ids in ([*one, *copied], low, high, other)]
    assert {shard.tokens.dtype for shard in each} == {np.dtype("<u4")} and len(each) > 2
    counts = done(folder)["sources"]["data"]
    assert (counts["duplicates"], counts["repeated_tokens"]) == (1, len(copied))


def test_held_out_documents_keep_their_places(tmp_path: Path) -> None:
    """What is dropped does not move the others from one part to the other."""
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    texts = [" ".join(helpers.sentences(12, seed)) for seed in range(12)]
    cfg = replace(source(tmp_path, [texts[0], *texts]), near_duplicates=0.9, validation_share=0.5)
    folder = prepare.run(cfg)
    assert documents(folder, "validation")["data"] == [texts[0], *texts[1::2]]
    assert documents(folder, "train")["data"] == texts[2::2]


# Training on it


def test_pretraining_takes_a_prepared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare.run(recipe(tmp_path))
    monkeypatch.setattr(pretrain.readers, "read", None)
    cfg = helpers.pretrain_config(tmp_path, data=(folder,), steps=3)
    pretrain.run(cfg)
    assert [line["step"] for line in read_metrics(tmp_path / "pretrain/metrics.jsonl")] == [0, 1, 2, 3]
    _, train, validation = pretrain.prepare(cfg, tmp_path / "unused")
    assert isinstance(train, loader.Mixture) and train.weights == {"a": 1.0, "b": 2.5} == validation.weights
    assert not (tmp_path / "pretrain/data").exists()


def test_a_prepared_folder_stands_alone(tmp_path: Path) -> None:
    folder = prepare.run(recipe(tmp_path))
    with pytest.raises(ConfigError, match="out is a prepared folder: it must be the only data"):
        pretrain.prepare(helpers.pretrain_config(tmp_path, data=(folder, folder)), tmp_path)
    pretrain.tokenizers.train(helpers.sentences(50, seed=9), 330, tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer"):
        pretrain.prepare(helpers.pretrain_config(tmp_path, data=(folder,), tokenizer=tmp_path / "other"), tmp_path)
    with pytest.raises(DataError, match=r"the validation part of the source 'b' has .* too few for a window"):
        pretrain.prepare(helpers.pretrain_config(tmp_path, data=(folder,), seq_len=120), tmp_path)
