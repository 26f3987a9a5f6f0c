"""How strongly a model looks back at an instruction of the first turn, by turn (paper 3.3, Figure 10).

Of every token of an answer: the largest weight, over layers, heads and the instruction's tokens, that its attention
gives the instruction; averaged over the answer's tokens, and over dialogs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from puna.data import packing
from puna.model.transformer import Transformer, TransformerBlock, rotate
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Message


def to_instruction(
    model: Transformer, tokenizer: Tokenizer, scripts: Sequence[dict[str, Any]], answers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The mean attention to the instruction, by turn, of scripts with their answers; a dialog ends at an answer ""."""
    turns: dict[int, list[float]] = defaultdict(list)
    for script, given in zip(scripts, answers, strict=True):
        dialog: list[Message] = []
        for i, (text, answer) in enumerate(zip(script["turns"], given, strict=True)):
            if not answer:
                break
            asked = f"{script['instruction']} {text}" if i == 0 else text
            dialog += [Message(role="user", content=asked), Message(role="assistant", content=answer)]
        if not dialog:
            continue
        tokens, mask = chat.encode(dialog, tokenizer)
        tokens, mask = tokens[: model.config.max_seq_len], mask[: model.config.max_seq_len]
        begin, end = span(tokenizer, script["instruction"], dialog[0])
        looks = strongest(model, torch.tensor([tokens]))[:, begin:end].amax(dim=1)  # (T,)
        for turn, positions in enumerate(runs(mask), start=1):
            turns[turn].append(float(looks[positions].mean()))
    return [{"turn": turn, "attention": sum(values) / len(values)} for turn, values in sorted(turns.items())]


def span(tokenizer: Tokenizer, instruction: str, first: Message) -> tuple[int, int]:
    """Where the instruction's tokens begin and end in the dialog whose first turn begins with it."""
    whole, alone, without = (
        chat.encode_prompt([Message(role="user", content=text)], tokenizer)
        for text in (first["content"], instruction, first["content"].removeprefix(instruction))
    )
    return packing.common(whole, without), packing.common(whole, alone)


def runs(mask: Sequence[bool]) -> list[list[int]]:
    """The positions of each unbroken run of True: of each answer."""
    found: list[list[int]] = []
    for i, counted in enumerate(mask):
        if counted and (i == 0 or not mask[i - 1]):
            found.append([])
        if counted:
            found[-1].append(i)
    return found


@torch.inference_mode()
def strongest(model: Transformer, tokens: Tensor) -> Tensor:
    """The largest weight over layers and heads with which each token looks at each, (T, T); tokens (1, T)."""
    table, x = model.rotary[: tokens.shape[1]], model.tok_embeddings(tokens)
    unseen = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).triu(1)
    most = torch.zeros(unseen.shape)
    for i, layer in enumerate(cast("Sequence[TransformerBlock]", model.layers)):
        attention, normed = layer.attention, layer.attention_norm(x)
        q, k = (
            rotate(projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2), table)
            for projection in (attention.wq, attention.wk)
        )
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (1, H, T, E)
        scores = (q @ k.transpose(-2, -1) * attention.head_dim**-0.5).masked_fill(unseen, -torch.inf)
        most = torch.maximum(most, scores.softmax(-1)[0].amax(dim=0))
        x = layer(x, table, None, None, i)
    return most
