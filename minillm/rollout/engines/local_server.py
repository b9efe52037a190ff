"""A vLLM server of this run's own, on loopback: one engine that every training process shares."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from minillm.rollout.engines.vllm_memory import engine_limits, memory_settings

_FLAGS = {"kv_cache_memory_bytes": "--kv-cache-memory-bytes", "gpu_memory_utilization": "--gpu-memory-utilization"}


class LocalServer:
    """A `vllm serve` process, which comes up while its engine waits for it. It ends with `stop`, or with this process.

    Args:
        folder: the model and its tokenizer.
        log: where its output goes.
        sequences, memory: see `VLLMEngine`.
    """

    def __init__(
        self, folder: str | Path, log: str | Path, *, max_length: int, sequences: int = 64, memory: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", Path(log)
        settings = memory_settings(folder, max_length=max_length, sequences=sequences, dtype=dtype, memory=memory)
        # Not the `vllm` command: the CPU build comes without one.
        batch = engine_limits(max_length, sequences)
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", str(max_length), "--dtype", str(dtype).removeprefix("torch."), "--logprobs-mode", "processed_logprobs",
            "--max-num-seqs", str(batch["max_num_seqs"]), "--max-num-batched-tokens", str(batch["max_num_batched_tokens"]),
            *(part for key, value in settings.items() for part in (_FLAGS[key], str(value))),
        ]  # fmt: skip
        if not torch.cuda.is_available():
            # As in `VLLMEngine`: short blocks, and prompts in one piece.
            command += ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
        environment = {
            k: v
            for k, v in os.environ.items()
            if k not in _OF_THE_LAUNCHER and not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))
        }
        environment |= {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            # A group of its own, so that Ctrl-C, which lets the update end, does not end the server amid it.
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True, preexec_fn=_end_with_parent
            )

    def stop(self) -> None:
        """At once, and the engine's own processes with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def exit_reason(self) -> str | None:
        """How it ended, once it has."""
        code = self.process.poll()
        return (
            None
            if code is None
            else f"the run's own server ended (exit status {code}); {self.log} ends with\n{self.last_words()}"
        )

    def last_words(self) -> str:
        """The end of its log, for an error."""
        return self.log.read_text(errors="replace")[-1000:].strip()


_OF_THE_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def _end_with_parent() -> None:
    """Linux: a trainer that is killed takes its server along."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_DEATH_SIGNAL, signal.SIGTERM)


def start_for_all(folder: str | Path, log: str | Path, **settings: Any) -> tuple[str, LocalServer | None]:
    """Process 0 starts a server; every process gets its address."""
    if not torch.distributed.is_initialized():
        server = LocalServer(folder, log, **settings)
        return server.url, server
    server = LocalServer(folder, log, **settings) if torch.distributed.get_rank() == 0 else None
    found = [server.url if server is not None else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return str(found[0]), server
