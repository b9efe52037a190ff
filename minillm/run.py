"""What the stages of a recipe share: its directory, its models' folders, its prompts and rows; bad input is refused here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minillm.data.examples import Example, Prompt, read_examples, read_texts, render_all, render_answer
from minillm.recipe import Recipe, RolloutConfig, Stage
from minillm.rollout.build import choose_engine
from minillm.rollout.engine import padding_bias
from minillm.run_state import RunState

logger = logging.getLogger(__name__)


class Run:
    """One recipe in its run directory."""

    def __init__(self, recipe: Recipe) -> None:
        from minillm.models.load import check_student, find_gguf, load_tokenizer
        from minillm.models.vocabulary import check_same_tokens

        self.recipe = recipe
        self.dir = recipe.run_dir
        self.processes = 1  # that the last training stage ran in
        self.state = RunState(recipe)
        # Everything that can be refused without a model is refused here.
        self.train_examples = read_examples(recipe.data.train, recipe.data.limit)
        self.heldout_examples = read_examples(recipe.data.heldout, recipe.data.limit)
        if {"responses", "minillm", "evaluate"} & set(recipe.stages):
            choose_engine(recipe.rollout.engine)
        self._check_sizes()
        gguf = find_gguf(recipe.teacher.source)
        teacher_tokenizer = None if gguf else load_tokenizer(recipe.teacher.source)  # a missing folder or hub id is refused here
        if recipe.student.source != "prune":
            check_same_tokens(load_tokenizer(recipe.student.source), teacher_tokenizer or load_tokenizer(recipe.teacher.source))
            self._check_model(recipe.student.source, "student")
        elif recipe.student.lora is not None and not gguf:
            check_student(recipe.teacher.source, recipe.student.lora)
        self._check_model(recipe.teacher.source, "teacher")
        if recipe.data.text is not None and "minillm" in recipe.stages:
            next(read_texts(recipe.data.text, seed=None), None)  # and not after the stages before, which take hours
        self.untuned = str(self.dir / "teacher") if gguf or recipe.teacher.adapter else recipe.teacher.source
        self.teacher = str(self.dir / "tuned") if "finetune" in recipe.stages else self.untuned
        self.start = str(self.dir / "pruned") if recipe.student.source == "prune" else recipe.student.source
        self.warmed = str(self.dir / "warmed") if "warmup" in recipe.stages else self.start
        self.fine_tuned = str(self.dir / "sft")
        self.student = str(self.dir / "student")
        self.answers = recipe.responses.file or self.dir / "responses.jsonl"

    def _check_sizes(self) -> None:
        training, rollouts = self.recipe.training, self.recipe.rollout.num_rollouts
        micro, accumulation = training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        sharded = any(map(_deals_out, (training, self.recipe.warmup.training, self.recipe.sft)))
        lora = self.recipe.student.lora
        if sharded and lora is not None and lora.quantization:
            raise ValueError(
                "student.lora.quantization: a quantised student is not dealt out over processes (FSDP, ZeRO-3): use "
                "recipes/accelerate/8-gpus.yaml"
            )
        if "minillm" in self.recipe.stages and rollouts % (micro * accumulation * processes):
            raise ValueError(
                f"rollout.num_rollouts ({rollouts}) must be a multiple of the responses of one update: "
                f"per_device_train_batch_size × gradient_accumulation_steps × processes ({micro} × {accumulation} × {processes})"
            )

    def _check_model(self, source: str, who: str) -> None:
        """Before weights load; of a GGUF file the config is known once the teacher stage has made a folder of it."""
        from minillm.models.load import (
            attends_fully,
            check_quantization,
            check_student,
            context_length,
            find_gguf,
            load_tokenizer,
            text_config,
        )
        from minillm.models.vocabulary import token_count

        if find_gguf(source):
            return
        recipe, config = self.recipe, text_config(source)
        if {"responses", "minillm", "evaluate"} & set(recipe.stages):
            chosen = choose_engine(recipe.rollout.engine, config)
            if chosen == "vllm" and torch.cuda.is_available():  # refused by name, before weights load
                padding_bias(token_count(load_tokenizer(source)), config.vocab_size)
        limit, supervised = context_length(config), {"finetune", "responses", "warmup", "sft"}
        for section, stages in (("rollout", {"minillm"}), ("responses", supervised), ("evaluate", {"evaluate"})):
            new = getattr(recipe, section).max_new_tokens
            if limit is not None and stages & set(recipe.stages) and recipe.data.max_prompt_tokens + new > limit:
                raise ValueError(
                    f"data.max_prompt_tokens + {section}.max_new_tokens ({recipe.data.max_prompt_tokens} + {new}) exceed the {who}'s "
                    f"context of {limit} tokens ({source})"
                )
        if who == "student" and recipe.student.lora is not None:
            if recipe.student.lora.quantization and config.model_type == "gpt2":
                raise ValueError(f"student.lora.quantization: bitsandbytes does not take the layers of GPT-2 ({source}): leave it out")
            check_student(source, recipe.student.lora)
        if who == "teacher" and recipe.teacher.quantization:
            check_quantization(recipe.teacher.quantization)
        if who == "teacher" and "minillm" in recipe.stages and recipe.rollout.teacher_mix and not attends_fully(config):
            raise ValueError(
                f"rollout.teacher_mix: mixing needs a teacher whose every layer is full attention, and {source} has sliding windows: set "
                "rollout.teacher_mix: 0"
            )
        block = recipe.objective.language_model_block
        if limit is not None and recipe.data.text is not None and "minillm" in recipe.stages and block > limit:
            raise ValueError(f"objective.language_model_block: {block} exceeds the {who}'s context of {limit} tokens ({source})")

    def prompts(self, examples: Sequence[Example], what: str) -> list[Prompt]:
        """Rendered prompts; those over the limit are left out and reported."""
        from minillm.models.load import load_tokenizer

        data = self.recipe.data
        prompts, too_long = render_all(examples, data.template, load_tokenizer(self.untuned), data.max_prompt_tokens, data.system)
        if too_long:
            logger.warning(
                "%s: %d of %d prompts exceed data.max_prompt_tokens (%d) and are left out; the first is row %d",
                what, len(too_long), len(examples), data.max_prompt_tokens, too_long[0].row,
            )  # fmt: skip
        if not prompts:
            raise ValueError(f"{what}: no prompt is within data.max_prompt_tokens ({data.max_prompt_tokens})")
        return prompts

    def references(self) -> list[dict[str, Any]]:
        """Training rows of the data's own answers, each with its end token, cut at responses.max_new_tokens."""
        from minillm.models.load import load_tokenizer

        tokenizer, data = load_tokenizer(self.untuned), self.recipe.data
        rows = []
        for prompt in self.prompts(self.train_examples, data.train.name):
            if prompt.example.output:
                ids = render_answer(prompt, data.template, tokenizer, data.system)[: self.recipe.responses.max_new_tokens]
                rows.append({"row": prompt.example.row, "prompt_ids": prompt.ids, "response_ids": ids})
        if not rows:
            raise ValueError(f"{data.train.name}: no row has an output to train on")
        return rows

    def validation(self) -> list[dict[str, Any]] | None:
        """Rows that training stages are validated on, where there are any."""
        data = self.recipe.data
        if data.validation is None:
            return None
        examples = [example for example in read_examples(data.validation, data.validation_limit) if example.references]
        prompts = self.prompts(examples, data.validation.name)
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
