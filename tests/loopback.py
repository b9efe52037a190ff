"""An HTTP server on a loopback port that stands in for a vLLM server where faults have to be forced."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from minillm.models import servers as serving


class LoopbackServer(ABC):
    """Subclasses answer requests in `get` and `post`, by the handler's `say`."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.get(self)

            def do_POST(self) -> None:
                outer.post(self, json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}"))

            def say(self, status: int, body: Any, kind: str = "application/json") -> None:
                raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @abstractmethod
    def get(self, handler: Any) -> None:
        """Answer a GET request."""

    @abstractmethod
    def post(self, handler: Any, body: dict[str, Any]) -> None:
        """Answer a POST request with this body."""

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported by the tests that force faults, so that they do not wait for retries."""
    monkeypatch.setattr(serving, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(serving, "LONGEST_BACKOFF", 0.05)
