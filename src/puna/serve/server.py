"""`puna serve CHECKPOINT`: a model behind OpenAI's API, with a web chat at `/`.

1. Open the models, each with an engine of its own, and the reward models.
2. Serve; a request passes the guard (puna.serve.guard) and is let in or refused before any work.
3. SIGTERM or Ctrl-C: refuse what is new, finish what runs, at most `drain_seconds` long; a second signal stops at once.
4. An engine that dies ends its answers with an error; the server drains as in 3, and fails for a supervisor to see.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from puna import api, config
from puna.api import Chat, RewardScorer
from puna.config import ConfigError
from puna.types import Reward

if TYPE_CHECKING:
    from puna.model.transformer import Transformer
    from puna.serve.answers import Served

log = logging.getLogger("puna.serve")

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig:
    """`puna serve`: which models, where, for whom, and how much at once."""

    checkpoint: Path
    """a run folder, a model folder or a .gguf file; clients name it by its last part."""
    also: tuple[Path, ...] = ()
    """more models, to choose from and to compare side by side."""
    reward_helpfulness: Path | None = None
    """a reward model: /v1/score, and a score beside each answer in the web chat."""
    reward_safety: Path | None = None
    """the same for safety."""
    weights: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """how the models are held: the smaller, the faster and the less exact."""
    host: str = "127.0.0.1"
    """this machine alone; 0.0.0.0 listens to the network."""
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    """names in the Host header that are answered; on loopback those of loopback, elsewhere any, where none is given."""
    api_keys: Path | None = None
    """a file with the sha256 of a key a line; PUNA_API_KEYS may hold keys too. Without either, no key is asked for."""
    max_concurrent: int = 64
    """answers of a model that are drawn at once."""
    max_queue: int = 256
    """answers of a model that may wait beside those; more are refused with 429."""
    cache_tokens: int = 0
    """tokens that a model's cache of keys and values holds; where running answers fill it, the newest ones wait and are
    begun again. 0: as many as `max_concurrent` answers can have; where memory does not hold so many it must be set."""
    max_body_bytes: int = 1_000_000
    """a request's size at most."""
    drain_seconds: float = 30.0
    """time for running answers after SIGTERM."""
    log_prompts: bool = False
    """write prompts into the log, which otherwise holds none of their text."""

    def __post_init__(self) -> None:
        config.positive(self, "max_concurrent", "max_body_bytes")
        for key in ("max_queue", "cache_tokens", "drain_seconds", "port"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} is {getattr(self, key)}: it must not be negative")
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}: it must be at most 65535")


def run(cfg: ServeConfig) -> None:
    """Serve until a signal comes. Raises RuntimeError where an engine dies."""
    import uvicorn

    from puna.serve.app import State, make_app
    from puna.serve.connections import Connection
    from puna.serve.guard import JSONLines, Rules, read_keys

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    threading.excepthook = lambda died: log.error("thread died", exc_info=died.exc_value, extra={"note": {}})
    keys = read_keys(cfg.api_keys)
    listening = listen(cfg.host, cfg.port)
    state = State(open_models(cfg), open_rewards(cfg), cfg.log_prompts)
    rules = Rules(keys, hosts_of(cfg), cfg.max_body_bytes, lambda: state.draining)
    if not keys and not is_loopback(cfg.host):
        log.warning("anybody who reaches this address can use the model: see --api-keys", extra={"note": {}})

    class Server(uvicorn.Server):
        """Drains before it stops: it listens on, so that what is new hears 503 and not a closed door."""

        deadline = math.inf
        dead: Sequence[str] = ()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.should_exit = self.force_exit = state.draining
            state.draining = True

        async def on_tick(self, counter: int) -> bool:
            if not state.draining and (dead := state.dead):
                log.error("engine dead", extra={"note": {"models": dead}})
                self.dead, state.draining = dead, True
            if state.draining and self.deadline == math.inf:
                self.deadline = time.monotonic() + cfg.drain_seconds
                log.info("draining", extra={"note": {"samples": state.samples}})
            if state.draining and (not state.busy or time.monotonic() > self.deadline):
                for model in state.models.values():  # what still runs ends with an error that its client can read
                    await asyncio.to_thread(model.engine.close)
                return True
            return await super().on_tick(counter)

    settings = uvicorn.Config(
        make_app(state, rules),
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    host, port = listening.getsockname()[:2]
    log.info("serving", extra={"note": {"host": host, "port": port, "models": list(state.models)}})
    server = Server(settings)
    gc.collect()
    gc.freeze()  # what is here stays: a full collection would look at all of it, and hold up everybody for 170 ms
    server.run([listening])
    if server.dead:
        raise RuntimeError(f"the engine of {', '.join(map(repr, server.dead))} has died: its error is in the log")


def listen(host: str, port: int) -> socket.socket:
    """The address, taken before the models are read, which may last; who comes meanwhile waits."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once on these alone
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen()  # until then another server could bind it as well
    except OSError as error:
        taken.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; see --host and --port") from None
    return taken


def open_models(cfg: ServeConfig) -> Mapping[str, Served]:
    """Every model with its engine, by name."""
    from puna import kernels
    from puna.generate.live import LiveEngine
    from puna.serve.answers import Served

    chats: dict[str, Chat] = {}
    for path in (cfg.checkpoint, *cfg.also):
        name, loaded = name_of(path), api.load(path, weights=cfg.weights)
        if not isinstance(loaded, Chat):
            raise ConfigError(f"{path} is a reward model, which gives scores: serve it with --reward-helpfulness")
        if name in chats:
            raise ConfigError(f"{path}: two models would be called {name!r}: link or rename one folder")
        chats[name] = loaded
    kernels.library()  # compiles once a machine, before anybody waits for an answer
    limit = cfg.max_concurrent + cfg.max_queue
    served = {}
    for name, chat in chats.items():
        engine = LiveEngine(
            chat.engine.model,
            chat.tokenizer,
            max_batch_size=cfg.max_concurrent,
            cache_tokens=cfg.cache_tokens or None,
        )
        served[name] = Served(name, engine, limit)
    check_memory(served, [chat.engine.model for chat in chats.values()])
    return served


def check_memory(served: Mapping[str, Served], models: Sequence[Transformer]) -> None:
    """ConfigError, and the engines' end, where full caches are more than the memory of the models' device."""
    from puna import parallel
    from puna.model.sizes import cache_bytes

    each = [cache_bytes(model.config, model.tok_embeddings.weight.dtype) for model in models]
    full = sum(n * model.engine.stats().capacity_tokens for n, model in zip(each, served.values(), strict=True))
    if full > (memory := parallel.memory_of(models[0].tok_embeddings.weight.device)):
        for model in served.values():
            model.engine.close()
        raise ConfigError(
            f"the cache of keys and values may grow to {full / 2**30:.1f} GiB, there are {memory / 2**30:.1f}: "
            f"set --cache-tokens (a token takes {sum(each) / 2**10:.0f} KiB), or a smaller --max-concurrent"
        )


def open_rewards(cfg: ServeConfig) -> Mapping[str, Reward]:
    """The reward models that are named."""
    rewards: dict[str, Reward] = {}
    for domain, path in (("helpfulness", cfg.reward_helpfulness), ("safety", cfg.reward_safety)):
        if path is not None:
            loaded = api.load(path)
            if not isinstance(loaded, RewardScorer):
                raise ConfigError(f"{path} is a chat model: name a reward model")
            rewards[domain] = loaded.score
    return rewards


def name_of(path: Path) -> str:
    """What clients call a model: the last part of its path that says something."""
    whole = path.absolute()
    if whole.is_file():
        return whole.stem
    parts = [part for part in whole.parts if part != "model"]
    return parts[-1] if len(parts) > 1 else "puna"


def hosts_of(cfg: ServeConfig) -> tuple[str, ...]:
    """Names in the Host header that are answered, in small letters; none where every name is."""
    ours = (*LOOPBACK, cfg.host) if is_loopback(cfg.host) else ()
    return tuple(name.lower() for name in cfg.allowed_hosts or ours)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
