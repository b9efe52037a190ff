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
                totals = self._divergences(self.teacher, sampled, own, rows)
                tokens = self.global_sum(sum(len(rollout.response_ids) for rollout in sampled))
                found |= {key: self.global_sum(total) / tokens for key, total in totals.items()}
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

    def _divergences(
        self, teacher: ExactTeacher, sampled: Sequence[Rollout], own: Sequence[Mapping[str, Any]], rows: Any
    ) -> dict[str, float]:
        """The sum of each metric per token over the tokens of this process's responses to its `own` rows, in nats."""
        # With a sharded model every forward involves all processes, so a process with one row fewer than others reads
        # one more, which does not count.
        missing = -(-len(rows) // self.accelerator.num_processes) - len(sampled)
        prompts = [r.prompt_ids for r in sampled] + [list(rows[0]["prompt_ids"])] * missing
        responses = [r.response_ids for r in sampled] + [[0]] * missing
        names = [row.get("teacher") for row in own] + [rows[0].get("teacher")] * missing
        kl = token_divergences(
            self.model_wrapped, teacher, prompts, responses, self.width, self.sampling.temperature, names=names
        )
        return {
            metric.key: sum(float(values[DIVERGENCES.index(metric.key)].sum()) for values in kl[: len(sampled)])
            for metric in HELD_OUT
            if metric.per == "token"
        }
