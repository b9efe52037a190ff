"""How much the stages of a recipe read, sample and train on: rows, tokens, weight updates and validations.

No tokenizer is loaded. The number of tokens is estimated from the length of the text.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Literal

from minillm.data.config import Source
from minillm.data.examples import Example, ExampleFile, open_examples
from minillm.data.files import read_jsonl
from minillm.data.templates import prompt_text
from minillm.errors import InputError
from minillm.loss.credit import needs_sampled_rewards_first
from minillm.models.shape import Shape, shape_of
from minillm.run.plan.machine import Machine
from minillm.run.recipe import Recipe
from minillm.run.stages import stage_named
from minillm.run.stages.stage import Stage
from minillm.run.training_arguments import argument, update_size_refusal, update_sizes
from minillm.train.update_size import MICRO_BATCH, RESPONSES

_UNREAD_ROWS = 11_435  # assumed of a data set that is not read: Dolly's rows without those that the paper holds out
_BYTES_PER_TOKEN = 4  # of text in UTF-8
_MESSAGE_TOKENS = 6  # that a chat template adds to mark a message
_MEASURED_ROWS = 1000  # about as many rows of a file have the length of their text measured


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many rows a data source has, and how long they are."""

    prompts: int
    """Rows in all; each has a prompt."""
    referenced: int
    """Rows with an answer to train on or to compare with."""
    prompt_tokens: float
    """Tokens of a prompt, on average."""
    answer_tokens: float
    """Tokens of an answer, on average."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Average lengths in the minillm stage. What is not given is estimated."""

    prompt: float | None = None
    """Tokens of a prompt."""
    response: float | None = None
    """Tokens of a response."""

    def of(self, recipe: Recipe) -> tuple[float, float]:
        """Return the tokens of a prompt and of a response of a recipe.

        The text of the data tells the first, and responses are taken to be half as long as the longest ones.
        """
        prompt = rows(recipe, "train").prompt_tokens if self.prompt is None else self.prompt
        return prompt, recipe.rollout.max_new_tokens / 2 if self.response is None else self.response


@dataclasses.dataclass(frozen=True)
class StageTraining:
    """The training of one stage of a recipe on a machine: batch sizes and numbers of updates."""

    recipe: Recipe
    """The recipe."""
    machine: Machine
    """The machine that it is planned for."""
    stage: str
    """The name of a stage that trains."""

    @property
    def definition(self) -> Stage:
        """The stage itself, with its facts."""
        return stage_named(self.stage)

    @property
    def arguments(self) -> dict[str, Any]:
        """The stage's `TrainingArguments` as the recipe gives them."""
        return self.definition.arguments(self.recipe)

    def argument(self, name: str) -> Any:
        """One of the stage's `TrainingArguments`, as given or by default."""
        return argument(self.arguments, name)

    @property
    def trains(self) -> str:
        """Which model the stage trains: `student` or `teacher`."""
        return self.definition.trains or "student"

    @property
    def has_adapter(self) -> bool:
        """Whether the stage trains a LoRA adapter instead of the weights."""
        return self.trains == "student" and self.recipe.student.lora is not None

    @property
    def itemsize(self) -> int:
        """Bytes of the numbers that the stage computes with."""
        return 2 if self.machine.bf16 and (self.argument("bf16") or self.argument("fp16")) else 4

    @property
    def micro_batch_size(self) -> int:
        """Responses in one forward and backward of one process."""
        return self._sizes[0]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one process in one weight update."""
        return self._sizes[1]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Responses of a micro-batch, and their number in an update of one process."""
        try:
            return update_sizes(self.arguments, self.machine.processes)
        except InputError:  # which the run refuses, as the plan says; it counts with the next larger update
            share = -(-self.arguments[RESPONSES] // self.machine.processes)
            micro_batch = min(self.argument(MICRO_BATCH), share)
            return micro_batch, -(-share // micro_batch)

    @property
    def responses_per_update(self) -> int:
        """Responses of all processes in one weight update."""
        return self.micro_batch_size * self.accumulation_steps * self.machine.processes

    @cached_property
    def updates_per_epoch(self) -> int:
        """Weight updates in one pass over the data, as the trainer of the stage counts them."""
        if self.definition.response_section == "rollout":
            samples = rows(self.recipe, "train").prompts * self.recipe.rollout.samples_per_prompt
            return max(samples // self.recipe.rollout.num_rollouts, 1) * updates_of_batch(self.recipe, self.machine)
        if self.stage == "pretrain":
            return max(text_blocks(self.recipe) // self.responses_per_update, 1)
        count = trained_rows(self.recipe, self.stage).referenced
        if not self.definition.uses_trl:  # this library's trainer leaves out the rows that do not fill a last update
            return max(count // self.responses_per_update, 1)
        batches = -(-count // (self.micro_batch_size * self.machine.processes))
        return max(-(-batches // self.accumulation_steps), 1)

    @cached_property
    def updates(self) -> int:
        """Weight updates of the stage: `max_steps`, or where that is not given those of `num_train_epochs`."""
        steps = self.argument("max_steps")
        if steps >= 0:
            return max(steps, 1)
        return max(math.ceil(self.argument("num_train_epochs") * self.updates_per_epoch), 1)

    @property
    def validations(self) -> int:
        """How many times the stage is validated, where the recipe has validation data."""
        return validations(self.arguments, self.updates, self.updates_per_epoch)


def why_refused(recipe: Recipe, machine: Machine) -> str | None:
    """The reason why a run would refuse the recipe on this number of processes.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.

    Returns:
        The reason with its remedy, or None where the run would not refuse.
    """
    if refusal := update_size_refusal(recipe, machine.processes):
        return refusal
    for name in recipe.stages:
        if refusal := stage_named(name).refusal(recipe, machine.processes):
            return refusal
    if machine.shard and recipe.student.lora is not None and recipe.student.lora.quantization:
        return "student.lora.quantization: a quantised student cannot be sharded: leave it out, or plan without --shard"
    return None


def updates_of_batch(recipe: Recipe, machine: Machine) -> int:
    """Weight updates of the minillm stage on one batch of rollouts, over all its inner epochs.

    Args:
        recipe: the recipe.
        machine: the machine that it is planned for.

    Returns:
        The number of updates.
    """
    update = StageTraining(recipe, machine, "minillm").responses_per_update
    return max(recipe.rollout.num_rollouts // update, 1) * recipe.rollout.inner_epochs


def layers_per_update(training: StageTraining, model: Shape, scoring: Shape | None = None) -> float:
    """Forwards and backwards of one layer in a weight update; a forward without a backward counts as a third of one.

    Args:
        training: the stage.
        model: the model that it trains.
        scoring: a model that scores the same sequences, if there is one.
    """
    layers = model.layers * (4 / 3 if training.argument("gradient_checkpointing") else 1)
    return training.accumulation_steps * (layers + (0 if scoring is None else scoring.layers / 3))


def needs_logprobs_first(recipe: Recipe) -> bool:
    """Whether the minillm stage computes log p of sampled tokens when rollouts are scored, before the loss does it.

    This costs one product of the teacher's head.

    Args:
        recipe: the recipe.
    """
    mixture_of_trainer = recipe.objective.old_logprobs == "trainer" and recipe.rollout.teacher_mix > 0
    return needs_sampled_rewards_first(recipe.objective) or mixture_of_trainer


def validations(training: dict[str, Any], updates: int, per_epoch: int) -> int:
    """How many times a stage is validated, by the rules of transformers' `DefaultFlowCallback`.

    Args:
        training: the stage's `TrainingArguments` as given.
        updates: weight updates of the stage.
        per_epoch: weight updates in one pass over the data.

    Returns:
        The number of validations.
    """
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
    """The rows that a supervised stage trains on.

    They are the rows with a reference; in the warm-up they are the responses of the teacher, unless its targets are the
    references. Where no file of responses is there yet, a response is taken to be half as long as the longest one.

    Args:
        recipe: the recipe.
        stage: the name of the stage: `finetune`, `warmup` or `sft`.

    Returns:
        The rows, of which the `referenced` ones are trained on.
    """
    train = rows(recipe, "train")
    if stage_named(stage).trains_on_references(recipe):
        return train
    file = recipe.responses.file
    count = train.prompts * recipe.responses.samples_per_prompt
    tokens = recipe.responses.max_new_tokens / 2
    if file is not None and file.is_file():
        given = read_jsonl(file)
        count = len(given)
        tokens = _mean([len(row["response_ids"]) for row in given if "response_ids" in row]) or tokens
    return dataclasses.replace(train, referenced=count, answer_tokens=tokens)


def text_blocks(recipe: Recipe) -> int:
    """Blocks of the text, by the size of its file; of a data set that is not read, by the assumed number of rows."""
    source, block = recipe.data.text, recipe.pretrain.block
    if source is None:
        return 0
    if source.file is None or not source.file.is_file():
        return sum(map(_rows_of_split, source.split.split("+")))
    return max(int(source.file.stat().st_size / _BYTES_PER_TOKEN / block), 1)


def vocabulary(recipe: Recipe) -> int:
    """Rows of the first teacher's head."""
    shape = shape_of(recipe.teacher.first.source)
    return shape.head // shape.hidden


def rows(recipe: Recipe, name: Literal["train", "heldout", "validation"]) -> Rows:
    """The rows of a data source.

    A file is read. A data set of the hub is not: its rows are counted by the slice of its split, and its prompts and
    answers are taken to be half as long as the longest ones that the recipe allows.

    Args:
        recipe: the recipe.
        name: which of the recipe's data sources, which must be given.

    Returns:
        The rows within the recipe's limit.
    """
    data, longest_answer = recipe.data, recipe.responses.max_new_tokens
    source: Source = getattr(data, name)
    limit = data.validation_limit if name == "validation" else data.limit
    if source.file is None or not source.file.is_file():
        count = sum(map(_rows_of_split, source.split.split("+")))
        count = min(count, limit or count)
        return Rows(count, count, data.max_prompt_tokens / 2, longest_answer / 2)
    status = source.file.stat()
    return _rows_of_file(
        source.model_dump_json(),
        (status.st_mtime_ns, status.st_size),
        limit,
        data.template,
        data.system,
        data.max_prompt_tokens,
        longest_answer,
    )


@cache
def _rows_of_file(
    source: str,
    version: tuple[int, int],
    limit: int | None,
    template: str,
    system: str | None,
    longest_prompt: int,
    longest_answer: int,
) -> Rows:
    """The rows of a file, measured; `version` has the cache read a file again when it has changed."""
    examples = open_examples(Source.model_validate_json(source), limit)
    measured = examples[:: max(len(examples) // _MEASURED_ROWS, 1)]
    prompts = [min(_prompt_tokens(example, template, system), longest_prompt) for example in measured]
    answers = [min(_tokens(example.output) + 1, longest_answer) for example in measured if example.references]
    if isinstance(examples, ExampleFile):
        referenced = len(examples.answered)
    else:
        referenced = sum(bool(example.references) for example in examples)
    return Rows(len(examples), referenced, _mean(prompts), _mean(answers))


def _mean(values: Sequence[float]) -> float:
    """The mean; 0 where there are no values."""
    return sum(values) / max(len(values), 1)


def _tokens(text: str) -> float:
    return len(text.encode(errors="replace")) / _BYTES_PER_TOKEN


def _prompt_tokens(example: Example, template: str, system: str | None) -> float:
    if template != "chat":
        return _tokens(prompt_text(example, template, system))
    texts = [text for _, text in example.chat or (("user", example.text),)]
    if system is not None and (not example.chat or example.chat[0][0] != "system"):
        texts.append(system)
    return sum(map(_tokens, texts)) + _MESSAGE_TOKENS * (len(texts) + 1)  # one more opens the answer


def _rows_of_split(split: str) -> int:
    """The rows of one split of a data set that is not read, such as `train[:1000]`.

    Percentages are taken of the assumed number of rows, to which a slice without an end extends as well.
    """
    found = re.search(r"\[(-?\d+)?(%?):(-?\d+)?(%?)\]", split)
    if found is None:
        return _UNREAD_ROWS
    start, end = (
        None if number is None else int(number) * _UNREAD_ROWS // 100 if percent else int(number)
        for number, percent in ((found[1], found[2]), (found[3], found[4]))
    )
    if end is None and not found[2]:
        # A negative start counts from the end. An unknown number of rows follows a positive one: the assumed number.
        return -start if start is not None and start < 0 else _UNREAD_ROWS
    limits = (start or 0, _UNREAD_ROWS if end is None else end)
    first, last = (number + _UNREAD_ROWS if number < 0 else number for number in limits)
    return max(last - first, 0)
