"""docs/paper-map.md against the code: each row's functions exist, its defaults are the code's, its tests are there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from puna.recipe import RecipeConfig

CODE = re.compile(r"\[.+?\]\(\.\./(src/puna/[\w/]+\.py)\) (`[\w.]+`(?:, `[\w.]+`)*)")
DEFAULT = re.compile(r"`(\w+Config)\.([\w.]+) = (.+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.fixture(scope="module")
def rows(root: Path) -> list[list[str]]:
    """The cells of every row: paper, code, config, choice, test."""
    lines = (root / "docs/paper-map.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [cells for cells in table if cells[0] != "Paper" and not set(cells[0]) <= {"-"}]


def config_classes(config_class: type[Any] = RecipeConfig) -> Iterator[type[Any]]:
    """A config and all configs in it: the recipe has every stage's."""
    yield config_class
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_classes(hints[field.name])  # type: ignore[arg-type]


CONFIGS = {config_class.__name__: config_class for config_class in config_classes()}


def default(name: str, key: str) -> Any:
    """The default of a dotted key; AttributeError or KeyError where there is none."""
    config_class: Any = CONFIGS[name]
    first, *rest = key.split(".")
    field = {f.name: f for f in dataclasses.fields(config_class)}[first]
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    for part in rest:
        value = getattr(value, part)
    return value


def test_the_map_has_rows_of_five_cells(rows: list[list[str]]) -> None:
    assert len(rows) > 40
    assert not [cells[0] for cells in rows if len(cells) != 5 or not all(cells)]


def test_every_function_exists(rows: list[list[str]], root: Path) -> None:
    for cells in rows:
        for part in cells[1].split("<br>"):
            match = CODE.fullmatch(part)
            assert match, f"{cells[0]}: {part}"
            path, names = match.groups()
            module = importlib.import_module(path.removeprefix("src/").removesuffix(".py").replace("/", "."))
            for name in re.findall(r"[\w.]+", names):
                found: Any = module
                for attribute in name.split("."):
                    found = getattr(found, attribute)


def test_every_default_is_the_codes(rows: list[list[str]]) -> None:
    wrong = []
    for cells in rows:
        for part in cells[2].split("<br>") if cells[2] != "–" else []:
            match = DEFAULT.fullmatch(part)
            assert match, f"{cells[0]}: {part}"
            name, key, value = match.groups()
            if default(name, key) != ast.literal_eval(value):
                wrong.append(f"{name}.{key} is {default(name, key)!r}, not {value}")
    assert not wrong


def test_every_test_is_there(rows: list[list[str]], root: Path) -> None:
    missing = []
    for cells in rows:
        for part in cells[4].split("<br>"):
            match = TEST.fullmatch(part)
            assert match, f"{cells[0]}: {part}"
            path, name = match.groups()
            if not (root / path).is_file() or (
                name and f"def {name}(" not in (root / path).read_text(encoding="utf-8")
            ):
                missing.append(part)
    assert not missing


def test_every_default_that_cites_the_paper_is_in_the_map(rows: list[list[str]], root: Path) -> None:
    """A field whose docstring names the paper, in a stage or in the recipe, has its row."""
    mapped = {match.group(1, 2) for cells in rows for match in DEFAULT.finditer(cells[2].replace("<br>", "\n"))}
    missing = []
    for path in [*sorted((root / "src/puna/stages").glob("*.py")), root / "src/puna/recipe.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in CONFIGS:
                missing += [f"{node.name}.{key}" for key in cited(node) if not has_row(mapped, node.name, key)]
    assert not missing


def cited(node: ast.ClassDef) -> list[str]:
    """The fields of a config that have a default and a docstring which names the paper."""
    fields = []
    for field, below in zip(node.body, node.body[1:], strict=False):
        says = isinstance(below, ast.Expr) and "paper" in ast.unparse(below)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None and says:
            fields.append(field.target.id)
    return fields


def has_row(mapped: set[tuple[str, str]], name: str, key: str) -> bool:
    return any(owner == name and mapped_key.split(".")[0] == key for owner, mapped_key in mapped)
