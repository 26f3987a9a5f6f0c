"""`puna import` of a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from puna.config import ConfigError
from puna.formats import convert, huggingface, meta
from puna.formats.convert import ImportConfig
from puna.text import tokenizer as tokenizers
from tests import helpers

pytestmark = pytest.mark.formats


def test_a_hugging_face_folder_is_imported_once(tmp_path: Path) -> None:
    source = helpers.talker_folder(tmp_path / "published")
    cfg = ImportConfig(path=source, out=tmp_path / "base")
    folder = convert.run(cfg)
    assert folder == tmp_path / "base/model"
    before, after = huggingface.load_model(source).state_dict(), huggingface.load_model(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tokenizers.load(folder).sha256 == helpers.tokenizer().sha256
    assert json.loads((folder / "puna.json").read_text()) == {"stage": "import", "parent": str(source)}
    with pytest.raises(ConfigError, match="begun with path"):
        convert.run(ImportConfig(path=tmp_path / "another", out=tmp_path / "base"))
    shutil.rmtree(source)
    assert convert.run(cfg) == folder


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no model: looked for a config\.json"):
        convert.run(ImportConfig(path=tmp_path, out=tmp_path / "base"))


@pytest.mark.parametrize("name", ["published", "meta"])
def test_bfloat16_is_imported(name: str, tmp_path: Path) -> None:
    source = helpers.talker_folder(tmp_path / "published")
    meta.save(huggingface.load_model(source), helpers.tokenizer(), tmp_path / "meta")
    folder = convert.run(ImportConfig(tmp_path / name, tmp_path / "base", dtype="bf16"))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    before, after = (huggingface.load_model(path).state_dict() for path in (source, folder))
    assert all(torch.equal(before[key].bfloat16().float(), after[key]) for key in before)
