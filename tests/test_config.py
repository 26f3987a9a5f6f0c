"""Recipes and flags: what is accepted, which wins, and what each mistake says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from puna import config
from puna.config import ConfigError


@dataclass(frozen=True)
class Optim:
    """The optimizer's numbers."""

    lr: float = 1e-3
    """peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = True


@dataclass(frozen=True)
class Config:
    """A stage's config."""

    data: tuple[Path, ...]
    """the files to train on."""
    kind: Literal["large", "small"] = "small"
    steps: int = 10
    limit: int | None = None
    smoke: bool = False
    max_len: int = 256
    shares: dict[str, float] = field(default_factory=dict)
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-3))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}: it must be at least 1")
        if len(self.data) == 0:
            raise ConfigError("data is empty")


def recipe(folder: Path, text: str, name: str = "x.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(*argv: str, section: str | None = "sft") -> Config:
    return config.load(Config, list(argv), section)


def test_a_recipe_alone(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[sft]\ndata = ["a", "b"]\noptim.betas = [0, 1]\nshares.x = 1\n')
    loaded = load(path)
    assert loaded == Config(data=(Path("a"), Path("b")), shares={"x": 1.0}, optim=Optim(lr=5e-3, betas=(0.0, 1.0)))
    assert type(loaded.optim.betas[0]) is float


def test_flags_alone() -> None:
    argv = "--data a b --kind large --optim.lr 1e-5 --smoke --limit 3 --max-len 7 --optim.no-fused".split()
    optim = Optim(lr=1e-5, fused=False)
    assert load(*argv) == Config((Path("a"), Path("b")), "large", limit=3, smoke=True, max_len=7, optim=optim)


def test_a_flag_outdoes_the_recipe_and_the_later_flag_the_earlier(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[sft]\ndata = ["a"]\nsteps = 3\noptim.lr = 1.0\noptim.betas = [0.1, 0.2]\nsmoke = true\n')
    loaded = load(path, "--steps", "4", "--steps", "5", "--optim.lr=2", "--no-smoke")
    assert loaded == Config((Path("a"),), steps=5, optim=Optim(lr=2.0, betas=(0.1, 0.2)))


def test_flags_and_recipe_mean_the_same(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[sft]\ndata = ["a"]\nkind = "large"\nlimit = 3\noptim.lr = 1e-5\noptim.fused = false\n')
    flags = "--data a --kind large --limit 3 --optim.lr 1e-5 --optim.no-fused".split()
    assert load(path) == load(*flags) == load(path, "--steps", "10")


def test_required_values_may_come_from_flags(tmp_path: Path) -> None:
    assert load(recipe(tmp_path, "[sft]\nsteps = 3\n"), "--data", "a").steps == 3


def test_underscores_in_flags() -> None:
    assert load("--data", "a", "--max_len", "3", "--optim.no_fused").max_len == 3


def test_sections(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'data = ["whole"]\n', "whole.toml")
    assert load(path, section=None).data == (Path("whole"),)
    path = recipe(tmp_path, '[v1.reward]\ndata = ["inner"]\n')
    assert load(path, section="v1.reward").data == (Path("inner"),)


def test_smoke_takes_the_recipes_overrides(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'data = ["a"]\nsteps = 50\noptim.betas = [0.1, 0.2]\n[smoke]\nsteps = 2\noptim.lr = 1.0\n')
    assert load(path, section=None) == Config((Path("a"),), steps=50, optim=Optim(lr=5e-3, betas=(0.1, 0.2)))
    smoke = Config((Path("a"),), steps=2, smoke=True, optim=Optim(lr=1.0, betas=(0.1, 0.2)))
    assert load(path, "--smoke", section=None) == smoke
    assert load(path, "--smoke", "--steps", "3", section=None).steps == 3


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    recipe(tmp_path, 'data = ["a"]\nsteps = 50\noptim.lr = 1.0\n[smoke]\nsteps = 2\n', "base.toml")
    (tmp_path / "more").mkdir()
    recipe(tmp_path / "more", 'extends = "../base.toml"\nkind = "large"\noptim.fused = false\n', "between.toml")
    path = recipe(tmp_path, 'extends = "more/between.toml"\nsteps = 7\n')
    expected = Config((Path("a"),), "large", steps=7, optim=Optim(lr=1.0, fused=False))
    assert load(path, section=None) == expected
    assert load(path, "--smoke", section=None).steps == 2
    with pytest.raises(ConfigError, match=r"no such recipe: .*nowhere\.toml"):
        load(recipe(tmp_path, 'extends = "nowhere.toml"', "y.toml"), section=None)
    recipe(tmp_path, 'extends = "x.toml"', "base.toml")
    with pytest.raises(ConfigError, match=r"x\.toml: extends itself, by way of x\.toml, between\.toml, base\.toml"):
        load(path, section=None)


def test_a_saved_config_is_a_recipe(tmp_path: Path) -> None:
    cfg = Config((Path("a"),), limit=None, shares={"x": 0.5}, optim=Optim(lr=1e-5))
    config.save(cfg, tmp_path / "run" / "config.json")
    path = str(tmp_path / "run" / "config.json")
    assert load(path) == load(path, section=None) == load(path, "--max-len", "256") == cfg
    assert load(path, "--limit", "3").limit == 3
    assert json.loads(Path(path).read_text()) == config.to_dict(cfg)
    whole = recipe(tmp_path, json.dumps({"seed": 0, "sft": config.to_dict(cfg)}), "whole.json")
    assert load(whole) == cfg


def test_a_folder_keeps_one_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, cfg = tmp_path / "run/config.json", Config((Path("a"),), optim=Optim(lr=1e-5))
    config.keep(cfg, path)
    (tmp_path / "run/metrics.jsonl").touch()
    config.keep(replace(cfg, data=(tmp_path / "x/../a",)), path)  # the same file by another name
    assert load(str(path)).data == (tmp_path / "x/../a",)
    config.keep(replace(cfg, steps=99), path, ignore=("steps",))
    config.keep(replace(cfg, steps=99, optim=Optim(lr=0.5)), path, ignore=("lr",))  # in a nested table too
    kept = path.read_bytes()
    for changes, said in (
        ({"steps": 3}, "steps 99, not 3"),
        ({"data": (Path("a"), Path("b"))}, r'data \["a"\], not \["a", "b"\]'),
        ({"optim": Optim(lr=0.1)}, r"optim\.lr 0\.5, not 0\.1"),
        ({"limit": 1}, "limit null, not 1"),
    ):
        changed = replace(Config((Path("a"),), steps=99, optim=Optim(lr=0.5)), **changes)
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/run was begun with {said} .*: use another --out$"):
            config.keep(changed, path)
    assert path.read_bytes() == kept


def test_a_mistake_leaves_the_folder_free(tmp_path: Path) -> None:
    path, cfg = tmp_path / "run/config.json", Config((Path("misspelt"),))
    config.keep(cfg, path)
    for name in ("run.lock", "bad_lines.jsonl", ".config.json.tmp-1"):  # the last: another process's, at work
        (tmp_path / "run" / name).touch()
    config.keep(replace(cfg, data=(Path("right"),)), path)
    assert load(str(path)).data == (Path("right"),)


@dataclass(frozen=True)
class Sampled:
    """A stage that may sample on a server."""

    vllm: str = ""


def test_a_servers_address_may_change_and_not_whether_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "run/config.json"
    config.keep(Sampled("http://a"), path)
    (tmp_path / "run/parts").mkdir()
    config.keep(Sampled("http://b"), path)
    with pytest.raises(ConfigError, match=r'was begun with vllm "http://b", not "" '):
        config.keep(Sampled(), path)


def test_one_of() -> None:
    config.one_of(replace(Config((Path("a"),)), limit=2), "limit", {2: "two"})
    with pytest.raises(ConfigError, match=r"^unknown kind 'larg'; did you mean 'large'\?$"):
        config.one_of(replace(Config((Path("a"),)), kind="larg"), "kind", ("small", "large"))


def test_positive() -> None:
    config.positive(Config((Path("a"),)), "steps", "max_len")
    with pytest.raises(ConfigError, match=r"^max_len is 0: it must be positive$"):
        config.positive(Config((Path("a"),), max_len=0), "steps", "max_len")
    with pytest.raises(ConfigError, match=r"^lr is nan: it must be positive$"):
        config.positive(Optim(lr=float("nan")), "lr")


def test_within() -> None:
    config.within(Optim(lr=0.0), 0, 1, "lr")
    for wrong, high, bounds in (
        (-1.0, 1, "from 0 to 1"),
        (2.0, 1, "from 0 to 1"),
        (float("inf"), math.inf, "at least 0"),
    ):
        with pytest.raises(ConfigError, match=rf"^lr is {wrong}: it must be {bounds}$"):
            config.within(Optim(lr=wrong), 0, high, "lr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.learning_rat = 1", "unknown key 'optim.learning_rat' in [sft]; did you mean 'optim.lr'?"),
        ("learning_rate = 1", "unknown key 'learning_rate' in [sft]; did you mean 'optim.lr'?"),
        ("max_steps = 1", "unknown key 'max_steps' in [sft]; did you mean 'steps'?"),
        ("maxlen = 1", "unknown key 'maxlen' in [sft]; did you mean 'max_len'?"),
        ("optim = 1", "key 'optim' in [sft] must be a table, not 1"),
        ("steps.a = 1", "key 'steps' in [sft] must be int, not {'a': 1}"),
        ('optim.lr = "fast"', "key 'optim.lr' in [sft] must be float, not 'fast'"),
        ("steps = 1.0", "key 'steps' in [sft] must be int, not 1.0"),
        ("steps = true", "key 'steps' in [sft] must be int, not True"),
        ("smoke = 1", "key 'smoke' in [sft] must be bool, not 1"),
        ('kind = "medium"', "key 'kind' in [sft] must be one of 'large', 'small', not 'medium'"),
        ("optim.betas = [1]", "key 'optim.betas' in [sft] must be tuple[float, float], not [1]"),
        ('data = "a"', "key 'data' in [sft] must be tuple[Path, ...], not 'a'"),
        ('limit = "3"', "key 'limit' in [sft] must be int | None, not '3'"),
        ("", "missing key 'data' in [sft]: it has no default"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = recipe(tmp_path, f"[sft]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {message}"
    if text:
        with pytest.raises(ConfigError) as caught:  # the same complaint where flags follow
            load(path, "--steps", "3")
        assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim.learning_rat 1", "unknown flag --optim.learning_rat; did you mean --optim.lr?"),
        ("--optim.learning_rat=1", "unknown flag --optim.learning_rat; did you mean --optim.lr?"),
        ("--optim.l 1", "unknown flag --optim.l; did you mean --optim.lr?"),
        ("--learning-rate 1", "unknown flag --learning-rate; did you mean --optim.lr?"),
        ("--no-steps", "unknown flag --no-steps; did you mean --steps?"),
        ("--optim.lr fast", "Error parsing --optim.lr: could not convert string to float: 'fast'"),
        ("--kind medium", "invalid choice 'medium' for argument '--kind'. Expected one of ('large', 'small')."),
        ("--steps", "Missing value for argument '--steps'. Expected 1 values."),
        ("--steps 0", "steps is 0: it must be at least 1"),
        ("--data", "data is empty"),
    ],
)
def test_mistakes_in_flags(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--data", "a", *flags.split())
    assert str(caught.value) == message


def test_a_missing_flag() -> None:
    with pytest.raises(ConfigError, match="missing --data"):
        load()
    with pytest.raises(ConfigError, match="--data"):
        load("--steps", "3")


def test_mistakes_in_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe: "):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"x\.toml: Invalid value \(at line 2, column 5\)"):
        load(recipe(tmp_path, "a = 3\nb = = 4\n"))
    with pytest.raises(ConfigError, match=r"x\.json, line 2: Expecting"):
        load(recipe(tmp_path, '{"a":\n]', "x.json"))
    with pytest.raises(ConfigError, match="not a list"):
        load(recipe(tmp_path, "[]", "x.json"))
    with pytest.raises(ConfigError, match=r"no table \[sft\]; tables there: \[stf\], \[reward\]"):
        load(recipe(tmp_path, "seed = 1\n[stf]\n[reward]\n"))


def test_help_shows_the_fields_docstrings_and_the_recipes_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(recipe(tmp_path, "[sft]\nsteps = 4321\n"), "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "peak learning rate." in out and "the files to train on." in out and "4321" in out


def test_from_dict_is_strict() -> None:
    assert config.from_dict(Config, {"data": ["a"], "optim": {"lr": 1}}).optim.lr == 1.0
    with pytest.raises(ConfigError, match=r"^unknown key 'optim\.rl'; did you mean 'optim\.lr'\?$"):
        config.from_dict(Config, {"data": ["a"], "optim": {"rl": 1}})


def test_a_recipe_alone_needs_no_tyro(tmp_path: Path) -> None:
    path = recipe(tmp_path, "steps = 3\n")
    program = f"""
import sys
sys.modules["tyro"] = None
from dataclasses import dataclass
from puna import config
@dataclass(frozen=True)
class C:
    steps: int = 1
assert config.load(C, [{path!r}], None).steps == 3
try:
    config.load(C, ["--steps", "3"], None)
except config.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("flags need the package tyro")


# Tables that a recipe names


@dataclass(frozen=True)
class Named:
    """A config with tables by name."""

    out: Path
    groups: dict[str, Optim] = field(default_factory=dict)


GROUPS = '[x]\nout = "o"\n[x.groups.first]\nlr = 1\n[x.groups.second]\nbetas = [0.5, 0.6]\n'


def test_named_tables_and_their_flags(tmp_path: Path) -> None:
    file = recipe(tmp_path, GROUPS)
    groups = {"first": Optim(lr=1.0), "second": Optim(betas=(0.5, 0.6))}
    cfg = config.load(Named, [file], "x")
    assert cfg == Named(Path("o"), groups)
    assert config.load(Named, [file, "--groups.second.lr", "2", "--groups.first.no-fused"], "x").groups == {
        "first": Optim(lr=1.0, fused=False),
        "second": Optim(lr=2.0, betas=(0.5, 0.6)),
    }
    config.keep(cfg, tmp_path / "config.json")
    assert config.load(Named, [str(tmp_path / "config.json")]) == cfg
    config.keep(cfg, tmp_path / "config.json")
    other = replace(cfg, groups={**groups, "first": Optim(lr=3.0)})
    with pytest.raises(ConfigError, match=r'begun with groups \{"first": \{"lr": 1\.0.*, not \{"first": \{"lr": 3\.0'):
        config.keep(other, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GROUPS + "bettas = 1", "x.toml: unknown key 'bettas' in [x.groups.second]; did you mean 'betas'?"),
        (GROUPS + 'lr = "a"', "x.toml: key 'lr' in [x.groups.second] must be float, not 'a'"),
        ('[x]\nout = "o"\ngroups = 3', "x.toml: key 'groups' in [x] must be"),
        ('[x]\nout = "o"\ngroups.first = 3', "x.toml: key 'groups' in [x] must be"),
    ],
)
def test_mistakes_in_named_tables(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(Named, [recipe(tmp_path, text)], "x")
    assert message in str(refused.value)


def test_a_flag_of_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--groups\.third\.lr"):
        config.load(Named, [recipe(tmp_path, GROUPS), "--groups.third.lr", "1"], "x")
