"""What the stages of a recipe share: its directory, its models' folders, its prompts and rows; bad input is refused here."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minillm.data.config import Source
from minillm.data.encoding import encoder_of
from minillm.data.examples import Example, Prompt, read_examples, read_texts
from minillm.data.rows import read_rows
from minillm.data.templates import render_all, render_answer
from minillm.errors import DataError, InputError
from minillm.models.conventions import Conventions, settle_run
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import padding_bias
from minillm.rollout.engines.choose import choose_engine
from minillm.run.directory import RunState
from minillm.run.recipe import Recipe, Stage

logger = logging.getLogger(__name__)
_SAMPLE = {"responses", "minillm", "evaluate"}
_SUPERVISED = {"finetune", "responses", "warmup", "sft"}


class Run:
    """One recipe in its run directory.

    Raises:
        RunError, DataError, EngineError, ValueError, OSError: everything that can be refused without a model's weights.
    """

    def __init__(self, recipe: Recipe) -> None:
        from minillm.models.adapters import check_adapter_files
        from minillm.models.lora import check_student
        from minillm.models.sources import check_source, find_gguf

        self.recipe = recipe
        self.dir = recipe.run_dir
        self.processes = 1  # that the last training stage ran in
        self.state = RunState(recipe)
        self.train_examples = read_examples(recipe.data.train, recipe.data.limit)
        self.heldout_examples = read_examples(recipe.data.heldout, recipe.data.limit)
        if _SAMPLE & set(recipe.stages):
            choose_engine(recipe.rollout.engine)
        self._check_sizes()
        pruned, gguf = recipe.student.source == "prune", find_gguf(recipe.teacher.source)
        chat = recipe.data.template == "chat"
        self.conventions: Conventions = settle_run(
            recipe.teacher.source, None if pruned else recipe.student.source, template=chat
        )
        for source in [recipe.teacher.source] if pruned else [recipe.teacher.source, recipe.student.source]:
            check_source(source)
        if not pruned:
            self._check_model(recipe.student.source, "student")
        elif recipe.student.lora is not None and not gguf:
            check_student(recipe.teacher.source, recipe.student.lora)
        self._check_model(recipe.teacher.source, "teacher")
        if recipe.teacher.adapter and "teacher" in recipe.stages:
            check_adapter_files(recipe.teacher.source, recipe.teacher.adapter)
        self.untuned = str(self.dir / "teacher") if gguf or recipe.teacher.adapter else recipe.teacher.source
        self.teacher = str(self.dir / "tuned") if "finetune" in recipe.stages else self.untuned
        self.start = str(self.dir / "pruned") if pruned else recipe.student.source
        self.warmed = str(self.dir / "warmed") if "warmup" in recipe.stages else self.start
        self.fine_tuned = str(self.dir / "sft")
        self.student = str(self.dir / "student")
        self.answers = recipe.responses.file or self.dir / "responses.jsonl"
        self._check_rows()

    def _check_sizes(self) -> None:
        training, rollouts = self.recipe.training, self.recipe.rollout.num_rollouts
        micro, accumulation = (
            training.get("per_device_train_batch_size", 8),
            training.get("gradient_accumulation_steps", 1),
        )
        processes = int(os.environ.get("WORLD_SIZE", 1))
        sharded = any(map(_deals_out, (training, self.recipe.warmup.training, self.recipe.sft)))
        lora = self.recipe.student.lora
        if sharded and lora is not None and lora.quantization:
            raise InputError(
                "student.lora.quantization: a quantised student is not dealt out over processes (FSDP, ZeRO-3): use "
                "recipes/accelerate/8-gpus.yaml"
            )
        if "minillm" in self.recipe.stages and rollouts % (micro * accumulation * processes):
            raise InputError(
                f"rollout.num_rollouts ({rollouts}) must be a multiple of the responses of one update: "
                f"per_device_train_batch_size × gradient_accumulation_steps × processes ({micro} × {accumulation} × {processes})"
            )

        for _, section, settings in self.recipe.trainings():
            if settings.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
                raise InputError(
                    f"{section}.deepspeed: DeepSpeed is not installed (pip install deepspeed): leave it out, or use FSDP2"
                )

    def _check_model(self, source: str, who: str) -> None:
        """Before weights load."""
        from minillm.models.configs import attends_fully, context_length, text_config
        from minillm.models.lora import check_student
        from minillm.models.pruning.depth import check_keep_layers
        from minillm.models.quantization import check_quantization
        from minillm.models.sources import find_gguf
        from minillm.models.vocabulary import check_tokenizer_fits, token_count

        recipe, config = self.recipe, text_config(source)
        check_tokenizer_fits(self.conventions.tokenizer, config, who)
        if (
            who == "teacher"
            and "student" in recipe.stages
            and recipe.student.source == "prune"
            and recipe.student.keep_layers is not None
        ):
            check_keep_layers(config.num_hidden_layers, recipe.student.keep_layers)
        if _SAMPLE & set(recipe.stages):
            chosen = choose_engine(recipe.rollout.engine, config)
            if chosen == "vllm" and torch.cuda.is_available():  # refused by name, before weights load
                padding_bias(token_count(self.conventions.tokenizer), config.vocab_size)
        limit = context_length(config)
        for section, stages in (("rollout", {"minillm"}), ("responses", _SUPERVISED), ("evaluate", {"evaluate"})):
            new = getattr(recipe, section).max_new_tokens
            if limit is not None and stages & set(recipe.stages) and recipe.data.max_prompt_tokens + new > limit:
                raise InputError(
                    f"data.max_prompt_tokens + {section}.max_new_tokens ({recipe.data.max_prompt_tokens} + {new}) exceed the {who}'s "
                    f"context of {limit} tokens ({source})"
                )
        if who == "student" and recipe.student.lora is not None:
            if recipe.student.lora.quantization and config.model_type == "gpt2":
                raise InputError(
                    f"student.lora.quantization: bitsandbytes does not take the layers of GPT-2 ({source}): leave it out"
                )
            check_student(source, recipe.student.lora)
        if who == "teacher" and recipe.teacher.quantization:
            check_quantization(recipe.teacher.quantization)
            if find_gguf(source):
                raise InputError(f"teacher.quantization: {source} is a GGUF file, which is read whole: leave it out")
        if who == "teacher" and "minillm" in recipe.stages and recipe.rollout.teacher_mix and not attends_fully(config):
            raise InputError(
                f"rollout.teacher_mix: mixing needs a teacher whose every layer is full attention, and {source} has sliding windows: set "
                "rollout.teacher_mix: 0"
            )
        block = recipe.objective.language_model_block
        if limit is not None and recipe.data.text is not None and "minillm" in recipe.stages and block > limit:
            raise InputError(
                f"objective.language_model_block: {block} exceeds the {who}'s context of {limit} tokens ({source})"
            )

    def _check_rows(self) -> None:
        """Render everything that the stages will read, so that no row fails after the stages before, which take hours."""
        recipe, stages = self.recipe, set(self.recipe.stages)
        if stages - {"teacher", "report"}:
            _ = self.train_prompts
        if "evaluate" in stages:
            _ = self.heldout_prompts
        if (
            {"finetune", "sft"} & stages
            or ("warmup" in stages and recipe.warmup.targets == "references")
            or ("minillm" in stages and recipe.rollout.on_policy < 1)
        ):
            _ = self.references
        if stages & {"finetune", "sft", "warmup", "minillm"}:
            _ = self.validation
        if recipe.data.text is not None and "minillm" in stages:
            self._check_texts(recipe.data.text)
        if recipe.responses.file is not None and "warmup" in stages and recipe.warmup.targets == "teacher":
            self.given_responses(recipe.responses.file)

    @staticmethod
    def _check_texts(source: Source) -> None:
        """A file whole; of a data set, which is streamed, the first row."""
        rows = read_texts(source, seed=None)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{source.name}: empty; rows of text are needed")
        if source.file is not None:
            for _ in rows:
                pass

    def given_responses(self, file: Path) -> list[dict[str, Any]]:
        """Rows of a `responses.jsonl`, checked.

        Raises:
            DataError: naming the line; a row without ids, or with ids that are no tokens.
        """
        rows = []
        for fields, place in read_rows(Source(file=file)):
            for name in ("prompt_ids", "response_ids"):
                ids = fields.get(name) if isinstance(fields, dict) else None
                if not (
                    isinstance(ids, list)
                    and ids
                    and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
                ):
                    raise DataError(
                        f"{place}: {name} is missing, or no list of token ids: responses.file is the responses.jsonl of a run with this "
                        "teacher. Answers as text are references: name them output in data.train and set warmup.targets: references"
                    )
                if strange := [token for token in ids if not 0 <= token < self.conventions.vocab_size]:
                    known = self.conventions.vocab_size
                    raise DataError(
                        f"{place}: {name} has id {strange[0]}, beyond the {known} tokens of {self.recipe.teacher.source}"
                    )
            rows.append(fields)
        if not rows:
            raise DataError(f"{file}: empty; the responses.jsonl of a run is needed")
        return rows

    @cached_property
    def train_prompts(self) -> list[Prompt]:
        return self._prompts(self.train_examples, self.recipe.data.train.name)

    @cached_property
    def heldout_prompts(self) -> list[Prompt]:
        return self._prompts(self.heldout_examples, self.recipe.data.heldout.name)

    def _prompts(self, examples: Sequence[Example], what: str) -> list[Prompt]:
        """Rendered prompts; those over the limit are left out and reported."""
        data, tokenizer = self.recipe.data, self.conventions.tokenizer
        prompts, too_long = render_all(examples, data.template, tokenizer, data.max_prompt_tokens, data.system)
        if too_long:
            logger.warning(
                "%s: %d of %d prompts exceed data.max_prompt_tokens (%d) and are left out; the first is row %d",
                what, len(too_long), len(examples), data.max_prompt_tokens, too_long[0].row,
            )  # fmt: skip
        if not prompts:
            raise InputError(f"{what}: no prompt is within data.max_prompt_tokens ({data.max_prompt_tokens})")
        encoder = encoder_of(tokenizer)
        literal = [
            e
            for e in examples
            if any(map(encoder.has_special, (e.text, *e.references, *(content for _, content in e.chat))))
        ]
        if literal:
            logger.warning(
                "%s: %d of %d rows hold the text of a special token of the tokenizer, which is read as ordinary text (first: %s)",
                what, len(literal), len(examples), literal[0].place,
            )  # fmt: skip
        return prompts

    @cached_property
    def references(self) -> list[dict[str, Any]]:
        """Training rows of the data's own answers, each with its end token, cut at responses.max_new_tokens."""
        tokenizer, data = self.conventions.tokenizer, self.recipe.data
        rows = []
        for prompt in self.train_prompts:
            if prompt.example.output:
                ids = render_answer(prompt, data.template, tokenizer, data.system)[
                    : self.recipe.responses.max_new_tokens
                ]
                rows.append({"row": prompt.example.row, "prompt_ids": prompt.ids, "response_ids": ids})
        if not rows:
            raise InputError(f"{data.train.name}: no row has an output to train on")
        return rows

    @cached_property
    def validation(self) -> list[dict[str, Any]] | None:
        """Rows that training stages are validated on, where there are any."""
        data = self.recipe.data
        if data.validation is None:
            return None
        examples = [example for example in read_examples(data.validation, data.validation_limit) if example.references]
        if not examples:
            raise DataError(f"{data.validation.name}: no row has a reference (output) to validate on")
        prompts = self._prompts(examples, data.validation.name)
        return [{"prompt_ids": prompt.ids, "references": list(prompt.example.references)} for prompt in prompts]

    def trained(self) -> dict[Stage, str]:
        """Where every stage of the recipe that trains the student leaves it."""
        folders: dict[Stage, str] = {"warmup": self.warmed, "sft": self.fine_tuned, "minillm": self.student}
        return {stage: folder for stage, folder in folders.items() if stage in self.recipe.stages}

    def rollout(self) -> RolloutConfig:
        return self.recipe.rollout.model_copy(update={"max_prompt_tokens": self.recipe.data.max_prompt_tokens})

    def max_length(self, new_tokens: int) -> int:
        return self.recipe.data.max_prompt_tokens + new_tokens


def _deals_out(training: dict[str, Any]) -> bool:
    """Whether a stage's training arguments, or accelerate's variables, deal the student out over processes: FSDP or ZeRO-3."""
    zero = training.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(zero, str | Path) and Path(zero).is_file():
        zero = json.loads(Path(zero).read_text(encoding="utf-8"))
    if isinstance(zero, dict) and zero.get("zero_optimization", {}).get("stage") == 3:
        return True
    return (
        bool(training.get("fsdp"))
        or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )
