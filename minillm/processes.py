"""A run in several processes (accelerate launch): they share a run directory, and what one of them does the others wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minillm.recipe import Recipe
from minillm.run import Run
from minillm.run_state import RunError, RunState

_MEETING = 120  # seconds in which a process has to see what process 0 wrote


def give_up(this: Run) -> None:
    """Others that wait for process 0 to do a stage see it."""
    _launched(this).unlink(missing_ok=True)


def _launched(this: Run) -> Path:
    return this.dir / "launched"


def meet(this: Run, rank: int) -> None:
    """Process 0 says in the run directory that it has begun. A process that does not see it has another directory.

    Raises:
        RunError: in such a process, which would wait for every stage for ever.
    """
    file, launch = _launched(this), ":".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))
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


def leave_together(this: Run, rank: int) -> None:
    """Left to the interpreter's exit, the communication threads end in std::terminate now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            _launched(this).unlink(missing_ok=True)


def in_one(this: Run, stage: str, rank: int) -> None:
    """Process 0 has a process of its own do the stage, outside the process group; the others wait for its file."""
    if rank == 0:
        kept = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        }
        kept = {k: v for k, v in kept.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        this.dir.mkdir(parents=True, exist_ok=True)
        whole = this.dir / "recipe.json"
        whole.write_text(json.dumps(_without_relative_paths(this.recipe), indent=1), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "minillm", "run", str(whole), "--stage", stage], env=kept, check=True)
        this.state = RunState(this.recipe)
    else:
        while not this.state.finished(stage):
            if not _launched(this).is_file():
                raise RunError(f"process 0 gave up at stage {stage}; what it printed says why")
            time.sleep(1)
            this.state = RunState(this.recipe)


def _without_relative_paths(recipe: Recipe) -> dict[str, Any]:
    """The recipe as another file can say it: there, a path that starts with a dot would mean another place."""
    tree = recipe.model_dump(mode="json")
    sources = [source for key in ("train", "heldout", "validation", "text") if (source := tree["data"][key]) is not None]
    places = [(source, key) for source in sources for key in ("file", "dataset")]
    others = ((tree["teacher"], "source"), (tree["teacher"], "adapter"), (tree["student"], "source"), (tree["responses"], "file"))
    for section, key in (*places, (tree["data"], "template"), *others):
        if section[key] is not None and len(section[key]) < 4096 and Path(section[key]).exists():
            section[key] = os.path.abspath(section[key])
    if "max_prompt_tokens" not in recipe.rollout.model_fields_set:
        del tree["rollout"]["max_prompt_tokens"]  # a recipe says it for every stage in data
    return tree | {"run_dir": os.path.abspath(tree["run_dir"])}
