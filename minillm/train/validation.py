"""Validation of the student that is being trained, on responses sampled from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minillm.data.rollouts import Rollout
from minillm.data.seeding import seed_of
from minillm.evaluation import metrics
from minillm.evaluation.answers import token_divergences
from minillm.teacher.states import StatesTeacher
from minillm.train.best_checkpoint import METRICS
from minillm.train.student import StudentMixin


class ValidationMixin(StudentMixin):
    """The part of a `transformers.Trainer` that evaluates by sampling.

    With `eval_dataset` (rows with `prompt_ids` and `references`), the evaluation settings of `TrainingArguments`
    validate the student on responses that are sampled from it alone: `eval_rouge_l`, `eval_reverse_kl`,
    `eval_finished`, `eval_length`. `load_best_model_at_end` keeps the best checkpoint by `metric_for_best_model`, one
    of these; Rouge-L by default.
    """

    validation_metrics: Mapping[str, bool | None] = METRICS
    """The metrics of `evaluate` without their prefix, and whether more is better. Subclasses may have others."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample one response per row from the student alone, always with the same seeds, and score it.

        Args:
            eval_dataset: rows with `prompt_ids` and `references`; the trainer's own by default.
            ignore_keys: not used.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Rouge-L in percent against the best reference; the share of finished responses in percent; their length in
            tokens; and, unless the teacher returns log-probabilities only, KL(q‖p) in nats per token on the sampled
            responses.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        own = [rows[i] for i in range(len(rows))][self.accelerator.process_index :: self.accelerator.num_processes]
        with self.phase("validation"):
            sampled = self.sample_answers([row["prompt_ids"] for row in own])
            sums = {"rouge_l": 0.0, "finished": 0.0, "length": 0.0}
            for row, rollout in zip(own, sampled, strict=True):
                text = self.student_tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()
                sums["rouge_l"] += metrics.rouge_l(text, row["references"])
                sums["finished"] += 100 * rollout.finished
                sums["length"] += len(rollout.response_ids)
            found = {name: self.global_sum(total) / len(rows) for name, total in sums.items()}
            if isinstance(self.teacher, StatesTeacher):
                total = self.global_sum(self._total_reverse_kl(self.teacher, sampled, rows))
                found["reverse_kl"] = total / self.global_sum(sums["length"])
        out = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(out)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, out)
        return out

    def sample_answers(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """One response per prompt from the student with its current weights, always with the same seeds."""
        engine = self.sync()
        seeds = [seed_of("validation", *prompt) for prompt in prompts]
        sampled = engine.generate(prompts, replace(self.sampling, top_logprobs=0), seeds)
        engine.sleep()
        return sampled

    def _total_reverse_kl(self, teacher: StatesTeacher, sampled: Sequence[Rollout], rows: Any) -> float:
        """The sum of KL(q‖p) over the tokens of this process's responses, in nats."""
        # With a sharded model every forward involves all processes, so a process with one row fewer than others reads
        # one more, which does not count.
        missing = -(-len(rows) // self.accelerator.num_processes) - len(sampled)
        prompts = [r.prompt_ids for r in sampled] + [list(rows[0]["prompt_ids"])] * missing
        responses = [r.response_ids for r in sampled] + [[0]] * missing
        kl = token_divergences(self.model_wrapped, teacher, prompts, responses, self.width, self.sampling.temperature)
        return sum(float(reverse.sum()) for reverse, _ in kl[: len(sampled)])
