"""Stock `vllm serve` processes, one or several, on this machine or others, reached over HTTP.

Requests go to whichever server has the fewest. A server that is gone, slow or talks nonsense is left alone for a while
and tried again; before it answers anything more it gets the current weights, because a restarted server holds those it
was started with. Nothing is drawn twice: a request that failed is asked again with its own seed.

Start each server with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-model-len N

The first makes it take new weights (an administrator's interface: keep it on loopback or a private network), the second
makes it report the log-probabilities that drew a token. Weights travel as safetensors through a folder that trainer and
servers both see. `VLLM_API_KEY`, where it is set, is sent along.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from minillm.rollout.engine import EngineError, NamedTensors, Rollout, Sampling

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_NEVER = -100.0  # added to the logits of padded vocabulary rows


# Token ids, their log-probabilities, and for each place those of other tokens by id.
_Completion = tuple[list[int], list[float], list[dict[int, float]]]


class _Trouble(Exception):
    """A server failed in a way that may pass."""


class _Server:
    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = ""
        self.busy = 0
        self.fresh = False  # holds the current weights
        self.well = True  # its last answer was one
        self.trouble: _Trouble | None = None
        self.pause, self.retry_at = _FIRST_PAUSE, 0.0
        self.lock = threading.Lock()
        self._client = client

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._client.request(method, self.url + path, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise EngineError(f"{self.url} is no address of a server: http://host:port ({error})") from error
        except httpx.RequestError as error:
            raise _Trouble(f"{type(error).__name__}: {error}") from error
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise _Trouble(f"{path} answered {answer.status_code}: {answer.text[:200]}")
        if answer.status_code >= 400:
            raise EngineError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}{_hint(path, answer.status_code)}")
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise _Trouble(f"{path} answered no JSON: {answer.text[:80]!r}") from error


def _hint(path: str, status: int) -> str:
    if status == 401:
        return " (set VLLM_API_KEY to the server's key)"
    if status == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
        return " (start the server with VLLM_SERVER_DEV_MODE=1, so that it takes new weights)"
    return ""


class VLLMServerEngine:
    """An `Engine` over servers.

    Args:
        urls: `http://host:port` of each server.
        folder: where weights are laid down for the servers to read.
        max_length: prompt and response together.
        head_width: rows of the model's head; those from `Sampling.vocab_size` on are never drawn.
        patience: seconds that a request may go on failing.
        timeout: seconds until an answer counts as not coming.
        concurrency: requests in flight, times the number of servers.

    Raises:
        EngineError: no server within `patience`, or one that cannot do what is needed, saying which and what.
    """

    def __init__(
        self, urls: Sequence[str], folder: str | Path, *, max_length: int, head_width: int, patience: float = 600.0,
        timeout: float = 300.0, concurrency: int = 64,
    ) -> None:  # fmt: skip
        key = os.environ.get("VLLM_API_KEY")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency * len(urls))
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=5.0),
            limits=limits,
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self._servers = [_Server(url, self._client) for url in urls]
        self._folder, self._weights = Path(folder).absolute(), None
        self._width, self._patience = head_width, patience
        self._pool = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="vllm")
        self._picking = threading.Lock()
        self._closed = False
        self.version = 0
        for server in self._servers:
            self._insist(lambda server=server: self._attach(server, max_length), server)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False) -> list[Rollout]:
        """See `Engine.generate`."""
        shared = self._settings(sampling) | {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,  # the served folder may name others
            "logprobs": sampling.likeliest,
        }

        def draw(prompt: list[int], seed: int) -> Rollout:
            # A seed on the wire is a signed 64-bit number.
            ids, logprobs, tables = self._complete(shared | {"prompt": list(prompt), "seed": seed})
            values = torch.tensor(logprobs)
            likeliest = tables if sampling.likeliest else None
            return Rollout(prompt, ids, values, values, self.version, ids[-1] in sampling.eos_ids, likeliest=likeliest)

        return self._all([lambda p=p, s=s: draw(p, s) for p, s in zip(prompts, seeds, strict=True)], progress)

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        """See `Engine.logprobs_of`."""
        shared = self._settings(sampling) | {"max_tokens": 1, "logprobs": 1}

        def score(prefix: list[int], named: list[int]) -> Tensor:
            tables = self._complete(shared | {"prompt": list(prefix), "logprob_token_ids": list(named)})[2]
            return torch.tensor([tables[0][token] for token in named])

        return self._all([lambda p=p, n=n: score(p, n) for p, n in zip(prefixes, ids, strict=True)], False)

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Lay the weights down once and have every server read them; call between generations."""
        distributed = torch.distributed.is_initialized()
        target = self._folder / f"weights-{version}"
        if not distributed or torch.distributed.get_rank() == 0:
            self._write(weights, target)
        else:
            for _ in weights:  # gathering shards is a collective operation
                pass
        if distributed:
            torch.distributed.barrier()
        before, self._weights, self.version = self._weights, target, version
        for server in self._servers:
            server.fresh = False
        if not distributed or torch.distributed.get_rank() == 0:
            self._send_to_all()
        if distributed:
            torch.distributed.barrier()
            for server in self._servers:
                server.fresh = True
        if before is not None and before != target and before.is_dir():
            shutil.rmtree(before, ignore_errors=True)

    def _send_to_all(self) -> None:
        """Every server that can be reached gets the weights now; the others before they next answer. One must."""
        for server, trouble in zip(self._servers, self._all([lambda s=s: self._offer(s) for s in self._servers], False), strict=True):
            server.well, server.trouble = trouble is None, trouble
        if not any(server.well for server in self._servers):
            self._insist(lambda: self._refresh(self._servers[0]), self._servers[0])
            self._servers[0].well = True

    def _offer(self, server: _Server) -> _Trouble | None:
        try:
            self._refresh(server)
        except _Trouble as trouble:
            return trouble
        return None

    def close(self) -> None:
        """Let go of the servers; they go on running."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        if self._weights is not None:
            shutil.rmtree(self._weights, ignore_errors=True)

    # One server

    def _attach(self, server: _Server, max_length: int) -> None:
        """Learn a server's model, and make sure that it can do what it will be asked."""
        [model, *_] = server.ask("GET", "/v1/models")["data"]
        server.model = model["id"]
        if model.get("max_model_len", max_length) < max_length:
            raise EngineError(
                f"{server.url} serves {model['max_model_len']} tokens; prompt and response need {max_length}: --max-model-len"
            )
        # A log-probability that does not change with the temperature is not the one that draws the token.
        values = []
        for temperature in (1.0, 2.0):
            body = {"temperature": temperature, "max_tokens": 1, "prompt": [1, 2], "logprobs": 1, "logprob_token_ids": [1, 2, 3]}
            values.append(self._read(server, self._settings(None) | body)[2])
        if values[0] == values[1]:
            raise EngineError(
                f"{server.url} reports log-probabilities before temperature: start it with --logprobs-mode processed_logprobs"
            )
        server.fresh = self._weights is None

    def _refresh(self, server: _Server) -> None:
        """Give a server the current weights, unless it has them."""
        with server.lock:
            if server.fresh or self._weights is None:
                return
            server.ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}})
            reset = server.ask("POST", "/reset_prefix_cache")
            if isinstance(reset, dict) and reset.get("success") is False:
                raise _Trouble("/reset_prefix_cache failed: keys and values of the weights before would be used")
            server.fresh = True

    def _write(self, weights: NamedTensors, target: Path) -> None:
        spare = target.with_name(target.name + ".part")
        shutil.rmtree(spare, ignore_errors=True)
        spare.mkdir(parents=True)
        # Tied weights are one storage under two names, which safetensors refuses.
        save_file({name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in weights}, spare / "model.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        spare.rename(target)

    # All of them

    def _settings(self, sampling: Sampling | None) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
            # Left out, each would be what the served folder's generation_config.json says.
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        if sampling is not None:
            settings["temperature"] = sampling.temperature
            if sampling.vocab_size < self._width:
                settings["logit_bias"] = {str(token): _NEVER for token in range(sampling.vocab_size, self._width)}
        return settings

    def _complete(self, body: dict[str, Any]) -> _Completion:
        """One completion from some server."""
        deadline = time.monotonic() + self._patience
        while True:
            server = self._pick(deadline)
            try:
                if not server.fresh:
                    self._refresh(server)
                answer = self._read(server, body)
                server.well, server.pause = True, _FIRST_PAUSE
                return answer
            except _Trouble as trouble:
                server.trouble, server.well, server.fresh = trouble, False, False
                server.retry_at = time.monotonic() + server.pause
                server.pause = min(2 * server.pause, _LONGEST_PAUSE)
            finally:
                with self._picking:
                    server.busy -= 1

    def _read(self, server: _Server, body: dict[str, Any]) -> _Completion:
        """A completion, refused where it is not one."""
        answer = server.ask("POST", "/v1/completions", body | {"model": server.model})
        try:
            [choice] = answer["choices"]
            if choice["finish_reason"] not in ("stop", "length"):
                raise ValueError(f"finish_reason {choice['finish_reason']!r}")
            ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
            if not ids or len(ids) != len(logprobs) or not all(isinstance(token, int) for token in ids):
                raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
            if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
                raise ValueError("log-probabilities that are none")
            if not body["logprobs"]:
                return ids, logprobs, []
            tables = [
                {int(name.removeprefix("token_id:")): float(value) for name, value in table.items()}
                for table in choice["logprobs"]["top_logprobs"]
            ]
            if len(tables) != len(ids) or not set(body.get("logprob_token_ids", [])) <= tables[0].keys():
                raise ValueError("log-probabilities that were asked for are missing")
            return ids, logprobs, tables
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _Trouble(f"/v1/completions answered garbage ({type(error).__name__}: {error})") from error

    def _pick(self, deadline: float) -> _Server:
        """A server whose pause is over gets one request to prove itself by; otherwise the one with the least to do."""
        while True:
            with self._picking:
                now = time.monotonic()
                back = next((server for server in self._servers if not server.well and now >= server.retry_at), None)
                well = [server for server in self._servers if server.well]
                if back is not None:
                    back.retry_at = now + _LONGEST_PAUSE
                chosen = back or min(well, key=lambda server: server.busy, default=None)
                if chosen is not None:
                    chosen.busy += 1
                    return chosen
                soonest = min(self._servers, key=lambda server: server.retry_at)
            # Not longer than the first pause: whichever request proves the server again, the others go on at once.
            self._wait(_FIRST_PAUSE, deadline, soonest, soonest.trouble)

    def _insist(self, action: Callable[[], None], server: _Server) -> None:
        deadline, pause = time.monotonic() + self._patience, _FIRST_PAUSE
        while True:
            try:
                return action()
            except _Trouble as trouble:
                self._wait(pause, deadline, server, trouble)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except (KeyError, TypeError, ValueError) as error:
                raise EngineError(f"{server.url} does not answer as a vLLM server does ({type(error).__name__}: {error})") from error

    def _wait(self, pause: float, deadline: float, server: _Server, trouble: _Trouble | None) -> None:
        if self._closed or time.monotonic() >= deadline:
            raise EngineError(f"{server.url}: {trouble}; tried for {self._patience:g} s (rollout.server_patience)") from trouble
        time.sleep(max(min(pause, deadline - time.monotonic()), 0.0))

    def _all(self, actions: Sequence[Callable[[], Any]], progress: bool) -> list[Any]:
        futures = [self._pool.submit(action) for action in actions]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="generating", disable=not progress):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]
