"""The text that `minillm plan` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from minillm.errors import InputError
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.fit import Override, advice, fewest_gpus, fit_recipe
from minillm.run.plan.machine import Machine
from minillm.run.plan.network_text import network_report
from minillm.run.plan.phases import Phase, Plan, plan
from minillm.run.plan.work import StageTraining, why_refused
from minillm.run.recipe import Recipe
from minillm.train.update_size import RESPONSES


def plan_report(recipe: Recipe, machine: Machine, source: str, override: Override) -> str:
    """Describe the plan of a recipe, with the changes that would help where it does not fit.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.
        source: where the numbers of the machine's speed come from; see `machine_for`.
        override: loads the recipe with changes.

    Returns:
        The text, in several lines.
    """
    return _report(recipe, plan(recipe, machine), source, recipe, override)


def fit_report(recipe: Recipe, machine: Machine, source: str, override: Override) -> tuple[str, Plan]:
    """Change settings of a recipe until it fits, and describe the result.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.
        source: where the numbers of the machine's speed come from; see `machine_for`.
        override: loads the recipe with changes.

    Returns:
        The text, in several lines, and the plan with the changed settings as its `overrides`.

    Raises:
        InputError: the run would refuse the recipe on this machine, whatever its memory is.
    """
    if refused := why_refused(recipe, machine):
        raise InputError(f"{refused}; then plan with --fit")
    found, changed = fit_recipe(recipe, machine, override)
    return _report(changed, found, source, recipe, override), found


def _report(shown: Recipe, found: Plan, source: str, recipe: Recipe, override: Override) -> str:
    """The plan `found` of the recipe `shown`, with advice about the recipe as it was given where that does not fit."""
    text = "\n".join(part for part in (summary(shown, found, source), network_report(shown, found.machine)) if part)
    if found.fits:
        return text
    nothing = f"no setting does: {_largest(found).name} needs GPUs with more memory, or a smaller model"
    return f"{text}\nwhat would help: " + ("; ".join(advice(recipe, found.machine, override)) or nothing)


def _largest(found: Plan) -> Phase:
    return max(found.phases, key=lambda phase: phase.peak)


def table_report(folder: Path, machine: Machine, load: Callable[[Path], Recipe]) -> str:
    """Plan all recipes in the subfolders of a folder.

    Args:
        folder: the folder. Its subfolder `accelerate` has no recipes.
        machine: the machine that they are planned for.
        load: loads the recipe of a file.

    Returns:
        A table; see `table`.
    """
    files = sorted(p for p in folder.rglob("*.yaml") if p.parent != folder and p.parent.name != "accelerate")
    plans = []
    for path in files:
        recipe = load(path)
        whole, sharded = (plan(recipe, replace(machine, shard=shard)) for shard in (False, True))
        name = str(path.relative_to(folder).with_suffix(""))
        plans.append((name, whole, sharded, fewest_gpus(recipe, machine)))
    return table(plans)


def summary(recipe: Recipe, found: Plan, source: str) -> str:
    """Describe a plan: one line for each phase, then their sum and the assumptions.

    Args:
        recipe: the recipe.
        found: its plan.
        source: where the numbers of the machine's speed come from; see `machine_for`.

    Returns:
        The text, in several lines.
    """
    machine, lines = found.machine, [_phase_line(phase) for phase in found.phases]
    small = " (small models: 4 ms a layer)" if machine.gpu else ""
    lines += [
        f"{'fits' if found.fits else 'does not fit'} in {machine.memory / GIB:.0f} GiB; about "
        f"{_time(found.hours * 3600)}, estimated for {machine.processes} process(es) at {machine.utilisation:.0%} of "
        f"{machine.flops:.0e} operations a second{small}",
        f"the time is based on {source}; on prompts of the length that the data has (4 bytes of text are a token; data "
        "sets that are not read have half of the longest prompts), and on sampled answers of half the longest length; "
        "loading models and starting engines comes on top, a minute or so for each stage",
    ]
    lines += _update_sizes(recipe, machine)
    if found.overrides:
        lines.append("changed: " + " ".join(found.overrides))
    if refused := why_refused(recipe, machine):
        lines.append(f"the run refuses this: {refused}")
    return "\n".join(lines)


def _update_sizes(recipe: Recipe, machine: Machine) -> list[str]:
    """The responses of a weight update of each stage, in a line for those that say it and for those that do not."""
    sizes: dict[bool, list[str]] = {True: [], False: []}
    for stage, given in recipe.trainings():
        training = StageTraining(recipe, machine, stage.name)
        parts = f"{training.micro_batch_size} × {training.accumulation_steps} × {machine.processes}"
        sizes[RESPONSES in given].append(f"{stage.name} {training.responses_per_update} ({parts})")
    lines = {
        "responses in a weight update (micro-batch × accumulation × processes)": sizes[True],
        f"responses in a weight update, which grow with the number of processes ({RESPONSES} fixes them)": sizes[False],
    }
    return [f"{what}: {', '.join(found)}" for what, found in lines.items() if found]


def _phase_line(phase: Phase) -> str:
    largest_first = sorted(phase.parts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest_first)
    cost = f"{phase.flops:.1e} operations, {_time(phase.seconds)}"
    return f"{phase.name}: {phase.peak / GIB:.1f} GiB a process ({parts}); {cost}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"


def table(plans: Sequence[tuple[str, Plan, Plan, int | None]]) -> str:
    """Format the plans of several recipes as a Markdown table.

    Args:
        plans: for each recipe its name, its plan with a whole student in each process, its plan with a sharded student,
            and the smallest number of GPUs that it fits on (None where the machine has too few).

    Returns:
        The table, with one row for each recipe.
    """

    def cell(found: Plan) -> str:
        fits = "" if found.fits else ", **does not fit**"
        return f"{found.peak / GIB:.0f} GiB ({_largest(found).name}){fits}"

    # recipes/README.md shows this table.
    heads = "| recipe | peak per GPU, student whole | in shards | GPUs, at least | hours, estimated |"
    rows = [
        f"| {name} | {cell(whole)} | {cell(sharded)} | {gpus or 'more'} | {whole.hours:.1f} |"
        for name, whole, sharded, gpus in plans
    ]
    return "\n".join([heads, "|---|---|---|---|---|", *rows]) + "\n"
