"""A server with OpenAI's chat interface whose answers depend on their question alone, and which fails as it is told."""

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import xxhash

FAILURES = ("500", "429", "garbage", "half", "shape", "nothing", "close")
"""What a server may do instead of answering; `nothing` is longer than anybody waits."""


def caption(key: str) -> str:
    """What the teacher says of a picture, by the hash of its bytes: words that few pictures share."""
    return "a wall of the shade " + " ".join(f"{key[place : place + 3]}" for place in range(0, 18, 3))


class TeacherServer(ThreadingHTTPServer):
    """Counts what it is asked; `behave` is told how many requests came before, and how often this one did."""

    daemon_threads = True

    def __init__(self, behave: Callable[[int, int], str] = lambda number, again: "ok", seconds: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.seconds = behave, seconds
        self.answer: Callable[[str, dict[str, Any]], str] = lambda key, body: caption(key)
        self.finish = "stop"
        self.asked: list[str] = []
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy, self.most_busy = 0, 0
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        key = xxhash.xxh3_128_hexdigest(base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2]))
        name = f"{key} {body['seed']} {parts[1]['text']}"
        server = self.server
        with server.guard:
            doing = server.behave(len(server.asked), server.asked.count(name))
            server.asked.append(name)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            time.sleep(server.seconds)
            self._do(doing, key, name, body)
        finally:
            with server.guard:
                server.busy -= 1

    def _do(self, doing: str, key: str, name: str, body: dict) -> None:
        message = {"role": "assistant", "content": self.server.answer(key, body)}
        whole = {
            "choices": [{"index": 0, "message": message, "finish_reason": self.server.finish}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 7},
        }
        if doing == "ok":
            self._reply(200, json.dumps(whole).encode())
            with self.server.guard:
                self.server.answered[name] += 1
        elif doing == "garbage":
            self._reply(200, b"<html>Bad gateway</html>")
        elif doing == "half":
            self._reply(200, json.dumps(whole).encode()[:40])
        elif doing == "shape":
            self._reply(200, b'{"choices": []}')
        elif doing == "nothing":
            time.sleep(30)
        elif doing == "close":
            self.close_connection = True
        elif doing == "429":
            self._reply(429, b"{}", {"Retry-After": "1"})
        else:
            self._reply(int(doing), b'{"error": "no such model"}')

    def _reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def teach(behave: Callable[[int, int], str] = lambda number, again: "ok", seconds: float = 0.0):
    """Runs a server on a free port of the loopback interface."""
    server = TeacherServer(behave, seconds)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
