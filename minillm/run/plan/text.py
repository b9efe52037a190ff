"""What the command says of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from minillm.errors import InputError
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.fit import Overridden, advice, fewest, fitted
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import update_responses, why_refused
from minillm.run.recipe import Recipe


def plan_report(recipe: Recipe, machine: Machine, source: str, overridden: Overridden) -> str:
    """What `minillm plan` prints: the plan, and what would help where it does not fit."""
    return _report(recipe, plan(recipe, machine), source, recipe, overridden)


def fit_report(recipe: Recipe, machine: Machine, source: str, overridden: Overridden) -> tuple[str, Plan]:
    """The same with the settings that make the recipe fit, and the plan with them.

    Raises:
        InputError: the run would refuse the recipe on this machine whatever its memory.
    """
    if refused := why_refused(recipe, machine):
        raise InputError(f"{refused}; then --fit")
    found, changed = fitted(recipe, machine, overridden)
    return _report(changed, found, source, recipe, overridden), found


def _report(shown: Recipe, found: Plan, source: str, recipe: Recipe, overridden: Overridden) -> str:
    text = summary(shown, found, source)
    if found.fits:
        return text
    largest = max(found.phases, key=lambda phase: phase.peak).name
    nothing = f"nothing that is a setting: {largest} needs GPUs with more memory, or a smaller model"
    return f"{text}\nwhat would help: " + ("; ".join(advice(recipe, found.machine, overridden)) or nothing)


def table_report(folder: Path, machine: Machine, load: Callable[[Path], Recipe]) -> str:
    """The table of all recipes below a folder; see `table`."""
    files = sorted(p for p in folder.rglob("*.yaml") if p.parent != folder and p.parent.name != "accelerate")
    plans = []
    for path in files:
        recipe = load(path)
        whole, sharded = (plan(recipe, replace(machine, shard=shard)) for shard in (False, True))
        name = str(path.relative_to(folder).with_suffix(""))
        plans.append((name, whole, sharded, fewest(recipe, machine)))
    return table(plans)


def summary(recipe: Recipe, found: Plan, rests_on: str) -> str:
    """A line a phase, then what they come to. `rests_on`: where the machine's speed is from."""
    machine, lines = found.machine, []
    for phase in found.phases:
        parts = ", ".join(
            f"{name} {size / GIB:.1f}" for name, size in sorted(phase.parts.items(), key=lambda part: -part[1])
        )
        lines.append(
            f"{phase.name}: {phase.peak / GIB:.1f} GiB a process ({parts}); {phase.flops:.1e} operations, {_time(phase.seconds)}"
        )
    small = " (small models: 4 ms a layer)" if machine.gpu else ""
    lines += [
        f"{'fits' if found.fits else 'does not fit'} in {machine.memory / GIB:.0f} GiB; about {_time(found.hours * 3600)}, estimated for "
        f"{machine.processes} process(es) at {machine.utilisation:.0%} of {machine.flops:.0e} operations a second{small}",
        f"time rests on {rests_on}; prompts as long as the data's (text at 4 bytes a token; of data sets that are not read, half of the "
        "most), sampled answers half as long as they may be; loading models and starting engines, a minute or so a stage, come on top",
    ]
    if sizes := [f"{stage.name} {update_responses(training, machine)}" for stage, training in recipe.trainings()]:
        lines.append(f"responses in an update, which grow with the processes: {', '.join(sizes)}")
    if found.overrides:
        lines.append("changed: " + " ".join(found.overrides))
    if refused := why_refused(recipe, machine):
        lines.append(f"the run refuses this: {refused}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"


def table(plans: Sequence[tuple[str, Plan, Plan, int | None]]) -> str:
    """Markdown: one row a recipe, its plan with the student whole in each process and in shards, and the fewest GPUs that it fits on."""

    def cell(found: Plan) -> str:
        fits = "" if found.fits else ", **does not fit**"
        return f"{found.peak / GIB:.0f} GiB ({max(found.phases, key=lambda phase: phase.peak).name}){fits}"

    rows = "".join(
        f"| {name} | {cell(whole)} | {cell(sharded)} | {least or 'more'} | {whole.hours:.1f} |\n"
        for name, whole, sharded, least in plans
    )
    return (
        "| recipe | peak per GPU, student whole | in shards | GPUs, at least | hours, estimated |\n|---|---|---|---|---|\n"
        + rows
    )
