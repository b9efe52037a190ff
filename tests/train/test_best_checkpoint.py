"""Which checkpoint is the best, and whether that can be known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.train.arguments import check_arguments
from minillm.train.best_checkpoint import METRICS, with_given
from minillm.train.finetune import FineTuner
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_tokenizer
from tests.train.argument_runs import NOWHERE, ROWS, VALIDATION, supervised
from tests.train.common import PROMPTS, ROLLOUT, arguments

BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}

TOLD = ["metric_for_best_model", "greater_is_better"]


def test_what_validation_measures_is_what_it_is_said_to(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(
        *pair, arguments(tmp_path), train_dataset=PROMPTS, rollout=ROLLOUT, eval_dataset=VALIDATION
    )
    assert {name.removeprefix("eval_") for name in trainer.evaluate()} - {"epoch"} == METRICS.keys()
    trainer.close()


@pytest.mark.parametrize("name", ["reverse_kl", "eval_reverse_kl", "rouge_l", None])
def test_the_best_is_the_best_in_the_metrics_own_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    scores = iter([3.0, 1.0, 2.0] if name and name.endswith("reverse_kl") else [1.0, 3.0, 2.0])

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        value = next(scores)
        out = {"eval_rouge_l": value, "eval_reverse_kl": value, "eval_finished": 0.0, "eval_length": 0.0}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, out)
        return out

    monkeypatch.setattr(SupervisedTrainer, "evaluate", evaluate)
    trainer = supervised(tmp_path, max_steps=6, metric_for_best_model=name, **BEST)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("changes", "given", "metric", "better"),
    [
        ({"metric_for_best_model": "finished"}, None, "finished", True),
        (
            {"metric_for_best_model": "rouge_l", "greater_is_better": False},
            None,
            "rouge_l",
            False,
        ),  # set by the user: transformers guesses True
        ({"metric_for_best_model": "reverse_kl", "greater_is_better": True}, TOLD, "reverse_kl", True),
        ({"metric_for_best_model": "reverse_kl"}, ["metric_for_best_model"], "reverse_kl", False),
        ({"metric_for_best_model": "length", "greater_is_better": False}, None, "length", False),
        ({"metric_for_best_model": "length", "greater_is_better": True}, TOLD, "length", True),
        ({}, [], "rouge_l", True),
    ],
)
def test_a_direction_that_is_given_is_kept(
    tmp_path: Path, changes: dict[str, Any], given: list[str] | None, metric: str, better: bool
) -> None:
    args = arguments(tmp_path, **BEST, **changes)
    if given is not None:
        with_given(args, given)
    check_arguments(args, eval_dataset=VALIDATION, reads_teacher=True)
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, better)


@pytest.mark.parametrize(
    ("changes", "rows", "fault"),
    [
        (
            {**BEST, "metric_for_best_model": "rougeL"},
            VALIDATION,
            "metric_for_best_model: .* measure it: did you mean rouge_l",
        ),
        (
            {**BEST, "metric_for_best_model": "eval_loss"},
            VALIDATION,
            "metric_for_best_model: validation does not measure it",
        ),
        (
            {**BEST, "metric_for_best_model": "length"},
            VALIDATION,
            "greater_is_better: whether more of length is better is not known",
        ),
        (BEST, None, "eval_strategy: there are no rows to validate on"),
        (BEST, [], "eval_dataset: there are no rows in it"),
        (BEST, {"a": VALIDATION}, "eval_dataset: one list of rows is needed"),
        (
            {"load_best_model_at_end": True},
            VALIDATION,
            "load_best_model_at_end: must be used with validation",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "rouge_l"},
            VALIDATION,
            "save_strategy: must be used with validation",
        ),
        (
            {**BEST, "save_steps": 4},
            VALIDATION,
            r"save_steps: with load_best_model_at_end it has to be eval_steps \(2\)",
        ),
        (
            {**BEST, "lr_scheduler_type": "reduce_lr_on_plateau"},
            VALIDATION,
            r"lr_scheduler_kwargs: .*: set mode to max \(it is min\)",
        ),
    ],
)
def test_a_best_that_cannot_be_known_is_refused(tmp_path: Path, changes: dict[str, Any], rows: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"(^|\n)(args\.)?{fault}"):
        SupervisedTrainer(
            NOWHERE,
            NOWHERE,
            arguments(tmp_path, **changes),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
            eval_dataset=rows,
        )


def test_reverse_kl_needs_the_teachers_model(tmp_path: Path) -> None:
    args = arguments(tmp_path, **BEST, metric_for_best_model="reverse_kl")
    with pytest.raises(
        ValueError, match=r"args\.metric_for_best_model: reverse_kl needs the teacher's model in this process"
    ):
        FineTuner(NOWHERE, args, train_dataset=ROWS, eval_dataset=VALIDATION)


def test_a_subclass_may_measure_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name} is looked for")

    monkeypatch.setattr("minillm.train.pair.load_tokenizer", load)

    class Measured(SupervisedTrainer):
        validation_metrics = METRICS | {"bleu": True}

    args = arguments(tmp_path, **BEST, metric_for_best_model="bleu")
    with pytest.raises(OSError, match="no/such-model is looked for"):  # there is no other fault
        Measured(NOWHERE, NOWHERE, args, train_dataset=ROWS, processing_class=tiny_tokenizer(), eval_dataset=VALIDATION)
