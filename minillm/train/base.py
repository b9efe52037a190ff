"""What on-policy and supervised distillation share: two models, scoring in the student's forward, metrics by token."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm.data.batches import Padded
from minillm.data.rollouts import TeacherRows
from minillm.errors import InputError
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.token_scores import Divergence, LossFn, ScoringSettings
from minillm.models.conventions import Conventions, settle
from minillm.models.device import fast_bfloat16
from minillm.models.head import TeacherStates, check_head, gather_head, head_of
from minillm.models.load import load_model, load_tokenizer, without_dropout
from minillm.models.shards import is_sharded
from minillm.models.vocabulary import check_same_tokens, head_width
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.teacher.local import AdapterOff, LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.sharded import shard
from minillm.train.arguments import check_arguments
from minillm.train.finite import Finite
from minillm.train.trl_arguments import check_parameters
from minillm.train.validation import Validated, check_one_gpu

logger = logging.getLogger(__name__)


class DistillationTrainer(Validated, Finite, Trainer):
    """A `transformers.Trainer` that holds a frozen teacher and scores tokens inside the student's forward.

    What an update trains on is a function of its number (`micro_batches`), the same in every process and after a
    resume; the dataloader only counts. Subclasses turn an item into a batch and a loss in `training_step`.

    Without a `teacher` it is the student's base, its adapter switched off, which takes no memory of its own. Rows of
    `eval_dataset` are what `Validated` says. `shard_teacher` deals the teacher's blocks out over the processes. Where answers end is
    settled from the tokenizer and the teacher, unless it is given (`conventions`), and saved with the student. `text_temperature`
    divides the logits where text or an answer is fitted, `temperature` in all else.
    """

    text_temperature: float = 1.0

    def __init__(
        self, model: str | PreTrainedModel, teacher: str | PreTrainedModel | ServedTeacher | None, args: TrainingArguments, *,
        processing_class: Any = None, temperature: float = 1.0, rollout: RolloutConfig | None = None, engine: Engine | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None, shard_teacher: bool = False, conventions: Conventions | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        check_parameters(kwargs)
        check_arguments(
            args,
            eval_dataset=eval_dataset,
            reads_teacher=not isinstance(teacher, ServedTeacher),
            metrics=self.validation_metrics,
        )
        if processing_class is None:
            if not isinstance(model, str):
                raise InputError("processing_class: a tokenizer is needed when the student is given as a model object")
            processing_class = load_tokenizer(model)
        check_one_gpu(args)
        # A different tokenizer is found before any weights load, where the teacher is still a name.
        served = teacher if isinstance(teacher, ServedTeacher) else None
        named = (
            served.source
            if served
            else teacher
            if isinstance(teacher, str)
            else str(getattr(teacher, "name_or_path", ""))
        )
        if served or isinstance(teacher, str) or (named and Path(named, "tokenizer_config.json").is_file()):
            check_same_tokens(processing_class, load_tokenizer(named))
        student = load_model(model, torch.float32) if isinstance(model, str) else model
        if teacher is None and not hasattr(student, "get_base_model"):
            raise InputError(
                "teacher: without one the student's base is it, its adapter off; this student has no adapter (PEFT)"
            )
        zero3 = is_deepspeed_zero3_enabled()
        if zero3 and is_sharded(student):
            raise InputError(
                "the student's weights were dealt out by ZeRO-3 when it was loaded: give its name, or minillm.models.load.load_model"
            )
        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        teacher_model: Any = None if served else load_model(teacher, compute) if isinstance(teacher, str) else teacher
        if teacher is None:
            teacher_model = student.get_base_model()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if args.bf16 and args.device.type == "cpu" and not fast_bfloat16():
            logger.warning("bf16=True on a CPU that emulates bfloat16, many times slower than float32: leave it out.")
        trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
        if trained & {torch.bfloat16, torch.float16}:
            logger.warning(
                "The student is trained in %s: at small learning rates most updates round away; load it in float32.",
                trained,
            )
        widths = head_width(student), served.vocab_size if served else head_width(teacher_model)
        if widths[0] != widths[1]:
            logger.warning(
                "The heads are %d (student) and %d (teacher) tokens wide; both are used up to %d.", *widths, min(widths)
            )
        if conventions is None:
            conventions = settle(
                processing_class, served.source if served else teacher_model if teacher is not None else None, [student]
            )
        conventions = replace(conventions, vocab_size=min(*widths, conventions.vocab_size))
        self.width = conventions.vocab_size
        self.temperature = temperature
        without_dropout(student)
        check_head(student, "student")  # pyright: ignore[reportArgumentType]
        if teacher_model is not None:
            check_head(teacher_model, "teacher")
        bind_scoring(student)
        if zero3:
            gather_head(student)  # pyright: ignore[reportArgumentType]
        super().__init__(
            model=student, args=args, processing_class=processing_class, eval_dataset=eval_dataset, **kwargs
        )  # pyright: ignore[reportArgumentType]
        self.set_up_sampling(rollout or RolloutConfig(), conventions, compute, engine)
        # The loss is divided by token counts here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        if teacher is None and (zero3 or self.is_fsdp_enabled):
            raise InputError(
                "a student whose base is its teacher is not dealt out over processes (FSDP, ZeRO-3): use plain data parallelism"
            )
        if served is not None:
            self.teacher = served
        elif teacher is None:
            self.teacher = AdapterOff(student, batch_size=max(args.per_device_train_batch_size, 16))
        else:
            assert teacher_model is not None
            if shard_teacher and self.accelerator.num_processes > 1:
                teacher_model = shard(teacher_model, args.device)
            else:
                teacher_model = teacher_model.to(args.device)
            self.teacher = LocalTeacher(teacher_model, batch_size=max(args.per_device_train_batch_size, 16))
        self._logged_at: int | None = None  # the update after which metrics were last logged
        self._sums: dict[str, float] = defaultdict(float)
        self._values: dict[str, tuple[float, float]] = {}

    def updates_per_epoch(self) -> int:
        """Updates in one pass over the training data."""
        raise NotImplementedError("a subclass says how long an epoch is")

    def micro_batches(self, update: int) -> list[Any]:
        """What this process's `training_step` gets for each micro-batch of an update."""
        raise NotImplementedError("a subclass says what an update trains on")

    @property
    def local_teacher(self) -> LocalTeacher:
        """The teacher where it is a model in this process.

        Raises:
            ValueError: it is served.
        """
        if not isinstance(self.teacher, LocalTeacher):
            raise InputError(
                "a served teacher tells log-probabilities of some tokens only: this needs the teacher's model in this process"
            )
        return self.teacher

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.updates_per_epoch() * self.args.gradient_accumulation_steps))  # pyright: ignore[reportArgumentType]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        if self._logged_at is None:
            self._logged_at = self.state.global_step
        return self.begin(self.micro_batches(self.state.global_step)), None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Score the batch in the student's forward. `inputs`: what `update_on` is given."""
        loss, scores = score(
            model, self.scoring(inputs["batch"], inputs["teacher"], inputs["loss_fn"], inputs["divergence"])
        )
        loss = self.see(loss * inputs["scale"])
        return (loss, scores) if return_outputs else loss

    def scoring(
        self,
        batch: Padded,
        teacher: Tensor | TeacherRows | None,
        loss_fn: LossFn | None = None,
        divergence: Divergence | None = None,
    ) -> Scoring:
        """What the student's forward is given to score a batch. `teacher`: its final states, or its rows."""
        settings = ScoringSettings(self.temperature, self.text_temperature, self.width)
        known = TeacherStates(teacher, head_of(self.local_teacher.model)) if isinstance(teacher, Tensor) else teacher
        return Scoring(batch, settings, known, loss_fn, divergence)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # built on the device already

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def update_on(
        self, model: Any, batch: Padded, loss_fn: LossFn, teacher: Tensor | TeacherRows | None, scale: float,
        divergence: Divergence | None = None,
    ) -> Tensor:  # fmt: skip
        """Forward and backward of one micro-batch; returns the loss. `teacher`: its final states, or its rows."""
        inputs = {"batch": batch, "loss_fn": loss_fn, "teacher": teacher, "scale": scale, "divergence": divergence}
        with self.phase("update", len(batch.targets)):
            return super().training_step(model, inputs, num_items_in_batch=1)

    def tally(self, sums: dict[str, Tensor]) -> None:
        """Add sums over tokens to what the next log reports as means."""
        for name, value in sums.items():
            self._sums[name] += float(value)

    def note(self, name: str, total: float, count: float) -> None:
        """Add a sum and its count to what the next log reports as a mean."""
        before = self._values.get(name, (0.0, 0.0))
        self._values[name] = (before[0] + total, before[1] + count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._flush()
        super().log(logs, start_time)

    def _all_names(self, mine: Iterable[str]) -> list[str]:
        """Of all processes, so that each takes part in the sums of all: what one noted another may not have."""
        if self.accelerator.num_processes == 1:
            return sorted(mine)
        return sorted({name for names in gather_object([list(mine)]) for name in names})

    def _flush(self) -> dict[str, float]:
        """Means since the last log, over all processes."""
        sums = {name: self.global_sum(self._sums[name]) for name in self._all_names(self._sums)}
        out = {}
        for name in sorted(sums):
            if name.endswith("_loss"):
                # Already divided by the update's token count; logged per update.
                out[name] = sums[name] / max(self.state.global_step - (self._logged_at or 0), 1)
            elif name not in ("tokens", "text_tokens", "advantage_squared"):
                out[name] = sums[name] / max(sums["text_tokens" if name.startswith("text") else "tokens"], 1.0)
        if "advantage" in out:
            spread = sums["advantage_squared"] / max(sums["tokens"], 1.0) - out["advantage"] ** 2
            out["advantage_std"] = max(spread, 0.0) ** 0.5
        for name in self._all_names(self._values):
            total, count = (self.global_sum(x) for x in self._values.get(name, (0.0, 0.0)))
            if count:
                out[name] = total / count
        for name in self._all_names(self._seconds):
            out[f"{name}_seconds"] = self._seconds[name]
            tokens = self.global_sum(self._phase_tokens[name])
            if tokens and self._seconds[name]:
                out[f"{name}_tokens_per_second"] = tokens / self._seconds[name]
        for store in (self._sums, self._values, self._seconds, self._phase_tokens):
            store.clear()
        self._logged_at = self.state.global_step
        return out
