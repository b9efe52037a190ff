"""Requests to `vllm serve` processes: load balancing and retries. `minillm.models.completions` validates the answers.

A request goes to the server with the fewest requests in flight. A server that is unreachable, overloaded or returns an
invalid answer is left alone for a while and then tried again. A failed request is repeated unchanged, seed included, so
that no response is sampled twice. `VLLM_API_KEY`, where it is set, is sent with every request.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import httpx

from minillm.errors import EngineError, MinillmError
from minillm.terminal import RESPONSES, Progress

# Settings of every completion: token ids as numbers, and none of the sampling settings of the served folder.
PLAIN: dict[str, Any] = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 10.0  # seconds before the first retry of a request, and the most between two
_COMPLETIONS, _PATIENCE = "/v1/completions", "rollout.server_patience"
_CONNECT_TIMEOUT = 5.0  # seconds
T = TypeVar("T")


class TransientServerError(Exception):
    """A server failed in a way that may pass. Raised and caught within minillm; a retry follows."""


class Server:
    """One server: its address, the model that it serves, and its current state.

    Attributes:
        url: `http://host:port`, without `/v1`.
        model: Name of the served model, once `attach` was called.
        in_flight: Number of requests that wait for an answer.
        has_current_weights: Whether the server needs no new weights before the next request.
        started_at: Start time of the process that received the current weights, in seconds since 1970, where known.
        healthy: Whether its last request succeeded.
        last_error: Why its last failed request failed.
        backoff: Seconds to leave the server alone after its next failure.
        retry_at: Time (`time.monotonic`) at which an unhealthy server is tried again.
        lock: Held while the server receives weights.
    """

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self.in_flight = 0
        self.has_current_weights = True
        self.started_at: float | None = None
        self.healthy = True
        self.last_error: TransientServerError | None = None
        self.backoff, self.retry_at = FIRST_BACKOFF, 0.0
        self.lock = threading.Lock()
        self._client = client

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one request and return the JSON of the answer, its bytes if it is binary, or None if it is empty.

        Raises:
            TransientServerError: The request failed in a way that another try may mend.
            EngineError: The server refuses the request.
        """
        answer = self._request(method, path, body)
        if answer.status_code >= 400:
            raise EngineError(
                f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}{_hint(path, answer.status_code)}"
            )
        if answer.headers.get("content-type") == "application/octet-stream":
            return answer.content
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise TransientServerError(f"{path} answered no JSON: {answer.text[:80]!r}") from error

    def process_start_time(self) -> float | None:
        """Return when the server's process started, in seconds since 1970; None with several API processes.

        Raises:
            TransientServerError: The server does not answer.
        """
        found = re.search(r"^process_start_time_seconds (\S+)", self._request("GET", "/metrics").text, re.MULTILINE)
        return float(found[1]) if found else None

    def has_route(self, path: str) -> bool:
        """Return whether the server knows a path, for whatever method. Raises a TransientServerError, as `ask` does."""
        return self._request("GET", path).status_code != 404

    def complete(self, body: dict[str, Any], read: Callable[[Any], T], path: str = _COMPLETIONS) -> T:
        """Request one completion, or what the server computes at another path.

        Args:
            body: The request, without the model.
            read: Converts what `ask` returns to the result, and raises where the answer is not valid.
            path: Where the request is sent.

        Raises:
            TransientServerError, EngineError: As in `ask`; also where `read` cannot read the answer.
        """
        answer = self.ask("POST", path, body | {"model": self.model})
        try:
            return read(answer)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise TransientServerError(f"{path} answered bad JSON ({fault})") from error

    def attach(self, max_length: int) -> None:
        """Find out which model is served.

        Raises:
            EngineError: The server does not accept sequences of `max_length` tokens.
        """
        [model, *_] = self.ask("GET", "/v1/models")["data"]
        self.model = model["id"]
        if model.get("max_model_len", max_length) < max_length:
            raise EngineError(
                f"{self.url} serves {model['max_model_len']} tokens; prompt and response need {max_length}: start it "
                f"with --max-model-len {max_length}"
            )

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._client.request(method, self.url + path, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise EngineError(f"{self.url} must be a server's address: use http://host:port ({error})") from error
        except httpx.RequestError as error:
            raise TransientServerError(f"{type(error).__name__}: {error}") from error
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise TransientServerError(f"{path} answered {answer.status_code}: {answer.text[:200]}")
        return answer


def _hint(path: str, status: int) -> str:
    if status == 401:
        return " (set VLLM_API_KEY to the server's key)"
    if status == 404 and path.startswith(("/collective_rpc", "/reset_prefix_cache")):
        return " (start the server with VLLM_SERVER_DEV_MODE=1, so that it takes new weights)"
    return ""


class Servers:
    """Several servers that are used as one.

    Args:
        urls: `http://host:port` of each server.
        refresh: Sends a server the current weights, or checks them. Called before a request to one that may lack them.
        patience: Seconds for which failing requests are retried (`rollout.server_patience`).
        timeout: Seconds that one request may take.
        concurrency: Requests in flight per server, at most.
        path: Where the servers take the requests.
        exit_reason: Returns why retrying is pointless, or None while it is not.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        refresh: Callable[[Server], None] | None = None,
        patience: float = 600.0,
        timeout: float = 300.0,
        concurrency: int = 64,
        path: str = _COMPLETIONS,
        exit_reason: Callable[[], str | None] | None = None,
    ) -> None:
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency * len(urls)),
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self.each = [Server(url, self._client) for url in urls]
        self._refresh, self._patience, self._path, self._exit_reason = refresh, patience, path, exit_reason
        self._pool = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="vllm")
        self._selection_lock = threading.Lock()
        self._closed = False

    def complete_all(
        self, requests: Sequence[tuple[dict[str, Any], Callable[[Any], T]]], progress: bool = False
    ) -> list[T]:
        """Request several completions, all from processes that have the current weights.

        A server may have been restarted between two requests, with other weights, without failing a request. The
        requests that it answered are then repeated.

        Args:
            requests: For each completion, the arguments of `complete`.
            progress: Whether to show a progress bar.

        Returns: The completions, in the order of the requests.

        Raises:
            EngineError: No server answered within `patience` seconds, a server refuses a request, or another process
                answers at an address every time.
        """
        completed: dict[int, T] = {}
        deadline = math.inf  # counts from the first restart: before it, the requests may take any time
        while missing := [i for i in range(len(requests)) if i not in completed]:
            answers = self.all([lambda request=requests[i]: self._complete(*request) for i in missing], progress)
            used = {server.url: server for _, server, _ in answers}
            replaced = {url for url, server in used.items() if self._was_restarted(server)}
            completed |= {
                i: answer
                for i, (answer, server, started_at) in zip(missing, answers, strict=True)
                if server.url not in replaced and started_at == server.started_at
            }
            if replaced and time.monotonic() > deadline:
                raise EngineError(
                    f"{', '.join(sorted(replaced))}: the answers came from changing processes (by their start time in "
                    f"/metrics) for {self._patience:g} s ({_PATIENCE}); an address must be one server, not several "
                    "behind a balancer"
                )
            if replaced:
                deadline = min(deadline, time.monotonic() + self._patience)
        return [completed[i] for i in range(len(requests))]

    def call_with_retries(self, action: Callable[[], None], server: Server) -> None:
        """Call `action`, which uses `server`, and retry it while it raises a `TransientServerError`.

        Raises:
            EngineError: It did not succeed within `patience` seconds, or the server is not a vLLM server.
        """
        deadline, backoff = time.monotonic() + self._patience, FIRST_BACKOFF
        while True:
            try:
                return action()
            except TransientServerError as error:
                self._wait(backoff, deadline, server, error)
                backoff = min(2 * backoff, LONGEST_BACKOFF)
            except MinillmError:
                raise
            except (KeyError, TypeError, ValueError) as error:
                raise EngineError(
                    f"{server.url} does not answer as a vLLM server does ({type(error).__name__}: {error})"
                ) from error

    def all(self, actions: Sequence[Callable[[], T]], progress: bool | str = False) -> list[T]:
        """Call functions concurrently and return their results in order; the first exception cancels the others.

        Args:
            actions: The functions.
            progress: Whether to show the progress, or what to call it.
        """
        futures = [self._pool.submit(action) for action in actions]
        doing = progress if isinstance(progress, str) else ""
        try:
            with Progress(len(futures), RESPONSES, doing, hidden=not progress) as shown:
                for future in as_completed(futures):
                    future.result()
                    shown.update()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def close(self) -> None:
        """Close the connections; the servers keep running."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _was_restarted(self, server: Server) -> bool:
        """Whether the process that answers is not the one that received the weights; then mark that it needs them."""
        try:
            same = server.started_at is None or server.process_start_time() == server.started_at
        except TransientServerError:
            same = False  # unreachable by now; which process gave its last answers cannot be determined
        if not same:
            server.has_current_weights = False
        return not same

    def _complete(self, body: dict[str, Any], read: Callable[[Any], T]) -> tuple[T, Server, float | None]:
        """Return a completion, the server that gave it, and the start time of the process that should have given it."""
        deadline = time.monotonic() + self._patience
        while True:
            server = self._select(deadline)
            try:
                # Read before `has_current_weights`: while another thread sends weights to a new process, `started_at`
                # is already that process's start time, but it does not have the weights yet.
                started_at = server.started_at
                if not server.has_current_weights and self._refresh is not None:
                    self._refresh(server)
                    started_at = server.started_at
                answer = server.complete(body, read, self._path)
                server.healthy, server.backoff = True, FIRST_BACKOFF
                return answer, server, started_at
            except TransientServerError as error:
                server.last_error, server.healthy = error, False
                # A process that is still the same has the weights; sending them again would disturb its other requests.
                if self._refresh is not None and (server.started_at is None or self._was_restarted(server)):
                    server.has_current_weights = False
                server.retry_at = time.monotonic() + server.backoff
                server.backoff = min(2 * server.backoff, LONGEST_BACKOFF)
            finally:
                with self._selection_lock:
                    server.in_flight -= 1

    def _select(self, deadline: float) -> Server:
        """Return the server for the next request, and count the request as in flight.

        An unhealthy server whose backoff is over gets a single request, which shows whether it has recovered. Otherwise
        the healthy server with the fewest requests in flight is selected.
        """
        while True:
            with self._selection_lock:
                now = time.monotonic()
                recovering = next((s for s in self.each if not s.healthy and now >= s.retry_at), None)
                if recovering is not None:
                    recovering.retry_at = now + LONGEST_BACKOFF
                healthy = [server for server in self.each if server.healthy]
                selected = recovering or min(healthy, key=lambda server: server.in_flight, default=None)
                if selected is not None:
                    selected.in_flight += 1
                    return selected
                soonest = min(self.each, key=lambda server: server.retry_at)
            # Wait no longer than the first backoff: as soon as any request finds the server healthy, the others go on.
            self._wait(FIRST_BACKOFF, deadline, soonest, soonest.last_error)

    def _wait(self, seconds: float, deadline: float, server: Server, error: TransientServerError | None) -> None:
        """Sleep for `seconds`, but at most until the deadline; raise where waiting any longer is pointless."""
        if self._exit_reason is not None and (reason := self._exit_reason()) is not None:
            raise EngineError(f"{server.url}: {reason}") from error
        if self._closed or time.monotonic() >= deadline:
            raise EngineError(f"{server.url}: {error}; tried for {self._patience:g} s ({_PATIENCE})") from error
        time.sleep(max(min(seconds, deadline - time.monotonic()), 0.0))
