"""Configs: a TOML recipe and command-line flags become one frozen dataclass.

A config is a frozen dataclass with a docstring under each field; nested dataclasses are nested tables, and a dict of
dataclasses is a table of tables that a recipe names. The way of a value:

1. the recipe's table is flattened into dotted keys, each checked against the dataclass; a recipe may give only what
   differs from another one (`extends = "laptop.toml"`, beside it);
2. the flags (`--optim.lr 1e-5`) are parsed by tyro over what the recipe gave, so the later one wins;
3. an unknown key or flag or a wrong type is a `ConfigError` that names the file, the key and the nearest valid one.

tyro is imported for flags and `--help` only: a machine that trains from a recipe alone needs no tyro.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import math
import os
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

ALIASES = {
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "max_len": ("max_length",),
}
"""What Hugging Face calls keys of ours that look like no key of ours: for the nearest valid key in messages."""


NOT_RESULTS = ("out", "threads", "dry_run", "workers", "cluster", "gpus", "parallel", "checkpoints_kept")
"""Keys and tables that do not change a run's results: a resumed run may have other values."""


LEFT_BY_A_MISTAKE = ("run.lock", "bad_lines.jsonl")
"""Files beside config.json of a run that stopped before any work, as at a misspelt path: it may begin anew."""


ADDRESSES = ("vllm",)
"""Keys that may change their value in a resumed run, but not come or go: vLLM samples otherwise than this process."""


class ConfigError(Exception):
    """A user's mistake in a recipe, a flag or a path: one line that names it and the way out (exit code 2)."""


class DataError(Exception):
    """A user's mistake in a data file: one line with the file, the line and the reason (exit code 2)."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; OSError where there is no such file, DataError where it is no such object."""
    try:
        read = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(read, dict):
        raise DataError(f"{path}: not a JSON object")
    return read


@dataclass(frozen=True)
class _Place:
    """Where a table came from, for messages."""

    file: str | None = None
    section: str | None = None

    def error(self, what: str, key: str, rest: str) -> ConfigError:
        file = f"{self.file}: " if self.file else ""
        section = f" in [{self.section}]" if self.section else ""
        return ConfigError(f"{file}{what} {key!r}{section}{rest}")


def load(
    config_class: type[T],
    argv: Sequence[str],
    section: str | None = None,
    *,
    prog: str | None = None,
    named: bool = False,
) -> T:
    """The config that an optional recipe (first of `argv`, .toml or .json) and the flags after it describe.

    `section` names the recipe's table, dotted for a table in a table; None takes the whole file. A config.json
    that `save` wrote serves as a recipe: whole where it has no such table, unless the user has `named` one. Relative
    paths stay relative to the current directory. `--help` prints and exits 0; every mistake is a ConfigError.
    """
    flags, place = list(argv), _Place()
    table: dict[str, Any] = {}
    if flags and not flags[0].startswith("-"):
        file = Path(flags.pop(0))
        table, section = _read_table(file, section, smoke="--smoke" in flags, named=named)
        place = _Place(str(file), section)
    values = _checked(table, _leaves(config_class), place)
    if flags:
        return _parse(config_class, flags, values, place, prog)
    return _construct(config_class, values, place)


def from_dict(config_class: type[T], table: Mapping[str, Any]) -> T:
    """The config that a table describes, strictly: unknown, missing and ill-typed keys are ConfigErrors."""
    place = _Place()
    return _construct(config_class, _checked(table, _leaves(config_class), place), place)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON takes it: paths are strings, tuples are lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def save(config: Any, path: Path) -> None:
    """Writes a resolved config as JSON that `load` takes as a recipe."""
    from puna.run_folder import write_atomically  # run_folder's errors are ours: imported late to avoid a circle

    write_atomically(path, json.dumps(to_dict(config), indent=2) + "\n")


def keep(config: Any, path: Path, ignore: Sequence[str] = NOT_RESULTS) -> None:
    """`save`, or a ConfigError where the config saved there is another one: a folder holds one config's results.

    What `ignore` names, a table or a key in one, may differ, and so may an address and the way a path is written. A
    folder that holds no more than another config and what could not be read is begun anew.
    """
    if path.exists() and any(other.name not in (path.name, *LEFT_BY_A_MISTAKE) for other in path.parent.glob("[!.]*")):
        begun = load(type(config), [str(path)])
        for key in _leaves(type(config)):
            old, new = (functools.reduce(getattr, key.split("."), each) for each in (begun, config))
            parts = key.split(".")
            same = bool(old) == bool(new) if parts[-1] in ADDRESSES else _resolved(old) == _resolved(new)
            if set(parts).isdisjoint(ignore) and not same:
                raise ConfigError(
                    f"{path.parent} was begun with {key} {_said(old)}, not {_said(new)} ({path}): use another --out"
                )
    if os.environ.get("RANK", "0") == "0":  # of several processes one writes
        save(config, path)


def positive(config: Any, *keys: str) -> None:
    """ConfigError where one of these numbers is not above zero."""
    for key, value in _numbers(config, keys):
        if not value > 0:
            raise ConfigError(f"{key} is {value}: it must be positive")


def within(config: Any, low: float, high: float, *keys: str) -> None:
    """ConfigError where one of these numbers is not finite and in [low, high]; a NaN never is."""
    for key, value in _numbers(config, keys):
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"{key} is {value}: it must be {bounds}")


def _numbers(config: Any, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Each key with its number, or with each of its numbers; ConfigError where it has none."""
    for key in keys:
        value = getattr(config, key)
        if value == ():
            raise ConfigError(f"{key} is empty: give one number or more")
        yield from ((key, each) for each in (value if isinstance(value, tuple) else (value,)))


def one_of(config: Any, key: str, table: Iterable[str]) -> None:
    """ConfigError where what a config says of this key is none of a table's names."""
    name, names = getattr(config, key), list(table)
    if name not in names:
        raise ConfigError(f"unknown {key} {name!r}; did you mean {_nearest(name, names)!r}?")


def _resolved(value: Any) -> Any:
    """A value with its paths made absolute, for comparison."""
    if isinstance(value, tuple):
        return tuple(map(_resolved, value))
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _resolved(dataclasses.asdict(value))
    return value.resolve() if isinstance(value, Path) else value


def _said(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_said, value))}]"
    return json.dumps(value, ensure_ascii=False, default=lambda it: str(it) if isinstance(it, Path) else to_dict(it))


def _read_table(
    file: Path, section: str | None, *, smoke: bool = False, named: bool = False
) -> tuple[dict[str, Any], str | None]:
    """A recipe's table and the name it was found under (None: the whole file).

    A recipe's [smoke] holds overrides of its other tables, taken with the flag `--smoke`.
    """
    recipe = _extended(file)
    if isinstance(recipe.get("smoke"), dict):
        overrides = recipe.pop("smoke")
        recipe = _merged(recipe, overrides) if smoke else recipe
    if section is None:
        return recipe, None
    table: Any = recipe
    for part in section.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    if isinstance(table, dict):
        return table, section
    if file.suffix == ".json" and not named:  # one stage's resolved config: the file is the table
        return recipe, None
    tables = ", ".join(f"[{name}]" for name, value in recipe.items() if isinstance(value, dict)) or "none"
    raise ConfigError(f"{file}: no table [{section}]; tables there: {tables}")


def _extended(file: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """A recipe over the one that its key `extends` names, beside it; ConfigError where these make a ring."""
    recipe = _read_recipe(file)
    if not isinstance(recipe.get("extends"), str):
        return recipe
    if file.resolve() in above:
        raise ConfigError(f"{file}: extends itself, by way of {', '.join(path.name for path in above)}")
    return _merged(_extended(file.parent / recipe.pop("extends"), [*above, file.resolve()]), recipe)


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the values of `over`, nested tables alike."""
    both = {
        key: _merged(table[key], value) if isinstance(value, dict) and isinstance(table.get(key), dict) else value
        for key, value in over.items()
    }
    return {**table, **both}


def _read_recipe(file: Path) -> dict[str, Any]:
    """A whole .toml or .json file."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; a recipe is a .toml file or a run's config.json")
    try:
        text = file.read_text(encoding="utf-8")
        recipe = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"no such recipe: {file}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}, line {error.lineno}: {error.msg}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None  # tomllib's message ends with the line and column
    if not isinstance(recipe, dict):
        raise ConfigError(f"{file}: a recipe is a table of keys, not a {type(recipe).__name__}")
    return recipe


def _leaves(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every value a config holds, nested dataclasses opened."""
    hints, leaves = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            leaves.update(_leaves(hint, f"{prefix}{field.name}."))  # type: ignore[arg-type]
        else:
            leaves[prefix + field.name] = hint
    return leaves


def _checked(table: Mapping[str, Any], leaves: Mapping[str, Any], place: _Place, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> converted value of a nested table; ConfigError on an unknown key or a wrong type."""
    values = {}
    for name, value in table.items():
        key = prefix + name
        if key in leaves:
            try:
                inner = _table_class(leaves[key])
                values[key] = _tables(inner, value, place, key) if inner else _convert(leaves[key], value)
            except TypeError:
                raise place.error("key", key, f" must be {_describe(leaves[key])}, not {value!r}") from None
        elif isinstance(value, dict) and any(leaf.startswith(f"{key}.") for leaf in leaves):
            values.update(_checked(value, leaves, place, f"{key}."))
        elif any(leaf.startswith(f"{key}.") for leaf in leaves):
            raise place.error("key", key, f" must be a table, not {value!r}")
        else:
            raise place.error("unknown key", key, f"; did you mean {_nearest(key, leaves)!r}?")
    return values


def _table_class(hint: Any) -> type[Any] | None:
    """The dataclass of a dict of named tables."""
    inner = get_args(hint)[1] if get_origin(hint) is dict else None
    return inner if dataclasses.is_dataclass(inner) else None  # type: ignore[return-value]


def _tables(inner: type[T], value: Any, place: _Place, key: str) -> dict[str, T]:
    """Named tables as dataclasses; their errors name the table."""
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise TypeError
    section = f"{place.section}.{key}" if place.section else key
    places = {name: _Place(place.file, f"{section}.{name}") for name in value}
    return {
        name: _construct(inner, _checked(table, _leaves(inner), places[name]), places[name])
        for name, table in value.items()
    }


def _convert(hint: Any, value: Any) -> Any:
    """A TOML or JSON value as the type a field is declared with; TypeError where it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is ...:
            return tuple(_convert(arguments[0], item) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(kind, item) for kind, item in zip(arguments, value, strict=True))
    if origin is list and isinstance(value, list | tuple):
        return [_convert(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {_convert(arguments[0], key): _convert(arguments[1], item) for key, item in value.items()}
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint or (hint is type(None) and value is None):  # exact: True is no int
        return value
    raise TypeError


def _convert_union(arms: Sequence[Any], value: Any) -> Any:
    """The first arm that takes the value."""
    for arm in arms:
        with contextlib.suppress(TypeError):
            return _convert(arm, value)
    raise TypeError


def _describe(hint: Any) -> str:
    """A type in words for a message."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("pathlib.", "")


def _nearest(key: str, keys: Iterable[str]) -> str:
    """The key most like this one, by its own name or by what others call it."""
    spellings: dict[str, str] = {}
    for ours in keys:
        table, dot, name = ours.rpartition(".")
        spellings |= {table + dot + spelling: ours for spelling in (name, *ALIASES.get(name, ()))}
    return spellings[difflib.get_close_matches(key, spellings, n=1, cutoff=0.0)[0]]


def _construct(
    config_class: type[T],
    values: Mapping[str, Any],
    place: _Place,
    *,
    prefix: str = "",
    base: Any = None,
    hole: Any = None,
) -> T:
    """A (nested) dataclass of dotted values; what they lack is as in `base`, an instance, or as declared.

    A value that nothing gives is an error, unless a `hole` is to stand in its place; then `__post_init__` is not
    run, for it would judge an unfinished config.
    """
    hints, arguments = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        key, hint = prefix + field.name, hints[field.name]
        fallback = _default(field) if base is None else getattr(base, field.name)
        if dataclasses.is_dataclass(hint):
            inner = None if fallback is dataclasses.MISSING else fallback
            arguments[field.name] = _construct(
                hint,  # type: ignore[arg-type]
                values,
                place,
                prefix=f"{key}.",
                base=inner,
                hole=hole,
            )
        elif (value := values.get(key, fallback)) is not dataclasses.MISSING:
            arguments[field.name] = value
        elif hole is not None:
            arguments[field.name] = hole
        elif place.file is None:
            raise ConfigError(f"missing {_flag(key)}: it has no default")
        else:
            raise place.error("missing key", key, ": it has no default")
    return config_class(**arguments) if hole is None else _unchecked(config_class, arguments)


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's declared default; `dataclasses.MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _unchecked(config_class: type[T], arguments: Mapping[str, Any]) -> T:
    """A frozen dataclass instance made without `__post_init__`."""
    instance = object.__new__(config_class)
    for name, value in arguments.items():
        object.__setattr__(instance, name, value)
    return instance


def _parse(
    config_class: type[T], flags: Sequence[str], values: Mapping[str, Any], place: _Place, prog: str | None
) -> T:
    """The flags over the recipe's values, by tyro; its boxed complaint becomes one line."""
    try:
        import tyro
    except ModuleNotFoundError:
        raise ConfigError("flags need the package tyro (pip install tyro); a recipe alone does not") from None
    _check_flags(flags, _leaves(config_class))
    default = _construct(config_class, values, place, hole=tyro.MISSING)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, args=list(flags), default=default, prog=prog)
    except SystemExit as leaving:
        if not leaving.code:
            raise  # --help has printed what it should
        raise ConfigError(_one_line(complaint.getvalue())) from None


def _check_flags(flags: Sequence[str], leaves: Mapping[str, Any]) -> None:
    """ConfigError on a flag that is no field's (tyro would complain of it too, and of the value after it)."""
    for flag in flags:
        key = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key in ("help", *leaves):
            continue
        if any(_table_class(hint) and key.startswith(f"{leaf}.") for leaf, hint in leaves.items()):
            continue
        table, _, name = key.rpartition(".")
        on = f"{table}.{name.removeprefix('no_')}".removeprefix(".")
        if leaves.get(on) is not bool and get_origin(leaves.get(table)) is not dict:
            raise ConfigError(f"unknown flag {flag.partition('=')[0]}; did you mean {_flag(_nearest(key, leaves))}?")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _one_line(box: str) -> str:
    """The message of tyro's box: without frame, title and the pointer to --help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    body = itertools.dropwhile(_is_rule, lines)
    return " ".join(" ".join(itertools.takewhile(lambda line: not _is_rule(line), body)).split())


def _is_rule(line: str) -> bool:
    return not line.strip("- ")
