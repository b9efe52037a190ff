"""What a recipe's stages read, draw and train on: rows, tokens, updates, validations. Text is measured, not tokenised."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from minillm.data.config import Source
from minillm.data.examples import Example, read_examples
from minillm.data.files import read_jsonl
from minillm.data.templates import prompt_text
from minillm.run.plan.machine import Machine
from minillm.run.recipe import Recipe
from minillm.run.training_arguments import argument

_UNREAD = 11_435  # rows of a data set that is not read: Dolly's without those that the paper keeps apart
_BYTES = 4  # of text in a token
_TURN = 6  # tokens by which a chat template marks a message
_SAMPLE = 1000  # rows whose text is measured


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of a data source."""

    prompts: int
    referenced: int
    """Those with a reference."""
    prompt: float
    """Tokens of one, on average."""
    answer: float
    """Tokens of a reference."""


def item_size(training: dict[str, Any], machine: Machine) -> int:
    """Bytes of the numbers that a stage computes with."""
    return 2 if machine.bf16 and (argument(training, "bf16") or argument(training, "fp16")) else 4


def update_responses(training: dict[str, Any], machine: Machine) -> int:
    """Responses that an update trains on, in all processes."""
    micro, accumulation = (
        argument(training, "per_device_train_batch_size"),
        argument(training, "gradient_accumulation_steps"),
    )
    return micro * accumulation * machine.processes


def why_refused(recipe: Recipe, machine: Machine) -> str | None:
    """Why the run would refuse a recipe on as many processes, if it would."""
    update, rollouts = update_responses(recipe.training, machine), recipe.rollout.num_rollouts
    if "minillm" in recipe.stages and rollouts % update:
        return (
            f"rollout.num_rollouts ({rollouts}) is no multiple of the {update} responses of an update on {machine.processes} process(es): "
            "change it, or training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    if machine.shard and recipe.student.lora is not None and recipe.student.lora.quantization:
        return "student.lora.quantization: a quantised student is not dealt out over processes: leave it out, or plan without --shard"
    return None


def updates_of_batch(recipe: Recipe, machine: Machine) -> int:
    """Updates between two draws of rollouts."""
    return (
        max(recipe.rollout.num_rollouts // update_responses(recipe.training, machine), 1) * recipe.rollout.inner_epochs
    )


def updates_per_epoch(recipe: Recipe, stage: str, training: dict[str, Any], machine: Machine) -> int:
    """As the stage's trainer counts them."""
    if stage == "minillm":
        drawn = rows(recipe, "train").prompts * recipe.rollout.samples_per_prompt
        return max(drawn // recipe.rollout.num_rollouts, 1) * updates_of_batch(recipe, machine)
    count = trained_rows(recipe, stage).referenced
    if stage == "warmup":  # what does not fill a last update is left out
        return max(count // update_responses(training, machine), 1)
    batches = -(-count // (argument(training, "per_device_train_batch_size") * machine.processes))
    return max(-(-batches // argument(training, "gradient_accumulation_steps")), 1)


def updates(recipe: Recipe, stage: str, training: dict[str, Any], machine: Machine) -> int:
    """`max_steps`, or without it as many as `num_train_epochs` have."""
    steps = argument(training, "max_steps")
    if steps >= 0:
        return max(steps, 1)
    return max(
        math.ceil(argument(training, "num_train_epochs") * updates_per_epoch(recipe, stage, training, machine)), 1
    )


def validations(training: dict[str, Any], updates: int, per_epoch: int) -> int:
    """Times that a stage of so many updates is validated, as transformers' `DefaultFlowCallback` has it."""
    strategy, delay = argument(training, "eval_strategy"), argument(training, "eval_delay")
    at_start = int(argument(training, "eval_on_start"))
    if strategy == "epoch":
        epochs = math.ceil(updates / per_epoch)
        return at_start + sum(min(epoch, updates / per_epoch) >= delay for epoch in range(1, epochs + 1))
    if strategy != "steps":
        return at_start
    every = argument(training, "eval_steps") or argument(training, "logging_steps")
    every = max(math.ceil(every * updates) if every < 1 else int(every), 1)
    due = {*range(every, updates + 1, every), updates}
    return at_start + sum(step >= delay for step in due)


def trained_rows(recipe: Recipe, stage: str) -> Rows:
    """What a supervised stage trains on: rows with a reference, or with the teacher's answer, where no file says half as long as may be."""
    train = rows(recipe, "train")
    if stage != "warmup" or recipe.warmup.targets == "references":
        return train
    file, drawn, answer = (
        recipe.responses.file,
        train.prompts * recipe.responses.samples_per_prompt,
        recipe.responses.max_new_tokens / 2,
    )
    if file is not None and file.is_file():
        given = read_jsonl(file)
        drawn = len(given)
        answer = _mean([len(row["response_ids"]) for row in given if "response_ids" in row]) or answer
    return dataclasses.replace(train, referenced=drawn, answer=answer)


def rows(recipe: Recipe, name: Literal["train", "heldout", "validation"]) -> Rows:
    """Of a file what is in it; of a data set, which is not read, what its split says, and half of the longest prompt and answer."""
    data, answer = recipe.data, recipe.responses.max_new_tokens
    source: Source = getattr(data, name)
    limit = data.validation_limit if name == "validation" else data.limit
    if source.file is None or not source.file.is_file():
        count = sum(map(_declared, source.split.split("+")))
        count = min(count, limit or count)
        return Rows(count, count, data.max_prompt_tokens / 2, answer / 2)
    stamp = source.file.stat()
    return _measured(
        source.model_dump_json(), (stamp.st_mtime_ns, stamp.st_size), limit, data.template, data.system, data.max_prompt_tokens, answer
    )  # fmt: skip


@cache
def _measured(
    source: str,
    stamp: tuple[int, int],
    limit: int | None,
    template: str,
    system: str | None,
    longest: int,
    longest_answer: int,
) -> Rows:
    """`stamp`: by which a file that has changed is read again."""
    examples = read_examples(Source.model_validate_json(source), limit)
    some = examples[:: max(len(examples) // _SAMPLE, 1)]
    prompts = [min(_prompt_tokens(example, template, system), longest) for example in some]
    answers = [min(_tokens(example.output) + 1, longest_answer) for example in some if example.references]
    referenced = sum(bool(example.references) for example in examples)
    return Rows(len(examples), referenced, _mean(prompts), _mean(answers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _tokens(text: str) -> float:
    return len(text.encode(errors="replace")) / _BYTES


def _prompt_tokens(example: Example, template: str, system: str | None) -> float:
    if template != "chat":
        return _tokens(prompt_text(example, template, system))
    said = [text for _, text in example.chat or (("user", example.text),)]
    if system is not None and (not example.chat or example.chat[0][0] != "system"):
        said.append(system)
    return sum(map(_tokens, said)) + _TURN * (len(said) + 1)  # one turn opens the answer


def _declared(split: str) -> int:
    """Rows of one split by its slice; in percent of, or without an end as, a data set that is not read."""
    found = re.search(r"\[(-?\d+)?(%?):(-?\d+)?(%?)\]", split)
    if found is None:
        return _UNREAD
    start, end = (
        None if number is None else int(number) * _UNREAD // 100 if percent else int(number)
        for number, percent in ((found[1], found[2]), (found[3], found[4]))
    )
    if (
        end is None and not found[2]
    ):  # from a row on, of nobody knows how many: as many; the last rows, counted from the end
        return -start if start is not None and start < 0 else _UNREAD
    first, last = (place + _UNREAD if place < 0 else place for place in (start or 0, _UNREAD if end is None else end))
    return max(last - first, 0)
