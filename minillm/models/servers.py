"""Requests to stock `vllm serve` processes: spread over them, tried again, and refused where the answer is none.

A request goes to whichever server has the fewest. A server that is gone, slow or talks nonsense is left alone for a
while and tried again. Nothing is drawn twice: a request that failed is asked again as it was, its seed included.
`VLLM_API_KEY`, where it is set, is sent along.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from tqdm.auto import tqdm

from minillm.data.logprobs import LOG_ZERO
from minillm.errors import EngineError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
T = TypeVar("T")


class TransientServerError(Exception):
    """A server failed in a way that may pass."""


class Server:
    """One address, what it serves, and how it is doing."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self.busy = 0
        self.has_current_weights = True  # nothing has to be sent before it is asked
        self.started_at: float | None = None  # when the process that was made fresh had started, where that can be told
        self.healthy = True  # its last answer was one
        self.trouble: TransientServerError | None = None
        self.pause, self.retry_at = _FIRST_PAUSE, 0.0
        self.lock = threading.Lock()
        self._client = client

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON. Raises TransientServerError where another try may help, else EngineError."""
        answer = self._request(method, path, body)
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise TransientServerError(f"{path} answered {answer.status_code}: {answer.text[:200]}")
        if answer.status_code >= 400:
            raise EngineError(
                f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}{_hint(path, answer.status_code)}"
            )
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise TransientServerError(f"{path} answered no JSON: {answer.text[:80]!r}") from error

    def started(self) -> float | None:
        """When its process started, in seconds since 1970; None where its metrics do not say (several front ends).

        Raises:
            TransientServerError: it does not answer.
        """
        answer = self._request("GET", "/metrics")
        if answer.status_code >= 500:
            raise TransientServerError(f"/metrics answered {answer.status_code}: {answer.text[:200]}")
        found = re.search(r"^process_start_time_seconds (\S+)", answer.text, re.MULTILINE)
        return float(found[1]) if found else None

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._client.request(method, self.url + path, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise EngineError(f"{self.url} is no address of a server: http://host:port ({error})") from error
        except httpx.RequestError as error:
            raise TransientServerError(f"{type(error).__name__}: {error}") from error

    def complete(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """A completion; TransientServerError where `read` can make nothing of the answer."""
        answer = self.ask("POST", "/v1/completions", body | {"model": self.model})
        try:
            return read(answer)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise TransientServerError(f"/v1/completions answered garbage ({type(error).__name__}: {error})") from error

    def attach(self, max_length: int) -> None:
        """Learn what is served.

        Raises:
            EngineError: it does not take sequences of `max_length` tokens.
        """
        [model, *_] = self.ask("GET", "/v1/models")["data"]
        self.model = model["id"]
        if model.get("max_model_len", max_length) < max_length:
            raise EngineError(
                f"{self.url} serves {model['max_model_len']} tokens; prompt and response need {max_length}: --max-model-len"
            )


def _hint(path: str, status: int) -> str:
    if status == 401:
        return " (set VLLM_API_KEY to the server's key)"
    if status == 404 and path.startswith(("/collective_rpc", "/reset_prefix_cache")):
        return " (start the server with VLLM_SERVER_DEV_MODE=1, so that it takes new weights)"
    return ""


class Servers:
    """Several servers as one.

    Args:
        urls: `http://host:port` of each.
        refresh: called with a server that is not `fresh` before it is asked.
        patience: seconds for which what has gone is tried again.
        setting: the setting behind `patience`, for the error at its end.
        exit_reason: tells why there is nothing to wait for any more, once that is so.
    """

    def __init__(
        self, urls: Sequence[str], *, refresh: Callable[[Server], None] | None = None, patience: float = 600.0,
        timeout: float = 300.0, concurrency: int = 64, setting: str = "rollout.server_patience",
        exit_reason: Callable[[], str | None] | None = None,
    ) -> None:  # fmt: skip
        key = os.environ.get("VLLM_API_KEY")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency * len(urls))
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=5.0),
            limits=limits,
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self.each = [Server(url, self._client) for url in urls]
        self._refresh, self._patience, self._setting, self._exit_reason = refresh, patience, setting, exit_reason
        self._pool = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="vllm")
        self._picking = threading.Lock()
        self._closed = False

    def complete(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """One completion from some server."""
        return self._complete(body, read)[0]

    def complete_all(
        self, requests: Sequence[tuple[dict[str, Any], Callable[[Any], T]]], progress: bool = False
    ) -> list[T]:
        """Completions in order, all from processes that were fresh: a server may have been started anew, with other weights,
        between two requests without failing one. What it answered is asked again.

        Raises:
            EngineError: patience is over; also where the process at an address is another one every time.
        """
        found: dict[int, T] = {}
        deadline = time.monotonic() + self._patience
        while missing := [i for i in range(len(requests)) if i not in found]:
            answers = self.all([lambda request=requests[i]: self._complete(*request) for i in missing], progress)
            replaced = {
                server.url
                for server in {server.url: server for _, server, _ in answers}.values()
                if self._is_another(server)
            }
            found |= {
                i: answer
                for i, (answer, server, started_at) in zip(missing, answers, strict=True)
                if server.url not in replaced and started_at == server.started_at
            }
            if replaced and time.monotonic() > deadline:
                raise EngineError(
                    f"{', '.join(sorted(replaced))}: answers come from one process after another (by their start in /metrics), for "
                    f"{self._patience:g} s ({self._setting}); an address must be one server, not several behind a balancer"
                )
        return [found[i] for i in range(len(requests))]

    def _is_another(self, server: Server) -> bool:
        """Whether the process that answers is not the one that was made fresh; then it has to be made so."""
        try:
            same = server.started_at is None or server.started() == server.started_at
        except TransientServerError:
            same = False  # gone since; whose its last answers were cannot be told
        if not same:
            server.has_current_weights = False
        return not same

    def _complete(self, body: dict[str, Any], read: Callable[[Any], T]) -> tuple[T, Server, float | None]:
        """The answer, who gave it, and when the process was started that was to give it."""
        deadline = time.monotonic() + self._patience
        while True:
            server = self._pick(deadline)
            try:
                started_at = server.started_at  # before `fresh`: a process that is being made so is not fresh yet
                if not server.has_current_weights and self._refresh is not None:
                    self._refresh(server)
                    started_at = server.started_at
                answer = server.complete(body, read)
                server.healthy, server.pause = True, _FIRST_PAUSE
                return answer, server, started_at
            except TransientServerError as trouble:
                server.trouble, server.healthy = trouble, False
                # Sending again what it has would disturb what it is answering meanwhile.
                if self._refresh is not None and (server.started_at is None or self._is_another(server)):
                    server.has_current_weights = False
                server.retry_at = time.monotonic() + server.pause
                server.pause = min(2 * server.pause, _LONGEST_PAUSE)
            finally:
                with self._picking:
                    server.busy -= 1

    def call_with_retries(self, action: Callable[[], None], server: Server) -> None:
        """Do something with this very server, trying again while patience lasts."""
        deadline, pause = time.monotonic() + self._patience, _FIRST_PAUSE
        while True:
            try:
                return action()
            except TransientServerError as trouble:
                self._wait(pause, deadline, server, trouble)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except (KeyError, TypeError, ValueError) as error:
                raise EngineError(
                    f"{server.url} does not answer as a vLLM server does ({type(error).__name__}: {error})"
                ) from error

    def all(self, actions: Sequence[Callable[[], T]], progress: bool | str = False) -> list[T]:
        """Results of actions done at the same time, in order; the first error ends them all."""
        futures = [self._pool.submit(action) for action in actions]
        title = progress if isinstance(progress, str) else "generating"
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title, disable=not progress):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let go of the servers; they go on running."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _pick(self, deadline: float) -> Server:
        """A server whose pause is over gets one request to prove itself by; otherwise the one with the least to do."""
        while True:
            with self._picking:
                now = time.monotonic()
                back = next((server for server in self.each if not server.healthy and now >= server.retry_at), None)
                healthy = [server for server in self.each if server.healthy]
                if back is not None:
                    back.retry_at = now + _LONGEST_PAUSE
                chosen = back or min(healthy, key=lambda server: server.busy, default=None)
                if chosen is not None:
                    chosen.busy += 1
                    return chosen
                soonest = min(self.each, key=lambda server: server.retry_at)
            # Not longer than the first pause: whichever request proves the server again, the others go on at once.
            self._wait(_FIRST_PAUSE, deadline, soonest, soonest.trouble)

    def _wait(self, pause: float, deadline: float, server: Server, trouble: TransientServerError | None) -> None:
        if self._exit_reason is not None and (end := self._exit_reason()) is not None:
            raise EngineError(f"{server.url}: {end}") from trouble
        if self._closed or time.monotonic() >= deadline:
            raise EngineError(f"{server.url}: {trouble}; tried for {self._patience:g} s ({self._setting})") from trouble
        time.sleep(max(min(pause, deadline - time.monotonic()), 0.0))


@dataclass
class Completion:
    """Token ids, their log-probabilities, and for each place those of other tokens by id."""

    ids: list[int]
    logprobs: list[float]
    tables: list[dict[int, float]]
    stopped: bool  # before the limit


def checked_logprob(value: float) -> float:
    """A log-probability as a server tells it, at least `LOG_ZERO`.

    Raises:
        ValueError: it is above 0 (beyond rounding) or not a number.
    """
    if not value <= 1e-3:
        raise ValueError(f"{value} is no log-probability")
    return max(float(value), LOG_ZERO)


def read_completion(answer: Any, named: Sequence[int] = (), tables: bool = True) -> Completion:
    """What a server's answer holds, checked; `named`: tokens that the first place's table must have.

    What was drawn has a probability. Others may have none: −inf, or −9999 where JSON has to stand for it, counts as `LOG_ZERO`.
    """
    [choice] = answer["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason {choice['finish_reason']!r}")
    ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
    if not ids or len(ids) != len(logprobs) or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
    if any(checked_logprob(value) == LOG_ZERO for value in logprobs):
        raise ValueError("a token that was drawn with a probability of 0")
    stopped = choice["finish_reason"] == "stop"
    if not tables:
        return Completion(ids, logprobs, [], stopped)
    found = [
        {int(name.removeprefix("token_id:")): checked_logprob(value) for name, value in table.items()}
        for table in choice["logprobs"]["top_logprobs"]
    ]
    if len(found) != len(ids) or not set(named) <= found[0].keys():
        raise ValueError("log-probabilities that were asked for are missing")
    return Completion(ids, logprobs, found, stopped)


# What every completion asks for: token ids as numbers, and none of the served folder's own sampling settings.
PLAIN: dict[str, Any] = {
    "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False, "top_p": 1.0, "top_k": 0,
    "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
