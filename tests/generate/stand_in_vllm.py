"""A server that speaks vLLM's protocol over a LocalEngine: a field or a path that vLLM has not is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from puna.formats import huggingface
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling

FIELDS = (
    "model prompt n max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty "
    "seed stop stop_token_ids ignore_eos logprobs return_token_ids"
).split()


class StandIn:
    """What the server knows, and what it was asked: (path, body) each."""

    def __init__(self, engine: LocalEngine, card: dict[str, Any] | None = None) -> None:
        self.engine = engine
        self.card = {"id": "llama", "max_model_len": engine.context} if card is None else card
        self.asked: list[tuple[str, Any]] = []
        self.paused = False
        self.changes: dict[str, Any] = {}
        """written over every choice."""

    def get(self, path: str) -> tuple[int, Any]:
        return (200, {"object": "list", "data": [self.card]}) if path == "/v1/models" else (404, "Not Found")

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path == "/v1/completions":
            return self.complete(body)
        if path in ("/pause?mode=wait", "/resume"):
            self.paused = path != "/resume"
            return 200, {"status": "paused" if self.paused else "resumed"}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            assert self.paused, "answers under way"
            self.engine.update_weights(huggingface.load_model(Path(body["kwargs"]["weights_path"])))
            return 200, {"results": [None]}
        return (200, None) if path == "/reset_prefix_cache" else (404, "Not Found")

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = set(body) - set(FIELDS)
        if unknown or self.paused or body["model"] != self.card["id"]:
            return 400, {"error": {"message": f"{unknown or body['model']}"}}
        assert body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 1
        eos, *stops = body["stop_token_ids"]
        assert eos == self.engine.tokenizer.eos_id
        sampling = Sampling(
            body["temperature"],
            body["top_p"],
            max(body["top_k"], 0),
            body["min_p"],
            body["repetition_penalty"],
            seed=body["seed"],
            max_new_tokens=body["max_tokens"],
            stop=tuple(body["stop"]),
            stop_ids=tuple(stops),
        )
        [answers] = self.engine.complete([body["prompt"]], [sampling], n=body["n"])
        choices = [
            {
                "index": i,
                "text": answer.text,
                "token_ids": answer.tokens,
                "logprobs": {"token_logprobs": answer.logprobs},
                "finish_reason": "stop" if answer.finished else "length",
            }
            | self.changes
            for i, answer in enumerate(answers)
        ]
        return 200, {"choices": choices[::-1]}


@contextmanager
def serving(known: StandIn) -> Iterator[str]:
    """The server's address, while it runs in threads."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*known.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(*known.post(self.path, body))

        def answer(self, status: int, body: Any) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
