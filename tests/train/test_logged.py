"""Every number that trainers really log is explained in `minillm.train.logged`, which the documents are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from minillm.loss.config import DivergenceConfig, Objective
from minillm.train.alpha import AlphaConfig
from minillm.train.finetune import FineTuner
from minillm.train.logged import LOGGED, PHASES
from minillm.train.pretraining import PretrainingTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.train.common import arguments, train

ROWS = [{"prompt_ids": [2, 5 + i, 3], "response_ids": [9 + i, 10 + i, 1]} for i in range(8)]
HELD_OUT = [{"prompt_ids": [2, 7, 3], "references": ["w5"]}] * 2
TEXT = [{"text": " ".join(f"w{(i * j + i) % 28}" for j in range(9 + i))} for i in range(20)]
VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
# Said once, when a training ends: transformers documents them.
AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


def unexplained(history: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names in a log that no table explains."""
    found = {name for entry in history for name in entry} - LOGGED.keys() - AT_THE_END - {"step"}
    suffixes = ("_tokens_per_second", "_seconds")
    return {name for name in found if not any(name.removesuffix(end) in PHASES for end in suffixes)}


def test_of_on_policy_training(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = train(
        pair, tmp_path / "a", text_dataset=TEXT, eval_dataset=HELD_OUT,
        objective=Objective.recommended(language_model_block=16, signal_every=1), **VALIDATED,
    )  # fmt: skip
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"reverse_kl", "text_nll", "eval_rouge_l", "long_term_signal", "rollout_seconds"} <= logged
    assert unexplained(trainer.state.log_history) == set()
    objective = Objective.recommended(long_term=0.0, divergence=DivergenceConfig(name="total_variation"))
    trainer = train(pair, tmp_path / "b", objective=objective, max_steps=1)
    assert unexplained(trainer.state.log_history) == set()


def test_of_supervised_training(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = SupervisedTrainer(
        *pair, arguments(tmp_path, max_steps=1), train_dataset=ROWS, divergence=DivergenceConfig(name="total_variation")
    )
    trainer.train()
    assert unexplained(trainer.state.log_history) == set()
    tuner = FineTuner(pair[0], arguments(tmp_path / "trl", max_steps=1), train_dataset=ROWS)
    tuner.train()
    assert unexplained(tuner.state.log_history) == set()
    pretraining = PretrainingTrainer(
        *pair, arguments(tmp_path / "text", max_steps=1), text_dataset=TEXT, block=16, alpha=AlphaConfig(value=0.5)
    )
    pretraining.train()
    assert unexplained(pretraining.state.log_history) == set()


@pytest.mark.parametrize("name", ["reverse_kI", "nothing_seconds", "rollout_minutes"])
def test_a_name_that_nothing_explains_is_noticed(name: str) -> None:
    assert unexplained([{name: 1.0}]) == {name}
