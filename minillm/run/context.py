"""What the stages of a run share: its directory, the folders of its models, its prompts and rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minillm.data.examples import Example, ExampleFile, Prompt, open_examples, open_texts, read_examples
from minillm.data.lazy import mapped
from minillm.data.prompts import LazyPrompts, Rendering, literal_specials
from minillm.data.sampling import Sampling
from minillm.data.templates import render_all, render_answer
from minillm.errors import DataError, InputError
from minillm.models.conventions import Conventions, settle_run
from minillm.models.pickles import allow_pickle
from minillm.models.sources import find_gguf
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine, EngineSizing
from minillm.rollout.engines.choose import make_engine
from minillm.run.checks import check_models, check_rows, check_sizes, check_teacher_names
from minillm.run.directory import RunState
from minillm.run.recipe import Recipe
from minillm.run.responses_file import ResponseCheck, open_responses
from minillm.run.stages import STAGES, stage_named
from minillm.teacher.config import teacher_label

logger = logging.getLogger(__name__)


class Run:
    """One recipe in its run directory.

    Attributes:
        dir: the run directory. state: which stages are finished.
        processes: how many processes the last training stage ran in.
        conventions: tokenizer, end tokens, vocabulary size and context, the same for every model.
        untuned, teacher: folder or hub id of the teacher before and after the finetune stage; of several the first.
        teachers: folder or hub id of every teacher by name; a single one has an empty name.
        start, pretrained, warmed, fine_tuned, student: those of the student: untrained, after the pretrain stage, after
            the warmup stage, after sft, and after the minillm stage.
        answers: the file of the teacher's responses.

    Raises:
        MinillmError: everything that can be refused without a model's weights.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dir = recipe.run_dir
        self.processes = 1
        self.state = RunState(recipe)
        _allow_pickles(recipe)
        self.train_examples = open_examples(recipe.data.train, recipe.data.limit)
        self.heldout_examples = open_examples(recipe.data.heldout, recipe.data.limit)
        check_sizes(recipe)
        check_teacher_names(recipe, self.train_examples, recipe.data.train)
        if recipe.teacher.several and any(example.teacher is not None for example in self.heldout_examples):
            check_teacher_names(recipe, self.heldout_examples, recipe.data.heldout)  # all rows name one, or none does
        first, *others = recipe.teacher.by_name.items()
        teacher, made, gguf = first[1], recipe.student.is_made, find_gguf(first[1].source)
        self.conventions: Conventions = settle_run(
            teacher.source,
            None if made else recipe.student.source,
            template=recipe.data.template == "chat",
            others={teacher_label(name): other.source for name, other in others},
        )
        check_models(recipe, self.conventions)
        self.untuned = self.folder("teacher") if gguf or teacher.adapter else teacher.source
        self.teacher = self.folder("finetune") if "finetune" in recipe.stages else self.untuned
        self.teachers = {first[0]: self.teacher, **{name: other.source for name, other in others}}
        random = recipe.student.source == "config"
        made_in = str(self.dir / "initial") if random else self.folder("student")
        self.start = made_in if made else recipe.student.source
        self.pretrained = self.folder("pretrain") if "pretrain" in recipe.stages else self.start
        self.warmed = self.folder("warmup") if "warmup" in recipe.stages else self.pretrained
        self.fine_tuned = self.folder("sft")
        self.student = self.folder("minillm")
        self.answers = recipe.responses.file or self.dir / "responses.jsonl"
        check_rows(self)

    def of_teacher(self, prompt: Prompt) -> dict[str, str]:
        """What a row of training data says of its teacher: nothing, unless there are several."""
        return {"teacher": str(prompt.example.teacher)} if self.recipe.teacher.several else {}

    def prompt_row(self, prompt: Prompt) -> dict[str, Any]:
        """The row of a prompt for on-policy training."""
        return {"prompt_ids": prompt.ids, **self.of_teacher(prompt)}

    def folder(self, stage: str) -> str:
        """The folder of this run in which a stage leaves its model."""
        return str(self.dir / str(stage_named(stage).folder))

    @cached_property
    def answer_rows(self) -> Sequence[dict[str, Any]]:
        """The rows of the teacher's responses, checked if the user names their file.

        Raises:
            DataError: naming the line: a row without token ids, or with ids beyond the vocabulary.
        """
        given = self.recipe.responses.file is not None
        teachers = list(self.teachers) if self.recipe.teacher.several else []
        limits = (self.conventions.vocab_size, self.recipe.teacher.first.source)
        return open_responses(Path(self.answers), check=ResponseCheck(*limits, teachers) if given else None)

    @cached_property
    def texts(self) -> Iterable[dict[str, str]] | None:
        """Rows of text for the language-model term, checked; None where the recipe names none."""
        text = self.recipe.data.text
        return None if text is None else open_texts(text, self.recipe.seed)

    @cached_property
    def heldout_texts(self) -> Iterable[dict[str, str]] | None:
        """Rows of held-out text, checked; None where the recipe names none."""
        text = self.recipe.data.heldout_text
        return None if text is None else open_texts(text, self.recipe.seed)

    @cached_property
    def train_prompts(self) -> Sequence[Prompt]:
        """The training prompts that are short enough. Those of a large data set are rendered when they are read."""
        data = self.recipe.data
        if isinstance(self.train_examples, ExampleFile):
            prompts = LazyPrompts(self.train_examples, self._rendering)
            prompts.look_at_some(data.train.name)
            return prompts
        return self._render(self.train_examples, data.train.name)

    def prompts_after(self, row: int, teacher: str) -> Iterator[Prompt]:
        """The training prompts of a teacher, each once, in the order of their rows.

        Args:
            row: the number of the example before the first one.
            teacher: the name of the teacher; empty for a single one, which all rows belong to.
        """
        if isinstance(self.train_prompts, LazyPrompts):
            yield from self.train_prompts.in_order(row, teacher)
        else:
            for prompt in self.train_prompts:
                if prompt.example.row > row and teacher in ("", prompt.example.teacher):
                    yield prompt

    @property
    def _rendering(self) -> Rendering:
        data = self.recipe.data
        return Rendering(data.template, self.conventions.tokenizer, data.max_prompt_tokens, data.system)

    @cached_property
    def heldout_prompts(self) -> list[Prompt]:
        """The held-out prompts that are short enough."""
        return self._render(self.heldout_examples, self.recipe.data.heldout.name)

    def _render(self, examples: Sequence[Example], source: str) -> list[Prompt]:
        """Rendered prompts; the log counts those that are left out as too long, and text that reads like tokens."""
        data, tokenizer = self.recipe.data, self.conventions.tokenizer
        prompts, too_long = render_all(examples, data.template, tokenizer, data.max_prompt_tokens, data.system)
        if too_long:
            logger.warning(
                "%s: %d of %d prompts exceed data.max_prompt_tokens (%d) and are left out; the first is row %d",
                source,
                len(too_long),
                len(examples),
                data.max_prompt_tokens,
                too_long[0].row,
            )
        if not prompts:
            raise InputError(f"{source}: no prompt is within data.max_prompt_tokens ({data.max_prompt_tokens})")
        literal = literal_specials(examples, tokenizer)
        if literal:
            logger.warning(
                "%s: %d of %d rows hold the text of a special token of the tokenizer, which is read as ordinary text "
                "(first: %s)",
                source,
                len(literal),
                len(examples),
                literal[0].place,
            )
        return prompts

    @cached_property
    def references(self) -> Sequence[dict[str, Any]]:
        """Training rows of the data's own answers, each with its end token, cut at responses.max_new_tokens.

        Raises:
            InputError: no row has an answer.
        """
        data, prompts = self.recipe.data, self.train_prompts
        if isinstance(self.train_examples, ExampleFile):
            answered = LazyPrompts(self.train_examples, self._rendering, self.train_examples.answered)
        else:
            answered = [prompt for prompt in prompts if prompt.example.output]
        if not answered:
            raise InputError(f"{data.train.name}: no row has an output to train on")
        return mapped(answered, self._reference, data.max_prompt_tokens + self.recipe.responses.max_new_tokens)

    def _reference(self, prompt: Prompt) -> dict[str, Any]:
        """The row of a prompt and its first reference."""
        data = self.recipe.data
        ids = render_answer(prompt, data.template, self.conventions.tokenizer, data.system)
        ids = ids[: self.recipe.responses.max_new_tokens]
        row = {"row": prompt.example.row, "prompt_ids": prompt.ids, "response_ids": ids}
        return row | self.of_teacher(prompt)

    @cached_property
    def validation(self) -> list[dict[str, Any]] | None:
        """Rows that the stages are validated on; None where the recipe names none.

        Raises:
            DataError: no row has a reference.
        """
        data = self.recipe.data
        if data.validation is None:
            return None
        examples = [e for e in read_examples(data.validation, data.validation_limit) if e.references]
        if not examples:
            raise DataError(f"{data.validation.name}: no row has a reference (output) to validate on")
        check_teacher_names(self.recipe, examples, data.validation)
        prompts = self._render(examples, data.validation.name)
        return [
            {"prompt_ids": prompt.ids, "references": list(prompt.example.references), **self.of_teacher(prompt)}
            for prompt in prompts
        ]

    def trained(self) -> dict[str, str]:
        """The folder of each stage of the recipe that trains the student."""
        return {
            stage.name: self.folder(stage.name)
            for stage in STAGES
            if stage.trains == "student" and stage.name in self.recipe.stages
        }

    def trained_by_label(self) -> dict[str, str]:
        """The same folders, keyed by the name of the student in results (`Stage.label`)."""
        folders = self.trained()
        return {str(stage.label): folders[stage.name] for stage in STAGES if stage.name in folders}

    def rollout(self) -> RolloutConfig:
        """The rollout settings, with the recipe's limit of prompt tokens."""
        return self.recipe.rollout.model_copy(update={"max_prompt_tokens": self.recipe.data.max_prompt_tokens})

    def max_length(self, new_tokens: int) -> int:
        """Tokens of the longest prompt with a response of `new_tokens`."""
        return self.recipe.data.max_prompt_tokens + new_tokens

    def sampling(self, new_tokens: int, temperature: float) -> Sampling:
        """How a model of this run is sampled."""
        return self.conventions.sampling(new_tokens, temperature, self.recipe.rollout.stop)

    def engine(self, folder: str, new_tokens: int) -> Engine:
        """An engine that samples the model in a folder."""
        sizing = EngineSizing.from_config(self.recipe.rollout, self.max_length(new_tokens))
        return make_engine(self.recipe.rollout, folder, sizing, tokenizer=folder)


def _allow_pickles(recipe: Recipe) -> None:
    """Let those models be read from a pickle that the recipe says so of."""
    models = [(teacher.allow_pickle, (teacher.source, teacher.adapter)) for teacher in recipe.teacher.by_name.values()]
    for allowed, sources in [*models, (recipe.student.allow_pickle, (recipe.student.source,))]:
        for source in sources if allowed else ():
            if source is not None:
                allow_pickle(source)
