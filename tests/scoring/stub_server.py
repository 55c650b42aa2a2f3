"""An OpenAI-compatible server on the loopback interface that says what a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdefSECRET"


def completion(content: Any, prompt_tokens: int = 100, completion_tokens: int = 2, **choice: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"message": {"role": "assistant", "content": content}, **choice}], "usage": usage}


class Stub:
    """The server's record and what it answers.

    Attributes:
        respond: (request, number of the request from 0) -> a completion, or (status, headers, body).
        requests: Every request's path, headers, body and time, in order of arrival.
        most: The most requests that were in work at the same time.
    """

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any], int], Any] = lambda request, number: completion("3")
        self.requests: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.url = ""

    def text(self, number: int) -> str:
        """The text of a request's first message."""
        return next(p["text"] for p in self.requests[number]["body"]["messages"][0]["content"] if p["type"] == "text")


@contextmanager
def stub_server() -> Iterator[Stub]:
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                number = len(stub.requests)
                record = {"path": self.path, "headers": dict(self.headers), "body": body, "time": time.monotonic()}
                stub.requests.append(record)
                stub.now += 1
                stub.most = max(stub.most, stub.now)
            try:
                answer = stub.respond(body, number)
            finally:
                with stub.lock:
                    stub.now -= 1
            status, headers, data = answer if isinstance(answer, tuple) else (200, {}, answer)
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
