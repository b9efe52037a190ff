"""Stock `vllm serve` processes, one or several, on this machine or others, as one engine.

Before a server answers anything it gets the current weights, because one that was restarted holds those it was started
with. Start each with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-model-len N

The first makes it take new weights (an administrator's interface: keep it on loopback or a private network), the second
makes it report the log-probabilities that drew a token. Weights travel as safetensors through a folder that trainer and
servers both see. How requests are spread and tried again is in `minillm.models.servers`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.models.servers import PLAIN, Completion, Server, Servers, TransientServerError, read_completion
from minillm.rollout.engines.base import EngineCapabilities, NamedTensors, padding_bias
from minillm.rollout.engines.local_server import LocalServer

logger = logging.getLogger(__name__)


class VLLMServerEngine:
    """An `Engine` over servers.

    Args:
        urls: `http://host:port` of each server.
        folder: where weights are laid down for the servers to read.
        max_length: prompt and response together; a server that takes less is refused.
        head_width: rows of the served model's head.
        patience: seconds for which a server that has gone is tried again. timeout: seconds that one answer may take.
        own: a server that is stopped at the end.
    """

    capabilities = EngineCapabilities(
        max_top_logprobs=20, max_logprobs_by_id=128
    )  # what a server gives unless --max-logprobs says otherwise; vLLM's own bound

    def __init__(
        self, urls: Sequence[str], folder: str | Path, *, max_length: int, head_width: int, patience: float = 600.0,
        timeout: float = 300.0, concurrency: int = 64, own: LocalServer | None = None,
    ) -> None:  # fmt: skip
        self._own = own
        self._servers = Servers(
            urls, refresh=self._refresh, patience=patience, timeout=timeout, concurrency=concurrency,
            exit_reason=None if own is None else own.exit_reason,
        )  # fmt: skip
        self._folder, self._weights = Path(folder).absolute(), None
        self._width, self._warned = head_width, False
        self.version = 0
        for server in self._servers.each:
            self._servers.call_with_retries(lambda server=server: self._attach(server, max_length), server)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        self.capabilities.check(sampling)
        shared = self._settings(sampling) | {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,  # the served folder may name others
            "logprobs": sampling.top_logprobs,
        }
        if sampling.stop is not None:
            shared |= {
                "stop": list(sampling.stop.strings),
                "include_stop_str_in_output": True,
                "skip_special_tokens": True,
            }

        def read(answer: Any) -> Completion:
            return read_completion(answer, tables=bool(sampling.top_logprobs))

        # A seed on the wire is a signed 64-bit number.
        requests = [
            (shared | {"prompt": list(prompt), "seed": seed}, read) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [
            Rollout.drawn(
                prompt, drawn.ids, drawn.logprobs, sampling, self.version, stopped=drawn.stopped,
                top_logprobs=drawn.tables if sampling.top_logprobs else None,
            )
            for prompt, drawn in zip(prompts, self._servers.complete_all(requests, progress), strict=True)
        ]  # fmt: skip

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        """See `Engine.logprobs_of`."""
        shared = self._settings(sampling) | {"max_tokens": 1, "logprobs": 1}

        requests = [
            (
                shared | {"prompt": list(prefix), "logprob_token_ids": list(named)},
                partial(read_completion, named=named),
            )
            for prefix, named in zip(prefixes, ids, strict=True)
        ]
        found = self._servers.complete_all(requests)
        return [
            torch.tensor([scored.tables[0][token] for token in named]) for scored, named in zip(found, ids, strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Lay the weights down once and have every server read them; call between generations, in every process.

        Raises:
            EngineError: in every process, where process 0 could not.
        """
        distributed = torch.distributed.is_initialized()
        first = not distributed or torch.distributed.get_rank() == 0
        target = self._folder / f"weights-{version}"
        before, self._weights, self.version = self._weights, target, version
        for server in self._servers.each:
            server.has_current_weights = False
        trouble: Exception | None = None
        if first:
            rest = iter(weights)
            try:
                self._write(rest, target)
            except Exception as error:
                trouble = EngineError(f"{target}: the weights cannot be laid down for the servers: {error}")
                for _ in rest:  # the others gather their shards with this process
                    pass
        else:
            for _ in weights:  # gathering shards is a collective operation
                pass
        if distributed:
            torch.distributed.barrier()  # nobody draws with the weights before any more
        if first and trouble is None:
            try:
                self._send_to_all()
            except EngineError as error:
                trouble = error
        if distributed:
            # Which servers have the weights is for process 0 to say; one that was away gets them before it next answers.
            told: list[Any] = [
                [(server.has_current_weights, server.started_at) for server in self._servers.each],
                None if trouble is None else str(trouble),
            ]
            torch.distributed.broadcast_object_list(told, src=0)
            for server, (fresh, started_at) in zip(self._servers.each, told[0], strict=True):
                server.has_current_weights, server.started_at = fresh, started_at
            if trouble is None and told[1] is not None:
                trouble = EngineError(told[1])
        if trouble is not None:
            raise trouble
        if first and before is not None and before != target and before.is_dir():
            shutil.rmtree(before, ignore_errors=True)

    def sleep(self) -> None:
        """A server keeps its memory."""

    def close(self) -> None:
        """Let go of the servers; they go on running, unless this run started them."""
        self._servers.close()
        if self._own is not None:
            self._own.stop()
        if self._weights is not None:
            shutil.rmtree(self._weights, ignore_errors=True)

    def _attach(self, server: Server, max_length: int) -> None:
        """Make sure that a server can do what it will be asked."""
        server.attach(max_length)
        # A log-probability that does not change with the temperature is not the one that draws the token.
        spreads, named = [], [1, 2, 3]
        for temperature in (1.0, 2.0):
            body = {
                "temperature": temperature,
                "max_tokens": 1,
                "prompt": [1, 2],
                "logprobs": 1,
                "logprob_token_ids": named,
            }
            table = server.complete(PLAIN | body, lambda answer: read_completion(answer, named)).tables[0]
            spreads.append(max(table[token] for token in named) - min(table[token] for token in named))
        if abs(spreads[0] - 2 * spreads[1]) > 0.1 * spreads[0] + 1e-3:  # numbers move a little with a server's batch
            raise EngineError(
                f"{server.url} reports log-probabilities before temperature: start it with --logprobs-mode processed_logprobs"
            )
        server.has_current_weights = self._weights is None

    def _refresh(self, server: Server) -> None:
        """Give a server the current weights, unless it has them."""
        with server.lock:
            if server.has_current_weights:
                return
            if self._weights is not None:
                server.started_at = server.started()  # before they are sent, so that a start after that is told from it
                if server.started_at is None and not self._warned:
                    self._warned = True
                    logger.warning(
                        "%s: /metrics does not tell its start, so that a restart which fails no request goes unnoticed",
                        server.url,
                    )
                server.ask(
                    "POST",
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}},
                )
                reset = server.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
                if isinstance(reset, dict) and reset.get("success") is False:
                    raise TransientServerError(
                        "/reset_prefix_cache failed: keys and values of the weights before would be used"
                    )
            server.has_current_weights = True

    def _send_to_all(self) -> None:
        """Every server that can be reached gets the weights now; the others before they next answer. One must, whichever."""
        servers = self._servers.each

        def offer() -> None:
            for server, trouble in zip(
                servers, self._servers.all([lambda s=s: self._offer(s) for s in servers]), strict=True
            ):
                server.healthy, server.trouble = trouble is None, trouble
            if not any(server.healthy for server in servers):
                raise servers[0].trouble or TransientServerError("no server has the weights")

        self._servers.call_with_retries(offer, servers[0])

    def _offer(self, server: Server) -> TransientServerError | None:
        try:
            self._refresh(server)
        except TransientServerError as trouble:
            return trouble
        return None

    def _write(self, weights: NamedTensors, target: Path) -> None:
        spare = target.with_name(target.name + ".part")
        shutil.rmtree(spare, ignore_errors=True)
        spare.mkdir(parents=True)
        # Tied weights are one storage under two names, which safetensors refuses.
        save_file(
            {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in weights},
            spare / "model.safetensors",
        )
        shutil.rmtree(target, ignore_errors=True)
        spare.rename(target)

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        settings = PLAIN | {"temperature": sampling.temperature}
        if bias := padding_bias(sampling.vocab_size, self._width):
            settings["logit_bias"] = {str(token): value for token, value in bias.items()}
        return settings
