"""Pre-training against a teacher on packed text: L = (1−α)·L_lm + α·L_kd per token (arXiv 2410.16215)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from minillm.data.batches import Padded, pad
from minillm.data.rollouts import SparseTargets
from minillm.data.text import TextBlocks
from minillm.errors import InputError
from minillm.evaluation.language_model import heldout_blocks, score_blocks
from minillm.evaluation.language_model_metrics import TEACHER_LOSS, VALIDATION, text_scores
from minillm.loss.config import BY_WEIGHTS, NOT_LINEAR, DivergenceConfig
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.teacher_spans import Teacher
from minillm.loss.terms import extra_divergence
from minillm.models.head import keeps_sequences_apart
from minillm.teacher.absent import NO_TEACHER
from minillm.teacher.routed import ExactTeacher, join_states
from minillm.teacher.store import TargetStore
from minillm.train.alpha import AlphaConfig
from minillm.train.base import DistillationTrainer
from minillm.train.pair import TeacherSource


@dataclass
class TextMicroBatch:
    """What one forward and backward of one process trains on.

    Attributes:
        blocks: numbers of the blocks of text, each with the number of the pass over the text.
        count: tokens that the update predicts, over all processes.
        alpha: α of the update.
    """

    blocks: list[tuple[int, int]]
    count: int
    alpha: float


class PretrainingTrainer(DistillationTrainer):
    """Minimises (1−α)·CE + α·D over the tokens of packed text, where CE is −log q at temperature 1.

    The teacher is a model, or a store of its distributions, which costs no forward and no product of it. At α = 0
    neither is read.

    Args:
        model: the student: a folder, a hub id or a loaded model.
        teacher: the teacher, as other trainers take it. It is not loaded if there is a store, or if α is 0 throughout.
        args: the arguments of the training. `per_device_train_batch_size` counts blocks of text.
        text_dataset: rows with `text`. A stream, or one of more than 20,000 rows, needs `max_steps`.
        block: most tokens of a block. Documents are packed into blocks and do not attend to each other.
        alpha: α and its schedule.
        divergence: D, the forward KL by default, at `temperature`.
        store: the teacher's distributions of the same blocks, in place of the teacher. D is then the cross-entropy to
            the kept tokens, whose gradient is that of the forward KL, or another of `BY_WEIGHTS`.
        eval_dataset: rows with `text`, on which validation measures `VALIDATION`, and KL(p‖q) with a live teacher.
        eval_blocks: how many blocks of them are scored.
        teacher_loss: the teacher's loss on these blocks, where there is no live teacher that tells it.
        **kwargs: further parameters of `DistillationTrainer`.

    Raises:
        InputError: the text has fewer blocks than one update, or the store cannot give this divergence; or α is to
            stop when the teacher is passed, and no validation tells when.
    """

    validation_metrics = VALIDATION

    validates_text = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: TeacherSource,
        args: TrainingArguments,
        *,
        text_dataset: Iterable[dict[str, Any]],
        block: int = 1024,
        alpha: AlphaConfig | None = None,
        divergence: DivergenceConfig | None = None,
        store: TargetStore | None = None,
        eval_dataset: Iterable[dict[str, Any]] | None = None,
        eval_blocks: int = 64,
        teacher_loss: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._alpha = alpha or AlphaConfig()
        self._divergence = divergence or DivergenceConfig(name="forward_kl")
        self._store = store
        if store is not None and self._divergence.name not in BY_WEIGHTS:
            raise InputError(f"divergence: {self._divergence.name} with a store: {NOT_LINEAR}")
        without = store is not None or not self._alpha.value
        rows: Any = eval_dataset
        super().__init__(model, NO_TEACHER if without else teacher, args, longest=block, eval_dataset=rows, **kwargs)
        if not without:
            _ = self.states_teacher  # refuses log-probabilities of some tokens before anything is trained
        self._teacher_loss = teacher_loss
        if self._alpha.until_passed and (args.eval_strategy == "no" or (store is not None and teacher_loss is None)):
            raise InputError(
                "alpha.until_passed: validation tells when the teacher is passed: set eval_strategy, give an "
                "eval_dataset with text, and with a store teacher_loss"
            )
        self._heldout = (
            [] if eval_dataset is None else heldout_blocks(eval_dataset, self.student_tokenizer, block, eval_blocks)
        )
        self._processes = self.accelerator.num_processes
        self._micro_batch_size = self.args.per_device_train_batch_size
        each = self._micro_batch_size * self.args.gradient_accumulation_steps * self._processes
        self.text = TextBlocks(
            text_dataset,
            self.student_tokenizer,
            block,
            each,
            args.seed,
            updates=args.max_steps,
            several=keeps_sequences_apart(self._student),
        )
        self.text.require(each)
        if not self.text.is_whole and args.max_steps <= 0:
            raise InputError("max_steps is needed with a stream of text, or with more than 20,000 rows of it")
        self._update_size = each

    @property
    def follows_length(self) -> list[str]:
        """What changes over the training beside the learning rate, by its whole length."""
        return [f"α ({self._alpha.schedule})"] if self._alpha.schedule != "constant" else []

    def updates_per_epoch(self) -> int:
        """Updates in one pass over the text; with a stream, all that there will be."""
        return len(self.text) // self._update_size if self.text.is_whole else self.args.max_steps

    def micro_batches(self, update: int) -> list[TextMicroBatch]:
        """The micro-batches of an update."""
        numbers, passes = self.text.of_update(update), self.text.passes_of_update(update)
        count = self.text.tokens(numbers)
        alpha = 0.0 if self._teacher_is_passed() else self._alpha.at(update, self.state.max_steps)
        own = list(zip(numbers, passes, strict=True))[self.accelerator.process_index :: self._processes]
        size = self._micro_batch_size
        self.metrics.add_mean("alpha", alpha, 1.0)
        return [TextMicroBatch(own[i : i + size], count, alpha) for i in range(0, len(own), size)]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the held-out text with the student as it is.

        Args:
            eval_dataset: not used; the rows are those of the constructor.
            ignore_keys: not used.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            The metrics of `language_model_metrics`, and the teacher's own loss where it is known.
        """
        own = self._heldout[self.accelerator.process_index :: self._processes]
        # With a sharded model every forward involves all processes: one with a block fewer scores one that does not
        # count.
        spare = self._heldout[: -(-len(self._heldout) // self._processes) - len(own)]
        teacher = self.teacher if isinstance(self.teacher, ExactTeacher) else None
        with self.phase("validation"):
            rows = score_blocks(
                self.model_wrapped,
                [*own, *spare],
                self.student_tokenizer,
                self.width,
                share_rows=self.text.share_rows,
                teacher=teacher,
            )
            found = text_scores([row for some in self.metrics.gather(rows[: len(own)]) for row in some])
        if self._teacher_loss is not None:
            found[TEACHER_LOSS.key] = self._teacher_loss
        out = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(out)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, out)
        return out

    def _teacher_is_passed(self) -> bool:
        """Whether a validation found the student below the teacher's loss. The log is kept in every checkpoint."""
        student, teacher = "eval_text_loss", f"eval_{TEACHER_LOSS.key}"
        return self._alpha.until_passed and any(
            entry[student] < entry[teacher] for entry in self.state.log_history if teacher in entry
        )

    def rows_of(self, micro_batch: TextMicroBatch) -> str:
        """The text that a micro-batch holds, in words."""
        firsts = [self.text.pieces(number)[0][:12] for number, _ in micro_batch.blocks]
        return " and ".join(f'text that begins "{self.student_tokenizer.decode(list(ids))}"' for ids in firsts)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, an item of `micro_batches`; returns the loss."""
        blocks = [self.text.pieces(number) for number, _ in inputs.blocks]
        batch, teacher = self._padded(blocks), None
        if inputs.alpha:
            with self.phase("teacher", len(batch.targets)):
                teacher = self._targets(inputs, blocks)
        # At α = 0 this is plain language modelling, to the last bit.
        loss = SupervisedLoss(1 - inputs.alpha if inputs.alpha else 1.0, inputs.count, self._divergence)
        extra = None if teacher is None else extra_divergence(self._divergence)
        value = self.update_on(model, batch, loss, teacher, self._processes, extra)
        sums = loss.tally.sums
        if isinstance(teacher, SparseTargets) and teacher.entropy is not None:
            # With a sample of p this is an estimate, which may be negative.
            sums["forward_kl"] = sums["target_cross_entropy"] - teacher.entropy.double().sum()
        self.metrics.add_sums(sums)
        return value

    def _padded(self, blocks: list[list[array[int]]]) -> Padded:
        """Blocks as rows; the first token of each piece is only read."""
        rows = [row for row, pieces in enumerate(blocks) for _ in pieces]
        pieces = [ids for block in blocks for ids in block]
        return pad([ids[:1] for ids in pieces], [ids[1:] for ids in pieces], self.args.device, rows=rows)

    def _targets(self, inputs: TextMicroBatch, blocks: list[list[array[int]]]) -> Teacher:
        """The teacher's states of some blocks, or what the store has of them."""
        if self._store is not None:
            named = [(*numbers, pieces) for numbers, pieces in zip(inputs.blocks, blocks, strict=True)]
            found, device = self._store.targets(named), self.args.device
            entropy = None if found.entropy is None else found.entropy.to(device)
            return SparseTargets(found.ids.to(device), found.weights.to(device), entropy)
        pieces = [ids for block in blocks for ids in block]
        prompts, responses, names = [ids[:1] for ids in pieces], [ids[1:] for ids in pieces], [None] * len(pieces)
        return join_states(self.states_teacher, self.states_of_teacher(prompts, responses, names), names)
