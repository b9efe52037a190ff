"""Settings that make a recipe fit, the least costly first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from minillm.models.shape import shape_of
from minillm.rollout.engines.vllm_memory import GIB, LEAST_CACHE
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import update_responses, why_refused
from minillm.run.recipe import Recipe
from minillm.run.training_arguments import argument

Overridden = Callable[[list[str]], Recipe]
"""Gives the recipe with some `section.key=value` settings changed; refuses (ValueError) what cannot be combined with the rest."""


def fitted(recipe: Recipe, machine: Machine, overridden: Overridden) -> tuple[Plan, Recipe]:
    """The plan of a recipe with changes that make it fit: again and again the least costly of those that make its largest phase smaller."""
    changes: dict[str, str] = {}
    current = plan(recipe, machine)
    while not current.fits:
        smaller = _smaller(recipe, current, machine, overridden, changes)
        if smaller is None:
            break
        changes, recipe, current = smaller
    return replace(current, overrides=[f"{name}={value}" for name, value in changes.items()]), recipe


def _smaller(
    recipe: Recipe, current: Plan, machine: Machine, overridden: Overridden, changes: dict[str, str]
) -> tuple[dict[str, str], Recipe, Plan] | None:
    for settings in _exact(recipe, current, machine) + _costly(recipe, machine):
        more = changes | dict(setting.split("=", 1) for setting in settings)  # a batch that is halved again
        with suppress(ValueError):
            changed = overridden([f"{name}={value}" for name, value in more.items()])
            found = plan(changed, machine)
            if found.peak < current.peak and why_refused(changed, machine) in (None, why_refused(recipe, machine)):
                return more, changed, found
    return None


def advice(recipe: Recipe, machine: Machine, overridden: Overridden) -> list[str]:
    """What would make the largest phase smaller; see `fitted`."""
    current, out = plan(recipe, machine), []
    if machine.processes > 1 and not machine.shard and plan(recipe, replace(machine, shard=True)).peak < current.peak:
        out.append(
            "what is trained in shards: accelerate launch --config_file recipes/accelerate/fsdp2-8-gpus.yaml (plan with --shard)"
        )
    for settings in _exact(recipe, current, machine) + _costly(recipe, machine):
        with suppress(ValueError):  # what cannot be combined with the rest is no advice
            if plan(overridden(settings), machine).peak < current.peak:
                out.append(" ".join(settings))
    return out


def fewest(recipe: Recipe, machine: Machine) -> int | None:
    """The fewest of 1, 2, 4 … and all of the machine's GPUs that the recipe fits on as it is, the student whole or in shards."""
    counts = sorted({1 << power for power in range(machine.processes.bit_length())} | {machine.processes})
    plans = ((count, shard) for count in counts for shard in (False, True))
    return next(
        (n for n, shard in plans if plan(recipe, replace(machine, processes=n, shard=shard and n > 1)).fits), None
    )


def _exact(recipe: Recipe, current: Plan, machine: Machine) -> list[list[str]]:
    """Settings that cost time alone, and fewer rollouts between two sets of weights, which are then less off policy."""
    out = [
        [f"{stage.training}.gradient_checkpointing=true"]
        for stage, training in recipe.trainings()
        if not argument(training, "gradient_checkpointing")
    ]
    for stage, training in recipe.trainings():
        micro, accumulation = (
            argument(training, "per_device_train_batch_size"),
            argument(training, "gradient_accumulation_steps"),
        )
        if (part := _divisor(micro)) is not None:  # an update keeps its responses
            out.append(
                [
                    f"{stage.training}.per_device_train_batch_size={micro // part}",
                    f"{stage.training}.gradient_accumulation_steps={accumulation * part}",
                ]
            )
    if recipe.rollout.engine_memory is not None:
        out.append(["rollout.engine_memory=null"])
    elif not machine.gpu:
        cache = max((phase.parts.get("vLLM's cache", 0.0) for phase in current.phases), default=0.0)
        if cache > LEAST_CACHE:  # sequences wait for each other
            out.append([f"rollout.engine_memory={max(cache / 2, LEAST_CACHE) / GIB:.3g}"])
    if "minillm" in recipe.stages:
        unit = math.lcm(update_responses(recipe.training, machine), recipe.rollout.samples_per_prompt)
        batches, rest = divmod(recipe.rollout.num_rollouts, unit)
        if not rest and (part := _divisor(batches)) is not None:
            out.append([f"rollout.num_rollouts={batches // part * unit}"])
    return out


def _costly(recipe: Recipe, machine: Machine) -> list[list[str]]:
    """Settings that train something else than the recipe, but nearly so."""
    teacher, lora = recipe.teacher, recipe.student.lora
    source = teacher.source if recipe.student.source == "prune" else recipe.student.source
    quantizable = not machine.shard and shape_of(source).config.model_type != "gpt2"  # else the run refuses it
    out: list[list[str]] = []
    unmixed = ["rollout.teacher_mix=0"] if "minillm" in recipe.stages and recipe.rollout.teacher_mix else []
    if unmixed:
        out.append(unmixed)
    if machine.processes > 1 and not teacher.shard:
        out.append(["teacher.shard=true", *unmixed])
    out += [[f"teacher.quantization={bits}"] for bits in _fewer_bits(teacher.quantization)]
    if lora is None:
        out.append(["student.lora.rank=16"])
    if quantizable and (lora is None or lora.quantization is None):
        out.append([*["student.lora.rank=16"] * (lora is None), "student.lora.quantization=4bit"])
    return out


def _fewer_bits(quantization: str | None) -> Sequence[str]:
    return {None: ("8bit", "4bit"), "8bit": ("4bit",)}.get(quantization, ())


def _divisor(number: int) -> int | None:
    """The smallest above 1."""
    return next((part for part in range(2, number + 1) if number % part == 0), None)
