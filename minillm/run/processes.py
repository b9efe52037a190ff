"""A run in several processes (accelerate launch): they share a run directory, and what one of them does the others wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from minillm.errors import RunError
from minillm.models.launcher import environment_without_launcher
from minillm.run.context import Run
from minillm.run.directory import RunState, absolute_paths
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import STANDARD_INPUT

_MEETING = 120  # seconds in which a process has to see what process 0 wrote


def signal_abort(this: Run) -> None:
    """Others that wait for process 0 to do a stage see it."""
    _launched(this).unlink(missing_ok=True)


def _launched(this: Run) -> Path:
    return this.dir / "launched"


def rendezvous(this: Run, rank: int) -> None:
    """Process 0 says in the run directory that it has begun. A process that does not see it has another directory.

    Raises:
        RunError: in such a process, which would wait for every stage for ever.
    """
    file, launch = (
        _launched(this),
        ":".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")),
    )
    if rank == 0:
        this.dir.mkdir(parents=True, exist_ok=True)
        file.write_text(launch, encoding="utf-8")
        return
    until = time.monotonic() + _MEETING
    while not (file.is_file() and file.read_text(encoding="utf-8") == launch):
        if time.monotonic() > until:
            raise RunError(
                f"run_dir: process {rank} does not see in {this.dir.absolute()} what process 0 wrote there {_MEETING} s ago: every node "
                "needs the same folder (a shared file system) at that path"
            )
        time.sleep(0.1)
    this.state = RunState(this.recipe)


def destroy_process_group(this: Run, rank: int) -> None:
    """Left to the interpreter's exit, the communication threads end in std::terminate now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            _launched(this).unlink(missing_ok=True)


def run_in_main_process(this: Run, stage: str, rank: int) -> None:
    """Process 0 has a process of its own do the stage, outside the process group; the others wait for its file."""
    if rank == 0:
        # By a pipe: a recipe may hold secrets, which are written nowhere.
        words = [sys.executable, "-m", "minillm", "run", str(STANDARD_INPUT), "--stage", stage]
        done = subprocess.run(words, env=environment_without_launcher(), input=_as_piped(this.recipe), text=True)
        if done.returncode:
            raise RunError(
                f"stage {stage} failed in its own process (exit status {done.returncode}); what it printed above says why"
            )
        this.state = RunState(this.recipe)
    else:
        while not this.state.finished(stage):
            if not _launched(this).is_file():
                raise RunError(f"process 0 gave up at stage {stage}; what it printed says why")
            time.sleep(1)
            this.state = RunState(this.recipe)


def _as_piped(recipe: Recipe) -> str:
    """The recipe as another process reads it, from wherever: paths in full, a path that starts with a dot would mean another place."""
    tree = absolute_paths(recipe)
    if "max_prompt_tokens" not in recipe.rollout.model_fields_set:
        del tree["rollout"]["max_prompt_tokens"]  # a recipe says it for every stage in data
    return json.dumps(tree)
