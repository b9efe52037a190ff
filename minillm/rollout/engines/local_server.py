"""A vLLM server that the run itself starts, on the loopback interface: one engine that all training processes share."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from minillm.errors import EngineError
from minillm.models.launcher import environment_without_launcher
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import CPU_BLOCK, engine_limits, memory_settings
from minillm.rollout.engines.vllm_plugin import PAIR_WORKER, pair_overrides

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_SECONDS_TO_END = 30
_LOG_TAIL = 1000  # characters of the log that an error message quotes


class LocalServer:
    """A `vllm serve` process. It ends with `stop`, or when this process ends.

    The constructor does not wait until the server is up; `VLLMServerEngine` retries until then.

    Args:
        folder: The model and its tokenizer.
        log: File that the server's output is appended to.
        sizing: How much the server must be able to hold.
        teacher: Folder of a teacher that the server holds beside the model, to sample from their mixture.
    """

    def __init__(
        self, folder: str | Path, log: str | Path, sizing: EngineSizing, teacher: str | Path | None = None
    ) -> None:
        port = _free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", Path(log)
        command = _command(folder, port, sizing, teacher)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            # Ctrl-C lets the trainer finish its update; in a session of its own the server does not end before that.
            self.process = subprocess.Popen(
                command,
                env=_environment(),
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def stop(self) -> None:
        """Kill the server and the processes that it started, and wait until it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_SECONDS_TO_END)

    def exit_reason(self) -> str | None:
        """Return a sentence on how the server ended, with the end of its log, or None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"the run's own server ended (exit status {code}); {self.log} ends with\n{self.log_tail()}"

    def log_tail(self) -> str:
        """Return the end of the server's log, for an error message."""
        return self.log.read_text(errors="replace")[-_LOG_TAIL:].strip()


def check_local_server(model: Any = None, teacher: Any = None) -> None:
    """Refuse models that a server of the run's own cannot hold. It is the vLLM that would sample in this process too.

    Args:
        model: The text config of the student, or None where it is not known yet.
        teacher: The text config of the teacher that is mixed in, or None without one.

    Raises:
        EngineError: vLLM is not installed, or cannot sample the model or mix the teacher in.
    """
    refusal = VLLMEngine.unavailable(model, teacher)
    if refusal is not None:
        remedy = f"{refusal.remedy}, or " if refusal.remedy else ""
        raise EngineError(
            f"rollout.servers: auto starts a vLLM server, and {refusal.reason}: {remedy}set rollout.engine=auto "
            "without rollout.servers"
        )


def start_for_all(
    folder: str | Path, log: str | Path, sizing: EngineSizing, teacher: str | Path | None = None
) -> tuple[str, LocalServer | None]:
    """Start one server for all training processes; see `LocalServer`. Every process must call this.

    Returns:
        The server's address, and the server itself in process 0, which started it (None in the others).
    """
    if not torch.distributed.is_initialized():
        server = LocalServer(folder, log, sizing, teacher)
        return server.url, server
    server = LocalServer(folder, log, sizing, teacher) if torch.distributed.get_rank() == 0 else None
    shared = [server.url if server is not None else None]
    torch.distributed.broadcast_object_list(shared, src=0)
    return str(shared[0]), server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(folder: str | Path, port: int, sizing: EngineSizing, teacher: str | Path | None = None) -> list[str]:
    """Return the command line of a server."""
    teacher_config = None if teacher is None else AutoConfig.from_pretrained(teacher)
    settings: dict[str, object] = {
        "model": folder,
        "host": "127.0.0.1",
        "port": port,
        "max_model_len": sizing.max_length,
        "dtype": sizing.dtype_name,
        "logprobs_mode": "processed_logprobs",
        **engine_limits(sizing),
        **memory_settings(folder, sizing, teacher_config),
    }
    if teacher is not None:
        architectures: Any = AutoConfig.from_pretrained(folder).architectures
        overrides = pair_overrides(architectures, str(teacher), loads_teacher=True)
        settings |= {"hf_overrides": json.dumps(overrides), "worker_extension_cls": PAIR_WORKER}
    # The module is started rather than the `vllm` command, because the CPU build comes without that command.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    if not torch.cuda.is_available():
        # As in `VLLMEngine`: short blocks, and prompts that are prefilled in one piece.
        command += ["--enforce-eager", "--block-size", str(CPU_BLOCK), "--no-enable-chunked-prefill"]
    return command


def _environment() -> dict[str, str]:
    """Return the environment of a server, which must not take itself for one of the training processes."""
    environment = environment_without_launcher()
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # so that the server accepts new weights
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return environment


def _end_with_parent() -> None:
    """On Linux, have this process terminated when its parent ends, so that a killed trainer leaves no server behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
