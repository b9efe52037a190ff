"""`vllm serve` processes, one or several, on this machine or on others, as one engine.

Start each server with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-model-len N

`VLLM_SERVER_DEV_MODE` makes the server accept new weights. It opens an administrator's interface, so keep the server on
the loopback interface or a private network. `--logprobs-mode processed_logprobs` makes it report the log-probabilities
that tokens were sampled with.

A server that samples from the mixture of student and teacher (`rollout.teacher_mix`) holds both models. It needs
minillm installed on its machine, and in addition

    --hf-overrides '{"architectures": ["MinillmStudentAndTeacher"], "minillm_student": ["LlamaForCausalLM"],
                     "minillm_teacher": "TEACHER", "minillm_loads_teacher": true}'
    --worker-extension-cls minillm.rollout.engines.vllm_pair.PairWorker

with the student's own architecture for `LlamaForCausalLM`. The teacher in the training process scores the responses.

The weights are written as safetensors to a folder that the trainer and the servers must both see: for servers on other
machines, `run_dir` is on a file system that they share, at the same path. Every server loads
the current weights before it samples, because a server that was restarted has the weights of MODEL. Load balancing and
retries are in `minillm.models.servers`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.models.completions import Completion, read_completion
from minillm.models.configs import text_config
from minillm.models.servers import PLAIN, Server, Servers, TransientServerError
from minillm.rollout.engines.base import EngineCapabilities, EngineRequest, Unavailable, padding_bias
from minillm.rollout.engines.local_server import LocalServer, check_local_server, start_for_all
from minillm.rollout.engines.server_checks import (
    check_addresses,
    check_logprobs_mode,
    read_mixed,
    start_pair,
    teacher_logprobs,
)
from minillm.rollout.engines.vllm_plugin import MixtureRequest

if TYPE_CHECKING:
    from minillm.rollout.engines.base import NamedTensors

logger = logging.getLogger(__name__)


class VLLMServerEngine:
    """An engine over one or several servers. Every training process has one of its own.

    Args:
        urls: `http://host:port` of each server.
        folder: Folder that weights are written to for the servers to read.
        max_length: Maximum number of tokens of prompt and response together; a server with a lower limit is refused.
        head_width: Number of rows of the served model's head.
        patience: Seconds for which failing requests are retried.
        timeout: Seconds that one request may take.
        mixes: Whether the servers must hold a teacher beside the student, which is mixed in.
        own: A server that this run started, and that is stopped with the engine.

    Raises:
        EngineError: A server cannot be reached, or cannot do what the engine needs.
    """

    name: ClassVar[str] = "server"
    only_in_training: ClassVar[bool] = True
    # What a server returns unless --max-logprobs sets another number.
    capabilities = EngineCapabilities(max_top_logprobs=20, supports_overlap=True)

    def __init__(
        self,
        urls: Sequence[str],
        folder: str | Path,
        *,
        max_length: int,
        head_width: int,
        patience: float = 600.0,
        timeout: float = 300.0,
        mixes: bool = False,
        own: LocalServer | None = None,
    ) -> None:
        self._own = own
        self.capabilities = replace(type(self).capabilities, mixes_teacher=mixes)
        self._servers = Servers(
            urls,
            refresh=self._refresh,
            patience=patience,
            timeout=timeout,
            exit_reason=None if own is None else own.exit_reason,
        )
        self._folder = Path(folder).absolute()
        self._weights: Path | None = None  # folder of the current weights; None while servers keep those of their start
        self._width, self._warned = head_width, False
        self.version = 0
        for server in self._servers.each:
            self._servers.call_with_retries(lambda server=server: self._attach(server, max_length), server)

    @classmethod
    def unavailable(cls, model: Any = None, teacher: Any = None) -> Unavailable | None:
        """See `RegisteredEngine.unavailable`. What a server cannot do is found when the engine attaches to it.

        What a server cannot do that the run starts itself is known before: see `check_local_server`.
        """

    @classmethod
    def create(cls, request: EngineRequest) -> VLLMServerEngine:
        """See `RegisteredEngine.create`. With `servers: auto`, this starts a server; every process must take part."""
        model, own, saved = request.model, None, request.work / "server-teacher"
        if model is None:
            raise EngineError("rollout.engine: server samples the student in training only")
        check_addresses(request.config.servers)
        if request.config.servers != "auto":
            return cls._attach_all(request, model, request.config.servers)
        teacher = request.teacher
        check_local_server(text_config(model), None if teacher is None else text_config(teacher.model))
        # All processes share the server, which therefore holds the rollouts of all.
        sizing = replace(request.sizing, sequences=request.config.num_rollouts)
        try:
            source = None if teacher is None else teacher.folder(saved)
            url, own = start_for_all(request.folder, request.work / "server.log", sizing, source)
            return cls._attach_all(request, model, [url], own)
        except BaseException:
            if own is not None:
                own.stop()
            raise
        finally:
            if own is not None and teacher is not None and teacher.source is None:
                shutil.rmtree(saved, ignore_errors=True)  # the server has loaded it, or has ended

    @classmethod
    def _attach_all(
        cls, request: EngineRequest, model: Any, urls: Sequence[str], own: LocalServer | None = None
    ) -> VLLMServerEngine:
        """Return an engine over servers that are running or starting."""
        return cls(
            urls,
            request.work / "weights",
            max_length=request.sizing.max_length,
            head_width=model.get_output_embeddings().weight.shape[0],
            patience=request.config.server_patience,
            timeout=request.config.server_timeout,
            mixes=request.teacher is not None,
            own=own,
        )

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        self.capabilities.check(sampling)
        shared = self._settings(sampling) | {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": True,  # the served folder may name other tokens
            "logprobs": 1 if sampling.teacher_mix else sampling.top_logprobs,
        }
        if sampling.stop is not None:
            shared |= {
                "stop": list(sampling.stop.strings),
                "include_stop_str_in_output": True,
                "skip_special_tokens": True,
            }

        def read(answer: Any) -> Completion:
            if sampling.teacher_mix:
                return read_mixed(answer, sampling.vocab_size)
            return read_completion(answer, tables=bool(shared["logprobs"]))

        # The server's API takes signed 64-bit seeds.
        requests = [
            (shared | {"prompt": list(prompt), "seed": seed} | _mixture_arguments(sampling, seed), read)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        completions = self._servers.complete_all(requests, progress)
        return [
            Rollout.drawn(
                prompt,
                completion.ids,
                completion.logprobs,
                sampling,
                self.version,
                stopped=completion.stopped,
                top_logprobs=completion.tables if sampling.top_logprobs else None,
                teacher=TeacherTargets(teacher_logprobs(completion, sampling.vocab_size))
                if sampling.teacher_mix
                else None,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Write the weights once and have every server load them.

        Every process must call this, between generations.

        Raises:
            EngineError: Process 0 could not write or send the weights. All processes raise it.
        """
        distributed = torch.distributed.is_initialized()
        main = not distributed or torch.distributed.get_rank() == 0
        target = self._folder / f"weights-{version}"
        previous, self._weights, self.version = self._weights, target, version
        for server in self._servers.each:
            server.has_current_weights = False
        error = self._write_or_gather(weights, target, main)
        if distributed:
            torch.distributed.barrier()  # from here on no process samples with the previous weights
        if main and error is None:
            try:
                self._send_to_all()
            except EngineError as failure:
                error = failure
        if distributed:
            error = self._share_outcome(error)
        if error is not None:
            raise error
        if main and previous is not None and previous != target and previous.is_dir():
            shutil.rmtree(previous, ignore_errors=True)

    def sleep(self) -> None:
        """Do nothing: a server keeps its memory."""

    def close(self) -> None:
        """Close the connections. The servers keep running, except the one that this run started."""
        self._servers.close()
        if self._own is not None:
            self._own.stop()
        if self._weights is not None:
            shutil.rmtree(self._weights, ignore_errors=True)

    def _attach(self, server: Server, max_length: int) -> None:
        """Check that a server can do what it will be asked for."""
        server.attach(max_length)
        check_logprobs_mode(server)
        if self.capabilities.mixes_teacher:
            start_pair(server)
        server.has_current_weights = self._weights is None

    def _refresh(self, server: Server) -> None:
        """Have a server load the current weights, unless it has them."""
        with server.lock:
            if server.has_current_weights:
                return
            if self._weights is not None:
                # Read before the weights are sent, so that a later restart shows as another start time.
                server.started_at = server.process_start_time()
                if server.started_at is None and not self._warned:
                    self._warned = True
                    logger.warning(
                        "%s: /metrics does not report when the process started; a restart during which no request "
                        "fails will not be noticed.",
                        server.url,
                    )
                if self.capabilities.mixes_teacher:
                    start_pair(server)  # a server that was restarted has vLLM's own sampler again
                    call: dict[str, Any] = {"method": "minillm_load_student", "args": [str(self._weights)]}
                else:
                    call = {"method": "reload_weights", "kwargs": {"weights_path": str(self._weights)}}
                server.ask("POST", "/collective_rpc", call)
                reset = server.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
                if isinstance(reset, dict) and reset.get("success") is False:
                    raise TransientServerError(
                        "/reset_prefix_cache failed: keys and values of the previous weights would be used"
                    )
            server.has_current_weights = True

    def _send_to_all(self) -> None:
        """Have every reachable server load the weights now; the others load them before they next sample.

        Raises:
            EngineError: No server loaded the weights within `patience` seconds.
        """
        servers = self._servers.each

        def send() -> None:
            errors = self._servers.all([lambda server=server: self._try_refresh(server) for server in servers])
            for server, error in zip(servers, errors, strict=True):
                server.healthy, server.last_error = error is None, error
            if not any(server.healthy for server in servers):
                raise servers[0].last_error or TransientServerError("no server has the weights")

        self._servers.call_with_retries(send, servers[0])

    def _try_refresh(self, server: Server) -> TransientServerError | None:
        try:
            self._refresh(server)
        except TransientServerError as error:
            return error
        return None

    def _write_or_gather(self, weights: NamedTensors, target: Path, main: bool) -> Exception | None:
        """Write the weights in the main process, and take part in gathering them in the others.

        Gathering a shard is a collective operation, so every process iterates over all weights, whatever happens.
        """
        remaining = iter(weights)
        error: Exception | None = None
        if main:
            try:
                self._write(remaining, target)
            except (OSError, SafetensorError) as failure:
                error = EngineError(f"{target}: the weights cannot be written for the servers: {failure}")
            except Exception as failure:  # a defect, which is raised as it is when all processes have come this far
                error = failure
        for _ in remaining:
            pass
        return error

    def _write(self, weights: NamedTensors, target: Path) -> None:
        partial_folder = target.with_name(target.name + ".part")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        # Tied weights are written under each of their names, as copies (safetensors refuses one storage twice): on a
        # CPU, vLLM's head multiplies a packed copy of its weight, which only a weight of its own name renews.
        found = {name: value.to("cpu", copy=True).contiguous() for name, value in weights}
        save_file(found, partial_folder / "model.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        partial_folder.rename(target)

    def _share_outcome(self, error: Exception | None) -> Exception | None:
        """Make process 0's knowledge of its servers, and its error, known to every process.

        Process 0 decides which servers have the weights. A server that was unreachable gets them before it next
        samples.
        """
        outcome: list[Any] = [
            [(server.has_current_weights, server.started_at) for server in self._servers.each],
            None if error is None else str(error),
        ]
        torch.distributed.broadcast_object_list(outcome, src=0)
        for server, (has_current_weights, started_at) in zip(self._servers.each, outcome[0], strict=True):
            server.has_current_weights, server.started_at = has_current_weights, started_at
        if error is None and outcome[1] is not None:
            return EngineError(outcome[1])
        return error

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """Return the settings that all requests have in common."""
        settings = PLAIN | {"temperature": sampling.temperature}
        if bias := padding_bias(sampling.vocab_size, self._width):
            settings["logit_bias"] = {str(token): value for token, value in bias.items()}
        return settings


def _mixture_arguments(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Return what a request says in addition to be sampled from the mixture."""
    if not sampling.teacher_mix:
        return {}
    request = MixtureRequest(sampling.teacher_mix, sampling.temperature, sampling.vocab_size, seed)
    return {"vllm_xargs": request.to_extra_args()}
