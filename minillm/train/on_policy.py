"""MiniLLMTrainer: a stream of the student's own responses becomes updates."""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from minillm.data.batches import Padded, bucket, pad, share_rows
from minillm.data.encoding import encoder_of
from minillm.data.rollouts import Rollout, TeacherRows, join
from minillm.data.seeding import permutation, seed_of
from minillm.data.text import TextBlocks
from minillm.errors import EngineError, InputError
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens, baselines
from minillm.loss.in_forward import Scoring, score_responses
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.terms import extra_divergence
from minillm.loss.token_scores import TokenScores
from minillm.models.configs import context_length, text_config
from minillm.models.device import release_memory
from minillm.models.head import keeps_sequences_apart
from minillm.models.lora import check_adapter
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.rollout.engines.choose import supports_overlap
from minillm.rollout.replay import OtherResponses
from minillm.rollout.samplers.teacher_mixed import FIRST_DRAFT, TeacherMixedSampler, draft_length
from minillm.teacher.served import ServedTeacher
from minillm.train.base import DistillationTrainer
from minillm.train.checks import check_off_policy, check_served_teacher, check_sharded_teacher
from minillm.train.finite import listed

logger = logging.getLogger(__name__)

# Nats a token. bfloat16 engines differ from the trainer by some hundredths; this far off they sample another student.
_MISMATCH_ALARM = 0.3
_ROLLOUTS = "rollouts-{rank}.pt"


@dataclass
class _MicroBatch:
    rollouts: list[int]  # of this process's live batch
    text: list[int]  # rows of the packed text
    count: float  # response tokens of the update, over all processes
    text_count: float
    first_use: bool  # these weights drew these rollouts


@dataclass
class _Drawn:
    rollouts: list[Rollout]
    seconds: float
    drafted: int
    accepted: int


class MiniLLMTrainer(DistillationTrainer):
    """Minimises KL(q‖p) on the student's own samples (MiniLLM, arXiv 2306.08543).

    Every `inner_epochs · num_rollouts / update size` updates, new responses are drawn with the current weights; the
    teacher reads them once. An epoch is one pass over the prompts. What `TrainingArguments` say of batches counts
    responses: an update trains on `per_device_train_batch_size · gradient_accumulation_steps · processes` of them.

    Args:
        model, teacher: folders, hub ids or loaded models of one vocabulary; the teacher may also be a `ServedTeacher`, or
            None for the base of a student with a LoRA adapter, as it is without it. A student given by name is loaded in float32.
        objective: the loss; `Objective.recommended()` by default.
        rollout: how responses are drawn.
        train_dataset: rows with `prompt_ids`, or with `prompt` as text or as a list of chat messages.
        text_dataset: rows with `text`, for the language-model term; as many blocks as responses join each update. Of a stream, which
            has no length, no more is read than `max_steps` updates need.
        responses: rows with `prompt_ids` and `response_ids`, for `rollout.on_policy` below 1.
        processing_class: the student's tokenizer; by default the one in its folder.

    Raises:
        ValueError: sizes that do not divide, prompts that do not fit, different tokenizers.
    """

    def __init__(
        self, model: str | PreTrainedModel, teacher: str | PreTrainedModel | ServedTeacher | None, args: TrainingArguments, *,
        objective: Objective | None = None, rollout: RolloutConfig | None = None,
        train_dataset: Sequence[dict[str, Any]], text_dataset: Iterable[dict[str, Any]] | None = None,
        responses: Sequence[dict[str, Any]] | None = None, processing_class: Any = None, engine: Engine | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.objective = objective or Objective.recommended()
        config = rollout or RolloutConfig()
        if isinstance(teacher, ServedTeacher):
            check_served_teacher(config, self.objective)
        check_off_policy(config, self.objective)
        if kwargs.get("shard_teacher"):
            check_sharded_teacher(config, self.objective, text_dataset is not None)
        if teacher is None and config.overlap and config.teacher_mix:
            raise InputError(
                "rollout.overlap: the student's own base, its adapter off, cannot draw while the student trains: set rollout.teacher_mix: 0"
            )
        if config.on_policy < 1 and not responses:
            raise InputError(
                f"rollout.on_policy: {config.on_policy:g} trains on given responses too, and there are none (responses)"
            )
        super().__init__(
            model, teacher, args, processing_class=processing_class, temperature=config.temperature, rollout=config, engine=engine,
            train_dataset=train_dataset, **kwargs,
        )  # fmt: skip
        self.text_temperature = self.objective.language_model_temperature
        self._processes = self.accelerator.num_processes
        self._update_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if config.num_rollouts % (self._update_size * self._processes):
            raise InputError(
                f"rollout.num_rollouts ({config.num_rollouts}) must be a multiple of the responses of one update "
                f"({self._update_size * self._processes} = per_device_train_batch_size × gradient_accumulation_steps × processes)"
            )
        self._prompts = self._tokenize(train_dataset)
        student: Any = self.model
        check_adapter(student)
        limit = context_length(text_config(student))
        if limit is not None and config.max_prompt_tokens + config.max_new_tokens > limit:
            raise InputError(
                f"rollout.max_prompt_tokens + max_new_tokens ({config.max_prompt_tokens} + {config.max_new_tokens}) "
                f"exceed the student's context of {limit}"
            )
        self._text = self._pack(text_dataset)
        if isinstance(self.teacher, ServedTeacher):
            self.sampling = replace(self.sampling, top_logprobs=self.teacher.top_k)
            self.teacher.attach(config.max_prompt_tokens + config.max_new_tokens)
        self._sampler: TeacherMixedSampler | None = None
        if config.overlap and engine is None and not supports_overlap(config.engine):
            raise InputError(
                "rollout.overlap draws beside the updates, with the weights before them: it needs rollout.engine: server"
            )
        if config.overlap and (self.objective.old_logprobs == "trainer" or self.objective.importance == "prefix"):
            raise InputError(
                "rollout.overlap trains one batch off policy, which token weights can take: objective.old_logprobs must be engine "
                "and objective.importance none or token"
            )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._ahead: tuple[int, Future[_Drawn]] | None = None  # the batch that is being drawn meanwhile
        self._alarmed = False
        self._batch_number = -1
        self._others = OtherResponses(
            config, responses or [], self.sampling.eos_ids, args.seed, self.accelerator.process_index, self._processes
        )  # fmt: skip
        centred = self.objective.baseline == "centre" and self.objective.long_term > 0
        self._reads_first = centred and self.objective.reward == "expected"  # returns are known before the first update
        self._rollouts: list[Rollout] = []
        self._of_batch: dict[str, tuple[float, float]] = {}  # sums and counts, logged with every update on the batch
        self._centred, self._baselines = centred, torch.zeros(0)  # one a rollout
        self._draft_tokens = FIRST_DRAFT if config.draft_tokens == "auto" else config.draft_tokens

    # What an update trains on

    def updates_per_epoch(self) -> int:
        drawn = len(self._prompts) * self.rollout_config.samples_per_prompt
        return max(1, drawn // self.rollout_config.num_rollouts) * self._updates_per_batch

    @property
    def _updates_per_batch(self) -> int:
        per_epoch = self.rollout_config.num_rollouts // (self._update_size * self._processes)
        return per_epoch * self.rollout_config.inner_epochs

    def micro_batches(self, update: int) -> list[_MicroBatch]:
        """Draws the rollouts of a new batch when its first update comes, after the last weights are final."""
        number, place = divmod(update, self._updates_per_batch)
        if number != self._batch_number:
            self._draw(number)
        for name, (total, of) in self._of_batch.items():
            self.note(name, total, of)
        inner, nth = divmod(place, self._updates_per_batch // self.rollout_config.inner_epochs)
        order = permutation(len(self._rollouts), self.args.seed, "inner", number, inner, self.accelerator.process_index)
        chosen = order[nth * self._update_size : (nth + 1) * self._update_size]
        lengths = [len(self._rollouts[i].response_ids) for i in chosen]
        each = self.args.per_device_train_batch_size
        if self.objective.normalise == "update_tokens":
            groups = bucket(lengths, each)
        else:  # what is whitened together, and divided by one count, must not be chosen by its length
            groups = [list(range(start, start + each)) for start in range(0, len(chosen), each)]
        text = self._text_rows(update, len(groups))
        if self.objective.normalise == "update_tokens":
            count = self.global_sum(float(sum(lengths)))
            text_count = self.global_sum(float(sum(self._text_tokens(rows) for rows in text)))
            counts = [(count, text_count)] * len(groups)
        else:  # each micro-batch by itself, then the mean of them
            share = len(groups) * self._processes
            counts = [
                (share * float(sum(lengths[i] for i in group)), share * float(self._text_tokens(rows)))
                for group, rows in zip(groups, text, strict=True)
            ]
        return [
            _MicroBatch([chosen[i] for i in group], rows, count, max(text_count, 1.0), place == 0)
            for group, rows, (count, text_count) in zip(groups, text, counts, strict=True)
        ]

    def training_step(self, model: Any, inputs: _MicroBatch, num_items_in_batch: Any = None) -> Tensor:
        device = self.args.device
        rollouts = [self._rollouts[i] for i in inputs.rollouts]
        rows, text = list(range(len(rollouts))), []
        if self._text and self._text.share_rows:  # beside blocks of text, a row each would be mostly padding
            lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
            rows = share_rows(lengths, max(*lengths, self.objective.language_model_block))
        for row, pieces in enumerate(
            (self._text.pieces(block) for block in inputs.text) if self._text else (), start=max(rows) + 1
        ):
            rows += [row] * len(pieces)
            text += pieces
        prompts = [r.prompt_ids for r in rollouts] + [ids[:1] for ids in text]
        responses = [r.response_ids for r in rollouts] + [ids[1:] for ids in text]
        batch = pad(prompts, responses, device, rows=rows)
        teacher = self._read_by_teacher(rollouts, text, device)
        sampled = self._sampled(rollouts)
        loss = OnPolicyLoss(
            self.objective, sampled.to(device), baseline=self._baselines[inputs.rollouts][sampled.segments].to(device), count=inputs.count,
            text_count=inputs.text_count, slots=len(rollouts) * self.sampling.max_new_tokens, total=self.global_sum,
        )  # fmt: skip
        value = self.update_on(
            model, batch, loss, teacher, self._processes, extra_divergence(self.objective.divergence)
        )
        for rollout, reverse_kl in zip(
            rollouts, loss.reverse_kl.cpu().split([len(r.response_ids) for r in rollouts]), strict=True
        ):
            if rollout.reverse_kl is None:
                rollout.reverse_kl = reverse_kl.clone()
        sums = loss.tally.sums
        current = all(self._is_current(rollout) for rollout in rollouts)
        if inputs.first_use and current and self.objective.old_logprobs == "engine":
            self._note_mismatch(float(sums["log_ratio"]), float(sums["tokens"]))
        self.tally({name: total for name, total in sums.items() if name != "log_ratio"})
        return value

    def rows_of(self, micro_batch: _MicroBatch) -> str:
        tokenizer: Any = self.processing_class
        blocks = [self._text.pieces(block) for block in micro_batch.text] if self._text else []
        text = [f'text that begins "{tokenizer.decode(list(pieces[0][:12]))}"' for pieces in blocks]
        return " and ".join([self._named([self._rollouts[i] for i in micro_batch.rollouts]), *text])

    def _named(self, rollouts: Sequence[Rollout]) -> str:
        """The rows that rollouts come from."""
        prompts, given = [r.prompt_ids for r in rollouts], self._others.given_rows(rollouts)
        drawn = [row for row, ids in enumerate(self._prompts) if ids in prompts]
        return " and ".join(
            listed(what, rows) for what, rows in (("train_dataset row", drawn), ("responses row", given)) if rows
        )

    def _read_by_teacher(
        self, rollouts: Sequence[Rollout], text: Sequence[array[int]], device: torch.device
    ) -> Tensor | TeacherRows:
        """The teacher's states, or what it tells of some tokens, for rollouts followed by text."""
        if isinstance(self.teacher, ServedTeacher):
            rows = [r.teacher_rows for r in rollouts if r.teacher_rows is not None]
            for ids in text:  # without a say in it
                drawn = torch.tensor(list(ids[1:]))[:, None]
                rows.append(TeacherRows(drawn, torch.full(drawn.shape, -1.0)))
            rows = join(rows)
            return TeacherRows(rows.ids.to(device), rows.logprobs.to(device))
        hidden = [r.teacher_hidden.to(device) for r in rollouts if r.teacher_hidden is not None]
        if text and self.objective.language_model_distill:
            hidden += self.local_teacher.hidden([ids[:1] for ids in text], [ids[1:] for ids in text])
        else:
            hidden += [hidden[0].new_zeros(len(ids) - 1, hidden[0].shape[1]) for ids in text]
        return torch.cat(hidden)

    def _note_mismatch(self, total: float, count: float) -> None:
        """Log how far the engine's log q is from the trainer's, and say so, once, where it is too far to train on."""
        self.note("engine_mismatch", total, count)
        if total > _MISMATCH_ALARM * count and not self._alarmed:
            self._alarmed = True
            logger.warning(
                "log q of the drawn tokens differs by %.2f nats a token between the sampling engine and the trainer, which hold the same "
                "weights: importance weights are off by as much. Have both compute in one dtype, or set objective.old_logprobs: trainer.",
                total / count,
            )  # fmt: skip

    def _is_current(self, rollout: Rollout) -> bool:
        """Whether the weights that are trained now drew it."""
        return rollout.weights_version == self.state.global_step

    # Rollouts

    def _draw(self, number: int) -> None:
        """The rollouts of batch `number`, for this process: sampled, read by the teacher, credited."""
        self._release_cpu_memory()
        ahead, self._ahead = self._ahead, None
        with self._checkpoint_on_engine_error():
            if ahead is not None and ahead[0] == number:
                with self.phase("waiting"):
                    drawn = ahead[1].result()
            else:
                engine = self._sync()
                drawn = self._sample(number)
                engine.sleep()
        rollouts = drawn.rollouts
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        self._seconds["rollout"] += drawn.seconds
        self._phase_tokens["rollout"] += tokens
        self._of_batch = {
            "response_length": (tokens, len(rollouts)),
            "finished": (sum(rollout.finished for rollout in rollouts), len(rollouts)),
            "version_lag": (
                sum(self.state.global_step - rollout.weights_version for rollout in rollouts),
                len(rollouts),
            ),
        }
        if drawn.drafted:
            self._of_batch |= {"acceptance": (drawn.accepted, drawn.drafted), "draft_length": (self._draft_tokens, 1)}
        if self.rollout_config.draft_tokens == "auto" and self.rollout_config.teacher_mix:
            # Of all processes, so that the same tokens are drawn however many there are.
            accepted, drafted = self.global_sum(drawn.accepted), self.global_sum(drawn.drafted)
            self._draft_tokens = draft_length(accepted / max(drafted, 1.0), self.args.device.type)
        earlier, given = self._others.of_batch(number, len(rollouts))
        for rollout, scores in zip(given, self._own_scores(given), strict=True):
            rollout.student_logprobs = rollout.behaviour_logprobs = scores.logq
        rollouts = [*rollouts, *earlier, *given]
        with self._checkpoint_on_engine_error():
            self._score(rollouts)
        if self.objective.old_logprobs == "trainer" or self._reads_first:
            with self.phase("rescoring", tokens):
                self._rescore(rollouts)
        self._adopt(number, rollouts)
        self._release_cpu_memory()
        ahead_too = self.rollout_config.overlap and (number + 1) * self._updates_per_batch < self.state.max_steps
        if ahead_too:
            with self._checkpoint_on_engine_error():
                self._sync()
        self._others.keep(drawn.rollouts)  # not before: a checkpoint of a lost engine has this batch drawn again
        if ahead_too:
            self._ahead = number + 1, self._background.submit(self._sample, number + 1)

    def _release_cpu_memory(self) -> None:
        """On a CPU, what sampling and updates freed goes back between them: the holes of one are not the size of the other's blocks."""
        if self.args.device.type == "cpu":
            release_memory()

    @contextmanager
    def _checkpoint_on_engine_error(self) -> Iterator[None]:
        """What was trained is not lost with the engine: a resume draws the batch again.

        Saving is done together, so every process learns of the error of any, and all of them end.
        """
        lost: EngineError | None = None
        try:
            yield
        except EngineError as error:
            lost = error
        if self.global_sum(float(lost is not None)):
            if self.state.global_step:
                self._save_checkpoint(self.model, trial=None)
            raise lost or EngineError("another process has lost its engine; its message says how")

    def _sample(self, number: int) -> _Drawn:
        """Touches nothing but the engine and the teacher: with `overlap` it runs beside the updates."""
        mine = self._prompt_rows(number)[: self._others.sizes()[0]]
        prompts = [self._prompts[row] for row in mine]
        # The place tells apart a prompt that comes twice in one batch.
        rank = self.accelerator.process_index
        seeds = [seed_of(self.args.seed, number, rank + place * self._processes, row) for place, row in enumerate(mine)]
        start = time.perf_counter()
        if self._sampler is not None:
            self._sampler.draft_tokens = self._draft_tokens
            drafted, accepted = self._sampler.drafted, self._sampler.accepted
            rollouts = self._sampler.generate(prompts, self.sampling, seeds)
            drafted, accepted = self._sampler.drafted - drafted, self._sampler.accepted - accepted
        else:
            assert self._engine is not None
            rollouts, drafted, accepted = self._engine.generate(prompts, self.sampling, seeds), 0, 0
        return _Drawn(rollouts, time.perf_counter() - start, drafted, accepted)

    def _score(self, rollouts: list[Rollout]) -> None:
        with self.phase("teacher", sum(len(r.response_ids) for r in rollouts if r.teacher_logprobs is None)):
            assert self.teacher is not None
            self.teacher.score(rollouts, self.sampling)

    def _own_scores(self, rollouts: Sequence[Rollout], teacher: bool = False) -> list[TokenScores]:
        """log q, and with the teacher KL(q‖p), by a forward of the student as it is."""

        def scoring(batch: Padded, group: list[int]) -> Scoring:
            return self.scoring(
                batch, self._read_by_teacher([rollouts[i] for i in group], [], device) if teacher else None
            )

        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        device = self.args.device
        return score_responses(
            self.model_wrapped, prompts, responses, self.args.per_device_train_batch_size, device, scoring
        )

    def _rescore(self, rollouts: list[Rollout]) -> None:
        """Before the student trains on them: KL(q‖p), where returns are centred on their mean, and where the objective asks for it
        q_old, and with it p̃, instead of the engine's numbers."""
        alpha = self.rollout_config.teacher_mix
        for rollout, scores in zip(rollouts, self._own_scores(rollouts, self._reads_first), strict=True):
            if self._reads_first:
                rollout.reverse_kl = scores.reverse_kl
            if self.objective.old_logprobs == "engine":
                continue
            logq = scores.logq
            if self._is_current(rollout):
                self._note_mismatch(float((logq - rollout.student_logprobs).abs().sum()), len(logq))
            rollout.student_logprobs = rollout.behaviour_logprobs = logq
            if alpha and rollout.teacher_logprobs is not None:
                mixed = torch.logaddexp(logq + math.log1p(-alpha), rollout.teacher_logprobs + math.log(alpha))
                rollout.behaviour_logprobs = mixed
        lost = [r for r in rollouts if r.reverse_kl is not None and not r.reverse_kl.isfinite().all()]
        self.stop_at([f"KL(q‖p) is not finite on {self._named(lost)}"] if lost else [])

    def _adopt(self, number: int, rollouts: list[Rollout]) -> None:
        self._batch_number, self._rollouts = number, rollouts
        self._baselines = torch.zeros(len(rollouts))
        if self._centred:
            self._baselines = baselines(self._sampled(rollouts), self.objective, self.global_sum).float()

    @staticmethod
    def _sampled(rollouts: Sequence[Rollout]) -> SampledTokens:
        return SampledTokens(
            torch.cat([r.student_logprobs for r in rollouts]),
            torch.cat([r.behaviour_logprobs for r in rollouts]),
            torch.cat([r.teacher_logprobs for r in rollouts if r.teacher_logprobs is not None]),
            torch.tensor([len(r.response_ids) for r in rollouts]),
            torch.cat(known)
            if len(known := [r.reverse_kl for r in rollouts if r.reverse_kl is not None]) == len(rollouts)
            else None,
        )

    def _prompt_rows(self, number: int) -> list[int]:
        """This process's prompts of rollout batch `number`: passes over the prompts, each in its own seeded order."""
        samples, n = self.rollout_config.samples_per_prompt, len(self._prompts)
        size = self.rollout_config.num_rollouts // samples
        rows = []
        for place in range(number * size, (number + 1) * size):
            lap, at = divmod(place, n)
            if not rows or at == 0:
                order = permutation(n, self.args.seed, "prompts", lap)
            rows += [order[at]] * samples
        return rows[self.accelerator.process_index :: self._processes]

    def _sync(self) -> Engine:
        engine = self.sync()
        if self.rollout_config.teacher_mix and self._sampler is None:
            self._sampler = TeacherMixedSampler(
                engine, self.local_teacher, self.rollout_config.teacher_mix, self._draft_tokens
            )
        return engine

    # Data

    def _tokenize(self, dataset: Sequence[dict[str, Any]]) -> list[list[int]]:
        prompts = [self._prompt_ids(dataset[i]) for i in range(len(dataset))]
        if not prompts:
            raise InputError("train_dataset is empty")
        limit = self.rollout_config.max_prompt_tokens
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        if len(prompts[longest]) > limit:
            raise InputError(
                f"train_dataset row {longest} has {len(prompts[longest])} prompt tokens; rollout.max_prompt_tokens is {limit}"
            )
        return prompts

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        if "prompt_ids" in row:
            return list(row["prompt_ids"])
        if "prompt" not in row:
            raise InputError(f"train_dataset: a row needs prompt or prompt_ids; it has {', '.join(row)}")
        tokenizer: Any = self.processing_class
        if isinstance(row["prompt"], str):
            return encoder_of(tokenizer).document(row["prompt"])
        return encoder_of(tokenizer).chat(row["prompt"], "a prompt of train_dataset")

    def _pack(self, dataset: Iterable[dict[str, Any]] | None) -> TextBlocks | None:
        if dataset is None:
            return None
        if not self.objective.language_model:
            logger.warning("text_dataset is not used: objective.language_model is 0")
            return None
        student: Any = self.model
        several = keeps_sequences_apart(student)
        if not several:
            logger.warning(
                "%s lets packed documents see each other: a block of text holds one document.", type(student).__name__
            )
        return TextBlocks(
            dataset, self.processing_class, self.objective.language_model_block, self._update_size * self._processes, self.args.seed,
            updates=self.args.max_steps, several=several,
        )  # fmt: skip

    def _text_rows(self, update: int, micro_batches: int) -> list[list[int]]:
        """This process's blocks of text for each micro-batch of an update."""
        if not self._text:
            return [[] for _ in range(micro_batches)]
        rows = self._text.of_update(update)[self.accelerator.process_index :: self._processes]
        each = self.args.per_device_train_batch_size
        return [rows[i * each : (i + 1) * each] for i in range(micro_batches)]

    def _text_tokens(self, blocks: list[int]) -> int:
        return self._text.tokens(blocks) if self._text else 0

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(
            parents=True, exist_ok=True
        )  # rollouts first: a checkpoint is one when the trainer's state is there
        amid = self.state.global_step % self._updates_per_batch > 0
        kept = (
            [
                {**vars(r), "teacher_hidden": None, "teacher_logprobs": None, "teacher_rows": None}
                for r in self._rollouts
            ]
            if amid
            else []
        )
        live = {
            "number": self._batch_number, "rollouts": kept, "draft_tokens": self._draft_tokens,
            "earlier": [vars(rollout) for rollout in self._others.earlier],
        }  # fmt: skip
        torch.save(live, folder / _ROLLOUTS.format(rank=self.accelerator.process_index))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With them, because this is called however the weights are loaded (DeepSpeed loads its own)."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(checkpoint)

    def _load_rollouts(self, resume_from_checkpoint: str) -> None:
        files = sorted(Path(resume_from_checkpoint).glob(_ROLLOUTS.format(rank="*")))
        own = Path(resume_from_checkpoint) / _ROLLOUTS.format(rank=self.accelerator.process_index)
        if not files:
            return
        live = torch.load(own if own in files else files[0], weights_only=True)
        self._draft_tokens = live["draft_tokens"]
        self._others.earlier = [Rollout(**fields) for fields in live["earlier"]]
        if not live["rollouts"]:
            return
        if len(files) != self._processes:
            raise InputError(
                f"{resume_from_checkpoint}: saved by {len(files)} process(es) amid a rollout batch; resume with as many, "
                f"not {self._processes}"
            )
        rollouts = [Rollout(**fields) for fields in live["rollouts"]]
        self._score(rollouts)
        self._adopt(live["number"], rollouts)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._ahead is not None:
            self._ahead[1].exception()  # what is being drawn is drawn with the weights it began with
        return super().evaluate(*args, **kwargs)

    def answers(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        with self._checkpoint_on_engine_error():
            return super().answers(prompts)

    def close(self) -> None:
        super().close()
        self._background.shutdown(wait=False, cancel_futures=True)
