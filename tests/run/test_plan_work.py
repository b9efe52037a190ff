"""The plan counts the rows, updates and validations that a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments

from minillm.models.shape import shape_of
from minillm.rollout.worker import Worker
from minillm.run.plan import work
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import plan
from minillm.run.plan.work import Lengths, StageTraining
from minillm.run.recipe_file import load_recipe
from minillm.run.training_arguments import argument
from minillm.train.schedule import BatchSchedule
from tests.run.plans import on_disk, phase, recipe, rows_file


@pytest.mark.parametrize(
    "given",
    [
        {"eval_strategy": "steps"},
        {"eval_strategy": "steps", "eval_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 0.3},
        {"eval_strategy": "steps", "logging_steps": 3},
        {"eval_strategy": "steps", "logging_steps": 0.25, "eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 6},
        {"eval_strategy": "steps", "eval_steps": 100},
        {"eval_strategy": "steps", "eval_steps": 100, "eval_delay": 100},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "epoch", "eval_delay": 2},
        {"eval_strategy": "no"},
        {},
        {"eval_on_start": True},
    ],
)
@pytest.mark.parametrize(("updates", "per_epoch"), [(10, 4), (12, 4), (1, 7)])
def test_validations_are_as_many_as_transformers_makes(
    given: dict[str, Any], updates: int, per_epoch: int, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"logging_steps": 1} | given
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **chosen)
    state, flow = TrainerState(max_steps=updates), DefaultFlowCallback()
    state.compute_steps(arguments, updates)
    made = int(arguments.eval_on_start)
    for step in range(1, updates + 1):
        state.global_step, state.epoch = step, step / per_epoch
        made += flow.on_step_end(arguments, state, TrainerControl()).should_evaluate
        if step % per_epoch == 0 or step == updates:
            made += flow.on_epoch_end(arguments, state, TrainerControl()).should_evaluate
    assert work.validations(given, updates, per_epoch) == made


@pytest.mark.parametrize("stage", ["finetune", "warmup", "sft", "minillm"])
def test_a_stage_without_eval_steps_is_validated_at_every_update(stage: str, tmp_path: Path) -> None:
    """It logs at every update, and transformers validates as often as it logs."""

    def seconds(**more: Any) -> float:
        training = {"max_steps": 20, "per_device_train_batch_size": 8, "bf16": True, "eval_strategy": "steps", **more}
        given = recipe(
            tmp_path,
            stages=[stage],
            data={"train": "a", "heldout": "b", "validation": "c", "validation_limit": 64},
            finetune=training,
            warmup={"training": training},
            sft=training,
            training=training,
        )
        return plan(given, Machine()).hours

    none = seconds(eval_strategy="no")
    assert seconds() - none == pytest.approx(20 * (seconds(eval_steps=500) - none))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        # 40 prompts × 2 samples are two batches of 32, each with 2 updates in each of 2 inner epochs
        ({}, 3 * 2 * 4),
        ({"max_steps": -1}, 3 * 2 * 4),
        ({"num_train_epochs": 0.7}, 6),
        ({"num_train_epochs": 1, "max_steps": 5}, 5),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_train_epochs": 1}, 2 * 16),
    ],
)
def test_updates_without_max_steps_are_passes_over_the_prompts(
    training: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    given = load_recipe(
        on_disk(
            tmp_path,
            training=sizes | training,
            rollout={"num_rollouts": 32, "samples_per_prompt": 2, "inner_epochs": 2},
        )
    )
    assert StageTraining(given, Machine(), "minillm").updates == expected
    with_steps = given.model_copy(update={"training": sizes | training | {"max_steps": expected}})
    assert plan(given, Machine()).hours == plan(with_steps, Machine()).hours


def test_the_plans_epoch_is_the_trainers(tmp_path: Path) -> None:
    given = load_recipe(on_disk(tmp_path, rollout={"num_rollouts": 24, "inner_epochs": 3, "teacher_mix": 0}))
    for processes in (1, 3):
        schedule = BatchSchedule(given.rollout, 8, 1, worker=Worker(processes=processes))
        training = StageTraining(given, Machine(processes), "minillm")
        assert training.updates_per_epoch == schedule.updates_per_epoch(40)


def test_rows_are_those_that_the_run_reads(tmp_path: Path) -> None:
    def supervised(*overrides: str) -> list[int]:
        training = {"num_train_epochs": 1, "per_device_train_batch_size": 8}
        stages = ["finetune", "responses", "warmup", "sft"]
        given = load_recipe(
            on_disk(tmp_path, stages=stages, finetune=training, sft=training, warmup={"training": training}), overrides
        )
        return [StageTraining(given, Machine(3), stage.name).updates for stage, _ in given.trainings()]

    # Of 40 rows, 24 fill an update: the warm-up leaves out the other 16, TRL's trainer does not.
    assert supervised() == [2, 1, 2]
    assert supervised("data.limit=24") == [1, 1, 1]
    assert supervised("responses.samples_per_prompt=3") == [2, 5, 2]
    assert supervised("responses.samples_per_prompt=3", "warmup.targets=references") == [2, 1, 2]
    chats = [{"messages": [{"role": role, "content": "z" * 40} for role in ("user", "assistant") * 5]}] * 12
    assert supervised("data.train=" + rows_file(tmp_path / "chats.jsonl", chats)) == [3, 2, 3]  # 60 answers
    half = [{"instruction": "x", "output": "y" * (row % 2)} for row in range(48)]
    assert supervised("data.train=" + rows_file(tmp_path / "half.jsonl", half)) == [1, 2, 1]  # 24 rows have a reference
    responses = rows_file(
        tmp_path / "responses.jsonl", [{"row": row, "prompt_ids": [1], "response_ids": [1] * 7} for row in range(96)]
    )
    assert supervised("responses.file=" + responses) == [2, 4, 2]
    given = load_recipe(on_disk(tmp_path), ["responses.file=" + responses])
    assert work.trained_rows(given, "warmup").answer_tokens == 7
    assert work.trained_rows(given, "sft").answer_tokens == 11  # 40 letters and the end token


def test_evaluation_counts_the_rows_within_the_limit_and_every_seed(tmp_path: Path) -> None:
    # Without vLLM, which reads a prompt once for all seeds.
    def flops(*overrides: str) -> float:
        given = load_recipe(on_disk(tmp_path, stages=["evaluate"]), overrides)
        return sum(phase.flops for phase in plan(given, Machine(vllm=False)).phases)

    assert flops("data.limit=10") == pytest.approx(flops() / 4)
    assert flops("evaluate.seeds=[1, 2, 3, 4, 5, 6]") == pytest.approx(2 * flops())


def test_vllm_reads_a_prompt_of_several_responses_once(tmp_path: Path) -> None:
    lengths = Lengths(prompt=100.0, response=20.0)

    def rollouts(samples: int, engine: str, gpu: bool) -> float:
        rollout = {"num_rollouts": 64, "samples_per_prompt": samples, "engine": engine, "teacher_mix": 0}
        given = recipe(tmp_path, rollout=rollout, objective={"preset": "recommended", "long_term": 0.0})
        return phase(plan(given, Machine(gpu=gpu), lengths), "rollouts").flops

    student = shape_of(recipe(tmp_path).student.source).dimensions
    for gpu, block in ((True, 16), (False, 32)):
        # The last block of a prompt is read again: 1 to all of its tokens.
        known = student.forward([100 - (block + 1) / 2])
        saved = rollouts(1, "vllm", gpu) - rollouts(4, "vllm", gpu)
        assert saved == pytest.approx(64 * 3 / 4 * known, rel=1e-6)  # 10 updates of 8 are one batch
        assert rollouts(4, "transformers", gpu) == rollouts(1, "transformers", gpu)


def test_lengths_that_are_known_are_planned_with(tmp_path: Path) -> None:
    def seconds(lengths: Lengths | None, tokens: int) -> list[float]:
        given = recipe(tmp_path, rollout={"num_rollouts": 64, "max_new_tokens": tokens})
        return [each.flops for each in plan(given, Machine(), lengths).phases]

    prompt = work.rows(recipe(tmp_path), "train").prompt_tokens
    assert seconds(None, 128) == seconds(Lengths(), 128) == seconds(Lengths(response=64.0), 128)
    assert seconds(Lengths(prompt, 64.0), 64) == seconds(None, 128)
    longer = seconds(Lengths(prompt, 128.0), 128)
    assert all(one > 1.2 * other for one, other in zip(longer, seconds(None, 128), strict=True))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", 11_435),
        ("train[:1000]", 1000),
        ("train[500:1000]", 500),
        ("train[1000:]", 11_435),
        ("train[-300:]", 300),
        ("train[:10%]", 1143),
        ("train[:-435]", 11_000),
        ("train[:20000]", 20_000),
        ("train[:100]+test[:50]", 150),
    ],
)
def test_a_data_set_that_is_not_read_has_the_rows_of_its_slice(split: str, expected: int, tmp_path: Path) -> None:
    given = recipe(tmp_path, data={"train": {"dataset": "x/y", "split": split}, "heldout": "b"})
    assert work.rows(given, "train").prompts == expected
    capped = recipe(tmp_path, data={"train": {"dataset": "x/y", "split": split}, "heldout": "b", "limit": 120})
    assert work.rows(capped, "train").prompts == min(expected, 120)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    names = "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps eval_delay"
    for name in names.split():
        assert argument({}, name) == getattr(arguments, name)
