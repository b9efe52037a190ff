"""Runs a recipe's stages in order: finished ones are skipped, and an interrupted one continues."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from minillm.capture import keep_log
from minillm.errors import Interrupted, LengthError, RunError
from minillm.models.device import release_memory
from minillm.run import processes
from minillm.run.context import Run
from minillm.run.directory import writing_to
from minillm.run.recipe import Recipe
from minillm.run.remaining import Remaining
from minillm.run.stages import NAMES, stage_named
from minillm.run.stages.stage import Stage
from minillm.terminal import current, duration

_WORTH_A_PLAN = 30.0  # seconds; to estimate the rest takes a few


def run_recipe(recipe: Recipe, only: str | Sequence[str] | None = None, redo: bool = False) -> Run:
    """Run the stages of a recipe, or some of them.

    Under several processes (`accelerate launch`) the stages that train, and `logits`, run in all of them, the others in
    one.

    Args:
        only: the stages to run; by default all that the recipe lists.
        redo: make these stages again, even if they are finished.

    Returns:
        The run, for its directory and its folders.

    Raises:
        RunError: `redo` would throw away the work of a stage that `only` does not name.
        RunError, RecipeError, DataError, EngineError: before any model loads, where that is possible.
        Interrupted: after Ctrl-C; the same call continues.
    """
    run = Run(recipe)
    named = [only] if isinstance(only, str) else list(only or ())
    stages: list[str] = sorted(named, key=NAMES.index) or list(recipe.stages)
    rank, world = processes.rank(), processes.world_size()
    if redo:
        _check_redo(run, named)
        if rank == 0:
            _discard(run, stages)
    if world > 1:
        processes.rendezvous(run, rank, world)
    for number, stage in enumerate(stages):
        run.state.check(stage)
        run.state.needs(stage, stages[:number])
    with writing_to(run.dir):
        keep_log(run.dir / "logs" / f"{_log_name(stages, rank)}.log")
    try:
        _run_pending_stages(run, stages, rank, world)
    except BaseException:
        if rank == 0:
            processes.signal_abort(run)
        raise
    if world > 1:
        processes.destroy_process_group(run, rank)
    return run


def _log_name(stages: Sequence[str], rank: int) -> str:
    """The log of what is printed: one for each process, since all that write to one would be shown by each."""
    return f"run-{stages[0]}" if current().part else "run" if rank == 0 else f"run-{rank}"


def _check_redo(run: Run, named: Sequence[str]) -> None:
    """Refuse to throw away the work of stages that nobody has named; hours may be in each.

    Raises:
        RunError: with the names, and what to write to agree.
    """
    lost = run.state.lost_with(named) if named else run.state.made()
    if not lost or (not named and len(lost) == 1):
        return
    names = ",".join(sorted({*named, *lost}, key=NAMES.index))
    what = f"what builds on {' and '.join(named)}: " if named else ""
    raise RunError(
        f"{run.dir}: --redo would throw away {what}{', '.join(lost)}. Nothing is deleted yet: write --stage {names} "
        "--redo to make all of it again, or name fewer stages"
    )


def _discard(run: Run, stages: Sequence[str]) -> None:
    """Forget stages and those that build on them, with the files that they would continue from."""
    for name in dict.fromkeys(name for stage in stages for name in run.state.forget(stage)):
        shutil.rmtree(run.dir / "work" / name, ignore_errors=True)
        stage_named(name).discard(run, requested=name in stages)


def _run_pending_stages(run: Run, stages: list[str], rank: int, world: int) -> None:
    """Run, in order, every stage that is not finished."""
    terminal, remaining, begun = current(), Remaining(run, stages, world), time.perf_counter()
    for number, name in enumerate(stages, 1):
        stage, heading = stage_named(name), f"[{number}/{len(stages)}] {name}"
        if run.state.finished(name) and not stage.always_runs:
            _tell(run, f"{heading}: finished before", rank, name, "finished before")
            continue
        if not terminal.part:
            terminal.heading, terminal.rest = heading, partial(remaining.after, name)
            processes.print_progress(heading, rank)
        started = time.perf_counter()
        if world > 1 and stage.training is None and not stage.in_every_process:
            processes.run_in_main_process(run, name, rank)
        else:
            _run_stage(run, stage, rank)
        seconds = time.perf_counter() - started
        left = remaining.after(name) if rank == 0 and time.perf_counter() - begun > _WORTH_A_PLAN else None
        rest = f", about {duration(left)} left" if left else ""
        _tell(run, f"{heading}: {duration(seconds)}{rest}", rank, name, "finished", seconds=round(seconds, 1))


def _run_stage(run: Run, stage: Stage, rank: int) -> None:
    """Run a stage in this process, and record it."""
    if rank == 0:
        run.state.begin(stage.name)
    started = time.perf_counter()
    try:
        stage.run(run)
    except LengthError:
        if rank == 0:
            run.state.take_back()
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stage {stage.name} was interrupted; the same command continues it") from None
    release_memory()
    if rank == 0:
        run.state.finish(stage.name, time.perf_counter() - started, run.processes)
        if stage.training is not None:
            for earlier in run.state.all_below(stage.name):  # which can no longer go on for longer
                shutil.rmtree(run.dir / "work" / earlier, ignore_errors=True)


def _tell(run: Run, text: str, rank: int, stage: str, status: str, **facts: Any) -> None:
    """Show that a stage is over."""
    if rank == 0 and not current().part:
        processes.print_progress(text)
        current().event("stage", run_dir=str(run.dir), stage=stage, status=status, **facts)
