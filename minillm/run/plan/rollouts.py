"""The batches of rollouts of the minillm stage: their operations, and the time to sample, score and rescore them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from minillm.loss.credit import needs_expected_rewards_first
from minillm.models.shape import Shape
from minillm.run.plan import work
from minillm.run.plan.machine import Machine
from minillm.run.plan.memory import SampledModel
from minillm.run.plan.teachers import Teachers, scoring_flops
from minillm.run.plan.work import Lengths, StageTraining
from minillm.run.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """The responses of one batch of rollouts, over all processes."""

    sampled: int
    """By the student, for this batch; the others are replayed or given."""
    scored: int
    """By a teacher when the batch is complete. One that the engine mixes in scores what is sampled meanwhile."""
    rescored: int
    """By a forward of the student before it trains on the batch."""


@dataclass(frozen=True)
class RolloutCost:
    """Operations and seconds of all batches of a stage."""

    flops: float
    """Operations of all processes."""
    sampling: float
    """Seconds in which responses are sampled."""
    teacher: float
    """Seconds in which a teacher of the run scores them; a served teacher's are not among them."""
    rescoring: float
    """Seconds in which the student scores them before it trains on them."""


def batch_of(recipe: Recipe) -> Batch:
    """Count the responses of one batch of rollouts.

    Args:
        recipe: the recipe.

    Returns:
        The numbers of responses.
    """
    rollout = recipe.rollout
    given = round((1 - rollout.on_policy) * rollout.num_rollouts)
    sampled = rollout.num_rollouts - given - round(rollout.replay * (rollout.num_rollouts - given))
    # A teacher that is mixed in scores what is sampled meanwhile, unless a server does the sampling.
    mixed = rollout.teacher_mix > 0 and rollout.engine != "server"
    scored = rollout.num_rollouts - (sampled if mixed else 0)
    # Responses whose log-probabilities under the student come from a forward of the trainer.
    rescored = given
    if recipe.objective.old_logprobs == "trainer" or (
        needs_expected_rewards_first(recipe.objective) and (scored > 0 or recipe.objective.baseline == "value")
    ):
        rescored = rollout.num_rollouts
    return Batch(sampled, scored, rescored)


def batches(training: StageTraining) -> int:
    """How many batches of rollouts the minillm stage samples.

    Args:
        training: the minillm stage.
    """
    return math.ceil(training.updates / work.updates_of_batch(training.recipe, training.machine))


def rollout_cost(training: StageTraining, student: Shape, teachers: Teachers, lengths: Lengths) -> RolloutCost:
    """Operations and seconds of all batches of rollouts.

    Args:
        training: the minillm stage.
        student: the sizes of the student.
        teachers: the sizes of its teachers.
        lengths: average lengths of prompts and responses, where they are known.

    Returns:
        The operations, and the seconds of each part, one after another.
    """
    recipe, machine, itemsize = training.recipe, training.machine, training.itemsize
    rollout, batch, times = recipe.rollout, batch_of(recipe), batches(training)
    prompt, response = lengths.of(recipe)
    mixed = teachers.first if rollout.teacher_mix else None
    engine = SampledModel(recipe, machine, student, itemsize, mixed)
    sampling = times * batch.sampled * engine.flops(prompt, response, rollout.samples_per_prompt)
    scoring = teachers.states_flops(prompt, response)
    scoring += work.needs_logprobs_first(recipe) * teachers.head_flops(response)
    scoring *= times * batch.scored
    rescoring = times * batch.rescored * scoring_flops(student, prompt, response)
    engines, longest = _engines(recipe, machine), rollout.max_new_tokens
    in_one_engine = -(-batch.sampled // engines)
    decoding = machine.decoding_seconds(student, itemsize, in_one_engine, longest, prompt + longest, mixed)
    return RolloutCost(
        sampling + scoring + rescoring,
        replace(machine, processes=engines).seconds(sampling, itemsize) + times * decoding,
        machine.seconds(scoring, itemsize),
        machine.seconds(rescoring, itemsize),
    )


def _engines(recipe: Recipe, machine: Machine) -> int:
    """How many engines sample rollouts at once. A server is taken to be as fast as a GPU of this machine."""
    if recipe.rollout.engine != "server":
        return machine.processes
    return 1 if recipe.rollout.servers == "auto" else max(len(recipe.rollout.servers), 1)
