"""How the time of a weight update changes with the number of machines, and what it is spent on."""

from __future__ import annotations

from dataclasses import replace

from minillm.run.plan import network, work
from minillm.run.plan.machine import Machine
from minillm.run.plan.network import UpdateTime
from minillm.run.plan.phases import Planner
from minillm.run.plan.rollouts import batch_of, rollout_cost
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe

_NODES = (1, 2, 4, 8)  # with eight GPUs each they are 8 to 64


def update_time(recipe: Recipe, machine: Machine) -> UpdateTime:
    """Where the time of a weight update of the minillm stage goes.

    A server is taken to be as fast as one GPU of the machine, whether it samples or is a teacher.

    Args:
        recipe: a recipe with the minillm stage.
        machine: the machine, or the machines.

    Returns:
        The seconds by part.
    """
    planner, training = Planner(recipe, machine), StageTraining(recipe, machine, "minillm")
    cost = rollout_cost(training, planner.student, planner.teachers, planner.lengths)
    updates = training.updates
    flows = network.traffic(planner, training)
    return UpdateTime(
        machine,
        training.responses_per_update,
        {
            "sampling": cost.sampling / updates,
            "teacher": cost.teacher / updates + _served_teacher(planner, training),
            "training": (planner.update_cost(training)[1] + cost.rescoring) / updates,
            "network": network.seconds(flows, machine),
        },
        recipe.rollout.overlap,
    )


def _served_teacher(planner: Planner, training: StageTraining) -> float:
    """Seconds of an update in which served teachers read responses, each with all its servers at once."""
    recipe, machine = planner.recipe, planner.machine
    prompt, response = planner.lengths.of(recipe)
    scored = batch_of(recipe).scored / work.updates_of_batch(recipe, machine) / len(planner.teachers)
    return sum(
        replace(machine, processes=len(settings.servers)).seconds(
            scored * shape.dimensions.forward([prompt + response]), machine.itemsize
        )
        for settings, shape in planner.teachers.by_label.values()
        if settings.servers
    )


def growth(recipe: Recipe, machine: Machine) -> list[UpdateTime]:
    """The time of a weight update on 1, 2, 4 and 8 machines, and on as many as are planned for.

    Every GPU keeps its number of responses, in an update and in a batch of rollouts; the servers stay the same.

    Args:
        recipe: a recipe with the minillm stage.
        machine: the machines that it is planned for.

    Returns:
        One entry for each number of machines, in order.
    """
    on_each = machine.processes // machine.nodes
    found = []
    for nodes in sorted({*_NODES, machine.nodes}):
        other = replace(machine, nodes=nodes, processes=nodes * on_each)
        if not (machine.shard and other.processes == 1):
            found.append(update_time(_with_as_many_updates(recipe, machine, other), other))
    return found


def _with_as_many_updates(recipe: Recipe, machine: Machine, other: Machine) -> Recipe:
    """The recipe with batches of rollouts for as many updates on another machine as it has on the first one."""
    updates = work.updates_of_batch(recipe, machine) // recipe.rollout.inner_epochs
    responses = updates * StageTraining(recipe, other, "minillm").responses_per_update
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"num_rollouts": responses})})
