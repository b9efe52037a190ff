"""The network's part of the text that `minillm plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from minillm.run.plan.growth import growth
from minillm.run.plan.machine import Machine
from minillm.run.plan.network import SPREADS, Flow, UpdateTime, seconds, spread_flows, traffic
from minillm.run.plan.phases import Planner
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe


def network_report(recipe: Recipe, machine: Machine) -> str:
    """Describe what the weight updates of a recipe send from machine to machine, and where their time goes.

    Args:
        recipe: the recipe.
        machine: the machines that it is planned for.

    Returns:
        The text, in several lines; empty where nothing leaves a machine.
    """
    planner = Planner(recipe, machine)
    stages = [StageTraining(recipe, machine, stage.name) for stage, _ in recipe.trainings()]
    flows = {stage.stage: (stage, traffic(planner, stage)) for stage in stages}
    if machine.nodes == 1 and not any(found for _, found in flows.values()):
        return ""
    lines = [
        f"network: {machine.nodes} machine(s) with {machine.processes // machine.nodes} process(es) each, "
        f"{machine.link / 1e9:g} GB/s to and from each; servers on machines of their own, run_dir on the first "
        "training machine. Bytes of a weight update that all machines send (that pass the busiest link in one "
        "direction):"
    ]
    lines += [_stage_line(stage, found, machine) for stage, found in flows.values()]
    if machine.nodes > 1 and stages:
        lines.append(_spreads_line(planner, stages[-1]))
    total = sum(stage.updates * seconds(found, machine) for stage, found in flows.values())
    lines.append(f"the network adds {total / 3600:.2f} h to the time above, where nothing is computed meanwhile")
    if "minillm" in flows:
        lines += growth_lines(growth(recipe, machine))
    return "\n".join(lines)


def _stage_line(stage: StageTraining, flows: Sequence[Flow], machine: Machine) -> str:
    parts = ", ".join(f"{flow.name} {_size(flow.total)} ({_size(flow.busiest)})" for flow in flows)
    return f"  {stage.stage}: {parts or 'nothing'}; {_time(seconds(flows, machine))}"


def _spreads_line(planner: Planner, stage: StageTraining) -> str:
    """What training alone would send with each way of spreading a model."""
    model = planner.trained_model(stage)
    sizes = {name: sum(flow.busiest for flow in spread_flows(name, stage, model)) for name in SPREADS}
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    return f"  training alone, on the busiest link, in stage {stage.stage}: {parts}"


def growth_lines(times: Sequence[UpdateTime]) -> list[str]:
    """Describe how the time of an update grows with the number of machines, and name the bottlenecks.

    Args:
        times: the time of an update on each number of machines, in order.

    Returns:
        A line for each, and one that says which part takes longest from where.
    """
    lines = ["a weight update of the minillm stage as machines are added, each with as many responses (seconds):"]
    for found in times:
        parts = ", ".join(f"{part} {found.parts[part]:.3g}" for part in found.parts)
        lines.append(
            f"  {found.machine.nodes} machine(s), {found.machine.processes} processes, {found.responses} responses: "
            f"{parts}; {found.responses / found.seconds:.3g} responses a second; bottleneck: {found.bottleneck}"
        )
    spans = [
        f"{name} {_span([found.machine.processes for found in group])}"
        for name, group in groupby(times, lambda found: found.bottleneck)
    ]
    return [*lines, f"bottleneck by the number of processes: {', '.join(spans)}"]


def _span(counts: Sequence[int]) -> str:
    return f"at {counts[0]}" if len(counts) == 1 else f"from {counts[0]} to {counts[-1]}"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _time(taken: float) -> str:
    return f"{taken:.2g} s on the busiest link"
