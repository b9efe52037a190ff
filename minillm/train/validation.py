"""Validation of the student that is being trained, on responses sampled from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minillm.data.rollouts import Rollout
from minillm.data.seeding import seed_of
from minillm.evaluation.answers import DIVERGENCES, token_divergences
from minillm.evaluation.metrics import HELD_OUT
from minillm.teacher.routed import ExactTeacher
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
            eval_dataset: rows with `prompt_ids` and `references`, and with `teacher` if there are several; the
                trainer's own by default.
            ignore_keys: not used.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Rouge-L in percent against the best reference; the share of finished responses in percent; their length in
            tokens; and, unless the teacher returns log-probabilities only, KL(q‖p) in nats per token on the sampled
            responses.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        own = [rows[i] for i in range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)]
        with self.phase("validation"):
            sampled = self.sample_answers([row["prompt_ids"] for row in own])
            answers = [self._answer(row, rollout) for row, rollout in zip(own, sampled, strict=True)]
            found = {
                metric.key: self.global_sum(metric.scale * sum(map(metric.of_answer, answers))) / len(rows)
                for metric in HELD_OUT
                if metric.per == "answer"
            }
            if isinstance(self.teacher, ExactTeacher):
                found |= self._divergences(self.teacher, [rollout.response_ids for rollout in sampled], own, rows)
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

    def _answer(self, row: Mapping[str, Any], rollout: Rollout) -> dict[str, Any]:
        """A response with what the metrics of an answer read, and with its scores against the references."""
        text = self.student_tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()
        scores = {metric.key: metric.score(text, row["references"]) for metric in HELD_OUT if metric.score is not None}
        return {"ids": rollout.response_ids, "finished": rollout.finished, **scores}

    def divergences_on(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Compare student and teacher along given responses. Every process must call this.

        Args:
            rows: rows with `prompt_ids` and `response_ids`, and with `teacher` if there are several.

        Returns:
            KL(q‖p) and KL(p‖q) of the student as it is, in nats per token, by the names of the metrics.
        """
        assert isinstance(self.teacher, ExactTeacher)
        own = list(rows)[self.accelerator.process_index :: self.accelerator.num_processes]
        with self.phase("validation"):
            return self._divergences(self.teacher, [row["response_ids"] for row in own], own, rows)

    def _divergences(
        self, teacher: ExactTeacher, answers: Sequence[list[int]], own: Sequence[Mapping[str, Any]], rows: Any
    ) -> dict[str, float]:
        """Each metric per token, over the answers of all processes; this one has `answers` to its `own` rows."""
        # With a sharded model every forward involves all processes, so a process with one row fewer than others reads
        # one more, which does not count.
        missing = -(-len(rows) // self.accelerator.num_processes) - len(own)
        prompts = [list(row["prompt_ids"]) for row in own] + [list(rows[0]["prompt_ids"])] * missing
        responses = [list(answer) for answer in answers] + [[0]] * missing
        names = [row.get("teacher") for row in own] + [rows[0].get("teacher")] * missing
        kl = token_divergences(
            self.model_wrapped, teacher, prompts, responses, self.width, self.sampling.temperature, names=names
        )
        tokens = self.global_sum(sum(map(len, answers)))
        return {
            metric.key: self.global_sum(
                sum(float(values[DIVERGENCES.index(metric.key)].sum()) for values in kl[: len(own)])
            )
            / tokens
            for metric in HELD_OUT
            if metric.per == "token"
        }
