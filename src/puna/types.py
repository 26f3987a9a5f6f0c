"""The words everything else speaks: a message, a dialog, a preference, a completion, a rollout.

Plug points are type aliases, not base classes: anything that can be called this way fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, Unpack

if TYPE_CHECKING:
    from torch import Tensor, nn

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn's text and who says it."""

    role: Role
    content: str


Dialog = list[Message]

Grade = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
GRADES: tuple[Grade, ...] = ("significantly_better", "better", "slightly_better", "negligibly_better")

SafetyLabel = Literal["chosen_safe_rejected_unsafe", "both_safe", "both_unsafe"]

Domain = Literal["helpfulness", "safety"]


@dataclass(frozen=True)
class Preference:
    """One comparison (paper 3.2.1): two answers to one prompt, the preferred one first.

    `margin` stands in where there is no grade (a numeric column, as TRL reads it). The safety flags are None
    where nobody labelled them.
    """

    prompt: Dialog
    chosen: str
    rejected: str
    grade: Grade | None = None
    margin: float | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None
    domain: Domain = "helpfulness"
    batch: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def safety_label(self) -> SafetyLabel | None:
        """The paper's three buckets (3.2.1); None without labels or where the chosen one alone is unsafe."""
        match self.chosen_is_safe, self.rejected_is_safe:
            case True, False:
                return "chosen_safe_rejected_unsafe"
            case True, True:
                return "both_safe"
            case False, False:
                return "both_unsafe"
        return None


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `logprobs` are those of `tokens` under the distribution they were drawn from (temperature applied). `finished` says
    that the answer ended by itself, not at a limit: then `tokens` ends with EOS or a stop sequence, which `text` leaves
    out.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Rollout(NamedTuple):
    """What PPO learns from. B answers, right-padded to T tokens of prompt + answer.

    Entry t of every (B, T - 1) field speaks of the step that emits token t + 1.
    """

    tokens: Tensor  # (B, T) int64
    action_mask: Tensor  # (B, T - 1) bool: True where the emitted token belongs to the answer (EOS included)
    logprobs: Tensor  # (B, T - 1) log pi_old of the emitted token, trainer's numbers; 0 where it is no action
    reference_logprobs: Tensor  # (B, T - 1)
    values: Tensor  # (B, T - 1)
    scores: Tensor  # (B,) whitened logit of the combined reward
    finished: Tensor  # (B,) bool: the answer ended with EOS


ChatFormat = Literal["llama2", "chatml"]

LossOn = Literal["every_answer", "last_answer"]
"""Which answers of a dialog a loss counts."""


class Tokenizer(Protocol):
    """What the rest of Puna asks of a tokenizer."""

    vocab_size: int
    bos_id: int
    """Opens a document; in a ChatML vocabulary the id of <|im_start|>, which opens a turn."""
    eos_id: int
    """Ends a document or an answer; in a ChatML vocabulary the id of <|im_end|>."""
    pad_id: int
    """Fills up rows. It is not EOS where the vocabulary has any other id to give, and no text encodes to it."""
    chat_format: ChatFormat
    sha256: str
    """Of the serialized file: two tokenizers are the same when these are."""

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: never a control id, no BOS or EOS added. DataError where it is not valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids are skipped."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder."""
        ...


class SamplingSettings(TypedDict, total=False):
    """How answers are drawn, beside their temperature, and where they end: as `puna.generate.sampling.Sampling`."""

    max_new_tokens: int
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


class Engine(Protocol):
    """Generates answers: in this process (puna.generate.engine) or on a vLLM server (puna.generate.vllm)."""

    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        ...

    def generate(
        self,
        dialogs: Sequence[Dialog],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """n completions for each dialog (whose last message is the user's), in order."""
        ...

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        first: int = 0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """The same of prompts of token ids.

        `first` is the place of the first prompt, where the list is part of a longer one: draws depend on the place.
        """
        ...

    def update_weights(self, model: nn.Module) -> None:
        """From now on generate with these weights."""
        ...


@dataclass(frozen=True)
class Judgement:
    """A person's (or a simulated person's) verdict on two answers."""

    chosen: Literal[0, 1]
    grade: Grade
    is_safe: tuple[bool, bool]


Reward = Callable[[Sequence[Dialog]], "Tensor"]  # dialogs ending with an answer -> scores in (0, 1), (N,)
Annotator = Callable[[dict[str, Any], str, str], Judgement]  # prompt record, answer 0, answer 1
Reader = Callable[[Path], Iterator[Any]]  # a file of one format -> dialogs or preferences
