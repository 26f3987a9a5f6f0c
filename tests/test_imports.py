"""Who may import whom, and that training needs four packages alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Imports point down only. A room may import its own layer's where `alike` says so: stages, corpus, evals, serve and
# annotate meet in files instead.
LAYERS = [
    {"types", "config", "run_folder", "heartbeat", "kernels"},
    {"text", "model", "losses", "optim", "parallel", "monitors"},
    {"data", "generate", "checkpoint", "formats", "valley"},
    {"stages", "corpus", "evals", "serve", "annotate", "api"},
    {"report"},
    {"recipe", "baselines", "imported", "plan"},
    {"cli", "__main__"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
APART = LAYERS[3] - {"api"}
BLOCKED = [
    "tyro",
    "rich",
    "jinja2",
    "matplotlib",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "markdown_it",
    "transformers",
    "tokenizers",
    "gguf",
    "pyarrow",
    "datasets",
    "datasketch",
    "ray",
]


def sources(root: Path) -> list[Path]:
    return sorted((root / "src" / "puna").rglob("*.py"))


def room_of(module: list[str]) -> str:
    """["puna", "text", "chat"] -> "text"; the package itself is "puna"."""
    return module[1] if len(module) > 1 else "puna"


def imports(path: Path) -> list[str]:
    """The dotted names of ours that a file imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            names += [f"{module}.{alias.name}" if module == "puna" else module for alias in node.names]
    return [name for name in names if name.split(".")[0] == "puna"]


def test_every_room_has_a_layer(root: Path) -> None:
    rooms = {room_of(list(path.relative_to(root / "src").with_suffix("").parts)) for path in sources(root)}
    assert rooms - {"__init__"} <= set(LAYER), "give the new room a layer here and a line in README's map"


def test_imports_point_down(root: Path) -> None:
    wrong = []
    for path in sources(root):
        room = room_of(list(path.relative_to(root / "src").with_suffix("").parts))
        for name in imports(path) if room != "__init__" else []:
            other = room_of(name.split("."))
            if other in (room, "puna", "__version__"):
                continue
            up = LAYER[other] > LAYER[room]
            beside = LAYER[other] == LAYER[room] and {room, other} <= APART
            if up or beside or (room == "model" and other == "parallel"):
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong


def test_stages_do_not_import_one_another(root: Path) -> None:
    wrong = [
        f"{path.name} imports {name}"
        for path in sources(root)
        if path.parent.name == "stages"
        for name in imports(path)
        if name.startswith("puna.stages")
    ]
    assert not wrong


def test_the_annotation_app_has_no_torch(root: Path) -> None:
    for path in sources(root):
        if "annotate" in path.parts:
            assert "import torch" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("room", ["stages", "valley", "corpus"])
def test_training_imports_with_four_packages_alone(root: Path, room: str) -> None:
    modules = [
        ".".join(path.relative_to(root / "src").with_suffix("").parts)
        for path in sources(root)
        if path.parent.name == room and path.stem not in ("__init__", "__main__")
    ]
    program = f"""
import importlib, sys
for name in {BLOCKED}:
    sys.modules[name] = None  # an import of it is an ImportError
for name in {modules}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
