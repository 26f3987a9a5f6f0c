"""An engine on a vLLM server: token ids in and out over its HTTP API, for sampling on GPUs at scale.

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs

1. A prompt is a request to /v1/completions, many at a time; the server batches them as it likes.
2. New weights are a Hugging Face folder, which the server must see at the same path: /pause until no answer is under
   way, /collective_rpc reload_weights, /reset_prefix_cache, /resume. These four answer in development mode alone, and
   to anybody: the server's address must be one that only the run's machines reach.

Log-probabilities are those of the server's mode: "processed" ones have the temperature applied, as `Completion` wants
them, and are renormalised where a cut is made, as ours are not; vLLM's default has no temperature. Of the cuts vLLM
makes min-p's first.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from puna import parallel
from puna.config import ConfigError
from puna.formats import huggingface
from puna.generate.sampling import Sampling, one_each
from puna.generate.sequence import TextStream, room
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Dialog, SamplingSettings

AT_ONCE = 256
"""Prompts under way; vLLM's own batch is as large by default."""

SECONDS = 3600.0
"""An answer may take, its wait in the server's queue included."""


class VLLMEngine:
    """Generates on the vLLM server at `url`, which serves the model that `tokenizer` belongs to.

    `weights` is where `update_weights` writes its folder, matrices in `dtype` or as the model has them. Draws depend on
    (seed, the prompt's place in the list, the sample's number), but vLLM does not promise the same logits in another
    batch. VLLM_API_KEY is sent where it is set.
    Raises ConfigError where no such server answers.
    """

    def __init__(
        self, url: str, tokenizer: Tokenizer, weights: Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer = tokenizer
        self.weights, self.dtype = weights, dtype
        card = (self._ask("/v1/models").get("data") or [{}])[0]
        if "max_model_len" not in card:
            raise ConfigError(f"{self.url} does not say its model's max_model_len: it is no vLLM server")
        self._name, self._context = str(card["id"]), int(card["max_model_len"])

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    def generate(
        self,
        dialogs: Sequence[Dialog],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """As `LocalEngine.generate`."""
        prompts = [chat.encode_prompt(dialog, self.tokenizer) for dialog in dialogs]
        answers = self.generate_ids(prompts, n=n, temperature=temperature, **settings)
        return [[Completion(a.text.strip(), a.tokens, a.logprobs, a.finished) for a in row] for row in answers]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        first: int = 0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """As `LocalEngine.generate_ids`; ConfigError also where the server refuses, OSError where it fails."""
        samplings = one_each(temperature, len(prompts), **settings)
        if n < 1:
            raise ConfigError(f"n is {n}: it must be at least 1")
        bodies = [
            self._request(list(prompt), sampling, n, room(prompt, self.context, f"prompt {i}"), i)
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True), start=first)
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._complete, bodies))

    def update_weights(self, model: nn.Module) -> None:
        """Write the model's folder and have the server load it. All ranks call this; of all, one speaks."""
        assert isinstance(model, Transformer), f"not a Transformer: {type(model).__name__}"
        assert self.weights is not None, "no folder for new weights"
        huggingface.save_model(model, self.tokenizer, self.weights, dtype=self.dtype)
        if parallel.is_main():
            self.load(self.weights)
        parallel.barrier()

    def load(self, folder: Path) -> None:
        """Have the server go on with the weights of a Hugging Face folder, once its answers under way have ended.

        Where that fails it stays paused: its weights may be of two models.
        """
        self._ask("/pause?mode=wait", {})
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
        self._ask("/collective_rpc", reload)
        self._ask("/reset_prefix_cache", {})
        self._ask("/resume", {})

    def _request(self, prompt: list[int], sampling: Sampling, n: int, most: int, place: int) -> dict[str, Any]:
        """A request's body. What it leaves out would be the server's own default, which its model's folder may set."""
        return {
            "model": self._name,
            "prompt": prompt,
            "n": n,
            "max_tokens": min(most, sampling.max_new_tokens),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request_seed(sampling.seed, place),
            "stop": list(sampling.stop),
            "stop_token_ids": [self.tokenizer.eos_id, *sampling.stop_ids],
            "ignore_eos": True,  # EOS is ours, whatever the server's model calls so
            "logprobs": 1,
            "return_token_ids": True,
        }

    def _complete(self, body: dict[str, Any]) -> list[Completion]:
        """A request's answers, in order."""
        choices = sorted(self._ask("/v1/completions", body)["choices"], key=lambda choice: int(choice["index"]))
        return [self._completion(choice, body) for choice in choices]

    def _completion(self, choice: dict[str, Any], body: dict[str, Any]) -> Completion:
        if choice.get("token_ids") is None:
            raise ConfigError(f"{self.url} gives no token ids: a vLLM that knows return_token_ids is needed")
        if choice["finish_reason"] not in ("stop", "length"):
            raise OSError(f"{self.url} cut an answer off: {choice['finish_reason']}")
        tokens, finished = list(choice["token_ids"]), choice["finish_reason"] == "stop"
        said = tokens[:-1] if finished and tokens[-1] in body["stop_token_ids"] else tokens
        text = TextStream(self.tokenizer.decode, body["stop"]).push(said, last=True)
        return Completion(text, tokens, list(choice["logprobs"]["token_logprobs"]), finished)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer to a POST of this body, or to a GET without one; {} where it says nothing."""
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                found = json.loads(response.read() or b"{}")
        except http.client.InvalidURL as error:
            raise ConfigError(f"{self.url}{path} is no vLLM server's address: {error}") from None
        except http.client.HTTPException as error:
            raise OSError(f"{self.url}{path} broke off: {error!r}") from None
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            if error.code >= 500:
                raise OSError(f"{self.url}{path} failed: {error.code} {said}") from None
            hint = "; is VLLM_SERVER_DEV_MODE=1 set?" if error.code == 404 else ""
            raise ConfigError(f"{self.url}{path} refused: {error.code} {said}{hint}") from None
        except urllib.error.URLError as error:
            raise ConfigError(f"no vLLM server answers at {self.url}: {error.reason}") from None
        except ValueError as error:  # of the address or of the answer
            raise ConfigError(f"{self.url}{path} is no vLLM server's address: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{self.url}{path} is no vLLM server's address: it answers a {type(found).__name__}")
        return found


def request_seed(seed: int, place: int) -> int:
    """A request's seed, 62 bits. vLLM adds a sample's number to it: neighbouring places must lie far apart."""
    return int(np.random.SeedSequence([seed % 2**64, place]).generate_state(1, np.uint64)[0] >> np.uint64(2))
