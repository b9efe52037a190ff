"""MiniLLMTrainer: distillation on responses that the student samples."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from minillm.data.batches import Padded
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.loss.config import Objective
from minillm.loss.credit import needs_sampled_rewards_first
from minillm.loss.in_forward import Scoring, score_responses
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.teacher_spans import Teacher
from minillm.loss.terms import extra_divergence
from minillm.loss.token_scores import TokenScores
from minillm.models.device import release_cpu_memory
from minillm.models.lora import check_adapter
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.rollout.engines.choose import supports_overlap
from minillm.rollout.replay import ReplayedAndGiven
from minillm.rollout.source import RolloutSource, SampledBatch
from minillm.rollout.worker import Worker
from minillm.teacher.base import score_missing
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import ExactTeacher, RoutedTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.train.assembly import keep_first_scores, pad_micro_batch, take_scores, teacher_inputs
from minillm.train.base import DistillationTrainer
from minillm.train.batch_credit import BatchCredit
from minillm.train.checks import check_logprob_teacher, check_on_policy, check_routing
from minillm.train.datasets import check_context, longest_scored, pack_text_dataset, tokenize_prompts
from minillm.train.journal import digests
from minillm.train.memory import memory_named
from minillm.train.pair import TeacherSource, teacher_names
from minillm.train.rollout_checkpoint import RolloutCheckpoint, saved_on_engine_error
from minillm.train.rollout_guard import RolloutGuard
from minillm.train.schedule import BatchSchedule, MicroBatch
from minillm.train.signal_monitor import SignalMonitor
from minillm.train.trl_names import reads_trl_configs


class MiniLLMTrainer(DistillationTrainer):
    """Minimises KL(q‖p) on the student's own samples (MiniLLM, arXiv 2306.08543).

    Every `inner_epochs · num_rollouts / update size` updates, new responses are sampled with the current weights, and
    the teacher scores them once. An epoch is one pass over the prompts. An update trains on `responses_per_update`
    responses, or else on `per_device_train_batch_size · gradient_accumulation_steps · processes`.

    Args:
        model: the student: a folder, a hub id or a loaded model. A student given by name is loaded in float32.
        teacher: the teacher, given in the same ways, with the student's vocabulary; or a `ServedTeacher`; or None for
            the base model of a student with a LoRA adapter, with the adapter disabled; or a mapping of several by name.
            Each rollout is scored by the teacher that the row of its prompt names in `teacher`.
        args: the arguments of the training. TRL's for distillation say the objective and the rollouts too.
        objective: the loss; `Objective.recommended()` by default.
        rollout: how responses are sampled.
        train_dataset: rows as `tokenize_prompts` reads them; with `teacher` for several, as in the other data sets.
        text_dataset: rows with `text`, for the language-model term; each update reads as many blocks as responses.
        responses: rows with `prompt_ids` and `response_ids`, for `rollout.on_policy` below 1.
        processing_class: the student's tokenizer; by default the one in its folder.
        engine: an engine that samples, with a teacher where one is mixed in; by default one is started at first use.
        **kwargs: further parameters of `DistillationTrainer`, such as `responses_per_update`, and TRL's names.

    Attributes:
        rollouts: this process's rollouts of the current batch.
        credit: what the batch is compared with: prices of its tokens, and baselines of its returns.
        source: where rollouts come from.
        schedule: which rollouts and which text an update trains on.

    Raises:
        InputError: sizes that do not divide, prompts that do not fit, different tokenizers, settings that conflict.
    """

    teacher: ExactTeacher | ServedLogprobs  # pyright: ignore[reportIncompatibleVariableOverride]

    @reads_trl_configs
    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: TeacherSource,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        rollout: RolloutConfig | None = None,
        train_dataset: Sequence[dict[str, Any]],
        text_dataset: Iterable[dict[str, Any]] | None = None,
        responses: Sequence[dict[str, Any]] | None = None,
        processing_class: Any = None,
        engine: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = objective or Objective.recommended()
        config = rollout or RolloutConfig()
        rows = {"train_dataset": train_dataset, "responses": responses, "eval_dataset": kwargs.get("eval_dataset")}
        check_routing(teacher_names(teacher), rows, config, self.objective, text_dataset is not None)
        check_on_policy(
            config,
            self.objective,
            served_teacher=isinstance(teacher, ServedTeacher),
            sharded_teacher=bool(kwargs.get("shard_teacher")),
            can_overlap=engine is not None or supports_overlap(config.engine),
            can_mix=engine is None or engine.capabilities.mixes_teacher,
            text=text_dataset is not None,
            responses=bool(responses),
        )
        super().__init__(
            model,
            teacher,
            args,
            processing_class=processing_class,
            temperature=config.temperature,
            rollout=config,
            engine=engine,
            train_dataset=train_dataset,
            longest=longest_scored(config, self.objective, text_dataset is not None, responses or []),
            **kwargs,
        )
        if isinstance(self.teacher, ServedLogprobs):
            check_logprob_teacher(config, self.objective, args)
            self.sampling = replace(self.sampling, top_logprobs=self.teacher.top_k)
        self.text_temperature = self.objective.language_model_temperature
        self._set_up_data(config, train_dataset, text_dataset, responses or [])
        self.credit = BatchCredit(self.objective, self.sampling.eos_ids, self.global_sum, self.metrics.gather)
        self.end_ids = self.credit.end_ids
        # Otherwise log p of the sampled tokens comes with their scores.
        trainers_mixture = self.objective.old_logprobs == "trainer" and config.teacher_mix > 0
        self._logp_first = needs_sampled_rewards_first(self.objective) or trainers_mixture
        self._guard, self._skipping = RolloutGuard(self), False  # whether the batch is not trained on
        self._signal = SignalMonitor(self.objective.signal_every, self.metrics)
        self._batch_number = -1
        self._batch_metrics: dict[str, tuple[float, float]] = {}  # logged with every update on the batch
        self.rollouts: list[Rollout] = []

    def _set_up_data(
        self,
        config: RolloutConfig,
        train_dataset: Sequence[dict[str, Any]],
        text_dataset: Iterable[dict[str, Any]] | None,
        responses: Sequence[dict[str, Any]],
    ) -> None:
        """Prepare the schedule, the text and the rollout source."""
        args, objective = self.args, self.objective
        worker = Worker(args.seed, self.accelerator.process_index, self.accelerator.num_processes)
        sizes, by_update = (args.per_device_train_batch_size, args.gradient_accumulation_steps), objective.normalise
        self.schedule = BatchSchedule(config, *sizes, worker=worker, by_update=by_update == "update_tokens")
        prompts = tokenize_prompts(train_dataset, self.student_tokenizer, config.max_prompt_tokens)
        routed = isinstance(self.teacher, RoutedTeacher)
        check_adapter(self._student)
        check_context(config, self._student)
        self.text = pack_text_dataset(
            text_dataset, self._student, self.student_tokenizer, objective, args, self.schedule.update_size
        )
        self.source = RolloutSource(
            config,
            prompts,
            ReplayedAndGiven(config, responses, self.sampling.eos_ids, worker, routed=routed),
            score_given=lambda given: [scores.logq for scores in self.student_scores(given)],
            worker=worker,
            teacher_of=(lambda row: train_dataset[row]["teacher"]) if routed else None,
        )

    def updates_per_epoch(self) -> int:
        """Updates in one pass over the prompts."""
        return self.schedule.updates_per_epoch(len(self.source.prompts))

    def micro_batches(self, update: int) -> list[MicroBatch]:
        """The micro-batches of an update. The first update on a batch samples that batch with the current weights."""
        position = self.schedule.position(update)
        if position.batch != self._batch_number:
            self._start_batch(position.batch)
        if self._skipping:
            self.skipped_updates += not position.first  # the first was counted when the batch was refused
            return [MicroBatch([], [], 1.0, 1.0, False)] * self.args.gradient_accumulation_steps
        for name, (total, count) in self._batch_metrics.items():
            self.metrics.add_mean(name, total, count)
        batches = self.schedule.micro_batches(update, self.rollouts, self.text, self.global_sum)
        self._signal.begin(update, len(batches))
        return batches

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, an item of `micro_batches`; returns the loss."""
        device, rollouts = self.args.device, [self.rollouts[i] for i in inputs.rollouts]
        if not rollouts:
            return torch.zeros((), device=device)  # of a batch that is skipped
        batch, pieces = pad_micro_batch(rollouts, inputs.text, self.text, self.objective.language_model_block, device)
        teacher = self._teacher_inputs(rollouts, pieces)
        sampled, baseline = self.credit.tokens(rollouts, inputs.rollouts)
        loss = OnPolicyLoss(
            self.objective,
            sampled.to(device),
            baseline=baseline.to(device),
            count=inputs.count,
            text_count=inputs.text_count,
            slots=len(rollouts) * self.sampling.max_new_tokens,
            total=self.global_sum,
        )
        divergence, sketch = extra_divergence(self.objective.divergence), self._signal.sketch(sampled)
        value = self.update_on(model, batch, loss, teacher, self.accelerator.num_processes, divergence, sketch)
        self._signal.add(sketch)
        keep_first_scores(rollouts, loss.reverse_kl, loss.advantages)
        sums = loss.tally.sums
        by_engine = self.objective.old_logprobs == "engine" and all(map(self._is_current, rollouts))
        self._guard.judge(sums, inputs, fresh=inputs.first_use and by_engine)
        self.metrics.add_sums({name: total for name, total in sums.items() if name != "log_ratio"})
        return value

    def rows_of(self, micro_batch: MicroBatch) -> str:
        """The rows of the data that a micro-batch holds, in words."""
        return self._guard.rows_of(micro_batch)

    def contents_of(self, micro_batch: MicroBatch) -> list[dict[str, Any]]:
        """What a micro-batch holds, for the file of a refused update."""
        return self._guard.contents_of(micro_batch)

    def _teacher_inputs(self, rollouts: Sequence[Rollout], text: Sequence[array[int]]) -> Teacher:
        """The teacher's states, or its rows, for the tokens of rollouts followed by pieces of text."""
        states = None
        if text and self.objective.language_model_distill:
            prompts, responses = [ids[:1] for ids in text], [ids[1:] for ids in text]
            states = self.states_of_teacher(prompts, responses, [None] * len(text))
        return teacher_inputs(self.teacher, rollouts, text, states, self.args.device)

    @property
    def mixed_teacher(self) -> LocalTeacher | None:
        """The teacher that the engine holds beside the student, if it is mixed in."""
        return self.teacher if self.rollout_config.teacher_mix and isinstance(self.teacher, LocalTeacher) else None

    @property
    def _mixed_sampling(self) -> Sampling:
        """How rollouts are sampled for training: from the mixture. (Validation samples the student alone.)"""
        return replace(self.sampling, teacher_mix=self.rollout_config.teacher_mix)

    def _start_batch(self, number: int) -> None:
        """Sample batch `number`, complete it, have the teacher score it, and compute what it is compared with."""
        release_cpu_memory(self.args.device)
        with self._checkpoint_on_engine_error():
            sampled = self._sample(number)
        self._note_sampling(sampled)
        rollouts = self.source.complete(number, sampled.rollouts)
        self._skipping = self._guard.refuses(rollouts)  # before anything reads them
        if not self._skipping:
            with self._checkpoint_on_engine_error():
                self._score_by_teacher(rollouts)
        if not self._skipping and self._needs_rescoring(rollouts):
            with self.phase("rescoring", sampled.num_tokens):
                self._skipping = self._rescore(rollouts)
        self.use_batch(number, rollouts)
        release_cpu_memory(self.args.device)
        ahead = self.rollout_config.overlap and (number + 1) * self.schedule.updates_per_batch < self.state.max_steps
        if ahead:
            with self._checkpoint_on_engine_error():
                self.sync()
        # Only after `sync` has succeeded: if the engine is lost there, a resume samples this batch again.
        self.source.others.keep([] if self._skipping else sampled.rollouts)
        if ahead:
            assert self._engine is not None
            self.source.sample_ahead(number + 1, self._engine, self._mixed_sampling)

    def _sample(self, number: int) -> SampledBatch:
        """This process's rollouts of batch `number`, sampled ahead or now."""
        ahead = self.source.take_ahead(number)
        if ahead is not None:
            with self.phase("waiting"):
                return ahead.result()
        engine = self.sync()
        with memory_named("rollout", self.args, self.state.global_step):
            sampled = self.source.sample(number, engine, self._mixed_sampling)
        engine.sleep()
        return sampled if self.credit.scores_first else sampled.without_reverse_kl()

    def _note_sampling(self, sampled: SampledBatch) -> None:
        self.utilisation.sampled(sampled.rollouts, self._engine, mixed=self.rollout_config.teacher_mix > 0)
        self.metrics.add_seconds("rollout", sampled.seconds, sampled.num_tokens)
        self._batch_metrics = sampled.means(self.state.global_step) | self._guard.look(sampled.rollouts)
        self.journal.write("batch", update=self.state.global_step + 1, **digests(sampled.rollouts))

    def _score_by_teacher(self, rollouts: Sequence[Rollout]) -> None:
        missing = [rollout for rollout in rollouts if rollout.teacher is None]
        sequences, names = [(r.prompt_ids, r.response_ids) for r in missing], [r.teacher_name for r in missing]
        with self.phase("teacher", self.utilisation.read_by_teacher(sequences, names)):
            score_missing(self.teacher, rollouts, self.sampling)
            if self._logp_first and not isinstance(self.teacher, ServedLogprobs):
                self.teacher.add_token_logprobs(rollouts, self.sampling)

    def student_scores(self, rollouts: Sequence[Rollout], teacher: bool = False) -> list[TokenScores]:
        """Scores of each rollout's tokens by a forward of the student with its current weights, without gradient.

        Args:
            rollouts: the rollouts.
            teacher: whether to compute KL(q‖p) too, for which the teacher must have scored the rollouts.
        """

        def scoring(batch: Padded, group: list[int]) -> Scoring:
            return self.scoring(batch, self._teacher_inputs([rollouts[i] for i in group], []) if teacher else None)

        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        return score_responses(
            self.model_wrapped, prompts, responses, self.args.per_device_train_batch_size, self.args.device, scoring
        )

    def _needs_rescoring(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether a forward of the student has to come before the updates on a batch, in any process."""
        lacking = self.credit.lacks_scores(rollouts)
        return self.objective.old_logprobs == "trainer" or self.global_sum(float(lacking)) > 0

    def _rescore(self, rollouts: Sequence[Rollout]) -> bool:
        """Score a batch with the student before it trains on it.

        This gives KL(q‖p), which centred returns need. If the objective asks for the trainer's own q_old, the trainer's
        log q replaces the engine's, and p̃ is computed from it. Returns whether the batch is to be skipped, because the
        two differ too much.
        """
        first, by_trainer = self.credit.scores_first, self.objective.old_logprobs == "trainer"
        scores = self.student_scores(rollouts, first)
        fresh = [(r, found.logq) for r, found in zip(rollouts, scores, strict=True) if self._is_current(r)]
        mismatched = by_trainer and self._guard.refuses_scores(fresh)
        take_scores(rollouts, scores, self.rollout_config.teacher_mix, kl=first, logq=by_trainer)
        return mismatched

    def use_batch(self, number: int, rollouts: list[Rollout]) -> None:
        """Make scored rollouts the batch that the next updates train on; or none, if the batch is refused."""
        self._skipping = self._skipping or self._guard.refuses(rollouts)
        self._batch_number, self.rollouts = number, [] if self._skipping else rollouts
        self.credit.start(self.rollouts)

    def _is_current(self, rollout: Rollout) -> bool:
        """Whether the current weights sampled the rollout."""
        return rollout.weights_version == self.state.global_step

    def _checkpoint_on_engine_error(self) -> AbstractContextManager[None]:
        """If any process loses its engine, save in all, then raise in all. A resume samples the batch again."""
        return saved_on_engine_error(self.global_sum, self._save_if_begun)

    def _save_if_begun(self) -> None:
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)

    # Checkpoints and validation

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        # Rollouts come first: a checkpoint counts as complete once the trainer's state is there.
        folder.mkdir(parents=True, exist_ok=True)
        within_batch = step % self.schedule.updates_per_batch > 0
        unfinished = self.rollouts if within_batch else []
        state = self.credit.state(finished=not within_batch)
        checkpoint = RolloutCheckpoint(self._batch_number, unfinished, self.source.others.buffer, state)
        checkpoint.save(folder, self.accelerator.process_index, self.accelerator.num_processes)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the rollouts too. Unlike the methods that load weights, this one is called with DeepSpeed as well."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        saved = RolloutCheckpoint.load(Path(checkpoint), rank, processes)
        if saved is None:
            return
        self.source.others.buffer = saved.replay
        self.credit.load_state(saved.credit)
        if saved.rollouts:
            self._score_by_teacher(saved.rollouts)
            self.use_batch(saved.number, saved.rollouts)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; see `ValidationMixin`.

        A batch that is being sampled has to be completed with the weights it began with, so it is awaited first.
        """
        self.source.wait()
        return super().evaluate(*args, **kwargs)

    def sample_answers(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """Sample as `ValidationMixin` does, and save a checkpoint if the engine is lost."""
        with self._checkpoint_on_engine_error():
            return super().sample_answers(prompts)

    def close(self) -> None:
        """Shut the engine down, release the teacher's connections, and stop sampling in the background."""
        super().close()
        self.source.close()
