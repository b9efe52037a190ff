"""What on-policy and supervised distillation share: two models, scoring in the student's forward, and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm.data.batches import Padded
from minillm.errors import InputError
from minillm.loss.in_forward import Scoring, score
from minillm.loss.teacher_spans import Teacher
from minillm.loss.token_scores import Divergence, LossFn, ScoringSettings, Sketch
from minillm.models.attention import set_training_attention
from minillm.models.conventions import Conventions
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.teacher.absent import NoTeacher
from minillm.teacher.routed import ExactTeacher, hidden_states
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.train.arguments import check_arguments
from minillm.train.checks import STATES_REMEDY, check_shard_teacher
from minillm.train.datasets import tokenize_validation
from minillm.train.finite import Finite
from minillm.train.pair import TeacherSource, load_pair, resolve_tokenizer, teacher_names
from minillm.train.student import check_one_gpu
from minillm.train.trl_arguments import check_parameters
from minillm.train.update_size import with_responses
from minillm.train.utilisation import Utilisation
from minillm.train.validation import ValidationMixin


class DistillationTrainer(ValidationMixin, Finite, Trainer):
    """A `transformers.Trainer` that holds a frozen teacher and scores tokens inside the student's forward.

    The number of an update decides which data it trains on (`micro_batches`), in every process and after a resume;
    the data loader only counts. Subclasses turn each micro-batch into tensors and a loss in `training_step`.

    Args:
        model: the student: a folder, a hub id or a loaded model.
        teacher: the teacher, given in the same ways, or a `ServedTeacher`. None means the student's base model with
            the adapter disabled, which needs no further memory. A mapping holds several by name, of which every row
            names its own in `teacher`.
        args: the arguments of the training.
        processing_class: the student's tokenizer; by default the one in its folder.
        temperature: divides the logits, except where `text_temperature` does.
        rollout: how the student is sampled, for validation too.
        engine: an engine that samples; by default one is started when it is needed.
        eval_dataset: rows for validation; see `ValidationMixin`.
        shard_teacher: shard the teacher's decoder layers over the processes; not with several teachers.
        longest: tokens of the longest sequence that the teacher scores; the servers of a served teacher are asked
            whether they accept it.
        conventions: vocabulary and end tokens. By default they follow from the tokenizer and the teacher. They are
            saved with the student.
        responses_per_update: responses (with text: blocks) of an update over all processes. The accumulation follows
            from it and is left out of `args`, whose `per_device_train_batch_size` is the largest micro-batch.
        **kwargs: further parameters of `transformers.Trainer`.

    Attributes:
        text_temperature: divides the logits in the losses on text, and in the cross-entropy of given responses.
        end_ids: the tokens whose probability the loss needs (`TokenScores.going_on`); empty if it does not.
        validates_text: the rows for validation are of text, and kept as they are.
        trl_fields: fields of TRL's configurations that are read; see `minillm.train.trl_settings`.
        utilisation: counts the operations of each update.
    """

    text_temperature: float = 1.0
    end_ids: tuple[int, ...] = ()
    validates_text: bool = False
    trl_fields: frozenset[str] = frozenset()
    teacher: ExactTeacher | ServedLogprobs | NoTeacher  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: TeacherSource,
        args: TrainingArguments,
        *,
        processing_class: Any = None,
        temperature: float = 1.0,
        rollout: RolloutConfig | None = None,
        engine: Engine | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        shard_teacher: bool = False,
        longest: int = 1,
        conventions: Conventions | None = None,
        responses_per_update: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_parameters(kwargs)
        check_shard_teacher(teacher_names(teacher), shard_teacher)
        check_arguments(
            args,
            eval_dataset=eval_dataset,
            reads_teacher=True,
            metrics=self.validation_metrics,
            honoured=self.trl_fields,
        )
        args = with_responses(args, responses_per_update)
        tokenizer = resolve_tokenizer(model, processing_class)
        if not self.validates_text:
            eval_dataset = tokenize_validation(eval_dataset, tokenizer)
        check_one_gpu(args)
        pair = load_pair(model, teacher, args, tokenizer, conventions)
        if isinstance(model, str):  # a model object keeps the attention that the user gave it
            set_training_attention(pair.student, args.device, pair.compute_dtype, longest)
        self.temperature = temperature
        super().__init__(
            model=pair.student,
            args=args,
            processing_class=tokenizer,
            eval_dataset=eval_dataset,  # pyright: ignore[reportArgumentType]
            **kwargs,
        )
        self.set_up_sampling(rollout or RolloutConfig(), pair.conventions, pair.compute_dtype, engine)
        # The loss is divided by token counts here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        if teacher is None and (is_deepspeed_zero3_enabled() or self.is_fsdp_enabled):
            raise InputError(
                "a student whose base model is its teacher cannot be sharded over processes (FSDP, ZeRO-3): use plain "
                "data parallelism"
            )
        sharded = shard_teacher and self.accelerator.num_processes > 1
        scoring = pair.teacher(args, sharded=sharded, longest=longest)
        # The mixin only closes the teacher, so it declares a wider type.
        self.teacher = scoring  # pyright: ignore[reportIncompatibleVariableOverride]
        self._logged_at: int | None = None  # the update after which metrics were last logged
        # A student whose weights have 16 bits computes with them, whatever the arguments say.
        dtype = self._student.dtype if self._student.dtype in (torch.bfloat16, torch.float16) else pair.compute_dtype
        self.utilisation = Utilisation(self._student, scoring, self.metrics, device=self.args.device, dtype=dtype)
        self.add_callback(self.utilisation)

    @abstractmethod
    def updates_per_epoch(self) -> int:
        """Updates in one pass over the training data."""

    @abstractmethod
    def micro_batches(self, update: int) -> list[Any]:
        """What this process's `training_step` gets for each micro-batch of an update.

        Args:
            update: the number of the update, counted from 0.
        """

    @property
    def states_teacher(self) -> ExactTeacher:
        """The teacher, or the teachers, if states are returned.

        Raises:
            InputError: it returns log-probabilities of some tokens only.
        """
        if not isinstance(self.teacher, ExactTeacher):
            raise InputError(f"the teacher's servers return log-probabilities of some tokens only: {STATES_REMEDY}")
        return self.teacher

    def states_of_teacher(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], names: Sequence[str | None]
    ) -> list[Tensor]:
        """The final hidden states that predict each response's tokens, for an update, by the teacher of its name."""
        self.utilisation.read_by_teacher(list(zip(prompts, responses, strict=True)), names)
        return hidden_states(self.states_teacher, prompts, responses, names)

    def get_train_dataloader(self) -> DataLoader:
        """A loader that only counts micro-batches."""
        counted: Any = range(self.updates_per_epoch() * self.args.gradient_accumulation_steps)
        return DataLoader(counted)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro-batches of the next update. The items of the loader are ignored."""
        if self._logged_at is None:
            self._logged_at = self.state.global_step
        self.utilisation.begin()
        return self.begin(self.micro_batches(self.state.global_step)), None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Score a batch in the student's forward. `inputs` is what `update_on` passes."""
        loss, scores = score(
            model,
            replace(
                self.scoring(inputs["batch"], inputs["teacher"], inputs["loss_fn"], inputs["divergence"]),
                sketch=inputs["sketch"],
            ),
        )
        loss = self.see(loss * inputs["scale"])
        return (loss, scores) if return_outputs else loss

    def scoring(
        self,
        batch: Padded,
        teacher: Teacher | None,
        loss_fn: LossFn | None = None,
        divergence: Divergence | None = None,
    ) -> Scoring:
        """Describe to the student's forward how it scores a batch.

        Args:
            batch: the sequences.
            teacher: the teacher's states, those of several, or rows of log-probabilities; None if not needed.
            loss_fn: what turns scores into a loss; by default only scores are computed.
            divergence: a further divergence to compute.

        Returns:
            The object that the forward reads.
        """
        self.utilisation.scored(batch, teacher, self.width, trained=loss_fn is not None)
        end_ids = self.end_ids if loss_fn is not None else ()
        settings = ScoringSettings(self.temperature, self.text_temperature, self.width, end_ids=end_ids)
        return Scoring(batch, settings, teacher, loss_fn, divergence)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # they are on the device already

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the Trainer's estimate would count the student alone, so operations are not counted."""
        return 0

    def update_on(
        self,
        model: Any,
        batch: Padded,
        loss_fn: LossFn,
        teacher: Teacher | None,
        scale: float,
        divergence: Divergence | None = None,
        sketch: Sketch | None = None,
    ) -> Tensor:
        """Run forward and backward of one micro-batch.

        Args:
            model: the student, as the Trainer wrapped it.
            batch: the sequences.
            loss_fn: turns scores into a loss.
            teacher: the teacher's states, those of several, or the rows of a served teacher.
            scale: a factor on the loss.
            divergence: a further divergence to compute.
            sketch: sees the gradients of each chunk.

        Returns:
            The loss.
        """
        inputs = {"batch": batch, "loss_fn": loss_fn, "teacher": teacher, "scale": scale, "divergence": divergence}
        inputs["sketch"] = sketch
        with self.phase("update", len(batch.targets)):
            return super().training_step(model, inputs, num_items_in_batch=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. If the loss is logged, the metrics that were measured since the last log are added."""
        if "loss" in logs:
            logs |= self.metrics.flush(self.state.global_step - (self._logged_at or 0))
            self._logged_at = self.state.global_step
        super().log(logs, start_time)
