"""What the command says of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.phases import Plan
from minillm.run.plan.work import update_responses, why_refused
from minillm.run.recipe import Recipe


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
    if sizes := [f"{stage} {update_responses(training, machine)}" for stage, _, training in recipe.trainings()]:
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

    def cell(plan: Plan) -> str:
        fits = "" if plan.fits else ", **does not fit**"
        return f"{plan.peak / GIB:.0f} GiB ({max(plan.phases, key=lambda phase: phase.peak).name}){fits}"

    rows = "".join(
        f"| {name} | {cell(whole)} | {cell(sharded)} | {least or 'more'} | {whole.hours:.1f} |\n"
        for name, whole, sharded, least in plans
    )
    return (
        "| recipe | peak per GPU, student whole | in shards | GPUs, at least | hours, estimated |\n|---|---|---|---|---|\n"
        + rows
    )
