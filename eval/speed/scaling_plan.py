"""What `minillm plan` says of the points of `scaling.py` before they are measured, and which do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from contenders import Workload
from scaling_suite import SETTINGS

from minillm.data.templates import chat_ids
from minillm.models.device import fast_bfloat16
from minillm.models.flops import UpdateFlops, update_flops
from minillm.models.load import load_tokenizer
from minillm.models.shape import shape_of
from minillm.run.plan import Lengths, Machine, Plan, plan
from minillm.run.recipe import Recipe

# A plan of the memory may be this much too low, by the aim that it is held to.
MARGIN = 1.15


@dataclass(frozen=True)
class Planned:
    """What is expected of a point."""

    seconds: float | None
    """Seconds of an update, or of an evaluation; None where the plan does not count the work."""
    phases: dict[str, float]
    """Seconds of the phases of an update."""
    peak: float | None
    """Bytes of memory of the process."""

    @property
    def record(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return {"seconds": self.seconds, "phases": self.phases, "peak_bytes": self.peak}


def prompt_lengths(work: Workload) -> list[int]:
    """Tokens of each different prompt of an update."""
    tokenizer = load_tokenizer(work.student)
    return [len(chat_ids(messages, tokenizer)) for messages in work.messages()]


def recipe_of(work: Workload) -> Recipe:
    """The recipe of one update of a workload."""
    micro = min(work.sequences, work.micro_batch)
    return Recipe.model_validate(
        {
            "run_dir": "runs/scaling/none",
            "stages": ["minillm"],
            "data": {"train": work.prompts, "heldout": work.prompts, "max_prompt_tokens": work.longest_prompt},
            "teacher": {"source": work.teacher},
            "student": {"source": work.student},
            "objective": {"preset": "recommended", "long_term": 0.0},
            "rollout": {
                "engine": "vllm",
                "num_rollouts": work.sequences,
                "samples_per_prompt": work.samples_per_prompt,
                "inner_epochs": 1,
                "teacher_mix": 0.0,
                "max_new_tokens": work.tokens,
            },
            "training": {
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": work.sequences // micro,
                "max_steps": 1,
                "bf16": fast_bfloat16(),
            },
        }
    )


def plan_update(work: Workload, machine: Machine) -> Planned:
    """Plan one update, given the true lengths of its prompts and responses."""
    prompts, responses = prompt_lengths(work), work.lengths or (work.tokens,)
    lengths = Lengths(sum(prompts) / len(prompts), sum(responses) / len(responses))
    found = plan(recipe_of(work), machine, lengths)
    phases = {phase.name.removeprefix("minillm: "): phase.seconds for phase in found.phases}
    return Planned(sum(phases.values()), phases, found.peak)


def plan_models(model: str, rows: str, prompts: int, count: int, machine: Machine) -> Planned:
    """Plan the answers of several models of one size; the start of each engine is not planned."""
    recipe = Recipe.model_validate(
        {
            "run_dir": "runs/scaling/none",
            "stages": ["evaluate"],
            "data": {
                **{"train": rows, "heldout": rows, "limit": prompts},
                "max_prompt_tokens": SETTINGS["max_prompt_tokens"],
            },
            "teacher": {"source": model},
            "student": {"source": model},
            "evaluate": {name: SETTINGS[name] for name in ("max_new_tokens", "seeds")},
        }
    )
    found: Plan = plan(recipe, machine)
    phase = next(each for each in found.phases if each.name == "evaluate: teacher")
    return Planned(count * phase.seconds, {}, phase.peak)


def operations(work: Workload) -> UpdateFlops:
    """Count the operations of an update, of whose prompts vLLM reads each once for all its responses."""
    prompts = [length for length in prompt_lengths(work) for _ in range(work.samples_per_prompt)]
    responses = work.lengths or (work.tokens,) * work.sequences
    student, teacher = (shape_of(name).dimensions for name in (work.student, work.teacher))
    width = min(student.vocab, teacher.vocab)
    found = update_flops(student, teacher, prompts, responses, width=width)
    read = [0.0 if i % work.samples_per_prompt == 0 else length - 1.0 for i, length in enumerate(prompts)]
    sampling = student.decoding(prompts, responses, read)
    return UpdateFlops(sampling, found.teacher, found.student, found.head)


def does_not_fit(peak: float | None, memory: int) -> str:
    """Why a point is left out before it is tried; empty if it is planned to fit.

    Args:
        peak: Bytes that are expected, if it is known.
        memory: Bytes of the machine's memory.
    """
    if peak is None or peak * MARGIN <= memory:
        return ""
    return (
        f"{peak / 1e9:.1f} GB are expected; with {MARGIN - 1:.0%} more, by which a plan may be too low, the machine's "
        f"{memory / 1e9:.1f} GB do not hold that"
    )


def expected_rows(earlier: dict[float, dict[str, Any]], rows: float) -> Planned:
    """What is expected of reading so many rows, by the largest number of rows that was read: in proportion to them.

    Args:
        earlier: Records by rows.
        rows: The rows.
    """
    smaller = [each for each in earlier if each < rows]
    if not smaller:
        return Planned(None, {}, None)
    largest = max(smaller)
    found, more = earlier[largest], rows / largest
    own = found["ours"]["own_bytes"]
    return Planned(found["ours"]["seconds"] * more, {}, found["ours"]["peak_bytes"] + own * (more - 1))
