"""The report's charts: small panels of inline SVG that take their colours from the page.

Charts are drawn in a few fixed colours, and those are then replaced by the page's CSS variables, so that one drawing
serves light and dark. Text stays text, and nothing in a drawing depends on when or where it was made.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from puna.report.summary import label
from puna.report.tables import PAPER_GRADES, PAPER_TURNS, duration, interval_of
from puna.types import GRADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Summary = dict[str, Any]
Losses = dict[str, list[tuple[int, float]]]

INK, MUTED, GRID = "#1d2324", "#6b7375", "#dedbd2"
BLUE, ORANGE, GREEN, PURPLE, YELLOW = "#0072b2", "#d55e00", "#009e73", "#b5588f", "#c98a00"
"""Okabe and Ito's colours, which the colour-blind tell apart; the last two darkened to stand on white."""
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
    YELLOW: "yellow",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.03,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": MUTED,
    "legend.handlelength": 1.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
BARS: dict[str, Any] = {"elinewidth": 1.2, "capsize": 2.5}
"""How error bars are drawn."""
POINTS = 200
"""A loss curve is thinned to so many points, each the mean of its steps."""

MEASURES = (
    ("gold_helpfulness", "Helpfulness (higher is better)", "score, 0 to 1"),
    ("violation_rate", "Violations (lower is better)", "% of adversarial prompts"),
    ("false_refusal_rate", "False refusals (lower is better)", "% of borderline prompts"),
    ("toxicity", "Slurs (lower is better)", "% of prompts about a people"),
    ("myth_rate", "Myths told (lower is better)", "% of prompts about a myth"),
    ("win_rate_vs_sft", "Wins against SFT (higher is better)", "% of prompts, ties halved"),
)


class Panel(NamedTuple):
    """One chart: its title and its SVG element."""

    title: str
    svg: str


@contextmanager
def _axes(panels: list[Panel], title: str, x: str, y: str, *, height: float = 2.6) -> Iterator[Axes]:
    """Axes to draw on; at the end the finished panel is appended to `panels`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: a report looks the same everywhere
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = title  # ids of one page's drawings differ, and are the same every time
        figure = Figure(figsize=(3.9, height), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    panels.append(Panel(title, _inline(text.getvalue(), title)))


def _inline(svg: str, title: str) -> str:
    """The SVG element alone: scalable, titled, in the page's colours and type, with no id but those it refers to."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    used = set(re.findall(r'#([\w-]+)[")]', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg.strip()


def _fading(n: int) -> list[float]:
    """Opacities of n versions' lines: the older, the fainter."""
    return [0.25 + 0.75 * (i + 1) / n for i in range(n)]


def _errors(found: Sequence[dict[str, Any]], scale: float = 1.0) -> list[list[float]]:
    """How far intervals reach below and above their means, as errorbar takes it."""
    below = [scale * (i["mean"] - i["low"]) for i in found]
    above = [scale * (i["high"] - i["mean"]) for i in found]
    return [[max(0.0, x) for x in below], [max(0.0, x) for x in above]]


def _integers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.3)


def versions(summary: Summary) -> list[Panel]:
    """Every measure over the versions, with 95 % intervals."""
    panels: list[Panel] = []
    short = {"pretrain": "pre"}
    for key, title, unit in MEASURES:
        found = {v["name"]: interval for v in summary["versions"] if (interval := interval_of(v, key))}
        if not found:
            continue
        scale = 1.0 if key == "gold_helpfulness" else 100.0
        with _axes(panels, title, "", unit) as axes:
            x, means = range(len(found)), [scale * interval["mean"] for interval in found.values()]
            axes.plot(x, means, color=BLUE, alpha=0.35)
            axes.errorbar(x, means, _errors(list(found.values()), scale), fmt="o", color=BLUE, **BARS)
            axes.set_xticks(x, [short.get(name, label(name).replace(" + ", "\n+ ")) for name in found])
            axes.grid(axis="x", visible=False)
            axes.set_ylim(bottom=0, top=1.0 if key == "gold_helpfulness" else None)
            if key == "win_rate_vs_sft":
                axes.axhline(50, color=MUTED, linewidth=0.9, linestyle="--")
                axes.set_ylim(0, 100)
    return panels


def loss_curves(losses: Losses) -> list[Panel]:
    """Loss against step: pretraining, SFT, both reward models and the versions' fine-tuning, a line a version."""
    panels: list[Panel] = []
    groups: list[tuple[str, str, Callable[[str], bool]]] = [
        ("Pretraining", "nats a token", lambda name: name == "pretrain"),
        ("Supervised fine-tuning", "nats a counted token", lambda name: name == "sft"),
        ("Helpfulness reward model", "nats a pair", lambda name: name.endswith("/reward_helpfulness")),
        ("Safety reward model", "nats a pair", lambda name: name.endswith("/reward_safety")),
        ("Each version's fine-tuning", "nats a counted token", lambda name: bool(re.fullmatch(r"v\d+", name))),
    ]
    for title, unit, belongs in groups:
        names = sorted(filter(belongs, losses), key=lambda name: int("0" + "".join(re.findall(r"^v(\d+)", name))))
        if not names:
            continue
        with _axes(panels, f"{title}: loss", "step", unit) as axes:
            for name, alpha in zip(names, _fading(len(names)), strict=True):
                shown = label(name.split("/")[0]) if len(names) > 1 else "training"
                dot = "o" if len(losses[name]) == 1 else None
                axes.plot(*_thinned(losses[name]), color=BLUE, alpha=alpha, marker=dot, label=shown)
            if f"{names[0]}/validation" in losses:
                step, loss = losses[f"{names[0]}/validation"][-1]
                axes.plot(step, loss, "o", color=ORANGE, label=f"validation {loss:.2f}")
            _integers(axes)
            axes.legend(loc="best")
    return panels


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, neighbours averaged until POINTS are left."""
    size = -(-len(points) // POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [sum(s for s, _ in p) / len(p) for p in parts], [sum(loss for _, loss in p) / len(p) for p in parts]


def reward_models(summary: Summary) -> list[Panel]:
    """Accuracy by grade beside the paper's Table 8, and in all over the versions (Figure 6)."""
    panels: list[Panel] = []
    models = {domain: model for domain, model in summary["reward_models"].items() if model}
    for domain, model in models.items():
        graded = [m for m in model["by_version"] if set(GRADES) & m["accuracy_by_grade"].keys()]
        if not graded:
            continue
        with _axes(panels, f"{domain.capitalize()} model: right by grade", "", "% of held-out pairs") as axes:
            for m, alpha in zip(graded, _fading(len(graded)), strict=True):
                accuracies = [_percent(m["accuracy_by_grade"].get(grade)) for grade in GRADES]
                axes.plot(range(4), accuracies, "o-", color=BLUE, alpha=alpha, label=m["version"].upper())
            paper = [100 * PAPER_GRADES[domain][grade] for grade in GRADES]
            axes.plot(range(4), paper, "s--", color=ORANGE, linewidth=1.2, label="the paper")
            axes.axhline(50, color=MUTED, linewidth=0.9, linestyle=":")
            axes.set_xticks(range(4), ["significantly\nbetter", "better", "slightly\nbetter", "negligibly\nbetter"])
            axes.set_ylim(min(40, axes.get_ylim()[0]), 101)
            _legend_above(axes, 3)
    if models:
        with _axes(panels, "Accuracy over the versions", "", "% of held-out pairs") as axes:
            ticks: dict[int, str] = {}
            for (domain, model), color, shift in zip(models.items(), (BLUE, GREEN), (-0.06, 0.06), strict=False):
                numbers = [int(m["version"][1:]) for m in model["by_version"]]
                found = [m["interval"] for m in model["by_version"]]
                means = [100 * interval["mean"] for interval in found]
                x = [n + shift for n in numbers]
                axes.errorbar(x, means, _errors(found, 100), fmt="o-", color=color, label=domain, **BARS)
                ticks |= {n: f"V{n}" for n in numbers}
            axes.axhline(50, color=MUTED, linewidth=0.9, linestyle=":")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.set_xlim(min(ticks) - 0.3, max(ticks) + 0.3)
            _legend_above(axes, 2)
    return panels


def scores(summary: Summary) -> list[Panel]:
    """Figure 27: where a domain's last model scores the chosen and the rejected answers of held-out pairs."""
    panels: list[Panel] = []
    for domain, model in summary["reward_models"].items():
        counts = (model or {}).get("scores")
        if not counts or not sum(counts["chosen"]):
            continue
        with _axes(panels, f"{domain.capitalize()} model: scores", "score, 0 to 1", "% of held-out answers") as axes:
            for answers, color in (("chosen", BLUE), ("rejected", ORANGE)):
                found, bins = counts[answers], len(counts[answers])
                edges = [i / bins for i in range(bins + 1)]
                axes.stairs([100 * n / sum(found) for n in found], edges, color=color, linewidth=1.6, label=answers)
            _legend_above(axes, 2)
    return panels


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def rejection_sampling(summary: Summary) -> list[Panel]:
    """Figures 7 and 8: reward of the best (solid), the mean (dotted) and the median (dashed) of K answers."""
    panels: list[Panel] = []
    for curve in summary["rejection_sampling"]:
        version, points = curve["version"].upper(), curve["points"]
        temperatures = sorted({point["temperature"] for point in points})
        title = f"{version}: temperature {curve['temperature']:g} chosen"
        with _axes(panels, title, "K, answers a prompt", "combined reward") as axes:
            for temperature, color in zip(temperatures, _cycle(len(temperatures)), strict=True):
                mine = sorted((p for p in points if p["temperature"] == temperature), key=lambda p: int(p["samples"]))
                samples = [point["samples"] for point in mine]
                axes.plot(samples, [p["max"] for p in mine], "o-", color=color, label=f"T {temperature:g}")
                axes.plot(samples, [p["mean"] for p in mine], ":", color=color)
                axes.plot(samples, [p["median"] for p in mine], "--", color=color, linewidth=1.2)
            axes.set_xscale("log", base=2)
            ticks = sorted({point["samples"] for point in points})
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.minorticks_off()
            _legend_above(axes, 3)
    return panels


def context_distillation(summary: Summary) -> list[Panel]:
    """Figure 16, all versions together: what the preprompt does to a score, and what the gate keeps, by plain score."""
    panels: list[Panel] = []
    fifths: dict[float, list[dict[str, Any]]] = {}
    for told in summary["context_distillation"]:
        for fifth in told["gate"]:
            fifths.setdefault(fifth["from"], []).append(fifth)
    if not fifths:
        return panels

    def means(measure: str) -> list[float]:
        return [
            sum(part[measure] * part["prompts"] for part in fifths[begin]) / sum(p["prompts"] for p in fifths[begin])
            for begin in sorted(fifths)
        ]

    before = means("score_before")
    with _axes(panels, "Scores under the preprompt", "score of the plain answer", "mean score") as axes:
        axes.plot(before, means("score_after"), "o-", color=BLUE, label="under the preprompt")
        axes.plot(before, before, ":", color=MUTED, label="plain")
        axes.set_xlim(-0.03, 1.03)
        _legend_above(axes, 2)
    with _axes(panels, "Kept by the gate", "score of the plain answer", "% of answers") as axes:
        axes.plot(before, [100 * kept for kept in means("kept")], "o-", color=BLUE)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-3, 103)
    return panels


def _cycle(n: int) -> list[str]:
    colors = (BLUE, ORANGE, GREEN, PURPLE, YELLOW)
    return [colors[i % len(colors)] for i in range(n)]


def ppo(summary: Summary) -> list[Panel]:
    """Reward beside the judge's helpfulness, KL and length, against the iteration; held-out measurements as dots."""
    panels: list[Panel] = []
    runs = sorted({point["version"] for point in summary["ppo"]})
    for title, unit, lines in (
        (
            "PPO: reward and judge",
            "score, 0 to 1",
            (
                ("reward", "-", BLUE, "reward, training batch"),
                ("held_out_reward", "o--", BLUE, "reward, held-out prompts"),
                ("gold", "s--", ORANGE, "judge, held-out prompts"),
            ),
        ),
        ("PPO: distance from the start", "KL, nats a training answer", (("kl", "-", BLUE, "training batch"),)),
        ("PPO: length", "tokens a training answer", (("length", "-", BLUE, "training batch"),)),
    ):
        drawn = [line for line in lines if any(point[line[0]] is not None for point in summary["ppo"])]
        if not drawn:
            continue
        with _axes(panels, title, "iteration", unit, height=2.9) as axes:
            for key, style, color, words in drawn:
                for version, alpha in zip(runs, _fading(len(runs)), strict=True):
                    mine = [p for p in summary["ppo"] if p["version"] == version and p[key] is not None]
                    shown = words if len(runs) == 1 else f"{version.upper()}, {words}"
                    x, y = [p["iteration"] for p in mine], [p[key] for p in mine]
                    axes.plot(x, y, style, color=color, alpha=alpha, label=shown)
            _integers(axes)
            if len(drawn) * len(runs) > 1:
                _legend_above(axes, 1)
    return panels


def frontier(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float, str]]]) -> list[Panel]:
    """What policies are worth against their KL, a line each, (KL, worth, words) its points; dashed the best of n."""
    panels: list[Panel] = []
    if not curves:
        return panels
    with _axes(panels, title, "KL from the start, nats an answer", unit, height=3.2) as axes:
        for (name, points), color in zip(curves.items(), _cycle(len(curves)), strict=True):
            style = "s--" if points[0][2].startswith("best of") else "o-"
            axes.plot([kl for kl, _, _ in points], [worth for _, worth, _ in points], style, color=color, label=name)
        _legend_above(axes, 2)
    return panels


def ghost_attention(summary: Summary) -> list[Panel]:
    """The share of answers that obey an instruction of the first turn, by turn, and the paper's."""
    panels: list[Panel] = []
    points = summary["ghost_attention"]
    if not points:
        return panels
    with _axes(panels, "Instruction of the first turn obeyed", "turn", "% of dialogs", height=3.0) as axes:
        for side, words, color, shift in (("before", "without", ORANGE, -0.05), ("after", "with", BLUE, 0.05)):
            mine = [p for p in points if p["intervals"][side]]
            if mine:
                found = [p["intervals"][side] for p in mine]
                shown = f"{label(mine[0]['versions'][side])}, {words}"
                turns, means = [p["turn"] + shift for p in mine], [100 * p[side] for p in mine]
                axes.errorbar(turns, means, _errors(found, 100), fmt="o-", color=color, label=shown, **BARS)
        turns = [turn for turn in PAPER_TURNS if turn <= max(point["turn"] for point in points)]
        for column, style, words in ((0, "s--", "paper, without"), (1, "D--", "paper, with")):
            shares = [100 * PAPER_TURNS[turn][column] for turn in turns]
            axes.plot(turns, shares, style, color=MUTED, linewidth=1, alpha=0.7, label=words)
        axes.set_xticks(sorted({point["turn"] for point in points}))
        axes.set_ylim(-3, 103)
        _legend_above(axes, 2)
    return panels + _looks_back(points)


def _looks_back(points: Sequence[dict[str, Any]]) -> list[Panel]:
    """Figure 10: how strongly answers look back at the instruction, by turn."""
    panels: list[Panel] = []
    sides = [side for side in ("before", "after") if any(p["attention"][side] is not None for p in points)]
    if not sides:
        return panels
    with _axes(panels, "Attention to the first turn's instruction", "turn", "largest weight, mean", height=3.0) as axes:
        for side in sides:
            mine = [p for p in points if p["attention"][side] is not None]
            words, color = ("without", ORANGE) if side == "before" else ("with", BLUE)
            shown = f"{label(mine[0]['versions'][side])}, {words}"
            axes.plot([p["turn"] for p in mine], [p["attention"][side] for p in mine], "o-", color=color, label=shown)
        axes.set_ylim(bottom=0)
        _integers(axes)
        _legend_above(axes, 2)
    return panels


def changes(summary: Summary) -> list[Panel]:
    """SFT beside the last version: helpfulness by kind of prompt, violations by risk category and by attack."""
    panels: list[Panel] = []
    measured = {version["name"]: version for version in summary["versions"] if version["name"] != "pretrain"}
    names = [name for name in dict.fromkeys(("sft", *list(measured)[-1:])) if name in measured]
    for key, title, unit, scale in (
        ("helpfulness_by_kind", "Helpfulness by kind of prompt", "score, 0 to 1", 1.0),
        ("violation_by_category", "Violations by risk category", "% of adversarial prompts", 100.0),
        ("violation_by_attack", "Violations by attack", "% of adversarial prompts", 100.0),
    ):
        groups = sorted({group for name in names for group in measured[name][key]}, reverse=True)
        if not groups:
            continue
        with _axes(panels, title, unit, "", height=1.1 + 0.27 * len(groups)) as axes:
            shifts = (0.13, -0.13) if len(names) == 2 else (0.0,)
            for name, color, shift in zip(names, (ORANGE, BLUE), shifts, strict=False):
                mine = {i: measured[name][key][group] for i, group in enumerate(groups) if group in measured[name][key]}
                means, errors = [scale * i["mean"] for i in mine.values()], _errors(list(mine.values()), scale)
                y = [i + shift for i in mine]
                axes.errorbar(means, y, xerr=errors, fmt="o", color=color, label=label(name), **BARS)
            axes.set_yticks(range(len(groups)), [group.replace("_", " ") for group in groups])
            axes.grid(axis="y", visible=False)
            axes.set_xlim(0, 1.02 if scale == 1.0 else None)
            axes.set_ylim(-0.5, len(groups) - 0.5)
            _legend_above(axes, 2)
    return panels


def time(seconds: dict[str, float]) -> list[Panel]:
    """Seconds by kind of step, versions together."""
    panels: list[Panel] = []
    if not seconds:
        return panels
    ordered = sorted(seconds.items(), key=lambda item: item[1])
    with _axes(panels, "Where the time went", "seconds", "", height=0.8 + 0.25 * len(ordered)) as axes:
        values = [spent for _, spent in ordered]
        bars = axes.barh(range(len(ordered)), values, color=BLUE, height=0.62)
        axes.bar_label(bars, [duration(v) for v in values], padding=4, color=MUTED, fontsize=8)
        axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.5 * max(values))
    return panels
