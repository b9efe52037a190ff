"""A run in several processes (`accelerate launch`), which share a run directory and wait there for each other."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from minillm.errors import RunError
from minillm.models.launcher import environment_without_launcher
from minillm.run.directory import RunState, absolute_paths, writing_to
from minillm.run.recipe_file import STANDARD_INPUT
from minillm.terminal import current

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe

RENDEZVOUS_TIMEOUT = 300
"""Seconds for which processes wait for each other in the run directory, before the first stage."""


def rank() -> int:
    """The number of this process among those that were launched together."""
    return int(environ.get("RANK", 0))


def world_size() -> int:
    """How many processes were launched together."""
    return int(environ.get("WORLD_SIZE", 1))


def launched(run: Run) -> bool:
    """Whether process 0 of this launch has not given up."""
    return _launch_file(run).is_file()


def select_device() -> None:
    """Give this process the accelerator of its number on the machine, where there are several."""
    if world_size() > 1 and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def print_progress(text: str, rank: int = 0) -> None:
    """Print a line about the run's progress, in process 0 alone."""
    if rank == 0:
        current().say(text)


def signal_abort(run: Run) -> None:
    """Let the processes that wait for process 0 know that it has stopped."""
    with suppress(OSError):  # an error of this file must not hide the one that stopped the run
        _launch_file(run).unlink()


def _launch_file(run: Run) -> Path:
    return run.dir / "launched"


def _arrival_file(run: Run, rank: int) -> Path:
    return run.dir / f"launched-{rank}"


def rendezvous(run: Run, rank: int, world: int) -> None:
    """Have all processes meet in the run directory, which every machine must see at the same path.

    Each process but the first writes a number of its own there, and process 0 writes all of them back. So none goes on
    with what an earlier launch has left, and process 0 does not work for hours before it finds that another machine has
    another folder, or that a process there has refused something.

    Raises:
        RunError: the directory cannot be written; or a process does not see what another one wrote.
    """
    if rank == 0:
        _await_arrivals(run, world)
    else:
        _arrive(run, rank)
        run.state = RunState(run.recipe)


def _await_arrivals(run: Run, world: int) -> None:
    """In process 0: wait until all other processes have written their numbers, and write them back."""
    with writing_to(run.dir):
        run.dir.mkdir(parents=True, exist_ok=True)
        _remove_launch_files(run)
    arrivals, deadline = [_arrival_file(run, rank) for rank in range(1, world)], _deadline()
    while missing := [rank for rank, file in enumerate(arrivals, 1) if not file.is_file()]:
        if time.monotonic() > deadline:
            raise RunError(
                f"run_dir: process(es) {', '.join(map(str, missing))} have not written to {run.dir.absolute()} within "
                f"{RENDEZVOUS_TIMEOUT} s. Either they stopped, and what they printed says why; or they are on a "
                "machine that does not have the same folder (a shared file system) at that path"
            )
        time.sleep(0.1)
    _write_whole(run, _launch_file(run), "\n".join(file.read_text(encoding="utf-8") for file in arrivals))


def _arrive(run: Run, rank: int) -> None:
    """In another process: write a number of its own until process 0 has written it back."""
    number, deadline = secrets.token_hex(8), _deadline()
    own, launch = _arrival_file(run, rank), _launch_file(run)
    while not (launch.is_file() and number in launch.read_text(encoding="utf-8").split()):
        if time.monotonic() > deadline:
            raise RunError(
                f"run_dir: process {rank} does not see in {run.dir.absolute()} what process 0 writes there, and has "
                f"waited {RENDEZVOUS_TIMEOUT} s: every node needs the same folder (a shared file system) at that path"
            )
        if run.dir.is_dir() and not own.is_file():  # process 0 makes the folder, and removes what was left in it
            _write_whole(run, own, number)
        time.sleep(0.1)


def _deadline() -> float:
    return time.monotonic() + RENDEZVOUS_TIMEOUT


def _write_whole(run: Run, file: Path, text: str) -> None:
    """Write a file that no other process sees half written."""
    part = file.with_name(file.name + ".part")
    with writing_to(run.dir):
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def _remove_launch_files(run: Run) -> None:
    for file in (_launch_file(run), *run.dir.glob("launched-*[0-9]")):
        file.unlink(missing_ok=True)


def destroy_process_group(run: Run, rank: int) -> None:
    """End the process group together: at the interpreter's exit its threads end in std::terminate now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            _remove_launch_files(run)


def run_in_main_process(run: Run, stage: str, rank: int) -> None:
    """Process 0 runs the stage in a subprocess outside the process group; the others wait for its entry in the state.

    Raises:
        RunError: the subprocess failed, or process 0 has stopped.
    """
    if rank == 0:
        # The recipe goes through a pipe: it may hold secrets, which are written nowhere.
        command = [sys.executable, "-m", "minillm", "run", str(STANDARD_INPUT), "--stage", stage]
        terminal = current()
        environment = environment_without_launcher() | terminal.environment()
        piped = _as_piped(run.recipe)
        done = subprocess.run(command, env=environment, input=piped, text=True, **terminal.streams())
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
