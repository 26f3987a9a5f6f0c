"""Checks the 26 details on which PPO trainers for language models differ, on one iteration that a trainer wrote down.

The format is in docs/guides/conformance.md; `puna ppo --dump` writes it, and any other trainer can. Each detail holds,
fails, or is not shown by the dump. All formulas are written out here once more, in NumPy and float64: nothing of the
trainer's is used to check it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.config import DataError
from puna.data import rollouts
from puna.data.rollouts import Dump
from puna.run_folder import write_atomically

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ConformanceConfig:
    """`puna conformance`: the dump of an iteration in, a verdict on every detail out."""

    rollout: Path
    """the dump's folder."""
    resumed: Path | None = None
    """the same iteration's dump of a run that was killed before it and resumed, for detail z."""
    out: Path | None = None
    """a JSON file to write the verdicts to."""
    tolerance: float = 1e-4
    """how far numbers may lie apart that should be equal."""


@dataclass(frozen=True)
class Verdict:
    """What a dump shows of one detail; `holds` is None where it shows nothing."""

    detail: str
    title: str
    holds: bool | None
    why: str


Finding = tuple[bool, str]
"""Whether a detail holds, and the numbers that say so."""


class NotShown(Exception):
    """The dump lacks what a check needs; the message says what."""


class Shown:
    """A dump as the checks read it: what is not there is NotShown."""

    def __init__(self, dump: Dump, tolerance: float = 1e-4, resumed: Dump | None = None) -> None:
        self.dump, self.tolerance, self.resumed = dump, tolerance, resumed

    def __getitem__(self, name: str) -> Array:
        """A tensor, numbers in float64."""
        if name not in self.dump.tensors:
            raise NotShown(f"the dump has no {name}")
        x = self.dump.tensors[name]
        return x.astype(np.float64) if x.dtype.kind == "f" else x

    def fact(self, name: str) -> Any:
        """A setting."""
        if name not in self.dump.facts:
            raise NotShown(f"rollout.json does not say {name}")
        return self.dump.facts[name]

    @property
    def mask(self) -> Array:
        """(B, T - 1) True where an action is."""
        return np.asarray(self["action_mask"], bool)

    @property
    def last(self) -> Array:
        """(B,) each row's last action."""
        return np.asarray(self.mask.shape[1] - 1 - self.mask[:, ::-1].argmax(1))

    @property
    def kl(self) -> Array:
        """(B, T - 1) log pi - log pi_0 of every action."""
        return np.asarray(np.where(self.mask, self["logprobs"] - self["reference_logprobs"], 0.0))

    @property
    def rewards(self) -> Array:
        """(B, T - 1) the reward of every action."""
        return np.asarray(np.where(self.mask, self["rewards"], 0.0))

    def at(self, name: str, places: str) -> Array:
        """The numbers of a (B, T - 1) tensor at the places (N, 2) that another names."""
        rows, columns = self[places].T
        return np.asarray(self[name][rows, columns])

    def equal(self, what: str, actual: Array, expected: Array) -> Finding:
        """Whether two arrays are equal within the tolerance, and how far they are apart at most."""
        far = float(np.abs(actual - expected).max(initial=0.0))
        return far <= self.tolerance, f"{what}: at most {far:.2g} apart"

    def updates(self) -> Iterator[tuple[int, list[Array]]]:
        """Each gradient step and its passes, a pass as indices of the pass_* tensors."""
        ends, n = self["pass_size"].cumsum(), len(self["pass_logprobs"])
        if ends[-1] != n or not np.isin(self["update_size"].cumsum(), ends).all() or self["update_size"].sum() != n:
            raise DataError(f"pass_size and update_size do not cut the {n} entries of pass_logprobs")
        passes = np.split(np.arange(n), ends[:-1])
        for update, end in enumerate(self["update_size"].cumsum()):
            begin = end - self["update_size"][update]
            yield update, [members for members in passes if len(members) and begin <= members[0] < end]


# Formulas -------------------------------------------------------------------------------------------------------------


def log_softmax(x: Array) -> Array:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def whiten(x: Array) -> Array:
    """Mean 0 and deviation 1; the mean is not kept."""
    return np.asarray((x - x.mean()) / np.sqrt(x.var() + 1e-8))


def advantages(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> Array:
    """GAE by its sum, row by row over the actions alone."""
    out = np.zeros_like(rewards)
    for row in range(len(rewards)):
        where = mask[row].nonzero()[0]
        v = np.append(values[row, where], 0.0)
        deltas = rewards[row, where] + gamma * v[1:] - v[:-1]
        for i, column in enumerate(where):
            out[row, column] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:]))
    return out


def ratios(s: Shown, members: Array) -> Array:
    """pi / pi_old of some entries of the pass_* tensors."""
    rows, columns = s["pass_at"][members].T
    return np.asarray(np.exp(s["pass_logprobs"][members] - s["logprobs"][rows, columns]))


def token_losses(s: Shown, members: Array) -> tuple[Array, Array, Array]:
    """Ratios, policy losses and value losses of some entries of the pass_* tensors."""
    rows, columns = s["pass_at"][members].T
    advantage, target, old = (s[name][rows, columns] for name in ("advantages", "returns", "values"))
    ratio = ratios(s, members)
    clip, reach = s.fact("clip"), s.fact("value_clip")
    policy = np.maximum(-ratio * advantage, -np.clip(ratio, 1 - clip, 1 + clip) * advantage)
    value = s["pass_values"][members]
    near = np.clip(value, old - reach, old + reach)
    return ratio, policy, 0.5 * np.maximum((value - target) ** 2, (near - target) ** 2)


def raw_scores(s: Shown) -> Array:
    """The combined rewards (B,) in the space in which they are whitened."""
    if not s.fact("logit_scores"):
        return s["combined"]
    stored = s.dump.tensors["combined"] if "combined" in s.dump.tensors else s["combined"]
    p = np.clip(stored, stored.dtype.type(1e-6), stored.dtype.type(1 - 1e-6)).astype(np.float64)  # as it was computed
    return np.asarray(np.log(p / (1 - p)))


# The details ----------------------------------------------------------------------------------------------------------


def temperature(s: Shown) -> Finding:
    """a: log-probabilities are at the sampling temperature."""
    rows, columns = s["logits_at"].T
    logp = log_softmax(s["logits"] / s.fact("temperature"))
    expected = logp[np.arange(len(rows)), s["tokens"][rows, columns + 1]]
    return s.equal(f"logprobs and the logits over {s.fact('temperature')}", s.at("logprobs", "logits_at"), expected)


def first_ratio(s: Shown) -> Finding:
    """b: the ratio is 1 on the first mini-batch."""
    _, passes = next(s.updates())
    ratio = ratios(s, np.concatenate(passes))
    return s.equal(f"1 and the first ratios of {len(ratio)} tokens", ratio, np.ones_like(ratio))


def padding(s: Shown) -> Finding:
    """c: positions follow the mask, so that pads change nothing."""
    return s.equal("log-probabilities with and without pads", s.at("logprobs", "alone_at"), s["alone_logprobs"])


def pad_token(s: Shown) -> Finding:
    """d: a pad is not EOS, and nothing but pads stands behind an answer."""
    pad, eos = s.fact("pad_id"), s.fact("eos_id")
    behind = s["tokens"][np.arange(s["tokens"].shape[1]) > s.last[:, None] + 1]
    others = int((behind != pad).sum())
    return pad != eos and not others, f"pad is {pad}, EOS is {eos}; {others} of {len(behind)} pads are other tokens"


def last_real_token(s: Shown) -> Finding:
    """e: the reward model reads the last real token."""
    alone = 1 / (1 + np.exp(-s["alone_score"]))
    return s.equal("scores with and without pads", s["helpfulness"][: len(alone)], alone)


def score_place(s: Shown) -> Finding:
    """f: the score is on the last action."""
    of_kl = -s.fact("beta") * (s.kl if s.fact("kl") == "token" else s.kl.sum(1, keepdims=True) * places(s))
    expected = s["scores"][:, None] * places(s)
    return s.equal("rewards without KL and scores at the last actions", s.rewards - of_kl, expected)


def places(s: Shown) -> Array:
    """(B, T - 1) 1 at each row's last action."""
    return np.asarray(np.arange(s.mask.shape[1]) == s.last[:, None], np.float64)


def missing_eos(s: Shown) -> Finding:
    """g: an answer that did not end is penalised."""
    finished = s["finished"].astype(bool)
    if finished.all():
        raise NotShown("every answer ended")
    penalty = s.fact("missing_eos_penalty")
    holds, why = s.equal("scores and whitened scores less the penalty", s["scores"], s["bounded"] - penalty * ~finished)
    return holds and penalty > 0, f"penalty {penalty} on {(~finished).sum()} of {len(finished)} answers; {why}"


def critic_start(s: Shown) -> Finding:
    """h: the critic begins as the reward model, or at 0."""
    if s.fact("iteration"):
        raise NotShown(f"iteration {s.fact('iteration')}: the critic has been trained")
    if s.fact("critic") == "reward":
        return s.equal("values and the reward model's scores", s.at("values", "alone_at"), s["alone_rewards"])
    return s.equal("values and 0", s["values"][s.mask], np.zeros(s.mask.sum()))


def head_start(s: Shown) -> Finding:
    """i: the reward model's head begins with deviation 1/sqrt(D + 1)."""
    head = s["reward_head"]
    expected, seen = (len(head) + 1) ** -0.5, float(head.std())
    allowed = 4 / np.sqrt(2 * len(head))  # four deviations of the estimate
    return abs(seen / expected - 1) < allowed, f"deviation {seen:.4f} of {len(head)} weights, expected {expected:.4f}"


def unit_scores(s: Shown) -> Finding:
    """j: scores have mean 0 and deviation 1, on reference samples or by whitening."""
    name = "reference_scores" if "reference_scores" in s.dump.tensors else "bounded"
    if name == "bounded" and (s.dump.facts.get("score_clip") or s.dump.facts.get("whiten") == "running"):
        raise NotShown("scores are clipped, or whitened by earlier batches too, and no reference_scores are dumped")
    mean, deviation = s[name].mean(), s[name].std()
    return abs(mean) < 0.1 and abs(deviation - 1) < 0.1, f"{name}: mean {mean:.3f}, deviation {deviation:.3f}"


def score_whitening(s: Shown) -> Finding:
    """k: scores are whitened as stated, the mean not kept."""
    if s.fact("whiten") == "running":
        raise NotShown("whitened by the moments of earlier batches too")
    raw = raw_scores(s)
    expected = whiten(raw) if s.fact("whiten") == "batch" else raw
    limit = s.fact("score_clip") or np.inf
    holds, why = s.equal(f"scores and whiten = {s.fact('whiten')}", s["bounded"], np.clip(expected, -limit, limit))
    return holds, f"{why}; mean {raw.mean():.3f} before, {s['bounded'].mean():.3f} after"


def advantage_whitening(s: Shown) -> Finding:
    """l: advantages are whitened over actions alone, the mean not kept."""
    limit = s.fact("advantage_clip") or np.inf
    seen = s["advantages"][s.mask]
    expected = np.clip(whiten(s["raw_advantages"][s.mask]), -limit, limit)
    holds, why = s.equal("advantages and whitened ones", seen, expected)
    return holds, f"{why}; mean {seen.mean():.3f}, deviation {seen.std():.3f}"


def gae(s: Shown) -> Finding:
    """m: GAE skips pads and what others said."""
    raw = advantages(s["rewards"], s["values"], s.mask, s.fact("gamma"), s.fact("lam"))
    holds, why = s.equal("advantages and GAE over actions", s["raw_advantages"][s.mask], raw[s.mask])
    returned, more = s.equal("returns", s["returns"][s.mask], (raw + s["values"])[s.mask])
    return holds and returned, f"{why}; {more}"


def clipped_losses(s: Shown) -> Finding:
    """n: the ratio is clipped, the value loss is clipped and halved."""
    outside = 0
    seen, expected = [], []
    for update, passes in s.updates():
        ratio, policy, value = token_losses(s, np.concatenate(passes))
        outside += int((np.abs(ratio - 1) > s.fact("clip")).sum())
        seen += [s["update_policy_loss"][update], s["update_value_loss"][update]]
        expected += [policy.mean(), value.mean()]
    if not outside:
        raise NotShown("no ratio has left the clip")
    holds, why = s.equal(f"losses of {len(seen) // 2} gradient steps", np.array(seen), np.array(expected))
    return holds, f"{why}; {outside} ratios are outside"


def token_weights(s: Shown) -> Finding:
    """o: tokens weigh the same however a mini-batch is cut."""
    seen, by_token, by_pass = [], [], []
    for update, passes in s.updates():
        per_pass = [token_losses(s, members)[2] for members in passes]
        seen.append(s["update_value_loss"][update])
        by_token.append(np.concatenate(per_pass).mean())
        by_pass.append(np.mean([x.mean() for x in per_pass]))
    if np.abs(np.subtract(by_token, by_pass)).max() <= s.tolerance:
        raise NotShown("no gradient step has passes whose means differ")
    return s.equal("value losses and means over tokens", np.array(seen), np.array(by_token))


def kl_estimator(s: Shown) -> Finding:
    """p: KL in the reward is k1, neither clamped nor an absolute value."""
    if not s.fact("beta") or s.kl.min(initial=0.0) >= 0:
        raise NotShown("no token has a negative estimate")
    if s.fact("kl") == "sequence":
        return s.equal("rewards and score - beta KL", s.rewards.sum(1), s["scores"] - s.fact("beta") * s.kl.sum(1))
    rest = s.mask & (places(s) == 0)
    holds, why = s.equal("rewards and -beta (log pi - log pi_0)", s["rewards"][rest], -s.fact("beta") * s.kl[rest])
    return holds, f"{why}; {(s.kl < 0).sum()} estimates are negative"


def sampler(s: Shown) -> Finding:
    """q: the sampler draws from what is scored."""
    if s.fact("top_p") < 1 or s.fact("top_k") > 0:
        return False, f"top_p {s.fact('top_p')}, top_k {s.fact('top_k')} cut the distribution"
    drawn, scored = s["sampled_logprobs"], s["logprobs"][s.mask]
    if len(drawn) != len(scored):
        return False, f"{len(drawn)} tokens were drawn, {len(scored)} are scored"
    far = np.abs(drawn - scored)
    return bool(far.mean() < 0.02), f"sampler's and trainer's log-probabilities: {far.mean():.2g} apart on average"


def reward_sums(s: Shown) -> Finding:
    """r: an answer's rewards sum to score - beta KL, gamma is 1."""
    expected = s["scores"] - s.fact("beta") * s.kl.sum(1)
    holds, why = s.equal("sums of rewards and score - beta KL", s.rewards.sum(1), expected)
    return holds and s.fact("gamma") == 1, f"{why}; gamma {s.fact('gamma')}"


def kl_weight(s: Shown) -> Finding:
    """s: beta is what it is said to be, fixed or adapted."""
    kl, paid = s.kl.sum(1), s["scores"] - s.rewards.sum(1)
    if np.abs(kl).max() < 1e-3:
        raise NotShown("the policy is still the reference")
    beta, target = s.fact("beta"), s.fact("kl_target")
    seen = float((paid @ kl) / (kl @ kl))
    after = beta * (1 + np.clip(kl.mean() / target - 1, -0.2, 0.2) * len(kl) / s.fact("kl_horizon")) if target else beta
    said = f"beta {beta:.4g}, {seen:.4g} in the rewards; {s.fact('beta_after'):.4g} afterwards, expected {after:.4g}"
    return bool(np.isclose(seen, beta, rtol=0.01) and np.isclose(s.fact("beta_after"), after, rtol=1e-6)), said


def warm_up(s: Shown) -> Finding:
    """t: in its warm-up the critic alone is trained."""
    policy, critic = (bool((s[name][0] != s[name][1]).any()) for name in ("policy_weights", "critic_weights"))
    until, iteration = s.fact("critic_warmup"), s.fact("iteration")
    if not until:
        raise NotShown("no warm-up was asked for")
    said = f"iteration {iteration} of a warm-up of {until}: policy {'moves' if policy else 'stays'}, critic "
    return critic and policy == (iteration >= until), said + ("moves" if critic else "stays")


def clipping(s: Shown) -> Finding:
    """u: scores and advantages are clipped where that is said, and nowhere else."""
    said = []
    for name, key in (("bounded", "score_clip"), ("advantages", "advantage_clip")):
        largest = np.abs(s[name][s.mask] if name == "advantages" else s[name]).max()
        if s.fact(key):
            said.append((largest <= s.fact(key) + s.tolerance, f"{name} up to {largest:.3g}, {key} {s.fact(key)}"))
    if s.fact("whiten") == "batch" and not s.fact("score_clip"):
        said.append(s.equal("scores and unclipped ones", s["bounded"], whiten(raw_scores(s))))
    if not s.fact("advantage_clip"):
        said.append(
            s.equal("advantages and unclipped ones", s["advantages"][s.mask], whiten(s["raw_advantages"][s.mask]))
        )
    return all(bool(holds) for holds, _ in said), "; ".join(why for _, why in said)


def adam(s: Shown) -> Finding:
    """v: Adam's epsilon is 1e-5."""
    eps, rate = s.fact("adam_eps"), s.dump.facts.get("lr")
    return bool(np.isclose(eps, 1e-5)), f"epsilon {eps:g}" + ("" if rate is None else f", rate {rate:g}")


def same_tokens(s: Shown) -> Finding:
    """w: what is trained on are the sampler's tokens, not their text encoded anew."""
    trained = s["tokens"][:, 1:][s.mask]
    if len(trained) != len(s["sampled"]):
        return False, f"{len(s['sampled'])} tokens were drawn, {len(trained)} are trained on"
    differ = int((trained != s["sampled"]).sum())
    return not differ, f"{differ} of {len(trained)} tokens differ"


def masked_numbers(s: Shown) -> Finding:
    """x: KL, entropy and clip fraction count actions alone."""
    seen, expected = [], []
    for update, passes in s.updates():
        members = np.concatenate(passes)
        ratio = ratios(s, members)
        seen += [s[f"update_{name}"][update] for name in ("clip_fraction", "approximate_kl", "entropy")]
        moved = (np.abs(ratio - 1) > s.fact("clip")).mean(), (ratio - 1 - np.log(ratio)).mean()
        expected += [*moved, s["pass_entropies"][members].mean()]
    return s.equal("logged numbers and means over actions", np.array(seen), np.array(expected))


def eos_counts(s: Shown) -> Finding:
    """y: an answer's EOS is an action."""
    ended = s["finished"].astype(bool)
    if not ended.any():
        raise NotShown("no answer ended")
    last = s["tokens"][np.arange(len(ended)), s.last + 1]
    wrong = int((last[ended] != s.fact("eos_id")).sum())
    return not wrong, f"the last action is EOS in {ended.sum() - wrong} of {ended.sum()} answers that ended"


def resumed(s: Shown) -> Finding:
    """z: a resumed run is the uninterrupted one, bit for bit."""
    if s.resumed is None:
        raise NotShown("give the resumed run's dump with --resumed")
    ours, theirs = ({name: x.tobytes() for name, x in dump.tensors.items()} for dump in (s.dump, s.resumed))
    differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return not differ, f"{', '.join(differ)} differ" if differ else f"all {len(ours)} tensors are equal"


CHECKS: dict[str, Callable[[Shown], Finding]] = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        (
            *(temperature, first_ratio, padding, pad_token, last_real_token, score_place, missing_eos, critic_start),
            *(head_start, unit_scores, score_whitening, advantage_whitening, gae, clipped_losses, token_weights),
            *(kl_estimator, sampler, reward_sums, kl_weight, warm_up, clipping, adam, same_tokens, masked_numbers),
            *(eos_counts, resumed),
        ),
        strict=True,
    )
)


def check(dump: Dump, tolerance: float = 1e-4, resumed: Dump | None = None) -> list[Verdict]:
    """The verdict on every detail. DataError where a tensor's shape does not fit the others'."""
    rollouts.check(dump)
    shown, verdicts = Shown(dump, tolerance, resumed), []
    for letter, work in CHECKS.items():
        title = (work.__doc__ or "").removeprefix(f"{letter}: ").removesuffix(".")
        try:
            holds, why = work(shown)
            verdicts.append(Verdict(letter, title, bool(holds), why))
        except NotShown as missing:
            verdicts.append(Verdict(letter, title, None, str(missing)))
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """A line a detail, and a count."""
    words = {True: "holds", False: "FAILS", None: "not shown"}
    lines = [f"{v.detail}  {words[v.holds]:9}  {v.title} ({v.why})" for v in verdicts]
    counts = ", ".join(f"{sum(v.holds is holds for v in verdicts)} {word.lower()}" for holds, word in words.items())
    return "\n".join([*lines, counts])


def run(cfg: ConformanceConfig) -> None:
    """Print the verdicts; the exit code is 1 where a detail fails."""
    other = rollouts.read(cfg.resumed) if cfg.resumed else None
    verdicts = check(rollouts.read(cfg.rollout), cfg.tolerance, other)
    if cfg.out:
        write_atomically(cfg.out, json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    print(table(verdicts))
    if any(verdict.holds is False for verdict in verdicts):
        raise SystemExit(1)
