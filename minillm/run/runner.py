"""Runs a recipe's stages in order: finished ones are skipped, and an interrupted one continues."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

from minillm.errors import Interrupted, RunError
from minillm.models.device import release_memory
from minillm.run import processes
from minillm.run.context import Run
from minillm.run.recipe import Recipe
from minillm.run.stages import NAMES, stage_named


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
    try:
        _run_pending_stages(run, stages, rank, world)
    except BaseException:
        if rank == 0:
            processes.signal_abort(run)
        raise
    if world > 1:
        processes.destroy_process_group(run, rank)
    return run


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
    for number, name in enumerate(stages, 1):
        stage, heading = stage_named(name), f"[{number}/{len(stages)}] {name}"
        if run.state.finished(name) and not stage.always_runs:
            processes.print_progress(f"{heading}: finished before", rank)
            continue
        if world > 1 and stage.training is None and not stage.in_every_process:
            processes.run_in_main_process(run, name, rank)
            continue
        processes.print_progress(heading, rank)
        if rank == 0:
            run.state.begin(name)
        started = time.perf_counter()
        try:
            stage.run(run)
        except KeyboardInterrupt:
            raise Interrupted(f"stage {name} was interrupted; the same command continues it") from None
        release_memory()
        seconds = time.perf_counter() - started
        if rank == 0:
            run.state.finish(name, seconds, run.processes)
        processes.print_progress(f"{heading}: {seconds:.0f} s", rank)
