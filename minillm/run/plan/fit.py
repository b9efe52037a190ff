"""Search for settings that make a recipe fit into memory, the least costly ones first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from minillm.distribution import shipped_path
from minillm.models.families import trains_quantized
from minillm.models.shape import shape_of
from minillm.rollout.engines.vllm_memory import GIB, LEAST_CACHE
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import StageTraining, why_refused
from minillm.run.recipe import Recipe
from minillm.run.training_arguments import argument
from minillm.train.update_size import ACCUMULATION, MICRO_BATCH, RESPONSES

Override = Callable[[list[str]], Recipe]
"""Loads the recipe with some `section.key=value` settings changed. It raises an InputError (a ValueError) where they
cannot be combined with the other settings."""


def fit_recipe(recipe: Recipe, machine: Machine, override: Override) -> tuple[Plan, Recipe]:
    """Change settings of a recipe, one after another, until it fits.

    Each step takes the least costly change that makes the largest phase smaller.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.
        override: loads the recipe with changes.

    Returns:
        The plan with the changed settings as its `overrides`, and the changed recipe. They do not fit where no change
        makes the largest phase smaller any more.
    """
    changes: dict[str, str] = {}
    current = plan(recipe, machine)
    while not current.fits:
        smaller = _next_change(recipe, current, machine, override, changes)
        if smaller is None:
            break
        changes, recipe, current = smaller
    return replace(current, overrides=[f"{name}={value}" for name, value in changes.items()]), recipe


def _next_change(
    recipe: Recipe, current: Plan, machine: Machine, override: Override, changes: dict[str, str]
) -> tuple[dict[str, str], Recipe, Plan] | None:
    """The changes so far with the least costly one that reduces the peak; their recipe and their plan."""
    for settings in _candidates(recipe, current, machine):
        more = changes | dict(setting.split("=", 1) for setting in settings)  # a setting may be changed again
        with suppress(ValueError):
            changed = override([f"{name}={value}" for name, value in more.items()])
            found = plan(changed, machine)
            if found.peak < current.peak and why_refused(changed, machine) in (None, why_refused(recipe, machine)):
                return more, changed, found
    return None


def advice(recipe: Recipe, machine: Machine, override: Override) -> list[str]:
    """List the single changes that would make the largest phase smaller.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.
        override: loads the recipe with changes.

    Returns:
        Settings as they are written on the command line, and sharding where that would help.
    """
    current, out = plan(recipe, machine), []
    if machine.processes > 1 and not machine.shard and plan(recipe, replace(machine, shard=True)).peak < current.peak:
        out.append(
            "sharding what is trained: accelerate launch --config_file "
            f"{shipped_path('recipes/accelerate/fsdp2-8-gpus.yaml')} (plan with --shard)"
        )
    for settings in _candidates(recipe, current, machine):
        with suppress(ValueError):  # settings that cannot be combined with the others are not advised
            if plan(override(settings), machine).peak < current.peak:
                out.append(" ".join(settings))
    return out


def fewest_gpus(recipe: Recipe, machine: Machine) -> int | None:
    """The smallest number of GPUs that the recipe fits on without changes, with or without sharding.

    Args:
        recipe: the recipe.
        machine: the machine, with all its processes.

    Returns:
        A power of two below the number of the machine's processes, or that number itself; None where it fits on none.
    """
    counts = sorted({1 << power for power in range(machine.processes.bit_length())} | {machine.processes})
    for count in counts:
        for shard in (False, True):
            if plan(recipe, replace(machine, processes=count, shard=shard and count > 1)).fits:
                return count
    return None


def _candidates(recipe: Recipe, current: Plan, machine: Machine) -> list[list[str]]:
    """Settings to try in turn, the least costly first; each entry is changed together."""
    return [
        *_checkpointing(recipe),
        *_smaller_micro_batches(recipe, machine),
        *_less_engine_memory(recipe, current, machine),
        *_fewer_rollouts(recipe, machine),
        *_other_training(recipe, machine),
    ]


# Changes that cost only time, or that sample fewer rollouts with one set of weights, which are then less off-policy.


def _checkpointing(recipe: Recipe) -> list[list[str]]:
    return [
        [f"{stage.training}.gradient_checkpointing=true"]
        for stage, given in recipe.trainings()
        if not argument(given, "gradient_checkpointing")
    ]


def _smaller_micro_batches(recipe: Recipe, machine: Machine) -> list[list[str]]:
    """Micro-batches divided by their smallest factor; a weight update keeps its number of responses."""
    out: list[list[str]] = []
    for stage, given in recipe.trainings():
        training = StageTraining(recipe, machine, stage.name)
        micro, factor = training.micro_batch_size, _smallest_factor(training.micro_batch_size)
        if factor is not None:
            smaller = [f"{stage.training}.{MICRO_BATCH}={micro // factor}"]
            if RESPONSES not in given:  # from which the accumulation follows
                smaller.append(f"{stage.training}.{ACCUMULATION}={training.accumulation_steps * factor}")
            out.append(smaller)
    return out


def _less_engine_memory(recipe: Recipe, current: Plan, machine: Machine) -> list[list[str]]:
    """The engine's own choice of its memory instead of the recipe's; on a CPU then a smaller cache."""
    if recipe.rollout.engine_memory is not None:
        return [["rollout.engine_memory=null"]]
    cache = max((phase.parts.get("vLLM's cache", 0.0) for phase in current.phases), default=0.0)
    if machine.gpu or cache <= LEAST_CACHE:
        return []
    # With half of the cache, sequences wait for each other.
    return [[f"rollout.engine_memory={max(cache / 2, LEAST_CACHE) / GIB:.3g}"]]


def _fewer_rollouts(recipe: Recipe, machine: Machine) -> list[list[str]]:
    """Fewer rollouts in a batch, which stay a multiple of a weight update and of the samples of a prompt."""
    if "minillm" not in recipe.stages:
        return []
    update = StageTraining(recipe, machine, "minillm").responses_per_update
    unit = math.lcm(update, recipe.rollout.samples_per_prompt)
    units, remainder = divmod(recipe.rollout.num_rollouts, unit)
    if remainder or (factor := _smallest_factor(units)) is None:
        return []
    return [[f"rollout.num_rollouts={units // factor * unit}"]]


# Changes that change what is trained, but only a little.


def _other_training(recipe: Recipe, machine: Machine) -> list[list[str]]:
    teacher, lora = recipe.teacher.first, recipe.student.lora
    source = recipe.student.model_like(teacher.source)
    # The run refuses a quantised student that is sharded, or whose family bitsandbytes cannot quantise.
    quantizable = not machine.shard and trains_quantized(shape_of(source).config)
    out: list[list[str]] = []
    unmixed = ["rollout.teacher_mix=0"] if "minillm" in recipe.stages and recipe.rollout.teacher_mix else []
    if unmixed:
        out.append(unmixed)
    if machine.processes > 1 and not teacher.shard and not recipe.teacher.several:
        out.append(["teacher.shard=true", *unmixed])
    for name, each in recipe.teacher.by_name.items():
        section = f"teacher.{name}" if name else "teacher"
        if not (name and each.servers):
            out += [[f"{section}.quantization={bits}"] for bits in _fewer_bits(each.quantization)]
    if lora is None:
        out.append(["student.lora.rank=16"])
    if quantizable and (lora is None or lora.quantization is None):
        out.append([*["student.lora.rank=16"] * (lora is None), "student.lora.quantization=4bit"])
    return out


def _fewer_bits(quantization: str | None) -> Sequence[str]:
    return {None: ("8bit", "4bit"), "8bit": ("4bit",)}.get(quantization, ())


def _smallest_factor(number: int) -> int | None:
    """The smallest factor of a number above 1; None where there is none."""
    return next((factor for factor in range(2, number + 1) if number % factor == 0), None)
