"""Everything that a run would refuse, one rendered prompt and one answer, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from minillm.models.device import device, working_dtype
from minillm.models.load import load_model
from minillm.models.sources import find_gguf
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.context import Run
from minillm.run.plan.machine import machine_for
from minillm.run.plan.phases import plan
from minillm.run.plan.work import why_refused
from minillm.run.recipe import Recipe

_LONGEST_ANSWER = 64  # tokens: to see that the template is right, not what the student is worth


@dataclass(frozen=True)
class DryRun:
    """What a run would begin with."""

    rows: dict[str, tuple[int, int]]
    """Prompts that are short enough, and all rows, by the name of the data."""
    prompt: str
    """The first training prompt as the models read it, with its control tokens."""
    prompt_tokens: int
    answer: str | None
    """An answer to it; None where no model is on this machine, or none was asked for."""
    answered_by: str
    """The model that answered, or would."""
    memory: str
    """The largest phase of the plan for this machine."""
    fits: bool
    """Whether the plan is within the memory of this machine."""


def dry_run(recipe: Recipe, *, sample: bool = True) -> DryRun:
    """Do what a run does before its first stage, and answer one prompt. Nothing is written.

    Args:
        recipe: the recipe.
        sample: whether to answer; the weights of a model are loaded, if they are on this machine.

    Raises:
        MinillmError: what the run would refuse.
    """
    run = Run(recipe)
    for number, stage in enumerate(recipe.stages):
        run.state.check(stage)
        run.state.needs(stage, recipe.stages[:number])
    prompt = run.train_prompts[0]
    model = recipe.teacher.first.source if recipe.student.is_made else recipe.student.source
    memory, fits = _memory(recipe)
    return DryRun(
        rows={
            "training": (len(run.train_prompts), len(run.train_examples)),
            "held-out": (len(run.heldout_prompts), len(run.heldout_examples)),
        },
        prompt=run.conventions.tokenizer.decode(prompt.ids),
        prompt_tokens=len(prompt.ids),
        answer=_answer(run, model, prompt.ids) if sample and is_here(model) else None,
        answered_by=model,
        memory=memory,
        fits=fits,
    )


def is_here(model: str) -> bool:
    """Whether the weights of a model are on this machine: in a folder, a GGUF file or the hub's cache."""
    if Path(model).exists() or find_gguf(model) is not None:
        return True
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(model, file), str) for file in files)


def _answer(run: Run, source: str, prompt: list[int]) -> str:
    """A response to a prompt, sampled as rollouts are, with its control tokens."""
    rollout = run.recipe.rollout
    length = min(rollout.max_new_tokens, _LONGEST_ANSWER)
    sampling = run.conventions.sampling(length, rollout.temperature, rollout.stop)
    model = load_model(source, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
    [response] = TransformersEngine(model).generate([prompt], sampling, [run.recipe.seed])
    return run.conventions.tokenizer.decode(response.response_ids)


def _memory(recipe: Recipe) -> tuple[str, bool]:
    """The largest phase on this machine, in words, and whether everything fits."""
    gpu = torch.cuda.is_available()
    machine, _ = machine_for(None if gpu else 0, flops=1e12)  # its speed does not matter here
    if refused := why_refused(recipe, machine):
        return refused, False
    found = plan(recipe, machine)
    largest = max(found.phases, key=lambda phase: phase.peak, default=None)
    if largest is None:
        return "no stage needs much", True
    where = "each GPU" if gpu else "this machine"
    return f"{found.peak / GIB:.1f} of the {machine.memory / GIB:.1f} GiB of {where} ({largest.name})", found.fits
