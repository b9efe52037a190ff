"""A run in several processes (`accelerate launch`), which share a run directory and wait there for each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from rich import print as rich_print

from minillm.errors import RunError
from minillm.models.launcher import environment_without_launcher
from minillm.run.directory import RunState, absolute_paths, writing_to
from minillm.run.recipe_file import STANDARD_INPUT

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe

RENDEZVOUS_TIMEOUT = 120
"""Seconds within which every process must see what process 0 wrote."""


def rank() -> int:
    """The number of this process among those that were launched together."""
    return int(environ.get("RANK", 0))


def world_size() -> int:
    """How many processes were launched together."""
    return int(environ.get("WORLD_SIZE", 1))


def print_progress(text: str, rank: int = 0) -> None:
    """Print a line about the run's progress, in process 0 alone."""
    if rank == 0:
        rich_print(f"[bold cyan]{text.replace('[', chr(92) + '[')}[/]", flush=True)


def signal_abort(run: Run) -> None:
    """Let the processes that wait for process 0 know that it has stopped."""
    with suppress(OSError):  # an error of this file must not hide the one that stopped the run
        _launch_file(run).unlink()


def _launch_file(run: Run) -> Path:
    return run.dir / "launched"


def rendezvous(run: Run, rank: int) -> None:
    """Process 0 writes to the run directory that it has begun, and the others wait until they see it.

    Raises:
        RunError: process 0 cannot write there; or another process does not see what process 0 wrote. It has another
            directory, and would wait for every stage for ever.
    """
    file = _launch_file(run)
    launch = ":".join(environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))
    if rank == 0:
        with writing_to(run.dir):
            run.dir.mkdir(parents=True, exist_ok=True)
            file.write_text(launch, encoding="utf-8")
        return
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
    while not (file.is_file() and file.read_text(encoding="utf-8") == launch):
        if time.monotonic() > deadline:
            raise RunError(
                f"run_dir: process {rank} does not see in {run.dir.absolute()} what process 0 wrote there "
                f"{RENDEZVOUS_TIMEOUT} s ago: every node needs the same folder (a shared file system) at that path"
            )
        time.sleep(0.1)
    run.state = RunState(run.recipe)


def destroy_process_group(run: Run, rank: int) -> None:
    """End the process group together: at the interpreter's exit its threads end in std::terminate now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            _launch_file(run).unlink(missing_ok=True)


def run_in_main_process(run: Run, stage: str, rank: int) -> None:
    """Process 0 runs the stage in a subprocess outside the process group; the others wait for its entry in the state.

    Raises:
        RunError: the subprocess failed, or process 0 has stopped.
    """
    if rank == 0:
        # The recipe goes through a pipe: it may hold secrets, which are written nowhere.
        command = [sys.executable, "-m", "minillm", "run", str(STANDARD_INPUT), "--stage", stage]
        done = subprocess.run(command, env=environment_without_launcher(), input=_as_piped(run.recipe), text=True)
        if done.returncode:
            raise RunError(
                f"stage {stage} failed in its own process (exit status {done.returncode}); see what it printed above"
            )
        run.state = RunState(run.recipe)
        return
    while not run.state.finished(stage):
        if not _launch_file(run).is_file():
            raise RunError(f"process 0 gave up at stage {stage}; what it printed says why")
        time.sleep(1)
        run.state = RunState(run.recipe)


def _as_piped(recipe: Recipe) -> str:
    """The recipe as text that means the same to a process with another working directory."""
    tree = absolute_paths(recipe)
    if "max_prompt_tokens" not in recipe.rollout.model_fields_set:
        del tree["rollout"]["max_prompt_tokens"]  # data.max_prompt_tokens is the limit of every stage
    return json.dumps(tree)
