"""How many responses an update trains on: one setting for any number of processes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.errors import InputError, RecipeError
from minillm.rollout.config import RolloutConfig
from minillm.run import checks
from minillm.run.plan.machine import Machine
from minillm.run.plan.text import plan_report
from minillm.run.plan.work import StageTraining, why_refused
from minillm.run.recipe_file import load_recipe
from minillm.run.training_arguments import with_update_sizes
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from minillm.train.update_size import sizes_of_update
from tests.run.plans import on_disk
from tests.train.common import PROMPTS, arguments

SIZED = {"max_steps": 2, "responses_per_update": 16, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("responses", "processes", "micro_batch", "found"),
    [
        (64, 8, 8, (8, 1)),
        (64, 1, 8, (8, 8)),
        (64, 16, 8, (4, 1)),  # a process has four, whatever the largest micro-batch is
        (24, 2, None, (6, 2)),
        (24, 1, None, (8, 3)),
        (7, 1, None, (7, 1)),
        (22, 1, None, (2, 11)),
        (1, 1, 8, (1, 1)),
    ],
)
def test_micro_batches_and_accumulation_follow(
    responses: int, processes: int, micro_batch: int | None, found: tuple[int, int]
) -> None:
    assert sizes_of_update(responses, processes, micro_batch) == found
    assert found[0] * found[1] * processes == responses


def test_what_does_not_divide_is_refused_with_the_numbers_that_do() -> None:
    with pytest.raises(
        InputError,
        match=r"^responses_per_update: 64 .* by 6 processes alike: set 60 or 66, or launch 1, 2, 4, 8, 16, 32 or 64",
    ):
        sizes_of_update(64, 6)
    with pytest.raises(
        InputError, match=r"^responses_per_update: 4 .* by 8 processes alike: set 8, or launch 1, 2 or 4"
    ):
        sizes_of_update(4, 8)
    with pytest.raises(
        InputError,
        match=r"^per_device_train_batch_size: 8 does not divide the 12 responses of a process in an update \(24 over 2 processes\): set 1, 2, 3, 4, 6 or 12, or",
    ):
        sizes_of_update(24, 2, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.gradient_accumulation_steps=2"], r"command line: training\.gradient_accumulation_steps: it follows from responses_per_update \(16\)"),
        (["training.responses_per_update=0"], r"training\.responses_per_update: a whole number of responses above 0 is needed \(given: 0\)"),
        (["training.responses_per_update=true"], r"above 0 is needed \(given: True\)"),
        (["training.responses_per_updat=8"], r"training\.responses_per_updat: unknown key; did you mean responses_per_update\?"),
    ],
)  # fmt: skip
def test_what_contradicts_it_is_refused_when_the_recipe_is_read(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(on_disk(tmp_path, training=SIZED), overrides)


def test_an_extending_recipe_can_take_it_back(tmp_path: Path) -> None:
    file = on_disk(tmp_path, training=SIZED)
    loaded = load_recipe(file, ["training.responses_per_update=null", "training.gradient_accumulation_steps=2"])
    assert with_update_sizes(loaded.training, 8) == loaded.training
    assert "responses_per_update" not in loaded.training
    assert loaded.training["gradient_accumulation_steps"] == 2


def test_the_plan_the_checks_and_the_stage_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = on_disk(tmp_path, training=SIZED, rollout={"num_rollouts": 64, "engine": "transformers"})
    given = load_recipe(file)
    for processes, sizes in ((1, (4, 4)), (2, (4, 2)), (8, (2, 1))):
        training = StageTraining(given, Machine(processes), "minillm")
        assert (training.micro_batch_size, training.accumulation_steps) == sizes
        assert training.responses_per_update == 16
        resolved = with_update_sizes(given.training, processes)
        assert (resolved["per_device_train_batch_size"], resolved["gradient_accumulation_steps"]) == sizes
        assert "responses_per_update" not in resolved
    planned = why_refused(given, Machine(5))
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(InputError) as refused:
        checks.check_sizes(given)
    assert planned == str(refused.value)
    assert planned is not None
    assert planned.startswith("training.responses_per_update: 16 responses cannot be shared by 5 processes alike")

    def override(changes: list[str]) -> Any:
        return load_recipe(file, changes)

    text = plan_report(given, Machine(5), "nothing", override)
    assert f"the run refuses this: {planned}" in text
    text = plan_report(given, Machine(2), "nothing", override)
    assert "responses in a weight update (micro-batch × accumulation × processes): minillm 16 (4 × 2 × 2)" in text


def test_the_trainers_take_it(pair: tuple[str, str], tmp_path: Path) -> None:
    given = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    rollout = RolloutConfig(engine="transformers", num_rollouts=12, max_new_tokens=4, max_prompt_tokens=8)
    trainer = MiniLLMTrainer(*pair, given, train_dataset=PROMPTS, rollout=rollout, responses_per_update=6)
    assert (trainer.schedule.update_size, trainer.args.gradient_accumulation_steps) == (6, 3)
    assert given.gradient_accumulation_steps == 1  # the user's own arguments are left as they are
    rows = [{"prompt_ids": [2, 3], "response_ids": [4, 1]}] * 12
    supervised = SupervisedTrainer(*pair, given, train_dataset=rows, responses_per_update=4)
    assert sum(len(rows) for rows, _ in supervised.micro_batches(0)) == 4
    twice = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match=r"args\.gradient_accumulation_steps: it follows from responses_per_update"):
        MiniLLMTrainer(*pair, twice, train_dataset=PROMPTS, rollout=rollout, responses_per_update=6)
    with pytest.raises(InputError, match=r"per_device_train_batch_size: 2 does not divide the 3 responses"):
        MiniLLMTrainer(*pair, given, train_dataset=PROMPTS, rollout=rollout, responses_per_update=3)
